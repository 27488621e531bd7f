"""Starts the processes of a run on this machine, one for each GPU, and ends as they do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from grpo.system.heartbeat import PEER_LOST
from grpo.system.stopping import SIGNALS

LAUNCHED = "GRPO_LAUNCHED"
"""Set in the processes that are started here; see stopping.LAUNCHERS."""


def num_processes(wanted: int | None) -> int:
    """One for each GPU, or one; or as many as are wanted.

    Raises:
        ValueError: there are GPUs, and fewer than that.
    """
    import torch

    gpus = torch.cuda.device_count()
    if wanted is not None and 0 < gpus < wanted:
        raise ValueError(
            f"--processes is {wanted}; this machine has {gpus} GPU{'s' * (gpus > 1)}, and each process needs one. Set it to "
            f"{gpus} or less."
        )
    return wanted or max(gpus, 1)


def run(module: str, arguments: Sequence[str], *, num_processes: int) -> int:
    """Run a module in that many processes, which find each other; the exit code of the run.

    Every signal that asks for a stop is handed on. The processes end each other where one of them fails (system/heartbeat.py), so
    here nobody is killed, and nothing is printed beside what they print.
    """
    environment = {
        **os.environ,
        LAUNCHED: "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = [sys.executable, "-m", module, *arguments]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]

    def hand_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        return exit_code([process.wait() for process in processes])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(codes: Sequence[int]) -> int:
    """Of a run, from those of its processes: that of the one that failed, if the others ended because of it."""
    own = [code for code in codes if code not in (0, PEER_LOST)]
    code = own[0] if own else max(codes)
    return 128 - code if code < 0 else code  # as a shell counts a signal


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
