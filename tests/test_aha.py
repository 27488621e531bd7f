"""Reflective words and language mixing by hand and against slow references; what a run logs of them, read back."""

import json
import random
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import language
from helpers import ROOT, TINY, clean_environment, tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import wandb_histories, wandb_records_of

from grpo import Trainer
from grpo.cli.aha import completions, settings_of
from grpo.observe.metric_names import METRICS
from grpo.observe.metrics import Meter, measure_texts
from grpo.observe.sinks import TensorBoardSink, _thinned
from grpo.scoring.answers import is_right
from grpo.system.jsonl import append_jsonl, read_jsonl
from grpo.system.terminal import UNSAFE
from grpo.text import aha

WORDS = aha.Words(aha.WORD_LISTS)


def found(text: str, words: list[str], question: str = "") -> list[str]:
    spans = aha.Words({"list": words}).find(text, question)["list"]
    return [text[start:end] for start, end in spans]


# ---- matching --------------------------------------------------------------------------------------------------------


def test_the_papers_words_count_alone_and_whole_in_any_case():
    text = "Wait, WAIT!\nA paycheck awaits; errors were verified, error_rate checked. But: check(x), (wrong) 7check"
    assert found(text, list(aha.PAPER_WORDS)) == ["Wait", "WAIT", "But", "check", "wrong"]


def test_a_star_stands_for_any_ending_and_a_space_for_white_space_hyphens_and_commas():
    assert found("Verified. verification, I verify; unverified", ["verif*"]) == ["Verified", "verification", "verify"]
    text = "double-check, double\n check. First, we add. Let’s see; let's see. doublecheck"
    assert found(text, ["double check", "first we", "let's see"]) == [
        *("double-check", "double\n check", "First, we", "Let’s see", "let's see")
    ]


def test_chinese_words_are_found_without_spaces_around_them_and_latin_ones_beside_them():
    assert found("我们验证一下,等一下!check一下İwait wait", ["验证", "等一下", "check", "wait"]) == [
        "验证",
        "等一下",
        "check",
        "wait",
    ]


def test_of_words_that_overlap_a_list_counts_the_longest_and_each_list_its_own():
    words = aha.Words({"short": ["check"], "long": ["double check", "check", "check again"], "other": ["again"]})
    text = "double check again. check again"
    assert {name: [text[a:b] for a, b in spans] for name, spans in words.find(text).items()} == {
        "short": ["check", "check"],
        "long": ["double check", "check again"],
        "other": ["again", "again"],
    }


def test_words_of_the_question_do_not_count():
    question = "Sarah’s paycheck is wrong, But not verified. 小明检查作业"
    text = "It is wrong. Check the paycheck: but I verified it, I verify it. 检查 验证"
    assert found(text, [*aha.PAPER_WORDS, "verif*"], question) == ["Check", "verify"]
    assert found(text, ["检查", "验证"], question) == ["验证"]


def slow_find(text: str, words: tuple[str, ...]) -> list[tuple[int, int]]:
    """Every word at every place, one after the other."""
    spans, place = [], 0
    while place < len(text):
        ends = []
        for word in words:
            core = re.escape(word.rstrip("*")).replace(r"\ ", r"[\s,-]+").replace("'", "['’]")
            if word.isascii():
                core = (
                    r"(?<![A-Za-z0-9_])" + core + ("[A-Za-z0-9_]*" if word.endswith("*") else "") + r"(?![A-Za-z0-9_])"
                )
            match = re.compile(core, re.IGNORECASE).match(text, place)
            ends += [match.end()] if match else []
        if ends:
            spans.append((place, max(ends)))
        place = max([place + 1, *ends])
    return spans


def random_text(rng: random.Random) -> str:
    every = [word.rstrip("*") for words in aha.WORD_LISTS.values() for word in words]
    pieces = [*every, *["ing", "ed", "x", "7", "the", "a", "İ", "é", "_", "的"], "\n", "-", "’"]
    return "".join(rng.choice(pieces) + rng.choice(["", " ", " ", ", ", "-", ". "]) for _ in range(60))


@pytest.mark.parametrize("seed", range(20))
def test_one_pass_over_the_text_finds_what_a_slow_search_finds(seed: int):
    text = random_text(random.Random(seed))
    assert WORDS.find(text) == {name: slow_find(text, words) for name, words in aha.WORD_LISTS.items()}


