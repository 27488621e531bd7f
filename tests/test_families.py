"""What each family of models does, and what is refused before or after its weights are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, save_family, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
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

from grpo.check.families import FAMILIES
from grpo.config import ModelConfig
from grpo.inference.model import load, sampling_config
from grpo.policy.families import LogitTransform, attention_calls, check_family, logit_transform
from grpo.policy.language_model import fuse_kernels, load_lm, output_head, with_computed_buffers
from grpo.policy.model_source import model_config, source_of, with_resolved_name
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.engine import unsupported
from grpo.system import distributed

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


def with_experts() -> PretrainedConfig:
    return Qwen3MoeConfig(**SIZES | {"hidden_size": 64}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def test_experts_keep_their_own_product(tmp_path: Path):
    """Liger's kernel of experts waits for the GPU in each layer, and no step with it can be captured."""
    lm = AutoModelForCausalLM.from_config(with_experts())
    experts = lm.base_model.layers[0].mlp.experts
    own = type(experts).forward
    fuse_kernels(lm)
    assert getattr(experts.forward, "__func__", experts.forward) is own
    assert (
        getattr(lm.base_model.norm.forward, "__func__", None) is not type(lm.base_model.norm).forward
    )  # others are fused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose graphs it captures")
def test_a_step_of_experts_is_captured(tmp_path: Path):
    policy = policy_of(save_family(tmp_path / "model", with_experts()), tmp_path, dtype="bfloat16")
    assert unsupported(policy, fused=True) is None


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
    config = tiny_config(tmp_path / "run", model=model)
    check_family(config.model)
    policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))
    policy.export(tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
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


def tiny_gemma3() -> Gemma3Config:
    text = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=text.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )


def test_an_export_of_a_multimodal_model_has_its_processor_files(tmp_path: Path):
    """Without them, programs that know the model as multimodal refuse to load it."""
    directory = save_family(tmp_path / "model", tiny_gemma3())
    for name in ("preprocessor_config.json", "processor_config.json"):
        (directory / name).write_text(json.dumps({"processor_class": "Gemma3Processor", "from": name}))
    policy = policy_of(directory, tmp_path)
    for path in directory.glob("*processor_config.json"):
        path.unlink()  # an export does not need the starting model
    policy.export(tmp_path / "hf")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["from"] == name
    assert not (tmp_path / "hf/video_preprocessor_config.json").exists()


def test_a_model_whose_layers_have_keys_of_different_sizes_is_sampled_with_generate(tmp_path: Path):
    """Its configuration answers the question for the size of a head by an error."""
    config = Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": 6},
        head_dim=8,
        global_head_dim=16,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
    )
    policy = policy_of(save_family(tmp_path / "model", config), tmp_path)
    assert "keys and values are of different sizes" in str(unsupported(policy, fused=False))


# --- what model.name may be -----------------------------------------------------------------------------------------------


def make_run(directory: Path, *, steps: tuple[int, ...] = (1, 12)) -> Path:
    """As much of a run's directory as tells which checkpoint is the newest."""
    for step in steps:
        shutil.copytree(TINY / "model", directory / f"checkpoints/step-{step:08d}/hf")
    (directory / "checkpoints/step-00000099.partial/hf").mkdir(parents=True)
    return directory


def test_a_runs_directory_as_model_name_is_its_newest_checkpoint_and_stays_it(tmp_path: Path):
    run = make_run(tmp_path / "earlier")
    newest = str(run / "checkpoints/step-00000012/hf")
    shutil.copytree(run / "checkpoints/step-00000012", run / "checkpoints/step-00000012-backup")  # a person's own
    for name in (run, run / "checkpoints/step-00000012", newest):
        resolved = with_resolved_name(tiny_config(tmp_path / "run", model={"name": str(name)}))
        assert resolved.model.name == newest
        assert load_tokenizer(ModelConfig(name=str(name))).eos_token_id == 0
    hub = tiny_config(tmp_path / "run", model={"name": "Qwen/Qwen2.5-0.5B"})
    assert with_resolved_name(hub).model.name == "Qwen/Qwen2.5-0.5B"


LORA = {"rank": 4, "alpha": 8}


def make_adapter(directory: Path, **settings: Any) -> Path:
    base = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": kinds, **settings})
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    model.save_pretrained(str(directory))
    return directory


