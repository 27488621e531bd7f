"""What a person sees of a run in a terminal: the numbers, and that nothing which is printed meanwhile is harmed."""

import contextlib
import io
import json
import os
import pty
import re
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import warm
from helpers import ROOT, clean_environment, tiny_config, tiny_settings
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console
from rich.text import Text

from grpo.cli.contamination import watched
from grpo.observe import display
from grpo.observe.bar import Bar
from grpo.observe.console import LineSink, errors_for_users, show_samples
from grpo.observe.display import Dashboard, contrast, fold, samples, sparkline, styled_completion
from grpo.observe.rundir import RunLog
from grpo.observe.screen import console_sink
from grpo.observe.sinks import JsonlSink, RowsLost
from grpo.system import distributed
from grpo.system.distributed import Processes
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import EXIT_STOPPED
from grpo.system.terminal import Region, SilencedConsole, can_repaint, flush_within, printable, say, say_at_once

NAMES = ["accuracy", "format"]


class Screen:
    """As much of a terminal as the display uses: text, line feeds, carriage returns, cursor up, erase below."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.history: list[str] = []  # scrolled out at the top
        self.rows = [""]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[\s\S]", text):
            self._do(token)

    def _do(self, token: str) -> None:
        if token == "\n":
            self.row, self.column = self.row + 1, 0
            self._grow()
        elif token == "\r":
            self.column = 0
        elif token == "\x1b[J":
            self.rows = [*self.rows[: self.row], self.rows[self.row][: self.column]]
        elif len(token) > 1 and token.endswith("A"):
            self.row -= int(token[2:-1])
        elif len(token) > 1 and token.endswith("m"):
            return  # a style
        else:
            assert len(token) == 1, f"the display uses {token!r}, which this terminal does not know"
            if self.column == self.width:
                self._do("\n")
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + token + row[self.column + 1 :]
            self.column += 1

    def _grow(self) -> None:
        while self.row >= len(self.rows):
            self.rows.append("")
        while len(self.rows) > self.height:
            self.history.append(self.rows.pop(0))
            self.row -= 1

    @property
    def text(self) -> list[str]:
        return [row.rstrip() for row in (*self.history, *self.rows)]


def row(
    number: int, *, right: bool | None, completion: str = "<think> 2+3 </think> <answer> 5 </answer>"
) -> dict[str, Any]:
    return {
        "step": 7,
        "row": number,
        "question": f"question {number}",
        "answer": "5",
        "completion": completion,
        "num_tokens": 9,
        "rewards": {"accuracy": None if right is None else float(right), "format": 1.0},
    }


def step(number: int, **more: float) -> dict[str, float]:
    return {
        "reward/mean": 0.1 * number,
        "reward/accuracy": 0.05 * number,
        "reward/format": 0.5,
        "completion/length_mean": 100.0 + number,
        "policy/entropy": 0.25,
        "throughput/rollout": 9000.0,
        "time/step": 2.0,
        "time/rollout": 1.0,
        "time/update": 0.8,
        **more,
    }


def dashboard(steps: int = 0, **more: float) -> Dashboard:
    board = Dashboard(title="run", num_steps=40, first_step=0, reward_names=NAMES, rows=[])
    for number in range(1, steps + 1):
        board.add(number, step(number, **more))
    return board


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(
        force_terminal=True,
        width=width,
        height=height,
        file=io.StringIO(),
        soft_wrap=True,
        highlight=False,
        _environ={},
    )


def shown(board: Dashboard, width: int = 80, height: int = 24) -> list[str]:
    return [line.plain for line in board.lines(terminal(width, height))]


def test_a_sparkline_goes_from_low_to_high_and_averages_what_does_not_fit():
    assert sparkline([0.0, 1.0, 7.0, 3.5], 4) == "▁▂█▅"
    assert sparkline([0.0, 1.0, 7.0, 3.5], 8) == "▁▁▂▂██▅▅"  # a value takes as many places as there are
    assert sparkline([0.5, 0.75], 2, scale=(0.0, 1.0)) == "▅▆"  # 3.5, rounded to the even 4, and 5.25 of seven steps up
    assert (
        sparkline([0.0, 2.0, 10.0, 12.0, 4.0, 4.0], 3) == "▁█▃"
    )  # means 1, 11, 4: (4 - 1) / 10 of seven steps up is 2.1
    assert sparkline([2.0, 2.0], 2) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0, float("inf")], 4) == "▁ █ "
    assert sparkline([float("nan")], 1) == " "


def test_a_curve_shows_its_first_and_newest_value_and_its_shape():
    lines = shown(dashboard(steps=4))
    assert lines[2].split() == ["reward", "0.100", "0.400", "▁▃▆█"]
    assert lines[3].split() == ["accuracy", "0.050", "0.200", "▁▂▂▂"]  # a share, from 0 to 1
    assert lines[5].split() == ["length", "101", "104", "▁▃▆█"]
    assert not any(line.startswith("KL") for line in lines), "a run without a reference has no KL"
    board = dashboard(steps=3, **{"policy/kl": 0.01})
    board.add(3, {"eval/accuracy": 0.25, "eval/accuracy_stderr": 0.1, "eval/length_mean": 90.0})
    assert [line.split() for line in shown(board) if line.startswith(("KL", "held"))] == [
        ["KL", "0.010", "0.010", "▁▁▁"],
        ["held-out", "accuracy", "0.250", "0.250", "▃▃▃", "step", "3"],
    ]


def test_a_curve_is_as_long_as_the_part_of_the_run_that_is_done():
    board = dashboard(steps=30)
    board.about = "a/model, 2 x H200, native engine, runs/mine"
    lines = shown(board, width=120)
    assert lines[1] == board.about
    assert len(lines[3]) == 18 + 9 + 9 + 2 + 82 * 30 // 40
    done = dashboard(steps=40)
    assert len(shown(done, width=120)[2]) == 120


def test_progress_and_speed_say_how_far_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    board = dashboard()
    assert shown(board)[0].endswith(" step 0/40  0:00:00")
    assert shown(board)[-1] == "the first step is under way"
    for number in range(1, 11):
        now += 60.0
        board.add(number, step(number, **{"time/step": 100.0 + number, "memory/step": 12.5}))
    now += 5.5
    first, *_, last = (line for line in shown(board) if not line.startswith("signal"))
    # 30 steps of (101 + ... + 110) / 10 = 105.5 s are 3165 s, of which 5.5 are over
    assert first.endswith(" step 10/40  0:10:05  0:52:39 left")
    assert len(first) == 80
    assert last == "110 s a step (rollout 1%, update 1%), 9000 tok/s, 12.50 GiB"
    bar = re.sub("[^━─]", "", first)
    assert bar.count("━") == len(bar) * 10 // 40


def test_troubles_and_alarms_are_seen():
    board = dashboard(steps=3, **{"scoring/timeouts": 2.0, "optimizer/skipped": 0.0})
    assert any(line.endswith("9000 tok/s, 6 reward calls timed out") for line in shown(board))
    for number in (1, 2):
        board.alarm("kl", f"watchdog.kl, step {number}: grown")
    board.alarm("reward", "watchdog.reward, step 3: fallen")
    assert [line for line in shown(board) if line.startswith("!")] == [
        "! watchdog.reward, step 3: fallen",
        "! watchdog.kl, step 2: grown",
    ]


def test_a_right_and_a_wrong_completion_of_one_question_are_preferred():
    rows = [row(0, right=True), row(1, right=False), row(2, right=None), row(2, right=True), row(2, right=False)]
    assert contrast(rows) == [rows[3], rows[4]]
    assert contrast(rows[:3]) == [rows[0], rows[1]]
    assert contrast([rows[1]]) == [rows[1]]
    assert contrast([rows[2]]) == []


def test_a_sample_shows_question_rewards_and_completion_with_dimmed_thoughts():
    board = dashboard(steps=1)
    board.take_samples([row(0, right=False, completion="<think>a\n b</think> <answer>6</answer>"), row(0, right=True)])
    assert shown(board)[-3:] == [
        "step 7, answer 5: question 0",
        "✓ accuracy 1, format 1, 9 tokens: <think> 2+3 </think> <answer> 5 </answer>",
        "✗ accuracy 0, format 1, 9 tokens: <think>a b</think> <answer>6</answer>",
    ]
    text = styled_completion("<think>why</think> <answer>6</answer>")
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style}
    assert styles["why"] == "dim"
    assert styles["6"] == "bold"
    assert styles["</think>"] == "dim cyan"


def test_samples_stay_long_enough_to_be_read(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    board = dashboard()
    board.take_samples([row(0, right=True)])
    now += 19.0
    board.take_samples([row(1, right=True)])
    assert "question 0" in str(board.samples[0].question)
    now += 1.0
    board.take_samples([row(1, right=True)])
    assert "question 1" in str(board.samples[0].question)


def test_a_long_completion_keeps_its_beginning_and_its_end():
    (sample,) = samples([row(0, right=True, completion="<think> start " + "x y " * 30_000 + "</think> end")])
    assert len(sample.completion) < 5000
    lines = [line.plain for line in fold(sample.completion, terminal(width=60), 3)]
    assert len(lines) == 3
    assert "start" in lines[0]
    assert lines[1].endswith(" …")
    assert lines[2].endswith("end")


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [2, 5, 12, 24, 40, 60])
def test_the_display_leaves_rows_for_messages_and_fits_every_terminal(width: int, height: int):
    board = dashboard(steps=100, **{"policy/kl": 0.1, "aha/reflection_per_1k": 0.5, "optimizer/grad_norm": 1.0})
    board.add(100, {"eval/accuracy": 0.5, "eval/format": 0.5})
    board.alarm("kl", "watchdog.kl, step 2: " + "grown " * 40)
    board.take_samples([row(0, right=True, completion="long " * 500), row(1, right=False, completion="多" * 500)])
    screen = Screen(width, height)
    console = Console(
        force_terminal=True, width=width, height=height, file=screen_file(screen), soft_wrap=True, _environ={}
    )
    region = Region(console, board.lines)
    for number in range(3):
        console.push_render_hook(region)
        console.print(f"message {number}")
        console.pop_render_hook()
    assert screen.text[:3] == ["message 0", "message 1", "message 2"]
    assert len(screen.text) - 3 <= max(height - 4, 2)
    if height >= 24:
        assert any("✗" in line for line in screen.text)
        assert any("held-out format" in line for line in screen.text) or width < 40
    assert any("grad norm" in line for line in screen.text) == (height >= 40)


def screen_file(screen: Screen) -> Any:
    """A file that writes to it; wide characters take two cells there."""
    file = io.StringIO()
    file.write = lambda text: screen.write(text.replace("多", "多\x1b[m" + "_")) or len(text)  # type: ignore[method-assign]
    return file


def test_what_others_write_meanwhile_stays_above_the_region():
    screen = Screen(80, 24)
    file = screen_file(screen)
    board = dashboard(steps=2)
    console = Console(force_terminal=True, width=80, height=24, file=file, soft_wrap=True, _environ={})
    region = Region(console, board.lines)
    region.start()
    console.print("ours")
    screen.write("a library writes past us\n")
    region.refresh()
    screen.write("another process too\n")
    console.print("[not markup? it is ours]", markup=False)
    region.stop()
    text = screen.text
    assert text[:4] == ["ours", "a library writes past us", "another process too", "[not markup? it is ours]"]
    assert sum(line.startswith("run ") for line in text) == 1, "a copy of the display stayed behind"
    assert text[5].startswith("run ")
    assert text[-1] == "", "the cursor is beneath the display"


def test_a_narrower_terminal_leaves_no_remains():
    screen = Screen(80, 24)
    console = Console(force_terminal=True, width=80, height=24, file=screen_file(screen), soft_wrap=True, _environ={})
    board = dashboard(steps=2)
    region = Region(console, board.lines)
    region.start()
    screen.rows = [
        part for line in screen.rows for part in re.findall(".{1,40}", line) or [""]
    ]  # it breaks the lines anew
    screen.width = console.width = 40
    region.refresh()
    region.stop()
    assert sum(line.startswith("run ") for line in screen.text) == 1
    assert [line[:30] for line in screen.text if line] == [line[:30] for line in shown(board, 40)]


def test_what_is_printed_by_whatever_stream_comes_out_whole(monkeypatch: pytest.MonkeyPatch):
    screen = Screen(80, 24)
    file = screen_file(screen)
    file.isatty = lambda: True
    elsewhere = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", elsewhere)
    region = Region(Console(force_terminal=True, width=80, height=24, soft_wrap=True, _environ={}), dashboard().lines)
    region.start()
    print("[red]no markup[/red] ", end="", flush=True)
    print("and one line")
    print("two\nlines")
    print("\r 10%\r100%", flush=True)
    print("an error", file=sys.stderr)
    print("begun", end="")
    region.stop()
    assert screen.text[:5] == ["[red]no markup[/red] and one line", "two", "lines", "100%", "begun"]
    assert elsewhere.getvalue() == "an error\n", "a stream that leads elsewhere is left alone"
    assert sys.stdout is file


def test_a_fault_of_the_display_ends_no_print(monkeypatch: pytest.MonkeyPatch):
    screen = Screen(80, 24)
    monkeypatch.setattr(sys, "stdout", file := screen_file(screen))
    file.isatty = lambda: True

    def lines(console: Console) -> list[Text]:
        raise KeyError("policy/kl")

    region = Region(Console(force_terminal=True, width=80, height=24, soft_wrap=True, _environ={}), lines)
    region.start()
    print("a message")
    region.stop()
    assert screen.text[:3] == ["a message", "", "the display failed: KeyError('policy/kl')"]


def test_samples_at_the_end_of_a_run_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    asked = {"row": 0, "question": "q\x1b[2J", "answer": "1\x9b31m", "sample": 0, "rewards": {"accuracy": 0.0}}
    row = {**asked, "completion": "a\x1b]0;owned\x07"}
    show_samples([row], [row], 2)
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_samples_of_games_that_are_asked_alike_are_paired_by_their_row_and_shown_with_what_was_said(
    capsys: pytest.CaptureFixture[str],
):
    def game(row: int, guess: str) -> dict[str, Any]:
        turns = [{"role": "assistant", "content": guess}, {"role": "user", "content": "Lower."}]
        asked = {"row": row, "question": "Guess.", "answer": str(row), "sample": 0, "rewards": {"environment": 0.0}}
        return {**asked, "completion": guess, "turns": [*turns, {"role": "assistant", "content": "1\n"}]}

    show_samples([game(1, " 20"), game(2, " 30")], [game(1, " 21"), game(2, " 31")], 2)
    shown = capsys.readouterr().out.split("Question: ")
    assert [re.findall(r"\): (\d+)\nuser: Lower\.\n1\n", each) for each in shown[1:]] == [["20", "21"], ["30", "31"]]


def test_text_of_a_model_does_not_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\u202ec\td\n") == "a�[2Jb��c\td\n"


@pytest.mark.parametrize(
    ("environment", "able"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "", "CI": ""}, True),
        ({"TERM": "dumb"}, False),
        ({}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "CI": "true"}, False),
    ],
)
def test_only_a_terminal_that_wants_it_is_painted_on(environment: dict[str, str], able: bool):
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as file:
        assert can_repaint(file, environment) is able
    with open(os.devnull, "w") as file:
        assert not can_repaint(file, environment)
    os.close(ours)


def test_a_resumed_run_shows_the_curves_from_their_start():
    rows = [{"step": 0, "eval/accuracy": 0.1}, *({"step": number, **step(number)} for number in (1, 2, 3))]
    board = Dashboard(title="run", num_steps=40, first_step=3, reward_names=NAMES, rows=rows)
    assert " step 3/40 " in shown(board)[0]
    board.add(4, step(4))
    assert shown(board)[2].split() == ["reward", "0.100", "0.400", "▁▃▆█"]
    assert any(line.split()[:4] == ["held-out", "accuracy", "0.100", "0.100"] for line in shown(board))


def test_without_a_terminal_there_are_plain_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    sink = console_sink(title="run", num_steps=2, first_step=0, reward_names=NAMES, rows=[])
    more = {"group/with_signal": 1.0, "completion/truncated": 0.0, "policy/kl": 5e-4}
    of_answers = {"eval/pass@1": 0.25 + 2**-54, "eval/length_mean": 20.5, "eval/truncated": 0.0}
    sink.log(0, {"eval/accuracy": 0.25, "eval/accuracy_stderr": 0.125, **of_answers})
    sink.log_completions(1, [row(0, right=True)])
    sink.log(1, step(1, **more))
    sink.log(2, step(2, **more))
    sink.alarm("kl", "printed by the trainer")
    sink.close()
    assert capsys.readouterr().out.splitlines() == [
        "held-out, step 0:  accuracy 0.250 ± 0.125  length 20.500  cut off 0.000",
        "     step    reward  accuracy    format    signal    length   cut off   entropy        KL     tok/s    s/step time left",
        "      1/2     0.100     0.050     0.500     1.000       101     0.000     0.250     5e-04      9000     2.000  00:00:02",
        "      2/2     0.200     0.100     0.500     1.000       102     0.000     0.250     5e-04      9000     2.000  00:00:00",
    ]


LONG = ["environment", "accuracy", "language_consistency", "penalty_of_the_thought", "penalty_of_the_answer"]


def terminal_of(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=True, color_system=None, soft_wrap=True)


def long_step(number: int) -> dict[str, float]:
    rewards = {f"reward/{name}": place / 10 for place, name in enumerate(LONG)}
    return {**step(number), **rewards, "group/with_signal": 1.0, "completion/truncated": 0.0}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_display_tells_long_names_of_rewards_apart_at_every_width(width: int):
    board = Dashboard(title="run", num_steps=40, first_step=0, reward_names=LONG, rows=[])
    board.add(1, long_step(1))
    board.add(1, {f"eval/{name}": 0.5 for name in LONG})
    lines = [line.plain for line in board.lines(terminal_of(width))]
    assert max(map(len, lines)) <= width
    told = LONG if width > 80 else [*LONG[:3], "penalty_of_the_thoug…", LONG[4]]
    for name, place in zip(told, range(5), strict=True):
        (trained,) = (line for line in lines if line.startswith(f"{name} "))
        assert trained.split()[1:3] == [f"{place / 10:.3f}"] * 2
        (held_out,) = (line for line in lines if line.startswith(f"held-out {name} "))
        assert held_out.split()[2:4] == ["0.500"] * 2
    assert len({line.index("0.500") for line in lines if line.startswith("held-out")}) == 1, (
        "the numbers are in a column"
    )


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (80, ["environm…", "accuracy", "language…", "…thought", "…answer"]),
        (100, ["environment", "accuracy", "language_consi…", "…the_thought", "…of_the_answer"]),
        (140, [*LONG[:3], "penalty_of_the_thou…", "penalty_of_the_answ…", "signal", "length"]),
    ],
)
def test_lines_of_steps_fit_into_a_terminal_and_say_what_has_no_room(width: int, titles: list[str]):
    sink = LineSink(num_steps=2, reward_names=LONG)
    sink.console = terminal_of(width)
    for number in (1, 2):
        sink.log(number, long_step(number))
    notice, header, *rows = sink.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert header.replace("time left", "time_left").split() == ["step", "reward", *titles, "time_left"]
    assert notice.startswith(f"metrics.jsonl has what {width} columns have no room for: ")
    assert notice.endswith(", tok/s, s/step")
    assert {len(line) for line in (header, *rows)} == {len(header)}
    assert len(header) <= width
    assert rows[1].split()[:7] == ["2/2", "0.200", "0.000", "0.100", "0.200", "0.300", "0.400"]


def test_a_log_has_every_column_with_whole_names(capsys: pytest.CaptureFixture[str]):
    LineSink(num_steps=2, reward_names=LONG).log(1, long_step(1))
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[2:7] == [*LONG[:3], "penalty_of_the_thou…", "penalty_of_the_answ…"]
    assert header.endswith("tok/s    s/step time left")
    assert len(header) == len(row)


def test_held_out_lines_tell_of_every_reward_and_leave_the_ends_of_intervals_out(capsys: pytest.CaptureFixture[str]):
    sink = console_sink(title="run", num_steps=2, first_step=0, reward_names=["mine", "mine_low"], rows=[])
    of_answers = {"eval/pass@2": 0.75, "eval/pass@2_low": 0.5, "eval/pass@2_high": 1.0}
    rewards = {"eval/mine": 0.5, "eval/mine_stderr": 0.1, "eval/mine_low": 0.25, "eval/mine_low_stderr": 0.2}
    sink.log(0, rewards | of_answers)
    sink.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "held-out, step 0:  mine 0.500 ± 0.100  mine_low 0.250 ± 0.200  pass@2 0.750"


RUN = """
import json, sys
from grpo import Trainer
from grpo.config import Config
Trainer(Config(**json.loads(sys.argv[1]))).train()
"""


def test_a_run_in_a_terminal_that_is_stopped_by_ctrl_c_leaves_it_clean(tmp_path: Path):
    settings = tiny_settings(tmp_path / "run", run={"steps": 500}, algorithm={"kl_coef": 0.001})
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**clean_environment(), "TERM": "xterm", "CI": "", "NO_COLOR": "", "PYTHONPATH": str(ROOT)}
    process = warm.Process(["-c", RUN, json.dumps(settings)], stdin=theirs, in_terminal=True, env=environment)
    os.close(theirs)
    received, is_interrupted = b"", False
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the other end any more
        while chunk := os.read(ours, 65536):
            received += chunk
            if b" step 3/500 " in received and not is_interrupted:
                is_interrupted = os.write(ours, b"\x03") == 1  # once: a second one ends the process
    assert process.wait(60) == EXIT_STOPPED, received.decode()[-3000:]
    os.close(ours)
    text = received.decode()
    assert "\x1b[?25l" not in text, "the cursor was hidden"
    screen = Screen(80, 24)
    screen.write(text.replace("\r\n", "\n"))
    lines = screen.text
    assert "200 training questions" in lines
    assert any("SIGINT: saving, then stopping" in line for line in lines)
    (place,) = (number for number, line in enumerate(lines) if line.startswith("run "))
    assert lines[place + 1].startswith("quickstart/model, CPU, native engine, /")
    assert lines[place + 3].startswith("reward")
    assert any(line.startswith("KL") for line in lines)
    assert any(line.startswith("stopped: SIGINT. Saved to ") for line in lines[place:]), (
        "said beneath what remains of the display"
    )
    assert lines[-1] == ""


class Broken(io.StringIO):
    """A stream that takes nothing."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