@pytest.mark.parametrize("name", aha.WORD_LISTS)
def test_the_pattern_for_other_programs_finds_the_same(name: str):
    pattern = re.compile(aha.pattern_source(aha.WORD_LISTS[name]), re.IGNORECASE | re.ASCII)
    for seed in range(10):
        text = random_text(random.Random(seed)).replace("İ", "")
        assert [match.span() for match in pattern.finditer(text)] == WORDS.find(text)[name]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"my_list": ["so"]}, "my_list"),
        ({"eval": ["so"]}, "'eval'"),
        ({"mine": []}, "mine is empty"),
        ({"mine": ["Hmm"]}, "'Hmm'"),
        ({"mine": ["*"]}, r"'\*'"),
        ({"mine": ["a.b"]}, "'a.b'"),
    ],
)
def test_a_list_that_cannot_be_counted_is_refused(tmp_path: Path, lists: dict[str, list[str]], message: str):
    with pytest.raises(ValueError, match=f"logging.reflection_words.*{message}"):
        tiny_config(tmp_path, logging={"reflection_words": lists})


def test_a_users_list_joins_the_others_or_takes_the_place_of_one():
    words = aha.with_own({"hm": ["hm*"], "subgoals": ["plan"]})
    assert [*words.lists] == ["reflection", "verification", "backtracking", "subgoals", "hm"]
    assert words.find("Hmm, plan step by step")["subgoals"] == [(5, 9)]


# ---- counting --------------------------------------------------------------------------------------------------------


def row(text: str, accuracy: float | None, num_tokens: int, finish_reason: str = "stop") -> dict[str, Any]:
    rewards = {"format": 1.0, "accuracy": accuracy}
    return {
        **{"question": "What is 2+2?", "answer": "4", "completion": text, "rewards": rewards},
        **{"num_tokens": num_tokens, "finish_reason": finish_reason},
    }


ROWS = [
    row("wait, wait", 1.0, 10),
    row("four", 1.0, 30),
    row("but no, 我们错了", 0.0, 100),
    row("wrong check", 0.0, 60, "length"),
    row("however", None, 200),
]


def test_counts_rates_shares_and_lengths_of_five_completions_by_hand():
    values = aha.values(aha.tally(ROWS, [is_right(each) for each in ROWS], WORDS))
    expected = {
        "aha/reflection": 6 / 5,  # 2, 0, 1, 2 and 1 words
        "aha/reflection_per_1k": 6000 / 400,
        "aha/reflection_share": 4 / 5,
        "aha/reflection_per_1k_right": 2000 / 40,
        "aha/reflection_share_right": 1 / 2,
        "aha/reflection_per_1k_wrong": 1000 / 100,
        "aha/reflection_share_wrong": 1.0,
        "aha/reflection_per_1k_truncated": 2000 / 60,
        "aha/reflection_share_truncated": 1.0,
        "completion/length_right": 20.0,
        "completion/length_wrong": 100.0,
        "completion/other_script": (4 / 6) / 5,  # "but", "no" and four characters
        "aha/verification_share": 1 / 5,
        "aha/backtracking_share": 2 / 5,
        "aha/subgoals": 0.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_every_metric_of_texts_has_its_formula():
    measured = {*aha.values(aha.tally(ROWS, [is_right(each) for each in ROWS], WORDS))}
    measured |= {*aha.evaluation_metrics(ROWS, [is_right(each) for each in ROWS], WORDS)}
    for name in measured:
        general = re.sub("reflection|verification|backtracking|subgoals", "<list>", name)
        assert re.sub("_(right|wrong|truncated)$", "_<kind>", general) in METRICS


class Gathered:
    """What a process gets from the others."""

    def __init__(self, meters: list[Meter]) -> None:
        self.meters = meters

    def gather(self, meter: Meter) -> list[Meter]:
        return self.meters


def test_two_processes_count_what_one_would_and_so_do_two_parts_of_a_step():
    meters = [Meter() for _ in range(4)]
    for meter, rows in ((0, ROWS), (1, ROWS[:2]), (2, ROWS[2:]), (3, ROWS[:2]), (3, ROWS[2:])):
        measure_texts(meters[meter], rows, WORDS)
    whole, apart, joined = (meters[part][0].reduce(Gathered(meters[part])) for part in map(slice, (0, 1, 3), (1, 3, 4)))
    assert apart == pytest.approx(whole)
    assert joined == pytest.approx(whole)


@pytest.mark.parametrize("forms", [True, False])
def test_forms_of_answers_are_counted_where_they_tell_something(forms: bool):
    meter = Meter()
    measure_texts(meter, [{**row, "rewards": {"own": 1.0}, "answer": "24"} for row in ROWS], WORDS, forms=forms)
    told = meter.reduce(Gathered([meter]))
    assert ("answer/arithmetic" in told) == ("answer/right" in told) == forms
    assert "aha/reflection_share" in told


def test_the_base_level_is_that_of_step_one():
    rows = [
        {"step": 0, "aha/eval_reflection_share": 0.3},
        {"step": 1, "aha/reflection_share": 0.1, "completion/length_mean": 9.0, "reward/mean": 0.5},
        {"step": 1, "aha/eval_reflection_share": 0.2},
        {"step": 2, "aha/reflection_share": 0.4},
    ]
    assert aha.base_level(rows) == {"aha/reflection_share": 0.1, "completion/length_mean": 9.0}


# ---- language mixing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "question", "share"),
    [
        ("We add the numbers", "How many?", 0.0),
        ("We 加 the 数 now", "How many?", 2 / 5),
        ("сорок two", "How many?", 1 / 2),
        ("naïve café × 3 ÷ ½ m² π Δx", "How many?", 0.0),
        ("42 + 7 = 49", "How many?", None),
        (r"$\frac{price}{two}$ `print`", "How many?", None),
        (r"我们有 $\frac{a}{b} = \text{price}$ 和 \boxed{7} <think>", "有几个？", 0.0),
        ("我 `print` ```python\nprice = 3\n``` 有", "有几个？", 0.0),
        ("我 the 有", "有几个？", 1 / 3),
        ("costs $3 加 $5 each", "How many?", 1 / 3),
        ("the answer", "7 × 8?", 0.0),
        (r"\(数\) two \[数\] $x=数$ $$数$$ \(x two", "How many?", 0.0),
    ],
)
def test_share_of_words_in_another_script(text: str, question: str, share: float | None):
    assert aha.other_script(text, question) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize("seed", range(20))
