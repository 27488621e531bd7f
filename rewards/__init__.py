"""Reward functions: strings and numbers in, a number out (None: can't tell). A YAML uses the names they have here."""

from rewards.accuracy import accuracy
from rewards.code import code
from rewards.countdown import countdown
from rewards.exact_match import exact_match
from rewards.format import format
from rewards.language import language
from rewards.length import overlong
from rewards.reasoning_gym import reasoning_gym
from rewards.repetition import repetition
from rewards.vote import vote

__all__ = [
    "accuracy",
    "code",
    "countdown",
    "exact_match",
    "format",
    "language",
    "overlong",
    "reasoning_gym",
    "repetition",
    "vote",
]
