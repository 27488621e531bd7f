"""Code: does the program pass its tests?

The program never sees what is expected of it, and none of its names takes part in the verdict. Of input/output tests it sees
the input. Statements (`assert f(2) == 4`, HumanEval's `check(f)`, a loop) run in a clean interpreter of their own, where what
they take from the program stands for calls to its process: arguments and results cross as plain values (numbers, texts,
containers, dates, fractions, arrays), and any other object fails a comparison. So neither a printed "passed", nor
`sys.exit(0)`, nor `range = lambda *a: [0]`, nor an object that equals everything earns anything.

Names of Python's own (`sorted`) and of libraries (`np`, `Counter`) are the tests' own. Only where tests call nothing else
but a single one of them (MBPP's `assert sum(10, 15) == 6`) it is the program's.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import symtable
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from .sandbox import SandboxError, run_python, runs_as_root, unprotected
from .verifier.extraction import last_answer_tag

Source = Literal["answer_tag", "fence"]
MAX_PROGRAM_CHARS = 100_000

_LANGUAGES = ("", "python", "python3", "py")
_MODULES = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
    *("json", "math", "numpy", "operator", "random", "re", "statistics", "string", "typing"),
)
_LIBRARY = {
    **{name: name for name in _MODULES},
    "np": "numpy",
    **{name: f"collections:{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple")},
    **{name: f"datetime:{name}" for name in ("date", "timedelta", "timezone")},
    **{"Fraction": "fractions:Fraction", "Decimal": "decimal:Decimal", "isclose": "math:isclose", "sqrt": "math:sqrt"},
}
"""Names that mean a library in a test, whatever the program calls so: module, or module:name."""


@dataclass(frozen=True)
class InputOutput:
    """A test that gives a program something to read and compares what it prints."""

    input: str
    output: str


@dataclass(frozen=True)
class Statements:
    """Tests of one program that run beside it, one after another."""

    texts: tuple[str, ...]
    counts: tuple[bool, ...]  # False: it only defines what the next ones use
    names: tuple[str, ...]  # that they take from the program
    library: dict[str, str]  # of _LIBRARY, those that they use


Tests = list[InputOutput] | Statements


def code(
    completion: str,
    tests: Any,
    *,
    source: Source = "answer_tag",
    share: bool = False,
    seconds: float = 6.0,
    memory_gib: float = 1.0,
    as_root: bool = False,
) -> float | None:
    """1 if the program that the completion ends with passes all tests, else 0; with `share`, the share that it passes.

    Args:
        completion: what the model wrote.
        tests: a list, or its JSON text, of `{"input": text, "output": text}`, or of Python statements such as
            `assert f(2) == 4`. Outputs are compared line by line, without the white space at the ends.
        source: where the program is looked for: the last fenced block (three backticks, and `python` or nothing) inside the
            last `<answer>...</answer>`, or `fence`: the last one anywhere.
        share: pay the share of tests passed. Easier to learn from, and paid for programs that are wrong.
        seconds: wall-clock limit for all tests of one program together, comparing included; late is wrong. Keep it below
            `scoring.timeout_seconds`, or a program that sleeps is "can't tell" instead.
        memory_gib: address space of the program, and of its tests.
        as_root: run programs as the machine's root where there is no bubblewrap.

    Returns:
        From 0.0 to 1.0, or None ("can't tell") if the tests cannot be read or the sandbox does not start.

    Raises:
        ValueError: programs would run as root, and `as_root` is not set.
    """
    check_root(0, as_root=as_root)
    read = _read_tests(_frozen(tests))
    if isinstance(read, str):
        return None
    program = _program(completion, source)
    if program is None:
        return 0.0
    _warn_if_unprotected()
    try:
        verdicts = _verdicts(program, read, time.monotonic() + seconds, memory_gib, stop_early=not share)
    except SandboxError:
        return None
    if None in verdicts:
        return None
    return sum(map(bool, verdicts)) / len(verdicts) if share else float(all(verdicts))


def check_tests(tests: Any) -> str | None:
    """Why these tests cannot grade a program; None if they can. To be asked of every data row before training."""
    read = _read_tests(_frozen(tests))
    return f"tests is {str(tests)[:80]!r}; {read}. Correct or drop the row" if isinstance(read, str) else None


def check_root(limit: int, /, *, as_root: bool = False, **_: Any) -> None:
    """Refuse, before a model is loaded, to run programs as root.

    Raises:
        ValueError: there is no bubblewrap, the user is root, and `as_root` is not set.
    """
    if not as_root and os.geteuid() == 0 and runs_as_root():
        raise ValueError(
            "rewards.*.args.as_root is false; code would run the model's programs as root, because bubblewrap is not "
            "installed or user namespaces are forbidden. Install bubblewrap, train as another user, or set "
            "rewards.*.args.as_root: true if the machine is a container that has nothing to lose."
        )


code.check_row = check_tests  # type: ignore[attr-defined]
code.check_limit = check_root  # type: ignore[attr-defined]
code.notice = unprotected  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _warn_if_unprotected() -> None:
    if (open_ways := unprotected()) is not None:
        warnings.warn(open_ways, RuntimeWarning, stacklevel=3)


# ---- the program -----------------------------------------------------------------------------------------------------


def _program(completion: str, source: Source) -> str | None:
    if source not in ("answer_tag", "fence"):
        raise ValueError(f"code's source is {source!r}; it is one of answer_tag, fence. Set one of them.")
    text = last_answer_tag(completion) if source == "answer_tag" else completion
    block = None if text is None else last_fence(text)
    return None if block is None or len(block) > MAX_PROGRAM_CHARS else block


def last_fence(text: str) -> str | None:
    """The content of the last fenced block of Python; None without a complete one."""
    block = None
    opened: list[str] | None = None
    is_python = False
    for line in text.split("\n"):
        before, fence, language = line.partition("```")
        if opened is not None and line.startswith("```"):
            block = "\n".join(opened) if is_python else block
            opened = None
        elif opened is not None:
            opened.append(line)
        elif fence and (language.strip().lower() in _LANGUAGES or not before):  # "<answer>```python" opens one, too
            opened, is_python = [], language.strip().lower() in _LANGUAGES
    return block


# ---- the tests -------------------------------------------------------------------------------------------------------


def _frozen(tests: Any) -> str:
    """The tests as JSON text: what the cache below is asked for."""
    try:
        return tests if isinstance(tests, str) else json.dumps(tests, sort_keys=True)
    except (TypeError, ValueError):
        return ""


@lru_cache(maxsize=256)  # one row meets all the completions of its group
def _read_tests(text: str) -> Tests | str:
    """The tests, all of one kind, or why they cannot be read."""
    try:
        tests = json.loads(text)
    except ValueError:
        return "it is neither a list nor the JSON text of one"
    if not isinstance(tests, list) or not tests:
        return "it is no list of tests, or an empty one"
    if all(isinstance(test, dict) for test in tests):
        return _read_inputs(tests)
    if all(isinstance(test, str) for test in tests):
        return _read_statements(tests)
    return 'its items are neither all {"input": ..., "output": ...} nor all statements'


def _read_inputs(tests: list[dict[str, Any]]) -> list[InputOutput] | str:
    for test in tests:
        if not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
            return f"{str(test)[:80]} has no input and output that are text"
        if not test["output"].strip():
            return "a test expects no output: a program that does nothing would pass it"
    return [InputOutput(test["input"], test["output"]) for test in tests]


def _read_statements(tests: list[str]) -> Statements | str:
    reads: list[set[str]] = []
    called: set[str] = set()
    defined: set[str] = set()
    counts = []
    for test in tests:
        try:
            tree, table = ast.parse(test), symtable.symtable(test, "test", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"{test[:80]!r} is no Python: {error}"
        nodes = list(ast.walk(tree))
        if any(isinstance(node, ast.ClassDef) for node in nodes):
            return f"{test[:80]!r} defines a class, whose objects a program cannot be given"
        called |= {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        defined |= set(_defined(table))
        reads.append(set(_globals(table)))
        counts.append(not all(isinstance(statement, _SETUP) for statement in tree.body))
    names, library = _names(set().union(*reads) - defined, called - defined)
    for test, read, is_counted in zip(tests, reads, counts, strict=True):
        if is_counted and not read & (names | defined):
            return f"{test[:80]!r} does not call the program"
    if not names or not any(counts):
        return "it does not call the program" if not names else "its tests check nothing"
    return Statements(tuple(tests), tuple(counts), tuple(sorted(names)), library)


def _names(used: set[str], called: set[str]) -> tuple[set[str], dict[str, str]]:
    """The program's names, and those of libraries. A single name of Python's own that is all that is called may be its."""
    names = used - _LIBRARY.keys() - vars(builtins).keys()
    if not names and len(called) == 1:
        names = called
    return names, {name: _LIBRARY[name] for name in sorted((used & _LIBRARY.keys()) - names)}


_SETUP = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that a test reads and no function of its own binds."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals(child)


def _defined(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that a test binds for those after it."""
    return (symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported())


