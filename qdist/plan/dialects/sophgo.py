"""Sophgo's per-layer fields in a prototxt, and the layers that its options leave in float.

Inside ``layer { ... }``: ``th_strategy`` (USE_DEFAULT, USE_KL or USE_MAX), ``th_scale``,
``threshold`` and ``forward_with_float``. The first three are about the threshold of the layer's
output. USE_KL is any KL-like method: one that the layers after it have stays, else it is ``kl``.
Layers without any of these fields are the network's description, and need not be in the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qdist.plan.dialects import prototext
from qdist.plan.dialects.prototext_edit import edited
from qdist.plan.dialects.reading import Before, FileRules, cannot_write, line_of, note_of, refuse
from qdist.plan.plan import QuantizationPlan
from qdist.plan.rules import Rule
from qdist.plan.selector import close

STRATEGIES: dict[str, str | None] = {"USE_DEFAULT": None, "USE_KL": "kl", "USE_MAX": "max"}
"""``th_strategy`` as a threshold method; None: what the layer has anyway."""
_FIELDS = ("th_strategy", "th_scale", "threshold", "forward_with_float")
_KL_LIKE = ("kl", "symkl", "jsd", "kl_v2")
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class SophgoLayer:
    """One layer; None for a field that it lacks. ``line`` counts from 1."""

    name: str
    type: str = ""
    th_strategy: str | None = None
    th_scale: float | None = None
    threshold: float | None = None
    forward_with_float: bool | None = None
    line: int = field(default=0, compare=False)

    @property
    def says_something(self) -> bool:
        """Whether it has one of the vendor's fields."""
        return any(getattr(self, name) is not None for name in _FIELDS)


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like a prototxt."""
    lines = (line.split("#")[0].strip().replace(" ", "") for line in text.splitlines())
    return any(line.startswith(("layer{", "layers{")) for line in lines)


def parse(text: str, file: str) -> tuple[SophgoLayer, ...]:
    """The layers of a prototxt. Raises QD508 with the line."""
    return tuple(
        _layer(message, file)
        for message in prototext.parse(text, file)
        if message.name in ("layer", "layers")
    )


def render(layers: Iterable[SophgoLayer]) -> str:
    """The layers with their names, types and the vendor's fields, as proto text."""
    lines = []
    for layer in layers:
        lines += ["layer {", f"  name: {prototext.quoted(layer.name)}"]
        if layer.type:
            lines.append(f"  type: {prototext.quoted(layer.type)}")
        if layer.th_strategy is not None:
            lines.append(f"  th_strategy: {layer.th_strategy}")
        for name in ("th_scale", "threshold"):
            value = getattr(layer, name)
            if value is not None:
                lines.append(f"  {name}: {value!r}")
        if layer.forward_with_float is not None:
            lines.append(f"  forward_with_float: {str(layer.forward_with_float).lower()}")
        lines.append("}")
    return "\n".join([*lines, ""])


def read(text: str, file: str, before: Before) -> FileRules:
    """The rules of a prototxt for a model. Raises QD508 for a layer that the model lacks."""
    index = before.index
    rules: list[Rule] = []
    idle: list[str] = []
    for layer in parse(text, file):
        if not layer.says_something:
            continue
        where = line_of(file, layer.line)
        if layer.name not in index.by_name:
            near = ", ".join(close(layer.name, list(index.by_name)))
            raise refuse(where, f"no layer {layer.name!r}", f"a layer such as {near}")
        if layer.forward_with_float:
            if index.is_choosable(index.by_name[layer.name]):
                rules += before.layer_rule(layer.name, {"precision": "float32"}, where)
            elif layer.name in index.fused:
                idle.append(layer.name)
        settings: dict[str, object] = {}
        method = STRATEGIES[layer.th_strategy or "USE_DEFAULT"]
        if method is not None:
            settings["saturation"] = method
        if layer.th_scale is not None and layer.th_scale != 1.0:
            settings["th_scale"] = layer.th_scale
        if layer.threshold is not None:
            settings["threshold"] = (layer.threshold,)
        found = before.output_rule(layer.name, settings, where, _KL_LIKE)
        if settings and not _is_read(layer.name, before):
            idle.append(layer.name)
        rules += found
    what = (
        f"{file}: fields of {len(idle)} layers mean nothing here, since they are computed with "
        "another or no quantized layer reads them:"
    )
    return FileRules(rules=tuple(rules), notes=note_of(what, tuple(dict.fromkeys(idle[:3]))))


def template(before: Before) -> str:
    """Every layer that can have a choice, with all of the vendor's fields but ``threshold``.

    Raises QD507 for a precision other than 8 bits and float.
    """
    return render(template_layers(before))


