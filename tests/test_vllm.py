"""Both modes of the vLLM engine against a double that really samples with the tiny model; see fake_vllm.py."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import LLM, VLLMServer, installed
from helpers import TINY, launch, tiny_config
from torch import Tensor

from grpo.algorithm.batch import micro_batch, pack
from grpo.config import Config, Section, VLLMConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout import make_generator
from grpo.rollout.hf import HFGenerator
from grpo.rollout.vllm import Request, Sampled, VLLMGenerator, check_available
from grpo.rollout.vllm_server import ServerError
from grpo.system import distributed
from grpo.trainer import Trainer
from grpo.types import Completion, Group, Prompt, Sampling

MODEL = str(TINY / "model")
MODES = ("colocated", "server")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    config = tiny_config(tmp_path_factory.mktemp("run"))
    return Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))


@pytest.fixture(autouse=True)
def same_weights(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test may update the shared policy; the next one finds it as it was."""
    if "policy" not in request.fixturenames:
        yield
        return
    policy = request.getfixturevalue("policy")
    before = [parameter.clone() for parameter in policy.lm.parameters()]
    yield
    copy_weights(policy, before)


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    return build_prompts(load_rows(policy._config.data)[:4], policy.tokenizer, policy._config.data)[0]


@pytest.fixture
def server() -> Iterator[VLLMServer]:
    with VLLMServer(MODEL) as server:
        yield server


@pytest.fixture
def llm() -> Iterator[type[LLM]]:
    with installed() as llm:
        yield llm


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, llm: type[LLM], server: VLLMServer) -> str:
    return request.param


def vllm_config(tmp_path: Path, mode: str, url: str | None, **sections: Any) -> Config:
    settings: dict[str, Any] = {"mode": mode}
    if mode == "server":
        settings |= {"url": url, "sync_dir": str(tmp_path / "sync"), "timeout_seconds": 20}
    sections["vllm"] = settings | sections.get("vllm", {})
    return tiny_config(tmp_path / "run", **{**sections, "rollout": {"engine": "vllm", **sections.get("rollout", {})}})


@pytest.fixture
def generator(mode: str, policy: Policy, server: VLLMServer, tmp_path: Path) -> VLLMGenerator:
    generator = make_generator(vllm_config(tmp_path, mode, server.url), policy)
    assert isinstance(generator, VLLMGenerator)
    return generator


