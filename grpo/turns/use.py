"""Tools and an environment made ready for a model: what its prompts say of them, and a generator whose completions call and are
answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo.config import COLUMN_IN_BRACES, Config, DataConfig, EnvironmentConfig, ToolsConfig
from grpo.config.sections import ScoringConfig
from grpo.turns.environment import Environment
from grpo.turns.form import Form, ReplyForm, form_of, reply_form
from grpo.turns.generator import TurnGenerator
from grpo.turns.toolbox import Given, Toolbox
from grpo.types import Generator


@dataclass(frozen=True)
class Tools:
    """A toolbox, and how a model with this tokenizer and these prompts calls what is in it and is answered.

    Args:
        form: of calls; None: there are no tools.
        reply_form: of what the environment says; None: there is none.
    """

    toolbox: Toolbox
    form: Form | None
    reply_form: ReplyForm | None
    tokenizer: PreTrainedTokenizerBase
    limits: ToolsConfig

    @classmethod
    def of(
        cls,
        config: ToolsConfig,
        scoring: ScoringConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        *,
        given: Sequence[Given] | None = None,
        environment: Environment | None = None,
    ) -> Tools | None:
        """The tools that a configuration names, or those that are given instead, and an environment; None if there is neither.

        Raises:
            ValueError: as Toolbox; or the chat template has no tools, or no place for what the environment says.
        """
        has_tools = bool(config.functions if given is None else given)
        if not has_tools and environment is None:
            return None
        form = form_of(tokenizer, data) if has_tools else None  # first, since it starts no processes
        replies = None if environment is None else reply_form(tokenizer, data, environment.config.reply_template)
        toolbox = Toolbox.of(config, scoring, given, environment)
        return None if toolbox is None else cls(toolbox, form, replies, tokenizer, config)

    def told(self, data: DataConfig) -> DataConfig:
        """The same for prompts that tell of the tools."""
        return data.with_tools(self.toolbox.schemas)

    def around(self, generator: Generator, *, at_once: bool = False) -> Generator:
        """See TurnGenerator."""
        return TurnGenerator(
            generator, self.toolbox, self.form, self.tokenizer, self.limits, self.reply_form, at_once=at_once
        )


def named_environment(text: str) -> EnvironmentConfig:
    """The environment that a command line names: as environment.function, as JSON with what else the section has, or a
    configuration (.yaml) with such a section.

    Raises:
        ValueError: it is none of these.
    """
    if text.endswith(".yaml"):
        found = Config.load(Path(text)).environment
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
    config = Config.load(Path(environment))
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
