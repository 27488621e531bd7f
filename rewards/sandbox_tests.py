"""Tests of a program that never sees them: two processes, one with the program and one with the tests.

The tests run in a clean interpreter, `judge`. The names that they take from the program stand there for calls to the other
process, `serve`. Arguments and results cross as plain values: numbers, texts, containers of Python's own, dates, fractions,
numpy's arrays. Any other object of the program's stays where it is, behind a `Remote`: it can be called, iterated over and
asked for its attributes, and comparing it with a value of the tests' is an error. So the program learns the arguments of its
calls and nothing else, and none of its names, operators or methods has a part in the verdict.

The text of this file runs inside the sandbox, without the library: the standard library only, numpy where a value needs it.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import itertools
import json
import operator
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_BYTES = 32 * 2**20
MAX_VALUES = 2_000_000  # of one message
MAX_ITEMS = 100_000  # of an iterator that is handed to the program
MUTABLE = (list, dict, set, bytearray)
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul")
ORDERINGS = ("lt", "le", "gt", "ge")


class Ended(BaseException):
    """The program's process has ended, or what it says is no message."""


class NotForTheProgram(BaseException):
    """A test hands over what cannot cross: no program can be graded by it."""


# ---- values as text --------------------------------------------------------------------------------------------------

# type -> (mark, content, children). The children of a container are encoded before it.
Parts = tuple[str, Any, list[Any]]
ENCODERS: dict[str, Callable[[Any], Parts]] = {
    "builtins.NoneType": lambda v: ("none", None, []),
    "builtins.ellipsis": lambda v: ("ellipsis", None, []),
    "builtins.bool": lambda v: ("bool", bool(v), []),
    "builtins.int": lambda v: ("int", hex(int(v)), []),
    "builtins.float": lambda v: ("float", float(v).hex(), []),
    "builtins.str": lambda v: ("str", str.__str__(v), []),
    "builtins.bytes": lambda v: ("bytes", bytes.hex(v), []),
    "builtins.bytearray": lambda v: ("bytearray", bytearray.hex(v), []),
    "builtins.complex": lambda v: ("complex", [v.real.hex(), v.imag.hex()], []),
    "builtins.list": lambda v: ("list", len(items := list(v)), items),
    "builtins.tuple": lambda v: _tuple(v),
    "builtins.set": lambda v: ("set", len(items := list(v)), items),
    "builtins.frozenset": lambda v: ("frozenset", len(items := list(v)), items),
    "builtins.dict": lambda v: _pairs("dict", v),
    "builtins.dict_keys": lambda v: ("dict_keys", len(items := list(v)), items),
    "builtins.dict_values": lambda v: ("dict_values", len(items := list(v)), items),
    "builtins.dict_items": lambda v: _pairs("dict_items", dict(v)),
    "builtins.range": lambda v: ("range", [hex(v.start), hex(v.stop), hex(v.step)], []),
    "builtins.slice": lambda v: ("slice", 3, [v.start, v.stop, v.step]),
    "collections.Counter": lambda v: _pairs("Counter", v),
    "collections.OrderedDict": lambda v: _pairs("OrderedDict", v),
    "collections.deque": lambda v: ("deque", len(items := list(v)), items),
    "fractions.Fraction": lambda v: ("Fraction", [hex(v.numerator), hex(v.denominator)], []),
    "decimal.Decimal": lambda v: ("Decimal", str(v), []),
    "datetime.datetime": lambda v: ("datetime", v.isoformat(), []),
    "datetime.date": lambda v: ("date", v.isoformat(), []),
    "datetime.time": lambda v: ("time", v.isoformat(), []),
    "datetime.timedelta": lambda v: ("timedelta", [v.days, v.seconds, v.microseconds], []),
    "numpy.ndarray": lambda v: _array(v),
    "numpy.generic": lambda v: _scalar(v),
}


def _tuple(value: Any) -> Parts:
    items = list(value)
    fields = getattr(type(value), "_fields", None)
    if isinstance(fields, tuple) and len(fields) == len(items):
        return "namedtuple", [type(value).__name__, *map(str, fields)], items
    return "tuple", len(items), items


