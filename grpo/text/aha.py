"""How often completions doubt, check and start over: the paper's measures of the "aha moment", and language mixing.

DeepSeek-R1 (arXiv 2501.12948v2, appendix C.2) counts ten reflective words in the responses of R1-Zero over training; Gandhi et
al. 2025 (arXiv 2503.01307) name verification, backtracking and sub-goals as the behaviours that let a model improve itself. Both
are counted by words here. Where this departs from the paper:

- The paper gives raw counts. Longer text has more words, so each count comes per 1,000 tokens as well, and as the share of
  completions with any.
- Right and wrong completions are also counted apart, without those that were cut off, which would make the wrong ones longer.
- A word that the question has too is not counted: a bill is a "check", and a pupil gets three answers "wrong".

A word is no proof of what it says. Base models reflect before any training, DeepSeek-V3-Base too (Liu et al. 2025, arXiv
2503.20783), reflection need not lead to the right answer, and "but" is mostly just a conjunction: read the excerpts, and compare
with step 1, which the untrained model sampled.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

PAPER_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""As published. Like all plain words they stand for themselves alone: "verified", "errors" and "paycheck" are not counted."""


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",\n", ", ").split(", "))


WORD_LISTS: dict[str, tuple[str, ...]] = {
    "reflection": PAPER_WORDS,
    "verification": _list("""verif*, check, checked, checking, recheck*, double check*, sanity check, make sure, confirm,
confirms, confirming, reexamin*, re examin*, reevaluat*, re evaluat*, substitute back, plug back,
验证, 检查, 核实, 检验, 验算"""),
    "backtracking": _list("""wait, hold on, hmm, oops, no actually, retry, try again, try another, try a different, let me try,
let's try, start over, go back, think again, rethink*, reconsider*, recalculat*, alternatively, another approach, another way,
different approach, on second thought, not correct, not right, is incorrect, is wrong, was wrong, made a mistake, made an error,
my mistake, misunderstanding, that can't be, that cannot be, doesn't work, does not work,
等一下, 稍等, 不对, 错了, 重新, 换一种, 再试"""),
    "subgoals": _list("""step by step, break it down, break this down, break down the problem, first we, first i, first let's,
let's first, let's start, need to find, need to calculate, need to determine, our goal, the goal is, next step, next we, step 1,
step 2, step 3, step 4, step 5, 首先, 第一步, 第二步, 接下来, 下一步, 需要先"""),
}
"""The lists that every run counts. The last three are ours, with what keyword studies use (oat-zero: recheck, rethink, try
again, check again, reevaluate, re-examine). An occurrence counts once in each list that has it; lists are never added up."""


class Words:
    """Word lists, made ready for counting.

    Case does not matter. A word or phrase is matched whole; a space in it stands for any white space, hyphens or commas, and `*`
    at its end for any ending ("verif*": verified, verification). A Chinese one is found anywhere, as there is no space around
    words. Of two in one list that overlap, the earlier and then the longer one counts ("double check", not "check" once more).
    """

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        self.lists = {name: tuple(words) for name, words in lists.items()}
        every = {word for words in lists.values() for word in words}
        self._latin = re.compile(rf"\b(?=({_alternatives(_latin(every), by_initial=True)})\b)", re.ASCII)
        self._chinese = re.compile(f"(?=({_alternatives(_chinese(every))}))")
        self._each = {name: re.compile(pattern_source(words), re.ASCII) for name, words in lists.items()}
        self._known: dict[
            str, list[tuple[str, int]]
        ] = {}  # by matched text: the lists that have it, and how much of it

    def find(self, text: str, question: str = "") -> dict[str, list[tuple[int, int]]]:
        """Where each list's words begin and end in the text, in order, without those that are in the question."""
        text, question = _fold(text), _fold(question)
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in self.lists}
        matches = [*self._latin.finditer(text)]
        if not text.isascii():
            matches = sorted([*matches, *self._chinese.finditer(text)], key=lambda match: match.start())
        for match in matches:
            for name, length in self._lists_with(match[1]):
                start, end = match.start(), match.start() + length
                spans = found[name]
                if (not spans or start >= spans[-1][1]) and not _has(question, text[start:end]):
                    spans.append((start, end))
        return found

    def _lists_with(self, matched: str) -> list[tuple[str, int]]:
        """One pass finds the longest word of any list at a place; those of other lists there are what it begins with."""
        if matched not in self._known:
            starts = ((name, pattern.match(matched)) for name, pattern in self._each.items())
            self._known[matched] = [(name, match.end()) for name, match in starts if match]
        return self._known[matched]


