"""Rejection sampling: the rules one by one, going on after a stop, several processes, pass rates, rewriting by a model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, TINY, launch, read_json, tiny_config
from transformers import AutoTokenizer

from grpo import assembly
from grpo.cli import reject as command
from grpo.config import Config, DataConfig, read_yaml
from grpo.data.pass_rates import within_pass_rates
from grpo.observe.rundir import DirectoryLock
from grpo.rejection.reject import table_of
from grpo.rejection.rewriting import Kept, Rewriter, in_tags, prompts_of, rewritten
from grpo.rejection.rules import Required, Rules, falls_of_row, judge, pass_rate
from grpo.rejection.template import read_template
from grpo.rollout.grouping import all_at_once
from grpo.system import distributed
from grpo.system.jsonl import read_jsonl
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling
from rewards import accuracy
from rewards import format as well_formed

ENGLISH = "How many coins are left?"
GOOD = "<think>First add the nine to the five, which gives fourteen.</think> <answer>14</answer>"
REQUIRED = Required({"accuracy": 1.0})


def row(
    completion: str = GOOD,
    *,
    sample: int = 0,
    right: float | None = 1.0,
    ended: bool = True,
    tokens: int = 20,
    **extra: Any,
):
    return {
        "row": 0,
        "sample": sample,
        "completion": completion,
        "finish_reason": "stop" if ended else "length",
        "num_tokens": tokens,
        "reward": right,
        "rewards": {"accuracy": right, "format": 0.0, **extra},
    }


def broken_by(each: dict[str, Any], question: str = ENGLISH, rules: Rules | None = None) -> list[str]:
    return [fall.rule for fall in falls_of_row(each, question, rules or Rules(), REQUIRED, ["<|endoftext|>"])]


@pytest.mark.parametrize(
    ("each", "rules"),
    [
        (row(), []),
        (row(right=0.0), ["wrong"]),
        (row(right=None), ["unknown"]),
        (row(ended=False), ["unfinished"]),
        (row(" \n"), ["unfinished"]),
        (row("<think>nine</think> 14 \ufffd"), ["broken"]),
        (row("<think>nine</think> 14<|endoftext|>"), ["broken"]),
        (row("<think> </think> <answer>14</answer>"), ["no_thought"]),
        (row("<think>检查一下，等于十四</think> Fourteen coins."), ["language", "mixed_scripts"]),
        (row(GOOD + " That is what all of the coins together come to, as far as I can tell 对."), ["mixed_scripts"]),
        (row("<think>We сheck it.</think> 14"), ["mixed_scripts"]),  # a Cyrillic с
        (row("<think>" + "Nine and five are fourteen, are they not? " * 4 + "</think> 14"), ["repetition"]),
        (row(f"<think>{' '.join(f'word{n}' for n in range(301))}</think> 14"), ["long_paragraph"]),
        (row("<think>So:\n```python\nprint(9 + 5)\n```\n</think> 14"), ["code_in_thought"]),
        (row("<think>By hand.</think> Run:\n```python\nprint(9 + 5)\n```\n"), []),  # code in the answer is fine
        (row(r"<think>Let \(\alpha = 9\), $\text{硬币}=5$.</think> \boxed{14}"), []),
        (row("14"), []),  # without words or tags nothing can be said against it
        (row("检查", right=0.0, ended=False), ["wrong", "unfinished", "language", "mixed_scripts"]),
    ],
)
def test_a_row_is_dropped_for_what_it_breaks(each: dict[str, Any], rules: list[str]):
    assert broken_by(each) == rules


def test_chinese_solutions_of_chinese_questions_pass():
    text = "<think>先用Python算一下：九加五等于十四，所以还剩十四枚。</think> <answer>14</answer>"
    assert broken_by(row(text), "还剩多少枚硬币？") == []
    assert broken_by(row(text)) == ["language", "mixed_scripts"]
    assert broken_by(row("<think>So there are fourteen of them.</think> 14"), "还剩多少枚硬币？") == [
        "language",
        "mixed_scripts",
    ]


def test_every_threshold_is_an_option_of_the_rules():
    mixed = row(GOOD + " 对 就 是")
    assert broken_by(mixed) == ["language", "mixed_scripts"]
    assert broken_by(mixed, rules=Rules(min_language=0.5)) == ["mixed_scripts"]
    assert broken_by(mixed, rules=Rules(min_language=0.5, max_foreign_words=3)) == []
    loop = row("<think>" + "Nine and five are fourteen, are they not? " * 4 + "</think> 14")
    assert broken_by(loop, rules=Rules(max_loop=1.0)) == []
    assert broken_by(loop, rules=Rules(loop_times=5)) == []
    assert broken_by(loop, rules=Rules(loop_size=40)) == []
    assert broken_by(row("<think> </think> 14"), rules=Rules(min_thought_words=0)) == []
    assert broken_by(row("<think>```\nx\n```</think> 14"), rules=Rules(max_thought_code=1)) == []
    assert broken_by(row("one two three"), rules=Rules(max_paragraph_words=2)) == ["long_paragraph"]


def kept_of(rows: Sequence[dict[str, Any]], **rules: Any) -> tuple[list[int], dict[int, str]]:
    """The numbers of the samples that are kept, and the reasons of the others."""
    falls = judge(rows, ENGLISH, Rules(**rules), REQUIRED)
    return (
        [each["sample"] for each, own in zip(rows, falls, strict=True) if not own],
        {each["sample"]: own[0].rule for each, own in zip(rows, falls, strict=True) if own},
    )


def test_a_question_has_so_many_rows_chosen_as_said_and_none_twice():
    texts = [
        GOOD,
        GOOD + " ",
        GOOD.replace("First", "Now"),
        "<think>Nine and five.</think> 14",
        "<think>Count.</think> 14",
    ]
    rows = [row(text, sample=n, tokens=30 - n) for n, text in enumerate(texts)]
    assert kept_of(rows, per_question=2) == ([0, 2], {1: "duplicate", 3: "surplus", 4: "surplus"})
    assert kept_of(rows, per_question=2, choose="shortest") == ([3, 4], {0: "surplus", 1: "surplus", 2: "surplus"})
    assert kept_of(rows, per_question=2, choose="longest") == ([0, 2], {1: "duplicate", 3: "surplus", 4: "surplus"})
    assert kept_of(rows, per_question=9) == ([0, 2, 3, 4], {1: "duplicate"})


def test_a_question_that_is_too_easy_or_too_hard_has_no_rows():
    rows = [row(sample=0), row(GOOD + " Done.", sample=1), row(sample=2, right=0.0), row(sample=3, right=None)]
    assert pass_rate(rows, REQUIRED) == pytest.approx(2 / 3)  # of what is known
    assert kept_of(rows, pass_rate=(0.5, 0.7))[0] == [0, 1]
    assert kept_of(rows, pass_rate=(0.0, 0.6))[1] == {0: "pass_rate", 1: "pass_rate", 2: "wrong", 3: "unknown"}
    assert kept_of(rows, pass_rate=(2 / 3, 1.0))[0] == [0, 1]  # the bounds belong to it
    assert pass_rate([row(right=None)], REQUIRED) is None


def test_what_is_right_may_be_several_rewards():
    both = Required({"accuracy": 1.0, "format": 0.5})
    assert [fall.rule for fall in falls_of_row(row(), ENGLISH, Rules(), both)] == ["wrong"]
    assert falls_of_row(row(), ENGLISH, Rules(), both)[0].detail == "format 0"
    assert falls_of_row(row() | {"rewards": {"accuracy": 1.0, "format": 0.5}}, ENGLISH, Rules(), both) == []
    assert Rules().required(["format", "accuracy"], ["accuracy"]) == REQUIRED
    with pytest.raises(ValueError, match=r"^--require names 'acuracy'; the rewards are accuracy, format\. Correct"):
        Rules(require={"acuracy": 1.0}).required(["accuracy", "format"], ["accuracy"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_language": 90}, r"^--min-language is 90; it is a share, 0 to 1\. Correct it\.$"),
        ({"pass_rate": (0.9, 0.1)}, r"^--pass-rate is 0\.9 0\.1; two shares, the smaller one first"),
        ({"per_question": 0}, r"^--per-question is 0; it is at least 1"),
        ({"loop_times": 1}, r"^--loop-times is 1; it is at least 2"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Rules(**changed)


# ---- the command -----------------------------------------------------------------------------------------------------

SETTINGS = ["--model", str(TINY / "model"), "--config", str(ROOT / "configs" / "quickstart.yaml")]
ASKED = [*SETTINGS, "--num-questions", "12", "--samples", "8", "--max-tokens", "48", "--workers", "1"]


def run(out: Path, *words: str, asked: Sequence[str] = ASKED) -> dict[str, Any]:
    return command.run(command._parser().parse_args([*asked, *words, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    run(out, "--per-question", "2")
    return out


def files(out: Path) -> list[str]:
    return [
        out.with_suffix(suffix).read_text() for suffix in (".jsonl", ".dropped.jsonl", ".pass_rates.jsonl", ".json")
    ]


def test_every_sample_is_kept_or_dropped_with_a_reason(whole: Path):
    kept, dropped = read_jsonl(whole), read_jsonl(whole.with_suffix(".dropped.jsonl"))
    found = read_json(whole.with_suffix(".json"))
    assert sorted((each["row"], each["sample"]) for each in [*kept, *dropped]) == [
        (q, g) for q in range(12) for g in range(8)
    ]
    assert 0 < len(kept) == found["num_kept"] < 40
    assert all(each["rewards"]["accuracy"] == 1 and each["finish_reason"] == "stop" for each in kept)
    assert found["first"] == {
        rule: sum(d["reason"] == rule for d in dropped) for rule in {d["reason"] for d in dropped}
    }
    assert sum(found["first"].values()) + found["num_kept"] == found["num_samples"] == 96
    assert max(sum(each["row"] == q for each in kept) for q in range(12)) == 2
    table = table_of(found)
    assert f"wrong  {found['first']['wrong']:>9}".split() == table.splitlines()[1].split()[:2]
    assert f"{found['num_questions_kept']} of 12 questions have a row" in table


def test_a_row_has_what_supervised_training_reads(whole: Path):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    data = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:12]]
    rates = {each["row"]: each for each in read_jsonl(whole.with_suffix(".pass_rates.jsonl"))}
    for each in read_jsonl(whole):
        assert data[each["row"]].items() <= each.items()  # the columns of the data
        assert each["prompt"] == f"User: {each['question']}\nAssistant:"
        assert tokenizer.decode(each["prompt_ids"]) == each["prompt"]
        assert tokenizer.decode(each["completion_ids"]) == each["completion"] + tokenizer.eos_token
        assert len(each["completion_ids"]) == each["num_tokens"]
        assert each["pass_rate"] == rates[each["row"]]["pass_rate"]
        assert set(each["source"]) == {"model", "model_files", "questions"}
    dropped = read_jsonl(whole.with_suffix(".dropped.jsonl"))
    right = [
        sum(e["row"] == q and e["rewards"]["accuracy"] == 1 for e in [*read_jsonl(whole), *dropped]) for q in range(12)
    ]
    assert [rates[q]["pass_rate"] for q in range(12)] == [each / 8 for each in right]


def test_a_stopped_start_ends_with_the_same_rows_and_other_thresholds_sample_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "rows.jsonl"
    samples = whole.with_suffix(".samples")
    out.with_suffix(".samples").mkdir()
    lines = (samples / "samples.jsonl").read_text().splitlines(keepends=True)
    (out.with_suffix(".samples") / "settings.json").write_text((samples / "settings.json").read_text())
    (out.with_suffix(".samples") / "samples.jsonl").write_text(
        "".join(lines[:21]) + lines[21][:50]
    )  # two questions and a bit
    run(out, "--per-question", "2")
    assert files(out) == files(whole)
    with monkeypatch.context() as patch:
        patch.setattr("grpo.inference.model.load", lambda *_: pytest.fail("the model was loaded"))
        found = run(out, "--per-question", "1")
    assert max(sum(each["row"] == q for each in read_jsonl(out)) for q in range(12)) == 1
    assert found["first"]["surplus"] > 0
    with pytest.raises(
        ValueError, match=r"^--out is .*; the samples there have --seed 0, and these 1: .* Choose another"
    ):
        run(out, "--seed", "1")
    with pytest.raises(
        ValueError, match=r"^--out is .*; the questions, or how they become prompts, have changed since"
    ):
        run(out, "--template", "none")


def test_two_processes_give_the_same_rows(whole: Path, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    shown = launch("../scripts/reject.py", *ASKED, "--per-question", "2", "--out", str(out), processes=2)
    assert files(out) == files(whole)
    assert shown.count("questions have a row") == 1


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    with pytest.raises(
        ValueError, match=r"^--out is .*; there is such a file, and no rows\.samples that it was made from"
    ):
        run(out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match=r"^--out is .*rows\.json'; the rows are JSON lines\. Let its name end with"):
        run(tmp_path / "rows.json")


def test_rows_below_a_file_are_refused_by_their_option(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--out is '.*/file/below/rows.jsonl'; it cannot be written to: .* another --out"
    ):
        run(tmp_path / "file" / "below" / "rows.jsonl")


def test_questions_may_be_a_file_or_a_configurations(tmp_path: Path):
    rows = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:3]]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({**each, "prompt": "taken", "kind": "story"}) + "\n" for each in rows))
    few = [*SETTINGS, "--samples", "2", "--max-tokens", "48", "--workers", "1", "--questions"]
    found = run(tmp_path / "a.jsonl", str(own), "--require", "format=0", asked=few)
    assert (found["num_questions"], found["rules"]["require"]) == (3, {"format": 0.0})
    kept = read_jsonl(tmp_path / "a.jsonl")
    assert {(each["kind"], each["data_prompt"]) for each in kept} == {
        ("story", "taken")
    }  # `prompt` is what the model read
    (tmp_path / "own.yaml").write_text(
        json.dumps({"data": {"name": str(own), "template": "none"}, "model": {"name": "x"}})
    )
    found = run(
        tmp_path / "b.jsonl", str(tmp_path / "own.yaml"), "--require", "format=0", "--min-language", "0", asked=few
    )
    assert all(
        each["prompt_ids"] != other["prompt_ids"]
        for each, other in zip(read_jsonl(tmp_path / "b.jsonl"), kept, strict=False)
    )
    own.write_text("".join(json.dumps({**each, "answer": ""}) + "\n" for each in rows))
    with pytest.raises(
        ValueError, match=r"--questions: not one of 3 questions can be asked: 3: answer cannot be graded"
    ):
        run(tmp_path / "c.jsonl", str(own), asked=few)


def test_a_configuration_of_questions_is_enough(whole: Path, tmp_path: Path):
    settings = read_yaml((ROOT / "configs" / "quickstart.yaml").read_text())
    questions = {name: settings[name] for name in ("model", "data", "rollout", "rewards") if name in settings}
    questions["data"]["name"] = str(ROOT / "configs" / questions["data"]["name"].removeprefix("configs/"))
    (tmp_path / "questions.yaml").write_text(json.dumps(questions))
    asked = [str(tmp_path / "questions.yaml") if each.endswith("quickstart.yaml") else each for each in ASKED]
    run(tmp_path / "rows.jsonl", "--per-question", "2", asked=asked)
    assert (tmp_path / "rows.jsonl").read_text() == whole.read_text()


def test_settings_are_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "rows.jsonl"
    asked = [
        *SETTINGS,
        "--num-questions",
        "2",
        "--samples",
        "1",
        "--workers",
        "1",
        "--set",
        "rollout.max_completion_tokens=4",
    ]
    run(out, f"data.name={TINY / 'test.jsonl'}", asked=asked)
    wanted = [json.loads(line)["question"] for line in (TINY / "test.jsonl").read_text().splitlines()[:2]]
    rows = [*read_jsonl(out), *read_jsonl(out.with_suffix(".dropped.jsonl"))]
    assert sorted(each["question"] for each in rows) == sorted(wanted)
    assert max(each["num_tokens"] for each in rows) <= 4
    monkeypatch.setattr(
        "sys.argv", ["grpo reject", "--model", str(TINY / "model"), "--set", "a.b=1", "--out", str(out)]
    )
    with pytest.raises(SystemExit, match="2"):
        command.main()


def test_questions_that_the_run_has_left_out_are_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:4]]
    rows[2]["question"] = "x y " * 300
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.load("quickstart", [f"data.name={tmp_path / 'own.jsonl'}"])
    (tmp_path / "own.yaml").write_text(config.to_yaml())
    own = [
        "--model",
        str(TINY / "model"),
        "--config",
        str(tmp_path / "own.yaml"),
        "--samples",
        "2",
        "--max-tokens",
        "48",
    ]
    found = run(tmp_path / "rows.jsonl", "--require", "format=0", "--workers", "1", asked=own)
    assert found["num_questions"] == 3
    assert "without 1 of the questions: " in capsys.readouterr().out


# ---- pass rates as a filter ------------------------------------------------------------------------------------------


def test_pass_rates_filter_the_training_questions(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rates = read_jsonl(whole.with_suffix(".pass_rates.jsonl"))
    wanted = [each["question"] for each in rates if 0.1 <= each["pass_rate"] <= 0.2]
    assert 0 < len(wanted) < 12
    config = tiny_config(
        tmp_path / "run",
        data={
            "name": str(TINY / "train.jsonl"),
            "pass_rates": str(whole.with_suffix(".pass_rates.jsonl")),
            "pass_rate": [0.1, 0.2],
        },
    )
    parts = assembly.assemble(
        config,
        lock=DirectoryLock(),
        rewards=None,
        train_dataset=None,
        eval_dataset=None,
        policy_class=assembly.Policy,
        learner_class=assembly.Learner,
    )
    parts.collector.scorer.close()
    assert [prompt.columns["question"] for prompt in parts.prompts.prompts] == wanted
    shown = capsys.readouterr().out
    assert "3,988 training questions left out: not in data.pass_rates" in shown
    assert "training questions left out: pass rate below 0.1" in shown


def test_pass_rates_that_do_not_fit_the_data_are_refused(tmp_path: Path):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    path = tmp_path / "rates.jsonl"

    def filtered(lines: list[dict[str, Any]], low: float = 0.1, high: float = 0.9) -> tuple[list[bool], dict[str, int]]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return within_pass_rates(rows, DataConfig(pass_rates=str(path), pass_rate=(low, high)))

    a = {"question": "a", "answer": "1", "pass_rate": 0.0, "num_samples": 4}
    assert filtered([a, {**a, "pass_rate": 0.75, "num_samples": 12}]) == ([True, False], {"not in data.pass_rates": 1})
    assert filtered([{**a, "pass_rate": 0.5}, {**a, "question": "b", "answer": "2", "pass_rate": None}]) == (
        [True, False],
        {"its pass rate could not be told": 1},
    )
    with pytest.raises(
        ValueError, match=r"^data\.pass_rates is .*; it knows not one of the 2 questions: it begins with 'c'"
    ):
        filtered([{**a, "question": "c"}])
    with pytest.raises(ValueError, match=r"knows not one"):
        filtered([{**a, "answer": "7"}])  # the same words with another answer are another question
    with pytest.raises(
        ValueError, match=r"^data\.pass_rate is \[0\.1, 0\.9\]; not one question lies within: .* from 0 to 0"
    ):
        filtered([a])
    with pytest.raises(ValueError, match=r"no line has question, answer and pass_rate"):
        filtered([{"question": "a"}])
    with pytest.raises(ValueError, match=r"a row has the pass rate 75, which is no share"):
        filtered([{**a, "pass_rate": 75}])
    with pytest.raises(ValueError, match=r"there is no file"):
        within_pass_rates(rows, DataConfig(pass_rates=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"^data\.pass_rate is \[0\.1, 0\.9\]; without data\.pass_rates nobody knows"):
        tiny_config(tmp_path / "run", data={"pass_rate": [0.1, 0.9]})
    with pytest.raises(ValueError, match=r"data\.pass_rate is \[0\.9, 0\.1\]; the smaller bound comes first"):
        tiny_config(tmp_path / "run", data={"pass_rates": str(path), "pass_rate": [0.9, 0.1]})


# ---- rewriting -------------------------------------------------------------------------------------------------------


def kept(completion: str = f" {GOOD}", prefill: str = "") -> Kept:
    prompt = Prompt(3, [1], f"User: {ENGLISH} Assistant:{prefill}", prefill, {"question": ENGLISH, "answer": "14"})
    return Kept(prompt, row(completion, sample=5), 0.5)


def test_the_rewritten_solution_takes_the_place_of_the_rows_own():
    assert rewritten("Sure!\n<rewritten>\n<think>a</think> 14\n</rewritten> Bye", kept()) == " <think>a</think> 14"
    assert rewritten("<rewritten>x</rewritten> no: <rewritten>y</rewritten>", kept()) == " y"
    assert rewritten("<think>how do I put it</think>\n<think>a</think> 14", kept()) == " <think>a</think> 14"
    assert rewritten("<think>a</think> 14", kept()) == " <think>a</think> 14"
    opened = kept("<think>nine</think> 14", prefill=" <think>")
    assert rewritten("<rewritten><think>a</think> 14</rewritten>", opened) == " <think>a</think> 14"
    assert rewritten("<rewritten>a</think> 14</rewritten>", opened) == " <think>a</think> 14"


def test_the_rewriting_model_sees_question_and_solution_and_no_gold_answer():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    own = kept(" The {question} is solved: fourteen.")
    (prompt,) = prompts_of([own], "Q {question} S {completion}", tokenizer, seed=0)
    assert prompt.text == f"User: Q {ENGLISH} S The {{question}} is solved: fourteen.\nAssistant:"
    assert prompt.columns == own.prompt.columns  # for the verifier
    assert prompt.seed != prompts_of([own], "Q {question} S {completion}", tokenizer, seed=1)[0].seed


def test_a_template_of_rewriting_has_a_place_for_the_question_and_the_solution(tmp_path: Path):
    file = tmp_path / "own.txt"
    with pytest.raises(
        ValueError, match=r"^--rewrite-template is '.*own\.txt'; there is no such file\. Correct the path\.$"
    ):
        read_template(str(file))
    file.write_text("{question}")
    with pytest.raises(
        ValueError, match=r"^--rewrite-template is '.*own\.txt'; the file has no \{completion\}, .* Add it\.$"
    ):
        read_template(str(file))
    file.write_text("{question} {completion}")
    assert read_template(str(file)) == "{question} {completion}"
    assert "{completion}" in read_template(None)


@pytest.mark.parametrize(
    ("sampled", "tagged"),
    [
        (r"So \(9 + 5 = \boxed{14}\).", r" <think> So \(9 + 5 = \boxed{14}\). </think> <answer> 14 </answer>"),
        (
            r"First \boxed{3}. Then $\boxed{ \frac{1}{2} }$",
            r" <think> First \boxed{3}. Then $\boxed{ \frac{1}{2} }$ </think> <answer> \frac{1}{2} </answer>",
        ),
        ("It is 14.", None),  # what it commits to is not known
        (r"so \boxed{1}, \boxed{2}", None),  # the verifier takes both for the answer
        (r"\boxed{1} and \boxed{2}", None),
        (r"\boxed{14}. Again \boxed{", None),  # and leaves out what is cut off
        (r"\boxed{14}. Again \boxed{15", None),
        (r"\boxed{}", None),
        (r"<think>a</think> \boxed{14}", None),  # a form of its own
        (r"The <answer> is \boxed{14}", None),
    ],
)
def test_a_boxed_solution_becomes_one_in_tags(sampled: str, tagged: str | None):
    own = row(sampled)
    found = in_tags(own, kept().prompt)
    if tagged is not None:
        assert found == {**own, "completion": tagged, "original": sampled}
        assert accuracy(tagged, gold := exact(tagged)) == accuracy(sampled, gold, source="boxed") == 1
    else:
        assert found["completion"] == sampled
        assert broken_by(found) == ["untagged"]


def exact(tagged: str) -> str:
    return tagged.partition("<answer>")[2].partition("</answer>")[0].strip()


def test_rows_are_kept_and_judged_as_they_are_in_tags(whole: Path, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    shutil.copytree(whole.with_suffix(".samples"), out.with_suffix(".samples"))
    path = out.with_suffix(".samples") / "samples.jsonl"
    rows = read_jsonl(path)
    for number, each in enumerate(rows):  # as a model writes that knows boxes
        code = "\n```python\nprint(9)\n```\n" if number % 2 else ""
        text = re.sub(r"</?think>", code, each["completion"])
        each["completion"] = re.sub(r"<answer>(.*?)</answer>", r"\\boxed{\1}", text)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    texts = {(each["row"], each["sample"]): each["completion"] for each in rows}
    found = run(out, "--tags")
    assert found["tags"] is True
    assert found["any"]["code_in_thought"] > 0  # which only a thought can have
    assert len(read_jsonl(out)) > 4
    for each in read_jsonl(out):
        assert accuracy(each["completion"], each["answer"]) == well_formed(each["completion"]) == 1
        assert "prompt_ids" not in each
        assert "completion_ids" not in each
        assert each["original"] == texts[each["row"], each["sample"]]


def test_tags_are_not_for_rows_that_a_model_rewrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = [*ASKED, "--out", str(tmp_path / "rows.jsonl"), "--tags", "--rewrite-with", str(TINY / "model")]
    monkeypatch.setattr("sys.argv", ["grpo reject", *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()


class Replies:
    """A generator that replies what it is told to."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        groups = [Group(prompt, [Completion([1], [0.0], text, "stop") for text in self.texts]) for prompt in prompts]
        return all_at_once(groups, on_group)


