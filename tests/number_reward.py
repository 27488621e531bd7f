"""Apart from helpers.py, because a reward worker imports the module of its function, and torch takes seconds."""


def number_in_text(completion: str) -> float:
    """A reward: the number that FixedGenerator wrote as text."""
    return float(completion)


def digits_in_text(completion: str) -> float:
    """Another reward of the same text, of another size and order."""
    return float(sum(map(int, filter(str.isdigit, completion))))


def number_or_nothing(completion: str, question: str) -> float:
    """The number of FixedGenerator's completions, for about half of the questions; 0 for the others."""
    return float(completion) if sum(map(ord, question)) % 2 else 0.0
