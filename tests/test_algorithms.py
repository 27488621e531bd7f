"""Every row of docs/algorithms.md trains the tiny model, beside the algorithm's own formula in Python loops and plain AdamW."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, FixedGenerator, digits_in_text, number_in_text, tiny_config
from slow_family import FAMILY, Algorithm, Told
from transformers import AutoModelForCausalLM

from grpo import Reward, Trainer
from grpo.config import Config
from grpo.rollout.grouping import all_at_once
from grpo.system.jsonl import read_jsonl
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling

TABLE = dict(re.findall(r"^\| ([^|`]+) \| `(algorithm\.[^`]+)` \|", (ROOT / "docs/algorithms.md").read_text(), re.M))
LONGEST, RATE = 24, 3e-4
WITH_RESULTS = ("GRPO", "80/20", "GSPO", "MIS of completions")


def test_every_row_of_the_table_has_a_slow_reference_and_the_other_way_round():
    assert TABLE.keys() == FAMILY.keys()


class Replay(FixedGenerator):
    """Answers with the groups that it is given."""

    groups: list[Group]

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        assert prompts == [group.prompt for group in self.groups]
        return all_at_once(self.groups, on_group)


def sample_from(lm: torch.nn.Module, prompts: list[Prompt], *, result_tokens: int = 0) -> list[Group]:
    """Three completions each, the first cut off, with log-probabilities that are not quite the model's."""
    rng, groups = random.Random(7), []
    for group in FixedGenerator(longest=8).sample(prompts, Sampling(8), num_completions=3, seed=0):
        group = with_results(group, result_tokens) if result_tokens else group
        completions = []
        for number, completion in enumerate(group.completions):
            with torch.no_grad():
                drawn = iter(outcomes(lm, group, completion)[0].tolist())
            logprobs = [x if math.isnan(x) else next(drawn) + rng.gauss(0, 0.8) for x in completion.logprobs]
            reason = "length" if number == 0 else "stop"
            completions.append(replace(completion, logprobs=logprobs, finish_reason=reason))
        groups.append(Group(group.prompt, completions))
    return groups


def row_config(path: Path, settings: str) -> Config:
    base = tiny_config(
        path / "run",
        rollout={"num_prompts": 4, "group_size": 3, "max_completion_tokens": LONGEST},
        algorithm={"kl_coef": 0.001, "num_minibatches": 2, "max_sampling_gap": 100},
        optimizer={"learning_rate": RATE, "max_grad_norm": 0.5},
        logging={"completions_every": 0},
        checkpoint={"every_steps": 0},
    )
    (path / "base.yaml").write_text(base.to_yaml())
    return Config.load(path / "base.yaml", settings.split())


