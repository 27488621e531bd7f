"""Gold answers equal themselves and their rewritten spellings, and no two different ones are equal: scripts/check_golds.py."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
from golds import EQUAL, OWN, numbers
from grpo.rewards import accuracy
from helpers import ROOT


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_golds", ROOT / "scripts" / "check_golds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_golds = load_script()


@pytest.mark.parametrize("gold", OWN)
def test_a_gold_answer_equals_itself_and_its_rewritten_spellings(gold: str):
    assert accuracy.check_row(gold) is None
    assert check_golds.refused(gold) == []
    assert len(check_golds.spellings(gold)) >= 4


def test_no_two_gold_answers_of_our_own_are_equal():
    assert list(check_golds.equal_pairs(OWN)) == []


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_what_looks_different_and_is_equal_is_found(one: str, other: str):
    assert [set(pair) for pair in check_golds.equal_pairs(["41", one, "x+41", other])] == [{one, other}]


def test_gsm8k_and_svamp_answers_equal_their_spellings_and_nothing_else():
    assert len(numbers()) > 400
    golds = numbers()[::3]
    assert [gold for gold in golds if check_golds.refused(gold)] == []
    assert all(float(a) == float(b) for a, b in check_golds.equal_pairs(golds))


def test_factorials_between_whole_numbers_have_their_value_at_once():
    """In a process of its own: mpmath keeps what it has once computed."""
    code = (
        "import time; from grpo.rewards import accuracy as right; t = time.process_time()\n"
        "tag = '<answer>{}</answer>'.format\n"
        "print(right(tag('\\\\binom{e}{e}'), '1'), right(tag('(n+1)n!'), '(n+1)!'), right(tag('n!+1'), '(n+1)!'),\n"
        "      right(tag('\\\\frac{n!}{k!(n-k)!}'), '\\\\binom{n}{k}'), right(tag('(1/2)!'), '\\\\frac{\\\\sqrt{\\\\pi}}{2}'))\n"
        "print(time.process_time() - t)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert said[:5] == ["1.0", "1.0", "0.0", "1.0", "1.0"]
    assert float(said[5]) < 1.5  # takes 0.2 s; the first series of 400 digits took up to 3


def test_spellings_are_what_their_names_say():
    ways = check_golds.spellings("1+\\frac{1}{2}")
    assert ways["another order"] == "\\frac{1}{2}+1"
    assert ways["dfrac"] == "1+\\dfrac{1}{2}"
    assert ways["spaces"] == "1 + \\frac{1}{2}"
    assert check_golds.spellings("(a, b)")["with left"] == "\\left(a, b\\right)"
    assert check_golds.spellings("x - y")["another order"] == "-y+x"
    assert check_golds.spellings("\\{1, 2, 3\\}")["another order"] == "\\{3,2,1\\}"
    assert check_golds.spellings("-12500")["thousands"] == "-12{,}500"
    assert "another order" not in check_golds.spellings("(1, 2)")  # a tuple has one order
    assert "another order" not in check_golds.spellings("x+1=2")


def test_the_script_counts_reports_and_fails_on_a_refused_spelling(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"answer": "5"}\n{"answer": "x=5"}\n{"answer": "\\\\int x"}\n')
    done = subprocess.run(
        [sys.executable, "scripts/check_golds.py", "--data", str(data)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "3 gold answers, 3 different; 1 cannot be graded" in done.stdout
    assert "1 pairs of different ones, 1 taken for equal" in done.stdout
    assert "equal: '5' and 'x=5'" in done.stdout
    monkeypatch.setattr(check_golds, "spellings", lambda gold: {"worse": gold + "1"})
    assert check_golds.check(["5", "7"]) == 2
    assert "refused: '51' for '5' (worse)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--column is 'gold'; line 1 of"):
        check_golds.load(data, "gold")
