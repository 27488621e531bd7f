"""Environments: what is appended, masked, rewarded and kept; bugs and limits; those that come with the library; real runs."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from grpo.tools.environments.guess_number import ASK, guess_number
from helpers import ROOT, TINY, steps_of, tiny_config
from transformers import AddedToken, AutoTokenizer

from grpo import Reward, Trainer
from grpo.config import Config, DataConfig, EnvironmentConfig, ToolsConfig
from grpo.config.sections import ScoringConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import MESSAGES
from grpo.rollout.grouping import Grouping
from grpo.run.preflight import group_stats
from grpo.scoring.scorer import Scorer
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import RunError, Stopped
from grpo.turns.environment import Environment
from grpo.turns.episode import EpisodeRunner
from grpo.turns.form import TAGGED, reply_form
from grpo.turns.generator import TurnGenerator
from grpo.turns.runner import Runner, without_observation
from grpo.turns.toolbox import Toolbox, with_observations
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling, Scores

TOKENIZER = AutoTokenizer.from_pretrained(TINY / "model")
SCORING = ScoringConfig(num_workers=1)


class Player:
    """A Generator whose words are a function of all that it has read, and of the place in the call."""

    def __init__(self, words: Callable[[str, int], str]) -> None:
        self.words, self.asked = words, list[Prompt]()

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        self.asked += prompts
        grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        for place, prompt in enumerate(grouping.prompts):
            said = self.words(TOKENIZER.decode(prompt.token_ids), place)
            most = min(sampling.max_tokens, prompt.max_tokens or sampling.max_tokens)
            ids = TOKENIZER(said, add_special_tokens=False)["input_ids"][:most]
            text = TOKENIZER.decode(ids)
            reason = "stop" if text == said else "length"
            grouping.add(place, Completion(ids, [-0.5] * len(ids), prompt.prefill + text, reason))
        return grouping.groups()

    def metrics(self) -> dict[str, float]:
        return {}


def play(
    words: Callable[[str, int], str],
    environment: Any,
    *,
    num: int = 1,
    max_tokens: int = 200,
    tools: list | None = None,
    template: str = "r1_zero",
    row: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Prompt, list[Completion], Player]:
    """The completions of one question that a player of these words writes."""
    config = EnvironmentConfig(**{"timeout_seconds": 1.0, **settings})
    data = DataConfig(name="x", template=template, max_prompt_tokens=1000)
    own = Environment.of(config, environment)
    with Toolbox.of(ToolsConfig(), SCORING, tools or [], own) as toolbox:
        rows = toolbox.observed([{"question": "Guess.", "answer": "6", **(row or {})}], data)
        prompt = build_prompts(rows, TOKENIZER, data)[0][0]
        inner = Player(words)
        generator = TurnGenerator(
            inner,
            toolbox,
            TAGGED if tools else None,
            TOKENIZER,
            ToolsConfig(),
            reply_form(TOKENIZER, data, config.reply_template),
        )
        (group,) = generator.sample([prompt], Sampling(max_tokens), num_completions=num, seed=3)
    return prompt, group.completions, inner


def answer(value: object) -> str:
    return f" <answer> {value} </answer>"


class Higher:
    """The number is `answer`; a turn is worth 0.25, the right number 1."""

    def reset(self, answer: str) -> None:
        self.number, self.last = int(answer), 0

    def step(self, text: str) -> Any:
        self.last = int(text.split()[1])
        return (None, 0.0) if self.last == self.number else ("Higher." if self.last < self.number else "Lower.", 0.25)

    def reward(self) -> float:
        return float(self.last == self.number)


def bisects(read: str, place: int) -> str:
    """Guesses 5, and goes on from there."""
    return answer(5 + read.count("Higher.") - read.count("Lower.")) if place == 0 else answer(6)


def test_what_an_environment_says_is_appended_to_the_very_tokens_and_masked():
    prompt, (first, second), inner = play(bisects, Higher, num=2)
    own = [TOKENIZER(answer(n), add_special_tokens=False)["input_ids"] for n in (5, 6)]
    reply = TOKENIZER(" User: Higher. Assistant:", add_special_tokens=False)["input_ids"]
    assert first.token_ids == own[0] + reply + own[1]
    assert first.trained == [True] * len(own[0]) + [False] * len(reply) + [True] * len(own[1])
    assert [x for x, is_own in zip(first.logprobs, first.trained, strict=True) if not is_own] == [0.0] * len(reply)
    assert inner.asked[-1].token_ids == prompt.token_ids + own[0] + reply, "it goes on from what was sampled"
    assert first.text == answer(5) + answer(6)
    assert first.messages == [
        {"role": "assistant", "content": answer(5)},
        {"role": "user", "content": "Higher."},
        {"role": "assistant", "content": answer(6)},
    ]
    assert (first.finish_reason, first.episode.reward, first.episode.ended, first.episode.num_turns) == (
        "stop",
        1.25,  # of the first turn 0.25, and at the end 1
        True,
        2,
    )
    assert (second.trained, second.episode.reward, second.episode.num_turns) == (None, 1.0, 1)


def test_an_episode_that_a_limit_ends_gives_its_last_reward_all_the_same():
    _, (out,), _ = play(lambda *_: answer(4), Higher, max_turns=3)
    assert (out.finish_reason, out.episode.num_turns, out.episode.ended) == ("turns", 3, False)
    assert out.episode.reward == 0.75, "0.25 a turn, and 0 at the end"
    assert out.text == 3 * answer(4), "it ends with what the model wrote"
    size = len(TOKENIZER(answer(4) + " User: Higher. Assistant:", add_special_tokens=False)["input_ids"])
    _, (no_room,), _ = play(lambda *_: answer(4), Higher, max_tokens=size)
    endings = group_stats(
        Group(Prompt(0, [1], "", "", {}), [out, no_room]),
        Scores(torch.zeros(1, 2), {}, 0, 0),
        0,
        end_token_ids=[TOKENIZER.eos_token_id],
    ).endings
    assert endings == ["stop text", "cut off"], "out of turns is not cut off, which the preflight would refuse"
    assert (no_room.finish_reason, no_room.trained, no_room.episode.reward) == ("length", None, 0.25)
    _, (cut,), _ = play(lambda *_: answer(4), Higher, max_tokens=3)
    assert (cut.finish_reason, cut.episode.num_turns, cut.episode.reward) == ("length", 0, 0.0)


class Slow(Higher):
    def step(self, text: str) -> str | None:
        if "hang" in text:
            time.sleep(60)
        if "die" in text:
            os._exit(1)
        return None


def test_a_step_that_hangs_or_dies_ends_its_completion_whose_reward_nobody_can_tell():
    words = ["hang", "die", "5 5"]
    _, completions, _ = play(lambda read, place: words[place], Slow, num=3)
    assert [each.episode.reward for each in completions] == [None, None, 0.0]
    assert [each.episode.ended for each in completions] == [False, False, True]
    prompt = Prompt(0, [1], "", "", {"question": "", "answer": ""})
    reward = Environment.of(EnvironmentConfig(weight=2.0), Higher).reward
    kept = {"max_completion_tokens": 9, "num_workers": 1, "timeout_seconds": 9.0, "memory_gib": 1.0}
    with Scorer([reward], columns=["question"], **kept) as scorer:
        scores = scorer.score([Group(prompt, completions)])
    assert scores.rewards.isnan().tolist() == [[True, True, False]]
    assert list(scores.values) == ["environment"]


class Unsure(Higher):
    """Cannot tell where the number was 7."""

    def reward(self) -> float | None:
        return None if self.number == 7 else super().reward()


def test_an_environment_that_cannot_tell_leaves_the_reward_unknown():
    _, (told, *_), _ = play(bisects, Unsure)
    _, (unknown, *_), _ = play(bisects, Unsure, row={"answer": "7"})
    assert told.episode.reward == 1.25
    assert (unknown.episode.reward, unknown.episode.ended, unknown.finish_reason) == (None, False, "stop")


class Trips(Higher):
    def step(self, text: str) -> str | None:
        return {"long": [1, 2], "five": (1, 2, 3), "nan": ("x", float("nan"))}[text]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("key", "KeyError: 'key'"),
        ("long", "it returned '[1, 2]'; what is said to a model is a text"),
        ("five", "step returned 3 values"),
        ("nan", "step returned nan as the reward"),
    ],
)
def test_a_bug_of_an_environment_stops_the_run_and_shows_the_turn(words: str, said: str):
    with pytest.raises(RunError) as error:
        play(lambda *_: words, Trips)
    assert f"Environment Trips raised an exception in `step` on the turn '{words}'" in str(error.value)
    assert said in str(error.value)


class Dice:
    """Says what it has thrown before the first turn, and again in each."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        assert "observation" not in row
        self.question, self.first = row["question"], random.randint(1, 10**9)
        return [{"role": "user", "content": f"I have thrown {self.first}."}]

    def step(self, text: str) -> str:
        return f"{self.question} {self.first} {random.randint(1, 10**9)}"


