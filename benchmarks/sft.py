"""Tokens per second of supervised training, beside a plain loop of transformers and TRL's SFTTrainer in the same command.

On a GPU, random weights in the shape of Qwen2.5 and rows of random tokens, as long as solutions of GSM8K or as thoughts are:

    python benchmarks/sft.py --size 0.5b --peers plain trl trl-liger
    python benchmarks/sft.py --size 0.5b --completion-lens 500 8000 --peers trl-liger

On a CPU, the quickstart's model and its worked answers:

    python benchmarks/sft.py --peers plain

Passes are of --pass-tokens tokens, updates of --update-tokens. Tokens are those of prompts and completions, without padding; the
rate is that of the median update after --warmup. All learn the completions' tokens alone, in bfloat16 on CUDA, and recompute
activations in the backward pass with --checkpointing. The plain loop pads: its passes are rows sorted by length, as many as
fit a pass when they are padded, torch's AdamW on bfloat16 weights. TRL packs (best fit, rows of --peer-length tokens) and keeps
weights and optimizer in bfloat16. Its attention is --peer-attention, which without the package flash-attn reads a mask of all
pairs of a pass, so that larger passes do not pay: --peer-pass-tokens. Ours keeps float32 masters and moments. Each is measured in
a process of its own, which alone has used the memory that it reports.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step import GIB, in_a_process
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_step import Clock
from workload import SHAPES, device_name, device_type, saved_model, synchronize, word_ids

from grpo import SupervisedConfig, SupervisedTrainer
from grpo.policy.language_model import resolve_dtype
from grpo.system import distributed
from grpo.types import Group

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


def main(given: Sequence[str] | None = None) -> None:
    args = parse_args(given)
    own, updates = in_a_process(measure, args)
    records = [own | {"name": "grpo"}]
    print(line_of(records[0], records[0]), flush=True)
    for name in args.peers:
        try:
            records.append(in_a_process(PEERS[name], args, updates) | {"name": name})
            print(line_of(records[-1], records[0]), flush=True)
        except Exception as error:  # it does not take the others' numbers with it
            print(f"{name}: failed with {type(error).__name__}: {str(error)[:300]}", flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(each | {"device": device_name()}) + "\n" for each in records)


def parse_args(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, help="shape of random weights, which learn random rows")
    parser.add_argument("--model", default=str(QUICKSTART / "model"), help="without --size")
    parser.add_argument("--rows", type=Path, default=QUICKSTART / "worked.jsonl", help="without --size: its rows")
    parser.add_argument("--prompt-lens", type=int, nargs=2, default=(90, 199), metavar=("LEAST", "MOST"))
    parser.add_argument("--completion-lens", type=int, nargs=2, default=(50, 400), metavar=("LEAST", "MOST"))
    parser.add_argument("--pass-tokens", type=int, help="default: 32768 on a GPU, 4096 without")
    parser.add_argument("--update-tokens", type=int, help="default: two passes")
    parser.add_argument(
        "--checkpointing", type=float, default=1.0, help="share of the layers; peers: all, or none at 0"
    )
    parser.add_argument("--updates", type=int, default=6, help="that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, help="after our own run")
    parser.add_argument(
        "--peer-length", type=int, help="tokens of TRL's packed rows; default: the longest row, in 1,024s"
    )
    parser.add_argument("--peer-pass-tokens", type=int, default=8192, help="of TRL's packed rows in a pass")
    parser.add_argument("--peer-attention", default="sdpa", help="TRL's attn_implementation")
    parser.add_argument("--out", type=Path, help="append the results to this file, as lines of JSON")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where the random models are kept")
    args = parser.parse_args(given)
    args.pass_tokens = args.pass_tokens or (32768 if torch.cuda.is_available() else 4096)
    args.update_tokens = args.update_tokens or 2 * args.pass_tokens
    return args


# ---- the same updates for all ----------------------------------------------------------------------------------------


def model_of(args: argparse.Namespace) -> str:
    return str(saved_model(args.size, args.cache)) if args.size else args.model


def random_rows(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Of lengths drawn evenly from the two ranges; enough for all updates."""
    rng, rows, tokens = random.Random(0), [], 0
    some = word_ids(args.size)
    while tokens < (args.warmup + args.updates + 1) * args.update_tokens:
        lens = rng.randint(*args.prompt_lens), rng.randint(*args.completion_lens)
        prompt, completion = (rng.choices(some, k=length) for length in lens)
        rows.append({"prompt_ids": prompt, "completion_ids": completion})
        tokens += sum(lens)
    return rows


def make_trainer(args: argparse.Namespace, scratch: str) -> SupervisedTrainer:
    form = "ids" if args.size else "question"
    longest = args.prompt_lens[1] + args.completion_lens[1] if args.size else 256
    config = SupervisedConfig(
        model={"name": model_of(args)},
        data={"name": str(args.rows), "form": form, "template": "none" if args.size else "chat", "max_tokens": longest},
        training={"rows_per_update": args.update_tokens, "tokens_per_update": args.update_tokens},
        memory={
            "micro_batch_tokens": args.pass_tokens,
            "activation_checkpointing": args.checkpointing,
        },
        run={"dir": f"{scratch}/run", "steps": args.warmup + args.updates},
    )
    return SupervisedTrainer(config, train_dataset=random_rows(args) if args.size else None)


def deal(trainer: SupervisedTrainer, number: int) -> list[list[Row]]:
    """The rows of the first updates, which the trainer has still before it."""
    before = trainer.order.position
    updates = [[row for group in trainer.order.draw() for row in rows_of(group)] for _ in range(number)]
    trainer.order.position = before
    return updates


