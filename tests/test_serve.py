"""`grpo serve` on the quickstart's model: a real server on a port of this machine, OpenAI's own client among those who ask."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from browser import KEYS, browser, chromium
from helpers import QWEN, ROOT, TINY, clean_environment, read_json, tiny_settings

pytest.importorskip("starlette")
pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from openai import APIStatusError, OpenAI  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402

from grpo.cli import evaluate as cli_evaluate  # noqa: E402
from grpo.data.prompts import TEMPLATES, tokenize  # noqa: E402
from grpo.evaluation import asked, benchmark  # noqa: E402
from grpo.evaluation.endpoint import Endpoint, HostedModel  # noqa: E402
from grpo.inference import model as inference  # noqa: E402
from grpo.policy.tokenizer import load_tokenizer  # noqa: E402
from grpo.scoring.scorer import Scorer  # noqa: E402
from grpo.serving.app import Limits, Server  # noqa: E402
from grpo.serving.decoder import Served  # noqa: E402
from grpo.serving.models import Hosted, host  # noqa: E402
from grpo.serving.protocol import (  # noqa: E402
    ApiError,
    ChatRequest,
    CompletionRequest,
    Message,
    VerdictRequest,
    error_of,
)
from grpo.serving.run import bound  # noqa: E402
from grpo.serving.scheduler import Worker  # noqa: E402
from grpo.serving.text import Answer  # noqa: E402
from grpo.system.jsonl import read_jsonl  # noqa: E402
from grpo.types import Group, Prompt, Sampling  # noqa: E402

QUESTION = "Ava has 5 coins. Ben gives her 7 more. How many coins does Ava have?"
WORDS = {"model": "model", "messages": [{"role": "user", "content": QUESTION}]}


def options(model: Path | str, **given: Any) -> Namespace:
    """What the command line gives."""
    usual = dict.fromkeys(
        (
            "config",
            "template",
            "system",
            "temperature",
            "top_p",
            "max_tokens",
            "steps",
            "name",
            "kv_cache_gib",
            "max_context",
        )
    )
    return Namespace(model=str(model), trust_remote_code=False, max_sequences=8, **{**usual, **given})


@contextlib.contextmanager
def serving(
    models: list[Hosted], limits: Limits | None = None, around: Callable[[Any], Any] = lambda app: app
) -> Iterator[tuple[Server, int]]:
    server = Server(models, limits or Limits(seconds=100))
    listener = bound("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(around(server.app()), log_level="critical", lifespan="on"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server has not started"
        time.sleep(0.01)
    try:
        yield server, listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def models() -> Iterator[list[Hosted]]:
    with ExitStack() as stack:
        yield host(options(TINY / "model", max_tokens=200), stack)


@pytest.fixture(scope="module")
def served(models: list[Hosted]) -> Iterator[tuple[Server, int]]:
    with serving(models) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: tuple[Server, int]) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key="none", max_retries=0)


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a reply."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    with contextlib.closing(connection):
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(text) if is_json else text.decode()


def all_is_free(server: Server) -> bool:
    """Whether no slot and no page is anybody's; the thread of the device may need a moment for it."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        all_slots = [hosted.scheduler.slots for hosted in server.models.values()]
        idle = all(not slots and slots.num_free_pages == slots.num_pages for slots in all_slots)
        if idle and not any(server._num_open.values()):
            return True
        time.sleep(0.02)
    return False


# ---- the text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler() -> inference.Sampler:
    """What `grpo sample` samples with."""
    config = inference.sampling_config(str(TINY / "model"), max_prompt_tokens=200, max_completion_tokens=200)
    return inference.load(config, load_tokenizer(config.model))


def group_of(sampler: inference.Sampler, text: str, data: Any, sampling: Sampling, *, num: int, seed: int) -> Group:
    (ids,) = tokenize([text], sampler.tokenizer, data)
    return sampler.generator.sample([Prompt(0, ids, text, "", {})], sampling, num_completions=num, seed=seed)[0]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 2.0, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_text_is_that_of_grpo_sample_to_the_token(
    models: list[Hosted], served: tuple[Server, int], sampler: inference.Sampler, settings: dict[str, Any]
):
    """The same prompt, settings, seed and number of completions; beside requests with other settings."""
    sampling = Sampling(48, **settings)
    text = TEMPLATES["chat"].fill(QUESTION, sampler.tokenizer, models[0].data)
    group = group_of(sampler, text, models[0].data, sampling, num=4, seed=11)
    asked = {"model": "model", "prompt": text, "n": 4, "seed": 11, "max_tokens": 48, "logprobs": 1, **settings}
    asked = {"top_p": 1, **asked}  # as Sampling has it; the server's is 0.95
    chat = {**WORDS, **{name: value for name, value in asked.items() if name not in ("prompt", "logprobs")}}
    others = [{**asked, "temperature": 1.7, "top_k": 3, "seed": 5, "n": 3}, {**asked, "temperature": 0, "top_p": 1}]
    port = served[1]
    with ThreadPoolExecutor(4) as threads:
        beside = [threads.submit(ask, port, "/v1/completions", other) for other in others]
        ours = threads.submit(ask, port, "/v1/chat/completions", chat)
        status, reply = ask(port, "/v1/completions", {**asked, "prompt": group.prompt.token_ids})
        assert [each.result()[0] for each in beside] == [200, 200]
    assert status == 200
    assert [choice["text"] for choice in reply["choices"]] == [each.text for each in group.completions]
    assert [choice["finish_reason"] for choice in reply["choices"]] == [
        each.finish_reason for each in group.completions
    ]
    ends = sampler.model.end_token_ids
    for choice, completion in zip(reply["choices"], group.completions, strict=True):
        visible = completion.token_ids[:-1] if completion.token_ids[-1] in ends else completion.token_ids
        assert choice["logprobs"]["tokens"] == [models[0].token_text(token)[0] for token in visible]
    num_tokens = sum(len(each.token_ids) for each in group.completions)
    assert reply["usage"] == {
        "prompt_tokens": len(group.prompt.token_ids),
        "completion_tokens": num_tokens,
        "total_tokens": len(group.prompt.token_ids) + num_tokens,
    }
    for choice, completion in zip(ours.result()[1]["choices"], group.completions, strict=True):
        message = choice["message"]
        thought = message["reasoning"]
        assert thought == message["reasoning_content"]
        before, opened, rest = completion.text.partition("<think>")
        expected, _, after = rest.partition("</think>")
        assert (thought or "") == expected
        assert message["content"] == (before if before.strip() or not opened else "") + after


