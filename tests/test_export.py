"""A model that is exported computes what it did, and the file says of its tokenizer what llama.cpp needs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
import yaml
from go_template import render
from helpers import ROOT, TINY, clean_environment, save_family, tiny_config, tiny_settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo.cli.export import parser, run
from grpo.config import DataConfig
from grpo.data.prompts import R1_ZERO, build_prompts, chat_text
from grpo.data.rows import load_rows
from grpo.export.export import step_of, write_folder
from grpo.export.families import family_of, permuted, rope_factors
from grpo.export.modelfile import go_template, plainly_quoted, quoted
from grpo.export.quantizations import QUANTIZATIONS
from grpo.export.sentencepiece import NO_SCORE, SAMPLES, Pieces
from grpo.export.vocabulary import pre_tokenizer_of
from grpo.report.card import card, read_run

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {
    "vocab_size": 416,  # the tiny tokenizer has 407 tokens, so 9 rows have none
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied, with biases": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6}, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    ),
}


READ_WHOLE = ("llama", "mistral", "qwen2")
"""Of the others transformers takes weights from a file, but not all of head_dim, query_pre_attn_scalar and what has a bias."""


def export(model: Path, out: Path, *options: str) -> Path:
    (made,) = run(parser().parse_args([str(model), "--out", str(out), *options]))
    return Path(made)


def read_back(file: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options).eval()


def logits_of(lm: Any, num_tokens: int = 24) -> Tensor:
    ids = torch.randint(5, 400, (2, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return lm(input_ids=ids).logits


def fields_of(file: Path) -> dict[str, Any]:
    return {key: each.contents() for key, each in gguf.GGUFReader(file).fields.items()}


def test_the_command_exports_a_model(tmp_path: Path):
    options = ["--quantization", "q4_0", "--out", str(tmp_path / "out")]
    done = warm.run(
        ["scripts/export.py", str(TINY / "model"), *options], cwd=ROOT, timeout=120, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written to {tmp_path / 'out' / 'model-Q4_0.gguf'}\n")
    assert not re.search("Loading weights|Writing model shards|real_accelerator", done.stdout + done.stderr)
    again = warm.run(
        ["scripts/export.py", str(TINY / "model"), *options], cwd=ROOT, timeout=120, env=clean_environment()
    )
    assert (again.returncode, again.stderr[:13]) == (2, "error: --out ")


# --- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_back_what_each_family_computes(family: str, tmp_path: Path):
    model = save_family(tmp_path / "model", FAMILIES[family])
    spread_norms(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    known = {} if family in READ_WHOLE else {"config": original.config}
    again = read_back(export(model, tmp_path / "out", "--quantization", "f32"), **known)
    assert type(again) is type(original) or family == "mistral", "in llama.cpp Mistral is a Llama"
    torch.testing.assert_close(logits_of(again), logits_of(original), rtol=1e-4, atol=1e-4)


def spread_norms(model: Path) -> None:
    """New models' norms are all alike, and a norm in the wrong place would not show."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    lm.save_pretrained(model)


