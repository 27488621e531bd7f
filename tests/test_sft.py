"""Supervised training: what a row becomes, what is refused, and that the update is that of cross-entropy."""

import copy
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from helpers import QUESTIONS, ROOT, TINY, clean_environment, launch, read_json
from safetensors.torch import load_file
from test_trainer import steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from grpo import SupervisedConfig, SupervisedTrainer
from grpo.algorithm.batch import share_prompts
from grpo.algorithm.loss import grpo_loss, token_weights
from grpo.check import supervised
from grpo.config import Config, ModelConfig
from grpo.config.supervised import RowsConfig, TrainingConfig, as_spelled_here
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows
from grpo.evaluation.benchmark import default_max_tokens
from grpo.run import watchdog
from grpo.scoring.worker_pool import _Worker
from grpo.sft.assembly import cross_entropy
from grpo.sft.order import RowOrder, set_aside
from grpo.sft.rows import read_rows
from grpo.sft.trainer import batch_of
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import EXIT_STOPPED, Stopped
from grpo.training.learner import Learner
from grpo.types import Group

GREETING = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think> 1 </think> Hello"}]
MORE = [*GREETING, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think> 2 </think> 2"}]
ROWS: list[dict[str, Any]] = [
    *({"question": f"What is {n}+{n}?", "completion": f" <think> {n}+{n}={2 * n} </think> {2 * n}"} for n in range(9)),
    *({"question": "What is 3+3?", "completion": f" <think> {guess} </think> 6"} for guess in (5, 66, 7)),
    {"messages": MORE},
    {"messages": GREETING},
    {"prompt": "Once upon", "completion": " a time there was a number"},
    {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10, 0]},
]
"""Of every form."""


def sft_settings(run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": {"name": str(TINY / "model")},
        "data": {"template": "chat", "max_tokens": 200},
        "training": {"rows_per_update": 4},
        "optimizer": {"learning_rate": 1e-3},
        "memory": {"micro_batch_tokens": 256, "activation_checkpointing": 0},
        "distributed": {"zero_stage": 0},
        "scoring": {"num_workers": 1},
        "run": {"dir": str(run_dir)},
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def sft_config(run_dir: Path, **sections: Any) -> SupervisedConfig:
    return SupervisedConfig(**sft_settings(run_dir, **sections))


def test_the_settings_of_a_run_of_so_many_steps_can_be_read_again(tmp_path: Path):
    config = sft_config(tmp_path, run={"dir": str(tmp_path), "steps": 3})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = SupervisedConfig.load(tmp_path / "config.yaml")
    assert again.run.steps == 3
    assert "  epochs:" not in config.to_yaml()
    assert SupervisedConfig.load(tmp_path / "config.yaml", ["run.resume=auto"]).to_yaml() != config.to_yaml()
    assert "  epochs: 2.0" in sft_config(tmp_path).to_yaml()


def test_answers_of_a_supervised_run_have_the_limit_of_its_own_evaluation(tmp_path: Path):
    config = sft_config(
        tmp_path, run={"dir": str(tmp_path)}, evaluation={"max_completion_tokens": 17, "num_questions": 2}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "metrics.jsonl").touch()
    checkpoint = tmp_path / "checkpoints/step-00000001"
    shutil.copytree(TINY / "model", checkpoint / "hf")
    assert default_max_tokens(ModelConfig(name=str(checkpoint / "hf")), 20) == 17


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "model")


def read(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any) -> list[Group]:
    return read_rows(RowsConfig(**{"template": "chat"} | settings), tokenizer, given=rows, model="tiny").groups


def texts(tokenizer: PreTrainedTokenizerBase, group: Group) -> tuple[str, str, str]:
    """The prompt, what follows it, and what of that is learned."""
    (completion,) = group.completions
    ids = completion.token_ids
    learned = [i for i, is_trained in zip(ids, completion.trained or [True] * len(ids), strict=True) if is_trained]
    return tuple(map(tokenizer.decode, (group.prompt.token_ids, ids, learned)))  # type: ignore[return-value]


# ---- what a row becomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["r1_zero", "r1_zero_think", "chat", "none"])
def test_a_question_trains_the_very_prompt_that_reinforcement_learning_uses(tokenizer, template: str):
    data = RowsConfig(name=str(QUESTIONS), template=template)
    questions, _ = build_prompts(load_rows(data)[:5], tokenizer, data)
    rows = [{**row, "completion": " <think> so </think> 4"} for row in read_jsonl(QUESTIONS)[:5]]
    groups = read(tokenizer, rows, template=template)
    assert [group.prompt.token_ids for group in groups] == [prompt.token_ids for prompt in questions]
    begun = "<think>" * (template == "r1_zero_think")
    assert (
        texts(tokenizer, groups[0])[2]
        == " <think> so </think> 4".removeprefix(f" {begun}" if begun else "") + "<|endoftext|>"
    )


def test_a_text_is_a_prompt_as_it_stands_and_ids_are_what_was_sampled(tokenizer):
    (text,) = read(tokenizer, [{"prompt": "Once upon", "completion": " a time"}])
    assert texts(tokenizer, text) == ("Once upon", " a time<|endoftext|>", " a time<|endoftext|>")
    (ids,) = read(tokenizer, [{"prompt_ids": [5, 6, 7], "completion_ids": [8, 9]}])
    assert (ids.prompt.token_ids, ids.completions[0].token_ids) == ([5, 6, 7], [8, 9])


