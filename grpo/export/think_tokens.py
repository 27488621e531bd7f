"""Make the tags of a thought tokens of their own, for parsers that look for a token and not for text.

A model that was trained with the tags in parts (`<`, `think`, `>`) has never seen the new tokens. Their rows are made of those of
the parts; that is a beginning, not what the model would have learned: it may go on writing the parts, and what it reads in one
token is not what it read in three. A few steps of training with them follow.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.policy.tokenizer import vocabulary_size

TAGS = ("<think>", "</think>")
How = Literal["mean", "sum"]

MEANING = (
    "note: <think> and </think> are tokens now, which the model has not been trained with; their rows are the {how} of those of "
    "their parts. Answers change: train some steps with them, or export without --think-tokens."
)


def add_think_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Give the tokenizer the tags as tokens.

    Returns:
        New token id -> ids of the parts that it had.

    Raises:
        ValueError: they are tokens already.
    """
    parts = {tag: tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in TAGS}
    new = [tag for tag, ids in parts.items() if len(ids) > 1]
    if not new:
        raise ValueError(
            "--think-tokens has no effect; <think> and </think> are tokens of this tokenizer. Leave it out."
        )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in new])
    return {tokenizer.get_vocab()[tag]: parts[tag] for tag in new}


@torch.no_grad()
def give_rows(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: dict[int, list[int]], how: How) -> None:
    """Rows for new tokens in the embedding and the output layer; the matrices grow where they have none to spare."""
    if vocabulary_size(tokenizer) > lm.config.get_text_config().vocab_size:
        lm.resize_token_embeddings(vocabulary_size(tokenizer), mean_resizing=False)
    layers = (lm.get_input_embeddings(), lm.get_output_embeddings())
    for weight in {id(layer.weight): cast(Tensor, layer.weight) for layer in layers}.values():  # one, if they are tied
        for new, ids in parts.items():
            rows = weight[ids].float()
            weight[new] = (rows.mean(0) if how == "mean" else rows.sum(0)).to(weight.dtype)
