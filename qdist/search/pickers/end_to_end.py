"""By what quantizing one layer alone does to the outputs of the model.

The error of a layer's own output says nothing of what becomes of it: a residual sum carries it to
the end, a normalization may forget it. So each layer is quantized by itself, all others float, and
the squared error of the outputs is taken as a share of their energy: the sensitivity Omega of Z.
Dong et al., "HAWQ-V2" (2020), measured rather than expanded. Errors of 8 bits are small enough to
be about independent, so that what a set of layers costs is about the sum of what each costs, and
raising the largest leaves the least.

A layer is what the user raises, so all its inputs count together. The model runs once more per
layer, on one session (`qdist.simulate.switched`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import DataSource, Feeds
from qdist.emit.writer import write_model
from qdist.evaluate.builtin import batches, session_inputs
from qdist.model.freeze import FrozenModel
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.target import ProjectedPlan
from qdist.search.pickers.picking import Picked, PickSettings, n_raised, worst
from qdist.simulate.switched import switched_graph

LOW_SHARE = 0.8
"""Of the layers that stay low, unless a share or a threshold is given."""


def end_to_end(errors: Mapping[str, float], settings: PickSettings) -> Picked:
    """The layers that move the outputs most.

    ``errors``: of every layer alone, as `output_errors` measures them. ``threshold``: layers above
    this share of the outputs' energy are raised; else ``low_share`` of them (0.8) stay low.
    """
    if settings.threshold is not None:
        chosen = tuple(name for name, error in errors.items() if error > settings.threshold)
    else:
        share = LOW_SHARE if settings.low_share is None else settings.low_share
        chosen = worst(errors, n_raised(len(errors), share))
    why = {name: f"moves the outputs by {errors[name]:.2g} of their energy" for name in chosen}
    return Picked(raised=frozenset(chosen), scores=dict(errors), why=why)


def output_errors(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    source: DataSource,
    execution: Execution,
    *,
    batch: int = 8,
    n_samples: int | None = None,
) -> dict[str, float]:
    """Quantized layer -> squared error of the model's float outputs when it alone is quantized, as
    a share of their squares, each output for itself and then the mean.

    ``inf`` for a layer that makes outputs infinite or NaN. Raises `DataError`, QD205, QD206.
    """
    switched = switched_graph(frozen, projected)
    switches = switched.switches
    if not switches:
        return {}
    with TemporaryDirectory(prefix="qdist-switched-") as folder:
        path = write_model(switched.graph, Path(folder) / "switched.onnx").path
        session = scoring_session(path, execution)
        outputs = [v.name for v in session.get_outputs() if "float" in v.type]
        own = set(switches.values())
        inputs = tuple(spec for spec in session_inputs(session) if spec.name not in own)
        off = {name: np.array(False) for name in own}
        noise = {layer: np.zeros(len(outputs)) for layer in switches}
        signal = np.zeros(len(outputs))
        for entry in batches(source, inputs, batch, n_samples=n_samples):
            feeds: Feeds = {**entry.feeds, **off}
            plain = run(session, outputs, feeds)
            signal += [np.square(f[np.isfinite(f)], dtype=np.float64).sum() for f in plain]
            for layer, switch in switches.items():
                found = run(session, outputs, {**feeds, switch: np.array(True)})
                noise[layer] += _squares(found, plain)
    share = np.where(signal > 0, signal, 1.0)
    return {layer: float(np.mean(total / share)) for layer, total in noise.items()}


def _squares(
    found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Of each output, the squared distance over all that the float model has finite."""
    totals = []
    for q, f in zip(found, expected, strict=True):
        known = np.isfinite(f)
        total = float(np.square(q[known].astype(np.float64) - f[known]).sum())
        totals.append(total if np.isfinite(total) else np.inf)
    return np.array(totals)
