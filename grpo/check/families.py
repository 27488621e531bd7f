"""Which families of models train and sample natively, found by trying: the table of docs/families.md.

Of each family a random model of a few thousand weights is made, with the tokenizer of a given model, and put through what a run
puts its model through: the checks before weights are loaded, loading, the packed forward pass, NaN beside a sequence, an update,
and the native engine's own checks.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from grpo.algorithm.batch import micro_batch
from grpo.config import Config
from grpo.policy.families import check_family
from grpo.policy.model_source import PROCESSOR_FILES
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import check_context, load_tokenizer
from grpo.rollout.engine import unsupported
from grpo.system import distributed
from grpo.types import Batch

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = {"shared_expert_intermediate_size": 48}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """A row of the table: models by their names, transformers' name, and what makes a tiny one."""

    models: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PretrainedConfig:
        if "text_config" in self.settings:
            text = {**SIZES, **self.settings["text_config"]}
            return AutoConfig.for_model(self.model_type, **{**self.settings, "text_config": text})
        return AutoConfig.for_model(self.model_type, **{**SIZES, **self.settings})


FAMILIES = [
    Family("Qwen2, Qwen2.5", "qwen2", GROUPED),
    Family("Qwen3", "qwen3", HEADS),
    Family("Qwen2-MoE", "qwen2_moe", {**GROUPED, **EXPERTS, **SHARED}),
    Family("Qwen3-MoE", "qwen3_moe", {**HEADS, **EXPERTS}),
    Family("Qwen3-Next", "qwen3_next", {**HEADS, **EXPERTS, **SHARED, **DELTA, "num_hidden_layers": 4}),
    Family("Qwen3.5", "qwen3_5_text", {**HEADS, **DELTA, "num_hidden_layers": 4}),
    Family("Qwen2.5-VL", "qwen2_5_vl", {"text_config": GROUPED}),
    Family("Qwen3-VL", "qwen3_vl", {"text_config": HEADS}),
    Family("Llama 1 to 3, SmolLM 1 and 2, DeepSeek-R1-Distill-Llama", "llama", HEADS),
    Family("Llama 4", "llama4_text", {**HEADS, **EXPERTS, "intermediate_size_mlp": 96}),
    Family("SmolLM3", "smollm3", GROUPED),
    Family("Mistral 7B", "mistral", {**HEADS, "sliding_window": 8}),
    Family("Ministral", "ministral", {**HEADS, "sliding_window": 8}),
    Family("Mistral Small 3.1 with images", "mistral3", {}),
    Family("Mixtral", "mixtral", {**HEADS, **EXPERTS}),
    Family("Gemma", "gemma", HEADS),
    Family("Gemma 2", "gemma2", HEADS),
    Family("Gemma 3 1B", "gemma3_text", {**HEADS, "sliding_window": 8}),
    Family(
        "Gemma 3 4B and larger",
        "gemma3",
        {"text_config": {**HEADS, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        {
            **HEADS,
            **PER_LAYER,
            "laurel_rank": 8,
            "num_hidden_layers": 5,
            "intermediate_size": [96] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    Family("Gemma 4", "gemma4_text", {**HEADS, **PER_LAYER, "num_hidden_layers": 6, "global_head_dim": 32}),
    Family("Phi-1, Phi-2", "phi", {}),
    Family("Phi-3, Phi-4", "phi3", GROUPED),
    Family("Phi-3.5-MoE", "phimoe", {**GROUPED, **EXPERTS}),
    Family("Granite 3", "granite", {**GROUPED, "logits_scaling": 8.0}),
    Family("Granite 3 MoE", "granitemoe", {**GROUPED, **EXPERTS}),
    Family(
        "Granite 4",
        "granitemoehybrid",
        {
            **GROUPED,
            **EXPERTS,
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "mamba_expand": 2,
            "shared_intermediate_size": 64,
        },
    ),
    Family("Command R", "cohere", GROUPED),
    Family("Command R7B, Command A", "cohere2", HEADS),
    Family("OLMo", "olmo", GROUPED),
    Family("OLMo 2", "olmo2", GROUPED),
    Family("OLMo 3", "olmo3", GROUPED),
    Family("OLMoE", "olmoe", {**GROUPED, **EXPERTS}),
    Family("GLM-4 9B", "glm", HEADS),
    Family("GLM-4.5", "glm4_moe", {**HEADS, **EXPERTS, **ROUTED, "first_k_dense_replace": 1}),
    Family("DeepSeek-V2", "deepseek_v2", {**LATENT, **ROUTED, "topk_method": "greedy"}),
    Family("DeepSeek-V3, R1", "deepseek_v3", {**LATENT, **ROUTED, "num_key_value_heads": 4}),
    Family("MiniCPM3", "minicpm3", LATENT),
    Family("gpt-oss", "gpt_oss", {**HEADS, **EXPERTS}),
    Family("StableLM", "stablelm", GROUPED),
    Family("Nemotron", "nemotron", HEADS),
    Family("StarCoder2", "starcoder2", GROUPED),
    Family("EXAONE 4", "exaone4", GROUPED),
    Family("ERNIE 4.5", "ernie4_5", HEADS),
    Family("Seed-OSS", "seed_oss", HEADS),
    Family("HyperCLOVA X", "hyperclovax", {**GROUPED, "logits_scaling": 4.0}),
    Family("Hunyuan", "hunyuan_v1_dense", HEADS),
    Family("nanochat", "nanochat", GROUPED),
    Family("Falcon 7B, 40B", "falcon", {}),
    Family("Falcon-H1", "falcon_h1", {**HEADS, **MAMBA, "mamba_d_ssm": 128}),
    Family("LFM2", "lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    Family("Mamba", "mamba", {}),
    Family("Jamba", "jamba", {**GROUPED, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("GPT-2", "gpt2", GPT),
    Family("GPT-J", "gptj", {**GPT, "rotary_dim": 8}),
    Family("Pythia, GPT-NeoX", "gpt_neox", {}),
    Family("OPT", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family("BLOOM", "bloom", {}),
    Family("MPT", "mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
]


@dataclass(frozen=True)
class Verdict:
    """What became of a family; "" where there is nothing against it."""

    refused: str
    not_native: str

    @property
    def cells(self) -> list[str]:
        if self.refused:
            return ["no", "no", self.refused]
        return ["yes", "no" if self.not_native else "yes", self.not_native]


def try_family(family: Family, tokenizer: Path) -> Verdict:
    """Put a tiny model of a family through what a run does with its model."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        directory = Path(shutil.copytree(tokenizer, Path(name) / "model", ignore=_no_weights))
        settings = family.config()
        settings.save_pretrained(directory)
        torch.manual_seed(0)
        config = _run_settings(directory)
        try:
            check_context(config)
            check_family(config.model)
            AutoModelForCausalLM.from_config(settings).save_pretrained(directory)
            processes = distributed.start(config, dtype=torch.float32)
            policy = Policy(config, load_tokenizer(config.model), processes)
        except ValueError as error:
            return Verdict(_reason(str(error)), "")
        not_native = unsupported(policy, fused=False)
        _update(policy)
        return Verdict("", not_native or "")


def _no_weights(_: Any, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") or name in ("config.json", *PROCESSOR_FILES)]


def _run_settings(directory: Path) -> Config:
    return Config(
        model={"name": str(directory), "dtype": "float32"},
        data={"max_prompt_tokens": 64},
        rollout={"max_completion_tokens": 64},
        algorithm={"kl_coef": 0.0},
        memory={"micro_batch_tokens": 256, "activation_checkpointing": 0},
        distributed={"zero_stage": 0},
        run={"dir": str(directory.parent / "run"), "steps": 1},
    )


def _reason(message: str) -> str:
    """What is against a family, from a refusal's second part."""
    return message.partition("; ")[2].partition(". Packing does not work")[0]


def _update(policy: Policy) -> None:
    """One update on a sequence of ten tokens."""
    tokens = torch.arange(3, 13)
    batch = Batch(
        tokens=tokens,
        cu_seqlens=torch.tensor([0, 10]),
        prompt_lens=torch.tensor([4]),
        prompt_index=torch.tensor([0]),
        advantages=torch.ones(1),
        sampling_logprobs=torch.zeros(6),
    )
    logprobs, *_ = policy.logprobs(micro_batch(batch, weights=torch.ones(6)).to(policy.processes.device))
    policy.backward(-logprobs.mean(), last=True)
    norm = policy.optimizer_step(1e-3)
    assert 0 < norm < float("inf"), f"the gradient of {type(policy.lm).__name__} has the norm {norm}"


def rows(tokenizer: Path) -> dict[str, list[str]]:
    """Of each family that this version of transformers has, by its `model_type`: its models, and the cells of its verdict."""
    known = set(transformers.CONFIG_MAPPING.keys())
    found = {
        family.model_type: [family.models, *try_family(family, tokenizer).cells]
        for family in FAMILIES
        if family.model_type in known
    }
    distributed.stop()
    return found


HEAD = """# Families of models

`python scripts/make_family_table.py` made this table with transformers {version}, and tests check each row.

For each family the script makes a tiny random model and runs the checks that every run makes of its model:

- The packed forward pass has the log-probabilities of the model's own forward pass.
- Nothing of its neighbours reaches a sequence: they are NaN, and its log-probabilities stay numbers.
- An update has a gradient.
- The native engine has the log-probabilities of the model's own forward pass.

A family that is not in the table goes through the same checks when a run starts. If it does not fit, the run stops and says
why, in most cases before weights are loaded.

`trains`: a policy can be trained. `native`: grpo's own engine can sample from it; a family that trains and has a `no` here is
sampled with transformers' `generate`.

Quantised checkpoints (GPTQ, AWQ, bitsandbytes, FP8, GGUF) are refused. So are models of images or sound that transformers does
not load as causal language models. Only the text of a Gemma 3 is trained; its exports keep the processor files.

| models | `model_type` | trains | native | why not |
|---|---|---|---|---|
"""


def document(found: dict[str, list[str]]) -> str:
    """docs/families.md."""
    lines = [
        f"| {models} | `{model_type}` | {trains} | {native} | {why} |"
        for model_type, (models, trains, native, why) in found.items()
    ]
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"