def test_the_reward_for_the_language_and_the_metric_of_the_script_count_the_same_words(seed: int):
    """Neither package imports the other, so both have the alphabets."""
    rng = random.Random(seed)
    pieces = [
        "the",
        "price",
        "数",
        "我们",
        "сорок",
        "x",
        "42",
        "`print`",
        "$a_{b}$",
        "π",
        "½",
        "かな",
        " ",
        ", ",
        "naïve",
    ]
    text = " ".join(rng.choices(pieces, k=12))
    for question in ("How many?", "有几个？"):
        share = aha.other_script(text, question)
        assert language(text, question) == pytest.approx(0.0 if share is None else 1 - share)


@pytest.mark.parametrize("bomb", [r"\(", r"\[9", "$=", "$$", "`", "<a", "verif", "first ", "我", "数\\"])
def test_texts_that_never_end_what_they_begin_cost_little(bomb: str):
    started = time.process_time()
    text = f"数{bomb * 100_000}"
    assert aha.other_script(text, "How many?") != 0
    assert aha.tally([row(text, 0.0, 9)], [False], WORDS)
    assert time.process_time() - started < 3  # most take some ms; a quadratic scan would take minutes


# ---- excerpts --------------------------------------------------------------------------------------------------------


def test_excerpts_show_each_word_once_with_what_is_around_it():
    text = "0123456789 wait abc but " + "x" * 40 + " <wrong> end"
    spans = WORDS.find(text)["reflection"]
    passages = aha.excerpts(text, spans, width=6)
    assert passages == [
        [("56789 ", False), ("wait", True), (" abc ", False), ("but", True), (" xxxxx", False)],
        [("xxxx <", False), ("wrong", True), ("> end", False)],
    ]
    assert aha.as_text(passages) == "56789 [wait] abc [but] xxxxx … xxxx <[wrong]> end"
    assert aha.as_html(passages).endswith("<p>xxxx &lt;<mark>wrong</mark>&gt; end</p>")


@pytest.mark.parametrize("seed", range(5))
def test_excerpts_of_any_width_hold_every_marked_word(seed: int):
    text = random_text(random.Random(seed))
    spans = WORDS.find(text)["backtracking"]
    for width in (0, 3, 20, 1000):
        passages = aha.excerpts(text, spans, width=width)
        marked = [piece for passage in passages for piece, is_marked in passage if is_marked]
        assert marked == [text[start:end] for start, end in spans]
        assert all("".join(piece for piece, _ in passage) in text for passage in passages)


