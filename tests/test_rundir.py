"""Which directory a run takes, and what is said where it cannot."""

from pathlib import Path

import pytest
import torch
from helpers import TINY, read_json, tiny_config

from grpo.config import Config, DataConfig, RunConfig
from grpo.observe.rundir import DirectoryLock, RunLog, claim, record
from grpo.system.build import own_version
from grpo.system.distributed import Processes


def test_a_tilde_is_the_users_home_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = Config.load(
        TINY.parent / "quickstart.yaml",
        ["run.dir=~/runs/x", "model.name=~/model", "data.name=~/train.jsonl", "data.eval_name=~/test.jsonl"],
    )
    assert claim(config.run, DirectoryLock()) == tmp_path / "runs/x"
    own = DataConfig(template="chat", chat_template="~/own.jinja")
    assert own.chat_template == str(tmp_path / "own.jinja")
    assert config.model.name == str(tmp_path / "model")
    assert (config.data.name, config.data.eval_name) == (str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_directory_that_cannot_be_made_is_said_with_the_setting(tmp_path: Path, resume: str):
    (tmp_path / "file").write_text("")
    in_a_file = f"'{tmp_path / 'file'}' is a file, .* Name another"
    for parent, said in {"/sys": "it cannot be written to: .*Make room", str(tmp_path / "file"): in_a_file}.items():
        with pytest.raises(ValueError, match=rf"^run.dir is '{parent}/run'; {said}"):
            claim(RunConfig(dir=f"{parent}/run", steps=1, resume=resume), DirectoryLock())


def test_a_full_disk_at_the_start_is_said_with_the_setting_and_no_row_is_lost(tmp_path: Path):
    rows = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / "metrics.superseded.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, tiny_config(tmp_path), Processes(0, 1, torch.device("cpu")), reward_names=[])
    with pytest.raises(ValueError, match=r"^run.dir is .* cannot be written to: .*No space left"):
        log.open(resumed_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_a_file_as_the_directory_is_refused_and_a_used_one_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for resume in ("never", "auto"):
        with pytest.raises(ValueError, match=r"^run.dir is '.*/file'; it is a file, .* Name another\.$"):
            claim(RunConfig(dir=str(tmp_path / "file"), steps=1, resume=resume), DirectoryLock())
    assert claim(RunConfig(dir=str(tmp_path / "run"), steps=1), DirectoryLock()) == tmp_path / "run"
    assert capsys.readouterr().out == ""
    assert claim(RunConfig(dir=str(tmp_path / "run"), steps=1), DirectoryLock()) == tmp_path / "run-2"
    assert (
        f"run.dir {tmp_path / 'run'} is used already; this run goes to {tmp_path / 'run-2'}" in capsys.readouterr().out
    )


def test_what_a_run_ran_on_is_written_down(tmp_path: Path):
    record(tmp_path, tiny_config(tmp_path), Processes(0, 1, torch.device("cpu")))
    written = read_json(tmp_path / "environment.json")
    assert written["device"] == "cpu"
    assert written["processor"]
    assert written["commit"] is None or len(written["commit"].rstrip("+")) == 40
    assert written["grpo"] == own_version()


def test_the_traceback_of_a_run_that_goes_on_is_kept_under_another_name(tmp_path: Path):
    log = RunLog(tmp_path, tiny_config(tmp_path), Processes(0, 1, torch.device("cpu")), reward_names=[])
    for error in ("first", "second"):
        (tmp_path / "traceback.txt").write_text(error)
        log.open(resumed_step=None)
        log.close()
    assert not (tmp_path / "traceback.txt").exists()
    assert (tmp_path / "traceback.superseded.txt").read_text().split() == ["first", "second"]
