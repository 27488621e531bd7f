"""One thread per process: on a few shared cores more of them only wait for each other. And which tests run where, and when.

seconds.json has the processor seconds that the slower tests took (`--write-seconds`, on one worker or several), with those of
the processes that they started: how busy a machine is hardly changes them. By it

- several workers (`pytest -n 2 --dist loadgroup`) begin with what takes longest, so that none is left alone with it at the end;
- `-m "not slow"` leaves out what takes longer than 0.3 seconds: `make check`.

A test that has a fixture of its module's stays with the others that have, so that no fixture is made twice; and all that is fast
stays with its module.
"""

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# what a thousand processes import is compiled once: without it each compiles grpo anew, for most of a second
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# of this run alone, also in processes that tests start
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="grpo-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

for _number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # which a shell's `&` and nohup have ignored, here and in what tests start
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported; the kernels then run on the CPU

import graders  # noqa: E402
import warm  # noqa: E402  which keeps the environment as it is here

torch.set_num_threads(1)

from helpers import without_pictures  # noqa: E402

from grpo import report  # noqa: E402
from grpo.report import at_the_end  # noqa: E402

without_pictures()
graders.use()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends draws its curves and its page, as it does outside of tests."""
    monkeypatch.setattr(report, "at_the_end", at_the_end)


# ---- which tests run where, and when ---------------------------------------------------------------------------------

SECONDS = Path(__file__).with_name("seconds.json")
SLOW = 0.3
"""Seconds from which on a test is slow; also the least that is written down."""
SLOW_FIXTURES = 1.5
"""Seconds from which on what a module's fixtures take makes all tests slow that have them."""
ALONE = 4.0
"""Seconds from which on a test without fixtures of its module may run away from its module."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help="write what slow tests took to tests/seconds.json")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than the cores that this process may use, in a container too, if there are 3 GiB of memory for each: several tests
    wait for limits to pass, and no core idles meanwhile."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return int(max(1, min(round(cores) + 1, gib // 3, 8)))


@pytest.hookimpl(wrapper=True)  # before xdist, which reads the groups in the same hook, and before `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    group_and_order(config, items)
    yield


def pytest_configure(config: pytest.Config) -> None:
    """pytest 9.2 ignores the groups that pytest-xdist 3.8 writes into the ids of tests: each would be its own, in silence."""
    assert hasattr(pytest.Item, "_nodeid"), "install pytest<9.2, as pyproject.toml says"


def group_and_order(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds = expected_seconds({name_of(item.nodeid) for item in items})
    shared = {name: took for name, took in seconds.items() if "::" not in name}
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for number, item in enumerate(items):
        name, module = name_of(item.nodeid), item.location[0]
        waits = max((shared[each] for each in names_of_fixtures(item, shared)), default=0.0)
        if seconds.get(name, 0) >= SLOW or waits >= SLOW_FIXTURES:
            item.add_marker(pytest.mark.slow)
        alone = seconds.get(name, 0) >= ALONE and not fixtures_of_its_module(item)
        groups[f"{module}-{number}" if alone else module].append(item)
    if not getattr(config.option, "loadgroup", False):
        return
    for group, members in groups.items():
        for item in members:
            item.add_marker(pytest.mark.xdist_group(group))
    took = {group: expected_of(groups[group], seconds, shared) for group in groups}
    items[:] = [item for group in sorted(groups, key=lambda group: -took[group]) for item in groups[group]]


def expected_of(items: list[pytest.Item], seconds: dict[str, float], shared: dict[str, float]) -> float:
    """Of the tests and, once, of what those of a module share."""
    waited_for = {name for item in items for name in names_of_fixtures(item, shared)}
    return sum(seconds.get(name_of(item.nodeid), 0.01) for item in items) + sum(shared[name] for name in waited_for)


def expected_seconds(names: set[str]) -> dict[str, float]:
    """What was written down; of a test with parameters that nobody has measured, what its slowest others took."""
    known: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    slowest: dict[str, float] = defaultdict(float)
    for name, took in known.items():
        function = name.partition("[")[0]
        slowest[function] = max(slowest[function], took)
    measured = {name.partition("[")[0] for name in names & known.keys()}
    return known | {
        name: slowest[name.partition("[")[0]]
        for name in names - known.keys()
        if name.partition("[")[0] not in measured and name.partition("[")[0] in slowest
    }


def name_of(nodeid: str) -> str:
    """Without the folder, and the group that xdist appends."""
    return re.sub(r"@[^\]]*$", "", nodeid).removeprefix("tests/")


def fixtures_of_its_module(item: pytest.Item) -> list[str]:
    found = item._fixtureinfo.name2fixturedefs.items()
    return sorted(name for name, each in found if each[-1].scope in ("module", "class", "package"))


_made: dict[str, set[str]] = defaultdict(set)


def name_of_new_fixtures(item: pytest.Item) -> str | None:
    """Under which what they take is written down, for whichever test comes first has to wait for them; None: all are made."""
    module = item.location[0].removeprefix("tests/")
    new = [name for name in fixtures_of_its_module(item) if name not in _made[module]]
    _made[module].update(new)
    return f"{module}: {', '.join(new)}" if new else None


def names_of_fixtures(item: pytest.Item, seconds: dict[str, float]) -> set[str]:
    """Under which what its module's fixtures took is written down."""
    own = set(fixtures_of_its_module(item))
    head = f"{item.location[0].removeprefix('tests/')}: "
    return {name for name in seconds if name.startswith(head) and own & set(name.removeprefix(head).split(", "))}


_took: dict[str, float] = defaultdict(float)
_used = [0.0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Processor seconds since the report before, in the process that tests: a worker's report is sent with them."""
    report = yield
    before, _used[0] = _used[0], processor_seconds()
    report.processor_seconds = _used[0] - before
    report.shared = name_of_new_fixtures(item) if report.when == "setup" else None
    return report  # type: ignore[return-value]


def pytest_runtest_logstart() -> None:
    _used[0] = _used[0] or processor_seconds()  # not what was imported before the first test


def processor_seconds() -> float:
    """Of this process, its forks and what all of them have started and waited for."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + warm.processor_seconds()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With what its own fixtures took; what the first test of those of its module took to set up is counted for these."""
    name = getattr(report, "shared", None) or name_of(report.nodeid)
    _took[name] += getattr(report, "processor_seconds", 0.0)  # none of a worker that died


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-seconds") and not hasattr(session.config, "workerinput"):
        before: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        new = {**before, **{name: round(took, 1) for name, took in _took.items()}}
        kept = {name: took for name, took in sorted(new.items()) if took >= SLOW}
        SECONDS.write_text(json.dumps(kept, indent=0) + "\n")
