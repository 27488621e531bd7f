"""How near a model's GGUF files are to it, one for each type: size, divergence, and the text of greedy answers.

    python benchmarks/gguf_types.py configs/quickstart/model --data configs/quickstart/test.jsonl

transformers reads each file back and dequantises it. Over the original's own greedy answers: the mean KL divergence of a token's
distribution in nats, how often the likeliest token is the same, and in how many answers all tokens are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModelForCausalLM

from grpo.cli import export
from grpo.config import DataConfig, ModelConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows
from grpo.export.gguf_file import QUANTIZATIONS
from grpo.policy.tokenizer import end_token_ids, load_tokenizer


@dataclass(frozen=True)
class Nearness:
    """Of one file to the model that it was made of."""

    quantization: str
    num_bytes: int
    kl: float  # nats for each token
    same_token: float  # share of tokens
    same_text: float  # share of answers

    def row(self) -> str:
        return (
            f"| {self.quantization} | {self.num_bytes / 1e6:,.1f} | {self.kl:.2g} | {100 * self.same_token:.2f} % | "
            f"{100 * self.same_text:.0f} % |"
        )


def measure(
    model: str, prompts: list[list[int]], *, num_tokens: int, types: list[str], scratch: Path
) -> Iterator[Nearness]:
    config = ModelConfig(name=model)
    ends = end_token_ids(config, load_tokenizer(config))
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = [greedy(original, prompt, num_tokens, ends) for prompt in prompts]
    before = [logprobs_of(original, *pair) for pair in zip(prompts, answers, strict=True)]
    for kind in types:
        options = export.parser().parse_args([model, "--quantization", kind, "--out", str(scratch / kind)])
        file = Path(*export.run(options))
        lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        after = [logprobs_of(lm, *pair) for pair in zip(prompts, answers, strict=True)]
        p, q = torch.cat(before), torch.cat(after)
        yield Nearness(
            kind,
            file.stat().st_size,
            float((p.exp() * (p - q)).sum(-1).mean()),
            float((p.argmax(-1) == q.argmax(-1)).float().mean()),
            sum(greedy(lm, prompt, num_tokens, ends) == answer for prompt, answer in zip(prompts, answers, strict=True))
            / len(prompts),
        )


def greedy(lm: Any, prompt: list[int], num_tokens: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def logprobs_of(lm: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of every token of the answer, (T, V)."""
    logits = lm(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="questions")
    parser.add_argument("--template", default="chat")
    parser.add_argument("--num-questions", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--types", nargs="+", default=list(QUANTIZATIONS), choices=list(QUANTIZATIONS))
    options = parser.parse_args()
    data = DataConfig(name=options.data, template=options.template, max_prompt_tokens=10**9)
    rows = load_rows(data, reads_answer=True)[: options.num_questions]
    prompts, _ = build_prompts(rows, load_tokenizer(ModelConfig(name=options.model)), data)
    print("| type | MB | KL per token | same likeliest token | same greedy answer |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for each in measure(
            options.model,
            [prompt.token_ids for prompt in prompts],
            num_tokens=options.max_tokens,
            types=options.types,
            scratch=Path(scratch),
        ):
            print(each.row(), flush=True)


if __name__ == "__main__":
    main()
