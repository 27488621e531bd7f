"""The configurations that come with the library: `configs/` in a checkout, `grpo/configs/` where it is installed."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any


def folder() -> Path:
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.with_name("configs")


STAGES = "stages.yaml"
"""The list of a path's stages, which is no configuration: grpo/pipeline/stages.py."""


def names() -> list[str]:
    """Such as `quickstart` and `recipes/dapo-32b`."""
    found = (path for path in folder().rglob("*.yaml") if path.name != STAGES)
    return sorted(str(path.relative_to(folder()).with_suffix("")) for path in found)


def shipped(name: str) -> Path:
    """Where the configuration of that name lies."""
    return folder() / f"{name}.yaml"


def find(given: str | Path) -> Path:
    """The file that `--config` names: a path, or the name of a configuration that comes with the library.

    Raises:
        ValueError: there is neither.
    """
    if Path(given).is_file():
        return Path(given)
    if str(given) in names():
        return shipped(str(given))
    near = difflib.get_close_matches(Path(given).stem, names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Name a YAML file, or one of {', '.join(names())}."
    raise ValueError(
        f"--config is {str(given)!r}; there is no such file, and no configuration of that name comes with the library. {hint}"
    )


LOCATIONS = (
    ("model", "name"),
    ("teacher", "name"),
    ("data", "name"),
    ("data", "eval_name"),
    ("data", "chat_template"),
    ("data", "pass_rates"),
)
"""Settings that may be paths."""


def look_beside(file: Path, settings: dict[str, Any]) -> None:
    """Make absolute, in settings as read from `file`, what lies beside it and not in the working directory."""
    for section, name in LOCATIONS:
        values = settings.get(section)
        if isinstance(values, dict) and name in values:
            values[name] = _beside(file.parent, values[name])


def _beside(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_beside(folder, each) for each in value]
    if isinstance(value, dict):
        return {key: _beside(folder, each) if key == "name" else each for key, each in value.items()}
    if not isinstance(value, str) or Path(value).exists() or not (folder / value).exists():
        return value
    return str((folder / value).resolve())