def test_a_long_prompt_is_read_in_pieces_and_a_short_one_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch):
    """No pass has more tokens than a piece, a short prompt that comes later draws its first token earlier, and the tokens are
    those after prompts that are read whole."""
    with ExitStack() as stack:
        (hosted,) = host(options(TINY / "model", max_tokens=200), stack)
        scheduler, decoder = hosted.scheduler, hosted.scheduler.decoder
        read, passes = decoder.read, []
        monkeypatch.setattr(decoder, "read", lambda prefixes: passes.append(read(prefixes)))

        def served(piece: int) -> tuple[list[list[int]], list[int]]:
            """Tokens of each, and which have drawn, turn by turn."""
            passes.clear()
            scheduler.piece = piece
            words = torch.randint(10, 400, (300,), generator=torch.Generator().manual_seed(0)).tolist()
            prompts = [words, words[7:277], words[40:52]]
            sequences = [Served(n, prompt, 12, seed=n, ignores_ends=True) for n, prompt in enumerate(prompts)]
            scheduler.add(sequences[:1])
            drawn = [update.sequence.index for update in scheduler.turn()]
            for sequence in sequences[1:]:
                scheduler.add([sequence])
            while scheduler:
                drawn += [update.sequence.index for update in scheduler.turn()]
            return [sequence.tokens for sequence in sequences], list(dict.fromkeys(drawn))

        with torch.no_grad():
            whole, _ = served(4096)
            assert passes[0] == 299
            pieces, order = served(32)
        assert order == [2, 0, 1]
        assert max(passes) == 32
        assert sum(passes) == 299 + 269 + 11
        assert pieces == whole
        assert not scheduler.slots.num_pages - scheduler.slots.num_free_pages


def test_log_probabilities_are_the_models_own(models: list[Hosted], client: OpenAI):
    """At temperature 1, whatever the tokens were drawn at."""
    lm, tokenizer = models[0].model.lm, models[0].tokenizer
    prompt = tokenizer("Ava has 5 coins.")["input_ids"]
    reply = client.completions.create(
        model="model",
        prompt=prompt,
        max_tokens=12,
        temperature=1.7,
        seed=3,
        logprobs=4,
        extra_body={"ignore_eos": True},
    )
    found = reply.choices[0].logprobs
    ids = models[0].tokenizer("".join(found.tokens), add_special_tokens=False)["input_ids"]
    drawn = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(token)[0] for token in found.tokens])
    assert len(drawn) == 12, ids
    with torch.no_grad():
        lm.set_attn_implementation("sdpa")
        logits = lm(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
        lm.set_attn_implementation("paged")
    expected = logits.float().log_softmax(-1)
    own = expected.gather(1, torch.tensor(drawn).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(found.token_logprobs), own, rtol=0, atol=1e-4)
    top = expected.topk(4, -1).values
    torch.testing.assert_close(
        torch.tensor([list(each.values()) for each in found.top_logprobs]), top, rtol=0, atol=1e-4
    )
    assert [len(each) for each in found.top_logprobs] == [4] * 12
    assert found.text_offset[1] == len(found.tokens[0])


def test_an_echo_has_the_log_probabilities_of_the_prompt(models: list[Hosted], client: OpenAI):
    """As lm-evaluation-harness asks for them: token ids, one more token, which may end the text, and what stands in front."""
    lm, hosted = models[0].model.lm, models[0]
    prompts = [
        hosted.raw_prompt(text) for text in (QUESTION, f"{QUESTION} <think> 5+7=12\n</think> <answer> 12 </answer>")
    ]
    given = {"model": "model", "prompt": prompts, "temperature": 0, "logprobs": 3, "echo": True}
    with torch.no_grad():
        lm.set_attn_implementation("sdpa")
        expected = [lm(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]
        lm.set_attn_implementation("paged")
    nothing_new = client.completions.create(**given, max_tokens=0).choices
    one_more = client.completions.create(**given, max_tokens=1).choices
    ended = [choice.finish_reason for choice in one_more]
    assert ended == ["length", "stop"]  # the second is at the end of its text, whose token is told, too
    for prompt, own, alone, longer in zip(prompts, expected, nothing_new, one_more, strict=True):
        found = alone.logprobs
        assert alone.text == hosted.ending.text(prompt) == "".join(found.tokens)
        assert alone.finish_reason == "length"
        assert [found.token_logprobs[0], found.top_logprobs[0]] == [None, None]
        taken = own[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), taken, rtol=0, atol=1e-4)
        best = torch.tensor([max(each.values()) for each in found.top_logprobs[1:]])
        torch.testing.assert_close(best, own[:-1].max(-1).values, rtol=0, atol=1e-4)
        assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(len(prompt))]
        assert longer.logprobs.token_logprobs[:-1] == found.token_logprobs
        assert longer.logprobs.token_logprobs[-1] == pytest.approx(float(own[-1].max()), abs=1e-4)
    pieces = [
        chunk.choices[0]
        for chunk in client.completions.create(**given | {"prompt": QUESTION}, max_tokens=3, stream=True)
    ]
    whole = client.completions.create(**given | {"prompt": QUESTION}, max_tokens=3).choices[0]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for piece in pieces for each in getattr(piece.logprobs, name)] == getattr(whole.logprobs, name)
    assert pieces[-1].finish_reason == whole.finish_reason == "length"


def chat(client: OpenAI, **given: Any) -> Any:
    extra = {name: given.pop(name) for name in ("top_k", "min_p") if name in given}
    return client.chat.completions.create(**{**WORDS, **given}, extra_body=extra)


def test_a_stream_put_together_is_the_answer(client: OpenAI):
    """With thoughts, several choices, log-probabilities and the usage; OpenAI's client reads it to [DONE]."""
    asked = {"n": 3, "seed": 2, "temperature": 1.3, "top_p": 1, "max_tokens": 60, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **asked)
    texts: dict[int, dict[str, str]] = {n: {"content": "", "reasoning": "", "reasoning_content": ""} for n in range(3)}
    tokens: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    reasons, usage, num_chunks = {}, None, 0
    for chunk in chat(client, **asked, stream=True, stream_options={"include_usage": True}):
        num_chunks += 1
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert chunk.usage is None
        choice = chunk.choices[0]
        for name, text in choice.delta.model_dump().items():
            if name in texts[0] and text:
                texts[choice.index][name] += text
        tokens[choice.index] += [] if choice.logprobs is None else choice.logprobs.content
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert num_chunks > 12
    assert usage == whole.usage
    for choice in whole.choices:
        own, message = texts[choice.index], choice.message
        assert own["content"] == message.content
        assert own["reasoning"] == own["reasoning_content"] == (message.reasoning or "")
        assert tokens[choice.index] == choice.logprobs.content
        assert reasons[choice.index] == choice.finish_reason
    assert any(choice.message.reasoning for choice in whole.choices)


def test_stop_texts_are_cut_off_also_within_tokens_and_end_the_work(served: tuple[Server, int], client: OpenAI):
    """As the engine ends: with the token that completes it, which counts."""
    asked = {"seed": 1, "temperature": 0, "max_tokens": 100}
    text = "".join(filter(None, (chat(client, **asked).choices[0].message.reasoning, "")))
    assert len(text) > 8
    stop = text[3:7]  # whatever tokens that takes
    cut = chat(client, **asked, stop=[stop, "never said"])
    assert cut.choices[0].message.reasoning == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta for chunk in chat(client, **asked, stop=stop, stream=True) if chunk.choices]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in pieces) == text[: text.index(stop)]
    assert cut.usage.completion_tokens < chat(client, **asked).usage.completion_tokens
    assert all_is_free(served[0])


