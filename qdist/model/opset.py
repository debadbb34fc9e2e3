"""Raising the opset of a graph, with the standard converter."""

from __future__ import annotations

import onnx
import onnx.version_converter
from onnx import ModelProto

from qdist.errors import ModelError
from qdist.model.rewrite import opset_of

IR_VERSION_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}
"""The IR version that belongs to each opset (ONNX's table of releases)."""


def raise_opset(model: ModelProto, version: int) -> ModelProto:
    """A model of at least opset ``version`` that computes the same. Never lowers.

    External data stays external: only the graph passes through the converter. Raises QD206.
    """
    present = opset_of(model)
    if present >= version:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, version)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise ModelError(
            "QD206",
            where=f"opset {present} to {version}",
            got=f"the converter's refusal: {reason[:300]}",
            expected="operators that the ONNX version converter can convert",
            mend=f"export the model at opset {version} or later",
        ) from error
    converted.ir_version = max(model.ir_version, IR_VERSION_OF_OPSET.get(version, 10))
    # The converter forgets imports of other domains.
    known = {entry.domain for entry in converted.opset_import}
    converted.opset_import.extend(e for e in model.opset_import if e.domain not in known)
    return converted