# ---- running ---------------------------------------------------------------------------------------------------------


def _verdicts(program: str, tests: Tests, deadline: float, memory_gib: float, *, stop_early: bool) -> list[bool | None]:
    """Of each test, whether the program passes it by the deadline; with `stop_early`, up to the first that it does not."""
    if isinstance(tests, Statements):
        return _statements_held(program, tests, deadline, memory_gib)
    verdicts: list[bool | None] = []
    for test in tests:
        left = deadline - time.monotonic()
        run = run_python(program, seconds=left, memory_gib=memory_gib, stdin=test.input) if left > 0 else None
        verdicts.append(run is not None and run.exit_code == 0 and _is_same(run.output, test.output))
        if stop_early and not verdicts[-1]:
            break
    return verdicts


def _is_same(output: bytes, expected: str) -> bool:
    """Whether the lines are the same but for white space at their ends. Counted first: a program may write millions."""
    written, expected = output.rstrip().decode("utf-8", "replace").rstrip(), expected.rstrip()
    if written.count("\n") != expected.count("\n"):
        return False
    return [line.rstrip() for line in written.split("\n")] == [line.rstrip() for line in expected.split("\n")]


_VERDICTS: dict[bytes, bool | None] = {b"true": True, b"false": False, b"null": None}


def _statements_held(program: str, tests: Statements, deadline: float, memory_gib: float) -> list[bool | None]:
    """All of them in one run; one without a result was not reached in time, or the program ended."""
    request = {"tests": tests.texts, "names": tests.names, "library": tests.library}
    run = run_python(program, seconds=deadline - time.monotonic(), memory_gib=memory_gib, tests=request)
    written = run.output.split(b"\n")[:-1]  # what follows the last line's end was cut off with its process
    if len(written) > len(tests.texts) or not set(written) <= _VERDICTS.keys():
        raise SandboxError("the results cannot be read")
    held = [_VERDICTS[line] for line in written] + [False] * (len(tests.texts) - len(written))
    return [verdict for verdict, counts in zip(held, tests.counts, strict=True) if counts or verdict is None]