def copy_weights(policy: Policy, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(policy.lm.parameters(), weights, strict=True):
            parameter.copy_(value)


def update(policy: Policy, size: float = 0.03) -> None:
    """Like an optimizer step: a small change of every weight."""
    generator = torch.Generator().manual_seed(1)
    moved = [p + size * p.std() * torch.randn(p.shape, generator=generator) for p in policy.lm.parameters()]
    copy_weights(policy, moved)


def fresh_logprobs(policy: Policy, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> Tensor:
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    with torch.no_grad(), policy.sampling_model() as lm:
        logits = lm(input_ids=ids, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
    chosen = torch.tensor(completion.token_ids).unsqueeze(1)
    return (logits / temperature).log_softmax(-1).gather(1, chosen).squeeze(1)


def gap(policy: Policy, groups: list[Group], temperature: float = 1.0) -> float:
    """Largest difference between sampled log-probabilities and those of a fresh forward pass."""
    return max(
        float((torch.tensor(each.logprobs) - fresh_logprobs(policy, group.prompt, each, temperature)).abs().max())
        for group in groups
        for each in group.completions
    )


ROUNDING = 1e-4  # float32 with cached keys against one pass


def test_each_group_is_handed_on_once(generator: VLLMGenerator, prompts: list[Prompt]):
    handed_on: dict[int, Group] = {}
    groups = generator.sample(
        prompts,
        Sampling(max_tokens=8),
        num_completions=3,
        seed=3,
        on_group=lambda p, group: handed_on.update({p: group}),
    )
    assert [handed_on[p] for p in range(len(prompts))] == groups


def test_a_served_group_is_handed_on_while_others_are_still_asked_for(
    served: VLLMGenerator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    first = threading.Event()
    complete = served.engine._complete

    def patient(request: Request) -> Sampled:
        assert request.token_ids == prompts[0].token_ids or first.wait(20), "the first group never came"
        return complete(request)

    monkeypatch.setattr(served.engine, "_complete", patient)
    order = []
    served.sample(
        prompts[:3],
        Sampling(max_tokens=8),
        num_completions=2,
        seed=3,
        on_group=lambda p, group: (order.append(p), first.set()),
    )
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


# Log-probabilities.


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
def test_logprobs_equal_a_fresh_forward_pass_at_the_sampling_temperature(
    generator: VLLMGenerator, policy: Policy, prompts: list[Prompt], temperature: float
):
    sampling = Sampling(max_tokens=24, temperature=temperature)
    groups = generator.sample(prompts, sampling, num_completions=3, seed=3)
    assert "stop" in {each.finish_reason for group in groups for each in group.completions}
    assert gap(policy, groups, temperature or 1.0) < ROUNDING


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}], ids=lambda cut: next(iter(cut)))
def test_logprobs_are_of_the_whole_vocabulary_where_tokens_are_left_out(
    mode: str, cut: dict[str, Any], policy: Policy, prompts: list[Prompt], llm: type[LLM], tmp_path: Path
):
    with VLLMServer(MODEL, logprobs_mode="raw_logprobs") as server:
        config = vllm_config(tmp_path, mode, server.url, rollout=cut)
        groups = VLLMGenerator(policy, config).sample(prompts, config.sampling, num_completions=4, seed=3)
    assert gap(policy, groups) < ROUNDING
    for group in groups:
        for completion in group.completions:  # every token was among those left to draw from
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with torch.no_grad(), policy.sampling_model() as lm:
                probs = lm(input_ids=ids).logits[0, len(group.prompt.token_ids) - 1 : -1].softmax(-1)
            chosen = probs.gather(1, torch.tensor(completion.token_ids).unsqueeze(1))
            likelier = (probs * (probs > chosen)).sum(1)
            assert bool(((probs > chosen).sum(1) < cut.get("top_k", 10**6)).all())
            assert bool((likelier < cut.get("top_p", 1.0) + 1e-5).all())
            assert bool((chosen.squeeze(1) > cut.get("min_p", 0.0) * probs.max(1).values - 1e-6).all())


REFUSED_SAMPLING = [
    ({"rollout": {"temperature": 0.7, "top_p": 0.9}}, "rollout.temperature is 0.7; where top_k, top_p or min_p"),
    ({"rollout": {"temperature": 1.2, "top_k": 5}}, "rollout.temperature is 1.2; where top_k, top_p or min_p"),
    (
        {"evaluation": {"num_questions": 2, "temperature": 0.6, "top_p": 0.95}},
        "evaluation.temperature is 0.6; where top_k, top_p or min_p leave tokens out, as in evaluation",
    ),
    (
        {"rollout": {"temperature": 0.7}, "evaluation": {"num_questions": 2, "temperature": 1, "top_p": 0.95}},
        "rollout.temperature is 0.7; where top_k, top_p or min_p leave tokens out, as in evaluation",
    ),
    ({"rollout": {"min_p": 0.1, "top_p": 0.9}}, "rollout.min_p is 0.1 and rollout.top_p 0.9; vLLM takes top_p of what"),
    ({"rollout": {"temperature": 0.001}}, "rollout.temperature is 0.001; vLLM would sample at 0.01"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED_SAMPLING)
def test_sampling_whose_logprobs_vllm_cannot_tell_is_refused(tmp_path: Path, sections: dict[str, Any], message: str):
    tiny_config(tmp_path, **sections)  # another engine can
    with pytest.raises(ValueError, match=re.escape(message)):
        vllm_config(tmp_path, "colocated", None, **sections)


def test_evaluation_settings_that_no_evaluation_uses_do_not_matter(tmp_path: Path):
    config = vllm_config(tmp_path, "colocated", None, evaluation={"temperature": 0.6, "top_p": 0.95})
    assert config.vllm_logprobs_mode == "processed_logprobs"


# Where completions end.


def test_every_end_token_ends_a_completion_and_is_part_of_it(
    generator: VLLMGenerator, policy: Policy, prompts: list[Prompt]
):
    options: dict[str, Any] = {"num_completions": 4, "seed": 3}
    free = generator.sample(prompts, Sampling(max_tokens=24), **options)
    known = set(policy.end_token_ids)
    other = next(token for token in free[0].completions[0].token_ids[1:] if token not in known)
    generator.ending.end_token_ids.append(other)
    try:
        groups = generator.sample(prompts, Sampling(max_tokens=24), **options)
    finally:
        generator.ending.end_token_ids.remove(other)
    completions = [each for group in groups for each in group.completions]
    assert {each.token_ids[-1] for each in completions if each.finish_reason == "stop"} == {*known, other}
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert not {*known, other} & set(completion.token_ids[:-1])
    assert gap(policy, groups) < ROUNDING


def test_without_an_end_token_nothing_ends_a_completion_before_its_limit(
    generator: VLLMGenerator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generator, "ending", replace(generator.ending, end_token_ids=[]))
    groups = generator.sample(prompts, Sampling(max_tokens=24), num_completions=4, seed=3)
    assert {len(each.token_ids) for group in groups for each in group.completions} == {24}


def answers(generator: VLLMGenerator, requests: list[Request]) -> list[Sampled]:
    found: dict[int, Sampled] = {}
    generator.engine.generate(requests, found.__setitem__)
    return [found[place] for place in range(len(requests))]


def test_vllm_itself_stops_where_completions_end(generator: VLLMGenerator, prompts: list[Prompt]):
    """Ending would cut what ran on; but tokens behind the end would cost time and could hit the limit."""
    wanted = [replace(prompt, max_tokens=12) for prompt in prompts for _ in range(3)]
    requests = [
        generator._request(prompt, Sampling(max_tokens=40, stop=("=",)), seed=str(place))
        for place, prompt in enumerate(wanted)
    ]
    ends = set()
    for sampled in answers(generator, requests):
        end = generator.ending.find(sampled.token_ids, ("=",))
        assert (len(sampled.token_ids), sampled.finish_reason) == end
        assert len(sampled.token_ids) <= 12
        ends.add(end[1])
    assert ends == {"stop", "length"}
    generator.ending.end_token_ids.append(sampled.token_ids[0])
    try:
        request = generator._request(wanted[-1], Sampling(max_tokens=40), seed=str(len(wanted) - 1))
    finally:
        generator.ending.end_token_ids.pop()
    (again,) = answers(generator, [request])
    assert (again.token_ids, again.finish_reason) == (sampled.token_ids[:1], "stop")


def test_a_stop_text_ends_a_completion_and_stays_part_of_it(
    generator: VLLMGenerator, policy: Policy, prompts: list[Prompt]
):
    groups = generator.sample(prompts, Sampling(max_tokens=40, stop=("=",)), num_completions=4, seed=1)
    stopped = [each for group in groups for each in group.completions if "=" in each.text]
    assert len(stopped) >= 8
    for completion in stopped:
        assert completion.finish_reason == "stop"
        assert completion.text.endswith("=")
        assert completion.text.count("=") == 1
        assert policy.tokenizer.decode(completion.token_ids) == completion.text
    assert gap(policy, groups) < ROUNDING


def test_a_prompts_own_limit_and_prefill_are_kept(generator: VLLMGenerator, prompts: list[Prompt]):
    wanted = [replace(prompts[0], max_tokens=3, prefill="<think>"), prompts[1]]
    first, second = generator.sample(wanted, Sampling(max_tokens=9), num_completions=2, seed=0)
    assert max(len(each.token_ids) for each in first.completions) == 3
    assert max(len(each.token_ids) for each in second.completions) == 9
    assert all(each.text.startswith("<think>") for each in first.completions)


def test_a_completion_that_ended_for_no_known_reason_stops_the_run(
    generator: VLLMGenerator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    """An aborted request, or vLLM's own idea of an end: scored, it would count as cut off at the limit."""
    generate = generator.engine.generate
    monkeypatch.setattr(
        generator.engine,
        "generate",
        lambda requests, on_answer: generate(
            requests,
            lambda place, each: on_answer(
                place, each._replace(token_ids=[20, 30], logprobs=[-1.0, -1.0], finish_reason="abort")
            ),
        ),
    )
    with pytest.raises(RuntimeError, match="after 2 of 9 tokens, for the reason 'abort'"):
        generator.sample(prompts[:1], Sampling(max_tokens=9), num_completions=1, seed=0)


def test_the_models_own_sampling_defaults_do_not_leak_in(mode: str, generator: VLLMGenerator, llm: type[LLM]):
    if mode == "colocated":
        assert llm.instances[0].options["generation_config"] == "vllm"
    else:  # what the server was started with is checked; see REFUSED_SERVERS
        assert generator.engine.server.get("/server_info?config_format=json")["vllm_config"]["model_config"]


# Order and seeds.


def test_completions_come_back_with_their_prompts(generator: VLLMGenerator, policy: Policy, prompts: list[Prompt]):
    """Greedy completions of unlike prompts, in two orders; a neighbour's would have another fresh log-probability."""
    greedy = Sampling(max_tokens=12, temperature=0.0)
    groups = generator.sample(prompts, greedy, num_completions=2, seed=0)
    assert [group.prompt for group in groups] == prompts
    assert len({group.completions[0].text for group in groups}) == len(prompts)
    assert generator.sample(prompts[::-1], greedy, num_completions=2, seed=0) == groups[::-1]
    expected = HFGenerator(policy, max_sequences=1).sample(prompts, greedy, num_completions=2, seed=0)
    assert [g.completions[0].token_ids for g in groups] == [g.completions[0].token_ids for g in expected]


def test_the_seed_and_the_place_decide_the_sample_and_nothing_else(generator: VLLMGenerator, prompts: list[Prompt]):
    sampling = Sampling(max_tokens=12)
    all_of_them = generator.sample(prompts, sampling, num_completions=3, seed=1)
    assert generator.sample(prompts, sampling, num_completions=3, seed=1) == all_of_them
    assert generator.sample(prompts[:2], sampling, num_completions=3, seed=1) == all_of_them[:2]
    assert generator.sample(prompts, sampling, num_completions=3, seed=2) != all_of_them
    assert len({tuple(each.token_ids) for each in all_of_them[0].completions}) > 1


def test_no_prompts_give_no_groups(generator: VLLMGenerator):
    assert generator.sample([], Sampling(max_tokens=4), num_completions=2, seed=0) == []


# Weights.


def test_after_a_sync_the_weights_are_the_new_ones(generator: VLLMGenerator, policy: Policy, prompts: list[Prompt]):
    sampling = Sampling(max_tokens=16)
    before = generator.sample(prompts, sampling, num_completions=2, seed=1)
    update(policy)
    assert gap(policy, before) > 100 * ROUNDING  # old weights would be seen
    generator.sync()
    after = generator.sample(prompts, sampling, num_completions=2, seed=1)  # the same prompts, which were cached
    assert gap(policy, after) < ROUNDING
    again = generator.sample(
        prompts, sampling, num_completions=2, seed=1
    )  # as an evaluation, without an update between
    assert again == after


def test_a_colocated_engine_cannot_sample_with_old_weights(
    policy: Policy, prompts: list[Prompt], llm: type[LLM], tmp_path: Path
):
    """Not even without a sync: it has none but those it loads for each call."""
    generator = VLLMGenerator(policy, vllm_config(tmp_path, "colocated", None))
    (engine,) = llm.instances
    assert engine.calls == ["sleep 2"]
    update(policy)
    assert gap(policy, generator.sample(prompts, Sampling(max_tokens=8), num_completions=1, seed=1)) < ROUNDING
    wake = ["wake_up ['weights']", "reload_weights", "wake_up ['kv_cache']", "reset_prefix_cache"]
    assert engine.calls == ["sleep 2", *wake, "generate", "sleep 2"]


def test_a_colocated_engine_sleeps_after_an_error_too(
    policy: Policy, prompts: list[Prompt], llm: type[LLM], tmp_path: Path
):
    generator = VLLMGenerator(policy, vllm_config(tmp_path, "colocated", None))
    with pytest.raises(ValueError, match="max_model_len of 120"):
        generator.sample(prompts, Sampling(max_tokens=120), num_completions=1, seed=1)
    assert llm.instances[0].asleep == {"weights", "kv_cache"}


def test_a_forgotten_sync_with_a_server_is_refused(
    policy: Policy, prompts: list[Prompt], server: VLLMServer, tmp_path: Path
):
    generator = VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))
    update(policy)
    with pytest.raises(RuntimeError, match=re.escape("sync() belongs after every update")):
        generator.sample(prompts, Sampling(max_tokens=4), num_completions=1, seed=1)


def test_an_update_without_a_sync_is_refused_however_small_it_was(
    policy: Policy, prompts: list[Prompt], server: VLLMServer, tmp_path: Path
):
    """Also where no process can ask the policy by itself."""
    generator = VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))
    groups = generator.sample(prompts[:1], Sampling(max_tokens=4), num_completions=1, seed=1)
    micro = micro_batch(pack(groups, torch.zeros(1, 1)), torch.zeros(len(groups[0].completions[0].token_ids)))
    policy.backward(policy.logprobs(micro)[0].sum(), last=True)
    policy.optimizer_step(0.0)
    with pytest.raises(RuntimeError, match=r"\(1 times; .* sync\(\) belongs after every update"):
        generator.sample(prompts, Sampling(max_tokens=4), num_completions=1, seed=1)
    generator.sync()
    generator.sample(prompts[:1], Sampling(max_tokens=4), num_completions=1, seed=1)


