"""Which sampled rows are kept. Pure functions of rows: no model, no files.

DeepSeek-R1 (arXiv 2501.12948v1, 2.3.3) keeps right answers in one language without long paragraphs and code blocks, and its cold
start (v2) drops repetition as well. Its thresholds are not published: those here are ours, each an option of `grpo reject`.

A row is dropped by the first rule in this order that it breaks:

    unknown           a required reward can't tell
    wrong             a required reward is below its least value
    unfinished        it was cut off at the limit of tokens, or its text is empty
    broken            characters that no reader should see, or tokens of the tokenizer's own
    no_thought        its thought has too few words, an empty <think></think> above all
    language          too small a share of its words is in the question's language
    mixed_scripts     words of another script, or of two alphabets
    repetition        too much of it lies in a loop
    long_paragraph    a paragraph has too many words
    code_in_thought   the thought has code blocks
    untagged          with --tags: its answer is not the content of one box, or it has tags already
    pass_rate         its question is answered right too rarely or too often
    duplicate         another row of the question has the same text
    surplus           the question has enough rows already
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.text import readable

ROUNDING = 1e-9
"""A reward may add up parts of 1 in floating point; as in scoring/answers.py."""

Choice = Literal["first", "shortest", "longest"]


@dataclass(frozen=True)
class Rules:
    """Thresholds. The defaults let a healthy English or Chinese solution pass; see docs/rejection.md."""

    require: Mapping[str, float] = field(default_factory=dict)
    """Least value of each reward that a right row has; empty: 1 of the reward that says what is right."""
    min_thought_words: int = 1
    """Words of the thought, where tags tell it from the answer."""
    min_language: float = 0.9
    """Share of the words that are in the script of the question. A row without words passes."""
    max_foreign_words: int = 0
    """Words of another script that the question does not have, and words of two alphabets."""
    loop_size: int = 8
    """Words and signs of a run that should not come again and again."""
    loop_times: int = 3
    """From so many times on it is a loop."""
    max_loop: float = 0.2
    """Share of the text that may lie in loops."""
    max_paragraph_words: int = 300
    """Words of a paragraph."""
    max_thought_code: int = 0
    """Code blocks of the thought."""
    pass_rate: tuple[float, float] = (0.0, 1.0)
    """Least and largest share of right answers of a question, both included."""
    per_question: int = 4
    """Rows that a question may have."""
    choose: Choice = "first"
    """Which of them: `first` in the order of sampling, which is as good as at random and shifts no length; or by tokens."""

    def __post_init__(self) -> None:
        """Raises ValueError: a threshold that nothing or everything passes."""
        for name, least in (("min_thought_words", 0), ("max_foreign_words", 0), ("max_thought_code", 0)):
            _check(name, getattr(self, name), getattr(self, name) >= least, f"it is at least {least}")
        for name, least in (("loop_size", 1), ("loop_times", 2), ("max_paragraph_words", 1), ("per_question", 1)):
            _check(name, getattr(self, name), getattr(self, name) >= least, f"it is at least {least}")
        for name in ("min_language", "max_loop"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "it is a share, 0 to 1")
        low, high = self.pass_rate
        _check("pass_rate", f"{low} {high}", 0 <= low <= high <= 1, "two shares, the smaller one first")

    def required(self, names: Sequence[str], verdicts: Sequence[str]) -> Required:
        """What makes a row right.

        Args:
            names: of the rewards there are.
            verdicts: those that say what is right.

        Raises:
            ValueError: a required reward is not there.
        """
        for name in self.require:
            if name not in names:
                raise ValueError(f"--require names {name!r}; the rewards are {', '.join(names)}. Correct the name.")
        if self.require:
            return Required(self.require)
        return Required(dict.fromkeys(verdicts, 1.0), by_row=len(verdicts) > 1)


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; {rule}. Correct it.")


@dataclass(frozen=True)
class Fall:
    """A rule that a row breaks, and how."""

    rule: str
    detail: str


OPTIONS = {
    "unknown": "--require",
    "wrong": "--require",
    "unfinished": "",
    "broken": "",
    "no_thought": "--min-thought-words",
    "language": "--min-language",
    "mixed_scripts": "--max-foreign-words",
    "repetition": "--max-loop",
    "long_paragraph": "--max-paragraph-words",
    "code_in_thought": "--max-thought-code",
    "untagged": "--tags",
    "pass_rate": "--pass-rate",
    "duplicate": "",
    "surplus": "--per-question",
    "answer_lost": "",
    "rewrite_unreadable": "",
}
"""Every rule in its order, with the option that has its threshold. The last two are those of rewriting: see rewriting.py."""


@dataclass(frozen=True)
class Required:
    """What makes a row right: the least value of each of these rewards.

    Args:
        by_row: each of them judges questions of its own kind; a row's `right` says what the one that judged it said.
    """

    least: Mapping[str, float]
    by_row: bool = False


def is_right(row: Mapping[str, Any], required: Required) -> bool | None:
    """Whether every required reward reaches its least value; None if one can't tell and none is below."""
    if required.by_row:
        right: bool | None = row["right"]
        return right
    values = [(row["rewards"][name], least) for name, least in required.least.items()]
    if any(value is not None and value < least - ROUNDING for value, least in values):
        return False
    return None if any(value is None for value, _ in values) else True


