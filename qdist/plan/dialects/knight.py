"""Knight's mix-quantization JSON (``-mc``, and ``-gt`` for a template).

Our reading of the vendor's guide, which prints no file: an object of layer names, each with
``bitwidth`` (8 or 16) and ``mode`` (``min_max``, ``kl``, ``kl_v2``, ``percentile``, ``mse``), both
required. Its rules for neighbours are in `knight_rules`. ``auto-mix-ratio`` is taken as the share
of *low* bits, as the guide of version 1 has it; a newer page says high.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qdist.plan.dialects.knight_rules import check_neighbours
from qdist.plan.dialects.reading import Before, FileRules, cannot_write, line_of, note_of, refuse
from qdist.plan.rules import Rule
from qdist.plan.selector import close

MODES = {
    "min_max": "max",
    "kl": "kl",
    "kl_v2": "kl_v2",
    "percentile": "percentile",
    "mse": "mse",
}
"""Knight's modes in our words."""
_KNIGHT_MODES = {ours: theirs for theirs, ours in MODES.items()}
DEFAULT_MODES = {8: "kl", 16: "min_max"}
"""What ``-qm`` is unless given, by bits."""
PRECISIONS = {8: "int8", 16: "int16"}
"""Knight's bits as precisions: weights have those of the activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnightLayer:
    """One layer: its bits (8 or 16) and mode. ``line`` counts from 1."""

    name: str
    bitwidth: int
    mode: str
    line: int = field(default=0, compare=False)


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like one of this form."""
    return text.lstrip("\ufeff \t\r\n").startswith("{") and '"bitwidth"' in text


def parse(text: str, file: str) -> tuple[KnightLayer, ...]:
    """The layers of a file. Raises QD508 with the line."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice.extend(key for key, n in counts.items() if n > 1)
        return dict(pairs)

    try:
        document = json.loads(text.lstrip("\ufeff"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise refuse(line_of(file, error.lineno), error.msg, "JSON") from error
    if not isinstance(document, dict):
        raise refuse(file, type(document).__name__, '{"LAYER": {"bitwidth": 8, "mode": "kl"}, ...}')
    if twice:
        raise refuse(line_of(file, _line(text, twice[0])), f"{twice[0]!r} twice", "it once")
    return tuple(_layer(name, value, text, file) for name, value in document.items())


def render(layers: tuple[KnightLayer, ...]) -> str:
    """The text of a file."""
    document = {x.name: {"bitwidth": x.bitwidth, "mode": x.mode} for x in layers}
    return json.dumps(document, indent=4, ensure_ascii=False) + "\n"


def read(text: str, file: str, before: Before) -> FileRules:
    """The rules of a file for a model.

    Raises QD508 for a layer that the model lacks or that has no choice of its own, QD509 where
    neighbours that must have equal bits do not.
    """
    index = before.index
    rules: list[Rule] = []
    bits: dict[str, int] = {
        x.name: _bits(before.choices[x.name].precision) for x in index.choosable
    }
    places: dict[str, str] = {}
    for layer in parse(text, file):
        where = line_of(file, layer.line)
        _check_name(layer, before, where)
        places[layer.name] = where
        bits[layer.name] = layer.bitwidth
        settings = {"precision": PRECISIONS[layer.bitwidth], "saturation": MODES[layer.mode]}
        rules += before.layer_rule(layer.name, settings, where)
    check_neighbours(index, bits, file, places)
    missing = [x.name for x in index.choosable if x.name not in places]
    notes = note_of(f"{file}: {len(missing)} layers are not in it:", missing)
    return FileRules(rules=tuple(rules), notes=notes)


def template(before: Before) -> str:
    """A file with every layer that can have a choice. Raises QD507 for other than 8 and 16 bits."""
    rows = []
    for layer in before.index.choosable:
        choice = before.choices[layer.name]
        widths = [bits for bits, name in PRECISIONS.items() if name == choice.precision]
        if not widths:
            expected = " or ".join(PRECISIONS.values())
            got = f"precision {choice.precision}"
            raise cannot_write("Knight's JSON", layer.name, got, expected)
        if choice.saturation not in _KNIGHT_MODES:
            got = f"threshold method {choice.saturation}"
            raise cannot_write("Knight's JSON", layer.name, got, ", ".join(_KNIGHT_MODES))
        mode = _KNIGHT_MODES[choice.saturation]
        rows.append(KnightLayer(name=layer.name, bitwidth=widths[0], mode=mode))
    return render(tuple(rows))


def layer_threshold_rules(value: float) -> tuple[Rule, ...]:
    """Knight's ``-lt``: the range of what LayerNormalizations read and give is ``-value .. value``.

    Meant for models whose score falls off at these layers; the vendor says not to use it elsewhere.
    """
    match = "op:LayerNormalization"
    return (
        Rule(match=match, settings={"threshold": value}, origin="layer_threshold"),
        Rule(match=f"output:{match}", settings={"threshold": (value,)}, origin="layer_threshold"),
    )


def _layer(name: str, value: Any, text: str, file: str) -> KnightLayer:
    line = _line(text, name)
    where = line_of(file, line)
    if not isinstance(value, dict) or set(value) != {"bitwidth", "mode"}:
        got = f"{name!r} with {', '.join(value) or 'nothing'}" if isinstance(value, dict) else value
        raise refuse(where, str(got), '"bitwidth" and "mode", both and no more')
    bitwidth, mode = value["bitwidth"], value["mode"]
    if bitwidth not in PRECISIONS or isinstance(bitwidth, bool):
        raise refuse(where, f"bitwidth {bitwidth!r} of {name!r}", "8 or 16")
    if mode not in MODES:
        raise refuse(where, f"mode {mode!r} of {name!r}", f"one of {', '.join(MODES)}")
    return KnightLayer(name=name, bitwidth=bitwidth, mode=mode, line=line)


def _line(text: str, name: str) -> int:
    """The line where a key stands for the last time; 1 if it is written in another way."""
    found = list(re.finditer(re.escape(json.dumps(name, ensure_ascii=False)) + r"\s*:", text))
    return text.count("\n", 0, found[-1].start()) + 1 if found else 1


def _bits(precision: str) -> int:
    """Bits as Knight counts them; other precisions count as 8."""
    return next((bits for bits, name in PRECISIONS.items() if name == precision), 8)


def _check_name(layer: KnightLayer, before: Before, where: str) -> None:
    index = before.index
    if layer.name not in index.by_name:
        near = ", ".join(close(layer.name, list(index.by_name)))
        raise refuse(where, f"no layer {layer.name!r}", f"a layer such as {near}")
    reason = index.left_out.get(layer.name)
    if layer.name in index.fused:
        reason = f"computed with {index.fused[layer.name]}"
    if reason is not None:
        raise refuse(
            where,
            f"{layer.name!r}, which has no choice of its own ({reason})",
            "layers that are quantized, as a template lists them",
            "remove it; qdist quantize --template knight writes what can be chosen",
        )
