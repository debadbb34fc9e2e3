"""Which elements of an activation belong to positions that are no padding.

A model whose sequence has a fixed length runs padded positions too. They are found in every tensor
by its shape, and left out when counting.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, numpy_helper

from qdist.errors import DataError

Dims = Sequence[int | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDims:
    """How the model names the two axes of its mask, and which sizes other axes are known to have.

    ``batch``, ``sequence``  the declared dimension: a name, a number, or None.
    ``widths``               sizes of axes that are no sequence; see `feature_widths`.
    """

    batch: int | str | None = None
    sequence: int | str | None = None
    widths: frozenset[int] = frozenset()


def kept_positions(
    mask: NDArray[np.bool_],
    shape: tuple[int, ...],
    *,
    tensor: str,
    dims: Dims | None = None,
    names: MaskDims | None = None,
    axes: Sequence[int] | None = None,
) -> NDArray[np.bool_] | None:
    """Which elements of a tensor count: bool, of as many axes as ``shape``, broadcastable to it.

    None: all of them, as the mask has no zero or the tensor no sequence axis.

    ``mask``    bool [B, S]: false where a position is padding.
    ``shape``   of the tensor ``tensor`` in this run; ``dims`` its declared dimensions, if known.
    ``names``   what the model says of the mask's axes.
    ``axes``    the tensor's sequence axes, from a user who knows; () for none.

    [B, S, D] keeps the rows of positions that are no padding; where several axes are the sequence,
    as in attention scores [B, H, S, S], an element counts when it is no padding along any of them.
    Batch and sequence may be one axis: [B * S, D], and batch and heads: [B * H, S, S]. In a tensor
    without a batch axis, a position counts that is no padding in some row.

    An axis is the sequence when its declared dimension has the sequence's name. Where names do not
    tell (another name, none, or a fixed length), it is when its size is S. Raises QD303 with the
    tensor's name where size alone would tell and a width or the batch has the same size.
    """
    names = names or MaskDims()
    if bool(mask.all()):
        return None
    n_rows, length = mask.shape
    if axes is not None:
        found = tuple(axis % len(shape) for axis in axes)
    else:
        found = _sequence_axes(tensor, shape, dims, names, n_rows, length)
    if not found:
        return _flattened(mask, shape, dims, names, tensor) if axes is None else None
    rows = _rows_along(shape, dims, names, found, n_rows, tensor)
    return functools.reduce(np.logical_and, (_placed(mask, shape, rows, axis) for axis in found))


def feature_widths(graph: GraphProto) -> frozenset[int]:
    """Sizes that axes of activations have without being the sequence, as far as weights tell.

    Sizes of the weights' axes, and of constant shapes (small integer vectors) their last entry and
    every entry that occurs twice.
    """
    found: set[int] = set()
    for weight in graph.initializer:
        if weight.data_type == TensorProto.INT64 and len(weight.dims) <= 1:
            if weight.dims and weight.dims[0] <= 8 and not weight.external_data:
                found.update(_repeated(numpy_helper.to_array(weight).tolist()))
        else:
            found.update(int(size) for size in weight.dims)
    return frozenset(found - {0, 1, -1})


def _repeated(shape: list[int]) -> Iterable[int]:
    return {size for i, size in enumerate(shape) if size in shape[:i]} | set(shape[-1:])


def _sequence_axes(
    tensor: str,
    shape: tuple[int, ...],
    dims: Dims | None,
    names: MaskDims,
    n_rows: int,
    length: int,
) -> tuple[int, ...]:
    sized = [axis for axis, size in enumerate(shape) if size == length]
    if dims is None or len(dims) != len(shape):
        dims = (None,) * len(shape)
    named, open_axes = [], []
    for axis in sized:
        dim = dims[axis]
        if isinstance(names.sequence, str) and dim == names.sequence:
            named.append(axis)
        elif isinstance(dim, str) and dim == names.batch:
            continue
        elif isinstance(dim, int) and not isinstance(names.sequence, int):
            continue  # an axis of fixed size in a model whose sequence is dynamic
        else:
            open_axes.append(axis)
    if open_axes and length in names.widths:
        raise _ambiguous(tensor, shape, dims, f"a width of the model is {length} too")
    if open_axes and n_rows > 1 and n_rows == length:
        raise _ambiguous(tensor, shape, dims, f"the batch is {length} too")
    return tuple(sorted([*named, *open_axes]))


def _rows_along(
    shape: tuple[int, ...],
    dims: Dims | None,
    names: MaskDims,
    taken: Collection[int],
    n_rows: int,
    tensor: str,
) -> int | None:
    """The batch axis (its size a multiple of ``n_rows``), or None where the tensor has none."""
    if n_rows == 1:
        return None
    if dims is not None and isinstance(names.batch, str):
        for axis, dim in enumerate(dims):
            if dim == names.batch and axis not in taken and shape[axis] == n_rows:
                return axis
    if 0 not in taken:
        # A fixed size in a model whose batch is dynamic: a tensor without a batch axis.
        fixed = dims is not None and isinstance(dims[0], int) and isinstance(names.batch, str)
        if shape[0] == 1 or fixed:
            return None
        # A multiple: [B * H, S, S], with the heads of one sample side by side.
        if shape[0] % n_rows == 0:
            return 0
        raise _ambiguous(tensor, shape, dims, f"no axis is the batch of {n_rows}")
    others = [axis for axis in range(1, len(shape)) if axis not in taken and shape[axis] == n_rows]
    if others and n_rows in names.widths:
        raise _ambiguous(tensor, shape, dims, f"a width of the model is the batch, {n_rows}, too")
    return others[0] if others else None


def _placed(
    mask: NDArray[np.bool_], shape: tuple[int, ...], rows: int | None, axis: int
) -> NDArray[np.bool_]:
    """The mask along ``axis`` and, where there is one, the batch axis ``rows``."""
    target = [1] * len(shape)
    target[axis] = mask.shape[1]
    if rows is None:
        any_row: NDArray[np.bool_] = np.logical_or.reduce(mask, axis=0)
        return any_row.reshape(target)
    repeated = np.repeat(mask, shape[rows] // mask.shape[0], axis=0)
    target[rows] = shape[rows]
    return (repeated if rows < axis else repeated.T).reshape(target)


def _flattened(
    mask: NDArray[np.bool_],
    shape: tuple[int, ...],
    dims: Dims | None,
    names: MaskDims,
    tensor: str,
) -> NDArray[np.bool_] | None:
    """For a leading axis that is batch and sequence together."""
    if not shape or mask.shape[0] == 1 or shape[0] != mask.size:
        return None
    if dims is not None and isinstance(dims[0], int) and not isinstance(names.sequence, int):
        return None
    if mask.size in names.widths:
        raise _ambiguous(tensor, shape, dims, f"a width of the model is {mask.size} too")
    return mask.reshape(-1, *(1,) * (len(shape) - 1))


def _ambiguous(tensor: str, shape: tuple[int, ...], dims: Dims | None, why: str) -> DataError:
    return DataError(
        "QD303",
        where=f"tensor {tensor}",
        got=f"shape {list(shape)}, declared as {list(dims) if dims else 'unknown'}, of which "
        f"the sequence axes cannot be told: {why}",
        expected="a sequence of a length of its own, or a sequence axis with a name",
        mend="say which axes are the sequence with calibration.sequence_axes={TENSOR: [AXIS]} "
        "([] for none), or export the model with a dynamic sequence axis",
    )