def test_what_reset_says_stands_behind_the_question_and_all_that_is_drawn_comes_again():
    prompt, (first,), _ = play(lambda *_: "x", Dice, max_turns=2)
    thrown = prompt.columns["observation"].removeprefix("I have thrown ").removesuffix(".")
    assert f"User: Guess.\n\nI have thrown {thrown}. Assistant:" in prompt.text
    said = first.turns[1].said[0]
    assert said.startswith(f"Guess. {thrown} "), "as `reset` was given the question, and as it had thrown before"
    _, (second,), _ = play(lambda *_: "x", Dice, max_turns=2)
    assert second.turns[1].said[0] == said
    _, both, _ = play(lambda *_: "x", Dice, max_turns=2, num=2)
    assert both[0].turns[1].said != both[1].turns[1].said, "and of each completion its own"


class Draws:
    """Draws with Python and numpy wherever it can."""

    def __init__(self) -> None:
        self.made = random.random()

    def reset(self, row: dict[str, Any]) -> str:
        return f"{self.made} {random.random()} {np.random.rand()}"

    def step(self, text: str) -> str:
        return f"{self.made} {random.random()} {np.random.rand()}"


def test_numbers_of_numpy_and_of_init_follow_from_the_row_and_those_of_a_step_from_its_seed():
    """Also of a class of tools. Between two calls others have drawn, as other completions do."""

    def twice(call: Callable[[], Any]) -> list[Any]:
        return [(call(), random.seed(), np.random.seed())[0] for _ in range(2)]

    row, runner = {"question": "q", "answer": "1"}, EpisodeRunner(Draws)
    first, second = twice(lambda: runner("reset", "", None, row, 0))
    assert first == second
    assert runner("reset", "", None, {**row, "answer": "2"}, 0) != first
    told = {**row, "question": f"q\n\n{first}", "observation": first}
    steps = twice(lambda: runner("step", "x", None, told, 3).said[0])
    assert steps[0] == steps[1]
    assert steps[0].split()[0] == first.split()[0], "made as it was for the prompt"
    other = runner("step", "x", None, told, 4).said[0].split()
    assert [a == b for a, b in zip(steps[0].split(), other, strict=True)] == [True, False, False]
    tools = twice(lambda: Runner(Draws, is_object=True)("reset", {}, None, row)[1])
    assert tools == [first, first]


