"""Runs that are killed at random moments, again and again, until they have come to their end; and one that never is.

python tests/worker_kills.py OUT --kills 300 [--processes 2 --zero 3] [--lora 4] [--background] [--seed 1]

Prints a JSON object: kills, where they struck, and the differences between each run and the one that was left alone (none).
A third of the kills are SIGTERM, after which a process must save and end with 75 by itself; the others are SIGKILL. After half
of these, rows later than the newest checkpoint are cut at any byte, as by a machine that loses its power; the questions are of
characters of several bytes. Each attempt is a fork of this process, which has imported everything, so that hundreds take
minutes. On a GPU, whose driver does not survive a fork, each is a process of its own, and is struck once it has made a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch

os.environ.update({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})

import deepspeed  # noqa: F401  before the forks
import warm
from helpers import QUESTIONS, VARIETY, free_port, shallow, shard_even_small_weights, tiny_config, without_pictures
from safetensors.torch import load_file

from grpo import Trainer
from grpo.policy.model_source import complete_checkpoints, numbers_of
from grpo.system.heartbeat import PEER_LOST
from grpo.system.jsonl import iterate_backwards, read_jsonl
from grpo.system.stopping import EXIT_STOPPED

ON_GPU = torch.cuda.is_available()
STEPS = 5
MOMENTS = (0.0, 0.1) if ON_GPU else (0.1, 0.8)
"""When a blow falls, as shares of the seconds that a whole run takes; on a GPU most of them are the start."""
CLOCKS = ("time/", "throughput/", "memory/")
torch.set_num_threads(1)
without_pictures()


def train(run: Path, arguments: argparse.Namespace, every_steps: int) -> None:
    if arguments.zero == 3:
        shard_even_small_weights()
    Trainer(
        tiny_config(
            run,
            data={
                "question_template": "🧮 请计算 {question}",
                "eval_name": str(QUESTIONS),
                "eval_question_template": "é中 {question}",
            },
            rollout={"num_prompts": 2 * max(2, arguments.processes), "group_size": 2, "max_completion_tokens": 8},
            model={"name": shallow(1)},
            rewards=VARIETY,
            evaluation={"num_questions": 3, "every_steps": 2},
            algorithm={"kl_coef": 0.05, "num_minibatches": 2, "reference_refresh_steps": 4},
            optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3},
            lora={"rank": arguments.lora},
            distributed={"zero_stage": arguments.zero},
            checkpoint={"every_steps": every_steps, "background": arguments.background},
            run={"steps": STEPS, "resume": "auto"},
        )
    ).train()


def start(run: Path, arguments: argparse.Namespace, *, every_steps: int = 1) -> list[int]:
    """A process group; their process ids."""
    group = {"WORLD_SIZE": str(arguments.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    begin = spawned if ON_GPU else forked
    return [
        begin(run, rank, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, arguments, every_steps)
        for rank in range(arguments.processes)
    ]


APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def log_of(run: Path, rank: int) -> Path:
    return run.with_name(f"{run.name}-{rank}.log")


def spawned(run: Path, rank: int, group: dict[str, str], arguments: argparse.Namespace, every_steps: int) -> int:
    command = [sys.executable, *sys.argv, "--run", run.name, "--every-steps", str(every_steps)]
    log = (os.POSIX_SPAWN_OPEN, 1, str(log_of(run, rank)), APPEND, 0o644)
    return os.posix_spawn(
        sys.executable, command, {**os.environ, **group}, file_actions=[log, (os.POSIX_SPAWN_DUP2, 1, 2)]
    )


def forked(run: Path, rank: int, group: dict[str, str], arguments: argparse.Namespace, every_steps: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ.update(group)
        _as_a_process_of_its_own(run, rank, arguments, every_steps)
    return pid


def _as_a_process_of_its_own(run: Path, rank: int, arguments: argparse.Namespace, every_steps: int) -> None:
    log = os.open(log_of(run, rank), APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        train(run, arguments, every_steps)
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pids: list[int], codes: dict[int, int], *, within: float) -> list[int] | None:
    """Exit codes (negative: the signal), or None if they have not all ended in so many seconds; `codes` collects them."""
    deadline = time.monotonic() + within
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in pids] if len(codes) == len(pids) else None


def newest_checkpoint(run: Path) -> str:
    return max((path.name for path in (run / "checkpoints").glob("step-" + 8 * "[0-9]")), default="")


def has_made_a_step(run: Path, pids: list[int], codes: dict[int, int]) -> None:
    """Wait until the attempt has saved a step of its own, or has ended."""
    first = newest_checkpoint(run)
    while newest_checkpoint(run) <= first and ended(pids, codes, within=0.02) is None:
        pass


def strike(pids: list[int], codes: dict[int, int], number: signal.Signals) -> None:
    for pid in set(pids) - codes.keys():
        os.kill(pid, number)


def tear(run: Path, dice: random.Random) -> bool:
    """Cut the last row of each file at any byte, where its step is later than the newest checkpoint; whether there was one."""
    saved = max((numbers_of(path)[0] for path in complete_checkpoints(run / "checkpoints")), default=-1)
    torn = False
    for path in (run / f"{name}.jsonl" for name in ("metrics", "completions", "evaluations")):
        content = path.read_bytes() if path.exists() else b""
        begin = content.rstrip(b"\n").rfind(b"\n") + 1
        last = next(iterate_backwards(path), {"step": -1})
        if last["step"] > saved and content.endswith(b"\n"):
            os.truncate(path, dice.randrange(begin, len(content)))
            torn = True
    return torn


def where(run: Path) -> str:
    """What the run was doing, by what it left."""
    checkpoints = run / "checkpoints"
    if any(checkpoints.glob("*.partial")):
        return "while saving"
    if any(checkpoints.glob("step-*-*")):
        return "with a step under way saved"
    return "between" if any(checkpoints.glob("step-*")) else "before the first checkpoint"


def differences(run: Path, reference: Path) -> list[str]:
    found = []
    for name in ("metrics", "completions", "evaluations"):
        ours, theirs = (
            [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_jsonl(each / f"{name}.jsonl")]
            for each in (run, reference)
        )
        found += [f"{run.name}: {name}.jsonl, row {i}" for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]  # noqa: B905
        found += [f"{run.name}: {name}.jsonl has {len(ours)} rows, not {len(theirs)}"] * (len(ours) != len(theirs))
    last = f"checkpoints/step-{STEPS:08d}/hf/model.safetensors"
    ours, theirs = load_file(run / last), load_file(reference / last)
    return found + [f"{run.name}: {name}" for name in theirs if not torch.equal(ours[name], theirs[name])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--lora", type=int, default=0, help="rank")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="be one process of an attempt at the run of this name")
    parser.add_argument("--every-steps", type=int, default=1, help="of such a process: between two checkpoints")
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments.out / arguments.run, arguments, arguments.every_steps)
        return
    if not ON_GPU:
        warm.fill_caches()
    arguments.out.mkdir(parents=True, exist_ok=True)
    reference = arguments.out / "whole"
    began = time.monotonic()
    assert ended(start(reference, arguments), {}, within=300) == [0] * arguments.processes, (
        "the run that is left alone failed"
    )
    seconds = time.monotonic() - began
    dice = random.Random(arguments.seed)
    kills, struck, found, runs = 0, Counter[str](), [], 0
    while kills < arguments.kills:
        runs += 1
        run = arguments.out / f"killed-{runs}"
        codes = None
        while codes is None:
            pids, ends = start(run, arguments, every_steps=dice.choice((1, 2))), dict[int, int]()
            patience = dice.uniform(*MOMENTS) * seconds if kills < arguments.kills else 300
            if ON_GPU:
                has_made_a_step(run, pids, ends)
            codes = ended(pids, ends, within=patience)
            if codes is None:
                assert kills < arguments.kills, "a run that was left alone at last did not end"
                kills += 1
                number = signal.SIGTERM if dice.random() < 0.3 else signal.SIGKILL
                strike(pids, ends, number)
                left = ended(pids, ends, within=90)
                assert left is not None, f"not all processes ended soon after {number.name}"
                if left == [0] * len(pids):
                    codes = left  # it had come to its end
                # before it handles signals a process dies of SIGTERM, and the others notice
                handled = {0, EXIT_STOPPED, -signal.SIGTERM, PEER_LOST}
                expected = {0, -signal.SIGKILL} if number == signal.SIGKILL else handled
                assert set(left) <= expected, f"{number.name} ended in {left}; see {run}-0.log"
                struck[f"{number.name} {where(run)}"] += 1
                if number == signal.SIGKILL and dice.random() < 0.5:
                    struck["rows torn"] += tear(run, dice)
            else:
                assert codes == [0] * len(pids), f"a resumed run failed with {codes}; see {run}-0.log"
        found += differences(run, reference)
    print(json.dumps({"kills": kills, "runs": runs, "struck": struck, "differences": found}))


if __name__ == "__main__":
    main()
