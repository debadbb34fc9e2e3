"""Choosing the samples that stand for the whole set.

The aim: statistics merged over N chosen samples give the clipping ranges that all samples would.
Samples are taken one by one, each the one that brings the merged distribution of what is chosen
nearest to that of the whole set; then every choice is reconsidered once with the others fixed.
This is the greedy moment matching of kernel herding (M. Welling, "Herding dynamical weights to
learn", ICML 2009; Y. Chen, M. Welling, A. Smola, "Super-samples from kernel herding", UAI 2010)
under another distance. Herding's own, here the chi-square distance between bins, did no
better than random picks in ranges (docs/selection.md): a range hangs on the tail, whose bins it
either overlooks or drowns in noise. Two terms replace it, both averages over tensors:

* For both signs of a tensor, the first moment of the tail, E[(|x| - t)+], at the edges t of the
  sketches' bins where 1e-5 to one half of all values lie beyond. Every method's range is a
  function of this curve near the tail. Curves are compared by the squared difference of their
  logarithms: missing a tail costs far more than having a little too much of it, as it does in the
  error of a quantizer.
* The squared binary logarithm of max|x| of the chosen over that of all, over the number wanted:
  one extreme sample weighs less in a larger choice.

Constants were set on demo models and a keyword spotter and checked on others. Nothing is drawn at
random; of equal candidates the first by sample id is taken. One step costs O(samples x features).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qdist.data.stored import unreadable
from qdist.files import write_text

_LEAST_SHARE, _MOST_SHARE = 1e-5, 0.5
_TRACE = np.float32(0.05)
"""Added to both sides of a ratio, so that an empty tail costs 9, not infinity."""
_LEAST_RATIO = np.float32(1e-6)
_BLOCK = 1 << 17
"""Feature values that are worked on at a time, so that they stay in the cache."""
_HELD_BYTES = 1 << 30
"""Features larger than this lie in a temporary file."""

Rows = NDArray[np.float32]


class Sketched(Protocol):
    """Sketches of some samples, as `qdist.stats.sketch.SketchTable` describes them."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids."""

    @property
    def counts(self) -> NDArray[np.uint32]:
        """[n, tensors, 2, bins]."""

    @property
    def maxima(self) -> NDArray[np.float32]:
        """[n, tensors]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What samples are chosen by. Row i is sample ``ids[i]``; ids ascend.

    ``tails`` float32[n, features]: a sample's tail moments relative to the whole set's; merged
    over all samples they are 1. ``tensor_of`` int[features] and ``weights`` float32[features]:
    each feature's tensor and its share of the total, 1. ``sizes`` float32[n, tensors]: values in
    the sample's tensor relative to the mean over samples. ``reach`` float32[n, tensors]: max|x|
    relative to the whole set's, 0..1.
    """

    ids: tuple[str, ...]
    tails: Rows
    tensor_of: NDArray[np.intp]
    weights: Rows
    sizes: Rows
    reach: Rows

    @property
    def is_even(self) -> bool:
        """Whether all samples are of equal size in every tensor."""
        return bool((self.sizes == 1).all())


