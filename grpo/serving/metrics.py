"""Counts and times of a server in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of a histogram's buckets."""

NAMES = {
    "grpo_requests_total": ("counter", "requests by path and status"),
    "grpo_prompt_tokens_total": ("counter", "tokens read"),
    "grpo_completion_tokens_total": ("counter", "tokens written"),
    "grpo_clients_left_total": ("counter", "requests whose client left before the end"),
    "grpo_preempted_total": ("counter", "sequences that gave their place up for want of pages"),
    "grpo_sequences_running": ("gauge", "completions in the running step"),
    "grpo_sequences_waiting": ("gauge", "completions that wait for a slot"),
    "grpo_slots": ("gauge", "completions that can run at once"),
    "grpo_pages_free": ("gauge", "pages for keys and values that nobody has"),
    "grpo_pages": ("gauge", "pages for keys and values"),
    "grpo_time_to_first_token_seconds": ("histogram", "from a request's arrival to its first token"),
    "grpo_time_between_tokens_seconds": ("histogram", "mean of a request, from its first token on"),
    "grpo_request_seconds": ("histogram", "from a request's arrival to its end"),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Used by the thread of the event loop alone."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, Labels], float] = defaultdict(float)
        self._histograms: dict[tuple[str, Labels], list[float]] = {}  # counts of each bucket and beyond, and the sum

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        self._values[name, _key(labels)] += value

    def set(self, name: str, value: float, /, **labels: str) -> None:
        self._values[name, _key(labels)] = value

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        counts = self._histograms.setdefault((name, _key(labels)), [0.0] * (len(SECONDS) + 2))
        counts[bisect_left(SECONDS, seconds)] += 1
        counts[-1] += seconds

    def text(self) -> str:
        lines = []
        for name, (kind, help_) in NAMES.items():
            own = [f"{name}{_labels(key)} {value:g}" for (each, key), value in self._values.items() if each == name]
            for (each, key), counts in self._histograms.items():
                own += _histogram(name, key, counts) if each == name else []
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}", *own] if own else []
        return "\n".join(lines) + "\n"


def _key(labels: dict[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _labels(key: Labels, **more: str) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in (*key, *more.items())]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _histogram(name: str, key: Labels, counts: list[float]) -> list[str]:
    lines, total = [], 0.0
    for bound, count in zip([*map(str, SECONDS), "+Inf"], counts[:-1], strict=True):
        total += count
        lines.append(f"{name}_bucket{_labels(key, le=bound)} {total:g}")
    return [*lines, f"{name}_sum{_labels(key)} {counts[-1]:g}", f"{name}_count{_labels(key)} {total:g}"]
