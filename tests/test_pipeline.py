"""grpo r1: what is wrong is said before anything runs, the order, launch lines, resuming, refusing what changed, the record.

One run of three small stages, real processes forked from a warm one, is shared by those that look at it (about half a minute).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm
import yaml
from helpers import ROOT, clean_environment, read_json

from grpo.cli import evaluate, launch, r1, reject
from grpo.cli.check_stages import check_stages
from grpo.config import Config
from grpo.config.shipped import names
from grpo.pipeline import outcome
from grpo.pipeline import run as pipeline_run
from grpo.pipeline.lineage import of_path
from grpo.pipeline.run import Ended, line, process, run
from grpo.pipeline.stages import OPTIONS, OWN_OPTIONS, Plan, read_plan
from grpo.system.files import checksum
from grpo.system.jsonl import read_jsonl, read_metrics

R1 = ROOT / "configs" / "r1-tiny"
SMALL = {"evaluation.num_questions": 12, "evaluation.num_samples": 2}
STAGES: dict[str, Any] = {
    "stages": [
        {"name": "start", "kind": "sft", "config": "sft.yaml", "rows": ["rows", "other.jsonl"],
         "set": {**SMALL, "training.epochs": 1, "training.rows_per_update": 16}},
        {"name": "zero", "kind": "train", "config": "zero.yaml", "set": {**SMALL, "run.steps": 2, "rollout.num_prompts": 4}},
        {"name": "rows", "kind": "reject", "model": "zero",
         "options": {"num_questions": 40, "samples": 4, "require": ["accuracy=1"]}},
    ],
    "compare": [{"title": "Rows or rewards", "stages": ["start", "zero"]}],
}  # fmt: skip


def folder_of(place: Path, stages: Any = STAGES) -> Path:
    """A folder with these stages and the shipped configurations that they name."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("zero", "sft"):
        settings = yaml.safe_load((R1 / f"{name}.yaml").read_text())
        settings["model"]["name"] = str(R1 / "base")
        settings["data"]["eval_name"] = str(ROOT / "configs/quickstart/test.jsonl")
        settings["data"]["name"] = str(ROOT / "tests/data/questions.jsonl")
        (place / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    lines = (R1 / "other.jsonl").read_text().splitlines(keepends=True)
    (place / "other.jsonl").write_text("".join(lines[:20]))
    (place / "stages.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    return place


def warmly(arguments: Sequence[str]) -> Ended:
    path = os.environ.get("PYTHONPATH", str(ROOT))  # a run in this process has left RANK and its like behind
    done = warm.run(["-m", "grpo", *arguments], env={**clean_environment(), "PYTHONPATH": path}, timeout=200)
    assert done.returncode in (0, 75), done.stderr[-3000:]
    return Ended(done.returncode)


def nothing(arguments: Sequence[str]) -> Ended:
    raise AssertionError(f"it launches {arguments}")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_stages_run_after_those_that_they_need_and_else_as_listed(tmp_path: Path):
    plan = read_plan(folder_of(tmp_path / "small"), tmp_path / "out")
    assert [stage.name for stage in plan.stages] == ["zero", "rows", "start"]
    listed = yaml.safe_load((R1 / "stages.yaml").read_text())["stages"]
    shipped = read_plan("r1-tiny", tmp_path / "out")
    assert [stage.name for stage in shipped.stages] == [each["name"] for each in listed]
    assert "r1-tiny/stages" not in names()
    assert {"r1-tiny/zero", "r1-tiny/sft"} <= set(names())


def test_print_shows_the_launch_line_of_each_stage_and_runs_nothing(tmp_path: Path, capsys, monkeypatch):
    place, out = folder_of(tmp_path / "small"), tmp_path / "my out"
    monkeypatch.setattr(sys, "argv", ["grpo r1", str(place), "--out", str(out), "--print", "--set", "rows:samples=3"])
    r1.main()
    printed = [shlex.split(each) for each in capsys.readouterr().out.splitlines()]
    small = ["evaluation.num_questions=12", "evaluation.num_samples=2"]
    assert printed == [
        ["grpo", "train", "--config", f"{place}/zero.yaml", "--set", *small, "run.steps=2", "rollout.num_prompts=4",
         f"run.dir={out}/zero", "run.resume=auto"],
        ["grpo", "reject", "--model", f"{out}/zero", "--num-questions", "40", "--samples", "3", "--require", "accuracy=1",
         "--out", f"{out}/rows/rows.jsonl"],
        ["grpo", "sft", "--config", f"{place}/sft.yaml", "--set", *small, "training.epochs=1", "training.rows_per_update=16",
         f'data.name=[{{"name": "{out}/rows/rows.jsonl"}}, {{"name": "{place}/other.jsonl"}}]', f"run.dir={out}/start",
         "run.resume=auto"],
    ]  # fmt: skip
    assert not out.exists()
    done = warm.run(["scripts/r1.py", str(place), "--out", str(out), "--print"], cwd=ROOT, timeout=100)
    assert [each.split()[:2] for each in done.stdout.splitlines()] == [each[:2] for each in printed]


def test_a_model_of_a_stage_and_a_teacher_become_settings(tmp_path: Path):
    stages = {
        "stages": [
            {"name": "a", "kind": "sft", "config": "sft.yaml"},
            {
                "name": "b",
                "kind": "train",
                "config": "zero.yaml",
                "model": "a",
                "teacher": "a",
                "set": {"algorithm.kl_coef": 1.0},
            },
        ]
    }
    plan = read_plan(folder_of(tmp_path, stages), "out")
    config = plan.config(plan.stages[1])
    assert isinstance(config, Config)
    assert config.model.name == config.teacher.name == f"{Path('out').absolute()}/a"
    assert config.run.dir == f"{Path('out').absolute()}/b"


ZERO = {"name": "zero", "kind": "train", "config": "zero.yaml"}
REJECT = {"name": "r", "kind": "reject"}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{**ZERO, "kind": "trian"}], "stage zero: kind is 'trian'; it is one of .* Did you mean train?"),
        ([{**ZERO, "rows": "no"}], "stage zero: rows is 'no'; there is neither a stage of that name nor such a file"),
        ([ZERO, {**ZERO, "name": "b", "model": "zeroo"}], "stage b: model is 'zeroo'; .* Did you mean zero?"),
        ([{**ZERO, "config": "none.yaml"}], "stage zero: config is 'none.yaml'; there is no such file"),
        ([{"name": "zero", "kind": "train"}], "stage zero: config is missing"),
        ([{"name": "rows", "kind": "reject"}], "stage rows: model is missing"),
        ([ZERO, ZERO], "stage zero is listed twice"),
        ([{**ZERO, "name": "a/b"}], "a stage has a name of letters"),
        ([{**ZERO, "modle": "x"}], "stage zero has 'modle'; .* Did you mean model?"),
        ([{**ZERO, "options": {"samples": 2}}], "stage zero: options has no effect on kind train"),
        ([{**ZERO, "set": {"run.stepz": 2}}], "stage zero: run.stepz is not a setting. Did you mean run.steps?"),
        ([ZERO, {**REJECT, "model": "zero", "set": {"data.name": "x"}}], "stage r: set has no effect .* without a config"),
        ([{**ZERO, "set": {"run.dir": "x"}}], "stage zero: set has run.dir, which the path itself sets"),
        ([{**ZERO, "model": "b"}, {**ZERO, "name": "b", "model": "zero"}], "in a circle: (zero <- b <- zero|b <- zero <- b)"),
        ([ZERO, {**ZERO, "name": "b", "rows": "zero"}], "stage b: rows is zero, a stage of kind train; it must be one of"),
        ([ZERO, {**REJECT, "model": "zero", "options": {"sample": 2}}], "options has 'sample', .* Did you mean samples?"),
        ([ZERO, {**REJECT, "model": "zero", "options": {"out": "x"}}], "stage r: options has 'out'"),
        ([{"name": "s", "kind": "sft", "config": "sft.yaml"}, {**REJECT, "model": "s"}], "stage r: config is missing"),
        ([], "has no list `stages`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_stages_name_before_anything_runs(tmp_path: Path, stages: Any, said: str):
    with pytest.raises(ValueError, match=said):
        read_plan(folder_of(tmp_path / "small", {"stages": stages}), tmp_path / "out")


SECOND = {"name": "b", "kind": "train", "config": "zero.yaml"}
START = {"name": "start", "kind": "sft", "config": "sft.yaml"}
EXAM = {"name": "exam", "kind": "evaluate", "model": "zero"}


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ([{**SECOND, "set": {"data.name": "no.jsonl"}}], "stage b: data.name is 'no.jsonl'; there is no such file"),
        ([{**SECOND, "set": {"data.eval_name": "no.jsonl"}}], "stage b: data.eval_name is 'no.jsonl'; there is no such file"),
        ([{**SECOND, "set": {"data.name": [{"name": "no.jsonl"}]}}],
         r"stage b: data.name.0.name is 'no.jsonl'; there is no such"),
        ([{**SECOND, "set": {"rewards": [{"function": "acuracy"}]}}], r"stage b: rewards.0.function .* did you mean accuracy\?"),
        ([{**SECOND, "set": {"scoring.verdict": ["accuracy", "vrdict"]}}], "stage b: scoring.verdict is .*; vrdict is no reward"),
        ([{**SECOND, "set": {"rewards": [{"function": "nofile.py:f"}]}}], r"stage b: rewards.0.function .* there is no file"),
        ([{**SECOND, "set": {"model.name": "nowhere/here/model"}}],
         "stage b: model.name is 'nowhere/here/model'; there is no such"),
        ([{**SECOND, "set": {"tools.functions": ["calculater"]}}], "stage b: tools.functions is 'calculater'; "),
        ([{**START, "set": {"data.name": "no.jsonl"}}], "stage start: data.name is 'no.jsonl'; there is no such file"),
        ([{**START, "set": {**SMALL, "data.eval_name": None}}], "stage start: evaluation.num_questions is 12; data.eval_name is"),
        ([{**START, "set": {**SMALL, "rewards": [{"function": "acuracy"}]}}], "stage start: rewards.0.function is 'acuracy'"),
        ([{**REJECT, "model": "zero"}, {**SECOND, "rows": "r", "set": {"data.eval_name": None}}],
         "stage b: data.eval_name is missing; the training questions .*rows.jsonl"),
        ([{**REJECT, "model": "zero", "options": {"questions": "no.jsonl"}}],
         "stage r: options.questions is 'no.jsonl'; there is no such"),
        ([{**REJECT, "model": "zero", "options": {"samples": 0}}], "stage r: grpo reject: argument options.samples: "),
        ([{**REJECT, "model": "zero", "options": {"temperature": -1}}], "stage r: options.temperature is -1"),
        ([{**REJECT, "model": "./nowhere", "config": "zero.yaml"}], "stage r: model is './nowhere'"),
        ([{**REJECT, "model": "zero", "config": "zero.yaml", "set": {"rewards": [{"function": "acuracy"}]}}],
         "stage r: rewards.0.function is 'acuracy'"),
        ([{**REJECT, "model": "zero", "config": "zero.yaml", "set": {"data.name": "no.jsonl"}}],
         "stage r: data.name is 'no.jsonl'; there is no such file"),
        ([{**SECOND, "set": {"data.pass_rates": "no.jsonl"}}], "stage b: data.pass_rates is 'no.jsonl'; there is no file"),
        ([{**REJECT, "model": "zero", "options": {"rewrite_template": "x.txt"}}],
         "stage r: options.rewrite_template is x.txt; it has no effect without options.rewrite_with"),
        ([{**REJECT, "model": "zero", "options": {"rewrite_with": "a/b", "tags": True}}],
         "stage r: options.tags has no effect with options.rewrite_with"),
        ([{**SECOND, "set": {"tools.functions": ["calculator"]}}, {**REJECT, "model": "b"}],
         "stage r: tools.functions of .*/out/b names tools; grpo reject calls none"),
        ([{**SECOND, "set": {"environment.function": "guess_number"}}, {**REJECT, "model": "b"}],
         "stage r: environment.function of .*/out/b is 'guess_number'; grpo reject has no environment"),
        ([{**REJECT, "model": "zero", "options": {"rewrite_with": "a/b", "rewrite_template": "no.txt"}}],
         "stage r: options.rewrite_template is 'no.txt'; there is no such file"),
        ([{**REJECT, "model": "zero", "config": "zero.yaml", "set": {"data.where": {"a": 1}},
           "options": {"questions": "other.jsonl"}}], "stage r: set data.where chooses among"),
        ([{**SECOND, "set": {"data.template": "chat", "data.chat_template": "no.jinja"}}],
         "stage b: data.chat_template is 'no.jinja'; there is no file"),
        ([{**START, "set": {"data.chat_template": "stages.yaml"}}], r"stage start: data.chat_template is 'stages.yaml'; th"),
        ([{**REJECT, "model": "zero", "config": "zero.yaml",
           "set": {"data.template": "chat", "data.chat_template": "no.jinja"}}],
         "stage r: data.chat_template is 'no.jinja'; there is no file"),
        ([{**SECOND, "set": {"rewards": [{"function": f"{ROOT}/tests/warm.py:run"}]}}, {**REJECT, "model": "b"}],
         "stage r: the configuration of .*/out/b' names reward functions .* say so with options.trust_rewards, or "),
        ([{**EXAM, "options": {"benchmarks": "gsm9k"}}], "stage exam: options.benchmarks has 'gsm9k'; .*did you mean gsm8k"),
        ([{**EXAM, "options": {"benchmarks": "m", "data": ["m=no.jsonl"]}}],
         "stage exam: options.data m is 'no.jsonl'; there is no such"),
        ([{**EXAM, "options": {"benchmarks": "gsm8k", "templates": "r1"}}],
         "stage exam: options.templates has 'r1'; it is one of"),
        ([{**EXAM, "options": {"samples": 2}}], "stage exam: grpo evaluate: .*required: options.benchmarks"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_late_stage_is_said_before_the_first_runs(tmp_path: Path, late: list[Any], said: str):
    place = folder_of(tmp_path / "small", {"stages": [ZERO, *late]})
    with pytest.raises(ValueError, match=said):
        run(read_plan(place, tmp_path / "out"), nothing, check=check_stages)


def test_the_command_checks_all_stages_first(tmp_path: Path):
    late = {**SECOND, "set": {"rewards": [{"function": "acuracy"}]}}
    place = folder_of(tmp_path / "small", {"stages": [ZERO, late]})
    done = warm.run(["scripts/r1.py", str(place), "--out", str(tmp_path / "out")], cwd=ROOT, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: stage \w+: rewards\.0\.function is 'acuracy'", done.stderr)


def test_what_earlier_stages_make_and_models_of_the_hub_are_not_looked_for(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("grpo.system.hub_access.unreachable", lambda: "the hub was asked")
    stages = [
        {**ZERO, "set": {"model.name": "nobody/no-such-model"}},
        {**REJECT, "model": "zero", "options": {"step": 10}},
        {**START, "rows": ["r", "other.jsonl"], "model": "zero"},
        {**SECOND, "set": {"model.name": f"{tmp_path}/out/start", "data.name": f"{tmp_path}/out/r/rows.jsonl"}},
        {**EXAM, "options": {"benchmarks": "gsm8k,mine", "data": [f"mine={tmp_path}/out/r/rows.jsonl"]}},
    ]
    plan = read_plan(folder_of(tmp_path / "small", {"stages": stages}), tmp_path / "out")
    assert run(plan, lambda _: Ended(3), check=check_stages) == 3


@pytest.mark.parametrize("name", ["r1-tiny", "r1", "gsm8k-warm", "gsm8k-distil", "countdown-warm", "countdown-short"])
def test_nothing_is_wrong_with_the_paths_that_come_with_the_library(tmp_path: Path, name: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(name, tmp_path / "out")
    check_stages(plan, plan.stages)


def test_a_stage_that_has_made_nothing_takes_the_settings_that_were_corrected(tmp_path: Path):
    place, out = folder_of(tmp_path / "small", {"stages": [ZERO]}), tmp_path / "out"
    assert run(read_plan(place, out, ["zero:run.steps=2"]), lambda _: Ended(2)) == 2
    (out / "zero" / "lock").touch()
    (out / "zero" / "traceback.txt").write_text("ValueError")
    assert run(read_plan(place, out, ["zero:run.steps=3"]), lambda _: Ended(2)) == 2
    assert read_json(out / "lineage.json")["stages"]["zero"]["settings"]["run.steps"] == 3
    (out / "zero" / "metrics.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=r"stage zero: its configuration changed since it was made: run.steps was 3 and is 4"
    ):
        run(read_plan(place, out, ["zero:run.steps=4"]), nothing)


def test_settings_of_the_configuration_that_questions_come_from_are_overridden(tmp_path: Path):
    questions = str(ROOT / "configs/quickstart/test.jsonl")
    stages = [ZERO, {**REJECT, "model": "zero", "config": "zero.yaml", "set": {"rollout.temperature": 0.5}}]
    folder = folder_of(tmp_path / "small", {"stages": stages})
    plan = read_plan(folder, tmp_path / "out", [f"r:data.name={questions}", "r:samples=3"])
    stage = plan.stage("r")
    assert stage is not None
    assert plan.launch(stage)[3:-2] == [
        *("--config", str(folder / "zero.yaml"), "--set", "rollout.temperature=0.5", f"data.name={questions}"),
        *("--samples", "3"),
    ]
    assert plan.settings(stage)["data.name"] == questions
    assert [each.path for each in plan.inputs(stage) if each.label == "data"] == [questions]
    asked = yaml.safe_load((folder / "zero.yaml").read_text())
    del asked["run"]
    (folder / "questions.yaml").write_text(yaml.safe_dump(asked))
    without = replace(stage, config=folder / "questions.yaml")
    assert plan.settings(without) == plan.settings(stage)
    assert plan.inputs(without) == plan.inputs(stage)
    with pytest.raises(ValueError, match=r"stage r: data\.nam is not a setting"):
        read_plan(folder, tmp_path / "out", ["r:data.nam=1"])


def test_a_folder_that_is_a_link_finds_what_lies_beside_the_folder_itself(tmp_path: Path):
    real = folder_of(tmp_path / "real" / "deep", {"stages": [{**ZERO, "config": "../zero.yaml"}]})
    (real / "zero.yaml").rename(tmp_path / "real" / "zero.yaml")
    (tmp_path / "linked").symlink_to(real)
    stage = read_plan(str(tmp_path / "linked"), tmp_path / "out").stage("zero")
    assert stage is not None
    assert stage.config == tmp_path / "real" / "zero.yaml"


def test_a_wrong_folder_override_or_comparison_is_refused(tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"'r1-tinny' is no folder .*: countdown-short, countdown-warm, gsm8k-distil, gsm8k-warm, r1, r1-tiny",
    ):
        read_plan("r1-tinny", None)
    with pytest.raises(ValueError, match=r"--set 'zro:run.steps=1': there is no stage 'zro', .* Did you mean zero\?"):
        read_plan("r1-tiny", None, ["zro:run.steps=1"])
    with pytest.raises(ValueError, match=r"--set 'run.steps=1': it reads STAGE:section.setting=value"):
        read_plan("r1-tiny", None, ["run.steps=1"])
    broken = folder_of(tmp_path, {**STAGES, "compare": [{"title": "t", "stages": ["zero", "rows"]}]})
    with pytest.raises(ValueError, match=r"it is a title and two stages of zero, start"):
        read_plan(broken, None)


@pytest.mark.parametrize(("kind", "command"), [("reject", reject), ("evaluate", evaluate)])
def test_a_stage_may_set_the_options_of_its_command_and_no_others(kind: str, command: Any):
    has = {action.dest for action in command._parser()._actions} - {"help"}
    assert set(OPTIONS[kind]) <= has - set(OWN_OPTIONS)
    of_endpoints = {"endpoint", "api_key_env", "concurrency", "request", "price_in", "price_out"}
    others = {"tools", "base", "set"} if kind == "reject" else {"tools", "environment", *of_endpoints}
    assert has - set(OWN_OPTIONS) - set(OPTIONS[kind]) == others


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The three stages, the first stopped once before its end."""
    place = tmp_path_factory.mktemp("pipeline")
    plan = read_plan(folder_of(place / "small"), place / "out")
    launched = []

    def stopping(arguments: Sequence[str]) -> Ended:
        launched.append(arguments[0])
        return warmly([*arguments, "run.max_hours=0.00001"])

    assert run(plan, stopping) == 75
    entry = read_json(plan.out / "lineage.json")["stages"]["zero"]
    assert (launched, entry["status"], entry["outputs"]) == (["train"], "stopped", [])
    launched.clear()

    def counting(arguments: Sequence[str]) -> Ended:
        launched.append(arguments[0])
        return warmly(arguments)

    assert run(plan, counting) == 0
    assert launched == ["train", "reject", "sft"]
    after = read_json(plan.out / "lineage.json")["stages"]["zero"]
    assert after["status"] == "finished"
    assert after["seconds"] > entry["seconds"] > 0  # of both starts
    return plan


def test_the_lineage_has_launch_lines_checksums_counts_and_seconds(finished: Plan):
    found = read_json(finished.out / "lineage.json")["stages"]
    assert list(found) == ["zero", "rows", "start"]
    assert all(found[stage.name]["launch"] == line(finished, stage) for stage in finished.stages)
    rows = finished.out / "rows" / "rows.jsonl"
    model = finished.out / "zero" / "checkpoints" / "step-00000002" / "hf"
    (made,) = found["zero"]["outputs"]
    assert made == {"label": "model", "path": str(model), "source": "zero", "checksum": of_path(model)}
    assert found["rows"]["inputs"][0] == made
    assert found["rows"]["outputs"][0]["checksum"] == checksum(rows)
    read = {(each["label"], each["path"]): each["checksum"] for each in found["start"]["inputs"]}
    assert read["rows", str(rows)] == checksum(rows)
    assert read["rows", str(finished.folder / "other.jsonl")] == checksum(finished.folder / "other.jsonl")
    assert read["model", str(R1 / "base")] == of_path(R1 / "base")
    assert found["zero"]["counts"] == {"steps": 2, "completions": 64}
    num_rows = len(read_jsonl(rows, ("row",)))
    assert num_rows > 0
    counts = found["rows"]["counts"]
    assert (counts["samples"], counts["rows"]) == (160, num_rows)
    assert sum(counts.values()) - counts["samples"] == 160  # kept, or dropped by a rule
    assert found["start"]["counts"]["rows learned"] == num_rows + 20
    assert all(each["seconds"] > 0 for each in found.values())


def test_the_evaluation_is_that_of_the_run_before_and_after(finished: Plan):
    found = read_json(finished.out / "lineage.json")["stages"]
    assert found["rows"]["evaluation"] is None
    for name in ("zero", "start"):
        told = [row for row in read_metrics(finished.out / name / "metrics.jsonl") if "eval/accuracy" in row]
        for when, row in (("before", told[0]), ("after", told[-1])):
            own = found[name]["evaluation"][when]
            assert (own["questions"], own["samples"]) == (12, 2)
            assert own["right"]["value"] == pytest.approx(row["eval/accuracy"])
            assert own["length"]["value"] == pytest.approx(row["eval/length_mean"])
            assert own["right"]["low"] <= own["right"]["value"] <= own["right"]["high"]
    before = [found[name]["evaluation"]["before"] for name in ("zero", "start")]
    assert before[0] == before[1]  # one model, the same questions and samples


def test_the_page_shows_lineage_evaluations_samples_and_comparisons(finished: Plan):
    page, text = (finished.out / "r1.html").read_text(), (finished.out / "r1.md").read_text()
    found = read_json(finished.out / "lineage.json")["stages"]
    for each in (page, text):
        for name in ("zero", "rows", "start"):
            assert found[name]["outputs"][0]["checksum"][:12] in each
            assert found[name]["config"][:12] in each
        assert f"{found['start']['evaluation']['after']['right']['value']:.1%}" in each
        assert "Rows or rewards: start mixes languages in" in each
    assert "<script" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert text.count("zero, before (") == text.count("zero, after (") == text.count("start, after (") == 1


def test_what_is_finished_is_not_run_again_also_where_it_was_moved(finished: Plan, tmp_path: Path):
    assert run(finished, nothing) == 0
    shutil.copytree(finished.out, tmp_path / "moved")
    assert run(read_plan(finished.folder, tmp_path / "moved"), nothing) == 0


def moved(finished: Plan, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the stages and of all that they made."""
    shutil.copytree(finished.out, tmp_path / "out")
    shutil.copytree(finished.folder, tmp_path / "small")
    return tmp_path / "small", tmp_path / "out"


def test_changed_files_and_settings_of_a_finished_stage_are_refused_by_name(finished: Plan, tmp_path: Path):
    place, out = moved(finished, tmp_path)
    with pytest.raises(ValueError, match=r"stage zero: its configuration changed since it was made") as refused:
        run(read_plan(place, out, ["zero:optimizer.learning_rate=1e-3"]), nothing)
    first, second = str(refused.value).splitlines()
    assert first.startswith(
        "stage zero: its configuration changed since it was made: optimizer.learning_rate was 0.0005"
    )
    assert second.endswith(f"rm -r {out}/zero {out}/rows {out}/start")
    with pytest.raises(ValueError, match=r"stage rows: its configuration changed .*: samples was 4 and is 5"):
        run(read_plan(place, out, ["rows:samples=5"]), nothing)
    with (place / "other.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"stage start: its input rows changed since it was made: .*other.jsonl\.\n"):
        run(read_plan(place, out), nothing)
    shutil.copy(finished.folder / "other.jsonl", place)
    assert run(read_plan(place, out), nothing) == 0
    rows = out / "rows" / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(ValueError, match=r"stage rows: its output changed since it was made: .*rows.jsonl\.\n"):
        run(read_plan(place, out), nothing)
    weights = out / "zero/checkpoints/step-00000002/hf/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"stage zero: its output changed since it was made: .*/hf\.\n"):
        run(read_plan(place, out), nothing)


def test_a_stage_whose_directory_is_deleted_is_made_again_but_not_under_what_came_from_it(
    finished: Plan, tmp_path: Path
):
    place, out = moved(finished, tmp_path)
    shutil.rmtree(out / "rows")
    with pytest.raises(ValueError, match=r"stage start: it was made from rows, which is not there any more") as refused:
        run(read_plan(place, out), nothing)
    assert str(refused.value).endswith(f"rm -r {out}/start")
    shutil.rmtree(out / "start")
    with pytest.raises(AssertionError, match=r"it launches.*reject"):
        run(read_plan(place, out), nothing)
    (out / "lineage.json").unlink()
    with pytest.raises(ValueError, match=r"stage zero: .*zero is there, and .*lineage.json knows nothing of it"):
        run(read_plan(place, out), nothing)


def test_a_finished_stage_whose_files_are_gone_has_not_made_nothing(finished: Plan, tmp_path: Path):
    place, out = moved(finished, tmp_path)
    shutil.rmtree(out / "start")
    (out / "start").mkdir()
    with pytest.raises(ValueError, match=r"stage start: its output is gone"):
        run(read_plan(place, out), nothing)


def test_a_stage_that_fails_ends_the_path_with_its_exit_code_and_is_tried_again(tmp_path: Path, capsys):
    plan = read_plan(folder_of(tmp_path / "small"), tmp_path / "out")
    launched = []

    def failing(arguments: Sequence[str]) -> Ended:
        launched.append(arguments[0])
        return Ended(3)

    assert [run(plan, failing), run(plan, failing), launched] == [3, 3, ["train", "train"]]
    assert "1/3 zero: it failed with exit code 3" in capsys.readouterr().err
    assert read_json(plan.out / "lineage.json")["stages"]["zero"]["status"] == "failed"
    assert run(plan, lambda _: Ended(143, was_asked=True)) == 75  # grpo reject has no exit code of its own for it


def test_a_stage_without_rows_says_so_instead_of_the_next_one(finished: Plan, tmp_path: Path):
    place, out = moved(finished, tmp_path)
    for name in ("rows", "start"):
        shutil.rmtree(out / name)
    plan = read_plan(place, out)

    def keeping_none(arguments: Sequence[str]) -> Ended:
        shutil.copytree(finished.out / "rows", out / "rows", dirs_exist_ok=True)
        table = read_json(out / "rows" / "rows.json")
        (out / "rows" / "rows.json").write_text(json.dumps({**table, "num_kept": 0}))
        return Ended(0)

    with pytest.raises(ValueError, match=r"stage rows: no row is kept of 160 samples: .* dropped: wrong"):
        run(plan, keeping_none)
    assert read_json(out / "lineage.json")["stages"]["rows"]["status"] == "failed"


def test_rows_of_an_early_step_come_from_that_checkpoint(tmp_path: Path):
    plan = read_plan("r1-tiny", tmp_path)
    cold_rows, rejected = plan.stages[1], plan.stages[4]
    assert plan.inputs(cold_rows)[0].path == f"{tmp_path}/zero/checkpoints/step-00000010"
    assert plan.inputs(rejected)[0].path == f"{tmp_path}/rl1"
    with pytest.raises(ValueError, match=r"stage cold_rows: step is 'ten'; it is the number of a step"):
        read_plan("r1-tiny", tmp_path, ["cold_rows:step=ten"])


@pytest.mark.parametrize("module", [pipeline_run, launch], ids=["a stage", "a launched run"])
def test_a_signal_that_comes_while_a_process_is_started_reaches_it(tmp_path: Path, monkeypatch, module: Any):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*words, **options))
        os.kill(os.getpid(), signal.SIGTERM)  # its caller does not know of it yet
        return started[0]

    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=popen))
    code = process(["train"]).code if module is pipeline_run else launch.run("grpo", ["train"], num_processes=1)
    assert code == 128 + signal.SIGTERM
    assert started[0].returncode == -signal.SIGTERM


def test_a_signal_is_handed_on_to_the_stage_and_two_do_not_share_a_directory(tmp_path: Path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap 'exit 75' TERM\nkill -TERM $PPID\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "executable", str(script))
    assert process(["train"]) == Ended(75, was_asked=True)
    assert signal.getsignal(signal.SIGTERM) == before
    script.write_text("#!/bin/sh\n[ $GRPO_LAUNCHED = 1 ] && [ \"$*\" = '-P -m grpo a b' ] && kill -KILL $$\n")
    assert process(["a", "b"]) == Ended(137)
    plan = read_plan(folder_of(tmp_path / "small"), tmp_path / "out")

    def again(_: Sequence[str]) -> Ended:
        with pytest.raises(ValueError, match=r"another process is at work there"):
            run(plan, nothing)
        return Ended(1)

    assert run(plan, again) == 1


# ---- numbers ---------------------------------------------------------------------------------------------------------


def answer(question: int, right: float, text: str, sample: int = 0) -> dict[str, Any]:
    return {
        "row": question,
        "question": f"What is {question}+1?",
        "completion": text,
        "rewards": {"accuracy": right},
        "num_tokens": 4,
        "sample": sample,
    }


def test_the_measures_of_answers_by_hand():
    mixed, plain, wordless = "<think>Wait 检查</think> 2", "<think>Wait check</think> 2", "<think>1+1</think> 2"
    rows = [answer(0, 1.0, mixed), answer(0, 0.0, wordless, 1), answer(1, 1.0, plain), answer(1, 1.0, plain, 1)]
    found = outcome.measured(rows)
    assert (found["questions"], found["samples"]) == (2, 2)
    assert found["right"]["value"] == 0.75  # (1/2 + 2/2) / 2
    assert found["mixed"]["value"] == 0.5  # (1/1 + 0/2) / 2: an answer without words is left out
    assert found["consistency"]["value"] == pytest.approx((1 / 3 + 1) / 2)  # a Chinese character is a word
    other = [answer(0, 1.0, plain), answer(1, 0.0, plain), answer(7, 1.0, plain)]
    delta = outcome.difference(rows, other)
    assert delta["right"].value == 0.25  # (1/2 - 1 + 1 - 0) / 2; question 7 is not shared
    assert delta["mixed"].value == 0.5
    same = outcome.difference(rows, rows)["right"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert outcome.difference(rows, [answer(9, 1.0, plain)]) == {}


def test_the_whole_path_runs_in_short_with_an_exam_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All stages of r1-tiny, each a process that trains, samples or learns for a few seconds: about a minute."""
    (tmp_path / "quickstart").symlink_to(ROOT / "configs/quickstart")
    folder = tmp_path / "short"
    folder.mkdir()
    for path in R1.iterdir():
        (folder / path.name).symlink_to(path)
    stages = yaml.safe_load((R1 / "stages.yaml").read_text())
    exam = {
        "benchmarks": "mine",
        "data": f"mine={ROOT / 'configs/quickstart/test.jsonl'}",
        "questions": 6,
        "samples": 1,
    }
    stages["stages"].append({"name": "exam", "kind": "evaluate", "model": "rl2", "options": exam})
    (folder / "stages.yaml").unlink()
    (folder / "stages.yaml").write_text(yaml.safe_dump(stages))
    trained = {stage["name"]: stage["kind"] for stage in stages["stages"] if stage["kind"] in ("train", "sft")}
    short = [f"{name}:evaluation.num_questions=8" for name in trained] + [
        f"{name}:evaluation.num_samples=1" for name in trained
    ]
    short += [f"{name}:{'run.steps=2' if kind == 'train' else 'training.epochs=1'}" for name, kind in trained.items()]
    short += [f"{name}:rollout.num_prompts=2" for name, kind in trained.items() if kind == "train"]
    short += ["zero:checkpoint.keep_every=1", "zero:checkpoint.every_steps=1", "cold_rows:step=1"]
    short += [f"{name}:num_questions=60" for name in ("cold_rows", "rejected")]
    short += [f"{name}:require=[accuracy=1]" for name in ("cold_rows", "rejected")]
    plan = read_plan(folder, tmp_path / "out", short)
    assert run(plan, warmly) == 0
    found = read_json(plan.out / "lineage.json")["stages"]
    assert [entry["status"] for entry in found.values()] == ["finished"] * 11
    assert (
        found["sft"]["counts"]["rows learned"] > found["distil"]["counts"]["rows learned"] > 0
    )  # and those of another kind
    assert found["exam"]["outputs"]
    said = capsys.readouterr().out
    for title in (
        "The path beside as many steps of zero",
        "The student by distillation, and by reinforcement learning",
    ):
        assert f"{title}: " in said
