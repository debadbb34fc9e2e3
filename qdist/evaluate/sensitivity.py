"""How far every layer's output moves when it alone is quantized, for many choices at once.

All layers and all choices of a few plans take one run of the model, beside whose layers stand
their quantized twins (`qdist.simulate.twin_sums`); nothing but sums leaves ONNX Runtime. A budget
cuts the twins into parts, each of which runs the model up to the last layer that it needs. Parts
that are finished are kept, where there is something that keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdist.calibration import input_specs
from qdist.data.checks import InputSpec, fixed_batch
from qdist.data.source import DataSource
from qdist.digest import digest_json
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches
from qdist.evaluate.sums import Deviation, deviation_of
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import Execution, fingerprint, folding_session, run
from qdist.plan.target import ProjectedPlan
from qdist.simulate.twin_sums import N_SUMS, TOTALS, TwinSums, twin_key, twin_sums

VERSION = 1
"""Of how the sums are taken: another one meets no stored sums."""
DEFAULT_BUDGET_BYTES = 1 << 30
_BYTES_PER_WEIGHT = 8
"""A twin's weights while a session is made: as stored, and dequantized."""

Totals = NDArray[np.float64]
"""float64[N_SUMS] of one twin: sums of f*f, q*q, (q-f)^2, abs(q-f), and 1."""


class Kept(Protocol):
    """What holds finished sums between runs, under one identity. Used by one process."""

    def known(self) -> Mapping[str, Totals]:
        """All sums by `twin_key`."""
        ...

    def keep(self, totals: Mapping[str, Totals]) -> None:
        """Add finished sums, all of them or none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """``scalars``: tensors without an axis, which have no last one to sum over first."""

    inputs: tuple[InputSpec, ...]
    scalars: frozenset[str]


def sensitivity_identity(
    frozen: FrozenModel,
    plans: Sequence[ProjectedPlan],
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
    graph: Graph | None = None,
) -> dict[str, Any]:
    """All that sums depend on besides the quantizers, which their keys are made of: JSON.

    The model's digest covers its weights. ``graph``: of ``frozen``, where there is one already.
    Raises `DataError`.
    """
    inputs = input_specs(graph or Graph(frozen))
    names = source.keys()
    if n_samples is not None:
        step = fixed_batch(inputs) or 1
        names = names[: -(-n_samples // step) * step]
    return {
        "version": VERSION,
        "model_digest": frozen.digest,
        "preprocessing": source.preprocessing(),
        "samples": digest_json([source.content_digest(name) for name in names]),
        "fingerprint": fingerprint(execution),
        "batch": batch,
        "opset": max((projected.plan.opset for projected in plans), default=0),
    }


def sensitivities(
    frozen: FrozenModel,
    plans: Sequence[ProjectedPlan],
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    kept: Kept | None = None,
    graph: Graph | None = None,
) -> tuple[dict[str, Deviation], ...]:
    """For each plan: layer -> deviation when it alone is quantized as there, reading the float
    model's activations.

    ``n_samples``: the first so many of ``source``. ``budget_bytes``: for the weights of twins that
    are there at a time; the float model, and one layer with all its twins, are held in any case.
    ``graph``: of ``frozen``, where there is one already.
    Raises `DataError`, QD205, QD206.
    """
    totals = dict(kept.known()) if kept is not None else {}
    about = _about(graph or Graph(frozen))
    for keys in _parts(frozen, plans, totals, budget_bytes):
        found = _measured(frozen, plans, keys, about, source, execution, batch, n_samples)
        totals |= found
        if kept is not None:
            kept.keep(found)
    return tuple(
        {
            layer.name: deviation_of_totals(totals[twin_key(layer)])
            for layer in projected.plan.layers
            if layer.is_quantized
        }
        for projected in plans
    )


def sensitivity(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
) -> dict[str, Deviation]:
    """`sensitivities` of one plan."""
    (found,) = sensitivities(
        frozen, (projected,), source, execution, batch=batch, n_samples=n_samples
    )
    return found


def deviation_of_totals(totals: Totals) -> Deviation:
    """What a twin's sums come to."""
    ff, qq, square, absolute, n = (float(value) for value in totals)
    # Exact but for rounding, and one sum less to take.
    return deviation_of(ff, qq, (ff + qq - square) / 2, square, absolute, round(n))


def _parts(
    frozen: FrozenModel,
    plans: Sequence[ProjectedPlan],
    known: Mapping[str, Totals],
    budget_bytes: int,
) -> Iterator[tuple[str, ...]]:
    """The keys that are not known, in the order of the graph, in parts of bounded weights."""
    weights = frozen.weights()
    sizes: dict[str, dict[str, int]] = {}
    for projected in plans:
        for layer in projected.plan.layers:
            key = twin_key(layer) if layer.is_quantized else ""
            if key and key not in known:
                n = sum(
                    int(np.prod(weights.shape(entry.tensor), dtype=np.int64))
                    for entry in layer.weights
                )
                sizes.setdefault(layer.name, {})[key] = n * _BYTES_PER_WEIGHT
    part: list[str] = []
    used = 0
    for found in sizes.values():
        size = sum(found.values())
        if part and used + size > budget_bytes:
            yield tuple(part)
            part, used = [], 0
        part += found
        used += size
    if part:
        yield tuple(part)


def _measured(
    frozen: FrozenModel,
    plans: Sequence[ProjectedPlan],
    keys: tuple[str, ...],
    about: _About,
    source: DataSource,
    execution: Execution,
    batch: int,
    n_samples: int | None,
) -> dict[str, Totals]:
    """The sums of one part over all samples."""

    def opened(careful: frozenset[str]) -> tuple[TwinSums, ort.InferenceSession]:
        twins = twin_sums(frozen, plans, keys=keys, careful=careful, scalars=about.scalars)
        with TemporaryDirectory(prefix="qdist-twins-") as folder:
            path = write_model(twins.graph, Path(folder) / "twins.onnx").path
            return twins, folding_session(path, execution)

    twins, session = opened(frozenset())
    # A part may read fewer inputs than samples have.
    read = {value.name for value in session.get_inputs()}
    sums = np.zeros((len(twins.keys), N_SUMS))
    for entry in batches(source, about.inputs, batch, n_samples=n_samples):
        feeds = {name: array for name, array in entry.feeds.items() if name in read}
        (found,) = run(session, [TOTALS], feeds)
        broken = {twins.layer_of[twins.keys[i]] for i in np.flatnonzero(~np.isfinite(found).all(1))}
        if broken - twins.careful:
            # From here on in float64, and without what is infinite in the float model too.
            twins, session = opened(twins.careful | broken)
            (found,) = run(session, [TOTALS], feeds)
        found[~np.isfinite(found).all(1)] = (0.0, np.inf, np.inf, np.inf, 0.0)
        sums += found
    return {key: sums[i] for i, key in enumerate(twins.keys)}


def _about(graph: Graph) -> _About:
    names = (name for node in graph.proto.graph.node for name in node.output if name)
    types = ((name, graph.type_of(name)) for name in names)
    scalars = frozenset(name for name, kind in types if kind is not None and kind.shape == ())
    return _About(inputs=input_specs(graph), scalars=scalars)
