"""A group of completions for a question, and what each reward function made of each: values, weights, advantages and why."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo.algorithm.advantage import advantages_of_batch
from grpo.algorithm.objective import AdvantageRule
from grpo.config import DataConfig, ScoringConfig
from grpo.data.rows import load_rows
from grpo.observe.console import number
from grpo.observe.display import styled_completion
from grpo.scoring.answers import completion_rows, is_right, verdicts_of
from grpo.scoring.binding import LISTED, SINGLE
from grpo.scoring.reward import Reward
from grpo.scoring.scorer import Scorer
from grpo.system.terminal import printable
from grpo.text.plural import counted
from grpo.turns.environment import Environment
from grpo.turns.environment import own_rows as rows_of_environment
from grpo.types import Generator, Prompt, Sampling


def chosen_rows(
    data: DataConfig, numbers: Sequence[int], *, held_out: bool, environment: Environment | None = None
) -> list[dict[str, Any]]:
    """Rows of a data set, or of those that an environment brings, by their numbers.

    Raises:
        ValueError: see load_rows; or there is no row of that number.
    """
    own = None
    if environment is not None:
        own = rows_of_environment(environment, data, evaluation=held_out, reads_answer=False)
    if own is None and data.name is None:
        raise ValueError(
            f"--row is {numbers[0]}; there are no questions to take it from. Name them with --data, or a run as --model."
        )
    rows = load_rows(data, evaluation=held_out, reads_answer=False) if own is None else own
    for n in numbers:
        if not 0 <= n < len(rows):
            raise ValueError(
                f"--row is {n}; there are {len(rows):,} rows, counted from 0. Choose 0 to {len(rows) - 1}."
            )
    return [rows[n] for n in numbers]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reward function can be given of these rows."""
    return [name for name in rows[0] if name != "answer" or rows[0]["answer"] is not None]


def without(rewards: Sequence[Reward], columns: Sequence[str]) -> dict[str, list[str]]:
    """The rewards that cannot be asked: they need what is no column, or go by it (`only`). Their names, and what they need."""
    known = {*SINGLE, *LISTED, *columns}
    lacking = {
        reward.name: (_required(reward) - known - set(reward.args)) | (set(reward.only) - set(columns))
        for reward in rewards
    }
    return {name: sorted(needed) for name, needed in lacking.items() if needed}


def verdicts_left(scoring: ScoringConfig, rewards: Sequence[Reward], lacking: Container[str]) -> list[str]:
    """Of the rewards that say what is right, those that can be asked."""
    names = verdicts_of(scoring.verdict, [reward.name for reward in rewards])
    return [name for name in names if name not in lacking]


