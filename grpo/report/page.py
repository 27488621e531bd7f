"""Runs -> one HTML file that holds everything it shows and asks nobody for anything.

The page is page.html with page.css and the scripts put in, and the data as blocks: `<script type="application/octet-stream">`
elements with base64 of gzipped JSON, which no text can break out of. A browser unpacks `head` at once, and blocks of completions
when they are looked at. A content security policy names the hashes of the page's own script and style; nothing else runs or is
fetched, whatever a completion says.

    head              settings, metrics as columns, tables, and of each source of completions its index block and text blocks
    index-R-S         of run R and source S, a list per column: step, group, reward, right, ...
    texts-R-S-B       {"completions": [...], "rewards": [...], "questions": {group: [question, answer]}} of the block's rows, and
                      "results": {row: [[offset, text], ...]}, what tools and environments answered
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpo.report import fit, panels, summary
from grpo.report.read import Row, Run, Source, kind_of_questions, read_runs, verdicts_of_runs
from grpo.system.files import replace_text
from grpo.text.aha import PAPER_WORDS, pattern_source

SCRIPTS = ("data.js", "charts.js", "completions.js", "page.js")
BLOCK_CHARACTERS = 1_000_000
"""Of completions in a block: unpacked within a few hundredths of a second."""
MAX_COMPLETIONS = 20_000


def write_page(directories: list[Path], path: Path, *, max_completions: int = MAX_COMPLETIONS) -> int:
    """Write the page of these runs and return its size in bytes.

    Args:
        max_completions: rows of each kind (training, held-out, each benchmark) that the page holds of all runs together, about;
            where there are more, evenly chosen steps or questions, the first and the last among them.

    Raises:
        ValueError: a directory is not that of a run; max_completions is below 0.
    """
    return write_page_of(read_runs(directories, max_completions=max_completions), path)


def write_page_of(runs: list[Run], path: Path) -> int:
    """The same of runs that have been read."""
    text = page(runs)
    replace_text(path, text)
    return len(text)


def page(runs: list[Run]) -> str:
    """The page's HTML, in ASCII."""
    blocks = dict(_blocks(runs))
    script = "\n".join(_file(name) for name in SCRIPTS)
    style = _file("page.css")
    parts = {
        "title": html.escape(", ".join(run.name for run in runs)).encode("ascii", "xmlcharrefreplace").decode(),
        "policy": "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        "style": style,
        "script": script,
        "blocks": "\n".join(
            f'<script type="application/octet-stream" id="{name}">{data}</script>' for name, data in blocks.items()
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def _file(name: str) -> str:
    return files("grpo.report").joinpath(name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pack(value: Any) -> str:
    """JSON, gzipped, in base64. Lone surrogates and control characters stay what they are, as escapes."""
    return base64.b64encode(gzip.compress(json.dumps(value, allow_nan=False).encode("ascii"), 6, mtime=0)).decode()


def _blocks(runs: list[Run]) -> Iterator[tuple[str, str]]:
    described = []
    for r, run in enumerate(runs):
        sources = []
        for s, source in enumerate(run.sources):
            bounds = list(_cut(source.rows))
            for b, (start, end) in enumerate(bounds):
                yield f"texts-{r}-{s}-{b}", pack(summary.plain(_texts(source.rows[start:end])))
            yield f"index-{r}-{s}", pack(summary.index(source))
            sources.append(_describe(source, bounds))
        described.append({**_describe_run(run), "sources": sources})
    yield "head", pack(summary.plain(_head(runs, described)))


def _cut(rows: list[Row]) -> Iterator[tuple[int, int]]:
    start = characters = 0
    for i, row in enumerate(rows):
        characters += len(row["completion"])
        if characters >= BLOCK_CHARACTERS or i == len(rows) - 1:
            yield start, i + 1
            start, characters = i + 1, 0


def _texts(rows: list[Row]) -> dict[str, Any]:
    return {
        "completions": [row["completion"] for row in rows],
        "results": {at: _results(row["turns"]) for at, row in enumerate(rows) if row.get("turns")},
        "rewards": [row["rewards"] for row in rows],
        "questions": {summary._group(row): [row["question"], str(row["answer"])] for row in rows},
    }


def _results(turns: list[dict[str, str]]) -> list[tuple[int, str]]:
    """What tools and the environment answered, each with its place in the completion, counted as JavaScript counts: in units of
    UTF-16."""
    found, place = [], 0
    for turn in turns:
        if turn["role"] != "assistant":
            found.append((place, turn["content"]))
        else:
            place += len(turn["content"].encode("utf-16-le", "surrogatepass")) // 2
    return found


def _describe(source: Source, bounds: list[tuple[int, int]]) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "unit": source.unit,
        "shown": len(source.rows),
        "rows": source.num_rows,
        "units": source.num_units,
        "kept": source.num_kept,
        "blocks": bounds,
    }


def _describe_run(run: Run) -> dict[str, Any]:
    told = fit.prediction(run)
    metrics = summary.columns(run)
    if told is not None and "curve" in told:
        metrics["values"][panels.FIT] = told.pop("curve")
    return {
        "name": run.name,
        "headline": summary.headline(run),
        "prediction": told,
        "settings": summary.settings(run.config),
        "environment": summary.settings(run.environment),
        "metrics": metrics,
        "intervals": summary.intervals(run),
        "held_out": summary.held_out(run),
        "results": run.results,
        "roll_backs": run.roll_backs,
        "alarms": run.alarms,
        "reflective": pattern_source(_own_lists(run).get("reflection", PAPER_WORDS)),
        "notes": run.notes,
    }


def _own_lists(run: Run) -> dict[str, list[str]]:
    """Lists of words that the run counts beside the built-in ones, or in place of one of the same name."""
    return run.config.get("logging", {}).get("reflection_words", {})


def _head(runs: list[Run], described: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for run in described for name in run["metrics"]["values"]))
    asked = panels.sections(names, verdicts=verdicts_of_runs(runs), kind=kind_of_questions(runs))
    return {
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "sections": [
            {"title": section.title, "panels": [vars(panel) for panel in section.panels]} for section in asked
        ],
        "shares": [name for name in names if summary.is_share(name, runs)],
        "formulas": {name: panels.formula(name) for name in names},
        "defaults": summary.defaults(),
        "runs": described,
    }
