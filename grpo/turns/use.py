"""Tools made ready for a model: what its prompts say of them, and a generator whose completions call them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig, ToolsConfig
from grpo.config.sections import ScoringConfig
from grpo.turns.form import Form, form_of
from grpo.turns.generator import ToolGenerator
from grpo.turns.toolbox import Given, Toolbox
from grpo.types import Generator


@dataclass(frozen=True)
class Tools:
    """A toolbox, and how a model with this tokenizer and these prompts calls what is in it."""

    toolbox: Toolbox
    form: Form
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
    ) -> Tools | None:
        """The tools that a configuration names, or those that are given instead; None if there are none.

        Raises:
            ValueError: as Toolbox; or the chat template has no tools.
        """
        if not config.functions and not given:
            return None
        form = form_of(tokenizer, data)  # first, since it starts no processes
        toolbox = Toolbox.of(config, scoring, given)
        return None if toolbox is None else cls(toolbox, form, tokenizer, config)

    def told(self, data: DataConfig) -> DataConfig:
        """The same for prompts that tell of the tools."""
        return data.with_tools(self.toolbox.schemas)

    def around(self, generator: Generator) -> Generator:
        return ToolGenerator(generator, self.toolbox, self.form, self.tokenizer, self.limits)


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
