"""What is wrong with the stages that are to run, told before the first of them does.

Each stage's command checks itself, as it does at its own start. Here it loads no model, asks no hub, runs no code of the user's,
and does not look for what earlier stages make.
"""

from __future__ import annotations

import contextlib
import io
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.check.at_once import IsToCome, check_config
from grpo.cli import evaluate, reject
from grpo.config import Config
from grpo.pipeline.stages import OPTIONS, TRAINED, Plan, Stage


def check_stages(plan: Plan, stages: Sequence[Stage]) -> None:
    """Raises ValueError, with the stage's name: a file, a function or a model is missing, or an option is wrong."""
    checks = {**dict.fromkeys(TRAINED, _check_training), "reject": _check_reject, "evaluate": _check_evaluate}

    def is_to_come(name: object) -> bool:
        """Whether it is a path into the folder of a stage, which has it in the end."""
        path = Path(str(name)).absolute()
        return any(path.is_relative_to(plan.directory(stage)) for stage in plan.stages)

    for stage in stages:
        try:
            checks[stage.kind](plan, stage, is_to_come)
        except ValueError as error:
            said = _as_in_stages(str(error), stage.kind) if stage.kind in OPTIONS else str(error)
            raise ValueError(f"stage {stage.name}: {said}") from None


def _check_training(plan: Plan, stage: Stage, is_to_come: IsToCome) -> None:
    check_config(plan.config(stage), resumes=True, is_to_come=is_to_come, asks_hub=False)


def _check_reject(plan: Plan, stage: Stage, is_to_come: IsToCome) -> None:
    _, options = _parsed(reject._parser(), plan, stage)
    source = plan.stage(stage.model or "")
    run = plan.config(source) if source is not None else None
    reject.check(options, run=run if isinstance(run, Config) else None, is_to_come=is_to_come, asks_hub=False)


def _check_evaluate(plan: Plan, stage: Stage, is_to_come: IsToCome) -> None:
    parser, arguments = _parsed(evaluate._parser(), plan, stage)
    with _as_value_error():
        evaluate.check(parser, arguments, is_to_come=is_to_come, asks_hub=False)


def _parsed(parser: ArgumentParser, plan: Plan, stage: Stage) -> tuple[ArgumentParser, Namespace]:
    """The options of a stage's launch line. Raises ValueError for one that its command does not take."""
    parser.prog = f"grpo {stage.kind}"
    with _as_value_error():
        return parser, parser.parse_args(plan.launch(stage)[1:])


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """What a parser prints before it ends the process."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit:
        raise ValueError(printed.getvalue().removeprefix("error: ").strip()) from None


def _as_in_stages(text: str, kind: str) -> str:
    """A command's words with its options as stages.yaml spells them: `--rewrite-with` is `options.rewrite_with`."""
    places = {name: name for name in ("model", "config", "set")} | {name: f"options.{name}" for name in OPTIONS[kind]}

    def spelt(found: re.Match[str]) -> str:
        return places.get(found[1].replace("-", "_"), found[0])

    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", spelt, text)
