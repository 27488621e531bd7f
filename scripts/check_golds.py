r"""Is each gold answer of a data set equal to itself and to its rewritten spellings, and to no other one?

    python scripts/check_golds.py --data math_test.jsonl gsm8k.jsonl.gz

Per file: how many gold answers `accuracy` cannot grade, with reasons; spellings of a gold answer that it refuses; and pairs of
different gold answers that it takes for equal, for a person to read. What is written as one line of JSON per question is read,
gzipped or not; --column names the gold answer. Exit code 1 if a spelling is refused.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.rewards.accuracy import accuracy
from grpo.rewards.verifier.equivalence import Gold, read_gold, same_value

from grpo.observe.bar import Bar


def spellings(gold: str) -> dict[str, str]:
    r"""Other ways to write a gold answer, by what was done to it; `1+\frac{1}{2}` gives, among others, `\frac{1}{2}+1`."""
    bare = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", gold).removesuffix(".")
    ways = {
        "itself": gold,
        "in dollars": f"${gold}$",
        "in a box": f"\\boxed{{{gold}}}",
        "displayed": f"\\[ \\displaystyle {gold} \\]",
        "with a full stop": gold if gold.endswith(".") else f"{gold}.",
        "dfrac": re.sub(r"\\[dt]?frac(?![a-zA-Z])", r"\\dfrac", gold),
        "tfrac": re.sub(r"\\[dt]?frac(?![a-zA-Z])", r"\\tfrac", gold),
        "without left": bare,
        "with left": _with_left(bare),
        "spaces": _spaced(gold),
        "no spaces": _unspaced(gold),
        "thousands": _with_thousands(gold),
        "a decimal point": f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else gold,
        "slash": re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold),
        "another order": _in_another_order(bare),
    }
    if "$" in gold:
        del ways["in dollars"]
    return {name: text for name, text in ways.items() if name == "itself" or text != gold}


def _with_left(text: str) -> str:
    is_paired = text.count("(") == text.count(")") and "[" not in text and "]" not in text
    return re.sub(r"(?<!\\)\)", r"\\right)", re.sub(r"(?<!\\)\(", r"\\left(", text)) if is_paired else text


def _spaced(text: str) -> str:
    """Spaces around signs that are not part of a word, a number or a command."""
    return text if "\\text" in text or "\\mbox" in text else re.sub(r"(?<![\\^_{,eE])([-+=<>])", r" \1 ", text)


def _unspaced(text: str) -> str:
    return text if "\\text" in text or "\\mbox" in text else re.sub(r"\s*(?<!\\)([-+=<>(){}])\s*", r"\1", text)


def _with_thousands(text: str) -> str:
    return f"{int(text):,}".replace(",", "{,}") if re.fullmatch(r"-?[1-9]\d{3,}", text) else text


def _in_another_order(text: str) -> str:
    """The terms of a sum, or the members of a set or bare list, the other way round."""
    if re.search(r"\\begin|\\!|\$|\de-\d|\\text", text):
        return text
    inner = re.fullmatch(r"\\\{(.*)\\\}", text)
    members = _parts(inner[1] if inner else text, ",")
    if len(members) > 1 and not re.search(r"\d,\d{3}(?!\d)", text):
        reordered = ",".join(reversed(members))
        return f"\\{{{reordered}\\}}" if inner else reordered
    if re.search(r"=|<|>|\\[lg]eq?\b|\\in\b|\\cup|,|:|\\text|\\mbox|\\pm|\\equiv|\\%|[|$]|\\left|_|\\cap|\\ne", text):
        return text
    terms = _parts(re.sub(r"(?<=[\w)}\s])-\s*", "+-", text), "+")
    return "+".join(reversed(terms)).replace("+-", "-") if len(terms) > 1 else text


def _parts(text: str, separator: str) -> list[str]:
    """What stands between the separators outside of all brackets; the text alone if brackets do not match."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0 and text[at - 1 : at] not in ("\\", ""):
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()] if depth == 0 and all(parts) and text[start:].strip() else [text]


