"""Samples of different lengths: padding cut off, or made up to a few lengths.

A model that takes a mask says with it which positions of a sample are padding. Where the model's
sequence axis is dynamic, `Trimmed` cuts them off, so that they never run: the statistics are those
of samples that were never padded. `Bucketed` pads samples up to one of a few lengths, so that
several of them can run together; what it added is left out when counting, see
`qdist.data.positions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.source import DataSource, Feeds
from qdist.data.stored import unreadable
from qdist.errors import ConfigError, DataError

SequenceAxes = Mapping[str, tuple[int, ...]]
"""Model input -> its sequence axes, counted from the end (-1 is the last), so that they hold for
arrays with and without the batch axis."""


def sequence_axes(
    specs: Sequence[InputSpec], mask_input: str, sample: Feeds, *, fixed: bool = False
) -> dict[str, tuple[int, ...]]:
    """The sequence axes of the inputs in ``sample`` (and of the mask), as the model declares them.

    The mask is [batch, sequence]. Another input's axis is a sequence axis when its dimension has
    the mask's name, or, where names do not tell, when the input too is [batch, sequence] and as
    long as the mask. An axis of fixed size is none, unless with ``fixed`` the mask's is fixed too:
    then the one axis of that size is.

    Raises QD307 where the model has no such input, and QD303 for a mask of other axes, a sequence
    of fixed length without ``fixed`` (a sample has to stay padded then), and an axis that is as
    long as the mask without anything that tells whether it is the sequence.
    """
    by_name = {spec.name: spec for spec in specs}
    mask = by_name.get(mask_input)
    if mask is None:
        raise DataError(
            "QD307",
            where="mask_input",
            got=mask_input,
            expected=f"an input of the model: {', '.join(by_name)}",
            mend="name the input that says which positions are padding",
        )
    if mask.shape is None or len(mask.shape) != 2:
        raise _shape_error(
            f"mask_input {mask_input}",
            f"shape {mask.shape}",
            "a mask with two axes, [batch, sequence]",
            "name another input, or give samples without padding",
        )
    symbol = mask.shape[1]
    if isinstance(symbol, int) and not fixed:
        raise _shape_error(
            f"mask_input {mask_input}",
            f"a sequence of fixed length {symbol}",
            "a dynamic sequence axis",
            "export the model with one, or leave the samples padded: what is padding is not "
            "counted then",
        )
    lengths = {array.shape[-1] for name, array in sample.items() if name == mask_input}
    found: dict[str, tuple[int, ...]] = {mask_input: (-1,)}
    for name, array in sample.items():
        spec = by_name.get(name)
        if spec is None or spec.shape is None or name == mask_input:
            continue
        axes = _axes_of(spec, symbol, array, lengths)
        if axes:
            found[name] = axes
    return found


def _axes_of(
    spec: InputSpec, symbol: int | str | None, array: NDArray[Any], lengths: set[int]
) -> tuple[int, ...]:
    dims = spec.shape or ()
    named = tuple(axis - len(dims) for axis in range(1, len(dims)) if dims[axis] == symbol)
    if isinstance(symbol, str) and named:
        return named
    if isinstance(symbol, int):
        if len(named) == 1:
            return named
        if named:
            raise _which_axis(spec.name, f"{len(named)} axes of size {symbol}, the mask's")
        return ()
    open_axes = [
        axis - len(dims)
        for axis in range(1, len(dims))
        if not isinstance(dims[axis], int) and -(axis - len(dims)) <= array.ndim
    ]
    alike = [axis for axis in open_axes if array.shape[axis] in lengths]
    if alike == [-1] and len(dims) == 2:
        return (-1,)
    if alike:
        raise _which_axis(
            f"{spec.name}, dimension {dims[alike[0]] or alike[0]}",
            f"size {array.shape[alike[0]]}, the mask's length, under another name",
        )
    return ()


def _which_axis(where: str, got: str) -> DataError:
    return _shape_error(
        f"input {where}",
        got,
        "one dimension, named as the mask's is",
        "say which axes are the sequence with data.calibration.sequence_axes={INPUT: [AXIS]}",
    )


@dataclass(frozen=True, kw_only=True)
class Trimmed:
    """The samples of ``source`` without the padding at their beginning and end.

    ``mask_input``  the input whose zeros say what is padding: [sequence], or [n, sequence] in
                    samples that carry their own batch axis, whose rows are cut alike.
    ``axes``        which axes of which inputs are cut; see `sequence_axes`.

    Zeros between ones stay. Where a model counts positions for itself, cutting leading padding
    moves them: give such models position inputs, which are cut like the tokens.

    Raises QD303 (an input's sequence is not as long as the mask), QD306 (a mask without a one),
    QD307 (no mask in the sample).
    """

    source: DataSource
    mask_input: str
    axes: SequenceAxes

    def keys(self) -> list[str]:
        """The source's."""
        return self.source.keys()

    def content_digest(self, key: str) -> str:
        """The source's."""
        return self.source.content_digest(key)

    def preprocessing(self) -> dict[str, Any]:
        """The source's, and what is cut."""
        return {
            "kind": "trimmed",
            "mask": self.mask_input,
            "axes": {name: list(axes) for name, axes in sorted(self.axes.items())},
            "source": self.source.preprocessing(),
        }

    def load(self, key: str) -> Feeds:
        """The arrays from the first to the last position that is no padding."""
        feeds = self.source.load(key)
        mask = _mask_of(feeds, self.mask_input, key)
        used = np.flatnonzero(mask.reshape(-1, mask.shape[-1]).any(axis=0))
        if not len(used):
            raise unreadable(
                f"sample {key}, input {self.mask_input}",
                "a mask of zeros alone",
                "a position that is no padding",
                "remove the sample",
            )
        kept = slice(int(used[0]), int(used[-1]) + 1)
        for name, axes in self.axes.items():
            if name not in feeds:
                continue
            _check_length(key, name, feeds[name], axes, mask.shape[-1])
            for axis in axes:
                feeds[name] = _along(feeds[name], axis, kept)
        return feeds

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The source's, uncut."""
        return self.source.label(key)


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """The samples of ``source``, each padded to the smallest of ``lengths`` that holds it.

    ``mask_input``  padded with zeros; made of ones, as ``mask_dtype``, where samples lack it.
    ``axes``        which axes of which inputs are padded; see `sequence_axes`.
    ``pad_values``  what each input but the mask is padded with.
    ``side``        where padding goes.

    Raises QD104 (lengths that are not ascending), QD105 (no pad value for an input), QD303 (a
    sample that no length holds, inputs of different lengths).
    """

    source: DataSource
    mask_input: str
    lengths: tuple[int, ...]
    axes: SequenceAxes
    pad_values: Mapping[str, float] = field(default_factory=dict)
    mask_dtype: str = "int64"
    side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        ascending = list(self.lengths) == sorted(set(self.lengths))
        if not self.lengths or self.lengths[0] < 1 or not ascending:
            raise ConfigError(
                "QD104",
                where="length_buckets",
                got=str(list(self.lengths)),
                expected="lengths of at least 1 in ascending order",
                mend="sort them and remove repeated ones",
            )
        missing = sorted(set(self.axes) - set(self.pad_values) - {self.mask_input})
        if missing:
            raise ConfigError(
                "QD105",
                where="pad_values",
                got=f"none for {', '.join(missing)}",
                expected="a value for every input with a sequence axis",
                mend=f"set data.calibration.pad_values={{{missing[0]}: VALUE}}",
            )

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes by construction."""
        return len(self.lengths) == 1

    def keys(self) -> list[str]:
        """The source's."""
        return self.source.keys()

    def content_digest(self, key: str) -> str:
        """The source's."""
        return self.source.content_digest(key)

    def preprocessing(self) -> dict[str, Any]:
        """The source's, and how samples are padded."""
        return {
            "kind": "bucketed",
            "mask": [self.mask_input, self.mask_dtype],
            "lengths": list(self.lengths),
            "axes": {name: list(axes) for name, axes in sorted(self.axes.items())},
            "pad_values": dict(sorted(self.pad_values.items())),
            "side": self.side,
            "source": self.source.preprocessing(),
        }

    def load(self, key: str) -> Feeds:
        """The padded arrays."""
        feeds = self.source.load(key)
        if self.mask_input not in feeds:
            feeds[self.mask_input] = self._ones(feeds, key)
        length = _mask_of(feeds, self.mask_input, key).shape[-1]
        fitting = [bucket for bucket in self.lengths if bucket >= length]
        if not fitting:
            raise _shape_error(
                f"sample {key}",
                f"length {length}",
                f"at most {self.lengths[-1]}, the longest of the length buckets",
                f"add a length to data.calibration.length_buckets, or leave the sample out with "
                f"data.calibration.exclude=[{key}]",
            )
        n_added = fitting[0] - length
        for name, axes in self.axes.items():
            if name not in feeds:
                continue
            _check_length(key, name, feeds[name], axes, length)
            widths = [(0, 0)] * feeds[name].ndim
            for axis in axes:
                widths[axis] = (0, n_added) if self.side == "right" else (n_added, 0)
            value = 0 if name == self.mask_input else self.pad_values[name]
            feeds[name] = np.pad(feeds[name], widths, constant_values=value)
        return feeds

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The source's, not padded."""
        return self.source.label(key)

    def _ones(self, feeds: Feeds, key: str) -> NDArray[Any]:
        for name, axes in self.axes.items():
            if name in feeds:
                array = feeds[name]
                # A sample with its own batch axis gets a mask with one.
                own = array.shape[:1] if array.ndim + min(axes) > 0 else ()
                return np.ones((*own, array.shape[axes[0]]), self.mask_dtype)
        raise DataError(
            "QD307",
            where=f"sample {key}",
            got=f"neither {self.mask_input} nor an input with a sequence axis",
            expected=f"one of {', '.join(self.axes)}",
            mend="name the sequence axes with data.calibration.sequence_axes={INPUT: [AXIS]}",
        )


def _mask_of(feeds: Feeds, name: str, key: str) -> NDArray[np.bool_]:
    """Where the mask is not zero: [sequence] or [n, sequence]. Raises QD303, QD307."""
    if name not in feeds:
        raise DataError(
            "QD307",
            where=f"sample {key}",
            got=f"no array for the mask {name}",
            expected=f"{name} beside {', '.join(feeds)}",
            mend="give the mask with every sample, or leave out mask_input",
        )
    mask = feeds[name]
    if mask.ndim not in (1, 2):
        raise _shape_error(
            f"sample {key}, input {name}",
            f"shape {list(mask.shape)}",
            "a mask [sequence], or [n, sequence]",
            "give one number per position",
        )
    return mask != 0


def _check_length(
    key: str, name: str, array: NDArray[Any], axes: tuple[int, ...], length: int
) -> None:
    for axis in axes:
        if -axis > array.ndim or array.shape[axis] != length:
            raise _shape_error(
                f"sample {key}, input {name}",
                f"shape {list(array.shape)}",
                f"{length} along axis {axis}, as the mask has",
                "give inputs of one length",
            )


def _along(array: NDArray[Any], axis: int, kept: slice) -> NDArray[Any]:
    """Those positions of a negative ``axis``, as an array of its own."""
    index: list[slice] = [slice(None)] * array.ndim
    index[axis] = kept
    return np.ascontiguousarray(array[tuple(index)])


def _shape_error(where: str, got: str, expected: str, mend: str) -> DataError:
    return DataError("QD303", where=where, got=got, expected=expected, mend=mend)
