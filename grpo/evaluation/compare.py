"""Several configurations, several seeds each: run them, and tell what differs in the end.

    OUT/<arm>/seed-0/            the run;  seed-0.log beside it has what it printed
    OUT/comparison.md, .json     the table;  comparison.png  curves, the mean over each arm's seeds
    OUT/report.html              the runs' curves

An arm is a configuration with its overrides; the others are compared with the first one. Runs resume: what has finished is not
repeated, what was interrupted goes on. Two intervals are told, because they answer two questions. Over questions: how far may
the accuracy of these very models be from that on all questions of the kind? Over seeds: how far may the mean of these runs be
from that of all runs there could be, on these questions?
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from types import FrameType
from typing import Any

import numpy as np
import torch

from grpo.evaluation.arms import PlannedRun, verdicts_in
from grpo.policy.model_source import name_of
from grpo.report import plot_arms, write_page
from grpo.report.read import MAX_RUNS
from grpo.scoring.answers import by_question, columns_of, is_right, metrics_of
from grpo.scoring.statistics import Estimate, Values, estimate, mean_of_few
from grpo.system.files import replace_text, to_json
from grpo.system.jsonl import iterate_jsonl, read_metrics
from grpo.system.stopping import EXIT_STOPPED, SAFE_PATH_VARIABLE, SIGNALS

Row = dict[str, Any]
Accuracy = dict[tuple[int, str], float]
"""Row and text of a question -> share of its samples that are right; without questions of unknown verdict."""


def is_finished(run: PlannedRun) -> bool:
    """Whether its last step has been made, saved and evaluated."""
    steps = run.config.run.steps
    saved = run.directory / "checkpoints" / name_of(steps)
    rows = read_metrics(run.directory / "metrics.jsonl") if saved.exists() else []
    return any(row["step"] == steps and "eval/length_mean" in row for row in rows)


def places(at_once: int) -> list[dict[str, str]]:
    """What to add to the environment of each of so many runs at once: GPUs of its own. Those visible are dealt out evenly.

    Raises:
        ValueError: they cannot be.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if at_once < 1 or len(gpus) % at_once:
        raise ValueError(
            f"--at-once is {at_once}; the {len(gpus)} GPUs cannot be dealt out evenly to so many runs. Set it to a divisor of "
            f"{len(gpus)}, or CUDA_VISIBLE_DEVICES to a multiple of {at_once}."
        )
    each = len(gpus) // at_once
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each :][:each])} if gpus else {} for i in range(at_once)]


def carry_out(
    runs: Sequence[PlannedRun],
    command: Sequence[str],
    *,
    at: Sequence[dict[str, str]] = ({},),
    say: Callable[[str], None] = print,
) -> int:
    """Launch the runs that have not finished; a failed one is told and does not end the others.

    A signal that asks to stop goes on to the runs under way, which then save where they stand; no other is begun.

    Args:
        command: what starts a training script, up to its options.
        at: what to add to the environment of a run; as many run at once.

    Returns:
        What to exit with: 0 if all have finished, EXIT_STOPPED if some have stopped, 1 if some have failed, and as a shell counts
        a signal if there was one.
    """
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in at:
        free.put(place)

    def launch(number: int, run: PlannedRun) -> int:
        what = f"{number}/{len(runs)}  {run.arm.name}, seed {run.seed}"
        if is_finished(run):
            say(f"{what}: finished before")
            return 0
        place, began = free.get(), time.monotonic()
        said_before = run.log.stat().st_size if run.log.exists() else 0
        try:
            code = processes.run([*command, "--config", str(run.arm.config), "--set", *run.settings], run.log, place)
        except OSError as error:
            say(f"{what}: FAILED, it could not be begun: {error}")
            return 1
        finally:
            free.put(place)
        if code is None:
            return EXIT_STOPPED
        seconds = f"after {time.monotonic() - began:.0f} s"
        if is_finished(run):
            say(f"{what}: finished {seconds}")
            return 0
        if _has_stopped(run.log.read_bytes()[said_before:].decode(errors="replace")):
            say(f"{what}: stopped {seconds}; started again, it goes on")
            return EXIT_STOPPED
        failed = "FAILED" if processes.asked is None else "ended without saving"
        say(f"{what}: {failed} ({code}) {seconds}; see {run.log}")
        return 1

    with _Processes() as processes, ThreadPoolExecutor(len(at)) as pool:
        exit_codes = set(pool.map(launch, range(1, len(runs) + 1), runs))
    if processes.asked is not None:
        return 128 + processes.asked
    return 1 if 1 in exit_codes else max(exit_codes)


