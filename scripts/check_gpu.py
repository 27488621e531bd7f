"""Run on GPUs what needs them: tests, every way to train, faults, resuming, and speed. `make gpu` calls this.

python scripts/check_gpu.py
python scripts/check_gpu.py --only zero learns --gpus 2
python scripts/check_gpu.py --only rollout-speed evaluate everything --model DIR --data gsm8k_test.jsonl
python scripts/check_gpu.py --cpu --only display

Several jobs share a GPU, except those that measure speed, which come last. OUT/table.md has what passed and failed, and each
figure beside that of docs/performance.md; OUT/table.json has the same with all commands; what a job printed is in its
output.txt.
Exit code 0: nothing failed; 1: something did; 2: an option is refused.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, f"{sys.path[0]}/tests")

from gpu.checks import CHECKS, QUICKSTART, USES_WEIGHTS, Check, Failed, Machine
from gpu.figures import Outcome, table, write
from gpu.jobs import ROOT, Job, Result, run

PLACES = 8
"""Jobs that share a GPU: each spends most of its time importing, on one core of the machine."""
REHEARSED = 2
"""Processes that stand for GPUs in a rehearsal."""


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    checks = chosen(parser, options.only)
    if options.list:
        print("\n".join(f"{check.name:15} {check.what}" for check in checks))
        return 0
    machine, devices, title = look(parser, options)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    outcomes = carry_out(checks, machine, devices, out, title, minutes=options.minutes)
    print(f"\n{table(outcomes, title)}\n\ntable      {out / 'table.md'}")
    return int(any(each.verdict == "failed" for each in outcomes))


def leave(number: int, _: object) -> None:
    """What runs is killed on the way out, which nothing interrupts: launchers pass a signal on that their group has had."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks; see --list")
    parser.add_argument("--list", action="store_true", help="name the checks and run none")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", metavar="DIR", help="default: runs/gpu")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: all there are")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model in Hugging Face format for some checks")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE_OR_DIR",
        help="its questions: .jsonl, or a directory with train.jsonl and test.jsonl",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after so many no further job begins")
    parser.add_argument("--cpu", action="store_true", help="a dress rehearsal without a GPU, at tiny sizes")
    return parser


def chosen(parser: argparse.ArgumentParser, names: Sequence[str] | None) -> list[Check]:
    known = [check.name for check in CHECKS]
    for name in names or ():
        if name not in known:
            parser.error(f"--only has {name!r}; there is {', '.join(known)}.")
    wanted = set(names or known)
    if wanted & USES_WEIGHTS:
        wanted.add("weights")
    return [check for check in CHECKS if check.name in wanted]


def look(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Machine, list[str], str]:
    """The machine, the value of CUDA_VISIBLE_DEVICES for each of its GPUs, and a line about them."""
    data = questions(parser, options)
    if options.cpu:
        machine = Machine(num_gpus=options.gpus or REHEARSED, gib=80, on_cpu=True)
        return (
            replace(machine, **data),
            [""] * machine.num_gpus,
            f"a rehearsal on {machine.num_gpus} processes of the CPU",
        )
    found = gpus()
    if not found:
        parser.error("there is no GPU here that torch can use. Run it where there is one, or rehearse with --cpu.")
    count = len(found) if options.gpus is None else options.gpus
    if not 1 <= count <= len(found):
        parser.error(f"--gpus is {count}; this machine has {len(found)}. Name 1 to {len(found)}.")
    name, gib, torch = found[0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(len(found))]
    machine = replace(Machine(num_gpus=count, gib=float(gib)), **data)
    return machine, devices[:count], f"{count} x {name}, torch {torch}, {os.cpu_count()} cores"


def gpus() -> list[list[str]]:
    """Name, GiB, and torch's version for each; asked of a process of its own, so that this one holds no memory there."""
    ask = (
        "import torch\nfor i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    print(p.name, p.total_memory / 2**30, torch.__version__, sep='|')"
    )
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    return [line.split("|") for line in said.splitlines()]


def questions(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Path]:
    """The fields of Machine that --model and --data give."""
    for option, path in (("--model", options.model), ("--data", options.data)):
        if path is not None and not path.exists():
            parser.error(f"{option} is {str(path)!r}; there is no such file or directory. Correct it.")
    if options.data and not options.model:
        parser.error(
            f"--data is {str(options.data)!r}; it has no effect on the quickstart's model. Give --model, or leave it out."
        )
    found = {} if options.model is None else {"model": options.model.resolve()}
    data = (options.data or QUICKSTART).resolve()
    parts = {name: data / f"{name}.jsonl" if data.is_dir() else data for name in ("train", "test")}
    for path in parts.values():
        if not path.is_file():
            parser.error(f"--data is {str(options.data)!r}; {path} is missing. Name a file, or a directory with both.")
    return found | parts


def carry_out(
    checks: Sequence[Check], machine: Machine, devices: Sequence[str], out: Path, title: str, *, minutes: float
) -> list[Outcome]:
    """Run the jobs of all checks and judge each check as its last job ends. The table is written each time."""
    jobs = {check.name: list(check.jobs(machine)) for check in checks}
    results: dict[str, list[Result]] = {
        name: [Result(job, out / job.name) for job in own if job.skip] for name, own in jobs.items()
    }
    owner = {job.name: name for name, own in jobs.items() for job in own}
    outcomes = {check.name: judged(check, results[check.name]) for check in checks if not unskipped(jobs[check.name])}
    write(list(outcomes.values()), title, out)
    patience = 4 if machine.on_cpu else 1
    everything = [replace(job, seconds=patience * job.seconds) for own in jobs.values() for job in own]
    threads = max(1, (os.cpu_count() or 1) // (PLACES * len(devices)))
    places, deadline = 1 if machine.on_cpu else PLACES, time.monotonic() + 60 * minutes
    under_way = run(everything, devices=devices, places=places, out=out, deadline=deadline, threads=threads)
    with closing(under_way):
        for result in under_way:
            name = owner[result.job.name]
            results[name].append(result)
            print(f"{result.seconds:6.0f} s  {result.job.name:32} {result.problem or 'ended'}", flush=True)
            if len(results[name]) == len(jobs[name]):
                check = next(check for check in checks if check.name == name)
                outcome = judged(check, results[name])
                outcomes[name] = replace(outcome, figures=()) if machine.on_cpu else outcome  # of other sizes
                print(f"{'':10}{name}: {outcomes[name].verdict}  {outcomes[name].why}", flush=True)
                write(in_order(outcomes, checks), title, out)
    return in_order(outcomes, checks)


def unskipped(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not job.skip]


def in_order(outcomes: dict[str, Outcome], checks: Sequence[Check]) -> list[Outcome]:
    return [outcomes[check.name] for check in checks if check.name in outcomes]


def judged(check: Check, results: Sequence[Result]) -> Outcome:
    ran = {result.job.name: result for result in results if not result.job.skip}
    skipped = [f"{result.job.name}: {result.job.skip}" for result in results if result.job.skip]
    problems = [f"{name}: {result.problem}" for name, result in ran.items() if result.problem]
    seconds = sum(result.seconds for result in ran.values())
    figures, verdict = [], "passed" if ran else "skipped"
    if ran and not problems:
        try:
            figures = list(check.judge(ran))
        except Failed as found:
            problems = [str(found)]
        except Exception as error:  # the files are not what the check takes them for
            problems = [f"its output cannot be read: {type(error).__name__}: {error}"]
    if problems:
        verdict = "failed"
    return Outcome(check.name, verdict, "; ".join([*problems, *skipped]), seconds, figures, results)


if __name__ == "__main__":
    raise SystemExit(main())