@pytest.fixture
def served(policy: Policy, server: VLLMServer, tmp_path: Path) -> VLLMGenerator:
    return VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))


@pytest.mark.parametrize("size", [0.001, 0.03, 1.0])
def test_a_server_that_keeps_its_old_weights_is_noticed(
    served: VLLMGenerator, policy: Policy, server: VLLMServer, size: float
):
    """From a change that is far below the sampling gap's limit to one far above."""
    server.ignores_reload = True
    update(policy, size)
    with pytest.raises(ServerError, match=r"kept its old weights|off the policy's on average") as caught:
        served.sync()
    assert "may not have the policy's weights" in str(caught.value)


def test_an_update_that_changes_nothing_is_not_taken_for_old_weights(served: VLLMGenerator, policy: Policy):
    for size in (0.0, 1e-6, 0.0):
        update(policy, size)
        served.sync()


def test_a_server_that_does_not_reset_its_prefix_cache_is_noticed(
    served: VLLMGenerator, policy: Policy, prompts: list[Prompt], server: VLLMServer
):
    served.sample(prompts, Sampling(max_tokens=16), num_completions=2, seed=1)
    update(policy)
    server.keeps_prefix_cache = server.is_busy = True
    with pytest.raises(ServerError, match="did not reset its prefix cache"):
        served.sync()
    server.is_busy = (
        False  # it says that it did: only the log-probabilities can tell, which policy/sampling_gap watches
    )
    served.sync()
    stale = served.sample(prompts, Sampling(max_tokens=16), num_completions=2, seed=1)
    assert gap(policy, stale) > 100 * ROUNDING


