"""The syntax of protobuf's text format: messages, fields, comments, with line numbers.

No schema: a field is a name with a scalar as it is written, or with a message. The vendor's own
fields are in no public schema, and files hold many that do not matter here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qdist.plan.dialects.reading import line_of, refuse

_TOKEN = re.compile(
    r"""(?P<space>[\s,;]+)|(?P<comment>\#[^\n]*)|(?P<brace>[{}<>\[\]:])"""
    r"""|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<word>[^\s,;\#{}<>\[\]:"']+)"""
)
_OPENING = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field. ``value``: a scalar as written, strings without quotes; or the fields of a
    message. ``line`` counts from 1."""

    name: str
    value: str | tuple[Field, ...]
    line: int = field(default=0, compare=False)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a message; none of a scalar."""
        return () if isinstance(self.value, str) else self.value

    @property
    def scalar(self) -> str:
        """The scalar; empty for a message."""
        return self.value if isinstance(self.value, str) else ""


def parse(text: str, file: str) -> tuple[Field, ...]:
    """The top-level fields. Raises QD508 with the line."""
    tokens = tokens_of(text, file)
    found, at = _fields(tokens, 0, "", file)
    if at < len(tokens):
        raise refuse(line_of(file, tokens[at].line), repr(tokens[at].text), "a field")
    return found


def quoted(text: str) -> str:
    """A string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class Token(NamedTuple):
    """A word, string or brace as written; its line from 1, and where in the text it starts."""

    kind: str
    text: str
    line: int
    start: int

    @property
    def value(self) -> str:
        """What it stands for: strings without quotes."""
        if self.kind != "string":
            return self.text
        return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], self.text[1:-1])


def tokens_of(text: str, file: str) -> list[Token]:
    """The tokens of a text, without space and comments. Raises QD508 with the line."""
    return list(_tokens(text, file))


def closing_of(tokens: list[Token], at: int) -> int:
    """The place of the brace that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(tokens)):
        if tokens[i].kind == "brace" and tokens[i].text in _OPENING:
            depth += 1
        elif tokens[i].kind == "brace" and tokens[i].text in _OPENING.values():
            depth -= 1
            if depth == 0:
                return i
    return len(tokens)


def _tokens(text: str, file: str) -> Iterator[Token]:
    at, line = int(text.startswith("\ufeff")), 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise refuse(line_of(file, line), repr(text[at : at + 10]), "text that ends its quotes")
        kind = found.lastgroup or ""
        if kind not in ("space", "comment"):
            yield Token(kind, found[0], line, at)
        line += found[0].count("\n")
        at = found.end()


def _fields(tokens: list[Token], at: int, closing: str, file: str) -> tuple[tuple[Field, ...], int]:
    """Fields up to the closing brace (or the end), and the place after it."""
    found: list[Field] = []
    while at < len(tokens):
        kind, text, line, _ = tokens[at]
        if text == closing and kind == "brace":
            return tuple(found), at + 1
        if kind != "word":
            raise refuse(line_of(file, line), repr(text), "the name of a field")
        value, at = _value(tokens, at + 1, line, text, file)
        found += [Field(name=text, value=each, line=line) for each in value]
    if closing:
        last = tokens[-1].line if tokens else 1
        raise refuse(line_of(file, last), "the end of the file", f"{closing!r}")
    return tuple(found), at


def _value(
    tokens: list[Token], at: int, line: int, name: str, file: str
) -> tuple[list[str | tuple[Field, ...]], int]:
    has_colon = at < len(tokens) and tokens[at][1] == ":"
    at += has_colon
    if at >= len(tokens):
        raise refuse(line_of(file, line), f"{name!r} at the end", "a value")
    kind, text, where, _ = tokens[at]
    if kind == "brace" and text in _OPENING:
        inner, at = _fields(tokens, at + 1, _OPENING[text], file)
        return [inner], at
    if has_colon and text == "[":
        values = []
        at += 1
        while at < len(tokens) and tokens[at][1] != "]":
            values.append(_scalar(tokens[at], file))
            at += 1
        return list(values), at + 1
    if not has_colon:
        raise refuse(line_of(file, where), f"{name} {text}", f"'{name}: VALUE' or '{name} {{'")
    parts = [_scalar(tokens[at], file)]
    at += 1
    while kind == "string" and at < len(tokens) and tokens[at][0] == "string":
        parts.append(_scalar(tokens[at], file))
        at += 1
    return ["".join(parts)], at


def _scalar(token: Token, file: str) -> str:
    if token.kind not in ("string", "word"):
        raise refuse(line_of(file, token.line), repr(token.text), "a value")
    return token.value
