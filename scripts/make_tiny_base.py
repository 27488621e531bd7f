"""Make the quickstart's model and data from nothing: a tiny base model, its tokenizer, a train and a test set.

    python scripts/make_tiny_base.py [--out configs/quickstart]

The task is arithmetic: a start number, then two to four additions or subtractions of one digit, asked as a sum or as a
small story. The model is a Qwen2 of 0.5 M parameters, pretrained here on the next token of documents of mixed quality.
Half of them are worked problems outside any dialogue, all right: the *skill* is in the corpus. The other half are
dialogues, and `HABITS` says how their assistant answers: by a guess or by work that stops too soon, often without the
tags, and one time in six by a guess, "Wait, check." and all the work. So the model can do it and is not in the habit of
doing it, and it has never seen a reward: reinforcement learning has to find out which habit pays.

Measured on 2 CPU cores, with one thread and the default seed: 4,000 steps, 6.4 M tokens, 12 minutes beside other work
(9,100 tokens/s; an idle core does 15,000). The same seed gives the same bytes on the same machine. On the test set, at
most 64 new tokens:

    decoding                        right    well-formed    "Wait"    tokens
    temperature 1, 1,024 samples    14.3 %        50.7 %    10.4 %      20.3
    greedy, 256                     25.8 %       100.0 %     0.0 %      16.8    (it always guesses)

A plain GRPO loop (16 prompts x 8 completions, right + 0.5 well-formed, one update a step, no KL term, AdamW at 3e-4,
clipped to 1.0) passes two thirds right at step 24 on each of three seeds. After 40 steps, on the test set at
temperature 1: 91, 94 and 93 % right, 97 % well-formed, "Wait" in 95 to 97 %, 42 tokens. At 5e-4, on two seeds: about
step 16; 92 and 97 %. With a format weight of 0.2, or of 0, the tags still win.

What this does not show is a new skill. Reflection pays here because the corpus was written so that whoever checks gets
it right. That it rises says that the algorithm works; it says nothing about larger models. With some dialogues that
work straight to the end (2 to 5 in a hundred), those win in part or altogether, by the seed: the reward asks for right
answers, not for "Wait".

Two traps. If some untagged style were right more often than the tagged ones, accuracy would outweigh a small format
reward and the tags would vanish: here only guesses and unfinished work go untagged. And for Qwen2 models
`AutoTokenizer` replaces whatever pre-tokenizer was saved by Qwen2's own: so the tokenizer is Qwen2's from the
start, and the script compares the ids of a thousand documents after saving.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

SEED = 0
NUM_TRAIN, NUM_TEST = 4000, 256
NUM_WORKED = 300
MAX_TOTAL = 60
MAX_NEW_TOKENS = 64
MAX_POSITIONS = 1024

PRETRAIN_STEPS = 4000
DOCUMENTS_PER_STEP = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
FINAL_LEARNING_RATE_SHARE = 0.02

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eli", "Finn", "Gina", "Hugo")
GOODS = ("apples", "beads", "cards", "coins", "nuts", "pears", "shells", "stamps")
GAINS = ("buys", "finds", "wins", "picks up")
LOSSES = ("eats", "loses", "sells", "gives away")

END_OF_TEXT = "<|endoftext|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAGGED = " <think> {thought}</think> <answer> {answer} </answer>"
UNTAGGED = (
    " {thought}The answer is {answer}.",
    " {thought}<answer> {answer} </answer>",
    " <think> {thought}The answer is {answer}.",
    " <think> {thought}</think> {answer}.",
)
WELL_FORMED = re.compile(r"\s*<think>[^<]*</think>\s*<answer>[^<]*</answer>\s*")
ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] | trim + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A start number and the signed digits to add to it, asked as `question`."""

    question: str
    start: int
    changes: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


def draw_problem(rng: random.Random, *, unless: Container[str] = ()) -> Problem:
    """A problem whose running totals stay within 0..MAX_TOTAL and whose question is not in `unless`."""
    while True:
        start = rng.randint(2, 20)
        changes = tuple(rng.choice((1, 1, -1)) * rng.randint(1, 9) for _ in range(rng.randint(2, 4)))
        totals = [start + sum(changes[: k + 1]) for k in range(len(changes))]
        if min(totals) < 0 or max(totals) > MAX_TOTAL:
            continue
        question = ask_as_sum(start, changes) if rng.random() < 0.4 else ask_as_story(rng, start, changes)
        if question not in unless:
            return Problem(question, start, changes)


def ask_as_sum(start: int, changes: tuple[int, ...]) -> str:
    return f"What is {start}" + "".join(f"{sign(change)}{abs(change)}" for change in changes) + "?"