def test_the_documents_own_environment_is_played():
    """Also in the paper's template, whose turns end with </answer>, and where a limit cuts the first turn off."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/environments.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "my_game"}
    exec(code, names)
    words = ["<answer> 4 </answer>", "<answer> five </answer>", "<answer> 6 </answer>"]
    _, (won,), _ = play(lambda read, _: words[read.count("Higher.") + read.count("Say a number.")], names["Game"])
    assert [turn.said for turn in won.turns[1::2]] == [("Higher.",), ("Say a number.",)]
    assert (won.episode.reward, won.episode.ended) == (1.0, True)
    _, (cut,), _ = play(lambda *_: answer(6), names["Game"], max_tokens=3)
    assert (cut.finish_reason, cut.episode.reward) == ("length", 0.0)


def test_what_reset_says_has_a_place_and_a_column_of_its_own():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]
    rows = [{"question": "", "answer": "1"}, {"question": "Why?", "answer": "2", MESSAGES: turns}]
    chat = DataConfig(name="x", template="chat")
    first, second = with_observations(rows, ["A 1.", "A 2."], chat)
    assert (first["question"], first["observation"]) == ("A 1.", "A 1.")
    assert second[MESSAGES] == [turns[0], {"role": "user", "content": "Why?\n\nA 2."}]
    assert [without_observation(each) for each in (first, second)] == rows, "as `reset` is given them again"
    raw = DataConfig(name="x", template="none", question_template="User: {question}\nAssistant:")
    with pytest.raises(ValueError, match=r"a `reset` returned 'A 1.'; it would stand behind the template"):
        with_observations(rows, ["A 1.", ""], raw)
    with pytest.raises(ValueError, match=r"the data has a column 'observation'"):
        with_observations([{**rows[0], "observation": "x"}], ["A 1."], chat)


class Changing(Higher):
    def reset(self, answer: str) -> str:
        super().reset(answer)
        return str(time.time())


def test_a_reset_that_says_something_else_the_second_time_is_told():
    with pytest.raises(RunError, match=r"(?s)Changing.reset returned .* not what it returned when the prompt was made"):
        play(bisects, Changing)


class Greeter:
    """A class of tools as TRL's environment_factory takes it."""

    def reset(self, **columns: Any) -> str:
        self.word = columns["answer"]
        return f"The word has {len(self.word)} letters."

    def spell(self, place: int) -> str:
        """Tell a letter.

        Args:
            place: from 0.
        """
        return self.word[place]