def test_rows_of_a_head_become_pairs():
    # two heads of four rows; transformers turns rows 0 and 2, and 1 and 3, together
    rows = torch.arange(8.0).view(8, 1)
    assert permuted(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama_3_has_the_frequencies_of_transformers():
    config = LlamaConfig(**{**SIZES, "head_dim": 64, "rope_parameters": LLAMA_3})
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None
    torch.testing.assert_close(plain / factors, expected)
    assert {factors[0].item(), factors[-1].item()} == {1, 8}
    assert len(set(factors.tolist())) > 2, "also what lies between"


def test_what_stretches_positions_is_in_the_file(tmp_path: Path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    model = save_family(tmp_path / "model", Qwen2Config(**{**SIZES, "rope_parameters": {**yarn, "beta_fast": 16.0}}))
    fields = fields_of(export(model, tmp_path / "out"))
    assert fields["qwen2.rope.scaling.type"] == "yarn"
    assert fields["qwen2.rope.scaling.original_context_length"] == 64
    assert (fields["qwen2.rope.scaling.factor"], fields["qwen2.rope.scaling.yarn_beta_fast"]) == (4.0, 16.0)
    window = save_family(tmp_path / "mistral", MistralConfig(**SIZES, sliding_window=32))
    assert fields_of(export(window, tmp_path / "window"))["llama.context_length"] == 32, "llama.cpp would look further"
    gemma = fields_of(export(save_family(tmp_path / "gemma", FAMILIES["gemma3"]), tmp_path / "g"))
    assert gemma["gemma3.attention.sliding_window"] == 8
    assert (gemma["gemma3.rope.freq_base"], gemma["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)


def test_an_adapter_is_merged(tmp_path: Path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY / "model")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(TINY / "model")}))
    again = read_back(export(tmp_path / "adapter", tmp_path / "out", "--quantization", "f32"))
    torch.testing.assert_close(logits_of(again), logits_of(adapted.eval()), rtol=1e-4, atol=1e-4)


# --- types ----------------------------------------------------------------------------------------------------------------


def test_each_type_is_as_near_as_the_documents_say(tmp_path: Path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gguf_types

    data = DataConfig(name=str(TINY / "test.jsonl"), template="chat", max_prompt_tokens=96)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    prompts, _ = build_prompts(load_rows(data, reads_answer=True)[:12], tokenizer, data)
    ids = [prompt.token_ids for prompt in prompts]
    bounds = dict(
        re.findall(r"^\| (\w+) \| .* \| below ([\d.e-]+) \|$", (ROOT / "docs/export.md").read_text(), re.MULTILINE)
    )
    assert list(bounds) == list(QUANTIZATIONS)
    sizes = []
    for found in gguf_types.measure(
        str(TINY / "model"), ids, num_tokens=32, types=list(QUANTIZATIONS), scratch=tmp_path
    ):
        assert found.kl <= float(bounds[found.quantization]), found
        assert found.same_token >= 0.95, found
        sizes.append(found.num_bytes)
    assert sizes == sorted(sizes, reverse=True)


def test_vectors_stay_float32_and_odd_rows_become_float16(tmp_path: Path):
    model = save_family(tmp_path / "model", Qwen2Config(**{**SIZES, "intermediate_size": 80}))
    file = export(model, tmp_path / "out", "--quantization", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0", "it decides each token"
    assert kinds["blk.0.ffn_down.weight"] == "F16", "its rows of 80 are no blocks of 32"


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_written_as_llama_cpp_reads_it(tmp_path: Path):
    file = export(save_family(tmp_path / "model", FAMILIES["qwen2"]), tmp_path / "out")
    fields = fields_of(file)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert tokens[407:] == [f"[PAD{number}]" for number in range(407, 416)], "a row of the embedding each"
    assert set(types[407:]) == {5}
    assert (types[0], types[1], types[tokens.index("<think>")]) == (3, 1, 4)
    assert fields["tokenizer.ggml.merges"][:2] == ["a n", "l e"]
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == (TINY / "model" / "chat_template.jinja").read_text()
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "What is 12+8? <think> an apple,\n\n a man's </think>"
    assert again(text)["input_ids"] == AutoTokenizer.from_pretrained(TINY / "model")(text)["input_ids"]


def test_every_end_token_is_known(tmp_path: Path):
    model = save_family(tmp_path / "model", Qwen2Config(**SIZES))
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 404, 406]}')
    fields = fields_of(export(model, tmp_path / "out"))
    assert fields["tokenizer.ggml.eos_token_ids"] == [0, 404, 406]
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (404, 406)


SAME = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {"llama-bpe": SAME % r"\p{N}{1,3}", "qwen2": SAME % r"\p{N}"}
"""As they stand in tokenizer.json of Llama 3 and of Qwen 2."""


def stored(expression: str, **model: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"ignore_merges": False, **model},
    }


