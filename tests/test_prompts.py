import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpo.rewards import format
from helpers import TINY
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.order import PromptOrder, ranks
from grpo.data.prompts import TEMPLATES, build_prompts, use_chat_template
from grpo.data.rows import load_rows, prepare_rows
from grpo.types import Prompt

ROWS = [{"question": f"What is {i}+1?", "answer": str(i + 1), "level": i} for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    import pandas

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_local_files_load_with_all_their_columns(files: Path, name: str):
    assert load_rows(DataConfig(name=str(files / name))) == ROWS


def test_evaluation_rows_come_from_the_evaluation_file(files: Path):
    (files / "eval.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    config = DataConfig(name=str(files / "rows.jsonl"), eval_name=str(files / "eval.jsonl"))
    assert load_rows(config, evaluation=True) == [{"question": "q", "answer": "a"}]


def test_columns_can_be_named_and_the_answer_cut_out():
    rows = [{"problem": "1+1?", "solution": "Add them.\n#### 2"}]
    config = DataConfig(question_column="problem", answer_column="solution", answer_regex=r"####\s*(.+)")
    (row,) = prepare_rows(rows, config, answer_regex=config.answer_regex, setting="data.name")
    assert (row["question"], row["answer"], row["problem"]) == ("1+1?", "2", "1+1?")


def test_a_question_can_be_made_of_columns_and_other_braces_are_text():
    rows = [{"nums": [3, 4], "target": 7}]
    config = DataConfig(question_template=r"Make {target} of {nums}, in \boxed{}.", answer_column="target")
    (row,) = prepare_rows(rows, config, answer_regex=None, setting="data.name")
    assert (row["question"], row["answer"], row["nums"]) == (r"Make 7 of [3, 4], in \boxed{}.", "7", [3, 4])


def test_a_template_may_show_a_call_in_json():
    call = '<tool>{"name": "python", "arguments": {"code": "print(3)"}}</tool>'
    config = DataConfig(question_template=f"Do as here: {call} {{question}}")
    (row,) = prepare_rows([{"question": "1+1?", "answer": "2"}], config, answer_regex=None, setting="data.name")
    assert row["question"] == f"Do as here: {call} 1+1?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"target": 7},
            "data.question_template is 'of {nums}'; row 0 of data.name has the columns target. Name one of them.",
        ),
        ({"target": 7, "nums": None}, "row 0 of data.name has no nums. Drop the row."),
    ],
)
def test_a_template_without_its_column_is_refused(row: dict, message: str):
    config = DataConfig(question_template="of {nums}", answer_column="target")
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_rows([row], config, answer_regex=None, setting="data.name")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "/nowhere/rows.jsonl"}, "data.name is '/nowhere/rows.jsonl'; there is no such file"),
        ({"name": str(Path(__file__))}, "a local file ends in .json"),
        ({}, "data.name is missing"),
    ],
)
def test_missing_data_is_refused_by_its_setting(settings: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rows(DataConfig(**settings))


def test_a_missing_column_is_refused_with_the_columns_there_are():
    with pytest.raises(
        ValueError, match=r"data.question_column is 'problem'; row 0 of data.name has the columns question, answer"
    ):
        prepare_rows(ROWS, DataConfig(question_column="problem"), answer_regex=None, setting="data.name")


def test_an_answer_that_the_pattern_misses_is_refused_with_its_row():
    with pytest.raises(ValueError, match=r"data.answer_regex is .* row 0 of data.name: '1'"):
        prepare_rows(ROWS, DataConfig(), answer_regex="#### (.*)", setting="data.name")


def test_a_missing_answer_stays_missing_and_a_missing_question_is_refused():
    (row,) = prepare_rows([{"question": "q", "answer": None}], DataConfig(), answer_regex=None, setting="data.name")
    assert row["answer"] == ""
    with pytest.raises(ValueError, match=r"row 0 of data\.name has no question"):
        prepare_rows([{"question": None, "answer": "1"}], DataConfig(), answer_regex=None, setting="data.name")


def test_evaluation_on_another_hub_data_set_uses_its_own_subset_and_pattern(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> list[dict]:
        asked.append((name, subset, split))
        return [{"question": "q", "answer": "work #### 7"}] if name == "a/b" else [{"question": "q", "answer": "7"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    own = DataConfig(name="a/b", subset="main", answer_regex="#### (.+)")
    other = DataConfig(name="a/b", subset="main", answer_regex="#### (.+)", eval_name="c/d", eval_split="validation")
    for config, evaluation in ((own, False), (own, True), (other, True)):
        assert load_rows(config, evaluation=evaluation)[0]["answer"] == "7"
    assert asked == [("a/b", "main", "train"), ("a/b", "main", "test"), ("c/d", None, "validation")]


def test_r1_zero_is_the_papers_text_with_the_question_in_it(tokenizer):
    text = TEMPLATES["r1_zero"].fill("What is {x}?", tokenizer, DataConfig())
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant")
    assert text.endswith("<answer> answer here </answer>. User: What is {x}? Assistant:")


def test_r1_zero_think_begins_the_answer_and_says_so(tokenizer):
    (prompt,), _ = build_prompts(ROWS[:1], tokenizer, DataConfig(template="r1_zero_think"))
    assert prompt.text.endswith("Assistant: <think>")
    assert prompt.prefill == "<think>"


def test_chat_uses_the_tokenizers_template_and_the_system_prompt(tokenizer):
    (prompt,), _ = build_prompts(ROWS[:1], tokenizer, DataConfig(template="chat", system_prompt="Be brief."))
    assert "Be brief." in prompt.text
    assert prompt.text.endswith("User: What is 0+1?\nAssistant:")


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_ids_are_those_of_the_text(tokenizer, template: str):
    prompts, dropped = build_prompts(ROWS, tokenizer, DataConfig(template=template, max_prompt_tokens=1000))
    assert not dropped
    for prompt in prompts:
        assert prompt.token_ids
        assert tokenizer.decode(prompt.token_ids) == prompt.text


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str, **changes: object) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with a chat template, and other settings of its own."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model", **changes)
    tokenizer.chat_template = template
    return tokenizer


def chat_prompt(tokenizer: PreTrainedTokenizerBase, **settings: object) -> Prompt:
    (prompt,), _ = build_prompts(ROWS[:1], tokenizer, DataConfig(template="chat", max_prompt_tokens=10_000, **settings))
    return prompt


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_tokenizer_appends_to_a_text_is_no_part_of_a_prompt(tokenizer, template: str):
    appending = AutoTokenizer.from_pretrained(TINY / "model")
    end = appending.eos_token
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, appending.eos_token_id)]
    )
    assert appending("a")["input_ids"][-1] == appending.eos_token_id
    config = DataConfig(template=template, max_prompt_tokens=1000)
    (expected, _), (prompts, dropped) = (build_prompts(ROWS, each, config) for each in (tokenizer, appending))
    assert not dropped
    assert [prompt.token_ids for prompt in prompts] == [prompt.token_ids for prompt in expected]


