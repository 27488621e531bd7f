"""A judge behind an endpoint: a real server on this machine that answers, is slow, overloaded, dead, or talks nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import judge
from grpo.rewards.parts_of import part_of
from helpers import free_port

from grpo.config import RewardConfig
from grpo.scoring.binding import bind
from grpo.scoring.reward import Reward, resolve_rewards
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt

QUESTION = "Why is the sky blue?"


class Endpoint:
    """What a server does: `reply(text of the request, number of requests with this text)` is (status, headers, body)."""

    def __init__(self, reply: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()


def said(content: str, *, read: int = 100, written: int = 10) -> tuple[int, dict[str, str], bytes]:
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


@contextmanager
def serving(reply: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, Endpoint]]:
    endpoint = Endpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*endpoint.reply("", 1))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            with endpoint.lock:
                endpoint.requests.append(body)
                endpoint.headers.append(dict(self.headers))
                number = sum(each["messages"][0]["content"] == text for each in endpoint.requests)
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                self._send(*endpoint.reply(text, number))
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the judge has gone

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def graded(own: Any, *completions: str) -> tuple[list[float | None], dict[str, list[float]]]:
    logged: dict[str, list[float]] = {}
    found = own(
        list(completions),
        [QUESTION] * len(completions),
        log_metric=lambda name, v: logged.setdefault(name, []).append(v),
    )
    return found, logged


def by_word(text: str, number: int) -> tuple[int, dict[str, str], bytes]:
    return said(
        "It is fine.\nGrade: 10" if "scatters" in text else "Meh.\n**Score**: 1" if "dunno" in text else "Grade: 5.5"
    )


def test_grades_are_shares_and_asked_for_at_once_with_what_they_cost():
    def slowly(text: str, number: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.2)
        return by_word(text, number)

    with serving(slowly) as (url, endpoint):
        own = judge(url, "grader", cache="", price=(2.0, 10.0), request={"seed": 3})
        found, logged = graded(own, "Air scatters blue.", "I dunno.", *(f"so so {n}" for n in range(6)))
        assert endpoint.most_at_once > 3
    assert found == [1.0, 0.0, *[0.5] * 6]
    assert logged["judge_tokens"] == [110.0] * 8
    assert logged["judge_dollars"] == pytest.approx([(100 * 2 + 10 * 10) / 1e6] * 8)
    assert logged["judge_failed"] == [0.0] * 8
    body = endpoint.requests[0]
    assert (body["model"], body["temperature"], body["seed"]) == ("grader", 0.0, 3)
    assert QUESTION in body["messages"][0]["content"]
    assert "from 1 to 10" in body["messages"][0]["content"]


def test_the_judge_sees_the_answer_without_thoughts_or_all_of_it():
    text = "<think>dunno</think> <answer>Air scatters.</answer>"
    with serving(by_word) as (url, endpoint):
        assert graded(judge(url, "m", cache=""), text)[0] == [1.0]
        assert "dunno" not in endpoint.requests[0]["messages"][0]["content"]
        graded(judge(url, "m", cache="", part="all"), text)
        assert text in endpoint.requests[1]["messages"][0]["content"]
    assert part_of("<think>a</think> b", "answer") == "b"
    assert part_of("a</think> <answer> b </answer> c", "answer") == "b"
    assert part_of("<think>never ends", "answer") == ""
    assert part_of("plain", "answer") == "plain"
    assert part_of(text, "all") == text


def test_what_a_completion_writes_in_braces_is_not_filled_in():
    with serving(by_word) as (url, endpoint):
        graded(judge(url, "m", "Q {question} A {completion} G {answer}", cache=""), "see {answer} and {low}")
    assert endpoint.requests[0]["messages"][0]["content"] == f"Q {QUESTION} A see {{answer}} and {{low}} G "


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_endpoint_is_asked_again_after_a_pause(status: int):
    def reply(text: str, number: int) -> tuple[int, dict[str, str], bytes]:
        return (status, {"Retry-After": "0.3"}, b"later") if number < 3 else by_word(text, number)

    with serving(reply) as (url, endpoint):
        began = time.monotonic()
        found, logged = graded(judge(url, "m", cache=""), "Air scatters blue.")
        assert time.monotonic() - began > 0.6
    assert found == [1.0]
    assert len(endpoint.requests) == 3
    assert logged["judge_failed"] == [0.0]


NONSENSE = [
    (200, {}, b"<html>hello</html>"),
    (200, {}, b'{"choices": [{"mess'),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[1, 2]"),
    (200, {}, b"[" * 100_000),
    (200, {}, b"\xff\xfe"),
    said("I will not grade this."),
    said("Grade: 11"),
    said("Grade: 7 of 7 ...\nGrade: -1"),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (500, {}, b"broken"),
]


@pytest.mark.parametrize("reply", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_cannot_tell_and_not_zero(
    reply: tuple[int, dict[str, str], bytes], capsys: pytest.CaptureFixture[str]
):
    with serving(lambda text, number: reply) as (url, endpoint):
        found, logged = graded(judge(url, "m", cache="", retries=1), "Air scatters blue.", "Good.")
    assert found == [None, None]
    assert len(endpoint.requests) == 4  # each twice
    assert logged["judge_failed"] == [1.0, 1.0]
    assert logged["judge_tokens"] == [0.0, 0.0]
    assert capsys.readouterr().err.count("judge: can't tell: ") == 1  # once for both, into rewards.log


def test_a_refused_key_or_a_wrong_model_is_not_asked_again():
    for status in (400, 401, 404):
        with serving(lambda text, number, status=status: (status, {}, b"no such model")) as (url, endpoint):
            assert graded(judge(url, "m", cache=""), "x")[0] == [None]
            assert len(endpoint.requests) == 1


def test_a_dead_endpoint_is_cannot_tell_and_said_at_start():
    url = f"http://127.0.0.1:{free_port()}/v1"
    own = judge(url, "m", cache="", retries=1)
    found, logged = graded(own, "a", "b")
    assert found == [None, None]
    assert logged["judge_failed"] == [1.0, 1.0]
    assert own.notice().startswith(f"warning: judge: {url} does not answer (")
    with serving(by_word) as (alive, _):
        assert judge(alive, "m", cache="").notice() is None
    with serving(lambda text, number: (401, {}, b"")) as (closed, _):
        assert "refuses the key (401)" in judge(closed, "m", cache="").notice()


def test_a_slow_endpoint_has_its_time_and_no_more():
    goes_on = threading.Event()

    def asleep(text: str, number: int) -> tuple[int, dict[str, str], bytes]:
        goes_on.wait(60)
        return by_word(text, number)

    with serving(asleep) as (url, _):
        began = time.monotonic()
        assert graded(judge(url, "m", cache="", timeout_seconds=0.3, retries=0), "a", "b")[0] == [None, None]
        assert time.monotonic() - began < 20  # and not for the answer, which takes a minute
        began = time.monotonic()
        own = judge(url, "m", cache="", timeout_seconds=0.3, retries=50, deadline_seconds=1.0)
        assert graded(own, "a", "b")[0] == [None, None]
        assert time.monotonic() - began < 20
        assert own.least_seconds > 1.0  # so that the worker outlives it
        goes_on.set()


def test_verdicts_are_kept_and_failures_are_not(tmp_path: Path):
    cache = str(tmp_path / "verdicts")
    is_up = [False]

    def reply(text: str, number: int) -> tuple[int, dict[str, str], bytes]:
        return by_word(text, number) if is_up[0] else (500, {}, b"")

    with serving(reply) as (url, endpoint):
        assert graded(judge(url, "m", cache=cache, retries=0), "Air scatters.")[0] == [None]
        is_up[0] = True
        assert graded(judge(url, "m", cache=cache), "Air scatters.")[0] == [1.0]
        num = len(endpoint.requests)
        found, logged = graded(judge(url, "m", cache=cache), "Air scatters.", "other")
        assert found == [1.0, 0.5]
        assert len(endpoint.requests) == num + 1
        assert logged["judge_cached"] == [1.0, 0.0]
        assert logged["judge_tokens"] == [0.0, 110.0]  # what is known costs nothing
        graded(judge(url, "other model", cache=cache), "Air scatters.")
        graded(judge(url, "m", "{question} {completion}", cache=cache), "Air scatters.")
        assert len(endpoint.requests) == num + 3
        for path in Path(cache).rglob("*.json"):
            path.write_text('{"grade": ')  # cut short
        assert graded(judge(url, "m", cache=cache), "Air scatters.")[0] == [1.0]
        assert len(endpoint.requests) == num + 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"url": "localhost:8000"}, r"^rewards\.\*\.args\.url of judge is 'localhost:8000'; it begins with http"),
        ({"template": "{question}"}, r"has no \{completion\}; the judge could not see it\. Add it\.$"),
        ({"low": 5, "high": 5}, r"have low 5 and high 5; low is the smaller one"),
        (
            {"api_key_env": "NO_SUCH_KEY"},
            r"api_key_env of judge is 'NO_SUCH_KEY'; there is no such environment variable here",
        ),
        ({"part": "thought"}, r"^the part of judge is 'thought'; it is all or answer"),
        ({"retries": -1}, r"retries are at least 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        judge(**{"url": "http://127.0.0.1:1/v1", "model": "m", **changed})


def test_an_unknown_argument_of_a_configuration_is_told_beside_those_that_a_judge_is_made_with():
    args = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    (mistaken,) = resolve_rewards([RewardConfig(function="judge", args={**args, "retry": 3})])
    names = r"api_key_env, cache, .*, retries, template, timeout_seconds, url; did you mean retries\?"
    with pytest.raises(ValueError, match=rf"^rewards\.\*\.args of judge sets 'retry'; .*: there is {names} Remove it"):
        bind(mistaken, ["question", "answer"], {})
    own = Reward(judge(**args), args={"retry": 3})  # whose args are those of a call
    with pytest.raises(ValueError, match=r"^rewards\.\*\.args of judge sets 'retry'; .*: there is nothing\. Remove it"):
        bind(own, ["question", "answer"], {})


def test_a_worker_asks_with_the_key_that_the_judge_names_and_logs_the_cost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    with serving(by_word) as (url, endpoint):
        own = judge(url, "m", cache="", api_key_env="JUDGE_API_KEY", price=(1.0, 1.0))
        with Scorer(
            [Reward(own)],
            columns=["question", "answer"],
            max_completion_tokens=9,
            num_workers=1,
            timeout_seconds=10,
            memory_gib=4,
        ) as scorer:
            columns = {"question": QUESTION, "answer": None}
            texts = ["Air scatters blue.", "I dunno."]
            group = Group(Prompt(0, [1], "q", "", columns), [Completion([2], [0.0], text, "stop") for text in texts])
            scores = scorer.score([group])
    assert scores.values["judge"].tolist() == [[1.0, 0.0]]
    assert scores.metrics["judge_dollars"] == pytest.approx([110e-6] * 2)
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer s3cret"}
    assert "s3cret" not in repr(vars(own))
