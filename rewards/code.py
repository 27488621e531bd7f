"""Code: does the program pass its tests?

The program never sees what is expected of it. Of input/output tests it sees the input. `assert f(2) == 4` is taken apart: the
sandbox evaluates `f(2)`, and the comparison happens here, on plain data (numbers, strings, lists, ...; any other object fails
the test), so neither a printed "passed", nor `sys.exit(0)`, nor an object that equals everything earns anything. Only tests
that cannot be taken apart (a loop, a `check` function, a comparison inside a comprehension) run beside the program, which a
program that looks for them can fool; prefer the other forms.
"""

from __future__ import annotations

import ast
import json
import math
import secrets
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, Literal

from .extraction import last_answer_tag
from .sandbox import Run, SandboxError, run_python, unprotected

Source = Literal["answer_tag", "fence"]
MAX_PROGRAM_CHARS = 100_000

_LANGUAGES = ("", "python", "python3", "py")
_FUNCTIONS = (
    abs,
    all,
    any,
    bool,
    dict,
    float,
    frozenset,
    int,
    isinstance,
    len,
    list,
    max,
    min,
    round,
    set,
    sorted,
    str,
    sum,
)
_OUTSIDE: dict[str, Any] = {f.__name__: f for f in (*_FUNCTIONS, tuple, type)} | {"math": math}  # not the program's
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)


@dataclass(frozen=True)
class InputOutput:
    """A test that gives a program something to read and compares what it prints."""

    input: str
    output: str


@dataclass(frozen=True)
class Assertion:
    """A test taken apart: what to evaluate beside the program, and, with those values as `_0`, `_1`, ..., what must hold."""

    inside: tuple[str, ...]
    holds: CodeType


@dataclass(frozen=True)
class Block:
    """A test that runs beside the program as it is."""

    text: str


def code(
    completion: str,
    tests: Any,
    *,
    source: Source = "answer_tag",
    share: bool = False,
    seconds: float = 6.0,
    memory_gib: float = 1.0,
) -> float | None:
    """1 if the program that the completion ends with passes all tests, else 0; with `share`, the share that it passes.

    Args:
        completion: what the model wrote.
        tests: a list, or its JSON text, of `{"input": text, "output": text}`, or of Python statements such as
            `assert f(2) == 4`. Outputs are compared line by line, without the white space at the ends.
        source: where the program is looked for: the last fenced block (three backticks, and `python` or nothing) inside the
            last `<answer>...</answer>`, or `fence`: the last one anywhere.
        share: pay the share of tests passed. Easier to learn from, and paid for programs that are wrong.
        seconds: wall-clock limit for all tests of one program together. Keep it below `scoring.timeout_seconds`, or a program
            that sleeps is "can't tell" instead of wrong.
        memory_gib: address space of the program.

    Returns:
        From 0.0 to 1.0, or None ("can't tell") if the tests cannot be read or the sandbox does not start.
    """
    read = _read_tests(_frozen(tests))
    if isinstance(read, str):
        return None
    program = _program(completion, source)
    if program is None:
        return 0.0
    _warn_if_unprotected()
    try:
        passed = _num_passed(program, read, time.monotonic() + seconds, memory_gib, stop_early=not share)
    except SandboxError:
        return None
    return passed / len(read) if share else float(passed == len(read))


def check_tests(tests: Any) -> str | None:
    """Why these tests cannot grade a program; None if they can. To be asked of every data row before training."""
    read = _read_tests(_frozen(tests))
    return f"tests is {str(tests)[:80]!r}; {read}. Correct or drop the row" if isinstance(read, str) else None


code.check_row = check_tests  # type: ignore[attr-defined]
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

Test = InputOutput | list[Assertion] | Block


def _frozen(tests: Any) -> str:
    """The tests as JSON text: what the cache below is asked for."""
    try:
        return tests if isinstance(tests, str) else json.dumps(tests, sort_keys=True)
    except (TypeError, ValueError):
        return ""


@lru_cache(maxsize=256)  # one row meets all the completions of its group
def _read_tests(text: str) -> list[Any] | str:
    """The tests, all of one kind (`InputOutput`, or lists of `Assertion` and `Block`s), or why they cannot be read."""
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


def _read_statements(tests: list[str]) -> list[list[Assertion] | Block] | str:
    read: list[list[Assertion] | Block] = []
    for test in tests:
        try:
            statements = ast.parse(test).body
        except (SyntaxError, ValueError, RecursionError) as error:
            return f"{test[:80]!r} is no Python: {error}"
        if not any(isinstance(node, ast.Call) for statement in statements for node in ast.walk(statement)):
            return f"{test[:80]!r} does not call the program"
        parts = [_take_apart(statement) for statement in statements]
        read.append([part for part in parts if part is not None] if None not in parts else Block(test))
    return read