def test_the_vocabulary_is_not_made_anew_for_each_row(tokenizer, monkeypatch: pytest.MonkeyPatch):
    """150,000 tokens take 50 milliseconds: 5,000 rows took four minutes to read."""
    calls = []
    own = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: calls.append(1) or own(self))
    counts = []
    for num in (4, 40):
        calls.clear()
        read(tokenizer, [{"prompt": f"a {n}", "completion": " b"} for n in range(num)])
        read(tokenizer, [{"question": f"a {n}", "completion": " b"} for n in range(num)], form="question")
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_the_end_is_learned_once_and_not_where_a_row_was_cut_off(tokenizer):
    rows = [
        {"prompt": "a", "completion": " b<|endoftext|>"},
        {"prompt": "a", "completion": " b", "finish_reason": "length"},
    ]
    found = read_rows(RowsConfig(), tokenizer, given=rows, model="tiny")
    assert [texts(tokenizer, group)[2] for group in found.groups] == [" b<|endoftext|>", " b"]
    assert found.notes[0].startswith("note: 1 of 2 rows do not end with an end token")


@pytest.mark.parametrize(
    ("loss_on", "prompt", "learned"),
    [
        ("all", "User: Hi\nAssistant:", " <think> 1 </think> Hello<|endoftext|> <think> 2 </think> 2<|endoftext|>"),
        (
            "last",
            "User: Hi\nAssistant: <think> 1 </think> Hello<|endoftext|>\nUser: 1+1?\nAssistant:",
            " <think> 2 </think> 2<|endoftext|>",
        ),
    ],
)
def test_of_a_conversation_the_assistants_turns_are_learned_and_the_rest_is_read(tokenizer, loss_on, prompt, learned):
    whole = tokenizer.apply_chat_template(MORE, tokenize=False).removesuffix("\n")
    rows = [{"messages": [*MORE, {"role": "user", "content": "Thanks"}]}, {"prompt": MORE[:3], "completion": MORE[3:]}]
    for group in read(tokenizer, rows, loss_on=loss_on):
        found = texts(tokenizer, group)
        assert (found[0], found[2]) == (prompt, learned)
        assert found[0] + found[1] == whole
    single = read(tokenizer, [{"messages": GREETING}], template="r1_zero", loss_on=loss_on)
    assert texts(tokenizer, single[0])[0].endswith("User: Hi Assistant:")


def test_a_system_prompt_is_part_of_every_prompt(tokenizer):
    for row in ({"messages": GREETING}, {"question": "Hi", "completion": " Hello"}):
        (group,) = read(tokenizer, [row], system_prompt="Be brief.")
        assert texts(tokenizer, group)[0] == "Be brief.\nUser: Hi\nAssistant:"


def test_columns_have_the_names_that_the_settings_say(tokenizer):
    row = {"q": "Hi", "response": " Hello"}
    (group,) = read(tokenizer, [row], question_column="q", completion_column="response")
    assert texts(tokenizer, group) == ("User: Hi\nAssistant:", " Hello<|endoftext|>", " Hello<|endoftext|>")
    (group,) = read(tokenizer, [{"turns": GREETING}], messages_column="turns")
    assert texts(tokenizer, group)[0] == "User: Hi\nAssistant:"
    (group,) = read(tokenizer, [row], question_template="Say {q}", completion_column="response")
    assert texts(tokenizer, group)[0] == "User: Say Hi\nAssistant:"


# ---- what is refused -------------------------------------------------------------------------------------------------

DROPS_THOUGHTS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DROPS_EARLIER_THOUGHTS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}{{ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_drops_thoughts_is_found_and_named(tokenizer, tmp_path: Path):
    own = copy.deepcopy(tokenizer)
    own.chat_template = DROPS_THOUGHTS
    with pytest.raises(
        ValueError, match=r"the chat template \(that of tiny\) rewrites what the assistant said in row 0 .*<think>"
    ):
        read(own, [{"messages": GREETING}])
    own.chat_template = DROPS_EARLIER_THOUGHTS
    with pytest.raises(
        ValueError, match=r"rewrites what was said in earlier turns in row 0 .* set data.loss_on to last"
    ):
        read(own, [{"messages": MORE}])
    (last,) = read(own, [{"messages": MORE}], loss_on="last")
    assert texts(own, last)[2] == "<think> 2 </think> 2<|endoftext|>"
    own.chat_template = DROPS_THOUGHTS  # a question with a completion does not go through it
    (group,) = read(own, [{"question": "Hi", "completion": "<think> 1 </think> Hello"}])
    assert texts(own, group)[2] == "<think> 1 </think> Hello<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "Hi", "completion": "  "},
            r"row 1 of train_dataset has no token to learn: .* 'User: Hi\\nAssistant:«  »",
        ),
        (
            {"messages": GREETING[:1]},
            r"row 1 of train_dataset has no token to learn: the assistant says nothing.* 'User: Hi",
        ),
        ({"messages": [GREETING[0], {"role": "assistant", "content": ""}]}, "row 1 .* has no token to learn"),
        ({"prompt_ids": [5], "completion_ids": []}, "row 1 .* has no token to learn"),
        ({"prompt_ids": [5], "completion_ids": [5.0]}, r"row 1 .* has 5.0 among its token ids"),
        (
            {"question": "Hi"},
            r"row 1 .* has the columns question; nothing can be learned from it \(completion is None\)",
        ),
        ({"question": "Hi", "completion": 4}, "completion of row 1 .* is of type int"),
        (
            {"question": "Hi", "prompt": "Hi", "completion": "a"},
            "learned as question or as prompt. Set data.form to one",
        ),
        ({"prompt": "", "completion": "a"}, "row 1 .* has an empty prompt"),
        ({"messages": [GREETING[1]]}, "row 1 .* begins with what the assistant says"),
        (
            {"messages": [GREETING[0], {"role": "assistant", "text": "Hello"}]},
            r"row 1 .* nothing can be learned from it \(messages\.1 has no content, but role, text\)",
        ),
        (
            {"messages": [{"from": "human", "value": "Hi"}]},
            r"row 1 .* \(messages\.0 has no role and no content, but from, value\)\. Give it",
        ),
        ({"messages": [{"role": "user", "content": None}, GREETING[1]]}, "row 1 .* message of the user whose content"),
        (
            {"question": "Hi", "completion": "<think>\n</think> 3"},
            r"1 of 2 rows have an empty <think></think>.*Set data.empty_thoughts",
        ),
        ({"prompt_ids": [5], "completion_ids": "EMPTY"}, "1 of 2 rows have an empty <think></think>"),
    ],
)
def test_a_row_that_teaches_nothing_or_the_wrong_thing_is_refused_and_shown(tokenizer, row: dict, said: str):
    if row.get("completion_ids") == "EMPTY":
        row["completion_ids"] = tokenizer("<think> </think> 3")["input_ids"]
    with pytest.raises(ValueError, match=said):
        read(tokenizer, [ROWS[0], row])