def _pairs(mark: str, value: Any) -> Parts:
    items = [part for pair in dict.items(value) for part in pair]
    return mark, len(items), items


def _array(value: Any) -> Parts:
    if value.dtype.kind not in "biufcSU":
        items = value.tolist()
        return _parts(items) or ("list", 0, [])
    return "ndarray", [value.dtype.str, list(value.shape), value.tobytes().hex()], []


def _scalar(value: Any) -> Parts:
    plain = value.item()
    if type(plain).__module__ == "numpy":
        raise TypeError(f"a {type(plain).__name__} is no plain value")
    parts = _parts(plain)
    if parts is None:
        raise TypeError(f"a {type(plain).__name__} is no plain value")
    return parts


def _parts(value: Any) -> Parts | None:
    """Of a plain value, or one whose class derives from such; None of any other object."""
    for kind in type(value).__mro__:
        if (encoder := ENCODERS.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return encoder(value)
    return None


def encode(value: Any, export: Callable[[Any], Parts]) -> list[Any]:
    """A value as a flat list of [mark, content], children first, so that depth costs no recursion."""
    result: list[Any] = []
    waiting: list[tuple[bool, Any]] = [(False, value)]
    while waiting:
        is_done, item = waiting.pop()
        if is_done:
            result.append(item)
            continue
        mark, content, children = _parts(item) or export(item)
        if len(result) + len(waiting) + len(children) > MAX_VALUES:
            raise ValueError("too many values")
        waiting.append((True, [mark, content]))
        waiting += [(False, child) for child in reversed(children)]
    return result


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda items: items,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": _dict,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: _dict(items).items(),
    "slice": lambda items: slice(*items),
    "Counter": lambda items: collections.Counter(_dict(items)),
    "OrderedDict": lambda items: collections.OrderedDict(_dict(items)),
    "deque": collections.deque,
    "iterator": iter,
}
ATOMS: dict[str, Callable[[Any], Any]] = {
    "none": lambda c: None,
    "ellipsis": lambda c: ...,
    "bool": bool,
    "int": lambda c: int(c, 16),
    "float": float.fromhex,
    "str": str,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda c: complex(float.fromhex(c[0]), float.fromhex(c[1])),
    "range": lambda c: range(*(int(part, 16) for part in c)),
    "Fraction": lambda c: fractions.Fraction(int(c[0], 16), int(c[1], 16)),
    "Decimal": decimal.Decimal,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda c: datetime.timedelta(*c),
    "ndarray": lambda c: _read_array(*c),
}


def _read_array(kind: str, shape: list[int], data: str) -> Any:
    import numpy

    class Array(numpy.ndarray):
        """One that also equals a list: programs return arrays where tests have lists."""

        def __eq__(self, other: Any) -> Any:
            return numpy.bool_(self.tolist() == other) if type(other) in (list, tuple) else super().__eq__(other)

    return numpy.frombuffer(bytes.fromhex(data), numpy.dtype(kind)).reshape(shape).copy().view(Array)


def decode(tokens: list[Any], resolve: Callable[[str, Any], Any]) -> Any:
    """The inverse of `encode`. Other marks are handed to `resolve`."""
    values: list[Any] = []
    for mark, content in tokens:
        if mark in ATOMS:
            values.append(ATOMS[mark](content))
        elif mark in CONTAINERS or mark == "namedtuple":
            count = len(content) - 1 if mark == "namedtuple" else content
            items = values[len(values) - count :]
            if type(count) is not int or not 0 <= count <= len(values):
                raise ValueError("not that many values")
            del values[len(values) - count :]
            values.append(_named(content, items) if mark == "namedtuple" else CONTAINERS[mark](items))
        else:
            values.append(resolve(mark, content))
    (value,) = values
    return value


def _named(names: list[str], items: list[Any]) -> Any:
    return collections.namedtuple(names[0], names[1:], rename=True)(*items)  # type: ignore[misc]


# ---- two processes that call each other ------------------------------------------------------------------------------