def _required(reward: Reward) -> set[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(reward.function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind not in variable}


def make_scorer(
    rewards: Sequence[Reward],
    *,
    columns: Sequence[str],
    sampling: Sampling,
    scoring: ScoringConfig,
) -> Scorer:
    return Scorer(
        rewards,
        columns=columns,
        max_completion_tokens=sampling.max_tokens,
        num_workers=scoring.num_workers,
        timeout_seconds=scoring.timeout_seconds,
        memory_gib=scoring.memory_gib,
        environment=scoring.environment,
        verdict=scoring.verdict,
    )


def sample_groups(
    prompts: list[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    sampling: Sampling,
    num_completions: int,
    rule: AdvantageRule,
    seed: int,
    judged: bool = True,
) -> list[dict[str, Any]]:
    """A row per completion: as `grpo.scoring.answers.completion_rows`, with `sample`, `advantage`, `weights` and `why` besides.

    `why` has what a reward function's `explain` attribute says of the completion, where it has one.

    Args:
        judged: whether any of the rewards that say what is right are asked; no other speaks for them.
    """
    with scorer.begin(len(prompts)) as scoring:
        groups = generator.sample(prompts, sampling, num_completions=num_completions, seed=seed, on_group=scoring.add)
        scores = scoring.result()
    advantages = advantages_of_batch(rule, scores.rewards, scorer.parts(scores))
    weights = {reward.name: reward.weight for reward in scorer.rewards}
    rows = []
    for number_, (row, advantage) in enumerate(
        zip(completion_rows(groups, scores), advantages.nan_to_num().flatten().tolist(), strict=True)
    ):
        columns = prompts[number_ // num_completions].columns
        why = {reward.name: text for reward in scorer.rewards if (text := _why(reward, row["completion"], columns))}
        rows.append(
            {
                **row,
                "right": row["right"] if judged else None,
                "advantage": advantage,
                "sample": number_ % num_completions,
                "weights": weights,
                "why": why,
            }
        )
    return rows


def _why(reward: Reward, completion: str, columns: Mapping[str, Any]) -> str | None:
    explain = getattr(reward.function, "explain", None)
    if explain is None:
        return None
    known = {**columns, **reward.args, "completion": completion}
    try:
        return str(explain(**{name: known[name] for name in inspect.signature(explain).parameters if name in known}))
    except Exception as error:  # a group that was sampled and scored is shown, whatever is said of it
        return f"its explain failed: {error!r}"


def show_group(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the completions of one question with their breakdowns, and what they come to."""
    console.print(Text.assemble(("\nQuestion: ", "bold"), printable(rows[0]["question"])))
    if rows[0]["answer"] is not None:
        console.print(Text.assemble(("Gold answer: ", "bold"), printable(rows[0]["answer"])))
    for row in rows:
        console.print(_heading(row, len(rows)))
        for name, value in row["rewards"].items():
            console.print(_verdict(name, value, row))
        console.print(_indented(_styled(row)))
    console.print(Text.assemble(("\n", ""), (_summary(rows), "bold")))


ENDS = {"length": "cut off", "calls": "out of calls", "turns": "out of turns"}


def _heading(row: Mapping[str, Any], num: int) -> Text:
    mark = {True: ("✓", "bold green"), False: ("✗", "bold red"), None: ("?", "bold yellow")}[is_right(row)]
    advantage = f"  advantage {row['advantage']:+.3f}" if num > 1 else ""
    end = ENDS.get(row["finish_reason"], "ended")
    said = f" {row['sample'] + 1}/{num}  reward {number(row['reward'])}{advantage}  {row['num_tokens']} tokens, {end}"
    return Text.assemble(("\n", ""), mark, (said, "bold"))


def _verdict(name: str, value: float | None, row: Mapping[str, Any]) -> Text:
    known = "can't tell" if value is None else f"{value:g} x {row['weights'][name]:g}"
    why = row["why"].get(name, "")
    return Text.assemble(f"    {name:12} {known:10} ", (printable(why), "dim"))


def _indented(text: Text) -> Text:
    return Text("\n").join(Text.assemble(("    │ ", "dim cyan"), line) for line in text.split("\n"))


def _styled(row: Mapping[str, Any]) -> Text:
    """What the model wrote, and between it, on lines of their own, what tools and the environment said, which stands out."""
    turns = row.get("turns") or [{"role": "assistant", "content": row["completion"].strip()}]
    styled = [
        styled_completion(turn["content"].strip())
        if turn["role"] == "assistant"
        else Text(printable(f"{turn.get('name') or turn['role']}: {turn['content']}"), style="cyan")
        for turn in turns
    ]
    return Text("\n").join(styled)


def _summary(rows: list[dict[str, Any]]) -> str:
    said = [counted(len(rows), "completions")]
    if rows[0]["answer"] is not None or any(row["right"] is not None for row in rows):
        verdicts = [is_right(row) for row in rows]
        counts = {"right": verdicts.count(True), "wrong": verdicts.count(False), "unknown": verdicts.count(None)}
        said += [f"{count} {name}" for name, count in counts.items() if count]
    known = [row["reward"] for row in rows if row["reward"] is not None]
    if known:
        said.append(
            f"reward {number(min(known))} to {number(max(known))}, {number(sum(known) / len(known))} on average"
        )
    if len(rows) > 1 and not any(row["advantage"] for row in rows):
        said.append("no signal to learn from")
    return ", ".join(said)
