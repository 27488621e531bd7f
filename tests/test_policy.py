"""The policy's log-probabilities, packing through real model families, and sampling."""

import json
import re
import shutil
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, VARIETY, FixedGenerator, number_in_text, save_family, sequences_of, shallow, tiny_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    masking_utils,
)
from transformers.integrations import is_deepspeed_zero3_enabled

import grpo.policy.policy
from grpo import Trainer
from grpo.algorithm.batch import micro_batch, pack, take
from grpo.config import ModelConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows
from grpo.policy.attention import packed_inputs
from grpo.policy.language_model import checkpoint_activations, fuse_kernels, load_lm, output_head, pair_cost
from grpo.policy.logprobs import float32_linear, token_logprobs
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import check_context, end_token_ids, load_tokenizer
from grpo.rollout.hf import HFGenerator
from grpo.system import distributed
from grpo.types import Batch, Group, MicroBatch, Sampling

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
    return AutoModelForCausalLM.from_config(deepcopy(FAMILIES[family])).eval()


PROMPT_LENS, COMPLETION_LENS = [3, 3, 1, 5, 3], [4, 9, 6, 80, 2]  # the first two and the last share a prompt


def ragged() -> MicroBatch:
    """Five sequences of three prompts."""
    torch.manual_seed(1)
    prompt_index = torch.tensor([0, 0, 1, 2, 0])
    prompts = {i: torch.randint(3, 128, (n,)) for i, n in zip(prompt_index.tolist(), PROMPT_LENS, strict=True)}
    lens = [p + c for p, c in zip(PROMPT_LENS, COMPLETION_LENS, strict=True)]
    parts = [
        (prompts[i], torch.randint(3, 128, (n,))) for i, n in zip(prompt_index.tolist(), COMPLETION_LENS, strict=True)
    ]
    batch = Batch(
        tokens=torch.cat([part for both in parts for part in both]),
        cu_seqlens=torch.tensor([0, *lens]).cumsum(0),
        prompt_lens=torch.tensor(PROMPT_LENS),
        prompt_index=prompt_index,
        advantages=torch.zeros(5),
        sampling_logprobs=torch.zeros(sum(COMPLETION_LENS)),
    )
    return micro_batch(batch, weights=torch.ones(sum(COMPLETION_LENS)))


def runs(micro: MicroBatch) -> list[slice]:
    """Where the completions lie in the pass."""
    edges = micro.packing.cu_queries.tolist()[-1 - len(COMPLETION_LENS) :]
    return [slice(a, b) for a, b in pairwise(edges)]


