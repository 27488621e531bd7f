"""Tokens and pieces of text as a server's client sees them, wherever they are cut."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from helpers import TINY
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from grpo.config import ModelConfig
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.stop_criteria import Ending
from grpo.serving.text import Answer, Calls, Detokenizer, StopFinder, Thoughts

TEXT = "<think>héllo 🎉🎉 wörld ≤ x²\n漢字</think> <answer> 4 </answer>"


@pytest.fixture(scope="module")
def ending() -> Ending:
    tokenizer = load_tokenizer(ModelConfig(name=str(TINY / "model")))
    return Ending(tokenizer, [tokenizer.eos_token_id])


def cuts(length: int, seed: int) -> list[slice]:
    """A sequence cut into pieces of one to four."""
    rng, places = random.Random(seed), [0]
    while places[-1] < length:
        places.append(min(places[-1] + rng.randint(1, 4), length))
    return [slice(*each) for each in itertools.pairwise(places)]


@pytest.mark.parametrize("seed", range(20))
def test_text_comes_as_it_reads_whole(ending: Ending, seed: int):
    """Of characters of several tokens nothing is shown before the last one; of bytes that are no text all the same."""
    ids = ending.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    rng = random.Random(seed)
    for tokens in (ids, [rng.randrange(5, len(ending.tokenizer)) for _ in range(80)]):
        detokenizer, shown = Detokenizer(ending), ""
        for cut in cuts(len(tokens), seed):
            shown += detokenizer.feed(tokens[cut])
            assert ending.text(tokens).startswith(shown)
        assert shown + detokenizer.close() == ending.text(tokens)
    assert len(shown) > 20  # it does not all come at the end


BYTE_FALLBACK_SEQUENCES = 100


def test_bytes_that_are_tokens_of_their_own_are_read_together():
    """As SentencePiece writes what its vocabulary lacks: one byte that is not finished spoils all bytes before it."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "x", "y", "▁", "▁a"]
    model = BPE(vocab={word: number for number, word in enumerate(words)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ending = Ending(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), [])

    def ids(text: str) -> list[int]:
        return [words.index(each) if each in words else 1 + byte for each in text for byte in each.encode()]

    assert ending.text(ids("x😀😀😀y")) == "x😀😀😀y"
    rng = random.Random(0)
    for seed in range(BYTE_FALLBACK_SEQUENCES):
        tokens = ids("x😀😀😀y" if not seed else "".join(rng.choices("xy😀漢é", k=30)))
        if seed % 2:  # also a byte that is no text, in the middle or at the end
            place = 1 + rng.choice([n for n, token in enumerate(tokens) if token > 256] or [-1])
            tokens[place:place] = [1 + rng.randrange(128, 256)]
        detokenizer, shown = Detokenizer(ending), ""
        for cut in cuts(len(tokens), seed):
            shown += detokenizer.feed(tokens[cut])
            assert ending.text(tokens).startswith(shown)
        assert shown + detokenizer.close() == ending.text(tokens)
        assert seed % 2 or len(shown) == len(ending.text(tokens))  # what is whole is given out before the end
    late = Detokenizer(ending)  # a byte behind a whole character makes both unreadable, when one of them was shown
    assert [late.feed(ids("漢")), late.feed([256])] == ["漢", ""]
    assert (late.feed([*ids("x"), 256])[-1], late.close()) == ("x", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("aab", ("ab",), "a", "ab"),
        ("xabcx", ("abcd", "bc"), "xa", "bc"),
        ("xabcd", ("abcd", "d"), "x", "abcd"),  # both are complete with the same character
        ("never", ("no", "neve!"), "never", None),
        ("all", (), "all", None),
    ],
)
def test_a_stop_text_is_cut_off_wherever_the_pieces_are(
    text: str, stop: tuple[str, ...], expected: str, found: str | None
):
    for seed in range(8):
        finder = StopFinder(stop)
        shown = "".join(finder.feed(text[cut]) for cut in cuts(len(text), seed))
        assert (shown + finder.close(), finder.found) == (expected, found)
        assert finder.feed("more") == ("" if found else "more")


