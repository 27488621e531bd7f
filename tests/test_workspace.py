"""A workspace of W&B draws what runs log, in the report's words and order; everything up to what a server would be sent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_wandb import KEY, FakeWandb
from helpers import ROOT, clean_environment
from wandb_files import wandb_records_of

from grpo import Trainer, cli
from grpo.config import Config
from grpo.observe.metric_names import METRICS, is_bound
from grpo.observe.sinks import CHARTS, COMPLETIONS, REFLECTIVE
from grpo.report import workspace
from grpo.report.panels import SAME, formula, sections

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
needs_package = pytest.mark.skipif(
    find_spec("wandb_workspaces") is None, reason="the package wandb-workspaces is not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the quickstart, with samples enough for pass@k and for a reflective word, whatever they say."""
    directory = tmp_path_factory.mktemp("workspace") / "run"
    few = (
        f"run.dir={directory} run.steps=2 rollout.num_prompts=8 rollout.group_size=8 preflight.num_questions=0 "
        "evaluation.num_questions=4 evaluation.num_samples=2 logging.wandb=offline"
    )
    Trainer(Config.load("quickstart", few.split())).train()
    return directory


@pytest.fixture(scope="module")
def logged(run: Path) -> set[str]:
    """All that W&B has of the run, tables and charts included."""
    (history,) = wandb_records_of(run, "history")
    return {item.nested_key[0] if item.nested_key else item.key for each in history for item in each.item}


def spec_of(logged: set[str], **options: str) -> dict[str, Any]:
    """What would be sent."""
    made = workspace.build(logged, **{"entity": "me", "project": "p", "name": "n", **options})
    return json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def sections_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in spec["section"]["panelBankConfig"]["sections"]}


def plots(section: dict[str, Any]) -> dict[str, list[str]]:
    """Title -> metrics of its line plots."""
    configs = [each["config"] for each in section["panels"] if each["viewType"] == "Run History Line Plot"]
    found = {each["chartTitle"]: each["metrics"] for each in configs}
    assert len(found) == len(configs)
    return found


@needs_package
def test_the_workspace_of_the_quickstart_begins_with_the_aha_moment_and_ends_with_what_is_closed(logged: set[str]):
    told = sections_of(spec_of(logged))
    opened = [name for name, section in told.items() if section["isOpen"]]
    assert opened == list(told)[: len(opened)]
    assert opened == ["Is there an aha moment?", "Is it healthy?", "What is rewarded?", "What does it cost?", "Samples"]
    assert {"Does it reflect?", "In which language does it think?"} <= set(told) - set(opened)
    aha, health, rewards, cost, _ = (told[name] for name in opened)
    assert plots(aha) == {
        "Accuracy": ["reward/accuracy", "eval/accuracy"],
        "Right": ["answer/right"],
        "Length (tokens)": ["completion/length_mean", "eval/length_mean"],
        "Length by verdict (tokens)": ["completion/length_right", "completion/length_wrong"],
        "Any reflection": [f"aha/{name}" for name in of_list("reflection_share")],
        "Reflection (per 1k tokens)": [f"aha/{name}" for name in of_list("reflection_per_1k")],
        "pass@2": ["eval/pass@2"],
    }
    assert [each["viewType"] for each in aha["panels"]] == ["Run History Line Plot"] * 7 + ["Vega2"] * 3
    assert (aha["flowConfig"]["columnsPerPage"], aha["flowConfig"]["rowsPerPage"]) == (3, 4), "all of it is seen"
    assert list(plots(health))[:8] == [
        "KL to reference (nats)",
        "Entropy (nats)",
        "Clipped tokens",
        "Sampling gap (nats)",
        "Gradient norm",
        "Groups with signal",
        "Cut off",
        "Format",
    ]
    assert {"Alarms", "Loss", "Learning rate"} <= set(plots(health)), "what else the report has there comes after"
    assert list(plots(rewards)) == ["Reward", "Accuracy", "Format", "Spread of rewards", "Unknown rewards"]
    assert plots(cost)["Step time by phase (seconds)"] == [
        "time/rollout",
        "time/scoring",
        "time/logprobs",
        "time/update",
    ]
    assert "Any verification" in plots(told["Does it reflect?"])
    assert "Any reflection" not in plots(told["Does it reflect?"])


def of_list(measure: str) -> list[str]:
    """Metrics of a list of words: all, right, wrong, held out; none of the two steps' completions is cut off."""
    return [measure, f"{measure}_right", f"{measure}_wrong", f"eval_{measure}"]