def test_the_most_reflective_are_chosen_among_right_and_wrong_ones_that_ended():
    def texts(verdict: bool) -> list[str]:
        chosen = aha.most_reflective(ROWS, [is_right(each) for each in ROWS], WORDS, verdict=verdict, num=3)
        return [each["completion"] for each, _ in chosen]

    assert texts(True) == ["wait, wait"]
    assert texts(False) == ["but no, 我们错了"]


# ---- a run, read back ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, of which the second is lost with its checkpoint, and again from the first to a third."""
    directory = tmp_path_factory.mktemp("aha") / "run"
    for steps in (2, 3):
        sections = {
            "logging": {"wandb": "offline", "tensorboard": True, "reflection_words": {"guess": ["guess", "i guess"]}},
            "rollout": {"num_prompts": 8, "max_completion_tokens": 48},
            "data": {"eval_name": str(TINY / "test.jsonl")},
            "evaluation": {"num_questions": 4, "every_steps": 1},
            "checkpoint": {"every_steps": 1, "keep": 3},
            "run": {"steps": steps, "resume": "auto"},
        }
        Trainer(tiny_config(directory, **sections)).train()
        if steps == 2:
            (directory / "checkpoints/step-00000002").rename(directory / "lost")
    return directory


def test_a_run_logs_what_its_completions_say(run: Path):
    logged = {each["step"]: each for each in read_jsonl(run / "metrics.jsonl") if "aha/reflection" in each}
    completions = read_jsonl(run / "completions.jsonl")
    words = aha.with_own({"guess": ["guess", "i guess"]})
    assert set(logged) == {1, 2, 3}
    for step, metrics in logged.items():
        rows = [each for each in completions if each["step"] == step]
        expected = aha.values(aha.tally(rows, [is_right(each) for each in rows], words))
        assert "aha/guess_share" in expected
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        assert {name for name in metrics if name.startswith("aha/")} <= set(expected)
    assert any(metrics["aha/guess"] > 0 for metrics in logged.values())  # the tiny model's habit


def test_evaluations_are_counted_too(run: Path):
    (metrics,) = (each for each in read_jsonl(run / "metrics.jsonl") if each["step"] == 0)
    rows = [each for each in read_jsonl(run / "evaluations.jsonl") if each["step"] == 0]
    share = sum("guess" in each["completion"] for each in rows) / 4
    assert metrics["aha/eval_guess_share"] == share


def test_wandb_has_the_curves_of_both_attempts_and_the_few_that_matter_once_more(run: Path):
    attempts = [[each for each in rows if "aha/reflection" in each] for rows in wandb_histories(run)]
    assert [[each["step"] for each in rows] for rows in attempts] == [[1, 2], [2, 3]]
    logged = read_jsonl(run / "metrics.jsonl")
    (last,) = (each for each in logged if each["step"] == 3 and "aha/reflection" in each)
    assert {name: attempts[1][-1][name] for name in last} == pytest.approx(last)
    short = {"reward": "reward/mean", "accuracy": "reward/accuracy", "length": "completion/length_mean"}
    assert {name: attempts[1][-1][name] for name in short} == {name: last[full] for name, full in short.items()}
    (evaluated,) = (each for each in wandb_histories(run)[1] if each["step"] == 3 and "held-out accuracy" in each)
    assert evaluated["held-out accuracy"] == evaluated["eval/accuracy"]


def test_wandbs_charts_hold_the_steps_of_both_attempts_and_the_untrained_models_level(run: Path):
    key = "Custom Chart Tables/reflection_table/path"
    *_, path = (each[key] for each in wandb_histories(run)[1] if key in each)
    (file,) = (run / "wandb").glob(f"offline-run-*/files/{path}")
    lines = {(step, line): value for step, line, value in json.loads(file.read_text())["data"]}
    logged = [each for each in read_jsonl(run / "metrics.jsonl") if "aha/reflection" in each]
    assert {key: value for key, value in lines.items() if key[1] in ("all", "untrained model")} == {
        **{(each["step"], "all"): each["aha/reflection_share"] for each in logged},
        **{(each["step"], "untrained model"): logged[0]["aha/reflection_share"] for each in logged},
    }


def test_wandb_has_a_table_of_the_most_reflective_samples_with_the_words_marked(run: Path):
    artifacts = [each for each in wandb_records_of(run, "artifact")[0] if "samplesreflective" in each.name]
    contents = {each.path: Path(each.local_path) for each in artifacts[0].manifest.contents}
    table = json.loads(contents["samples/reflective.table.json"].read_text())
    assert table["columns"][:5] == ["step", "verdict", "words", "tokens", "excerpts"]
    for step, verdict, num_words, _, cell, *_ in table["data"]:
        assert (step, verdict in ("right", "wrong")) == (1, True)
        assert contents[cell["path"]].read_text().count("<mark>") == num_words


