"""What this machine itself reaches, in a few seconds: the rates to put beside what the other benchmarks measure.

    python benchmarks/card.py --out card.jsonl
    torchrun --nproc_per_node 2 benchmarks/card.py

    matrix_tflops      TFLOP/s of a product of two bfloat16 matrices of 8,192 x 8,192 random numbers
    copy_gbs           GB/s of a copy from the device's memory to itself, bytes read and bytes written
    launches_per_s     kernels a second that the host launches, each adding to a single number
    all_reduce_gbs     bus bandwidth over n processes: 2 (n - 1) / n times the bytes of a buffer of 1 GiB by the seconds it takes
    all_gather_gbs     the same with (n - 1) / n, the buffer being what all shards make up

Several processes measure at the same time, and the slowest one's rate counts. Without a GPU the sizes are small, to see that it
runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from workload import device_name, device_type, on_gpu, synchronize

from grpo.system import distributed
from grpo.system.distributed import Processes

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, as a line of JSON")
    args = parser.parse_args()
    processes = distributed.join()
    record = measure(processes)
    distributed.stop()
    if processes.is_main:
        print(describe(record), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def measure(processes: Processes) -> dict[str, Any]:
    """All rates, each of the slowest process; those between processes are None where there is one."""
    alone = {
        "matrix_tflops": matrix_rate() / 1e12,
        "copy_gbs": copy_rate() / 1e9,
        "launches_per_s": launch_rate(),
    }
    every = processes.gather(alone)
    world = processes.world_size
    return {
        "device": device_name(),
        "processes": world,
        "torch": torch.__version__,
        **{name: min(each[name] for each in every) for name in alone},
        "all_reduce_gbs": all_reduce_rate(world) / 1e9 if world > 1 else None,
        "all_gather_gbs": all_gather_rate(world) / 1e9 if world > 1 else None,
    }


def describe(record: dict[str, Any]) -> str:
    parts = [
        f"{record['matrix_tflops']:,.4g} TFLOP/s (bfloat16 product)",
        f"{record['copy_gbs']:,.4g} GB/s copied",
        f"{record['launches_per_s']:,.0f} launches/s",
    ]
    if record["processes"] > 1:
        parts.append(
            f"all-reduce {record['all_reduce_gbs']:,.4g} GB/s, all-gather {record['all_gather_gbs']:,.4g} GB/s"
        )
    return f"{record['processes']} x {record['device']}, torch {record['torch']}: {'; '.join(parts)}"


def seconds_each(act: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call among `repeats`, after as many that are not counted; the device waits for none of them."""
    for _ in range(repeats):
        act()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        act()
    synchronize()
    return (time.perf_counter() - start) / repeats


def matrix_rate() -> float:
    """Operations per second of a large matrix product in bfloat16, as this device reaches them."""
    size, repeats = (8192, 50) if on_gpu() else (512, 5)
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device_type())
    return 2 * size**3 / seconds_each(lambda: a @ b, repeats)


def copy_rate() -> float:
    """Bytes read and written per second."""
    num_bytes, repeats = (2048 * MEBIBYTE, 20) if on_gpu() else (16 * MEBIBYTE, 5)
    source, target = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device_type())
    return 2 * num_bytes / seconds_each(lambda: target.copy_(source), repeats)


def launch_rate() -> float:
    """Kernels per second, each too small to keep the device from waiting for the host."""
    number = torch.zeros(1, device=device_type())
    return 1 / seconds_each(lambda: number.add_(1), 20_000 if on_gpu() else 2_000)


def all_reduce_rate(world: int) -> float:
    """Bus bandwidth in bytes per second: a ring sends all but 1/n of the buffer twice, to add up and to hand out."""
    buffer = _buffer(world)
    num_bytes = buffer.numel() * buffer.element_size()
    seconds = seconds_each(lambda: dist.all_reduce(buffer), _num_collectives())
    return 2 * (world - 1) / world * num_bytes / seconds


def all_gather_rate(world: int) -> float:
    """Bus bandwidth in bytes per second, of shards that make up a buffer as large as the all-reduce's."""
    whole = _buffer(world)
    shard = torch.zeros_like(whole[: len(whole) // world])
    num_bytes = whole.numel() * whole.element_size()
    seconds = seconds_each(lambda: dist.all_gather_into_tensor(whole, shard), _num_collectives())
    return (world - 1) / world * num_bytes / seconds


def _buffer(world: int) -> torch.Tensor:
    """One GiB of bfloat16 zeros (a mebibyte without a GPU), in shards of the same length."""
    num_elements = (1024 if on_gpu() else 1) * MEBIBYTE // 2
    return torch.zeros(num_elements // world * world, dtype=torch.bfloat16, device=device_type())


def _num_collectives() -> int:
    return 20 if on_gpu() else 2


if __name__ == "__main__":
    main()
