"""SlimAI's quantization profile (public Glow's), read as fixed ranges and edited in place.

Three YAML documents: version, hash of the graph, and a list of ``NodeOutputName``, ``Min`` and
``Max`` (perhaps ``Histogram``). The hash is the tool's own and cannot be computed elsewhere, so a
profile for it is never written from nothing: `edited` changes Min and Max of a dumped one and
leaves every other byte alone. `template` writes one that only qdist reads, by tensors.

``NodeOutputName`` is ``TYPE_NAME__SUFFIX:RESULT``. It is found in the model by its tensor, or by
the layer that makes it, with and without type and suffix, and with other characters than letters
and digits taken as ``_``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qdist.plan.dialects.reading import Before, FileRules, exactly, line_of, note_of, refuse
from qdist.plan.dialects.slimai import plain_name
from qdist.plan.layer_index import LayerIndex
from qdist.plan.plan import QuantizationPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.rules import Rule
from qdist.plan.selector import close

_NAME = re.compile(r"^(\s*(?:-\s+)?NodeOutputName\s*:\s*)(.+?)\s*$")
_NUMBER = re.compile(r"^(\s*(?:-\s+)?(Min|Max)\s*:\s*)(\S+)(.*)$")
_HASH = re.compile(r"^\s*GraphPreLowerHash\s*:\s*(\S+)", re.M)
_HEADING = (
    "# Ranges of a qdist plan. The vendor's tool refuses this file, for want of the hash",
    "# of its graph: for that tool, write ranges into a profile that it has dumped.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """The range of one tensor. ``line`` counts from 1."""

    name: str
    low: float
    high: float
    line: int = field(default=0, compare=False)


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like one of this form."""
    return "NodeOutputName" in text


def parse(text: str, file: str) -> tuple[ProfileEntry, ...]:
    """The entries of a profile. Raises QD508 with the line."""
    found: list[ProfileEntry] = []
    seen: dict[str, int] = {}
    for name, line, numbers in _entries(text, file):
        where = line_of(file, line)
        if name in seen:
            raise refuse(where, f"{name!r} again", f"it once (line {seen[name]})")
        seen[name] = line
        for key in ("Min", "Max"):
            if key not in numbers:
                raise refuse(where, f"{name!r} without {key}", "Min and Max")
        low, high = numbers["Min"], numbers["Max"]
        if low > high:
            raise refuse(where, f"Min {low:g} above Max {high:g} of {name!r}", "Min <= Max")
        found.append(ProfileEntry(name=name, low=low, high=high, line=line))
    return tuple(found)


def edited(text: str, ranges: Mapping[str, tuple[float, float]], file: str = "profile") -> str:
    """The profile with other Min and Max for the nodes in ``ranges``, all else as it was.

    Raises QD508 for a node that the profile lacks, or a range that is none.
    """
    known = {entry.name for entry in parse(text, file)}
    for name, (low, high) in ranges.items():
        if name not in known:
            near = ", ".join(close(name, sorted(known)))
            raise refuse(file, f"no node {name!r}", f"a node such as {near}")
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise refuse(file, f"{low}..{high} for {name!r}", "finite numbers, Min <= Max")
    lines, current = [], ""
    for line in text.splitlines(keepends=True):
        named = _NAME.match(line.rstrip("\r\n"))
        number = _NUMBER.match(line.rstrip("\r\n"))
        if named is not None:
            current = _unquoted(named[2])
        elif number is not None and current in ranges:
            value = ranges[current][0 if number[2] == "Min" else 1]
            ending = line[len(line.rstrip("\r\n")) :]
            # A number that says the same is left as the tool wrote it.
            if float(number[3]) != value:
                line = f"{number[1]}{_decimal(value)}{number[4]}{ending}"
        lines.append(line)
    return "".join(lines)


def into(
    text: str, file: str, before: Before, plan: QuantizationPlan | None
) -> tuple[str, tuple[str, ...]]:
    """A profile that the vendor's tool has dumped, with the ranges of a plan, and notes: hash,
    histograms and all else stay.

    Nodes whose tensor the plan does not quantize keep their range. Raises QD508 for a file of which
    no node is in the model, `ValueError` without a plan.
    """
    if plan is None:
        raise ValueError("ranges come from a plan")
    ranges = widest(plan, lambda found: found.bounds)
    for layer in plan.layers:
        for entry in layer.outputs:
            ranges.setdefault(entry.tensor, entry.quantizer.bounds)
    names = _known_names(before.index)
    entries = parse(text, file)
    tensors = {entry.name: _tensor(entry.name, names) for entry in entries}
    strange = [name for name, tensor in tensors.items() if tensor is None]
    if len(strange) == len(entries):
        near = ", ".join(close(strange[0], list(names)))
        raise refuse(file, f"no node of the model, such as {strange[0]!r}", f"nodes such as {near}")
    found = {name: ranges[t] for name, t in tensors.items() if t is not None and t in ranges}
    still = [name for name, t in tensors.items() if t is not None and t not in ranges]
    notes = (
        *note_of(f"{file}: {len(strange)} nodes are not in the model, and stay:", strange),
        *note_of(f"{file}: {len(still)} nodes have no range in the plan, and stay:", still),
    )
    return edited(text, found, file), notes


