"""Whether the hub can be reached, found out within seconds.

`huggingface_hub` tries each file six times with growing waits, which is right for a network that stumbles. Where there is no
network at all, transformers and datasets would so need more than a minute for their error. Here the hub is asked for nothing but
an answer, before the first file.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from grpo.system.terminal import say

WAITS = (0.0, 1.0, 2.0)
"""Seconds before each try: a name that cannot be resolved for a moment is tried again."""

VALID_SECONDS = 60.0
"""So long the hub counts as out of reach without being asked again: a notebook outlives a network that is gone for a while."""

_answered = False
_failed: tuple[float, str] | None = None


def unreachable() -> str | None:
    """Why the hub is not asked, in words that follow "and"; None: it answers.

    Any answer will do. One that takes longer than HF_HUB_ETAG_TIMEOUT seconds (10, unless the user sets it) is none, as it is for
    the downloads themselves.
    """
    from huggingface_hub import constants  # takes a while, which `--help` need not wait for

    global _answered, _failed
    if constants.is_offline_mode():
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    if _answered:
        return None
    if _failed is None or time.monotonic() - _failed[0] > VALID_SECONDS:
        reason = _ask(float(constants.HF_HUB_ETAG_TIMEOUT))
        _answered, _failed = reason is None, None if reason is None else (time.monotonic(), reason)
    return None if _failed is None else f"the hub {constants.ENDPOINT} cannot be reached ({_failed[1]})"


def no_model(said: str, name: str, setting: str, reason: str) -> str:
    """An error's text; `said` begins it, `reason` is `unreachable`'s."""
    return (
        f"{said}; there is no such directory and no copy of the model in the cache, and {reason}. Set {setting} to a local "
        f"directory, or download the model where there is a network: `hf download {name}`."
    )


def no_data_set(said: str, name: str, setting: str, reason: str) -> str:
    """As `no_model`."""
    return (
        f"{said}; there is no such file or folder and no copy of the data set in the cache, and {reason}. Set {setting} to a "
        f"file (.jsonl, .csv, .parquet), or download it where there is a network: `hf download {name} --repo-type dataset`."
    )


def has_model(name: str, revision: str) -> bool:
    """Whether the cache has what its files are read by."""
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "adapter_config.json")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)


def has_data_set(name: str) -> bool:
    """Whether the caches have anything of it."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    downloaded = Path(constants.HF_HUB_CACHE)
    return (prepared / name.replace("/", "___")).exists() or (
        downloaded / f"datasets--{name.replace('/', '--')}"
    ).exists()


def _ask(patience: float) -> str | None:
    """Why the hub has not answered after so many seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reasons = [f"no answer in {patience:g} s; HF_HUB_ETAG_TIMEOUT waits longer"]
    answered = threading.Event()

    def ask() -> None:
        for wait in WAITS:
            time.sleep(wait)
            try:  # through a proxy and with certificates as the downloads
                get_session().head(constants.ENDPOINT, timeout=patience, follow_redirects=False)
            except Exception as error:
                reasons.append(str(error) or type(error).__name__)
            else:
                reasons.clear()
                break
        answered.set()

    threading.Thread(target=ask, daemon=True).start()  # a resolver's own time limit cannot be set
    answered.wait(patience)
    return reasons[-1] if reasons else None


_show_bars = [True]


def hide_bars_of_data_sets() -> None:
    """The package `datasets` shows no bars from here on, wherever it is imported first: that takes a second."""
    _show_bars[0] = False
    if "datasets" in sys.modules:
        data_sets()


def data_sets() -> ModuleType:
    """The package `datasets`."""
    import datasets

    if not _show_bars[0]:
        datasets.disable_progress_bars()
    return datasets


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within it, files that are looked for in the hub come from its cache at once if the hub cannot be reached.

    Not for the rest of the process: its network may be back when a checkpoint is pushed.
    """
    from huggingface_hub import constants

    reason = unreachable()
    if reason is None or constants.is_offline_mode():
        yield
        return
    import datasets  # now, for its setting is a copy

    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before
    _say_once(f"note: {reason}; copies in {constants.HF_HUB_CACHE} are used.")


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(text)
        say(text)
