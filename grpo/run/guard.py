"""Asked before and after every update whether the run is well: tripwire, watchdog, roll-backs, post-mortems."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.observe.rundir import RunLog
from grpo.policy.model_source import numbers_of
from grpo.policy.policy import Policy
from grpo.run import post_mortem, tripwire
from grpo.run.checkpoint import Checkpoints
from grpo.run.watchdog import Alarm, RollBacks, Watchdog, WatchdogError
from grpo.scoring.answers import completion_rows, is_right
from grpo.system.distributed import Processes
from grpo.text.answer_forms import excerpts
from grpo.training.collector import Collector
from grpo.training.learner import Totals
from grpo.training.state import Rollout, StepState

NUM_EXCERPTS = 3
"""Answers that an alarm shows."""


class Guard:
    """Stops a run that is not well, or says which checkpoint it should go back to. Every process has one.

    Args:
        config: of the run.
        collector: None where nothing is sampled to train on.
        log: open; its metrics and roll-backs so far are taken up.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        collector: Collector | None,
        checkpoints: Checkpoints,
        log: RunLog,
        processes: Processes,
    ) -> None:
        self.settings = config.watchdog
        self.policy = policy
        self.collector = collector
        self.checkpoints = checkpoints
        self.log = log
        self.processes = processes
        self.watchdog = Watchdog(config, processes.on_main(log.metrics))
        self.roll_backs = RollBacks(processes.on_main(log.roll_backs))
        self.rounding: float | None = None  # nats, see tripwire.measure_rounding

    def before_update(self, totals: Totals, rollout: Rollout, *, step: int, now: Config) -> None:
        """Whether the tokens were sampled from the policy that is about to be trained on them.

        Args:
            step: number of the training step under way, counted from 1.
            now: the settings of the step.

        Raises:
            SamplingGapError: they were not; with the likeliest causes. A loss that is not finite is another fault.
        """
        gaps, num_tokens = totals.gaps, totals.num_tokens
        if not math.isfinite(totals.loss) or gaps <= self.gap_limit(rollout, now) * num_tokens:
            return
        # logits have grown since it was measured, and their rounding with them
        limit = self.gap_limit(rollout, now, anew=True)
        if gaps <= limit * num_tokens:
            return
        assert self.rounding is not None, "the limit was made of it"
        assert self.collector is not None, "the tokens were sampled"
        causes = tripwire.diagnose(
            self.policy,
            self.collector.generator,
            rollout.groups,
            now,
            earlier_gap=self.watchdog.median("policy/sampling_gap"),
            rounding=self.rounding,
        )
        text = tripwire.explanation(gaps / num_tokens, limit, step, causes)
        self.checkpoints.try_to(self.checkpoints.finish)
        raise tripwire.SamplingGapError(f"{text}\n{self._post_mortem(step, text, rollout)}")

    def gap_limit(self, rollout: Rollout, now: Config, *, anew: bool = False) -> float:
        """The largest sampling gap; what it follows from is measured on the first rollout of a process, and anew if wanted."""
        if self.rounding is None or anew:
            in_8_bits = now.rollout.weights == "fp8"
            self.rounding = tripwire.measure_rounding(self.policy, rollout.groups, in_8_bits=in_8_bits)
        return tripwire.gap_limit(now, self.policy.dtype, self.rounding)

    def observe(self, step: int, metrics: dict[str, Any], rollout: Rollout) -> list[Alarm]:
        """Take up the metrics of a step that is done, and what was sampled in it; what they give alarm of."""
        return [self._with_excerpts(alarm, rollout) for alarm in self.watchdog.observe(step, metrics)]

    def _with_excerpts(self, alarm: Alarm, rollout: Rollout) -> Alarm:
        """The alarm about the forms of right answers shows some of them; every process calls it."""
        if alarm.rule != "reward_hacking":
            return alarm
        rows = completion_rows(rollout.groups, rollout.scores)
        found = self.processes.gather(excerpts(rows, [is_right(row) for row in rows], num=NUM_EXCERPTS))
        return replace(alarm, excerpts=tuple(each for part in found for each in part)[:NUM_EXCERPTS])

    def act_on(self, alarms: list[Alarm], step: StepState, *, number: int) -> Path | None:
        """Warn, and stop if one of the alarms asks for it.

        Args:
            step: the one that the alarms are of, with its number.

        Returns:
            The checkpoint to go back to, which is now the last one; None: the run goes on.

        Raises:
            WatchdogError: the run is to stop.
        """
        for alarm in alarms:
            self.processes.say(f"warning: {alarm}")
            self.log.log_alarm(alarm.rule, str(alarm))
        serious = sorted(
            (alarm for alarm in alarms if alarm.action != "warn"), key=lambda alarm: alarm.action != "stop"
        )
        if not serious:
            return None
        self.checkpoints.try_to(self.checkpoints.finish)
        alarm, remains = serious[0], self._post_mortem(number, "\n".join(map(str, alarms)), step.sampled)
        if alarm.action == "stop":
            raise WatchdogError(f"{alarm}. {remains}")
        if len(self.roll_backs.rows) == self.settings.max_roll_backs:
            raise WatchdogError(f"{alarm}, after {len(self.roll_backs.rows)} roll-backs. {remains}")
        good = self.checkpoints.last_before(alarm.began, self.policy)
        if good is None:
            raise WatchdogError(f"{alarm}. There is no checkpoint from before step {alarm.began}. {remains}")
        self.checkpoints.remove_after(good)  # first, so that a run that is killed here comes to the same alarm again
        self.roll_backs.add(alarm, to=numbers_of(good)[0], factor=self.settings.rate_factor)
        self.log.log_roll_back(self.roll_backs.rows[-1])
        return good

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`."""
        self.watchdog.rewind(step)

    def _post_mortem(self, step: int, text: str, rollout: Rollout) -> str:
        written = post_mortem.write(self.log.directory, step, text, rollout, self.processes)
        return (
            "No post-mortem could be written."
            if written is None
            else f"The batch and the last metrics lie in {written}"
        )