def logits_of(adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=torch.arange(20).unsqueeze(0)).logits


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_adapter_is_trained_further_and_is_its_own_reference(zero_stage: int, tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter")
    policy = policy_of(adapter, tmp_path, lora=LORA, algorithm={"kl_coef": 0.1}, distributed={"zero_stage": zero_stage})
    policy.sync()
    with torch.no_grad(), policy.sampling_model() as lm:
        ours = lm(input_ids=torch.arange(20, device=lm.device).unsqueeze(0)).logits.cpu()
    torch.testing.assert_close(ours, logits_of(adapter), rtol=1e-4, atol=1e-4)
    for _, source, target in policy._reference_pairs():
        assert torch.equal(source, target)
    policy.export_adapter(tmp_path / "again")
    stored = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(TINY / "model")


def test_an_adapter_is_sampled_merged_into_its_model(tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter")
    config = sampling_config(str(adapter), dtype="float32", max_prompt_tokens=96, max_completion_tokens=24, engine="hf")
    sampler = load(config, load_tokenizer(config.model))
    with torch.no_grad(), sampler.model.sampling_model() as lm:
        ours = lm(input_ids=torch.arange(20, device=lm.device).unsqueeze(0)).logits.cpu()
    torch.testing.assert_close(ours, logits_of(adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "lora", "said"),
    [
        ({}, {}, r"lora\.rank is 0; .* Set lora\.rank=4 lora\.alpha=8"),
        ({}, {"rank": 4, "alpha": 16}, r"lora\.alpha is 16.*; .* Set lora\.rank=4 lora\.alpha=8"),
        ({"use_dora": True}, LORA, "an adapter with use_dora; only plain LoRA can be trained further"),
    ],
)
def test_an_adapter_that_the_settings_do_not_continue_is_refused(
    settings: dict[str, Any], lora: dict[str, Any], said: str, tmp_path: Path
):
    config = tiny_config(tmp_path / "run", model={"name": str(make_adapter(tmp_path / "a", **settings))}, lora=lora)
    with pytest.raises(ValueError, match=said):
        with_resolved_name(config)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"Set lora\.target_modules=\[q_proj,v_proj\]"):
        policy_of(adapter, tmp_path, lora=LORA)


def test_the_base_of_an_adapter_is_what_its_configuration_says(tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter")
    assert source_of(ModelConfig(name=str(adapter))).base == str(TINY / "model")
    assert model_config(ModelConfig(name=str(adapter))).model_type == "qwen2"
    stored = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(stored | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        source_of(ModelConfig(name=str(adapter)))


# --- a model that no process loads whole ----------------------------------------------------------------------------------

MANY_BUFFERS = ("qwen2", "llama", "gemma3_text", "gemma3n_text", "minicpm3", "gptj")


@pytest.mark.parametrize("model_type", MANY_BUFFERS)
def test_computed_buffers_are_those_of_a_model_that_is_loaded_whole(model_type: str, tmp_path: Path):
    """In bfloat16, in which they would come out otherwise where they are not computed in float32."""
    (family,) = (each for each in FAMILIES if each.model_type == model_type)
    config = ModelConfig(name=str(save_family(tmp_path / "model", family.config())))
    expected = dict(load_lm(config, dtype=torch.bfloat16).named_buffers())
    shell = with_computed_buffers(config, dtype=torch.bfloat16)
    assert shell is not None
    found = dict(shell.named_buffers())
    assert found.keys() == expected.keys()
    assert found, "there is something to compare"
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    assert {parameter.device.type for parameter in shell.parameters()} == {"meta"}


def test_a_model_whose_files_hold_buffers_is_kept_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (family,) = (each for each in FAMILIES if each.model_type == "glm4_moe")
    model = save_family(tmp_path / "model", family.config())
    assert with_computed_buffers(ModelConfig(name=str(model)), dtype=torch.float32) is None
    config = tiny_config(tmp_path / "run", model={"name": str(model)}, distributed={"zero_stage": 3})
    processes = distributed.start(config, dtype=torch.float32)
    policy = Policy(config, load_tokenizer(config.model), processes, samples=False)
    assert policy.holds_whole
    assert "its files hold buffers beside its weights" in capsys.readouterr().out
    assert any("e_score_correction_bias" in name for name, _ in policy.whole_lm.named_buffers())
