"""A completion is cut into thought, answer, tags and the rest, whole or as it is written."""

import random

import pytest

from grpo.text.thinking import Reader, parts

WHOLE = "<think> 2+3=5 </think> so <answer> 5 </answer>."


def test_a_completion_falls_into_thought_answer_tags_and_the_rest():
    assert parts(WHOLE) == [
        ("tag", "<think>"),
        ("think", " 2+3=5 "),
        ("tag", "</think>"),
        ("text", " so "),
        ("tag", "<answer>"),
        ("answer", " 5 "),
        ("tag", "</answer>"),
        ("text", "."),
    ]


@pytest.mark.parametrize("text", [WHOLE, "no tags, 2 < 3", "<think>cut o", "<answer>7</answ", "<<think>></think>", ""])
def test_a_text_that_arrives_in_pieces_is_cut_like_the_whole(text: str):
    for seed in range(30):
        rng = random.Random(seed)
        reader, found, rest = Reader(), [], text
        while rest:
            size = rng.randint(1, 6)
            found += reader.feed(rest[:size])
            rest = rest[size:]
        found += reader.close()
        assert by_character(found) == by_character(parts(text))


def by_character(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, character) for kind, part in found for character in part]


def test_what_may_become_a_tag_waits_and_nothing_else_does():
    reader = Reader("think")
    assert list(reader.feed("5 < 6 </th")) == [("think", "5 < 6 ")]
    assert list(reader.feed("ree")) == [("think", "</three")]
    assert list(reader.close()) == []


@pytest.mark.parametrize("after", [" 5", " 5 <think> again"])
def test_thoughts_that_begin_in_the_prompt_are_thoughts(after: str):
    assert parts(f"hm</think>{after}")[:3] == [("think", "hm"), ("tag", "</think>"), ("text", after.partition("<")[0])]
