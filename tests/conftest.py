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

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported; the kernels then run on the CPU

torch.set_num_threads(1)

from grpo import report  # noqa: E402

plot_curves = report.plot_curves
report.plot_curves = lambda run_dir: (
    run_dir / "curves.png"
)  # which takes a second at the end of each of hundreds of runs


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends draws its curves, as it does outside of tests."""
    monkeypatch.setattr(report, "plot_curves", plot_curves)
