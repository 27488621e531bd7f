"""What each family of models does, and what is refused before or after its weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, save_family, tiny_config
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    NanoChatConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    StableLmConfig,
)

from grpo import Trainer, distributed
from grpo.config import Config, ModelConfig
from grpo.families import LogitTransform, attention_calls, check_family, logit_transform
from grpo.inference import load, sampling_config
from grpo.model_source import model_config, source_of, with_resolved_name
from grpo.policy import Policy, load_lm, load_tokenizer, output_head
from grpo.rollout.engine import unsupported

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def policy_of(directory: Path, tmp_path: Path, *, dtype: str = "float32", **sections: Any) -> Policy:
    config = tiny_config(tmp_path / "run", model={"name": str(directory), "dtype": dtype}, **sections)
    return Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=getattr(torch, dtype)))


# --- what becomes of the output layer's numbers ---------------------------------------------------------------------------

SCALED = {
    "Granite divides": (GraniteConfig(**SIZES, logits_scaling=13.0), LogitTransform(1 / 13)),
    "Cohere multiplies": (CohereConfig(**SIZES, logit_scale=0.0625), LogitTransform(0.0625)),
    "HyperCLOVA X multiplies by what Granite divides by": (
        HyperCLOVAXConfig(**SIZES, logits_scaling=4.0),
        LogitTransform(4.0),
    ),
    "NanoChat caps": (NanoChatConfig(**SIZES, final_logit_softcapping=15.0), LogitTransform(1.0, 15.0)),
    "Llama does nothing": (LlamaConfig(**SIZES), LogitTransform()),
}


@pytest.mark.parametrize("family", SCALED)
def test_what_a_family_does_to_its_logits_is_measured(family: str):
    config, expected = SCALED[family]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    found = logit_transform(lm)
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert found.cap == expected.cap
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(100)  # so that a cap shows
        ids = torch.arange(3, 40).unsqueeze(0)
        own = lm(input_ids=ids).logits[0]
        ours = output_head(lm)(lm.base_model(input_ids=ids).last_hidden_state[0])
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Granite divides", "Cohere multiplies"])
def test_a_family_with_scaled_logits_is_trained_and_sampled_natively(family: str, tmp_path: Path):
    """Both were refused: packing was said not to work for them."""
    policy = policy_of(save_family(tmp_path / "model", SCALED[family][0]), tmp_path)
    assert unsupported(policy, fused=False) is None


# --- neighbours -----------------------------------------------------------------------------------------------------------

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
LEAKY = {
    "falcon_h1": FalconH1Config(**SIZES, mamba_d_ssm=64, **MAMBA),
    "lfm2": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "jamba": JambaConfig(**SIZES, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", LEAKY)
def test_a_family_whose_sequences_leak_is_refused_in_any_precision(family: str, dtype: str, tmp_path: Path):
    """Random models leak less than the tolerance of either precision: only NaN beside a sequence shows it."""
    with pytest.raises(ValueError, match="see their neighbours") as refused:
        policy_of(save_family(tmp_path / "model", LEAKY[family]), tmp_path, dtype=dtype)
    assert "model.name is" in str(refused.value)


def test_the_neighbours_of_a_mixture_of_experts_change_nothing(tmp_path: Path):
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    policy_of(save_family(tmp_path / "model", config), tmp_path, dtype="bfloat16")


# --- before weights are loaded --------------------------------------------------------------------------------------------

REFUSED = {
    "stablelm": (StableLmConfig(**SIZES), "attention is not told where packed sequences begin and end"),
    "nemotron": (NemotronConfig(**SIZES), "attention is not told where packed sequences begin and end"),
    "gpt_oss": (GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), r"a term of its own \(s_aux\)"),
    "lfm2": (LEAKY["lfm2"], "1 of Lfm2ForCausalLM's 2 layers mix positions by other means"),
    "jamba": (LEAKY["jamba"], "1 of JambaForCausalLM's 2 layers mix positions by other means"),
}


def without_weights(directory: Path, config: PretrainedConfig) -> ModelConfig:
    config.save_pretrained(directory)
    return ModelConfig(name=str(directory))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_packs_do_not_fit_is_refused_before_its_weights_are_read(family: str, tmp_path: Path):
    config, reason = REFUSED[family]
    with pytest.raises(ValueError, match=reason) as refused:
        check_family(without_weights(tmp_path, config))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_a_model_that_is_no_causal_language_model_is_refused_in_two_lines(kind: str, tmp_path: Path):
    """transformers' own message lists 150 classes."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"no causal language model of the type {kind}") as refused:
        check_family(ModelConfig(name=str(tmp_path)))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4-bit bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_quantised_weights_are_named_and_refused(stored: dict[str, Any], named: str, tmp_path: Path):
    settings = LlamaConfig(**SIZES).to_dict() | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"its weights are quantised \({named}\)"):
        check_family(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct-GGUF", "folder"])
def test_gguf_is_named_and_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model-q4.gguf").touch()
    with pytest.raises(ValueError, match=r"its weights are quantised \(GGUF\)"):
        load_tokenizer(ModelConfig(name=name))


def test_what_layers_hand_to_their_attention_does_not_depend_on_weights():
    config = Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    calls, _ = attention_calls(lm)
    assert [(call.layer, call.num_kv_heads, call.key_dim, call.has_packing) for call in calls[:1]] == [(0, 2, 8, True)]


# --- code of its own ------------------------------------------------------------------------------------------------------

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    directory = save_family(tmp_path / "odd", LlamaConfig(**SIZES))
    (directory / "odd.py").write_text(OWN_CODE)
    settings = json.loads((directory / "config.json").read_text())
    auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (directory / "config.json").write_text(json.dumps(settings | {"model_type": "odd_llama", "auto_map": auto}))
    return directory


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(own_code: Path):
    with pytest.raises(ValueError, match=r"Read that code, and set model\.trust_remote_code=true"):
        check_family(ModelConfig(name=str(own_code)))


def test_a_model_with_code_of_its_own_is_trained_and_exported(own_code: Path, tmp_path: Path):
    model = {"name": str(own_code), "dtype": "float32", "trust_remote_code": True}
    trainer = Trainer(tiny_config(tmp_path / "run", model=model, run={"steps": 1, "dir": str(tmp_path / "run")}))
    exported = trainer.train() / "hf"
    trainer.close()
    loaded = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert type(loaded).__name__ == "OddForCausalLM"


# --- what an export holds -------------------------------------------------------------------------------------------------


def test_an_export_has_the_dropouts_of_the_model_that_was_trained(tmp_path: Path):
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3
    )
    policy = policy_of(save_family(tmp_path / "model", config), tmp_path)
    assert policy.lm.config.attn_pdrop == 0
    policy.export(tmp_path / "hf")
    saved = json.loads((tmp_path / "hf/config.json").read_text())
    assert [saved[name] for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop")] == [0.1, 0.2, 0.3]
    assert policy.lm.config.attn_pdrop == 0
