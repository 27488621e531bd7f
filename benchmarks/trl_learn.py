"""TRL's GRPOTrainer on the task of one of our configurations, for so many minutes: what it has learned is beside what ours has.

    python benchmarks/trl_learn.py --config configs/gsm8k-warm/rl.yaml --minutes 10 --out runs/trl
    python benchmarks/trl_learn.py --config configs/gsm8k-warm/rl.yaml --minutes 10 --out runs/trl-defaults --defaults
    grpo evaluate --model runs/trl --benchmarks gsm8k --templates r1_zero --temperature 0 --max-tokens 1024

Same model, prompts, rewards and grader. Without --defaults TRL gets the configuration's recipe, as far as it has the settings
(`recipe`): questions and completions of a step, rate and schedule, clipping, KL, the loss's aggregation. With it everything is
TRL's own but the length of an answer, and one step has one question. Weights are float32 under bfloat16 autocast either way on a
GPU, because at these rates bfloat16 weights would not move. It samples with transformers' `generate`, or with --vllm through
vLLM in its process.

The clock starts with the first step and ends training after --minutes, in the middle of the schedule if need be; --steps is the
schedule's length. The last line of the output, and OUT/learned.json, say how many steps and seconds there were.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grpo.rewards import accuracy, exact_match, format
from transformers import AutoTokenizer, TrainerCallback

from grpo import Config
from grpo.config import RewardConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows, prepare_rows

REWARDS: dict[str, Callable[..., float | None]] = {
    "accuracy": lambda completion, answer: accuracy(completion, answer),
    "exact_match": lambda completion, answer: exact_match(completion, answer),
    "format": lambda completion, answer: format(completion),
}
LOSSES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}
"""Our algorithm.aggregation, as TRL's loss_type calls it."""

SCALES: dict[bool | str, str] = {True: "group", False: "none", "batch": "batch"}
"""Our algorithm.normalize_by_std, as its scale_rewards."""


def main() -> None:
    args = parse_args()
    config = Config.load(args.config, args.set)
    args.out.mkdir(parents=True, exist_ok=True)
    record = train(config, args)
    (args.out / "learned.json").write_text(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="ours, of rewards that compare with a gold answer")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--steps", type=int, help="of the schedule; default: the configuration's")
    parser.add_argument("--defaults", action="store_true", help="TRL's own instead of the configuration's recipe")
    parser.add_argument("--micro-batch", type=int, default=32, help="completions per forward pass")
    parser.add_argument("--vllm", action="store_true", help="sample through vLLM in this process")
    return parser.parse_args()


def recipe(config: Config, *, micro_batch: int) -> dict[str, Any]:
    """The settings of GRPOConfig that do what the configuration's do.

    Raises:
        SystemExit: TRL has none for one of them.
    """
    algorithm, optimizer, rollout = config.algorithm, config.optimizer, config.rollout
    if optimizer.schedule not in ("constant", "linear", "cosine") or algorithm.num_minibatches > 1:
        raise SystemExit(
            f"optimizer.schedule is {optimizer.schedule!r} and algorithm.num_minibatches {algorithm.num_minibatches}; this "
            "script knows constant, linear and cosine, and one update a step. Set them so."
        )
    num_completions = rollout.num_prompts * rollout.group_size
    if num_completions % micro_batch:
        raise SystemExit(f"--micro-batch is {micro_batch}; it must divide the {num_completions} completions of a step.")
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": num_completions // micro_batch,
        "num_generations": rollout.group_size,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(optimizer.schedule, optimizer.schedule),
        "warmup_steps": optimizer.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "beta": algorithm.kl_coef,
        "epsilon": algorithm.clip_low,
        "epsilon_high": algorithm.clip_high,
        "loss_type": LOSSES[algorithm.aggregation],
        "scale_rewards": SCALES[algorithm.normalize_by_std],
        "num_iterations": 1,
        "temperature": rollout.temperature,
        "reward_weights": [reward.weight for reward in config.rewards],
    }


def train(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = prepare_rows(load_rows(config.data), config.data, answer_regex=config.data.answer_regex, setting="data.name")
    prompts, _ = build_prompts(rows, tokenizer, config.data)
    on_gpu = torch.cuda.is_available()
    settings = {} if args.defaults else recipe(config, micro_batch=args.micro_batch)
    clock = Clock(args.minutes * 60)
    trainer = GRPOTrainer(
        model=str(config.model.name),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(args.out / "trl"),
            max_steps=args.steps or config.run.steps,
            max_completion_length=config.rollout.max_completion_tokens,
            model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
            bf16=on_gpu,
            use_cpu=not on_gpu,
            seed=config.run.seed,
            use_vllm=args.vllm,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        reward_funcs=[of_trl(reward) for reward in config.rewards],
        train_dataset=Dataset.from_list(
            [{"prompt": each.text, "prefill": each.prefill, "answer": each.columns["answer"]} for each in prompts]
        ),
        callbacks=[clock],
    )
    trainer.train()
    trainer.model.to(torch.bfloat16 if on_gpu else torch.float32).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return {"steps": clock.steps, "seconds": round(clock.seconds, 1), "defaults": args.defaults, "settings": settings}


def of_trl(reward: RewardConfig) -> Callable[..., list[float | None]]:
    """One of our rewards in TRL's form, under our name.

    Raises:
        SystemExit: it is none that compares with a gold answer, or has more than a weight.
    """
    name = reward.function
    if name not in REWARDS or reward.args or reward.only:
        raise SystemExit(
            f"rewards has {name!r}, args {reward.args}, only {reward.only}; this script knows {', '.join(REWARDS)}, without args "
            "or only. Leave it out."
        )

    def grade(completions: list[str], prefill: list[str], answer: list[str], **_: Any) -> list[float | None]:
        every = zip(completions, prefill, answer, strict=True)
        return [REWARDS[str(name)](begun + completion, gold) for completion, begun, gold in every]

    grade.__name__ = str(name)
    return grade


class Clock(TrainerCallback):
    """Ends training when the time is over."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.started = self.seconds = 0.0
        self.steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        self.seconds = time.perf_counter() - self.started
        control.should_training_stop = control.should_training_stop or self.seconds > self.limit


if __name__ == "__main__":
    main()
