"""Does a sample fit the model? With the error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.errors import DataError

Dim = int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One model input: NumPy dtype name, and shape with the batch axis first.

    A dimension that is a name or None matches any size. ``shape`` None: the model does not say how
    many axes the input has, and arrays of any shape fit it.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


def check_sample(key: str, feeds: Feeds, specs: Sequence[InputSpec]) -> None:
    """Raises QD307 (inputs missing or unknown), QD303 (shape), QD304 (dtype), QD305 (NaN or
    infinity) for the sample ``key``.

    An array with as many axes as the model input has carries its own batch axis; one with an axis
    less is without it. All inputs of a sample have to agree on that.
    """
    _check_names(key, feeds, specs)
    for spec in specs:
        array = feeds[spec.name]
        _check_shape(key, array, spec)
        _check_dtype(key, array, spec)
        _check_finite(key, array, spec)
    stackable(feeds, specs)


def stackable(feeds: Feeds, specs: Sequence[InputSpec]) -> bool:
    """Whether the sample's arrays lack the batch axis, so that several can be stacked.

    An input of unknown rank goes with the others. Where all are of unknown rank nothing tells, and
    they count as without the axis, which is how every source gives them unless its user adds it.
    Raises QD303 where some lack it and others do not.
    """
    ranked = {spec.name: len(spec.shape) for spec in specs if spec.shape is not None}
    if specs and not ranked:
        return True
    lacking = [name for name, rank in ranked.items() if feeds[name].ndim == rank - 1]
    carrying = [name for name, rank in ranked.items() if feeds[name].ndim == rank]
    if lacking and carrying:
        raise DataError(
            "QD303",
            where="sample",
            got=f"inputs with the batch axis ({', '.join(carrying)}) and inputs without it "
            f"({', '.join(lacking)})",
            expected="all inputs of a sample with the batch axis, or all without",
            mend="add a leading axis of length 1 to the inputs without it",
        )
    return bool(lacking)


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model insists on, or None where its inputs name none.

    For samples that lack the batch axis: the micro-batch size has to be this one. Raises QD303
    where the inputs insist on different ones.
    """
    leading = (spec.shape[0] for spec in specs if spec.shape)
    sizes = sorted({size for size in leading if isinstance(size, int)})
    if len(sizes) > 1:
        raise DataError(
            "QD303",
            where="model inputs",
            got=f"leading dimensions {sizes}",
            expected="one batch size for all inputs",
            mend="give samples that carry their own batch axis in every input",
        )
    return sizes[0] if sizes else None


def _check_names(key: str, feeds: Feeds, specs: Sequence[InputSpec]) -> None:
    wanted = [spec.name for spec in specs]
    missing = [name for name in wanted if name not in feeds]
    extra = [name for name in feeds if name not in wanted]
    if not missing and not extra:
        return
    got = [f"missing {', '.join(missing)}"] if missing else []
    got += [f"not an input of the model: {', '.join(extra)}"] if extra else []
    raise DataError(
        "QD307",
        where=f"sample {key}",
        got="; ".join(got),
        expected=f"exactly the model's inputs: {', '.join(wanted)}",
        mend="name the inputs as the model does, in data.calibration",
    )


def _check_shape(key: str, array: NDArray[Any], spec: InputSpec) -> None:
    if spec.shape is None:
        return
    whole, inner = spec.shape, spec.shape[1:]
    if array.ndim == len(whole):
        fits = _matches(array.shape, whole)
    else:
        fits = bool(whole) and array.ndim == len(inner) and _matches(array.shape, inner)
    if fits:
        return
    expected = f"{_text(whole)} with the batch axis"
    expected += f", or {_text(inner)} without" if whole else ""
    raise DataError(
        "QD303",
        where=f"sample {key}, input {spec.name}",
        got=f"shape {list(array.shape)}",
        expected=expected,
        mend="change resize, crop, layout or transpose in data.calibration",
    )


def _check_dtype(key: str, array: NDArray[Any], spec: InputSpec) -> None:
    wanted = _dtype_name(spec.dtype)
    if array.dtype.name == wanted and array.dtype.isnative:
        return
    raise DataError(
        "QD304",
        where=f"sample {key}, input {spec.name}",
        got=array.dtype.name if array.dtype.isnative else f"{array.dtype} (foreign byte order)",
        expected=wanted,
        mend=f"set data.calibration.preprocess.dtype={wanted}",
    )


def _check_finite(key: str, array: NDArray[Any], spec: InputSpec) -> None:
    # The small floats of ml_dtypes have kind "V", but names and `isfinite` like the others.
    if array.dtype.kind not in "fc" and "float" not in array.dtype.name:
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    bad = np.argwhere(~finite)
    first = [int(index) for index in bad[0]]
    raise DataError(
        "QD305",
        where=f"sample {key}, input {spec.name}",
        got=f"{len(bad)} of {array.size} values, the first {array[tuple(first)]} at index {first}",
        expected="finite numbers",
        mend="remove or repair the sample, or check mean, std and scale",
    )


def _matches(shape: tuple[int, ...], dims: tuple[Dim, ...]) -> bool:
    return all(
        size == dim or not isinstance(dim, int) for size, dim in zip(shape, dims, strict=True)
    )


def _text(dims: tuple[Dim, ...]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in dims) + "]"


def _dtype_name(dtype: str) -> str:
    """Canonical name: "<f4" and "float32" are one; types beyond NumPy keep theirs."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype
