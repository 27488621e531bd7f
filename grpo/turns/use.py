"""Tools and an environment made ready for a model: what its prompts say of them, and a generator whose completions call and are
answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig, ToolsConfig
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
