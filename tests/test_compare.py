"""Several configurations and seeds: what is run, what is not run again, and the numbers of the table."""

import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TINY, read_json, tiny_config

from grpo import Trainer
from grpo.evaluation.arms import Arm, PlannedRun, arms_of, plan
from grpo.evaluation.compare import (
    as_markdown,
    as_text,
    carry_out,
    compare,
    is_finished,
    places,
    write,
)
from grpo.observe.console import positive
from grpo.scoring.statistics import mean_of_few

COMMAND = [sys.executable, str(ROOT / "tests" / "worker_compare.py")]
DRGRPO = "drgrpo:algorithm.normalize_by_std=false,algorithm.aggregation=constant"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(
        tiny_config(
            tmp_path, data={"eval_name": str(TINY / "test.jsonl")}, evaluation={"num_questions": 8}, run={"steps": 3}
        ).to_yaml()
    )
    return path


def planned(config: Path, out: Path, *seeds: int, variants: tuple[str, ...] = (), settings: tuple[str, ...] = ()):
    return plan(arms_of([config], variants, settings), seeds, out)


def test_the_script_runs_every_arm_and_prints_the_table_and_where_it_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    launched: list[list[str]] = []

    def carry_out_without_training(runs: list[PlannedRun], command: list[str], *, at: list[dict[str, str]]) -> int:
        launched.append(command)
        return carry_out(runs, COMMAND, at=at, say=lambda line: None)

    monkeypatch.setattr("grpo.evaluation.compare.carry_out", carry_out_without_training)
    out = tmp_path / "out"
    options = ["--variant", DRGRPO, "--set", "run.steps=2", "--launch", "--num_processes 2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(config), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")
    assert ended.value.code == 0
    ((*_, two, processes, by_name, module),) = launched
    assert (two, processes, by_name, module) == ("--num_processes", "2", "-m", "grpo.cli.train")
    printed = capsys.readouterr().out
    table = next(out.glob("*.md")).read_text()
    for arm in ("base", "drgrpo"):
        assert re.search(rf"^\s*{arm} ", printed, re.MULTILINE)
        assert f"| {arm} |" in table
    assert str(out) in printed


