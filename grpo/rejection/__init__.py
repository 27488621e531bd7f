"""Rejection sampling: which of a model's own answers are worth learning from."""
