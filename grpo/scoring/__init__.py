"""Completions -> rewards: reward functions in worker processes, answers with their verdicts, statistics of them."""
