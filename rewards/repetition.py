"""Repetition: a penalty for going round in circles."""

from __future__ import annotations


def repetition(completion: str, *, ngram: int = 20, max_penalty: float = 1.0) -> float:
    """Minus the share of word n-grams that repeat an earlier one, times `max_penalty`: in [-max_penalty, 0].

        -max_penalty * (1 - num_distinct_ngrams / num_ngrams)

    The n-gram penalty is from Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs" (section 4), who
    charge it to single tokens with n = 40; the share over a whole completion is open-r1's. Short n-grams also punish
    restating a formula, which a good solution does; raise `ngram` to punish only long loops. 0 for a completion of
    fewer words than `ngram`.

    Raises:
        ValueError: ngram is below 1, or max_penalty is negative.
    """
    if ngram < 1 or max_penalty < 0:
        raise ValueError(
            f"repetition's ngram is {ngram} and max_penalty {max_penalty}; ngram must be at least 1 and max_penalty at "
            "least 0 (it is subtracted). Set rewards.*.args accordingly."
        )
    words = completion.lower().split()
    num_ngrams = len(words) - ngram + 1
    if num_ngrams < 1:
        return 0.0
    num_distinct = len({tuple(words[i : i + ngram]) for i in range(num_ngrams)})
    return -max_penalty * (1 - num_distinct / num_ngrams)
