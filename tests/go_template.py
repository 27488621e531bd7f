"""As much of Go's template language as Ollama's templates need: text, fields, variables, `if`, `else if`, `range`, functions."""

from __future__ import annotations

import re
from typing import Any

FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "not": lambda value: not value,
    "ne": lambda a, b: a != b,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "len": len,
    "slice": lambda values, start: values[start:],
}


def render(template: str, root: dict[str, Any]) -> str:
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    actions = [("text" if i % 2 == 0 else "action", part) for i, part in enumerate(parts)]
    text, end = _block(actions, 0, root, {"$": root}, live=True)
    assert end == len(actions), "an end too many"
    return text


def _block(
    actions: list[tuple[str, str]], at: int, dot: Any, variables: dict[str, Any], *, live: bool
) -> tuple[str, int]:
    """Up to an `else` or `end` that belongs to what began before."""
    out = ""
    while at < len(actions):
        kind, body = actions[at]
        if kind == "text":
            out += body if live else ""
            at += 1
        elif body == "end" or body.startswith("else"):
            break
        elif body.startswith("if "):
            text, at = _if(actions, at, dot, variables, live=live)
            out += text
        elif body.startswith("range "):
            index, values = re.fullmatch(r"range (\$\w+), \$_ := (.+)", body).groups()
            start, rows = at + 1, _value(values, dot, variables) if live else []
            for number, row in enumerate(rows):
                out += _block(actions, start, row, {**variables, index: number}, live=True)[0]
            at = _block(actions, start, dot, variables, live=False)[1]
            assert actions[at][1] == "end"
            at += 1
        elif ":=" in body:
            name, value = body.split(" := ")
            if live:
                variables[name] = _value(value, dot, variables)
            at += 1
        else:
            out += str(_value(body, dot, variables)) if live else ""
            at += 1
    return out, at


def _if(actions: list[tuple[str, str]], at: int, dot: Any, variables: dict[str, Any], *, live: bool) -> tuple[str, int]:
    out, done = "", not live
    while True:
        condition = actions[at][1].removeprefix("else ").removeprefix("if ")
        taken = not done and (condition == "else" or bool(_value(condition, dot, variables)))
        text, at = _block(actions, at + 1, dot, dict(variables), live=taken)
        out, done = out + text, done or taken
        if actions[at][1] == "end":
            return out, at + 1


def _value(text: str, dot: Any, variables: dict[str, Any]) -> Any:
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+', text)
    value, rest = _call(tokens, dot, variables)
    assert not rest, text
    return value


def _call(tokens: list[str], dot: Any, variables: dict[str, Any]) -> tuple[Any, list[str]]:
    values = []
    while tokens and tokens[0] != ")":
        if tokens[0] == "(":
            value, tokens = _call(tokens[1:], dot, variables)
            tokens = tokens[1:]
        else:
            value, tokens = _atom(tokens[0], dot, variables), tokens[1:]
        values.append(value)
    return (values[0](*values[1:]) if callable(values[0]) else values[0]), tokens


def _atom(token: str, dot: Any, variables: dict[str, Any]) -> Any:
    if token in FUNCTIONS:
        return FUNCTIONS[token]
    if token.startswith('"'):
        return token[1:-1].replace('\\"', '"')
    if token.isdigit():
        return int(token)
    if token.startswith("$."):
        return variables["$"][token[2:]]
    return dot.get(token[1:], "") if token.startswith(".") else variables[token]
