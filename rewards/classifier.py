"""A reward model of the hub: a sequence classifier with one output, frozen, that scores all completions of a question at once.

It runs where `where` says: in a reward worker on the CPU, beside the sampling, or in the training process on its GPU, between two
groups that are sampled. What it reads is made as it was in its training: by its tokenizer's chat template, as a pair of texts, or
as one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .parts_of import check_part, part_of

FORMATS = ("chat", "pair", "text")
PLACES = ("worker", "process")
LOAD_SECONDS = 60.0


class RewardModel:
    """The scalar that a sequence classifier gives to question and completion; None for what is too long for it.

    Args:
        model: a directory, or an id of the hub.
        where: `worker` (CPU) or `process` (the training process's device).
        format: what it reads. `chat`: its chat template over the conversation with the completion as the assistant's reply;
            `pair`: question and completion as two texts; `text`: prompt and completion as one. None: chat if its tokenizer has a
            template, else pair.
        part: of the completion, `all` or `answer` (without thoughts).
        revision: branch, tag or commit of a hub model.
        max_tokens: of what it reads; None: as many as it has positions, at most 8192. A longer text is not cut: nobody could tell
            from its beginning.
        batch_tokens: padded tokens of a forward pass.

    Raises:
        ValueError: it is no classifier, or has no single output; the model itself is not loaded for that.
    """

    def __init__(
        self,
        model: str,
        where: str = "worker",
        format: str | None = None,
        part: str = "all",
        revision: str = "main",
        max_tokens: int | None = None,
        batch_tokens: int = 16384,
        dtype: str = "auto",
    ) -> None:
        self.__name__ = "reward_model"
        if where not in PLACES:
            raise ValueError(
                f"where reward_model runs is {where!r}; it is {' or '.join(PLACES)}. Correct rewards.*.args.where."
            )
        if format is not None and format not in FORMATS:
            raise ValueError(
                f"the format of reward_model is {format!r}; it is {', '.join(FORMATS)} or null. Correct rewards.*.args.format."
            )
        check_part("reward_model", part)
        self.model, self.where, self.format, self.part, self.revision = model, where, format, part, revision
        self.max_tokens, self.batch_tokens, self.dtype = max_tokens, batch_tokens, dtype
        self._loaded: Any = None
        self._check()

    in_process = property(lambda self: self.where == "process", doc="Whether it is called in the training process.")
    tells_of_all = True  # None is a text that is too long
    least_seconds = 300.0  # of a call, whatever scoring.timeout_seconds says: a CPU reads a group for a while

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker: load the model at its start, where no call's time and memory are limited yet."""
        vars(self).update(state)
        self.load()

    def _check(self) -> None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rewards.*.args.model of reward_model is {self.model!r}; it cannot be read: {error}. Name a directory or a "
                "model of the hub."
            ) from error
        kinds = list(config.architectures or [])
        if not any(kind.endswith(("ForSequenceClassification", "RewardModel")) for kind in kinds):
            raise ValueError(
                f"rewards.*.args.model of reward_model is {self.model!r}, a {', '.join(kinds) or 'model of no architecture'}; it "
                "has no scalar head. Name a model whose architecture is ...ForSequenceClassification with one label."
            )
        if config.num_labels != 1:
            raise ValueError(
                f"rewards.*.args.model of reward_model is {self.model!r}; it has {config.num_labels} outputs "
                f"({', '.join(map(str, list(config.id2label.values())[:5]))}), and a reward model has one. Name another."
            )

    def load(self) -> None:
        """Load the model onto its device.

        Raises:
            ValueError: its files have no weights for the head.
        """
        if self._loaded is not None:
            return
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = torch.device("cuda", torch.cuda.current_device()) if self._on_gpu() else torch.device("cpu")
        dtype = self.dtype if self.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        with _whole_weights():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.model, revision=self.revision, dtype=getattr(torch, dtype), output_loading_info=True
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"rewards.*.args.model of reward_model is {self.model!r}; its files lack weights for {', '.join(missing[:3])}, "
                "which would be random. Name a model that was trained as a reward model."
            )
        tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision)
        if self.format == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"the format of reward_model is 'chat'; the tokenizer of {self.model!r} has no chat template. Set it to pair "
                "or text."
            )
        self._loaded = model.to(device).requires_grad_(False).eval(), tokenizer

    def _on_gpu(self) -> bool:
        import torch

        return self.where == "process" and torch.cuda.is_available()

    def __call__(
        self,
        completions: list[str],
        prompts: list[str],
        question: list[str],
        question_messages: list[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> list[float | None]:
        """The completions' scores, in any batches the same up to rounding."""
        self.load()
        turns = question_messages or [None] * len(completions)
        texts = [
            self._read(part_of(completion, self.part), prompt, asked, own)
            for completion, prompt, asked, own in zip(completions, prompts, question, turns, strict=True)
        ]
        limit = self._limit()
        lens = [len(ids) for ids, _ in texts]
        fits = [n for n, length in enumerate(lens) if 0 < length <= limit]
        scores: list[float | None] = [None] * len(texts)
        for batch in _batches(fits, lens, self.batch_tokens):
            for number, score in zip(batch, self._scores([texts[n] for n in batch]), strict=True):
                scores[number] = score
        if log_metric is not None:
            for number in range(len(texts)):
                log_metric("reward_model_too_long", float(number not in fits))
        return scores

    def _read(self, completion: str, prompt: str, question: str, turns: Any) -> tuple[list[int], list[int] | None]:
        """Token ids, and which of two texts each belongs to where the model tells them apart."""
        tokenizer = self._loaded[1]
        how = self.format or ("chat" if tokenizer.chat_template else "pair")
        if how == "pair":
            pair = tokenizer(question, completion)
            return list(pair["input_ids"]), pair.get("token_type_ids")
        if how == "text":
            return list(tokenizer(prompt + completion)["input_ids"]), None
        messages = [*(turns or [{"role": "user", "content": question}]), {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]), None

    def _limit(self) -> int:
        positions = getattr(self._loaded[0].config.get_text_config(), "max_position_embeddings", None)
        return self.max_tokens or min(positions or 8192, 8192)

    def _scores(self, batch: list[tuple[list[int], list[int] | None]]) -> list[float]:
        """Padded on the right. The head of a decoder reads the last token that is not the padding's: where the model's own
        configuration names none, the padding is a token that is in none of the texts, so that it reads their true last one."""
        import torch

        model, _ = self._loaded
        config = model.config
        own = getattr(config, "pad_token_id", None)
        used = {token for ids, _ in batch for token in ids}
        pad = own if own is not None else next(token for token in range(len(used) + 1) if token not in used)
        width = max(len(ids) for ids, _ in batch)
        tokens = torch.full((len(batch), width), pad, dtype=torch.long)
        mask, types = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for number, (ids, of_text) in enumerate(batch):
            tokens[number, : len(ids)] = torch.tensor(ids)
            mask[number, : len(ids)] = 1
            if of_text is not None:
                types[number, : len(ids)] = torch.tensor(of_text)
        device = next(model.parameters()).device
        also = {} if batch[0][1] is None else {"token_type_ids": types.to(device)}
        config.pad_token_id = pad
        try:
            with torch.inference_mode():
                logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), **also).logits
        finally:
            config.pad_token_id = own
        return [float(value) for value in logits.float().reshape(len(batch)).tolist()]


def _batches(numbers: Sequence[int], lens: Sequence[int], budget: int) -> list[list[int]]:
    """The longest first, so many together that they have at most `budget` tokens with their padding; at least one."""
    batches: list[list[int]] = []
    for number in sorted(numbers, key=lambda n: -lens[n]):
        if batches and (len(batches[-1]) + 1) * lens[batches[-1][0]] <= budget:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _whole_weights() -> Any:
    """Under ZeRO-3 transformers would split what it loads over the processes, and this model is none of DeepSpeed's."""
    import contextlib

    @contextlib.contextmanager
    def without() -> Any:
        from transformers.integrations import deepspeed

        before = deepspeed._hf_deepspeed_config_weak_ref
        deepspeed._hf_deepspeed_config_weak_ref = None
        try:
            yield
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = before

    return without()
