"""In which language a model thinks: language consistency as DeepSeek-R1 defines it, measured whether or not it is rewarded.

R1 (arXiv 2501.12948v2, section 2.3.2) adds the share of the words of the thought that are in the target language to the reward.
rewards/language.py is that reward. The measure differs in one thing: a thought without words is left out, where the reward gives
it 0, because saying nothing must not pay, and because nobody can tell which language nothing is in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.text.readable import foreign_words, language_share

MEASURES = ("language/consistency", "language/mixed")


def consistency(completion: str, question: str) -> float | None:
    """Share of the words of the thought that are in the script of the question; None if it has no words.

    The thought is what stands before `</think>`, all of it without one. What a word is, `aha.other_script` says.
    """
    return language_share(completion.partition("</think>")[0], question)


def tally(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each metric over `completion_rows`: of all, and of each kind of question.

    `language/mixed` is the share of completions that have words of another script anywhere, of those that have words at all.
    """
    sums: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for row in rows:
        text, question = row["completion"], row["question"]
        mixed = None if language_share(text, question) is None else float(bool(foreign_words(text, question)))
        for name, value in zip(MEASURES, (consistency(text, question), mixed), strict=True):
            if value is None:
                continue
            for each in (name, f"{name}/{row['kind']}") if "kind" in row else (name,):
                sums[each] += value
                sizes[each] += 1
    return {name: (sums[name], sizes[name]) for name in sums}


def evaluation_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The same of held-out answers, as `language/eval_consistency` and so on."""
    return {
        name.replace("language/", "language/eval_", 1): total / size
        for name, (total, size) in tally(rows).items()
        if size
    }
