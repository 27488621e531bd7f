"""Supervised training: rows that are learned as they stand, with the learner of reinforcement learning."""
