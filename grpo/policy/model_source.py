"""Which files `model.name` means, and how they are read: a model, a hub id, a run, a checkpoint, or an adapter of peft.

Every configuration, tokenizer and model is loaded through `from_source`, so `model.revision` and `model.trust_remote_code` hold
everywhere. What cannot be trained is refused here, before any weight is read.
"""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import Config, ModelConfig
from grpo.system import hub_access

if TYPE_CHECKING:  # imported where it is used: what a name means is told before transformers is imported
    from transformers import PretrainedConfig

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """The files of a model: a directory or hub id with whole weights, and the adapter that lies over it."""

    base: str
    revision: str
    adapter: Path | None = None


def model_directory(name: str, *, setting: str = "--model") -> str:
    """The model that a user means: a run's directory is its newest checkpoint, a checkpoint its `hf`; else the name itself,
    which is a directory with a model or an adapter, or an id of the hub.

    Raises:
        ValueError: there is no such directory, or no model in it.
    """
    path = Path(name)
    if not path.exists():
        folder = path.parts[0] if "/" in name else ""
        if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            raise ValueError(
                f"{setting} is {name!r}; there is no such directory. Correct the path, or name a model of the hub."
            )
        if folder and Path(folder).is_dir():  # the hub would be asked for it for a minute where there is no network
            raise ValueError(
                f"{setting} is {name!r}; there is no such directory in {folder}/. Correct the path; for a model of the hub of "
                f"this name, start where there is no directory {folder}."
            )
        return name
    newest_first = reversed(complete_checkpoints(path / "checkpoints"))
    for directory in (path, path / "hf", *(checkpoint / "hf" for checkpoint in newest_first)):
        if (directory / "config.json").is_file() or (directory / ADAPTER).is_file():
            return str(directory)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise ValueError(_quantised(setting, name, "GGUF"))
    raise ValueError(
        f"{setting} is {name!r}; it is neither a model in Hugging Face format (there is no config.json) nor a checkpoint (no "
        "hf/config.json) nor a run with a checkpoint (no checkpoints/step-*/hf). Name one of these, or a model of the hub."
    )


CHECKPOINT_NAME = re.compile(r"step-[0-9]{8,}(-[0-9]{4,})?")
"""What `name_of` gives, and a person who makes a copy does not."""


def complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in directory.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir())


def name_of(step: int, updates: int | None = None) -> str:
    """The directory of a checkpoint after so many steps, or with the next one under way and so many updates of it done.

    Names sort by time.
    """
    return f"step-{step:08d}" + ("" if updates is None else f"-{updates:04d}")


def numbers_of(checkpoint: Path) -> tuple[int, int | None]:
    """The step and the updates that `name_of` was given."""
    _, step, *updates = checkpoint.name.split("-")
    return int(step), int(updates[0]) if updates else None


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.bin")


def check_files(directory: Path, said: str) -> None:
    """Raises ValueError if a model's files are not whole, as after a download that was interrupted: config.json is not JSON, or
    weights are missing or cut off. Of the weights only the first bytes are read.

    Args:
        said: the setting and its value, for the error.
    """
    if (directory / ADAPTER).is_file() and not (directory / "config.json").is_file():
        return
    again = f"Copy or download the model again into {str(directory)!r}."
    try:
        json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{said}; its config.json is not JSON ({error}). {again}") from error
    index = directory / INDEX
    named = {path.name for path in directory.glob(WEIGHTS[0])}
    if WHOLE in named:  # which is what is loaded, whatever lies beside it
        named = {WHOLE}
    elif index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{said}; its {INDEX} does not list its weights ({error}). {again}") from error
    if not named and not any(directory.glob(WEIGHTS[1])):
        raise ValueError(f"{said}; there are no weights in it ({' or '.join(WEIGHTS)}). {again}")
    for name in sorted(named):
        if (problem := _problem_of(directory / name)) is not None:
            raise ValueError(f"{said}; its file {name} {problem}. {again}")


def check_weights(config: ModelConfig) -> None:
    """Raises ValueError if the model lies on this machine and its files are not whole."""
    directory = Path(source_of(config).base)
    if directory.is_dir():
        check_files(directory, f"model.name is {config.name!r}")


def _problem_of(path: Path) -> str | None:
    """Why a file of weights is not whole; None: it is as long as its header says."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        begun = file.read(8)
        if begun == b"version ":
            return "is a pointer of Git LFS and holds no weights (`git lfs pull` fetches them)"
        length = int.from_bytes(begun, "little")
        if size < 8 + length:
            return f"is cut off: {size:,} bytes, less than its header"
        try:
            tensors = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            return "has a header that cannot be read"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"is not whole: {size:,} bytes instead of {whole:,}"


def with_resolved_name(config: Config) -> Config:
    """The configuration with a run's directory as `model.name` replaced by its newest checkpoint, which stays the same when the
    run goes on.

    Raises:
        ValueError: see `model_directory`; or an adapter that the settings of `lora` do not continue.
    """
    name = model_directory(config.model.name, setting="model.name")
    if name != config.model.name:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    if config.teacher.name is not None:
        teacher = {"name": model_directory(config.teacher.name, setting="teacher.name")}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=teacher)})
    adapter = source_of(config.model).adapter
    if adapter is not None:
        _check_adapter(adapter, config)
    return config


def source_of(config: ModelConfig) -> Source:
    """Raises ValueError if there is no such directory, or an adapter does not say what it belongs to."""
    name = model_directory(config.name, setting="model.name")
    if not (Path(name) / ADAPTER).is_file() or (Path(name) / "config.json").is_file():
        return Source(name, config.revision)
    adapter = read_adapter(Path(name))
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"model.name is {config.name!r}, an adapter whose {ADAPTER} does not say which model it belongs to. Set "
            f"base_model_name_or_path there."
        )
    below = source_of(config.model_copy(update={"name": base, "revision": adapter.get("revision") or "main"}))
    if below.adapter is not None:
        raise ValueError(
            f"model.name is {config.name!r}, an adapter over another adapter ({base}). Merge the lower one into its model."
        )
    return Source(below.base, below.revision, Path(name))


QUANTIZATION = "quantization.json"
"""In an adapter's folder: what the weights are beneath it, where they are not those of its model."""


