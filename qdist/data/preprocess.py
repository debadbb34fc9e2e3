"""What turns stored values into model inputs: scale, mean, standard deviation, axes, dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import ConfigError, DataError

_DTYPES = (
    "keep",
    *("float16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """``(x * scale - mean) / std``, computed in float32, after an optional transposition.

    ``scale``         multiplied first, so that mean and std are in scaled units.
    ``mean``, ``std`` per channel, or a single value for all; empty means 0 and 1.
    ``channel_axis``  axis of the sample (without batch axis, after ``transpose``) that per-channel
                      values run along.
    ``transpose``     order of the sample's axes, applied first: (2, 0, 1) turns HWC into CHW.
    ``dtype``         of the result; "keep" leaves the array as it is stored.

    Raises QD104 on values that are not finite or a std that is not positive or an unknown dtype,
    QD107 on mean and std of different lengths and on arithmetic whose result is not a float.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channel_axis: int = 0
    transpose: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.dtype not in _DTYPES:
            raise _out_of_range("dtype", repr(self.dtype), "one of " + ", ".join(_DTYPES))
        if sorted(self.transpose) != list(range(len(self.transpose))):
            raise _out_of_range(
                "transpose", str(list(self.transpose)), "every axis of the sample once, from 0"
            )
        if len(self.mean) > 1 and len(self.std) > 1 and len(self.mean) != len(self.std):
            raise ConfigError(
                "QD107",
                where="preprocess.mean and preprocess.std",
                got=f"{len(self.mean)} means and {len(self.std)} standard deviations",
                expected="as many of each as the sample has channels, or a single one",
                mend="give both settings the same number of values",
            )
        if self.has_arithmetic and not self.dtype.startswith("float"):
            raise ConfigError(
                "QD107",
                where="preprocess.dtype",
                got=f"{self.dtype} together with scale, mean or std",
                expected="a float dtype, since the result of the arithmetic is a float",
                mend="set preprocess.dtype=float32, or remove scale, mean and std",
            )

    def _check_numbers(self) -> None:
        for name, values in (("scale", (self.scale,)), ("mean", self.mean), ("std", self.std)):
            if not all(math.isfinite(value) for value in values):
                raise _out_of_range(name, str(values), "finite numbers")
        if any(value <= 0 for value in self.std):
            raise _out_of_range("std", str(list(self.std)), "numbers above 0")

    @property
    def has_arithmetic(self) -> bool:
        """Whether the values change, rather than at most their dtype and axes."""
        return self.scale != 1.0 or bool(self.mean) or bool(self.std)

    def as_json(self) -> dict[str, Any]:
        """Every setting as JSON; part of a sample's identity."""
        return {
            "scale": float(self.scale),
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "channel_axis": self.channel_axis,
            "transpose": list(self.transpose),
            "dtype": self.dtype,
        }

    def apply(self, array: NDArray[Any], *, where: str) -> NDArray[Any]:
        """The model input made from one stored sample.

        ``where`` names the sample in errors. Raises QD303 where the axes or the number of channels
        do not fit, QD304 where the stored values are not numbers or ``dtype`` cannot hold them.
        """
        if array.dtype.kind not in "biuf":
            raise DataError(
                "QD304",
                where=where,
                got=f"dtype {array.dtype}",
                expected="an array of booleans, integers or floats",
                mend="store the sample as numbers",
            )
        result = self._transposed(array, where)
        if self.has_arithmetic:
            result = self._normalised(result.astype(np.float32), where)
        return self._cast(result, where)

    def _transposed(self, array: NDArray[Any], where: str) -> NDArray[Any]:
        if not self.transpose:
            return array
        if len(self.transpose) != array.ndim:
            raise DataError(
                "QD303",
                where=where,
                got=f"shape {list(array.shape)}",
                expected=f"{len(self.transpose)} axes, as in preprocess.transpose="
                f"{list(self.transpose)}",
                mend="give preprocess.transpose one entry per axis of the stored sample",
            )
        return np.ascontiguousarray(array.transpose(self.transpose))

    def _normalised(self, values: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        """float32 in, float32 out, same shape."""
        values = values * np.float32(self.scale)
        if self.mean:
            values = values - self._per_channel("mean", self.mean, values, where)
        if self.std:
            values = values / self._per_channel("std", self.std, values, where)
        return values

    def _per_channel(
        self, name: str, numbers: tuple[float, ...], values: NDArray[Any], where: str
    ) -> NDArray[np.float32]:
        """``numbers`` in a shape that broadcasts against ``values``."""
        if len(numbers) == 1:
            return np.asarray(numbers[0], np.float32)
        axis = self.channel_axis
        has_axis = -values.ndim <= axis < values.ndim
        if not has_axis or values.shape[axis] != len(numbers):
            raise DataError(
                "QD303",
                where=where,
                got=f"shape {list(values.shape)} with channel axis {axis}",
                expected=f"{len(numbers)} channels, as preprocess.{name} has values",
                mend="set preprocess.channel_axis, or give one value per channel",
            )
        shape = [1] * values.ndim
        shape[axis] = len(numbers)
        return np.asarray(numbers, np.float32).reshape(shape)

    def _cast(self, array: NDArray[Any], where: str) -> NDArray[Any]:
        if self.dtype == "keep" or array.dtype == np.dtype(self.dtype):
            return array
        with np.errstate(invalid="ignore", over="ignore"):
            cast = array.astype(self.dtype)
        # A float result may round; an integer result that differs has lost what was stored.
        if cast.dtype.kind in "biu" and not np.array_equal(cast, array):
            raise DataError(
                "QD304",
                where=where,
                got=f"{array.dtype} values that {self.dtype} cannot hold exactly",
                expected=f"values that survive the cast to {self.dtype}",
                mend="set preprocess.dtype to the type that the values have",
            )
        return cast


def _out_of_range(name: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD104",
        where=f"preprocess.{name}",
        got=got,
        expected=expected,
        mend=f"change preprocess.{name}",
    )
