"""What a rewriting model is asked, without torch."""

from __future__ import annotations

from pathlib import Path

from grpo.config import read_text

TEMPLATE = """Below are a question and a solution to it. Rewrite the solution so that it is easy to read: in the language of the \
question only, in short paragraphs, without repetition. Keep every step that matters, and keep the final answer exactly as it \
is. Keep the form too: where the solution has <think> and </think>, or <answer> and </answer>, yours has them. Write the \
rewritten solution between <rewritten> and </rewritten>.

Question:
{question}

Solution:
{completion}"""

PLACES = ("{question}", "{completion}")


def read_template(path: str | None) -> str:
    """The text of --rewrite-template; without one, ours.

    Raises:
        ValueError: there is no such file, it cannot be read, or it has no place for the question or for the completion.
    """
    if path is None:
        return TEMPLATE
    setting = f"--rewrite-template is {path!r}"
    if not Path(path).is_file():
        raise ValueError(f"{setting}; there is no such file. Correct the path.")
    template = read_text(Path(path), setting)
    for place in PLACES:
        if place not in template:
            raise ValueError(
                f"{setting}; the file has no {place}, where the rewriting model is shown the question or the solution. Add it."
            )
    return template