def alone(model: PreTrainedModel, micro: MicroBatch) -> list[torch.Tensor]:
    """Logits of each completion's tokens, its sequence the only one in the model's own forward pass."""
    return [
        model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, prompt_len:]
        for ids, prompt_len in sequences_of(micro)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_equals_one_sequence_at_a_time(family: str):
    model, micro = random_model(family), ragged()
    with torch.no_grad():
        expected = alone(model, micro)
        model.set_attn_implementation("packed")
        packed = output_head(model)(model.base_model(**packed_inputs(micro)).last_hidden_state[0])
    for place, logits in zip(runs(micro), expected, strict=True):
        # float32 sums in another order: 1e-5 of logits of size one
        torch.testing.assert_close(packed[place], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pass_asks_the_device_where_sequences_begin(family: str, monkeypatch: pytest.MonkeyPatch):
    """transformers looks for them in the positions, and waits for the answer, wherever it has a mask to make."""

    def ask(positions: torch.Tensor) -> None:
        raise AssertionError("the device was asked")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", ask)
    model = random_model(family)
    model.set_attn_implementation("packed")
    with torch.no_grad():
        model.base_model(**packed_inputs(ragged()))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_gradient_of_a_packed_forward_is_the_sum_over_the_sequences(share: float):
    model, micro = random_model("qwen2"), ragged()
    model.train()
    weights = [torch.randn(n, 128) for n in COMPLETION_LENS]
    loss = sum((logits * w).sum() for logits, w in zip(alone(model, micro), weights, strict=True))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model.set_attn_implementation("packed")
    checkpoint_activations(model, share)
    assert sum(layer.gradient_checkpointing for layer in model.model.layers) == 2 * share
    packed = output_head(model)(model.base_model(**packed_inputs(micro)).last_hidden_state[0])
    loss = sum((packed[place] * w).sum() for place, w in zip(runs(micro), weights, strict=True))
    actual = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_of_enormous_values_does_not_leak_in(family: str):
    model, micro = random_model(family), ragged()
    model.set_attn_implementation("packed")
    inputs = packed_inputs(micro)
    watched = runs(micro)[1]
    with torch.no_grad():
        calm = model.base_model(**inputs).last_hidden_state[0]
        beside = with_loud_neighbours(model, inputs, micro, 10_000.0)
    assert not torch.allclose(calm[runs(micro)[2]], beside[runs(micro)[2]])
    torch.testing.assert_close(beside[watched], calm[watched], rtol=1e-4, atol=1e-5)


def with_loud_neighbours(model: PreTrainedModel, inputs: dict, micro: MicroBatch, value: float) -> torch.Tensor:
    """Hidden states when every place but the second completion and its prompt (the first 3 places) has this embedding."""
    inputs = dict(inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    loud = torch.ones(len(micro.tokens), dtype=torch.bool)
    loud[:3] = loud[runs(micro)[1]] = False
    embeddings[:, loud] = value
    return model.base_model(inputs_embeds=embeddings, **inputs).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_kernels_are_this_models_alone(family: str):
    """Liger's own patch would send every later model of the family, on the CPU too, through its GPU kernels."""
    ids, before = torch.arange(3, 20).unsqueeze(0), random_model(family)
    expected = before(input_ids=ids).logits
    for _ in range(2):
        fused = random_model(family)
        own = [type(module).forward for module in fused.modules()]
        fuse_kernels(fused)
        # the model's own modules have changed, the ones of others have not
        forwards = [getattr(module.forward, "__func__", module.forward) for module in fused.modules()]
        assert forwards != own
    assert torch.equal(random_model(family)(input_ids=ids).logits, expected)
    assert torch.equal(before(input_ids=ids).logits, expected)


def test_what_attention_to_a_token_takes_is_counted_from_the_shapes():
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    dense = Qwen2Config(**sizes, intermediate_size=96)
    of_a_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96  # query, key, value, output; gate, up, down
    assert pair_cost(AutoModelForCausalLM.from_config(dense)) == pytest.approx(2 * 64 * 3 / (3 * of_a_layer))
    mixture = Qwen3MoeConfig(**sizes, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    of_a_layer = (
        64 * (64 + 32 + 32 + 64) + 2 * 3 * 64 * 32
    )  # two experts; the router, which is no linear layer, is small
    assert pair_cost(AutoModelForCausalLM.from_config(mixture)) == pytest.approx(
        2 * 64 * 3 / (3 * of_a_layer), rel=0.03
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for variable-length flash attention")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_over_packs_equals_sdpa_and_keeps_nan_neighbours_out(family: str, fused: bool):
    model, micro = random_model(family).to("cuda"), ragged().to(torch.device("cuda"))
    model.set_attn_implementation("packed")
    inputs, watched = packed_inputs(micro), runs(micro)[1]
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state[0]  # in float32
        if fused:
            fuse_kernels(model)
        actual = with_loud_neighbours(model.to(torch.bfloat16), inputs, micro, float("nan"))
    # bfloat16 keeps 8 bits: 2 % of hidden states of size one, over two layers
    torch.testing.assert_close(actual[watched].float(), expected[watched], rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for variable-length flash attention")
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_through_flash_attention_equal_those_in_float32(fused: bool):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model, micro = random_model("qwen2").to("cuda", dtype).train(), ragged().to(torch.device("cuda"))
        if fused and dtype == torch.bfloat16:
            fuse_kernels(model)
        model.set_attn_implementation("packed")
        hidden = model.base_model(**packed_inputs(micro)).last_hidden_state[0]
        logprobs, *_ = token_logprobs(
            hidden[micro.source_index], micro.targets, output_head(model), temperature=0.7, chunk_tokens=50
        )
        gradients.append(torch.autograd.grad(logprobs.mean(), list(model.parameters())))
    for exact, ours in zip(*gradients, strict=True):
        # bfloat16 keeps 8 bits, through two layers and back
        assert (ours.float() - exact).norm() < 0.03 * exact.norm()


def test_logits_of_a_float32_head_are_those_of_exact_sums():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((7, 64), (50, 64), (50,)))
    slope, found = torch.randn(7, 50), []
    for compute in (float32_linear, lambda *given: nn.functional.linear(*(each.double() for each in given))):
        given = [each.clone().requires_grad_() for each in (x, weight, bias)]
        logits = compute(*given)
        found.append((logits, *torch.autograd.grad((logits * slope).sum(), given)))
    (ours, *gradients), (exact, *expected) = found
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5 < 1e-2 < (exact.bfloat16() - exact).abs().max()
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() < 5e-3 * other.norm()  # 8 bits


@pytest.mark.parametrize("zero", [2, 3])
def test_a_policy_with_a_float32_head_trains_and_samples_with_it(tmp_path: Path, zero: int):
    norms, gaps = [], []
    for is_wide in (False, True):
        config = tiny_config(
            tmp_path / f"run-{is_wide}",
            model={"name": shallow(1), "dtype": "bfloat16", "float32_head": is_wide},
            distributed={"zero_stage": zero},
            rewards=VARIETY,
        )
        trainer = Trainer(config)
        policy, head = trainer.policy, torch.zeros(2, dtype=torch.long)
        with policy.sampling_model("paged") as lm:
            logits = output_head(lm)(lm.get_input_embeddings()(head))
        assert logits.dtype == (torch.float32 if is_wide else torch.bfloat16)
        metrics = trainer.train_step()
        norms.append(metrics["optimizer/grad_norm"])
        gaps.append(metrics["policy/sampling_gap"])
        trainer.close()
        distributed.stop()
    assert gaps[1] < 0.2 * gaps[0], "rounded logits are most of the gap"
    assert norms[1] == pytest.approx(norms[0], rel=0.5)  # of other samples


def test_a_float32_head_needs_an_output_layer_that_is_known(monkeypatch: pytest.MonkeyPatch):
    class Own(nn.Linear):
        pass

    def given(*_: Any, **__: Any) -> PreTrainedModel:
        lm = random_model("qwen2")
        lm.lm_head.__class__ = Own
        return lm

    monkeypatch.setattr("grpo.policy.language_model.from_source", given)
    with pytest.raises(ValueError, match=r"model\.float32_head is true; the output layer of Qwen2ForCausalLM is a Own"):
        load_lm(ModelConfig(name=str(TINY / "model"), float32_head=True), dtype=torch.bfloat16)


WHERE_KERNELS_RUN = (
    pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"
)  # there through Triton's interpreter


@pytest.mark.parametrize("device", [WHERE_KERNELS_RUN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "with_entropy"), [(50, True), (4096, False), (151_936, True)])
def test_the_kernels_over_logits_equal_the_plain_formulas(
    device: str, dtype: torch.dtype, size: int, with_entropy: bool
):
    from grpo.policy import logprob_kernels, logprobs

    torch.manual_seed(0)
    rows = 33 if device == "cuda" or size < 100_000 else 10  # the interpreter is slow
    logits = (4 * torch.randn(rows, size, device=device)).to(dtype)
    logits[:, 7] = float("-inf")
    logits[3] += 500
    targets = torch.randint(8, size, (rows,), device=device)
    targets[:9] = logits[:9].argmax(-1)
    ours = logprob_kernels.row_statistics(logits, targets, 0.7)
    plain = logprobs.plain_row_statistics(logits, targets, 0.7)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)  # logits of up to 700 in float32
    assert plain[3][:9].all()
    gradient = torch.randn((), device=device).expand(rows)
    before, other = logits.clone(), logits.clone()
    of_entropy = (plain[1], torch.randn(rows, device=device)) if with_entropy else None
    logprob_kernels.replace_by_gradient(logits, targets, plain[2], gradient, 0.7, of_entropy=of_entropy)
    logprobs.plain_replace_by_gradient(other, targets, plain[2], gradient, 0.7, of_entropy=of_entropy)
    # a gradient is a sum of parts, each a probability times something, and an exponent of 714 is rounded by 6e-5
    scaled = before.double() / 0.7
    probability = scaled.softmax(-1)
    parts = probability * (1 + scaled.log_softmax(-1).abs().nan_to_num(posinf=0) + plain[1].unsqueeze(1))
    parts[torch.arange(rows), targets] += 1
    rounding = 1e-6 * scaled.where(scaled.isfinite(), 0.0).abs().amax(-1, keepdim=True)
    allowed = (1e-2 if dtype == torch.bfloat16 else 1e-4) * other.abs() + rounding * parts
    assert other.isfinite().all()
    assert ((logits - other).abs() <= allowed).all()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_and_entropy_equal_the_plain_formula(chunk_tokens: int, temperature: float):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 50, bias=False, dtype=torch.float64)
    targets = torch.randint(50, (10,))
    targets[:3] = head(hidden)[:3].argmax(-1)
    logprobs, entropy, likeliest = token_logprobs(
        hidden, targets, head, temperature=temperature, chunk_tokens=chunk_tokens
    )
    distribution = torch.distributions.Categorical(logits=head(hidden).float() / temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(targets))
    torch.testing.assert_close(entropy, distribution.entropy())
    assert likeliest.tolist() == (head(hidden).argmax(-1) == targets).tolist()
    weights, bonuses = torch.randn(2, 10)

    for of_logprobs, of_entropy in ((weights, None), (None, bonuses), (weights, bonuses)):
        logprobs, entropy, _ = token_logprobs(hidden, targets, head, temperature=temperature, chunk_tokens=chunk_tokens)
        pairs = [(logprobs, distribution.log_prob(targets), of_logprobs), (entropy, distribution.entropy(), of_entropy)]
        ours, plain = (
            sum((factor * pair[which]).sum() for *pair, factor in pairs if factor is not None) for which in (0, 1)
        )
        actual = torch.autograd.grad(ours, [hidden, head.weight])
        expected = torch.autograd.grad(plain, [hidden, head.weight], retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # of float32 inside


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
            with torch.no_grad(), policy.sampling_model() as lm:
                logits = lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1].cpu()
            fresh = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
            # cached keys and left padding in float32: 1e-4 of a log-probability
            torch.testing.assert_close(torch.tensor(completion.logprobs), fresh, rtol=0, atol=1e-4)


def test_the_trainers_logprobs_equal_the_sampling_logprobs(policy: Policy, groups: list[Group]):
    batch = pack(groups, torch.ones(len(groups), 4))
    for part in (batch, take(batch, [5, 0, 17])):
        micro = micro_batch(part, torch.ones_like(part.sampling_logprobs)).to(policy.processes.device)
        torch.testing.assert_close(policy.old_logprobs(micro), micro.sampling_logprobs, rtol=0, atol=1e-4)


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
    with torch.no_grad(), policy.sampling_model() as lm:
        logits = lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1]
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


FALCON = FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
OPT = OPTConfig(
    vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
)


def test_a_family_that_packing_does_not_fit_is_refused(tmp_path: Path):
    """Falcon does not hand its attention what tells sequences apart, so each would see those before it."""
    model = {"name": str(save_family(tmp_path / "falcon", FALCON)), "dtype": "float32"}
    config = tiny_config(tmp_path, model=model)
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
    trainer.collector.generator = FixedGenerator()
    policy = trainer.policy
    with policy.sampling_model() as lm:
        before = lm.model.layers[0].mlp.up_proj.weight.detach().float().clone()
    trainer.train_step()
    policy.sync()
    trainer.close()
    with policy.sampling_model() as lm:
        moved = (lm.model.layers[0].mlp.up_proj.weight.detach().float() - before).abs()
    assert float(moved.median()) == pytest.approx(0.5, rel=0.01)  # 0.37 if a step of zeros were counted before


@pytest.mark.parametrize("samples", [True, False])
def test_a_sharded_model_has_the_buffers_of_the_one_that_is_sampled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: bool
):
    """As transformers 5.17 loads a model under ZeRO-3: its rotary frequencies rounded to bfloat16."""
    original = grpo.policy.policy.load_lm

    def rounded(*args: Any, **options: Any) -> PreTrainedModel:
        lm = original(*args, **options)
        if is_deepspeed_zero3_enabled():
            rotary = lm.base_model.rotary_emb
            rotary.inv_freq = rotary.inv_freq.bfloat16()
        return lm

    monkeypatch.setattr(grpo.policy.policy, "load_lm", rounded)
    model = {"name": str(TINY / "model"), "dtype": "bfloat16"}
    config = tiny_config(
        tmp_path, model=model, distributed={"zero_stage": 3}, algorithm={"kl_coef": 0.1, "reference_refresh_steps": 1}
    )
    expected = original(config.model, dtype=torch.bfloat16).base_model.rotary_emb.inv_freq
    processes = distributed.start(config, dtype=torch.bfloat16)
    policy = Policy(config, load_tokenizer(config.model), processes, samples=samples)
    if samples:
        with policy.sampling_model() as lm:
            assert torch.equal(lm.base_model.rotary_emb.inv_freq, expected)
    assert expected.dtype == torch.float32
    assert not torch.equal(expected, expected.bfloat16().float())
    assert policy.reference is not None
    for model in (policy.lm, policy.reference.module.lm):
        assert torch.equal(model.base_model.rotary_emb.inv_freq, expected)