def test_a_restarted_server_is_noticed(served: VLLMGenerator, prompts: list[Prompt], server: VLLMServer):
    server.restart()
    with pytest.raises(ServerError, match=r"weights 'default' and not 'weights-.*restarted, or another run uses it"):
        served.sample(prompts, Sampling(max_tokens=4), num_completions=1, seed=1)


def test_a_server_without_tags_is_told_by_what_it_says_of_plain_text(
    policy: Policy, prompts: list[Prompt], server: VLLMServer, tmp_path: Path
):
    """vLLM 0.26."""
    server.keeps_tags = False
    served = VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))
    update(policy)
    served.sync()
    assert gap(policy, served.sample(prompts, Sampling(max_tokens=8), num_completions=1, seed=1)) < ROUNDING
    server.restart()
    with pytest.raises(ServerError, match=r"other weights than it was given, .* restarted, or another run uses it"):
        served.sample(prompts, Sampling(max_tokens=4), num_completions=1, seed=1)
    assert "/update_weight_version" not in {each["path"] for each in server.requests}
    server.restart()
    served.sync()

    def collective(*_: object) -> None:
        raise AssertionError("a process without a prompt would not join it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy.processes), "broadcast", collective)
        served.sample(prompts, Sampling(max_tokens=4), num_completions=1, seed=1)


def test_a_server_with_other_weights_takes_the_policys_at_the_start(
    policy: Policy, prompts: list[Prompt], server: VLLMServer, tmp_path: Path
):
    update(policy)
    generator = VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))
    assert gap(policy, generator.sample(prompts, Sampling(max_tokens=8), num_completions=1, seed=1)) < ROUNDING