@needs_package
def test_samples_stand_one_below_the_other_and_a_section_of_many_panels_has_pages():
    told = sections_of(spec_of({f"reward/of_{letter}" for letter in "abcdefghijklmno"} | {COMPLETIONS, REFLECTIVE}))
    sizes = {
        name: (own["flowConfig"]["columnsPerPage"], own["flowConfig"]["rowsPerPage"]) for name, own in told.items()
    }
    assert len(told["What is rewarded?"]["panels"]) == 15
    assert sizes["What is rewarded?"] == (3, 4)
    assert sizes["Samples"] == (1, 2)


@needs_package
def test_panels_have_what_the_run_has_logged_and_all_of_it_under_the_reports_titles(run: Path, logged: set[str]):
    in_files = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert in_files <= logged
    drawn: dict[str, list[str]] = {}
    for section in sections_of(spec_of(logged)).values():
        drawn |= plots(section)
    assert {name for metrics in drawn.values() for name in metrics} == {
        name for name in in_files if not is_bound(name) and name not in ("step", SAME)
    }
    report = [panel for section in sections(sorted(in_files)) for panel in section.panels]
    assert drawn == {panel.caption: panel.metrics for panel in report}


@needs_package
def test_every_panel_is_over_the_runs_own_step_and_smooths_nothing(logged: set[str]):
    spec = spec_of(logged)
    settings = [each["localPanelSettings"] for each in sections_of(spec).values()] + [spec["section"]["settings"]]
    assert {(each["xAxis"], each["smoothingType"], each["smoothingWeight"]) for each in settings} == {
        ("step", "none", 0)
    }
    assert all(each["xAxisActive"] and not each["smoothingActive"] for each in settings)
    panels = [each["config"] for section in sections_of(spec).values() for each in section["panels"]]
    lines = [each for each in panels if "metrics" in each]
    assert {(each["xAxis"], each["smoothingType"]) for each in lines} == {("step", "none")}
    assert spec["section"]["settings"]["shouldAutoGeneratePanels"] is False, "or W&B's own sections would follow"