def rows_of(group: Group) -> list[Row]:
    return [(group.prompt.token_ids, completion.token_ids) for completion in group.completions]


def size_of(rows: Sequence[Row]) -> int:
    return sum(len(prompt) + len(completion) for prompt, completion in rows)


def record(seconds: Sequence[float], updates: Sequence[Sequence[Row]], warmup: int) -> dict[str, Any]:
    rates = [size_of(rows) / taken for rows, taken in zip(updates, seconds, strict=True)][warmup:]
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    return {"tokens_per_second": median(rates), "rates": rates, "peak_gib": peak}


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[list[Row]]]:
    """Our own, and the rows of its updates, which the others learn, too."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(args, scratch)
        updates = deal(trainer, args.warmup + args.updates)
        seconds = []
        for _ in updates:
            synchronize()
            began = time.perf_counter()
            trainer.train_step()
            synchronize()
            seconds.append(time.perf_counter() - began)
        trainer.close()
    distributed.stop()
    return record(seconds, updates, args.warmup), updates


# ---- the plain loop --------------------------------------------------------------------------------------------------


def measure_plain(args: argparse.Namespace, updates: list[list[Row]]) -> dict[str, Any]:
    """What one writes on an afternoon."""
    lm: Any = (
        AutoModelForCausalLM.from_pretrained(model_of(args), dtype=resolve_dtype("auto")).to(device_type()).train()
    )
    if args.checkpointing:
        lm.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-5, weight_decay=0.0)
    seconds = []
    for rows in updates:
        synchronize()
        began = time.perf_counter()
        total = sum(len(completion) for _, completion in rows)
        optimizer.zero_grad()
        for part in padded_passes(rows, args.pass_tokens):
            ids = pad_sequence([torch.tensor([*p, *c]) for p, c in part], batch_first=True)
            labels = [torch.tensor([-100] * len(p) + c) for p, c in part]
            mask = pad_sequence([torch.ones(len(p) + len(c)) for p, c in part], batch_first=True)
            lm(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                labels=pad_sequence(labels, batch_first=True, padding_value=-100).to(lm.device),
                num_items_in_batch=total,
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return record(seconds, updates, args.warmup)


def padded_passes(rows: Sequence[Row], pass_tokens: int) -> list[list[Row]]:
    """Rows sorted by length, as many in a pass as fit it at the length of its longest."""
    passes: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: size_of([row])):
        if passes[-1] and size_of([row]) * (len(passes[-1]) + 1) > pass_tokens:
            passes.append([])
        passes[-1].append(row)
    return passes


# ---- TRL -------------------------------------------------------------------------------------------------------------


def measure_trl(args: argparse.Namespace, updates: list[list[Row]], *, liger: bool) -> dict[str, Any]:
    """SFTTrainer with packing. Its packed rows are not our updates: its rate is that of all tokens over all measured updates."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dtype = resolve_dtype("auto")
    rows = [{"input_ids": [*p, *c], "labels": [-100] * len(p) + c} for update in updates for p, c in update]
    longest = max(len(row["input_ids"]) for row in rows)
    length = args.peer_length or -(-longest // 1024) * 1024
    in_a_pass = max(1, args.peer_pass_tokens // length)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            model_init_kwargs={"dtype": dtype, "attn_implementation": args.peer_attention},
            bf16=dtype == torch.bfloat16,
            max_steps=len(updates),
            max_length=length,
            packing=True,
            completion_only_loss=True,
            per_device_train_batch_size=in_a_pass,
            gradient_accumulation_steps=max(1, args.update_tokens // (in_a_pass * length)),
            gradient_checkpointing=args.checkpointing > 0,
            learning_rate=1e-5,
            use_liger_kernel=liger,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        clock = Clock(args.warmup)
        tokenizer = AutoTokenizer.from_pretrained(model_of(args))
        trainer = SFTTrainer(
            model=model_of(args), processing_class=tokenizer, args=settings, train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )  # fmt: skip
        taken = Taken(trainer)
        trainer.train()
    rates = [n / seconds for n, seconds in zip(taken.per_update(len(updates)), clock.steps, strict=True)][args.warmup :]
    return {"tokens_per_second": median(rates), "rates": rates, "peak_gib": clock.peak_gib()}


class Taken:
    """How many tokens each pass of a trainer of transformers has read, padding left out."""

    def __init__(self, trainer: Any) -> None:
        self.passes: list[int] = []
        step, pad = trainer.training_step, trainer.processing_class.pad_token_id

        def counted(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            self.passes.append(int((inputs["input_ids"] != pad).sum()))
            return step(model, inputs, *rest)

        trainer.training_step = counted

    def per_update(self, number: int) -> list[int]:
        size = len(self.passes) // number
        return [sum(self.passes[i * size : (i + 1) * size]) for i in range(number)]


PEERS = {
    "plain": measure_plain,
    "trl": partial(measure_trl, liger=False),
    "trl-liger": partial(measure_trl, liger=True),
}


def line_of(record: dict[str, Any], ours: dict[str, Any]) -> str:
    rate, peak = record["tokens_per_second"], record["peak_gib"]
    memory = f"{peak:8.1f} GiB" if peak is not None else ""
    beside = f"   grpo is {ours['tokens_per_second'] / rate:.2f} times as fast" if record is not ours else ""
    return f"{record['name']:<10} {rate:>10,.0f} tokens/s{memory}{beside}"


if __name__ == "__main__":
    main()