def test_the_rule_of_splitting_follows_from_the_expressions():
    assert pre_tokenizer_of(stored(PUBLISHED["llama-bpe"], ignore_merges=True), name="m") == "llama-bpe"
    assert pre_tokenizer_of(stored(PUBLISHED["qwen2"]), name="m") == "qwen2"
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, whole]}
    assert pre_tokenizer_of({**stored(""), "pre_tokenizer": whole}, name="m") == "gpt-2"
    assert pre_tokenizer_of({**stored(""), "pre_tokenizer": digits}, name="m") == "smollm"
    with pytest.raises(ValueError, match=r"another rule than any that llama\.cpp has"):
        pre_tokenizer_of(stored(PUBLISHED["qwen2"].replace(r"\p{N}|", r"\p{N}{1,2}|")), name="m")
    with pytest.raises(ValueError, match="normalises text by Lowercase"):
        pre_tokenizer_of({**stored(PUBLISHED["qwen2"]), "normalizer": {"type": "Lowercase"}}, name="m")


def sentencepiece(tmp_path: Path, *, all_ways: bool) -> Path:
    """A model with BPE over characters, whose merges are all ways to make a token; or none of those for one token."""
    words = (TINY / "train.jsonl").read_text().splitlines()[:400] + list(SAMPLES)
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    inner.train_from_iterator(words, trainer)
    made = json.loads(inner.to_str())
    vocabulary = made["model"]["vocab"]
    ways = [(vocabulary[t], t[:i], t[i:]) for t in vocabulary for i in range(1, len(t)) if t not in bytes_]
    merges = [[a, b] for _, a, b in sorted(ways) if a in vocabulary and b in vocabulary]
    first = "".join(merges[0])
    made["model"]["merges"] = [pair for pair in merges if all_ways or "".join(pair) != first]
    made["added_tokens"] = made["added_tokens"][:3]
    inner = Tokenizer.from_str(json.dumps(made))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    config = LlamaConfig(**{**SIZES, "bos_token_id": 1, "eos_token_id": 2})
    model = save_family(tmp_path / f"model-{all_ways}", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)
    return model


def test_sentencepiece_has_scores_by_which_llama_cpp_merges(tmp_path: Path):
    model = sentencepiece(tmp_path, all_ways=True)
    fields = fields_of(export(model, tmp_path / "out"))
    tokens, types, scores = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", False)
    assert types[:4] == [2, 3, 3, 6]
    assert [scores[tokens.index(token)] for token in ("<s>", "<0x0A>", "a")] == [NO_SCORE] * 3
    pieces = Pieces({token: number for number, token in enumerate(tokens)}, scores, add_space_prefix=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "How many apples does the man have? 12 + 8 = 20 Größe 🦙"
    ids = pieces.encode(text)
    assert ids == tokenizer(text)["input_ids"]
    assert len(ids) < len(text.encode()), "merged, with bytes for a llama"


def test_merges_that_llama_cpp_would_do_otherwise_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"does not merge as SentencePiece does: '.*in llama.cpp. llama.cpp would read"
    ):
        export(sentencepiece(tmp_path, all_ways=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- bad input ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "architecture": ({"model_type": "olmo"}, [], "is of the type olmo, and GGUF is written for llama, mistral, qwen2"),
    "activation": ({"hidden_act": "relu"}, [], "has the activation relu, where llama.cpp has silu"),
    "rope": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        [],
        "rotary embedding of the type dynamic, and only default, linear, yarn, llama3",
    ),
    "llama3": (
        {"rope_parameters": LLAMA_3},
        [],
        "rotary embedding of the type llama3, which llama.cpp's qwen2 does not read",
    ),
    "rows": ({"vocab_size": 400}, [], "has a token 406 .*, and the model 400 rows"),
    "K-quant": ({}, ["--quantization", "q4_k_m"], r"llama-quantize model-BF16.gguf model-Q4_K_M.gguf Q4_K_M"),
    "type": ({}, ["--quantization", "q3"], "--quantization is 'q3'; it is one of f32, f16"),
    "temperature": ({}, ["--temperature", "-1"], "--temperature is -1.0; it is at least 0"),
    "step": ({}, ["--step", "3"], "--step is 3; .* belongs to no run"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_refused_before_anything_is(what: str, tmp_path: Path):
    settings, options, message = REFUSED[what]
    shutil.copytree(TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", tmp_path / "out", *options)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_gemma_of_another_make_is_refused(tmp_path: Path):
    for change, message in (
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64, where llama.cpp has 32"),
        ({"layer_types": ["full_attention"] * 6}, "another order of layers"),
    ):
        config = Gemma3TextConfig(**{**FAMILIES["gemma3"].to_dict(), **change})
        with pytest.raises(ValueError, match=message):
            family_of(config, name="m")


def test_a_destination_that_is_there_or_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="it is there already, and nothing is written over"):
        export(TINY / "model", tmp_path / "there")
    monkeypatch.setattr("grpo.export.destination.free_bytes", lambda path: 2**20)
    with pytest.raises(ValueError, match=r"takes about 0\.\d+ GiB, and 0.000977 GiB are free there"):
        export(TINY / "model", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_a_push_needs_room_for_its_folder_and_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("grpo.run.hub.is_logged_in", lambda: True)
    monkeypatch.setattr(
        "grpo.run.hub.push_model", lambda repo, folder, **_: " ".join(each.name for each in folder.iterdir())
    )
    asked = parser().parse_args([str(TINY / "model"), "--to", "hub", "user/name"])
    (pushed,) = run(asked)
    assert "model.safetensors" in pushed.split()
    assert f"user/name is written to {tmp_path}/grpo-hub-" in capsys.readouterr().out
    monkeypatch.setattr("grpo.export.destination.free_bytes", lambda path: 2**20)
    with pytest.raises(ValueError, match=r"^TMPDIR is .*; the export takes about .* name a directory on another disk"):
        run(asked)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def break_off(self: Any, tensor: Any) -> None:
        written.append(tensor)
        (partial,) = tmp_path.glob(".out.*")
        assert (partial / "model-Q8_0.gguf").stat().st_size > 1000 or len(written) == 1
        if len(written) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", break_off)
    with pytest.raises(OSError, match="No space"):
        export(TINY / "model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what lies beside it --------------------------------------------------------------------------------------------------

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for turn in turns %}<start_of_turn>"
    "{{ 'model' if turn['role'] == 'assistant' else 'user' }}\n{{ first if loop.first else '' }}{{ turn['content'] }}"
    "<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    '{{ "\\"\\"\\"{{ x }}" if message["role"] == "user" else " -> " }}{{ message["content"] }}{% endfor %}'
)


