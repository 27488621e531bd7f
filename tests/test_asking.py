"""Asking a model by hand: which model is meant, a group with its reward breakdown, and a conversation."""

import argparse
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grpo.rewards import accuracy, format
from helpers import ROOT, TINY, tiny_config
from rich.console import Console

from grpo.algorithm.objective import AdvantageRule
from grpo.cli.model_options import add_options
from grpo.config import DataConfig, RewardConfig, ScoringConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import asked_rows
from grpo.inference import model as inference
from grpo.inference.chat import Conversation, show, write
from grpo.inference.inspect import columns_of, make_scorer, sample_groups, show_group, verdicts_left, without
from grpo.inference.model import Sampler
from grpo.inference.resolve_model import choose, num_positions, trusted_environment, trusted_rewards
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.grouping import all_at_once
from grpo.scoring.reward import resolve_rewards
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling

MODEL = TINY / "model"
QUESTION = "What is 12+8+5-5+9?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with checkpoints of the steps 2 and 4."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(
        directory,
        rollout={"temperature": 0.8, "max_completion_tokens": 48},
        rewards=[{"function": "accuracy"}, {"function": "format", "weight": 0.5}],
    )
    for step in (2, 4):
        shutil.copytree(MODEL, directory / f"checkpoints/step-{step:08d}/hf")
    (directory / "config.yaml").write_text(config.to_yaml())
    return directory


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(["--model", *map(str, words)])


def test_a_run_means_its_newest_checkpoint_with_the_runs_own_settings(run: Path):
    chosen = choose(options(run))
    assert chosen.model.name == str(run / "checkpoints/step-00000004/hf")
    assert chosen.sampling == Sampling(max_tokens=48, temperature=0.8)
    assert chosen.data(load_tokenizer(chosen.model), None, None).template == "chat"
    assert choose(options(run, "--step", "2")).model.name == str(run / "checkpoints/step-00000002/hf")
    assert choose(options(run, "--base")).model.name == str(MODEL)
    for inside in ("checkpoints/step-00000002", "checkpoints/step-00000002/hf"):
        assert choose(options(run / inside)).model.name == str(run / "checkpoints/step-00000002/hf")
        assert choose(options(run / inside)).settings.rewards[1].weight == 0.5


def test_options_win_over_the_run_and_a_model_without_one_is_sampled_as_r1_is_evaluated(run: Path):
    given = choose(options(run, "--temperature", "0", "--max-tokens", "7", "--template", "none"))
    assert given.sampling == Sampling(max_tokens=7, temperature=0.0)
    assert given.data(load_tokenizer(given.model), "none", None).template == "none"
    alone = choose(options(MODEL))
    half = num_positions(alone.model) // 2
    assert half < 1024
    assert alone.sampling == Sampling(max_tokens=half, temperature=0.6, top_p=0.95)
    with pytest.raises(ValueError, match=rf"^--max-tokens is {half}; .* Set --max-tokens <= {half - 1}\."):
        alone.load(load_tokenizer(alone.model), longest_prompt=half + 1)
    with pytest.raises(
        ValueError, match=rf"^a prompt has {2 * half} tokens; .* knows {2 * half} positions, which leaves none"
    ):
        alone.load(load_tokenizer(alone.model), longest_prompt=2 * half)
    tokenizer = load_tokenizer(alone.model)
    assert alone.data(tokenizer, None, None).template == "chat"
    tokenizer.chat_template = None
    assert alone.data(tokenizer, None, None).template == "r1_zero"


