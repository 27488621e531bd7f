"""Throughput and latency of `grpo serve`, or of any server with OpenAI's API, under 1, 16, 64 and 256 clients.

    python benchmarks/serve.py --model DIR --clients 1 16 64 256 --new-tokens 256

Another server, which is already running, in the same way:

    python benchmarks/serve.py --url http://127.0.0.1:8001/v1 --name DIR --clients 1 16 64 256 --new-tokens 256

Without a GPU, to see that it runs:

    python benchmarks/serve.py --size tiny --clients 1 4 --new-tokens 8

Each client streams one completion after the other. Prompts are random words, no two alike, so a cache of prefixes has nothing to
keep. `ignore_eos` is asked for, so that every completion has the same length; the servers' own usage says how many tokens there
were. A gap is the time between two events of a stream, of one token or of several, as the server sends them. The time per token
is that from the first to the last event over the tokens behind the first event.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workload import SHAPES, saved_model

from grpo.observe.console import positive

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
]


def main() -> None:
    args = parse_args()
    print(shlex.join(sys.argv), flush=True)
    with server(args) as (url, name, _):
        asyncio.run(warm_up(url, name, args))
        records = [asyncio.run(measure(url, name, clients, args)) for clients in args.clients]
    print(table(records))
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Those of a server and of what it is asked."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="serve random weights of this shape")
    parser.add_argument("--model", help="serve this directory instead")
    parser.add_argument(
        "--url", help="ask this server instead, up to and including its version: http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--name", help="of the model there; with --url")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="leave out fields that a server may refuse; its events count as tokens then",
    )
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 16, 64, 256], help="at once")
    parser.add_argument("--rounds", type=positive, default=3, help="requests of each client")
    parser.add_argument("--prompt-words", type=positive, default=128)
    parser.add_argument(
        "--beside-words",
        type=positive,
        metavar="N",
        help="meanwhile one more client, which is not counted, asks with prompts of so many words, one after the other",
    )
    parser.add_argument("--new-tokens", type=positive, default=256, help="of each completion")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="append the results to this file, a line of JSON each")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where the random models are kept")
    return parser


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    args = parser.parse_args()
    if (args.url is None) != (args.name is None):
        parser.error("--url and --name go together: the server, and what the model is called there.")
    return args


@contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, str, int | None]]:
    """The address and the model's name of the server that is asked, and the process of ours, which is started and ended again."""
    if args.url is not None:
        yield args.url, args.name, None
        return
    model = args.model or str(saved_model(args.size, args.cache))
    words = max(args.prompt_words, args.beside_words or 0)
    longest = str(4 * words + args.new_tokens) if args.size != "tiny" or words > 100 else "512"
    command = [sys.executable, "-m", "grpo", "serve", "--model", model, "--name", "own", "--port", "0"]
    command += [
        "--max-sequences",
        str(max(args.clients) + bool(args.beside_words)),
        "--max-context",
        longest,
        "--template",
        "none",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None, "it is a pipe"
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("serving at "):
                yield line.split()[2] + "/v1", "own", process.pid
                break
        else:
            raise SystemExit("the server has not started:\n" + "".join(said[-20:]))
    finally:
        process.terminate()
        process.wait(timeout=60)


@dataclass
class Asked:
    """One request as its client saw it; seconds."""

    begun: float
    events: list[float] = field(default_factory=list)  # when those came that brought text
    usage: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.events) if self.usage is None else int(self.usage["completion_tokens"])


async def warm_up(url: str, name: str, args: argparse.Namespace) -> None:
    """So that nothing is compiled or captured while it is measured."""
    for clients in sorted({1, *args.clients}):
        await asyncio.gather(*(ask(url, name, prompt(args, -1 - n), args) for n in range(clients)))