BROKEN = [
    OSError(5, "Input/output error"),
    OSError(28, "No space left on device"),
    BrokenPipeError(32, "Broken pipe"),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_a_terminal_that_is_gone_or_full_costs_neither_rows_nor_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    alone = Processes(0, 1, torch.device("cpu"))
    log = RunLog(tmp_path, tiny_config(tmp_path), alone, reward_names=["accuracy"])
    log.open(resumed_step=None)
    monkeypatch.setattr(sys, "stdout", Broken(error))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # what is said of it cannot be heard
    log.log(1, step(1))
    (tmp_path / "metrics.jsonl").unlink()
    log.log(2, step(2))
    log.close()
    monkeypatch.undo()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_a_broken_stream_did_not_take_is_not_printed_again_and_again():
    stream = Broken(OSError(28, "No space left on device"))
    terminal = SilencedConsole(file=stream)
    terminal.print("lost")
    stream.write = lambda text: io.StringIO.write(stream, text)
    terminal.print("there is room again")
    assert stream.getvalue() == "there is room again\n"


def test_say_is_safe_for_terminals_and_never_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    say("red \x1b[31m\x9b2J\u202e\ud800 答 🧮\tand\nso on")
    assert capsys.readouterr().out == "red \ufffd[31m\ufffd2J\ufffd\ufffd 答 🧮\tand\nso on\n"
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    say("答 ü", file=narrow)
    assert narrow.buffer.getvalue() == b"\\u7b54 \xfc\n"
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it if the process was started with a closed one
    say("nobody hears")
    assert not can_repaint(sys.stdout, {"TERM": "xterm"})


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_a_run_ends_well_whatever_becomes_of_its_output(tmp_path: Path, output: str):
    settings = json.dumps(tiny_settings(tmp_path / "run"))
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full", "w") as full:
        done = warm.run(
            ["-c", RUN, settings],
            stdout=theirs if output == "closed pipe" else full,
            timeout=120,
            env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        )
    os.close(theirs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Error" not in done.stderr
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "time/step" in row] == [1, 2]
    assert len(read_jsonl(tmp_path / "run/completions.jsonl")) == 32


def test_rows_that_can_be_written_nowhere_are_an_error_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    sink = JsonlSink(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for number in (1, 2):
        sink.log(number, {"reward/mean": 0.5})
    with pytest.raises(RowsLost, match=r"the last 2 rows of metrics.jsonl \(.*\) are lost"):
        sink.close()


def test_ctrl_c_has_no_traceback():
    with pytest.raises(SystemExit) as ended, errors_for_users():
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_what_is_said_at_once_survives_any_text_and_a_stdout_that_is_none_or_closed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as closed:
        closed.write("held back")
        for stdout in (None, closed):
            monkeypatch.setattr(sys, "stdout", stdout)
            say_at_once("half a character \ud800 and \x1b[2J")
            flush_within(2)
    assert capfd.readouterr().err == "half a character \ufffd and \ufffd[2J\n" * 2


def test_a_terminal_sees_how_far_a_download_is_and_a_log_does_not(monkeypatch: pytest.MonkeyPatch):
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)  # noqa: B023
        distributed.quiet()
        assert are_progress_bars_disabled() is not is_terminal


def test_the_search_for_contamination_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    added: list[int] = []
    monkeypatch.setattr(Bar, "add", lambda self, number=1: added.append(number))
    questions = [str(number) for number in range(600)]
    assert [*watched(questions, "mine")] == questions
    assert added == [256, 256, 88]


def test_a_line_is_written_whole_so_that_another_threads_does_not_end_up_in_it():
    class Stream(io.StringIO):
        parts: ClassVar[list[str]] = []

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    stream = Stream()
    say("what a thread says", file=stream)
    assert [part for part in stream.parts if part] == ["what a thread says\n"]
