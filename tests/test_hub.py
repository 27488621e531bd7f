"""A run is pushed to the hub, and does not depend on it; the hub is a server on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from fake_hub import Hub, fake_hub
from helpers import TINY, tiny_config, tiny_settings
from safetensors.torch import load, load_file

from grpo import Trainer
from grpo.cli.export import parser, run
from grpo.config import Config, SupervisedConfig


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as server:
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