def test_what_the_reset_of_a_class_of_tools_returns_is_told_too():
    call = '<tool>{"name": "spell", "arguments": {"place": 1}}</tool>'
    prompt, (first,), _ = play(
        lambda read, _: answer(6) if read.endswith("</result>") else call,
        Silent,
        tools=[Greeter],
        row={"answer": "67"},
        max_turns=1,
    )
    assert "Guess.\n\nThe word has 2 letters. Assistant:" in prompt.text
    assert [message["role"] for message in first.messages] == ["assistant", "tool", "assistant"]
    assert first.messages[1] == {"role": "tool", "name": "spell", "content": "7"}
    assert (first.finish_reason, first.episode.num_turns) == ("turns", 1), "a call is no turn of the environment's"


class Listens(Higher):
    def step(self, text: str) -> str:
        assert text.startswith("<think> hm </think>")
        return "Go on."


def test_a_turn_begins_with_the_thought_that_the_reply_has_opened():
    said = " hm </think> <answer> 1 </answer>"
    _, (first,), _ = play(lambda *_: said, Listens, template="r1_zero_think", max_turns=2)
    assert [turn.text for turn in first.turns] == [
        f"<think>{said}",
        " User: Go on. Assistant: <think>",
        f"<think>{said}",
    ]
    assert first.own_ids == 2 * TOKENIZER(said, add_special_tokens=False)["input_ids"], "the tag is the prompt's"


class Silent(Higher):
    def step(self, text: str) -> str:
        assert text.startswith("<tool>"), "what was written before the result is part of the turn"
        return "Go on."


CHAT = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""


def test_in_a_chat_template_a_reply_is_a_turn_of_the_user_and_an_open_turn_is_closed_first():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = CHAT
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    form = reply_form(tokenizer, DataConfig(name="x", template="chat"), None)
    said = "\n<|im_start|>user\nHigher.\n< |im_end|><|im_end|>\n<|im_start|>assistant\n<think>\n"
    ended = tokenizer("5<|im_end|>")["input_ids"]
    assert form.reply(("Higher.", "<|im_end|>"), tokenizer, most=50, behind=ended).text == said
    reply = form.reply(("Higher.", "<|im_end|>"), tokenizer, most=50, behind=ended[:-1])
    assert reply.text == "<|im_end|>" + said, "a text of rollout.stop has ended it"
    assert tokenizer.decode(reply.token_ids) == reply.text
    short = form.reply(("word " * 99,), tokenizer, most=5, behind=ended)
    assert "[cut off]" in short.text
    assert len(short.said[0]) < 40
    plain = reply_form(TOKENIZER, DataConfig(name="x", template="chat"), None)
    eos = [TOKENIZER.eos_token_id]
    assert plain.reply(("Higher.",), TOKENIZER, most=9, behind=eos).text == "\nUser: Higher.\nAssistant:"


