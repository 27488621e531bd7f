"""Which completions of a question give the same answer: what a majority vote counts."""

from __future__ import annotations

from .accuracy import Source, candidate_answer
from .verifier.cleaning import clean
from .verifier.equivalence import MAX_CHARS, Gold, is_equivalent, read_gold

NO_ANSWER = -1.0
RIGHT_ANSWER = 0.0


def vote(
    completions: list[str], answer: list[str], *, source: Source = "answer_tag", **_: object
) -> list[float | None]:
    """A number for each completion of one question, the same for equivalent answers.

    Equivalent is what `accuracy` takes for equal, so "1/2" and "0.5" vote together. All right answers are equivalent through the
    gold answer; a wrong one joins the first wrong answer before it that it equals.

    Args:
        completions: of one question.
        answer: its gold answer, once for each.
        source: see `accuracy`.

    Returns:
        0 for the right answer, 1, 2, ... for the others in the order they come up, -1 where there is none to vote with. None for
        all of them if the gold answer cannot be graded.
    """
    gold = read_gold(answer[0])
    if isinstance(gold, str):
        return [None] * len(completions)
    candidates = [candidate_answer(completion, source) for completion in completions]
    wrong: list[_Wrong] = []
    return [NO_ANSWER if each is None else _number(each, gold, wrong) for each in candidates]


class _Wrong:
    """A wrong answer that got a number."""

    def __init__(self, text: str) -> None:
        self.text = _plain(text)
        self.gold = read_gold(text)  # a reason (text) if only the same words can equal it

    def is_met_by(self, candidate: str) -> bool:
        if _plain(candidate) == self.text:
            return True
        return isinstance(self.gold, Gold) and is_equivalent(candidate, self.gold)


def _number(candidate: str, gold: Gold, wrong: list[_Wrong]) -> float:
    if is_equivalent(candidate, gold):
        return RIGHT_ANSWER
    for number, each in enumerate(wrong, 1):
        if each.is_met_by(candidate):
            return float(number)
    wrong.append(_Wrong(candidate))
    return float(len(wrong))


def _plain(text: str) -> str:
    """Without what does not change its value, unless it is too long to be an answer."""
    return clean(text) if len(text) <= 2 * MAX_CHARS else text