def into(
    text: str, file: str, before: Before, plan: QuantizationPlan | None
) -> tuple[str, tuple[str, ...]]:
    """A network's own prototxt with what `template` says of its layers, and notes.

    Only what means something else than the file does already is changed; ``th_scale``,
    ``threshold``, comments and order stay. Layers of one name (of two phases) change alike. Raises
    QD508 for a file without any layer of the model, QD507 as `template`.
    """
    rows = {layer.name: layer for layer in template_layers(before)}
    known = parse(text, file)
    changes: dict[str, dict[str, str]] = {}
    for layer in known:
        wanted = rows.get(layer.name)
        if wanted is None:
            continue
        fields = changes.setdefault(layer.name, {})
        if (layer.th_strategy or "USE_DEFAULT") != wanted.th_strategy:
            fields["th_strategy"] = wanted.th_strategy or "USE_DEFAULT"
        if bool(layer.forward_with_float) != bool(wanted.forward_with_float):
            fields["forward_with_float"] = str(bool(wanted.forward_with_float)).lower()
    if not changes:
        expected = f"a network with layers such as {', '.join(list(rows)[:3])}"
        raise refuse(file, f"none of the model's layers among {len(known)}", expected)
    missing = [name for name in rows if name not in changes]
    notes = note_of(f"{file}: {len(missing)} layers of the model are not in it:", missing)
    return edited(text, changes, file, ("layer", "layers")), notes


def template_layers(before: Before) -> list[SophgoLayer]:
    """What `template` writes. Raises QD507."""
    rows = []
    for layer in before.index.choosable:
        choice = before.choices[layer.name]
        if choice.precision not in ("int8", "float32"):
            got = f"precision {choice.precision}"
            raise cannot_write("Sophgo's prototxt", layer.name, got, "int8 or float32")
        method = before.method_after(before.index.adjacency.children[layer.name])
        strategy = next((s for s, known in STRATEGIES.items() if known == method), "USE_DEFAULT")
        if method in _KL_LIKE:
            strategy = "USE_KL"
        rows.append(
            SophgoLayer(
                name=layer.name,
                type=layer.op_type,
                th_strategy="USE_DEFAULT" if method is None else strategy,
                th_scale=1.0,
                forward_with_float=choice.bits.is_float,
            )
        )
    return rows


def float_rules(
    inputs: Sequence[str] = (), outputs: Sequence[str] = (), blocks: Sequence[str] = ()
) -> tuple[Rule, ...]:
    """``fpfwd_inputs`` (a layer and all before it), ``fpfwd_outputs`` (a layer and all after it)
    and ``fpfwd_blocks`` (a layer and those after it up to the next that computes) as rules."""
    return tuple(
        Rule(match=f"{word}:{name}", settings={"precision": "float32"}, origin=origin)
        for word, names, origin in (
            ("before", inputs, "fpfwd_inputs"),
            ("after", outputs, "fpfwd_outputs"),
            ("until_compute", blocks, "fpfwd_blocks"),
        )
        for name in names
    )


def _is_read(layer: str, before: Before) -> bool:
    adjacency = before.index.adjacency
    children = adjacency.children[adjacency.host(layer)]
    return any(name not in before.index.left_out for name in children)


def _layer(message: prototext.Field, file: str) -> SophgoLayer:
    where = line_of(file, message.line)
    found: dict[str, prototext.Field] = {}
    for entry in message.fields:
        if entry.name in ("name", "type", *_FIELDS):
            if entry.name in found:
                place = line_of(file, entry.line)
                raise refuse(place, f"{entry.name} twice in one layer", "it once")
            found[entry.name] = entry
    if "name" not in found:
        raise refuse(where, "a layer without a name", 'name: "LAYER"')
    strategy = found.get("th_strategy")
    if strategy is not None and strategy.scalar not in STRATEGIES:
        place = line_of(file, strategy.line)
        raise refuse(place, f"th_strategy {strategy.scalar!r}", f"one of {', '.join(STRATEGIES)}")
    return SophgoLayer(
        name=found["name"].scalar,
        type=found["type"].scalar if "type" in found else "",
        th_strategy=None if strategy is None else strategy.scalar,
        th_scale=_positive(found.get("th_scale"), file),
        threshold=_positive(found.get("threshold"), file),
        forward_with_float=_bool(found.get("forward_with_float"), file),
        line=message.line,
    )


def _positive(entry: prototext.Field | None, file: str) -> float | None:
    if entry is None:
        return None
    try:
        value = float(entry.scalar)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        place = line_of(file, entry.line)
        raise refuse(place, f"{entry.name} {entry.scalar!r}", "a positive number")
    return value


def _bool(entry: prototext.Field | None, file: str) -> bool | None:
    if entry is None:
        return None
    if entry.scalar.lower() not in _BOOLS:
        raise refuse(line_of(file, entry.line), f"{entry.name} {entry.scalar!r}", "true or false")
    return _BOOLS[entry.scalar.lower()]