def test_a_chat_template_that_does_not_open_the_answer_is_given_the_opening_of_its_own_answers():
    ignoring = CHATML.split("{% if add")[0]
    assert chat_prompt(with_template(ignoring)).text == chat_prompt(with_template(CHATML)).text
    without_opening = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert chat_prompt(with_template(without_opening.replace("]", "] "))).text == "[What is 0+1?] ["
    plain = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}"
    )
    assert chat_prompt(with_template(plain)).text == "[INST] What is 0+1? [/INST]"


def test_prompts_that_end_the_text_are_refused_or_dropped(tokenizer):
    end = tokenizer.eos_token
    for template in (f"{{{{ messages[-1].content }}}}{end}", f"{{{{ messages[-1].content }}}}{end}\n"):
        with pytest.raises(
            ValueError, match=r"1 of 1 prompts end with an end-of-sequence token.*\(data.chat_template\)"
        ):
            chat_prompt(with_template(template))
    rows = [ROWS[0], {"question": f"over{end}", "answer": ""}]
    prompts, dropped = build_prompts(rows, tokenizer, DataConfig(template="none"))
    assert [prompt.row for prompt in prompts] == [0]
    assert dropped == {"prompt ends with an end-of-sequence token": 1}


@pytest.mark.parametrize("ending", ["<think>", "<think>\n", "<think>\n\n</think>\n\n", ""])
def test_the_prefill_is_what_the_prompt_ends_with_whatever_template_wrote_it(ending: str):
    prompt = chat_prompt(with_template(CHATML.replace("assistant\n", f"assistant\n{ending}")))
    assert prompt.text.endswith(f"assistant\n{ending}")
    assert prompt.prefill == ending
    if ending:
        answer = " 1" if "</think>" in ending else " a thought </think> <answer> 1 </answer>"
        assert format(prompt.prefill + answer) == float("</think>" not in ending)