def test_tensorboard_shows_each_step_once_after_resuming_and_the_untrained_models_level(run: Path):
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    logged = [each for each in read_jsonl(run / "metrics.jsonl") if "aha/reflection" in each]
    for name in ("aha/reflection_share", "aha/guess", "reward/mean"):
        events = [(event.step, event.value) for event in board.Scalars(name)]
        assert events == [(each["step"], pytest.approx(each[name])) for each in logged]
    base = pytest.approx(logged[0]["aha/reflection_share"])
    untrained = [(event.step, event.value) for event in board.Scalars("aha/reflection_share_untrained")]
    assert untrained == [(1, base), (2, base), (3, base)]
    assert [event.step for event in board.Scalars("eval/length_mean")] == [0, 1, 2, 3]
    assert any(tag.startswith("samples/reflective") for tag in board.Tags()["tensors"])
    assert "custom_scalars__config__" in board.Tags()["tensors"]


def test_a_disk_that_is_full_ends_tensorboards_files_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    sink = TensorBoardSink(tmp_path, first_step=0, words=WORDS, history=[])

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink._writer, "flush", full)
    for step in (1, 2):
        sink.log(step, {"reward/mean": 0.5})
    sink.log_completions(3, [])
    sink.close()
    assert capsys.readouterr().out.count("No space left on device; from step 1 on") == 1


def test_the_script_shows_no_escape_sequence_of_a_model_or_of_a_data_set(tmp_path: Path):
    text = "\x1b[2J wait, \x9b31m\u202e let me check 检查 🧮"
    row = {"step": 1, "row": 0, "question": "\x1b[2J 1+1", "answer": "1", "completion": text, "num_tokens": 9}
    rows = [{**row, "rewards": {"accuracy": value}, "finish_reason": "stop"} for value in (0.0, 1.0)]
    append_jsonl(tmp_path / "completions.jsonl", rows)
    (tmp_path / "config.yaml").write_text("logging: {}\n")
    done = subprocess.run(
        [sys.executable, "scripts/aha.py", str(tmp_path)],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "检查 🧮" in done.stdout
    assert not UNSAFE.search(done.stdout)
    assert read_jsonl(tmp_path / "completions.jsonl") == rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "training: {}\nlogging: {completions_every: 1}\n",
            r"is a run of supervised training .* Name a run of `grpo train`",
        ),
        (
            "logging: {completions_every: 0}\n",
            r"holds no completions; .* Set logging\.completions_every > 0 in the next run",
        ),
        ("logging: {completions_every: 5}\n", r"holds no completions; .* The run has written none yet\."),
        ("{}\n", r"holds no completions; .* The run has written none yet\."),
    ],
)
def test_a_run_without_completions_is_told_why(tmp_path: Path, settings: str, said: str):
    (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(ValueError, match=said):
        completions(tmp_path, settings_of(tmp_path))


def test_a_chart_of_a_long_run_keeps_its_last_point_and_stays_within_what_wandb_shows():
    points = [(float(step), 0.5) for step in range(9999)]
    thinned = _thinned(points, 2500)
    assert (len(thinned), thinned[-1]) == (2500, points[-1])
    assert {later[0] - earlier[0] for earlier, later in pairwise(thinned)} == {4.0}
    assert _thinned(points[:3], 2500) == points[:3]


def test_tensorboard_that_is_not_installed_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grpo.observe.sinks.find_spec", lambda name: None)
    config = tiny_config(tmp_path / "run", logging={"tensorboard": True})
    with pytest.raises(ValueError, match=r"logging.tensorboard is true; .* not installed. Run `pip install"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_the_script_shows_the_run_step_by_step_and_its_samples(run: Path):
    command = [sys.executable, str(ROOT / "scripts/aha.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("\nreflection")[1].split("\n\n")[0]
    logged = [each for each in read_jsonl(run / "metrics.jsonl") if "aha/reflection" in each]
    for each in logged:
        (line,) = (line for line in table.splitlines() if line.startswith(f"step {each['step']} "))
        assert line.split()[2:5] == [f"{each[f'aha/reflection{name}']:.3f}" for name in ("", "_per_1k", "_share")]
    assert "[Wait]" in done.stdout
