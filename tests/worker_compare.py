"""Plays a training script: writes what a run leaves, with two right answers, or six without normalize_by_std.

Seed 5 stops, behind a launcher with an exit code of its own. Seed 6 waits for a signal, of which its launcher dies and which it
takes a second to follow itself. Seed 7 fails; seed 8 waits until two runs are under way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

arguments = sys.argv[1:]
settings = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
for override in arguments[arguments.index("--set") + 1 :]:
    name, _, value = override.partition("=")
    section, setting = name.split(".")
    settings[section][setting] = yaml.safe_load(value)
run, steps = settings["run"], settings["run"]["steps"]
if run["seed"] == 7:
    raise SystemExit("seed 7 cannot be")
directory = Path(run["dir"])
if run["seed"] == 5:
    print("stopped: run.max_hours (1) are over. Saved to here; this goes on from there. Exit code 75.")
    raise SystemExit(1)
if run["seed"] == 6:
    if "launched" not in os.environ:
        subprocess.run([sys.executable, *sys.argv], env=os.environ | {"launched": "1"})
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    directory.mkdir(parents=True)
    signal.sigwait([signal.SIGTERM])
    time.sleep(1)
    print("stopped: SIGTERM. Saved to here; this goes on from there. Exit code 75.")
    raise SystemExit(75)
if run["seed"] == 8:
    directory.mkdir(parents=True)
    began = time.monotonic()
    while len(list(directory.parents[1].glob("*/seed-8"))) < 2:
        assert time.monotonic() - began < 30, "the other one does not come"
        time.sleep(0.05)
print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"))
(directory / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
(directory / "config.yaml").write_text(yaml.safe_dump(settings))
num_right = 2 + run["seed"] if settings["algorithm"]["normalize_by_std"] else 6
answers = [
    {
        "step": step,
        "row": row,
        "sample": 0,
        "question": f"{row}?",
        "answer": "!",
        "completion": "",
        "finish_reason": "stop",
    }
    | {"num_tokens": 10 if right else 30, "reward": float(right), "rewards": {"accuracy": float(right)}}
    for step, count in ((0, 1), (steps, num_right))
    for row, right in enumerate(row < count for row in range(8))
]
(directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
metrics = [
    {"step": step, "reward/accuracy": step / 10, "time/step": 10.0, "policy/entropy": 0.5}
    for step in range(1, steps + 1)
]
metrics[-1]["eval/length_mean"] = 1.0
(directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