@pytest.mark.parametrize(
    "template", [None, CHATML, GEMMA, NO_SYSTEM], ids=["tiny", "chatml", "gemma", "without system"]
)
def test_ollamas_template_writes_what_the_chat_template_does(template: str | None):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = template or tokenizer.chat_template
    data = DataConfig(name="d", template="chat")
    made = go_template(tokenizer, data, thinks=True, adds_bos=False)
    assert made is not None
    says = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."), ("user", "Five?")]
    turns = [{"role": role, "content": text} for role, text in says]
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (turns[:1], turns[:3], turns, system + turns[:1], system + turns):
        if messages[0]["role"] == "system" and template == NO_SYSTEM:
            continue
        shown = [{key.title(): value for key, value in message.items()} for message in messages]
        first = messages[0]["content"] if messages[0]["role"] == "system" else ""
        assert render(made, {"Messages": shown, "System": first}) == chat_text(messages, tokenizer, data)
    assert "<think>{{ .Thinking }}</think>" in made, "by which Ollama knows the tags"
    assert '"""' not in quoted(made)[3:-3]


def test_a_run_from_a_base_model_is_asked_in_its_own_words():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    made = go_template(tokenizer, DataConfig(name="d", template="r1_zero_think"), thinks=True, adds_bos=False)
    assert made is not None
    assert render(made, {"Prompt": "2+2?"}) == f"{R1_ZERO.replace('{question}', '2+2?')} <think>"
    irregular = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = irregular
    assert go_template(tokenizer, DataConfig(name="d", template="chat"), thinks=True, adds_bos=False) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, as it is after a checkpoint and an evaluation."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    hf = run_dir / "checkpoints" / "step-00000003" / "hf"
    shutil.copytree(TINY / "model", hf)
    base = tmp_path_factory.mktemp("bases") / "base"
    shutil.copytree(TINY / "model", base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    settings = tiny_settings(run_dir, model={"name": str(base)}, run={"steps": 3}, rollout={"stop": ["\nUser:"]})
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    rewards = {"accuracy": 1.0, "format": 1.0}
    answer = {
        "question": "1+1?",
        "answer": "2",
        "completion": "2",
        "finish_reason": "stop",
        "num_tokens": 5,
        "reward": 2.0,
    }
    rows = [
        {"step": s, "row": r, **answer, "rewards": {**rewards, "accuracy": float(s > 0)}, "sample": 0}
        for s in (0, 3)
        for r in range(40)
    ]
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "reward/accuracy": 0.5}\n')
    return run_dir


