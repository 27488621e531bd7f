"""How readable a text is, on texts made by hand: languages, loops, paragraphs, code, formulas, broken characters."""

import time

import pytest

from grpo.text.readable import (
    broken_characters,
    code_blocks,
    foreign_words,
    language_share,
    longest_paragraph,
    loop_share,
    mixed_words,
    num_words,
    thought,
)

ENGLISH = "How many coins are left?"
CHINESE = "还剩多少枚硬币？"


def test_a_loop_is_what_stands_three_times():
    assert loop_share("a b a b a b c", size=2) == pytest.approx(6 / 7)
    assert loop_share("a b a b c", size=2) == 0.0  # twice
    assert loop_share("a b a b c", size=2, times=2) == pytest.approx(4 / 5)
    assert loop_share("", size=2) == 0.0


def test_working_a_sum_out_again_is_no_loop_and_saying_wait_for_ever_is_one():
    sum_ = "12 + 8 = 20, and 20 + 5 is 25. "
    assert loop_share(f"{sum_}Wait, let me check. {sum_}So it is 25.") == 0.0
    assert loop_share(sum_ * 3) == 1.0
    healthy = (
        "First, add the coins that Finn has to those that he finds. Then take away what he sells, which leaves 16. "
    )
    stuck = healthy + "Wait, let me think about this once more. " * 20
    assert loop_share(stuck) == pytest.approx(180 / (num_words_and_signs(healthy) + 200), abs=0.1)
    assert loop_share("等一下，让我再检查一遍。" * 3) == 1.0  # no spaces between its words


def num_words_and_signs(text: str) -> int:
    return len(text.replace(",", " ,").replace(".", " .").split())


def test_the_language_is_the_questions_and_code_and_formulas_have_none():
    assert language_share("There are nine left.", ENGLISH) == 1.0
    assert language_share("Nine coins. 检查", ENGLISH) == pytest.approx(2 / 4)  # a Chinese character is a word
    assert language_share("还剩九枚。", CHINESE) == 1.0
    assert language_share("还剩九枚 coins.", CHINESE) == pytest.approx(4 / 5)
    assert language_share("$x_{硬币} = 9$ and `硬币 = 9`, so nine.", ENGLISH) == 1.0
    assert language_share("14 + 5 = 19", ENGLISH) is None
    assert language_share("```\nвсего = 9\n```", ENGLISH) is None


def test_words_of_another_script_are_named_unless_the_question_has_them():
    assert foreign_words("Wait, 检查一下: nine. 对", ENGLISH) == ["检查一下", "对"]
    assert foreign_words("The word 你好 means hello.", "What does 你好 mean?") == []
    assert foreign_words("Да, девять coins", ENGLISH) == ["Да", "девять"]
    assert foreign_words(r"Let \(\alpha = 2\) and π = 3, so $α$ fits.", ENGLISH) == []
    assert foreign_words("```python\nprint('检查')\n```\nNine.", ENGLISH) == []


def test_latin_terms_belong_to_chinese_text_and_a_clause_does_not():
    assert foreign_words("用Python写，再用 Google Chrome 看。", CHINESE) == []
    assert foreign_words("所以 the answer is nine 枚。", CHINESE) == ["the", "answer", "is", "nine"]
    assert foreign_words("设 sin 和 cos 相等，则 tan 为一。", CHINESE) == []  # single terms, with Chinese between


def test_a_word_of_two_alphabets_is_found_and_units_and_particles_are_not():
    assert mixed_words("Let us сheck the раper.") == ["сheck", "раper"]  # Cyrillic с, and ра
    assert mixed_words("Δt is 3 μm, naïve Straße") == []
    assert mixed_words("用Python写 Python을 배워요") == []


def test_thoughts_end_where_the_tag_says():
    assert thought(" <think>9+5=14</think> <answer>14</answer>") == "9+5=14"
    assert thought("9+5=14</think> 14") == "9+5=14"  # opened in the prompt
    assert thought("<think></think>14") == ""
    assert thought("The answer is 14.") is None


def test_paragraphs_end_at_lines_formulas_and_code():
    assert longest_paragraph("one two three\n\nfour five") == 3
    assert longest_paragraph("one two\n\\[ x + y = z + 1 + 2 \\]\nthree") == 2
    assert longest_paragraph("one two $$a b c d e$$ three four five") == 3
    assert longest_paragraph("one\n```python\na b c d e f\n```\ntwo three") == 2
    assert longest_paragraph("\\begin{align}\na &= b c d\n\\end{align}") == 0
    assert num_words("还剩9枚 coins, ok?") == 6  # 还 剩 9 枚 coins ok
    assert longest_paragraph("") == 0


def test_texts_that_never_end_what_they_begin_cost_little():
    began = time.perf_counter()
    for part in ("\\[ x ", "$$ x", "\\begin{align} x ", "```\n", "a b "):
        longest_paragraph(part * 20_000)
        code_blocks(part * 20_000)
        loop_share(part * 20_000)
    assert time.perf_counter() - began < 15  # seconds; a scan that starts anew at each of them takes minutes


def test_code_blocks_are_fenced_and_may_be_open():
    assert code_blocks("Use `x` here.") == 0
    assert code_blocks("Try:\n```python\nx = 1\n```\nand\n~~~\ny\n~~~\n") == 2
    assert code_blocks("Try:\n```python\nx = 1") == 1
    assert code_blocks("````\n```\n````") == 1  # a fence within a longer one


def test_broken_text_is_found():
    assert broken_characters("fine\n\ttext — 检查 ∑ 🙂 π") == []
    assert broken_characters("half \ufffd, bell \x07, turned \u202e") == ["\ufffd", "\x07", "\u202e"]
    assert broken_characters("so<|im_end|> 5", ["<|im_end|>", "<|pad|>"]) == ["<|im_end|>"]
