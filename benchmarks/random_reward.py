"""Rewards that cost nothing and know nothing, in a module of their own: what imports torch takes each reward worker seconds to
import."""

import random


def random_reward(completion_ids: list[int]) -> float:
    """Arbitrary but fixed: the same text has the same reward, so that benchmarks repeat. A policy can learn which text is paid
    best."""
    return hash(tuple(completion_ids)) % 1000 / 1000


def coin(completion: str) -> float:
    """1 or 0 with even odds, whatever was written and each time anew: nothing can be learned from it (arXiv 2506.10947,
    section 2).

    No two runs have the same rewards.
    """
    return float(random.random() < 0.5)