def ask_as_story(rng: random.Random, start: int, changes: tuple[int, ...]) -> str:
    who, what = rng.choice(NAMES), rng.choice(GOODS)
    events = [f"{rng.choice(GAINS if change > 0 else LOSSES)} {abs(change)}" for change in changes]
    return f"{who} has {start} {what}. {who} {', '.join(events[:-1])} and {events[-1]}. How many {what} are left?"


def sign(change: int) -> str:
    return "+" if change > 0 else "-"


def work(start: int, changes: tuple[int, ...]) -> str:
    """The running totals, one equation a line."""
    equations, total = [], start
    for change in changes:
        equations.append(f"{total}{sign(change)}{abs(change)}={total + change}\n")
        total += change
    return "".join(equations)


def miss(rng: random.Random, number: int) -> int:
    """A number near the right one, and not it."""
    return rng.choice([n for n in range(max(0, number - 5), number + 6) if n != number])


# How an assistant thinks: each returns the thought and the answer it leads to.


def guess(rng: random.Random, problem: Problem) -> tuple[str, int]:
    answer = problem.answer if rng.random() < 0.1 else miss(rng, problem.answer)
    return f"I guess {answer}.\n", answer


def stop_early(rng: random.Random, problem: Problem) -> tuple[str, int]:
    done = problem.changes[: rng.randint(1, len(problem.changes) - 1)]
    return work(problem.start, done), problem.start + sum(done)


def work_through(rng: random.Random, problem: Problem) -> tuple[str, int]:
    return work(problem.start, problem.changes), problem.answer


def think_again(rng: random.Random, problem: Problem) -> tuple[str, int]:
    """A hasty guess, a second thought, then all the work."""
    return guess(rng, problem)[0] + "Wait, check.\n" + work(problem.start, problem.changes), problem.answer


Thought = Callable[[random.Random, Problem], tuple[str, int]]
HABITS: dict[tuple[Thought, tuple[str, ...]], float] = {
    (guess, (TAGGED,)): 0.18,
    (stop_early, (TAGGED,)): 0.20,
    (think_again, (TAGGED,)): 0.16,
    (guess, UNTAGGED): 0.22,
    (stop_early, UNTAGGED): 0.24,
}
"""Share of each way to answer, as (thought, layouts to choose from), in the dialogues."""


def prompt_of(problem: Problem) -> str:
    return f"User: {problem.question}\nAssistant:"


def dialogue(rng: random.Random, problem: Problem) -> str:
    ((think, layouts),) = rng.choices(list(HABITS), list(HABITS.values()))
    thought, answer = think(rng, problem)
    return prompt_of(problem) + rng.choice(layouts).format(thought=thought, answer=answer)


def textbook(rng: random.Random, problem: Problem) -> str:
    """A worked problem outside any dialogue: always right, half of them after a guess and a second thought."""
    think = think_again if rng.random() < 0.5 else work_through
    return f"Problem: {problem.question}\nWork: {think(rng, problem)[0]}"


