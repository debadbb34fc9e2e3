"""The accumulator equals plain NumPy bit for bit, on every path that it takes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.stats import side_by_side, sweep
from qdist.stats.accumulator import Accumulator
from qdist.stats.record import CalibrationRecord
from qdist.stats.side_by_side import LEAST_ELEMENTS, SideBySide
from qdist.stats.spec import GroupRequest, StatisticsSpec
from tests.plain_statistics import SPECIAL_BITS, Batch, assert_measured

SPECIAL = np.array(SPECIAL_BITS, np.uint32)
KINDS = ("bits", "gauss", "relu", "special", "constant", "few", "many", "rising", "plateau", "mask")
SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (0,), (0, 5), (1,), (3,), (7, 1), (2, 3, 50)),
    *((4, 500), (5, 300, 2), (1, 5, 4, 4), (2, 7, 33, 5), (6, 64), (3, 65), (2, 8, 63)),
    *((sweep.SMALL - 1,), (sweep.SMALL,), (sweep.BLOCK - 1,), (sweep.BLOCK,), (sweep.BLOCK + 1,)),
    *((2, 3, 3000), (4, 20, 384), (9, 1000), (2, 3000, 3), (1, 2, 9001), (10, 70, 33)),
)


def tensor(shape: tuple[int, ...], kind: str, seed: int, n_pokes: int) -> NDArray[np.float32]:
    """Values of one kind, with stretches of special bits poked into them."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    gauss = rng.normal(size=n).astype(np.float32)
    kinds: dict[str, Callable[[], NDArray[Any]]] = {
        "bits": lambda: rng.integers(0, 2**32, n, np.uint32).view(np.float32),
        "gauss": lambda: gauss,
        "relu": lambda: np.maximum(gauss, 0),
        "special": lambda: rng.choice(SPECIAL, n).view(np.float32),
        "constant": lambda: np.full(n, rng.choice(SPECIAL)).view(np.float32),
        "few": lambda: rng.integers(0, 40, n).astype(np.float32),
        "many": lambda: rng.integers(0, 600, n).astype(np.float32),
        "rising": lambda: np.sort(gauss),
        "plateau": lambda: np.clip(4 * gauss, -3, 3),
        "mask": lambda: np.where(gauss > 0, np.float32(-np.inf), gauss),
    }
    bits = np.array(kinds[kind](), np.float32).view(np.uint32)
    for _ in range(n_pokes if n else 0):
        start = int(rng.integers(0, n))
        bits[start : start + int(rng.integers(1, 40))] = rng.choice(SPECIAL)
    return bits.view(np.float32).reshape(shape)


def mask(shape: tuple[int, ...], seed: int) -> NDArray[np.bool_]:
    """A mask that broadcasts to ``shape``, or to its last axes."""
    rng = np.random.default_rng(seed)
    mine = tuple(size if rng.random() < 0.6 else 1 for size in shape)
    return rng.random(mine[int(rng.integers(0, len(shape) + 1)) :]) < 0.6


@st.composite
def batches(draw: Any) -> list[Batch]:
    """Micro-batches of one tensor, mostly of one shape."""
    usual = draw(st.sampled_from(SHAPES))
    parts: list[Batch] = []
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from((usual, usual, usual, *SHAPES)))
        seed = draw(st.integers(0, 2**32 - 1))
        values = tensor(shape, draw(st.sampled_from(KINDS)), seed, draw(st.integers(0, 2)))
        parts.append((values, mask(shape, seed) if draw(st.booleans()) else None))
    return parts


requests = st.builds(
    lambda axis, size, count, bits: GroupRequest(
        match="*",
        axis=axis,
        group_size=size if count is None else None,
        group_count=count,
        mantissa_bits=bits,
    ),
    st.integers(-2, 2),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(0, 7),
)
specs = st.builds(
    lambda largest, values, groups: StatisticsSpec(
        n_largest=largest, n_values=values, groups=tuple(groups)
    ),
    st.sampled_from((0, 1, 7, 1024)),
    st.sampled_from((0, 1, 20, 512)),
    st.lists(requests, max_size=1),
)


def measured(
    parts: list[Batch], spec: StatisticsSpec, axis: int | None
) -> tuple[CalibrationRecord, Accumulator]:
    accumulator = Accumulator(("x",), spec, {} if axis is None else {"x": axis})
    for values, keep in parts:
        accumulator.add(0, values, keep)
    return accumulator.record(), accumulator


@given(batches(), specs, st.one_of(st.none(), st.integers(-3, 3)))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_all_statistics_are_those_of_plain_numpy(
    parts: list[Batch], spec: StatisticsSpec, axis: int | None
) -> None:
    record, accumulator = measured(parts, spec, axis)
    assert_measured(record, {"x": parts}, spec, {} if axis is None else {"x": axis})
    nans = record.histogram("x").n_nan
    assert accumulator.n_nan(0) == nans
    assert accumulator.has_nan == (nans > 0)


