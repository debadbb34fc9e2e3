"""The whole decision for a model, as versioned JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdist.digest import digest_json
from qdist.errors import PlanError
from qdist.files import write_json
from qdist.model.layers import COMPUTE
from qdist.model.smoothing import Smoothing
from qdist.plan.choice import LayerChoice
from qdist.plan.passing import Passing
from qdist.plan.quantizer import Quantizer

SCHEMA = 2
READABLE = (1, 2)
"""Schemas that this version reads. Schema 1 has no provenance of single tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a tensor's numbers come from, beside the method that its quantizer names.

    ``rule``: the rules about this very tensor, or empty where its layer's choice decides.
    ``statistics``: hex SHA-256 of the histogram that the range was found on; None for weights,
    whose values the model's digest covers, and for what was not measured.
    """

    rule: str = ""
    statistics: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"rule": self.rule, "statistics": self.statistics}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedInput:
    """One quantized tensor at a layer: the ``index``-th of its inputs, or outputs."""

    index: int
    tensor: str
    quantizer: Quantizer
    provenance: Provenance = Provenance()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "index": self.index,
            "tensor": self.tensor,
            "quantizer": self.quantizer.to_json(),
            "provenance": self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> QuantizedInput:
        """From `to_json`."""
        return cls(
            index=value["index"],
            tensor=value["tensor"],
            quantizer=Quantizer.from_json(value["quantizer"]),
            provenance=Provenance(**value.get("provenance", {})),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasAdd:
    """The Add that the bias of a convolution becomes.

    ``result``: how the convolution's result is stored before the bias is added, under a name that
    no tensor of the model has. ``bias``: the constant, input 2 of the convolution. ``shape``: of
    the constant as the Add reads it, ``[channels, 1, ...]``.
    """

    result: QuantizedInput
    bias: QuantizedInput
    shape: tuple[int, ...]

    @property
    def entries(self) -> tuple[QuantizedInput, QuantizedInput]:
        """Both inputs of the Add."""
        return self.result, self.bias

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "result": self.result.to_json(),
            "bias": self.bias.to_json(),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BiasAdd:
        """From `to_json`."""
        return cls(
            result=QuantizedInput.from_json(value["result"]),
            bias=QuantizedInput.from_json(value["bias"]),
            shape=tuple(value["shape"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer: what was chosen, the numbers, and why an input stays float.

    ``why``: where the choice comes from. ``left_float``: input tensor -> reason. ``fused_with``:
    the layer that it is computed together with, whose choice holds for both. ``outputs``: how the
    results are stored, where statistics tell: those of the last layer that is computed together
    with this one. Floating-point types round there; integer targets requantize there.
    ``is_depthwise``: a convolution of every channel by itself. ``bias_bounds``: the largest
    magnitude that is added to each output channel (or one for all), biases of layers that are
    computed together with this one included; empty for none that is constant. ``bias_add``: the Add
    that its bias is, where that is split off (`LayerChoice.split_bias`); ``outputs`` are then what
    the Add gives.
    """

    name: str
    op_type: str
    choice: LayerChoice
    activations: tuple[QuantizedInput, ...]
    weights: tuple[QuantizedInput, ...]
    why: str
    left_float: dict[str, str] = field(default_factory=dict)
    fused_with: str | None = None
    outputs: tuple[QuantizedInput, ...] = ()
    is_depthwise: bool = False
    bias_bounds: tuple[float, ...] = ()
    bias_add: BiasAdd | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether any input is quantized."""
        return bool(self.activations or self.weights)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "op_type": self.op_type,
            "choice": self.choice.to_json(),
            "activations": [entry.to_json() for entry in self.activations],
            "weights": [entry.to_json() for entry in self.weights],
            "why": self.why,
            "left_float": self.left_float,
            "fused_with": self.fused_with,
            "outputs": [entry.to_json() for entry in self.outputs],
            "is_depthwise": self.is_depthwise,
            "bias_bounds": list(self.bias_bounds),
            **({} if self.bias_add is None else {"bias_add": self.bias_add.to_json()}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LayerPlan:
        """From `to_json`."""
        return cls(
            name=value["name"],
            op_type=value["op_type"],
            choice=LayerChoice(**value["choice"]),
            activations=tuple(QuantizedInput.from_json(v) for v in value["activations"]),
            weights=tuple(QuantizedInput.from_json(v) for v in value["weights"]),
            why=value["why"],
            left_float=dict(value["left_float"]),
            fused_with=value["fused_with"],
            outputs=tuple(QuantizedInput.from_json(v) for v in value.get("outputs", ())),
            is_depthwise=bool(value.get("is_depthwise", False)),
            bias_bounds=tuple(value.get("bias_bounds", ())),
            bias_add=BiasAdd.from_json(value["bias_add"]) if "bias_add" in value else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """How every layer of one model is quantized.

    ``model_digest``: of the frozen model it fits. ``statistics_digest``: of the record that the
    ranges come from. ``notes``: what the user should know. ``passing``: which tensors have their
    numbers from others, on targets that pass ratios on. ``smoothing``: the factors that were moved
    into that model's constants.
    """

    model_digest: str
    statistics_digest: str
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()
    passing: tuple[Passing, ...] = ()
    smoothing: Smoothing | None = None

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything but the notes."""
        return digest_json({**self.to_json(), "notes": []})

    @property
    def opset(self) -> int:
        """The lowest opset that the plan needs."""
        used = [layer.choice.opset for layer in self.layers if layer.is_quantized]
        return max(used, default=13)

    def counts(self) -> Counter[str]:
        """How many layers have each precision; ``float32`` counts what stays float. A fused layer
        counts with the one that it is computed with."""
        return Counter(
            layer.choice.precision if layer.is_quantized else "float32"
            for layer in self.layers
            if layer.fused_with is None
        )

    def coverage(self) -> Coverage:
        """How much of the model is quantized."""
        compute = [layer for layer in self.layers if layer.op_type in COMPUTE]
        both = sum(not layer.left_float and layer.is_quantized for layer in compute)
        tensors = {
            (entry.tensor, entry.quantizer.key)
            for layer in self.layers
            for entry in (*layer.activations, *((layer.bias_add.result,) if layer.bias_add else ()))
        }
        return Coverage(n_compute=len(compute), n_quantized=both, n_activations=len(tensors))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        smoothing = self.smoothing
        return {
            "qdist_plan": SCHEMA,
            "model_digest": self.model_digest,
            "statistics_digest": self.statistics_digest,
            **({} if smoothing is None else {"smoothing": smoothing.to_json()}),
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
            "passing": [entry.to_json() for entry in self.passing],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> QuantizationPlan:
        """From `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        if value["qdist_plan"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ValueError(f"schema {value['qdist_plan']}, this version reads {known}")
        return cls(
            model_digest=str(value["model_digest"]),
            statistics_digest=str(value["statistics_digest"]),
            layers=tuple(LayerPlan.from_json(v) for v in value["layers"]),
            notes=tuple(value["notes"]),
            passing=tuple(Passing.from_json(v) for v in value.get("passing", ())),
            smoothing=Smoothing.from_json(value["smoothing"]) if "smoothing" in value else None,
        )

    def save(self, path: Path) -> Path:
        """Write the plan as JSON, whole or not at all. Raises QD603."""
        return write_json(path, self.to_json())


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """``n_quantized`` of ``n_compute`` matmul- and conv-like layers have every data input
    quantized; ``n_activations`` distinct activations are."""

    n_compute: int
    n_quantized: int
    n_activations: int

    def __str__(self) -> str:
        return (
            f"{self.n_quantized} of {self.n_compute} matmul- and conv-like layers, "
            f"{self.n_activations} activations"
        )


def load_plan(path: Path, model_digest: str | None = None) -> QuantizationPlan:
    """Read a plan; with ``model_digest``, one for that model. Raises QD504, QD505."""
    try:
        plan = QuantizationPlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise _unreadable(path, "nothing there") from error
    except (OSError, KeyError, TypeError, ValueError, PlanError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if model_digest is not None:
        check_model(plan, path, model_digest)
    return plan


def check_model(plan: QuantizationPlan, path: Path, model_digest: str) -> None:
    """Raise QD505 where the plan, read from ``path``, is for another model."""
    if plan.model_digest != model_digest:
        raise PlanError(
            "QD505",
            where=str(path),
            got=f"a plan for model {plan.model_digest[:12]}",
            expected=f"one for model {model_digest[:12]}",
            mend="give the model that the plan was made for, or run qdist quantize again",
        )


def _unreadable(path: Path, got: str) -> PlanError:
    return PlanError(
        "QD504",
        where=str(path),
        got=got,
        expected=f"a qdist plan (JSON, schema {SCHEMA})",
        mend="run qdist quantize, or give another file with plan=FILE",
    )
