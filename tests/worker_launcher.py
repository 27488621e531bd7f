"""Started by test_stopping, in one process or several: waits until something asks for a stop, and writes down what did.

python tests/worker_launcher.py OUT SECONDS: after so many seconds it gives up, and writes None.
"""

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from grpo.system import heartbeat
from grpo.system.distributed import Processes
from grpo.system.stopping import EXIT_STOPPED, StopRequest

out, seconds = Path(sys.argv[1]), float(sys.argv[2])
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
processes = None
if world_size > 1:
    import torch

    dist.init_process_group("gloo")
    processes = Processes(rank, world_size, torch.device("cpu"))
    heartbeat.start(rank=rank, world_size=world_size)

with StopRequest(None) as stopping:
    (out / f"{rank}.pid").write_text(f"{os.getpid()} {os.getppid()}")
    until = time.monotonic() + seconds
    reasons: list[str | None] = [None]
    while reasons == [None] * len(reasons) and time.monotonic() < until:
        time.sleep(0.2)
        reasons = [stopping.reason] if processes is None else processes.gather(stopping.reason)
    if processes is not None:  # as saving does
        time.sleep(6 * heartbeat.BEAT_SECONDS)
        processes.barrier()
(out / f"{rank}.new").write_text(repr(next(filter(None, reasons), None)))
(out / f"{rank}.new").rename(out / f"{rank}.stopped")
heartbeat.stop()
os._exit(EXIT_STOPPED)
