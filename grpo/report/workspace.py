"""The report's panels as a W&B workspace: a saved view of a project, in which an "aha moment" shows before anything is opened.

W&B's own view has a section for each group of metrics, in the order of the alphabet. This one has the sections of FIRST, then
tables of samples, then what else the report has. It draws what the project's newest runs have logged, so no panel is empty in all
of them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from itertools import islice
from typing import Any

from grpo.observe.sinks import CHARTS, COMPLETIONS, REFLECTIVE, STEP, chart_of, end_wandb_service, overview
from grpo.report.panels import COST, HEALTH, Panel, Section, formula, functions_of, natural, sections
from grpo.scoring.answers import RIGHT_OF_ALL_KINDS
from grpo.system.stopping import RunError

AHA, REWARDS, SAMPLES = "Is there an aha moment?", "What is rewarded?", "Samples"

FIRST: dict[str, tuple[str, ...]] = {
    AHA: (
        RIGHT_OF_ALL_KINDS,
        "reward/<verdict>",
        "answer/right",
        "completion/length_mean",
        "completion/length_right",
        "aha/reflection_share",
        "aha/reflection_per_1k",
        r"eval/(pass|cons)@\d+",
    ),
    HEALTH: (
        "policy/kl",
        "policy/entropy",
        "policy/clip_fraction",
        "policy/sampling_gap",
        "optimizer/grad_norm",
        "group/with_signal",
        "completion/truncated",
        "reward/format",
    ),
    REWARDS: ("reward/mean", "reward/<verdict>", "reward/<function>", "reward/.+"),
    COST: ("time/.+", "throughput/.+", "memory/.+"),
}
"""Sections that are open: the panels of these metrics, in this order, then what else the report's section of the same title has.
`<function>` stands for the rewards, `<verdict>` for those that say what is right. A panel may be in several."""

NEWEST = 20
"""Runs of a project whose metrics decide what is drawn."""

COLUMNS, MOST_ROWS = 3, 4
"""Of panels; a section with more has pages."""


def check_package() -> None:
    """Raises:
    ValueError: the package that makes workspaces is missing.
    """
    if find_spec("wandb_workspaces") is None:
        raise ValueError(
            "grpo workspace needs the package wandb-workspaces, which is not installed. Install it: "
            "pip install 'wandb-workspaces>=0.4.13'."
        )


def connect() -> Any:
    """W&B's client, logged in.

    Raises:
        ValueError: there is no login.
        RunError: the service cannot be reached, or refuses the key.
    """
    import wandb

    try:
        return wandb.Api()
    except wandb.errors.UsageError as error:
        raise ValueError(
            "grpo workspace writes to your account at W&B, and there is no login. Run `wandb login`, or set WANDB_API_KEY."
        ) from error
    except Exception as error:  # of no common class
        raise _failure(error) from error


def _failure(error: Exception) -> RunError:
    """What is said of it.

    W&B's process is ended here: where the service does not answer, its hook at the end of Python waits for it without limit.
    """
    import wandb

    told = f"W&B: {error}".strip()
    if _is_timeout(error):  # W&B's own words blame its process
        told = (
            f"W&B: cannot reach {wandb.setup().settings.base_url}: no answer in time. Is the address right (WANDB_BASE_URL), "
            "and the network up?"
        )
    end_wandb_service()
    with contextlib.suppress(Exception, SystemExit):  # for a lost connection, and with the exit code of what was ended
        wandb.teardown()
    return RunError(told)


def _is_timeout(error: BaseException | None) -> bool:
    """Whether it comes of one."""
    return error is not None and (isinstance(error, TimeoutError) or _is_timeout(error.__cause__ or error.__context__))


def entity_of(api: Any) -> str:
    """Whose projects are meant where nobody says: WANDB_ENTITY, else what the account has as its default.

    Raises:
        ValueError: it has none.
        RunError: the service fails.
    """
    try:
        entity = api.settings["entity"] or api.default_entity
    except Exception as error:
        raise _failure(error) from error
    if not entity:
        raise ValueError("--entity is not given, and your account at W&B has no default. Give the user or the team.")
    return entity


def logged_names(api: Any, entity: str, project: str, *, said: str) -> set[str]:
    """All that the newest runs of a project have logged.

    Args:
        said: what the project is, and who says so, for errors.

    Raises:
        ValueError: there is no such project, or no run of this library in it.
        RunError: the service fails.
    """
    try:
        runs = api.runs(f"{entity}/{project}", order="-created_at", per_page=NEWEST, lazy=False)
        names = {name for run in islice(runs, NEWEST) for name in run.summary.keys()}  # noqa: SIM118 - it is no dict
    except ValueError as error:
        raise ValueError(
            f"{said}; W&B has no project {entity}/{project}, or your account may not see it. Take --project "
            "and --entity from the address of a run: ENTITY/PROJECT/runs/..."
        ) from error
    except Exception as error:
        raise _failure(error) from error
    if not any(map(formula, names)):
        raise ValueError(
            f"{said}; none of its {NEWEST} newest runs has metrics of grpo. Train one with "
            "logging.wandb=online first, or send one that was kept offline with `wandb sync`."
        )
    return names


def arrange(logged: Collection[str]) -> tuple[list[Section], list[Section]]:
    """Of runs that have logged these names, the sections that are open, and those with all other panels of the report."""
    names = sorted(filter(formula, logged), key=natural)
    verdicts = _verdicts(logged)
    asked = sections(names, verdicts=verdicts)
    panels = [panel for section in asked for panel in section.panels]
    stands_for = {"<verdict>": _any_of(verdicts), "<function>": _any_of(functions_of(names))}
    first = []
    for title, patterns in FIRST.items():
        same = [panel for section in asked if section.title == title for panel in section.panels]
        written = [re.sub("<.*>", lambda found: stands_for[found[0]], pattern) for pattern in patterns]
        chosen = [panel for pattern in written for panel in _with(pattern, panels)]
        first.append(Section(title, _once([*chosen, *same])))
    placed = [panel for section in first for panel in section.panels]
    rest = [Section(each.title, [panel for panel in each.panels if panel not in placed]) for each in asked]
    return [section for section in first if section.panels], [section for section in rest if section.panels]


def _verdicts(logged: Collection[str]) -> list[str]:
    """Of each run the reward that says what is right, which the overview has under its own name: W&B keeps no order."""
    others = overview([""]).values()
    return sorted(name for name in functions_of(logged) if name in logged and name not in others)


def _any_of(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names)) or '(?!)'})"


def _with(pattern: str, panels: Iterable[Panel]) -> list[Panel]:
    return [panel for panel in panels if any(re.fullmatch(pattern, name) for name in panel.metrics)]


def _once(panels: Iterable[Panel]) -> list[Panel]:
    found: list[Panel] = []
    for panel in panels:
        if panel not in found:
            found.append(panel)
    return found


def build(logged: Collection[str], *, entity: str, project: str, name: str) -> Any:
    """The workspace for runs that have logged these names, which nobody has sent yet.

    Raises:
        ValueError: W&B takes no such name.
    """
    from wandb_workspaces import workspaces
    from wandb_workspaces.utils.validators import validate_no_emoji

    try:
        validate_no_emoji(name)
    except ValueError as error:
        raise ValueError(f"--name is {name!r}; W&B takes no symbols in it. Set one of letters and digits.") from error
    first, rest = arrange(logged)
    panels = {section.title: [_line_plot(panel) for panel in section.panels] for section in first}
    panels.setdefault(AHA, []).extend(_charts(logged))
    opened = [_section(title, own, is_open=True) for title, own in panels.items() if own]
    if tables := _tables(logged):
        opened.append(_section(SAMPLES, tables, is_open=True, columns=1))
    closed = [_section(each.title, [_line_plot(panel) for panel in each.panels], is_open=False) for each in rest]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*opened, *closed],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, smoothing_type="none"),
    )


def _section(title: str, panels: list[Any], *, is_open: bool, columns: int = COLUMNS) -> Any:
    from wandb_workspaces import workspaces

    rows = min(math.ceil(len(panels) / columns), MOST_ROWS)
    return workspaces.Section(
        name=title,
        panels=panels,
        is_open=is_open,
        layout_settings=workspaces.SectionLayoutSettings(columns=columns, rows=rows),
        panel_settings=workspaces.SectionPanelSettings(x_axis=STEP, smoothing_type="none"),  # over the workspace's own
    )


def _line_plot(panel: Panel) -> Any:
    """All lines of a panel, of all runs; nothing is stacked, as the runs would be, too."""
    from wandb_workspaces.reports import v2 as reports

    return reports.LinePlot(title=panel.caption, x=STEP, y=[*panel.metrics], smoothing_type="none")


def _charts(logged: Collection[str]) -> list[Any]:
    """Those that a run draws itself, with the level of the untrained model."""
    import wandb
    from wandb_workspaces.reports import v2 as reports

    found = []
    for name, (title, _) in CHARTS.items():
        chart = chart_of(wandb, title, [[0.0]], [[0.0]], [""])
        chart.set_key(name)
        spec = chart.spec
        if spec.table_key in logged:
            columns = {"id": None, "name": None, "_defaultColorIndex": None}
            found.append(
                reports.CustomChart(
                    query={**columns, "summaryTable": {"tableKey": spec.table_key}},
                    chart_name=spec.spec_name,
                    chart_fields=spec.fields,
                    chart_strings=spec.string_fields,
                )
            )
    return found


def _tables(logged: Collection[str]) -> list[Any]:
    from wandb_workspaces.reports import v2 as reports

    return [reports.WeavePanelSummaryTable(table_name=name) for name in (REFLECTIVE, COMPLETIONS) if name in logged]


def save(workspace: Any) -> str:
    """Send it as a new view of its project; returns its address.

    Raises:
        RunError: the service fails, or takes no view from this account.
    """
    try:
        return workspace.save().url
    except Exception as error:
        raise _failure(error) from error
