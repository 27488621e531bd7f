"""What a finished run's completions say: reflective words over the steps, right and wrong apart, and the most reflective samples.

grpo aha runs/quickstart
grpo aha runs/quickstart --list verification --samples 5

Reads completions.jsonl only, so it works for any run, whatever it logged.
"""

import argparse
from pathlib import Path
from typing import Any

from grpo.config.load import read_settings, read_text
from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say
from grpo.text import aha

Row = dict[str, Any]
COLUMNS = ("", "_per_1k", "_share", "_share_right", "_share_wrong", "_share_truncated")
TITLES = ("each", "per 1k", "share", "right", "wrong", "cut off")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--list", default="reflection", help="whose words choose the samples, and are marked in them")
    parser.add_argument("--samples", type=int, default=3, help="right ones and wrong ones to show, each")
    arguments = parser.parse_args()
    with errors_for_users():
        settings = settings_of(arguments.run)
        words = words_of(settings)
        if arguments.list not in words.lists:
            parser.error(f"--list is {arguments.list!r}; there is no such list. Take one of {', '.join(words.lists)}.")
        rows = completions(arguments.run, settings)
    show_table(rows, words)
    show_samples(rows, words, arguments.list, arguments.samples)


def settings_of(run: Path) -> dict[str, Any]:
    """Of the run's configuration, as it was written."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run} is not the directory of a run; there is no {path.name} in it. Name one, such as runs/quickstart."
        )
    return read_settings(read_text(path, f"RUN_DIR is {str(run)!r}"), str(path))


def words_of(settings: dict[str, Any]) -> aha.Words:
    """The built-in lists and those of the run's configuration."""
    logging = settings.get("logging") or {}
    return aha.with_own(logging.get("reflection_words", {}))  # runs before there was such a setting have none


def completions(run: Path, settings: dict[str, Any]) -> list[Row]:
    from grpo.system.jsonl import read_jsonl

    path = run / "completions.jsonl"
    rows = read_jsonl(path, ("step", "completion"))
    if rows:
        return rows
    if "training" in settings:
        raise ValueError(
            f"{run} is a run of supervised training (`grpo sft`); it learns from rows and samples no completions, which are what "
            "is counted. Name a run of `grpo train`. Words of its held-out answers are in its metrics, as aha/eval_..."
        )
    every = (settings.get("logging") or {}).get("completions_every", 1)
    raise ValueError(
        f"{path} holds no completions; they are what is counted. "
        + ("The run has written none yet." if every else "Set logging.completions_every > 0 in the next run.")
    )


def bands(steps: list[int]) -> list[list[int]]:
    """The first step alone, then a quarter of the others at a time; step 1 is sampled from the untrained model."""
    first, others = steps[:1], steps[1:]
    edges = [round(len(others) * quarter / 4) for quarter in range(5)]
    return [first, *(band for i in range(4) if (band := others[edges[i] : edges[i + 1]]))]


def show_table(rows: list[Row], words: aha.Words) -> None:
    from grpo.scoring.answers import is_right

    print("words per completion and per 1,000 tokens; share of completions with any: of all, right, wrong, cut off")
    parts = []
    for band in bands(sorted({row["step"] for row in rows})):
        chosen = [row for row in rows if band[0] <= row["step"] <= band[-1]]
        label = f"{band[0]}-{band[-1]}" if len(band) > 1 else str(band[0])
        parts.append((label, len(chosen), aha.values(aha.tally(chosen, [is_right(row) for row in chosen], words))))
    for name in words.lists:
        print(f"\n{name:<14}" + "".join(f"{title:>9}" for title in TITLES))
        for label, _, values in parts:
            print(f"{'step ' + label:<14}" + "".join(cell(values.get(f"aha/{name}{column}")) for column in COLUMNS))
    print("\ncompletions; mean tokens of right and of wrong ones; share of words in another script than the question's")
    for label, num, values in parts:
        lens = (values.get(f"completion/length{kind}") for kind in ("_right", "_wrong"))
        print(
            f"{'step ' + label:<14}{num:>9,}" + "".join(map(cell, lens)) + cell(values.get("completion/other_script"))
        )


def cell(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.3f}"


def show_samples(rows: list[Row], words: aha.Words, name: str, num: int) -> None:
    from grpo.scoring.answers import is_right

    verdicts = [is_right(row) for row in rows]
    for label, verdict in (("right", True), ("wrong", False)):
        for row, spans in aha.most_reflective(rows, verdicts, words, verdict=verdict, num=num, name=name):
            say(f"\n{label}, step {row['step']}, {row['num_tokens']} tokens, {len(spans)} words: {row['question']}")
            say(f"  {aha.as_text(aha.excerpts(row['completion'], spans))}")