def test_a_server_with_other_weights_that_keeps_them_is_noticed(policy: Policy, server: VLLMServer, tmp_path: Path):
    server.ignores_reload = True
    update(policy, 1.0)
    with pytest.raises(
        ServerError, match=r"nats off the policy's on average, more than 0.001; algorithm.max_sampling_gap"
    ):
        VLLMGenerator(policy, vllm_config(tmp_path, "server", server.url))


def test_weights_do_not_pile_up_and_never_have_the_same_name(
    served: VLLMGenerator, policy: Policy, server: VLLMServer, tmp_path: Path
):
    served.sync()
    paths = [each["kwargs"]["weights_path"] for each in server.requests if each["path"] == "/collective_rpc"]
    assert len(set(paths)) == len(paths) == 2
    assert {Path(path).parent for path in paths} == {tmp_path / "sync"}
    assert list((tmp_path / "sync").iterdir()) == []


# Servers that are not there, or not the right ones.


def test_a_server_that_is_not_there_is_refused_before_a_model_loads(tmp_path: Path, server: VLLMServer):
    server.end()
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"vllm.url is '{server.url}'.*gave no answer to /v1/models.*docs/vllm.md"):
        check_available(vllm_config(tmp_path, "server", server.url))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("dies_on", ["/v1/completions", "/collective_rpc", "/weight_info"])
