"""Is the update the same however it is split? One batch through other token budgets, ZeRO stages and numbers of processes.

The first variant samples the completions, one rollout of the configured size to real questions; every variant then makes one
optimizer step on them, with the same random rewards. Two things are compared with the first variant:

- the gradient's norm, before clipping;
- the update itself: the whole weights after the step less those before, over all weights together and for the worst single one.

AdamW's own first step is almost the sign of each gradient, which turns noise around zero into full-sized differences. So the
variants run it with a large epsilon, where it is plain descent along the clipped gradient; see grpo/check/variant.py. For the
same reason they make one minibatch of the rollout: a second one would start from what rounding left of the first. Neither the
learning rate nor its schedule, nor weight decay, plays a part.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from grpo.check.dry_run import NOTHING_HELD_OUT, changed, passes_alone
from grpo.check.variant import EPSILON, SCALE
from grpo.config import Config, OptimizerConfig
from grpo.policy.language_model import resolve_dtype
from grpo.policy.model_source import model_config
from grpo.policy.sequence_parallel import num_heads
from grpo.system.terminal import say

WORKER = ("-m", "grpo.check.variant")


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that rounding explains."""

    norm: float  # of the gradient's norm
    update: float  # of the update, L2, over all weights and for the worst one


TOLERANCE = {
    torch.float32: Tolerance(norm=2e-5, update=1e-4),
    torch.bfloat16: Tolerance(norm=1e-2, update=5e-2),
}
"""In bfloat16 some times the most that was seen with the quickstart's model on a CPU (1.6e-3 of the norm, 9e-3 of the update,
1.7e-2 of the worst weight): activations, and the gradients that passes add up, are rounded to eight bits. In float32 (1e-7, 4e-7
and 1.4e-6) more, since the sums of larger models are longer. A loss that is normalised by pass is off by tenths."""


@dataclass(frozen=True)
class Variant:
    name: str
    processes: int
    config: Config | None  # None: the settings cannot be combined like this
    refusal: str = ""


def check(config: Config, *, processes: Sequence[int] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Run all variants, print how far each is from the first, and return 0 if none is too far, else 1.

    Args:
        processes: numbers of processes to try; None: 1, 2, and as many as there are GPUs.
        worker: what the launcher starts for each variant.

    Raises:
        ValueError: a number of processes that cannot be launched here, or a launcher has started this check.
    """
    dtype = resolve_dtype(config.model.dtype)
    variants = list(plan(config, _counts(config, processes)))
    tolerance = TOLERANCE[dtype]
    say(_preface(config, dtype, tolerance))
    results: list[dict[str, Any]] = []
    verdicts: list[str] = []
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        for variant in variants:
            results.append(_run(variant, Path(directory), worker))
            verdicts.append(verdict(results[-1], results[0], tolerance))
            say(row(variant, results[-1], results[0], verdicts[-1]))
            if verdicts[0] != "first":
                break
    say(conclusion(verdicts))
    return 0 if "FAIL" not in verdicts and "ok" in verdicts else 1


def _counts(config: Config, asked: Sequence[int] | None) -> list[int]:
    """Numbers of processes, ascending."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; this check launches its variants itself. Start it with "
            "grpo check, without accelerate launch or torchrun."
        )
    gpus = torch.cuda.device_count()
    possible = [n for n in (1, 2, gpus) if 1 <= n <= min(gpus or 2, config.rollout.num_prompts)]
    counts = sorted(set(possible if asked is None else asked))
    for count in counts:
        if count < 1 or (gpus and count > gpus):
            raise ValueError(
                f"--processes is {count}; this machine has {gpus} GPUs, and every process takes one. Name 1 to {gpus}."
                if gpus
                else f"--processes is {count}; it is a number of processes, at least 1. Correct --processes."
            )
        config.check_world_size(count)
    return counts