def test_capped_attention_logits_are_refused(tmp_path: Path):
    capped = Gemma2Config(**SIZES, attn_logit_softcapping=5.0)
    config = tiny_config(tmp_path / "run", model={"name": str(save_family(tmp_path / "gemma2", capped))})
    with pytest.raises(ValueError, match=r"caps its attention logits at 5\.0"):
        Trainer(config)


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
        ValueError,
        match=r"may have 120 tokens, and the rotary embedding \(longrope\) .* changes .* longer than 119 tokens",
    ):
        check_context(config)
    config.rollout.max_completion_tokens = 23
    check_context(config)


def test_a_model_that_is_not_there_is_refused_by_its_setting():
    with pytest.raises(ValueError, match=re.escape("model.name is '/nowhere/model'; there is no such directory")):
        load_tokenizer(ModelConfig(name="/nowhere/model"))


def sharded(tmp_path: Path, **sections: Any) -> Policy:
    """Of a process that does not sample."""
    config = tiny_config(tmp_path / "run", distributed={"zero_stage": 3}, **sections)
    processes = distributed.start(config, dtype=torch.float32)
    return Policy(config, load_tokenizer(config.model), processes, samples=False)


def test_a_model_that_nobody_holds_whole_is_compared_with_itself_as_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before kernels and DeepSpeed are there: a run does not begin with a forward pass that is another."""
    policy = sharded(tmp_path)
    assert not policy.holds_whole
    with pytest.raises(RuntimeError, match="no process of this run holds the whole model"), policy.sampling_model():
        pass
    packed = Policy._packed

    def with_other_frequencies(policy: Policy, lm: PreTrainedModel) -> Any:
        lm.base_model.rotary_emb.inv_freq.mul_(0.6)
        return packed(policy, lm)

    monkeypatch.setattr(Policy, "_packed", with_other_frequencies)
    with pytest.raises(ValueError, match="the log-probabilities of packed sequences differ by"):
        sharded(tmp_path)


def test_adapters_keep_a_whole_copy_though_nobody_samples(tmp_path: Path):
    policy = sharded(tmp_path, lora={"rank": 4}, optimizer={"learning_rate": 1e-3})
    assert policy.holds_whole
    with policy.sampling_model() as lm:
        assert lm is not policy.lm