def with_own(lists: Mapping[str, Sequence[str]]) -> Words:
    """The built-in lists and a user's, of which one of the same name takes a built-in one's place."""
    return Words({**WORD_LISTS, **lists}) if lists else _built_in()


@cache
def _built_in() -> Words:
    return Words(WORD_LISTS)


def pattern_source(words: Iterable[str]) -> str:
    r"""A regular expression for the words, for Python's `re` (IGNORECASE | ASCII) and JavaScript's RegExp (flags `gi`) alike.

    It knows nothing of the question, so it also finds what only repeats it.
    """
    words = list(words)
    latin, chinese = _alternatives(_latin(words)), _alternatives(_chinese(words))
    return "|".join([rf"\b(?:{latin})\b"] * bool(_latin(words)) + [chinese] * bool(_chinese(words)))


def _alternatives(words: Iterable[str], *, by_initial: bool = False) -> str:
    """The longest first. `by_initial` groups them, which halves the time; a pattern without words matches nothing."""
    sources = [_source(word) for word in sorted(words, key=lambda word: (-len(word), word))]
    if not sources:
        return "(?!)"
    if not by_initial:
        return "|".join(sources)
    groups: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        groups[source[0]].append(source[1:])
    return "|".join(f"{initial}(?:{'|'.join(rest)})" for initial, rest in groups.items())


def _source(word: str) -> str:
    parts = (re.escape(part).replace("'", "['’]") for part in word.lower().removesuffix("*").split())
    return r"[\s,-]+".join(parts) + r"\w*" * word.endswith("*")


def _latin(words: Iterable[str]) -> list[str]:
    return [word for word in words if word.isascii()]


def _chinese(words: Iterable[str]) -> list[str]:
    return [word for word in words if not word.isascii()]


def check_lists(setting: str, lists: Mapping[str, Sequence[str]]) -> None:
    """Raises:
    ValueError: a name that cannot be part of a metric's, a list without words, or a word that cannot be found.
    """
    for name, words in lists.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*", name):
            raise ValueError(
                f"{setting} has a list {name!r}; its metrics are named aha/<list>_share and so on, so a name has lower-case "
                "letters and digits only. Rename it."
            )
        if name == "eval":
            raise ValueError(f"{setting} has a list {name!r}; aha/eval_... are the metrics of evaluations. Rename it.")
        if not words:
            raise ValueError(f"{setting}.{name} is empty; there is nothing to count. Give it words, or remove it.")
        for word in words:
            if not re.fullmatch(r"[a-z0-9]([a-z0-9' -]*[a-z0-9])?\*?|[^\x00-\x7f]+", word):
                raise ValueError(
                    f"{setting}.{name} has {word!r}; a word or phrase is lower-case letters, digits, spaces, hyphens and "
                    "apostrophes, with * at its end for any ending, or is Chinese without spaces. Correct it."
                )


def _fold(text: str) -> str:
    """Lower case, at the same places: the one character whose lower case is two is taken for an I."""
    return text.replace("İ", "I").lower()


def _has(question: str, word: str) -> bool:
    """Whether the word, or the Chinese word, is in the question as one of its own."""
    if word not in question:
        return False
    return not word.isascii() or re.search(rf"\b{re.escape(word)}\b", question, re.ASCII) is not None


# ---- counting --------------------------------------------------------------------------------------------------------


