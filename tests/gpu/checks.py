"""What `make gpu` checks: commands, and what must be true of what they leave.

A check fails if one of its commands does, or if its `judge` raises `Failed`; what the judge returns are figures for the table.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.figures import Figure
from gpu.jobs import ROOT, Job, Result

QUICKSTART = ROOT / "configs/quickstart"
Results = Mapping[str, Result]


class Failed(Exception):
    """What a check has found."""


@dataclass(frozen=True)
class Machine:
    """What the checks run on, and with what."""

    num_gpus: int
    gib: float
    """Memory of a GPU."""
    on_cpu: bool = False
    """A dress rehearsal: the same commands at tiny sizes, on as many processes of the CPU."""
    model: Path | None = None
    """A real model; None: the quickstart's."""
    train: Path = QUICKSTART / "train.jsonl"
    test: Path = QUICKSTART / "test.jsonl"

    @property
    def counts(self) -> list[int]:
        """Numbers of GPUs to compare."""
        return sorted({1, self.num_gpus})


@dataclass(frozen=True)
class Check:
    name: str
    what: str
    jobs: Callable[[Machine], Sequence[Job]]
    judge: Callable[[Results], Sequence[Figure]] = lambda results: ()


# ---- commands ----------------------------------------------------------------------------------------------------------


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def launched(machine: Machine, processes: int, *words: str) -> tuple[str, ...]:
    """A script on one process or several; accelerate starts only one on a machine without a GPU."""
    if processes == 1:
        return python(*words)
    if machine.on_cpu:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "{port}"]
    else:
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--multi_gpu"]
        launcher += ["--main_process_port", "{port}"]
    return python(*launcher, *words)


SHORT = (
    "run.dir={out}/run", "preflight.num_questions=0", "evaluation.num_questions=0", "checkpoint.every_steps=0",
    "logging.num_samples=0",
)  # fmt: skip
SMALL = ("rollout.num_prompts=4", "rollout.group_size=4", "rollout.max_completion_tokens=24")
"""In a rehearsal."""


def training(
    machine: Machine, name: str, *settings: str, config: str = "quickstart", processes: int = 1, **options: Any
) -> Job:
    """A few steps of the quickstart, or of another small configuration, cut into shards even where they are small."""
    small = SMALL if machine.on_cpu else ()
    script = ("tests/gpu/train.py", "--config", f"configs/{config}.yaml", "--set", *SHORT, *small, *settings)
    return Job(name, launched(machine, processes, *script), processes=processes, **options)


def lora(rank: int = 16) -> tuple[str, ...]:
    return (f"lora.rank={rank}", "optimizer.learning_rate=2.5e-3")


# ---- what must be true of a run ------------------------------------------------------------------------------------------


