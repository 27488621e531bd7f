"""The process group, and the few collectives the rest needs.

accelerate launches the processes and DeepSpeed shards the training state; this module is the only place that sets either
up. Three defaults of theirs are silent traps on machines without a GPU, and `start` guards against each:

- accelerate finds no backend for DeepSpeed on a CPU, so every rank would believe it is alone (`num_processes == 1`) while
  DeepSpeed averages gradients over all of them. We name gloo, and check the world size.
- `cpu=True` or `ACCELERATE_USE_CPU=1` makes accelerate drop DeepSpeed without a word. We never set the one and clear the
  other, and check the distributed type.
- DeepSpeed compiles a shared-memory collective (a minute of g++) at the first start on a CPU. We leave it out.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from grpo.config import Config
from grpo.system import heartbeat, hub_access, mapped_memory
from grpo.system.files import GIB
from grpo.system.terminal import say

COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""Processes wait for the longest rollout among them, and for rank 0's files: hours, where the default of NCCL ends the run after
ten minutes. `heartbeat` ends who waits for a process that has died, or for one that waits too."""


MOST_THREADS = 4
"""Of torch on the host of a GPU, which only lays batches out there. Its own default is one for each core, and threads that wait
spin: five runs side by side on 32 cores kept all of them busy, and took 1 to 2.4 s for what takes 0.3 s with four each."""


SMALL_PARAMETERS = 5_000_000
"""A smaller model trains on one thread of a CPU. Two made the quickstart's steps a tenth shorter on two idle processors, and ten
times as long beside other work, for which each waits spinning. No clock decides it: the number of threads decides how sums are
rounded, and a run that is resumed shall be the same."""


BUCKET_ELEMENTS = 100_000_000
"""Elements that DeepSpeed moves between GPUs at once, through buffers of this size; its own default takes 0.9 GiB for each."""