def tally(
    rows: Sequence[Mapping[str, Any]], verdicts: Sequence[bool | None], words: Words
) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each metric over `completion_rows` and their verdicts; metrics.py has the formulas.

    They add up over processes. A completion that was cut off is neither right nor wrong here, whatever its verdict, nor is one
    without a verdict.
    """
    sums: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for row, verdict in zip(rows, verdicts, strict=True):
        text, question, num_tokens = row["completion"], row["question"], row["num_tokens"]
        kind = _kind(row, verdict)
        for name, spans in words.find(text, question).items():
            sums[f"aha/{name}"] += len(spans)
            sizes[f"aha/{name}"] += 1
            for suffix in ("", kind) if kind else ("",):
                sums[f"aha/{name}_per_1k{suffix}"] += 1000 * len(spans)
                sizes[f"aha/{name}_per_1k{suffix}"] += num_tokens
                sums[f"aha/{name}_share{suffix}"] += bool(spans)
                sizes[f"aha/{name}_share{suffix}"] += 1
        if kind in ("_right", "_wrong"):
            sums[f"completion/length{kind}"] += num_tokens
            sizes[f"completion/length{kind}"] += 1
        if (share := other_script(text, question)) is not None:
            sums["completion/other_script"] += share
            sizes["completion/other_script"] += 1
    return {name: (sums[name], sizes[name]) for name in sums}


def _kind(row: Mapping[str, Any], verdict: bool | None) -> str:
    if row["finish_reason"] == "length":
        return "_truncated"
    return "" if verdict is None else "_right" if verdict else "_wrong"


def values(tallied: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The metrics of a tally; a share of nothing is left out."""
    return {name: total / size for name, (total, size) in tallied.items() if size}


EVALUATED = ("_per_1k", "_share")


def evaluation_metrics(
    rows: Sequence[Mapping[str, Any]], verdicts: Sequence[bool | None], words: Words
) -> dict[str, float]:
    """Of held-out answers, each list's rate and share as `aha/eval_<list>_per_1k` and `aha/eval_<list>_share`."""
    measured = values(tally(rows, verdicts, words))
    wanted = (f"{name}{measure}" for name in words.lists for measure in EVALUATED)
    return {f"aha/eval_{name}": measured[f"aha/{name}"] for name in wanted if f"aha/{name}" in measured}


def base_level(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The untrained model's level, from the rows of metrics.jsonl: step 1 is sampled before the first update."""
    first = (row for row in metrics if row["step"] == 1)
    return {
        name: value
        for row in first
        for name, value in row.items()
        if name.startswith(("aha/", "completion/")) and not name.startswith("aha/eval_")
    }


# ---- language mixing -------------------------------------------------------------------------------------------------

HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
LATIN = "a-zA-Z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
NO_LETTERS = "\u00aa\u00b2\u00b3\u00b9\u00ba\u00bc-\u00be\u2070-\u209f\u2100-\u218f\u2460-\u24ff\U0001d400-\U0001d7ff"
"""Superscripts, fractions, roman and circled numbers, letters of formulas: characters of words to `re`, of no language."""

_SCRIPTS = re.compile(rf"([{HAN}])|([{LATIN}]{{2,}})|[^\W\d_{HAN}{LATIN}{NO_LETTERS}]{{2,}}")
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$(?=[^$\n]*[\\^_={}])[^$\n]*\$"
    r"|\\\((?:(?!\\[()]).)*\\\)|\\\[(?:(?!\\[\[\]]).)*\\\]|\\[a-zA-Z]+|</?[a-zA-Z_]+>",
    re.DOTALL,
)  # no scan for an end goes past the next beginning: what never ends costs no more
_LATIN_WORD = re.compile(f"[{LATIN}]{{2}}")
_OTHER_LETTER = re.compile(rf"[^\W\d_{LATIN}{NO_LETTERS}]")


