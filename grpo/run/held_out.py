"""The evaluation during training: the held-out questions, answered by the policy as it is."""

from __future__ import annotations

from typing import Any

from grpo.config import EvaluationConfig
from grpo.observe.rundir import RunLog
from grpo.scoring.answers import answer, in_order
from grpo.system.distributed import Processes
from grpo.training.collector import Collector
from grpo.types import Prompt, Sampling


class HeldOut:
    """Answers the held-out questions and logs what came of it. Every process has one, and answers its share.

    Args:
        prompts: of all processes.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        settings: EvaluationConfig,
        sampling: Sampling,
        collector: Collector,
        log: RunLog,
        processes: Processes,
    ) -> None:
        self.prompts = prompts
        self.settings = settings
        self.sampling = sampling
        self.collector = collector
        self.log = log
        self.processes = processes

    def evaluate(self, step: int, *, seed: int) -> list[dict[str, Any]]:
        """After `step` training steps; the answers of all processes with their rewards.

        Raises:
            Interrupted: on all processes, if one of them was asked to stop.
        """
        mine = self.collector.run(lambda: self._answer(seed))
        self.collector.stop.sync()
        rows = in_order(self.processes.gather(mine), self.prompts)
        self.log.log_evaluation(step, rows)
        return rows

    def is_evaluated(self, step: int) -> bool:
        return self.processes.on_main(lambda: bool(self.log.evaluation(step)))

    def _answer(self, seed: int) -> list[dict[str, Any]]:
        self.collector.scorer.max_completion_tokens = self.sampling.max_tokens
        return answer(
            self.prompts[self.processes.rank :: self.processes.world_size],
            generator=self.collector.generator,
            scorer=self.collector.scorer,
            sampling=self.sampling,
            num_samples=self.settings.num_samples,
            seed=seed,
        )
