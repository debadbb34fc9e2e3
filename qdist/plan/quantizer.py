"""The numbers of one quantized tensor."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.dtype import DTYPES, DType, FloatType
from qdist.numbers.grid import LEAST_SCALE
from qdist.numbers.rounding import round_float, round_integer
from qdist.threshold.clip import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """A scale for every ``size`` values along ``axis``, at each index of the other axes.

    ``shape``: of the scales, which is the tensor's but for ``axis``; ``raw``: their little-endian
    float32 bytes, since there may be millions.
    """

    axis: int
    size: int
    shape: tuple[int, ...]
    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 4 * math.prod(self.shape) or not 0 <= self.axis < len(self.shape):
            raise ValueError(f"{len(self.raw)} bytes of scales {self.shape} along {self.axis}")
        if not bool((self.values > 0).all() and np.isfinite(self.values).all()):
            raise ValueError("scales must be finite and positive")

    @classmethod
    def of(cls, values: NDArray[Any], axis: int, size: int) -> BlockScales:
        """From an array of scales."""
        raw = np.asarray(values, "<f4").tobytes()
        return cls(axis=axis, size=size, shape=tuple(values.shape), raw=raw)

    @property
    def values(self) -> NDArray[np.float32]:
        """float32[shape], read-only."""
        return np.frombuffer(self.raw, "<f4").reshape(self.shape)

    def spread(self, length: int) -> NDArray[np.float32]:
        """Each scale at every value it holds for, for a tensor of ``length`` along the axis."""
        repeated = np.repeat(self.values, self.size, axis=self.axis)
        return repeated.take(np.arange(length), axis=self.axis)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; the scales in base64."""
        raw = base64.b64encode(self.raw).decode("ascii")
        return {"axis": self.axis, "size": self.size, "shape": list(self.shape), "raw": raw}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BlockScales:
        """From `to_json`."""
        raw = base64.b64decode(value["raw"], validate=True)
        return cls(axis=value["axis"], size=value["size"], shape=tuple(value["shape"]), raw=raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A uniform quantizer, ``q = clip(round(x / scale) + zero_point)``, or a rounding to a
    floating-point type, ``q = round(x / scale)``.

    ``scales`` and ``zero_points`` have one entry, or one per index of ``axis``. ``bits`` is the
    storage width, ``low .. high`` the levels in use, both 0 for a floating-point type. ``bounds``
    is the range ``(low, high)`` in the tensor's units that was asked for (of the widest channel).
    ``clipped_share`` and ``expected_mse`` say what it costs, where known.

    ``storage``: name of the number type; None for the signed integer of ``bits``. ``blocks``: the
    scales where each holds for a block, and ``scales`` is the largest alone. ``token_length``: the
    length of the last axis, where every row of it has a scale that is found while the model runs:
    the largest magnitude there over ``high``; else 0. ``saturates``: what a floating-point type
    cannot hold becomes its largest value, not infinity. ``rounding``: as in
    `qdist.numbers.rounding`; only weights have another than ``half_even``, which is that of ONNX.
    ``cuts``: for each scale of a weight on a
    target that multiplies with ``m * 2**-n``, the ``(m, n, first cut)`` of the normalized scale
    (`qdist.numbers.cuts`).
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
    storage: str | None = None
    blocks: BlockScales | None = None
    token_length: int = 0
    saturates: bool = False
    rounding: str = "half_even"
    cuts: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.zero_points) or not self.scales:
            raise ValueError(f"{len(self.scales)} scales, {len(self.zero_points)} zero points")
        if self.axis is None and len(self.scales) != 1:
            raise ValueError(f"{len(self.scales)} scales without an axis")
        if not all(math.isfinite(s) and s > 0 for s in self.scales):
            raise ValueError("scales must be finite and positive")
        if self.dtype not in DTYPES or DTYPES[self.dtype].bits != self.bits:
            raise ValueError(f"no number type {self.dtype!r} of {self.bits} bits")

    @property
    def dtype(self) -> str:
        """Name of the storage type."""
        return self.storage or f"int{self.bits}"

    @property
    def number(self) -> DType:
        """The storage type."""
        return DTYPES[self.dtype]

    @property
    def is_dynamic(self) -> bool:
        """Whether scales are found while the model runs."""
        return self.token_length > 0

    @property
    def is_float(self) -> bool:
        """Whether the storage type is a floating-point one."""
        return isinstance(self.number, FloatType)

    @property
    def is_narrow(self) -> bool:
        """Whether fewer levels are in use than storage and scheme would have."""
        kind = self.number
        if isinstance(kind, FloatType):
            return False
        return self.high < kind.high or self.low > kind.low + 1

    @property
    def levels(self) -> Levels:
        """The levels in use."""
        return Levels(low=self.low, high=self.high, symmetric=not any(self.zero_points))

    @property
    def grain(self) -> str:
        """What shares a scale, in words."""
        if self.is_dynamic:
            return "per token"
        if self.blocks is not None:
            return f"in blocks of {self.blocks.size}"
        return "per tensor" if self.axis is None else f"x {len(self.scales)}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the numbers: equal keys mean one Q/DQ pair."""
        kind = (self.dtype, self.low, self.high, self.token_length, self.saturates, self.rounding)
        return (*kind, self.scales, self.zero_points, self.axis, self.blocks)

    def _along(self, values: tuple[Any, ...], rank: int, dtype: Any) -> NDArray[Any]:
        array = np.asarray(values, dtype)
        if self.axis is None:
            return array.reshape(())
        shape = [1] * rank
        shape[self.axis] = -1
        return array.reshape(shape)

    def _scale(self, x: NDArray[Any]) -> NDArray[np.float32]:
        if self.blocks is not None:
            return self.blocks.spread(x.shape[self.blocks.axis])
        return self._along(self.scales, x.ndim, np.float32)

    def token_scales(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scale of each row of the last axis, float32[..., 1], of a dynamic quantizer."""
        top = np.abs(x).max(axis=-1, keepdims=True)
        least = np.float32(LEAST_SCALE * self.high)
        return np.asarray(np.maximum(top, least) / np.float32(self.high), np.float32)

    def quantize(self, values: NDArray[Any]) -> NDArray[Any]:
        """The stored numbers of a float tensor: int32, or float32 on the grid of a floating-point
        type. Division and rounding are in float32, as ONNX defines them."""
        x = values.astype(np.float32, copy=False)
        scale = self.token_scales(x) if self.is_dynamic else self._scale(x)
        kind = self.number
        if isinstance(kind, FloatType):
            return round_float(x / scale, kind, saturate=self.saturates, rounding=self.rounding)
        zero = self._along(self.zero_points, x.ndim, np.float32)
        q = round_integer(x / scale, self.rounding) + zero
        return np.clip(q, self.low, self.high).astype(np.int32)

    def dequantize(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """The float32 values that stored numbers stand for. Raises `ValueError` for a dynamic
        quantizer, whose scales are not known."""
        if self.is_dynamic:
            raise ValueError("scales of a dynamic quantizer lie in the tensor itself")
        zero = self._along(self.zero_points, stored.ndim, stored.dtype)
        return (stored - zero).astype(np.float32) * self._scale(stored)

    def applied(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """The float tensor as it is after storing: quantized and dequantized."""
        stored = self.quantize(values)
        if self.is_dynamic:
            x = values.astype(np.float32, copy=False)
            return stored.astype(np.float32) * self.token_scales(x)
        return self.dequantize(stored)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object. What most quantizers do not have is left out where it is absent."""
        extra: dict[str, Any] = {
            "storage": self.storage,
            "blocks": None if self.blocks is None else self.blocks.to_json(),
            "token_length": self.token_length,
            "saturates": self.saturates,
            "rounding": self.rounding if self.rounding != "half_even" else None,
            "cuts": [list(cut) for cut in self.cuts],
        }
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
            **{key: value for key, value in extra.items() if value},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Quantizer:
        """From `to_json`."""
        low, high = value["bounds"]
        blocks = value.get("blocks")
        return cls(
            **{
                **value,
                "scales": tuple(value["scales"]),
                "zero_points": tuple(value["zero_points"]),
                "bounds": (low, high),
                "blocks": None if blocks is None else BlockScales.from_json(blocks),
                "cuts": tuple((m, n, shift) for m, n, shift in value.get("cuts", ())),
            }
        )


def rounding_to(kind: FloatType, *, saturates: bool) -> Quantizer:
    """The quantizer that rounds to a floating-point type, without a scale."""
    return Quantizer(
        bits=kind.bits,
        low=0,
        high=0,
        scales=(1.0,),
        zero_points=(0,),
        axis=None,
        method="rounding",
        bounds=(-kind.largest, kind.largest),
        storage=kind.name,
        saturates=saturates,
    )