def outcomes(lm: torch.nn.Module, group: Group, completion: Completion) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each token that the model wrote, from a pass over this sequence alone."""
    start = len(group.prompt.token_ids)
    ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
    own = [
        place for place in range(len(completion.token_ids)) if completion.trained is None or completion.trained[place]
    ]
    logits = lm(input_ids=ids).logits[0, start - 1 : -1][own]
    every = logits.log_softmax(-1)
    return every.gather(1, ids[0, start:][own].unsqueeze(1)).squeeze(1), -(every.exp() * every).sum(-1)


def with_results(group: Group, num_tokens: int) -> Group:
    """The same after a tool has answered in the middle of every second completion, with numbers that nobody may use."""
    completions = []
    for number, each in enumerate(group.completions):
        half, ids = len(each.token_ids) // 2, [(7 * place) % 250 + 5 for place in range(num_tokens * (number % 2))]
        completions.append(
            replace(
                each,
                token_ids=each.token_ids[:half] + ids + each.token_ids[half:],
                logprobs=each.logprobs[:half] + [math.nan] * len(ids) + each.logprobs[half:],
                trained=[True] * half + [False] * len(ids) + [True] * (len(each.token_ids) - half),
            )
        )
    return Group(group.prompt, completions)


def own_logprobs(completion: Completion) -> list[float]:
    return [x for x in completion.logprobs if not math.isnan(x)]


def advantages_of_all(
    algorithm: Algorithm, groups: list[Group], lm: torch.nn.Module, reference: torch.nn.Module
) -> list[list[float]]:
    every = [advantages_of(algorithm, group, lm, reference) for group in groups]
    if not algorithm.over_batch:
        return every
    flat = [x for each in every for x in each]
    std = math.sqrt(sum((x - sum(flat) / len(flat)) ** 2 for x in flat) / len(flat))
    return [[(x - sum(flat) / len(flat)) / std for x in each] for each in every]


def advantages_of(algorithm: Algorithm, group: Group, lm: torch.nn.Module, reference: torch.nn.Module) -> list[float]:
    if algorithm.separate:
        first, second = (
            algorithm.advantages([reward(completion.text) for completion in group.completions])
            for reward in (number_in_text, digits_in_text)
        )
        return [x + 0.5 * y for x, y in zip(first, second, strict=True)]
    rewards = [float(completion.text) for completion in group.completions]
    if algorithm.kl_in_reward:
        with torch.no_grad():
            for number, completion in enumerate(group.completions):
                kl = outcomes(lm, group, completion)[0] - outcomes(reference, group, completion)[0]
                rewards[number] -= algorithm.kl_in_reward * sum(kl.tolist())
    return algorithm.advantages(rewards)


@pytest.mark.parametrize("name", FAMILY)
def test_two_steps_of_each_algorithm_equal_its_own_formula_in_loops(tmp_path: Path, name: str):
    check_two_steps(tmp_path, name)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_a_tools_thousand_tokens_are_read_and_are_in_no_sum_no_length_and_no_ratio(tmp_path: Path, name: str):
    metrics = check_two_steps(tmp_path, name, result_tokens=1000)
    assert metrics["completion/length_max"] <= 8
    assert metrics["policy/sampling_gap_max"] < 10, "of a result it would be NaN"


def check_two_steps(tmp_path: Path, name: str, *, result_tokens: int = 0) -> dict[str, float]:
    """Compare losses and gradients; the metrics of the first step."""
    algorithm, config = FAMILY[name], row_config(tmp_path, TABLE[name])
    rewards = [number_in_text, Reward(digits_in_text, weight=0.5)] if algorithm.separate else [number_in_text]
    trainer = Trainer(config, rewards=rewards, train_dataset=read_jsonl(TINY / "train.jsonl")[:8])
    trainer.collector.generator = Replay()
    model, reference = (AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for _ in range(2):
        first = trainer.prompts.position
        asked = [trainer.prompts._at(first + i) for i in range(4)]
        groups = sample_from(model, asked, result_tokens=result_tokens)
        trainer.collector.generator.groups = groups
        parts = [groups[:2], groups[2:]] if config.algorithm.num_minibatches == 2 else [groups]
        advantages = iter(advantages_of_all(algorithm, groups, model, reference))
        minibatches = []
        for part in parts:
            told = []
            for group in part:
                for advantage, completion in zip(next(advantages), group.completions, strict=True):
                    with torch.no_grad():
                        old, old_entropies = outcomes(model, group, completion)
                        ref, _ = outcomes(reference, group, completion)
                    before = [each.tolist() for each in (old, old_entropies, ref)]
                    cut_off, targets = completion.finish_reason == "length", completion.own_ids
                    told.append((group, completion, (advantage, *before, own_logprobs(completion), cut_off, targets)))
            minibatches.append(told)
        losses, norms = [], []
        for told in config.algorithm.num_epochs * minibatches:
            tolds = []
            for group, completion, (advantage, *before) in told:
                now, entropies = outcomes(model, group, completion)
                tolds.append(Told(advantage, now, entropies, *before))
            loss = algorithm.loss(tolds, LONGEST)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            losses.append(loss.item())
            optimizer.step()
        metrics = trainer.train_step()
        rows.append(metrics)
        # sums in another order: float32, and after the first update weights that differ by a thousandth of a step
        assert metrics["optimizer/loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-3, abs=2e-5)
        assert metrics["optimizer/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=2e-3, abs=1e-6)
    trainer.close()
    assert all(math.isfinite(row["optimizer/grad_norm"]) for row in rows)
    assert rows[0]["optimizer/grad_norm"] > 1e-2
    # a gate has no bound, and no token of the tiny model is likely enough to move by 0.2: tests/test_loss.py has such ones
    if (config.algorithm.clip_high or 1) < 1 and config.algorithm.clip not in ("soft", "divergence"):
        assert any(row["policy/clip_fraction"] > 0 for row in rows), (
            "no ratio reached a bound, so the bounds were not tested"
        )
    if config.algorithm.importance != "none":
        assert any(0 < row["policy/importance_bounded"] < 1 for row in rows)
    if config.algorithm.clip_cov:
        assert all(row["policy/selected"] < 1 for row in rows), "no covariance was within the bounds"
    return rows[0]