def test_plain_values_of_a_modelfile_are_written_without_a_templates_escapes():
    assert plainly_quoted("a\nb") == '"""a\nb"""'
    assert plainly_quoted('say "done"') == 'say "done"'
    assert plainly_quoted('say "it"\nnow') == '"""say "it"\nnow"""'
    with pytest.raises(ValueError, match=r"the Modelfile cannot hold .* Change them in data\.system_prompt or rollout"):
        plainly_quoted('one\ntwo "three"')


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_folder_proposes_sampling_that_transformers_takes(tmp_path: Path, temperature: float):
    """A temperature of 0 is greedy there, and no number to divide by."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    whole: Any = SimpleNamespace(lm=model, tokenizer=AutoTokenizer.from_pretrained(TINY / "model"))
    chosen: Any = SimpleNamespace(sampling=SimpleNamespace(temperature=temperature, top_p=0.9))
    write_folder(whole, tmp_path, ends=[0], chosen=chosen)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.do_sample == (temperature > 0)
    assert again.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] > 2


def test_only_a_checkpoint_at_a_steps_end_is_called_by_its_step(tmp_path: Path):
    assert step_of(str(tmp_path / "step-00000050" / "hf")) == 50
    for other in ("step-00000050-0003/hf", "step-best/hf", "step-00000050"):
        assert step_of(str(tmp_path / other)) is None


def test_a_run_is_exported_with_its_card_and_a_modelfile(trained: Path, tmp_path: Path):
    file = export(trained, tmp_path / "out", "--quantization", "bf16")
    assert {path.name for path in file.parent.iterdir()} == {"small-BF16.gguf", "Modelfile", "README.md", "curves.png"}
    ollama = (file.parent / "Modelfile").read_text()
    assert ollama.startswith('FROM ./small-BF16.gguf\nTEMPLATE """')
    for line in (
        "temperature 0.6",
        "top_p 0.95",
        "repeat_penalty 1",
        "num_ctx 1024",
        'stop """<|endoftext|>"""',
        'stop """\nUser:"""',
    ):
        assert f"\nPARAMETER {line}\n" in ollama
    text = (file.parent / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["tags"]) == ("apache-2.0", ["grpo", "reinforcement-learning", "reasoning"])
    assert "after GRPO on `data/questions.jsonl`: step 3 of 3 steps" in text
    # Wilson's interval of 40 right of 40 at 95 %: 40 / (40 + 1.96^2) = 0.912
    assert "| 3 | 1.000 [0.912, 1.000] | 1.000 [0.912, 1.000] | 5 | 0.0% |" in text
    assert "| `rollout.group_size` | 4 |" in text
    assert str(trained) not in text, "nothing of the machine"
    assert not (trained / "curves.png").exists(), "the run stays as it is"


