"""A model to a folder that others can run: checks first, then the weights, then the rename that makes it appear."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.export.destination import appearing, check_destination, check_room
from grpo.export.families import Family, context_of, family_of
from grpo.export.gguf_file import plan, unknown_ends, write_gguf
from grpo.export.model import Whole, load_whole
from grpo.export.modelfile import modelfile
from grpo.export.quantizations import check_quantization
from grpo.export.think_tokens import MEANING, How, add_think_tokens, give_rows
from grpo.export.vocabulary import Vocabulary, vocabulary_of
from grpo.inference.options import short_name
from grpo.inference.resolve_model import Chosen
from grpo.observe.bar import Bar
from grpo.policy.model_source import CHECKPOINT_NAME, check_not_quantised, model_config, numbers_of, source_of
from grpo.policy.tokenizer import end_token_ids, load_tokenizer, vocabulary_size
from grpo.report.card import FIGURE, card, licence_of, read_run
from grpo.report.figures import plot_curves
from grpo.run import hub
from grpo.system import distributed, progress
from grpo.system.terminal import say

SMALL_FILES = 2**20
"""Bytes of a card, a figure and a Modelfile, at most."""

Kind = Literal["gguf", "folder", "hub"]


@dataclass(frozen=True)
class Asked:
    """What is exported, and to where."""

    chosen: Chosen
    run: Path | None  # that the model comes from
    out: Path  # with --to hub the name of the model there
    kind: Kind = "gguf"
    quantization: str = "q8_0"
    think_tokens: How | None = None

    @property
    def name(self) -> str:
        return short_name(self.chosen.model.name, self.run)

    @property
    def file(self) -> str:
        return f"{self.name}-{self.quantization.upper()}.gguf"


@dataclass(frozen=True)
class Prepared:
    """What is known before weights are read."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    data: DataConfig  # how the model is asked
    parts: dict[int, list[int]]  # of new tokens


def export(asked: Asked) -> Path:
    """Write a model into a new folder.

    Returns:
        What is to be loaded: the GGUF file, or the folder.

    Raises:
        ValueError: there is something at `out`, no room, or the model or its tokenizer has what llama.cpp does not do. Nothing is
            written then.
    """
    check_destination(asked.out)
    prepared = _prepare(asked)
    return _gguf(asked, prepared) if asked.kind == "gguf" else _folder(asked, prepared)


def push(asked: Asked, *, private: bool) -> list[str]:
    """Push a model to the hub, under the tag of its step, and the completions of its run as a data set.

    Returns:
        Their addresses.

    Raises:
        ValueError: nobody is logged in, the name is none of the hub, or it was not reached.
    """
    repo = str(asked.out)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--to is hub {repo}; the name of a model on the hub is user/name. Correct it.")
    if not hub.is_logged_in():
        raise ValueError(f"--to is hub {repo}; nobody is logged in to the hub. Log in with `hf auth login`.")
    prepared = _prepare(asked)
    with tempfile.TemporaryDirectory(prefix="grpo-hub-") as scratch:
        folder = Path(scratch) / "model"
        say(f"{repo} is written to {folder} (TMPDIR), and removed there once it is pushed")
        whole = _load(asked, prepared)
        num_bytes = sum(weight.nbytes for weight in whole.weights().values()) + FOLDER_FILES
        check_room(Path(tempfile.gettempdir()), num_bytes, setting="TMPDIR")
        write_folder(whole, folder, ends=prepared.ends, chosen=asked.chosen)
        _write_card(asked, prepared, folder)
        try:
            pushed = [hub.push_model(repo, folder, step=step_of(asked.chosen.model.name), private=private)]
            if asked.run is not None:
                pushed.append(hub.push_completions(repo, asked.run, private=private) or "")
        except hub.NotPushed as error:
            raise ValueError(f"--to is hub {repo}; it was not pushed: {error}. Try again.") from None
    return [address for address in pushed if address]


