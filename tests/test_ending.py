"""Where completions end, with the tokenizer of the quickstart."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from helpers import TINY
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

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


@pytest.mark.parametrize("stop", [("</answer>",), ("é",), ("\n\n", "😀!"), ("er",), ("Wait, ",)])
def test_a_stop_text_is_found_where_reading_each_beginning_would_find_it(ending: Ending, stop: tuple[str, ...]):
    rng = random.Random(0)
    whole = [tokens_of(ending, text) for text in stop]
    found = 0
    for _ in range(60):
        tokens = [rng.randrange(20, 400) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.6:
            tokens += [*rng.choice(whole), *(rng.randrange(20, 400) for _ in range(rng.randrange(4)))]
        first = next((n for n in range(1, len(tokens) + 1) if ending.has_stop(tokens[:n], stop)), None)
        assert ending.find(tokens, stop) == ((len(tokens), "length") if first is None else (first, "stop"))
        watch = ending.watch(stop)
        seen = next((n for n in range(1, len(tokens) + 1) if watch.has_seen(tokens[:n], 1)), None)
        assert seen == first
        found += first is not None
    assert found > 20


def test_tokens_that_complete_no_stop_text_are_not_read_again(ending: Ending, monkeypatch: pytest.MonkeyPatch):
    answer = tokens_of(ending, "she has 4 + 7 = 11 of them")
    watch = ending.watch(("</answer>",))
    assert not watch.has_seen(answer, len(answer))
    monkeypatch.setattr(Ending, "text", lambda *_: pytest.fail("a text was made of tokens that are known"))
    assert not watch.has_seen([*answer, *answer], 2 * len(answer))
    assert ending.watch(("</answer>",)) is watch, "what was learned of tokens is kept for the next call"


def test_bytes_that_a_broken_character_takes_in_complete_no_stop_text():
    """As Llama 2's tokenizer reads them: the line breaks alone are a stop text, behind half a character they are parts of it."""
    vocabulary = {"a": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    plain = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    plain.decoder = Sequence([ByteFallback(), Fuse()])
    ending = Ending(PreTrainedTokenizerFast(tokenizer_object=plain), [])
    broken = [0, vocabulary["<0xE2>"], *[vocabulary["<0x0A>"]] * 4]
    assert ending.has_stop(broken[-3:], ("\n\n",))
    assert ending.find(broken, ("\n\n",)) == (len(broken), "length")
    assert not ending.watch(("\n\n",)).has_seen(broken, 1)
    assert ending.watch(("\n\n",)).has_seen([0, *broken[-2:]], 1)
