"""An evaluation on benchmarks: its numbers, going on after an interruption, several processes, several templates."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from helpers import ROOT, TINY, launch, read_json, tiny_config

from grpo.cli import evaluate as command
from grpo.config import EnvironmentConfig, ModelConfig, read_yaml, write_yaml
from grpo.data import registry
from grpo.evaluation import benchmark, results
from grpo.evaluation.asked import Runtime, Settings
from grpo.evaluation.sample_file import Samples, claimed, finished
from grpo.inference.resolve_model import num_positions
from grpo.observe.bar import Bar, check_rows
from grpo.rollout import sampling
from grpo.scoring import answers
from grpo.system import jsonl, progress
from grpo.system.jsonl import append_jsonl, read_jsonl
from grpo.turns.environment import Environment
from grpo.turns.named import PromptDefaults, named_environment, prompt_defaults

MODEL = str(TINY / "model")
TOOLS = ROOT / "configs/quickstart-tools"
QUESTIONS = str(TINY / "test.jsonl")
ONE = Runtime(num_workers=1)


def settings(**changed: Any) -> Settings:
    values = {
        "model": MODEL,
        "benchmarks": ["mine"],
        "templates": ["chat"],
        "data": {"mine": QUESTIONS},
        "num_samples": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_completion_tokens": 48,
        "num_questions": 8,
    }
    return Settings(**values | changed)


def samples(out: Path) -> list[dict[str, Any]]:
    return sorted(read_jsonl(out / "samples.jsonl"), key=lambda row: (row["template"], row["row"], row["sample"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exam") / "out"
    benchmark.evaluate(settings(templates=["r1_zero", "chat"]), out, ONE)
    return out


def test_the_numbers_are_those_of_the_samples(whole: Path):
    results = read_json(whole / "results.json")
    assert results["model"] == MODEL
    first, second = results["results"]
    assert (first["template"], second["template"]) == ("r1_zero", "chat")
    rows = [row for row in samples(whole) if row["template"] == "chat"]
    assert [(row["row"], row["sample"]) for row in rows] == [(q, g) for q in range(8) for g in range(4)]
    right = [row["rewards"]["accuracy"] for row in rows]
    assert 0 < sum(right) < 32
    metrics = second["metrics"]
    assert metrics["pass@1"]["value"] == pytest.approx(sum(right) / 32)
    by_question = [right[4 * q : 4 * q + 4] for q in range(8)]
    assert metrics["pass@4"]["value"] == pytest.approx(sum(map(max, by_question)) / 8)
    assert metrics["pass@1"]["low"] < metrics["pass@1"]["value"] < metrics["pass@1"]["high"]
    assert metrics["length"]["value"] == pytest.approx(sum(row["num_tokens"] for row in rows) / 32)
    assert metrics["truncated"]["value"] == sum(row["finish_reason"] == "length" for row in rows) / 32
    assert metrics["format"]["value"] == pytest.approx(sum(row["rewards"]["format"] for row in rows) / 32)
    assert metrics["unknown"]["value"] == 0
    assert metrics["cons@4"]["value"] == pytest.approx(sum(agreed(rows[4 * q : 4 * q + 4]) for q in range(8)) / 8)
    assert metrics["cons@4"]["value"] not in (0, metrics["pass@1"]["value"], metrics["pass@4"]["value"])
    assert (second["num_questions"], second["num_samples"], second["temperature"]) == (8, 4, 1.0)


def agreed(rows: list[dict[str, Any]]) -> float:
    """Of the answers that most samples of a question give, the share that is right."""
    counts = Counter(row["rewards"]["vote"] for row in rows)
    most = [vote for vote, count in counts.items() if count == max(counts.values())]
    return (0 in most) / len(most)


def test_votes_put_right_answers_together(whole: Path):
    for row in samples(whole):
        assert (row["rewards"]["vote"] == 0) == (row["rewards"]["accuracy"] == 1)


def test_an_interrupted_evaluation_ends_with_the_same_samples(whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "settings.json").write_text((whole / "settings.json").read_text())
    kept = lines[: 32 + 21]  # of r1_zero all, of chat five questions, one sample of the sixth, and half a line
    unasked = [line.replace('"row": 0', '"row": 8') for line in lines[:4]]
    (out / "samples.jsonl").write_text("".join([*kept, *unasked]) + lines[32 + 21][:40])
    benchmark.evaluate(settings(templates=["r1_zero", "chat"]), out, ONE)
    assert samples(out) == samples(whole)
    assert (out / "samples.jsonl").read_text().startswith("".join(lines[: 32 + 20]))  # nothing is answered twice
    ours, theirs = read_json(out / "results.json"), read_json(whole / "results.json")
    assert [each["metrics"] for each in ours["results"]] == [each["metrics"] for each in theirs["results"]]
    assert ours["results"][1]["seconds"] is None  # of the first start nobody knows
    finished = (out / "samples.jsonl").read_text()
    benchmark.evaluate(settings(templates=["r1_zero", "chat"]), out, ONE)
    assert (out / "samples.jsonl").read_text() == finished
    assert read_json(out / "results.json") == ours
    before = read_json(whole / "results.json")
    benchmark.evaluate(settings(templates=["r1_zero", "chat"]), whole, ONE)
    assert read_json(whole / "results.json") == before  # also the seconds


def test_samples_are_read_once_and_not_after_each_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"set{n}" for n in range(6)]
    many = settings(benchmarks=names, data=dict.fromkeys(names, QUESTIONS), num_samples=2, max_completion_tokens=4)
    lines: list[bytes] = []
    original = jsonl.row_of
    monkeypatch.setattr(jsonl, "row_of", lambda line, keys: lines.append(line) or original(line, keys))
    benchmark.evaluate(many, tmp_path / "out", ONE)
    written = (tmp_path / "out" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(lines) == sorted(written)
    first = read_json(tmp_path / "out" / "results.json")
    lines.clear()
    (tmp_path / "out" / "samples.jsonl").write_bytes(b"".join(written[:-1]))  # a kill took the last
    benchmark.evaluate(many, tmp_path / "out", ONE)
    assert len(lines) <= 4 * len(written)  # what is there, what is whole, whose it is, and itself
    again = read_json(tmp_path / "out" / "results.json")
    assert [each["metrics"] for each in again["results"]] == [each["metrics"] for each in first["results"]]


def test_samples_are_those_of_their_benchmark_wherever_they_lie_and_whenever_they_came(tmp_path: Path):
    def row(benchmark: str, number: int, sample: int) -> dict[str, Any]:
        return {"benchmark": benchmark, "template": "chat", "row": number, "sample": sample}

    path, keys = tmp_path / "samples.jsonl", ("benchmark", "template")
    a, b = {"benchmark": "a", "template": "chat"}, {"benchmark": "b", "template": "chat"}
    append_jsonl(path, [row("b", 0, 1), row("a", 1, 0), row("b", 0, 0)])
    path.write_bytes(path.read_bytes() + b"null\n")
    append_jsonl(path, [row("a", 0, 0)])
    found = Samples(path, keys)
    assert found.of(a) == [row("a", 0, 0), row("a", 1, 0)]
    append_jsonl(path, [row("b", 1, 0), row("a", 2, 0)])
    assert found.of(b) == [row("b", 0, 0), row("b", 0, 1), row("b", 1, 0)]
    assert found.of(a) == [row("a", 0, 0), row("a", 1, 0), row("a", 2, 0)]


def test_samples_that_a_kill_cut_within_a_character_are_answered_again(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    row = {"benchmark": "mine", "template": "chat", "row": 0, "sample": 0, "completion": "答案"}
    append_jsonl(path, [row])
    whole = path.read_bytes()
    path.write_bytes(whole + b"null\n" + whole[:-4])
    assert Samples(path, ["benchmark"]).of({"benchmark": "mine"}) == [row]
    assert finished(path, results.QUESTION_KEYS, {}) == set()
    assert path.read_bytes() == b""


def test_a_stop_text_ends_the_answers(tmp_path: Path):
    benchmark.evaluate(settings(stop=["="], num_questions=4, num_samples=2), tmp_path / "out", ONE)
    texts = [row["completion"] for row in samples(tmp_path / "out")]
    assert any("=" in text for text in texts)
    assert all(text.find("=") in (-1, len(text) - 1) for text in texts)
    with pytest.raises(ValueError, match=r'--stop has ""'):
        settings(stop=[""])


def test_two_processes_share_the_questions_and_give_the_same_samples(whole: Path, tmp_path: Path):
    arguments = ["--samples", "4", "--temperature", "1", "--top-p", "1", "--max-tokens", "48", "--questions", "8"]
    single = tmp_path / "single.jsonl"
    single.write_text(Path(QUESTIONS).read_text().splitlines(keepends=True)[0])
    arguments += ["--model", MODEL, "--benchmarks", "mine,single", "--templates", "r1_zero,chat"]
    arguments += ["--data", f"mine={QUESTIONS}", f"single={single}"]
    shown = launch("../scripts/evaluate.py", *arguments, "--workers", "1", "--out", str(tmp_path / "out"), processes=2)
    assert [row for row in samples(tmp_path / "out") if row["benchmark"] == "mine"] == samples(whole)
    ours, theirs = read_json(tmp_path / "out" / "results.json"), read_json(whole / "results.json")
    assert [each["metrics"] for each in ours["results"][:2]] == [each["metrics"] for each in theirs["results"]]
    assert [each["num_questions"] for each in ours["results"][2:]] == [1, 1]  # fewer than processes
    assert "8 x 4" in shown
    assert shown.count("* the best template of its benchmark") == 1


def test_a_template_changes_the_prompt_and_not_the_question():
    taken = settings(templates=["chat_boxed"], num_samples=1, num_questions=2)
    rows = [{"question": "How many?", "answer": "3", "level": 2}]
    own = benchmark.OwnModel(taken, ONE)
    with benchmark._scorers(taken, ONE, None) as scorers:
        processes = benchmark.distributed.join()
        scorer = scorers["anywhere"]
        paper = benchmark._task(taken, "mine", "chat_boxed", rows, own, scorer, processes)
        other = benchmark._task(taken, "mine", "chat", rows, own, scorer, processes)
    (prompt,), (plain,) = paper.prompts, other.prompts
    assert "How many?\nPlease reason step by step, and put your final answer within \\boxed{}." in prompt.text
    assert prompt.columns == rows[0]
    assert "Please reason" not in plain.text
    assert prompt.seed != plain.seed


def test_questions_by_level_and_subject_have_numbers_of_their_own(tmp_path: Path):
    rows = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()[:6]]
    data = tmp_path / "levels.jsonl"
    leveled = [{**row, "level": n % 2 + 1, **({"subject": "Algebra"} if n == 0 else {})} for n, row in enumerate(rows)]
    leveled.append({"question": "What?", "answer": "", "level": 3})
    data.write_text("".join(json.dumps(row) + "\n" for row in leveled))
    found = benchmark.evaluate(
        settings(data={"mine": str(data)}, num_questions=None, num_samples=2), tmp_path / "out", ONE
    )
    (result,) = found["results"]
    assert (result["num_questions"], result["num_ungradable"]) == (6, 1)
    parts = result["by"]
    assert {level: part["num_questions"] for level, part in parts["level"].items()} == {"1": 3, "2": 3}
    assert parts["subject"]["Algebra"]["num_questions"] == 1
    mean = sum(part["metrics"]["pass@1"]["value"] for part in parts["level"].values()) / 2
    assert mean == pytest.approx(result["metrics"]["pass@1"]["value"])
    shown = results.report(found["results"])
    assert "mine level 2" in shown
    assert "1 question left out, because the gold answer cannot be graded" in shown


def test_greedy_decoding_answers_once(tmp_path: Path):
    greedy = settings(temperature=0.0, num_samples=None, num_questions=3)
    (result,) = benchmark.evaluate(greedy, tmp_path / "out", ONE)["results"]
    assert result["num_samples"] == 1
    assert "cons@1" not in result["metrics"]
    assert "vote" not in samples(tmp_path / "out")[0]["rewards"]


def test_a_file_for_a_known_benchmark_that_is_not_asked_for_is_passed_over_and_for_any_other_name_refused():
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser)
    listed = ["gsm8k=no/such/file.jsonl", "math500=here.jsonl", "mine=mine.jsonl"]

    def named(benchmarks: str, *data: str) -> tuple[list[str], dict[str, str]]:
        return registry.named(parser.parse_args(["--benchmarks", benchmarks, "--data", *data]))

    assert named("math500,mine", *listed) == (["math500", "mine"], {"math500": "here.jsonl", "mine": "mine.jsonl"})
    assert named("probes", *listed[:2]) == (["probes"], {})
    with pytest.raises(
        ValueError, match=r"^--data has a file for 'mine'; it is not among --benchmarks \(math500\)\. Add"
    ):
        named("math500", *listed)
    with pytest.raises(
        ValueError, match=r"^--data has a file for 'gsm8'; it is not among --benchmarks \(gsm8k\)\. Add"
    ):
        named("gsm8k", "gsm8=gsm8k.jsonl")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmarks": ["gsm8"]}, r"^--benchmarks has 'gsm8'; there is .*; did you mean gsm8k\? Correct it, or give"),
        (
            {"benchmarks": [], "data": {}},
            r"^--benchmarks is empty; there is aime2024, .*\. Name one or more, with commas",
        ),
        ({"revision": "v2"}, r"^--revision is 'v2'; --model is the directory .* no effect\. Remove it\.$"),
        ({"benchmarks": ["mine", "mine"]}, r"^--benchmarks has 'mine' twice; .* Name it once\."),
        ({"benchmarks": ["probes"]}, r"^--data has a file for 'mine'; it is not among --benchmarks \(probes\)\. Add"),
        ({"templates": ["r1-zero"]}, r"^--templates has 'r1-zero'; it is one of r1_zero, .*\. Correct it\."),
        (
            {"temperature": 0.0},
            r"^--samples is 4; at --temperature 0 all samples of a question are the same\. Set it to 1",
        ),
        ({"temperature": 0.0, "num_samples": 1, "top_p": 0.9}, r"^--top-p is 0\.9; at --temperature 0 .* Remove it\."),
        (
            {"templates": ["none"], "system_prompt": "x"},
            r"^--system-prompt is 'x'; only the chat templates .* Remove it, or add",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**changed)


# ---- with an environment ---------------------------------------------------------------------------------------------


def played(**changed: Any) -> Settings:
    """The model of quickstart-tools, which may call a calculator and has a second try."""
    values = {
        "model": str(TOOLS / "model"),
        "templates": ["none"],
        "data": {"mine": str(TOOLS / "test.jsonl")},
        "tools": ["calculator"],
        "environment": EnvironmentConfig(
            function="second_try",
            args={"source": "anywhere", "later": 0.25},
            reply_template="\nUser: {text}\nAssistant:",
            max_turns=2,
        ).model_dump(mode="json"),
        "question_template": "User: {question}\nAssistant:",
        "max_completion_tokens": 96,
        "num_samples": 3,
    }
    return settings(**values | changed)


def test_an_environment_is_played_its_numbers_are_those_of_the_samples_and_a_kill_changes_nothing(tmp_path: Path):
    out = tmp_path / "out"
    found = benchmark.evaluate(played(), out, ONE)["results"][0]
    rows = read_jsonl(out / "samples.jsonl")
    metrics = {name: each["value"] for name, each in found["metrics"].items()}
    assert len(rows) == 24
    assert {tuple(row["rewards"]) for row in rows} == {("environment",)}
    said = [[turn["content"] for turn in row.get("turns", []) if turn["role"] == "user"] for row in rows]
    assert any(said)
    assert {text for each in said for text in each} == {"That is not right. Try again."}
    assert any(turn["role"] == "tool" for row in rows for turn in row.get("turns", []))
    assert metrics["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 24)
    assert metrics["pass@1"] == pytest.approx(sum(row["reward"] == 1 for row in rows) / 24)
    assert metrics["turns"] == pytest.approx(sum(row["episode"]["turns"] for row in rows) / 24)
    assert metrics["ended"] == pytest.approx(sum(row["finish_reason"] == "stop" for row in rows) / 24)
    assert metrics["truncated"] + metrics["ended"] == pytest.approx(1)
    assert {"ended": True, "turns": 2} in [row["episode"] for row in rows]
    assert "    < That is not right. Try again." in results.transcript(rows).splitlines()
    table = results.report([found]).splitlines()
    assert table[0].split()[:4] == ["environment", "template", "episodes", "reward"]
    assert table[1].startswith(f"mine         none      8 x 3     {metrics['reward']:.3f} [")
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:10]))
    again = benchmark.evaluate(played(), out, ONE)["results"][0]
    assert samples(out) == sorted(rows, key=lambda row: (row["row"], row["sample"]))
    assert again["metrics"] == found["metrics"]
    with pytest.raises(
        ValueError, match=r"the evaluation there has --environment \{.*'later': 0.25.*their samples must not"
    ):
        benchmark.evaluate(played(environment=None), out, ONE)


def test_an_environments_own_questions_are_its_held_out_ones():
    game = EnvironmentConfig(function="guess_number", rows={"size": 30, "high": 9}, reply_template="{text}")
    asked = played(benchmarks=[], data={}, environment=game.model_dump(mode="json"), num_questions=20)
    environment = Environment.of(game)
    assert environment is not None
    rows = benchmark._every_row(asked, environment)
    assert [row["answer"] for row in rows["guess_number"]] == [
        str(random.Random(seed).randint(1, 9)) for seed in range(30, 50)
    ]
    own = environment.rows(held_out=False)
    assert own is not None
    assert not {id(row) for row in own} & {id(row) for row in rows["guess_number"]}


def environment_of(function: str, **values: Any) -> dict[str, Any]:
    return EnvironmentConfig(function=function, **values).model_dump(mode="json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"environment": environment_of("countdown", reply_template="{text}")},
            r"Environment countdown: its `reset` asks for nums, target; the rows have the columns question, answer\. Name data",
        ),
        (
            {"environment": environment_of("second_try", reply_template="{text}"), "benchmarks": [], "data": {}},
            r"^--environment is 'second_try', which brings no questions of its own\. Name some to play it on: --benchmarks",
        ),
        (
            {"environment": environment_of("second_try")},
            r"^reply_template of --environment is missing; --templates none",
        ),
        ({"environment": environment_of("second_tri")}, r"^--environment is 'second_tri'.*second_try"),
        ({"endpoint": "http://x/v1"}, r"^--tools is \['calculator'\] with --endpoint"),
        (
            {"endpoint": "http://x/v1", "tools": []},
            r"^--environment is 'second_try' with --endpoint; what it says is put",
        ),
        ({"environment": environment_of("guess_number", rows={"size": 3})}, r"^--environment has rows .* no effect"),
        (
            {"question_template": "User:"},
            r"^--question-template is 'User:'; the question takes the place of \{question\}",
        ),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        benchmark.evaluate(played(**changed), tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()


def test_an_environment_is_named_as_it_is_or_with_all_its_section_has_or_by_a_configuration(tmp_path: Path):
    assert named_environment("guess_number").function == "guess_number"
    assert named_environment('{"function": "guess_number", "max_turns": 3}').max_turns == 3
    config = tiny_config(
        tmp_path, environment={"function": "guess_number", "args": {"early": 0.5}}, data={"name": None}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert named_environment(str(tmp_path / "config.yaml")).args == {"early": 0.5}
    assert prompt_defaults(str(tmp_path / "config.yaml")) == PromptDefaults(config.data.template)
    assert prompt_defaults("guess_number") == PromptDefaults("r1_zero")
    game = ROOT / "configs/quickstart-game.yaml"
    assert prompt_defaults(str(game)) == PromptDefaults("none", "{question}\nPlayer:", None, ["\n"])
    asked = {name: section for name, section in read_yaml(game.read_text()).items() if name != "run"}
    (tmp_path / "questions.yaml").write_text(json.dumps(asked))  # nothing is trained with
    assert named_environment(str(tmp_path / "questions.yaml")) == named_environment(str(game))
    assert prompt_defaults(str(tmp_path / "questions.yaml")) == prompt_defaults(str(game))
    other = game.read_text().replace("{question}\\nPlayer:", "{hint} {question}")
    (tmp_path / "other.yaml").write_text(other)
    with pytest.raises(
        ValueError,
        match=r"data\.question_template is '\{hint\} \{question\}'; the questions here have no column but \{question\}",
    ):
        prompt_defaults(str(tmp_path / "other.yaml"))
    assert prompt_defaults(str(tmp_path / "other.yaml"), "Q: {question}").question_template == "Q: {question}"
    for text, message in (
        ('{"function": ', "is no JSON"),
        ("{}", 'names no environment. Add "function"'),
        ('{"function": "guess_number", "turns": 3}', "turns"),
        (str(ROOT / "configs/quickstart.yaml"), "has no environment.function"),
    ):
        with pytest.raises(ValueError, match=message):
            named_environment(text)


def test_a_directory_that_cannot_be_written_to_is_told_with_its_option(tmp_path: Path):
    refused = OSError(errno.EROFS, "Read-only file system")
    with (
        patch.object(Path, "mkdir", side_effect=refused),
        pytest.raises(ValueError, match=r"--out is '.*'; it cannot be written to: .*Read-only file system\. Make room"),
        claimed(tmp_path / "out", {}, option="--out", difference=lambda *_: ""),
    ):
        pass


def test_a_directory_without_a_sample_is_bound_to_no_settings(tmp_path: Path):
    for value in (1, 2):
        with claimed(tmp_path, {"a": value}, option="--out", difference=lambda *_: "", results=["results.json"]):
            (tmp_path / "samples.jsonl").touch()
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with (
        pytest.raises(ValueError, match=r"their samples must not be mixed"),
        claimed(tmp_path, {"a": 3}, option="--out", difference=lambda *_: "", results=["results.json"]),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{broken", "[1]", '"\xff'])
@pytest.mark.parametrize(
    ("name", "remedy"), [("settings.json", "choose another --out"), ("results.json", "remove it:")]
)
def test_a_file_of_an_evaluation_that_cannot_be_read_is_named_before_the_model_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str, text: str
):
    monkeypatch.setattr(benchmark.inference, "load", lambda *_: pytest.fail("it was loaded"))
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^--out is '{out}'; {name} there cannot be read \(.*\).*{remedy}"):
        benchmark.evaluate(settings(templates=["r1_zero", "chat"]), out, ONE)


def test_samples_of_different_settings_are_never_mixed(whole: Path, tmp_path: Path):
    before = (whole / "samples.jsonl").read_text()
    with pytest.raises(
        ValueError, match=r"^--out is .*; the evaluation there has --seed 0, and this one 1: .* Choose another"
    ):
        benchmark.evaluate(settings(templates=["r1_zero", "chat"], seed=1), whole, ONE)
    assert (whole / "samples.jsonl").read_text() == before
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"^--out is .*; the directory holds something else\. Choose another, or empty it\.$"
    ):
        benchmark.evaluate(settings(), tmp_path, ONE)


def test_samples_of_different_questions_or_weights_under_one_name_are_never_mixed(whole: Path, tmp_path: Path):
    lines = Path(QUESTIONS).read_text().splitlines(keepends=True)
    data, model, out = tmp_path / "mine.jsonl", tmp_path / "model", tmp_path / "out"
    data.write_text("".join(lines[:2]))
    shutil.copytree(MODEL, model)
    asked = settings(model=str(model), data={"mine": str(data)}, num_samples=1)
    benchmark.evaluate(asked, out, ONE)
    before = (out / "samples.jsonl").read_text()
    data.write_text("".join(lines[2:4]))
    with pytest.raises(
        ValueError,
        match=r"^--out is .*; the questions of --benchmarks, --data or --environment have changed since .* Cho",
    ):
        benchmark.evaluate(asked, out, ONE)
    data.write_text("".join(lines[:2]))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        ValueError, match=r"^--out is .*; the files of --model have changed since the .* Choose another"
    ):
        benchmark.evaluate(asked, out, ONE)
    assert (out / "samples.jsonl").read_text() == before


def test_two_starts_at_once_do_not_answer_the_same_questions(whole: Path):
    before = (whole / "samples.jsonl").read_text()
    with (whole / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"^--out is .*; another process is at work there, .* Wait until it has"):
            benchmark.evaluate(settings(templates=["r1_zero", "chat"]), whole, ONE)
    benchmark.evaluate(settings(templates=["r1_zero", "chat"]), whole, ONE)
    assert (whole / "samples.jsonl").read_text() == before


def test_a_refused_command_leaves_nothing_and_one_without_samples_binds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="max-tokens"):
        benchmark.evaluate(settings(max_completion_tokens=100_000), out, ONE)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("grpo.inference.model.load_lm", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            benchmark.evaluate(settings(seed=1), out, ONE)
    benchmark.evaluate(settings(num_questions=1, num_samples=1), out, ONE)
    assert read_json(out / "settings.json")["seed"] == 0


def test_questions_are_answered_in_parts_and_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    answer = answers.answer

    def counted(prompts: list[Any], **named: Any) -> Any:
        asked.append(len(prompts))
        return answer(prompts, **named)

    monkeypatch.setattr(answers, "answer", counted)
    benchmark.evaluate(settings(), tmp_path / "whole", ONE)
    monkeypatch.setattr(answers, "ANSWERED_AT_ONCE", 12)
    benchmark.evaluate(settings(), tmp_path / "parts", ONE)
    assert asked == [8, 3, 3, 2]
    whole, parts = (sorted((tmp_path / name / "samples.jsonl").read_text().splitlines()) for name in ("whole", "parts"))
    assert whole == parts


def test_what_is_wrong_is_said_of_the_options_that_were_typed(tmp_path: Path):
    for runtime, message in (
        (
            Runtime(engine="hf", kv_cache_gib=2.0),
            r"^--kv-cache-gib is 2\.0; only the native engine reads it, and --engine is hf\. Remove it\.$",
        ),
        (Runtime(kv_cache_gib=-1.0), r"^--kv-cache-gib is -1\.0; .* Correct --kv-cache-gib\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.evaluate(settings(num_questions=1), tmp_path / "out", runtime)


def test_a_prompt_that_does_not_fit_the_model_is_said_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grpo.inference.model.load_lm", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(
        ValueError, match=r"^--max-tokens is 100000; with the longest prompt .* and --model .* Lower --max-tokens\.$"
    ):
        benchmark.evaluate(settings(max_completion_tokens=100_000), tmp_path / "out", ONE)


def test_a_runs_evaluation_lies_in_its_directory():
    assert benchmark.default_out("runs/x/checkpoints/step-00000060/hf") == Path("runs/x/evaluation/step-00000060")
    assert benchmark.default_out("Qwen/Qwen2.5-0.5B") == Path("evaluations/Qwen--Qwen2.5-0.5B")
    assert benchmark.default_out(str(TINY / "model")) == Path("evaluations/model")


def test_the_transcript_shows_each_question_once_with_the_answers_of_each_template(whole: Path):
    text = results.transcript(samples(whole))
    assert text.count("gold answer:") == 8
    assert text.count("r1_zero: right 0 of 4 times") == 8


def test_the_command_prints_the_transcript_of_the_probes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """9 probes in each of two templates, beside a question of another benchmark."""
    given = ["--model", MODEL, "--benchmarks", "mine,probes", "--data", f"mine={QUESTIONS}", "--questions", "9"]
    asked = ["--templates", "r1_zero,chat", "--samples", "2", "--max-tokens", "4", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["grpo evaluate", *given, *asked, "--out", str(tmp_path / "out")])
    command.main()
    shown = capsys.readouterr().out
    probes = [row for row in read_jsonl(tmp_path / "out" / "samples.jsonl") if row["benchmark"] == "probes"]
    probes.sort(key=lambda row: (row["row"], row["sample"]))
    assert len(probes) == 9 * 2 * 2
    assert shown.endswith(f"{results.transcript(probes)}\n")
    assert shown.count("gold answer:") == 9


def test_without_a_limit_answers_are_as_long_as_the_model_or_its_run_allows(tmp_path: Path):
    model = ModelConfig(name=MODEL)
    positions = num_positions(model)
    assert positions == 1024  # fewer than MOST_TOKENS
    assert benchmark.default_max_tokens(model, 30) == positions - 30
    with pytest.raises(
        ValueError, match=rf"^--model is .*, which knows {positions} positions; the longest prompt has "
    ):
        benchmark.default_max_tokens(model, positions)
    trained = tmp_path / "checkpoints" / "step-00000001" / "hf"
    shutil.copytree(MODEL, trained)
    (tmp_path / "config.yaml").write_text(
        "model: {name: m}\nrollout: {max_completion_tokens: 77}\nrun: {dir: x, steps: 1}\n"
    )
    assert benchmark.default_max_tokens(ModelConfig(name=str(trained)), 30) == 77
    found = benchmark.evaluate(
        settings(model=str(trained), max_completion_tokens=None, num_questions=1), tmp_path / "o", ONE
    )
    assert (
        found["results"][0]["max_completion_tokens"]
        == read_json(tmp_path / "o" / "settings.json")["max_completion_tokens"]
        == 77
    )


def test_questions_share_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """8 questions x 4 samples take as many passes as the longest answer has tokens, not 8 times as many."""
    batches = []
    draw = "grpo.rollout.hf.draw"
    real = sampling.draw
    monkeypatch.setattr(draw, lambda logits, *rest, **more: batches.append(len(logits)) or real(logits, *rest, **more))
    benchmark.evaluate(settings(), tmp_path / "out", Runtime(engine="hf", num_workers=1))
    assert set(batches) == {32}
    assert len(batches) <= 48


def test_the_bar_knows_how_much_is_left_before_the_first_answer_and_after_it(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("grpo.observe.bar.time.monotonic", lambda: now)
    bar = Bar("mine, chat", total=8, most_tokens=8 * 100, shown=False)
    assert bar.words() == "0 of 8 questions"
    now = 102.0
    progress.drew(40)
    assert bar.words() == "0 of 8 questions, 20 tokens/s, at most 00:00:38 left"  # 760 tokens at 20 a second
    progress.drew(60)
    bar.add(2)
    assert bar.words() == "2 of 8 questions, 50 tokens/s, 00:00:06 left"  # a second each
    now = 103.0
    assert bar.words().endswith(", 00:00:05 left")


def test_a_check_of_a_start_has_a_bar_once_it_takes_long(monkeypatch: pytest.MonkeyPatch):
    now, painted = [0.0], []
    monkeypatch.setattr("grpo.observe.bar.time.monotonic", lambda: now[0])
    monkeypatch.setattr("grpo.observe.bar.can_repaint", lambda *_: True)
    monkeypatch.setattr("grpo.observe.bar.Region", lambda *_: Mock(start=lambda: painted.append(now[0])))

    def check(rows: list[Any], add: Callable[[int], None]) -> list[None]:
        for now[0] in (1.0, 3.0, 4.0):
            add(1)
        return [None] * len(rows)

    assert check_rows(Mock(check_rows=check), [1, 2, 3]) == [None] * 3
    assert painted == [3.0]


def test_a_run_is_asked_as_it_was_trained_unless_an_option_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        write_yaml({"model": {"name": str(TINY / "model")}, "data": {"template": "chat", "system_prompt": "Think."}})
    )
    words = ["--benchmarks", "gsm8k", "--model"]
    parser = command._parser()
    asked = [command._settings_of(parser.parse_args([*words, *each])) for each in ([str(run)], [str(run / "hf")])]
    assert [(each.templates, each.system_prompt) for each in asked] == [(["chat"], "Think."), (["r1_zero"], None)]
    assert f"template chat, by which {run} was trained" in capsys.readouterr().out
    own = command._settings_of(parser.parse_args([*words, str(run), "--templates", "none"]))
    assert own.templates == ["none"]
