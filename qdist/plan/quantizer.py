"""The numbers of one quantized tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.threshold.clip import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A uniform quantizer: ``q = clip(round(x / scale) + zero_point)``.

    ``scales`` and ``zero_points`` have one entry, or one per index of ``axis``. ``bits`` is the
    storage width of the signed integers, ``low .. high`` the levels in use. ``bounds`` is the
    range ``(low, high)`` in the tensor's units that was asked for (of the widest channel).
    ``clipped_share`` and ``expected_mse`` say what it costs, where known.
    """

    bits: int
    low: int
    high: int
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None
    method: str
    bounds: tuple[float, float]
    clipped_share: float | None = None
    expected_mse: float | None = None

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.zero_points) or not self.scales:
            raise ValueError(f"{len(self.scales)} scales, {len(self.zero_points)} zero points")
        if self.axis is None and len(self.scales) != 1:
            raise ValueError(f"{len(self.scales)} scales without an axis")
        if not all(math.isfinite(s) and s > 0 for s in self.scales):
            raise ValueError("scales must be finite and positive")

    @property
    def dtype(self) -> str:
        """Name of the storage type."""
        return f"int{self.bits}"

    @property
    def levels(self) -> Levels:
        """The levels in use."""
        return Levels(low=self.low, high=self.high, symmetric=not any(self.zero_points))

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the numbers: equal keys mean one Q/DQ pair."""
        return (self.bits, self.low, self.high, self.scales, self.zero_points, self.axis)

    def _along(self, values: tuple[Any, ...], rank: int, dtype: Any) -> NDArray[Any]:
        array = np.asarray(values, dtype)
        if self.axis is None:
            return array.reshape(())
        shape = [1] * rank
        shape[self.axis] = -1
        return array.reshape(shape)

    def quantize(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Integers of a float tensor: rounding half to even, in float32 as ONNX defines it."""
        x = values.astype(np.float32, copy=False)
        scale = self._along(self.scales, x.ndim, np.float32)
        zero = self._along(self.zero_points, x.ndim, np.float32)
        q = np.rint(x / scale) + zero
        return np.clip(q, self.low, self.high).astype(np.int32)

    def dequantize(self, integers: NDArray[np.int32]) -> NDArray[np.float32]:
        """The float32 values that integers stand for."""
        scale = self._along(self.scales, integers.ndim, np.float32)
        zero = self._along(self.zero_points, integers.ndim, np.int32)
        return (integers - zero).astype(np.float32) * scale

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "bits": self.bits,
            "low": self.low,
            "high": self.high,
            "scales": list(self.scales),
            "zero_points": list(self.zero_points),
            "axis": self.axis,
            "method": self.method,
            "bounds": list(self.bounds),
            "clipped_share": self.clipped_share,
            "expected_mse": self.expected_mse,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Quantizer:
        """From `to_json`."""
        low, high = value["bounds"]
        return cls(
            **{
                **value,
                "scales": tuple(value["scales"]),
                "zero_points": tuple(value["zero_points"]),
                "bounds": (low, high),
            }
        )