@needs_package
def test_charts_and_tables_are_asked_for_as_the_run_has_logged_them(run: Path, logged: set[str]):
    told = sections_of(spec_of(logged))
    records = [update for each in wandb_records_of(run, "config")[0] for update in each.update]
    of_run = {
        each.nested_key[2]: json.loads(each.value_json)
        for each in records
        if list(each.nested_key[:2]) == ["_wandb", "visualize"]
    }
    charts = [each for each in told["Is there an aha moment?"]["panels"] if each["viewType"] == "Vega2"]
    assert len(charts) == len(CHARTS) == len(of_run)
    for chart, name in zip(charts, CHARTS, strict=True):
        limit = chart["config"]["userQuery"]["queryFields"][0]["args"].pop()
        assert limit == {"name": "limit", "value": 500.0}, "all of the project's runs, which the package adds"
        fields = chart["config"]["userQuery"]["queryFields"][0]["fields"]
        own = of_run[name]["panel_config"]["userQuery"]["queryFields"][0]["fields"]
        assert sorted(fields, key=str) == sorted(own, key=str)
        chart["config"]["userQuery"]["queryFields"][0]["fields"] = own
        assert chart["config"] == of_run[name]["panel_config"]
    tables = [
        each["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] for each in told["Samples"]["panels"]
    ]
    assert tables == ["samples/reflective", "samples/completions"]
    assert set(tables) <= logged


@needs_package
def test_what_no_run_has_logged_has_no_panel():
    told = sections_of(spec_of({"reward/mean", "reward", "policy/kl", "KL", "step", "_runtime", "system/gpu.0.temp"}))
    assert {name: plots(section) for name, section in told.items()} == {
        "Is it healthy?": {"KL to reference (nats)": ["policy/kl"]},
        "What is rewarded?": {"Reward": ["reward/mean"]},
    }
    supervised = sections_of(spec_of({"supervised/loss", "supervised/held_out_loss", "supervised/tokens"}))
    assert plots(supervised["Is it learning?"]) == {
        "Loss of rows (nats)": ["supervised/loss", "supervised/held_out_loss"]
    }


@needs_package
def test_every_documented_metric_has_a_place_and_panels_have_no_others():
    values = {
        "<function>": "accuracy",
        "<list>": "reflection",
        "<kind>": "right",
        "<question_kind>": "math",
        "<k>": "4",
    }
    values |= {"<n>": "4", "<form>": "several", "<setting>": "algorithm.kl_coef", "<name>": "chars"}
    names = set()
    for name in METRICS:
        for placeholder, value in values.items():
            name = name.replace(placeholder, value)
        names.add(name)
    assert not [name for name in names if "<" in name]
    drawn = {
        name for section in sections_of(spec_of(names)).values() for own in plots(section).values() for name in own
    }
    assert drawn == names - {"eval/accuracy_stderr", "eval/pass@4_low", "eval/pass@4_high"}
    assert all(map(formula, drawn))


def test_the_verdict_is_the_reward_that_the_run_says_it_is_whatever_the_order():
    names = {"reward/brevity", "reward/zeal", "reward/length", "reward/format", "eval/zeal", "completion/length_mean"}
    (first, *_, rewards), _ = workspace.arrange(names | {"zeal", "length", "held-out zeal"})
    assert [panel.title for panel in first.panels] == ["Zeal", "Length"]
    assert first.panels[0].points == ["eval/zeal"]
    assert [panel.title for panel in rewards.panels] == ["Zeal", "Brevity", "Length", "Format"]


def test_runs_with_different_verdicts_have_a_panel_each_and_pass_at_k_stands_in_order():
    names = {"reward/accuracy", "accuracy", "reward/countdown", "countdown"}
    names |= {"eval/pass@1", "eval/pass@2", "eval/pass@16", "eval/cons@16"}
    (first, *_), _ = workspace.arrange(names)
    assert [panel.title for panel in first.panels] == ["Accuracy", "Countdown", "cons@16", "pass@2", "pass@16"]
    (first, *_), _ = workspace.arrange(names | {"verdict/right", "right"})
    assert [panel.title for panel in first.panels][:3] == ["Right of all kinds", "Accuracy", "Countdown"]


# ---- what is asked of the server, and said of its answers -------------------------------------------------------------


@pytest.fixture
def server(logged: set[str]) -> FakeWandb:
    return FakeWandb({"grpo": [dict.fromkeys(logged, 1.0)], "empty": [], "others": [{"loss": 1.0, "acc": 0.5}]})


def call(place: Path, server: FakeWandb | None, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in clean_environment().items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(place), "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), **more}
    if server is not None:
        environment = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY, **environment}
    command = [sys.executable, "-m", "grpo", "workspace", *arguments]
    return subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


@needs_package
def test_the_command_sends_one_view_and_prints_where_it_is(server: FakeWandb, logged: set[str], tmp_path: Path):
    done = call(tmp_path, server, "--name", "At a glance")
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "grpo", "At a glance")
    assert (view["type"], "id" in view) == ("project-view", False), "a new one"
    assert without_ids(json.loads(view["spec"])) == without_ids(spec_of(logged))
    address, *lines = done.stdout.splitlines()
    assert address == f"{server.address}/me/grpo?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    assert lines[0] == "  10 panels  Is there an aha moment?"
    assert lines[-1].endswith("  (closed)")


def without_ids(spec: Any) -> Any:
    """Each panel has a random one."""
    if isinstance(spec, dict):
        return {name: without_ids(value) for name, value in spec.items() if name != "__id__"}
    return [without_ids(each) for each in spec] if isinstance(spec, list) else spec


@needs_package
def test_the_newest_runs_together_say_what_is_drawn_and_the_environment_names_the_project(
    server: FakeWandb, tmp_path: Path
):
    old = {"optimizer/loss": 1.0}
    kl = {"policy/kl": {"last": 1.0, "max": 2.0}}  # as a metric with a summary of its own
    server.projects["mine"] = [{"reward/mean": 1.0}, *[kl] * (workspace.NEWEST - 1), old]
    done = call(tmp_path, server, WANDB_PROJECT="mine", WANDB_ENTITY="me", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    told = sections_of(json.loads(view["spec"]))
    assert [*plots(told["Is it healthy?"]), *plots(told["What is rewarded?"])] == ["KL to reference (nats)", "Reward"]


@needs_package
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--project gpro", "--project is 'gpro'; W&B has no project me/gpro, or your account may not see it"),
        (
            "--entity you",
            "the project is 'grpo' by default, without --project or WANDB_PROJECT; W&B has no project you/grpo, or your account",
        ),
        ("--project empty", "--project is 'empty'; none of its 20 newest runs has metrics of grpo."),
        ("--project others", "--project is 'others'; none of its 20 newest runs has metrics of grpo."),
        ("--name aha💡", "--name is 'aha💡'; W&B takes no symbols in it."),
    ],
    ids=["misspelt", "of another", "empty", "of others", "symbol"],
)
def test_a_project_that_is_unknown_or_has_no_runs_is_said_and_nothing_is_sent(
    server: FakeWandb, tmp_path: Path, arguments: str, said: str
):
    assert_error(call(tmp_path, server, *arguments.split()), 2, re.escape(f"error: {said}"))
    assert server.views == []