class Peer:
    """One end of the connection: asks the other end, and answers what that asks meanwhile."""

    def __init__(self, read_from: int, write_to: int, operations: dict[str, Callable[..., Any]]) -> None:
        self.read_from, self.write_to, self.operations = read_from, write_to, operations
        self.objects: list[Any] = []
        self._read, self._write, self._json = os.read, os.write, (json.dumps, json.loads)

    def ask(self, operation: str, *arguments: Any) -> Any:
        self._send(["ask", operation, self._encode(arguments)])
        while True:
            message = self._receive()
            if message[0] != "ask":
                return self._outcome(message, arguments)
            self._answer(message)

    def answer_all(self) -> None:
        while True:
            self._answer(self._receive())

    def _outcome(self, message: list[Any], arguments: tuple[Any, ...]) -> Any:
        kind, content, after = message
        if kind == "raised":
            raise _exception(str(content), str(after))
        if kind != "value":
            raise Ended
        result = decode(content, self._resolve)
        for old, new in zip(_handed_over(arguments), after or [], strict=False):
            if new is not None:
                _update(old, decode(new, self._resolve))
        return result

    def _answer(self, message: list[Any]) -> None:
        try:
            _, operation, tokens = message
            arguments = decode(tokens, self._resolve)
            result = self.operations[operation](self, *arguments)
            content = self._encode(result)
            after = None
            if operation == "call" and result is None:  # a function that changes its arguments returns None
                after = [self._encode(a) if isinstance(a, MUTABLE) else None for a in _handed_over(arguments)]
            self._send(["value", content, after])
        except Ended:
            raise
        except BaseException as error:  # SystemExit too
            self._send(["raised", _builtin_name(error, operation), _text(error)])

    def _send(self, message: list[Any]) -> None:
        data = self._json[0](message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError("too long a value")
        view = memoryview(struct.pack("<I", len(data)) + data)
        while view:
            view = view[self._write(self.write_to, view) :]

    def _receive(self) -> list[Any]:
        (length,) = struct.unpack("<I", self._exactly(4))
        if length > MAX_MESSAGE_BYTES:
            raise Ended
        try:
            message = self._json[1](self._exactly(length))
        except (ValueError, RecursionError):
            raise Ended from None
        if not isinstance(message, list) or len(message) != 3:
            raise Ended
        return message

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._read(self.read_from, min(length - len(data), 1 << 20))
            if not part:
                raise Ended
            data += part
        return bytes(data)

    def _encode(self, value: Any) -> list[Any]:
        return encode(value, self._export)

    def _export(self, value: Any) -> Parts:
        if isinstance(value, Remote):
            return "yours", value._number, []
        return self._handle(value)

    def _handle(self, value: Any) -> Parts:
        self.objects.append(value)
        return "mine", len(self.objects) - 1, []

    def _resolve(self, mark: str, content: Any) -> Any:
        if mark == "mine":
            return Remote(self, int(content))
        if mark == "yours" and int(content) >= 0:
            return self.objects[int(content)]
        if mark == "builtin":
            return getattr(builtins, content)
        raise ValueError(f"no {mark}")


def _handed_over(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments of a call (function, positional, by name), one after another."""
    if len(arguments) != 3 or not isinstance(arguments[1], tuple) or not isinstance(arguments[2], dict):
        return []
    return [*arguments[1], *arguments[2].values()]


def _update(old: Any, new: Any) -> Any:
    """Give a container what the program's copy of it holds now; containers inside stay the same objects."""
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [_update(old[i], item) if i < len(old) else item for i, item in enumerate(new)]
    elif isinstance(old, dict) and isinstance(new, dict):
        items = [(key, _update(old.get(key), item)) for key, item in new.items()]
        old.clear()
        old.update(items)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    else:
        return new
    return old


def _builtin_name(error: BaseException, operation: Any) -> str:
    """Of the nearest class of Python's own. A StopIteration out of a plain call would end a test's loop early."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return "RuntimeError" if name == "StopIteration" and operation != "next" else name


def _text(error: BaseException) -> str:
    try:
        return str(error)[:10_000]
    except BaseException:
        return ""


def _exception(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    is_one = isinstance(kind, type) and issubclass(kind, Exception)
    try:
        return kind(text) if is_one else RuntimeError(f"{name}: {text}")  # type: ignore[misc]
    except TypeError:  # UnicodeDecodeError takes five arguments
        return ValueError(text)


class Remote:
    """An object of the other process."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        if other is None or other is self:
            return other is self
        raise TypeError("an object of the program's is not compared; compare plain values")

    def __instancecheck__(self, value: Any) -> Any:
        return bool(self._peer.ask("isinstance", value, self))

    __hash__ = object.__hash__


def _forward(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._peer.ask(name, self, *arguments)


def _between_objects(name: str) -> Callable[..., Any]:
    """An operator is the program's only between two of its objects: a value of the tests' is not shown to it."""
    return lambda self, other: self._peer.ask(name, self, other) if isinstance(other, Remote) else NotImplemented


# What Python asks of an object, and what answers it in the program's process.
ASKED: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
}
for _name in ASKED:
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in (*OPERATORS, *ORDERINGS):
    setattr(Remote, f"__{_name.strip('_')}__", _between_objects(_name))


# ---- the program's side ----------------------------------------------------------------------------------------------


def _without_peer(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda peer, *arguments: function(*arguments)


def _call(peer: Peer, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return function(*arguments, **named)


def serve(program: str, read_from: int, write_to: int) -> None:
    """Run the program, then answer the tests until they end."""
    namespace: dict[str, Any] = {"__name__": "program"}

    def get(peer: Peer, names: list[str]) -> dict[str, Any]:
        return {name: namespace[name] for name in names if name in namespace}

    answers: dict[str, Callable[..., Any]] = {**ASKED, "getattr": getattr, "setattr": setattr, "isinstance": isinstance}
    answers |= {name: getattr(operator, name) for name in (*OPERATORS, *ORDERINGS)}
    operations: dict[str, Callable[..., Any]] = {name: _without_peer(f) for name, f in answers.items()}
    operations |= {"call": _call, "get": get}
    peer = Peer(read_from, write_to, operations)
    exec(compile(program, "program.py", "exec"), namespace)
    try:
        peer.answer_all()
    except Ended:
        return


# ---- the tests' side -------------------------------------------------------------------------------------------------


class Judge(Peer):
    """The tests' end: hands functions over to be called back, and no other objects."""

    def _handle(self, value: Any) -> Parts:
        name = getattr(value, "__name__", "")
        if getattr(builtins, str(name), None) is value:
            return "builtin", name, []
        if hasattr(value, "__next__"):
            items = list(itertools.islice(value, MAX_ITEMS + 1))
            if len(items) > MAX_ITEMS:  # no end of it: the program may be what it draws from, so it is wrong
                raise ValueError("too many items")
            return "iterator", len(items), items
        if callable(value):
            return super()._handle(value)
        raise NotForTheProgram(type(value).__name__)


def judge(requests: dict[str, Any], read_from: int, write_to: int, results: int) -> None:
    """Run the tests; for each that ends write a line of JSON: whether it held, null if no program can be graded by it.

    Args:
        requests: `tests`, statements; `names` that they take from the program; `library`, names that stand for a part of a
            library, such as {"np": "numpy"}.
        results: where to write to.
    """
    sys.setrecursionlimit(10_000)  # comparing deep lists
    peer = Judge(read_from, write_to, {"call": _call})
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        namespace |= {name: _part(path) for name, path in requests["library"].items()}
    except ImportError:
        os.write(results, b"null\n" * len(requests["tests"]))
        return
    given: dict[str, Any] = {}
    for text in requests["tests"]:
        try:
            fetched = peer.ask("get", requests["names"])
            namespace |= {n: v for n, v in fetched.items() if n not in namespace or namespace[n] is given.get(n)}
            given |= fetched
            exec(compile(text, "test", "exec"), namespace)
            peer.ask("get", [])  # a program that has ended passes no test
            held: bool | None = True
        except NotForTheProgram:
            held = None
        except BaseException:  # SystemExit too
            held = False
        os.write(results, f"{json.dumps(held)}\n".encode())


def _part(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name) if name else importlib.import_module(module)