def test_a_server_that_falls_silent_ends_the_run_within_the_timeout(
    policy: Policy, prompts: list[Prompt], server: VLLMServer, tmp_path: Path, dies_on: str
):
    config = vllm_config(tmp_path, "server", server.url, vllm={"timeout_seconds": 1.5})
    generator = VLLMGenerator(policy, config)
    server.hang_on = dies_on
    started = time.monotonic()
    with pytest.raises(ServerError, match=rf"no answer to {dies_on} within vllm.timeout_seconds \(1.5\)"):  # noqa: PT012
        generator.sync()
        generator.sample(prompts, Sampling(max_tokens=4), num_completions=8, seed=1)
    assert time.monotonic() - started < 20


def test_a_server_that_dies_ends_the_run(served: VLLMGenerator, prompts: list[Prompt], server: VLLMServer):
    server.end()
    with pytest.raises(ServerError, match="gave no answer"):
        served.sample(prompts, Sampling(max_tokens=4), num_completions=2, seed=1)
    with pytest.raises(ServerError, match="gave no answer"):
        served.sync()


def test_an_error_of_the_server_is_shown(served: VLLMGenerator, prompts: list[Prompt], server: VLLMServer):
    with pytest.raises(ServerError, match=r"answered 500 to /v1/completions: .*max_model_len of 120"):
        served.sample(prompts, Sampling(max_tokens=120), num_completions=1, seed=1)


