"""Rows -> Prompts: fill the template, filter, and serve in a resumable order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.rows import DATA_NAME, MESSAGES
from grpo.types import Prompt

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question} Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948v1), table 1, word for word: raw text for a base model, no chat template."""


@dataclass(frozen=True)
class Template:
    """`fill(question, tokenizer, system_prompt)` is the prompt without `prefill`, which follows it and counts as answer."""

    fill: Callable[[str, PreTrainedTokenizerBase, str | None], str]
    prefill: str = ""
    adds_special_tokens: bool = True  # False where the filled text has the tokenizer's special tokens already


def _chat(question: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "data.template is 'chat'; the tokenizer of this model has no chat template. Set data.template to r1_zero."
        )
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return chat_text(messages, tokenizer, system_prompt)


def chat_text(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    """A conversation in the tokenizer's own chat template, up to where the assistant is to speak."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return str(tokenizer.apply_chat_template([*system, *messages], tokenize=False, add_generation_prompt=True))


TEMPLATES: dict[str, Template] = {
    "r1_zero": Template(lambda question, *_: R1_ZERO.replace("{question}", question)),
    "r1_zero_think": Template(lambda question, *_: R1_ZERO.replace("{question}", question) + " ", prefill="<think>"),
    "chat": Template(_chat, adds_special_tokens=False),
    "none": Template(lambda question, *_: question),
}


def build_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[Prompt], Counter[str]]:
    """Prompts in the order of `rows`, and how many rows were dropped for which reason.

    Raises:
        ValueError: no row is left, or a prompt has no tokens.
    """
    template = TEMPLATES[config.template]
    texts = [_filled(row, tokenizer, config) + template.prefill for row in rows]
    ids = tokenizer(texts, add_special_tokens=template.adds_special_tokens)["input_ids"]
    prompts, dropped = [], Counter[str]()
    for number, (row, text, token_ids) in enumerate(zip(rows, texts, ids, strict=True)):
        if not token_ids:  # seen with tokenizer files that transformers reads as another family's
            raise ValueError(
                f"data.template is {config.template!r}; {type(tokenizer).__name__} turns the prompt {text[:80]!r} into no tokens "
                "at all. If the question is not empty, the tokenizer does not load as it was saved; check model.name."
            )
        if len(token_ids) > config.max_prompt_tokens:
            dropped[f"prompt longer than data.max_prompt_tokens ({config.max_prompt_tokens})"] += 1
        else:
            prompts.append(Prompt(number, list(token_ids), text, template.prefill, row))
    if not prompts:
        shortest = min(len(token_ids) for token_ids in ids)
        raise ValueError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}; the shortest of {len(rows)} prompts has {shortest} "
            f"tokens, so none is left. Set data.max_prompt_tokens >= {shortest}."
        )
    return prompts, dropped


def _filled(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """The template with the row's question in it, which may be a conversation; only chat templates have one of several turns.

    Raises:
        ValueError: the conversation does not fit into the template, or has a system message beside data.system_prompt.
    """
    turns = row.get(MESSAGES)
    if not turns or (len(turns) == 1 and config.template != "chat"):
        return TEMPLATES[config.template].fill(row["question"], tokenizer, config.system_prompt)
    asked = repr(row["question"][:80])
    if config.template != "chat":
        raise ValueError(
            f"data.template is {config.template!r}; the question {asked} is a conversation of {len(turns)} messages, and "
            "this template has room for one. Set data.template to chat, or data.question_column to one message: "
            "messages.0.content."
        )
    if turns[0]["role"] == "system" and config.system_prompt is not None:
        raise ValueError(
            f"data.system_prompt is {config.system_prompt!r}; the conversation that ends with {asked} has a system message "
            "of its own. Remove data.system_prompt, or the message."
        )
    return _chat(turns, tokenizer, config.system_prompt)


class PromptOrder:
    """Deals prompts to the processes, epoch after epoch, in an order that depends only on seed and position.

    `position` counts the prompts dealt so far over all processes; it is all there is to save and restore.

    An epoch has as many places as there are prompts. Without weights each prompt has one. With weights each source has its share
    of them, rounded to whole places: its prompts in an order of their own, begun anew when all were dealt; the next epoch goes on
    where this one ended.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        *,
        seed: int,
        rank: int,
        world_size: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            weights: of each source, as the prompts have it in their column `data_name`.

        Raises:
            ValueError: a source has no prompts, or too small a share for one place in an epoch.
        """
        self.prompts = prompts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._sources = [] if weights is None else _shared_out(prompts, weights)

    def draw(self, num_prompts: int) -> list[Prompt]:
        """This process's share of the next `num_prompts` prompts: every world_size-th, starting at its rank."""
        mine = range(self.position + self.rank, self.position + num_prompts, self.world_size)
        self.position += num_prompts
        return [self._at(place) for place in mine]

    def _at(self, place: int) -> Prompt:
        epoch, offset = divmod(place, len(self.prompts))
        if self._epoch[0] != epoch:
            pool = [number for source in self._sources for number in self._of_source(*source, epoch)]
            order = self._permutation(len(self.prompts), epoch)
            self._epoch = (epoch, [pool[place] for place in order] if pool else order)
        return self.prompts[self._epoch[1][offset]]

    def _of_source(self, members: list[int], num_places: int, epoch: int) -> list[int]:
        """The prompts of a source that an epoch deals."""
        first, last = epoch * num_places, (epoch + 1) * num_places - 1
        rounds = range(first // len(members), last // len(members) + 1)
        dealt = [members[n] for each in rounds for n in self._permutation(len(members), each)]
        start = first - rounds[0] * len(members)
        return dealt[start : start + num_places]

    def _permutation(self, length: int, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(length, generator=generator).tolist()


def _shared_out(prompts: list[Prompt], weights: Mapping[str, float]) -> list[tuple[list[int], int]]:
    """The numbers of each source's prompts, and how many places of an epoch it has: largest remainders are rounded up.

    Raises:
        ValueError: see PromptOrder.
    """
    members: dict[str, list[int]] = {label: [] for label in weights}
    for number, prompt in enumerate(prompts):
        members[prompt.columns[DATA_NAME]].append(number)
    exact = {label: len(prompts) * weight / sum(weights.values()) for label, weight in weights.items()}
    places = {label: int(share) for label, share in exact.items()}
    spare = len(prompts) - sum(places.values())
    for label in sorted(exact, key=lambda label: places[label] - exact[label])[:spare]:
        places[label] += 1
    for label, weight in weights.items():
        if not members[label] or not places[label]:
            what = (
                "not one question of it is left"
                if not members[label]
                else f"that is not one of {len(prompts):,} questions"
            )
            raise ValueError(
                f"data.name has the weight {weight:g} for {label}; {what}. Raise the weight, or remove the source."
            )
    return [(members[label], places[label]) for label in weights]
