"""Reward functions: strings and numbers in, a number out (None: can't tell). A YAML uses the names they have here."""

from .accuracy import accuracy
from .classifier import RewardModel as reward_model
from .code import code
from .countdown import countdown
from .countdown_search import countdown_search, countdown_trials
from .endpoint import Judge as judge
from .exact_match import exact_match
from .format import format
from .language import language
from .length import overlong
from .reasoning_gym import reasoning_gym
from .repetition import repetition
from .vote import vote

__all__ = [
    "accuracy",
    "code",
    "countdown",
    "countdown_search",
    "countdown_trials",
    "exact_match",
    "format",
    "judge",
    "language",
    "overlong",
    "reasoning_gym",
    "repetition",
    "reward_model",
    "vote",
]