FLUSHED = sweep.BLOCK * sweep.FLUSH_BLOCKS


@pytest.mark.parametrize("n", [FLUSHED - 1, FLUSHED, FLUSHED + 1, 2 * FLUSHED + 5])
@pytest.mark.parametrize("kind", ["gauss", "constant", "few", "special"])
def test_scratch_counters_are_emptied_before_they_overflow(n: int, kind: str) -> None:
    values = tensor((n,), kind, n, 0)
    spec = StatisticsSpec(n_values=0)
    record, _ = measured([(values, None)], spec, -1 if kind == "few" else None)
    counts = np.bincount(record.histogram("x").bins, minlength=1 << 16)
    assert counts.max() == 1
    assert int(record.histogram("x").counts.sum()) == n
    assert record.largest("x").size <= 1024
    bins = values.view(np.uint32) >> 16
    if not np.isnan(values).any():
        plain = np.bincount(bins, minlength=1 << 16)
        assert np.array_equal(record.histogram("x").counts, plain[plain > 0])


@pytest.mark.parametrize("bits", SPECIAL_BITS)
@pytest.mark.parametrize("place", [0, 5000, 3 * sweep.BLOCK - 1])
def test_one_special_value_in_one_block_counts_alone(bits: int, place: int) -> None:
    values = tensor((3, 64, 64), "gauss", 3, 0)
    values.reshape(-1).view(np.uint32)[place] = bits
    parts: list[Batch] = [(values, None)]
    for axis in (0, 1, 2):
        assert_measured(
            measured(parts, StatisticsSpec(), axis)[0], {"x": parts}, StatisticsSpec(), {"x": axis}
        )


@pytest.mark.parametrize("n_lanes", [64, 100, 384, 1030, 1536, 2048])
@pytest.mark.parametrize("kind", ["gauss", "rising", "relu", "mask"])
def test_rows_of_lanes_over_several_groups_of_blocks(n_lanes: int, kind: str) -> None:
    n_rows = sweep.BLOCK * sweep.FLUSH_BLOCKS // n_lanes + 7
    parts: list[Batch] = [
        (tensor((n_rows, n_lanes), kind, seed, 2 * seed), None) for seed in (0, 1)
    ]
    # Later ones are compared with a bound that is known, in blocks that are short or constant too.
    parts += [(tensor((37, n_lanes), kind, 3, 0) * np.float32(2), None)]
    parts += [(np.full((9, n_lanes), fill, np.float32), None) for fill in (9, -0.0, np.inf, np.nan)]
    record, _ = measured(parts, StatisticsSpec(), -1)
    assert_measured(record, {"x": parts}, StatisticsSpec(), {"x": -1})


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "i4"])
def test_other_types_count_as_their_float32(dtype: str) -> None:
    values = np.arange(-700, 3000, dtype=dtype).reshape(4, -1)
    parts: list[Batch] = [(values.astype(np.float32), None)]
    accumulator = Accumulator(("x",), None, {"x": -1})
    accumulator.add(0, values)
    assert_measured(accumulator.record(), {"x": parts}, StatisticsSpec(), {"x": -1})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_order_in_memory_does_not_matter(axis: int) -> None:
    values = tensor((30, 20, 40), "gauss", 1, 3)
    orders = (values, np.asfortranarray(values), np.repeat(values, 2, axis=2)[:, :, ::2])
    for keep in (None, mask(values.shape, 4)):
        records = [measured([(array, keep)], StatisticsSpec(), axis)[0] for array in orders]
        assert len({record.digest for record in records}) == 1


def test_a_buffer_of_any_alignment_counts() -> None:
    values = tensor((2, 5000), "gauss", 1, 3)
    shifted = np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1).reshape(values.shape)
    assert not shifted.flags.aligned
    digests = {measured([(a, None)], StatisticsSpec(), 1)[0].digest for a in (values, shifted)}
    assert len(digests) == 1


def test_an_array_is_not_written_to() -> None:
    values = tensor((3, 5000), "special", 1, 3)
    before = values.tobytes()
    values.flags.writeable = False
    measured([(values, None), (values, values > 0)], StatisticsSpec(), 1)
    assert values.tobytes() == before


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        Accumulator(("x",)).add(0, np.zeros((2, 3), np.float32), np.ones((2, 4), np.bool_))


