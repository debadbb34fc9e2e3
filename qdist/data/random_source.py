"""Random samples, made from nothing but the shapes of the model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.source import Feeds
from qdist.data.stored import unreadable
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError

RANDOM_WARNING = (
    "WARNING: the calibration samples are RANDOM numbers. Ranges measured with them say nothing "
    "about real inputs, so neither do thresholds and accuracy. Use them to try a model out, and "
    "calibrate with real samples before anything is deployed."
)
"""What is printed, and noted in the report, wherever a `RandomSource` is used."""


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """``n_samples`` random samples for a model with these ``inputs``. Gives `RANDOM_WARNING`.

    ``distribution``  of float inputs: "uniform" over [0, 1), or "normal" with mean 0 and
                      standard deviation 1.
    ``ranges``        integer input -> (lowest, past the highest); bool inputs need none.
    ``sizes``         name of a symbolic dimension -> its size. One without a name is
                      ``INPUT.AXIS``, counted with the batch axis. The batch axis needs none.
    ``seed``          the same seed gives the same samples.

    Raises QD104 (settings out of range or for what the model does not have), QD105 (no range for
    an integer input), QD303 (a dimension or rank that is not known), QD304 (complex numbers).
    """

    inputs: tuple[InputSpec, ...]
    n_samples: int = 32
    distribution: Literal["uniform", "normal"] = "uniform"
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.seed < 0 or self.distribution not in ("uniform", "normal"):
            raise _setting(
                "random samples",
                f"n_samples={self.n_samples}, seed={self.seed}, distribution={self.distribution}",
                "at least 1 sample, a seed from 0, and uniform or normal",
            )
        used: set[str] = set()
        for spec in self.inputs:
            self._check_type(spec)
            used.update(name for name, _ in self._named_dims(spec))
            self._shape(spec)
        unknown = sorted(set(self.sizes) - used)
        if unknown:
            known = ", ".join(sorted(used)) or "none: all are numbers"
            raise _setting("sizes", f"sizes of {', '.join(unknown)}", f"dimensions among {known}")
        strangers = sorted(set(self.ranges) - {spec.name for spec in self.inputs})
        if strangers:
            known = ", ".join(spec.name for spec in self.inputs)
            raise _setting("ranges", f"ranges of {', '.join(strangers)}", f"inputs among {known}")

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes by construction: yes."""
        return True

    def keys(self) -> list[str]:
        """The sample's number as six or more digits."""
        return [f"{index:06d}" for index in range(self.n_samples)]

    def content_digest(self, key: str) -> str:
        """Over the arrays."""
        return digest_arrays(self.load(key).items())

    def preprocessing(self) -> dict[str, Any]:
        """Nothing is done to the arrays after they were drawn."""
        return {"kind": "random"}

    def load(self, key: str) -> Feeds:
        """The arrays of one sample: the same for the same key, settings and seed."""
        if not key.isdecimal() or int(key) >= self.n_samples:
            raise unreadable(
                "random samples",
                f"no sample {key!r}",
                f"a number below {self.n_samples}",
                "look the sample up by a key of this data set",
            )
        feeds: Feeds = {}
        for place, spec in enumerate(self.inputs):
            draw = np.random.Generator(np.random.PCG64([self.seed, int(key), place]))
            feeds[spec.name] = self._draw(spec, draw)
        return feeds

    def label(self, key: str) -> NDArray[np.int64] | None:
        """None."""
        return None

    def _draw(self, spec: InputSpec, draw: np.random.Generator) -> NDArray[Any]:
        dtype, shape = np.dtype(spec.dtype), self._shape(spec)
        if dtype.kind == "b":
            return draw.integers(0, 2, shape).astype(bool)
        if dtype.kind in "iu":
            low, high = self.ranges[spec.name]
            return draw.integers(low, high, shape, dtype=dtype)
        if self.distribution == "normal":
            return draw.standard_normal(shape).astype(dtype)
        # As many steps as the type has below 1, so that rounding never reaches 1.
        n_steps = 1 << _MANTISSA_BITS.get(dtype.name, 8)
        return (draw.integers(0, n_steps, shape) / n_steps).astype(dtype)

    def _check_type(self, spec: InputSpec) -> None:
        dtype = np.dtype(spec.dtype)
        if dtype.kind in "iu" and spec.name not in self.ranges:
            raise ConfigError(
                "QD105",
                where=f"ranges, input {spec.name}",
                got=f"no range for {spec.dtype}",
                expected="the lowest number, and the first above the highest",
                mend=f"set data.calibration.ranges={{{spec.name}: [0, 1000]}}, with the sizes of "
                "your vocabulary or classes",
            )
        if spec.name in self.ranges:
            low, high = self.ranges[spec.name]
            limits = np.iinfo(dtype) if dtype.kind in "iu" else None
            if limits is None or not limits.min <= low < high <= limits.max + 1:
                raise _setting(
                    f"ranges, input {spec.name}",
                    f"[{low}, {high}) for {spec.dtype}",
                    "an ascending range of an integer input, within its type",
                )
        if dtype.kind not in "biuf" and "float" not in dtype.name:
            raise DataError(
                "QD304",
                where=f"input {spec.name}",
                got=f"dtype {spec.dtype}",
                expected="floats, integers or bool",
                mend="give real samples",
            )

    def _named_dims(self, spec: InputSpec) -> Iterator[tuple[str, int]]:
        """Name and axis of the dimensions that need a size."""
        first = 0 if self._own_batch else 1
        for axis, dim in enumerate(spec.shape or ()):
            if axis >= first and not isinstance(dim, int):
                yield dim or f"{spec.name}.{axis}", axis

    @property
    def _own_batch(self) -> bool:
        """Whether samples carry their own batch axis: inputs without one, or of different ones."""
        leading = [spec.shape[0] if spec.shape else 0 for spec in self.inputs]
        return 0 in leading or len({size for size in leading if isinstance(size, int)}) > 1

    def _shape(self, spec: InputSpec) -> tuple[int, ...]:
        """Of one sample."""
        if spec.shape is None:
            raise _unknown(f"input {spec.name}", "an unknown number of axes", "give real samples")
        shape = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
        for name, axis in self._named_dims(spec):
            if name not in self.sizes:
                raise _unknown(
                    f"input {spec.name}, dimension {name}",
                    "no size",
                    f"set data.calibration.sizes={{{name}: SIZE}}",
                )
            if self.sizes[name] < 1:
                raise _setting(f"sizes, dimension {name}", str(self.sizes[name]), "at least 1")
            shape[axis] = self.sizes[name]
        return tuple(shape if self._own_batch else shape[1:])


_MANTISSA_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Bits of precision: multiples of 2**-bits in [0, 1) are exact."""


def _setting(where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD104", where=where, got=got, expected=expected, mend="change or remove the setting"
    )


def _unknown(where: str, got: str, mend: str) -> DataError:
    return DataError("QD303", where=where, got=got, expected="a size for every axis", mend=mend)
