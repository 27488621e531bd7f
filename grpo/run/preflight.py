"""Before the first step: is there anything to learn from, and does the model answer the template as it should?

A few training questions are answered, group_size times each, with the settings of the rollout. `measure` turns that into the
numbers of a template, `diagnose` says what is wrong with them; both are pure. Only where the configured template is refused are
the others tried, so a run that is fine pays for one small rollout.

Nothing of the run changes by it: it draws from random numbers of its own, and deals no question of the run's order.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.algorithm.advantage import has_signal
from grpo.config import Config
from grpo.data.contamination import normalized
from grpo.data.order import PromptOrder
from grpo.data.prompts import TEMPLATES, build_prompts
from grpo.system import progress
from grpo.system.distributed import Processes
from grpo.system.files import to_json
from grpo.training.collector import Collector
from grpo.turns.generator import TurnGenerator
from grpo.types import Completion, Group, Prompt, Scores

CONFIDENCE = 0.95
"""Of what is said about questions that were not tried."""

FEW = 0.1
"""A smaller share of groups with signal is warned of: most of each rollout would be thrown away."""

BAD_ENDINGS = {"cut off": (0.5, 0.95), "empty": (0.2, 0.95)}
"""Shares of completions that are warned of, and that are refused. GSM8K under the paper's template starts near 0.3 cut off."""

MANY_UNKNOWN = 0.2
"""Share of completions without a known reward that is warned of."""

EXAMPLE_LENGTH = 300

MANY_DROPPED = 0.1
"""Share of the rows that cannot be used that is warned of."""


class PreflightRefused(RuntimeError):
    """A run that would have nothing to learn from."""


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupStats:
    """What became of one group; every list has an item per completion."""

    endings: list[Literal["end token", "stop text", "cut off"]]
    empty: list[bool]
    lens: list[int]  # in tokens
    rewards: list[float]  # weighted; NaN: unknown
    values: dict[str, list[float]]  # by function, unweighted
    example: str  # its first completion


@dataclass(frozen=True)
class TemplateReport:
    """How a template did. Shares are of all completions, or of all groups."""

    template: str
    num_groups: int
    group_size: int
    num_with_signal: int  # groups whose known rewards are not all equal
    functions: dict[str, Function]
    reward_mean: float | None  # over the known ones; None: there are none
    reward_range: tuple[float, float] | None
    num_always_best: int  # groups without signal that have the highest reward throughout
    ended: float  # share with an end-of-sequence token
    stopped: float  # share that completed a text of rollout.stop
    truncated: float  # share cut off at rollout.max_completion_tokens
    empty: float  # share of nothing but white space
    unknown: float
    length_mean: float
    example: str  # the beginning of a completion
    num_too_long: int = 0  # questions left out, because their prompt is longer than data.max_prompt_tokens

    @property
    def signal(self) -> float:
        return self.num_with_signal / self.num_groups


@dataclass(frozen=True)
class Function:
    """What a reward function said."""

    weight: float
    mean: float | None  # over its verdicts; None: it gave none
    signal: float  # share of groups in which its verdicts are not all equal


@dataclass(frozen=True)
class Skipped:
    """A template that cannot be tried."""

    template: str
    reason: str


@dataclass(frozen=True)
class Problem:
    level: Literal["warn", "refuse"]
    text: str


def group_stats(group: Group, scores: Scores, p: int, *, end_token_ids: Iterable[int]) -> GroupStats:
    """What is kept of group number p."""
    return GroupStats(
        endings=[_ending(completion, set(end_token_ids)) for completion in group.completions],
        empty=[not each.text.removeprefix(group.prompt.prefill).strip() for each in group.completions],
        lens=[len(completion.own_ids) for completion in group.completions],
        rewards=scores.rewards[p].tolist(),
        values={name: values[p].tolist() for name, values in scores.values.items()},
        example=group.completions[0].text,
    )


def _ending(completion: Completion, end_token_ids: set[int]) -> Literal["end token", "stop text", "cut off"]:
    """How its last turn ended; out of calls of tools or out of turns, it has ended like others."""
    if completion.finish_reason == "length":
        return "cut off"
    return "end token" if completion.token_ids[-1] in end_token_ids else "stop text"


