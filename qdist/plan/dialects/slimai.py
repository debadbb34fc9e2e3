"""SlimAI's ``nodename_datatypes`` and ``nodekind_datatypes`` YAML.

Our reading of the vendor's guide: a list of entries with ``nodes`` (names or kinds, ``*`` stands
for anything), ``intypes`` and ``outtypes`` (``s8`` or ``s16``). Of ``intypes`` the first is that of
the activations, the second that of the weights; a single one is both. ``outtypes`` s8 carries the
output in 8 bits, whatever a layer that reads it would take. Entries by name go before those by
kind. Keys may stand at the left margin, as the guide prints them, or below their entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.reading import (
    Before,
    FileRules,
    cannot_write,
    exactly,
    line_of,
    note_of,
    refuse,
)
from qdist.plan.layer_index import LayerIndex
from qdist.plan.precision import precision
from qdist.plan.rules import Rule, apply_rules
from qdist.plan.selector import close

TYPES = {"s8": 8, "s16": 16}
_PRECISIONS = {(8, 8): "int8", (16, 16): "int16", (16, 8): "w8a16"}
"""(activation bits, weight bits) -> precision."""
_KEYS = ("nodes", "intypes", "outtypes")
_KINDS = {
    "convolution": "Conv",
    "convtranspose": "ConvTranspose",
    "fullyconnected": "Gemm",
    "batchmatmul": "MatMul",
    "avgpool": "AveragePool",
    "relu": "Relu",
}
_ITEM = re.compile(r"""\s*(?:'((?:[^']|'')*)'|"((?:[^"\\]|\\.)*)"|([^,\[\]'"]+?))\s*(?:,|$)""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datatypes:
    """One entry. ``outtypes`` may be empty. ``line`` counts from 1."""

    nodes: tuple[str, ...]
    intypes: tuple[str, ...]
    outtypes: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like one of this form."""
    return re.search(r"^\s*(-\s*)?(intypes|outtypes)\s*:", text, re.M) is not None


def parse(text: str, file: str) -> tuple[Datatypes, ...]:
    """The entries of a file. Raises QD508 with the line."""
    entries: list[dict[str, tuple[str, ...]]] = []
    lines: list[int] = []
    for number, raw in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        line = _without_comment(raw)
        where = line_of(file, number)
        if line.strip() in ("", "---", "..."):
            continue
        found = re.fullmatch(r"\s*(-\s+)?(\w+)\s*:\s*\[(.*)\]\s*", line)
        if found is None or found[2] not in _KEYS:
            raise refuse(where, repr(raw.strip()), "nodes, intypes or outtypes: [VALUE, ...]")
        dash, key, inner = found[1], found[2], found[3]
        if dash is not None:
            entries.append({})
            lines.append(number)
        if not entries:
            raise refuse(where, f"{key} before any entry", "an entry, which begins with '- nodes:'")
        if key in entries[-1]:
            raise refuse(where, f"{key} twice in one entry", "it once, or a '-' before a new entry")
        entries[-1][key] = _items(inner, where)
    return tuple(
        _entry(entry, line, line_of(file, line)) for entry, line in zip(entries, lines, strict=True)
    )


def render(entries: Iterable[Datatypes]) -> str:
    """The text of a file."""
    lines = ["---"]
    for entry in entries:
        lines.append(f"- nodes: [{', '.join(map(_quoted, entry.nodes))}]")
        lines.append(f"  intypes: [{', '.join(entry.intypes)}]")
        if entry.outtypes:
            lines.append(f"  outtypes: [{', '.join(entry.outtypes)}]")
    return "\n".join([*lines, ""])


def read(text: str, file: str, before: Before) -> FileRules:
    """The rules of a file for a model: those by kind first, so that names go before them.

    Raises QD508 for a node that is neither a layer's name nor a kind of the model's.
    """
    by_kind: list[Rule] = []
    by_name: list[Rule] = []
    carried: dict[str, tuple[int, str]] = {}
    names = _names(before.index)
    for entry in parse(text, file):
        where = line_of(file, entry.line)
        for node in entry.nodes:
            layers = _named(node, names)
            if layers:
                by_name += [_rule(layer, entry, where) for layer in layers]
                carried |= _carried(layers, entry, where)
                continue
            layers = _of_kind(node, before)
            if not layers:
                choosable = [layer.name for layer in before.index.choosable]
                kinds = sorted({layer.op_type for layer in before.index.choosable})
                expected = f"a layer such as {', '.join(close(node, choosable))}, or a kind: "
                raise refuse(where, f"no node {node!r}", expected + ", ".join(kinds))
            by_kind += [_rule(layer, entry, where) for layer in layers]
            carried = {**_carried(layers, entry, where), **carried}
    return _effective([*by_kind, *by_name], carried, file, before)


def _rule(layer: str, entry: Datatypes, where: str) -> Rule:
    inputs = [TYPES[name] for name in entry.intypes]
    pair = (inputs[0], inputs[1] if len(inputs) > 1 else inputs[0])
    if pair not in _PRECISIONS:
        expected = "weights in no more bits than activations: [s8], [s16] or [s16, s8]"
        raise refuse(where, f"intypes {', '.join(entry.intypes)}", expected)
    return Rule(match=f"layer:{layer}", settings={"precision": _PRECISIONS[pair]}, origin=where)


def _carried(layers: Iterable[str], entry: Datatypes, where: str) -> dict[str, tuple[int, str]]:
    """The layers whose output an entry carries in some bits (where there is an ``outtypes``)."""
    if not entry.outtypes:
        return {}
    return dict.fromkeys(layers, (TYPES[entry.outtypes[0]], where))


def _effective(
    rules: list[Rule], carried: dict[str, tuple[int, str]], file: str, before: Before
) -> FileRules:
    """The rules that change something, and those that keep an output at the bits it is carried in
    though a layer reads more."""
    choices = apply_rules(before.index, before.choices, rules).choices
    last = {rule.match: rule for rule in rules}
    needed = [
        last[f"layer:{layer}"]
        for layer, choice in choices.items()
        if choice != before.choices[layer]
    ]
    narrowed = []
    for layer, (bits, where) in carried.items():
        if bits < _bits_after(layer, before.index, choices):
            narrowed.append(layer)
            settings = {"most_bits": bits}
            needed.append(Rule(match=f"output:layer:{layer}", settings=settings, origin=where))
    what = (
        f"{file}: {len(narrowed)} outputs are carried in 8 bits, though a layer after reads more:"
    )
    return FileRules(rules=tuple(needed), notes=note_of(what, narrowed))


def template(before: Before) -> str:
    """A ``nodename_datatypes`` file with every layer that can have a choice.

    Raises QD507 for a precision of other than 8- and 16-bit integers.
    """
    entries = []
    for layer in before.index.choosable:
        name = before.choices[layer.name].precision
        bits = next((pair for pair, known in _PRECISIONS.items() if known == name), None)
        if bits is None:
            expected = ", ".join(_PRECISIONS.values())
            raise cannot_write("SlimAI's YAML", layer.name, f"precision {name}", expected)
        intypes = (f"s{bits[0]}",) if bits[0] == bits[1] else (f"s{bits[0]}", f"s{bits[1]}")
        entries.append(
            Datatypes(
                nodes=(layer.name,),
                intypes=intypes,
                outtypes=(f"s{_bits_after(layer.name, before.index, before.choices)}",),
            )
        )
    return render(entries)


def plain_name(name: str) -> str:
    """A name as graph tools write it: what is no letter or digit becomes ``_``."""
    return re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_")


def _bits_after(layer: str, index: LayerIndex, choices: Mapping[str, LayerChoice]) -> int:
    """The most bits in which quantized layers read a layer's output; 8 where none does."""
    children = index.adjacency.children[index.adjacency.host(layer)]
    found = [
        precision(choices[name].precision).activation_bits
        for name in children
        if name not in index.left_out
    ]
    return max((max(bits, 8) for bits in found if bits is not None), default=8)