@needs_package
def test_an_error_names_the_variable_that_says_the_project(server: FakeWandb, tmp_path: Path):
    assert_error(
        call(tmp_path, server, WANDB_PROJECT="gpro"), 2, "error: WANDB_PROJECT is 'gpro'; W&B has no project me/gpro"
    )
    assert_error(call(tmp_path, server, WANDB_PROJECT="empty"), 2, "error: WANDB_PROJECT is 'empty'; none of its 20")
    both = call(tmp_path, server, "--project", "gpro", WANDB_PROJECT="grpo")
    assert_error(both, 2, "error: --project is 'gpro'; W&B has no project me/gpro")
    assert server.views == []


@pytest.mark.parametrize(
    ("arguments", "variable", "said"),
    [
        (["--name", ""], "", "--name is ''; it is empty. Give one, or leave --name out."),
        (["--name", "  "], "", "--name is '  '; it is empty. Give one, or leave --name out."),
        (["--project", ""], "nope", "--project is ''; it is empty. Give one, or leave --project out."),
        (["--entity", ""], "", "--entity is ''; it is empty. Give one, or leave --entity out."),
        (
            ["--project", "me/grpo"],
            "",
            "--project is 'me/grpo'; the name of a project has no /. Give --entity me --project grpo.",
        ),
        ([], "me/grpo", "WANDB_PROJECT is 'me/grpo'; the name of a project has no /. Give --entity me --project grpo."),
        (
            ["--project", "a/b/c"],
            "",
            "--project is 'a/b/c'; the name of a project has no /. Give ENTITY and PROJECT of its address.",
        ),
    ],
)
def test_a_name_that_is_empty_or_more_than_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variable: str,
    said: str,
):
    monkeypatch.setenv("WANDB_PROJECT", variable)
    monkeypatch.setattr(workspace, "connect", None)
    monkeypatch.setattr(sys, "argv", ["grpo"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["workspace", *arguments])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {said}\n")


def test_the_entity_of_the_environment_comes_before_the_accounts_own():
    account = SimpleNamespace(settings={"entity": "team"}, default_entity="me")
    assert workspace.entity_of(account) == "team"
    account.settings["entity"] = None
    assert workspace.entity_of(account) == "me"


def assert_error(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.search(f"^{said}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback (" not in done.stderr


@needs_package
def test_without_a_login_with_a_wrong_key_or_a_service_that_fails_a_line_says_so(server: FakeWandb, tmp_path: Path):
    nobody = call(tmp_path, None, WANDB_BASE_URL=server.address)
    assert_error(
        nobody, 2, "error: grpo workspace writes to your account at W&B, and there is no login. Run `wandb login`, "
    )
    short = call(tmp_path, server, WANDB_API_KEY="abc")
    assert_error(short, 1, "error: W&B: WANDB_API_KEY invalid: API key must have 40")
    gone = call(tmp_path, server, WANDB_BASE_URL="http://127.0.0.1:1", WANDB_HTTP_TIMEOUT="1")
    assert_error(gone, 1, r"error: W&B: cannot reach http://127\.0\.0\.1:1: no answer in time\. Is the address right")
    server.refuses = True
    assert_error(call(tmp_path, server), 1, "error: W&B: .*permission denied")
    server.entity = None
    assert_error(call(tmp_path, server), 2, "error: --entity is not given, and your account at W&B has no default")
    assert server.views == []


def test_without_the_package_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setattr(sys, "argv", ["grpo"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["workspace", "--project", "p"])
    assert ended.value.code == 2
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["workspace"]
    assert capsys.readouterr().err == (
        "error: grpo workspace needs the package wandb-workspaces, which is not installed. Install it: "
        f"pip install '{wanted}'.\n"
    )