def other_script(text: str, question: str) -> float | None:
    """Share of the text's words that are in another script than most of the question's; None without words.

    R1's language consistency (arXiv 2501.12948v2) is the share in the target language; this is the rest, as far as scripts tell
    languages apart: German among English is not seen. Scripts are Latin, Chinese characters and kana (each character a word),
    and all others. Code, formulas, LaTeX commands, tags and numbers have no words, nor has a single letter of an alphabet: x, π.
    """
    if _is_latin(text) and _is_latin(question):
        return 0.0 if _LATIN_WORD.search(_NO_WORDS.sub(" ", text)) else None
    of_question, of_text = _scripts(question), _scripts(text)
    num_words = sum(of_text)
    if not num_words:
        return None
    return 1 - of_text[of_question.index(max(of_question))] / num_words


def runs_of_other_scripts(text: str, question: str) -> list[list[str]]:
    """The words that `other_script` is the share of, in order: those with no word of the question's script between them are one
    run. A Chinese character is a word."""
    if _is_latin(text) and _is_latin(question):
        return []
    of_question = _scripts(question)
    own = of_question.index(max(of_question))
    runs: list[list[str]] = []
    before = own
    for match in _SCRIPTS.finditer(_NO_WORDS.sub(" ", text)):
        script = _number_of(match)
        if script != own:
            if script == before:
                runs[-1].append(match[0])
            else:
                runs.append([match[0]])
        before = script
    return runs


def _is_latin(text: str) -> bool:
    return text.isascii() or not _OTHER_LETTER.search(text)


def _scripts(text: str) -> list[int]:
    """How many words are Latin, Chinese, and in other scripts; the first is taken for a question without words."""
    counts = [0, 0, 0]
    for match in _SCRIPTS.finditer(_NO_WORDS.sub(" ", text)):
        counts[_number_of(match)] += 1
    return counts


def _number_of(match: re.Match[str]) -> int:
    """Of a word's script in `_scripts`."""
    return 1 if match[1] is not None else 0 if match[2] is not None else 2


# ---- excerpts --------------------------------------------------------------------------------------------------------

Passage = list[tuple[str, bool]]
"""A stretch of text in pieces, and which of them are marked."""


def excerpts(text: str, spans: Sequence[tuple[int, int]], *, width: int = 60) -> list[Passage]:
    """The passages `width` characters around the marked spans; two that meet are one."""
    passages: list[Passage] = []
    end = -1
    for number, (start, stop) in enumerate(spans):
        begin = max(start - width, 0)
        if begin > end:
            passages.append([])
        else:
            begin = end
        upcoming = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        end = min(stop + width, upcoming)
        pieces = ((text[begin:start], False), (text[start:stop], True), (text[stop:end], False))
        passages[-1].extend(piece for piece in pieces if piece[0])
    return passages


def as_text(passages: Iterable[Passage], *, mark: tuple[str, str] = ("[", "]")) -> str:
    """On one line; pass a terminal's escape codes as the mark, or `**` for Markdown."""
    lines = (
        "".join(f"{mark[0]}{piece}{mark[1]}" if marked else piece for piece, marked in passage) for passage in passages
    )
    return " … ".join(" ".join(line.split()) for line in lines)


def as_html(passages: Iterable[Passage]) -> str:
    """The words in `<mark>`, everything escaped."""
    lines = (
        "".join("<mark>" * marked + html.escape(piece) + "</mark>" * marked for piece, marked in passage)
        for passage in passages
    )
    return "<p>" + "</p><p>".join(line.replace("\n", "<br>") for line in lines) + "</p>"


def most_reflective(
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[bool | None],
    words: Words,
    *,
    verdict: bool,
    num: int,
    name: str = "reflection",
) -> list[tuple[Mapping[str, Any], list[tuple[int, int]]]]:
    """Of the right or the wrong completions that were not cut off, those with most words of a list, and where they are."""
    found = [
        (row, words.find(row["completion"], row["question"])[name])
        for row, each in zip(rows, verdicts, strict=True)
        if _kind(row, each) == ("_right" if verdict else "_wrong")
    ]
    return sorted((pair for pair in found if pair[1]), key=lambda pair: -len(pair[1]))[:num]
