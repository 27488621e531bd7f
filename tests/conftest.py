"""One thread per process: on a few shared cores more of them only wait for each other."""

import atexit
import os
import shutil
import tempfile

# of this run alone, also in processes that tests start
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="grpo-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported; the kernels then run on the CPU

torch.set_num_threads(1)