def plan(config: Config, counts: Sequence[int]) -> Iterator[Variant]:
    """The configuration as it is, with the smallest passes, on every number of processes; on the most of them in every ZeRO
    stage, and with passes that processes run together."""
    stage, budget = config.distributed.zero_stage, config.pass_tokens
    smallest = config.max_sequence_tokens
    other_budget = smallest if budget > smallest else 2 * smallest
    base = _one_plain_step(config)
    yield Variant(f"as configured: ZeRO {stage}, passes of {budget:,} tokens", counts[0], base)
    yield Variant(
        f"passes of {other_budget:,} tokens", counts[0], changed(base, memory={"micro_batch_tokens": other_budget})
    )
    for count in counts[1:]:
        yield Variant("as configured", count, base)
    for other in {0, 1, 2, 3} - {stage}:
        try:
            yield Variant(f"ZeRO {other}", counts[-1], changed(base, distributed={"zero_stage": other}))
        except ValueError as error:
            yield Variant(f"ZeRO {other}", counts[-1], None, str(error))
    for together in _group_sizes(config, counts[-1]):
        name = f"passes on {together} processes together"
        own = {"micro_batch_tokens": -(-budget // together)}
        yield Variant(name, counts[-1], changed(base, distributed={"sequence_parallel": together}, memory=own))


def _group_sizes(config: Config, processes: int) -> list[int]:
    """How many processes are to run passes together: as configured, or the fewest that there can be; none if there cannot."""
    wanted = config.distributed.sequence_parallel
    heads = num_heads(model_config(config.model))
    possible = [n for n in range(2, processes + 1) if processes % n == 0 and heads % n == 0]
    return [wanted] if wanted in possible else possible[:1]


def _one_plain_step(config: Config) -> Config:
    """One optimizer step per rollout, whose update is the clipped gradient times SCALE."""
    rate = SCALE * EPSILON
    return changed(
        config,
        **passes_alone(config),
        rollout={"max_oversampling": 1.0, "signal_from": None, "carry_over": False, "max_staleness": 2},
        algorithm={"num_minibatches": 1, "num_epochs": 1},
        optimizer={**OptimizerConfig().model_dump(include=OF_THE_SCHEDULE), "learning_rate": rate, "weight_decay": 0.0},
        evaluation=NOTHING_HELD_OUT,
    )


OF_THE_SCHEDULE = {"schedule", "warmup_steps", "final_rate_share", "decay_share"}
"""Settings of the optimizer, whose defaults leave the learning rate as it is."""


def _run(variant: Variant, directory: Path, worker: Sequence[str]) -> dict[str, Any]:
    """What a variant's main process wrote, or why it has written nothing."""
    if variant.config is None:
        return {"refused": variant.refusal}
    settings, out, log = directory / "config.yaml", directory / "result.json", directory / "log.txt"
    settings.write_text(variant.config.to_yaml())
    out.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(variant.processes)]
    files = ["--config", str(settings), "--directory", str(directory), "--out", str(out)]
    exit_code = _launch([sys.executable, *launcher, *worker, *files], log)
    printed = log.read_text()
    if exit_code is None:
        return {"failed": f"did not end within {LONGEST_SECONDS:,} seconds; it was ended:\n{printed[-LOG_TAIL:]}"}
    result = json.loads(out.read_text()) if out.exists() else {}
    if exit_code == 0 or "out_of_memory" in result:
        return result
    ours = [line for line in printed.splitlines() if line.startswith("error")]
    return {"failed": "crashed:\n" + ("\n".join(ours) or printed[-LOG_TAIL:])}


LONGEST_SECONDS = 7200
"""After so long a variant is taken to hang. It loads the model, makes one update and, if it is the first, samples one rollout:
minutes, or an hour with the longest completions of a large model."""

LOG_TAIL = 6000
"""Characters shown of what a variant printed before it failed without a message of ours."""


def _launch(command: list[str], log: Path) -> int | None:
    """Run a launcher and all that it starts to the end, and return its exit code; None if it took too long and was ended."""
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        return process.wait(LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs, with its workers: each has a session of its own, so only the launcher can signal all of
    what a worker started. It kills what a SIGTERM has not ended after 30 seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def verdict(result: dict[str, Any], first: dict[str, Any], tolerance: Tolerance) -> str:
    """`ok`, `FAIL`, or that there is nothing to compare; `first` of the first itself."""
    if "failed" in result:
        return "FAIL"
    if "update" not in result:
        return "not run"
    if result is first:
        return "first"
    close = norm_difference(result, first) <= tolerance.norm  # not true of NaN
    return "ok" if close and max(result["update"], result["weight_update"]) <= tolerance.update else "FAIL"


def norm_difference(result: dict[str, Any], first: dict[str, Any]) -> float:
    """Of the gradient's norm, relative to the first's."""
    return abs(result["grad_norm"] - first["grad_norm"]) / first["grad_norm"] if first["grad_norm"] else math.nan


def _preface(config: Config, dtype: torch.dtype, tolerance: Tolerance) -> str:
    name = str(dtype).removeprefix("torch.")
    completions = f"{config.rollout.num_prompts} x {config.rollout.group_size} completions"
    lines = [
        f"One update on the same {completions}, which the first variant samples; random rewards.",
        "Compared with the first: the gradient's norm before clipping, and the update of the weights along the clipped gradient",
        "(L2, relative; of all weights together, and of the worst single one against its own update and 1 % of the whole).",
        f"Tolerance in {name}: {tolerance.norm:g} of the norm, {tolerance.update:g} of the update.",
    ]
    if dtype == torch.bfloat16:
        lines.append("For a sharper comparison, where memory allows: --set model.dtype=float32")
    titles = f"{'':{WIDE}}{'processes':>10}{'passes':>8}{'grad norm':>12}{'differs':>10}{'update':>10}{'worst':>10}"
    return "\n".join([*lines, "", titles])


WIDE = 50


def row(variant: Variant, result: dict[str, Any], first: dict[str, Any], verdict: str) -> str:
    """A variant's line in the table."""
    label = f"{variant.name:<{WIDE}}{variant.processes:>10}"
    if "update" not in result:
        why = result.get("refused") or result.get("out_of_memory") or result["failed"]
        return f"{label}  {verdict}: {'out of memory: ' * ('out_of_memory' in result)}{why}"
    numbers = f"{result['passes']:>8}{result['grad_norm']:>12.6g}"
    if verdict == "first":
        return f"{label}{numbers}"
    apart = "".join(f"{x:>10.1e}" for x in (norm_difference(result, first), result["update"], result["weight_update"]))
    worst = f" ({result['weight']})" if verdict == "FAIL" else ""
    return f"{label}{numbers}{apart}  {verdict}{worst}"


def conclusion(verdicts: list[str]) -> str:
    if verdicts[0] != "first":
        return "\nThe configuration as it is did not run, so there is nothing to compare."
    compared = len(verdicts) - 1 - verdicts.count("not run")
    failed = verdicts.count("FAIL")
    if failed:
        return f"\n{failed} of {compared} variants failed: the result of a run would depend on how it is split."
    if not compared:
        return "\nNo other variant ran, so nothing was compared."
    return f"\nAll {compared} variants make the same update."