def measure(
    template: str, groups: Sequence[GroupStats], weights: dict[str, float], *, num_too_long: int = 0
) -> TemplateReport:
    """The numbers of a template, from one group or more."""
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    known = rewards[~rewards.isnan()]
    signal = has_signal(rewards)
    endings = [each for group in groups for each in group.endings]
    empty = [each for group in groups for each in group.empty]
    lens = [each for group in groups for each in group.lens]
    return TemplateReport(
        template=template,
        num_groups=len(groups),
        group_size=rewards.shape[1],
        num_with_signal=int(signal.sum()),
        functions={
            name: _function(weight, torch.tensor([group.values[name] for group in groups], dtype=torch.float64))
            for name, weight in weights.items()
        },
        reward_mean=float(known.mean()) if len(known) else None,
        reward_range=(float(known.min()), float(known.max())) if len(known) else None,
        num_always_best=int((~signal & (rewards.nan_to_num(-math.inf) >= _highest(known)).all(1)).sum()),
        ended=endings.count("end token") / len(endings),
        stopped=endings.count("stop text") / len(endings),
        truncated=endings.count("cut off") / len(endings),
        empty=sum(empty) / len(empty),
        unknown=float(rewards.isnan().double().mean()),
        length_mean=sum(lens) / len(lens),
        example=_shorten(groups[0].example, EXAMPLE_LENGTH),
        num_too_long=num_too_long,
    )


def _function(weight: float, values: Tensor) -> Function:
    known = values[~values.isnan()]
    mean = float(known.mean()) if len(known) else None
    return Function(weight, mean, float(has_signal(values).double().mean()))


def _highest(known: Tensor) -> float:
    return float(known.max()) if len(known) else math.inf


# ---- what is said of it ----------------------------------------------------------------------------------------------


def largest_share(num_tried: int) -> float:
    """The largest share of groups with signal under which it is not unlikely that none of `num_tried` has any.

    Exact one-sided bound (Clopper and Pearson 1934): (1 - share)^n = 1 - CONFIDENCE.
    """
    return 1 - (1 - CONFIDENCE) ** (1 / num_tried)


def diagnose(trial: TemplateReport) -> list[Problem]:
    """What is wrong with a template; empty if nothing is."""
    return [*_judge_signal(trial), *_judge_endings(trial)]


def is_refused(trial: TemplateReport) -> bool:
    return any(problem.level == "refuse" for problem in diagnose(trial))


def _judge_signal(trial: TemplateReport) -> list[Problem]:
    if trial.reward_range is None:
        return [
            Problem(
                "refuse",
                f"nothing to learn: not one of {trial.num_groups * trial.group_size} completions has a known reward: the "
                "functions return None, take longer than scoring.timeout_seconds, or crash. Check rewards, data.answer_column.",
            )
        ]
    problems = []
    if trial.num_with_signal == 0:
        problems.append(Problem("refuse", _no_signal(trial)))
    elif trial.signal < FEW:
        hopeless = trial.num_groups - trial.num_with_signal - trial.num_always_best
        problems.append(
            Problem(
                "warn",
                f"little to learn from: {trial.num_with_signal} of {trial.num_groups} groups have signal; of the others, "
                f"{trial.num_always_best} have the highest reward throughout (too easy) and {hopeless} do not (too hard). Take "
                "other questions, or raise rollout.group_size.",
            )
        )
    silent = [name for name, each in trial.functions.items() if each.weight and not each.signal]
    if trial.num_with_signal and silent:
        others = [name for name, each in trial.functions.items() if each.weight and each.signal]
        problems.append(
            Problem(
                "warn",
                f"{_list(silent)} {'is' if len(silent) == 1 else 'are'} the same in all completions of every question "
                f"({_means(trial, silent)}): all there is to learn is {_list(others)}.",
            )
        )
    if trial.unknown >= MANY_UNKNOWN:
        problems.append(
            Problem(
                "warn",
                f"the reward of {trial.unknown:.0%} of the completions is unknown; they are not trained on. Look at what the "
                "reward functions return None for, and at scoring.timeout_seconds.",
            )
        )
    return problems