def _has_stopped(log: str) -> bool:
    """By the trainer's last words, because launchers have exit codes of their own."""
    last = f"Exit code {EXIT_STOPPED}."
    return any(line.startswith("stopped: ") and line.endswith(last) for line in log.splitlines())


class _Processes:
    """The runs' processes. As a context it passes signals on to all; each is waited for, with what it left in its group."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the last signal
        self._groups: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Processes:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
        if threading.current_thread() is threading.main_thread():  # another cannot handle signals
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
            self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: list[str], log: Path, place: dict[str, str]) -> int | None:
        """The exit code, once all processes of it have ended; None if it was not begun because a signal came before."""
        if self.asked is not None:
            return None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | SAFE_PATH_VARIABLE | place,
                start_new_session=True,
            )
        self._groups.add(process.pid)
        if self.asked is not None:  # since
            _ask_to_stop(process.pid, self.asked)
        code = process.wait()
        with suppress(ChildProcessError):  # there are no more
            while True:  # accelerate's launcher dies of a signal and leaves a child, which is saving
                if os.waitpid(-process.pid, os.WNOHANG) == (0, 0):  # without waiting: it may leave the group meanwhile
                    time.sleep(0.1)
        self._groups.discard(process.pid)
        return code

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        for group in list(self._groups):
            _ask_to_stop(group, number)


_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): what a run leaves behind becomes a child of this process, which can wait for it."""


def _ask_to_stop(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number if number == signal.SIGINT else signal.SIGTERM)  # which every launcher passes on


def compare(runs: Sequence[PlannedRun]) -> list[Row]:
    """A row for each arm, in order, from its finished runs; of an arm without any, its name and the seeds that are missing."""
    rows: list[Row] = []
    base: dict[int, Accuracy] = {}
    for number, arm in enumerate(dict.fromkeys(run.arm for run in runs)):
        own = [run for run in runs if run.arm == arm]
        by_seed = {run.seed: known for run in own if is_finished(run) and (known := _accuracy_by_question(run))}
        done = [run for run in own if run.seed in by_seed]
        row: Row = {
            "arm": arm.name,
            "seeds": list(by_seed),
            "missing": [run.seed for run in own if run not in done],
        }
        if done:
            row |= _accuracy(list(by_seed.values())) | {"difference": _difference(by_seed, base)} | _the_rest(done)
        base = by_seed if number == 0 else base
        rows.append(row)
    return rows


def _final(run: PlannedRun) -> list[Row]:
    return _answers(run, run.config.run.steps)


def _answers(run: PlannedRun, step: int | None) -> list[Row]:
    """Of one evaluation; the file may be larger than memory."""
    return [row for row in iterate_jsonl(run.directory / "evaluations.jsonl", ["step"]) if row["step"] == step]


def _accuracy_by_question(run: PlannedRun) -> Accuracy:
    questions = by_question(_final(run))
    shares = columns_of(questions)["pass@1"]
    return {
        (rows[0]["row"], rows[0]["question"]): float(share)
        for rows, share in zip(questions, shares, strict=True)
        if not np.isnan(share)
    }


def _mean_by_question(each: Sequence[Accuracy]) -> Accuracy:
    """Over those that know it."""
    questions = dict.fromkeys(question for accuracy in each for question in accuracy)
    return {question: fmean(accuracy[question] for accuracy in each if question in accuracy) for question in questions}


def _accuracy(accuracies: Sequence[Accuracy]) -> Row:
    each = [fmean(accuracy.values()) for accuracy in accuracies]
    means = _mean_by_question(accuracies)
    over_questions = estimate({"accuracy": np.array(list(means.values()))})["accuracy"]
    return {
        "accuracy": fmean(each),
        "by_seed": each,
        "questions": len(means),
        "over_questions": _ends(over_questions),
        "over_seeds": [min(max(end, 0.0), 1.0) for end in _ends(mean_of_few(each))] if len(each) > 1 else None,
    }


def _difference(by_seed: dict[int, Accuracy], base: dict[int, Accuracy]) -> Row | None:
    """To the first arm, with the interval over questions; None if not one question with one seed is known of both.

    It is that of each seed and question which both know, then the mean over seeds.
    """
    seeds = [seed for seed in by_seed if seed in base]
    differences = [
        {question: own - base[seed][question] for question, own in by_seed[seed].items() if question in base[seed]}
        for seed in seeds
    ]
    paired: Values = np.array(list(_mean_by_question(differences).values()))
    if not len(paired):
        return None
    found = estimate({"difference": paired})["difference"]
    return {"value": found.value, "over_questions": _ends(found), "questions": len(paired), "seeds": seeds}