def _prepare(asked: Asked) -> Prepared:
    distributed.quiet()
    model = asked.chosen.model
    config = model_config(model)
    check_not_quantised(model, config)
    tokenizer = load_tokenizer(model)
    ends = end_token_ids(model, tokenizer)
    data = asked.chosen.data(tokenizer, None, None)
    parts = {} if asked.think_tokens is None else add_think_tokens(tokenizer)
    return Prepared(config, tokenizer, ends, data, parts)


def _load(asked: Asked, prepared: Prepared) -> Whole:
    whole = load_whole(asked.chosen.model, prepared.tokenizer)
    if asked.think_tokens is not None:
        give_rows(whole.lm, prepared.tokenizer, prepared.parts, asked.think_tokens)
        say(MEANING.format(how=asked.think_tokens))
    return whole


# --- GGUF -----------------------------------------------------------------------------------------------------------------


def _gguf(asked: Asked, prepared: Prepared) -> Path:
    check_quantization(asked.quantization, file=f"{asked.name}-BF16.gguf")
    check_installed()
    name = asked.chosen.model.name
    family = family_of(prepared.config, name=name)
    rows = prepared.config.vocab_size
    if prepared.parts:
        rows = max(rows, vocabulary_size(prepared.tokenizer))
    vocabulary = vocabulary_of(prepared.tokenizer, num_rows=rows, ends=prepared.ends, name=name)
    whole = _load(asked, prepared)
    tensors = plan(family, whole.config, whole.weights(), asked.quantization)
    size = sum(tensor.num_bytes for tensor in tensors)
    check_room(asked.out, size + vocabulary_bytes(vocabulary) + SMALL_FILES)
    for note in notes_on(family, whole.config, vocabulary):
        say(note)
    with appearing(asked.out) as folder:
        with Bar(f"{asked.name}, {asked.quantization}", total=size, most_tokens=0, unit="bytes") as bar:
            for tensor in write_gguf(
                folder / asked.file,
                family,
                whole.config,
                vocabulary,
                tensors,
                quantization=asked.quantization,
                about={"name": asked.name},
                sampling={"temp": asked.chosen.sampling.temperature, "top_p": asked.chosen.sampling.top_p},
            ):
                bar.add(tensor.num_bytes)
        (folder / "Modelfile").write_text(_modelfile(asked, prepared, vocabulary, whole.config), encoding="utf-8")
        _write_card(asked, prepared, folder)
    return asked.out / asked.file


def _modelfile(asked: Asked, prepared: Prepared, vocabulary: Vocabulary, config: PretrainedConfig) -> str:
    sampling, settings = asked.chosen.sampling, asked.chosen.settings
    own = prepared.data.max_prompt_tokens if asked.run is None else settings.max_sequence_tokens
    template = vocabulary.chat_template or ""
    return modelfile(
        asked.file,
        prepared.tokenizer,
        prepared.data,
        thinks=asked.run is not None or "<think>" in template or "<think>" in vocabulary.tokens,
        adds_bos=vocabulary.flags["add_bos_token"],
        stop=[*(vocabulary.tokens[number] for number in prepared.ends), *settings.rollout.stop],
        parameters={
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,  # Ollama's own defaults, 40 and 1.1, are not what a run samples with
            "repeat_penalty": 1,
            "num_ctx": min(context_of(config), max(USUAL_CONTEXT, own if asked.run is not None else 0)),
        },
    )


USUAL_CONTEXT = 8192
"""Positions for which Ollama makes room, where the model has so many."""


