"""Python in the sandbox of the code reward; what a call defines is there in the next ones of its conversation."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from grpo.rewards.sandbox import run_python, runs_as_root, unprotected

_SESSION = """
import _ast, os, sys

def run(code, names):
    tree = compile(code, "<call>", "exec", _ast.PyCF_ONLY_AST)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    exec(compile(tree, "<call>", "exec"), names)
    if last is not None:
        value = eval(compile(_ast.Expression(last.value), "<call>", "eval"), names)
        if value is not None:
            print(repr(value))

def again(earlier, names):
    import contextlib, io
    screen, nowhere = os.dup(1), os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 1)
    for each in earlier:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(BaseException):
            run(each, names)
    os.dup2(screen, 1)
    os.close(screen)
    os.close(nowhere)

def in_words(error):
    try:
        import traceback
        return "".join(traceback.format_exception_only(error)).rstrip()
    except BaseException:  # there is no memory left for it
        return type(error).__name__

def session(earlier, code, well, badly):
    names = {"__name__": "__main__"}
    if any("import" in each for each in (*earlier, code)):
        import random
        random.seed(0)
    if earlier:
        again(earlier, names)
    try:
        run(code, names)
    except BaseException as error:
        said = in_words(error)
        print(said.encode("utf-8", "replace").decode())
        sys.stdout.flush()
        os._exit(badly)
    sys.exit(well)

"""
"""What runs in the sandbox: the earlier calls again, silently, then the one at hand, whose last expression is shown. What most
calls do not need is imported where it is needed: `ast`, `traceback` and `random` would double the time of a call."""


WELL, BADLY = 93, 94
"""Exit codes of a session that came to its end, without and with an exception; with any other the code has ended its process."""


def _from_the_margin(code: str) -> str:
    """Code whose first line is indented, which none may be: models write a blank before the first word, or indent all of it."""
    lines = code.splitlines()
    first = next((line for line in lines if line.strip()), "")
    indentation = first[: len(first) - len(first.lstrip())]
    if not indentation:
        return code
    is_all = all(line.startswith(indentation) for line in lines if line.strip())
    return textwrap.dedent(code) if is_all else code.lstrip()


class CodeError(Exception):
    """The code raised an exception, which the message ends with."""


class python:
    """A conversation's Python. A call that is over its time is forgotten.

    What earlier calls have left is made anew by running them again, so that nothing has to live between two calls: their time
    counts towards the limit, and what depends on the clock may differ.

    Args:
        seconds: wall-clock limit of a call, with what it runs again. Keep it below tools.timeout_seconds.
        memory_gib: address space.
        as_root: run code as the machine's root where there is no bubblewrap.
    """

    def __init__(self, seconds: float = 4.0, memory_gib: float = 1.0, as_root: bool = False) -> None:
        self.seconds, self.memory_gib = seconds, memory_gib
        self.calls: list[str] = []

    def __call__(self, code: str) -> str:
        """Run Python code. Returns what it prints, and the value of its last line. Names stay defined for the next call.

        Args:
            code: the program text.
        """
        code = _from_the_margin(code)
        program = f"{_SESSION}session({self.calls!r}, {code!r}, {WELL}, {BADLY})"
        run = run_python(program, seconds=self.seconds, memory_gib=self.memory_gib)
        written = run.output.decode("utf-8", "replace").rstrip("\n")
        if run.exit_code is None:
            raise TimeoutError(f"the code ran for more than {self.seconds:g} seconds")
        if run.exit_code < 0 or run.exit_code > 128:
            raise CodeError(f"{written}\nthe process was ended: it took more memory, time or files than it may".strip())
        if run.exit_code not in (WELL, BADLY):  # run again, it would end those after it too
            raise CodeError(f"{written}\nthe code ended its own process; the call is forgotten".strip())
        self.calls.append(code)
        if run.exit_code == BADLY:
            raise CodeError(written)
        return written

    @staticmethod
    def _check(as_root: bool = False, **_: Any) -> None:
        """Refuse, before a model is loaded, to run code as root.

        Raises:
            ValueError: there is no bubblewrap, the user is root, and `as_root` is not set.
        """
        if not as_root and os.geteuid() == 0 and runs_as_root():
            raise ValueError(
                "tools has python without as_root; it would run the model's code as root, because bubblewrap is not installed or "
                "user namespaces are forbidden. Install bubblewrap, run as another user, or, in a container that has nothing to "
                "lose, set tools.functions to [{function: python, args: {as_root: true}}]."
            )

    _notice = staticmethod(unprotected)