def test_a_card_names_the_verdicts_and_says_of_how_many_questions_each_column_is(tmp_path: Path):
    rewards = [
        {"function": "accuracy", "name": "sums", "only": {"kind": ["sums", "products"]}},
        {"function": "code", "only": {"kind": "code"}},
        {"function": "format", "weight": 0.5},
    ]
    config = tiny_config(tmp_path, rewards=rewards, scoring={"verdict": ["sums", "code"]})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    same = {
        "step": 3,
        "question": "",
        "answer": "",
        "completion": "",
        "finish_reason": "stop",
        "num_tokens": 5,
        "reward": 1.0,
    }
    # of ten questions six are sums, of which three are right, and two are programs, both right
    rows = [
        {**same, "row": r, "rewards": {"sums": r % 2, "code": None, "format": 1.0}, "right": r % 2 == 1}
        for r in range(6)
    ]
    rows += [{**same, "row": r, "rewards": {"sums": None, "code": 1.0, "format": 1.0}, "right": True} for r in (6, 7)]
    rows += [{**same, "row": r, "rewards": {"sums": None, "code": None, "format": 1.0}, "right": None} for r in (8, 9)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pass_1 = {"eval/pass@1": 0.625, "eval/pass@1_low": 0.25, "eval/pass@1_high": 0.875}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "reward/mean": 0.5, **pass_1}) + "\n")
    text = card("m", read_run(tmp_path), base="b", step=3, usage="", licence=None)
    assert (
        "| step | right (pass@1), 8 questions | sums, 6 questions | code, 2 questions | format | tokens | cut off |"
        in text
    )
    assert "\n| 3 | 0.625 [0.250, 0.875] | 0.500 [0.188, 0.812] | 1.000 [" in text
    assert "\n10 held-out questions, 10 answers, with 95 % intervals. `sums` or `code` says what is right.\n" in text
    assert "- `sums`: accuracy, weight 1, only where kind is sums or products\n" in text
    assert "- `format`: weight 0.5\n" in text


def test_a_folder_loads_as_the_checkpoint_does(trained: Path, tmp_path: Path):
    folder = export(trained, tmp_path / "out", "--to", "folder")
    again, original = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, TINY / "model"))
    assert torch.equal(logits_of(again), logits_of(original))
    assert (again.generation_config.temperature, again.generation_config.eos_token_id) == (0.6, [0])
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    file = export(folder, tmp_path / "gguf", "--quantization", "f32")
    assert torch.equal(logits_of(read_back(file)), logits_of(original)), "and is exported again"


def test_a_run_of_supervised_training_is_exported_too(trained: Path, tmp_path: Path):
    run_dir = tmp_path / "distilled"
    shutil.copytree(trained / "checkpoints", run_dir / "checkpoints")
    rows = [{"name": str(TINY / f"{name}.jsonl")} for name in ("worked", "train")]
    settings = {
        "model": {"name": "Qwen/Qwen2.5-0.5B"},
        "data": {"name": rows},
        "training": {},
        "run": {"dir": str(run_dir)},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    text = (export(run_dir, tmp_path / "out", "--to", "folder") / "README.md").read_text()
    assert (
        "`Qwen/Qwen2.5-0.5B` after supervised training on `quickstart/worked.jsonl`, `quickstart/train.jsonl`" in text
    )
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"


def test_tags_become_tokens_made_of_their_parts(tmp_path: Path):
    model = save_family(tmp_path / "model", Qwen2Config(**{**SIZES, "vocab_size": 407}))
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["added_tokens"] = [each for each in stored["added_tokens"] if "think" not in each["content"]]
    for number, each in enumerate(stored["added_tokens"][1:]):
        each["id"] = 403 + number
    (model / "tokenizer.json").write_text(json.dumps(stored))
    before = AutoTokenizer.from_pretrained(model)("</think>")["input_ids"]
    folder = export(model, tmp_path / "out", "--to", "folder", "--think-tokens", "sum")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    (new,) = tokenizer("</think>")["input_ids"]
    assert len(before) > 1
    weights = load_file(model / "model.safetensors")
    for name, weight in (("model.embed_tokens", lm.model.embed_tokens.weight), ("lm_head", lm.lm_head.weight)):
        torch.testing.assert_close(weight[new], weights[f"{name}.weight"][before].sum(0))
    fields = fields_of(export(model, tmp_path / "gguf", "--think-tokens"))
    assert fields["tokenizer.ggml.token_type"][fields["tokenizer.ggml.tokens"].index("<think>")] == 4
    with pytest.raises(ValueError, match="--think-tokens has no effect"):
        export(folder, tmp_path / "again", "--think-tokens")
    with pytest.raises(ValueError, match="--quantization is q8_0 with --to folder, where it has no effect"):
        export(model, tmp_path / "again", "--to", "folder", "--quantization", "q8_0")