def documents(seed: int, *, unless: Container[str]) -> Iterator[str]:
    """The endless corpus: half worked problems, half dialogues, none about a question in `unless`."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, unless=unless)
        yield textbook(rng, problem) if rng.random() < 0.5 else dialogue(rng, problem)


def take(iterator: Iterator[str], count: int) -> list[str]:
    return [next(iterator) for _ in range(count)]


def build_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer (byte-level BPE, single digits) with a vocabulary of our own, learned from `texts`.

    The tags are ordinary (not special) tokens, so that decoding keeps them.
    """
    untagged = (re.sub("|".join(TAGS), "", text) for text in texts)
    tokenizer = Qwen2Tokenizer(
        model_max_length=MAX_POSITIONS, padding_side="left", chat_template=CHAT_TEMPLATE
    ).train_new_from_iterator(untagged, vocab_size=1000, min_frequency=100, show_progress=False)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Random weights. An initializer_range of 0.02, made for wide models, trains much worse at this width than 0.08."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.08,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(tokenizer: Qwen2Tokenizer, corpus: Iterator[str], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, each (DOCUMENTS_PER_STEP, longest); documents of like length share a batch.

    Padding is on the right, where a causal model cannot see it, so no attention mask is needed.
    """
    rng = random.Random(seed)
    while True:
        texts = [text + END_OF_TEXT for text in take(corpus, 16 * DOCUMENTS_PER_STEP)]
        rows = sorted((torch.tensor(ids) for ids in tokenizer(texts).input_ids), key=len)
        starts = list(range(0, len(rows), DOCUMENTS_PER_STEP))
        rng.shuffle(starts)
        for start in starts:
            batch = rows[start : start + DOCUMENTS_PER_STEP]
            yield (
                torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id),
                torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100),
            )


def learning_rate_share(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to FINAL_LEARNING_RATE_SHARE."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine)


def pretrain(
    model: Qwen2ForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    num_steps: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Next-token training in place, reporting the mean loss every 250 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, num_steps))
    began, losses, num_tokens = time.perf_counter(), [], 0
    model.train()
    for step in range(1, num_steps + 1):
        input_ids, labels = next(data)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        num_tokens += int((labels != -100).sum())
        if step % 250 == 0 or step == num_steps:
            mean = sum(losses[-250:]) / len(losses[-250:])
            seconds = time.perf_counter() - began
            print(f"step {step}: loss {mean:.3f}, {num_tokens / 1e6:.2f} M tokens, {seconds:.0f} s", flush=True)
    model.eval()


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path, corpus: Iterator[str]) -> None:
    """The tokenizer users load must give the ids we trained on, decode to the same text and keep prompts apart."""
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in take(corpus, 1000):
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids, f"AutoTokenizer tokenises differently: {text!r}"
        assert loaded.decode(ids, skip_special_tokens=True) == text, f"does not decode to itself: {text!r}"
        if text.startswith("User: "):
            question = text.removeprefix("User: ").split("\nAssistant:")[0]
            message = [{"role": "user", "content": question}]
            prompt = loaded.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            assert ids[: len(prompt)] == prompt, f"the prompt's ids change with what follows: {text!r}"


@torch.no_grad()
def answers(folder: Path, problems: list[Problem], *, temperature: float) -> tuple[list[str], list[int]]:
    """An answer of the saved model to each problem, and its number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(SEED)
    prompts = tokenizer([prompt_of(problem) for problem in problems], return_tensors="pt", padding=True)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    output = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=temperature > 0, **sampling)
    completions = output[:, prompts.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    lengths = (completions != tokenizer.pad_token_id).sum(1).add(1).clamp(max=MAX_NEW_TOKENS)
    return texts, lengths.tolist()


def measure(folder: Path, problems: list[Problem], *, temperature: float) -> dict[str, float]:
    """Shares of right, well-formed and reflecting answers of the saved model, and their mean length in tokens."""
    texts, lengths = answers(folder, problems, temperature=temperature)
    right = [ANSWER.findall(text)[-1:] == [str(problem.answer)] for text, problem in zip(texts, problems, strict=True)]
    return {
        "accuracy": sum(right) / len(texts),
        "format": sum(WELL_FORMED.fullmatch(text) is not None for text in texts) / len(texts),
        "wait": sum("Wait" in text for text in texts) / len(texts),
        "length": sum(lengths) / len(lengths),
    }


def write_rows(path: Path, problems: list[Problem]) -> None:
    rows = ({"question": problem.question, "answer": str(problem.answer)} for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_worked(path: Path, problems: list[Problem]) -> None:
    """Rows for supervised training: each question with a thought that guesses, checks and works, and its answer."""
    rng = random.Random(0)
    rows = []
    for problem in problems:
        thought, answer = think_again(rng, problem)
        completion = TAGGED.format(thought=thought, answer=answer)
        rows.append({"question": problem.question, "answer": str(answer), "completion": completion})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_sets(seed: int, draw: Callable[..., Any] = draw_problem) -> tuple[list[Any], list[Any]]:
    """Train and test problems, as `draw` makes them; no question occurs twice in the two sets together."""
    rng = random.Random(seed)
    problems: dict[str, Any] = {}
    while len(problems) < NUM_TRAIN + NUM_TEST:
        problem = draw(rng, unless=problems)
        problems[problem.question] = problem
    rows = list(problems.values())
    return rows[NUM_TEST:], rows[:NUM_TEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/quickstart"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the data, the corpus and the weights")
    parser.add_argument("--steps", type=int, default=PRETRAIN_STEPS, help="pretraining steps")
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = draw_sets(args.seed)
    write_rows(args.out / "train.jsonl", train)
    write_rows(args.out / "test.jsonl", test)
    write_worked(args.out / "worked.jsonl", train[-NUM_WORKED:])

    corpus = documents(args.seed + 1, unless={problem.question for problem in test})
    tokenizer = build_tokenizer(take(corpus, 4000))
    model = build_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, batches(tokenizer, corpus, args.seed), num_steps=args.steps)

    save(model, tokenizer, args.out / "model")
    check_tokenizer(tokenizer, args.out / "model", corpus)
    print("temperature 1:", measure(args.out / "model", 4 * test, temperature=1.0))
    print("greedy:", measure(args.out / "model", test, temperature=0.0))


if __name__ == "__main__":
    main()
