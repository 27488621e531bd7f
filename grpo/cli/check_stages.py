"""What is wrong with the stages that are to run, told before the first of them does.

Each check is one that the stage's command makes at its own start. None of them loads a model, asks the hub, or runs code of the
user's, and what a stage makes is not looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.check.at_once import check_data, check_functions
from grpo.cli import evaluate, reject
from grpo.config import AnyConfig, Config
from grpo.data.hub_names import check_model, models_of
from grpo.inference.options import RULES, can_ask, check_number, check_options, foreign_rewards
from grpo.pipeline.stages import TRAINED, Plan, Stage


def check_stages(plan: Plan, stages: Sequence[Stage]) -> None:
    """Raises ValueError, with the stage's name: a file, a function or a model is missing, or an option is wrong."""
    checks = {**dict.fromkeys(TRAINED, _check_training), "reject": _check_reject, "evaluate": _check_evaluate}
    for stage in stages:
        try:
            checks[stage.kind](plan, stage)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from None


def _is_to_come(plan: Plan, name: object) -> bool:
    """Whether a name is a path into the folder of a stage, which has it in the end."""
    path = Path(str(name)).absolute()
    return any(path.is_relative_to(plan.directory(stage)) for stage in plan.stages)


def _check_training(plan: Plan, stage: Stage) -> None:
    config = plan.config(stage)
    for setting, name, _ in models_of(config):
        if not _is_to_come(plan, name):
            check_model(name, setting, asks_hub=False)
    check_functions(config)
    check_data(config, lambda name: _is_to_come(plan, name))


def _check_reject(plan: Plan, stage: Stage) -> None:
    options = _parsed(reject._parser(), plan, stage)
    for name in REWRITING if options.rewrite_with is None else ():
        if getattr(options, name) is not None:
            raise ValueError(f"options has {name}, without effect without rewrite_with. Remove it, or name a model.")
    if options.rewrite_with is not None and options.tags:
        raise ValueError(
            "options has tags, without effect with rewrite_with. Remove it: rewrite_template can ask for tags."
        )
    source = plan.stage(stage.model or "")
    if options.config is None and source is not None:
        _check_sampled(source, plan.config(source), trusts=options.trust_rewards)
    if _is_to_come(plan, options.model):
        for name in RULES:
            if (value := getattr(options, name)) is not None:
                check_number(name, value)
    else:
        check_model(options.model, asks_hub=False)
        check_options(options)
        reject.check_questions(options)
    if options.rewrite_with and not _is_to_come(plan, options.rewrite_with):
        check_model(options.rewrite_with, "--rewrite-with", asks_hub=False)
    if _is_to_come(plan, options.questions or ""):
        options.questions = None
    reject.rules_of(options)
    if options.config is not None:
        asked = Config.load_questions(options.config, options.set)
        _check_sampled(stage, asked, trusts=True)
        check_functions(asked)
        if options.questions is None:
            check_data(_without_evaluation(asked), lambda name: _is_to_come(plan, name))
    if options.questions is not None and options.questions.endswith((".yaml", ".yml")):
        check_data(_without_evaluation(Config.load_questions(options.questions)), lambda name: _is_to_come(plan, name))


REWRITING = ("rewrite_template", "rewrite_temperature", "rewrite_max_tokens", "rewrite_samples")


def _check_sampled(source: Stage, config: AnyConfig, *, trusts: bool) -> None:
    """Of the configuration that says how questions are sampled and graded. A person at a terminal is asked for trust later."""
    if isinstance(config, Config) and (config.tools.functions or config.environment.function is not None):
        raise ValueError(
            f"the configuration of stage {source.name} has tools or an environment; grpo reject has none, and the answers "
            "would not be those of the run. Name a config without them."
        )
    if not trusts and not can_ask() and (foreign := foreign_rewards(config.rewards)):
        raise ValueError(
            f"the configuration of stage {source.name} names reward functions that are run here: {', '.join(foreign)}. If you "
            "trust them, set options: {trust_rewards: true}, or name a config."
        )


def _without_evaluation(config: Config) -> AnyConfig:
    """Held-out questions are not sampled."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_questions": 0})})


def _check_evaluate(plan: Plan, stage: Stage) -> None:
    parser = evaluate._parser()
    arguments = _parsed(parser, plan, stage)
    with _as_value_error():
        evaluate.check(parser, arguments)
    if not _is_to_come(plan, arguments.model):
        check_model(arguments.model, asks_hub=False)
    settings = evaluate.settings_of(arguments)
    for name, path in settings.data.items():
        if not _is_to_come(plan, path):
            evaluate.check_file(name, path)


def _parsed(parser: argparse.ArgumentParser, plan: Plan, stage: Stage) -> argparse.Namespace:
    """The options of a stage's launch line. Raises ValueError for one that its command does not take."""
    parser.prog = f"grpo {stage.kind}"
    with _as_value_error():
        return parser.parse_args(plan.launch(stage)[1:])


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """What a parser prints before it ends the process."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit:
        raise ValueError(printed.getvalue().removeprefix("error: ").strip()) from None