def test_an_empty_thought_that_the_prompt_has_begun_is_one_too(tokenizer):
    row = {"question": "Hi", "completion": "<think></think> 3"}
    with pytest.raises(ValueError, match="1 of 1 rows have an empty"):
        read(tokenizer, [row], template="r1_zero_think")
    assert len(read(tokenizer, [row], empty_thoughts="keep")) == 1
    found = read_rows(RowsConfig(empty_thoughts="drop"), tokenizer, given=[row, ROWS[0]], model="tiny")
    assert (len(found.groups), found.dropped["empty <think></think> (data.empty_thoughts)"]) == (1, 1)


def test_longer_rows_are_dropped_and_counted_or_refused_and_never_cut(tokenizer):
    rows = [ROWS[0], {"question": "Hi", "completion": " ha" * 500}]
    found = read_rows(RowsConfig(template="chat", max_tokens=100), tokenizer, given=rows, model="tiny")
    assert len(found.groups) == 1
    ((why, count),) = found.dropped.items()
    assert why.startswith("longer than data.max_tokens (100)")
    assert count == 1
    with pytest.raises(ValueError, match=r"data.max_tokens is 100; 1 of 2 rows are longer, row 1 of train_dataset"):
        read(tokenizer, rows, max_tokens=100, too_long="error")
    with pytest.raises(ValueError, match=r"data.max_tokens is 3; 2 of 2 rows are longer"):
        read(tokenizer, rows, max_tokens=3)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"nmae": "x"}}, "data.nmae is not a setting. Did you mean data.name"),
        ({"training": {"epoch": 2}}, "training.epoch is not a setting. Did you mean training.epochs"),
        ({"rollout": {"group_size": 2}}, "rollout is not a setting here. `grpo train` reads it"),
        ({"training": {"num_train_epochs": 2}}, "a name of TRL; here it is training.epochs"),
        ({"data": {"name": "reasoning_gym:chain_sum"}}, "a task makes questions"),
        ({"training": {"tokens_per_update": 100}}, "training.tokens_per_update is 100; one row may have 200 tokens"),
        ({"memory": {"micro_batch_tokens": 100}}, "memory.micro_batch_tokens is 100; one row may have 200"),
        ({"training": {"epochs": 1}, "run": {"steps": 3}}, "run.steps is 3 and training.epochs 1; each says how long"),
        ({"optimizer": {"warmup_steps": 9}, "run": {"steps": 3}}, "optimizer.warmup_steps is 9; the run has 3 steps"),
        ({"optimizer": {"schedule": "constant"}}, "optimizer.final_rate_share is 0.1; it has no effect"),
        ({"evaluation": {"every_steps": 3}}, "evaluation.every_steps is 3; there is nothing to evaluate"),
        ({"evaluation": {"temperature": 0.6}}, "evaluation.temperature is 0.6; it has no effect while"),
        ({"watchdog": {"kl": "stop"}}, "watchdog.kl is 'stop'; it looks at what was sampled"),
        (
            {"watchdog": {"loss": "roll_back"}, "checkpoint": {"every_steps": 0}},
            "watchdog.loss is 'roll_back'; trouble shows",
        ),
        ({"lora": {"alpha": 8}}, "lora.alpha is 8.0; it has no effect while lora.rank is 0"),
        ({"data": {"template": "none", "system_prompt": "Hi"}}, "data.system_prompt is 'Hi'; only the chat template"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, sections: dict, said: str):
    with pytest.raises(ValueError, match=said):
        sft_config(tmp_path, **sections)


def test_a_rule_about_rows_is_refused_in_reinforcement_learning():
    with pytest.raises(ValueError, match=r"watchdog.loss is 'stop'; it watches the loss of rows"):
        Config(model={"name": "m"}, watchdog={"loss": "stop"}, run={"dir": "d", "steps": 1})


