"""A hub that cannot be reached is found out within seconds; one that is slow, or was there before, is used."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from helpers import TINY
from huggingface_hub import constants
from transformers.utils import hub

from grpo import cli
from grpo.config import ModelConfig
from grpo.data.files import load_table
from grpo.policy.model_source import model_config
from grpo.policy.tokenizer import load_tokenizer
from grpo.system import hub_access

FILES = TINY / "model"


class _SlowHub(BaseHTTPRequestHandler):
    """Has one model, somebody/tiny, and takes its time for each answer."""

    def do_HEAD(self) -> None:
        time.sleep(0.1)
        found = re.fullmatch(r"/somebody/tiny/resolve/main/([\w.]+)", self.path)
        path = FILES / found[1] if found else FILES / "none"
        content = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if path.is_file() else 404)
        if not path.is_file():
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


@contextmanager
def slow_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _SlowHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As without HF_HUB_OFFLINE and with an empty cache; the hub is at a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_access, "_answered", False)
    monkeypatch.setattr(hub_access, "_failed", None)
    monkeypatch.chdir(tmp_path)
    _move(monkeypatch, closed)
    yield monkeypatch
    huggingface_hub.close_session()


def _move(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hub.hf_api(), "endpoint", address)  # which transformers makes once
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


COMMANDS = [
    ["train", "--config", "hub.yaml", "--processes", "2"],
    ["train", "--config", "quickstart", "--set", "data.name=somebody/data"],
    ["train", "--config", "quickstart", "--set", "rewards=[{function: reward_model, args: {model: somebody/tiny}}]"],
    ["preflight", "--config", "hub.yaml"],
    ["check", "memory", "--config", "hub.yaml"],
    ["evaluate", "--model", "somebody/tiny", "--benchmarks", "gsm8k"],
    ["chat", "--model", "somebody/tiny"],
    ["sample", "--model", "somebody/tiny", "--row", "1"],
    ["serve", "--model", "somebody/tiny"],
    ["export", "somebody/tiny", "--out", "x"],
    ["reject", "--model", "somebody/tiny", "--out", "x.jsonl"],
    ["scale", "--model", "somebody/tiny", "--gpus", "1", "--hours", "1", "--out", "x.yaml"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_without_a_network_says_so_in_a_line_and_asks_no_second_time(
    arguments: list[str], online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("hub.yaml").write_text("model: {name: somebody/tiny}\ndata: {name: openai/gsm8k}\nrun: {dir: x, steps: 1}\n")
    online.setattr(hub_access, "WAITS", (0.0,))
    online.setattr(sys, "argv", [])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert time.monotonic() - began < 15  # huggingface_hub alone takes 24 s for one file
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(
        r"error: \S+ is 'somebody/(tiny|data)'; .* in the cache, and the hub http://127\.0\.0\.1:\d+ cannot be reached "
        r"\(.*refused.*\)\. Set \S+ to a .*`hf download somebody/.*`\.\n",
        said,
    ), said


def test_a_hub_that_accepts_and_never_answers_is_given_up_after_the_users_timeout(online: pytest.MonkeyPatch):
    online.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _move(online, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"somebody/tiny.*cannot be reached \(.*(timed out|no answer in 4 s)"):
            model_config(ModelConfig(name="somebody/tiny"))
        with pytest.raises(ValueError, match=r"^data\.name is 'somebody/data' .*cannot be reached"):
            list(load_table("somebody/data", None, "train", "data.name"))
        assert time.monotonic() - began < 7.5, "it was asked twice"


def test_a_slow_hub_is_waited_for_and_what_it_gave_is_used_when_it_is_gone(
    online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = ModelConfig(name="somebody/tiny")
    with slow_hub() as address:
        _move(online, address)
        vocabulary = load_tokenizer(model).get_vocab()
        assert hub_access.unreachable() is None
    online.setattr(hub_access, "_answered", False)  # another process, later
    online.setattr(hub_access, "WAITS", (0.0,))
    huggingface_hub.close_session()
    began = time.monotonic()
    assert load_tokenizer(model).get_vocab() == vocabulary
    assert time.monotonic() - began < 15
    assert re.search(r"note: the hub .* cannot be reached .*; copies in .*cache are used", capsys.readouterr().out)
    assert constants.HF_HUB_OFFLINE is False  # a push at the end of the run asks again
