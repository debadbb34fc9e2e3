"""A prototxt changed in place: comments, order and layout stay what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qdist.plan.dialects.prototext import Token, closing_of, parse, tokens_of

Changes = Mapping[str, Mapping[str, str]]
"""Name of a message -> its scalar fields that change, as they are to be written."""


@dataclass(slots=True)
class _Message:
    """Where a message and its scalar fields stand in the text. ``values``: begin and end."""

    body: int
    end: int
    name: str = ""
    values: dict[str, tuple[int, int]] = field(default_factory=dict)


def edited(text: str, changes: Changes, file: str, kinds: tuple[str, ...]) -> str:
    """The text with other scalars in the top-level messages of these ``kinds`` and names.

    A field that is there has its value replaced; a new one is put last, on a line of its own where
    the message has several. Raises QD508 for text that is no prototxt.
    """
    parse(text, file)  # So that what follows can trust the syntax.
    pieces: list[tuple[int, int, str]] = []
    for message in _messages(text, file, kinds):
        for name, value in changes.get(message.name, {}).items():
            if name in message.values:
                pieces.append((*message.values[name], value))
            else:
                pieces.append(_addition(text, message, f"{name}: {value}"))
    found, at = [], 0
    # New fields of one message stand at one place, in the order given.
    for start, stop, value in sorted(pieces, key=lambda piece: piece[:2]):
        found += [text[at:start], value]
        at = stop
    return "".join([*found, text[at:]])


def _messages(text: str, file: str, kinds: tuple[str, ...]) -> list[_Message]:
    tokens = tokens_of(text, file)
    found: list[_Message] = []
    at = 0
    while at < len(tokens):
        kind = tokens[at].text
        at += 1 + (at + 1 < len(tokens) and tokens[at + 1].text == ":")
        if at < len(tokens) and tokens[at].text in ("{", "<"):
            end = closing_of(tokens, at)
            if kind in kinds:
                found.append(_message(tokens, at, end))
            at = end
        at += 1
    return found


def _message(tokens: list[Token], at: int, end: int) -> _Message:
    """The message between two braces."""
    found = _Message(body=tokens[at].start + 1, end=tokens[end].start)
    at += 1
    while at < end:
        name = tokens[at].text
        at += 1 + (tokens[at + 1].text == ":")
        if tokens[at].text in ("{", "<"):
            at = closing_of(tokens, at) + 1
            continue
        if tokens[at].text == "[":
            while tokens[at].text != "]":
                at += 1
            at += 1
            continue
        first = at
        at += 1
        # Strings side by side are one.
        while tokens[first].kind == tokens[at].kind == "string":
            at += 1
        last = tokens[at - 1]
        if name == "name" and name not in found.values:
            found.name = "".join(token.value for token in tokens[first:at])
        found.values.setdefault(name, (tokens[first].start, last.start + len(last.text)))
    return found


def _addition(text: str, message: _Message, line: str) -> tuple[int, int, str]:
    """A new last field: on a line of its own, unless the closing brace shares one with a field."""
    start = text.rfind("\n", 0, message.end) + 1
    if start <= message.body or text[start : message.end].strip():
        gap = "" if text[message.end - 1].isspace() else " "
        return message.end, message.end, f"{gap}{line} "
    ending = "\r\n" if text[:start].endswith("\r\n") else "\n"
    indent = text[start : message.end] + "  "
    for known, _ in message.values.values():
        before = text[text.rfind("\n", 0, known) + 1 : known]
        if text.rfind("\n", 0, known) + 1 > message.body:
            indent = before[: len(before) - len(before.lstrip())]
            break
    return start, start, f"{indent}{line}{ending}"