def _no_signal(trial: TemplateReport) -> str:
    assert trial.reward_range is not None, "rewards are known"
    lowest, highest = trial.reward_range
    weighted = [name for name, each in trial.functions.items() if each.weight]
    found = (
        f"nothing to learn: in 0 of {trial.num_groups} groups of {trial.group_size} do rewards differ; the true share is below "
        f"{largest_share(trial.num_groups):.0%} at {CONFIDENCE:.0%} confidence. "
    )
    if lowest < highest:
        return (
            f"{found}Some questions always have a reward of {highest:g}, others always of {lowest:g}. Raise rollout.temperature "
            "if the completions of a question are all the same text, or take questions in between."
        )
    if all((trial.functions[name].mean or 0) >= 1 for name in weighted):
        return (
            f"{found}The task is solved already: every completion has {_means(trial, weighted)}. Take harder questions."
        )
    return (
        f"{found}Every completion has the reward {highest:g} ({_means(trial, weighted)}). Take easier questions, a stronger "
        "model or another data.template, or add a reward that tells attempts apart."
    )


def _judge_endings(trial: TemplateReport) -> list[Problem]:
    remedies = {
        "cut off": f"cut off at rollout.max_completion_tokens, {trial.ended:.0%} end with an end-of-sequence token and "
        f"{trial.stopped:.0%} with a text of rollout.stop. Raise rollout.max_completion_tokens if answers are longer; "
        "if they go on after the answer, set rollout.stop or another data.template.",
        "empty": f"nothing but white space, {trial.length_mean:.1f} tokens on average: to the model the prompt looks finished. "
        "Set another data.template.",
    }
    problems = []
    for ending, share in (("cut off", trial.truncated), ("empty", trial.empty)):
        worrying, hopeless = BAD_ENDINGS[ending]
        if share >= worrying:
            level: Literal["warn", "refuse"] = "refuse" if share >= hopeless else "warn"
            problems.append(Problem(level, f"ends badly: {share:.0%} of the completions are {remedies[ending]}"))
    return problems


def better(configured: TemplateReport | Skipped, others: Iterable[TemplateReport]) -> TemplateReport | None:
    """The template to take instead: with signal from more of the weighted functions, or clearly more of it."""
    best = max((trial for trial in others if not is_refused(trial)), key=_rank, default=None)
    if best is None:
        return None
    if isinstance(configured, Skipped) or is_refused(configured) or _rank(best)[0] > _rank(configured)[0]:
        return best
    return best if _is_clearly_more(best, configured) else None


def _rank(trial: TemplateReport) -> tuple[int, float]:
    return sum(each.weight != 0 and each.signal > 0 for each in trial.functions.values()), trial.signal


def _is_clearly_more(a: TemplateReport, b: TemplateReport) -> bool:
    """By two standard errors of the difference."""
    variance = sum(each.signal * (1 - each.signal) / each.num_groups for each in (a, b))
    return a.signal - b.signal > 2 * math.sqrt(variance)


def _means(trial: TemplateReport, names: Iterable[str]) -> str:
    means = {name: trial.functions[name].mean for name in names}
    return ", ".join(f"{name} {'unknown' if mean is None else f'{mean:g}'}" for name, mean in means.items())


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# ---- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What of a set of rows can be used."""

    what: str
    num_rows: int
    num_ungradable: int  # rows whose gold answer a reward function cannot grade
    examples: list[str]  # of those, with the reason
    num_too_long: int  # of the others


MOST_EXAMPLES = 3


def audit(what: str, rows: list[dict[str, Any]], reasons: list[str | None], *, num_prompts: int) -> Audit:
    """Count what `Scorer.check_rows` and `build_prompts` said of the rows."""
    bad = [
        f"row {n} ({_shorten(row['question'])}): {reason}"
        for n, (row, reason) in enumerate(zip(rows, reasons, strict=True))
        if reason is not None
    ]
    return Audit(what, len(rows), len(bad), bad[:MOST_EXAMPLES], len(rows) - len(bad) - num_prompts)


