"""The policy's log-probabilities, packing through real model families, and sampling."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, FixedGenerator, number_in_text, save_family, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from grpo import Trainer, distributed
from grpo.attention import implementation_for, packed_inputs
from grpo.batch import pack, take
from grpo.config import ModelConfig
from grpo.logprobs import token_logprobs
from grpo.policy import Policy, check_context, end_token_ids, load_lm, load_tokenizer, output_head
from grpo.prompts import build_prompts, load_rows
from grpo.rollout.hf import HFGenerator
from grpo.types import Group, Sampling

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "smollm3": SmolLM3Config(**SIZES),
    "mistral with a sliding window of 4": MistralConfig(**SIZES, sliding_window=4),
    "gemma2 with capped logits": Gemma2Config(**SIZES, final_logit_softcapping=5.0, attn_logit_softcapping=None),
}


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def ragged(lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(3, 128, (sum(lens),))
    return tokens, torch.cat([torch.arange(n) for n in lens]), torch.tensor([0, *lens]).cumsum(0).int()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_equals_one_sequence_at_a_time(family: str):
    model = random_model(family)
    tokens, position_ids, cu_seqlens = ragged([7, 1, 12, 5])
    with torch.no_grad():
        packed = model.base_model(**packed_inputs(tokens, position_ids, cu_seqlens)).last_hidden_state[0]
        alone = [
            model(input_ids=tokens[a:b].unsqueeze(0), use_cache=False).logits[0]
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
    # float32 sums in another order: 1e-5 of logits of size one
    torch.testing.assert_close(output_head(model)(packed), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_of_enormous_values_does_not_leak_in(family: str):
    model = random_model(family)
    tokens, position_ids, cu_seqlens = ragged([6, 8, 9])
    inputs = packed_inputs(tokens, position_ids, cu_seqlens)
    with torch.no_grad():
        calm = model.base_model(**inputs).last_hidden_state[0]
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        embeddings[:, :6] = 10_000.0
        embeddings[:, 14:] = -10_000.0
        beside = model.base_model(inputs_embeds=embeddings, **inputs).last_hidden_state[0]
    assert not torch.allclose(calm[:6], beside[:6])
    torch.testing.assert_close(beside[6:14], calm[6:14], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for variable-length flash attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_over_packs_equals_sdpa_and_keeps_nan_neighbours_out(family: str):
    model = random_model(family).to("cuda", torch.bfloat16)
    tokens, position_ids, cu_seqlens = (x.cuda() for x in ragged([6, 80, 9]))
    inputs = packed_inputs(tokens, position_ids, cu_seqlens)
    with torch.no_grad():
        expected = model.float().base_model(**inputs).last_hidden_state[0]
        model.to(torch.bfloat16).set_attn_implementation(implementation_for(model))
        assert model.config._attn_implementation == "packed"
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        embeddings[:, :6] = float("nan")
        embeddings[:, 86:] = float("nan")
        actual = model.base_model(inputs_embeds=embeddings, **inputs).last_hidden_state[0]
    # bfloat16 keeps 8 bits: 2 % of hidden states of size one, over two layers
    torch.testing.assert_close(actual[6:86].float(), expected[6:86], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_and_entropy_equal_the_plain_formula(chunk_tokens: int, temperature: float):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 50, bias=False, dtype=torch.float64)
    targets = torch.randint(50, (10,))
    logprobs, entropy = token_logprobs(hidden, targets, head, temperature=temperature, chunk_tokens=chunk_tokens)
    distribution = torch.distributions.Categorical(logits=head(hidden).float() / temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(targets))
    torch.testing.assert_close(entropy, distribution.entropy())
    weights = torch.randn(10)
    actual = torch.autograd.grad((weights * logprobs).sum(), [hidden, head.weight])
    expected = torch.autograd.grad((weights * distribution.log_prob(targets)).sum(), [hidden, head.weight])
    torch.testing.assert_close(actual, expected)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    model = {"name": str(TINY / "model"), "dtype": "float32"}
    config = tiny_config(tmp_path_factory.mktemp("run"), model=model, rollout={"temperature": 0.7})
    return Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))


@pytest.fixture(scope="module")
def groups(policy: Policy) -> list[Group]:
    config = policy._config
    prompts, _ = build_prompts(load_rows(config.data)[:6], policy.tokenizer, config.data)
    generator = HFGenerator(policy, max_sequences=9)  # 24 completions: more than one call, the last one smaller
    return generator.sample(prompts, Sampling(max_tokens=24, temperature=0.7), num_completions=4, seed=3)


def test_sampling_logprobs_equal_a_fresh_forward_pass(policy: Policy, groups: list[Group]):
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids], device=policy.processes.device)
            with torch.no_grad():
                logits = policy.lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1].cpu()
            fresh = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
            # cached keys and left padding in float32: 1e-4 of a log-probability
            torch.testing.assert_close(torch.tensor(completion.logprobs), fresh, rtol=0, atol=1e-4)


def test_the_trainers_logprobs_equal_the_sampling_logprobs(policy: Policy, groups: list[Group]):
    batch = pack(groups, torch.ones(len(groups), 4)).to(policy.processes.device)
    torch.testing.assert_close(policy.old_logprobs(batch), batch.sampling_logprobs, rtol=0, atol=1e-4)
    part = take(batch, [5, 0, 17])
    torch.testing.assert_close(policy.old_logprobs(part), part.sampling_logprobs, rtol=0, atol=1e-4)


def test_completions_end_with_their_first_end_token_or_at_the_limit(policy: Policy, groups: list[Group]):
    completions = [completion for group in groups for completion in group.completions]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        *before, last = completion.token_ids
        assert not set(before) & set(policy.end_token_ids)
        assert len(completion.token_ids) == len(completion.logprobs) <= 24
        ended = last in policy.end_token_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 24
        assert "<|endoftext|>" not in completion.text


def test_the_same_seed_samples_the_same_and_another_one_does_not(policy: Policy, groups: list[Group]):
    generator = HFGenerator(policy, max_sequences=64)
    prompts = [group.prompt for group in groups]
    options = {"sampling": Sampling(max_tokens=12), "num_completions": 2}
    first, again, other = (generator.sample(prompts, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_greedy_decoding_takes_the_likeliest_token(policy: Policy, groups: list[Group]):
    (group,) = HFGenerator(policy, max_sequences=4).sample(
        [groups[0].prompt], Sampling(max_tokens=10, temperature=0.0), num_completions=1, seed=0
    )
    ids = torch.tensor([group.prompt.token_ids + group.completions[0].token_ids], device=policy.processes.device)
    with torch.no_grad():
        logits = policy.lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == group.completions[0].token_ids


def test_no_prompts_give_no_groups(policy: Policy):
    generator = HFGenerator(policy, max_sequences=4)
    assert generator.sample([], Sampling(max_tokens=4), num_completions=2, seed=0) == []


def test_the_models_own_generation_settings_do_not_change_the_samples(policy: Policy, groups: list[Group]):
    generator = HFGenerator(policy, max_sequences=64)
    options = {"sampling": Sampling(max_tokens=12), "num_completions": 3, "seed": 5}
    before = generator.sample([group.prompt for group in groups], **options)
    own = policy.lm.generation_config
    own.update(repetition_penalty=3.0, top_k=1, top_p=0.1, min_p=0.5, max_length=5)
    try:
        assert generator.sample([group.prompt for group in groups], **options) == before
        assert policy.lm.generation_config is own
    finally:
        own.update(repetition_penalty=None, top_k=None, top_p=None, min_p=None, max_length=None)


def test_a_prefill_is_part_of_the_answer(policy: Policy, groups: list[Group]):
    from dataclasses import replace

    prompt = replace(groups[0].prompt, prefill="<think>")
    (group,) = HFGenerator(policy, max_sequences=4).sample([prompt], Sampling(max_tokens=4), num_completions=1, seed=0)
    assert group.completions[0].text.startswith("<think>")


def test_the_exported_model_gives_the_policys_logits(policy: Policy, tmp_path: Path):
    policy.export(tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    device = policy.processes.device
    ids = torch.arange(20, device=device).unsqueeze(0)
    with torch.no_grad(), policy.sampling_model() as lm:
        assert torch.equal(loaded.to(device)(input_ids=ids).logits, lm(input_ids=ids).logits)


def test_the_export_does_not_inherit_sampling_defaults(policy: Policy, tmp_path: Path):
    own = policy.lm.generation_config
    own.update(temperature=0.3)  # without do_sample: transformers refuses to save such a configuration
    try:
        policy.export(tmp_path / "hf")
    finally:
        own.update(temperature=None)
    saved = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert saved["eos_token_id"] == policy.end_token_ids
    assert "temperature" not in saved


OPT = OPTConfig(
    vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
)


def test_a_family_that_packing_does_not_fit_is_refused(tmp_path: Path):
    """OPT counts positions from the attention mask, so packed sequences would see each other's places."""
    config = tiny_config(tmp_path, model={"name": str(save_family(tmp_path / "opt", OPT)), "dtype": "float32"})
    with pytest.raises(ValueError, match="Packing does not work for this model family"):
        Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_update_is_adamws_first_step_in_every_stage(tmp_path: Path, dtype: str, zero_stage: int):
    """The larger part of the weights moves by the learning rate then, whatever its gradient: AdamW's first step is its sign."""
    sections = {
        "model": {"dtype": dtype},
        "distributed": {"zero_stage": zero_stage},
        "optimizer": {"learning_rate": 0.5},
        "algorithm": {"max_sampling_gap": 100},
    }
    trainer = Trainer(tiny_config(tmp_path / "run", **sections), rewards=[number_in_text])
    trainer.generator = FixedGenerator()
    policy = trainer.policy
    with policy.sampling_model() as lm:
        before = lm.model.layers[0].mlp.up_proj.weight.detach().float().clone()
    trainer.train_step()
    policy.sync()
    trainer.close()
    with policy.sampling_model() as lm:
        moved = (lm.model.layers[0].mlp.up_proj.weight.detach().float() - before).abs()
    assert float(moved.median()) == pytest.approx(0.5, rel=0.01)  # 0.37 if a step of zeros were counted before


