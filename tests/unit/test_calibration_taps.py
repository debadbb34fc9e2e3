"""Law 2: taps that are missing later are added by running just them, and no bit is another."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    calibrate_here,
    load_phases,
    open_work,
    prepare,
)
from qdist.data.source import Feeds
from qdist.demo import demo_file
from qdist.errors import ModelError
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.taps import find_taps
from qdist.stats.observer import Observer
from qdist.store.zarr_store import ZarrStore, create_store
from tests.onnx_models import EXECUTION, HeldSamples, samples_of

GRAPH = Graph(freeze(load_model(demo_file("digits_cnn.onnx"))), EXECUTION)
EVERY = find_taps(GRAPH).tensors
(INPUT,) = GRAPH.input_names
N = 10


class Watched(HeldSamples):
    """Counts how often each sample is loaded."""

    @property
    def loads(self) -> Counter[str]:
        return self.__dict__.setdefault("_loads", Counter())

    def load(self, key: str) -> Feeds:
        self.loads[key] += 1
        return HeldSamples.load(self, key)


def watched(n: int = N) -> Watched:
    return Watched(samples=samples_of(INPUT, 1, 8, 8, n=n).samples)


def job_of(taps: str | tuple[str, ...], source: HeldSamples | None = None) -> CalibrationJob:
    wanted = CalibrationSettings(micro_batch=2, shard_samples=4, taps=taps)
    return prepare(GRAPH.model, source or watched(), wanted, EXECUTION, graph=GRAPH)


@cache
def at_once(taps: str | tuple[str, ...]) -> str:
    """The digest of all micro-batches measured in one go, without a store."""
    job, source = job_of(taps), watched()
    batches = [(batch.keys, partial(load_phases, batch, source, job.inputs)) for batch in job.grid]
    return Observer(job.observer).observe(batches).digest


def made(store: ZarrStore) -> Counter[tuple[str, ...]]:
    """How many shards were measured with each set of taps."""
    return Counter(receipt.tensors for receipt in store.receipts())


def test_compute_and_then_all_runs_the_others_alone(tmp_path: Path) -> None:
    some = job_of("compute")
    store = create_store(tmp_path / "s", some.identity)
    first = calibrate_here(some, watched(), store)
    assert first.record.tensors == some.taps.tensors
    assert 0 < len(some.taps.tensors) < len(EVERY)
    job = job_of("all")
    assert job.identity == some.identity
    (observer,) = open_work(job, store).observers
    rest = tuple(tensor for tensor in EVERY if tensor not in some.taps.tensors)
    assert observer.taps.tensors == rest
    source = watched()
    merged = calibrate_here(job, source, store)
    assert merged.record.digest == at_once("all")
    assert made(store) == {some.taps.tensors: 3, rest: 3}
    assert set(source.loads.values()) == {1}
    assert open_work(job, store).tasks == ()
    # And back: fewer taps than there are need nothing at all.
    source = watched()
    again = calibrate_here(job_of("compute"), source, store)
    assert again.record.digest == first.record.digest == at_once("compute")
    assert not source.loads
    assert store.latest().record.tensors == some.taps.tensors


@settings(max_examples=6)
@given(
    tap_sets=st.lists(
        st.sets(st.sampled_from(EVERY), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_taps_added_one_after_the_other_are_those_measured_at_once(
    tmp_path_factory: pytest.TempPathFactory, tap_sets: list[set[str]]
) -> None:
    folder = tmp_path_factory.mktemp("taps")
    so_far: set[str] = set()
    store = create_store(folder / "s", job_of("all").identity)
    for wanted in tap_sets:
        job = job_of(tuple(sorted(wanted)))
        missing = {t for spec in open_work(job, store).observers for t in spec.taps.tensors}
        assert missing == wanted - so_far
        merged = calibrate_here(job, watched(), store)
        so_far |= wanted
        assert merged.record.tensors == tuple(t for t in EVERY if t in wanted)
    together = tuple(t for t in EVERY if t in so_far)
    source = watched()
    merged = calibrate_here(job_of(together), source, store)
    assert merged.record.digest == at_once(together)
    assert not source.loads
    assert sum(made(store).values()) <= 3 * len(tap_sets)


def test_taps_and_samples_that_are_both_missing(tmp_path: Path) -> None:
    """Some taps of the first samples; then all taps of more."""
    few = watched(4)
    some = job_of(EVERY[:3], few)
    store = create_store(tmp_path / "s", some.identity)
    calibrate_here(some, few, store)
    source = watched()
    job = job_of("all", source)
    named = dict(source.loads)
    merged = calibrate_here(job, source, store)
    assert merged.record.digest == at_once("all")
    runs = {key: n - named.get(key, 0) for key, n in source.loads.items()}
    # The first four lack some taps; the others lack them all, in as many sets as the taps fall in.
    assert [runs[f"{i:04d}"] for i in range(4)] == [1] * 4
    assert {runs[f"{i:04d}"] for i in range(4, N)} <= {1, 2}


def test_patterns_and_layers_choose_what_their_names_say(tmp_path: Path) -> None:
    layer = next(node for node in GRAPH.nodes.values() if node.op_type == "Conv")
    job = job_of((layer.name,))
    assert set(job.taps.tensors) == {layer.input[0], layer.output[0]}
    pattern = job_of((f"{layer.output[0][:-1]}?",))
    assert layer.output[0] in pattern.taps.tensors
    store = create_store(tmp_path / "s", job.identity)
    merged = calibrate_here(job, watched(), store)
    assert merged.record.tensors == job.taps.tensors


@pytest.mark.parametrize("entry", ["no_such_tensor", "no*such*pattern"])
def test_names_that_fit_nothing_are_refused_with_those_that_come_close(entry: str) -> None:
    with pytest.raises(ModelError) as caught:
        job_of((EVERY[0], entry))
    assert caught.value.code == "QD208"
    assert entry in str(caught.value)
