"""The tools and the environment that a command line names, and how a model is asked there: without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.config import COLUMN_IN_BRACES, Config, EnvironmentConfig, ToolsConfig


def named_environment(text: str) -> EnvironmentConfig:
    """The environment that a command line names: as environment.function, as JSON with what else the section has, or a
    configuration (.yaml) with such a section.

    Raises:
        ValueError: it is none of these.
    """
    if text.endswith(".yaml"):
        found = Config.load_questions(Path(text)).environment
        if found.function is None:
            raise ValueError(f"--environment is {text!r}; the configuration has no environment.function. Name another.")
        return found
    if not text.startswith("{"):
        return EnvironmentConfig(function=text)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f'--environment is {text!r}, which is no JSON: {error}. Name one, or write {{"function": ..., "rows": {{...}}}}.'
        ) from None
    config = EnvironmentConfig(**values)
    if config.function is None:
        raise ValueError(f'--environment is {text!r}; it names no environment. Add "function".')
    return config


@dataclass(frozen=True)
class PromptDefaults:
    """How a model is asked, where options do not say so."""

    template: str = "r1_zero"
    question_template: str | None = None
    system_prompt: str | None = None
    stop: list[str] = field(default_factory=list)


def prompt_defaults(environment: str | None, question_template: str | None = None) -> PromptDefaults:
    """Those of the configuration (.yaml) that `named_environment` reads; where that is none, DeepSeek-R1-Zero's.

    Args:
        question_template: what an option says of it.

    Raises:
        ValueError: that asks with words of other columns, which the questions here do not have.
    """
    if environment is None or not environment.endswith(".yaml"):
        return PromptDefaults(question_template=question_template)
    config = Config.load_questions(Path(environment))
    template = config.data.question_template if question_template is None else question_template
    if question_template is None and template is not None and COLUMN_IN_BRACES.findall(template) != ["question"]:
        raise ValueError(
            f"--environment is {environment!r}, whose data.question_template is {template!r}; the questions here have no "
            "column but {question}. Say it with --question-template."
        )
    return PromptDefaults(config.data.template, template, config.data.system_prompt, config.rollout.stop)


def named(names: Sequence[str], limits: ToolsConfig | None = None) -> ToolsConfig:
    """The tools that a command line names: as in the YAML, or JSON with arguments, {"function": "python", "args": {...}}.

    Raises:
        ValueError: an entry is neither.
    """
    entries = []
    for name in names:
        try:
            entries.append(json.loads(name) if name.startswith("{") else name)
        except ValueError as error:
            raise ValueError(
                f'--tools has {name!r}, which is no JSON: {error}. Name a tool, or write {{"function": ..., "args": {{...}}}}.'
            ) from None
    values = {} if limits is None else limits.model_dump(exclude_unset=True)
    return ToolsConfig(**{**values, "functions": entries})
