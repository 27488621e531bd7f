"""A run -> the model card that lies beside its weights: what it was made of, how, how good it is, and how to run it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from grpo.report import summary
from grpo.report.read import Run, read_runs
from grpo.text.plural import counted

FIGURE = "curves.png"

SHOWN = (
    "rollout.num_prompts",
    "rollout.group_size",
    "rollout.max_completion_tokens",
    "rollout.temperature",
    "algorithm.kl_coef",
    "algorithm.clip_low",
    "algorithm.clip_high",
    "algorithm.aggregation",
    "algorithm.normalize_by_std",
    "optimizer.learning_rate",
    "lora.rank",
    "run.steps",
    "run.seed",
)
"""Settings that say which algorithm it was, whether or not they are the defaults; others are shown where they differ."""

LEFT_OUT = (
    "model.",
    "data.",
    "rewards.",
    "run.dir",
    "logging.",
    "checkpoint.",
    "scoring.",
    "memory.",
    "vllm.",
    "watchdog.",
)
"""Of settings that say nothing of the model, or are said elsewhere."""


def read_run(directory: Path) -> Run:
    return read_runs([directory], max_completions=0)[0]


def card(name: str, run: Run | None, *, base: str, step: int | None, usage: str, licence: str | None) -> str:
    """The text of README.md.

    Args:
        base: the model that the training started from, or, without a run, the model itself.
        step: of the checkpoint.
        usage: how to run it, in Markdown.
        licence: of the base; None: not known.
    """
    parts = [_front_matter(run, base, licence), f"# {name}", _what(name, run, base, step, licence)]
    if run is not None:
        parts += [_answers(run), _training(run)]
    return "\n\n".join(filter(None, [*parts, "## How to run it", usage])) + "\n"


def licence_of(base: str) -> str | None:
    """What the base's own card says, if it lies here: in its directory, or in the cache of the hub."""
    path = Path(base) / "README.md"
    found = path if path.is_file() else None
    if found is None and is_hub_id(base):
        cached = try_to_load_from_cache(base, "README.md")
        found = Path(cached) if isinstance(cached, str) else None
    if found is None:
        return None
    head = re.match(r"---\n(.*?)\n---", found.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return str(licence) if licence else None


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def plain_name(name: str) -> str:
    """A hub's id as it is; of a path the last parts, which say nothing of the machine."""
    if is_hub_id(name):
        return name
    return "/".join([part for part in Path(name).parts if part not in ("/", "hf", "checkpoints")][-2:])


def _front_matter(run: Run | None, base: str, licence: str | None) -> str:
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if licence is not None:
        values["license"] = licence
    if is_hub_id(base):
        values["base_model"] = base
    if run is not None:
        values["tags"] = ["grpo", "reinforcement-learning", "reasoning"]
        data = [name for name in _data_names(run) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).suffix]
        if data:
            values["datasets"] = data
    return f"---\n{yaml.safe_dump(values, sort_keys=False).strip()}\n---"


def _data_names(run: Run) -> list[str]:
    name = run.config.get("data", {}).get("name")
    sources = name if isinstance(name, list) else [{"name": name}]
    return [str(source["name"]) for source in sources if source["name"]]


def _what(name: str, run: Run | None, base: str, step: int | None, licence: str | None) -> str:
    about = (
        f"Its licence is that of its base: {licence}."
        if licence
        else ("The licence of its base was not found; look at the base's page before you pass it on.")
    )
    if run is None:
        return f"`{plain_name(base)}`, exported by `grpo export`. {about}"
    head, data = summary.headline(run), ", ".join(f"`{plain_name(each)}`" for each in _data_names(run)) or "prompts"
    when = f"step {step}" if step is not None else "the starting model"
    kind = "supervised training" if "training" in run.config else "GRPO"
    return (
        f"`{plain_name(base)}` after {kind} on {data}: {when} of {head['planned'] or head['steps']} steps, template "
        f"`{head['template']}`. {about}"
    )