def in_both(training: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[str]:
    """Held-out questions that are training questions too, apart from case and white space."""
    seen = {normalized(prompt.columns["question"]) for prompt in training}
    questions = [prompt.columns["question"] for prompt in held_out]
    return [question for question in questions if normalized(question) in seen]


def diagnose_data(audits: Iterable[Audit], leaked: list[str], *, num_held_out: int) -> list[Problem]:
    """What is wrong with the rows, whatever the template."""
    problems = []
    for each in audits:
        for number, why, remedy in (
            (each.num_ungradable, "have an answer that cannot be graded", "Correct data.answer_column or the answers."),
            (each.num_too_long, "have a prompt that is too long", "Raise data.max_prompt_tokens."),
        ):
            if number >= MANY_DROPPED * each.num_rows:
                text = f"{number:,} of {each.num_rows:,} {each.what} {why} and are dropped. {remedy}"
                problems.append(Problem("warn", text))
    if leaked:
        problems.append(
            Problem(
                "warn",
                f"{len(leaked)} of {num_held_out} held-out questions are training questions too, e.g. {_shorten(leaked[0])}: the "
                "evaluation would measure memory. Remove them from one of the two.",
            )
        )
    return problems


def _shorten(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


# ---- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """All that was found; the first of `templates` is the configured one."""

    templates: list[TemplateReport | Skipped]
    audits: list[Audit]
    leaked: list[str]
    num_held_out: int
    seconds: float

    @property
    def problems(self) -> list[Problem]:
        first = self.templates[0]
        if isinstance(first, Skipped):
            of_template = [Problem("refuse", f"there are no prompts for data.template {first.template}")]
        else:
            of_template = diagnose(first)
        return [*of_template, *diagnose_data(self.audits, self.leaked, num_held_out=self.num_held_out)]

    @property
    def better(self) -> TemplateReport | None:
        return better(self.templates[0], (each for each in self.templates[1:] if isinstance(each, TemplateReport)))

    @property
    def verdict(self) -> Literal["fine", "warn", "refuse"]:
        levels = {problem.level for problem in self.problems}
        return "refuse" if "refuse" in levels else "warn" if levels else "fine"

    def to_json(self) -> str:
        best = self.better
        return to_json(
            {
                "verdict": self.verdict,
                "problems": [asdict(problem) for problem in self.problems],
                "template": self.templates[0].template,
                "better_template": best.template if best else None,
                "templates": [asdict(each) for each in self.templates],
                "data": [asdict(each) for each in self.audits],
                "held_out_in_training": self.leaked,
                "seconds": self.seconds,
            },
            indent=1,
        )


class Preflight:
    """Tries templates on training questions, and looks at the data.

    Args:
        config: of the run's first step.
        audits: what became of the rows of the data, in the order in which they were read.
    """

    def __init__(
        self,
        config: Config,
        collector: Collector,
        processes: Processes,
        *,
        prompts: list[Prompt],
        eval_prompts: list[Prompt],
        audits: list[Audit],
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: list[int],
    ) -> None:
        self.config = config
        self.collector = collector
        self.processes = processes
        self.prompts = prompts
        self.eval_prompts = eval_prompts
        self.audits = audits
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids

    @progress.phase("preflight")
    def before_training(self, directory: Path) -> None:
        """Look before the first step, if configured; every process calls it, and all come to the same verdict.

        Raises:
            PreflightRefused: there is nothing to learn from, and `preflight.on_failure` is stop.
        """
        settings = self.config.preflight
        if not settings.num_questions:
            return
        result = self.examine(num_questions=settings.num_questions)
        self.processes.say(report(result))
        if self.processes.is_main:
            (directory / "preflight.json").write_text(result.to_json())
        if settings.on_failure == "stop" and result.verdict == "refuse":
            raise PreflightRefused(
                "preflight refuses this run: "
                + "; ".join(each.text for each in result.problems if each.level == "refuse")
            )

    def examine(self, *, num_questions: int, templates: Sequence[str] | None = None) -> Result:
        """Try the configured template on some training questions, and the others.

        Args:
            templates: the others to try; None: all there are, if the configured one is refused, and nobody answers the model in
                the form of that one.
        """
        started, own = time.perf_counter(), self.config.data.template
        num_questions = min(num_questions, len(self.prompts))
        order = PromptOrder(self.prompts, seed=self.config.run.seed, rank=0, world_size=1)
        questions = order.draw(num_questions)  # the first that training will see
        first = self.try_template(questions, own)
        generator = self.collector.generator
        if templates is None:
            templates = list(TEMPLATES) if is_refused(first) and not isinstance(generator, TurnGenerator) else []
        is_game = isinstance(generator, TurnGenerator) and generator.toolbox.environment is not None
        others = [self._rebuilt(questions, template) for template in templates if template != own]
        return Result(
            [first, *others],
            self.audits,
            [] if is_game else in_both(self.prompts, self.eval_prompts),  # a game's question may always be the same
            len(self.eval_prompts),
            seconds=time.perf_counter() - started,
        )

    def _rebuilt(self, questions: list[Prompt], template: str) -> TemplateReport | Skipped:
        """Try the same questions in another template."""
        data = self.config.data.model_copy(update={"template": template})
        try:
            prompts = build_prompts([prompt.columns for prompt in questions], self.tokenizer, data)[0]
        except ValueError as error:
            return Skipped(template, str(error))
        return self.try_template(prompts, template, num_too_long=len(questions) - len(prompts))

    def try_template(self, prompts: list[Prompt], template: str, *, num_too_long: int = 0) -> TemplateReport:
        """Answer and score prompts, shared out over the processes."""
        processes, purpose = self.processes, f"{self.config.run.seed} preflight {template} {self.processes.rank}"
        collected = self.collector.collect(
            prompts[processes.rank :: processes.world_size],
            self.config.sampling,
            num_completions=self.config.rollout.group_size,
            seed=random.Random(purpose).getrandbits(62),
        )
        self.collector.stop.sync()
        assert collected is not None, "only a request to stop breaks off the sampling"
        seen = [
            group_stats(group, collected[1], p, end_token_ids=self.end_token_ids)
            for p, group in enumerate(collected[0])
        ]
        # in the order of `prompts` again, so that sums are the same on any number of processes
        everyone = [group for each in zip_longest(*processes.gather(seen)) for group in each if group is not None]
        weights = {reward.name: reward.weight for reward in self.collector.scorer.rewards}
        return measure(template, everyone, weights, num_too_long=num_too_long)


# ---- in words --------------------------------------------------------------------------------------------------------


def report(result: Result) -> str:
    """A table of the templates, what there is to say of the data, and the verdict."""
    trials = [each for each in result.templates if isinstance(each, TemplateReport)]
    lines = [f"\npreflight: what the untrained model makes of some training questions ({result.seconds:.1f} s)"]
    if trials:
        names = list(trials[0].functions)
        lines.append(_row("template", "answers", "signal", *names, "ended", "cut off", "empty", "unknown", "length"))
        lines += [_row(*_cells(trial)) for trial in trials]
    lines += [f"  {each.template}: not tried: {each.reason}" for each in result.templates if isinstance(each, Skipped)]
    lines += [_data_line(each) for each in result.audits]
    lines += [f"      {example}" for each in result.audits for example in each.examples]
    if result.num_held_out:
        lines.append(f"  {len(result.leaked)} of {result.num_held_out:,} held-out questions are training questions too")
    lines += [f"  {'REFUSED' if each.level == 'refuse' else 'WARNING'}: {each.text}" for each in result.problems]
    first = result.templates[0]
    if isinstance(first, TemplateReport) and is_refused(first):
        lines.append(f"  a completion of it: {first.example}")
    if result.verdict == "fine":
        lines.append(f"  fine: {_summary(trials[0])}")
    best = result.better
    if best is not None:
        lines.append(f"  BETTER: data.template={best.template}: {_summary(best)}")
    return "\n".join(lines)


def _row(template: str, answers: str, *cells: str) -> str:
    return f"  {template:<14}{answers:>9}" + "".join(f" {cell[:9]:>9}" for cell in cells)


def _cells(trial: TemplateReport) -> list[str]:
    shares = (trial.ended, trial.truncated, trial.empty, trial.unknown)
    means = [each.mean for each in trial.functions.values()]
    return [
        trial.template,
        f"{trial.num_groups} x {trial.group_size}",
        f"{trial.num_with_signal}/{trial.num_groups}",
        *("-" if mean is None else f"{mean:.3f}" for mean in means),
        *(f"{share:.3f}" for share in shares),
        f"{trial.length_mean:.1f}",
    ]


def _data_line(each: Audit) -> str:
    usable = each.num_rows - each.num_ungradable - each.num_too_long
    return (
        f"  {usable:,} of {each.num_rows:,} {each.what} are used; {each.num_ungradable:,} cannot be graded, "
        f"{each.num_too_long:,} are too long"
    )


def _summary(trial: TemplateReport) -> str:
    return (
        f"{trial.num_with_signal} of {trial.num_groups} groups have signal, {_rounded_means(trial)}, "
        f"{trial.truncated:.0%} cut off"
    )


def _rounded_means(trial: TemplateReport) -> str:
    return ", ".join(f"{n} {f.mean:.3f}" for n, f in trial.functions.items() if f.mean is not None)
