"""The step of TRL's GRPOTrainer on the workload of step.py, which starts it; see there."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback
from workload import prompt_ids, saved_model, synchronize

from grpo.policy.language_model import resolve_dtype


def measure_trl(args: argparse.Namespace, *, liger: bool) -> dict[str, Any]:
    """Seconds and peak memory of its steps, with what is not the same by default set to what ours does.

    All completions of a step are sampled at once by transformers' `generate`, which is what TRL has without vLLM, and trained
    on in one update, on bfloat16 weights as they are loaded.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = saved_model(args.size, args.cache)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dtype = resolve_dtype("auto")
    num_sequences = args.prompts * args.completions
    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(
            output_dir=scratch,
            model_init_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
            bf16=dtype == torch.bfloat16,
            max_steps=args.warmup + args.steps,
            per_device_train_batch_size=args.peer_micro_batch,
            gradient_accumulation_steps=num_sequences // args.peer_micro_batch,
            gradient_checkpointing=args.checkpointing,
            num_generations=args.completions,
            max_completion_length=args.new_tokens,
            temperature=1.0,
            beta=0.001,
            loss_type="grpo",
            num_iterations=1,
            learning_rate=1e-6,
            use_liger_kernel=liger,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        clock = Clock(args.warmup)
        trainer = GRPOTrainer(
            model=str(model),
            processing_class=tokenizer,
            args=settings,
            reward_funcs=random_reward,
            train_dataset=Dataset.from_list(
                [{"prompt": tokenizer.decode(ids)} for ids in prompt_ids(args.prompts, args.size)]
            ),
            callbacks=[clock],
        )
        clock.watch_generation(trainer, num_tokens=num_sequences * args.new_tokens)
        trainer.train()
    return clock.result()


def random_reward(completions: list[str], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


class Clock(TrainerCallback):
    """Waits for the device before and after each step and each generation, and remembers how long they took."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.started = 0.0
        self.steps: list[float] = []
        self.generations: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        if torch.cuda.is_available() and len(self.steps) == self.warmup:
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.steps.append(time.perf_counter() - self.started)

    def watch_generation(self, trainer: Any, *, num_tokens: int) -> None:
        generate = trainer._generate_single_turn

        def timed(*args: Any, **options: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            ids, logprobs = generate(*args, **options)
            synchronize()
            self.generations.append(time.perf_counter() - start)
            sampled = sum(map(len, ids))
            assert sampled == num_tokens, f"{sampled} tokens were sampled instead of {num_tokens}"
            return ids, logprobs

        trainer._generate_single_turn = timed

    def result(self) -> dict[str, Any]:
        step, generation = median(self.steps[self.warmup :]), median(self.generations[self.warmup :])
        return {
            "step": step, "generation": generation, "rest": step - generation, "peak_gib": self.peak_gib(),
            "steps": self.steps, "generations": self.generations,
        }  # fmt: skip

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