@dataclass(frozen=True)
class SequenceGroup:
    """Processes that run each pass together, and which of them this one is."""

    group: Any  # of torch.distributed
    rank: int
    size: int


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print it, on the main process."""
        if self.is_main:
            say(text)

    def sum(self, *values: float) -> list[float]:
        """Sum of each value over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def add_up(self, values: Tensor) -> Tensor:
        """Sum of each element over the ranks, in place; on a GPU nobody waits for the numbers."""
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What every rank passed, in rank order, on every rank. For small Python objects."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def exchange(self, values: list[Any]) -> list[Any]:
        """What every rank passed for this one, in rank order; `values` are for each rank. Only what moves is sent."""
        texts = [pickle.dumps(value) for value in values]
        sizes = torch.tensor([len(text) for text in texts], device=self.device)
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes)
        sent = torch.frombuffer(bytearray().join(texts), dtype=torch.uint8).to(self.device)
        received = sent.new_empty(int(theirs.sum()))
        dist.all_to_all_single(received, sent, theirs.tolist(), sizes.tolist())
        return [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(theirs.tolist())]

    def check_same(self, what: str, value: Any) -> None:
        """Make sure that all processes are about to do the same.

        Raises:
            RuntimeError: on all of them, if their values differ; they would wait for each other for ever.
        """
        values = self.gather(value)
        if any(each != values[0] for each in values):
            raise RuntimeError(
                f"{what} differ between the processes: {values}. They would wait for each other for ever."
            )

    def broadcast(self, value: Any) -> Any:
        """What rank 0 passed, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def on_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns on rank 0, on every rank."""
        return self.broadcast(compute() if self.is_main else None)

    def reset_peak_memory(self) -> None:
        """Let `peak_memory_gib` start from what is allocated now."""
        if self.device.type == "cuda":
            mapped_memory.reset_peak(self.device)

    def peak_memory_gib(self) -> float | None:
        """Most GPU memory that this process's tensors took at once since the reset; None without a GPU."""
        return mapped_memory.peak_bytes(self.device) / GIB if self.device.type == "cuda" else None

    def synchronize(self) -> None:
        """Wait until the GPU has done what was asked of it, so that a clock tells its time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@dataclass(frozen=True)
class TrainingProcesses(Processes):
    """With DeepSpeed. Passes are dealt to `num_parts` processes, or groups of processes of which each runs a pass together."""

    accelerator: Accelerator
    sequence_group: SequenceGroup | None = None

    @property
    def sequence_parallel(self) -> int:
        return 1 if self.sequence_group is None else self.sequence_group.size

    @property
    def num_parts(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def part(self) -> int:
        return self.rank // self.sequence_parallel

    @property
    def speaks(self) -> bool:
        """Whether this process is the one of its part by which what all of them have is counted."""
        return self.sequence_group is None or self.sequence_group.rank == 0

    def gather_parts(self, value: Any) -> list[Any]:
        """What one process of each part passed, where all processes of a part pass the same."""
        return self.gather(value)[:: self.sequence_parallel]

    def gather_within(self, value: Any) -> list[Any]:
        """What every process of this part passed."""
        members = range(self.part * self.sequence_parallel, (self.part + 1) * self.sequence_parallel)
        found = self.exchange([value if rank in members else None for rank in range(self.world_size)])
        return [found[rank] for rank in members]


def start(config: Config, *, dtype: torch.dtype) -> TrainingProcesses:
    """Join the process group that the launcher described (or a group of one) with DeepSpeed as `config` asks.

    Raises:
        ValueError: the launcher's own accelerate configuration asks for another ZeRO stage than the YAML.
    """
    _check_launcher(config, dtype=dtype)
    _prepare_environment()
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, before the first product
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        _leave_out_compiled_collective()
    AcceleratorState._reset_state()  # an earlier Trainer in this process may have had another ZeRO stage
    unset_hf_deepspeed_config()
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, dtype=dtype)),
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    launched = int(os.environ["WORLD_SIZE"])
    assert accelerator.num_processes == launched == dist.get_world_size(), (
        f"{launched} processes were launched, accelerate sees {accelerator.num_processes}, torch {dist.get_world_size()}"
    )
    assert accelerator.distributed_type == DistributedType.DEEPSPEED, f"no DeepSpeed: {accelerator.distributed_type}"
    dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    if config.distributed.offload_optimizer:
        share_threads()
    elif not on_cpu:
        limit_threads()
    heartbeat.start(rank=accelerator.process_index, world_size=launched)
    return TrainingProcesses(
        accelerator.process_index,
        launched,
        accelerator.device,
        accelerator,
        _sequence_group(accelerator.process_index, launched, config.distributed.sequence_parallel),
    )


def _sequence_group(rank: int, world_size: int, size: int) -> SequenceGroup | None:
    """Neighbours, which one host has where its number of GPUs is a multiple of `size`.

    Raises:
        ValueError: processes would be left over.
    """
    if world_size % size:
        raise ValueError(
            f"distributed.sequence_parallel is {size}; {world_size} process{'es were' if world_size > 1 else ' was'} launched, "
            f"which cannot be grouped by {size}. Launch a multiple of {size} (grpo train --processes), or "
            f"{f'set it to a divisor of {world_size}' if world_size > 1 else 'remove it'}."
        )
    if size == 1:
        return None
    starts = range(0, world_size, size)
    groups = [dist.new_group(list(range(first, first + size)), timeout=COLLECTIVE_TIMEOUT) for first in starts]
    return SequenceGroup(groups[rank // size], rank % size, size)


def join() -> Processes:
    """Join the process group that the launcher described (or a group of one), to sample and not to train: without DeepSpeed."""
    _prepare_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        limit_threads()
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=COLLECTIVE_TIMEOUT)
    heartbeat.start(rank=rank, world_size=world_size)
    return Processes(rank, world_size, device)


def limit_threads(most: int = MOST_THREADS) -> None:
    """At most so many for torch's work on the host, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), most))


def share_threads() -> None:
    """This process's share of the cores, for an optimizer on the host, which updates with the threads of torch.

    Launchers of several processes set OMP_NUM_THREADS to 1 where it is not set, so 1 is taken for theirs then. Another number is
    kept, and any that a process alone has.
    """
    processes, chosen = num_local_processes(), os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (chosen == "1" and processes > 1):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def num_local_processes() -> int:
    """Of the group, those on this machine; all of them where the launcher does not say."""
    of_launcher = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # the latter is DeepSpeed's
    return int(of_launcher or os.environ["WORLD_SIZE"])


def _prepare_environment() -> None:
    quiet()
    _complete_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def deepspeed_config(config: Config, *, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own settings. It clips and steps; loss scaling and the number of micro-batches are the trainer's."""
    zero: dict[str, Any] = {
        "stage": config.distributed.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
    }
    if config.distributed.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        # DeepSpeed's own linear layer keeps no gathered weight for the backward pass, at the price of a Python function each way
        # in every linear layer of the process; torch's keeps it where a layer is not computed again there, and beneath adapters
        zero["memory_efficient_linear"] = config.memory.activation_checkpointing < 1 or config.lora.rank > 0
    cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.distributed.offload_optimizer:
        zero["offload_optimizer"] = cpu
    if config.distributed.offload_parameters:
        zero["offload_param"] = cpu
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused, but DeepSpeed wants a number
        "gradient_accumulation_steps": 1,  # else DeepSpeed would divide a loss that is already a sum of weighted tokens
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # else accelerate puts DeepSpeed's own in place of torch's, compiled for minutes
        "steps_per_print": 2**40,
    }