def features_of(
    tables: Callable[[], Iterable[Sketched]], ids: Iterable[str], edges: NDArray[np.float64]
) -> Features:
    """The features of the samples ``ids``.

    ``tables()`` gives sketches that cover them, in any order and division, the same each of the
    two times that it is called; other samples in them are passed over. ``edges`` float64[bins]:
    lower edges of the sketches' bins. Raises `ValueError` when a sample is missing.
    """
    ordered = tuple(sorted(set(ids)))
    row_of = {id: row for row, id in enumerate(ordered)}
    totals, top = _totals(tables(), row_of)
    n_tensors = len(totals)
    n_values = totals.sum(axis=(1, 2))
    whole = _tails(totals[np.newaxis], edges)[0] / np.maximum(n_values, 1)[:, None, None]
    beyond = _beyond(totals) / np.maximum(n_values, 1)[:, None, None]
    kept = (beyond > _LEAST_SHARE) & (beyond < _MOST_SHARE)
    kept[:, :, 0] = False
    of_side = kept.sum(axis=2)
    tensor_of, side_of, _ = np.nonzero(kept)
    weights = 1.0 / of_side[tensor_of, side_of]
    tails = _rows(len(ordered), len(tensor_of))
    sizes = np.zeros((len(ordered), n_tensors), np.float32)
    reach = np.zeros((len(ordered), n_tensors), np.float32)
    mean_size = np.maximum(n_values / len(ordered), 1e-30)
    scale = (whole * mean_size[:, None, None])[kept]
    for table in tables():
        rows, held = _places(table, row_of)
        counts = table.counts[held].astype(np.float64)
        tails[rows] = _tails(counts, edges)[:, kept] / scale
        sizes[rows] = np.where(n_values > 0, counts.sum(axis=(2, 3)) / mean_size, 1.0)
        reach[rows] = np.where(top > 0, table.maxima[held] / np.where(top > 0, top, 1), 1.0)
    return Features(
        ids=ordered,
        tails=tails,
        tensor_of=tensor_of,
        weights=(weights / max(weights.sum(), 1e-30)).astype(np.float32),
        sizes=sizes,
        reach=reach,
    )