def test_a_chat_template_comes_from_a_file_and_takes_arguments(tmp_path: Path, tokenizer):
    file = tmp_path / "own.jinja"
    file.write_text(CHATML.replace("assistant\n", "assistant\n{{ '' if enable_thinking else '<think></think>' }}"))
    own = AutoTokenizer.from_pretrained(TINY / "model")
    use_chat_template(own, DataConfig(template="chat", chat_template=str(file)))
    assert chat_prompt(own, chat_template_kwargs={"enable_thinking": True}).text.endswith("assistant\n")
    assert chat_prompt(own, chat_template_kwargs={"enable_thinking": False}).prefill == "<think></think>"
    own.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == file.read_text()
    with pytest.raises(ValueError, match=r"chat_template_kwargs.enable_thought is True; .* It reads enable_thinking\."):
        chat_prompt(own, chat_template_kwargs={"enable_thought": True})
    with pytest.raises(ValueError, match=r"data.chat_template is 'no.jinja'; there is no file"):
        use_chat_template(own, DataConfig(template="chat", chat_template="no.jinja"))
    file.write_bytes("{# naïve #}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^data.chat_template is .*own.jinja'; the file cannot be read: .*UTF-8\.$"):
        use_chat_template(own, DataConfig(template="chat", chat_template=str(file)))


def test_prompts_of_conversations_keep_their_messages(tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 0+1?"}]
    assert chat_prompt(with_template(CHATML), system_prompt="Be brief.").messages == talk
    (raw,), _ = build_prompts(ROWS[:1], tokenizer, DataConfig())
    assert raw.messages is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + CHATML,
            "refuses a conversation of the roles system, user: TemplateError: System role not supported. Remove "
            "data.system_prompt",
        ),
        (
            CHATML.replace("%}<|im_start|>", " if m.role != 'system' %}<|im_start|>", 1),
            "the tokenizer's chat template leaves it out",
        ),
        ("{{ messages[0].content | nonsense }}", "No filter named 'nonsense'"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "the tokenizer's chat template has not ended within 0.3 seconds. Name a file with another chat template",
        ),
    ],
    ids=["refuses the system role", "leaves it out", "broken", "endless"],
)
def test_a_chat_template_that_fails_says_why(template: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.data.prompts.TEMPLATE_SECONDS", 0.25)
    with pytest.raises(ValueError, match=re.escape(message)):
        chat_prompt(with_template(template), system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("system_prompt", "remedy"),
    [
        ("Be brief.", "Remove data.system_prompt and say it in"),
        (None, "Say it in the first message of the user, or name"),
    ],
)
@pytest.mark.parametrize("takes", [False, True])
def test_a_template_without_a_system_message_blames_who_wrote_one(system_prompt: str | None, remedy: str, takes: bool):
    system = "" if takes else "{% if messages[0].role == 'system' %}{{ raise_exception('not supported') }}{% endif %}"
    template = system + CHATML.replace("%}<|im_start|>", " if m.role != 'system' %}<|im_start|>", 1)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    config = DataConfig(template="chat", question_column="turns", system_prompt=system_prompt)
    row = {"turns": turns[1:] if system_prompt else turns, "answer": "2"}
    with pytest.raises(ValueError, match=re.escape(remedy)) as error:
        build_prompts(prepare_rows([row], config, answer_regex=None, setting="rows"), with_template(template), config)
    assert ("data.system_prompt" in str(error.value)) == (system_prompt is not None)


def test_too_long_prompts_are_dropped_and_counted(tokenizer):
    rows = [*ROWS, {"question": "long " * 200, "answer": "1"}]
    prompts, dropped = build_prompts(rows, tokenizer, DataConfig(template="none", max_prompt_tokens=50))
    assert [prompt.row for prompt in prompts] == list(range(6))
    assert dropped == {"prompt longer than data.max_prompt_tokens (50)": 1}


def test_a_prompt_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"turns the prompt '' into no tokens at all"):
        build_prompts([{"question": "", "answer": "1"}], tokenizer, DataConfig(template="none"))


def test_dropping_every_prompt_is_refused_with_the_length_that_would_do(tokenizer):
    with pytest.raises(ValueError, match=r"the shortest of 6 prompts has \d+ tokens"):
        build_prompts(ROWS, tokenizer, DataConfig(template="r1_zero", max_prompt_tokens=10))


