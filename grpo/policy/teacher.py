"""Whether a policy can learn from another model what that makes of its tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from grpo.config import Config
from grpo.policy.families import attribute, check_family
from grpo.policy.model_source import model_config, source_of
from grpo.policy.tokenizer import check_positions, load_tokenizer


def check_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Before any model is loaded; nothing to check without a teacher.

    Args:
        tokenizer: the policy's.

    Raises:
        ValueError: the teacher's tokens are not the policy's, it knows too few positions, or it is an adapter.
    """
    teacher = config.teacher_model
    if teacher is None:
        return
    said = f"teacher.name is {config.teacher.name!r}"
    if source_of(teacher).adapter is not None:
        raise ValueError(f"{said}, an adapter. Merge it into its model (`merge_and_unload`), and name that.")
    check_family(teacher)
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if ours != theirs:
        differing = sorted(ours.items() ^ theirs.items(), key=lambda each: (each[1], each[0]))
        raise ValueError(
            f"{said}; its vocabulary is not that of model.name {config.model.name!r}: {len(theirs):,} tokens and {len(ours):,}, "
            f"{len({token for token, _ in differing}):,} of them different, such as {differing[0][0]!r}. It cannot tell how "
            "likely the policy's tokens are. Name a teacher with the same tokenizer, or learn from its answers: grpo sft."
        )
    rows = attribute(model_config(teacher).get_text_config(), "vocab_size")
    if rows is not None and max(ours.values()) >= rows:
        raise ValueError(
            f"{said}; its embedding matrix has {rows} rows, and the tokenizer's last token is {max(ours.values())}. Name a "
            "teacher that was trained with this tokenizer."
        )
    check_positions(teacher, config.max_sequence_tokens, said=f"{said}; it reads sequences that may have")