async def measure(url: str, name: str, clients: int, args: argparse.Namespace) -> dict[str, Any]:
    async def client(number: int) -> list[Asked]:
        return [
            await ask(url, name, prompt(args, 1_000_000 * clients + number * args.rounds + n), args)
            for n in range(args.rounds)
        ]

    async def beside() -> None:
        for number in itertools.count():
            await ask(url, name, prompt(args, -1_000 - number, args.beside_words), args)

    other = asyncio.create_task(beside()) if args.beside_words else None
    start = time.perf_counter()
    found = [asked for each in await asyncio.gather(*map(client, range(clients))) for asked in each]
    seconds = time.perf_counter() - start
    if other is not None:
        if other.done():
            other.result()  # the server has refused it
        other.cancel()
    num_tokens = sum(asked.num_tokens for asked in found)
    first = [asked.events[0] - asked.begun for asked in found]
    gaps = [b - a for asked in found for a, b in zip(asked.events, asked.events[1:], strict=False)]
    each = [
        (asked.events[-1] - asked.events[0]) / (asked.num_tokens * (1 - 1 / len(asked.events)))
        for asked in found
        if len(asked.events) > 1
    ]
    whole = [asked.events[-1] - asked.begun for asked in found]
    return {
        "url": url if args.url else "grpo serve",
        "clients": clients,
        "requests": len(found),
        "prompt_tokens": sum((asked.usage or {}).get("prompt_tokens", 0) for asked in found) / len(found),
        "new_tokens": num_tokens / len(found),
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        **{f"first_token_{label}": value for label, value in quantiles(first).items()},
        **{f"gap_{label}": value for label, value in quantiles(gaps).items()},
        **{f"per_token_{label}": value for label, value in quantiles(each).items()},
        **{f"request_{label}": value for label, value in quantiles(whole).items()},
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile, by rank."""
    ordered = sorted(values) or [float("nan")]
    return {f"p{share}": ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 99)}


def prompt(args: argparse.Namespace, seed: int, num_words: int | None = None) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words or args.prompt_words))


async def ask(url: str, name: str, text: str, args: argparse.Namespace) -> Asked:
    """Stream one completion. Read by hand: a client library would take longer than a server for a small model."""
    where = urlsplit(url)
    is_chat = args.api == "chat"
    body = {
        "model": name,
        "max_tokens": args.new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "stream": True,
        **({} if args.plain else {"ignore_eos": True, "stream_options": {"include_usage": True}}),
        **({"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}),
    }
    data = json.dumps(body).encode()
    head = [
        f"POST {where.path}/{'chat/completions' if is_chat else 'completions'} HTTP/1.1",
        f"Host: {where.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
    ]
    if key := os.environ.get("OPENAI_API_KEY"):
        head.append(f"Authorization: Bearer {key}")
    reader, writer = await asyncio.open_connection(where.hostname, where.port or 80, limit=2**20)
    asked = Asked(time.perf_counter())
    writer.write("\r\n".join([*head, "", ""]).encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{url} answered {status.decode().strip()}: {(await reader.read(4000)).decode()[-1000:]}")
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        if b'"usage":{' in line or b'"usage": {' in line:
            asked.usage = json.loads(line[6:])["usage"]
        elif b'"error"' in line and "error" in (found := json.loads(line[6:])):
            raise SystemExit(f"{url}: {found['error']}")
        elif asked.events or _has_text(json.loads(line[6:])):
            asked.events.append(time.perf_counter())
    writer.close()
    if not asked.events:
        raise SystemExit(f"{url} sent no text")
    return asked


def _has_text(event: dict[str, Any]) -> bool:
    return any(
        choice.get("text") or any((choice.get("delta") or {}).get(name) for name in ("content", "reasoning"))
        for choice in event["choices"]
    )


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds, but for tokens."""
    head = (
        "clients",
        "tokens/s",
        "first token p50",
        "p99",
        "per token p50",
        "p99",
        "gap p50",
        "p99",
        "request p50",
        "p99",
    )
    names = [f"{what}_{share}" for what in ("first_token", "per_token", "gap", "request") for share in ("p50", "p99")]
    rows = [
        (
            str(each["clients"]),
            f"{each['tokens_per_second']:,.0f}",
            *(f"{1000 * each[name]:,.{2 if name.startswith('per') else 1}f}" for name in names),
        )
        for each in records
    ]
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    first = records[0]
    said = f"{first['url']}: prompts of {first['prompt_tokens']:.0f} tokens, {first['new_tokens']:.0f} new ones; milliseconds"
    return "\n".join([said, *lines])


if __name__ == "__main__":
    main()
