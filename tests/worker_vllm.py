"""Started by test_vllm as two processes: steps whose samples must come from the new weights, then a server that dies."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from fake_vllm import VLLMServer, installed
from helpers import shallow, shard_even_small_weights, tiny_config

from grpo import Trainer
from grpo.rollout.vllm_server import ServerError
from grpo.system import distributed

mode, out = sys.argv[1], Path(sys.argv[2])


def share(url: str) -> str:
    """The address of the first process's server, through a file: the process group does not exist yet."""
    path = out / "url"
    if url:
        path.with_suffix(".new").write_text(url)
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.05)
    return path.read_text()


def length(completion: str) -> float:
    return float(len(completion))


MODEL = shallow(1)
shard_even_small_weights()
settings = {"mode": mode}
server = None
if mode == "server":
    server = VLLMServer(MODEL) if os.environ["RANK"] == "0" else None
    url = share(server.url if server else "")
    settings |= {"url": url, "sync_dir": str(out / "sync"), "timeout_seconds": 20}
config = tiny_config(
    out / "run",
    model={"name": MODEL},
    rollout={"engine": "vllm", "num_prompts": 4, "group_size": 3, "max_completion_tokens": 8},
    vllm=settings,
    optimizer={"learning_rate": 1e-2},
    algorithm={"kl_coef": 0.0, "max_sampling_gap": 1e-3},
    distributed={"zero_stage": 3},
    checkpoint={"every_steps": 0},
    logging={"completions_every": 0},
)
with installed():
    trainer = Trainer(config, rewards=[length])
    assert trainer.policy.holds_whole == (mode == "colocated")
    for _ in range(3):
        trainer.train_step()
    if server:
        server.end()
    if mode == "server":
        try:
            trainer.collector.generator.sync()
        except ServerError as error:
            print(f"rank {trainer.processes.rank} was told: {error}", flush=True)
    print(f"rank {trainer.processes.rank} is done", flush=True)
trainer.close()
torch.distributed.barrier()
distributed.stop()