def check_installed() -> None:
    """Raises ValueError without the package that knows the format."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            "--to is gguf; the package gguf is not installed. Install it: pip install 'gguf>=0.19'."
        ) from None


def vocabulary_bytes(vocabulary: Vocabulary) -> int:
    """About what it takes in the file: texts with their lengths, types and scores."""
    texts = [*vocabulary.tokens, *vocabulary.merges, vocabulary.chat_template or ""]
    return sum(len(text.encode()) + 8 for text in texts) + 8 * len(vocabulary.tokens)


def notes_on(family: Family, config: PretrainedConfig, vocabulary: Vocabulary) -> list[str]:
    """What a user should know of the file, though it is right."""
    notes = []
    if context_of(config) < config.max_position_embeddings:
        notes.append(
            f"note: llama.cpp has no sliding window for {family.architecture}; the file allows {context_of(config)} positions, "
            "up to which both are the same"
        )
    left = [vocabulary.tokens[number] for number in unknown_ends(vocabulary)[2:]]
    if left:
        notes.append(f"note: llama.cpp has no more places for end tokens; name {' '.join(left)} as stop words")
    return notes


# --- a plain folder -------------------------------------------------------------------------------------------------------


def _folder(asked: Asked, prepared: Prepared) -> Path:
    whole = _load(asked, prepared)
    check_room(asked.out, sum(weight.nbytes for weight in whole.weights().values()) + FOLDER_FILES)
    with appearing(asked.out) as folder:
        write_folder(whole, folder, ends=prepared.ends, chosen=asked.chosen)
        _write_card(asked, prepared, folder)
    return asked.out


FOLDER_FILES = 2**25
"""Bytes of a tokenizer, at most."""


def write_folder(whole: Whole, folder: Path, *, ends: list[int], chosen: Chosen) -> None:
    """Weights, configuration and tokenizer in Hugging Face format, with the sampling that is proposed."""
    is_drawn = chosen.sampling.temperature > 0
    drawing = {"temperature": chosen.sampling.temperature, "top_p": chosen.sampling.top_p} if is_drawn else {}
    whole.lm.generation_config = GenerationConfig(
        do_sample=is_drawn,
        **drawing,
        eos_token_id=ends,
        pad_token_id=whole.tokenizer.pad_token_id,
        bos_token_id=whole.tokenizer.bos_token_id,
    )
    with progress.busy("writing the model"):
        whole.lm.save_pretrained(folder)
        whole.tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # they are written for their owner alone


# --- the card -------------------------------------------------------------------------------------------------------------


def _write_card(asked: Asked, prepared: Prepared, folder: Path) -> None:
    run = None if asked.run is None else read_run(asked.run)
    if run is not None and run.metrics:
        plot_curves(run.directory, folder / FIGURE)
    # a run's base may have been moved since; its name is still what it was
    base = source_of(asked.chosen.model).base if run is None else asked.chosen.settings.model.name
    prompt = _example(prepared)
    usage = USAGE[asked.kind](asked) + f"\n\nA prompt, as the model was trained with it:\n\n````\n{prompt}\n````"
    text = card(
        asked.name, run, base=base, step=step_of(asked.chosen.model.name), usage=usage, licence=licence_of(base)
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _example(prepared: Prepared) -> str:
    from grpo.data.prompts import TEMPLATES

    return TEMPLATES[prepared.data.template].fill("How many primes are below 20?", prepared.tokenizer, prepared.data)


def step_of(model: str) -> int | None:
    """Of a checkpoint at the end of a run's step; None for one within a step, and for other directories."""
    path = Path(model)
    if path.name != "hf" or not CHECKPOINT_NAME.fullmatch(path.parent.name):
        return None
    step, updates = numbers_of(path.parent)
    return step if updates is None else None


def _gguf_usage(asked: Asked) -> str:
    sampling = asked.chosen.sampling
    return (
        "```bash\n"
        f"ollama create {asked.name.lower()} -f Modelfile && ollama run {asked.name.lower()}\n"
        f"llama-cli -m {asked.file} --temp {sampling.temperature:g} --top-p {sampling.top_p:g} --jinja\n"
        "```\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'lm = AutoModelForCausalLM.from_pretrained(".", gguf_file="{asked.file}")\n'
        "```"
    )


def _hub_usage(asked: Asked) -> str:
    return hub.hub_usage(str(asked.out))


def _folder_usage(asked: Asked) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'lm = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        "```\n\n"
        "```bash\n"
        f"vllm serve . --served-model-name {asked.name.lower()}\n"
        f"grpo export . --to gguf --out {asked.name.lower()}-gguf # for llama.cpp and Ollama\n"
        "```"
    )


USAGE: dict[Kind, Callable[[Asked], str]] = {"gguf": _gguf_usage, "folder": _folder_usage, "hub": _hub_usage}