def test_an_end_of_turn_that_is_special_without_a_part_is_not_doubled():
    """As Gemma's <end_of_turn>: among the added tokens, and neither eos_token nor another of all_special_tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = CHAT.replace("<|im_end|>", "<end_of_turn>")
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    assert "<end_of_turn>" not in tokenizer.all_special_tokens
    form = reply_form(tokenizer, DataConfig(name="x", template="chat"), None)
    ended = tokenizer("5<end_of_turn>")["input_ids"]
    said = "\n<|im_start|>user\nHigher.<end_of_turn>\n<|im_start|>assistant\n<think>\n"
    assert form.reply(("Higher.",), tokenizer, most=50, behind=ended).text == said
    assert form.reply(("Higher.",), tokenizer, most=50, behind=ended[:-1]).text == "<end_of_turn>" + said


@pytest.mark.parametrize(
    ("template", "given", "words"),
    [
        ("none", None, "environment.reply_template is missing"),
        ("chat", "{text}", "environment.reply_template is '{text}' with data.template chat"),
        ("r1_zero", "Feedback:", "takes the place of {text} in it, once"),
    ],
)
def test_a_reply_without_a_place_is_refused(template: str, given: str | None, words: str):
    with pytest.raises(ValueError, match=r"environment\.reply_template") as error:
        reply_form(TOKENIZER, DataConfig(name="x", template=template), given)
    assert words in str(error.value)


def test_what_is_no_environment_and_what_does_not_go_with_one_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the class has no method `step`.*belongs into tools"):
        Environment.of(EnvironmentConfig(), Greeter)
    with pytest.raises(ValueError, match="did you mean guess_number"):
        Environment.of(EnvironmentConfig(function="guess_numbers"))
    with pytest.raises(ValueError, match=r"environment.args sets 'late'.*early, turns"):
        Environment.of(EnvironmentConfig(function="guess_number", args={"late": 1}))
    with pytest.raises(ValueError, match=r"takes size, seed, low, high, question.*'least'"):
        Environment.of(EnvironmentConfig(function="guess_number", rows={"least": 1})).rows(held_out=False)
    with pytest.raises(ValueError, match=r"environment.rows is \{'size': 5\}.*no effect"):
        Trainer(tiny_config(tmp_path, environment={"function": "guess_number", "rows": {"size": 5}}))
    with pytest.raises(ValueError, match=r"environment.max_turns is 3; there is no environment, and it has no effect"):
        Trainer(tiny_config(tmp_path, environment={"max_turns": 3}))
    carries: dict[str, Any] = {
        "rollout": {"carry_over": True, "engine": "native", "max_completion_tokens": 40},
        "algorithm": {"importance": "truncate", "importance_high": 2.0},
        "schedules": {"rollout.max_completion_tokens": {"points": {0: 20, 4: 40}}},
    }
    tiny_config(tmp_path, **carries)
    with pytest.raises(ValueError, match=r"cannot be carried to another. Remove the schedule, or rollout.carry_over"):
        tiny_config(tmp_path, environment={"function": "second_try"}, **carries)
    with pytest.raises(ValueError, match=r"cannot be carried to another. Remove the schedule, or rollout.carry_over"):
        Trainer(tiny_config(tmp_path, **carries), rewards=[], environment=Higher)


def test_the_environments_that_come_along_answer_what_a_model_may_write():
    from grpo.tools.environments import countdown, guess_number, second_try, twenty_questions
    from grpo.tools.environments.twenty_questions import ANIMALS, PROPERTIES

    guess = guess_number(early=0.5, turns=4)
    guess.reset(answer="37")
    turns = ["<answer> 50 </answer>", "20? No, 30.", "I give up", "3.7", "37", "-37"]
    assert [guess.step(turn) for turn in turns[:4]] == ["Lower.", "Higher.", "Say a number.", "Say a number."]
    assert (guess.reward(), guess.step("37"), guess.reward()) == (0.0, None, 0.5)
    guess.reset(answer="1000")
    turns = ["not 1,000, 3", "1,0,00", "1,000.5", "(3,999)", "1,000,000", "<answer>1,000</answer>"]
    said = ["Higher.", "Higher.", "Say a number.", "Lower.", "Lower.", None]
    assert [guess.step(turn) for turn in turns] == said, (
        "a comma parts thousands where three digits follow, and a list else"
    )

    assert len({frozenset(each.split()) for each in ANIMALS.values()}) == len(ANIMALS), "each can be found out"
    assert {word for each in ANIMALS.values() for word in each.split()} <= set(PROPERTIES)
    twenty = twenty_questions()
    twenty.reset(answer="polar bear")
    assert [twenty.step(turn) for turn in ("A bird?", "Is it a mammal, or large?", "hm\nArctic?\n")] == [
        "No.",
        f"Ask about one of these: {', '.join(PROPERTIES)}; or name one animal.",
        "Yes.",
    ]
    assert (twenty.step("<answer>Polar Bear</answer>"), twenty.reward()) == (None, 1.0)

    count = countdown()
    rows = countdown.rows(size=50, seed=0)
    for row in rows:
        count.reset(nums=row["nums"], target=row["target"])
        assert count.step(f"<answer>{row['answer']}</answer>") is None, row
    count.reset(nums=[3, 5, 5], target=20)
    said = [count.step(f"<answer> {each} </answer>") for each in ("5*5-3", "5*(5-3)*2", "(5+5)*3", "5/(5-5)+3", "five")]
    assert said == [
        "5*5-3 makes 22, not 20.",
        "5*(5-3)*2 has 2 once; the numbers have it not at all.",
        "(5+5)*3 makes 30, not 20.",
        "5/(5-5)+3 divides by 0.",
        "There is no <answer> with an arithmetic expression.",
    ]

    again = second_try(later=0.25)
    again.reset(row={"question": "", "answer": "1/2"})
    assert [again.step(answer(each)) for each in ("2", "0.5")] == [("That is not right. Try again.", 0.0), (None, 0.25)]
    entry = {"answer": "7", "question": "3+4"}
    at_once = second_try()
    at_once.reset(row={"answer": "7", "task": "chain_sum", "task_args": {}, "entry": entry})
    assert at_once.step("no idea") == ("That is not right. Try again.", 0.0)


TOOLS = ROOT / "configs" / "quickstart-tools"


class Pays:
    """Asks once more, and pays for a second turn that begins with a call."""

    @staticmethod
    def rows(size: int, seed: int) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (TOOLS / "test.jsonl").read_text().splitlines()]
        return rows[seed : seed + size]

    def reset(self, question: str) -> None:
        print("asked", question)
        self.question = question.removeprefix("User: ").removesuffix("\nAssistant:")
        self.num = 0

    def step(self, text: str) -> tuple[str | None, float]:
        self.num += 1
        if self.num == 1:
            return self.question, 0.0
        return None, float(text.strip().startswith("<tool>"))


def run_with_environment(directory: Path, **sections: Any) -> Config:
    settings = yaml.safe_load((ROOT / "configs/quickstart-tools.yaml").read_text())
    settings["model"]["name"] = str(TOOLS / "model")
    settings["data"] = {**settings["data"], "name": None, "eval_name": None}
    settings["environment"] = {
        "rows": {"size": 64},
        "reply_template": "\nUser: {text}\nAssistant:",
        "max_turns": 2,
        "weight": 2.0,
    }
    settings["rollout"] |= {"num_prompts": 4, "group_size": 4, "max_completion_tokens": 112}
    settings |= {"evaluation": {"num_questions": 0}, "preflight": {"num_questions": 0}, "scoring": {"num_workers": 1}}
    settings |= {"tools": {}}
    settings["run"] = {"dir": str(directory), "steps": 3}
    for section, values in sections.items():
        settings[section] |= values
    return Config(**settings)


def test_a_tiny_model_learns_what_its_second_turn_is_paid_for(tmp_path: Path):
    config = run_with_environment(
        tmp_path / "run",
        rollout={"num_prompts": 8, "group_size": 8},
        optimizer={"learning_rate": 1.5e-3},
        run={"steps": 8},
    )
    trainer = Trainer(config, rewards=[Reward(asks_again, weight=0)], environment=Pays)
    metrics = [trainer.train_step() for _ in range(8)]
    trainer.close()
    assert metrics[0]["reward/environment"] < 0.5
    assert sum(row["reward/environment"] for row in metrics[-3:]) / 3 > 0.7
    for row in metrics:
        assert row["reward/mean"] == pytest.approx(2 * row["reward/environment"]), "its weight is 2"
        assert row["policy/sampling_gap_max"] < 1e-3, "float32: also behind what the environment says"
        assert 1 < row["environment/turns"] <= 2
        assert row["environment/ended"] + row["completion/truncated"] == pytest.approx(1)
    assert "tools/calls" not in metrics[0]
    row = next(row for row in read_jsonl(tmp_path / "run/completions.jsonl") if len(row.get("turns", [])) == 3)
    assert [turn["role"] for turn in row["turns"]] == ["assistant", "user", "assistant"]
    assert row["turns"][0]["content"] + row["turns"][2]["content"] == row["completion"]
    assert row["rewards"]["asks_again"] == 1
    assert "asked User: " in (tmp_path / "run/tools.log").read_text()


def asks_again(turns: list[dict[str, str]], environment_reward: float | None) -> float:
    """A reward beside the environment's, which reads what was said; of weight 0 here."""
    assert environment_reward is not None
    return float(any(turn["role"] == "user" for turn in turns))


