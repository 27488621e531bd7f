"""A language model as judge, behind an endpoint that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, or a service.

The verdicts of a group are asked for at once, in a reward worker, while other groups are still being sampled. What the judge
cannot say is None, "can't tell", never 0: an endpoint that is dead, slow or overloaded, an answer without a grade. Such a
completion is neither rewarded nor punished, and the share of them is a metric.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parts_of import check_part, part_of

if TYPE_CHECKING:
    import urllib.request

# What speaks HTTP is imported where it is used: every reward worker imports this module, and few of them ask a judge.

TEMPLATE = """Please grade the response of an assistant to a question of a user: is it helpful, correct, relevant and clear?

[Question]
{question}

[Response]
{completion}

Think briefly, then end with a line with the grade, an integer from {low} to {high}, like this: Grade: {high}"""

_GRADE = re.compile(r"(?:grade|score|rating)(?:[^\w-]|-(?!\d)){1,12}(-?\d+(?:\.\d+)?)", re.IGNORECASE)
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses of a server that may answer another time."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds before another attempt; doubled each time


class Unanswered(Exception):
    """The endpoint gave no grade. `pause`: seconds after which it may; None: never."""

    def __init__(self, why: str, pause: float | None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class Answer:
    """What an attempt brought."""

    grade: float
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Judge:
    """A grade from `low` to `high`, as a share from 0 to 1; None where there is none.

    Args:
        url: of the endpoint, up to and including its version: http://127.0.0.1:8000/v1.
        model: its name there.
        template: what is asked, with {question}, {completion}, and {answer}, {low}, {high} if you like.
        part: of the completion, `all` or `answer` (without thoughts).
        low, high: the bounds of the grade.
        api_key_env: name of the environment variable that holds the key; it is handed to the reward workers. None: no key.
        timeout_seconds: of one request.
        retries: further attempts, after a pause that doubles from half a second on, or as the endpoint says (Retry-After).
        deadline_seconds: of all attempts at the completions of a group.
        concurrency: requests at once, of each reward worker.
        cache: directory of verdicts, so that a resumed run pays for none twice; empty: none.
        price: dollars for a million tokens read, and for a million written.
        request: further fields of a request; temperature and max_tokens have defaults here.

    Raises:
        ValueError: an argument is no such thing, or the key is not in the environment.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        part: str = "answer",
        low: float = 1,
        high: float = 10,
        api_key_env: str | None = None,
        timeout_seconds: float = 60.0,
        retries: int = 3,
        deadline_seconds: float = 240.0,
        concurrency: int = 16,
        cache: str | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        request: dict[str, Any] | None = None,
    ) -> None:
        self.__name__ = "judge"
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"rewards.*.args.url of judge is {url!r}; it begins with http:// or https://. Correct it.")
        for place in ("{question}", "{completion}"):
            if place not in template:
                raise ValueError(
                    f"rewards.*.args.template of judge has no {place}; the judge could not see it. Add it."
                )
        if not low < high:
            raise ValueError(
                f"rewards.*.args of judge have low {low} and high {high}; low is the smaller one. Correct them."
            )
        if retries < 0 or concurrency < 1 or timeout_seconds <= 0 or deadline_seconds <= 0:
            raise ValueError(
                f"rewards.*.args of judge have retries {retries}, concurrency {concurrency}, timeout_seconds {timeout_seconds}, "
                f"deadline_seconds {deadline_seconds}; retries are at least 0, the others above it. Correct them."
            )
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(
                f"rewards.*.args.api_key_env of judge is {api_key_env!r}; there is no such environment variable here. Export it."
            )
        check_part("judge", part)
        self.url, self.model, self.template, self.part = url.rstrip("/"), model, template, part
        self.low, self.high, self.api_key_env = low, high, api_key_env
        self.timeout_seconds, self.retries, self.deadline_seconds = timeout_seconds, retries, deadline_seconds
        self.concurrency, self.price = concurrency, tuple(price)
        self.cache = _default_cache() if cache is None else cache
        self.request = {"temperature": 0.0, "max_tokens": 1024, **(request or {})}

    tells_of_all = True  # None is a grade that did not come
    environment = property(
        lambda self: () if self.api_key_env is None else (self.api_key_env,), doc="Variables that a worker is given."
    )
    least_seconds = property(
        lambda self: self.deadline_seconds + 10, doc="Of a call, whatever scoring.timeout_seconds says."
    )

    def notice(self) -> str | None:
        """Said at start: the endpoint does not answer. It may come up later, so this is no error."""
        import http.client
        import urllib.error
        import urllib.request

        try:
            with urllib.request.urlopen(self._request("models"), timeout=5):
                return None
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                return None  # a server that lists no models may grade
            return f'warning: judge: {self.url} refuses the key ({error.code}); its verdicts will be "can\'t tell".'
        except (OSError, http.client.HTTPException) as error:
            return (
                f"warning: judge: {self.url} does not answer ({_said(error)}); as long as that is so, its verdicts are \"can't "
                'tell".'
            )

    def __call__(
        self,
        completions: list[str],
        question: list[str],
        answer: list[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> list[float | None]:
        """The grades of the completions of a group, asked for at once."""
        from concurrent.futures import ThreadPoolExecutor

        deadline = time.monotonic() + self.deadline_seconds
        golds = answer or [None] * len(completions)
        asked = [self._asked(*each) for each in zip(completions, question, golds, strict=True)]
        with ThreadPoolExecutor(min(self.concurrency, len(asked))) as threads:
            found = list(threads.map(lambda text: self._graded(text, deadline), asked))
        for name in sorted({why for _, _, why in found if why}):
            print(f"judge: can't tell: {name}", file=sys.stderr)
        if log_metric is not None:
            for each, is_cached, why in found:
                read, written = (0, 0) if each is None or is_cached else (each.prompt_tokens, each.completion_tokens)
                log_metric("judge_failed", float(bool(why)))
                log_metric("judge_cached", float(is_cached))
                log_metric("judge_tokens", float(read + written))
                log_metric("judge_dollars", (read * self.price[0] + written * self.price[1]) / 1e6)
        return [None if each is None else (each.grade - self.low) / (self.high - self.low) for each, _, _ in found]

    def _asked(self, completion: str, question: str, answer: Any) -> str:
        values = {
            "question": question,
            "completion": part_of(completion, self.part),
            "answer": "" if answer is None else str(answer),
            "low": f"{self.low:g}",
            "high": f"{self.high:g}",
        }
        return re.sub(r"\{(question|completion|answer|low|high)\}", lambda place: values[place[1]], self.template)

    def _graded(self, text: str, deadline: float) -> tuple[Answer | None, bool, str]:
        """The answer, whether it was known before, and why there is none."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.request}
        path = self._path(body)
        if (kept := _read(path)) is not None:
            return kept, True, ""
        pause, why = FIRST_PAUSE, "out of time"
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                found = self._answer(body, min(self.timeout_seconds, left))
            except Unanswered as error:
                why = str(error)
                if error.pause is None or attempt == self.retries:
                    break
                wait = max(error.pause, pause * random.uniform(0.5, 1.0))  # not all of a group at the same moment
                if wait > deadline - time.monotonic():
                    break
                time.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            _write(path, found)
            return found, False, ""
        return None, False, why

    def _answer(self, body: dict[str, Any], seconds: float) -> Answer:
        """Ask once.

        Raises:
            Unanswered: there is no grade in what came, if anything did.
        """
        import http.client
        import urllib.error
        import urllib.request

        until = time.monotonic() + seconds
        try:
            with urllib.request.urlopen(self._request("chat/completions", body), timeout=seconds) as response:
                text = _within(response, until)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode(errors="replace")
            pause = _retry_after(error.headers.get("Retry-After")) if error.code in RETRIED else None
            raise Unanswered(f"HTTP {error.code}: {said}", pause) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, no such host, out of time
            raise Unanswered(_said(error), 0.0) from None
        try:
            reply = json.loads(text)
            content = str(reply["choices"][0]["message"]["content"])
            usage = reply.get("usage") or {}
            read, written = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Unanswered(f"no answer of a chat: {text[:200]!r}", 0.0) from None
        grades = _GRADE.findall(content)
        if not grades or not self.low <= float(grades[-1]) <= self.high:
            raise Unanswered(f"no grade from {self.low:g} to {self.high:g} in {content[-200:]!r}", 0.0)
        return Answer(float(grades[-1]), read, written)

    def _request(self, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
        import urllib.request

        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)

    def _path(self, body: dict[str, Any]) -> Path | None:
        if not self.cache:
            return None
        key = json.dumps([self.url, body, self.low, self.high], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.cache).expanduser() / name[:2] / f"{name[2:]}.json"


def _default_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(Path(base).expanduser() / "grpo" / "judge")


LARGEST_REPLY = 4 * 2**20  # bytes


def _within(response: Any, until: float) -> str:
    """What a server sends, which may drip without end."""
    data = bytearray()
    while block := response.read1(65536):
        data += block
        if time.monotonic() > until:
            raise TimeoutError("timed out while it was answering")
        if len(data) > LARGEST_REPLY:
            raise Unanswered("its reply does not end", None)
    return data.decode(errors="replace")


def _retry_after(value: str | None) -> float:
    """Seconds; a date is taken for none."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0


def _said(error: BaseException) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _read(path: Path | None) -> Answer | None:
    if path is None:
        return None
    try:
        return Answer(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or cut short by a full disk
        return None


def _write(path: Path | None, answer: Answer) -> None:
    """Whole or not at all: other workers read it. A full disk loses a verdict of the cache, not one of the run."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(vars(answer), file)
        os.replace(name, path)