def choose(features: Features, n: int) -> tuple[str, ...]:
    """The ids of ``n`` samples that stand for all of them, ascending; all when there are no more.

    Raises `ValueError` for ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"a choice of {n} samples")
    if n >= len(features.ids):
        return features.ids
    state = _State(features, n)
    chosen: list[int] = []
    for _ in range(n):
        chosen.append(int(np.argmin(state.costs())))
        state.take(chosen[-1])
    for place, row in enumerate(chosen):
        state.leave(row)
        # Itself among the candidates, so that the choice never gets worse.
        chosen[place] = int(np.argmin(state.costs()))
        state.take(chosen[place])
    return tuple(features.ids[row] for row in sorted(chosen))


def mismatch(features: Features, ids: Iterable[str]) -> float:
    """How far the samples ``ids`` are from the whole set, 0 for the set itself; what `choose`
    makes small. At least one sample."""
    row_of = {id: row for row, id in enumerate(features.ids)}
    rows = [row_of[id] for id in ids]
    state = _State(features, len(rows))
    for row in rows[:-1]:
        state.take(row)
    return float(state.costs_of(slice(rows[-1], rows[-1] + 1))[0])


def random_mismatch(features: Features, n: int, *, n_picks: int = 20) -> float:
    """The mean `mismatch` of ``n_picks`` random picks of ``n`` samples: what there was to gain."""
    ids = np.array(features.ids)
    picks = (np.random.default_rng(seed).choice(ids, n, replace=False) for seed in range(n_picks))
    return float(np.mean([mismatch(features, pick.tolist()) for pick in picks]))


def auto_name(origin: Path) -> str:
    """The name of the list of samples chosen from a list file, data file or folder.

    >>> auto_name(Path("data/images.txt")), auto_name(Path("data/photos"))
    ('images_auto.txt', 'photos_auto.txt')
    """
    known = {".txt", ".csv", ".lst", ".list", ".npz", ".npy", ".json", ".py"}
    stem = origin.stem if origin.suffix.lower() in known else origin.name
    return f"{stem or 'samples'}_auto.txt"


def write_list(path: Path, keys: Sequence[str]) -> Path:
    """Write keys, one a line, whole or not at all. Raises QD306 for a key that is no line, QD603.

    `qdist.data.subset.Listed` reads it; so does ``list_file`` where keys are images.
    """
    for key in keys:
        if len(key.splitlines()) != 1 or key != key.strip():
            raise unreadable(
                f"sample {key!r}",
                "a name with a line break, or white space at its ends",
                "names that can be lines of a list",
                "rename the sample",
            )
    return write_text(path, "".join(f"{key}\n" for key in keys))


class _State:
    """What is chosen so far, and what taking one more of the others would cost."""

    def __init__(self, features: Features, n_wanted: int) -> None:
        self._features = features
        self._is_even = features.is_even
        self._weight_of_reach = np.float32(1 / n_wanted)
        self._rows: list[int] = []
        self._tails = np.zeros(features.tails.shape[1], np.float64)
        self._sizes = np.zeros(features.sizes.shape[1], np.float64)

    def take(self, row: int) -> None:
        self._rows.append(row)
        self._tails += self._features.tails[row]
        self._sizes += self._features.sizes[row]

    def leave(self, row: int) -> None:
        self._rows.remove(row)
        self._tails -= self._features.tails[row]
        self._sizes -= self._features.sizes[row]

    def costs(self) -> NDArray[np.float32]:
        """The cost of the chosen with each sample added; infinite for those already chosen."""
        n = len(self._features.ids)
        costs = np.empty(n, np.float32)
        step = max(1, _BLOCK // max(1, self._features.tails.shape[1]))
        for start in range(0, n, step):
            costs[start : start + step] = self.costs_of(slice(start, start + step))
        costs[self._rows] = np.inf
        return costs

    def costs_of(self, part: slice) -> NDArray[np.float32]:
        """The cost with each of some samples added, whether chosen already or not."""
        return self._tail_costs(part) + self._weight_of_reach * self._reach_costs(part)

    def _tail_costs(self, part: slice) -> NDArray[np.float32]:
        given = self._features
        ratio = given.tails[part] + self._tails.astype(np.float32)
        if self._is_even:
            ratio *= np.float32(1 / (len(self._rows) + 1))
        else:
            sizes = given.sizes[part] + self._sizes.astype(np.float32)
            ratio /= np.maximum(sizes, np.float32(1e-30))[:, given.tensor_of]
        # A sum that a sample was taken from again can end a rounding below zero.
        np.maximum(ratio, 0, out=ratio)
        ratio += _TRACE
        ratio *= 1 / (1 + _TRACE)
        np.log(ratio, out=ratio)
        np.square(ratio, out=ratio)
        return np.asarray(ratio @ given.weights)

    def _reach_costs(self, part: slice) -> NDArray[np.float32]:
        reach = self._features.reach[part]
        if self._rows:
            reach = np.maximum(reach, self._features.reach[self._rows].max(axis=0))
        lacking = np.log2(np.maximum(reach, _LEAST_RATIO))
        return np.asarray(np.square(lacking).mean(axis=1))


def _totals(
    tables: Iterable[Sketched], row_of: Mapping[str, int]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Counts and maxima of the whole set. Sums of integers, so in any order the same."""
    counts: NDArray[np.float64] | None = None
    top: NDArray[np.float32] | None = None
    seen: set[str] = set()
    for table in tables:
        _, held = _places(table, row_of)
        fresh = [i for i in held if table.ids[i] not in seen]
        seen.update(table.ids[i] for i in fresh)
        if not fresh:
            continue
        added = table.counts[fresh].sum(axis=0, dtype=np.uint64).astype(np.float64)
        highest = table.maxima[fresh].max(axis=0)
        counts = added if counts is None else counts + added
        top = highest if top is None else np.maximum(top, highest)
    if counts is None or top is None or len(seen) != len(row_of):
        raise ValueError(f"sketches of {len(seen)} of {len(row_of)} samples")
    return counts, top


def _places(table: Sketched, row_of: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The rows of a table that are wanted: where they go, and where they are."""
    held = [i for i, id in enumerate(table.ids) if id in row_of]
    return [row_of[table.ids[i]] for i in held], held


def _beyond(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many values lie at or beyond each bin's lower edge, along the last axis."""
    return np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]


def _tails(counts: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of (|x| - t)+ at each bin's lower edge t, every value at the upper end of its bin.

    The last bin is taken to be as wide as its lower edge.
    """
    widths = np.diff(np.append(edges, 2 * edges[-1]))
    return _beyond(_beyond(counts) * widths)


def _rows(n: int, n_features: int) -> Rows:
    """Room for features: in memory, or in a file that goes when the array does."""
    if n * n_features * 4 <= _HELD_BYTES:
        return np.zeros((n, n_features), np.float32)
    descriptor, name = tempfile.mkstemp(prefix="qdist-features-")
    with os.fdopen(descriptor, "w+b") as file:
        os.unlink(name)
        return np.memmap(file, np.float32, mode="w+", shape=(n, n_features))
