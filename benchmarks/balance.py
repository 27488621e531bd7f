"""How long processes would wait for each other in an update whose completions are of many lengths; on a CPU, without a model.

    python benchmarks/balance.py --size 7b --processes 8

The lengths are log-normal, of one mean a prompt and --mean-tokens over all; passes are dealt as in training. What a pass takes is
counted in operations, attention's included; printed is the share of their time that processes would wait (batch/imbalance) if
passes that run at the same time were matched by tokens alone, and as they are.
"""

from __future__ import annotations

import argparse
import math
import random
from statistics import mean

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from workload import SHAPES, model_config

from grpo.algorithm.batch import Outline, pass_cost, plan_passes
from grpo.policy.language_model import pair_cost

PROMPT_TOKENS = 150
SEEDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--mean-tokens", type=int, default=4000)
    parser.add_argument("--most-tokens", type=int, default=32000)
    parser.add_argument("--pass-tokens", type=int, default=33000, help="memory.micro_batch_tokens")
    args = parser.parse_args()
    with init_empty_weights():
        cost = pair_cost(AutoModelForCausalLM.from_config(model_config(args.size)))
    outlines = [lengths(args, random.Random(seed)) for seed in range(SEEDS)]
    for name, matched in (("by tokens", 0.0), ("by operations", cost)):
        shares = [waiting(args, outline, matched=matched, cost=cost) for outline in outlines]
        print(
            f"passes matched {name}: {mean(shares):.1%} of the time is waiting, {min(shares):.1%} to {max(shares):.1%}"
        )


def lengths(args: argparse.Namespace, rng: random.Random) -> Outline:
    """Of a minibatch."""
    completions, prompts = [], []
    for prompt in range(args.prompts):
        middle = math.log(args.mean_tokens) - 0.5 + rng.gauss(0, 0.5)
        for _ in range(args.completions):
            completions.append(int(min(args.most_tokens, max(20, rng.lognormvariate(middle, 1.0)))))
            prompts.append(prompt)
    lens = torch.tensor(completions)
    return Outline(torch.full_like(lens, PROMPT_TOKENS), lens, lens, torch.tensor(prompts), torch.ones(len(lens)))


def waiting(args: argparse.Namespace, outline: Outline, *, matched: float, cost: float) -> float:
    """Share of the processes' time."""
    plan = plan_passes(outline, token_budget=args.pass_tokens, num_processes=args.processes, pair_cost=matched)
    at_once = [[pass_cost(outline, each, pair_cost=cost) for each in passes] for passes in zip(*plan, strict=True)]
    return 1 - sum(map(sum, at_once)) / sum(args.processes * max(each) for each in at_once)


if __name__ == "__main__":
    main()