def test_a_persons_question_stands_in_the_words_that_the_runs_data_have_around_theirs(sampler: Sampler):
    chosen = choose(options(MODEL, "--config", "quickstart-tools"))
    data = chosen.data(load_tokenizer(chosen.model), None, None)
    talk = Conversation(sampler.model, data, Sampling(8))
    assert talk.prompt("2*3?") == "User: 2*3?\nAssistant:"
    other = chosen.data(load_tokenizer(chosen.model), "r1_zero", None)
    alone = Conversation(sampler.model, other, Sampling(8)).prompt("2*3?")
    assert alone.endswith("User: 2*3? Assistant:"), "the words were written for the run's own template"
    of_columns = DataConfig(template="none", question_template="Make {target} of {nums}.")
    assert Conversation(sampler.model, of_columns, Sampling(8)).prompt("2*3?") == "2*3?"
    chat = Conversation(
        sampler.model, DataConfig(template="chat", question_template="{question} Be brief."), Sampling(8)
    )
    chat.remember("2*3?", "6")
    assert chat.messages[0]["content"] == "2*3? Be brief."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "3"], "--step is 3; the run in {run} has checkpoints of these steps: 2, 4. Choose one of them."),
        (["--step", "2", "--base"], "--step is 2 with --base; that is step 0 of the run. Leave one of the two out."),
        (["--temperature", "-1"], "--temperature is -1.0; it is at least 0. Set 0"),
        (["--temperature", "nan"], "--temperature is nan; it is at least 0. Set 0"),
        (["--top-p", "0"], "--top-p is 0.0; it is above 0 and at most 1. Set 1"),
        (["--max-tokens", "0"], "--max-tokens is 0; an answer has at least 1 token. Raise it."),
        (
            ["--config", "nowhere.yaml"],
            "--config is 'nowhere.yaml'; there is no such file, and no configuration of that name",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, words: list[str], said: str):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the text is compared whole
        choose(options(run, *words))
    assert str(refused.value).startswith(said.format(run=run))


def test_a_model_without_a_run_has_no_steps_and_no_base(tmp_path: Path):
    for words in (["--step", "2"], ["--base"]):
        with pytest.raises(ValueError, match=rf"^{words[0]} is \w+; .* belongs to no run .* Leave {words[0]} out"):
            choose(options(MODEL, *words))
    with pytest.raises(ValueError, match=r"^--model is .*; there is no such directory"):
        choose(options(tmp_path / "nothing"))


def test_only_a_chat_template_takes_a_system_message(run: Path):
    chosen = choose(options(run))
    tokenizer = load_tokenizer(chosen.model)
    assert chosen.data(tokenizer, None, "Be brief.").system_prompt == "Be brief."
    with pytest.raises(ValueError, match=r"^--system is 'Be brief.' with the template r1_zero; only .* Leave it out"):
        chosen.data(tokenizer, "r1_zero", "Be brief.")
    brief = chosen.settings.data.model_copy(update={"system_prompt": "Be brief."})
    of_run = replace(chosen, settings=chosen.settings.model_copy(update={"data": brief}))
    assert of_run.data(tokenizer, "chat", None).system_prompt == "Be brief."
    assert of_run.data(tokenizer, "chat", "").system_prompt == ""
    assert of_run.data(tokenizer, "r1_zero", None).system_prompt is None, "nobody asked for the run's there"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^--template is chat; .* has no chat template. Set --template r1_zero"):
        chosen.data(tokenizer, "chat", None)


