"""HAWQ: layers where the model's output bends most, times how far their weights are rounded.

Dong et al. 2020, "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks": a layer
counts with the mean trace of the Hessian times ||Q(W) - W||^2. The trace is that of the
Gauss-Newton Hessian J^T J of the outputs, and needs no gradients: for v with entries +1 and -1 at
random (Hutchinson 1990), ||f(W + eps v) - f(W)||^2 / eps^2 estimates v^T J^T J v, whose mean is
the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qdist.data.source import DataSource, Feeds
from qdist.evaluate.builtin import batches, session_inputs
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.plan import QuantizationPlan
from qdist.search.pickers.picking import (
    DEFAULT_LOW_SHARE,
    Picked,
    PickSettings,
    n_raised,
    worst,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """``n_probes`` random directions for each weight, from ``seed``. ``relative_step``: eps as a
    share of the weight's root mean square, small enough for the model to be nearly linear and large
    enough for float32."""

    n_probes: int = 4
    seed: int = 0
    relative_step: float = 0.01

    def __post_init__(self) -> None:
        if self.n_probes < 1 or not 0 < self.relative_step < 1:
            raise ValueError("n_probes must be at least 1 and relative_step within 0..1")


def hawq(plan: QuantizationPlan, traces: Mapping[str, float], settings: PickSettings) -> Picked:
    """The layers of the largest mean trace times squared weight error.

    ``plan``: the one at the lower precision, whose quantizers know what they cost. ``traces``: of
    every weight, whole. ``low_share`` of the layers with weights stays low (0.5 unless given).
    """
    scores: dict[str, float] = {}
    for layer in plan.layers:
        # Mean trace times squared error is trace times mean squared error.
        costs = [
            traces[entry.tensor] * entry.quantizer.expected_mse
            for entry in layer.weights
            if entry.tensor in traces and entry.quantizer.expected_mse is not None
        ]
        if costs:
            scores[layer.name] = sum(costs)
    share = DEFAULT_LOW_SHARE if settings.low_share is None else settings.low_share
    chosen = worst(scores, n_raised(len(scores), share))
    why = {name: f"trace times weight error {scores[name]:.2g}" for name in chosen}
    return Picked(raised=frozenset(chosen), scores=scores, why=why)


def traces(
    frozen: FrozenModel,
    weights: Sequence[str],
    source: DataSource,
    execution: Execution,
    probes: Probes | None = None,
    *,
    batch: int = 8,
    n_samples: int | None = None,
) -> dict[str, float]:
    """Weight -> trace of J^T J over all its entries, the mean over samples.

    J is the derivative of all float outputs of the model by the weight. The model runs
    1 + ``n_probes`` * weights times on each batch. A weight that is all zeros has no scale to step
    by and trace 0. Raises `DataError`, QD205.
    """
    probes = probes or Probes()
    held = frozen.weights()
    session = _session(frozen, weights, execution)
    outputs = [v.name for v in session.get_outputs() if "float" in v.type]
    overridable = set(weights)
    inputs = tuple(i for i in session_inputs(session) if i.name not in overridable)
    totals = dict.fromkeys(weights, 0.0)
    n_seen = 0
    given = [entry.feeds for entry in batches(source, inputs, batch, n_samples=n_samples)]
    plain = [run(session, outputs, feeds) for feeds in given]
    for feeds in given:
        n_seen += next(iter(feeds.values())).shape[0]
    for i, name in enumerate(weights):
        weight = np.asarray(held.read(name), np.float32)
        step = probes.relative_step * float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
        if step == 0.0:
            continue
        rng = np.random.default_rng([probes.seed, i])
        for _ in range(probes.n_probes):
            moved = weight + np.float32(step) * _signs(rng, weight.shape)
            for feeds, expected in zip(given, plain, strict=True):
                totals[name] += _distance(session, outputs, {**feeds, name: moved}, expected)
        totals[name] /= step**2 * probes.n_probes * max(1, n_seen)
    return totals


def _session(
    frozen: FrozenModel, weights: Sequence[str], execution: Execution
) -> ort.InferenceSession:
    """The frozen model with its weights as inputs that may be given, or left as they are."""
    proto = frozen.proto()
    wanted = set(weights)
    for tensor in proto.graph.initializer:
        if tensor.name in wanted:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return scoring_session(proto.SerializeToString(), execution, frozen.data_folder)


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Entries +1 and -1 with equal chance."""
    return (rng.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1).astype(np.float32)


def _distance(
    session: ort.InferenceSession,
    outputs: list[str],
    feeds: Feeds,
    expected: Sequence[NDArray[np.float32]],
) -> float:
    """Squared distance of the outputs, over all that are finite."""
    total = 0.0
    for found, known in zip(run(session, outputs, feeds), expected, strict=True):
        difference = found.astype(np.float64) - known
        total += float(np.square(difference[np.isfinite(difference)]).sum())
    return total
