"""A reward that costs nothing, in a module of its own: what imports torch takes each reward worker seconds to import."""


def random_reward(completion_ids: list[int]) -> float:
    return hash(tuple(completion_ids)) % 1000 / 1000
