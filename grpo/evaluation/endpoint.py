"""A model that is hosted elsewhere, behind OpenAI's API, as a Generator: DeepSeek's own, vLLM, Ollama, `grpo serve`.

Chat templates ask /chat/completions, where the server fills its own template; the paper's raw templates ask /completions. Each
answer is a request of its own, as many services know no `n`. Thoughts that a server tells from the answer are put back in front
of it in their tags, so that verdicts see what they would see of the same model here.

rewards/endpoint.py asks a judge in the same way; rewards and this package do not import each other.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.config import DataConfig
from grpo.data.prompts import TEMPLATES, conversation, prefill_of
from grpo.evaluation.asked import Settings
from grpo.rollout.sampling import sequence_seeds
from grpo.system.files import replace_text
from grpo.system.terminal import say
from grpo.turns.environment import Environment
from grpo.types import Completion, FinishReason, Generator, Group, OnGroup, Prompt, Sampling

SET_HERE = ("model", "messages", "prompt", "stream", "n")
"""Fields that --request may not have: another question, or a reply of another form."""

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses of a server that may answer another time."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another attempt; doubled each time
MOST_TOKENS = 4096
"""Of a completion, where the server does not say what it allows."""

LARGEST_REPLY = 64 * 2**20  # bytes
WRITE_EVERY = 2.0  # seconds

OWN_SERVER = "grpo"
"""What `grpo serve` says in /v1/models of who owns a model."""
OWN_FIELDS: dict[str, Any] = {"stop": [], "top_k": 0, "min_p": 0.0}
"""Sent to it: it would sample as its run did, and cut off the run's stop texts, with </answer> the answer's own tag. Not to
others, of which some refuse what they do not know."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is hosted, and how it is asked.

    Args:
        url: up to and including its version: https://api.deepseek.com/v1.
        api_key_env: name of the environment variable that holds the key; None: no key.
        concurrency: requests at once.
        retries: further attempts at a request, after a pause that doubles, or as the server says (Retry-After).
        timeout_seconds: without a byte from the server.
        request: further fields of each request.
        price: dollars for a million tokens read, and for a million written.

    Raises:
        ValueError: an argument is no such thing, or the key is not in the environment.
    """

    url: str
    api_key_env: str | None = None
    concurrency: int = 32
    retries: int = 8
    timeout_seconds: float = 900.0
    request: dict[str, Any] = field(default_factory=dict)
    price: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"--endpoint is {self.url!r}; it begins with http:// or https://. Correct it.")
        if taken := [name for name in SET_HERE if name in self.request]:
            raise ValueError(f"--request has {', '.join(taken)}, which each request sets itself. Leave it out.")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(
                f"--api-key-env is {self.api_key_env!r}; there is no such environment variable here. Export it, or leave it out."
            )


@dataclass
class Usage:
    """What was asked so far, over all starts."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def dollars(self, price: tuple[float, float]) -> float:
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6

    def in_words(self, price: tuple[float, float]) -> str:
        cost = f", ${self.dollars(price):,.4f}" if any(price) else ""
        return (
            f"{self.requests:,} requests ({self.retries:,} attempts more), {self.prompt_tokens:,} tokens read, "
            f"{self.completion_tokens:,} written{cost}"
        )