def order(rank: int = 0, world_size: int = 1, seed: int = 0) -> PromptOrder:
    prompts = [Prompt(i, [i], "", "", {}) for i in range(10)]
    return PromptOrder(prompts, seed=seed, rank=rank, world_size=world_size)


def rows_of(prompts: list[Prompt]) -> list[int]:
    return [prompt.row for prompt in prompts]


def test_an_epoch_deals_every_prompt_once_and_the_next_in_another_order():
    dealer = order()
    first = rows_of(dealer.draw(5) + dealer.draw(5))
    second = rows_of(dealer.draw(3) + dealer.draw(7))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_depends_only_on_seed_and_position():
    dealer = order()
    batches = [rows_of(dealer.draw(4)) for _ in range(6)]
    resumed = order()
    resumed.position = 12
    assert rows_of(resumed.draw(4)) == batches[3]
    assert rows_of(order(seed=1).draw(4)) != batches[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_processes_together_deal_the_same_prompts_as_one(world_size: int):
    alone, shared = order(), [order(rank, world_size) for rank in range(world_size)]
    for _ in range(6):
        assert sorted(rows_of(alone.draw(4))) == sorted(r for s in shared for r in rows_of(s.draw(4)))


def leveled(
    order_by: str, levels: list[Any], *, rank: int = 0, world_size: int = 1, epochs: int = 1, seed: int = 0
) -> PromptOrder:
    prompts = [Prompt(i, [i], "", "", {"question": "?", "level": level}) for i, level in enumerate(levels)]
    places = ranks(prompts, DataConfig(order_by=order_by))
    return PromptOrder(prompts, seed=seed, rank=rank, world_size=world_size, ranks=places, ranked_epochs=epochs)


@pytest.mark.parametrize(
    "as_written", [lambda level: level, lambda level: f"Level {level}", lambda level: level / 3, np.int64, np.float32]
)
def test_a_curriculum_goes_by_a_column_and_is_seeded_within_and_afterwards(as_written: Callable[[int], Any]):
    levels = [3, 1, 2, 2, 3, 1, 2, 1, 3, 2]
    values = [*map(as_written, levels)]
    for order_by, expected in (("level", sorted(levels)), ("-level", sorted(levels, reverse=True))):
        dealer = leveled(order_by, values)
        first, second = rows_of(dealer.draw(10)), rows_of(dealer.draw(10))
        assert [levels[row] for row in first] == expected
        assert sorted(first) == sorted(second) == list(range(10))
        assert [levels[row] for row in second] != expected, "one epoch was asked for"
    twice = leveled("level", values, epochs=2)
    epochs = [rows_of(twice.draw(10)) for _ in range(3)]
    assert [[levels[row] for row in epoch] == sorted(levels) for epoch in epochs] == [True, True, False]
    assert epochs[0] != epochs[1], "within a level the order is another one"
    assert rows_of(leveled("level", values, seed=1).draw(10)) != epochs[0]
    pair = [leveled("level", values, rank=rank, world_size=2) for rank in range(2)]
    assert [row for rows in zip(*(rows_of(each.draw(10)) for each in pair), strict=True) for row in rows] == epochs[0]
    resumed = leveled("level", values, epochs=2)
    resumed.position = 13
    assert rows_of(resumed.draw(7)) == epochs[1][3:]


@pytest.mark.parametrize(
    ("order_by", "levels", "said"),
    [
        (
            "-lvel",
            [1, 2],
            r"'-lvel'; 2 of 2 questions have nothing in the column 'lvel'. The columns are question, level",
        ),
        ("level", [1, None], r"1 of 2 questions have nothing in the column 'level'"),
        ("level", [1, "2"], r"its values are of the types int, str, which have no order"),
    ],
)
def test_a_column_without_an_order_is_refused(order_by: str, levels: list[Any], said: str):
    with pytest.raises(ValueError, match=said):
        leveled(order_by, levels)


def test_held_out_questions_may_have_columns_of_their_own(tmp_path: Path):
    (tmp_path / "held_out.jsonl").write_text('{"problem": "1+1?", "solution": 2}\n')
    own = {"eval_question_template": "Say {problem}", "eval_answer_column": "solution"}
    config = DataConfig(name="unused", eval_name=str(tmp_path / "held_out.jsonl"), **own)
    (row,) = load_rows(config, evaluation=True)
    assert (row["question"], row["answer"]) == ("Say 1+1?", "2")
