"""The page and the figures of runs: what they hold is what the files say, whatever the files say."""

import base64
import gzip
import hashlib
import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from browser import browser, chromium
from helpers import ROOT, tiny_config
from matplotlib.figure import Figure

from grpo import report
from grpo.observe.metric_names import METRICS
from grpo.report import save_figures, write_page
from grpo.report.figures import _draw, plot_curves, smooth
from grpo.report.panels import Panel, formula, sections
from grpo.report.read import read_runs
from grpo.report.summary import columns, headline, held_out, intervals
from grpo.scoring.statistics import wilson

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(2)"> <!-- <script> ]]> {{blocks}} {{title}}',
    "a lone surrogate \ud800, NUL \0, a right-to-left override \u202e, a separator \u2028, a bell \x07",
    "",
    '\\" "step": 7, "row": 9 \\',
    "等一下, 👩‍🚀 <think> never closed",
]


def row(step: int, question: int, text: str = "1", *, right: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "row": question,
        "question": f"What is {question}?",
        "answer": str(question),
        "completion": text,
        "finish_reason": "stop",
        "num_tokens": 3,
        "reward": right,
        "rewards": {"accuracy": right, "format": 0.5},
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def a_run(directory: Path, *, steps: int = 4, per_step: int = 4, **files: list[dict[str, Any]]) -> Path:
    """A run of few steps; other files by their names."""
    metrics: list[dict[str, Any]] = [
        {"step": s, "reward/mean": s / 10, "reward/accuracy": s / steps, "policy/entropy": 1 / s, "time/step": 2.0}
        for s in range(1, steps + 1)
    ]
    completions = [row(s, i // 2, f"{s} {i}", advantage=0.5) for s in range(1, steps + 1) for i in range(per_step)]
    for name, rows in {"metrics": metrics, "completions": completions, **files}.items():
        write(directory / f"{name}.jsonl", rows)
    (directory / "config.yaml").write_text(tiny_config(directory, run={"dir": "r", "steps": 9}).to_yaml())
    return directory


def html_of(*directories: Path, **options: Any) -> str:
    path = directories[0] / "page.html"
    size = write_page(list(directories), path, **options)
    assert size == path.stat().st_size
    return path.read_text(encoding="ascii")


def block(html: str, name: str) -> Any:
    found = re.search(f'<script type="application/octet-stream" id="{name}">([A-Za-z0-9+/=]*)</script>', html)
    assert found, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def completions_of(html: str, run: int = 0, source: int = 0) -> list[str]:
    blocks = block(html, "head")["runs"][run]["sources"][source]["blocks"]
    return [text for b in range(len(blocks)) for text in block(html, f"texts-{run}-{source}-{b}")["completions"]]


# ---- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["tool", "user"])
def test_what_tools_and_environments_said_stands_at_its_place_as_javascript_counts(tmp_path: Path, role: str):
    said, answered, rest = "\U0001f600 <tool>{}</tool>", "7", " so 7"
    turns = [
        {"role": "assistant", "content": said},
        {"role": role, "content": answered},
        {"role": "assistant", "content": rest},
    ]
    rows = [row(1, 0, "no call", advantage=0.0), {**row(1, 0, said + rest, advantage=0.0), "turns": turns}]
    html = html_of(a_run(tmp_path / "run", completions=rows))
    assert block(html, "texts-0-0-0")["results"] == {"1": [[len(said) + 1, answered]]}
    assert completions_of(html) == ["no call", said + rest]


def test_the_page_holds_what_the_files_say(tmp_path: Path):
    run = a_run(tmp_path / "run", evaluations=[row(s, q, right=float(s > 0)) for s in (0, 4) for q in range(10)])
    html = html_of(run)
    described = block(html, "head")["runs"][0]
    metrics = described["metrics"]
    assert metrics["steps"] == [1, 2, 3, 4]
    assert metrics["values"]["policy/entropy"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-5)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert completions_of(html) == [each["completion"] for each in rows]
    index = block(html, "index-0-0")
    assert index["step"] == [each["step"] for each in rows]
    assert index["group"] == [str(each["row"]) for each in rows]
    assert index["advantage"] == [0.5] * 16
    assert index["right"] == [1] * 16
    assert block(html, "texts-0-0-0")["questions"]["1"] == ["What is 1?", "1"]
    assert [source["kind"] for source in described["sources"]] == ["training", "held-out"]
    assert described["settings"]["rollout.group_size"] == "4"
    assert described["settings"]["rewards.accuracy"] == "weight 1"
    assert block(html, "head")["defaults"]["rollout.temperature"] == described["settings"]["rollout.temperature"]


def test_whatever_a_completion_says_stays_text(tmp_path: Path):
    rows = [{**row(1, i, text), "question": text, "answer": text} for i, text in enumerate(HOSTILE)]
    html = html_of(a_run(tmp_path / "run", completions=rows))
    assert completions_of(html) == HOSTILE
    assert block(html, "texts-0-0-0")["questions"]["0"] == [HOSTILE[0], HOSTILE[0]]
    assert "alert" not in html
    assert html.count("<script") == html.count("</script>") == 4  # head, index, texts and the page's own


def test_nothing_but_the_pages_own_script_and_style_may_run_and_nothing_may_be_fetched(tmp_path: Path):
    html = html_of(a_run(tmp_path / "run"))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    allowed = dict(each.split(" ", 1) for each in policy[1].split("; "))
    for kind, tag in (("script", "script"), ("style", "style")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert text
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert allowed[f"{kind}-src"] == f"'sha256-{digest}'"
    assert allowed["default-src"] == "'none'"
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}
    own = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert own
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|fetch\(", own[1])


def test_a_name_with_odd_characters_is_escaped_in_the_title(tmp_path: Path):
    run = a_run(tmp_path / "a <b> & \"ü'{{script}}")
    html = html_of(run)
    title = re.search(r"<title>(.*?)</title>", html)
    assert title
    assert title[1] == "a &lt;b&gt; &amp; &quot;&#252;&#x27;{{script}} &middot; grpo"
    assert block(html, "head")["runs"][0]["name"] == run.name


def test_runs_of_the_same_name_are_told_apart_and_share_the_room(tmp_path: Path):
    runs = [a_run(tmp_path / name / "run", steps=50, per_step=4) for name in ("x", "y")]
    html = html_of(*runs, max_completions=80)
    described = block(html, "head")["runs"]
    assert [run["name"] for run in described] == ["x/run", "y/run"]
    assert [run["sources"][0]["shown"] for run in described] == [40, 40]
    assert completions_of(html, run=1)[:4] == ["1 0", "1 1", "1 2", "1 3"]


def test_of_too_many_completions_whole_steps_at_equal_distances_are_kept_and_the_page_says_so(tmp_path: Path):
    html = html_of(a_run(tmp_path / "run", steps=101, per_step=4), max_completions=44)
    index = block(html, "index-0-0")
    assert index["step"] == [step for step in range(1, 102, 10) for _ in range(4)]
    source = block(html, "head")["runs"][0]["sources"][0]
    assert {key: source[key] for key in ("shown", "rows", "units", "kept")} == {
        "shown": 44,
        "rows": 404,
        "units": 101,
        "kept": 11,
    }
    none = block(html_of(tmp_path / "run", max_completions=0), "head")["runs"][0]
    assert none["sources"] == []


def test_questions_that_are_kept_keep_all_their_evaluations(tmp_path: Path):
    evaluations = [row(step, question) for step in (0, 2, 4) for question in range(40)]
    html = html_of(a_run(tmp_path / "run", evaluations=evaluations), max_completions=30)
    index = block(html, "index-0-1")
    assert index["step"] == [0] * 10 + [2] * 10 + [4] * 10
    assert index["group"][:10] == index["group"][10:20] == index["group"][20:]
    assert index["group"][0] == "0"
    assert index["group"][9] == "39"
    assert block(html, "head")["runs"][0]["held_out"][0]["questions"] == 40  # tables are of all of them


def test_long_completions_are_cut_into_blocks_that_join_up_again(tmp_path: Path):
    texts = [f"{i} " + "x" * 400_000 for i in range(7)]
    html = html_of(a_run(tmp_path / "run", completions=[row(1, i, text) for i, text in enumerate(texts)]))
    blocks = block(html, "head")["runs"][0]["sources"][0]["blocks"]
    assert blocks == [[0, 3], [3, 6], [6, 7]]
    assert completions_of(html) == texts


def test_a_run_that_is_still_writing_is_shown_as_far_as_it_is(tmp_path: Path):
    run = a_run(tmp_path / "run")
    for name in ("metrics", "completions"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 5, "row": 1, "reward/mean": 0.')
    described = block(html_of(run), "head")["runs"][0]
    assert described["metrics"]["steps"] == [1, 2, 3, 4]
    assert described["notes"] == []
    assert described["headline"]["steps"] == 4
    assert described["headline"]["planned"] == 9


def test_a_line_that_cannot_be_read_is_left_out_and_said(tmp_path: Path):
    run = a_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b'{"step": 2, \xff\xfe\n' + lines[2] + b"[1]\n")
    described = block(html_of(run), "head")["runs"][0]
    assert described["metrics"]["steps"] == [1, 3]
    assert described["notes"] == [f"line {n} of metrics.jsonl cannot be read and is left out" for n in (2, 4)]


def test_a_file_that_cannot_be_read_is_left_out_and_said(tmp_path: Path):
    run = a_run(
        tmp_path / "run",
        metrics=[{"reward/mean": 1.0}, {"step": 2}],
        completions=[{"step": 3}, row(3, 0)],
        evaluations=[{"step": 0, "row": 0}],
    )
    for name, text in {"config.yaml": "", "environment.json": '{"device": ', "evaluation/x/results.json": "{}"}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    html = html_of(run)
    described = block(html, "head")["runs"][0]
    assert described["metrics"]["steps"] == [2]
    assert completions_of(html) == ["1"]
    assert (described["settings"], described["environment"], described["results"]) == ({}, {}, [])
    lines = [f"line 1 of {name}.jsonl" for name in ("evaluations", "metrics", "completions")]
    whole = ["config.yaml", "environment.json", "x/results.json"]
    assert sorted(described["notes"]) == sorted(f"{name} cannot be read and is left out" for name in lines + whole)


def test_reflective_words_are_those_that_the_run_counts(tmp_path: Path):
    own = {"logging": {"reflection_words": {"reflection": ["hmm"]}}}
    runs = [a_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "config.yaml").write_text(tiny_config(tmp_path, **own).to_yaml())
    first, second = (run["reflective"] for run in block(html_of(*runs), "head")["runs"])
    assert re.search(first, "wait")
    assert not re.search(first, "hmm")
    assert re.search(second, "hmm")
    assert not re.search(second, "wait")


def test_what_is_not_a_finite_number_is_a_gap_with_its_steps(tmp_path: Path):
    metrics = [{"step": s, "policy/kl": value} for s, value in ((1, 0.5), (2, math.nan), (3, math.inf), (5, 0.25))]
    rows = [row(1, 0, right=None, reward=math.nan, advantage=math.inf)]
    html = html_of(a_run(tmp_path / "run", metrics=metrics, completions=rows))
    described = block(html, "head")["runs"][0]["metrics"]
    assert described["values"]["policy/kl"] == [0.5, None, None, 0.25]
    assert described["not_finite"] == {"policy/kl": [2, 3]}
    index = block(html, "index-0-0")
    assert (index["reward"], index["advantage"], index["right"]) == ([None], [None], [None])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_one_step_or_none_has_a_page_and_curves(tmp_path: Path, steps: int):
    run = a_run(tmp_path / "run", steps=steps)
    if not steps:
        for name in ("metrics", "completions"):
            (run / f"{name}.jsonl").unlink()
    described = block(html_of(run), "head")
    assert described["runs"][0]["headline"]["steps"] == steps
    assert bool(described["sections"]) == bool(steps)
    assert plot_curves(run).read_bytes().startswith(b"\x89PNG")


def test_roll_backs_alarms_and_what_was_taken_back_are_on_the_page(tmp_path: Path):
    back = {"step": 4, "to": 2, "rule": "kl", "rate_factor": 0.5, "text": "policy/kl has grown"}
    run = a_run(tmp_path / "run", roll_backs=[back], **{"metrics.superseded": [{"step": 3}, {"step": 4}]})
    (run / "post_mortem/step-00000004").mkdir(parents=True)
    (run / "post_mortem/step-00000004/alarm.txt").write_text("watchdog.kl, step 4: <b>")
    described = block(html_of(run), "head")["runs"][0]
    assert described["roll_backs"] == [back]
    assert described["alarms"] == [["step-00000004", "watchdog.kl, step 4: <b>"]]
    assert described["notes"] == ["metrics.superseded.jsonl holds 2 rows of steps that were taken back and done again"]


def test_benchmarks_are_shown_with_their_samples_the_base_model_first(tmp_path: Path):
    run = a_run(tmp_path / "run")
    metrics = {"pass@1": {"value": 0.5, "low": 0.4, "high": 0.6}}
    for name in ("a", "base"):
        sample = [{**row(0, 3, name), "sample": k, "benchmark": "gsm8k", "template": "chat"} for k in range(2)]
        write(run / "evaluation" / name / "samples.jsonl", sample)
        results = {"model": name, "settings": {}, "results": [{"benchmark": "gsm8k", "metrics": metrics, "by": {}}]}
        (run / "evaluation" / name / "results.json").write_text(json.dumps(results))
    html = html_of(run)
    described = block(html, "head")["runs"][0]
    assert [result["name"] for result in described["results"]] == ["base", "a"]
    assert described["results"][0]["results"][0]["metrics"] == metrics
    assert [source["kind"] for source in described["sources"]] == ["training", "base", "a"]
    assert block(html, "index-0-1")["group"] == ["gsm8k chat 3"] * 2
    assert block(html, "index-0-1")["sample"] == [0, 1]


def test_a_page_without_completions_is_small(tmp_path: Path):
    assert len(html_of(a_run(tmp_path / "run", steps=100), max_completions=0)) < 100_000  # the scripts are most of it


@pytest.mark.parametrize(
    ("directories", "limit", "words"),
    [
        (["nothing"], 10, ["RUN_DIR is", "nothing'", "metrics.jsonl", "Give the directory"]),
        (["run"] * 9, 10, ["RUN_DIR is given 9 times", "at most 8 runs", "Give fewer"]),
        (["run", "run/../run"], 10, ["run' is given 2 times", "drawn once", "Give each"]),
        (["run"], -1, ["--max-completions is -1", "number of completions", "Set 0"]),
    ],
)
def test_what_cannot_be_shown_says_what_to_do(tmp_path: Path, directories: list[str], limit: int, words: list[str]):
    a_run(tmp_path / "run")
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        read_runs([tmp_path / name for name in directories], max_completions=limit)


def test_the_script_writes_the_page_beside_the_run_and_figures_where_asked(tmp_path: Path):
    run = a_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("no row\n")
    command = ["scripts/report.py", str(run), "--png", str(tmp_path / "figures")]
    done = warm.run(command, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert block((run / "report.html").read_text(), "head")["runs"][0]["name"] == "run"
    assert (tmp_path / "figures" / "reward-mean.png").exists()
    assert str(run / "report.html") in done.stdout
    assert re.search(r"^run: line \d+ of metrics\.jsonl cannot be read and is left out$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("option", "place", "words"),
    [
        ("--out", "none/page.html", "--out is .*none/page.html'; it is a file in a directory that exists. Give"),
        ("--out", "run", "--out is .*run'; it is a file"),
        (
            "--png",
            "run/metrics.jsonl",
            "--png or --pdf is .*metrics.jsonl'; figures go into a directory.* Give another",
        ),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    place: str,
    words: str,
):
    run = a_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), option, str(tmp_path / place)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")
    assert re.search(words, capsys.readouterr().err)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In a directory that takes no files, whoever asks."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(a_run(tmp_path / "run")), "--out", "/proc/page.html"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: --out is '/proc/page\.html'; no page can be written there \(.*\)\. Name a file .*\n", said
    )


# ---- numbers ----------------------------------------------------------------------------------------------------------


def test_wilsons_interval_is_that_of_the_textbook():
    # 10 of 20: centre 1/2, half width 1.96 / (1 + 1.96**2 / 20) * sqrt(1/80 + 1.96**2 / 1600) = 0.2007
    assert wilson(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    # 0 of 10: 0 to 1.96**2 / (10 + 1.96**2) = 0.2775
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_intervals_of_the_run_are_taken_over_and_votes_are_no_values(tmp_path: Path):
    metrics = [{"step": 0, "eval/pass@4": 0.5, "eval/pass@4_low": 0.25, "eval/pass@4_high": 0.75}]
    metrics.append({"step": 0, "eval/mine": 2.0, "eval/mine_stderr": 0.5})
    rows = [row(0, q, rewards={"accuracy": 1.0, "vote": 17.0}) for q in range(4)]
    (run,) = read_runs([a_run(tmp_path / "run", metrics=metrics, evaluations=rows)], max_completions=9)
    assert intervals(run)["eval/pass@4"] == {0: (0.5, 0.25, 0.75)}
    assert intervals(run)["eval/mine"] == {0: pytest.approx((2.0, 1.02, 2.98))}
    assert held_out(run)[0]["functions"].keys() == {"accuracy"}


def test_endings_of_names_alone_make_no_interval_and_hide_no_panel(tmp_path: Path):
    clipped = {"policy/clip_fraction": 0.3, "policy/clip_fraction_low": 0.1, "policy/clip_fraction_high": 0.2}
    mine = {
        f"{group}/{name}": 0.5 for group in ("reward", "eval") for name in ("fit", "fit_low", "fit_high", "odd_low")
    }
    names = [*clipped, *mine, "eval/odd_low_stderr", "eval/fit_stderr", "schedule/algorithm.clip_low"]
    panels = {panel.title: panel.metrics for section in sections(names) for panel in section.panels}
    assert panels["Clipped tokens"] == list(clipped)
    assert panels["Odd low"] == ["reward/odd_low", "eval/odd_low"]
    assert panels["Fit high"] == ["reward/fit_high", "eval/fit_high"]
    assert {name for metrics in panels.values() for name in metrics} == {each for each in names if "stderr" not in each}
    metrics = [{"step": 0, **clipped, "eval/fit": 0.5, "eval/fit_low": 0.5}]
    (run,) = read_runs([a_run(tmp_path / "run", metrics=metrics)], max_completions=0)
    assert intervals(run) == {}


def test_what_was_learned_and_forgotten_is_counted_by_question_and_intervals_count_questions(tmp_path: Path):
    # of two samples a question is right if both are; 0, 1 | 2 | 3 are right | one of two | wrong, then wrong | right | right
    before = {0: (1, 1), 1: (1, 1), 2: (1, 0), 3: (0, 0)}
    after = {0: (0, 0), 1: (1, 1), 2: (1, 1), 3: (1, 1)}
    rows = [
        row(step, question, right=float(value), sample=k)
        for step, verdicts in ((0, before), (4, after))
        for question, values in verdicts.items()
        for k, value in enumerate(values)
    ]
    (run,) = read_runs([a_run(tmp_path / "run", evaluations=rows)], max_completions=100)
    first, last = held_out(run)
    assert (first["questions"], first["answers"]) == (4, 8)
    assert (first["learned"], first["forgotten"]) == ([], [])
    assert (last["learned"], last["forgotten"]) == ([2, 3], [0])
    assert first["functions"]["accuracy"] == pytest.approx((5 / 8, *wilson(5 / 8, 4)))
    assert headline(run)["after"] == pytest.approx((0.75, *wilson(0.75, 4)))


def test_before_and_after_are_of_whole_evaluations_with_as_many_questions(tmp_path: Path):
    rows = [row(step, q, right=float(step == 4)) for step, num in ((0, 6), (4, 6), (8, 2)) for q in range(num)]
    (run,) = read_runs([a_run(tmp_path / "run", evaluations=rows)], max_completions=0)
    top = headline(run)
    assert (top["evaluated"], top["questions"]) == ([0, 4], 6)
    assert (top["before"][0], top["after"][0]) == (0.0, 1.0)
    assert [each["questions"] for each in held_out(run)] == [6, 6, 2]  # the table tells of all


def test_the_headline_adds_up_time_and_tokens(tmp_path: Path):
    metrics = [
        {
            "step": s,
            "reward/mean": s,
            "time/step": 3.0,
            "time/rollout": 2.0,
            "throughput/rollout": 50.0,
            "memory/step": s,
        }
        for s in range(1, 41)
    ]
    (run,) = read_runs([a_run(tmp_path / "run", metrics=metrics)], max_completions=0)
    top = headline(run)
    assert (top["seconds"], top["tokens"], top["memory"]) == (120.0, 4000, 40)
    assert top["reward"] == (2.5, 38.5)  # the mean of the first four of 40 steps, and of the last four
    assert top["before"] is top["after"] is None
    assert columns(run)["last"]["reward/mean"] == 38.5


OF_AN_ESTIMATE = {"eval/accuracy_stderr", "eval/pass@4_low", "eval/pass@4_high"}
"""Told with the values of which they say how sure they are."""


def test_every_metric_is_in_one_panel_and_has_its_formula():
    example = {"<function>": "accuracy", "<list>": "reflection", "<kind>": "right", "<k>": "4", "<n>": "4"}
    example |= {"<setting>": "algorithm.kl_coef", "<name>": "found", "<form>": "arithmetic", "<question_kind>": "maths"}
    names = [re.sub(r"<\w+>", lambda found: example[found[0]], name) for name in METRICS]
    panels = [panel for section in sections([*names, "eval/pass@1"]) for panel in section.panels]
    drawn = [name for panel in panels for name in panel.metrics]
    assert sorted(drawn) == sorted({*names, "eval/pass@1"} - OF_AN_ESTIMATE)
    one = [panel for section in sections([*{*names} - {"verdict/right"}, "eval/pass@1"]) for panel in section.panels]
    assert not any("eval/pass@1" in panel.metrics for panel in one)  # it is the verdict's own mean
    for name, pattern in zip(names, METRICS, strict=True):
        assert formula(name) == METRICS[pattern], name
    assert formula("reward/my_function") == METRICS["reward/<function>"]
    assert formula("mine/own") == ""
    assert [panel.lines for panel in sections(["mine/own"])[0].panels] == [["mine/own"]]


def test_smoothing_keeps_a_constant_and_a_line_and_sees_no_further_than_three_sigma():
    steps = np.arange(50.0)
    assert smooth(steps, np.full(50, 0.3), sigma=2) == pytest.approx(np.full(50, 0.3))
    assert smooth(steps, 2 * steps, sigma=2)[6:-6] == pytest.approx(2 * steps[6:-6])
    spike = smooth(steps, np.where(steps == 25, 1.0, 0.0), sigma=2)
    assert np.flatnonzero(spike).tolist() == list(range(19, 32))
    # weights 1, exp(-1/2), exp(-2), exp(-9/2), each but the first on both sides
    alone = smooth(np.arange(7.0), np.eye(7)[3], sigma=1)
    assert alone[3] == pytest.approx(1 / (1 + 2 * (math.exp(-0.5) + math.exp(-2) + math.exp(-4.5))))


# ---- figures, and the end of a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_each_curve_is_a_figure_for_one_run_and_for_several(tmp_path: Path, suffix: str, magic: bytes):
    phases = {f"time/{phase}": 1.0 for phase in ("rollout", "scoring", "logprobs", "update")}
    metrics = [{"step": s, "reward/mean": s, "completion/length_mean": 9.0, **phases} for s in range(1, 13)]
    metrics[3]["reward/mean"] = math.nan
    held = [row(s, q, right=float(q > 3)) for s in (0, 12) for q in range(9)]
    runs = [a_run(tmp_path / name, metrics=metrics, evaluations=held) for name in ("a", "b")]
    one = save_figures(runs[:1], tmp_path / "one", suffix=suffix)
    assert [path.stem for path in one] == ["reward-mean", "completion-length_mean", "step-time-by-phase"]
    both = save_figures(runs, tmp_path / "both", suffix=suffix)
    phases_of_each = ["step-time-by-phase-a", "step-time-by-phase-b"]
    assert [path.stem for path in both] == ["reward-mean", "completion-length_mean", *phases_of_each]
    assert all(path.read_bytes().startswith(magic) for path in [*one, *both])


@pytest.mark.usefixtures("pictures")
def test_a_picture_that_cannot_be_drawn_does_not_cost_a_run_its_end(tmp_path: Path):
    run = a_run(tmp_path / "run")
    assert report.at_the_end(run) == [f"curves     {run / 'curves.png'}", f"report     {run / 'report.html'}"]
    (run / "curves.png").unlink()
    (run / "curves.png").mkdir()
    curves, page = report.at_the_end(run)
    assert curves.startswith("warning: IsADirectoryError")
    assert f"grpo report {run} --png" in curves
    assert page == f"report     {run / 'report.html'}"


def test_figures_say_what_the_dots_and_the_dotted_line_are_and_lines_of_few_completions_have_no_single_values(
    tmp_path: Path,
):
    lines = ("aha/reflection", "aha/reflection_truncated")
    metrics: list[dict[str, Any]] = [{"step": s, **dict.fromkeys(lines, float(s % 2))} for s in range(1, 41)]
    metrics.append({"step": 41, "aha/eval_reflection": 0.5})  # no answers, so no interval
    panel = Panel("Reflection", [lines[0]], points=["aha/eval_reflection"], base=True, alone=[lines[1]])
    runs = read_runs([a_run(tmp_path / name, metrics=metrics) for name in ("a", "b")], max_completions=0)
    for number, labels, drawn in ((1, ["all", "cut off"], 5), (2, ["a", "b"], 8)):
        axis = Figure().subplots()
        _draw(axis, panel, runs[:number])
        wanted = {*labels, "step 1, untrained", "held out"}
        assert sorted(axis.get_legend_handles_labels()[1]) == sorted(wanted)
        assert (
            len(axis.lines) == drawn
        )  # of a run: single values, smoothed, step 1 and dots; of "cut off" only smoothed


def test_what_is_no_file_is_left_out(tmp_path: Path):
    """As a pipe or a device would be, of which nobody finds the end."""
    directory = a_run(tmp_path / "run")
    (directory / "completions.jsonl").unlink(missing_ok=True)
    for name in ("completions.jsonl", "environment.json", "roll_backs.jsonl"):
        (directory / name).mkdir()
    (run,) = read_runs([directory], max_completions=100)
    assert (run.environment, run.roll_backs) == ({}, [])
    assert [source.kind for source in run.sources] == []
    assert run.metrics[-1]["step"] == 4


def test_a_legend_stands_clear_of_the_axis_and_its_label(tmp_path: Path):
    """In the small figure of a paper and in the large one of an overview."""
    runs = read_runs([a_run(tmp_path / "run", steps=12)], max_completions=0)
    panel = Panel("Reward", ["reward/mean", "reward/accuracy"])
    for size in ((3.4, 2.3), (10, 8)):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        _draw(axis, panel, runs)
        figure.draw_without_rendering()
        label, legend = (part.get_window_extent() for part in (axis.xaxis.label, axis.get_legend()))
        assert legend.y1 <= label.y0 + 3  # in pixels at 100 dpi, of which the legend's own padding is most
        assert label.y0 - legend.y1 < 12


def test_the_ways_to_count_one_list_of_words_are_one_chart():
    names = [f"aha/reflection{measure}{side}" for measure in ("_per_1k", "_share", "") for side in ("", "_right")]
    (section,) = [each for each in sections(names) if each.title == "Does it reflect?"]
    assert [(panel.family, panel.measure) for panel in section.panels] == [
        ("reflection", "per 1k tokens"),
        ("reflection", "share of answers"),
        ("reflection", "words"),
    ]


@pytest.mark.skipif(chromium() is None, reason="chromium and chromedriver are not installed")
def test_a_printed_page_is_dark_on_white_and_has_all_charts_and_completions(tmp_path: Path):
    """Also where a person has chosen the dark colours, and from below what was scrolled to."""
    rows = [row(step, number, f"answer {number} " * 200) for step in (1, 2, 3, 4) for number in range(6)]
    page = tmp_path / "page.html"
    page.write_text(html_of(a_run(tmp_path / "a", completions=rows)))
    with browser() as shown:
        shown.open(page.as_uri())
        shown.wait("return document.querySelectorAll('.cards').length > 0")
        shown.click("#theme")
        dark = "const [r] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g); return Number(r) < 100"
        was_dark = shown.run(dark)
        if not was_dark:  # the system's colours were dark before
            shown.click("#theme")
        assert shown.run(dark)
        shown.print_preview()
        assert not shown.run(dark)
        assert shown.run("return [...document.querySelectorAll('.panel')].every(p => p.querySelector('svg *'))")
        cut = "return [...document.querySelectorAll('.cards, .text')].filter(e => e.scrollWidth > e.clientWidth + 1 || "
        assert shown.run(cut + "(e.scrollHeight > e.clientHeight + 1 && e.className === 'text')).length") == 0
        assert shown.errors() == []


@pytest.mark.skipif(chromium() is None, reason="chromium and chromedriver are not installed")
def test_on_a_phone_the_first_question_is_open_and_the_others_open_with_their_charts_drawn(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(html_of(a_run(tmp_path / "a")))
    is_open = "return [...document.querySelectorAll('#curves details.section')].map(s => s.open)"
    with browser() as shown:
        shown.open(page.as_uri())
        shown.wait("return document.querySelectorAll('.panel').length > 0")
        assert all(shown.run(is_open)[:-1])
        shown.resize(390, 844)
        shown.open(page.as_uri())
        shown.wait("return document.querySelectorAll('.panel').length > 0")
        first, *others = shown.run(is_open)
        assert first
        assert others
        assert not any(others)
        shown.click("#curves details.section:nth-of-type(2) summary")
        drawn = "return [...document.querySelectorAll('#curves details.section:nth-of-type(2) .panel')]"
        shown.wait(f"{drawn}.every(p => p.querySelector('svg *'))")
        shown.print_preview()
        assert all(shown.run(is_open))
        assert shown.run("return [...document.querySelectorAll('.panel')].every(p => p.querySelector('svg *'))")
        shown.run("window.dispatchEvent(new Event('afterprint'))")
        assert shown.run(is_open) == [True, True, *others[1:]]
        assert shown.errors() == []