@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(KINDS)), min_size=1, max_size=5),
    st.sampled_from([None, -1, 0, 1, -2]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_tensors_counted_in_one_call_are_those_counted_one_by_one(
    tensors: list[tuple[tuple[int, ...], str]], axis: int | None, seed: int, shape_varies: bool
) -> None:
    names = [f"tensor{row}" for row in range(len(tensors))]
    spec = StatisticsSpec(
        n_largest=20, n_values=30, groups=(GroupRequest(match="tensor1", axis=-1, group_size=2),)
    )
    axes = None if axis is None else dict.fromkeys(names, axis)
    together, single = (Accumulator(names, spec, axes) for _ in range(2))
    threads = SideBySide(names, spec, axes, n_threads=3)
    for turn in range(4):
        if turn == 2 and shape_varies:
            tensors = [((*shape, 2), kind) for shape, kind in tensors]
        arrays: list[NDArray[Any]] = [
            tensor(shape, kind, seed + 10 * turn + row, 1)
            for row, (shape, kind) in enumerate(tensors)
        ]
        # Some of another type, some that lie otherwise in memory, and of one tensor two.
        with np.errstate(invalid="ignore"):
            wide: list[NDArray[Any]] = [array.astype(np.float64) for array in arrays]
        arrays = [wide[r] if (turn + r) % 5 == 4 else a for r, a in enumerate(arrays)]
        arrays = [np.asfortranarray(a) if (turn + r) % 7 == 6 else a for r, a in enumerate(arrays)]
        pairs = [*enumerate(arrays), (0, arrays[0])]
        together.add_all([row for row, _ in pairs], [array for _, array in pairs])
        with pytest.MonkeyPatch.context() as patch:
            # So few elements would all be counted in one thread.
            patch.setattr(side_by_side, "LEAST_ELEMENTS", 0)
            threads.add_all([row for row, _ in pairs], [array for _, array in pairs])
        for row, array in pairs:
            single.add(row, array)
        for counting in (together, threads, single):
            counting.add_samples(2)
    assert together.record().digest == single.record().digest == threads.record().digest
    assert threads.has_nan == single.has_nan
    assert all(threads.n_nan(row) == single.n_nan(row) for row in range(len(names)))
    for counting in (together, threads):
        counting.reset()
        counting.add_all(range(len(arrays)), arrays)
    single.reset()
    for row, array in enumerate(arrays):
        single.add(row, array)
    assert together.record().digest == single.record().digest == threads.record().digest


class Source:
    """What stands for arrays that stay where they are."""


@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(KINDS)), min_size=1, max_size=4),
    st.lists(st.sampled_from(["again", "again", "other", "single", "reset"]), max_size=8),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_what_comes_from_one_source_is_counted_as_what_comes_anew(
    tensors: list[tuple[tuple[int, ...], str]], turns: list[str], seed: int
) -> None:
    names = [f"tensor{row}" for row in range(len(tensors))]
    spec = StatisticsSpec(
        n_largest=20, n_values=30, groups=(GroupRequest(match="tensor1", axis=-1, group_size=2),)
    )
    axes = dict.fromkeys(names, -1)
    fixed = [tensor(shape, kind, seed + row, 1) for row, (shape, kind) in enumerate(tensors)]
    source = Source()
    again, anew = Accumulator(names, spec, axes), Accumulator(names, spec, axes)
    for turn, what in enumerate(["again", *turns, "again", "again"]):
        if what == "reset":
            again.reset()
            anew.reset()
            continue
        values = [tensor(a.shape, tensors[r][1], seed + turn + r, 1) for r, a in enumerate(fixed)]
        if what == "again":
            for held, new in zip(fixed, values, strict=True):
                held[...] = new
            if not again.add_again(source):
                again.add_all(range(len(fixed)), fixed, source)
        elif what == "other":
            # Of another shape: what was known of the source does not hold any more.
            values = [np.stack([new, new]) for new in values]
            again.add_all(range(len(fixed)), values, Source())
        else:
            again.add(0, values[0])
            values = values[:1]
        for row, new in enumerate(values):
            anew.add(row, new)
        assert again.record().digest == anew.record().digest


def test_a_source_is_known_while_its_tensors_keep_their_shapes() -> None:
    fixed = [tensor((8, 64), "gauss", row, 1) for row in range(2)]
    spec = StatisticsSpec(n_values=30)
    counting, source = Accumulator(("a", "b"), spec, {"a": -1, "b": -1}), Source()
    assert not counting.add_again(source)
    # The second time, no tensor is counted by value any more.
    for _ in range(2):
        counting.add_all([0, 1], fixed, source)
    assert counting.add_again(source)
    counting.add(1, fixed[1][:4])
    assert not counting.add_again(source)
    counting.add_all([0, 1], fixed, source)
    counting.add_all([0, 1], fixed, source)
    assert counting.add_again(source)
    counting.reset()
    assert not counting.add_again(source)


