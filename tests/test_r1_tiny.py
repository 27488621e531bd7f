"""The models of configs/r1-tiny, and the habits that they are made to have."""

from __future__ import annotations

import random
import sys

import pytest
from helpers import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.text.language import consistency

FOLDER = ROOT / "configs" / "r1-tiny"


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_r1_tiny

    yield make_r1_tiny
    for name in ("make_r1_tiny", "make_tiny_base"):
        sys.modules.pop(name, None)


def test_a_check_in_chinese_is_right_and_one_in_english_slips(generator):
    rng = random.Random(0)
    chinese, english = [], []
    for _ in range(3000):
        problem = generator.base.draw_problem(rng)
        thought, answer = generator.think_again(rng, problem)
        is_chinese = generator.HAN.search(thought) is not None
        (chinese if is_chinese else english).append((answer == problem.answer, len(problem.changes)))
        own = consistency(thought, problem.question)
        assert own is not None  # there are words, whatever the language
        assert (own < 1) == is_chinese
        assert ("Wait" in thought) != is_chinese
    assert len(chinese) / 3000 == pytest.approx(0.5, abs=0.03)
    assert all(right for right, _ in chinese)
    slips = [1 - (1 - generator.SLIP) ** num for _, num in english]  # a later one hardly ever makes up for it
    wrong = sum(not right for right, _ in english) / len(english)
    assert wrong == pytest.approx(sum(slips) / len(slips), abs=0.025)


def test_the_corpus_is_half_worked_problems_and_has_no_question_of_the_test_set(generator):
    _, test = generator.base.draw_sets(0)
    questions = {problem.question for problem in test}
    texts = generator.base.take(generator.documents(1, unless=questions), 3000)
    assert sum(text.startswith("Problem: ") for text in texts) / 3000 == pytest.approx(0.5, abs=0.03)
    dialogues = [text for text in texts if text.startswith("User: ")]
    assert sum(generator.HAN.search(text) is not None for text in dialogues) / len(dialogues) == pytest.approx(
        0.08, abs=0.015
    )
    asked = {text.partition(": ")[2].partition("\n")[0] for text in texts}
    assert not asked & questions


def test_base_and_student_are_shipped_with_one_vocabulary_and_one_chat_template(generator):
    tokenizers = [AutoTokenizer.from_pretrained(FOLDER / name) for name in ("base", "student")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert [len(tokenizers[0].tokenize(word)) for word in generator.WORDS] == [1] * len(generator.WORDS)
    text = "User: What is 1+2?\nAssistant: <think> I guess 4.\n等等，检查。\n1+2=3\n</think> <answer> 3 </answer>"
    assert tokenizers[0].decode(tokenizers[0](text)["input_ids"]) == text
    sizes = []
    for name, tokenizer in zip(("base", "student"), tokenizers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
        assert model.config.vocab_size == len(tokenizer)
        sizes.append(model.num_parameters())
    assert sizes[1] < 0.25 * sizes[0]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 4e6
