"""Laws of the grid, the counting kernels, histograms and records."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qdist.stats import grid, sweep
from qdist.stats.accumulator import Accumulator
from qdist.stats.histogram import Density, Histogram
from qdist.stats.kernels import count_bits, merge_sorted
from qdist.stats.merger import merge_all
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import GroupRequest, StatisticsSpec
from tests.plain_statistics import SPECIAL_BITS, Batch, assert_measured, counted_plainly

LARGE = 3 * sweep.BLOCK
"""Several blocks, and more than is counted directly."""
SMALLEST = 2.0**-133
"""What has a smaller magnitude shares a bin with zero."""
AT_AN_EDGE = np.array(
    [0x80000000, 0x80800000, 0, 0x807FFFFF, 1, 0x80000001, *[0x7FFFFF] * 3], np.uint32
).view(np.float32)
"""The value of largest magnitude lies where a bin of smaller ones ends."""

any_bits = st.one_of(st.sampled_from(SPECIAL_BITS), st.integers(0, 2**32 - 1))
tensors = hnp.arrays(np.uint32, st.integers(0, 60), elements=any_bits).map(
    lambda bits: bits.view(np.float32)
)
ROWS = ("a", "b")
few = st.one_of(st.sampled_from(SPECIAL_BITS), st.integers(0x3F800000, 0x3F800004))
shapes = st.sampled_from(((4,), (2, 3), (3, 2), (0, 4), (1,), ()))
shaped = shapes.flatmap(
    lambda shape: hnp.arrays(np.uint32, shape, elements=st.one_of(any_bits, few)).map(
        lambda bits: bits.view(np.float32)
    )
)
flat_samples = st.tuples(tensors, tensors)
samples = st.tuples(shaped, shaped)
"""One tensor for each row; axes of two sizes, tables that overflow or not."""
seeds = st.integers(0, 2**32 - 1)


def counted(values: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """What the kernel finds in one flat tensor."""
    counts = np.zeros(grid.N_BINS, np.uint64)
    extrema = np.array([np.inf, -np.inf], np.float32)
    count_bits(values.view(np.uint32), counts, extrema)
    return counts, extrema


SPEC = StatisticsSpec(
    n_largest=5,
    n_values=6,
    groups=(
        GroupRequest(match="a", axis=-1, group_size=2),
        GroupRequest(match="*", axis=0, group_count=2, mantissa_bits=7),
    ),
)
"""Limits so low that small tensors reach them."""


def record_of(
    *parts: tuple[NDArray[np.float32], ...], names: Any = ROWS, spec: StatisticsSpec = SPEC
) -> CalibrationRecord:
    """The record of some samples, each one tensor per row."""
    accumulator = Accumulator(names, spec, {"a": 0, "b": -1})
    for part in parts:
        for row, values in enumerate(part):
            accumulator.add(row, values)
        accumulator.add_samples(1)
    return accumulator.record()


def histogram_of(values: NDArray[np.float32]) -> Histogram:
    return record_of((values,), names=("x",)).histogram("x")


def assert_same(one: CalibrationRecord, other: CalibrationRecord) -> None:
    assert one.tensors == other.tensors
    assert one.n_samples == other.n_samples
    mine, others = one.arrays(), other.arrays()
    assert set(mine) == set(others)
    for name, array in mine.items():
        assert array.dtype == others[name].dtype
        assert array.shape == others[name].shape
        assert array.tobytes() == others[name].tobytes()
    assert one.digest == other.digest


# --- the kernel -------------------------------------------------------------------------------


@given(tensors)
@example(np.array(SPECIAL_BITS, np.uint32).view(np.float32))
def test_the_small_path_counts_as_numpy_does(values: NDArray[np.float32]) -> None:
    counts, extrema = counted(values)
    plain_counts, plain_extrema = counted_plainly(values)
    assert np.array_equal(counts, plain_counts)
    assert np.array_equal(extrema, plain_extrema)


@given(
    seeds,
    st.integers(0, LARGE + 5),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, LARGE + 4), any_bits), max_size=20),
    st.tuples(st.integers(0, LARGE), st.integers(0, LARGE), any_bits),
)
@settings(max_examples=60)
@example(1, LARGE + 1, 0, [(LARGE, b) for b in SPECIAL_BITS], (0, LARGE, 0x7F800001))
@example(1, LARGE + 1, 3, [(LARGE, 0xFF800001)], (0, 0, 0))
@example(1, sweep.BLOCK * sweep.FLUSH_BLOCKS + 1, 1, [], (0, LARGE, 0x3F800000))
def test_both_paths_count_as_numpy_does_at_any_length(
    seed: int,
    n: int,
    kind: int,
    pokes: list[tuple[int, int]],
    run: tuple[int, int, int],
) -> None:
    """``pokes`` are bits at places, ``run`` a stretch of equal values."""
    rng = np.random.default_rng(seed)
    bits = (
        rng.integers(0, 2**32, n, np.uint32),
        rng.normal(size=n).astype(np.float32).view(np.uint32),
        np.maximum(rng.normal(size=n), 0).astype(np.float32).view(np.uint32),
        rng.choice(np.array(SPECIAL_BITS, np.uint32), n),
    )[kind]
    bits[run[0] : run[0] + run[1]] = run[2]
    for place, value in pokes if n else ():
        bits[min(place, n - 1)] = value
    counts, extrema = counted(bits.view(np.float32))
    plain_counts, plain_extrema = counted_plainly(bits.view(np.float32))
    assert np.array_equal(counts, plain_counts)
    assert np.array_equal(extrema, plain_extrema)


@pytest.mark.parametrize("n", [5, LARGE + 5])
@pytest.mark.parametrize("bits", [0x00000000, 0x80000000])
def test_a_zero_extremum_is_plus_zero_whatever_its_sign(n: int, bits: int) -> None:
    _, extrema = counted(np.full(n, bits, np.uint32).view(np.float32))
    assert extrema.tobytes() == np.zeros(2, np.float32).tobytes()


@pytest.mark.parametrize("n", [3, LARGE + 3])
def test_counts_and_extrema_add_to_what_is_there(n: int) -> None:
    counts, extrema = counted(np.full(n, 2.0, np.float32))
    count_bits(np.full(n, -3.0, np.float32).view(np.uint32), counts, extrema)
    assert counts.sum() == 2 * n
    assert extrema.tolist() == [-3.0, 2.0]


@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 2**62)),
    st.dictionaries(st.integers(0, 40), st.integers(1, 2**62)),
)
def test_merging_sorted_keys_is_the_union_with_counts_added(
    one: dict[int, int], other: dict[int, int]
) -> None:
    def arrays(counts: dict[int, int]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        keys = sorted(counts)
        return np.array(keys, np.int64), np.array([counts[k] for k in keys], np.uint64)

    keys, counts = merge_sorted(*arrays(one), *arrays(other))
    expected = {k: one.get(k, 0) + other.get(k, 0) for k in sorted({*one, *other})}
    assert keys.tolist() == list(expected)
    assert counts.tolist() == list(expected.values())


# --- the grid ---------------------------------------------------------------------------------


@given(tensors)
def test_every_finite_number_lies_in_the_interval_of_its_bin(values: NDArray[np.float32]) -> None:
    values = values[np.isfinite(values)]
    edges = grid.edges_of(grid.bin_of(values))
    # What is smaller counts as zero.
    in_zero = np.abs(values) < np.float32(SMALLEST)
    exact = values[~in_zero].astype(np.float64)
    assert np.all(edges.lower[~in_zero] <= exact)
    assert np.all(exact <= edges.upper[~in_zero])
    assert np.all(edges.lower[in_zero] == 0)
    assert np.all(edges.upper[in_zero] == 0)


def test_the_intervals_of_all_finite_bins_ascend_and_leave_no_gap() -> None:
    bins = np.arange(grid.N_BINS, dtype=np.uint16)
    bins = bins[~(grid.is_nan_bin(bins) | grid.is_infinite_bin(bins))]
    ordered = bins[grid.ascending(bins)]
    edges = grid.edges_of(ordered)
    assert np.all(edges.lower <= edges.upper)
    assert np.all(edges.lower[1:] >= edges.upper[:-1])
    largest = float(np.finfo(np.float32).max)
    assert (edges.lower[0], edges.upper[-1]) == (-largest, largest)
    # Neighbours touch, but for what counts as zero on either side of it.
    gaps = edges.lower[1:] - edges.upper[:-1]
    assert gaps[gaps > 0].tolist() == [SMALLEST, SMALLEST]


def test_a_bin_is_relatively_narrower_than_one_in_128() -> None:
    bins = grid.bin_of(np.array([1.0, 1.999, 3e-38, -7.5, 3.0e38], np.float32))
    edges = grid.edges_of(bins)
    width = edges.upper - edges.lower
    assert np.all(width <= np.minimum(abs(edges.lower), abs(edges.upper)) / 128 + 1e-300)


def test_kinds_of_bins_are_told_apart_for_all_65536() -> None:
    bins = np.arange(grid.N_BINS, dtype=np.uint16)
    smallest = (bins.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(grid.is_nan_bin(bins), np.isnan(smallest))
    assert np.array_equal(grid.is_infinite_bin(bins), np.isinf(smallest))


@given(tensors, st.integers(0, 7), st.integers(0, 7))
def test_coarsening_counts_is_counting_coarsely(
    values: NDArray[np.float32], one: int, other: int
) -> None:
    counts, _ = counted(values)
    hit = np.flatnonzero(counts)
    bins, fine = hit.astype(np.uint16), counts[hit]
    few_bits, many_bits = min(one, other), max(one, other)
    coarse = grid.coarsen(bins, fine, few_bits)
    plain = counts.reshape(grid.n_bins(few_bits), -1).sum(axis=1)
    assert np.array_equal(coarse[0], np.flatnonzero(plain))
    assert np.array_equal(coarse[1], plain[plain > 0])
    between = grid.coarsen(bins, fine, many_bits)
    again = grid.coarsen(*between, few_bits, from_bits=many_bits)
    assert np.array_equal(again[0], coarse[0])
    assert np.array_equal(again[1], coarse[1])
    assert np.array_equal(grid.leading(coarse[0], few_bits) >> (7 - few_bits), coarse[0])
    request = GroupRequest(match="*", axis=0, group_count=1, mantissa_bits=few_bits)
    spec = StatisticsSpec(groups=(request,))
    (groups,) = record_of((values,), names=("x",), spec=spec).groups("x")
    if values.size:
        assert np.array_equal(groups.group(0)[0], coarse[0])
        assert np.array_equal(groups.group(0)[1], coarse[1])


def test_bins_are_not_split() -> None:
    bins, counts = np.zeros(1, np.uint16), np.ones(1, np.uint64)
    with pytest.raises(ValueError, match="cannot be split"):
        grid.coarsen(bins, counts, 4, from_bits=3)
    with pytest.raises(ValueError, match="must lie in"):
        grid.coarsen(bins, counts, 8)


# --- histograms -------------------------------------------------------------------------------


@given(tensors)
def test_a_histogram_says_what_kinds_of_values_there_were(values: NDArray[np.float32]) -> None:
    histogram = histogram_of(values)
    assert histogram.n_values == values.size
    assert histogram.n_nan == np.isnan(values).sum()
    assert histogram.n_infinite == np.isinf(values).sum()
    assert histogram.n_zero == (np.abs(values) < np.float32(SMALLEST)).sum()
    assert histogram.finite.total == np.isfinite(values).sum()


@given(tensors)
@example(AT_AN_EDGE)
def test_a_density_is_ascending_disjoint_and_cut_by_the_exact_extrema(
    values: NDArray[np.float32],
) -> None:
    density = histogram_of(values).finite
    finite = values[np.isfinite(values)].astype(np.float64)
    assert density.is_empty == (finite.size == 0)
    if finite.size == 0:
        assert (density.minimum, density.maximum) == (0.0, 0.0)
        return
    assert np.all(density.lower <= density.upper)
    assert np.all(density.upper[:-1] <= density.lower[1:])
    assert density.lower[0] >= finite.min()
    assert density.upper[-1] <= finite.max()
    if abs(finite.min()) >= SMALLEST:
        assert density.minimum == finite.min()
    if abs(finite.max()) >= SMALLEST:
        assert density.maximum == finite.max()
    for number in finite[np.abs(finite) >= SMALLEST]:
        holds = (density.lower <= number) & (number <= density.upper)
        assert holds.any()


@given(tensors)
@example(np.array([-5.01, 5.02], np.float32))
@example(np.array([5.01, -5.02, -5.005], np.float32))
def test_magnitudes_are_a_density_of_the_absolute_values(values: NDArray[np.float32]) -> None:
    values = values[np.isfinite(values)]
    magnitudes = histogram_of(values).finite.magnitudes()
    assert magnitudes.total == values.size
    assert np.all(magnitudes.lower >= 0)
    assert np.all(magnitudes.lower <= magnitudes.upper)
    assert np.all(magnitudes.upper[:-1] <= magnitudes.lower[1:])
    if values.size:
        top = float(np.abs(values.astype(np.float64)).max())
        assert magnitudes.maximum == top or top < SMALLEST
        for number in np.abs(values[np.abs(values) >= SMALLEST].astype(np.float64)):
            assert ((magnitudes.lower <= number) & (number <= magnitudes.upper)).any()


@given(seeds, st.floats(-3, 3, width=32), st.floats(-3, 3, width=32))
@settings(max_examples=50)
def test_the_share_outside_a_range_is_that_of_the_data(seed: int, a: float, b: float) -> None:
    values = np.random.default_rng(seed).normal(size=4000).astype(np.float32)
    values[:1000] = 0
    low, high = min(a, b), max(a, b)
    exact = float(((values < low) | (values > high)).mean())
    # Within a bin, whose share at this density is below 1 %.
    assert histogram_of(values).finite.share_outside(low, high) == pytest.approx(exact, abs=0.01)


def test_the_share_outside_counts_a_point_mass_at_the_bound_as_inside() -> None:
    density = Density(
        lower=np.array([-1.0, 0.0, 2.0]),
        upper=np.array([-1.0, 0.0, 2.0]),
        counts=np.array([1.0, 2.0, 1.0]),
    )
    assert density.share_outside(0.0, 2.0) == 0.25
    assert density.share_outside(-1.0, 0.0) == 0.25
    assert density.share_outside(-1.0, 2.0) == 0.0
    assert density.share_outside(0.5, 1.0) == 1.0


@given(seeds)
@settings(max_examples=30)
def test_the_second_moment_is_that_of_the_data(seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(3, size=3000).astype(np.float32)
    exact = float(np.mean(values.astype(np.float64) ** 2))
    assert histogram_of(values).finite.second_moment == pytest.approx(exact, rel=1e-2)


def test_a_histogram_refuses_counts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="counts"):
        Histogram(bins=np.zeros(2, np.uint16), counts=np.ones(3, np.uint64), minimum=0, maximum=0)


# --- records ----------------------------------------------------------------------------------


@given(samples, samples, samples)
def test_merging_is_associative_and_commutative(a: Any, b: Any, c: Any) -> None:
    x, y, z = record_of(a), record_of(b), record_of(c)
    assert_same(x.merge(y), y.merge(x))
    assert_same(x.merge(y).merge(z), x.merge(y.merge(z)))


@given(st.lists(samples, max_size=3))
def test_the_empty_record_is_the_identity_on_either_side(parts: list[Any]) -> None:
    record, empty = record_of(*parts), CalibrationRecord.empty(ROWS)
    assert_same(record.merge(empty), record)
    assert_same(empty.merge(record), record)


@given(st.lists(samples, max_size=8), st.lists(st.integers(0, 8), max_size=8), st.randoms())
def test_the_record_of_all_samples_is_the_merge_of_any_partition_in_any_order(
    parts: list[Any], cuts: list[int], random: Any
) -> None:
    edges = [0, *sorted(min(cut, len(parts)) for cut in cuts), len(parts)]
    records = [record_of(*parts[i:j]) for i, j in pairwise(edges)]
    random.shuffle(records)
    assert_same(merge_all(records, ROWS), record_of(*parts))


@given(st.lists(flat_samples, max_size=8))
def test_how_samples_are_put_into_tensors_does_not_change_what_is_counted(parts: list[Any]) -> None:
    flat = tuple(np.concatenate([part[row] for part in parts] or [[]]) for row in range(2))
    whole = record_of(tuple(values.astype(np.float32) for values in flat)).arrays()
    pieces = record_of(*parts).arrays()
    assert whole["largest"].tobytes() == pieces["largest"].tobytes()
    assert np.array_equal(whole["extrema"][:2], pieces["extrema"][:2])
    one, other = record_of(*parts), record_of(tuple(values.astype(np.float32) for values in flat))
    for name in ROWS:
        assert np.array_equal(one.histogram(name).bins, other.histogram(name).bins)
        assert np.array_equal(one.histogram(name).counts, other.histogram(name).counts)
        tables = one.value_table(name), other.value_table(name)
        assert (tables[0] is None) == (tables[1] is None)
        if tables[0] is not None and tables[1] is not None:
            assert tables[0].values.tobytes() == tables[1].values.tobytes()
            assert np.array_equal(tables[0].counts, tables[1].counts)


def test_merging_nothing_is_the_empty_record() -> None:
    assert_same(merge_all([], ROWS), CalibrationRecord.empty(ROWS))


def test_merging_many_records_holds_few_of_them_at_once() -> None:
    """Memory may not grow with the number of shards (bounded memory)."""
    alive: set[int] = set()
    most = 0

    def stream() -> Any:
        nonlocal most
        for i in range(256):
            record = record_of((np.full(3, i, np.float32),) * 2)
            weakref.finalize(record, alive.discard, i)
            alive.add(i)
            most = max(most, len(alive))
            yield record
            del record

    merged = merge_all(stream(), ROWS)
    assert merged.n_samples == 256
    assert merged.histograms.counts.sum() == 256 * 6
    assert most <= 3


@given(st.lists(samples, max_size=4), st.permutations(("a", "b", "c")), st.booleans())
def test_a_record_is_the_join_of_its_columns(
    parts: list[Any], order: tuple[str, ...], twice: bool
) -> None:
    names = ("a", "b", "c")
    whole = record_of(*((*part, part[0]) for part in parts), names=names)
    left = record_of(*((part[0],) for part in parts), names=("c",))
    right = record_of(*parts, names=("a", "b"))
    columns = [left, right, whole] if twice else [left, right]
    assert_same(CalibrationRecord.join(columns, names), whole)
    assert_same(CalibrationRecord.join(columns, order), whole.select(order))
    assert_same(whole.select(order).select(names), whole)
    assert_same(whole.select(("c",)), left)
    assert_same(whole.select(()), CalibrationRecord.join([whole], ()))


@given(samples, samples, st.sampled_from((("b",), ("b", "a"), ())))
def test_selecting_and_merging_commute(one: Any, other: Any, wanted: tuple[str, ...]) -> None:
    x, y = record_of(one), record_of(other)
    assert_same(x.merge(y).select(wanted), x.select(wanted).merge(y.select(wanted)))
    empty = CalibrationRecord.empty(ROWS).select(wanted)
    assert_same(x.select(wanted).merge(empty), x.select(wanted))


def test_records_that_do_not_belong_together_do_not_join() -> None:
    part = (np.ones(3, np.float32),) * 2
    with pytest.raises(ValueError, match="numbers of samples"):
        CalibrationRecord.join([record_of(part), record_of(part, part)], ROWS)
    with pytest.raises(ValueError, match="no records"):
        CalibrationRecord.join([], ROWS)
    with pytest.raises(ValueError, match="do not join"):
        CalibrationRecord.join([record_of(part), record_of(part, spec=StatisticsSpec())], ROWS)
    with pytest.raises(KeyError):
        CalibrationRecord.join([record_of(part)], ("x",))
    with pytest.raises(KeyError):
        record_of(part).select(("x",))


OTHER_SPECS = (
    StatisticsSpec(n_largest=6, n_values=6, groups=SPEC.groups),
    StatisticsSpec(n_largest=5, n_values=7, groups=SPEC.groups),
    StatisticsSpec(n_largest=5, n_values=6, groups=SPEC.groups[:1]),
    StatisticsSpec(n_largest=5, n_values=6, groups=SPEC.groups[::-1]),
)


@pytest.mark.parametrize("spec", OTHER_SPECS)
def test_records_of_other_statistics_do_not_merge(spec: StatisticsSpec) -> None:
    part = (np.ones((3, 2), np.float32),) * 2
    with pytest.raises(ValueError, match="merge"):
        record_of(part).merge(record_of(part, spec=spec))
    with pytest.raises(ValueError, match="merge"):
        merge_all([record_of(part), record_of(part, spec=spec)], ROWS)


def test_records_of_other_tensors_do_not_merge() -> None:
    with pytest.raises(ValueError, match="different tensors"):
        CalibrationRecord.empty(("a", "b")).merge(CalibrationRecord.empty(("b", "a")))


@given(st.lists(samples, max_size=3), st.lists(samples, max_size=3))
def test_digests_are_equal_exactly_where_the_contents_are(one: list[Any], other: list[Any]) -> None:
    a, b = record_of(*one), record_of(*other)
    mine, others = a.arrays(), b.arrays()
    same = a.n_samples == b.n_samples and all(
        mine[name].tobytes() == others[name].tobytes() for name in mine
    )
    assert (a.digest == b.digest) == same


@given(st.lists(samples, max_size=3))
def test_a_record_comes_back_from_its_arrays(parts: list[Any]) -> None:
    for record in (record_of(*parts), CalibrationRecord.empty(ROWS)):
        arrays = record.arrays()
        assert len(arrays) <= 6
        back = CalibrationRecord.from_arrays(record.tensors, record.n_samples, arrays)
        assert_same(back, record)
        assert_same(back.merge(record_of(*parts)), record.merge(record_of(*parts)))
        for array in arrays.values():
            # What marks a chunk that was never written does not occur.
            if array.dtype.kind == "f":
                assert not np.isnan(array).any()
            elif array.dtype.kind == "i":
                assert array.size == 0 or array.min() >= 0
            else:
                assert array.size == 0 or array.max() < np.iinfo(np.uint64).max


@pytest.mark.parametrize("name", ["key", "count", "extrema", "largest", "layout", "grouping"])
@pytest.mark.parametrize("harm", ["missing", "short", "unwritten", "type", "shape"])
def test_arrays_that_are_no_record_are_refused(name: str, harm: str) -> None:
    arrays = dict(record_of((np.arange(6, dtype=np.float32).reshape(2, 3),) * 2).arrays())
    array = arrays.pop(name)
    assert len(array) > 1
    if harm == "short":
        arrays[name] = array[:-1]
    elif harm == "unwritten":
        fill = {"f": np.nan, "i": -1, "u": np.iinfo(np.uint64).max}[array.dtype.kind]
        arrays[name] = np.concatenate([array[:1], np.full_like(array[1:], fill)])
    elif harm == "type":
        arrays[name] = array.astype(np.float64)
    elif harm == "shape":
        arrays[name] = array[..., np.newaxis]
    with pytest.raises(ValueError):  # noqa: PT011
        CalibrationRecord.from_arrays(ROWS, 1, arrays)


def test_arrays_of_other_tensors_are_refused() -> None:
    arrays = record_of((np.ones(3, np.float32),) * 2).arrays()
    for names in (("a",), ("a", "b", "c"), ()):
        with pytest.raises(ValueError, match="is broken"):
            CalibrationRecord.from_arrays(names, 1, arrays)


names = st.lists(st.text("a\n|,\"'", max_size=3), min_size=1, max_size=3, unique=True).map(tuple)


@given(names, names)
@example(("a\nb", "c"), ("a", "b\nc"))
def test_names_are_part_of_the_digest(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    same = CalibrationRecord.empty(one).digest == CalibrationRecord.empty(other).digest
    assert same == (one == other)


def test_the_sign_of_a_zero_extremum_does_not_change_the_digest() -> None:
    tables = [np.zeros(grid.N_BINS, np.uint64)] * 2
    plus = CalibrationRecord.from_dense(ROWS, tables, np.zeros((2, 2), np.float32), 1)
    minus = CalibrationRecord.from_dense(ROWS, tables, -np.zeros((2, 2), np.float32), 1)
    assert np.signbit(minus.extrema).all()
    assert minus.digest == plus.digest


@given(st.lists(samples, max_size=4))
def test_a_row_gives_back_what_was_counted(parts: list[Any]) -> None:
    batches: dict[str, list[Batch]] = {
        name: [(part[row], None) for part in parts] for row, name in enumerate(ROWS)
    }
    record = record_of(*parts)
    assert_measured(record, batches, SPEC, {"a": 0, "b": -1})
    each = [record.histogram(name) for name in ROWS]
    n_nan, n_infinite = record.specials
    assert n_nan.tolist() == [histogram.n_nan for histogram in each]
    assert n_infinite.tolist() == [histogram.n_infinite for histogram in each]
    for one in (record_of(*parts[:2]).merge(record_of(*parts[2:])), merge_all([record], ROWS)):
        assert_measured(one, batches, SPEC, {"a": 0, "b": -1})
    assert "a" in record
    assert "c" not in record
    with pytest.raises(KeyError):
        record.histogram("c")


def test_dense_tables_make_a_record_of_histograms_alone() -> None:
    values = np.array([1.0, 1.0, -2.0], np.float32)
    counts, extrema = counted(values)
    record = CalibrationRecord.from_dense(("x",), [counts], extrema[np.newaxis], 3)
    assert record.histogram("x").n_values == 3
    assert (record.histogram("x").minimum, record.histogram("x").maximum) == (-2.0, 1.0)
    assert record.largest("x").size == 0
    assert record.value_table("x") is None
    assert record.channels("x") is None
    assert record.groups("x") == ()
    assert record.merge(record).histogram("x").n_values == 6


def test_a_record_refuses_columns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        replace(CalibrationRecord.empty(ROWS), tensors=("a",))