def test_sixteen_requests_at_once_are_each_as_alone(served: tuple[Server, int]):
    """On eight slots, with settings, lengths and forms of all kinds."""
    rng = random.Random(0)

    def body(n: int) -> dict[str, Any]:
        question = f"{QUESTION} And {n} more?" if n % 3 else QUESTION
        settings = {"top_p": 1, **SETTINGS[n % len(SETTINGS)]}
        return {
            **WORDS,
            "messages": [{"role": "user", "content": question}],
            "seed": n,
            "n": 1 + n % 3,
            "max_tokens": rng.randint(5, 60),
            **settings,
        }

    bodies = [body(n) for n in range(16)]
    port = served[1]
    alone = [ask(port, "/v1/chat/completions", each) for each in bodies]
    assert {status for status, _ in alone} == {200}
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda each: ask(port, "/v1/chat/completions", each), bodies))
    assert [reply["choices"] for _, reply in together] == [reply["choices"] for _, reply in alone]


# ---- tools -----------------------------------------------------------------------------------------------------------

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
SAID = [
    '<think>hm</think>I look.\n<tool_call>\n{"name": "look", "arguments": {"word": "coin"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {"word": "é"}}\n</tool_call>',
    "It is 12.",
]


@pytest.fixture
def told(models: list[Hosted], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gives the model a chat template with tools, and lets it write what the list begins with, whatever it draws."""
    template, scripted = QWEN.replace("<|im_end|>", "<|endoftext|>"), list[str]()
    monkeypatch.setattr(models[0].tokenizer, "chat_template", template)

    class Scripted(Answer):
        def feed(self, tokens: list[int], *, has_ended: bool, ignores_ends: bool = False) -> Any:
            if not hasattr(self, "left"):
                self.left = models[0].tokenizer(f"{scripted[0]}<|endoftext|>")["input_ids"]
            now, self.left = self.left[: len(tokens)], self.left[len(tokens) :]
            return super().feed(now, has_ended=not self.left)

    monkeypatch.setattr("grpo.serving.generation.Answer", Scripted)
    return scripted


def test_openais_client_is_given_calls_and_hands_in_what_came_of_them(
    client: OpenAI, told: list[str], models: list[Hosted], monkeypatch: pytest.MonkeyPatch
):
    told[:] = SAID
    asked: dict[str, Any] = {"model": "model", "tools": [LOOK], "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    conversation: list[Any] = [{"role": "user", "content": "What is a coin?"}]
    reply = client.chat.completions.create(messages=conversation, logprobs=True, **asked).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert (reply.message.content, reply.message.reasoning) == ("I look.", "hm")
    calls = reply.message.tool_calls
    assert [(each.type, each.function.name, each.function.arguments) for each in calls] == [
        ("function", "look", '{"word": "coin"}'),
        ("function", "look", '{"word": "é"}'),
    ]
    pieces: dict[int, list[Any]] = {}
    content, reasons = "", []
    for chunk in client.chat.completions.create(messages=conversation, stream=True, **asked):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for each in choice.delta.tool_calls or []:
            pieces.setdefault(each.index, []).append(each)
    assert (content, reasons, sorted(pieces)) == ("I look.", ["tool_calls"], [0, 1])
    assert ["".join(each.function.arguments for each in pieces[n]) for n in (0, 1)] == [
        '{"word": "coin"}',
        '{"word": "é"}',
    ]
    assert all(pieces[n][0].id.startswith("call_") and pieces[n][0].function.name == "look" for n in (0, 1))
    single = client.chat.completions.create(messages=conversation, parallel_tool_calls=False, **asked).choices[0]
    assert len(single.message.tool_calls) == 1

    prompts: list[str] = []
    own = Hosted._tokens
    monkeypatch.setattr(
        Hosted, "_tokens", lambda self, text, *given: (prompts.append(text), own(self, text, *given))[1]
    )
    told.pop(0)
    conversation.append(reply.message.model_dump())
    conversation += [{"role": "tool", "tool_call_id": each.id, "content": f"{n} found"} for n, each in enumerate(calls)]
    last = client.chat.completions.create(messages=conversation, **asked).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "It is 12.", None)
    assert '"name": "look", "description": "Look a word up."' in prompts[0]
    assert (
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "look", "arguments": {"word": "coin"}}\n</tool_call>'
        in prompts[0]
    )
    assert prompts[0].endswith(
        "<|im_start|>user\n<tool_response>\n0 found\n</tool_response><|endoftext|>\n"
        "<|im_start|>user\n<tool_response>\n1 found\n</tool_response><|endoftext|>\n<|im_start|>assistant\n"
    )

    named = {"type": "function", "function": {"name": "look"}}
    told[:] = ['{"word": "x"}}\n</tool_call>']
    for choice, words, begun in (
        (named, '{"word": "x"}}\n</tool_call>', '<tool_call>\n{"name": "look", "arguments": '),
        ("required", '{"name": "look", "arguments": {"word": "x"}}</tool_call>', "<tool_call>\n"),
        ("none", "<tool_call>{}</tool_call>", ""),
    ):
        told[:] = [words]
        found = client.chat.completions.create(messages=conversation[:1], tool_choice=choice, **asked).choices[0]
        assert prompts[-1].endswith(f"<|im_start|>assistant\n{begun}")
        if choice == "none":
            assert "Look a word up" not in prompts[-1]
            assert (found.finish_reason, found.message.tool_calls) == ("stop", None)
            assert "<tool_call>" in found.message.content
        else:
            assert [each.function.arguments for each in found.message.tool_calls] == ['{"word": "x"}']


ONE_CALL = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls|length > 1 %}
{{ raise_exception("This model only supports single tool-calls at once!") }}{% endif %}{{ m.role }}:
{{ m.content | tojson if m.role == "tool" else m.content }}<|endoftext|>{% endfor %}{{ add_generation_prompt }}"""
"""As Llama 3's: a call in a turn at most, and results as JSON."""


def test_a_template_that_refuses_two_calls_is_refused_and_results_as_json_are_no_loss(
    served: tuple[Any, int], models: list[Hosted], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models[0].tokenizer, "chat_template", ONE_CALL)
    status, reply = ask(served[1], "/v1/chat/completions", {**WORDS, "tools": [LOOK]})
    assert (status, reply["error"]["param"]) == (400, "tools")
    assert (
        "two calls (This model only supports single tool-calls at once!). Leave them out" in reply["error"]["message"]
    )
    result = ' {"word": "é\n"} '
    said = [Message(role="user", content="x"), Message(role="tool", content=result)]
    ids, _ = models[0].chat_prompt(said, None)
    assert json.dumps(result, ensure_ascii=False) in models[0].tokenizer.decode(ids)


def test_what_a_tool_answered_is_not_lost_in_a_template_without_tools(
    models: list[Hosted], monkeypatch: pytest.MonkeyPatch
):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    monkeypatch.setattr(models[0].tokenizer, "chat_template", template)
    with pytest.raises(ApiError, match=r"messages.1 is what a tool answered; the chat template of model leaves it out"):
        models[0].chat_prompt([Message(role="user", content="x"), Message(role="tool", content="5 coins")], None)
    template = QWEN.replace("<|im_end|>", "<|endoftext|>") + "{% if add_generation_prompt %}<think>{% endif %}"
    monkeypatch.setattr(models[0].tokenizer, "chat_template", template)
    with pytest.raises(ApiError, match="tool_choice asks for a call, and the chat template of model begins with a"):
        models[0].chat_prompt([Message(role="user", content="x")], None, [LOOK], "<tool_call>")


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "model is 'gpt-4'; there is model"),
    ({"model": None}, 400, "model", "model is None; "),
    ({"messages": []}, 400, "messages", "messages is []; "),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content.0.type",
        "'image_url'",
    ),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'robot'"),
    ({"temperature": -1}, 400, "temperature", "temperature is -1; input should be greater than or equal to 0"),
    ({"temperature": 1e300}, 400, "temperature", "less than or equal to 100"),
    ({"temperature": "hot"}, 400, "temperature", "temperature is 'hot'; "),
    ({"top_p": 0}, 400, "top_p", "greater than or equal to 0.000001"),
    ({"top_p": 1e-7}, 400, "top_p", "greater than or equal to 0.000001"),
    ({"max_tokens": -5}, 400, "max_tokens", "max_tokens is -5; "),
    ({"max_completion_tokens": 10**6}, 400, "max_tokens", "has room for"),
    ({"n": 0}, 400, "n", "n is 0; "),
    ({"seed": 2**64}, 400, "seed", "less than or equal"),
    ({"stop": [""]}, 400, "stop.0", "at least 1 character"),
    ({"top_logprobs": 2}, 400, None, "without logprobs"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "penalties are not computed here"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function", "tools.0.function is missing"),
    (
        {"tools": [LOOK]},
        400,
        "tools",
        "its chat template does not tell the model of tools. Leave them out, or serve it",
    ),
    ({"tools": [LOOK], "tool_choice": "always"}, 400, "tool_choice", "tool_choice is 'always'; "),
    ({"tool_choice": "required"}, 400, None, "tool_choice asks for a call, and there are no tools"),
    (
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "see"}}},
        400,
        None,
        "tool_choice names 'see'; tools has look",
    ),
    (
        {"messages": [{"role": "tool", "tool_call_id": "call_1", "content": "5"}]},
        400,
        "messages.0.tool_call_id",
        "no call before it has this id",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]}
            ]
        },
        400,
        "messages.0.tool_calls.0.function.arguments",
        "it is a JSON object",
    ),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "not held to a form"),
    (
        {"chat_template_kwargs": {"chat_template": "{{ 'a' * 1000000 }}"}},
        400,
        "chat_template_kwargs",
        "the server's to set",
    ),
    ({"chat_template_kwargs": {"return_tensors": "pt"}}, 400, "chat_template_kwargs", "return_tensors is no argument"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "surrogate"),
    ({"messages": [{"role": "user", "content": "coins " * 1200}]}, 400, "messages", "takes 1,024 tokens"),
    ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, 400, "messages", "10,000,000 characters"),
]


