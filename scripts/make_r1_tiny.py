"""Make the two models of configs/r1-tiny: a base that mixes languages, and a student of a fifth of its size.

    python scripts/make_r1_tiny.py [--out configs/r1-tiny]

The base is the quickstart's (scripts/make_tiny_base.py), pretrained further; the student begins with random weights. Both learn
from the quickstart's documents, worked problems and answers by habit, with two habits more, so that R1's path has something to
mend:

- Half of those who think again do so in Chinese, to an English question ("等等，检查。"). They never slip; those who check in
  English do, in one equation of twenty. So accuracy alone pays for Chinese, as it does in DeepSeek-R1-Zero, and the reward for
  language consistency (arXiv 2501.12948v2, section 2.3.2) has a price.
- Of the later steps of a check, half begin with "Then" or 然后: a thought has words of its language throughout.

They have one tokenizer, the quickstart's with WORDS, so that the student can learn from the other's tokens. They have never seen
a reward. The questions are the quickstart's.

Measured with the default seed on two cores beside much other work (716 s and about 1,000 s; idle, a few minutes). The test
set, at most 64 new tokens:

    model      decoding                        right    well-formed    "Wait"    Han    tokens
    base       temperature 1, 1,024 samples    11.5 %        47.5 %     4.7 %  6.0 %      20.5
    base       greedy, 256                     23.0 %       100.0 %     0.0 %  0.0 %      16.8
    student    temperature 1, 1,024 samples     9.2 %        46.5 %     3.6 %  5.0 %      20.0
    student    greedy, 256                     12.5 %       100.0 %     0.0 %  0.0 %      16.8
"""

import argparse
import random
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import make_tiny_base as base
import torch
from make_tiny_base import Problem
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

CHINESE_SHARE = 0.5  # of the second thoughts
SLIP = 0.05  # of an equation in a check in English
THEN_SHARE = 0.5  # of the steps of a check after its first
HAN = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Size:
    """A model, and how long it is pretrained."""

    steps: int
    learning_rate: float
    hidden: int = 0  # 0: it is the quickstart's model, pretrained further
    layers: int = 0


SIZES = {"base": Size(700, 1.5e-3), "student": Size(3000, base.LEARNING_RATE, hidden=64, layers=2)}
START = Path("configs/quickstart/model")
WORDS = ("等等", "，", "检查", "。", "然后", "Then")
"""Each a token, where the quickstart's tokenizer would need three bytes for a character."""


def think_again(rng: random.Random, problem: Problem) -> tuple[str, int]:
    """A hasty guess, and a check in one of two languages; in English with slips, which the later equations go on from."""
    thought = base.guess(rng, problem)[0]
    is_chinese = rng.random() < CHINESE_SHARE
    begin, then = ("等等，检查。\n", "然后 ") if is_chinese else ("Wait, check.\n", "Then ")
    total, steps = problem.start, []
    for number, change in enumerate(problem.changes):
        found = total + change
        if not is_chinese and rng.random() < SLIP:
            found = base.miss(rng, found)
        word = then if number and rng.random() < THEN_SHARE else ""
        steps.append(f"{word}{total}{base.sign(change)}{abs(change)}={found}\n")
        total = found
    return thought + begin + "".join(steps), total


HABITS = {
    (think_again if think is base.think_again else think, layouts): share
    for (think, layouts), share in base.HABITS.items()
}
"""Shares as in the quickstart."""


def documents(seed: int, *, unless: Container[str]) -> Iterator[str]:
    """The endless corpus: half worked problems, half dialogues, none about a question in `unless`."""
    rng = random.Random(seed)
    while True:
        problem = base.draw_problem(rng, unless=unless)
        if rng.random() < 0.5:
            think = think_again if rng.random() < 0.5 else base.work_through
            yield f"Problem: {problem.question}\nWork: {think(rng, problem)[0]}"
        else:
            ((think, layouts),) = rng.choices(list(HABITS), list(HABITS.values()))
            thought, answer = think(rng, problem)
            yield base.prompt_of(problem) + rng.choice(layouts).format(thought=thought, answer=answer)


def build_model(tokenizer: Qwen2Tokenizer, size: Size, seed: int) -> Qwen2ForCausalLM:
    """The quickstart's model with rows for WORDS, or random weights; a narrower model begins with larger ones."""
    torch.manual_seed(seed)
    if not size.hidden:
        model = Qwen2ForCausalLM.from_pretrained(START, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        return model
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=max(1, size.hidden // 64),
            max_position_embeddings=base.MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.08 * (128 / size.hidden) ** 0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def measure(folder: Path, problems: list[Problem], *, temperature: float) -> str:
    """In percent: right, well-formed, "Wait", answers with Chinese characters; and the mean length in tokens."""
    texts, lengths = base.answers(folder, problems, temperature=temperature)
    shares = {
        "right": [base.ANSWER.findall(t)[-1:] == [str(p.answer)] for t, p in zip(texts, problems, strict=True)],
        "well-formed": [base.WELL_FORMED.fullmatch(text) is not None for text in texts],
        "Wait": ["Wait" in text for text in texts],
        "Han": [HAN.search(text) is not None for text in texts],
    }
    said = ", ".join(f"{name} {sum(values) / len(texts):.1%}" for name, values in shares.items())
    return f"{said}, {sum(lengths) / len(lengths):.1f} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/r1-tiny"), help="folder to write into")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seed", type=int, default=base.SEED, help="seed of the corpus and the weights")
    parser.add_argument("--steps", type=int, help="pretraining steps; default: each model's own")
    args = parser.parse_args()

    torch.set_num_threads(1)
    _, test = base.draw_sets(base.SEED)  # the quickstart's
    corpus = partial(documents, args.seed + 1, unless={problem.question for problem in test})
    tokenizer = AutoTokenizer.from_pretrained(START)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    for name in args.models:
        size, folder = SIZES[name], args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        model = build_model(tokenizer, size, args.seed)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
        data = base.batches(tokenizer, corpus(), args.seed)
        base.pretrain(model, data, num_steps=args.steps or size.steps, learning_rate=size.learning_rate)
        base.save(model, tokenizer, folder)
        base.check_tokenizer(tokenizer, folder, corpus())
        print("temperature 1:", measure(folder, 4 * test, temperature=1.0))
        print("greedy:", measure(folder, test, temperature=0.0), flush=True)


if __name__ == "__main__":
    main()