def base_quantization(directory: Path) -> str | None:
    """Of an adapter that was trained over weights in 4 bits."""
    path = directory / QUANTIZATION
    return json.loads(path.read_text())["base"] if path.is_file() else None


def read_adapter(directory: Path) -> dict[str, Any]:
    return json.loads((directory / ADAPTER).read_text())


def _check_adapter(directory: Path, config: Config) -> None:
    """Raises ValueError if training would not go on with this adapter, or not as it is."""
    stored = read_adapter(directory)
    unlike = [name for name in UNLIKE_OURS if stored.get(name)]
    if stored.get("peft_type") != "LORA" or unlike:
        raise ValueError(
            f"model.name is {config.model.name!r}, an adapter with {', '.join(unlike) or stored.get('peft_type')}; only plain "
            "LoRA can be trained further. Merge it into its model (`PeftModel.merge_and_unload`) and name that."
        )
    below = base_quantization(directory)
    if below is not None and config.lora.quantization != below:
        raise ValueError(
            f"model.name is {config.model.name!r}, an adapter that was trained over weights in 4 bits. Set "
            f"lora.quantization={below}, or name the folder hf beside it, which is the merged model."
        )
    wanted = {"lora.rank": (config.lora.rank, stored["r"]), "lora.alpha": (config.lora.alpha, stored["lora_alpha"])}
    for setting, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise ValueError(
                f"{setting} is {ours}; model.name {config.model.name!r} is an adapter of rank {stored['r']} and alpha "
                f"{stored['lora_alpha']}, which is trained further as it is. Set lora.rank={stored['r']} "
                f"lora.alpha={stored['lora_alpha']}, or merge the adapter into its model and name that."
            )


UNLIKE_OURS = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
"""Settings of peft that change what an adapter computes, and that grpo/policy/lora.py does not know."""


def from_source(loader: Any, config: ModelConfig, /, **options: Any) -> Any:
    """`loader.from_pretrained` of the model's files."""
    source = source_of(config)
    with of_source(source):
        return loader.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=config.trust_remote_code, **options
        )


def of_source(source: Source) -> AbstractContextManager[None]:
    """Within it the files are read: from the directory, from the hub, or from its cache where the hub is out of reach."""
    return nullcontext() if Path(source.base).is_dir() else hub_access.hub_or_cache()


def model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        ValueError: neither a directory nor the hub has it, or it needs code of its own.
    """
    from transformers import AutoConfig

    try:
        return from_source(AutoConfig, config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(not_loaded(config, error)) from error


def not_loaded(config: ModelConfig, error: Exception) -> str:
    """Why a model's files could not be read, in words for a user."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if str(error).startswith("model.name is"):
        return str(error)
    if "gguf" in config.name.lower():
        return _quantised("model.name", config.name, "GGUF")
    if "trust_remote_code" in str(error):
        return (
            f"model.name is {config.name!r}; it comes with code of its own, which is not run unless you say so. Read that code, "
            "and set model.trust_remote_code=true; for grpo sample, chat and evaluate it is --trust-remote-code."
        )
    source = source_of(config)
    if not Path(source.base).is_dir() and (reason := hub_access.unreachable()) is not None:
        adapter = f", an adapter of {source.base}" if source.adapter else ""
        return hub_access.no_model(f"model.name is {config.name!r}{adapter}", source.base, "model.name", reason)
    return (
        f"model.name is {config.name!r}; it is neither a directory with a model in Hugging Face format nor a model "
        f"that the hub gave: {text} Set model.name to a local directory, or check the id; for a private or gated model, log in "
        "(`hf auth login`)."
    )


def quantisation(model: PretrainedConfig) -> str | None:
    """How a model's weights are quantised; None: they are not."""
    stored = getattr(model, "quantization_config", None) or getattr(
        model.get_text_config(), "quantization_config", None
    )
    if not stored:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    four = "4-bit " if values.get("load_in_4bit") or values.get("_load_in_4bit") else ""
    return four + str(values.get("quant_method") or "of an unknown kind").split(".")[-1].lower()


def check_not_quantised(config: ModelConfig, model: PretrainedConfig) -> None:
    """Raises ValueError if the weights are quantised."""
    method = quantisation(model)
    if method is not None:
        raise ValueError(_quantised("model.name", config.name, method))


def _quantised(setting: str, name: str, method: str) -> str:
    return (
        f"{setting} is {name!r}; its weights are quantised ({method}), and an update needs them in bfloat16 or float32. Name the "
        "checkpoint that it was made from, or a dequantised copy."
    )


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What programs that load a model of several kinds of input want beside its tokenizer."""


def processor_files(config: ModelConfig) -> dict[str, bytes]:
    """The model's processor files by their names. Read at the start, so that an export needs no network.

    A model of text alone has none, and the hub is not asked for any.
    """
    from transformers.utils import cached_file

    model = model_config(config)
    if model.get_text_config() is model:
        return {}
    source = source_of(config)
    with of_source(source):
        found = {
            name: cached_file(
                source.base,
                name,
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
            for name in PROCESSOR_FILES
        }
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}