def deepspeed_classes() -> list[type]:
    """The classes of DeepSpeed's own whose objects are in its training state; none of them does anything when it is loaded."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _check_launcher(config: Config, *, dtype: torch.dtype) -> None:
    """accelerate's options and its configuration file have settings of ours too; one that differs would be ignored.

    Raises:
        ValueError: one does.
    """
    _check_strategy()
    _check_precision(dtype)
    ours = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("distributed.zero_stage", config.distributed.zero_stage),
        "ACCELERATE_GRADIENT_CLIPPING": ("optimizer.max_grad_norm", config.optimizer.max_grad_norm),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("the number of micro-batches DeepSpeed should average over", 1),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
            "distributed.offload_optimizer",
            config.distributed.offload_optimizer,
        ),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
            "distributed.offload_parameters",
            config.distributed.offload_parameters,
        ),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("DeepSpeed's configuration file", "none"),
    }
    options = _launcher_options()
    for variable, (setting, value) in ours.items():
        name = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
        option = "deepspeed_config_file" if name == "config_file" else name  # which is accelerate's own
        theirs = os.environ.get(variable) or options.get(option, "none")
        if theirs not in ("none", "auto") and not _same(theirs, value):
            raise ValueError(
                f"{setting} is {value}; accelerate's own configuration file or option says {name} {theirs}, and the two must "
                "agree. Make them equal, or launch without it."
            )
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # what agrees needs no warning that only one of the two is read


STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Ways of accelerate to share out a model other than DeepSpeed's, by the variable that asks for each."""


def _check_strategy() -> None:
    for variable, name in STRATEGIES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"accelerate's own configuration file or options ask for {name}; weights, gradients and optimizer are shared out "
                "by DeepSpeed here. Set distributed.zero_stage (0 to 3) and launch without it."
            )


def _check_precision(dtype: torch.dtype) -> None:
    """`no` is also what accelerate says when nobody asked."""
    ours = "bf16" if dtype == torch.bfloat16 else "no"
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs not in ("no", ours):
        remedy = "Set model.dtype to bfloat16, or launch" if theirs == "bf16" else "Launch"
        raise ValueError(
            f"accelerate's mixed_precision is {theirs}; model.dtype, which decides it, is {str(dtype).removeprefix('torch.')} "
            f"here. {remedy} without --mixed_precision."
        )


def _launcher_options() -> dict[str, str]:
    """Options that the process which started this one was given, `--name value` or `--name=value`: accelerate hands some on to
    nobody unless it is told to use DeepSpeed."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return {}
    if not any("accelerate" in word for word in words[:4]):
        return {}
    pairs = [word.split("=", 1) if "=" in word else [word, after] for word, after in pairwise(words)]
    return {name.removeprefix("--").replace("-", "_"): value for name, value in pairs if name.startswith("--")}


def _same(text: str, value: float | str) -> bool:
    if isinstance(value, bool):
        return text == "cpu" and value  # of offloading: accelerate's file names a device
    try:
        return float(text) == float(value)
    except ValueError:
        return text == value


def _complete_environment() -> None:
    """A plain `python script.py` is a group of one."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(_ALONE, MASTER_PORT=str(_free_port()))


def leave_environment() -> None:
    """Let a process that takes the place of this one, if that is alone, find a port of its own."""
    if os.environ.get("WORLD_SIZE") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        for variable in (*_ALONE, "MASTER_PORT"):
            os.environ.pop(variable, None)


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quiet() -> None:
    """Keep progress bars of loading, and notices that only library authors can act on, out of the output."""
    hub_access.hide_bars_of_data_sets()
    transformers.utils.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None and sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # which the line above takes away too: a download may take minutes
    for module in ("torch.distributed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # DeepSpeed's, at a checkpoint on a GPU
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _leave_out_compiled_collective() -> None:
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole(*parameters: Tensor, written: bool = False) -> AbstractContextManager[None]:
    """Within it, parameters have all of their elements, of which a process holds a share under ZeRO-3. Every process enters it.

    Args:
        written: what rank 0 writes to the parameters reaches all; else they must not be written to.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None)


def num_elements(weight: Tensor) -> int:
    """Of the whole weight, of which a process holds a share under ZeRO-3."""
    return getattr(weight, "ds_numel", weight.numel())


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, torch sums in a fixed order where it otherwise would not: in flash attention's backward pass, on CUDA.

    Raises:
        RuntimeError: an operation has no such order.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(True)  # flash attention ignores a mere wish (warn_only)
    # it searches for bugs, which costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stop() -> None:
    """Leave the process group. A later `start` in the same process joins a new one."""
    heartbeat.stop()
    deepspeed = sys.modules.get("deepspeed")  # whose import takes seconds, and who only samples has no use for it
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with a dead group for its next engine
    elif dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state()
    PartialState._reset_state()
