"""Does `grpo serve` lose anything? Thousands of requests, of which a share leave in the middle; then slots, pages, descriptors.

    python benchmarks/soak.py --model DIR --requests 2000 --clients 64
    python benchmarks/soak.py --size tiny --requests 200 --clients 8 --new-tokens 16

Of four requests one leaves after its first text, one before any has come, and two stay; prompts and completions have any length
up to the limits. In the end no sequence may run or wait, all pages must be free, and the server may hold no more descriptors.
Its memory is printed after each quarter: what is lost grows on, what is kept for later comes to rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from serve import WORDS, arguments, server

SETTLED_SECONDS = 60
"""In which those who have left must be noticed: a chunk of steps, or a prompt that is being read."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="in all")
    args = parser.parse_args()
    args.clients, args.beside_words = [max(args.clients)], None
    if args.url is not None:
        parser.error(
            "--url names a server that is not ours; whether it loses descriptors cannot be seen. Name --model."
        )
    with server(args) as (url, name, pid):
        assert pid is not None, "it was started here"
        asyncio.run(soak(url, name, range(-8, 0), args.clients[0], args))  # compiles, opens what stays open
        before, memory, ends = settled(url, pid)["descriptors"], [resident_mib(pid)], Counter[str]()
        start = time.perf_counter()
        for quarter in range(4):
            numbers = range(args.requests * quarter // 4, args.requests * (quarter + 1) // 4)
            ends += asyncio.run(soak(url, name, numbers, args.clients[0], args))
            memory.append(resident_mib(pid))
        seconds = time.perf_counter() - start
        left = settled(url, pid, at_most=before)
    print(f"{args.requests} requests of {args.clients[0]} clients in {seconds:.0f} s: {dict(sorted(ends.items()))}")
    print(f"left: {left}; descriptors at first {before}; memory {' -> '.join(map(str, memory))} MiB")
    lost = not is_idle(left) or left["descriptors"] > before
    print("something was lost" if lost else "nothing was lost")
    return int(lost)


async def soak(url: str, name: str, numbers: range, clients: int, args: argparse.Namespace) -> Counter[str]:
    """How the requests ended."""
    waiting, ends = iter(numbers), Counter[str]()

    async def client() -> None:
        for number in waiting:
            ends[await ask(url, name, random.Random(number), args)] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return ends


async def ask(url: str, name: str, rng: random.Random, args: argparse.Namespace) -> str:
    leaves = rng.choice(["at once", "after some text", "never", "never"])
    body = {
        "model": name,
        "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, args.prompt_words))),
        "max_tokens": rng.randint(1, args.new_tokens),
        "n": rng.choice([1, 1, 3]),
        "stream": rng.random() < 0.7 or leaves == "after some text",
    }
    data, where = json.dumps(body).encode(), urlsplit(url)
    head = f"POST {where.path}/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**20)
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    try:
        if leaves == "at once":
            await asyncio.sleep(rng.random() * 0.05)
            return "left at once"
        status = (await reader.readline()).decode().strip()
        if " 200 " not in status:
            return status
        if leaves == "after some text":
            await reader.readuntil(b"data: {")
            return "left after some text"
        answer = await reader.read()
        return "answered" if (b"[DONE]" in answer) == body["stream"] else "cut off"
    finally:
        writer.close()


def settled(url: str, pid: int, at_most: int | None = None) -> dict[str, int]:
    """What must go back to nothing, once it has, or after SETTLED_SECONDS; sockets are closed a moment after their clients'.

    Args:
        at_most: the number of descriptors to wait for; None: one that stays the same for a second.
    """
    numbers: list[int] = []
    for _ in range(10 * SETTLED_SECONDS):
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
            text = answer.read().decode()
        names = {
            "running": "sequences_running",
            "waiting": "sequences_waiting",
            "pages_free": "pages_free",
            "pages": "pages",
        }
        found = {key: _number(rf"^grpo_{each}{{.*}} (\d+)", text) for key, each in names.items()}
        time.sleep(0.1)  # in which the connection of this question is closed, too
        found["descriptors"] = descriptors(pid)
        numbers.append(found["descriptors"])
        rests = len(numbers) >= 10 and len({*numbers[-10:]}) == 1
        if is_idle(found) and (rests if at_most is None else numbers[-1] <= at_most):
            break
    return found


def is_idle(found: dict[str, int]) -> bool:
    return found["running"] + found["waiting"] == 0 and found["pages"] == found["pages_free"]


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mib(pid: int) -> int:
    return _number(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) // 1024


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, f"{pattern} is not in {text[:200]}"
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