def pass_rate(rows: Sequence[Mapping[str, Any]], required: Required) -> float | None:
    """Share of right ones among the rows of a question whose verdict is known; None if there is none."""
    known = [right for row in rows if (right := is_right(row, required)) is not None]
    return sum(known) / len(known) if known else None


def falls_of_text(text: str, question: str, rules: Rules, special_tokens: Sequence[str] = ()) -> list[Fall]:
    """What a completion's text breaks, in the order of the rules."""
    falls = []
    if not text.strip():
        falls.append(Fall("unfinished", "it is empty"))
    if broken := readable.broken_characters(text, special_tokens):
        falls.append(Fall("broken", _named(map(ascii, broken))))
    thought = readable.thought(text)
    if thought is not None and (num := readable.num_words(thought)) < rules.min_thought_words:
        falls.append(Fall("no_thought", f"{num} words"))
    share = readable.language_share(text, question)
    if share is not None and share < rules.min_language:
        falls.append(Fall("language", f"{share:.0%} of the words in the question's script"))
    foreign = readable.foreign_words(text, question) + readable.mixed_words(text)
    if len(foreign) > rules.max_foreign_words:
        falls.append(Fall("mixed_scripts", _named(foreign)))
    loop = readable.loop_share(text, size=rules.loop_size, times=rules.loop_times)
    if loop > rules.max_loop:
        falls.append(Fall("repetition", f"{loop:.0%} in loops"))
    if (longest := readable.longest_paragraph(text)) > rules.max_paragraph_words:
        falls.append(Fall("long_paragraph", f"{longest} words"))
    if thought is not None and (num := readable.code_blocks(thought)) > rules.max_thought_code:
        falls.append(Fall("code_in_thought", f"{num} blocks"))
    return falls


def _named(words: Any, most: int = 5) -> str:
    words = list(words)
    return ", ".join(words[:most]) + f" and {len(words) - most} more" * (len(words) > most)


def falls_of_row(
    row: Mapping[str, Any],
    question: str,
    rules: Rules,
    required: Required,
    special_tokens: Sequence[str] = (),
) -> list[Fall]:
    """The same of a sampled row, with its rewards and how it ended."""
    falls = []
    rewards, right = row["rewards"], is_right(row, required)
    if right is None:
        falls.append(Fall("unknown", _named(name for name in required.least if rewards[name] is None)))
    if right is False:
        below = (
            f"{name} {value:g}"
            for name, least in required.least.items()
            if (value := rewards[name]) is not None and value < least - ROUNDING
        )
        falls.append(Fall("wrong", _named(below)))
    if row["finish_reason"] != "stop":
        falls.append(Fall("unfinished", f"cut off after {row['num_tokens']} tokens"))
    falls += falls_of_text(row["completion"], question, rules, special_tokens)
    return falls + ([Fall("untagged", row["untagged"])] if "untagged" in row else [])


def judge(
    rows: Sequence[Mapping[str, Any]],
    question: str,
    rules: Rules,
    required: Required,
    special_tokens: Sequence[str] = (),
) -> list[list[Fall]]:
    """Of each of a question's rows what it breaks; those with nothing are kept.

    Args:
        rows: all samples of the question, with `sample`, `completion`, `rewards`, `finish_reason` and `num_tokens`.
    """
    falls = [falls_of_row(row, question, rules, required, special_tokens) for row in rows]
    rate = pass_rate(rows, required)
    low, high = rules.pass_rate
    if rate is not None and not low <= rate <= high:
        for each in falls:
            each.append(Fall("pass_rate", f"{rate:g}"))
    texts: set[str] = set()
    num_kept = 0
    for number in sorted(range(len(rows)), key=lambda n: _place(rows[n], rules.choose)):
        text = rows[number]["completion"].strip()
        if falls[number]:
            continue
        if text in texts:
            falls[number].append(Fall("duplicate", "the same text as another sample"))
        elif num_kept >= rules.per_question:
            falls[number].append(Fall("surplus", f"{num_kept} are kept"))
        else:
            texts.add(text)
            num_kept += 1
    return falls


def _place(row: Mapping[str, Any], choose: Choice) -> tuple[int, int]:
    """Rows of a question are looked at in the order of this."""
    length = {"first": 0, "shortest": row["num_tokens"], "longest": -row["num_tokens"]}[choose]
    return length, row["sample"]