def test_questions_of_ones_own_have_a_gold_answer_each_or_none():
    assert asked_rows(["a", "b"], ["1", "2"]) == [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    assert columns_of(asked_rows(["a"], ["1"])) == ["question", "answer"]
    assert columns_of(asked_rows(["a"], [])) == ["question"]
    with pytest.raises(ValueError, match=r"^--answer is given 1 times with 2 of --question; each .* Give one for each"):
        asked_rows(["a", "b"], ["1"])
    with pytest.raises(ValueError, match=r"^--question is empty; there is nothing to ask. Write a question."):
        asked_rows([" "], [])


def test_rewards_that_nobody_can_fill_are_named_with_what_they_need():
    rewards = resolve_rewards([RewardConfig(function=name) for name in ("accuracy", "format", "code")])
    assert without(rewards, ["question"]) == {"accuracy": ["answer"], "code": ["tests"]}
    assert without(rewards, ["question", "answer", "tests"]) == {}
    some = [*rewards[:2], replace(rewards[1], name="of_sums", only={"kind": "sums"})]
    assert without(some, ["question", "answer"]) == {"of_sums": ["kind"]}
    assert without(some, ["question", "answer", "kind"]) == {}


def test_a_question_of_ones_own_is_asked_of_the_rewards_that_are_not_for_rows_of_some_kind():
    """Where what says what is right is left out, no other reward says so in its place."""
    sums = RewardConfig(function="accuracy", name="sums", only={"kind": "sums"})
    rows = asked(["29"], RewardConfig(function="accuracy"), sums, verdict=["sums", "accuracy"])
    assert [row["right"] for row in rows] == [True, False, False, True]
    assert set(rows[0]["rewards"]) == {"accuracy"}
    rows = asked(["29"], RewardConfig(function="accuracy"), sums, verdict="sums")
    assert [row["right"] for row in rows] == [None] * 4
    assert "4 unknown" in printed(rows).splitlines()[-1]


TEXTS = [
    "<think> 12+8=20 </think> <answer> 29 </answer>",
    "<think> 12+8=20 </think> <answer> 20 </answer>",
    "The answer is 29.",
    "<answer> 29 </answer>",
]


class SaidGenerator:
    """Always the same four completions."""

    def sample(
        self, prompts: list[Prompt], sampling: Sampling, *, num_completions: int, seed: int, on_group: OnGroup
    ) -> list[Group]:
        said = [Completion([5] * len(text), [-1.0] * len(text), text, "stop") for text in TEXTS]
        return all_at_once([Group(prompt, said) for prompt in prompts], on_group)


def asked(
    answers: list[str], *configured: RewardConfig, verdict: str | list[str] | None = None
) -> list[dict[str, Any]]:
    rows = asked_rows([QUESTION], answers)
    usual = RewardConfig(function="accuracy"), RewardConfig(function="format", weight=0.5)
    rewards = resolve_rewards(configured or usual)
    lacking = without(rewards, columns_of(rows))
    scoring = ScoringConfig(num_workers=1, verdict=verdict)
    verdicts = verdicts_left(scoring, rewards, lacking)
    scorer = make_scorer(
        [reward for reward in rewards if reward.name not in lacking],
        columns=columns_of(rows),
        sampling=Sampling(64),
        scoring=scoring.model_copy(update={"verdict": verdicts or None}),
    )
    prompts = [Prompt(0, [5], "", "", rows[0])]
    with scorer:
        return sample_groups(
            prompts,
            generator=SaidGenerator(),  # type: ignore[arg-type]
            scorer=scorer,
            sampling=Sampling(64),
            num_completions=4,
            rule=AdvantageRule(),
            seed=0,
            judged=bool(verdicts),
        )


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True, highlight=False)
    show_group(console, rows)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_breakdown_has_each_value_weight_total_advantage_and_reason():
    rows = asked(["29"])
    assert [row["reward"] for row in rows] == [1.5, 0.5, 0.0, 1.0]
    # mean 0.75, deviations 0.75, -0.25, -0.75, 0.25; squares 1.25, a quarter of it 0.3125, its root 0.5590
    assert [row["advantage"] for row in rows] == pytest.approx([1.342, -0.447, -1.342, 0.447], abs=1e-3)
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["rewards"] == {"accuracy": 0.0, "format": 1.0}
    assert rows[1]["weights"] == {"accuracy": 1.0, "format": 0.5}
    assert [row["why"] for row in rows] == [
        {"accuracy": "found '29', gold '29'", "format": "well-formed"},
        {"accuracy": "found '20', gold '29'", "format": "well-formed"},
        {"accuracy": "found no answer (answer_tag), gold '29'", "format": "<think> is missing"},
        {"accuracy": "found '29', gold '29'", "format": "<think> is missing"},
    ]
    text = printed(rows).splitlines()
    assert text[1:3] == [f"Question: {QUESTION}", "Gold answer: 29"]
    second = text.index("    │ " + TEXTS[1])
    assert (
        text[second - 3] == f"✗ 2/4  reward 0.500  advantage {rows[1]['advantage']:+.3f}  {len(TEXTS[1])} tokens, ended"
    )
    assert text[second - 2].split() == ["accuracy", "0", "x", "1", "found", "'20',", "gold", "'29'"]
    assert text[second - 1].split() == ["format", "1", "x", "0.5", "well-formed"]
    assert text[-1] == "4 completions, 2 right, 2 wrong, reward 0.000 to 1.500, 0.750 on average"


def test_without_a_gold_answer_nothing_is_called_right():
    rows = asked([])
    assert [row["reward"] for row in rows] == [0.5, 0.5, 0.0, 0.0]
    assert rows[0]["answer"] is None
    assert set(rows[0]["rewards"]) == {"format"}
    text = printed(rows)
    assert "✓" not in text
    assert "Gold" not in text
    assert text.endswith("\n4 completions, reward 0.000 to 0.500, 0.250 on average\n")