def test_a_run_with_an_environment_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path):
    halves: dict[str, Any] = {"algorithm": {"kl_coef": 0.001, "num_minibatches": 2}}

    def trainer(name: str) -> Trainer:
        return Trainer(
            run_with_environment(tmp_path / name, **halves, run={"resume": "auto"}),
            rewards=[],
            environment=Pays,
        )

    trainer("whole").train()
    first = trainer("halves")
    own = first._optimizer_step

    def step(minibatch: Any) -> None:
        if first.state.optimizer_steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        own(minibatch)

    first._optimizer_step = step  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.train()
    trainer("halves").train()
    whole, halves = (steps_of(tmp_path / name) for name in ("whole", "halves"))
    assert halves == whole
    assert sum(row["environment/turns"] for row in whole) > 3


def test_grpo_sample_plays_the_environment_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = {
        "model": {"name": str(TINY / "model")},
        "data": {"template": "none", "question_template": "User: {question}\nAssistant:", "max_prompt_tokens": 200},
        "environment": {
            "function": "guess_number",
            "rows": {"high": 20},
            "max_turns": 2,
            "reply_template": "\nUser: {text}\nAssistant:",
        },
        "rewards": [],
        "rollout": {"max_completion_tokens": 64, "stop": ["2", "4"]},
        "run": {"dir": str(tmp_path / "run"), "steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    options = ["--model", str(TINY / "model"), "--config", str(tmp_path / "run.yaml"), "--row", "3", "--group", "4"]
    monkeypatch.setattr(sys, "argv", ["sample", *options, "--temperature", "1", "--json"])
    importlib.import_module("grpo.cli.sample").main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4
    assert all(ASK.format(low=1, high=20) in row["question"] and 1 <= int(row["answer"]) <= 20 for row in rows)
    assert {name for row in rows for name in row["rewards"]} == {"environment"}
    answered = [row for row in rows if "turns" in row]
    assert answered, [row["completion"] for row in rows]
    assert {row["turns"][1]["content"] for row in answered} <= {"Higher.", "Lower.", "Say a number."}


VERIFIERS = """
import random
import verifiers as vf
from verifiers.envs.experimental.gym_env import GymEnv


class Game:
    def reset(self, seed):
        self.number = random.Random(seed).randint(1, 10)
        return "Guess a number from 1 to 10."

    def step(self, action):
        if action == 99:
            raise vf.ToolError("it is out of order")
        right = action == self.number
        return "Higher." if action < self.number else "Lower.", float(right), right, False, {}


class Sandboxed(GymEnv):
    async def setup_state(self, state):
        if state["answer"] == "3":
            raise vf.InfraError("no sandbox is free")
        return await super().setup_state(state)


def load_environment(episodes, rubric=None):
    parse = lambda text: int(text.split()[1])

    def ranks(states) -> list:
        return [0.0 for _ in states]

    own = vf.Rubric(funcs=[ranks]) if rubric == "group" else None
    return Sandboxed(
        Game, action_parser=parse, num_train_episodes=episodes, num_eval_episodes=3, max_episode_steps=4, rubric=own
    )
"""


def test_an_environment_of_verifiers_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their GymEnv around a game. Not in CI, which does not install the package."""
    pytest.importorskip("verifiers")
    (tmp_path / "gym_game.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(tmp_path)
    args = {"env": "gym_game", "args": {"episodes": 5}}
    config = EnvironmentConfig(function="of_verifiers", args=args, rows={"size": 4})
    own = Environment.of(config)
    rows, held_out = own.rows(held_out=False), own.rows(held_out=True)
    assert ([row["answer"] for row in rows], [row["answer"] for row in held_out]) == (["0", "1", "2", "3"], ["4"])
    number = random.Random(1).randint(1, 10)

    def words(read: str, place: int) -> str:
        guess = number if "Higher." in read or "Lower." in read else number % 10 + 1
        return answer((11, guess, 99)[place])

    given = {"num": 3, "row": rows[1], "args": args, "timeout_seconds": 60.0}
    _, (lost, won, wrong), _ = play(words, own.runner.make, **given)
    assert (lost.finish_reason, lost.episode.reward, lost.episode.num_turns) == ("stop", 0.0, 4)
    assert [turn.said for turn in lost.turns[1::2]] == [("Lower.",)] * 3
    assert (won.episode.reward, won.episode.num_turns, won.episode.ended) == (1.0, 2, True)
    assert (wrong.episode.reward, wrong.episode.num_turns, wrong.episode.ended) == (0.0, 1, True), "their error ends it"
    _, (unbegun, *_), _ = play(words, own.runner.make, **given | {"row": rows[3]})
    assert (unbegun.finish_reason, unbegun.episode.num_turns) == ("stop", 1), "it could not begin, and the run goes on"
    assert (unbegun.episode.reward, unbegun.episode.ended) == (None, False), "of which no answer is to blame"
    args = {**args, "args": {"episodes": 5, "rubric": "group"}}
    with pytest.raises(ValueError, match=r"args.env is 'gym_game', whose rubric has rewards of a whole group"):
        Environment.of(EnvironmentConfig(function="of_verifiers", args=args)).rows(held_out=False)


def test_without_the_package_of_verifiers_its_environments_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.delitem(sys.modules, "grpo.tools.environments.verifiers_env", raising=False)
    with pytest.raises(ValueError, match=r"verifiers cannot be imported.*pip install 'verifiers>=0\.3,<0\.4'"):
        Environment.of(EnvironmentConfig(function="of_verifiers"))


def test_the_games_that_the_base_of_quickstart_game_has_read_are_played_by_the_rules_and_its_notes_are_true(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import make_game_base

    games = list(itertools.islice(make_game_base.documents(3), 300))
    with_notes = [text for text in games if ">" in text]
    assert 0.5 < len(with_notes) / len(games) < 0.7, "half are records, and one in five of the others has notes"
    for text in with_notes:
        above, below = 0, 51
        for note, reply in itertools.zip_longest(
            re.findall(r">(\d+) <(\d+): (\d+)", text), re.findall(r"(Higher|Lower)\.", text)
        ):
            noted_above, noted_below, guess = map(int, note)
            assert (noted_above, noted_below) == (above, below)
            assert above < guess < below
            above, below = (guess, below) if reply == "Higher" else (above, guess)
    config = Config.load("quickstart-game")
    text = next(text for text in games if text.startswith("I think"))
    question = guess_number.rows(1, 0, high=config.environment.rows["high"])[0]["question"]
    assert text.startswith((config.data.question_template or "").format(question=question))
    assert (config.environment.reply_template or "").format(text="Lower.") in "".join(games)
    assert max(text.count("Player:") for text in games) == config.environment.max_turns