REFUSED_SERVERS = [
    ({"max_model_len": 119}, "takes 119 tokens, and a sequence may have 120"),
    ({"logprobs_mode": "raw_logprobs"}, "has logprobs_mode 'raw_logprobs'.*--logprobs-mode processed_logprobs"),
    ({"generation_config": "auto"}, "has generation_config 'auto'.*--generation-config vllm"),
    ({"dtype": "bfloat16"}, "has dtype 'torch.bfloat16'.*--dtype float32"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_SERVERS)
def test_a_server_with_the_wrong_options_is_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with VLLMServer(MODEL, **options) as server, pytest.raises(ValueError, match=message):
        check_available(vllm_config(tmp_path, "server", server.url))


def test_a_server_with_another_model_is_refused(tmp_path: Path, server: VLLMServer):
    config = vllm_config(tmp_path, "server", server.url, model={"name": "some/other"})
    with pytest.raises(ValueError, match=f"serves '{MODEL}' and not model.name 'some/other'"):
        check_available(config)


def test_a_server_without_the_endpoints_for_weights_is_refused(tmp_path: Path, server: VLLMServer):
    server.dev_mode = False
    with pytest.raises(ValueError, match=r"answered 404 to /server_info.*VLLM_SERVER_DEV_MODE=1"):
        check_available(vllm_config(tmp_path, "server", server.url))


def test_a_server_that_fits_is_not_refused(tmp_path: Path, server: VLLMServer):
    check_available(vllm_config(tmp_path, "server", server.url))
    assert {each["path"] for each in server.requests} == {"/v1/models", "/server_info"}


# Settings.


def test_a_missing_package_is_refused_with_the_command_that_installs_it(tmp_path: Path):
    with pytest.raises(
        ValueError, match=re.escape("rollout.engine is vllm; the package vllm is not installed")
    ) as caught:
        check_available(vllm_config(tmp_path, "colocated", None))
    assert "pip install 'vllm>=0.26,<0.29'" in str(caught.value)


REFUSED_SETTINGS = [
    (
        {"vllm": {"url": "http://a:1"}},
        "vllm.url is 'http://a:1'; it has no effect with rollout.engine auto. Remove it.",
    ),
    ({"vllm": {"mode": "server"}}, "vllm.mode is 'server'; it has no effect with rollout.engine auto. Remove it."),
    (
        {"rollout": {"engine": "vllm"}, "vllm": {"sync_dir": "/a"}},
        "vllm.sync_dir is '/a'; it has no effect with vllm.mode colocated. Remove it.",
    ),
    (
        {"rollout": {"engine": "vllm"}, "vllm": {"timeout_seconds": 9}},
        "vllm.timeout_seconds is 9.0; it has no effect with vllm.mode colocated. Remove it.",
    ),
    ({"rollout": {"engine": "vllm"}, "vllm": {"mode": "server"}}, "vllm.url is missing; vllm.mode server needs it."),
    (
        {"rollout": {"engine": "vllm"}, "vllm": {"mode": "server", "url": "http://a:1"}},
        "vllm.sync_dir is missing; vllm.mode server needs it.",
    ),
    (
        {"rollout": {"engine": "vllm"}, "vllm": {"mode": "server", "url": "a:1", "sync_dir": "/a"}},
        "vllm.url is 'a:1'; it is not an address like http://127.0.0.1:8000.",
    ),
    (
        {
            "rollout": {"engine": "vllm"},
            "vllm": {"mode": "server", "url": "http://a:1", "sync_dir": "/a", "gpu_memory_utilization": 0.5},
        },
        "vllm.gpu_memory_utilization is 0.5; it has no effect with vllm.mode server. Remove it.",
    ),
    (
        {"rollout": {"engine": "vllm"}, "memory": {"kv_cache_gib": 2}},
        "memory.kv_cache_gib is 2.0; only the native engine reads it, and rollout.engine is vllm. Remove it.",
    ),
    (
        {"rollout": {"engine": "vllm", "fused_layers": False}},
        "rollout.fused_layers is False; only the native engine reads it",
    ),
    (
        {"rollout": {"engine": "hf", "fused_layers": False}},
        "rollout.fused_layers is False; only the native engine reads it",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED_SETTINGS)
def test_a_setting_without_effect_or_a_missing_one_is_refused(tmp_path: Path, sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(tmp_path, **sections)


def test_a_resolved_configuration_loads_again(tmp_path: Path):
    """It names every setting, those without effect at their defaults."""
    for config in (tiny_config(tmp_path), vllm_config(tmp_path, "server", "http://a:1")):
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert Config.load(tmp_path / "config.yaml") == config


def test_every_setting_is_read(
    policy: Policy,
    prompts: list[Prompt],
    server: VLLMServer,
    llm: type[LLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    configs = [vllm_config(tmp_path, mode, server.url) for mode in MODES]
    read = set()

    def watched(section: Section, name: str) -> object:
        if type(section) is VLLMConfig:
            read.add(name)
        return object.__getattribute__(section, name)

    monkeypatch.setattr(Section, "__getattribute__", watched, raising=False)
    for config in configs:
        VLLMGenerator(policy, config)
    assert set(VLLMConfig.model_fields) <= read
    (engine,) = llm.instances
    assert engine.options["gpu_memory_utilization"] == 0.3
    assert engine.options["max_model_len"] == 120
    assert engine.options["max_num_seqs"] == 256


# A whole run.


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_samples_with_the_weights_it_trains_and_a_resumed_one_with_those_it_restored(
    mode: str, zero_stage: int, tmp_path: Path, server: VLLMServer, llm: type[LLM]
):
    """Large steps, evaluations between them: stale weights would pass the sampling gap's limit, lowered to rounding."""
    config = vllm_config(
        tmp_path,
        mode,
        server.url,
        data={"eval_name": str(TINY / "test.jsonl")},
        rollout={"temperature": 0.8, "group_size": 2},
        optimizer={"learning_rate": 1e-2},
        algorithm={"kl_coef": 0.0, "num_minibatches": 1, "max_sampling_gap": 1e-3},
        evaluation={"num_questions": 2, "every_steps": 1},
        distributed={"zero_stage": zero_stage},
        run={"dir": str(tmp_path / "run"), "steps": 3, "resume": "auto"},
    )
    assert Trainer(config).train().name == "step-00000003"
    config.run.steps = 4
    with VLLMServer(MODEL) as restarted:  # with the weights of the start
        config.vllm.url = restarted.url if mode == "server" else None
        assert Trainer(config).train().name == "step-00000004"


def test_an_engine_that_is_not_there_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grpo.trainer.Policy", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="the package vllm is not installed"):
        Trainer(vllm_config(tmp_path, "colocated", None))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_sample_with_the_weights_they_train(mode: str, tmp_path: Path):
    """Under ZeRO-3, each with prompts of its own; and no process waits for one that lost the server."""
    printed = launch("worker_vllm.py", mode, str(tmp_path), processes=2)
    for rank in (0, 1):
        assert f"rank {rank} is done" in printed
        assert (f"rank {rank} was told: vllm.url is" in printed) == (mode == "server")
