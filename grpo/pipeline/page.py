"""OUT/r1.html and OUT/r1.md: what came from what, each stage's evaluation, samples before and after, and comparisons.

The page is one file without scripts, in the style of the report. All it shows is read from lineage.json and the runs' files.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpo.pipeline import outcome
from grpo.pipeline.lineage import Lineage
from grpo.pipeline.stages import TRAINED, Plan
from grpo.scoring.answers import is_right
from grpo.scoring.statistics import Estimate
from grpo.system.files import replace_text

HTML, MARKDOWN = "r1.html", "r1.md"

Table = list[list[str]]
"""Rows of cells; the first is the head."""

STYLE = """
main { padding-bottom: 60px; }
td, th { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--edge); }
table { border-collapse: collapse; }
.scroll { overflow-x: auto; padding: 10px 18px; }
pre { white-space: pre-wrap; margin: 4px 0; font: 13px/1.45 var(--mono); }
code { font: 12.5px var(--mono); overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, sentences, tables and samples, which both forms of the page are made from."""

    title: str
    says: Sequence[str] = ()
    table: Table | None = None
    texts: Sequence[tuple[str, str]] = ()  # title and text as it stands
    lines: Sequence[str] = ()  # commands


def write(plan: Plan, lineage: Lineage) -> None:
    title = f"{plan.folder.name}: from R1-Zero to R1"
    sections = _sections(plan, lineage)
    replace_text(plan.out / HTML, _as_html(title, sections))
    replace_text(plan.out / MARKDOWN, _as_markdown(title, sections))


def summary(plan: Plan, lineage: Lineage) -> str:
    """For the console: the table of evaluations, and what the comparisons say."""
    table = _evaluations(plan, lineage)
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*rows, "", *(sentence for section in _comparisons(plan) for sentence in section.says)])


def in_words(entry: Mapping[str, Any]) -> str:
    """A finished stage in a line."""
    said = [f"{number:,} {what}" for what, number in entry["counts"].items()]
    after = (entry["evaluation"] or {}).get("after")
    if after:
        said += [f"{name} {_cell(after, name)}" for name in outcome.MEASURES[:2]]
    return ", ".join([*said, f"{entry['seconds']:.0f} s"])


# ---- what it says ----------------------------------------------------------------------------------------------------


def _sections(plan: Plan, lineage: Lineage) -> list[Section]:
    num = sum(entry["seconds"] for entry in lineage.stages.values())
    return [
        Section(
            "Evaluations",
            [
                f"After each stage that makes a model, on the same held-out questions; 95 % intervals over questions, of this "
                f"one run. All stages together took {num:,.0f} s.",
                "right: share of answers that are right; mixed: share with words of another script than the question's; "
                "consistency: share of the thought's words in the question's language; length in tokens.",
            ],
            _evaluations(plan, lineage),
        ),
        *_comparisons(plan),
        *_samples(plan),
        Section("Which file came from which", table=_files(plan, lineage)),
        Section("How often, how long", table=_counts(plan, lineage)),
        Section("Settings", ["What the stages of training do not have in common."], _settings(plan, lineage)),
        Section("Launch lines", lines=[lineage.stages[stage.name]["launch"] for stage in plan.stages]),
    ]


def _evaluations(plan: Plan, lineage: Lineage) -> Table:
    """A row for each untrained model that a stage began with, and one for each stage."""
    table = [["model", "from", *outcome.MEASURES]]
    shown = set()
    for stage in plan.stages:
        found = lineage.stages[stage.name]["evaluation"]
        if not found:
            continue
        begun = next(each for each in lineage.stages[stage.name]["inputs"] if each["label"] == "model")
        if begun["source"] is None and begun["path"] not in shown and "before" in found:
            shown.add(begun["path"])
            table.append([Path(begun["path"]).name, "", *(_cell(found["before"], name) for name in outcome.MEASURES)])
        source = begun["source"] or Path(begun["path"]).name
        table.append([stage.name, source, *(_cell(found["after"], name) for name in outcome.MEASURES)])
    return table


def _cell(found: Mapping[str, Any], name: str) -> str:
    if name not in found:
        return "-"
    value, low, high = (found[name][key] for key in ("value", "low", "high"))
    if name in outcome.SHARES:
        return f"{value:.1%} ({low:.1%} to {high:.1%})"
    return f"{value:.1f}"


def _comparisons(plan: Plan) -> list[Section]:
    sections = []
    for title, (left, right) in plan.compare:
        rows = [outcome.answers(plan.out / name).get("after", []) for name in (left, right)]
        found = outcome.difference(*rows) if all(rows) else {}
        if not found:
            continue
        mine, theirs = map(outcome.measured, rows)
        table = [["", left, right, "difference"]]
        for name in outcome.MEASURES:
            if name in found:
                table.append([name, _cell(mine, name), _cell(theirs, name), _delta(name, found[name])])
        sections.append(Section(title, [f"{title}: {_sentence(left, right, mine, theirs, found)}"], table))
    return sections


def _delta(name: str, found: Estimate) -> str:
    if name in outcome.SHARES:
        return f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _sentence(
    left: str, right: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], found: Mapping[str, Estimate]
) -> str:
    """What the path buys and what it does not, with the numbers."""
    said = []
    for name, what in (("mixed", "mixes languages in"), ("right", "is right in")):
        if name in found:
            said.append(
                f"{left} {what} {mine[name]['value']:.1%} of its answers and {right} in {theirs[name]['value']:.1%}, "
                f"{_verdict(name, found[name])}"
            )
    return "; ".join(said) + "."


def _verdict(name: str, delta: Estimate) -> str:
    """Whether the interval of a difference holds 0."""
    interval = _delta(name, delta)
    if delta.low <= 0 <= delta.high:
        return f"no difference is shown: {interval}"
    return f"a difference of {interval}"


RULE = (
    "The question is the first held-out one whose first answer, after the first stage, is right and has words of another script; "
    "if there is none, the first question. Shown is the first of its sampled answers, before and after each stage."
)


def _samples(plan: Plan) -> list[Section]:
    trained = [stage for stage in plan.stages if stage.kind in TRAINED]
    first = next((found for stage in trained if (found := outcome.answers(plan.directory(stage)).get("after"))), None)
    if first is None:
        return []
    firsts = [row for row in first if row["sample"] == 0]
    chosen = next((row for row in firsts if is_right(row) and outcome.is_mixed(row)), firsts[0])
    texts = []
    for stage in trained:
        for when, rows in outcome.answers(plan.directory(stage)).items():
            row = next((r for r in rows if r["question"] == chosen["question"] and r["sample"] == 0), None)
            if row is not None:
                texts.append((f"{stage.name}, {when} ({_judged(row)})", row["completion"]))
    return [Section("One question", [RULE, f"{chosen['question']} The answer is {chosen['answer']}."], texts=texts)]


def _judged(row: outcome.Row) -> str:
    right = {True: "right", False: "wrong", None: "unknown"}[is_right(row)]
    return f"{right}, {'mixed' if outcome.is_mixed(row) else 'not mixed'}"


def _files(plan: Plan, lineage: Lineage) -> Table:
    table = [["stage", "kind", "reads or writes", "from", "checksum", "file"]]
    for stage in plan.stages:
        entry = lineage.stages[stage.name]
        for what, each in [("reads", e) for e in entry["inputs"]] + [("writes", e) for e in entry["outputs"]]:
            path = Path(each["path"])
            shown = str(path.relative_to(plan.out)) if path.is_relative_to(plan.out) else str(path)
            source = (each["source"] or "") if what == "reads" else ""
            table.append(
                [stage.name, stage.kind, f"{what} {each['label']}", source, (each["checksum"] or "-")[:12], shown]
            )
    return table


def _counts(plan: Plan, lineage: Lineage) -> Table:
    table = [["stage", "kind", "counts", "seconds", "settings"]]
    for stage in plan.stages:
        entry = lineage.stages[stage.name]
        said = ", ".join(f"{number:,} {what}" for what, number in entry["counts"].items())
        table.append([stage.name, stage.kind, said, f"{entry['seconds']:.0f}", entry["config"][:12]])
    return table


def _settings(plan: Plan, lineage: Lineage) -> Table:
    """Settings of training that two stages of one kind have different, and the options of the others."""
    table = [["stage", "settings"]]
    for stage in plan.stages:
        own = lineage.stages[stage.name]["settings"]
        peers = [lineage.stages[each.name]["settings"] for each in plan.stages if each.kind == stage.kind]
        names = list(own) if stage.kind not in TRAINED else [n for n in own if any(p.get(n) != own[n] for p in peers)]
        said = ", ".join(f"{name} {_short(name, own[name])}" for name in names if name not in LEFT_OUT)
        table.append([stage.name, said])
    return table


LEFT_OUT = ("kind", "run.dir", "model.name", "data.name", "model")
"""Of the settings, what the table of files has."""


def _short(name: str, value: Any) -> str:
    if name == "rewards":
        return " + ".join(f"{each['weight']:g} {each['function']}" for each in value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- its two forms ---------------------------------------------------------------------------------------------------


def _as_html(title: str, sections: Sequence[Section]) -> str:
    style = files("grpo.report").joinpath("page.css").read_text(encoding="ascii") + STYLE
    body = "\n".join(_section_html(section) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>{style}</style></head>\n<body><main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _section_html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(each)}</p>" for each in section.says)]
    if section.table:
        head, *rows = section.table
        cells = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
        cells += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append(f'<div class="scroll"><table>{"".join(cells)}</table></div>')
    parts += [f"<h4>{html.escape(name)}</h4><pre>{html.escape(text)}</pre>" for name, text in section.texts]
    parts += [f"<p><code>{html.escape(each)}</code></p>" for each in section.lines]
    return "\n".join(parts)


def _as_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *section.says]
        if section.table:
            head, *rows = section.table
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines))
        for name, text in section.texts:
            fence = "`" * max(3, 1 + max((len(run) for run in _runs(text)), default=0))
            parts.append(f"{name}:\n\n{fence}text\n{text}\n{fence}")
        if section.lines:
            parts.append("```bash\n" + "\n".join(section.lines) + "\n```")
    return "\n\n".join(parts) + "\n"


def _runs(text: str) -> list[str]:
    """Of backticks."""
    return [part for part in "".join(c if c == "`" else " " for c in text).split(" ") if part]
