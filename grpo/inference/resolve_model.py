"""Which model a person means, and the settings of the run that it comes from: for commands that ask one."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from grpo.config import (
    Config,
    DataConfig,
    EnvironmentConfig,
    ModelConfig,
    RewardConfig,
    ToolsConfig,
)
from grpo.data.prompts import use_chat_template
from grpo.data.rows import stands_around_a_question
from grpo.inference.model import Sampler, load, sampling_config
from grpo.inference.options import (
    RULES,
    check_options,
    check_trusted,
    check_trusted_rewards,
    checkpoint_of,
    named_settings,
    run_directory,
    settings_of,
)
from grpo.policy.families import attribute
from grpo.policy.model_source import model_config, model_directory
from grpo.turns.named import named
from grpo.types import Sampling

LONG = 10**9
"""Tokens of a prompt: a person's question is not dropped for its length."""


@dataclass(frozen=True)
class Chosen:
    """A model, and how to ask it."""

    model: ModelConfig
    settings: Config  # of its run, or of the YAML that was named, or what is usual
    is_known: bool  # whether it is one of the first two
    sampling: Sampling

    def data(self, tokenizer: PreTrainedTokenizerBase, template: str | None, system: str | None) -> DataConfig:
        """How a question becomes a prompt: as said, or as in the run; without one `chat` if the tokenizer has a chat template.

        Raises:
            ValueError: the model has no chat template, or another one no system message.
        """
        data = self.settings.data
        use_chat_template(tokenizer, data)
        usual = data.template if self.is_known or not tokenizer.chat_template else "chat"
        template = template or usual
        if system is None and template == "chat":
            system = data.system_prompt
        if system is not None and template != "chat":
            raise ValueError(
                f"--system is {system!r} with the template {template}; only the chat template has a system message. "
                "Leave it out, or set --template chat."
            )
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"--template is chat; the tokenizer of {self.model.name} has no chat template. Set --template r1_zero."
            )
        changed = {"template": template, "system_prompt": system, "max_prompt_tokens": LONG}
        if template != data.template and stands_around_a_question(data.question_template):
            changed["question_template"] = None  # it was written for the run's template
        return data.model_copy(update=changed)

    def load(self, tokenizer: PreTrainedTokenizerBase, *, longest_prompt: int, engine: str = "auto") -> Sampler:
        """The model itself, for prompts up to so many tokens.

        Raises:
            ValueError: prompt and answer may have more positions than the model knows.
        """
        limit = num_positions(self.model)
        if limit is not None and longest_prompt >= limit:
            raise ValueError(
                f"a prompt has {longest_prompt} tokens; {self.model.name} knows {limit} positions, which leaves none for an "
                "answer. Shorten the question."
            )
        if limit is not None and longest_prompt + self.sampling.max_tokens > limit:
            raise ValueError(
                f"--max-tokens is {self.sampling.max_tokens}; with a prompt of {longest_prompt} tokens that is more than the "
                f"{limit} positions that {self.model.name} knows. Set --max-tokens <= {limit - longest_prompt}."
            )
        config = sampling_config(
            self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            trust_remote_code=self.model.trust_remote_code,
            max_prompt_tokens=longest_prompt,
            max_completion_tokens=self.sampling.max_tokens,
            engine=engine,
        )
        return load(config, tokenizer)


def trusted_rewards(chosen: Chosen, options: Namespace) -> list[RewardConfig]:
    """The rewards that a run's configuration lists. Outside of the package `grpo.rewards` they are code of whoever made the run.

    A configuration that a person names with --config is trusted. Otherwise a terminal asks.

    Raises:
        ValueError: there is such code, and nobody has said that it may run.
    """
    check_trusted_rewards(chosen.settings.rewards, options)
    return chosen.settings.rewards


def trusted_tools(chosen: Chosen, options: Namespace) -> ToolsConfig:
    """The tools of --tools, or else those that the run's configuration lists, which are trusted as rewards are.

    One of the library's own with arguments is another's say too: `as_root` lets `python` run as root.

    Raises:
        ValueError: there is code of others, and nobody has said that it may run; or --tools cannot be read.
    """
    tools = chosen.settings.tools
    if options.tools is not None:
        return named(options.tools, tools)
    foreign = [
        f"{each.function} with {json.dumps(each.args, default=str)}" if each.args else each.function
        for each in tools.functions
        if ":" in each.function or each.args
    ]
    check_trusted(foreign, "tools that are run", "name them with --tools", options)
    return tools


def trusted_environment(chosen: Chosen, options: Namespace) -> EnvironmentConfig:
    """The environment that the run's configuration names, which is trusted as its tools are.

    Raises:
        ValueError: it is code of others, and nobody has said that it may run.
    """
    config = chosen.settings.environment
    foreign = [config.function] if config.function is not None and ":" in config.function else []
    if not options.trust_rewards:
        check_trusted(foreign, "an environment that is run", "say so with --trust-rewards", options)
    return config


def choose(options: Namespace) -> Chosen:
    """What the options of `cli.model_options` say.

    Raises:
        ValueError: there is no such model, run or step, or a number is out of range.
    """
    check_options(options)
    directory = run_directory(options.model)
    if options.base and directory is not None:
        model = settings_of(directory / "config.yaml").model
    else:
        name = model_directory(options.model if options.step is None else str(checkpoint_of(directory, options.step)))
        model = ModelConfig(name=name)
    model.trust_remote_code = options.trust_remote_code  # not as the run has it, which may be another person's
    known = named_settings(options)
    settings = usual_settings(model) if known is None else known
    return Chosen(model, settings, known is not None, sampling_of(options, settings.sampling))


def usual_settings(model: ModelConfig) -> Config:
    """For a model whose run is not known; sampled as DeepSeek-R1 evaluates (arXiv 2501.12948v2, section D.1)."""
    limit = num_positions(model)
    rollout = {"temperature": 0.6, "top_p": 0.95, "max_completion_tokens": min(1024, (limit or 2048) // 2)}
    return Config(model=model.model_dump(), rollout=rollout, run={"dir": "", "steps": 1})


def num_positions(model: ModelConfig) -> int | None:
    """Most tokens of a sequence; None if the model does not say."""
    try:
        config = model_config(model)
    except ValueError as error:
        raise ValueError(str(error).replace("model.name", "--model")) from error
    return attribute(config.get_text_config(), "max_position_embeddings")


def sampling_of(options: Namespace, default: Sampling) -> Sampling:
    """`default` with what the options say otherwise, from the weights as they are."""
    given = {name: value for name in RULES if (value := getattr(options, name)) is not None}
    return replace(default, weights="policy", **given)


def said(sampling: Sampling) -> str:
    """In words."""
    return f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, at most {sampling.max_tokens} tokens"