def template(plan: QuantizationPlan) -> str:
    """A profile with the range of every activation that a plan quantizes, to be edited and read.

    Read back as it is, it fixes every range at what it was found to be, so that the numbers of the
    plan stay. Where layers read a tensor with different ranges it has the widest, and the numbers
    of the others change.
    """
    lines = profile_lines(_HEADING, widest(plan, lambda found: found.bounds), _decimal)
    return "\n".join([*lines, "...", ""])


def widest(
    plan: QuantizationPlan, bounds: Callable[[Quantizer], tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Activation -> the range that holds the ``bounds`` of all quantizers that a plan has for
    it."""
    ranges: dict[str, tuple[float, float]] = {}
    for layer in plan.layers:
        for entry in layer.activations:
            low, high = bounds(entry.quantizer)
            known = ranges.get(entry.tensor, (low, high))
            ranges[entry.tensor] = min(low, known[0]), max(high, known[1])
    return ranges


def profile_lines(
    heading: Sequence[str],
    ranges: Mapping[str, tuple[float, float]],
    number: Callable[[float], str],
) -> list[str]:
    """A profile without a hash, up to the end of its list. ``number``: how Min and Max are
    written."""
    lines = [*heading, "---", "GlowToolsVersion: ''", "..."]
    lines += ["---", "GraphPreLowerHash: 0x0", "...", "---"]
    for name, (low, high) in ranges.items():
        quoted = name.replace("'", "''")
        lines.append(f"- NodeOutputName:  '{quoted}'")
        lines.append(f"  Min:             {number(low)}")
        lines.append(f"  Max:             {number(high)}")
    return lines


def graph_hash(text: str) -> str | None:
    """The profile's ``GraphPreLowerHash``, as written."""
    found = _HASH.search(text)
    return None if found is None else found[1]


def read(text: str, file: str, before: Before) -> FileRules:
    """A fixed range for every tensor of the profile that a quantized layer reads.

    Zero is taken into a range that lacks it, as Glow does. Raises QD508 for a file of which no node
    is in the model.
    """
    names = _known_names(before.index)
    rules: list[Rule] = []
    strange: list[str] = []
    entries = parse(text, file)
    for entry in entries:
        tensor = _tensor(entry.name, names)
        if tensor is None:
            strange.append(entry.name)
            continue
        if not _is_read(tensor, before):
            continue
        bounds = (min(entry.low, 0.0), max(entry.high, 0.0))
        rules.append(
            Rule(
                match=f"tensor:{exactly(tensor)}",
                settings={"bounds": bounds},
                origin=line_of(file, entry.line),
            )
        )
    if strange and len(strange) == len(entries):
        near = ", ".join(close(strange[0], list(names)))
        raise refuse(file, f"no node of the model, such as {strange[0]!r}", f"nodes such as {near}")
    what = (
        f"{file}: {len(strange)} of {len(entries)} nodes are not in the model, and give no range:"
    )
    return FileRules(rules=tuple(rules), notes=note_of(what, strange))


def _entries(text: str, file: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    name, at, numbers = "", 0, dict[str, float]()
    for number, line in enumerate(text.splitlines(), 1):
        found = _NAME.match(line)
        value = _NUMBER.match(line)
        if found is not None:
            if name:
                yield name, at, numbers
            name, at, numbers = _unquoted(found[2]), number, {}
        elif value is not None and name:
            where = line_of(file, number)
            try:
                numbers[value[2]] = float(value[3])
            except ValueError as error:
                raise refuse(where, f"{value[2]} {value[3]!r}", "a number") from error
            if not math.isfinite(numbers[value[2]]):
                raise refuse(where, f"{value[2]} {value[3]}", "a finite number")
    if name:
        yield name, at, numbers
    else:
        raise refuse(file, "no NodeOutputName", "a profile that SlimAI has dumped")


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    return text


def _decimal(value: float) -> str:
    """A number as YAML and C++ read it: always with a point or an exponent."""
    return repr(float(value))


def _known_names(index: LayerIndex) -> dict[str, str]:
    """What a node may be called -> the tensor. Tensors go before layers, exact before plain."""
    found: dict[str, str] = {}
    layers = {layer.name: layer.outputs[0] for layer in index.layers if layer.outputs}
    tensors = {name: name for name in index.tensors}
    for names in (tensors, layers):
        for name, tensor in names.items():
            found.setdefault(name, tensor)
    for names in (tensors, layers):
        for name, tensor in names.items():
            found.setdefault(plain_name(name), tensor)
    return found


def _tensor(name: str, known: Mapping[str, str]) -> str | None:
    result = re.sub(r":\d+$", "", name)
    bare = re.sub(r"__\d+$", "", result)
    for text in (name, result, bare, *_without_type(bare)):
        for form in (text, plain_name(text)):
            if form in known:
                return known[form]
    return None


def _without_type(name: str) -> tuple[str, ...]:
    _, found, rest = name.partition("_")
    return (rest,) if found and rest else ()


def _is_read(tensor: str, before: Before) -> bool:
    """Whether a layer that can be quantized reads the tensor, under this name or behind a view."""
    if before.readers(tensor):
        return True
    adjacency = before.index.adjacency
    return any(
        child not in before.index.left_out
        for maker in adjacency.makers(tensor)
        if tensor in adjacency.outputs(maker)
        for child in adjacency.children[maker]
    )