def test_questions_and_rows_that_are_missing_are_asked_for_before_the_model_is_loaded(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.name is missing; supervised training needs rows"):
        SupervisedTrainer(sft_config(tmp_path))
    with pytest.raises(ValueError, match=r"data.eval_name is missing, and rows are no questions"):
        SupervisedTrainer(sft_config(tmp_path, evaluation={"num_questions": 3}), train_dataset=ROWS)
    long = sft_config(tmp_path, data={"max_tokens": 5000}, memory={"micro_batch_tokens": 5000})
    with pytest.raises(ValueError, match=r"data.max_tokens is 5000; a row may have 5000 tokens, .* knows"):
        SupervisedTrainer(long, train_dataset=ROWS)
    with pytest.raises(ValueError, match="has its tokenizer's token 99999"):
        SupervisedTrainer(sft_config(tmp_path), train_dataset=[{"prompt_ids": [5], "completion_ids": [99999]}])


# ---- order -----------------------------------------------------------------------------------------------------------


def test_every_epoch_deals_every_row_once_and_a_budget_of_tokens_makes_updates_smaller(tokenizer):
    groups = read(tokenizer, ROWS)
    for limit in (None, 100):
        config = TrainingConfig(epochs=3, rows_per_update=5, tokens_per_update=limit)
        order = RowOrder(groups, config, seed=1)
        updates = [order.draw() for _ in range(order.num_updates)]
        assert order.draw() == []
        dealt = [group.prompt.row for update in updates for group in update]
        for epoch in range(3):
            assert sorted(dealt[epoch * len(groups) : (epoch + 1) * len(groups)]) == list(range(len(groups)))
        assert dealt[: len(groups)] != dealt[len(groups) : 2 * len(groups)]
        if limit is None:
            assert [len(update) for update in updates] == [5] * 9 + [3]
        else:
            sizes = [sum(order.sizes[group.prompt.row] for group in update) for update in updates]
            assert max(sizes) <= limit < sum(sizes[:2])
            assert len(updates) > 10
    assert RowOrder(groups, TrainingConfig(epochs=0.5, rows_per_update=4), seed=1).num_updates == 2


def test_rows_are_set_aside_with_all_rows_of_their_prompts(tokenizer):
    groups = read(tokenizer, ROWS)
    for seed in range(10):
        learned, aside = set_aside(groups, 3, seed=seed)
        assert len(learned) + len(aside) == len(groups)
        assert 3 <= len(aside) <= 6
        assert [group.prompt.row for group in learned] == list(range(len(learned)))
        kept = {tuple(group.prompt.token_ids) for group in learned}
        assert not kept & {tuple(group.prompt.token_ids) for group in aside}
    with pytest.raises(ValueError, match=r"evaluation.num_rows is 16; .* none would be left to learn from"):
        set_aside(groups, 16, seed=0)


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_loss_with_these_values_is_cross_entropy(aggregation: str):
    torch.manual_seed(0)
    logits = torch.randn(9, 20, dtype=torch.float64, requires_grad=True)
    targets, lens = torch.randint(20, (9,)), torch.tensor([2, 4, 3])
    counts = {"num_completions": 3, "num_tokens": 9, "max_completion_tokens": 1}
    weights = token_weights(aggregation, lens, **counts).double()
    logprobs = logits.log_softmax(-1)[torch.arange(9), targets]
    algorithm = cross_entropy(aggregation)
    ours = grpo_loss(logprobs, torch.ones(9), weights, algorithm.objective, completion_lens=lens).loss
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    plain = each.mean() if aggregation == "token" else sum(part.mean() for part in each.split([2, 4, 3])) / 3
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, plain)))