def _answers(run: Run) -> str:
    """Held-out questions within the training, and what `grpo evaluate` found, with 95 % intervals."""
    lines = []
    held_out = summary.held_out(run)
    if held_out:
        shown = held_out if len(held_out) < 3 else [held_out[0], held_out[-1]]
        names, verdicts, pass_1 = list(shown[0]["functions"]), run.verdicts, {}
        if len(verdicts) > 1:
            names, pass_1 = [RIGHT, *names], summary.intervals(run).get(run.held_out_metric, {})
        counts = _num_questions(run, shown[-1]["step"])
        titles = [_title(name, counts.get(name, 0), shown[-1]["questions"]) for name in names]
        lines += [
            f"| step | {' | '.join(titles)} | tokens | cut off |",
            f"|---|{'---|' * len(names)}---|---|",
            *(
                "| "
                + " | ".join(
                    [
                        str(row["step"]),
                        *(_interval(({RIGHT: pass_1.get(row["step"])} | row["functions"]).get(each)) for each in names),
                        f"{row['length']:.0f}",
                        f"{row['truncated']:.1%}",
                    ]
                )
                + " |"
                for row in shown
            ),
            "",
            f"{shown[-1]['questions']} held-out questions, {shown[-1]['answers']} answers, with 95 % intervals. "
            f"{' or '.join(f'`{name}`' for name in verdicts)} says what is right.",
        ]
    if run.results:
        lines += ["", "| benchmark | template | answers of | pass@1 |", "|---|---|---|---|"]
        for result in run.results:
            lines += [_benchmark(result, each) for each in result["results"]]
    return "\n".join(["## How good it is", "", *lines]) if lines else ""


RIGHT = "right (pass@1)"
"""Title of the share of right answers, where several rewards say what is right and none has it alone."""


def _num_questions(run: Run, step: int) -> dict[str, int]:
    """How many held-out questions a column is of: a reward may be for some only, or cannot tell."""
    questions: dict[str, set[int]] = {}
    for row in run.evaluations:
        if row["step"] == step:
            for name, value in {RIGHT: row["right"], **row["rewards"]}.items():
                if value is not None:
                    questions.setdefault(name, set()).add(row["row"])
    return {name: len(rows) for name, rows in questions.items()}


def _title(name: str, num: int, of: int) -> str:
    return name if num == of else f"{name}, {counted(num, 'questions')}"


def _benchmark(result: dict[str, Any], found: dict[str, Any]) -> str:
    one = found["metrics"].get("pass@1")
    cell = "not known" if one is None else _interval((one["value"], one["low"], one["high"]))
    return f"| {found['benchmark']} | {found['template']} | {result['name']} | {cell} |"


def _interval(found: Sequence[float] | None) -> str:
    if found is None:
        return "not known"
    value, low, high = found
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _training(run: Run) -> str:
    flat, usual = summary.settings(run.config), summary.defaults()
    rewards = [
        f"- `{key.removeprefix('rewards.')}`: {value}" for key, value in flat.items() if key.startswith("rewards.")
    ]
    shown = {
        key: value
        for key, value in flat.items()
        if key in SHOWN or (usual.get(key) != value and not key.startswith(LEFT_OUT))
    }
    versions = ", ".join(
        f"{key} {run.environment[key]}" for key in ("grpo", "torch", "transformers") if key in run.environment
    )
    lines = ["## How it was trained", ""]
    if run.metrics:
        lines += [f"![reward, accuracy, length, signal, KL and entropy over the steps]({FIGURE})", ""]
    if rewards:
        lines += ["Rewards:", "", *rewards, ""]
    lines += ["| setting | value |", "|---|---|", *(f"| `{key}` | {_cell(value)} |" for key, value in shown.items())]
    return "\n".join([*lines, "", f"Made with {versions}."] if versions else lines)


def _cell(value: str) -> str:
    try:
        number = json.loads(value)
    except ValueError:
        number = None
    text = f"{number:g}" if isinstance(number, float) else value
    return text.replace("|", "\\|").replace("\n", " ")
