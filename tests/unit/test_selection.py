"""Selection: sketches against the values they are of, the choice against a plain reference, and
what it is worth on a demo model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper

import qdist.data.selection as selection_module
from actors.select import SelectionProgress, SketchWorker, select
from actors.session import ClusterSpec, RaySession
from qdist.calibration import input_specs
from qdist.data.arrays import ArraySource
from qdist.data.decoder import find_decoder
from qdist.data.preprocess import Preprocess
from qdist.data.selection import (
    Features,
    auto_name,
    choose,
    features_of,
    mismatch,
    random_mismatch,
    write_list,
)
from qdist.data.source import DataSource, Feeds
from qdist.data.subset import Listed
from qdist.demo import demo_file
from qdist.errors import ConfigError, DataError
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import Execution, measuring_session, run
from qdist.model.taps import find_taps, tapped_graph
from qdist.selection import (
    SelectionJob,
    open_tasks,
    plan_selection,
    select_here,
    sketch_samples,
)
from qdist.stats.sketch import (
    N_MAGNITUDES,
    Sketcher,
    SketchTable,
    lower_edges,
    sketch_values,
)
from qdist.store.sketches import SketchStore
from tests.onnx_models import EXECUTION, HeldSamples, frozen_from, model, normal, samples_of, value

Values = NDArray[np.float32]


def sketch(values: Values) -> tuple[NDArray[np.uint32], int, float]:
    counts = np.zeros((2, N_MAGNITUDES), np.uint32)
    n_nan, top = sketch_values(values, counts)
    return counts, n_nan, float(top)


def plain_sketch(values: Values) -> NDArray[np.uint32]:
    """The definition: finite values by sign and by the last edge that is not above them."""
    finite = values[np.isfinite(values)].astype(np.float64)
    place = np.searchsorted(lower_edges(), np.abs(finite), side="right") - 1
    counts = np.zeros((2, N_MAGNITUDES), np.uint32)
    np.add.at(counts, ((finite < 0).astype(int), place), 1)
    return counts


@settings(max_examples=100)
@given(arrays.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32)))
def test_sketch_counts_every_finite_value_in_its_bin(values: Values) -> None:
    counts, n_nan, top = sketch(values)
    assert np.array_equal(counts, plain_sketch(values))
    assert n_nan == np.isnan(values).sum()
    finite = np.abs(values[np.isfinite(values)])
    assert top == float(finite.max(initial=0))


def test_sketch_of_values_of_all_sizes() -> None:
    random = np.random.default_rng(0)
    values = (random.normal(size=50_000) * 10 ** random.uniform(-9, 7, 50_000)).astype(np.float32)
    edges = lower_edges().astype(np.float32)
    values = np.concatenate([values, edges, -edges, np.nextafter(edges, np.float32(0))])
    counts, _, _ = sketch(values)
    assert np.array_equal(counts, plain_sketch(values))


@settings(max_examples=50)
@given(
    arrays.arrays(np.float32, (2, 20), elements=st.floats(-1e9, 1e9, width=32)),
)
def test_sketches_add_up(values: Values) -> None:
    both, _, top = sketch(values)
    (first, _, top_1), (second, _, top_2) = sketch(values[0]), sketch(values[1])
    assert np.array_equal(both, first + second)
    assert top == max(top_1, top_2)


def test_a_table_that_does_not_fit_together() -> None:
    counts = np.zeros((1, 1, 2, N_MAGNITUDES), np.uint32)
    maxima = np.zeros((1, 1), np.float32)
    SketchTable(ids=("a",), counts=counts, maxima=maxima)
    for wrong in (
        {"ids": ("a", "b")},
        {"counts": counts[:, :, :, 1:]},
        {"counts": counts.astype(np.int64)},
        {"maxima": maxima[0]},
    ):
        with pytest.raises(ValueError, match="ids"):
            SketchTable(**({"ids": ("a",), "counts": counts, "maxima": maxima} | wrong))


# The choice


def table_of(samples: Sequence[Sequence[Values]], start: int = 0) -> SketchTable:
    """Sketches of samples given as one array for every tensor."""
    found = [[sketch(values) for values in sample] for sample in samples]
    return SketchTable(
        ids=tuple(f"{start + i:04d}" for i in range(len(samples))),
        counts=np.array([[counts for counts, _, _ in sample] for sample in found]),
        maxima=np.array([[top for _, _, top in sample] for sample in found], np.float32),
    )


def drawn(
    n: int, seed: int = 0, *, n_tensors: int = 3, sizes: Iterable[int] = (200,)
) -> list[list[Values]]:
    """Samples of some kinds that differ in scale; a few have a heavy tail."""
    random = np.random.default_rng(seed)
    sizes = list(sizes)
    samples = []
    for _ in range(n):
        scale = random.choice([0.2, 1.0, 3.0]) * random.uniform(0.8, 1.2)
        size = int(random.choice(sizes))
        sample = [scale * random.normal(size=size) for _ in range(n_tensors - 1)]
        sample.append(np.maximum(random.standard_t(3, size=size) * scale, 0))
        samples.append([values.astype(np.float32) for values in sample])
    return samples


def features(table: SketchTable) -> Features:
    return features_of(lambda: [table], table.ids, lower_edges())


def plain_mismatch(table: SketchTable, rows: Sequence[int]) -> float:
    """`mismatch` from merged counts, tensor by tensor, in float64."""
    edges = lower_edges()
    widths = np.diff(np.append(edges, 2 * edges[-1]))

    def curve(counts: NDArray[np.uint32]) -> tuple[Values, Values]:
        counts = counts.sum(axis=0, dtype=np.float64)
        beyond = np.array([counts[:, k:].sum(axis=1) for k in range(N_MAGNITUDES)]).T
        area = np.array([(beyond * widths)[:, k:].sum(axis=1) for k in range(N_MAGNITUDES)]).T
        return beyond / counts.sum(), area / counts.sum()

    terms, lacking = [], []
    for tensor in range(table.maxima.shape[1]):
        beyond, whole = curve(table.counts[:, tensor])
        _, part = curve(table.counts[list(rows), tensor])
        for sign in (0, 1):
            kept = (beyond[sign] > 1e-5) & (beyond[sign] < 0.5)
            kept[0] = False
            if kept.any():
                ratio = (part[sign, kept] / whole[sign, kept] + 0.05) / 1.05
                terms.append(np.mean(np.log(ratio) ** 2))
        top = table.maxima[:, tensor].max()
        lacking.append(np.log2(table.maxima[list(rows), tensor].max() / top) ** 2)
    return float(np.mean(terms) + np.mean(lacking) / len(rows))


@pytest.mark.parametrize("sizes", [(200,), (50, 200, 400)], ids=["even", "uneven"])
def test_mismatch_is_that_of_merged_counts(sizes: tuple[int, ...]) -> None:
    table = table_of(drawn(30, sizes=sizes))
    known = features(table)
    assert known.is_even == (len(sizes) == 1)
    random = np.random.default_rng(1)
    for n in (1, 2, 7, 29):
        rows = random.permutation(30)[:n].tolist()
        found = mismatch(known, [table.ids[row] for row in rows])
        assert found == pytest.approx(plain_mismatch(table, rows), rel=1e-3, abs=1e-6)
    assert mismatch(known, table.ids) == pytest.approx(0, abs=1e-6)


def test_the_best_single_sample_is_found() -> None:
    table = table_of(drawn(40, seed=2))
    best = min(range(40), key=lambda row: plain_mismatch(table, [row]))
    assert choose(features(table), 1) == (table.ids[best],)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 10), st.randoms(use_true_random=False))
def test_order_and_division_of_the_sketches_change_nothing(seed: int, n: int, random: Any) -> None:
    table = table_of(drawn(24, seed=seed, n_tensors=2, sizes=(20, 50)))
    order = list(range(24))
    random.shuffle(order)
    cut = random.randrange(1, 23)
    parts = [
        SketchTable(
            ids=tuple(table.ids[row] for row in rows),
            counts=table.counts[rows],
            maxima=table.maxima[rows],
        )
        for rows in (order[:cut], order[cut:], order[:2])
    ]
    shuffled = features_of(lambda: parts, reversed(table.ids), lower_edges())
    chosen = choose(shuffled, n)
    assert chosen == choose(features(table), n)
    assert len(set(chosen)) == n
    assert list(chosen) == sorted(chosen)


def test_of_equal_samples_the_first_by_id_is_chosen() -> None:
    same = drawn(1)[0]
    assert choose(features(table_of([same] * 5)), 2) == ("0000", "0001")


def test_all_samples_where_there_are_no_more() -> None:
    table = table_of(drawn(5))
    assert choose(features(table), 5) == choose(features(table), 50) == table.ids
    with pytest.raises(ValueError, match="0 samples"):
        choose(features(table), 0)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_a_choice_is_nearer_than_any_of_twenty_random_picks(n: int) -> None:
    known = features(table_of(drawn(150, seed=5)))
    ids = np.array(known.ids)
    chosen = mismatch(known, choose(known, n))
    picks = [
        mismatch(known, np.random.default_rng(seed).choice(ids, n, replace=False).tolist())
        for seed in range(20)
    ]
    assert chosen < min(picks)
    assert random_mismatch(known, n) == pytest.approx(np.mean(picks))


def test_the_extreme_sample_is_among_the_chosen() -> None:
    samples = drawn(60, seed=6)
    samples[17][0][:3] = 500.0
    assert "0017" in choose(features(table_of(samples)), 6)


def test_features_in_a_file_give_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(drawn(50))
    wanted = choose(features(table), 7)
    monkeypatch.setattr(selection_module, "_HELD_BYTES", 0)
    monkeypatch.setattr(selection_module, "_BLOCK", 100)
    known = features(table)
    assert isinstance(known.tails, np.memmap)
    assert choose(known, 7) == wanted


def test_tensors_that_hold_nothing_but_zeros_or_nothing_at_all() -> None:
    samples = drawn(20)
    for sample in samples:
        sample += [np.zeros(10, np.float32), np.zeros(0, np.float32)]
    known = features(table_of(samples))
    assert np.isfinite(mismatch(known, choose(known, 5)))


def test_a_missing_sketch_is_no_choice() -> None:
    table = table_of(drawn(5))
    with pytest.raises(ValueError, match="5 of 6"):
        features_of(lambda: [table], [*table.ids, "other"], lower_edges())


# Sketches of a model


@pytest.fixture(scope="module")
def cnn() -> FrozenModel:
    return freeze(load_model(demo_file("digits_cnn.onnx")))


def digits(limit: int | None = None) -> DataSource:
    return ArraySource(
        path=demo_file("digits.npz"),
        inputs={"images": "calibration_images"},
        preprocess=Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,)),
        limit=limit,
    )


def planned(frozen: FrozenModel, source: DataSource, n: int, **more: Any) -> SelectionJob:
    graph = Graph(frozen)
    return plan_selection(graph, source, input_specs(graph), n, EXECUTION, **more)


def activations(frozen: FrozenModel, feeds: Feeds) -> dict[str, Values]:
    graph = Graph(frozen)
    taps = find_taps(graph, "compute")
    session = measuring_session(tapped_graph(graph, taps), frozen.data_folder, Execution())
    names = [point.output for point in taps.points if not point.is_input]
    return feeds | dict(zip(names, run(session, names, feeds), strict=True))


def test_a_sketch_is_of_what_compute_layers_read(cnn: FrozenModel, tmp_path: Path) -> None:
    source = digits(3)
    job = planned(cnn, source, 1)
    (task,) = open_tasks(job, SketchStore(tmp_path, job.identity))
    table = sketch_samples(task, Sketcher(job.sketch), source, job)
    assert (task.keys, table.ids) == (tuple(source.keys()), tuple(id for id, _ in job.samples))
    for row, key in enumerate(task.keys):
        found = activations(cnn, {"images": source.load(key)["images"][np.newaxis]})
        for column, tensor in enumerate(job.sketch.taps.tensors):
            values = found[tensor].reshape(-1)
            assert np.array_equal(table.counts[row, column], plain_sketch(values))
            assert table.maxima[row, column] == np.abs(values).max()


def test_selection_covers_ranges_better_than_random_picks(cnn: FrozenModel, tmp_path: Path) -> None:
    source = digits()
    keys = source.keys()
    each = [
        {
            name: float(np.abs(values).max())
            for name, values in activations(
                cnn, {"images": source.load(key)["images"][np.newaxis]}
            ).items()
        }
        for key in keys
    ]
    tops = np.array([[sample[name] for name in each[0]] for sample in each])

    def error(rows: Sequence[int]) -> float:
        return float(np.mean(1 - tops[list(rows)].max(axis=0) / tops.max(axis=0)))

    job = planned(cnn, source, 16)
    chosen = select_here(job, source, SketchStore(tmp_path, job.identity))
    assert chosen.mismatch < chosen.random_mismatch / 2
    random = [
        error(np.random.default_rng(seed).permutation(len(keys))[:16].tolist())
        for seed in range(20)
    ]
    ours = error([keys.index(key) for key in chosen.keys])
    assert ours < np.mean(random) / 2
    assert ours < sorted(random)[2]


@dataclass(frozen=True, kw_only=True)
class Unreadable(HeldSamples):
    """Its samples can be named, not loaded."""

    def load(self, key: str) -> Feeds:
        raise AssertionError(f"sample {key} was loaded")


def images(n: int, seed: int = 1, kind: Callable[..., HeldSamples] = HeldSamples) -> HeldSamples:
    return kind(samples=[{"images": x} for x in normal(n, 1, 8, 8, seed=seed)])


def test_sketches_are_kept(cnn: FrozenModel, tmp_path: Path) -> None:
    job = planned(cnn, images(40), 5)
    store = SketchStore(tmp_path, job.identity)
    first = select_here(job, images(40), store)
    assert len(first.keys) == 5
    assert open_tasks(job, store) == ()
    again = SketchStore(tmp_path, job.identity)
    assert select_here(job, images(40, kind=Unreadable), again) == first
    more = HeldSamples(samples=[*images(40).samples, *images(3, seed=2).samples])
    (task,) = open_tasks(planned(cnn, more, 5), again)
    assert task.keys == ("0040", "0041", "0042")


def test_a_damaged_file_is_measured_again(cnn: FrozenModel, tmp_path: Path) -> None:
    source = images(40)
    job = planned(cnn, source, 5)
    store = SketchStore(tmp_path, job.identity)
    first = select_here(job, source, store)
    short, altered, _ = sorted(store.folder.glob("*.npz"))
    short.write_bytes(short.read_bytes()[:200])
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(bytes(content))
    (store.folder / ".half.npz.1.partial").write_bytes(b"half")
    left = open_tasks(job, store)
    assert 2 <= sum(len(task.ids) for task in left) <= 32
    assert not short.exists()
    assert not altered.exists()
    assert select_here(job, source, store) == first


def test_another_identity_has_sketches_of_its_own(cnn: FrozenModel, tmp_path: Path) -> None:
    source = images(20)
    job = planned(cnn, source, 5)
    store = SketchStore(tmp_path, job.identity)
    select_here(job, source, store)
    other = SketchStore(tmp_path, job.identity | {"model_digest": "other"})
    assert other.folder != store.folder
    assert len(open_tasks(job, other)) == 2


def test_putting_a_table_twice_changes_nothing(tmp_path: Path) -> None:
    store = SketchStore(tmp_path, {})
    table = table_of(drawn(3))
    store.put(table)
    store.put(table)
    (found,) = store.tables(table.ids)
    assert found.digest == table.digest
    assert store.held(3) == frozenset(table.ids)
    assert list(store.tables(["none of these"])) == []


def test_a_number_above_the_set_takes_all_and_runs_nothing(
    cnn: FrozenModel, tmp_path: Path
) -> None:
    source = images(6, kind=Unreadable)
    job = planned(cnn, source, 10)
    chosen = select_here(job, source, SketchStore(tmp_path, job.identity))
    assert chosen.keys == tuple(source.keys())
    assert chosen.notes == ("data.select_num=10: all 6 samples are taken",)


def test_a_number_below_one(cnn: FrozenModel) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(cnn, images(6), 0)
    assert (caught.value.code, caught.value.where) == ("QD104", "data.select_num")


def test_repeated_samples_are_no_candidates(cnn: FrozenModel, tmp_path: Path) -> None:
    samples = images(6).samples
    source = HeldSamples(samples=[*samples, *samples])
    job = planned(cnn, source, 6)
    chosen = select_here(job, source, SketchStore(tmp_path, job.identity))
    assert chosen.keys == tuple(source.keys()[:6])
    assert (chosen.n_samples, len(chosen.notes)) == (6, 7)


def test_a_sample_that_changed_since_it_was_named(cnn: FrozenModel, tmp_path: Path) -> None:
    job = planned(cnn, images(6), 2)
    with pytest.raises(DataError) as caught:
        select_here(job, images(6, seed=9), SketchStore(tmp_path, job.identity))
    assert caught.value.code == "QD306"


def two_inputs(path: Path, batch: int | str) -> FrozenModel:
    """One MatMul of two activations, over a batch of fixed or free size."""
    return frozen_from(
        model(
            [helper.make_node("MatMul", ["a", "b"], ["c"], name="mm")],
            [value("a", [batch, 3, 4]), value("b", [batch, 4, 2])],
            [value("c", [batch, 3, 2])],
        ),
        path,
    )


def pairs(n: int) -> HeldSamples:
    left, right = normal(n, 3, 4, seed=1), normal(n, 4, 2, seed=2)
    return HeldSamples(
        samples=[
            {"a": a * np.float32(4 ** (i % 3)), "b": b}
            for i, (a, b) in enumerate(zip(left, right, strict=True))
        ]
    )


def test_models_of_several_inputs_and_of_fixed_batch(tmp_path: Path) -> None:
    source = pairs(24)
    free, fixed = (
        planned(two_inputs(tmp_path / f"{batch}.onnx", batch), source, 6) for batch in ("n", 4)
    )
    assert free.sketch.taps.tensors == ("a", "b", "c")
    tables = [
        SketchTable.concatenate(
            [
                sketch_samples(task, Sketcher(job.sketch), source, job)
                for task in open_tasks(job, SketchStore(tmp_path, job.identity))
            ]
        )
        for job in (free, fixed)
    ]
    assert np.array_equal(tables[0].counts * 4, tables[1].counts)
    assert np.array_equal(tables[0].maxima, tables[1].maxima)
    assert choose(features(tables[0]), 6) == choose(features(tables[1]), 6)


def test_a_nan_names_tensor_and_sample_or_counts_nowhere(tmp_path: Path) -> None:
    frozen = frozen_from(
        model(
            [
                helper.make_node("Sqrt", ["x"], ["root"]),
                helper.make_node("MatMul", ["root", "w"], ["y"], name="mm"),
            ],
            [value("x", ["n", 4])],
            [value("y", ["n", 2])],
            {"w": normal(4, 2)},
        ),
        tmp_path / "sqrt.onnx",
    )
    samples = [{"x": np.ones(4, np.float32)} for _ in range(3)]
    samples[1] = {"x": np.array([1, -1, 4, 9], np.float32)}
    samples[2] = {"x": np.full(4, 2, np.float32)}
    source = HeldSamples(samples=samples)
    job = planned(frozen, source, 1)
    with pytest.raises(DataError) as caught:
        select_here(job, source, SketchStore(tmp_path, job.identity))
    assert caught.value.code == "QD309"
    assert "tensor root, sample 0001" in caught.value.where
    job = planned(frozen, source, 1, on_nan="report")
    assert len(select_here(job, source, SketchStore(tmp_path, job.identity)).keys) == 1


def decoder_model(path: Path) -> FrozenModel:
    """Tokens of 5 words, looked up and appended to a cache, of which each is multiplied."""
    return frozen_from(
        model(
            [
                helper.make_node("Gather", ["words", "input_ids"], ["new"]),
                helper.make_node(
                    "Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=1
                ),
                helper.make_node("MatMul", ["new", "w"], ["logits"], name="mm"),
            ],
            [
                value("input_ids", ["batch", "sequence"], TensorProto.INT64),
                value("past_key_values.0.key", ["batch", "past_sequence", 4]),
            ],
            [value("logits", ["batch", "sequence", 2]), value("present.0.key", None)],
            {"words": normal(5, 4), "w": normal(4, 2, seed=1)},
        ),
        path,
    )


def test_decoders_run_in_phases(tmp_path: Path) -> None:
    frozen = decoder_model(tmp_path / "decoder.onnx")
    graph = Graph(frozen)
    decoder = find_decoder(input_specs(graph), graph.output_names, n_steps=2)
    assert decoder is not None
    source = HeldSamples(
        samples=[
            {"input_ids": np.random.default_rng(i).integers(0, 5, 6).astype(np.int64)}
            for i in range(8)
        ]
    )
    job = planned(frozen, source, 3, decoder=decoder)
    (task,) = open_tasks(job, SketchStore(tmp_path, job.identity))
    table = sketch_samples(task, Sketcher(job.sketch), source, job)
    cache = job.sketch.taps.tensors.index("present.0.key")
    # Caches of 4, 5 and 6 tokens of width 4: the steps saw what the phases before had left.
    assert table.counts[:, cache].sum(axis=(1, 2)).tolist() == [(4 + 5 + 6) * 4] * 8
    assert len(select_here(job, source, SketchStore(tmp_path, job.identity)).keys) == 3


# Over Ray


def test_a_pool_chooses_what_one_process_does(
    cluster: RaySession, cnn: FrozenModel, tmp_path: Path
) -> None:
    source = digits(70)
    job = planned(cnn, source, 8)
    here = select_here(job, source, SketchStore(tmp_path / "here", job.identity))
    store = SketchStore(tmp_path / "pool", job.identity)
    spec = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)
    seen: list[SelectionProgress] = []
    assert select(job, source, store, spec, on_progress=seen.append) == here
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, len(job.samples), len(job.samples))
    resumed: list[SelectionProgress] = []
    assert select(job, source, store, spec, on_progress=resumed.append) == here
    assert [state.resumed for state in resumed] == [len(job.samples)]


def test_the_worker_needs_no_ray(cnn: FrozenModel, tmp_path: Path) -> None:
    source = samples_of("images", 1, 8, 8, n=5)
    job = planned(cnn, source, 2)
    worker = SketchWorker(job, source)
    (task,) = open_tasks(job, SketchStore(tmp_path, job.identity))
    with pytest.raises(RuntimeError, match="before setup"):
        worker.run(task)
    assert worker.setup()["fingerprint"] == job.identity["fingerprint"]
    assert worker.run(task).digest == worker.run(task).digest


# Lists


def test_the_list_is_what_other_settings_read(tmp_path: Path) -> None:
    source = images(10)
    path = write_list(tmp_path / auto_name(Path("set.npz")), ["0003", "0001"])
    assert path.name == "set_auto.txt"
    assert path.read_text() == "0003\n0001\n"
    assert Listed(source=source, list_file=path).keys() == ["0003", "0001"]


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("images.txt", "images_auto.txt"),
        ("a/b/photos", "photos_auto.txt"),
        ("imagenet.v2", "imagenet.v2_auto.txt"),
        ("set.NPZ", "set_auto.txt"),
    ],
)
def test_name_of_the_list(origin: str, name: str) -> None:
    assert auto_name(Path(origin)) == name


@pytest.mark.parametrize("key", ["a\nb", " a", "a ", ""])
def test_a_key_that_is_no_line(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError) as caught:
        write_list(tmp_path / "list.txt", [key])
    assert caught.value.code == "QD306"
    assert not (tmp_path / "list.txt").exists()