def _take_apart(statement: ast.stmt) -> Assertion | None:
    """`assert abs(f(2) - 4) < 0.1` as `f(2)` and `abs(_0 - 4) < 0.1`; None if it cannot be."""
    if not isinstance(statement, ast.Assert):
        return None
    splitter = _Splitter()
    rest: Any = splitter.visit(statement.test)
    if not splitter.inside or any(isinstance(node, _SCOPES) for node in ast.walk(rest)):
        return None
    return Assertion(
        tuple(splitter.inside), compile(ast.fix_missing_locations(ast.Expression(rest)), "the test", "eval")
    )


class _Splitter(ast.NodeTransformer):
    """Replaces every expression that begins with a name of the program's by a name for its value."""

    def __init__(self) -> None:
        self.inside: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, ast.expr) or not _needs_program(node):
            return self.generic_visit(node)
        self.inside.append(ast.unparse(node))
        return ast.Name(f"_{len(self.inside) - 1}", ast.Load())


def _needs_program(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and not isinstance(node.op, (ast.Add, ast.Sub)):
        return any(_needs_program(child) for child in ast.walk(node) if child is not node)  # 9 ** f(2): in the sandbox
    root = node
    while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return isinstance(root, ast.Name) and root.id not in _OUTSIDE


# ---- running ---------------------------------------------------------------------------------------------------------


def _num_passed(program: str, tests: list[Any], deadline: float, memory_gib: float, *, stop_early: bool) -> int:
    """How many tests it passes by the deadline; with `stop_early`, up to the first that it does not."""
    if not isinstance(tests[0], InputOutput):
        return _num_held(program, tests, deadline, memory_gib)
    passed = 0
    for test in tests:
        left = deadline - time.monotonic()
        run = run_python(program, seconds=left, memory_gib=memory_gib, stdin=test.input) if left > 0 else None
        if (
            run is not None
            and run.exit_code == 0
            and _lines(run.output.decode("utf-8", "replace")) == _lines(test.output)
        ):
            passed += 1
        elif stop_early:
            break
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _num_held(program: str, tests: list[list[Assertion] | Block], deadline: float, memory_gib: float) -> int:
    """The same for statements, all of them in one run."""
    nonce = secrets.token_hex(16)
    requests: list[Any] = [nonce]
    for test in tests:
        parts = test if isinstance(test, list) else [test]
        requests += [{"block": p.text} if isinstance(p, Block) else {"values": p.inside} for p in parts]
    run = run_python(program, seconds=deadline - time.monotonic(), memory_gib=memory_gib, tests=requests)
    results = _results(run, nonce)
    passed, number = 0, 0
    for test in tests:
        num_parts = len(test) if isinstance(test, list) else 1
        values = [results.get(i) for i in range(number, number + num_parts)]
        holds = (
            [_holds(part, value) for part, value in zip(test, values, strict=True)] if isinstance(test, list) else []
        )
        passed += None not in values and all(holds)
        number += num_parts
    return passed


def _results(run: Run, nonce: str) -> dict[int, list[Any]]:
    """The values of each test that went well, by number. A program may have written anything here."""
    results = {}
    for line in run.output.decode("utf-8", "replace").split("\n"):
        mark, _, text = line.partition(" ")
        if mark == nonce:
            try:
                number, went_well, values = json.loads(text)
                if went_well is True:
                    results[int(number)] = [_decoded(value) for value in values]
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                continue
    return results


def _decoded(value: Any) -> Any:
    """The inverse of `sandbox_guard.plain`."""
    mark, content = value
    read: dict[str, Callable[[Any], Any]] = {
        "none": lambda c: None,
        "bool": bool,
        "int": lambda c: int(c, 16),
        "float": float.fromhex,
        "str": str,
        "bytes": bytes.fromhex,
        "complex": lambda c: complex(float.fromhex(c[0]), float.fromhex(c[1])),
        "dict": lambda c: {_decoded(k): _decoded(v) for k, v in c},
        "list": lambda c: [_decoded(v) for v in c],
        "tuple": lambda c: tuple(_decoded(v) for v in c),
        "set": lambda c: {_decoded(v) for v in c},
        "frozenset": lambda c: frozenset(_decoded(v) for v in c),
    }
    return read[mark](content)


def _holds(assertion: Assertion, values: list[Any] | None) -> bool:
    if values is None or len(values) != len(assertion.inside):
        return False
    names = {f"_{i}": value for i, value in enumerate(values)}
    try:
        return bool(eval(assertion.holds, {"__builtins__": {}, **_OUTSIDE, **names}))
    except Exception:  # the program returned None where the test takes its length
        return False