def test_channels_that_end_where_elements_were_left_out_end_for_all() -> None:
    spec, axes = StatisticsSpec(n_values=30), {"a": -1}
    together, single = Accumulator(("a",), spec, axes), Accumulator(("a",), spec, axes)
    wide, narrow = tensor((8, 64), "gauss", 1, 1), tensor((8, 32), "gauss", 2, 1)
    source = Source()
    for _ in range(2):
        together.add_all([0], [wide], source)
        single.add(0, wide)
    for counting in (together, single):
        counting.add(0, narrow, np.arange(8)[:, None] < 4)
    assert not together.add_again(source)
    together.add_all([0], [wide], source)
    single.add(0, wide)
    assert together.record().digest == single.record().digest


def test_threads_count_large_tensors_as_one_does() -> None:
    rng = np.random.default_rng(7)
    sizes = (3 * LEAST_ELEMENTS, 2 * LEAST_ELEMENTS, LEAST_ELEMENTS, 5)
    arrays = [rng.normal(0, 1, (n // 8 + 1, 8)).astype(np.float32) for n in sizes]
    names = [*(f"tensor{n}" for n in sizes), "never seen"]
    threads = SideBySide(names, None, dict.fromkeys(names, -1), n_threads=2)
    single = Accumulator(names, None, dict.fromkeys(names, -1))
    keep = rng.random((len(arrays[0]), 1)) < 0.5
    for _ in range(3):
        threads.add_all(range(4), arrays)
        threads.add(0, arrays[0], keep)
        for row, array in enumerate(arrays):
            single.add(row, array)
        single.add(0, arrays[0], keep)
    assert threads.record().digest == single.record().digest


def test_what_one_thread_raises_is_raised() -> None:
    threads = SideBySide(("a", "b"), None, {}, n_threads=2)
    words: NDArray[Any] = np.full((LEAST_ELEMENTS, 1), "word")
    with pytest.raises(ValueError, match="word"):
        threads.add_all([0, 1], [words, np.zeros((2 * LEAST_ELEMENTS, 1), np.float32)])


def test_reset_forgets_everything_and_a_record_stays_as_it_was() -> None:
    spec = StatisticsSpec(groups=(GroupRequest(match="*", axis=1, group_size=2),))
    parts: list[Batch] = [(tensor((2, 9, 400), kind, 1, 2), None) for kind in ("few", "gauss")]
    record, accumulator = measured(parts, spec, 1)
    digest, blank = record.digest, Accumulator(("x",), spec, {"x": 1}).record().digest
    accumulator.reset()
    assert accumulator.record().digest == blank
    assert accumulator.n_nan(0) == 0
    for values, keep in parts:
        accumulator.add(0, values, keep)
    assert accumulator.record().digest == digest
    accumulator.add(0, parts[0][0])
    fresh = CalibrationRecord.from_arrays(record.tensors, record.n_samples, record.arrays())
    assert fresh.digest == digest


def test_a_typical_tensor_takes_little_memory() -> None:
    accumulator = Accumulator([f"t{i}" for i in range(50)], None, {})
    for i in range(50):
        accumulator.add(i, tensor((40, 384), "gauss", i, 0))
    assert accumulator.n_bytes < 50 * 100_000


@pytest.mark.parametrize("n_tensors", [1, 40])
def test_tables_of_values_are_reused_and_grow(n_tensors: int) -> None:
    names = tuple(f"t{i}" for i in range(n_tensors))
    accumulator = Accumulator(names, None, {})
    parts: dict[str, list[Batch]] = {name: [] for name in names}
    for turn in range(3):
        for i, name in enumerate(names):
            kind = "few" if (i + turn) % 3 else "many"
            parts[name].append((tensor((300,), kind, i * 7 + turn, 1), None))
            accumulator.add(i, parts[name][-1][0])
    assert_measured(accumulator.record(), parts, StatisticsSpec(), {})


@given(specs)
@example(StatisticsSpec())
def test_a_spec_survives_json_and_pickling(spec: StatisticsSpec) -> None:
    assert StatisticsSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_what_a_spec_cannot_mean_is_refused() -> None:
    for bad in (
        {"group_size": 1, "group_count": 2},
        {},
        {"group_size": 0},
        {"group_size": 1, "mantissa_bits": 8},
        {"group_size": 1, "axis": 64},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            GroupRequest(**{"match": "*", "axis": 1, **bad})  # type: ignore[arg-type]
    for name, limit in (("n_largest", -1), ("n_values", -1), ("n_values", 1 << 20)):
        with pytest.raises(ValueError, match="must lie in"):
            StatisticsSpec.from_json({name: limit})
    with pytest.raises(TypeError):
        StatisticsSpec.from_json({"n_largest": 1, "more": 2})