def refused(gold: str) -> list[tuple[str, str]]:
    """Spellings that are not paid under the gold answer, in a tag and in a box: what was done, and the text."""
    found = []
    for way, text in spellings(gold).items():
        in_tag = accuracy(f"<think> so </think> <answer>{text}</answer>", gold)
        in_box = accuracy(f"So \\boxed{{{text}}}", gold, source="boxed")
        if in_tag != 1.0 or in_box != 1.0:
            found.append((way, text))
    return found


def equal_pairs(golds: list[str], *, add: Callable[[int], None] = lambda number: None) -> Iterator[tuple[str, str]]:
    """All pairs of different texts whose values are equal, one as the answer under the other.

    Args:
        add: told how many more golds have been compared with the others.
    """
    read = [gold for gold in map(read_gold, golds) if isinstance(gold, Gold)]
    by_number: dict[Fraction, list[Gold]] = defaultdict(list)
    others = []
    for gold in read:
        if gold.number is not None and "," not in gold.text:  # two such are equal as numbers or not at all
            by_number[gold.number.value].append(gold)
        else:
            others.append(gold)
    numbers = [gold for same in by_number.values() for gold in same]
    add(len(golds) - len(others))
    for same in by_number.values():
        yield from ((a.text, b.text) for i, a in enumerate(same) for b in same[:i])
    for i, candidate in enumerate(others):
        for gold in (*others[:i], *numbers):
            if same_value(gold.value, candidate.value) or same_value(candidate.value, gold.value):
                yield gold.text, candidate.text
        add(1)


def check(golds: list[str], *, pairs: bool = True, limit: int = 40) -> int:
    """Print what is found in the distinct gold answers of one file; the number of refused spellings."""
    distinct = list(dict.fromkeys(golds))
    reasons = {gold: reason for gold in distinct if isinstance(reason := read_gold(gold), str)}
    gradable = [gold for gold in distinct if gold not in reasons]
    print(f"  {len(golds):,} gold answers, {len(distinct):,} different; {len(reasons)} cannot be graded")
    for gold, reason in list(reasons.items())[:limit]:
        print(f"    cannot be graded: {gold!r}: {reason}")
    num, counts = 0, Counter[str]()
    with Bar("other spellings", total=len(gradable), most_tokens=0, unit="gold answers") as bar:
        for gold in gradable:
            num += len(spellings(gold))
            for way, text in refused(gold):
                counts[way] += 1
                if sum(counts.values()) <= limit:
                    print(f"    refused: {text!r} for {gold!r} ({way})")
            bar.add()
    print(f"  {num:,} spellings, {sum(counts.values())} refused {dict(counts) if counts else ''}")
    if pairs:
        with Bar("pairs", total=len(gradable), most_tokens=0, unit="gold answers compared") as bar:
            found = list(equal_pairs(gradable, add=bar.add))
        for a, b in found[:limit]:
            print(f"    equal: {a!r} and {b!r}")
        print(f"  {len(gradable) * (len(gradable) - 1) // 2:,} pairs of different ones, {len(found)} taken for equal")
    return sum(counts.values())


def load(path: Path, column: str) -> list[str]:
    """The gold answers of a file of JSON lines, as texts."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    missing = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get(column), str)), None)
    if missing is not None:
        raise SystemExit(
            f"error: --column is {column!r}; line {missing} of {path} has no text there. Name the gold answer's."
        )
    return [row[column] for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of JSON lines, perhaps gzipped")
    parser.add_argument("--column", default="answer", help="of the gold answer")
    parser.add_argument("--no-pairs", action="store_true", help="leave out the comparison of each with each")
    parser.add_argument("--show", type=int, default=40, help="print so many of each kind")
    options = parser.parse_args()
    num_refused = 0
    for path in options.data:
        started = time.perf_counter()
        print(path.name)
        num_refused += check(load(path, options.column), pairs=not options.no_pairs, limit=options.show)
        print(f"  {time.perf_counter() - started:.0f} s")
    return int(num_refused > 0)


if __name__ == "__main__":
    sys.exit(main())