def test_dropout_is_switched_off(tmp_path: Path):
    lm = load_lm(ModelConfig(name=str(save_family(tmp_path / "opt", OPT))), dtype=torch.float32).train()
    assert OPT.dropout > 0
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(lm(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "model", tmp_path / "model"))


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_end_tokens_are_gathered_from_every_source(model_copy: Path):
    rewrite(model_copy / "config.json", eos_token_id=7)
    rewrite(model_copy / "generation_config.json", eos_token_id=[9, 11])
    config = ModelConfig(name=str(model_copy))
    tokenizer = load_tokenizer(config)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    expected = {7, 9, 11, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert end_token_ids(config, tokenizer) == sorted(expected)


def test_end_tokens_do_not_need_a_generation_config(model_copy: Path):
    (model_copy / "generation_config.json").unlink()
    config = ModelConfig(name=str(model_copy))
    assert load_tokenizer(config).eos_token_id in end_token_ids(config, load_tokenizer(config))


def test_a_rotary_embedding_that_changes_with_its_neighbours_is_refused_where_it_would(model_copy: Path):
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 119}
    rewrite(
        model_copy / "config.json",
        rope_parameters={**parameters, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    )
    config = tiny_config(
        model_copy.parent / "run", model={"name": str(model_copy)}
    )  # sequences of up to 96 + 24 tokens
    with pytest.raises(
        ValueError, match=r"rotary embedding \(longrope\) changes .* longer than 119 tokens, .* may have 120"
    ):
        check_context(config)
    config.rollout.max_completion_tokens = 23
    check_context(config)


def test_a_model_that_is_not_there_is_refused_by_its_setting():
    with pytest.raises(ValueError, match=re.escape("model.name is '/nowhere/model'; it is neither a directory")):
        load_tokenizer(ModelConfig(name="/nowhere/model"))
