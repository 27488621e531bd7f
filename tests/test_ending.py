"""Where completions end, with the tokenizer of the quickstart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import TINY

from grpo.config import ModelConfig
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.stop_criteria import Ending, token_limit
from grpo.types import Prompt, Sampling

PROMPT = Prompt(row=0, token_ids=[5], text="", prefill="", columns={})


@pytest.fixture(scope="module")
def ending() -> Ending:
    tokenizer = load_tokenizer(ModelConfig(name=str(TINY / "model")))
    return Ending(tokenizer, [tokenizer.eos_token_id, 7])


def tokens_of(ending: Ending, text: str) -> list[int]:
    return ending.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_end_token_ends_a_completion(ending: Ending):
    for end in ending.end_token_ids:
        assert ending.find([20, 30, end, 40, end], ()) == (3, "stop")
    assert ending.find([20, 30], ()) == (2, "length")
    assert ending.find([], ()) == (0, "length")


def test_a_stop_text_ends_it_with_the_token_that_completes_it(ending: Ending):
    answer = tokens_of(ending, "<answer> 4 </answer>")
    found, reason = ending.find([*answer, *tokens_of(ending, "and more </answer>")], ("</answer>", "more"))
    assert reason == "stop"
    assert ending.text(answer[:found]).endswith("</answer>")
    assert "</answer>" not in ending.text(answer[: found - 1])


def test_the_earlier_of_stop_text_and_end_token_counts(ending: Ending):
    text = tokens_of(ending, "a stop b")
    assert ending.find([7, *text], ("stop",)) == (1, "stop")
    assert ending.find([*text, 7], ("stop",))[0] < len(text)
    assert ending.find([*text, 7], ("else",)) == (len(text) + 1, "stop")


def test_a_completion_is_cut_and_its_end_token_is_not_shown(ending: Ending):
    ids = [*tokens_of(ending, "one"), 7, 20]
    completion = ending.completion(
        replace(PROMPT, prefill="<think>"), Sampling(max_tokens=9), ids, [-float(i) for i in range(len(ids))]
    )
    assert completion.token_ids == ids[:-1]
    assert completion.logprobs == [-float(i) for i in range(len(ids) - 1)]
    assert (completion.text, completion.finish_reason) == ("<think>one", "stop")


def test_a_prompts_own_limit_is_the_lower_one(ending: Ending):
    prompt = replace(PROMPT, max_tokens=2)
    assert token_limit(prompt, Sampling(max_tokens=9)) == 2
    assert token_limit(prompt, Sampling(max_tokens=1)) == 1
    assert token_limit(PROMPT, Sampling(max_tokens=9)) == 9
    completion = ending.completion(prompt, Sampling(max_tokens=9), [20, 30, 7], [-1.0, -2.0, -3.0])
    assert (completion.token_ids, completion.finish_reason) == ([20, 30], "length")