def test_an_answer_that_cannot_be_graded_says_why():
    rows = asked(["29 or so, who knows, maybe 30"])
    assert rows[0]["rewards"]["accuracy"] is None
    assert "Rewrite or drop the row" in rows[0]["why"]["accuracy"]
    assert "can't tell" in printed(rows)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<think>a</think><answer>b</answer>", "well-formed"),
        ("<think>a</think><answer>b", "</answer> is missing"),
        ("<think>a<think></think><answer>b</answer>", "<think> occurs 2 times"),
        ("<answer>b</answer><think>a</think>", "the tags are out of order"),
        ("<think> </think><answer>b</answer>", "the thought is empty"),
        ("<think>a</think><answer>\n</answer>", "the answer is empty"),
        ("So: <think>a</think><answer>b</answer>", "'So:' stands outside of the tags"),
        ("<think>a</think><answer>b</answer> amen", "'amen' stands outside of the tags"),
    ],
)
def test_the_format_reward_says_what_is_wrong_where_something_is(text: str, why: str):
    assert format.explain(text) == why
    assert (format(text) == 1.0) == (why == "well-formed")


def test_the_accuracy_reward_shows_what_it_compared():
    text = "so \\boxed{1/2} <answer> it is 0.5 </answer>"
    assert accuracy.explain(text, "1/2") == "found '0.5', gold '1/2'"
    assert accuracy(text, "1/2") == 1.0
    assert accuracy.explain(text, "3", source="boxed") == "found '1/2', gold '3'"


# ---- conversation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler(run: Path) -> Sampler:
    chosen = choose(options(run))
    return chosen.load(load_tokenizer(chosen.model), longest_prompt=96, engine="hf")


def conversation(sampler: Sampler, **more: Any) -> Conversation:
    sampling = Sampling(**{"max_tokens": 48, "temperature": 0.0, **more})
    return Conversation(sampler.model, DataConfig(template="chat"), sampling)


def expected(sampler: Sampler, sampling: Sampling) -> Completion:
    """What the engine answers that training samples with."""
    rows = [{"question": QUESTION, "answer": "29"}]
    prompts, _ = build_prompts(rows, sampler.tokenizer, DataConfig(template="chat"))
    return sampler.generator.sample(prompts, sampling, num_completions=1, seed=0)[0].completions[0]


@pytest.mark.parametrize("more", [{}, {"max_tokens": 5}, {"stop": ("=",)}])
def test_an_answer_in_pieces_is_the_completion_that_training_would_sample(sampler: Sampler, more: dict[str, Any]):
    talk = conversation(sampler, **more)
    answer = talk.ask(QUESTION)
    pieces = list(answer)
    completion = expected(sampler, talk.sampling)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text == completion.text
    assert answer.is_cut_off == (completion.finish_reason == "length") == ("max_tokens" in more)


def test_leaving_an_answer_stops_its_sampling(sampler: Sampler):
    torch.manual_seed(0)
    whole = list(conversation(sampler, max_tokens=400, temperature=20.0).ask(QUESTION))
    torch.manual_seed(0)
    answer = conversation(sampler, max_tokens=400, temperature=20.0).ask(QUESTION)
    pieces = iter(answer)
    next(pieces)
    pieces.close()
    sampled = list(answer._streamer.text_queue.queue)  # nobody has read these
    assert len(whole) > 50, "too short to tell"
    assert len(sampled) < len(whole) / 2


def test_thoughts_and_tags_are_dimmed_and_the_answer_is_not():
    styled = Console(file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True, _environ={})
    plain = Console(file=io.StringIO(), soft_wrap=True)
    pieces = [" ", "\n<th", "ink> 2+", "3 </think> <ans", "wer> 5 \x1b[2J</answer>"]
    for terminal in (styled, plain):
        write(pieces, terminal, starts_in_thought=False)
    assert plain.file.getvalue() == "<think> 2+3 </think> <answer> 5 �[2J</answer>"  # type: ignore[attr-defined]
    text = styled.file.getvalue()  # type: ignore[attr-defined]
    for part, style in ((" 2+", "2"), ("3 ", "2"), (" 5 �[2J", "1"), ("</think>", "2;36")):
        assert f"\x1b[{style}m{part}\x1b[0m" in text
    thought = Console(file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True, _environ={})
    write(["hm</think>"], thought, starts_in_thought=True)
    assert thought.file.getvalue().startswith("\x1b[2mhm\x1b[0m")  # type: ignore[attr-defined]


