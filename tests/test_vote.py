"""Which completions vote together, and where an answer is looked for when no form was asked for."""

from grpo.rewards.accuracy import accuracy
from grpo.rewards.vote import vote


def tagged(*answers: str) -> list[str]:
    return [f"<answer>{answer}</answer>" for answer in answers]


def votes(*answers: str, gold: str) -> list[float | None]:
    return vote(tagged(*answers), [gold] * len(answers))


def test_equivalent_answers_vote_together_whatever_they_look_like():
    assert votes("7", "0.5", r"\frac{1}{2}", "7.0", "1/2", gold="18") == [1, 2, 2, 1, 2]
    assert votes("18", "$18", "17", "18.00", "17", gold="18") == [0, 0, 1, 0, 1]
    assert votes("2\\sqrt{3}", "\\sqrt{12}", "x+1", "1+x", gold="18") == [1, 1, 2, 2]


def test_right_answers_vote_together_through_the_gold_answer():
    assert votes("20", "0.2", "20\\%", gold="20\\%") == [0, 0, 0]  # apart they would be 20 and 0.2


def test_who_has_no_answer_has_no_vote():
    assert vote(["nothing here", "<answer>5</answer>"], ["5", "5"]) == [-1, 0]


def test_a_gold_answer_that_cannot_be_graded_leaves_the_vote_unknown():
    assert vote(tagged("1", "2"), ["", ""]) == [None, None]


def test_words_and_texts_no_parser_reads_vote_by_what_they_say():
    assert votes("Tuesday", "tuesday", "}{", "}{", gold="Friday") == [1, 1, 2, 2]
    assert votes("9" * 2000, "9" * 2000, "8", gold="1") == [1, 1, 2]


def test_an_answer_is_found_anywhere_but_the_tag_comes_first_and_the_number_last():
    def right(completion: str) -> float | None:
        return accuracy(completion, "5", source="anywhere")

    assert right(r"\boxed{3} <answer>5</answer> or 4") == 1
    assert right(r"so it is \boxed{5}, after 3 steps") == 1
    assert right("3 + 2 makes 5 apples") == 1
    assert right(r"<answer>nothing</answer> \boxed{5}") == 0
    assert right(r"\boxed{4} 5") == 0
    assert right("nothing") == 0
