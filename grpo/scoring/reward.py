"""Reward functions: what they are, and finding and loading those that a configuration names."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import math
import re
import sys
import textwrap
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from grpo.config import RewardConfig, as_text, read_text
from grpo.scoring.worker import SourceFile
from grpo.system.stopping import RunError

loaded_files: dict[str, SourceFile] = {}  # modules that resolve_function loaded from a path; workers load the same text

LARGEST = 3.4028234663852886e38
"""Of a reward: the largest number of 32 bits. Rewards are 64-bit numbers up to the advantage, which is a 32-bit one: a larger
reward would become infinite."""

Form = Literal["completion", "texts", "messages"]
FORMS: dict[str, str] = {
    "completion": "once for each completion, as text",
    "texts": "once for a group, with its completions as texts",
    "messages": "once for a group, with its completions as lists of messages",
}
"""How a function can be called."""


class RewardError(RunError):
    """A bug in a reward function: it raised an exception or returned what is not a reward."""

    def __init__(self, message: str, worker_traceback: str = "") -> None:
        """Args: worker_traceback: of the process that the function ran in."""
        super().__init__(f"{message}\n{worker_traceback}".rstrip())
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)

    @property
    def sentence(self) -> str:
        return self._message


@dataclass(frozen=True)
class Reward:
    """A reward function and its place in the sum; docs/rewards.md has more.

        def brief(completion: str, limit: int) -> float:
            return 1.0 if len(completion) < limit else 0.0

        Trainer(..., rewards=[accuracy, Reward(brief, weight=0.2, args={"limit": 60})])

    A function is given what its parameters name: `completion`, `prompt`, `answer` and any other column of the data, or, if it is
    called once for a group, `completions`, `prompts` and so on. It returns a number for each completion, None for "can't tell".
    It runs in worker processes: a change that it makes to a variable of yours is lost. Return numbers with `log_metric` instead.

    Args:
        function: or an object that can be called.
        weight: factor in the sum. 0: only logged.
        name: in the metrics, reward/<name>; empty: the function's own.
        args: further keyword arguments.
        form: completion, texts or messages: how it is called; None: as its parameters say.
        only: which questions it is asked about, by columns of the data, as in {"kind": ["maths", "logic"]} or {"level": 1};
            empty: all.
        made_with: what `function` was made with, where it is an object that a configuration's class made; a run that resumes
            compares it, as `args`. None: it is none.

    Raises:
        ValueError: the function is a class or cannot be called, or what is said of it has the wrong form or is no value of it.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    name: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    form: Form | None = None
    only: Mapping[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] | None = field(default=None, repr=False)

    def is_asked(self, columns: Mapping[str, Any]) -> bool:
        """Whether `only` lets it be asked about a question with these columns."""
        return all(as_text(columns.get(name)) in values for name, values in self.only.items())

    @property
    def is_due(self) -> bool:
        """Whether it can tell of the questions that it is asked about, so that None is a failure: `only` names them, or the
        function has `tells_of_all`."""
        told = (getattr(each, "tells_of_all", False) for each in (self.function, _unwrapped(self.function)))
        return bool(self.only) or any(told)

    def __post_init__(self) -> None:
        """Raises ValueError: see the class."""
        if inspect.isclass(self.function):
            raise ValueError(
                f"reward {self.function.__name__} is a class; a reward is a function, or an object that can be called. Hand over "
                f"an object: {self.function.__name__}(...)."
            )
        if not callable(self.function):
            raise ValueError(
                f"a Reward is made of {self.function!r}; it is made of a function, or of an object that can be called. Hand over "
                "one, such as grpo.rewards.accuracy."
            )
        if not self.name:
            function = _unwrapped(self.function)
            object.__setattr__(self, "name", getattr(function, "__name__", type(function).__name__))
        self._check_values()
        object.__setattr__(self, "only", {name: _as_texts(wanted) for name, wanted in self.only.items()})

    def _check_values(self) -> None:
        """Raises ValueError: a value is none that the configuration would take."""
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        rules = {
            "name": (isinstance(self.name, str), "it is text"),
            "weight": (is_number and math.isfinite(self.weight), "it is a finite number"),
            "args": (_has_names(self.args), 'it says the values of further parameters, as in {"limit": 60}'),
            "form": (self.form in (None, *FORMS), f"it is {', '.join(FORMS)} or None"),
            "only": (
                _has_values(self.only),
                'it says by columns of the data which questions, in text, numbers or booleans, as in {"kind": ["maths"]}',
            ),
        }
        for setting, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"reward {self.name} has {setting}={getattr(self, setting)!r}; {rule}. Correct it.")


