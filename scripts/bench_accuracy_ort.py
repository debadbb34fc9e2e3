"""ONNX Runtime's own quantization, and the coverage of any Q/DQ model file.

`quantize_static` as a user calls it: Q/DQ, int8 weights per channel, int8 activations, everything
else by its defaults. It gets the same samples as we do, in the same micro-batches.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from bench_accuracy_cases import AccuracyCase
from bench_accuracy_scores import EXECUTION
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from qdist.data.source import Feeds
from qdist.evaluate.builtin import Runner, batches
from qdist.model.freeze import FrozenModel
from qdist.model.layers import COMPUTE
from qdist.simulate.assemble import raised

OPSET = 13
METHODS = {
    "MinMax": CalibrationMethod.MinMax,
    "Entropy": CalibrationMethod.Entropy,
    "Percentile": CalibrationMethod.Percentile,
}


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """Gives micro-batch after micro-batch of the calibration samples."""

    def __init__(self, case: AccuracyCase) -> None:
        inputs = Runner(case.model, EXECUTION).inputs
        self._left: Iterator[Feeds] = (
            batch.feeds for batch in batches(case.calibration, inputs, case.micro_batch)
        )

    def get_next(self) -> dict[str, Any] | None:
        """The feeds of the next micro-batch."""
        return next(self._left, None)


def readable(case: AccuracyCase, frozen: FrozenModel, folder: Path) -> Path:
    """The model that ONNX Runtime is given: the user's own, or where that is older than opset 13,
    in which Q/DQ per channel is defined, the same raised to it."""
    opsets = onnx.load(str(case.model), load_external_data=False).opset_import
    if max(entry.version for entry in opsets if entry.domain in ("", "ai.onnx")) >= OPSET:
        return case.model
    path = folder / "raised.onnx"
    onnx.save(raised(frozen, OPSET), str(path))
    return path


def quantize(
    case: AccuracyCase, model: Path, method: str, path: Path, *, symmetric: bool
) -> str | None:
    """Write ONNX Runtime's model to ``path``; None, or the error that it ended with.

    Ranges are kept beside it for the other symmetry, which its calibrators do not know of.
    """
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_static(
                str(model),
                str(path),
                _Samples(case),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=METHODS[method],
                calibration_cache_path=path.with_name(f"{method}.json"),
                extra_options={"ActivationSymmetric": symmetric},
            )
    except Exception as error:  # noqa: BLE001 - whatever it fails with is the result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """Of a Q/DQ model file: how many of the matmul- and conv-like operators have both inputs
    quantized, and how many tensors are quantized while the model runs."""

    n_compute: int
    n_quantized: int
    n_activations: int

    @property
    def share(self) -> float:
        """Of the operators that have both inputs quantized; 1 without any operator."""
        return self.n_quantized / self.n_compute if self.n_compute else 1.0


def coverage(path: Path) -> Covered:
    """Counted in the file itself, bodies of control flow included, in the same way for everyone's.
    Roundings to a floating-point type, which are Casts, count as quantized."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return _covered(graph, {}, frozenset())


def _covered(
    graph: onnx.GraphProto, outside: Mapping[str, onnx.NodeProto], constants: frozenset[str]
) -> Covered:
    """``outside``, ``constants``: what the graph sees of those around it."""
    maker = {**outside, **{name: node for node in graph.node for name in node.output}}
    constants |= {tensor.name for tensor in graph.initializer}
    compute = [node for node in graph.node if node.op_type in COMPUTE]

    def is_quantized(name: str) -> bool:
        node = maker.get(name)
        while node is not None and node.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
            node = maker.get(node.input[0])
        return node is not None and node.op_type in ("DequantizeLinear", "Cast")

    stored = {
        node.input[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    bodies = [
        _covered(entry.g, maker, constants)
        for node in graph.node
        for entry in node.attribute
        if entry.type == onnx.AttributeProto.GRAPH
    ]
    quantized = [all(is_quantized(name) for name in node.input[:2]) for node in compute]
    return Covered(
        n_compute=len(compute) + sum(body.n_compute for body in bodies),
        n_quantized=sum(quantized) + sum(body.n_quantized for body in bodies),
        n_activations=len(stored) + sum(body.n_activations for body in bodies),
    )
