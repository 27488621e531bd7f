"""On-policy distillation: a teacher where the reference stands, whose log-probabilities are the advantage of every token."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, launch, read_json, tiny_config
from test_sft import sft_config
from test_trainer import steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo import SupervisedTrainer, Trainer
from grpo.algorithm.loss import grpo_loss
from grpo.algorithm.objective import Objective
from grpo.system.jsonl import read_jsonl
from grpo.types import Group

DISTILS: dict[str, Any] = {
    "algorithm": {"kl_coef": 1.0, "kl_estimator": "k2", "aggregation": "token"},
    "rewards": [{"function": "accuracy", "weight": 0}],
    "optimizer": {"learning_rate": 1e-3},
}


def own_logprobs(model: Path, groups: list[Group]) -> torch.Tensor:
    """(T,) of the completions in plain forward passes of a model, one sequence each."""
    lm, found = AutoModelForCausalLM.from_pretrained(model), []
    for group in groups:
        for completion in group.completions:
            prompt = group.prompt.token_ids
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logprobs = lm(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(found)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It works a problem out, as none of the tiny model's own dialogues does without a guess."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    rows = [
        {
            **row,
            "completion": row["completion"].replace(row["completion"].split("check.\n")[0] + "check.\n", " <think> "),
        }
        for row in read_jsonl(TINY / "worked.jsonl")
    ]
    training = {"rows_per_update": 16, "epochs": 3}
    config = sft_config(run, training=training, optimizer={"learning_rate": 5e-4}, checkpoint={"every_steps": 0})
    return SupervisedTrainer(config, train_dataset=rows).train() / "hf"


def test_the_gradient_is_that_of_the_reverse_kl_as_an_advantage_of_every_token():
    torch.manual_seed(0)
    logprobs = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher, weights, lens = torch.randn(7, dtype=torch.float64), torch.rand(7).double(), torch.tensor([3, 4])
    objective = Objective(kl_coef=1.0, kl_estimator="k2")
    nothing = torch.zeros(7).double()  # of rewards
    ours = grpo_loss(logprobs, nothing, weights, objective, completion_lens=lens, ref_logprobs=teacher).loss
    advantages = (teacher - logprobs).detach()
    plain = grpo_loss(logprobs, advantages, weights, Objective(), completion_lens=lens).loss
    torch.testing.assert_close(*(torch.autograd.grad(loss, logprobs)[0] for loss in (ours, plain)))


def test_a_student_comes_to_say_what_its_teacher_says(tmp_path: Path, teacher: Path):
    config = tiny_config(
        tmp_path / "run",
        **DISTILS,
        teacher={"name": str(teacher)},
        data={"eval_name": str(TINY / "test.jsonl")},
        rollout={"num_prompts": 8, "group_size": 4, "max_completion_tokens": 48},
        memory={"micro_batch_tokens": 1024},
        evaluation={"num_questions": 32, "temperature": 1.0},
        run={"steps": 25},
    )
    Trainer(config).train()
    steps = steps_of(tmp_path / "run")
    before, after = (sum(row["policy/kl"] for row in part) / 3 for part in (steps[:3], steps[-3:]))
    assert after < before / 4
    rows = read_jsonl(tmp_path / "run/evaluations.jsonl")
    guesses = [sum("guess" in row["completion"] for row in rows if row["step"] == step) for step in (0, 25)]
    assert guesses[0] > 8
    assert guesses[1] <= 2
    assert all(row["reward/mean"] == 0 for row in steps)
    assert not any(row["watchdog/alarms"] for row in steps)  # the reward is as constant as it was meant to be


@pytest.mark.parametrize(
    ("options", "processes"), [(["--zero", "0"], 1), (["--zero", "3"], 2), (["--zero", "2", "--lora", "4"], 2)]
)
def test_the_teacher_says_what_it_says_alone_in_every_layout(tmp_path: Path, teacher: Path, options, processes: int):
    launch("worker_teacher.py", str(tmp_path), str(teacher), *options, processes=processes)
    gap, *_ = read_json(tmp_path / "found.json")
    assert gap < 1e-4  # float32


def test_two_processes_distil_as_one(tmp_path: Path, teacher: Path):
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        launch("worker_teacher.py", str(tmp_path / name), str(teacher), "--zero", "2", processes=processes)
    one, two = (read_json(tmp_path / name / "found.json") for name in ("one", "two"))
    for first, second in zip(one[1:], two[1:], strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_a_teacher_with_other_tokens_is_refused_by_name(tmp_path: Path):
    other = shutil.copytree(TINY / "model", tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = list(vocabulary)[50:52]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert (
        AutoTokenizer.from_pretrained(other).get_vocab()[a]
        != AutoTokenizer.from_pretrained(TINY / "model").get_vocab()[a]
    )
    config = tiny_config(tmp_path / "run", **DISTILS, teacher={"name": str(other)})
    with pytest.raises(
        ValueError, match=r"teacher.name is '.*other'; its vocabulary is not that of model.name .* 2 of them different"
    ):
        Trainer(config)
    with pytest.raises(ValueError, match=r"teacher.name is '/nowhere'; there is no such directory"):
        Trainer(tiny_config(tmp_path / "run", **DISTILS, teacher={"name": "/nowhere"}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"algorithm": {"kl_coef": 0.0}}, "nothing is learned from it, because algorithm.kl_coef is 0"),
        ({"algorithm": {"kl_coef": 1.0, "kl_estimator": "k1"}}, "has no gradient on average"),
        ({"algorithm": {"kl_coef": 1.0, "reference_refresh_steps": 4}}, "would take the teacher's place"),
        ({"preflight": {"num_questions": 4}}, "the preflight asks whether rewards tell answers apart"),
        ({"rewards": []}, r"rewards is \[\] without any weight"),
        ({"teacher": {"revision": "v1"}}, "teacher.revision is 'v1'; there is no teacher"),
    ],
)
def test_settings_that_leave_a_teacher_without_effect_are_refused(tmp_path: Path, sections: dict, said: str):
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, **{**DISTILS, "teacher": {"name": "t"}, **sections})


def test_without_a_teacher_some_reward_has_a_weight(tmp_path: Path):
    with pytest.raises(ValueError, match="without any weight"):
        tiny_config(tmp_path, rewards=DISTILS["rewards"])
