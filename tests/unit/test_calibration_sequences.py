"""Padding, length buckets and decoders with a cache, through a whole calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdist.calibration import (
    CalibrationJob,
    CalibrationSettings,
    Merged,
    calibrate_here,
    input_specs,
    prepare,
)
from qdist.data.decoder import Phased, find_decoder
from qdist.data.sequence import Bucketed, Trimmed, sequence_axes
from qdist.data.source import DataSource
from qdist.errors import DataError, ModelError, StoreError
from qdist.model.graph import Graph
from qdist.model.segments import cut_at
from qdist.store.zarr_store import create_store
from tests.onnx_models import EXECUTION, HeldSamples, frozen_from
from tests.unit.test_data_decoder import HEAD, HEADS, LAYERS, VOCABULARY, decoder_model
from tests.unit.test_data_decoder import WIDTH as DECODER_WIDTH
from tests.unit.test_data_sequence import LENGTH, WIDTH, Memory, samples, transformer

N = 8
PADDED, PLACES = samples(N)
LENGTHS = [place.stop - place.start for place in PLACES]
MASKED = CalibrationSettings(micro_batch=2, mask_input="mask")


def graph_of(model: bytes, folder: Path) -> Graph:
    return Graph(frozen_from(ModelProto.FromString(model), folder / "model.onnx"), EXECUTION)


def calibrated(
    graph: Graph, source: DataSource, settings: CalibrationSettings, store: Path
) -> tuple[CalibrationJob, Merged]:
    job = prepare(graph.model, source, settings, EXECUTION, graph=graph)
    return job, calibrate_here(job, source, create_store(store, job.identity))


@pytest.fixture
def fixed(tmp_path: Path) -> Graph:
    return graph_of(transformer(LENGTH), tmp_path)


@pytest.fixture
def open_ended(tmp_path: Path) -> Graph:
    return graph_of(transformer("sequence"), tmp_path)


def trimmed(graph: Graph) -> Trimmed:
    source = Memory(samples=PADDED)
    axes = sequence_axes(input_specs(graph), "mask", source.load("0"))
    return Trimmed(source=source, mask_input="mask", axes=axes)


def counts(merged: Merged) -> dict[str, int]:
    return {t: merged.record.histogram(t).n_values for t in merged.record.tensors}


def test_padding_of_a_model_of_one_length_counts_nowhere(fixed: Graph, tmp_path: Path) -> None:
    _, merged = calibrated(fixed, Memory(samples=PADDED), MASKED, tmp_path / "s")
    found = counts(merged)
    assert found["embedded"] == found["hidden"] == sum(LENGTHS) * WIDTH
    assert found["scores"] == sum(n * n for n in LENGTHS) * 2
    _, plain = calibrated(
        fixed, Memory(samples=PADDED), CalibrationSettings(micro_batch=2), tmp_path / "p"
    )
    assert counts(plain)["embedded"] == N * LENGTH * WIDTH


def test_statistics_with_and_without_a_mask_do_not_mix(fixed: Graph, tmp_path: Path) -> None:
    """Nothing else in the identity tells the two apart where the samples stay as they are."""
    source = Memory(samples=PADDED)
    job, _ = calibrated(fixed, source, CalibrationSettings(micro_batch=2), tmp_path / "s")
    with pytest.raises(StoreError) as caught:
        calibrated(fixed, source, MASKED, tmp_path / "s")
    assert caught.value.code == "QD401"
    assert "mask" in str(caught.value)
    masked, _ = calibrated(fixed, source, MASKED, tmp_path / "m")
    axes = CalibrationSettings(micro_batch=2, mask_input="mask", sequence_axes={"hidden": (1,)})
    with pytest.raises(StoreError) as caught:
        calibrated(fixed, source, axes, tmp_path / "m")
    assert caught.value.code == "QD401"
    assert job.identity != masked.identity


def test_trimmed_samples_and_buckets_count_the_same_tokens(
    open_ended: Graph, tmp_path: Path
) -> None:
    alone = CalibrationSettings(micro_batch=1, mask_input="mask")
    cut = trimmed(open_ended)
    _, expected = calibrated(open_ended, cut, alone, tmp_path / "t")
    bucketed = Bucketed(
        source=cut,
        mask_input="mask",
        lengths=(4, LENGTH),
        axes=cut.axes,
        pad_values={"ids": 0, "positions": 63},
        mask_dtype="int64",
    )
    settings = CalibrationSettings(micro_batch=3, mask_input="mask", bucketed=True, shard_samples=3)
    job, merged = calibrated(open_ended, bucketed, settings, tmp_path / "b")
    # Of equal lengths each, and fewer than samples.
    assert {batch.shapes[0][1][-1] for batch in job.grid} == {4, LENGTH}
    assert [len(batch) for batch in job.grid] == [3, 2, 3]
    assert counts(merged) == counts(expected)
    for tensor in ("embedded", "hidden"):
        one, other = merged.record.histogram(tensor), expected.record.histogram(tensor)
        np.testing.assert_array_equal(one.bins, other.bins)
        np.testing.assert_array_equal(one.counts, other.counts)
        assert (one.minimum, one.maximum) == (other.minimum, other.maximum)


def test_a_mask_that_is_no_input_is_refused(fixed: Graph) -> None:
    settings = CalibrationSettings(mask_input="attention_mask")
    with pytest.raises(DataError) as caught:
        prepare(fixed.model, Memory(samples=PADDED), settings, EXECUTION, graph=fixed)
    assert caught.value.code == "QD307"
    assert "ids, mask, positions" in str(caught.value)


def test_axes_of_a_tensor_that_nothing_measures_are_refused(fixed: Graph) -> None:
    settings = CalibrationSettings(mask_input="mask", sequence_axes={"hiden": (1,)})
    with pytest.raises(ModelError) as caught:
        prepare(fixed.model, Memory(samples=PADDED), settings, EXECUTION, graph=fixed)
    assert caught.value.code == "QD208"
    assert "did you mean hidden" in str(caught.value)


TOKENS = 9


def decoder_source(graph: Graph, n_steps: int, n: int = 4) -> Phased:
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (n, TOKENS))
    decoder = find_decoder(input_specs(graph), graph.output_names, n_steps=n_steps)
    assert decoder is not None
    return Phased(source=HeldSamples(samples=[{"input_ids": row} for row in ids]), decoder=decoder)


@pytest.mark.parametrize("budget", [None, 400 << 20])
def test_a_decoder_is_measured_in_prefill_and_in_decode(budget: int | None, tmp_path: Path) -> None:
    graph = graph_of(decoder_model(), tmp_path)
    settings = CalibrationSettings(micro_batch=2, memory_budget_bytes=budget)
    n_steps, n = 3, 4
    job, merged = calibrated(graph, decoder_source(graph, n_steps), settings, tmp_path / "s")
    assert merged.record.n_samples == n
    found = counts(merged)
    assert found[job.taps.row_of("h_0")] == n * TOKENS * DECODER_WIDTH
    assert found[job.taps.row_of("logits")] == n * TOKENS * VOCABULARY
    past = sum(range(TOKENS - n_steps, TOKENS))
    for i in range(LAYERS):
        for what in ("key", "value"):
            row = job.taps.row_of(f"past_key_values.{i}.{what}")
            assert found[row] == n * past * HEADS * HEAD
    prefill = TOKENS - n_steps
    pairs = prefill * prefill + sum(range(prefill + 1, TOKENS + 1))
    assert found[job.taps.row_of("weights_0")] == n * pairs * HEADS


@pytest.mark.parametrize("n_steps", [0, 2])
def test_a_decoder_in_segments_gives_the_same_statistics(n_steps: int, tmp_path: Path) -> None:
    graph = graph_of(decoder_model(), tmp_path)
    source = decoder_source(graph, n_steps)
    # Large, but so that the shapes of every phase are learned.
    settings = CalibrationSettings(micro_batch=2, memory_budget_bytes=8 << 30)
    job, whole = calibrated(graph, source, settings, tmp_path / "whole")
    assert len(job.observer.segments) == 1
    spec = job.observer
    shapes = [dict(phase) for phase in job.measuring.shapes]
    assert len(shapes) == 1 + n_steps
    n_nodes = len(graph.nodes)
    segments = cut_at(
        graph,
        spec.taps,
        shapes,
        [n_nodes * i // 4 for i in range(1, 4)],
        hands=[output for _, output in spec.carry],
        execution=EXECUTION,
    )
    assert len(segments) > 1
    parts = replace(job, observer=replace(spec, segments=segments))
    store = create_store(tmp_path / "parts", job.identity)
    assert calibrate_here(parts, source, store).record.digest == whole.record.digest
