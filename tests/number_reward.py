"""Apart from helpers.py, because a reward worker imports the module of its function, and torch takes seconds."""


def number_in_text(completion: str) -> float:
    """A reward: the number that FixedGenerator wrote as text."""
    return float(completion)
