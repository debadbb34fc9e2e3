"""Tensors that have their numbers from others, on targets that pass ratios on.

Icraft (section "operators") gives what MaxPool, Pad, Split and Concat make the ratio of what they
read, since nothing is computed there: a Concat's inputs keep theirs, side by side; constants that
are concatenated or padded with take the tensor's. Views and slices only move values. Nothing of
this holds on other targets, where every tensor has the range that was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qdist.model.graph import Graph, attribute
from qdist.model.views import is_view
from qdist.plan.quantizer import Quantizer

_WHOLE = ("MaxPool", "Pad", "Slice", "Split")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """``tensor`` has the numbers of ``sources``. ``axis``: along which several are joined, or one
    is split, counted from 0; ``sizes``: how long every source is there. ``start`` and ``length``:
    what part of its one source the tensor is. ``keeps_axes``: whether channels lie where the
    source has them."""

    tensor: str
    sources: tuple[str, ...]
    axis: int | None = None
    sizes: tuple[int, ...] = ()
    start: int | None = None
    length: int = 0
    keeps_axes: bool = True

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Passing:
        """From `to_json`."""
        lists = {"sources": tuple(value["sources"]), "sizes": tuple(value["sizes"])}
        return cls(**{**value, **lists})

    def passed(self, sources: list[Quantizer]) -> Quantizer | None:
        """The quantizer of the tensor from those of its sources; None where axes are lost."""
        first = sources[0]
        if all(q.key == first.key and q.axis is None for q in sources):
            return first
        if len(sources) == 1:
            return self._part(first) if self.keeps_axes else None
        if self.axis is None or len(self.sizes) != len(sources):
            return None
        if any(q.axis not in (None, self.axis) for q in sources):
            return None
        scales: list[float] = []
        zeros: list[int] = []
        for quantizer, size in zip(sources, self.sizes, strict=True):
            n = size if quantizer.axis is None else 1
            scales += quantizer.scales * n
            zeros += quantizer.zero_points * n
        lows, highs = zip(*(q.bounds for q in sources), strict=True)
        return replace(
            first,
            scales=tuple(scales),
            zero_points=tuple(zeros),
            axis=self.axis,
            bounds=(min(lows), max(highs)),
            clipped_share=None,
            expected_mse=None,
        )

    def _part(self, source: Quantizer) -> Quantizer:
        if source.axis is None or self.start is None or source.axis != self.axis:
            return source
        part = slice(self.start, self.start + self.length)
        return replace(source, scales=source.scales[part], zero_points=source.zero_points[part])


def find_passing(graph: Graph) -> tuple[Passing, ...]:
    """What passes numbers on in a model, in graph order."""
    found: list[Passing] = []
    for node in graph.proto.graph.node:
        if node.domain not in ("", "ai.onnx") or not node.input:
            continue
        source = node.input[0]
        outputs = [name for name in node.output if name and graph.is_float(name)]
        if node.op_type == "Concat":
            found += _concat(graph, node, outputs)
        elif not outputs or not graph.is_activation(source):
            continue
        elif is_view(graph, node, outputs[0]):
            found.append(Passing(tensor=outputs[0], sources=(source,), keeps_axes=False))
        elif node.op_type == "Split":
            found += _split(graph, node, outputs)
        elif node.op_type in _WHOLE:
            # A slice or a pad along the channels themselves has fewer or more of them.
            keeps = node.op_type == "MaxPool"
            found.append(Passing(tensor=outputs[0], sources=(source,), keeps_axes=keeps))
    return tuple(found)


def _concat(graph: Graph, node: Any, outputs: list[str]) -> Iterable[Passing]:
    sources = [name for name in node.input if graph.is_activation(name)]
    if not outputs or not sources:
        return
    lengths = [_length(graph, name, attribute(node, "axis", 0)) for name in sources]
    known = [pair for pair in lengths if pair is not None]
    is_whole = len(known) == len(sources) == len(node.input)
    yield Passing(
        tensor=outputs[0],
        sources=tuple(sources),
        axis=known[0][0] if is_whole else None,
        sizes=tuple(size for _, size in known) if is_whole else (),
        keeps_axes=False,
    )


def _split(graph: Graph, node: Any, outputs: list[str]) -> Iterable[Passing]:
    start = 0
    for name in outputs:
        found = _length(graph, name, attribute(node, "axis", 0))
        axis, length = (None, 0) if found is None else found
        yield Passing(
            tensor=name,
            sources=(node.input[0],),
            axis=axis,
            start=start,
            length=length,
            keeps_axes=found is not None,
        )
        start += length


def _length(graph: Graph, tensor: str, axis: int) -> tuple[int, int] | None:
    """An axis counted from 0, and its length; None where these are not known."""
    found = graph.type_of(tensor)
    if found is None or found.shape is None:
        return None
    axis = axis % len(found.shape)
    size = found.shape[axis]
    return (axis, size) if isinstance(size, int) else None
