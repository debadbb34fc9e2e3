"""Whether a rewritten model still computes what it did, on one input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from qdist.errors import ModelError
from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.model.half import widened
from qdist.model.loading import read_graph
from qdist.model.opset import raise_opset
from qdist.model.precision import HALF, mentions
from qdist.model.session import Execution, measuring_session, run, scoring_session
from qdist.model.within import run_within

TOLERANCE = 1e-4
"""Largest relative L2 difference that a rewriting may make to an output."""
HALF_TOLERANCES = {TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 8e-2}
"""The same for models with tensors in half precision: about 20 times what one rounding does. A
normalization that goes into the weights moves every weight by up to one rounding."""


def frozen_difference(
    frozen: FrozenModel,
    feeds: dict[str, NDArray[Any]],
    execution: Execution,
    *,
    budget_bytes: int | None = None,
) -> float:
    """Relative L2 difference between the model as given and frozen, on one input; 0 is bit-equal.

    Both run with graph optimization off and half precision rounded after every operator; in
    segments where ``budget_bytes`` says so. Raises QD207 above `TOLERANCE` (`HALF_TOLERANCES`).
    """
    names = [output.name for output in frozen.proto().graph.output]
    source = read_graph(frozen.source)
    tolerance = _tolerance(source)
    if budget_bytes is None and not mentions(source, HALF):
        del source
        expected = run(scoring_session(frozen.source, execution), names, feeds)
    else:
        given = source.SerializeToString()
        expected = _outputs(given, frozen, names, feeds, execution, budget_bytes)
    found = _outputs(frozen.graph_bytes, frozen, names, feeds, execution, budget_bytes)
    worst = 0.0
    for name, e, f in zip(names, expected, found, strict=True):
        worst = max(worst, _relative_l2(np.asarray(e), np.asarray(f)))
        if not worst <= tolerance:
            raise ModelError(
                "QD207",
                where=f"output {name} of {frozen.source}",
                got=f"a relative difference of {worst:.3g} after simplification",
                expected=f"at most {tolerance:g}",
                mend="export the model at opset 13 or later with constants folded",
            )
    return worst


def rewriting_difference(
    frozen: FrozenModel,
    rewritten: FrozenModel,
    feeds: dict[str, NDArray[Any]],
    execution: Execution,
    *,
    budget_bytes: int | None = None,
) -> float:
    """Relative L2 difference between a frozen model and another that is to have its outputs, on one
    input; 0 is bit-equal. Raises QD207 above `TOLERANCE` (`HALF_TOLERANCES`)."""
    worst, tolerance = _compared(
        frozen, (rewritten.graph_bytes, rewritten), feeds, execution, budget_bytes
    )
    if not worst <= tolerance:
        raise ModelError(
            "QD207",
            where=f"{frozen.source}, smoothed",
            got=f"a relative difference of {worst:.3g}",
            expected=f"at most {tolerance:g}",
            mend="leave out smoothing for this model",
        )
    return worst


def opset_difference(
    frozen: FrozenModel,
    opset: int,
    feeds: dict[str, NDArray[Any]],
    execution: Execution,
    *,
    budget_bytes: int | None = None,
) -> float:
    """Relative L2 difference that raising the frozen graph to ``opset`` makes; 0 is bit-equal.

    Raises QD206 when it cannot be raised, QD207 above `TOLERANCE` (`HALF_TOLERANCES`).
    """
    if rewrite.opset_of(frozen.proto()) >= opset:
        return 0.0
    raised = raise_opset(frozen.proto(), opset).SerializeToString()
    worst, tolerance = _compared(frozen, (raised, frozen), feeds, execution, budget_bytes)
    if not worst <= tolerance:
        raise ModelError(
            "QD207",
            where=f"{frozen.source} at opset {opset}",
            got=f"a relative difference of {worst:.3g}",
            expected=f"at most {tolerance:g}",
            mend=f"export the model at opset {opset}",
        )
    return worst


def _compared(
    frozen: FrozenModel,
    other: tuple[bytes, FrozenModel],
    feeds: dict[str, NDArray[Any]],
    execution: Execution,
    budget_bytes: int | None,
) -> tuple[float, float]:
    """The largest relative L2 difference of an output between the frozen graph and another (its
    bytes, and the model that holds its weights), and what is tolerated."""
    proto = frozen.proto()
    names = [output.name for output in proto.graph.output]
    expected = _outputs(frozen.graph_bytes, frozen, names, feeds, execution, budget_bytes)
    found = _outputs(*other, names, feeds, execution, budget_bytes)
    worst = max(_relative_l2(e, f) for e, f in zip(expected, found, strict=True))
    return worst, _tolerance(proto)


def _outputs(
    model: bytes,
    frozen: FrozenModel,
    names: list[str],
    feeds: dict[str, NDArray[Any]],
    execution: Execution,
    budget_bytes: int | None,
) -> list[NDArray[Any]]:
    """Outputs of a graph beside the frozen model's data, whole or in segments."""
    folder = frozen.data_folder
    if budget_bytes is not None:
        within = run_within(model, folder, feeds, names, budget_bytes, execution)
        return [within[name] for name in names]
    proto = widened(ModelProto.FromString(model), folder, execution)
    return run(measuring_session(proto.SerializeToString(), folder, execution), names, feeds)


def _tolerance(model: ModelProto) -> float:
    found = (limit for element, limit in HALF_TOLERANCES.items() if mentions(model, {element}))
    return max(found, default=TOLERANCE)


def _relative_l2(expected: NDArray[Any], found: NDArray[Any]) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if np.array_equal(expected, found, equal_nan=expected.dtype.kind == "f"):
        return 0.0
    e, f = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    same = (e == f) | (np.isnan(e) & np.isnan(f))
    off = e[~same] - f[~same]
    if not np.isfinite(off).all():
        return float("inf")
    return float(np.linalg.norm(off)) / (float(np.linalg.norm(e[np.isfinite(e)])) or 1.0)
