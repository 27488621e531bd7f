"""A run is pushed to the hub, and does not depend on it; the hub is a server on this machine."""

from __future__ import annotations

import concurrent.futures.thread
import errno
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from fake_hub import Hub, _Handler, fake_hub
from helpers import TINY, tiny_config, tiny_settings
from safetensors.torch import load, load_file

from grpo import Callback, Trainer
from grpo.cli.export import parser, run
from grpo.config import Config, SupervisedConfig
from grpo.policy.model_source import name_of
from grpo.run.hub import NotPushed, PushToHub, _unstage_all, push_model
from grpo.system import progress
from grpo.system.stopping import Stopped


class Keeper(_Handler):
    """Knows what it has: lists files and tags, deletes both, and refuses a tag that is there."""

    def do_GET(self) -> None:
        repo = next((name for name in self.server.files if f"/{name}/" in f"{self.path}/"), "")
        if "/tree/" in self.path:
            names = self.server.files[repo]
            self._answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names])
        elif self.path.endswith("/refs"):
            tags = self.server.tags.get(repo, {})
            refs = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "before"} for tag in tags]
            self._answer(200, {"branches": [], "converts": [], "tags": refs})
        else:
            super().do_GET()

    def do_DELETE(self) -> None:
        repo, tag = re.fullmatch(r"/api/models/(.*)/tag/(.*)", self.path).groups()
        del self.server.tags[repo][tag]
        self._answer(200, {})

    def _commit(self, kind: str, repo: str, body: bytes) -> None:
        for item in map(json.loads, body.decode().splitlines()):
            if item["key"] == "deletedFile":
                del self.server.files[repo][item["value"]["path"]]
        super()._commit(kind, repo, body)

    def _tag(self, kind: str, repo: str, body: bytes) -> None:
        name, revision = json.loads(body)["tag"], self.path.rpartition("/")[2]
        if name in self.server.tags.get(repo, {}):
            self._answer(409, {"error": "Tag reference exists already"})
        elif revision in getattr(self.server, "refused", ()):
            self._answer(500, {"error": "Out of order"})
        else:
            super()._tag(kind, repo, body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as server:
        server.RequestHandlerClass = Keeper
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def trained(run_dir: Path, **settings: object) -> Path:
    """The last checkpoint of a run of two steps with a checkpoint after each."""
    checkpoint = {"every_steps": 1, "keep": 1, "background": True}
    config = tiny_config(run_dir, checkpoint=checkpoint, run={"push_to_hub": "me/small", **settings})
    return Trainer(config).train()


def test_every_checkpoint_is_a_revision_and_completions_are_a_data_set(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    last = trained(tmp_path / "run", push_at="checkpoint")
    assert list(hub.tags["me/small"]) == ["step-1", "step-2"]
    first, second = (load(files["model.safetensors"]) for files in hub.tags["me/small"].values())
    stored = load_file(last / "hf" / "model.safetensors")
    assert all(second[name].equal(weight) for name, weight in stored.items())
    assert not all(first[name].equal(weight) for name, weight in stored.items())
    assert not (tmp_path / "run/checkpoints/step-00000001").exists(), "it was pushed though the run has removed it"
    card = hub.files["me/small"]["README.md"].decode()
    assert "step 2 of 2 steps" in card
    assert 'from_pretrained("me/small"' in card
    pushed = hub.files["me/small-completions"]
    assert pushed["completions.jsonl"] == (tmp_path / "run" / "completions.jsonl").read_bytes()
    assert hub.private == {"me/small": True, "me/small-completions": True}
    assert f"pushed     {hub.address}/me/small\n" in capsys.readouterr().out
    assert not (tmp_path / "run" / "hub").exists(), "nothing of it stays"


@pytest.mark.parametrize("trouble", ["no network", "no login"])
def test_a_run_ends_well_without_the_hub_and_says_so(
    trouble: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if trouble == "no network":
        with socket.socket() as free:  # a port at which nobody listens
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    else:
        monkeypatch.setattr("grpo.run.hub.get_token", lambda: None)
    last = trained(tmp_path / "run")
    assert (last / "hf" / "model.safetensors").is_file()
    said = capsys.readouterr().out
    later = f"`grpo export {tmp_path / 'run'} --to hub me/small`"
    if trouble == "no login":
        assert "nobody is logged in to the hub. The run goes on" in said
        assert f"nothing was pushed to me/small: nobody is logged in to the hub; {later} pushes it\n" in said
    else:
        line = next(line for line in said.splitlines() if line.startswith("warning: not pushed to me/small: "))
        assert "ConnectError" in line
        assert line.endswith(f"The run goes on; {later} pushes it later")
    assert not hub.files.get("me/small")
    assert not (tmp_path / "run" / "hub").exists()


def test_a_model_is_pushed_by_hand(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    options = [str(TINY / "model"), "--to", "hub", "me/base"]
    assert run(parser().parse_args([*options, "--public"])) == [f"{hub.address}/me/base"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files["me/base"])
    assert hub.private == {"me/base": False}
    assert not hub.tags, "it is no checkpoint"
    hub.broken = True
    with pytest.raises(ValueError, match=r"--to is hub me/base; it was not pushed: HfHubHTTPError: .* Try again"):
        run(parser().parse_args(options))
    hub.broken = False
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"it was not pushed: .*401"):
        run(parser().parse_args(options))
    monkeypatch.setattr("grpo.run.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"nobody is logged in to the hub\. Log in"):
        run(parser().parse_args(options))


def test_a_repository_holds_one_model_and_a_tag_is_not_lost(hub: Hub, tmp_path: Path):
    def folder(*names: str) -> Path:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        (tmp_path / "model").mkdir()
        for name in names:
            (tmp_path / "model" / name).write_text(f"{name} of {len(names)}")
        return tmp_path / "model"

    shards = (
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
    )
    push_model("me/one", folder(*shards, "pytorch_model.bin", "config.json"), step=3, private=True)
    hub.files["me/one"]["LICENSE"] = b"of a person"
    push_model("me/one", folder("model.safetensors", "config.json"), step=3, private=True)
    assert sorted(hub.files["me/one"]) == ["LICENSE", "config.json", "model.safetensors"]
    assert hub.tags["me/one"]["step-3"] == hub.files["me/one"], "the tag has moved"
    hub.refused = [f"{1:040d}"]  # what the next commit is called
    with pytest.raises(NotPushed, match="500"):
        push_model("me/one", folder("config.json", "generation_config.json", "model.safetensors"), step=3, private=True)
    assert list(hub.tags["me/one"]) == ["step-3"], "it is there again"


# --- while a run trains ---------------------------------------------------------------------------------------------------


class SlowApi:
    """A hub whose uploads end when `may_end` is set; `uploads` has what they read then, `started` how many have begun."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.started = threading.Semaphore(0)
        self.uploads: list[tuple[str, dict[str, str]]] = []
        self.failures: list[BaseException] = []

    def create_repo(self, repo: str, **_: Any) -> str:
        return f"https://hub/{repo}"

    def upload_folder(self, *, folder_path: Path, commit_message: str, **_: Any) -> SimpleNamespace:
        self.started.release()
        self.may_end.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        self.uploads.append((commit_message, {path.name: path.read_text() for path in folder_path.iterdir()}))
        return SimpleNamespace(oid="0" * 40)

    def create_tag(self, *_: Any, **__: Any) -> None:
        pass


class Run:
    """A run's directory, and what its loop tells a pusher."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reason: str | None = None
        directory.mkdir()
        self.config = tiny_config(directory, run={"push_to_hub": "me/small", "push_at": "checkpoint"})
        self.push = self.pusher()

    def pusher(self) -> PushToHub:
        processes: Any = SimpleNamespace(is_main=True, on_main=lambda compute: compute())
        return PushToHub(self.config, self.directory, processes, stop_reason=lambda: self.reason)

    def save(self, step: int, weights: str = "w") -> Path:
        path = self.directory / "checkpoints" / name_of(step)
        (path / "hf").mkdir(parents=True, exist_ok=True)
        (path / "hf" / "model.safetensors").write_text(weights)
        self.push.on_save(step, path)
        return path

    @property
    def staged(self) -> list[str]:
        try:
            return sorted(name.rpartition("-")[0] for name in os.listdir(self.directory / "hub"))
        except FileNotFoundError:  # removed with the last of them
            return []


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowApi]:
    slow = SlowApi()
    monkeypatch.setattr("grpo.run.hub.HfApi", lambda: slow)
    monkeypatch.setattr("grpo.run.hub.is_logged_in", lambda: True)
    monkeypatch.setattr("grpo.run.hub.write_card", lambda repo, run_dir, folder, **_: None)
    monkeypatch.setattr("grpo.run.hub.TICK_SECONDS", 0.02)
    yield slow
    slow.may_end.set()


@pytest.fixture
def training(api: SlowApi, tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came to it"
        time.sleep(0.01)


WHOLE = {"model.safetensors": "w"}


def test_the_last_checkpoint_is_pushed_whole_and_once_though_it_is_saved_twice(training: Run, api: SlowApi):
    training.save(2)
    assert api.started.acquire(timeout=20)
    last = training.save(2)
    assert training.staged == ["step-2"]
    threading.Timer(0.2, api.may_end.set).start()
    training.push.on_end(last)
    assert api.uploads == [("step-2", WHOLE)]
    assert not (training.directory / "hub").exists()


def test_a_last_checkpoint_that_was_not_pushed_is_pushed_at_the_end(
    training: Run, api: SlowApi, capsys: pytest.CaptureFixture[str]
):
    class Panic(BaseException):
        """What a library in Rust raises."""

    api.may_end.set()
    api.failures = [Panic("of Rust")]
    last = training.save(2)
    until(lambda: not training.staged)
    training.push.on_end(last)
    assert api.uploads == [("step-2", WHOLE)]
    assert "warning: not pushed to me/small: Panic: of Rust. The run goes on; `grpo export " in capsys.readouterr().out
    training.push.on_end(training.save(4))  # of a second call of train()
    assert [step for step, _ in api.uploads] == ["step-2", "step-4"]


def test_only_one_checkpoint_waits_for_a_slow_hub(training: Run, api: SlowApi, capsys: pytest.CaptureFixture[str]):
    training.save(1)
    assert api.started.acquire(timeout=20)
    for step in (2, 3, 4):
        shutil.rmtree(training.save(step))  # which has a newer one
    assert training.staged == ["step-1", "step-4"]
    said = capsys.readouterr().out
    assert "note: step 2 is not pushed to me/small: step 3 was saved while it waited" in said
    assert "note: step 3 is not pushed to me/small: step 4 was saved while it waited" in said
    api.may_end.set()
    until(lambda: not training.staged)
    assert api.uploads == [("step-1", WHOLE), ("step-4", WHOLE)]


def test_what_a_roll_back_has_undone_is_pushed_anew(training: Run, api: SlowApi):
    training.save(2, "first")
    assert api.started.acquire(timeout=20)
    shutil.rmtree(training.save(4, "never"))
    training.push.on_step(2, {}, None)
    assert training.staged == ["step-2"], "step 4 is no more, step 2 is under way"
    shutil.rmtree(training.directory / "checkpoints")  # which are links to what is under way
    last = training.save(2, "second")
    api.may_end.set()
    training.push.on_end(last)
    assert api.uploads == [("step-2", {"model.safetensors": text}) for text in ("first", "second")]


@pytest.mark.parametrize("trouble", ["too slow", "stopped"])
def test_the_end_waits_for_the_hub_with_a_limit_and_shows_that_it_lives(
    trouble: str, training: Run, api: SlowApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if trouble == "too slow":
        monkeypatch.setattr("grpo.run.hub.LIMIT_SECONDS", 0.36)
        why = "the hub has taken more than 0.0001 h"
    else:
        threading.Timer(0.36, lambda: setattr(training, "reason", "SIGTERM")).start()
        why = "the run was asked to stop (SIGTERM)"
    last = training.save(2)
    ticks, began = progress._ticks, time.monotonic()
    training.push.on_end(last)
    assert 0.3 < time.monotonic() - began < 10
    assert progress._ticks - ticks > 4, "other processes wait, and would end the run"
    assert progress._busy is None
    later = f"`grpo export {training.directory} --to hub me/small`"
    assert f"warning: not all is pushed to me/small: {why}; {later} pushes it later\n" in capsys.readouterr().out


def test_a_run_that_stops_drops_what_waits(training: Run, api: SlowApi, capsys: pytest.CaptureFixture[str]):
    training.push.on_stop()
    assert "not all" not in capsys.readouterr().out
    training.save(1)
    assert api.started.acquire(timeout=20)
    training.save(2)
    began = time.monotonic()
    training.push.on_stop()
    assert time.monotonic() - began < 15
    assert training.staged == ["step-1"]
    assert "warning: not all is pushed to me/small: the run stops; `grpo export" in capsys.readouterr().out
    other = training.pusher()  # in a notebook
    assert training.staged == ["step-1"], "what is under way is no leftover"
    api.may_end.set()
    until(lambda: not training.staged)
    assert api.uploads == [("step-1", WHOLE)]
    other.on_stop()


def test_a_trainer_that_is_stopped_does_not_wait_for_the_hub(
    api: SlowApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Stopper(Callback):
        def on_save(self, step: int, checkpoint: Path) -> None:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    given = {"push_to_hub": "me/small", "push_at": "checkpoint", "steps": 3}
    checkpoint = {"every_steps": 1, "background": False}
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=checkpoint, run=given), callbacks=[Stopper()])
    with pytest.raises(Stopped):
        trainer.train()
    assert "warning: not all is pushed to me/small: the run stops" in capsys.readouterr().out
    assert not api.uploads


def test_leftovers_of_a_killed_process_are_removed(api: SlowApi, training: Run):
    for name in ("step-7-abc", "completions-abc"):
        (training.directory / "hub" / name).mkdir(parents=True)
    training.pusher()
    assert not (training.directory / "hub").exists()


def test_a_full_disk_or_a_card_that_fails_is_a_line(
    training: Run, api: SlowApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    api.may_end.set()

    def full(*_: object) -> None:
        assert progress._busy is not None, "a copy may take longer than the others wait"
        raise OSError(errno.ENOSPC, "No space left on device")

    def bad_card(*_: object, **__: object) -> None:
        raise KeyError("no such metric")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", full)
        patch.setattr("shutil.copyfile", full)
        last = training.save(2)
        training.push.on_end(last)
    line = (
        "warning: not pushed to me/small: OSError: [Errno 28] No space left on device. The run goes on; `grpo export "
    )
    assert capsys.readouterr().out.count(line) == 2, "when it was saved, and at the end"
    assert not training.staged
    monkeypatch.setattr("grpo.run.hub.write_card", bad_card)
    training.push.on_end(last)
    assert "warning: not pushed to me/small: KeyError: 'no such metric'." in capsys.readouterr().out
    assert not training.staged
    assert not api.uploads


def test_the_end_of_a_process_does_not_wait_for_an_upload(training: Run, api: SlowApi):
    training.save(1)
    assert api.started.acquire(timeout=20)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "hub")
    assert thread.daemon
    assert thread not in concurrent.futures.thread._threads_queues, "which are waited for all the same"
    _unstage_all()
    assert not (training.directory / "hub").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hub", "base"], "--to is hub base; the name of a model on the hub is user/name"),
        (["--to", "hub"], "--to is hub; it is gguf, folder, or hub with user/name"),
        (["--to", "gguf", "me/base", "--out", "x"], "--to is gguf me/base; it is gguf, folder, or hub"),
        (["--to", "onnx", "--out", "x"], "--to is onnx; it is one of gguf, folder, hub"),
        (["--to", "folder"], "--out is missing; with --to folder it names a new folder"),
        (["--to", "hub", "me/base", "--out", "x"], "--out is x with --to hub, where it has no effect"),
        (["--public", "--out", "x"], "--public is True with --to gguf, where it has no effect"),
    ],
)
def test_a_place_that_is_none_is_refused(options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        run(parser().parse_args([str(TINY / "model"), *options]))


@pytest.mark.parametrize("kind", [Config, SupervisedConfig])
def test_settings_of_the_hub_are_checked(kind: type, tmp_path: Path):
    settings = tiny_settings(tmp_path / "run")
    if kind is SupervisedConfig:
        settings = {"model": settings["model"], "run": settings["run"]}
    for given, message in (
        ({"push_to_hub": "small"}, "run.push_to_hub is 'small'; it is the name of a model on the hub, user/name"),
        ({"push_at": "checkpoint"}, "run.push_at is 'checkpoint'; it has no effect while run.push_to_hub is null"),
        ({"hub_private": False}, "run.hub_private is False; it has no effect while run.push_to_hub is null"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**{**settings, "run": {**settings["run"], **given}})