def _has_names(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _has_values(only: Mapping[str, Any]) -> bool:
    return _has_names(only) and all(isinstance(text, str) for wanted in only.values() for text in _as_texts(wanted))


def _as_texts(wanted: Any) -> list[Any]:
    """A value of a column, or several, as they are compared."""
    wanted = getattr(wanted, "tolist", lambda: wanted)()  # of numpy
    is_one = isinstance(wanted, str | Mapping) or not isinstance(wanted, Iterable)
    return [as_text(value) for value in ([wanted] if is_one else wanted)]


CHANGING = frozenset(
    [
        "add",
        "append",
        "appendleft",
        "clear",
        "discard",
        "extend",
        "insert",
        "pop",
        "popitem",
        "remove",
        "setdefault",
        "update",
        "write",
    ]
)
"""Methods that change the object they belong to."""


def changed_variables(function: Callable[..., Any]) -> list[str]:
    """Names of variables outside of a function that its source changes, as far as that can be seen there.

    Of a closure, and of a function of a script or notebook: those of a module may keep a cache, which is nobody's surprise.
    """
    function = _unwrapped(function)
    code = getattr(function, "__code__", None)
    if code is None or not (code.co_freevars or getattr(function, "__module__", None) in ("__main__", "__mp_main__")):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed in without a file, or in the middle of an expression
        return []
    outside = {*code.co_freevars, *code.co_names} - {*code.co_varnames}
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Nonlocal, ast.Global)):
            found |= dict.fromkeys(node.names)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            found |= dict.fromkeys(_root(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            found |= dict.fromkeys(_root(node.func.value))
    return [name for name in found if name in outside]


def _root(node: ast.expr) -> list[str]:
    """The name that an expression such as `counts["a"].b` begins with, if it does with one."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return [node.id] if isinstance(node, ast.Name) else []


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a `functools.partial` is of."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def resolve_rewards(configured: Iterable[RewardConfig]) -> list[Reward]:
    """The rewards that a YAML lists. Raises ValueError as `resolve_function` does, or if a class makes no reward."""
    return [_configured(each) for each in configured]


def _configured(config: RewardConfig) -> Reward:
    function, args, own = resolve_function(config.function), config.args, None
    if inspect.isclass(function):
        own = {name: value for name, value in args.items() if name in inspect.signature(function).parameters}
        function, args = _instance(config, function, own), {n: v for n, v in args.items() if n not in own}
    return Reward(
        function,
        weight=config.weight,
        name=config.name or "",
        args=args,
        form=config.form,
        only=config.only,
        made_with=own,
    )


def _instance(config: RewardConfig, kind: type, args: dict[str, Any]) -> Callable[..., Any]:
    """An object of a class that a YAML names, made with those of its args that the class takes."""
    spec = config.function
    try:
        made = kind(**args)
    except TypeError as error:
        others = [name for name in config.args if name not in args]
        raise ValueError(
            f"rewards.*.function is {spec!r}, a class; it cannot be made from its args {config.args}: {error}; "
            f"{nearest(others[0] if others else '', inspect.signature(kind).parameters)} Set rewards.*.args."
        ) from error
    if not callable(made):
        raise ValueError(
            f"rewards.*.function is {spec!r}, a class; its objects cannot be called. Give it a method __call__, or name "
            "a function."
        )
    return made


def resolve_function(
    spec: str, setting: str = "rewards.*.function", built_in: str = "grpo.rewards"
) -> Callable[..., Any]:
    """The function that a YAML names, or the class of such functions.

    Args:
        spec: a name in rewards/ ("accuracy"), "module:function", or "path/to/file.py:function".
        setting: where it stands, for errors.
        built_in: the module of those that have a bare name.

    Raises:
        ValueError: there is no such function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        module, name = _built_in(spec, setting, built_in), spec
    else:
        module = (
            _load_file(spec, Path(place), setting) if place.endswith(".py") else _import_module(spec, place, setting)
        )
    function = getattr(module, name, None)
    if not callable(function):
        defined = [
            key for key, value in vars(module).items() if inspect.isfunction(value) or _is_own_class(value, module)
        ]
        raise ValueError(_no_function(spec, setting, defined))
    return function


def _is_own_class(value: Any, module: ModuleType) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__


def check_spec(spec: str, setting: str = "rewards.*.function", built_in: str = "grpo.rewards") -> None:
    """What `resolve_function` refuses and can be told without running a user's code: it may import torch, or take a GPU.

    Raises:
        ValueError: as there.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        _built_in(spec, setting, built_in)
    elif place.endswith(".py"):
        source = _source_file(spec, Path(place), setting)
        bound, functions = _bound_names(ast.parse(source.text))
        if bound is not None and name not in bound:
            raise ValueError(_no_function(spec, setting, functions))
    elif importlib.util.find_spec(package := place.partition(".")[0] or " ") is None:
        raise ValueError(_not_imported(spec, place, setting, f"there is no package {package!r}"))


def likely_name(function: str, name: str | None) -> str:
    """The name that a reward has by its entry, unless its source gives the function another."""
    return name or re.split("[:.]", function)[-1]


def sure_name(config: RewardConfig) -> str | None:
    """The name that a reward will have, by its entry and its source; None: nobody knows before its file is run."""
    place, colon, name = config.function.rpartition(":")
    if config.name or not colon:
        return config.name or name
    if not place.endswith(".py"):
        return None
    tree = ast.parse(_source_file(config.function, Path(place), "rewards.*.function").text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    plain = [node.name for node in functions if not node.decorator_list]  # a decorator may return one of another name
    return name if name in plain else None


def _built_in(spec: str, setting: str, built_in: str) -> ModuleType:
    module = importlib.import_module(built_in)  # a user's own `rewards` is another module
    if spec not in module.__all__:
        raise ValueError(
            f"{setting} is {spec!r}; {nearest(spec, module.__all__)} Name one of these, "
            "module:function, or path/to/file.py:function."
        )
    return module


def _no_function(spec: str, setting: str, defined: Iterable[str]) -> str:
    place, _, name = spec.rpartition(":")
    return (
        f"{setting} is {spec!r}; {place} has no function or class {name!r}: {nearest(name, defined)} Name one of these."
    )


def _bound_names(tree: ast.Module) -> tuple[set[str] | None, list[str]]:
    """Names that a source gives to anything, anywhere, and those of its outermost functions and classes. None: it imports `*`."""
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                return None, []
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return bound, [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


# ---- who is given what -----------------------------------------------------------------------------------------------


def _import_module(spec: str, name: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # ValueError: an empty name
        raise ValueError(_not_imported(spec, name, setting, error)) from error


def _not_imported(spec: str, name: str, setting: str, why: object) -> str:
    return (
        f"{setting} is {spec!r}; the module {name!r} cannot be imported: {why}. "
        "Install it, add its folder to PYTHONPATH, or name its file: path/to/file.py:function."
    )


def modules_of(rewards: Sequence[Reward]) -> list[str]:
    """Where the functions and their `check_row`s were defined, each once."""
    functions = [_unwrapped(f) for r in rewards for f in (r.function, getattr(r.function, "check_row", None)) if f]
    return list(dict.fromkeys(getattr(f, "__module__", type(f).__module__) for f in functions))


def _load_file(spec: str, path: Path, setting: str) -> ModuleType:
    name = _module_name(path)
    if name not in loaded_files:
        source = _source_file(spec, path, setting)
        _check_neighbours(spec, source, setting)
        try:
            with _importing_from(source.folder):
                source.load()
        except (Exception, SystemExit) as error:
            del sys.modules[name]  # what it has defined until then is not whole
            raise ValueError(_not_run(spec, source, setting, error)) from error
        loaded_files[name] = source
    return sys.modules[name]


def _module_name(path: Path) -> str:
    """Another one for each of two files with one name, and never with a dot."""
    return f"reward_file_{zlib.crc32(str(path.resolve()).encode()):08x}"


def _source_file(spec: str, path: Path, setting: str) -> SourceFile:
    """Raises ValueError if there is no such file, or it is no Python."""
    if not path.is_file():
        raise ValueError(
            f"{setting} is {spec!r}; there is no file {path.resolve()}. "
            "Give the path from the folder in which the run is started, or an absolute one."
        )
    path = path.resolve()
    source = SourceFile(_module_name(path), str(path), read_text(path, f"{setting} is {spec!r}"))
    try:
        compile(source.text, source.path, "exec")
    except SyntaxError as error:
        raise ValueError(f"{setting} is {spec!r}; the file is not valid Python: {error}. Correct it.") from error
    return source


def _not_run(spec: str, source: SourceFile, setting: str, error: BaseException) -> str:
    """What ended the file while it was imported, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source.path]
    remedy = "Install it, or correct the file." if isinstance(error, ImportError) else "Correct the file."
    return (
        f"{setting} is {spec!r}; line {lines[-1] if lines else 1} of {source.path} raised {type(error).__name__} while the file "
        f"was imported: {error}. {remedy}"
    )


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _check_neighbours(spec: str, source: SourceFile, setting: str) -> None:
    """Raises ValueError if the file imports a module beside it whose name another module has by now: it would be given that."""
    for name, path in _neighbours(Path(source.folder), source.text).items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and (loaded is None or Path(loaded).resolve() != path.resolve()):
            raise ValueError(
                f"{setting} is {spec!r}; it imports {name}, and {path} is not the only module of that name: "
                f"{loaded or 'one of Python itself'} has been imported as it. Rename one of the two."
            )


def _neighbours(folder: Path, text: str, known: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Path]:
    """The modules of a folder that a source in it imports, and what those import there."""
    found = dict(known)
    for name in _imports(text) - set(known):
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                found |= _neighbours(folder, path.read_text(encoding="utf-8"), {**found, name: path})
    return found


def _imports(text: str) -> set[str]:
    """Names of the modules that a source imports, up to their first dot."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    others = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in plain | others}


def nearest(name: str, known: Iterable[str]) -> str:
    """ "there is a, b, c; did you mean b?", with its full stop where there is no such question."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1)
    return f"there is {', '.join(known) or 'nothing'}" + (f"; did you mean {close[0]}?" if close else ".")
