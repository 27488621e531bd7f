"""A double of what benchmarks/trl_step.py uses of TRL 1.16: it calls back as TRL does, by a clock that it moves itself."""

from dataclasses import dataclass
from typing import Any

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