def test_a_mean_of_few_has_students_interval():
    found = mean_of_few([0.4, 0.6])  # s = 0.1414; 12.706 * 0.1414 / sqrt(2) = 1.2706
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - 1.2706, 0.5 + 1.2706))
    assert mean_of_few([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.303 / 3**0.5)  # s = 1
    assert mean_of_few([0.5] * 40).low == 0.5


def test_variants_are_arms_beside_each_configuration_and_commas_within_values_stay():
    variant = "v:lora.rank=4,lora.target_modules=[q_proj, k_proj],rollout.stop=[a,b]"
    one = arms_of([Path("x/a.yaml")], [variant], ["run.steps=3"])
    settings = ("run.steps=3", "lora.rank=4", "lora.target_modules=[q_proj, k_proj]", "rollout.stop=[a,b]")
    assert one == [Arm("a", Path("x/a.yaml"), ("run.steps=3",)), Arm("v", Path("x/a.yaml"), settings)]
    two = arms_of([Path("a.yaml"), Path("b.yaml")], [variant], [])
    assert [arm.name for arm in two] == ["a", "a-v", "b", "b-v"]


@pytest.mark.parametrize(
    ("variants", "settings", "seeds", "message"),
    [
        (["algorithm.kl_coef=0"], [], [0], "--variant is 'algorithm.kl_coef=0'; it reads NAME:section.setting=value"),
        (["base:run.steps=3"], [], [0], "give the name 'base' twice"),
        (["v:algorithm.nothing=3"], [], [0], "algorithm.nothing is not a setting"),
        ([], ["run.seed=3"], [0], "run.seed=3 is set for base; a comparison sets run.dir, run.seed, run.resume itself"),
        ([], ["evaluation.num_questions=0"], [0], "evaluation.num_questions is 0 in base"),
        ([], [], [1, 1], "--seeds is [1, 1]"),
        (
            ["other:rewards=[{function: format}]"],
            [],
            [0],
            "what is right is said by format in other and by accuracy in base",
        ),
        (["..:run.steps=3"], [], [0], "--variant is '..:run.steps=3'; it reads NAME:"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    config: Path, tmp_path: Path, variants: list[str], settings: list[str], seeds: list[int], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(arms_of([config], variants, settings), seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_do_not_go_into_a_file(config: Path):
    with pytest.raises(ValueError, match=r"--out is '.*base.yaml'; it is a file"):
        planned(config, config, 0)


@pytest.mark.parametrize("text", ["0", "-3", "x", "1.5"])
def test_an_option_that_counts_is_a_whole_number_of_at_least_one(text: str):
    assert positive("3") == 3
    with pytest.raises(ArgumentTypeError, match=f"'{text}' is not a whole number of at least 1"):
        positive(text)


def test_runs_at_once_have_gpus_of_their_own(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    at = places(2)
    assert at == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(ValueError, match="--at-once is 3; the 4 GPUs cannot be dealt out evenly"):
        places(3)
    runs = planned(config, tmp_path / "out", 8, variants=(DRGRPO,))
    carry_out(runs, COMMAND, at=at, say=lambda line: None)
    assert all(is_finished(run) for run in runs)
    assert sorted(run.log.read_text() for run in runs) == ["GPUs 4,5\n", "GPUs 6,7\n"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert places(2) == [{}, {}]


def test_finished_runs_are_not_repeated_and_a_failed_one_does_not_end_the_others(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    runs = planned(config, out, 7, 0, variants=(DRGRPO,))
    said: list[str] = []
    carry_out(runs, COMMAND, say=said.append)
    outcomes = [re.sub(r" after \d+ s", "", line) for line in said]
    assert outcomes == [
        f"1/4  base, seed 7: FAILED (1); see {out / 'base' / 'seed-7.log'}",
        f"2/4  drgrpo, seed 7: FAILED (1); see {out / 'drgrpo' / 'seed-7.log'}",
        "3/4  base, seed 0: finished",
        "4/4  drgrpo, seed 0: finished",
    ]
    assert "seed 7 cannot be" in (out / "base" / "seed-7.log").read_text()
    assert [row["missing"] for row in compare(runs)] == [[7], [7]]
    again: list[str] = []
    carry_out(runs[2:], ["false"], say=again.append)
    assert again == ["1/2  base, seed 0: finished before", "2/2  drgrpo, seed 0: finished before"]


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.clip_high=0.3",
        "rollout.max_completion_tokens=32",
        "scoring.timeout_seconds=1",
        "watchdog.patience=20",
        "evaluation.num_questions=4",
        "run.steps=4",
    ],
)
def test_a_run_of_any_other_setting_is_not_taken_for_the_one_asked_for(config: Path, tmp_path: Path, setting: str):
    out = tmp_path / "out"
    carry_out(planned(config, out, 0), COMMAND, say=lambda _: None)
    planned(config, out, 0, settings=("scoring.num_workers=2", "checkpoint.every_steps=1"))
    with pytest.raises(ValueError, match=f"the run there differs from the one asked for in {setting.split('=')[0]}"):
        planned(config, out, 0, settings=(setting,))


def test_a_run_that_is_older_than_a_setting_had_its_default(config: Path, tmp_path: Path):
    (run,) = planned(config, tmp_path / "out", 0)
    before = run.config.model_dump(mode="json")
    del before["data"]["where"], before["rewards"][0]["form"], before["preflight"]
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(json.dumps(before))
    assert planned(config, tmp_path / "out", 0) == [run]
    before["data"]["where"] = {"level": 1}
    (run.directory / "config.yaml").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"the run there differs from the one asked for in data\.where"):
        planned(config, tmp_path / "out", 0)


def test_a_run_has_stopped_if_it_says_so_whatever_the_exit_code_of_its_launcher(config: Path, tmp_path: Path):
    said: list[str] = []
    runs = planned(config, tmp_path / "out", 5, 0)
    assert carry_out(runs, COMMAND, say=said.append) == 75
    assert re.fullmatch(r"1/2  base, seed 5: stopped after \d+ s; started again, it goes on", said[0])
    assert carry_out(runs[1:], COMMAND, say=said.append) == 0
    failing = planned(config, tmp_path / "out", 5, 7)
    assert carry_out(failing, COMMAND, say=said.append) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_has_the_runs_save_and_is_waited_for_and_no_other_run_is_begun(
    config: Path, tmp_path: Path, number: int
):
    runs = planned(config, tmp_path / "out", 6, 0)

    def signal_once_it_runs() -> None:
        while not runs[0].directory.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=signal_once_it_runs, daemon=True).start()
    said: list[str] = []
    assert carry_out(runs, COMMAND, say=said.append) == 128 + number
    (line,) = said
    assert re.fullmatch(r"1/2  base, seed 6: stopped after \d+ s; started again, it goes on", line)
    assert not runs[1].directory.exists()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_table_has_the_numbers_of_the_answers(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    runs = planned(config, out, 0, 1, variants=(DRGRPO,))
    carry_out(runs, COMMAND, say=lambda _: None)
    base, variant = compare(runs)
    assert base["by_seed"] == [2 / 8, 3 / 8]
    assert base["accuracy"] == pytest.approx(5 / 16)
    assert base["before"] == 1 / 8
    assert base["over_seeds"] == [0.0, 1.0]  # 0.3125 -+ 12.706 * 0.0884 / sqrt(2) = 0.79, within what a share can be
    assert 0 <= base["over_questions"][0] < 5 / 16 < base["over_questions"][1] < 0.7
    assert base["length_right"] == 10
    assert base["length_wrong"] == 30
    assert base["length"] == (5 * 10 + 11 * 30) / 16
    assert base["difference"] is None
    assert variant["difference"]["value"] == pytest.approx((1 - 0.5 + 3) / 8)  # question 2 by a half, 3 to 5 by 1
    assert variant["over_seeds"] == [0.75, 0.75]
    assert (variant["seconds"], variant["entropy"]) == (30, 0.5)
    assert variant["sampled"] == pytest.approx(0.2)  # over steps 1 to 3
    text, markdown = as_text([base, variant]), as_markdown([base, variant])
    assert text.splitlines()[2].split()[:5] == ["drgrpo", "2", "12.5", "20.0", "75.0"]
    assert "| drgrpo | 2 | 12.5 | 20.0 | 75.0 |" in markdown
    assert "of 8 held-out questions" in markdown
    paths = write([base, variant], runs, out)
    assert read_json(out / "comparison.json")["arms"] == [base, variant]
    assert [path.name for path in paths] == ["comparison.md", "comparison.json", "comparison.png", "report.html"]
    assert (out / "comparison.png").stat().st_size > 10_000


def altered(run: PlannedRun, change: Callable[[dict[str, Any]], None]) -> None:
    """Its answers with something changed in each."""
    path = run.directory / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_answers_to_the_same_question_with_the_same_seed_are_told_apart(config: Path, tmp_path: Path):
    """Of 8 questions the first has 2 right with seed 0, the other 6: the first 6."""
    runs = planned(config, tmp_path / "out", 0, 1, variants=(DRGRPO,))
    base, other, _, other_1 = runs
    carry_out(runs[:3], COMMAND, say=lambda _: None)
    assert not is_finished(other_1)
    assert compare(runs)[1]["difference"]["value"] == (6 - 2) / 8
    altered(other, lambda row: row["rewards"].update(accuracy=None) if row["row"] == 7 else None)
    rows = compare(runs)
    assert rows[1]["difference"]["value"] == 4 / 7
    assert rows[1]["difference"]["questions"] == 7
    altered(base, lambda row: row.update(question="another") if row["row"] == 0 else None)
    difference = compare(runs)[1]["difference"]
    assert (difference["value"], difference["questions"], difference["seeds"]) == (4 / 6, 6, [0])
    assert "of 6" in as_text(compare(runs))
    altered(base, lambda row: row.update(question="another"))
    assert compare(runs)[1]["difference"] is None


def test_what_no_verdict_is_known_of_is_left_out(config: Path, tmp_path: Path):
    (run,) = runs = planned(config, tmp_path / "out", 0)
    carry_out(runs, COMMAND, say=lambda _: None)
    altered(run, lambda row: row["rewards"].update(accuracy=None) if row["step"] == 0 else None)
    (row,) = compare(runs)
    assert row["before"] is None
    assert as_text([row]).splitlines()[1].split()[2] == "-"
    altered(run, lambda row: row["rewards"].update(accuracy=None))
    assert compare(runs) == [{"arm": "base", "seeds": [], "missing": [0]}]


def test_an_arm_without_a_finished_run_is_a_line_and_no_base_for_the_others(config: Path, tmp_path: Path):
    runs = planned(config, tmp_path / "out", 0, variants=(DRGRPO,))
    carry_out(runs[1:], COMMAND, say=lambda _: None)
    rows = compare(runs)
    assert rows[0] == {"arm": "base", "seeds": [], "missing": [0]}
    assert rows[1]["difference"] is None
    assert as_text(rows).splitlines()[1].split() == ["base", "0", "of", "1", *["-"] * 12]


def test_a_run_of_the_trainer_is_finished_once_it_is_evaluated(config: Path, tmp_path: Path):
    settings: dict[str, Any] = {"evaluation": {"num_questions": 2}, "run": {"steps": 1, "resume": "auto"}}
    own = tiny_config(tmp_path / "run", data={"eval_name": str(TINY / "test.jsonl")}, **settings)
    run = PlannedRun(Arm("own", config, ()), 0, tmp_path / "run", [], own)
    assert not is_finished(run)
    Trainer(own).train()
    assert is_finished(run)
    (row,) = compare([run])
    assert row["questions"] == 2
    assert row["by_seed"] == [row["accuracy"]]
    assert row["over_seeds"] is None


def test_a_run_that_cannot_be_begun_has_failed_and_the_others_are_still_tried(config: Path, tmp_path: Path):
    said: list[str] = []
    runs = planned(config, tmp_path / "out", 0, 1)
    assert carry_out(runs, [str(tmp_path / "nothing")], say=said.append) == 1
    assert len(said) == 2
    assert all("FAILED, it could not be begun: " in line for line in said)


def test_what_leaves_the_group_of_its_run_is_not_waited_for(config: Path, tmp_path: Path):
    script = "setsid sleep 60 & exit 1"
    began = time.monotonic()
    assert carry_out(planned(config, tmp_path / "out", 0), ["sh", "-c", script], say=lambda _: None) == 1
    assert time.monotonic() - began < 40


def test_a_comparison_can_be_made_in_another_thread(config: Path, tmp_path: Path):
    with ThreadPoolExecutor(1) as pool:
        runs = planned(config, tmp_path / "out", 0)
        assert pool.submit(carry_out, runs, COMMAND, say=lambda _: None).result() == 0
