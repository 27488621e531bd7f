"""Tokens per second of supervised training, beside a plain loop of transformers: padded batches, its own loss, torch's AdamW.

python benchmarks/sft.py
python benchmarks/sft.py --model Qwen/Qwen2.5-0.5B --rows rows.jsonl --max-tokens 4096 --rows-per-update 64

Both learn the same rows in the same updates, in turns, so that whatever else the machine does slows both down. Tokens are those
of prompts and completions, without padding. The plain loop makes passes of `--plain-rows` rows, sorted by length in an update.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from grpo import SupervisedConfig, SupervisedTrainer
from grpo.policy.language_model import resolve_dtype
from grpo.types import Group

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"


class PlainLoop:
    """What one writes on an afternoon."""

    def __init__(self, model: str, device: torch.device, *, rows_per_pass: int) -> None:
        self.lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=resolve_dtype("auto")).to(device).train()
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=1e-5, weight_decay=0.0)
        self.device, self.rows_per_pass = device, rows_per_pass

    def update(self, rows: list[Group]) -> None:
        rows = sorted(rows, key=lambda row: len(row.prompt.token_ids) + len(row.completions[0].token_ids))
        total = sum(len(row.completions[0].token_ids) for row in rows)
        self.optimizer.zero_grad()
        for start in range(0, len(rows), self.rows_per_pass):
            part = rows[start : start + self.rows_per_pass]
            pairs = [(row.prompt.token_ids, row.completions[0].token_ids) for row in part]
            ids = pad_sequence([torch.tensor([*p, *c]) for p, c in pairs], batch_first=True)
            labels = [torch.tensor([-100] * len(p) + c) for p, c in pairs]
            mask = pad_sequence([torch.ones(len(p) + len(c)) for p, c in pairs], batch_first=True)
            self.lm(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                labels=pad_sequence(labels, batch_first=True, padding_value=-100).to(self.device),
                num_items_in_batch=total,
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(arguments: argparse.Namespace, directory: str) -> dict[str, float]:
    """Tokens per second of each, over all updates but the first."""
    config = SupervisedConfig(
        model={"name": arguments.model},
        data={"name": str(arguments.rows), "form": "question", "template": "chat", "max_tokens": arguments.max_tokens},
        training={"rows_per_update": arguments.rows_per_update},
        memory={
            "micro_batch_tokens": max(arguments.micro_batch_tokens, arguments.max_tokens),
            "activation_checkpointing": 0,
        },
        distributed={"zero_stage": 0},
        run={"dir": f"{directory}/run", "steps": arguments.updates + 1},
    )
    trainer = SupervisedTrainer(config)
    plain = PlainLoop(arguments.model, trainer.processes.device, rows_per_pass=arguments.plain_rows)
    seconds, tokens = {"grpo": 0.0, "plain": 0.0}, 0
    for number in range(arguments.updates + 1):
        before = trainer.order.position
        rows = trainer.order.draw()
        trainer.order.position = before
        began = time.perf_counter()
        trainer.train_step()
        between = time.perf_counter()
        plain.update(rows)
        if number:
            seconds["grpo"] += between - began
            seconds["plain"] += time.perf_counter() - between
            tokens += sum(len(row.prompt.token_ids) + len(row.completions[0].token_ids) for row in rows)
    trainer.close()
    return {name: tokens / taken for name, taken in seconds.items()}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "model"))
    parser.add_argument("--rows", type=Path, default=QUICKSTART / "worked.jsonl", help="questions with completions")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rows-per-update", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--plain-rows", type=int, default=16, help="rows of a pass of the plain loop")
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args(given)
    with TemporaryDirectory() as directory:
        found = measure(arguments, directory)
    for name, rate in found.items():
        print(f"{name:<6} {rate:>10,.0f} tokens/s")
    print(f"grpo is {found['grpo'] / found['plain']:.2f} times as fast")


if __name__ == "__main__":
    main()