def test_a_chat_remembers_what_was_said_without_its_thoughts_and_other_templates_remember_nothing(sampler: Sampler):
    talk = conversation(sampler)
    terminal = Console(file=io.StringIO(), soft_wrap=True)
    show(talk, QUESTION, terminal)
    text = expected(sampler, talk.sampling).text
    assert terminal.file.getvalue() == text.lstrip() + "\n"  # type: ignore[attr-defined]
    assert talk.messages == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text.rpartition("</think>")[2].strip()},
    ]
    assert "</think>" in text
    prompt = talk.prompt("And one more?")
    assert QUESTION in prompt
    assert "And one more?" in prompt
    assert talk.command("/reset") == "forgotten"
    assert QUESTION not in talk.prompt("And one more?")
    talk.remember("a", "<think> and so on")
    assert talk.messages[-1] == {"role": "assistant", "content": ""}, "thoughts without an end are no answer"
    talk.remember("a", "no thoughts at all")
    assert talk.messages[-1]["content"] == "no thoughts at all"
    with pytest.raises(ValueError, match="no UTF-8"):
        talk.ask("\udcff")
    alone = Conversation(sampler.model, DataConfig(template="r1_zero"), Sampling(8))
    alone.remember(QUESTION, text)
    assert QUESTION not in alone.prompt("And one more?")
    assert alone.prompt("And one more?").endswith("User: And one more? Assistant:")


def test_commands_change_the_conversation_and_refuse_what_cannot_be(sampler: Sampler):
    talk = conversation(sampler)
    assert talk.command("/temperature 0.5").startswith("temperature 0.5, top-p 1, at most 48 tokens")
    assert talk.sampling.temperature == 0.5
    talk.remember("a", "b")
    talk.command("/system Be brief.")
    assert (talk.messages, talk.data.system_prompt) == ([], "Be brief.")
    assert "/temperature T" in talk.command("/help")
    for line, said in {
        "/temperature hot": "/temperature is 'hot'; it is a number. Type",
        "/temperature -1": "/temperature is -1.0; it is at least 0. Set 0",
        "/forget": "/forget is no command; there are /reset, /system, /temperature, /help and /quit. Type one",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            talk.command(line)
    with pytest.raises(ValueError, match=r"^/system is 'x' with the template none; only .* Start with --template chat"):
        Conversation(sampler.model, DataConfig(template="none"), Sampling(8)).command("/system x")
    with pytest.raises(
        ValueError, match=r"^--max-tokens is 1000000; the conversation has \d+ tokens .* \(/reset\), or lower"
    ):
        conversation(sampler, max_tokens=1_000_000).ask(QUESTION)


# ---- the scripts -----------------------------------------------------------------------------------------------------


class Typed(io.StringIO):
    """What a person types."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs one in this process; its exit code, stdout and stderr."""

    def run_script(name: str, *words: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *words])
        monkeypatch.setattr(sys, "stdin", Typed(typed))
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run_script


def test_a_sample_as_json_is_a_line_per_completion_and_nothing_else(run: Path, script: Callable[..., Any]):
    code, out, err = script("sample.py", "--model", str(run), "--row", "3", "5", "--group", "2", "--json")
    assert code == 0, err
    assert "temperature 0.8, top-p 1, at most 48 tokens, seed 0" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["row"], row["sample"]) for row in rows] == [(3, 0), (3, 1), (5, 0), (5, 1)]
    questions = [json.loads(line)["question"] for line in (TINY / "train.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows[::2]] == [questions[3], questions[5]]
    for row in rows:
        assert row["reward"] == sum(row["weights"][name] * value for name, value in row["rewards"].items())


def test_a_typed_question_is_sampled_as_the_run_asks(script: Callable[..., Any]):
    words = ("--config", "quickstart-tools", "--question", "2*3?", "--group", "1", "--max-tokens", "4", "--json")
    code, out, err = script("sample.py", "--model", str(MODEL), *words)
    assert code == 0, err
    assert json.loads(out)["question"] == "User: 2*3?\nAssistant:"


@pytest.mark.parametrize(("answer", "runs"), [(None, False), ("", False), ("no\n", False), ("y\n", True)])
def test_reward_functions_that_a_run_names_are_run_only_if_a_person_agrees(
    run: Path,
    tmp_path: Path,
    script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    runs: bool,
):
    foreign = tmp_path / "run"
    shutil.copytree(run, foreign)
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'was-run')!r}, 'w').close()\ndef evil(completion):\n    return 1.0\n"
    )
    text = (foreign / "config.yaml").read_text().replace("function: accuracy", f"function: {tmp_path / 'evil.py'}:evil")
    (foreign / "config.yaml").write_text(text)
    words = ["--model", str(foreign), "--question", QUESTION, "--answer", "29", "--group", "1", "--json"]
    if answer is not None:
        monkeypatch.setattr(Typed, "isatty", lambda stream: True)
        monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True, raising=False)
    code, _, err = script("sample.py", *words, typed=answer or "")
    assert f"names reward functions that are run here: {tmp_path / 'evil.py'}:evil" in err
    assert (tmp_path / "was-run").exists() == runs
    assert code == (0 if runs else 2)
    assert runs or "say so with --trust-rewards" in err
    if answer is None:
        assert script("sample.py", *words, "--trust-rewards")[0] == 0
        assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize("spec", ["rewards:own", "rewards.own:own", "own:own", "own.py:own"])