def _ends(found: Estimate) -> list[float]:
    return [found.low, found.high]


def _the_rest(runs: Sequence[PlannedRun]) -> Row:
    """Means over all final answers of all runs; entropy and time are means over runs."""
    answers = [row for run in runs for row in _final(run)]
    sampled, _ = metrics_of(verdicts_in(runs[0].config))
    steps = [[row for row in read_metrics(run.directory / "metrics.jsonl") if "time/step" in row] for run in runs]
    return {
        "before": _mean(share for run in runs for share in _before(run)),
        "sampled": _mean(row[sampled] for rows in steps for row in rows if sampled in row),
        "length": _length(answers),
        "length_right": _length(row for row in answers if is_right(row) is True),
        "length_wrong": _length(row for row in answers if is_right(row) is False),
        "truncated": fmean(row["finish_reason"] == "length" for row in answers),
        "entropy": fmean(rows[-1]["policy/entropy"] for rows in steps),
        "seconds": fmean(sum(row["time/step"] for row in rows) for rows in steps),
    }


def _before(run: PlannedRun) -> list[float]:
    """A share for each question of known verdict."""
    shares = columns_of(by_question(_answers(run, 0)))["pass@1"]
    return [float(share) for share in shares if not np.isnan(share)]


def _length(rows: Iterable[Row]) -> float | None:
    return _mean(row["num_tokens"] for row in rows)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


COLUMNS = (
    "arm",
    "seeds",
    "before",
    "sampled",
    "accuracy",
    "over questions",
    "over seeds",
    "against the first",
    "tokens",
    "right",
    "wrong",
    "cut off",
    "entropy",
    "minutes",
)


def cells(row: Row) -> list[str]:
    """A row of `compare` as one reads it: accuracies and their 95 % intervals in percent, lengths in tokens."""
    seeds = f"{len(row['seeds'])}" + (f" of {len(row['seeds']) + len(row['missing'])}" if row["missing"] else "")
    if not row["seeds"]:
        return [row["arm"], seeds, *["-"] * (len(COLUMNS) - 2)]
    difference = row["difference"]
    against = "-"
    if difference is not None:
        against = f"{100 * difference['value']:+.1f} ({_range(difference['over_questions'])})"
        against += f" of {difference['questions']}" * (difference["questions"] < row["questions"])
    return [
        row["arm"],
        seeds,
        *("-" if row[name] is None else f"{100 * row[name]:.1f}" for name in ("before", "sampled")),
        f"{100 * row['accuracy']:.1f}",
        _range(row["over_questions"]),
        "-" if row["over_seeds"] is None else _range(row["over_seeds"]),
        against,
        *("-" if row[name] is None else f"{row[name]:.1f}" for name in ("length", "length_right", "length_wrong")),
        f"{100 * row['truncated']:.1f}",
        f"{row['entropy']:.3f}",
        f"{row['seconds'] / 60:.1f}",
    ]


def _range(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def as_text(rows: Sequence[Row]) -> str:
    """The table with aligned columns."""
    table = [list(COLUMNS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table with pipes, and what its columns mean."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_note(rows)}\n"


def _note(rows: Sequence[Row]) -> str:
    return NOTE.format(questions=next((row["questions"] for row in rows if row["seeds"]), 0))


NOTE = (
    "Accuracy: percent right of {questions} held-out questions after the last step, the mean over seeds. Before: before the "
    "first step. Sampled: of the completions sampled in all of training, so more is sooner. Intervals are of 95 %: over "
    "questions by bootstrap (other questions, the same models), over seeds by Student's t (other runs, the same questions). "
    "Against the first: the difference, question by question and seed by seed where both are known, over questions. Tokens: "
    "of held-out answers, of all, of right and of wrong ones. Entropy: of the last training step. Minutes: of training steps."
)


def write(rows: Sequence[Row], runs: Sequence[PlannedRun], out: Path) -> list[Path]:
    """The table as Markdown and JSON, curves, and a page over the finished runs: as many as it can tell apart, seed by seed."""
    paths = [out / "comparison.md", out / "comparison.json"]
    replace_text(paths[0], as_markdown(rows))
    replace_text(paths[1], to_json({"note": _note(rows), "arms": rows}, indent=1))
    finished = [run for run in runs if is_finished(run)]
    if finished:
        arms: dict[str, list[Path]] = {}
        for run in finished:
            arms.setdefault(run.arm.name, []).append(run.directory)
        paths += [plot_arms(arms, out / "comparison.png"), out / "report.html"]
        write_page([run.directory for run in finished][:MAX_RUNS], paths[-1])
    return paths