def test_what_may_become_a_stop_text_is_held_back():
    finder = StopFinder(("###",))
    assert [finder.feed(piece) for piece in ("a#", "#", "b", "##", "#c")] == ["a", "", "##b", "", ""]
    assert finder.found == "###"


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>2+3</think> 5", False, "2+3", " 5"),
        ("2+3</think> 5", True, "2+3", " 5"),
        ("well <think>2</think>a<think>b</think>", False, "2", "well a<think>b</think>"),
        ("no thought < 5", False, "", "no thought < 5"),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<think></think>x", False, "", "x"),
        ("5</think>x", False, "", "5</think>x"),
        (" \n<think>2</think> 5", False, "2", " 5"),
        ("  5 <thin", False, "", "  5 <thin"),
        ("  ", False, "", "  "),
    ],
)
def test_thoughts_are_told_from_answers_wherever_the_pieces_are(text: str, opened: bool, reasoning: str, content: str):
    for seed in range(8):
        thoughts = Thoughts(opened)
        parts = [part for cut in cuts(len(text), seed) for part in thoughts.feed(text[cut])] + thoughts.close()
        assert "".join(words for kind, words in parts if kind == "reasoning") == reasoning
        assert "".join(words for kind, words in parts if kind == "content") == content


def test_an_answer_has_the_tokens_to_its_end(ending: Ending):
    ids = ending.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for seed in range(8):
        answer = Answer(ending, (" 4 ",), thinks=False)
        parts = [part for cut in cuts(len(ids), seed) for part in answer.feed(ids[cut], has_ended=False)]
        assert answer.finish_reason == "stop"
        assert answer.tokens == ids[: ending.find(ids, (" 4 ",))[0]]
        assert "".join(words for kind, words in parts if kind == "content") == " <answer>"
    end = ending.end_token_ids[0]
    answer = Answer(ending)
    assert answer.feed([*ids, end], has_ended=True) == [("content", TEXT)]
    assert (answer.finish_reason, answer.tokens[-1]) == ("stop", end)
    answer = Answer(ending)
    assert answer.feed(ids, has_ended=True) == [("content", TEXT)]
    assert answer.finish_reason == "length"


CALLED = (
    'I <look>.\n\n<tool_call>\n{"name": "f", "arguments": {"x": "é<"}}\n</tool_call>\n<tool_call> f(1) </tool_call> and \n'
    '<tool_call>{"name": "g", "arguments": "{}"}</tool_call> \n so <tool_call>{"name": "h"'
)


@pytest.mark.parametrize("seed", range(10))
def test_calls_are_taken_out_of_an_answer_wherever_it_is_cut(seed: int):
    def read(text: str, most: int | None = None, begun: str = "") -> tuple[str, list[tuple[str, str]]]:
        calls, parts = Calls(("<tool_call>", "</tool_call>"), most, begun), []
        for cut in cuts(len(text), seed):
            parts += calls.feed(text[cut])
        parts += calls.close()
        made = [json.loads(text) for part, text in parts if part == "call"]
        assert [each["index"] for each in made] == list(range(len(made)))
        assert len({each["id"] for each in made}) == len(made)
        content = "".join(text for part, text in parts if part == "content")
        return content, [(each["function"]["name"], each["function"]["arguments"]) for each in made]

    f, g = ("f", '{"x": "é<"}'), ("g", "{}")
    assert read(CALLED) == ('I <look>.<tool_call> f(1) </tool_call> andso <tool_call>{"name": "h"', [f, g])
    assert read(CALLED, most=1) == ("I <look>.", [f])
    assert read(" none \n") == (" none \n", []), "without a call it is what it was"
    assert read('{"x": 1}}</tool_call>', begun='<tool_call>\n{"name": "f", "arguments": ') == ("", [("f", '{"x": 1}')])
    assert read("1", begun="<tool_call>\n") == ("<tool_call>\n1", []), "forced to call, it has not"
    half = '<tool_call>{"name": "f\\ud800", "arguments": {"x": "\\udfff"}}</tool_call>'
    assert read(half) == ("", [("f?", '{"x": "?"}')]), "half a surrogate pair is no text"
    for wrong in ('{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": 1e999}}', '{"name": ""}'):
        assert read(f"<tool_call>{wrong}</tool_call>") == (f"<tool_call>{wrong}</tool_call>", []), "no call of JSON"
    tag = '<tool_call>{"name": "f", "arguments": {"x": "a </tool_call> \\"</tool_call>"}}</tool_call>'
    assert read(f"{tag} so") == ("so", [("f", '{"x": "a </tool_call> \\"</tool_call>"}')]), (
        "a tag within a string ends none"
    )
    assert read(f'<tool_call>{{"name": "f</tool_call>{tag}') == (
        '<tool_call>{"name": "f</tool_call>',
        [("f", '{"x": "a </tool_call> \\"</tool_call>"}')],
    ), "a quote that was forgotten takes in no other call"