def test_the_verifier_sees_the_rewritten_text_and_the_rows_own_prompt():
    own = kept()
    (prompt,) = prompts_of([own], "{question} {completion}", AutoTokenizer.from_pretrained(TINY / "model"), seed=0)
    seen: list[tuple[int, Group]] = []
    generator = Rewriter(Replies("<rewritten>14</rewritten>", "15"), [own])
    groups = generator.sample(
        [prompt], Sampling(9), num_completions=2, seed=0, on_group=lambda p, group: seen.append((p, group))
    )
    assert [(p, [each.text for each in group.completions]) for p, group in seen] == [(0, [" 14", " 15"])]
    assert seen[0][1].prompt.text == own.prompt.text
    assert [each.text for each in groups[0].completions] == [" 14", " 15"]


class Writer:
    """Puts solutions into other words: of every three the second loses its answer, and the third becomes hard to read."""

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        groups = []
        for prompt in prompts:
            solution = prompt.text.partition("SOLUTION")[2].removesuffix("\nAssistant:")
            good = f"Gladly. <rewritten>{solution.replace('<think>', '<think> In other words:')}</rewritten>"
            last = [good, "It is -1.", good.replace("In other words", "换句话说")][prompt.row % 3]
            texts = ["<rewritten><think>Oh</think> <answer>-1</answer></rewritten>", last]
            groups.append(Group(prompt, [Completion([1], [0.0], text, "stop") for text in texts[:num_completions]]))
        return all_at_once(groups, on_group)