def plain_gradient(groups: list[Group], aggregation: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, accuracy and gradient of rows one after the other, in float64."""
    lm = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float64)
    masks = [g.completions[0].trained or [True] * len(g.completions[0].token_ids) for g in groups]
    total, right, loss = sum(map(sum, masks)), 0, torch.zeros((), dtype=torch.float64)
    for group, mask in zip(groups, masks, strict=True):
        prompt, completion = group.prompt.token_ids, group.completions[0].token_ids
        logits = lm(torch.tensor([[*prompt, *completion]])).logits[0]
        weight = 1 / total if aggregation == "token" else 1 / (len(groups) * sum(mask))
        for place, (token, is_trained) in enumerate(zip(completion, mask, strict=True)):
            if is_trained:
                predicted = logits[len(prompt) + place - 1]
                loss = loss + weight * torch.nn.functional.cross_entropy(predicted, torch.tensor(token))
                right += int(predicted.argmax() == token)
    loss.backward()
    gradient = {name: weight.grad for name, weight in lm.named_parameters() if weight.grad is not None}
    return loss.item(), right / total, gradient


@pytest.mark.parametrize(("aggregation", "budget"), [("token", 1024), ("token", 40), ("sequence", 100)])
def test_the_gradient_of_a_packed_update_is_that_of_plain_cross_entropy_row_by_row(
    tmp_path: Path, aggregation: str, budget: int
):
    config = sft_config(tmp_path / "run", training={"rows_per_update": len(ROWS), "aggregation": aggregation})
    config.memory.micro_batch_tokens = budget
    trainer = SupervisedTrainer(config, train_dataset=ROWS)
    rows = trainer.order.groups
    passes = trainer.learner.deal_whole(batch_of(rows))
    assert (len(passes) > 5) == (budget == 40)
    totals = trainer.learner.accumulate(passes, trainer.step.meter, [], ())
    ours = {name: weight.grad for name, weight in trainer.policy.lm.named_parameters()}
    trainer.close()
    loss, accuracy, gradient = plain_gradient(rows, aggregation)
    assert totals.loss == pytest.approx(loss, rel=1e-6)
    if aggregation == "token":
        metrics = trainer.step.meter.reduce(trainer.processes)
        assert metrics["supervised/loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["supervised/accuracy"] == pytest.approx(accuracy)
    assert gradient.keys() <= ours.keys()
    for name, expected in gradient.items():
        assert (ours[name].double() - expected).norm() < 1e-5 * expected.norm(), name  # float32 through four layers


def test_equal_prompts_are_read_once(tmp_path: Path):
    batch = batch_of(read(AutoTokenizer.from_pretrained(TINY / "model"), ROWS))
    assert batch.prompt_index.tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 3]
    assert torch.equal(share_prompts(batch).prompt_index, batch.prompt_index)


@pytest.mark.parametrize("options", [["--zero", "0"], ["--zero", "2"], ["--zero", "3"], ["--zero", "2", "--lora", "4"]])
def test_two_processes_make_the_update_of_one(tmp_path: Path, options: list[str]):
    """Takes long because each starts DeepSpeed. Without ZeRO they run their passes together."""
    together = ["--sequence-parallel", "2"] if options == ["--zero", "0"] else []
    for name, processes, own in (("one", 1, ["--budget", "1000"]), ("two", 2, ["--budget", "90", *together])):
        (tmp_path / name).mkdir()
        launch("worker_sft.py", str(tmp_path / name), *options, *own, processes=processes)
    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("one", "two"))
    names = ("supervised/loss", "supervised/accuracy", "supervised/tokens", "supervised/rows", "optimizer/grad_norm")
    for first, second in zip(one[:2], two[:2], strict=True):
        assert [first[name] for name in names] == pytest.approx([second[name] for name in names], rel=1e-4)
        assert first["supervised/rows"] == 7
    assert one[2] == pytest.approx(two[2], rel=1e-4)
    before = load_file(TINY / "model" / "model.safetensors")
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two")]
    moved = sum(float((weights[0][name] - value).norm()) for name, value in before.items())
    apart = sum(float((weights[0][name] - weights[1][name]).norm()) for name in before)
    assert apart < 0.02 * moved  # AdamW's first steps have a size of their own, whatever the gradient's
    saved = load_file(next((tmp_path / "two/run/checkpoints").glob("*/hf/model.safetensors")))
    assert all(torch.equal(saved[name], weights[1][name]) for name in saved)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_a_trained_model_says_what_its_rows_say_and_ends(tmp_path: Path):
    """Padding has the id of the end token in the tiny tokenizer."""
    rows = [ROWS[1], ROWS[2], {"messages": MORE}, {"prompt": "Once upon", "completion": " a time 7"}]
    config = sft_config(
        tmp_path / "run",
        optimizer={"learning_rate": 3e-3, "warmup_steps": 3},
        evaluation={"num_questions": 2, "max_completion_tokens": 40},
        run={"steps": 60},
    )
    questions = [{"question": "What is 1+1?", "answer": "2"}, {"question": "What is 2+2?", "answer": "4"}]
    trainer = SupervisedTrainer(config, train_dataset=rows, eval_dataset=questions)
    last = trainer.train()
    steps = steps_of(tmp_path / "run")
    assert steps[-1]["supervised/loss"] < 0.1
    assert steps[-1]["supervised/accuracy"] == 1
    tokenizer, lm = AutoTokenizer.from_pretrained(last / "hf"), AutoModelForCausalLM.from_pretrained(last / "hf")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for group in trainer.order.groups:
        prompt, completion = group.prompt.token_ids, group.completions[0]
        masks = completion.trained or [True] * len(completion.token_ids)
        start = 0
        while start < len(masks):  # each turn after all before it
            stop = masks.index(False, start) if False in masks[start:] else len(masks)
            seen = torch.tensor([[*prompt, *completion.token_ids[:start]]])
            said = lm.generate(seen, attention_mask=torch.ones_like(seen), do_sample=False, max_new_tokens=60)
            assert said[0, seen.shape[1] :].tolist() == completion.token_ids[start:stop]
            start = masks.index(True, stop) if True in masks[stop:] else len(masks)
    evaluated = [row for row in read_jsonl(tmp_path / "run/evaluations.jsonl") if row["step"] == 60]
    assert [row["completion"] for row in evaluated] == [row["completion"] for row in rows[:2]]
    assert [row["finish_reason"] for row in evaluated] == ["stop", "stop"]
    assert (tmp_path / "run/report.html").stat().st_size > 50_000


RESUMED = {
    "training": {"rows_per_update": 4, "epochs": 1.5},
    "optimizer": {"warmup_steps": 2},
    "evaluation": {"num_rows": 3, "num_questions": 2, "every_steps": 2, "max_completion_tokens": 12},
    "data": {"eval_name": str(QUESTIONS), "template": "chat", "max_tokens": 200},
    "checkpoint": {"every_steps": 2},
}


def resumed(run: Path, **sections: Any) -> SupervisedTrainer:
    return SupervisedTrainer(sft_config(run, **RESUMED, **sections, run={"resume": "auto"}), train_dataset=ROWS)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("*/hf/model.safetensors"))[-1])


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert steps_of(run) == steps_of(whole)
    losses = [
        [row for row in read_jsonl(path / "metrics.jsonl") if "supervised/held_out_loss" in row]
        for path in (run, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == len({row["step"] for row in losses[0]})
    assert read_jsonl(run / "evaluations.jsonl") == read_jsonl(whole / "evaluations.jsonl")
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    resumed(run).train()
    return run


def test_a_run_has_a_held_out_loss_and_a_rate_that_ends_at_a_tenth(whole_run: Path):
    steps = steps_of(whole_run)
    assert len(steps) == 5
    measured = {r["step"]: r for r in read_jsonl(whole_run / "metrics.jsonl") if "supervised/held_out_loss" in r}
    assert sorted(measured) == [0, 2, 4, 5]
    assert measured[5]["supervised/held_out_loss"] < measured[0]["supervised/held_out_loss"]
    rates = [row["optimizer/learning_rate"] for row in steps]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.25))  # cos(2/3 of the way)
    assert steps[-1]["progress/epoch"] == pytest.approx(1.5, abs=0.05)


def test_a_resumed_run_is_the_run_that_was_not_interrupted_to_the_bit(tmp_path: Path, whole_run: Path):
    first = resumed(tmp_path / "run")
    first._evaluate_if_due()
    first.train_step()
    first.save()
    first.train_step()  # lost when the run is stopped here; done again after the resume
    first.close()
    resumed(tmp_path / "run").train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not_been(tmp_path: Path, whole_run: Path):
    trainer = resumed(tmp_path / "run")
    own, calls = trainer.learner.accumulate, []

    def accumulate(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return own(*arguments)

    trainer.learner.accumulate = accumulate  # type: ignore[method-assign]
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.reason == "SIGTERM"
    assert 1 <= trainer.state.step <= 3
    resumed(tmp_path / "run").train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_a_run_out_of_memory_goes_on_with_smaller_passes(tmp_path: Path):
    trainer = SupervisedTrainer(sft_config(tmp_path / "run", run={"steps": 3}), train_dataset=ROWS)
    own, calls = trainer.learner.accumulate, []

    def accumulate(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments)

    trainer.learner.accumulate = accumulate  # type: ignore[method-assign]
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.settings[-1] == "memory.micro_batch_tokens=200"
    assert (trainer.state.step, trainer.state.position) == (1, 4)


def test_other_rows_or_settings_are_not_resumed_in_silence(tmp_path: Path, whole_run: Path):
    config = sft_config(whole_run, **RESUMED, run={"resume": "auto"})
    with pytest.raises(ValueError, match="the rows changed since"):
        SupervisedTrainer(config, train_dataset=[*ROWS[:-1], {"prompt": "Once", "completion": " more"}])
    with pytest.raises(ValueError, match=r"data.loss_on is 'last'; .* was written with 'all'"):
        SupervisedTrainer(SupervisedConfig.of(config, {"data.loss_on": "last"}), train_dataset=ROWS)


def test_the_watchdog_speaks_when_the_loss_runs_away(tmp_path: Path):
    config = sft_config(tmp_path, watchdog={"patience": 2, "loss": "stop"})
    dog = watchdog.Watchdog(config.parts, [])
    alarms = [dog.observe(n, {"supervised/loss": loss}) for n, loss in enumerate([0.5] * 5 + [0.9, 1.2, 1.3])]
    assert [[alarm.rule for alarm in each] for each in alarms] == [[]] * 6 + [["loss"], []]  # 1.05 of 0.5
    assert alarms[6][0].action == "stop"


def test_a_run_rolls_back_when_its_loss_runs_away_and_leaves_a_post_mortem(tmp_path: Path):
    config = sft_config(
        tmp_path / "run",
        watchdog={"patience": 2, "max_skipped": 2, "loss": "roll_back", "max_roll_backs": 1},
        checkpoint={"every_steps": 1, "keep": 6},
        run={"steps": 8},
    )
    trainer = SupervisedTrainer(config, train_dataset=ROWS)
    own = trainer.learner.measure

    def measure(meter: Any, micro: Any, objective: Any, predicted: Any, result: Any) -> None:
        wild = trainer.state.step >= 4 and not trainer.guard.roll_backs.rows
        own(meter, micro, objective, predicted._replace(logprobs=predicted.logprobs - 50 * wild), result)

    trainer.learner.measure = measure
    trainer.train()
    (back,) = read_jsonl(tmp_path / "run/roll_backs.jsonl")
    assert (back["rule"], back["rate_factor"]) == ("loss", 0.5)
    assert [row["step"] for row in steps_of(tmp_path / "run")] == list(range(1, 9))
    (remains,) = (tmp_path / "run/post_mortem").iterdir()
    assert len(read_jsonl(remains / "completions.jsonl")) == 4
    assert load_file(remains / "update-rank-0.safetensors")["weights"].sum() == pytest.approx(1, rel=1e-5)


def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = SupervisedTrainer(sft_config(tmp_path / "run", run={"steps": 2}), train_dataset=ROWS)
    before = {name: value.clone() for name, value in trainer.policy.lm.named_parameters()}
    passes = trainer._deal(trainer.order.draw())
    passes[0].weights[0] = float("inf")
    trainer._deal = lambda rows: passes  # type: ignore[method-assign]
    metrics = trainer.train_step()
    trainer.close()
    assert metrics["optimizer/skipped"] == 1
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.lm.named_parameters())
    assert "is not finite; an update of step 1 is left out" in capsys.readouterr().out


def test_steps_by_hand_end_with_the_rows_or_go_on_past_the_steps(tmp_path: Path):
    trainer = SupervisedTrainer(sft_config(tmp_path / "run", training={"epochs": 1}), train_dataset=ROWS)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    with pytest.raises(
        RuntimeError, match=r"^all \d+ updates are done; training\.epochs is 1, .* Make a trainer with more"
    ):
        trainer.train_step()
    trainer.close()
    trainer = SupervisedTrainer(sft_config(tmp_path / "steps", run={"steps": 1}), train_dataset=ROWS)
    assert [trainer.train_step()["optimizer/skipped"] for _ in range(2)] == [0, 0]
    trainer.close()


# ---- as a user starts it ---------------------------------------------------------------------------------------------


def call(*arguments: str, cwd: Path) -> Any:
    return warm.run(
        ["-m", "grpo", "sft", *arguments], cwd=cwd, timeout=200, env={**clean_environment(), "PYTHONPATH": str(ROOT)}
    )


def test_the_command_trains_on_a_file_beside_its_configuration(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = sft_config(Path("run"), data={"name": "rows.jsonl"}, evaluation={"num_rows": 2})
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    (tmp_path / "elsewhere").mkdir()
    done = call("--config", "../my.yaml", "--set", "training.epochs=1", "run.seed=3", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16 rows" in done.stdout
    assert "held-out rows, step 0:  loss" in done.stdout
    run = tmp_path / "elsewhere/run"
    assert SupervisedConfig.load(run / "config.yaml").run.seed == 3
    assert len(steps_of(run)) == 4
    refused = call("--config", "../my.yaml", "--set", "data.max_tokens=2", cwd=tmp_path / "elsewhere")
    assert (refused.returncode, refused.stderr.splitlines()[0][:25]) == (2, "error: data.max_tokens is")


def test_a_run_of_the_script_that_is_stopped_by_its_time_exits_with_75(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my.yaml").write_text(
        sft_config(Path("run"), data={"name": "rows.jsonl"}, run={"max_hours": 1e-6}).to_yaml()
    )
    command = [str(ROOT / "scripts/train_sft.py"), "--config", "my.yaml"]
    done = warm.run(command, cwd=tmp_path, timeout=200, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == EXIT_STOPPED, done.stderr[-3000:]
    assert "run.resume=auto" in done.stdout


def test_the_page_of_documentation_has_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/sft.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(code, {})
    assert (tmp_path / "runs/sft-example/checkpoints/step-00000002/hf").is_dir()


# ---- before a run ----------------------------------------------------------------------------------------------------


def test_a_dry_run_learns_the_longest_update_and_leaves_nothing_behind(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    learned = []

    def accumulate(learner: Any, passes: list[Any], *rest: Any) -> Any:
        learned.append(sum(len(micro.tokens) for micro in passes))
        return own(learner, passes, *rest)

    own = Learner.accumulate
    monkeypatch.setattr(Learner, "accumulate", accumulate)
    rows = [{"prompt": f"{length}", "completion": " b" * length} for length in (3, 90, 4, 5, 6, 100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = sft_config(
        tmp_path / "run",
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        training={"rows_per_update": 1, "epochs": 2},
        evaluation={"num_rows": 0, "num_questions": 2, "max_completion_tokens": 8},
    )
    monkeypatch.setattr("grpo.run.held_out.HeldOut.evaluate", lambda *_, **__: pytest.fail("it evaluated"))
    assert supervised.check(config) == 0
    sizes = [len(tokenizer.encode(str(length))) + length + 1 for length in (3, 90, 4, 5, 6, 100)]
    assert learned == [max(sizes)] * 3  # an update of one row has no fuller pass
    said = capsys.readouterr().out
    assert (
        f"The longest of 12 updates, 2 times: 1 row with {max(sizes)} tokens. The longest row has {max(sizes)}." in said
    )
    assert f"12 updates on {2 * sum(sizes)} tokens take about" in said
    assert "A checkpoint takes about 0.007" in said
    assert "at most 1 are there at once" in said  # the first is due after 50
    assert not (tmp_path / "run").exists()


def test_a_dry_run_has_no_workers_that_grade_once_its_questions_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def start(worker: _Worker) -> None:
        own(worker)
        started.append(worker)

    own, started = _Worker.start, []
    monkeypatch.setattr(_Worker, "start", start)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    config = sft_config(
        tmp_path / "run",
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        evaluation={"num_rows": 0, "num_questions": 2, "max_completion_tokens": 8},
        scoring={"num_workers": 2},
    )
    trainer = supervised.rehearse(config)  # which stays, and so does its collector
    assert trainer.collector is not None
    assert len(started) == 2
    assert [worker.is_alive for worker in started] == [False, False]


@pytest.mark.parametrize("num_questions", [0, 2])
def test_a_dry_run_holds_a_whole_copy_of_a_sharded_model_where_the_run_does(tmp_path: Path, num_questions: int):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    config = sft_config(
        tmp_path / "run",
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl") if num_questions else None},
        evaluation={"num_rows": 0, "num_questions": num_questions}
        | ({"max_completion_tokens": 8} if num_questions else {}),
        distributed={"zero_stage": 3},
    )
    assert supervised.rehearse(config).policy.holds_whole == bool(num_questions)


def _without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.observe.sinks.find_spec", lambda name: None)


def _unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.rollout.engine.unsupported", lambda *given, **named: "it is odd")


@pytest.mark.parametrize(
    ("sections", "said", "prepare"),
    [
        pytest.param(
            {"memory": {"release_kv_cache": True}},
            r"^memory\.release_kv_cache is true; .* no GPU here\. Remove it\.$",
            None,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can release keys and values"),
        ),
        (
            {"evaluation": {"engine": "native"}},
            r"^evaluation\.engine is native; it is odd\. Set evaluation\.engine to hf",
            _unsupported,
        ),
        ({"data": {"eval_name": None}}, r"^evaluation\.num_questions is 2; data\.eval_name is missing", None),
        (
            {"data": {"eval_answer_regex": "(never)"}},
            r"^data\.eval_answer_regex is '\(never\)'; it finds no group",
            None,
        ),
        ({"evaluation": {"max_completion_tokens": 5000}}, r"^evaluation\.max_completion_tokens is 5000; with", None),
        (
            {"rewards": [{"function": "acuracy"}]},
            r"^rewards\.\*\.function is 'acuracy'; .* did you mean accuracy",
            None,
        ),
        ({"memory": {"kv_cache_gib": 1e-6}}, r"^memory\.kv_cache_gib is 1e-06", None),
        ({"logging": {"tensorboard": True}}, r"^logging\.tensorboard is true; it needs", _without_tensorboard),
    ],
    ids=["release", "engine", "questions", "answers", "positions", "rewards", "cache", "logging"],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    sections: dict[str, Any],
    said: str,
    prepare: Callable[[pytest.MonkeyPatch], None] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if prepare is not None:
        prepare(monkeypatch)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    usual: dict[str, Any] = {
        "data": {"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        "evaluation": {"num_rows": 0, "num_questions": 2, "max_completion_tokens": 8},
    }
    rewards = {"rewards": sections["rewards"]} if "rewards" in sections else {}
    changed = {name: usual.get(name, {}) | values for name, values in sections.items() if name != "rewards"}
    config = SupervisedConfig(**sft_settings(tmp_path / "run", **usual | changed), **rewards)
    with pytest.raises(ValueError, match=said) as of_the_run:
        SupervisedTrainer(config)
    with pytest.raises(ValueError, match=said) as of_the_dry_run:
        supervised.check(config)
    free = re.compile(r"[\d.]+(?= GiB)|(?<= and )[\d.]+")  # which changes meanwhile
    assert free.sub("N", str(of_the_dry_run.value)) == free.sub("N", str(of_the_run.value))


def test_an_error_of_the_evaluation_names_its_own_setting_and_leaves_the_names_of_files(tmp_path: Path):
    model = tmp_path / "rollout.v2/rollout.engine"
    shutil.copytree(TINY / "model", model)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    config = sft_config(
        tmp_path / "run",
        model={"name": str(model)},
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        evaluation={"num_questions": 2, "max_completion_tokens": 5000},
    )
    with pytest.raises(ValueError, match=r"^evaluation\.max_completion_tokens is 5000; with") as caught:
        SupervisedTrainer(config)
    assert f"model.name {str(model)!r}" in str(caught.value)
    said = (
        "rollout.engine is hf (rollout.stop); take rollout.engine. 'rollout.engine' rollout.weights rollout.engine/hf"
    )
    ours = "evaluation.engine is hf (evaluation.stop); take evaluation.engine. 'rollout.engine' rollout.weights rollout.engine/hf"
    with pytest.raises(ValueError, match=f"^{re.escape(ours)}$"), as_spelled_here():
        raise ValueError(said)


def test_what_is_said_of_the_engine_names_the_setting_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("grpo.rollout.engine._unsupported_by_design", lambda lm: "its attention is odd")
    questions = [{"question": "What is 1+1?", "answer": "2"}]
    asks = {"num_questions": 1, "max_completion_tokens": 8}
    config = sft_config(tmp_path / "run", evaluation={**asks, "engine": "auto"})
    SupervisedTrainer(config, train_dataset=ROWS[:4], eval_dataset=questions).close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "its attention is odd" in line]
    assert lines == ["evaluation.engine is auto: sampling with transformers' generate, because its attention is odd"]
    config = sft_config(tmp_path / "run", evaluation={**asks, "engine": "native"})
    with pytest.raises(
        ValueError, match=r"^evaluation\.engine is native; its attention is odd\. Set evaluation\.engine to"
    ):
        SupervisedTrainer(config, train_dataset=ROWS[:4], eval_dataset=questions)


def test_a_dry_run_fills_a_pass_of_each_process_as_far_as_rows_can(tokenizer):
    """Of the update with the most tokens the passes are two of 120, of another one 155."""
    rows = [{"prompt_ids": [n], "completion_ids": [5] * (size - 1)} for n, size in enumerate((60, 60, 60, 60, 80, 75))]
    order = RowOrder(read(tokenizer, rows, form="ids"), TrainingConfig(rows_per_update=4), seed=0)
    assert [order.sizes[group.prompt.row] for group in supervised.fullest(order, 160, num_processes=1)] == [80, 75]
    two = supervised.fullest(order, 160, num_processes=2)
    assert [order.sizes[group.prompt.row] for group in two] == [80, 75, 60, 60]
    few = supervised.fullest(RowOrder(order.groups, TrainingConfig(rows_per_update=1), seed=0), 160, num_processes=1)
    assert [order.sizes[group.prompt.row] for group in few] == [80]
    fewer = RowOrder(order.groups, TrainingConfig(rows_per_update=4, tokens_per_update=140), seed=0)
    assert [order.sizes[group.prompt.row] for group in supervised.fullest(fewer, 160, num_processes=1)] == [80, 60]


def test_a_dry_run_that_does_not_fit_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("grpo.policy.policy.Policy.backward", full)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    config = sft_config(
        tmp_path / "run", data={"name": str(tmp_path / "rows.jsonl")}, memory={"micro_batch_tokens": 512}
    )
    assert supervised.check(config) == 1
    said = capsys.readouterr().err
    assert "It does not fit: out of memory in forward and backward passes or the optimizer step (update)." in said
    assert "First, set memory.micro_batch_tokens from 512 to 256" in said
    assert (
        said.splitlines()[-1]
        == "If that is not enough, set data.max_tokens from 200 to 100 (longer rows are left out)."
    )


def test_a_dry_run_that_does_not_fit_on_a_gpu_knows_what_its_keys_and_values_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(policy: Any, *_: Any, **__: Any) -> None:
        object.__setattr__(policy.processes, "device", torch.device("cuda"))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("grpo.policy.policy.Policy.backward", full)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}))
    config = sft_config(
        tmp_path / "run",
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        evaluation={"num_rows": 0, "num_questions": 2, "max_completion_tokens": 8, "engine": "native"},
        memory={"kv_cache_gib": 0.125},
    )
    assert supervised.check(config) == 1
    assert (
        "First, set memory.release_kv_cache from false to true (the 0.125 GiB of keys and values are free from the end of "
        "sampling on)."
    ) in capsys.readouterr().err


def test_a_role_that_no_template_knows_is_refused(tmp_path: Path):
    turns = [("user", "1+1?"), ("bot", "2"), ("user", "2+2?"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=r"^row 0 .* has a message of the role 'bot'; the roles are system, .* Rename it"
    ):
        SupervisedTrainer(sft_config(tmp_path / "run", data={"name": str(tmp_path / "rows.jsonl")}))
