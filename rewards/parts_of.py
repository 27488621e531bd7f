"""Which part of a completion is shown to a model that grades it."""

from __future__ import annotations

PARTS = ("all", "answer")


def part_of(completion: str, part: str) -> str:
    """The whole completion, or what is left of it without its thoughts and without the tags of an answer.

    DeepSeek-R1 (arXiv 2501.12948v2) grades helpfulness on the final answer alone, so that thoughts stay free, and harmlessness on
    the whole response.
    """
    if part == "all":
        return completion
    _, closed, after = completion.rpartition("</think>")
    text = after if closed else completion.partition("<think>")[0] if "<think>" in completion else completion
    _, opened, inside = text.rpartition("<answer>")
    return (inside.partition("</answer>")[0] if opened else text).strip()


def check_part(name: str, part: str) -> None:
    """Raises ValueError: there is no such part."""
    if part not in PARTS:
        raise ValueError(f"the part of {name} is {part!r}; it is {' or '.join(PARTS)}. Correct rewards.*.args.part.")
