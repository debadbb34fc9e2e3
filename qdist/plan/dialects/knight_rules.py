"""Which layers of a Knight mix file must have equal bits.

From the vendor's guide to mixed quantization: recurrent layers and LayerNormalization have the bits
of the quantized layers before and after them; a layer of several inputs gets all of them in the
same bits; a Concat that reads from a recurrent layer or LayerNormalization has that layer at no
more bits than its other neighbours; Abs cannot be mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qdist.errors import PlanError
from qdist.plan.layer_index import LayerIndex

RECURRENT = frozenset({"RNN", "LSTM", "GRU", "SRU", "LSTMP"})
SAME_AS_NEIGHBOURS = RECURRENT | {"LayerNormalization"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """Two layers whose bits do not go together, and the rule that says so."""

    layer: str
    other: str
    rule: str


def check_neighbours(
    index: LayerIndex, bits: Mapping[str, int], file: str, places: Mapping[str, str]
) -> None:
    """Raise QD509 for the first violation, at the line of the layer that breaks the rule."""
    for found in violations(index, bits):
        where = places.get(found.layer, places.get(found.other, file))
        raise PlanError(
            "QD509",
            where=where,
            got=f"{bits[found.layer]} bits for {found.layer} and {bits[found.other]} for "
            f"{found.other}",
            expected=found.rule,
            mend="give both layers the same bitwidth",
        )


def closure(index: LayerIndex, raised: Iterable[str]) -> frozenset[str]:
    """``raised``, and as few more layers at 16 bits as it takes for no violation to be left."""
    wide = set(raised)
    while True:
        bits = {layer.name: 16 if layer.name in wide else 8 for layer in index.choosable}
        low = {
            found.layer if bits[found.layer] < bits[found.other] else found.other
            for found in violations(index, bits)
        }
        if not low:
            return frozenset(wide)
        wide |= low


def violations(index: LayerIndex, bits: Mapping[str, int]) -> Iterator[Violation]:
    """All violations, in the order of the graph. ``bits``: of every layer that has a choice;
    layers without one (float, moving data) are no neighbours of anybody."""
    adjacency = index.adjacency
    for layer in index.choosable:
        name = layer.name
        parents = [n for n in adjacency.parents[name] if n in bits]
        children = [n for n in adjacency.children[name] if n in bits]
        if layer.op_type in SAME_AS_NEIGHBOURS:
            rule = f"the same bits around {layer.op_type}"
            for other in (*parents, *children):
                if bits[other] != bits[name]:
                    yield Violation(layer=name, other=other, rule=rule)
        if layer.op_type == "Concat":
            yield from _concat(index, name, parents, children, bits)
        for other in parents[1:]:
            if bits[other] != bits[parents[0]]:
                rule = f"the same bits for all inputs of {name}"
                yield Violation(layer=other, other=parents[0], rule=rule)
        if layer.op_type == "Abs":
            common = _common(bits)
            for other in (*parents, *children):
                if bits[name] != common and bits[other] == common:
                    rule = "no mixing for Abs: the bits that most layers have"
                    yield Violation(layer=name, other=other, rule=rule)


def _concat(
    index: LayerIndex,
    name: str,
    parents: list[str],
    children: list[str],
    bits: Mapping[str, int],
) -> Iterator[Violation]:
    for parent in parents:
        if index.by_name[parent].op_type not in SAME_AS_NEIGHBOURS:
            continue
        for other in (*parents, *children):
            if bits[parent] > bits[other]:
                rule = f"{parent} before Concat {name} at no more bits than the Concat's neighbours"
                yield Violation(layer=parent, other=other, rule=rule)


def _common(bits: Mapping[str, int]) -> int:
    values = list(bits.values())
    return max(sorted(set(values)), key=values.count)