def rows_of(result: Result) -> list[dict[str, float]]:
    """Its training steps."""
    rows = [json.loads(line) for line in (result.directory / "run/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "optimizer/loss" in row]


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


EIGHT_BITS = "rollouts in 8 bits"
"""In the name of a job: they may be further from the policy."""


GAP = "policy/sampling_gap"


def sound(result: Result) -> list[dict[str, float]]:
    """The run's steps, all of them finite and sampled from the policy: in bfloat16 within 0.04 nats (grpo/run/tripwire.py)."""
    rows, gap = rows_of(result), 0.15 if EIGHT_BITS in result.job.name else 0.04
    require(bool(rows), f"{result.job.name}: no step was logged")
    for row in rows:
        wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        require(not wrong, f"{result.job.name}: step {row['step']}: {', '.join(wrong)} not finite")
        found = row.get(GAP, math.inf)
        old = GAP not in row and row.get("rollout/staleness", 0) >= 1  # all its tokens were drawn a step ago or before
        require(
            old or found < gap, f"{result.job.name}: step {row['step']}: policy/sampling_gap {found:.3g}, limit {gap:g}"
        )
        require(row["optimizer/skipped"] == 0, f"{result.job.name}: step {row['step']}: an update was left out")
    return rows


def all_sound(results: Results) -> list[Figure]:
    check = next(iter(results)).split("/")[0]
    gaps: dict[str, list[float]] = {}
    for name, result in results.items():
        of = EIGHT_BITS if EIGHT_BITS in name else check
        gaps.setdefault(of, []).extend(row["policy/sampling_gap"] for row in sound(result) if GAP in row)
    return [Figure(f"largest sampling gap: {of}", max(found), "nats") for of, found in gaps.items()]


# ---- that it works at all --------------------------------------------------------------------------------------------------


def pytest_jobs(machine: Machine) -> list[Job]:
    command = python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    missing = "" if find_spec("pytest") else "pytest is not installed"
    skip = "needs a GPU" if machine.on_cpu else missing
    return [Job("pytest", command, processes=machine.num_gpus, seconds=400, skip=skip)]  # some want two


def pytest_judge(results: Results) -> list[Figure]:
    passed = re.search(r"^(\d+) passed", results["pytest"].output, re.MULTILINE)  # NCCL may speak after it
    require(passed is not None, "pytest: its last line is not there")
    return [Figure("tests that need a GPU", float(passed[1]), "passed")]


def engine_jobs(machine: Machine) -> list[Job]:
    engines = {
        "native": ("rollout.engine=native",),
        "native unfused": ("rollout.engine=native", "rollout.fused_layers=false"),
        "native released": ("rollout.engine=native", "memory.release_kv_cache=true"),
        "hf": ("rollout.engine=hf",),
        "vllm": ("rollout.engine=vllm",),
    }
    skip = {
        "vllm": "" if find_spec("vllm") else "vllm is not installed",
        "native released": "needs a GPU" if machine.on_cpu else "",
    }
    return [
        training(machine, f"engines/{name}", *settings, "run.steps=2", skip=skip.get(name, ""))
        for name, settings in engines.items()
    ]


SHARDING = {
    "ZeRO-0": ("distributed.zero_stage=0",),
    "ZeRO-2": ("distributed.zero_stage=2",),
    "ZeRO-3": ("distributed.zero_stage=3",),
    "ZeRO-2 offload": ("distributed.zero_stage=2", "distributed.offload_optimizer=true"),
    "ZeRO-3 offload": (
        "distributed.zero_stage=3", "distributed.offload_optimizer=true", "distributed.offload_parameters=true",
    ),
}  # fmt: skip


def zero_jobs(machine: Machine) -> list[Job]:
    return [
        training(machine, f"zero/{trained} {n} {name}", *settings, *own, "run.steps=2", processes=n)
        for n in machine.counts
        for trained, own in {"full": (), "LoRA": lora()}.items()
        for name, settings in SHARDING.items()
    ]


SAME = {"reward/mean": 0.02, "policy/entropy": 0.01, "optimizer/grad_norm": 0.03}
"""How far the first step may be from that of ZeRO-0, relative to it. Samples and weights are the same, so what is left is
bfloat16: grpo/check/invariance.py saw 1.6e-3 of the norm. One completion in 128 that ends otherwise moves the reward by 2 %."""


def zero_judge(results: Results) -> list[Figure]:
    firsts = {name: sound(result)[0] for name, result in results.items()}
    worst = 0.0
    for name, row in firsts.items():
        base = name.rpartition("ZeRO")[0] + "ZeRO-0"
        for metric, allowed in SAME.items() if base in firsts else ():
            apart = abs(row[metric] - firsts[base][metric]) / max(abs(firsts[base][metric]), 1e-12)
            require(apart <= allowed, f"{name}: {metric} {row[metric]:.4g}, of {base} {firsts[base][metric]:.4g}")
            worst = max(worst, apart * (metric == "optimizer/grad_norm"))
    return [*all_sound(results), Figure("gradient norm, ZeRO stages apart", 100 * worst, "%")]


# ---- that it learns --------------------------------------------------------------------------------------------------------

LEARNS = {
    "full": (),
    "LoRA": lora(),
    "QLoRA": (*lora(), "lora.quantization=nf4"),
    "offload": ("distributed.zero_stage=2", "distributed.offload_optimizer=true"),
    EIGHT_BITS: ("rollout.weights=fp8", "algorithm.importance=truncate", "algorithm.importance_high=2"),
}
VARIANTS = {
    "entropy bonus": ("algorithm.entropy_coef=0.001",),
    "top entropy": ("algorithm.top_entropy=0.5",),
    "float32 head": ("model.float32_head=true",),
    "KL in the reward": ("algorithm.kl_in=reward", "algorithm.kl_estimator=k1", "algorithm.normalize_by_std=false"),
    "solved, batch, covariance, entropy target": (
        "rollout.solved_share=0.2", "rollout.solved_from=0.5", "algorithm.normalize_by_std=batch", "algorithm.clip_cov=0.05",
        "algorithm.clip_cov_low=0.1", "algorithm.entropy_target=0.5",
    ),
    "scheduled temperature": (
        "schedules={rollout.temperature: {points: {0: 1.2, 2: 1.0, 4: 0.9}, interpolation: linear}}",
    ),
}  # fmt: skip


def learns_jobs(machine: Machine) -> list[Job]:
    steps = "run.steps=2" if machine.on_cpu else "run.steps=40"
    missing = "" if find_spec("bitsandbytes") else "bitsandbytes is not installed"
    learning = [
        training(machine, f"learns/{name}", *own, steps, skip=missing * (name == "QLoRA"))
        for name, own in LEARNS.items()
    ]
    few = "run.steps=2" if machine.on_cpu else "run.steps=6"
    return learning + [training(machine, f"learns/{name}", *own, few) for name, own in VARIANTS.items()]


def learns_judge(results: Results) -> list[Figure]:
    figures = all_sound(results)
    for name in LEARNS:
        if f"learns/{name}" not in results:
            continue  # skipped
        rows = sound(results[f"learns/{name}"])
        if len(rows) < 40:
            continue  # a rehearsal
        first, last = (sum(row["reward/accuracy"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        require(first < 0.5 and last > 0.8, f"learns/{name}: accuracy {first:.3f} at first, {last:.3f} at the end")
        figures.append(Figure(f"quickstart learns, {name}", last, "accuracy"))
    return figures


CARRIED = (
    "rollout.carry_over=true", "rollout.max_staleness=1", "algorithm.importance=truncate", "algorithm.importance_high=2",
)  # fmt: skip
"""At a rate this high two steps of age slow the game down to half: docs/algorithms.md."""
TURNS = {
    "tools": ("quickstart-tools", (), "tools/used", (0.5, 0.8)),
    "tools, as they are answered": ("quickstart-tools", ("run.deterministic=false",), "tools/used", (0.5, 0.8)),
    "game": ("quickstart-game", (), "reward/environment", (0.35, 0.5)),
    "game, carried over": ("quickstart-game", CARRIED, "reward/environment", (0.35, 0.4)),
}
"""Of each a configuration, settings, and what a metric is below at first and above at the end."""


def turns_jobs(machine: Machine) -> list[Job]:
    steps = "run.steps=2" if machine.on_cpu else "run.steps=40"
    return [
        training(machine, f"turns/{name}", *own, "rollout.max_completion_tokens=160", steps, config=config, seconds=300)
        for name, (config, own, *_) in TURNS.items()
    ]


def turns_judge(results: Results) -> list[Figure]:
    figures = all_sound(results)
    for name, (_, _, metric, (below, above)) in TURNS.items():
        rows = sound(results[f"turns/{name}"])
        if len(rows) < 40:
            continue  # a rehearsal
        first, last = (sum(row[metric] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        require(first < below and last > above, f"turns/{name}: {metric} {first:.3f} at first, {last:.3f} at the end")
        figures += [Figure(f"{name}: {metric}", last, "share"), Figure(f"{name}: step", rows[-1]["time/step"], "s")]
    return figures


def invariance_jobs(machine: Machine) -> list[Job]:
    questions = f"rollout.num_prompts={max(6, machine.num_gpus)}"
    settings = (questions, "rollout.group_size=4", "memory.micro_batch_tokens=512")
    command = python("-m", "grpo.check", "invariance", "--config", "configs/quickstart.yaml", "--set", *settings)
    return [Job("invariance", command, processes=machine.num_gpus, seconds=400)]


def invariance_judge(results: Results) -> list[Figure]:
    found = re.search(r"All (\d+) variants make the same update", results["invariance"].output)
    require(found is not None, "invariance: the report does not say so")
    return [Figure("variants of one update that agree", float(found[1]), "variants")]


def gradients_jobs(machine: Machine) -> list[Job]:
    there = (ROOT / "grpo/check/gradients.py").exists()
    command = python(
        "-m", "grpo.check", "gradients", "--config", "configs/quickstart.yaml", "--out", "{out}/gradients.json"
    )
    return [Job("gradients", command, skip="" if there else "there is no grpo/check/gradients.py")]


# ---- that it survives ------------------------------------------------------------------------------------------------------


def resume_jobs(machine: Machine) -> list[Job]:
    kills = ("tests/worker_kills.py", "{out}/runs", "--kills", "2")
    several = ("--processes", str(machine.num_gpus), "--zero", "3", "--background")
    one = Job("resume/1", python(*kills), seconds=300)
    return [one] + [
        Job(f"resume/{n} ZeRO-3", python(*kills, *several), processes=n, seconds=300) for n in machine.counts if n > 1
    ]


def resume_judge(results: Results) -> list[Figure]:
    found = {name: json.loads(result.output.strip().splitlines()[-1]) for name, result in results.items()}
    for name, each in found.items():
        require(each["kills"] >= 2 and not each["differences"], f"{name}: {each['differences'][:3]}")
    return [Figure("kills that left no trace", sum(each["kills"] for each in found.values()), "kills")]


EVERYTHING = (
    "algorithm.ratio=sequence", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1", "algorithm.normalize_by_std=false",
    "algorithm.kl_coef=0.001", "algorithm.top_entropy=0.5", "algorithm.entropy_coef=0.001", "algorithm.num_epochs=2",
    "algorithm.importance=truncate", "algorithm.importance_high=2", "rollout.max_oversampling=2",
    "memory.logprob_chunk_tokens=64", "run.steps=4", "evaluation.num_questions=64",
)  # fmt: skip
"""All at once. Chunks of 64 tokens make processes have different numbers of them."""


def everything_jobs(machine: Machine) -> list[Job]:
    lengths = (24, 48) if machine.on_cpu else (200, 512)
    schedule = f"schedules={{rollout.max_completion_tokens: {{points: {{0: {lengths[0]}, 4: {lengths[1]}}}}}}}"
    few = "needs two GPUs" if machine.num_gpus < 2 else ""
    return [
        training(
            machine, f"everything/ZeRO-{stage}", *EVERYTHING, f"rollout.max_completion_tokens={lengths[1]}", schedule,
            f"distributed.zero_stage={stage}", *of_real_model(machine), processes=max(2, machine.num_gpus), seconds=240, skip=few,
        )
        for stage in (2, 3)
    ]  # fmt: skip


def of_real_model(machine: Machine) -> list[str]:
    """Settings for --model and --data."""
    if machine.model is None:
        return []
    marks = "####" in machine.train.open().readline()
    return [
        f"model.name={machine.model}", f"data.name={machine.train}", f"data.eval_name={machine.test}", "data.template=r1_zero",
        "data.max_prompt_tokens=512", "memory.micro_batch_tokens=8192", "optimizer.learning_rate=1.0e-6",
        *(["data.answer_regex='####\\s*(.+)'"] if marks else []),
    ]  # fmt: skip


def everything_judge(results: Results) -> list[Figure]:
    """The sampling gap counts for the first of a rollout's updates only; the run itself watches it there."""
    for result in results.values():
        rows = sound(result)
        require(len(rows) == 4, f"{result.job.name}: {len(rows)} steps of 4")
        require(rows[-1]["schedule/rollout.max_completion_tokens"] > rows[0]["schedule/rollout.max_completion_tokens"],
                f"{result.job.name}: the schedule was not followed")  # fmt: skip
    return all_sound(results)


FAULTS = {
    "stale ZeRO-3": ("stale", "--zero", "3"),
    "stale LoRA": ("stale", "--zero", "2", "--lora", "8"),
    "stale offload": ("stale", "--zero", "3", "--offload", "optimizer", "parameters"),
    "temperature ZeRO-3": ("temperature", "--zero", "3"),
    "temperature LoRA": ("temperature", "--zero", "2", "--lora", "8"),
    "temperature offload": ("temperature", "--zero", "3", "--offload", "optimizer", "parameters"),
}


def faults_jobs(machine: Machine) -> list[Job]:
    n = machine.num_gpus
    return [
        Job(f"faults/{name}", launched(machine, n, "tests/worker_tripwire.py", "{out}", "--fault", *words), processes=n)
        for name, words in FAULTS.items()
    ]


def faults_judge(results: Results) -> list[Figure]:
    for name, result in results.items():
        expected = "step 2: old weights" if "stale" in name else "step 1: another temperature"
        found = re.findall(
            r"rank \d+ stopped in (step \d+: [a-z ]+?)(?=rank|\n)", result.output
        )  # two may share a line
        require(found == [expected] * result.job.processes, f"{name}: {found or 'the run was not stopped'}")
    return [Figure("planted faults found and named", len(results), "faults")]


# ---- what a person sees -----------------------------------------------------------------------------------------------------


def model_of(machine: Machine) -> str:
    return str(machine.model or QUICKSTART / "model")


def template_of(machine: Machine) -> str:
    return "r1_zero" if machine.model else "chat"


def evaluate_jobs(machine: Machine) -> list[Job]:
    few = ("--questions", "8", "--samples", "2") if machine.on_cpu else ("--questions", "64", "--samples", "8")
    words = (
        "scripts/evaluate.py",
        "--model",
        model_of(machine),
        "--benchmarks",
        "mine,probes",
        "--data",
        f"mine={machine.test}",
    )
    more = (
        "--templates",
        template_of(machine),
        "--max-tokens",
        "64" if machine.model is None else "400",
        "--out",
        "{out}/evaluation",
    )
    n = machine.num_gpus
    return [Job("evaluate", launched(machine, n, *words, *more, *few), processes=n)]


def evaluate_judge(results: Results) -> list[Figure]:
    found = json.loads((results["evaluate"].directory / "evaluation/results.json").read_text())["results"]
    (mine,) = (each for each in found if each["benchmark"] == "mine")
    return [Figure("evaluation, pass@1", 100 * mine["metrics"]["pass@1"]["value"], "%")]


def sample_jobs(machine: Machine) -> list[Job]:
    words = (
        "--model",
        model_of(machine),
        "--config",
        "configs/quickstart.yaml",
        "--row",
        "5",
        "--group",
        "4",
        "--json",
    )
    return [Job("sample", python("scripts/sample.py", *words, "--template", template_of(machine)))]


def sample_judge(results: Results) -> list[Figure]:
    rows = [json.loads(line) for line in results["sample"].output.splitlines() if line.startswith("{")]
    require(len(rows) == 4, f"sample: {len(rows)} completions of 4")
    return []


def chat_jobs(machine: Machine) -> list[Job]:
    words = ("scripts/chat.py", "--model", model_of(machine), "--seed", "0", "--max-tokens", "32")
    return [Job("chat", python(*words), typed="What is 2+3?\n/quit\n")]


def chat_judge(results: Results) -> list[Figure]:
    require(bool(results["chat"].output.strip()), "chat: no answer was printed")
    return []


def display_jobs(machine: Machine) -> list[Job]:
    steps = training(machine, "display", "run.steps=3")
    return [Job("display", python("tests/gpu/terminal.py", *steps.command))]


def display_judge(results: Results) -> list[Figure]:
    painted = results["display"].output
    require(" step 3/3 " in painted and "\x1b[" in painted, "display: the third step was not painted")
    return []


# ---- how fast it is ---------------------------------------------------------------------------------------------------------


def benchmark(machine: Machine, name: str, *words: str, size: str = "0.5b", processes: int = 1, **options: Any) -> Job:
    """benchmarks/step.py, with passes of 32,768 tokens; its result is in `step.jsonl`."""
    tiny = ("--size", "tiny", "--prompts", "2", "--completions", "4", "--new-tokens", "16", "--steps", "1")
    own = tiny if machine.on_cpu else ("--size", size)
    common = ("benchmarks/step.py", "--out", "{out}/step.jsonl", "--set", "memory.micro_batch_tokens=32768")
    command = launched(machine, processes, *common, *words, *own)
    return Job(name, command, processes=processes, alone=True, **{"seconds": 150, **options})


def record_of(result: Result) -> dict[str, Any]:
    return json.loads((result.directory / "step.jsonl").read_text().splitlines()[-1])


def weights_jobs(machine: Machine) -> list[Job]:
    """The benchmarks make them at need; two at once would be in each other's way."""
    sizes = ["tiny"] if machine.on_cpu else ["0.5b", "1.5b", "7b"]
    make = "import pathlib, sys, workload; workload.saved_model(sys.argv[1], pathlib.Path(sys.argv[2]))"
    paths = {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    return [Job(f"weights/{size}", python("-c", make, size, "runs/benchmarks"), environment=paths) for size in sizes]


def card_jobs(machine: Machine) -> list[Job]:
    skip = "" if (ROOT / "benchmarks/card.py").exists() else "there is no benchmarks/card.py"
    words = ("benchmarks/card.py", "--out", "{out}/card.json")
    return [
        Job(f"card/{n}", launched(machine, n, *words), processes=n, alone=True, seconds=90, skip=skip) for n in machine.counts
    ]  # fmt: skip


CARD = {
    "matrix_tflops": ("matrix rate", "TFLOP/s"),
    "copy_gbs": ("copy rate", "GB/s"),
    "launches_per_s": ("launch rate", "launches/s"),
    "all_reduce_gbs": ("all-reduce", "GB/s"),
    "all_gather_gbs": ("all-gather", "GB/s"),
}


def card_judge(results: Results) -> list[Figure]:
    """Collectives from the run on all GPUs, all else from that on one."""
    found: dict[str, float] = {}
    for result in sorted(results.values(), key=lambda result: -result.job.processes):
        record = json.loads((result.directory / "card.json").read_text().splitlines()[-1])
        found |= {name: value for name, value in record.items() if name in CARD and value is not None}
    return [Figure(name, found[key], unit) for key, (name, unit) in CARD.items() if key in found]


def rollout_jobs(machine: Machine) -> list[Job]:
    shape = ("--size", "tiny", "--prompts", "2", "--completions", "2", "--new-tokens", "8", "--repeats", "1")
    fixed = shape if machine.on_cpu else ("--size", "0.5b", "--repeats", "3")
    jobs = [Job("rollout-speed/0.5b", python("benchmarks/rollout.py", *fixed), alone=True, seconds=120)]
    if machine.model is not None:
        own = (
            "--model",
            str(machine.model),
            "--questions",
            str(machine.test),
            "--prompts",
            "128",
            "--new-tokens",
            "1024",
        )
        jobs.append(Job("rollout-speed/model", python("benchmarks/rollout.py", *own), alone=True, seconds=150))
    return jobs


def rollout_judge(results: Results) -> list[Figure]:
    figures = []
    for name, result in results.items():
        size = name.split("/")[1]
        rate = re.search(r"^native: .* = ([\d,]+) tokens/s", result.output, re.MULTILINE)
        step = re.search(r"decoding step, .*: ([\d.]+) ms", result.output)
        require(rate is not None and step is not None, f"{name}: no rate was printed")
        figures.append(Figure(f"rollout {size}", float(rate[1].replace(",", "")), "tokens/s", "copy rate"))
        figures.append(Figure(f"decoding step {size}", float(step[1]), "ms", "copy rate"))
    return figures


def eight_bit_jobs(machine: Machine) -> list[Job]:
    small = ("--prompts", "2", "--completions", "2", "--new-tokens", "8", "--repeats", "1")
    shape = ("--size", "tiny", *small) if machine.on_cpu else ("--size", "7b", "--repeats", "3")
    return [Job("8-bit", python("benchmarks/rollout.py", *shape, "--fp8"), alone=True, seconds=240)]


def eight_bit_judge(results: Results) -> list[Figure]:
    rates = re.findall(r"^(native.*): .* = ([\d,]+) tokens/s", results["8-bit"].output, re.MULTILINE)
    require(len(rates) == 2, f"8-bit: {len(rates)} rates of 2")
    found = {name: float(rate.replace(",", "")) for name, rate in rates}
    is_faster = found["native, 8 bits"] > 1.2 * found["native"]
    require(is_faster or results["8-bit"].output.startswith("CPU"), "8-bit: not 1.2 times as fast as 16 bits")
    return [Figure(f"rollout 7b, {name}", rate, "tokens/s", "copy rate") for name, rate in found.items()]


def step_jobs(machine: Machine) -> list[Job]:
    return [benchmark(machine, "step-speed", "--steps", "3")]


def step_judge(results: Results) -> list[Figure]:
    ours = record_of(results["step-speed"])
    step = Figure("step 0.5b", ours["step"], "s", "matrix rate")
    parts = [
        Figure(f"step 0.5b, {phase}", ours["medians"][f"time/{phase}"], "s")
        for phase in ("rollout", "logprobs", "update")
    ]
    memory = [Figure("step 0.5b, memory", ours["peak_gib"], "GiB")] if ours["peak_gib"] else []
    return [step, *parts, *memory]


UPDATES = {
    "update 0.5b": ("run.deterministic=false", {}),
    "update 0.5b, cuBLAS workspace": ("run.deterministic=false", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "update 0.5b, deterministic": ("run.deterministic=true", {}),
}
"""Which half of `run.deterministic` costs what: the fixed workspace of matrix products, or the order of attention's sums."""


def update_jobs(machine: Machine) -> list[Job]:
    return [
        benchmark(machine, f"update-cublas/{name}", setting, "--update-only", "--steps", "3", environment=environment)
        for name, (setting, environment) in UPDATES.items()
    ]


def update_judge(results: Results) -> list[Figure]:
    figures = []
    for name in UPDATES:
        record = record_of(results[f"update-cublas/{name}"])
        figures.append(Figure(name, record["medians"]["throughput/update"], "tokens/s", "matrix rate"))
        share = 100 * record["tflops_update"] / record["tflops_matrix"]
        figures.append(Figure(f"{name}, share of the matrix rate", share, "%"))
    return figures


def scaling_jobs(machine: Machine) -> list[Job]:
    n, few = machine.num_gpus, "needs two GPUs" if machine.num_gpus < 2 else ""
    one = benchmark(machine, "scaling/1", "--steps", "2", size="1.5b")
    return [one] + [
        benchmark(machine, f"scaling/ZeRO-{stage}", f"distributed.zero_stage={stage}", "--steps", "2", size="1.5b",
                  processes=max(2, n), skip=few)
        for stage in (2, 3)
    ]  # fmt: skip


def scaling_judge(results: Results) -> list[Figure]:
    records = {name: record_of(result) for name, result in results.items()}
    one = records.pop("scaling/1")["step"]
    figures = [Figure("step 1.5b", one, "s", "matrix rate")]
    for name, record in records.items():
        title = f"step 1.5b, {name.split('/')[1]} on {record['processes']}"
        figures += [Figure(title, record["step"], "s"), Figure(f"{title}, of linear", 100 * one / record["step"], "%")]
    return figures


def large_jobs(machine: Machine) -> list[Job]:
    """7.6 billion weights take 18 bytes each with gradients, optimizer and reference; the sampler has a whole copy, too."""
    n, few = machine.num_gpus, "needs two GPUs" if machine.num_gpus < 2 else ""
    tight = 18 * 7.6e9 / max(1, n) / 2**30 + 35 > machine.gib
    offload = ("distributed.offload_optimizer=true",) if tight and not machine.on_cpu else ()
    shape = ("--prompts", "8", "--new-tokens", "256", "--steps", "1")
    settings = ("distributed.zero_stage=3", "memory.micro_batch_tokens=16384", *offload)
    return [benchmark(machine, "7b", *settings, *shape, size="7b", processes=max(2, n), skip=few, seconds=240)]


def large_judge(results: Results) -> list[Figure]:
    record = record_of(results["7b"])
    medians = record["medians"]
    figures = [Figure(f"step 7b, ZeRO-3 on {record['processes']}", record["step"], "s", "matrix rate")]
    on = f"ZeRO-3 on {record['processes']}"
    figures.append(Figure(f"step 7b, {on}, sampling gap", medians["policy/sampling_gap"], "nats"))
    return figures + ([Figure(f"step 7b, {on}, memory", record["peak_gib"], "GiB")] if record["peak_gib"] else [])


def four_bit_jobs(machine: Machine) -> list[Job]:
    shape = ("--prompts", "8", "--new-tokens", "256", "--steps", "2")
    settings = ("lora.rank=32", "lora.quantization=nf4", "memory.micro_batch_tokens=8192", "memory.kv_cache_gib=3")
    if machine.on_cpu:
        settings = settings[:2]
    missing = "" if find_spec("bitsandbytes") else "bitsandbytes is not installed"
    return [benchmark(machine, "4-bit", *settings, *shape, size="7b", skip=missing)]


def four_bit_judge(results: Results) -> list[Figure]:
    record = record_of(results["4-bit"])
    figures = [Figure("step 7b, 4 bits", record["step"], "s", "matrix rate")]
    return figures + ([Figure("step 7b, 4 bits, memory", record["peak_gib"], "GiB")] if record["peak_gib"] else [])


def long_jobs(machine: Machine) -> list[Job]:
    """Two GPUs share each sequence."""
    few = "needs two GPUs" if machine.num_gpus < 2 else ""
    lengths, passes = ("200", "256") if machine.on_cpu else ("32000", "33000")
    shape = ("--prompts", "1", "--completions", "2", "--update-only", "--steps", "1")
    settings = ("distributed.zero_stage=3", "distributed.sequence_parallel=2", f"memory.micro_batch_tokens={passes}")
    job = benchmark(machine, "long", *settings, *shape, size="7b", processes=2, skip=few, seconds=240)
    return [replace(job, command=(*job.command, "--new-tokens", lengths))]


def long_judge(results: Results) -> list[Figure]:
    record = record_of(results["long"])
    name = "update 7b, 32,000 tokens on 2"
    figures = [Figure(name, record["medians"]["throughput/update"], "tokens/s", "matrix rate")]
    return figures + ([Figure(f"{name}, memory", record["peak_gib"], "GiB")] if record["peak_gib"] else [])


def grading_jobs(machine: Machine) -> list[Job]:
    scale = "0.1" if machine.on_cpu else "0.5"
    return [Job("grading", python("benchmarks/grading.py", "--scale", scale), alone=True, seconds=120)]


def grading_judge(results: Results) -> list[Figure]:
    found = re.findall(r"^  (\S.*?)  +([\d,.]+)", results["grading"].output, re.MULTILINE)
    require(len(found) == 3, f"grading: {len(found)} rates of 3")
    return [Figure(f"graded: {name}", float(rate.replace(",", "")), "completions/s") for name, rate in found]


CHECKS = [
    Check("pytest", "the tests that need a GPU", pytest_jobs, pytest_judge),
    Check("engines", "each rollout engine trains two steps", engine_jobs, all_sound),
    Check("zero", "steps under ZeRO 0, 2 and 3, with LoRA and offloading, agree", zero_jobs, zero_judge),
    Check("learns", "the quickstart learns; variants of the algorithm stay finite", learns_jobs, learns_judge),
    Check("turns", "tiny models learn to call a tool and to win a game", turns_jobs, turns_judge),
    Check("invariance", "one update, however it is split", invariance_jobs, invariance_judge),
    Check("gradients", "gradients against a slow reference", gradients_jobs),
    Check("resume", "kill -9 and resume, bit for bit", resume_jobs, resume_judge),
    Check("everything", "most features at once, under ZeRO 2 and 3", everything_jobs, everything_judge),
    Check("faults", "planted faults stop the run and are named", faults_jobs, faults_judge),
    Check("evaluate", "scripts/evaluate.py over all GPUs", evaluate_jobs, evaluate_judge),
    Check("sample", "scripts/sample.py", sample_jobs, sample_judge),
    Check("chat", "scripts/chat.py", chat_jobs, chat_judge),
    Check("display", "the live display in a terminal", display_jobs, display_judge),
    Check("weights", "random weights for the benchmarks", weights_jobs),
    Check("card", "what the GPU itself reaches", card_jobs, card_judge),
    Check("rollout-speed", "sampling, 256 completions of 512 tokens", rollout_jobs, rollout_judge),
    Check("8-bit", "sampling with 7B in 16 and in 8 bits", eight_bit_jobs, eight_bit_judge),
    Check("step-speed", "a whole step", step_jobs, step_judge),
    Check("update-cublas", "what run.deterministic costs, and which half of it", update_jobs, update_judge),
    Check("scaling", "a step on one GPU and on all", scaling_jobs, scaling_judge),
    Check("7b", "a step of 7B under ZeRO-3", large_jobs, large_judge),
    Check("4-bit", "a step of 7B with weights in 4 bits", four_bit_jobs, four_bit_judge),
    Check("long", "an update of 7B on 32,000 tokens over two GPUs", long_jobs, long_judge),
    Check("grading", "completions graded per second", grading_jobs, grading_judge),
]
USES_WEIGHTS = {"rollout-speed", "8-bit", "step-speed", "update-cublas", "scaling", "7b", "4-bit", "long"}
"""Checks before which `weights` must have run."""