def _names(index: LayerIndex) -> dict[str, list[str]]:
    """What a node may be called -> the layers of that name, as it is or plain."""
    found: dict[str, list[str]] = {}
    for layer in index.choosable:
        for name in dict.fromkeys((layer.name, plain_name(layer.name))):
            found.setdefault(name, []).append(layer.name)
    return found


def _named(node: str, names: Mapping[str, list[str]]) -> list[str]:
    if "*" not in node:
        return names.get(node, [])
    pattern = exactly(node).replace("[*]", "*")
    hits = (layers for name, layers in names.items() if fnmatchcase(name, pattern))
    return list(dict.fromkeys(layer for layers in hits for layer in layers))


def _of_kind(node: str, before: Before) -> list[str]:
    short = re.sub(r"^XI", "", node)
    pattern = _KINDS.get(short.lower(), short).lower()
    return [
        layer.name
        for layer in before.index.choosable
        if fnmatchcase(layer.op_type.lower(), pattern)
    ]


def _entry(entry: dict[str, tuple[str, ...]], line: int, where: str) -> Datatypes:
    for key in ("nodes", "intypes"):
        if not entry.get(key):
            raise refuse(where, f"an entry without {key}", f"{key}: [VALUE, ...]")
    for key in ("intypes", "outtypes"):
        for value in entry.get(key, ()):
            if value not in TYPES:
                raise refuse(where, f"{key} {value!r}", f"one of {', '.join(TYPES)}")
    return Datatypes(
        nodes=entry["nodes"],
        intypes=entry["intypes"],
        outtypes=entry.get("outtypes", ()),
        line=line,
    )


def _without_comment(line: str) -> str:
    """The line without what follows a ``#`` outside of quotes."""
    quote = ""
    for i, c in enumerate(line):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def _items(text: str, where: str) -> tuple[str, ...]:
    found, at = [], 0
    while text[at:].strip():
        match = _ITEM.match(text, at)
        if match is None:
            raise refuse(where, f"[{text}]", "values separated by commas, quoted where needed")
        single, double, bare = match.groups()
        if single is not None:
            found.append(single.replace("''", "'"))
        elif double is not None:
            found.append(re.sub(r"\\(.)", r"\1", double))
        else:
            found.append(bare.strip())
        at = match.end()
    return tuple(found)


def _quoted(name: str) -> str:
    """A name that may stand bare, or in single quotes."""
    if re.fullmatch(r"[\w./*+\-]+", name):
        return name
    return "'" + name.replace("'", "''") + "'"
