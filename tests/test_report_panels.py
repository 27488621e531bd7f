"""Panels of one run at a time, what becomes of completions and values by kind of question, on the page and in pictures."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from browser import browser, chromium
from helpers import ROOT, tiny_config
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_report import a_run, row

from grpo.report import check_places, save_picture, write_page
from grpo.report.figures import COLORS, _draw, _of_titles
from grpo.report.panels import Panel, sections
from grpo.report.read import Run, read_runs
from grpo.report.summary import intervals, is_share
from grpo.scoring.statistics import wilson

STEPS = 4
SHARES = {  # of steps 1 to 4; each step adds up to 1
    "outcome/right": [0.0, 0.0, 0.0, 0.0],
    "outcome/right_first": [0.125, 0.25, 0.25, 0.125],
    "outcome/right_later": [0.0, 0.25, 0.5, 0.625],
    "outcome/wrong": [0.875, 0.375, 0.125, 0.0],
    "outcome/truncated": [0.0, 0.125, 0.125, 0.25],
    "outcome/unknown": [0.0, 0.0, 0.0, 0.0],
}
OF_LEVELS = {"4": [0.25, 0.5, 0.5, 0.75], "12": [0.0, 0.125, 0.25, 0.25]}  # in training; 3 is only held out


def with_levels(directory: Path, *, column: str = "level") -> Path:
    """A run with shares of outcomes and questions of three levels; ten are held out of each, of which more are right later."""
    metrics: list[dict[str, Any]] = [
        {
            "step": step,
            "reward/mean": 0.5,
            "reward/accuracy": 0.5,
            **{name: values[step - 1] for name, values in SHARES.items()},
            **{f"kind/{level}/accuracy": values[step - 1] for level, values in OF_LEVELS.items()},
            **{f"kind/{level}/length": 10.0 * step for level in OF_LEVELS},
        }
        for step in range(1, STEPS + 1)
    ]
    right = {0: {"3": 6, "4": 3, "12": 0}, STEPS: {"3": 9, "4": 5, "12": 2}}
    held_out = [
        row(step, 100 * int(level) + q, right=float(q < count), kind=level)
        for step, counts in right.items()
        for level, count in counts.items()
        for q in range(10)
    ]
    for step, counts in right.items():
        metrics.append({"step": step, **{f"kind/{level}/eval_accuracy": n / 10 for level, n in counts.items()}})
    run = a_run(directory, metrics=metrics, evaluations=held_out)
    (run / "config.yaml").write_text(tiny_config(run, data={"kind_column": column}).to_yaml())
    return run


def read(*directories: Path) -> list[Run]:
    return read_runs([*directories], max_completions=0)


def panel_of(title: str, runs: list[Run]) -> Panel:
    names = dict.fromkeys(name for run in runs for each in run.metrics for name in each)
    (found,) = [
        each for section in sections(names, kind="level") for each in section.panels if each.title.startswith(title)
    ]
    return found


def drawn(title: str, *directories: Path) -> list[Axes]:
    figures = []
    for panel, runs in _of_titles(read(*directories), [title]):
        axis = Figure().subplots()
        _draw(axis, panel, runs)
        figures.append(axis)
    return figures


def test_areas_are_as_high_as_the_shares_and_what_never_happens_is_left_out(tmp_path: Path):
    (axis,) = drawn("What becomes of a completion", with_levels(tmp_path / "a"))
    labels = ["right at the first trial", "right after several", "wrong", "cut off"]
    assert axis.get_legend_handles_labels()[1] == labels
    floor = np.zeros(STEPS)
    for area, name in zip(axis.collections, ("right_first", "right_later", "wrong", "truncated"), strict=True):
        corners = area.get_paths()[0].vertices
        share = np.array(SHARES[f"outcome/{name}"])
        for step in range(1, STEPS + 1):
            heights = corners[corners[:, 0] == step, 1]
            assert (heights.min(), heights.max()) == pytest.approx((floor[step - 1], floor[step - 1] + share[step - 1]))
        floor += share
    assert floor.tolist() == [1.0] * STEPS
    assert axis.get_ylim() == (0, 1)
    assert axis.yaxis.get_major_formatter()(0.25) == "25%"
    colors = [to_hex(area.get_facecolor()[0]) for area in axis.collections]
    assert colors == [COLORS[5], COLORS[0], COLORS[1], COLORS[7]]


def test_kinds_are_in_the_order_of_numbers_and_have_one_colour_in_training_and_held_out(tmp_path: Path):
    runs = read(with_levels(tmp_path / "a"))
    trained, held_out = panel_of("Accuracy by level", runs), panel_of("Held-out accuracy by level", runs)
    assert trained.lines == ["kind/4/accuracy", "kind/12/accuracy"]
    assert held_out.points == [f"kind/{level}/eval_accuracy" for level in (3, 4, 12)]
    assert {name.split("/")[1]: color for name, (_, color) in held_out.legend.items()} == {"3": 0, "4": 1, "12": 2}
    (axis,) = drawn("Accuracy by level", tmp_path / "a")
    assert [(line.get_label(), line.get_color()) for line in axis.lines] == [("4", COLORS[1]), ("12", COLORS[2])]
    assert [line.get_ydata().tolist() for line in axis.lines] == [*OF_LEVELS.values()]
    (axis,) = drawn("Held-out accuracy by level", tmp_path / "a")
    dots = {line.get_color(): line for line in axis.lines if len(line.get_xdata()) and line.get_marker() == "o"}
    assert {color: line.get_ydata().tolist() for color, line in dots.items()} == {
        COLORS[0]: [0.6, 0.9],
        COLORS[1]: [0.3, 0.5],
        COLORS[2]: [0.0, 0.2],
    }
    assert {line.get_linestyle() for line in dots.values()} == {"-"}  # they are joined
    assert axis.get_legend().get_title().get_text() == "95 % interval"


def test_colours_come_again_after_eight_kinds_with_another_dash(tmp_path: Path):
    metrics = [
        {"step": step, "reward/mean": 0.1, "reward/accuracy": 0.1}
        | {f"kind/{k}/{name}": 0.1 * k for k in range(10) for name in ("accuracy", "length")}
        for step in (1, 2)
    ]
    (axis,) = drawn("Accuracy by kind", a_run(tmp_path / "a", metrics=metrics))
    assert [line.get_color() for line in axis.lines] == [*COLORS, *COLORS[:2]]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 10


def test_held_out_intervals_of_a_kind_count_its_questions(tmp_path: Path):
    (run,) = read(with_levels(tmp_path / "a"))
    assert intervals(run)["kind/3/eval_accuracy"] == {
        0: pytest.approx((0.6, *wilson(0.6, 10))),
        STEPS: pytest.approx((0.9, *wilson(0.9, 10))),
    }
    assert intervals(run)["eval/accuracy"][0] == pytest.approx((0.3, *wilson(0.3, 30)))


def test_shares_are_told_in_percent_and_other_values_are_not(tmp_path: Path):
    metrics = [
        {"step": 1, "reward/mean": 0.5, "reward/std": 0.1, "reward/x": 0.5, "kind/a/x": 1.0, "kind/a/reward": 0.5}
        | {"kind/a/length": 0.5, "eval/y": 1.5, "completion/truncated": 0.1, "policy/kl": 0.1}
    ]
    runs = read(a_run(tmp_path / "a", metrics=metrics))
    assert [name for name in metrics[0] if is_share(name, runs)] == ["reward/x", "kind/a/x", "completion/truncated"]


def test_runs_have_a_chart_each_and_what_their_kinds_are_called_where_they_differ(tmp_path: Path):
    a, b = with_levels(tmp_path / "a"), with_levels(tmp_path / "b", column="subject")
    plain = a_run(tmp_path / "plain")
    titles = [axis.get_title() for axis in drawn("What becomes of a completion", a, plain, b)]
    assert titles == ["What becomes of a completion: a", "What becomes of a completion: b"]
    assert len(drawn("Accuracy by kind", a, plain, b)) == 2
    assert len(drawn("Accuracy by level", a, plain)) == 1
    (axis,) = drawn("Accuracy", a, plain)
    assert {line.get_color() for line in axis.lines} == {COLORS[0], COLORS[1]}


# ---- the command ------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts/report.py"), run_name="__main__")


def test_the_command_draws_the_panels_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run = with_levels(tmp_path / "a")
    sizes = {}
    for name, titles in (
        ("one", ["What becomes of a completion"]),
        ("three", ["Reward", "Accuracy by level", "What becomes of a completion"]),
        ("four", ["Reward", "Accuracy", "Accuracy by level", "Held-out accuracy by level"]),
    ):
        picture = tmp_path / f"{name}.png"
        command(monkeypatch, run, "--picture", picture, "--panels", " , ".join(titles))
        assert str(picture) in capsys.readouterr().out
        height, width = matplotlib.image.imread(picture).shape[:2]
        sizes[name] = (round(width / height, 2), height)
    assert sizes == {"one": (1.33, 350), "three": (4.0, 350), "four": (1.33, 700)}
    command(monkeypatch, run, "--picture", tmp_path / "usual.pdf")
    assert (tmp_path / "usual.pdf").read_bytes().startswith(b"%PDF")


def test_a_title_that_is_none_is_told_with_the_nearest_and_all(tmp_path: Path):
    message = (
        r"--panels has 'Acuracy'; the runs have no panel .*Did you mean 'Accuracy'\? There are: Reward, Accuracy, "
    )
    with pytest.raises(ValueError, match=message):
        save_picture([with_levels(tmp_path / "a")], tmp_path / "x.png", ["Acuracy"])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            "none/x.png",
            r"--picture is .*none/x\.png'; it is a file in a directory that exists\. Give a name such as cur",
        ),
        ("x.gif", r"--picture is .*x\.gif'; a picture's name ends in \.png, \.pdf, \.svg"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_the_work(tmp_path: Path, picture: str, message: str):
    with pytest.raises(ValueError, match=message):
        check_places(None, picture=tmp_path / picture)


def test_a_picture_of_no_metrics_or_no_titles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run = a_run(tmp_path / "run", metrics=[])
    for titles in ([], ["Reward"]):
        with pytest.raises(
            ValueError, match=r"^--picture is '.*x\.png'; the runs have no metrics yet\. Draw it after a step"
        ):
            save_picture([run], tmp_path / "x.png", titles)
    with pytest.raises(SystemExit):
        command(monkeypatch, with_levels(tmp_path / "a"), "--picture", tmp_path / "x.png", "--panels", " , ")
    assert "--panels is ' , '; it names no panel. Name some by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "a", "--picture", tmp_path / "x.png", "--panels", "Acuracy")
    assert not (tmp_path / "a" / "report.html").exists()  # before the page is made


def test_names_are_drawn_as_they_are_written(tmp_path: Path):
    """matplotlib reads formulas between dollars and leaves out what begins with a line below."""
    names = ["_", r"a$\frac$b", "a/b"]
    shares = {f"kind/{name}/accuracy": 0.5 for name in names} | {f"kind/{name}/length": 0.5 for name in names}
    metrics = [{"step": step, "reward/accuracy": 0.5, **shares} for step in (1, 2)]
    runs = read(a_run(tmp_path / "run", metrics=metrics))
    axis = Figure().subplots()
    _draw(axis, panel_of("Accuracy by", runs), runs)
    axis.figure.canvas.draw()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [" _", r"a\$\frac\$b", "a/b"]
    assert [is_share(f"kind/a/b/{name}", runs) for name in ("accuracy", "length")] == [True, False]


def test_supervised_runs_have_their_held_out_kinds(tmp_path: Path):
    metrics = [{"step": s, "eval/code": 0.5, **{f"kind/{k}/eval_code": 0.5 for k in "ab"}} for s in (0, 2)]
    runs = read(a_run(tmp_path / "sft", metrics=metrics))
    assert panel_of("Held-out code by level", runs).points == ["kind/a/eval_code", "kind/b/eval_code"]


def test_panels_without_a_picture_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    with pytest.raises(SystemExit):
        command(monkeypatch, with_levels(tmp_path / "a"), "--panels", "Reward")
    assert "--panels says what --picture draws" in capsys.readouterr().err


# ---- the page ---------------------------------------------------------------------------------------------------------

CARD = "const card = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h4').textContent === arguments[0]); "


@pytest.mark.skipif(chromium() is None, reason="chromium and chromedriver are not installed")
def test_the_page_draws_them_in_light_and_dark_with_a_chart_for_each_run(tmp_path: Path):
    runs = [with_levels(tmp_path / "a"), with_levels(tmp_path / "b")]
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for number, page in enumerate(pages, 1):
        write_page(runs[:number], page)
    with browser() as shown:

        def see(script: str, title: str) -> Any:
            shown.run(CARD + "card.scrollIntoView()", title)
            shown.wait(CARD + "return card.querySelector('svg.plot').getAttribute('aria-label')", title)
            return shown.run(CARD + script, title)

        shown.open(pages[0].as_uri())
        shown.wait("return document.documentElement.dataset.ready === 'true'")
        title = "What becomes of a completion"
        legend = "return [...card.querySelectorAll('.legend span')].map(e => e.textContent)"
        said = "return card.querySelector('svg.plot').getAttribute('aria-label').split('. Arrow')[0].replaceAll('\\u202f', ' ')"
        assert see(legend, title) == ["right at the first trial", "right after several", "wrong", "cut off"]
        assert see(said, title) == (
            "What becomes of a completion: right at the first trial from 12.5 % to 12.5 %; right after several from 0.0 % to "
            "62.5 %; wrong from 87.5 % to 0.0 %; cut off from 0.0 % to 25.0 %"
        )
        ticks = "return [...card.querySelectorAll('text.tick')].map(e => e.textContent).filter(t => t.includes('%'))"
        assert see(ticks, title)[-1] == "100%"
        top = see(
            "const [d] = [...card.querySelectorAll('.area')].map(e => e.getAttribute('d')).slice(-1); return d", title
        )
        assert {float(y) for y in re.findall(r"[ML]\d+\.\d (\d+\.\d)", top)[:STEPS]} == {8.0}  # the margin above 100 %
        for _ in range(2):  # light and dark, whichever is first
            fills = see("return [...card.querySelectorAll('.area')].map(e => getComputedStyle(e).fill)", title)
            assert len(set(fills)) == 4
            shown.click("#theme")
        assert see(legend, "Accuracy by level") == ["4", "12"]
        assert see(legend, "Held-out accuracy by level") == ["3", "4", "12", "95 % intervals"]
        assert see(said, "Held-out accuracy by level") == (
            "Held-out accuracy by level: 3 from 60.0 % to 90.0 %; 4 from 30.0 % to 50.0 %; 12 from 0.0 % to 20.0 %"
        )
        held_out = see("return [card.querySelectorAll('.joined').length, card.querySelectorAll('.held').length]", title)
        assert held_out == [0, 0]
        held_out = "return [card.querySelectorAll('.joined').length, card.querySelectorAll('.held line').length]"
        assert see(held_out, "Held-out accuracy by level") == [3, 6]
        key = "return [...card.querySelectorAll('.legend i')].map(e => e.style.background)"
        assert see(key, "Accuracy by level") == see(key, "Held-out accuracy by level")[1:]
        shown.open(pages[1].as_uri())
        shown.wait("return document.documentElement.dataset.ready === 'true'")
        for name in "ab":
            assert see(legend, f"Accuracy by level: {name}") == ["4", "12"]
            assert see("return card.querySelectorAll('.area').length", f"{title}: {name}") == 4
        assert shown.errors() == []