def _most_tokens(listed: list[dict[str, Any]], model: str) -> int:
    """Of a completion: as the server samples by itself (`grpo serve`), or half of the positions that it names."""
    told = next((each for each in listed if str(each.get("id")) == model), {})
    sampling, positions = told.get("sampling"), told.get("max_model_len")
    if isinstance(sampling, dict) and isinstance(sampling.get("max_tokens"), int):
        return int(sampling["max_tokens"])
    return min(MOST_TOKENS, positions // 2) if isinstance(positions, int) and positions > 1 else MOST_TOKENS


class HostedModel:
    """Asks a hosted model; see `benchmark.Asks` and `types.Generator`.

        OUT/usage.json    requests and tokens of all starts

    Args:
        model: its name there.
    """

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.model = endpoint, model
        self.environment: Environment | None = None
        self.usage = Usage()
        self._path: Path | None = None
        self._own_fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._last_write = 0.0
        self._opener = urllib.request.build_opener(_StaysThere)

    # ---- as Asks

    def prompts(self, rows: list[dict[str, Any]], data: DataConfig, put: Callable[[str], str]) -> list[Prompt]:
        template, prompts = TEMPLATES[data.template], []
        for number, row in enumerate(rows):
            question = put(str(row["question"]))
            messages = conversation(question, data) if template.is_chat else None
            text = "" if messages is not None else template.fill(question, None, data)  # type: ignore[arg-type]
            prompts.append(Prompt(number, [], text, prefill_of(text), row, messages=messages))
        return prompts

    def prepared(self, settings: Settings, prompts: list[Prompt]) -> Settings:
        """
        Raises:
            ValueError: see `_listed`.
        """
        if settings.max_completion_tokens is None:
            settings = replace(settings, max_completion_tokens=_most_tokens(self._listed(), self.model))
        return settings

    def files(self) -> str:
        return json.dumps([self.endpoint.url, self.endpoint.request], sort_keys=True)

    def tool_sources(self) -> dict[str, str]:
        """A server's tools are its own."""
        return {}

    def around(self, generator: Generator, template: str) -> Generator:
        """As it is: a server calls its tools itself."""
        return generator

    def start(self, out: Path) -> HostedModel:
        """
        Raises:
            ValueError: see `_listed`.
        """
        self._path = out / "usage.json"
        if self._path.exists():
            self.usage = Usage(**json.loads(self._path.read_text())["usage"])
        listed = self._listed()
        self._own_fields = OWN_FIELDS if any(each.get("owned_by") == OWN_SERVER for each in listed) else {}
        return self

    def _listed(self) -> list[dict[str, Any]]:
        """What /models says of each; nothing of a server that lists none.

        Raises:
            ValueError: the server does not answer, refuses the key, or does not know the model.
        """
        try:
            found = self._send("models", None)
        except Refused as error:
            if error.status in (401, 403):
                raise ValueError(
                    f"--endpoint is {self.endpoint.url!r}; it refuses the key ({error}). Name the variable that holds one with "
                    "--api-key-env."
                ) from None
            if 300 <= error.status < 400:
                raise ValueError(f"--endpoint is {self.endpoint.url!r}; {error}. Name that address.") from None
            return []  # a server that lists no models may answer
        except Unanswered as error:
            raise ValueError(
                f"--endpoint is {self.endpoint.url!r}; it does not answer ({error}). Start the server, or correct the address."
            ) from None
        data = found.get("data") if isinstance(found, dict) else None
        listed = [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        names = [str(each.get("id")) for each in listed]
        if names and self.model not in names:
            raise ValueError(
                f"--model is {self.model!r}; at --endpoint there is {', '.join(names[:20])}. Name one of them."
            )
        return listed

    # ---- as Generator

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator. Of a completion's tokens the number is known, not what they are.

        Raises:
            ValueError: the server refuses a request, or does not answer after all attempts.
        """
        seeds = sequence_seeds(seed, len(prompts) * num_completions).view(len(prompts), -1)
        found: list[list[Completion | None]] = [[None] * num_completions for _ in prompts]
        groups: dict[int, Group] = {}
        self._stopped.clear()
        with ExitStack() as stack:
            stack.callback(self._write, at_once=True)  # once the requests have ended that were under way at an error
            threads = stack.enter_context(ThreadPoolExecutor(self.endpoint.concurrency))
            todo = iter(
                (p, g, _seed_of(prompt, int(seeds[p, g]), g, num_completions))
                for p, prompt in enumerate(prompts)
                for g in range(num_completions)
            )
            waiting: dict[Any, tuple[int, int]] = {}
            try:
                while True:
                    while len(waiting) < 2 * self.endpoint.concurrency and (each := next(todo, None)) is not None:
                        p, g, own = each
                        waiting[threads.submit(self._complete, prompts[p], sampling, own)] = p, g
                    if not waiting:
                        return [groups[p] for p in range(len(prompts))]
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        p, g = waiting.pop(future)
                        found[p][g] = future.result()
                        own_group = [each for each in found[p] if each is not None]
                        if len(own_group) == num_completions:
                            groups[p] = Group(prompts[p], own_group)
                            if on_group is not None:
                                on_group(p, groups[p])
            finally:
                self._stopped.set()
                for future in waiting:
                    future.cancel()

    def sync(self) -> None:
        """Its weights are its own."""

    def halve(self) -> str | None:
        return None

    def release_memory(self) -> None:
        """It has none here."""

    def metrics(self) -> dict[str, float]:
        return {}

    # ---- one request

    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        is_chat = prompt.messages is not None
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            **({"messages": prompt.messages} if is_chat else {"prompt": prompt.text}),
            **self._own_fields,
            **self.endpoint.request,
        }
        path = "chat/completions" if is_chat else "completions"
        reply = self._asked(path, body)
        try:
            (choice,) = reply["choices"]
            text = _chat_text(choice["message"]) if is_chat else prompt.prefill + str(choice["text"])
            reason: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
            usage = reply.get("usage") or {}
            read, written = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"--endpoint is {self.endpoint.url!r}; it answers {path} with {json.dumps(reply)[:200]}, which has no answer of "
                "OpenAI's form. Name another one."
            ) from None
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += read
            self.usage.completion_tokens += written
        self._write()
        return Completion([0] * written, [0.0] * written, text, reason)

    def _asked(self, path: str, body: dict[str, Any]) -> Any:
        pause, why = FIRST_PAUSE, ""
        for attempt in range(self.endpoint.retries + 1):
            try:
                return self._send(path, body)
            except Unanswered as error:
                why = str(error)
                if attempt == self.endpoint.retries or self._stopped.is_set():
                    break
                with self._lock:
                    self.usage.retries += 1
                # not all at the same moment, and at once if the others have failed
                if self._stopped.wait(max(error.pause, pause * random.uniform(0.5, 1.0))):
                    break
                pause = min(2 * pause, LONGEST_PAUSE)
            except Refused as error:
                bare = "HTTP 404" in str(error) and not re.search(r"/v\d+/?\Z", self.endpoint.url)
                remedy = "The address has no version, such as /v1: add it" if bare else "Correct the request"
                raise ValueError(
                    f"--endpoint is {self.endpoint.url!r}; it refuses a request for {self.model!r}: {error}. {remedy}; the same "
                    "command goes on where this one has ended."
                ) from None
        raise ValueError(
            f"--endpoint is {self.endpoint.url!r}; it has not answered after {self.endpoint.retries + 1} attempts: {why}. The "
            "same command goes on where this one has ended; a lower --concurrency asks for less."
        )

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """Ask once.

        Raises:
            Unanswered: it may answer another time.
            Refused: it will not.
        """
        headers = {"Content-Type": "application/json"}
        if self.endpoint.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.endpoint.api_key_env]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint.url.rstrip('/')}/{path}", data=data, headers=headers)
        seconds = self.endpoint.timeout_seconds if body is not None else 30.0
        try:
            with self._opener.open(request, timeout=seconds) as response:
                text = response.read(LARGEST_REPLY)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}: {_beginning(error)}"
            if error.code in RETRIED:
                raise Unanswered(said, _retry_after(error.headers.get("Retry-After"))) from None
            raise Refused(said, error.code) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, no such host, out of time
            reason = getattr(error, "reason", "") or error or type(error).__name__
            raise Unanswered(str(reason), 0.0) from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Unanswered(f"its reply is no JSON: {text[:200]!r}", 0.0) from None

    def _write(self, *, at_once: bool = False) -> None:
        with self._lock:
            if self._path is None or (time.monotonic() - self._last_write < WRITE_EVERY and not at_once):
                return
            self._last_write = time.monotonic()
            price = self.endpoint.price
            found = {"usage": asdict(self.usage), "price": price, "dollars": self.usage.dollars(price)}
            replace_text(self._path, json.dumps(found, indent=1))

    def report(self) -> None:
        say(f"{self.usage.in_words(self.endpoint.price)} (all starts)")


class Unanswered(Exception):
    """A server gave no answer; after `pause` seconds it may."""

    def __init__(self, why: str, pause: float) -> None:
        super().__init__(why)
        self.pause = pause


class Refused(Exception):
    """A server takes a request for wrong."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


class _StaysThere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key along, to whatever host it names. A 3xx is an error then."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _beginning(error: urllib.error.HTTPError) -> str:
    """What a reply that is an error says; its status alone where the connection breaks meanwhile."""
    if 300 <= error.code < 400:
        error.close()
        return f"it sends on to {error.headers.get('Location')!r}"
    try:
        with error:
            return error.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"({broken})"


def _seed_of(prompt: Prompt, usual: int, number: int, num_completions: int) -> int:
    """Of one sample, positive and within 31 bits, which every service takes."""
    own = usual if prompt.seed is None else int(sequence_seeds(prompt.seed, num_completions)[number])
    return own % 2**31


def _chat_text(message: dict[str, Any]) -> str:
    """An answer with its thoughts in front, which servers call reasoning_content or reasoning."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = str(message.get("content") or "")
    return f"<think>{thoughts}</think>{content}" if thoughts else content


def _retry_after(value: str | None) -> float:
    """Seconds; a date is taken for none."""
    try:
        return min(max(0.0, float(value or 0)), 600.0)
    except ValueError:
        return 0.0