@pytest.mark.parametrize(("fields", "status", "param", "message"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
def test_what_is_wrong_is_said_in_openais_form(
    served: tuple[Server, int], fields: dict[str, Any], status: int, param: str | None, message: str
):
    found, reply = ask(served[1], "/v1/chat/completions", {**WORDS, **fields})
    assert (found, set(reply), set(reply["error"])) == (status, {"error"}, {"message", "type", "param", "code"})
    assert reply["error"]["param"] == param
    assert message in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_no_request_are_refused_and_unknown_fields_are_not(served: tuple[Server, int]):
    port = served[1]
    for body in (b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"):
        status, reply = ask(port, "/v1/chat/completions", body)
        assert (status, reply["error"]["code"]) == (400, "invalid_json")
    status, reply = ask(port, "/v1/completions", b" " * (33 * 2**20))
    assert (status, reply["error"]["code"]) == (413, "too_large")
    for path, expected in (("/v1/nothing", 404), ("/v1/models/no/such", 404), ("/v1/completions", 405)):
        assert ask(port, path)[0] == expected
    for prompt, words in (([], "prompt"), ("", "prompt is empty"), ([[5, 10**6]], "token 1000000"), ([-1], "prompt")):
        status, reply = ask(port, "/v1/completions", {"model": "model", "prompt": prompt})
        assert status == 400
        assert words in reply["error"]["message"]
    assert ask(port, "/v1/chat/completions", {**WORDS, "max_tokens": 2, "user": "me", "metadata": {"a": 1}})[0] == 200
    assert ask(port, "/health") == (200, {"status": "ok"})


def test_a_wrong_list_costs_as_little_as_its_first_wrong_item():
    """An error for each of a million items, in each of four types, took seconds and gigabytes."""
    complete = {"model": "model"}
    for kind, fields, param in (
        (CompletionRequest, {**complete, "prompt": [-1] * 50}, "prompt"),
        (CompletionRequest, {**complete, "prompt": ["a", *[1] * 50]}, "prompt"),
        (CompletionRequest, {**complete, "prompt": [[0.5] * 50] * 50}, "prompt"),
        (CompletionRequest, {**complete, "prompt": [[1]] * 200}, "prompt"),
        (CompletionRequest, {**complete, "prompt": {"a": [1] * 50}}, "prompt"),
        (ChatRequest, {**WORDS, "messages": [{"role": "user", "content": [{}] * 50}] * 50}, "messages"),
        (ChatRequest, {**WORDS, "stop": [1] * 50}, "stop"),
        (VerdictRequest, {"answer": "1", "completions": [1] * 50}, "completions"),
    ):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(fields)
        assert caught.value.error_count() <= 4
        assert str(error_of(caught.value).param).startswith(param)


def test_what_a_template_writes_is_measured_before_it_is_tokenized(
    models: list[Hosted], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models[0].tokenizer, "chat_template", "{{ 'x ' * 10000000 }}{{ add_generation_prompt }}")
    monkeypatch.setattr("grpo.serving.models.tokenize", None)
    with pytest.raises(ApiError, match=r"messages has 20,000,004 characters"):
        models[0].chat_prompt([Message(role="user", content="x")], None)
    monkeypatch.setattr(models[0].tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(ApiError, match="refuses a conversation of the roles system: TemplateError: no such role"):
        models[0].chat_prompt([Message(role="system", content="x")], None)  # with no other message behind it


def test_openais_client_gets_its_errors(client: OpenAI):
    with pytest.raises(APIStatusError, match="there is model") as caught:
        client.chat.completions.create(model="other", messages=WORDS["messages"])
    assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").model_dump()["max_model_len"] == 1024


def test_a_key_other_hosts_and_other_sites_are_checked(models: list[Hosted]):
    with serving(models, Limits(api_key="séçret")) as (_, port):
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/models", Authorization="Bearer wrong")[0] == 401
        assert ask(port, "/health")[0] == 200
        right = "Bearer " + "séçret".encode().decode("latin-1")
        assert ask(port, "/v1/models", Authorization=right)[0] == 200
        assert ask(port, "/v1/models", Authorization=right.replace("Bearer", "bearer"))[0] == 200
        for path in ("/metrics", "/openapi.json"):
            assert (ask(port, path)[0], ask(port, path, Authorization=right)[0]) == (401, 200)
        assert ask(port, "/v1/models", Authorization=right, Host=f"127.0.0.2:{port}")[0] == 200
        assert ask(port, "/v1/models", Authorization=right, Host="evil.example:80")[0] == 403
        assert ask(port, "/v1/models", Authorization=right, Origin="https://evil.example")[0] == 403
        assert ask(port, "/v1/models", Authorization=right, Origin=f"http://127.0.0.1:{port}")[0] == 200


# ---- limits, clients that leave, failures ----------------------------------------------------------------------------

LONG = {"model": "model", "prompt": "Ava", "max_tokens": 1000, "ignore_eos": True, "temperature": 1}


def test_a_full_queue_and_a_slow_request_are_answered(models: list[Hosted]):
    with serving(models, Limits(max_queue=4, seconds=1.0)) as (server, port):
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(ask, port, "/v1/completions", {**LONG, "n": 8})
            while server._num_open["model"] < 8:
                time.sleep(0.01)
            second = threads.submit(ask, port, "/v1/completions", {**LONG, "n": 4, "stream": True})
            while server._num_open["model"] < 12:
                time.sleep(0.01)
            status, reply = ask(port, "/v1/completions", LONG)
            assert (status, reply["error"]["code"]) == (429, "queue_full")
            status, reply = ask(port, "/v1/completions", {**LONG, "n": 13})  # which never can run
            assert (status, reply["error"]["param"]) == (400, "n")
            status, reply = first.result()
            assert (status, reply["error"]["code"]) == (504, "timeout")
            status, text = second.result()
            assert status == 200
            assert '"code":"timeout"' in text
            assert text.endswith("data: [DONE]\n\n")
        assert all_is_free(server)
        assert "grpo_clients_left_total" not in server.metrics.text()
        assert ask(port, "/v1/completions", {**LONG, "max_tokens": 2})[0] == 200


def leaving(port: int, body: dict[str, Any], *, after: int) -> None:
    """Ask, read so many bytes of the reply, and close the connection."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + data)
        while after > 0:
            after -= len(connection.recv(after))


def test_a_client_that_leaves_frees_its_slots(served: tuple[Server, int]):
    """While it waits, while it is written to, streamed or not."""
    server, port = served
    before = server.metrics.text()
    for body, after in (
        (LONG, 0),
        ({**LONG, "stream": True}, 300),
        ({**LONG, "n": 20}, 0),
        ({**LONG, "stream": True}, 0),
    ):
        leaving(port, body, after=after)
    started = time.monotonic()
    assert all_is_free(server)
    assert time.monotonic() - started < 10  # 23 x 1,000 tokens would take longer
    assert server.metrics.text() != before
    assert "grpo_clients_left_total" in server.metrics.text()


def test_verdicts_wait_in_a_line_of_their_own_that_has_an_end(
    models: list[Hosted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Within the time limit, beside the requests for text, and without a file for each gold answer that somebody sends."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("grpo.serving.verdicts.MOST_WAITING", 3)
    asked = {"completions": ["<answer>12</answer>", "13"] * 5, "answer": "12"}
    with serving(models) as (server, port), ThreadPoolExecutor(8) as threads:
        assert ask(port, "/v1/verdict", asked) == (200, {"verdicts": [True, False] * 5})
        assert list(tmp_path.rglob("*")) == []
        score, goes_on = Scorer.score, threading.Event()
        monkeypatch.setattr(Scorer, "score", lambda *each: (goes_on.wait(60), score(*each))[1])
        usual, server.limits = server.limits, replace(server.limits, seconds=0.3)
        waiting = [threads.submit(ask, port, "/v1/verdict", asked) for _ in range(3)]
        while server.verifier._places._value > 0:
            time.sleep(0.01)
        server.limits = usual
        status, reply = ask(port, "/v1/verdict", asked)
        assert (status, reply["error"]["code"]) == (429, "queue_full")
        assert ask(port, "/v1/completions", {**LONG, "max_tokens": 2})[0] == 200
        time.sleep(0.3)  # their time is over
        goes_on.set()
        assert {each.result()[0] for each in waiting} == {504}
        monkeypatch.undo()
        assert ask(port, "/v1/verdict", asked)[0] == 200


def test_nothing_is_lost_of_a_hundred_requests(served: tuple[Server, int]):
    """Half of them leave at some time; after the first few, no descriptor is taken for good either."""
    server, port = served
    rng = random.Random(1)
    bodies = [
        {**LONG, "n": rng.choice([1, 1, 2, 5]), "max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.5}
        for _ in range(100)
    ]

    def one(number: int) -> int:
        if number % 2:
            leaving(port, bodies[number], after=bodies[number]["stream"] * (number * 7))
            return 200
        return ask(port, "/v1/completions", bodies[number])[0]

    with ThreadPoolExecutor(12) as threads:
        statuses = list(threads.map(one, range(10)))
        assert all_is_free(server)
        num_open = len(os.listdir("/proc/self/fd"))
        statuses += list(threads.map(one, range(10, 100)))
    assert set(statuses) == {200}
    assert all_is_free(server)
    until = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > num_open and time.monotonic() < until:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= num_open


def test_the_server_outlives_weights_that_break(models: list[Hosted], served: tuple[Server, int]):
    port, norm = served[1], models[0].model.lm.model.norm.weight
    kept = norm.clone()
    good = ask(port, "/v1/completions", {**LONG, "max_tokens": 9, "seed": 1})
    norm.data.fill_(float("nan"))
    status, reply = ask(port, "/v1/completions", {**LONG, "n": 3})
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert "not finite" in reply["error"]["message"]
    norm.data.copy_(kept)
    again = ask(port, "/v1/completions", {**LONG, "max_tokens": 9, "seed": 1})
    assert again[1]["choices"] == good[1]["choices"]
    assert all_is_free(served[0])


def test_a_device_that_is_lost_fails_what_runs_what_waits_and_what_comes(
    models: list[Hosted], monkeypatch: pytest.MonkeyPatch
):
    """An error that stays: nothing more is taken by the device, not even that it forgets. Nobody waits for the time limit."""
    decoder = models[0].scheduler.decoder

    def lost(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with serving(models) as (server, port), ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask, port, "/v1/completions", {**LONG, "n": 6}) for _ in range(2)]  # for eight slots
        while server._num_open["model"] < 12:
            time.sleep(0.01)
        monkeypatch.setattr(decoder, "forget", lost)
        monkeypatch.setattr(decoder, "decode", lost)
        for each in asked:
            status, reply = each.result()
            assert (status, reply["error"]["type"]) == (500, "server_error")
            assert "the server has lost its device" in reply["error"]["message"]
        assert ask(port, "/health")[0] == ask(port, "/v1/completions", LONG)[0] == 503
        monkeypatch.setattr(Worker, "is_alive", True)  # as one that was let in just before finds it
        assert ask(port, "/v1/completions", LONG)[0] == 500
        monkeypatch.undo()
        assert all_is_free(server)
    decoder.forget()


def test_a_client_that_does_not_read_its_stream_is_given_up(models: list[Hosted], monkeypatch: pytest.MonkeyPatch):
    """Sending then waits, as uvicorn's does while the connection's buffers are full."""
    monkeypatch.setattr("grpo.serving.app.STALLED_SECONDS", 0.2)

    def around(app: Any) -> Any:
        async def stuck(scope: Any, receive: Any, send: Any) -> None:
            async def never(message: Any) -> None:
                await (asyncio.Event().wait() if message["type"] == "http.response.body" else send(message))

            await app(scope, receive, never if scope["type"] == "http" else send)

        return stuck

    with serving(models, Limits(seconds=0.5), around) as (server, port):
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(port, "/v1/completions", {**LONG, "stream": True})
        assert all_is_free(server)


def test_requests_that_need_more_pages_than_there_are_take_turns():
    """Some give up their pages and are read again; the text is the same."""
    with ExitStack() as stack:
        page = 2 * 3 * 2 * 32 * 64 * 4 / 2**30
        small = host(options(TINY / "model", name="model", max_context=320, kv_cache_gib=page * 17), stack)
        asked = {**LONG, "n": 6, "max_tokens": 240, "seed": 4, "logprobs": 0}
        with serving(small) as (server, port):
            _, reply = ask(port, "/v1/completions", asked)
            assert server.models["model"].scheduler.num_preempted > 0
            assert all_is_free(server)
            for choice in reply["choices"]:
                assert len(choice["logprobs"]["tokens"]) == 240
        roomy = host(options(TINY / "model", name="model", max_context=320), stack)
        with serving(roomy) as (_, port):
            again = ask(port, "/v1/completions", asked)[1]
        for one, other in zip(again["choices"], reply["choices"], strict=True):
            assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]


# ---- several checkpoints, the process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the paper's template with two checkpoints, the second of other weights."""
    directory = tmp_path_factory.mktemp("serve") / "zero"
    settings = tiny_settings(directory, data={"template": "r1_zero_think"}, rollout={"temperature": 0.9})
    for step in (1, 2):
        folder = directory / "checkpoints" / f"step-{step:08d}" / "hf"
        shutil.copytree(TINY / "model", folder)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value * 0.5 if "norm" in name else value for name, value in weights.items()},
        folder / "model.safetensors",
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    return directory


def test_checkpoints_of_a_run_are_served_side_by_side_in_its_template(run: Path):
    with ExitStack() as stack:
        hosted = host(options(run, steps=["1", "latest", "base"]), stack)
        assert [each.name for each in hosted] == ["zero:1", "zero:latest", "zero:base"]
        assert (hosted[0].sampling.temperature, hosted[0].sampling.max_tokens) == (0.9, 24)
        with serving(hosted) as (_, port):
            asked = [{**WORDS, "model": each.name, "seed": 3, "temperature": 0} for each in hosted]
            with ThreadPoolExecutor(3) as threads:
                replies = list(threads.map(lambda each: ask(port, "/v1/chat/completions", each)[1], asked))
            first, latest, base = (reply["choices"] for reply in replies)
            assert first == base != latest
            assert first[0]["message"]["reasoning"]  # the prompt has opened the thought
            prompt = TEMPLATES["r1_zero_think"].fill(QUESTION, None, hosted[0].data)
            raw = ask(port, "/v1/completions", {"model": "zero:1", "prompt": prompt, "temperature": 0})[1]
            thought, _, rest = raw["choices"][0]["text"].partition("</think>")
            assert (thought, rest) == (first[0]["message"]["reasoning"], first[0]["message"]["content"])
            for messages in (
                [{"role": "system", "content": "x"}, *WORDS["messages"]],
                [*WORDS["messages"], {"role": "assistant", "content": "5"}, *WORDS["messages"]],
            ):
                status, reply = ask(port, "/v1/chat/completions", {**WORDS, "model": "zero:1", "messages": messages})
                assert status == 400
                assert "room for one question" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": ["7"]}, "--steps is 7; the run in .* has checkpoints of these steps: 1, 2"),
        ({"steps": ["one"]}, "--steps has 'one'; a step is a number, latest or base"),
        ({"steps": ["1", "1"]}, "each step is served once"),
        ({"max_context": 5000}, "--max-context is 5000; .*knows 1024 positions"),
        ({"kv_cache_gib": 1e-6}, "--kv-cache-gib is 1e-06; "),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_said_first(run: Path, given: dict[str, Any], message: str):
    with ExitStack() as stack, pytest.raises(ValueError, match=message):
        host(options(run, **{"max_context": 512, **given}), stack)


def test_a_model_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.serving.models.free_bytes", lambda device: 1_000_000)
    with ExitStack() as stack, pytest.raises(ValueError, match=r"its weights take .* GiB are free"):
        host(options(TINY / "model"), stack)


def test_the_command_ends_what_runs_when_it_is_told_to_end(tmp_path: Path):
    """SIGTERM in the middle of a stream: it comes to its end, no other begins, and the exit code is 0. The port is taken."""
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    words = ["scripts/serve.py", "--model", str(TINY / "model"), "--port", "0", "--max-sequences", "4"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = warm.Process(words, cwd=ROOT, env=environment, stdout=out, stderr=out)
        until = time.monotonic() + 60
        while "serving at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
    port = int(log.read_text().rpartition("/v1")[0].rpartition(":")[2])
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    taken = warm.run([*words[:3], "--port", str(port)], cwd=ROOT, env=environment, timeout=60)
    assert taken.returncode == 2
    assert f"error: --port is {port} with --host 127.0.0.1; Address already in use" in taken.stderr
    extra = {"ignore_eos": True}
    stream = client.completions.create(model="model", prompt="Ava", max_tokens=600, stream=True, extra_body=extra)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert process.wait(timeout=60) == 0, log.read_text()
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/health")


def test_a_client_that_reads_nothing_does_not_keep_the_command_from_its_end(tmp_path: Path):
    """An answer of 10 MB that is more than the buffers between the two take."""
    words = [
        "scripts/serve.py",
        "--model",
        str(TINY / "model"),
        "--port",
        "0",
        "--max-sequences",
        "32",
        "--timeout",
        "6",
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
        process = warm.Process(words, cwd=ROOT, env=environment, stdout=out, stderr=out)
    until = time.monotonic() + 60
    while "serving at" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    port = int(log.read_text().rpartition("/v1")[0].rpartition(":")[2])
    body = {"model": "model", "prompt": [[5] * 800] * 24, "echo": True, "logprobs": 20, "max_tokens": 0}
    data = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(("127.0.0.1", port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=60) == 0, log.read_text()
        assert 5 < time.monotonic() - began < 30


def test_a_server_has_a_description_that_names_its_paths(served: tuple[Server, int]):
    _, found = ask(served[1], "/openapi.json")
    assert set(found["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["model"]["enum"] == ["model"]
    assert {"messages", "top_k", "min_p", "max_completion_tokens", "top_logprobs"} <= set(fields)
    _, text = ask(served[1], "/metrics")
    for name in ("grpo_pages_free", "grpo_slots", "grpo_requests_total", "grpo_time_to_first_token_seconds_bucket"):
        assert name in text


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(chromium() is None, reason="chromium and chromedriver are not installed")
def test_the_page_asks_shows_grades_stops_and_says_what_is_wrong(models: list[Hosted], tmp_path: Path):
    """In a browser, by the keyboard; at the width of a desktop and of a phone."""
    with serving(models, Limits(api_key="secret")) as (server, port), browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("return document.querySelector('#hint').textContent.includes('API key is missing')")
        page.type("#key", "secret" + KEYS["enter"])
        page.wait("return document.querySelectorAll('#models input').length == 1")
        for name, value in (
            ("n", "3"),
            ("gold", "12"),
            ("temperature", "1.3"),
            ("top_p", "1"),
            ("seed", "2"),
            ("max_tokens", "60"),
        ):
            page.fill(f"#{name}", value)
        page.type("#question", QUESTION + KEYS["enter"])
        page.wait("return document.querySelectorAll('.verdict:not(:empty)').length == 3")
        asked = {"n": 3, "seed": 2, "temperature": 1.3, "top_p": 1, "max_tokens": 60}
        headers = {"Authorization": "Bearer secret"}
        _, reply = ask(port, "/v1/chat/completions", {**WORDS, **asked}, **headers)
        messages = [choice["message"] for choice in reply["choices"]]
        shown = page.run("return [...document.querySelectorAll('.reply > .words')].map(each => each.textContent)")
        assert shown == [message["content"].strip() for message in messages]
        thought = page.run("return [...document.querySelectorAll('.thoughts .words')].map(each => each.textContent)")
        assert thought == [(message["reasoning"] or "").lstrip() for message in messages]
        whole = [f"<think>{each['reasoning'] or ''}</think>{each['content']}" for each in messages]
        _, graded = ask(port, "/v1/verdict", {"completions": whole, "answer": "12"}, **headers)
        words = {True: "\u2713 right", False: "\u2717 wrong"}
        assert page.text(".verdict") == "|".join(words[right] for right in graded["verdicts"])
        assert f"{reply['usage']['completion_tokens']} tokens" in page.text(".speed")
        folded = page.run("return [...document.querySelectorAll('.thoughts:not([hidden])')].map(each => each.open)")
        assert folded
        assert not all(folded)  # where an answer follows

        page.click("#new")  # without reading again what was said, and stopped with Esc
        for name, value in (("n", "1"), ("gold", ""), ("max_tokens", "900"), ("temperature", "5")):
            page.fill(f"#{name}", value)
        page.type("#question", "Say much" + KEYS["shift"] + KEYS["enter"] + KEYS["shift"] + "and more" + KEYS["enter"])
        page.wait(
            "return document.querySelectorAll('.reply.live .words').length && document.querySelector('.speed').textContent"
        )
        page.type("body", KEYS["escape"])
        page.wait("return !document.querySelector('.reply.live') && document.querySelector('#stop').hidden")
        assert page.text(".asked") == "Say much\nand more"
        assert page.text(".reply footer span") in ("stopped", "")
        assert all_is_free(server)

        page.fill("#max_tokens", "5000")
        page.type("#question", "Too much" + KEYS["enter"])
        page.wait("return document.querySelector('.problem')?.textContent.includes('max_tokens is 5000')")
        assert page.run("return document.querySelector('#question').value") == "Too much"  # to be asked again
        page.resize(390, 844)
        page.screenshot(tmp_path / "phone.png")
        assert page.run("return document.documentElement.scrollWidth") <= 390
        assert page.errors() == []


# ---- evaluating what is served ---------------------------------------------------------------------------------------


def evaluation(model: str, endpoint: str | None, **given: Any) -> asked.Settings:
    usual: dict[str, Any] = {
        "templates": ["r1_zero", "chat"],
        "temperature": 0,
        "top_p": 1.0,
        "max_completion_tokens": 30,
    }
    data = {"mine": str(TINY / "test.jsonl")}
    return asked.Settings(model, ["mine"], data=data, num_questions=6, endpoint=endpoint, **{**usual, **given})


def rows_in(out: Path) -> list[dict[str, Any]]:
    return sorted(read_jsonl(out / "samples.jsonl"), key=lambda row: (row["template"], row["row"], row["sample"]))


class Unsteady:
    """Answers some requests badly, in turns: too many, a crash, a connection that breaks; and refuses one for good."""

    def __init__(self, app: Any, refused: int | None = None) -> None:
        self.app, self.number, self.refused, self.bodies = app, 0, refused, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        self.number += 1
        if self.number == self.refused:
            return await JSONResponse({"error": {"message": "no more credit"}}, 402)(scope, receive, send)
        match self.number % 5:
            case 1:
                return await JSONResponse({}, 429, headers={"Retry-After": "0"})(scope, receive, send)
            case 2:
                return await JSONResponse({}, 503)(scope, receive, send)
            case 3:
                raise ConnectionError("the connection breaks: uvicorn sends half a reply, or none")

        async def noted() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                self.bodies.append(message["body"])
            return message

        return await self.app(scope, noted, send)


def test_a_hosted_model_is_measured_as_one_that_is_loaded(
    models: list[Hosted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a server that fails now and then; stopped in the middle, it goes on. Tokens and dollars are those of all starts."""
    monkeypatch.setattr("grpo.evaluation.endpoint.FIRST_PAUSE", 0.01)
    local, out = tmp_path / "local", tmp_path / "hosted"
    benchmark.evaluate(evaluation(str(TINY / "model"), None), local, asked.Runtime(num_workers=1))
    unsteady: list[Unsteady] = []

    def around(app: Any) -> Any:
        unsteady.append(Unsteady(app, refused=17))
        return unsteady[0]

    own = replace(models[0].sampling, stop=("</answer>",), top_k=1)  # of its run, which is not how it is measured
    with serving([replace(models[0], sampling=own)], around=around) as (_, port):
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", concurrency=4, price=(1.0, 1000.0))
        settings = evaluation("model", endpoint.url)
        with pytest.raises(ValueError, match=r"HTTP 402: .*no more credit.*the same command goes on"):
            benchmark.evaluate(settings, out, asked.Runtime(num_workers=1), HostedModel(endpoint, "model"))
        num_before = len(rows_in(out))
        assert 0 < num_before < 12
        first = read_json(out / "usage.json")["usage"]
        found = benchmark.evaluate(settings, out, asked.Runtime(num_workers=1), HostedModel(endpoint, "model"))
    ours, theirs = rows_in(out), rows_in(local)
    assert any("</answer>" in row["completion"] for row in theirs)  # which the run's stop text would cut off
    assert all(b'"stop": [], "top_k": 0, "min_p": 0.0' in body for body in unsteady[0].bodies)
    for own, other in zip(ours, theirs, strict=True):
        same = ("row", "template", "finish_reason", "num_tokens", "rewards", "question")
        assert [own[name] for name in same] == [other[name] for name in same]
        if own["template"] == "r1_zero":
            assert own["completion"] == other["completion"]
        else:
            assert (
                own["completion"].replace("</think>", "").lstrip()
                == other["completion"].replace("</think>", "").lstrip()
            )
    metrics = [result["metrics"] for result in found["results"]]
    assert metrics == [result["metrics"] for result in read_json(local / "results.json")["results"]]
    whole = read_json(out / "usage.json")
    usage = whole["usage"]
    assert usage["requests"] >= 12 > first["requests"] > 0
    assert usage["retries"] > first["retries"] > 3
    assert usage["completion_tokens"] >= sum(row["num_tokens"] for row in ours)
    dollars = (usage["prompt_tokens"] + 1000 * usage["completion_tokens"]) / 1e6
    assert whole["dollars"] == pytest.approx(dollars)


def test_an_endpoint_that_cannot_be_asked_is_said_before_it_is(
    served: tuple[Server, int], models: list[Hosted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def start(url: str, model: str = "model", **given: Any) -> None:
        HostedModel(Endpoint(url, **given), model).start(tmp_path)

    with pytest.raises(ValueError, match=r"--endpoint is 'localhost'; it begins with http"):
        start("localhost")
    with pytest.raises(ValueError, match=r"--request has prompt, n, which each request sets itself"):
        start("http://127.0.0.1:1/v1", request={"n": 4, "seed": 1, "prompt": "x"})
    with pytest.raises(ValueError, match=r"it does not answer \(.*refused.*\)\. Start the server"):
        start("http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match=r"--model is 'gpt'; at --endpoint there is model\. Name one"):
        start(f"http://127.0.0.1:{served[1]}/v1", "gpt")
    with pytest.raises(ValueError, match=r"--api-key-env is 'NO_KEY'; there is no such"):
        start("http://127.0.0.1:1/v1", api_key_env="NO_KEY")
    with pytest.raises(ValueError, match=r"--stop is \['x'\] with --endpoint"):
        evaluation("model", "http://127.0.0.1:1/v1", stop=["x"])
    with serving(models, Limits(api_key="secret")) as (_, port):
        with pytest.raises(ValueError, match=r"it refuses the key \(HTTP 401"):
            start(f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("A_KEY", "secret")
        start(f"http://127.0.0.1:{port}/v1", api_key_env="A_KEY")
    for words, message in (
        (["--endpoint", "http://x/v1", "--engine", "hf"], "--engine with --endpoint has no effect"),
        (["--price-in", "3"], "--price-in without --endpoint has no effect"),
    ):
        monkeypatch.setattr("sys.argv", ["evaluate", "--model", "x", "--benchmarks", "gsm8k", *words])
        monkeypatch.setattr("grpo.system.parser.Parser.error", _raised)
        with pytest.raises(ValueError, match=message):
            cli_evaluate.main()


@contextlib.contextmanager
def scripted(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Iterator[str]:
    """The address of a server whose requests a function answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def reply_with(handler: BaseHTTPRequestHandler, status: int, text: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"content_length": str(len(text)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(text.encode())


GOOD = json.dumps({"choices": [{"text": " 12"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def test_completions_of_a_hosted_model_are_by_default_as_long_as_its_server_allows(
    served: tuple[Server, int], models: list[Hosted]
):
    url = f"http://127.0.0.1:{served[1]}/v1"
    settings = evaluation("model", url, max_completion_tokens=None)
    found = HostedModel(Endpoint(url), "model").prepared(settings, [])
    assert found.max_completion_tokens == models[0].sampling.max_tokens
    for listed, expected in (
        ([{"id": "model", "max_model_len": 1024}], 512),
        ([{"id": "model", "max_model_len": 131072}], 4096),
        ([{"id": "model"}], 4096),
        ([], 4096),
    ):
        answer = json.dumps({"data": listed})
        with scripted(lambda handler, _, answer=answer: reply_with(handler, 200, answer)) as other:  # type: ignore[misc]
            found = HostedModel(Endpoint(other), "model").prepared(settings, [])
        assert found.max_completion_tokens == expected


def sampled(model: HostedModel, num: int = 1) -> list[str]:
    prompts = [Prompt(n, [], "What is 5+7?", "", {}) for n in range(num)]
    groups = model.sample(prompts, Sampling(4), num_completions=1, seed=0)
    return [completion.text for group in groups for completion in group.completions]


@pytest.mark.parametrize(
    ("path", "remedy"), [("", r"The address has no version, such as /v1: add it"), ("/v1", "Correct the request")]
)
def test_an_address_without_its_version_is_told_what_it_lacks(path: str, remedy: str):
    with scripted(lambda handler, _: reply_with(handler, 404, "Not Found")) as url:
        model = HostedModel(Endpoint(url.removesuffix("/v1") + path), "model")
        with pytest.raises(ValueError, match=rf"refuses a request for 'model': HTTP 404.*\. {remedy}; the same"):
            sampled(model)


def test_a_key_does_not_follow_a_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", "secret")
    seen = []
    with scripted(lambda handler, _: (seen.append(dict(handler.headers)), reply_with(handler, 200, GOOD))[1]) as other:

        def moved(handler: BaseHTTPRequestHandler, _: bytes) -> None:
            reply_with(handler, 302, "", Location=f"{other}/models")

        with scripted(moved) as url:
            model = HostedModel(Endpoint(url, api_key_env="A_KEY"), "model")
            with pytest.raises(ValueError, match=rf"HTTP 302: it sends on to '{other}/models'\. Name that address"):
                model.start(tmp_path)
            with pytest.raises(ValueError, match=r"refuses a request for 'model': HTTP 302: it sends on to"):
                sampled(model)
    assert seen == []


def test_requests_that_end_after_another_has_failed_are_counted(tmp_path: Path):
    """They cost, too."""
    first, lock, together = [True], threading.Lock(), threading.Barrier(3)

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if body:
            together.wait(10)  # on a busy machine the first would be refused before the others are sent
        with lock:
            is_first = bool(body) and bool(first) and first.pop()
        if not is_first and body:
            time.sleep(0.5)
        reply_with(handler, 402, "no credit") if is_first else reply_with(handler, 200, GOOD if body else "{}")

    with scripted(answer) as url:
        model = HostedModel(Endpoint(url, concurrency=3), "model").start(tmp_path)
        with pytest.raises(ValueError, match="HTTP 402: no credit"):
            sampled(model, 3)
    assert read_json(tmp_path / "usage.json")["usage"]["requests"] == 2


def test_an_error_that_breaks_off_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.evaluation.endpoint.FIRST_PAUSE", 0.01)
    numbers = []

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        numbers.append(len(numbers))
        if len(numbers) > 1:
            return reply_with(handler, 200, GOOD)
        reply_with(handler, 503, "", content_length="500")  # of which nothing comes
        handler.wfile.flush()
        time.sleep(2)

    with scripted(answer) as url:
        assert sampled(HostedModel(Endpoint(url, timeout_seconds=1.0), "model")) == [" 12"]


def _raised(parser: Any, message: str) -> None:
    raise ValueError(message)
