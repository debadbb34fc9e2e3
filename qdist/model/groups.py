"""Layers that must agree, found from the graph alone.

| kind | members |
| --- | --- |
| ``concat`` | a Concat and the layers whose outputs it joins, where their scales are unified |
| ``residual`` | the layers whose outputs are summed along one residual stream, and the sums |
| ``attention`` | matmuls with weights that read one tensor, such as those of Q, K and V |
| ``neighbours`` | a layer of a type that a target ties to what comes before and after it |

Members of a group take one choice. ``tensors`` are those that hold the values which have to lie on
one scale: what a Concat joins and gives, what a stream carries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qdist.model.adjacency import Adjacency
from qdist.model.blocks import adds_back, is_sum
from qdist.model.layers import Layer

KINDS = ("concat", "residual", "attention", "neighbours")
_MATRICES = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """``layers`` (at least two hosts, in the order of the graph) that take one choice, and
    ``tensors`` that share a range where the target unifies them."""

    kind: str
    layers: tuple[str, ...]
    tensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.layers) < 2 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"a group of {self.layers}")


def find_groups(
    layers: Sequence[Layer],
    adjacency: Adjacency,
    *,
    kinds: Collection[str] = ("concat", "residual", "attention"),
    tied: Collection[str] = (),
    among: Collection[str] | None = None,
) -> tuple[LayerGroup, ...]:
    """The groups of a model, in the order of their first layers.

    ``tied``: operator types of the kind ``neighbours``. ``among``: the layers that can have a
    choice; None: all hosts. A group of which fewer than two are among them is none.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"no kind of group: {', '.join(sorted(unknown))}")
    order = {layer.name: i for i, layer in enumerate(layers)}
    wanted = set(order if among is None else among)
    found: list[tuple[str, set[str], list[str]]] = []
    if "concat" in kinds:
        found += _concats(layers, adjacency)
    if "residual" in kinds:
        found += _streams(layers, adjacency)
    if "attention" in kinds:
        found += _same_source(layers, adjacency)
    if "neighbours" in kinds:
        found += _neighbours(layers, adjacency, tied)
    groups = []
    for kind, members, tensors in found:
        names = sorted(members & wanted, key=order.__getitem__)
        if len(names) > 1:
            groups.append(
                LayerGroup(kind=kind, layers=tuple(names), tensors=tuple(dict.fromkeys(tensors)))
            )
    return tuple(sorted(groups, key=lambda group: order[group.layers[0]]))


def merged(groups: Iterable[LayerGroup], layers: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """A partition of ``layers``: those of groups that overlap together, every other one alone, in
    the order given."""
    names = tuple(layers)
    root = {name: name for name in names}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for group in groups:
        held = [name for name in group.layers if name in root]
        for name in held[1:]:
            root[find(name)] = find(held[0])
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(find(name), []).append(name)
    return tuple(tuple(part) for part in parts.values())


def raised_together(
    raised: Collection[str], groups: Iterable[LayerGroup], layers: Iterable[str]
) -> frozenset[str]:
    """``raised``, and every layer that shares a group with one of them, directly or not."""
    wanted = set(raised)
    parts = merged(groups, layers)
    return frozenset(name for part in parts if wanted.intersection(part) for name in part)


def disagreements(
    groups: Iterable[LayerGroup], choice: Mapping[str, object]
) -> Iterator[tuple[LayerGroup, str, str]]:
    """The groups with two members whose values in ``choice`` differ, and the first two such."""
    for group in groups:
        held = [name for name in group.layers if name in choice]
        for name in held[1:]:
            if choice[name] != choice[held[0]]:
                yield group, held[0], name
                break


def _concats(
    layers: Sequence[Layer], adjacency: Adjacency
) -> Iterator[tuple[str, set[str], list[str]]]:
    for layer in layers:
        if layer.op_type == "Concat":
            tensors = [entry.tensor for entry in layer.activations] + list(layer.outputs)
            yield "concat", {layer.name, *adjacency.parents[adjacency.host(layer.name)]}, tensors


def _streams(
    layers: Sequence[Layer], adjacency: Adjacency
) -> Iterator[tuple[str, set[str], list[str]]]:
    """Sums that feed one another, directly or through what only moves data, are one stream."""
    streams: list[tuple[set[str], set[str], list[str]]] = []
    for layer in layers:
        host = adjacency.host(layer.name)
        if not is_sum(layer) or host != layer.name:
            continue
        made_by = [adjacency.makers(entry.tensor) for entry in layer.activations]
        if not all(made_by) and not adds_back(layer, adjacency):
            # One of the two comes from an input of the model: a mask, or positions.
            continue
        parents = {name for names in made_by for name in names}
        members = {host, *parents}
        sums = {host}
        tensors = [entry.tensor for entry in layer.activations] + list(layer.outputs)
        joined = [stream for stream in streams if stream[1] & parents]
        for stream in joined:
            members |= stream[0]
            sums |= stream[1]
            tensors = stream[2] + tensors
            streams.remove(stream)
        streams.append((members, sums, tensors))
    for members, _, tensors in streams:
        yield "residual", members, tensors


def _same_source(
    layers: Sequence[Layer], adjacency: Adjacency
) -> Iterator[tuple[str, set[str], list[str]]]:
    readers: dict[str, set[str]] = {}
    for layer in layers:
        if layer.op_type in _MATRICES and layer.weights and len(layer.activations) == 1:
            source = layer.activations[0].tensor
            readers.setdefault(source, set()).add(adjacency.host(layer.name))
    for source, members in readers.items():
        yield "attention", members, [source]


def _neighbours(
    layers: Sequence[Layer], adjacency: Adjacency, tied: Collection[str]
) -> Iterator[tuple[str, set[str], list[str]]]:
    for layer in layers:
        if layer.op_type in tied:
            host = adjacency.host(layer.name)
            yield (
                "neighbours",
                {host, *adjacency.parents[host], *adjacency.children[host]},
                [],
            )
