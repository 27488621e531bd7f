"""A double of what benchmarks/trl_step.py and sft.py use of TRL 1.16. It calls back as TRL does, by a clock of its own."""

from dataclasses import dataclass
from typing import Any

import torch

tokens_missing = 0
"""How many tokens fewer than asked for a generation samples."""


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


clock = Clock()


@dataclass
class GRPOConfig:
    """The options that are used, under the names that TRL 1.16 has for them; another one is refused."""

    output_dir: str
    model_init_kwargs: dict[str, Any]
    bf16: bool
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    num_generations: int
    max_completion_length: int
    temperature: float
    beta: float
    loss_type: str
    num_iterations: int
    learning_rate: float
    use_liger_kernel: bool
    logging_steps: int
    report_to: str
    save_strategy: str
    disable_tqdm: bool


class GRPOTrainer:
    """Steps of 4 s, of which a generation takes 1; 10 more for the first one."""

    def __init__(self, *, args: GRPOConfig, callbacks: list[Any], train_dataset: Any, **_: Any) -> None:
        self.args, self.callbacks = args, callbacks
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8, "completions of a step"
        assert train_dataset.column_names == ["prompt"]

    def _generate_single_turn(self, prompts: list[str]) -> tuple[list[list[int]], None]:
        clock.now += 1
        ids = [[0] * self.args.max_completion_length for _ in prompts]
        del ids[0][:tokens_missing]
        return ids, None

    def train(self) -> None:
        for step in range(self.args.max_steps):
            self._call("on_step_begin")
            self._generate_single_turn(["prompt"] * 8)
            clock.now += 3 if step else 13
            self._call("on_step_end")

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, None, None)


@dataclass
class SFTConfig:
    """The options that are used, under the names that TRL 1.16 has for them; another one is refused."""

    output_dir: str
    model_init_kwargs: dict[str, Any]
    bf16: bool
    max_steps: int
    max_length: int
    packing: bool
    completion_only_loss: bool
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float
    use_liger_kernel: bool
    logging_steps: int
    report_to: str
    save_strategy: str
    disable_tqdm: bool


class SFTTrainer:
    """Passes of 2 s, each of all tokens that fit and as many of padding; 10 s more for the first one."""

    def __init__(
        self, *, args: SFTConfig, callbacks: list[Any], train_dataset: Any, processing_class: Any, **_: Any
    ) -> None:
        self.args, self.callbacks, self.processing_class = args, callbacks, processing_class
        assert args.packing, "rows are packed"
        for row in train_dataset:
            trained = [token for token in row["labels"] if token != -100]
            assert 0 < len(trained) < len(row["input_ids"]) == len(row["labels"])
            assert row["input_ids"][-len(trained) :] == trained, "the completion is what is learned"

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        clock.now += 2

    def train(self) -> None:
        shape = (self.args.per_device_train_batch_size, self.args.max_length)
        ids = torch.full((2, *shape), self.processing_class.pad_token_id)
        ids[0] = self.processing_class.pad_token_id + 1
        for step in range(self.args.max_steps):
            self._call("on_step_begin")
            for _ in range(self.args.gradient_accumulation_steps):
                self.training_step(None, {"input_ids": ids})
            clock.now += 0 if step else 10
            self._call("on_step_end")

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, None, None)
