"""Length: a soft penalty for answers that come close to the token limit."""

from __future__ import annotations


def overlong(num_tokens: int, max_completion_tokens: int, *, buffer: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13): 0, then falling to -1 over the last `buffer` tokens.

        0                                                           num_tokens <= max_completion_tokens - buffer
        (max_completion_tokens - buffer - num_tokens) / buffer      up to max_completion_tokens
        -1                                                          beyond

    DAPO generates 20,480 tokens with a buffer of 4,096. With a limit of 100 and a buffer of 20, 90 tokens cost 0.5.

    With tools `num_tokens` are the model's own and the limit is what the results of the completion leave of it, which may be
    less than the buffer; that the whole limit is not is checked when a run starts.

    Raises:
        ValueError: buffer is not at least 1.
    """
    _check_limit(max(max_completion_tokens, buffer), buffer=buffer)
    room = max_completion_tokens - buffer - num_tokens
    return max(min(room / buffer, 0.0), -1.0)


def _check_limit(max_completion_tokens: int, *, buffer: int) -> None:
    if not 1 <= buffer <= max_completion_tokens:
        raise ValueError(
            f"overlong's buffer is {buffer}; it must be between 1 and max_completion_tokens ({max_completion_tokens}). "
            f"Set rewards.*.args.buffer to, say, {max(max_completion_tokens // 5, 1)}."
        )


overlong.check_limit = _check_limit  # type: ignore[attr-defined]
