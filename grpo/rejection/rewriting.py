"""A model rewrites kept rows into a form that is easy to read, and only those whose answer survives stay.

DeepSeek-R1 (arXiv 2501.12948v2) lets DeepSeek-V3 and people rewrite R1-Zero's answers for the cold start. Its prompt is not
published in full; template.py has ours, and `--rewrite-template` takes another. The rewriting model never sees the gold answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.prompts import build_prompts
from grpo.inference.resolve_model import LONG
from grpo.rejection.rules import Fall
from grpo.rejection.sampling import Row, seed_of
from grpo.rejection.template import PLACES
from grpo.text.answer_forms import sole_box
from grpo.types import Generator, Group, OnGroup, Prompt, Sampling


@dataclass(frozen=True)
class Kept:
    """A row that passed all rules, with the prompt that it answers."""

    prompt: Prompt
    row: Row
    pass_rate: float | None


def prompts_of(kept: Sequence[Kept], template: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
    """A prompt for each row: its number is the row's place, its columns are those of the question, for the verifier.

    Raises:
        ValueError: see build_prompts.
    """
    data = DataConfig(template="chat" if tokenizer.chat_template else "none", max_prompt_tokens=LONG)
    rows = [{"question": _filled(template, each), "answer": None} for each in kept]
    prompts, dropped = build_prompts(rows, tokenizer, data)
    if dropped:
        raise ValueError(
            f"--rewrite-template: {dropped.total()} prompts for the rewriting model are none: {', '.join(dropped)}. "
            "Correct the template."
        )
    return [
        replace(
            prompt,
            columns=own.prompt.columns,
            seed=seed_of(seed, "rewrite", own.prompt.row, own.row["sample"]),
        )
        for prompt, own in zip(prompts, kept, strict=True)
    ]


def _filled(template: str, kept: Kept) -> str:
    values = {"{question}": str(kept.prompt.columns["question"]), "{completion}": kept.row["completion"].strip()}
    return re.sub("|".join(map(re.escape, PLACES)), lambda place: values[place[0]], template)


def rewritten(reply: str, kept: Kept) -> str:
    """The solution in a reply, in the place of the row's own: with the same beginning that belongs to the prompt.

    It is what stands between the last `<rewritten>` and `</rewritten>`; without them the whole reply, less the rewriting model's
    own thoughts if two of them begin there.
    """
    tagged = re.findall(r"<rewritten>((?:(?!<rewritten>).)*?)</rewritten>", reply, re.DOTALL)
    text = tagged[-1] if tagged else reply
    if not tagged and text.count("</think>") > 1:
        text = text.partition("</think>")[2]
    text, before = text.strip(), kept.row["completion"]
    prefill = kept.prompt.prefill
    if prefill.strip():
        return prefill + text.removeprefix(prefill.strip()).lstrip()
    return before[: len(before) - len(before.lstrip())] + text


def in_tags(row: Row, prompt: Prompt) -> Row:
    r"""A sampled row in the paper's form: the text is the thought, and the last `\boxed{}` the answer.

    So a model that answers right in the form it knows makes the rows of its own cold start in the form that it is to learn. A row
    that cannot be written so has the reason as `untagged`, and falls. `original` is the text as it was sampled.
    """
    text = row["completion"].removeprefix(prompt.prefill).strip()
    if re.search(r"</?(think|answer)>", row["completion"]):
        return {**row, "untagged": "it has tags"}
    answer = sole_box(text)
    if answer is None:
        return {**row, "untagged": "no box is its whole answer"}
    tagged = f" <think> {text} </think> <answer> {answer} </answer>"
    return {**row, "completion": tagged, "original": row["completion"]}


class Rewriter:
    """A Generator whose completions are the rewritten solutions in the place of the replies, as the verifier is to see them."""

    def __init__(self, generator: Generator, kept: Sequence[Kept]) -> None:
        self.generator = generator
        self.kept = kept

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator."""
        groups = self.generator.sample(
            prompts,
            sampling,
            num_completions=num_completions,
            seed=seed,
            on_group=None if on_group is None else lambda p, group: on_group(p, self._restored(group)),
        )
        return [self._restored(group) for group in groups]

    def _restored(self, group: Group) -> Group:
        kept = self.kept[group.prompt.row]
        prompt = replace(group.prompt, text=kept.prompt.text, messages=kept.prompt.messages)
        return Group(prompt, [replace(each, text=rewritten(each.text, kept)) for each in group.completions])

    def sync(self) -> None:
        self.generator.sync()

    def halve(self) -> str | None:
        """See Generator."""
        return self.generator.halve()

    def release_memory(self) -> None:
        """See Generator."""
        self.generator.release_memory()

    def metrics(self) -> dict[str, float]:
        return self.generator.metrics()


def fall_of(falls: Sequence[Fall]) -> Fall | None:
    """What a rewritten row is dropped for: its answer is not what it was, or it is not readable after all."""
    for fall in falls:
        if fall.rule in ("wrong", "unknown"):
            return Fall("answer_lost", f"{fall.rule}: {fall.detail}")
    return Fall("rewrite_unreadable", f"{falls[0].rule}: {falls[0].detail}") if falls else None