def test_rows_whose_answer_does_not_survive_the_rewriting_are_dropped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, template = tmp_path / "rows.jsonl", tmp_path / "template.txt"
    shutil.copytree(whole.with_suffix(".samples"), out.with_suffix(".samples"))
    template.write_text("{question} SOLUTION {completion}")
    how = ["--rewrite-with", str(TINY / "model"), "--rewrite-template", str(template), "--rewrite-samples", "2"]
    with monkeypatch.context() as patch:
        writer = SimpleNamespace(generator=Writer(), processes=distributed.join())
        patch.setattr("grpo.inference.model.load", lambda *_: writer)
        found = run(out, "--per-question", "2", *how)
    before, after = read_jsonl(whole), read_jsonl(out)
    fallen = {(each["row"], each["sample"]): each for each in read_jsonl(out.with_suffix(".dropped.jsonl"))}
    assert len(before) > 5
    assert [(each["row"], each["sample"]) for each in after] == [(each["row"], each["sample"]) for each in before[::3]]
    for own, other in zip(after, before[::3], strict=True):
        assert own["original"] == other["completion"]
        assert own["completion"] == " " + other["completion"].strip().replace("<think>", "<think> In other words:")
        assert own["prompt"] == other["prompt"]
        assert own["rewards"]["accuracy"] == 1
        assert own["source"] == {**other["source"], "rewritten_by": own["source"]["rewritten_by"]}
        assert not {"prompt_ids", "completion_ids"} & set(own)
    for number, other in enumerate(before):
        if number % 3:
            row = fallen[other["row"], other["sample"]]
            assert row["reason"] == ["", "answer_lost", "rewrite_unreadable"][number % 3]
            assert row["detail"].startswith(["", "wrong: accuracy 0", "mixed_scripts: 换句话说"][number % 3]) or (
                row["detail"].startswith("language: ")
            )
    assert found["num_kept"] == len(after)
    assert sum(found["first"].values()) + found["num_kept"] == found["num_samples"]
    again = files(out)
    run(out, "--per-question", "2", *how)  # and loads no model
    assert files(out) == again
    with pytest.raises(ValueError, match=r"the rows that are to be rewritten have changed since"):
        run(out, "--per-question", "1", *how)


def test_a_real_model_rewrites(whole: Path, tmp_path: Path):
    """The tiny model can't: it answers what it is asked, as a rule wrongly."""
    out, template = tmp_path / "rows.jsonl", tmp_path / "template.txt"
    shutil.copytree(whole.with_suffix(".samples"), out.with_suffix(".samples"))
    template.write_text("{completion} {question}")
    found = run(out, "--per-question", "2", "--rewrite-with", str(TINY / "model"), "--rewrite-template", str(template))
    samples = read_jsonl(out.with_suffix(".rewrites") / "samples.jsonl")
    assert sorted(each["row"] for each in samples) == list(range(len(read_jsonl(whole))))
    assert found["any"]["answer_lost"] > 0