def test_only_rewards_of_this_package_need_no_agreement(run: Path, tmp_path: Path, spec: str):
    foreign = tmp_path / "run"
    shutil.copytree(run, foreign)
    text = (run / "config.yaml").read_text()
    (foreign / "config.yaml").write_text(text.replace("function: accuracy", "function: grpo.rewards:accuracy"))
    asked = options(foreign)
    asked.trust_rewards = False
    assert len(trusted_rewards(choose(asked), asked)) == 2
    (foreign / "config.yaml").write_text(text.replace("function: accuracy", f"function: {spec}"))
    with pytest.raises(ValueError, match=f"names reward functions that are run here: {re.escape(spec)}"):
        trusted_rewards(choose(asked), asked)


def test_an_environment_of_a_runs_configuration_is_run_if_a_person_trusts_it(run: Path, tmp_path: Path):
    foreign = tmp_path / "run"
    shutil.copytree(run, foreign)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["environment"]["function"] = "game.py:Game"
    (foreign / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = options(foreign)
    asked.trust_rewards = False
    with pytest.raises(
        ValueError, match=r"names an environment that is run here: game\.py:Game\. .* with --trust-rewards"
    ):
        trusted_environment(choose(asked), asked)
    asked.trust_rewards = True
    assert trusted_environment(choose(asked), asked).function == "game.py:Game"


def test_a_runs_own_configuration_does_not_let_code_of_its_model_run(run: Path, tmp_path: Path):
    foreign = tmp_path / "run"
    shutil.copytree(run, foreign)
    text = (run / "config.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (foreign / "config.yaml").write_text(text)
    for words in ([], ["--base"], ["--step", "2"]):
        assert not choose(options(foreign, *words)).model.trust_remote_code
        assert choose(options(foreign, *words, "--trust-remote-code")).model.trust_remote_code


def test_a_piped_question_gets_the_answer_alone(run: Path, script: Callable[..., Any]):
    arguments = ("--model", str(run), "--temperature", "0", "--max-tokens", "40")
    code, out, err = script("chat.py", *arguments, typed=f"{QUESTION}\n/nonsense\n")
    assert code == 0, err
    assert "/nonsense is no command" in err
    _, sampled, _ = script("sample.py", *arguments, "--question", QUESTION, "--group", "1", "--json")
    assert out.strip() == json.loads(sampled)["completion"].strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--row", "5000"], "error: --row is 5000; there are 200 rows, counted from 0. Choose 0 to 199."),
        (
            ["--question", "a", "--answer", "1", "--answer", "2"],
            "error: --answer is given 2 times with 1 of --question; ",
        ),
        (
            ["--question", "a", "--template", "r1_zero", "--system", "b"],
            "error: --system is 'b' with the template r1_zero; ",
        ),
        (["--question", "a", "--group", "0"], "error: sample.py: --group is 0; there must be at least 1 completion."),
        (
            ["--question", "a", "--held-out"],
            "error: sample.py: --data and --held-out choose rows; they have no effect on",
        ),
        (
            ["--row", "1", "--answer", "3"],
            "error: sample.py: --answer is '3'; rows have their own gold answers. Leave it out",
        ),
        (["--question", "a", "--row", "1"], "error: sample.py: the questions are missing or twice there; give either"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_before_a_model_is_loaded(
    run: Path, script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
):
    monkeypatch.setattr(inference, "load_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, err = script("sample.py", "--model", str(run), *words)
    assert (code, out) == (2, "")
    assert said in err
