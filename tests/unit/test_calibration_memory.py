"""A memory budget: other pieces, the same statistics; and what cannot fit is refused at once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.errors import ModelError
from qdist.model.estimate import BASE_BYTES
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.store.zarr_store import create_store
from tests.onnx_models import EXECUTION, HeldSamples, samples_of
from tests.unit.test_segments import chain

MIB = 1 << 20
N_LAYERS, WIDTH = 6, 1024
SOURCE = samples_of("h0", WIDTH, n=6)


@pytest.fixture(scope="module")
def external(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    """Six weights of 4 MiB beside the graph."""
    return chain(tmp_path_factory.mktemp("chain"), N_LAYERS, WIDTH)


@pytest.fixture(scope="module")
def inline(external: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    """The same with its weights inside."""
    path = tmp_path_factory.mktemp("inline") / "model.onnx"
    onnx.save(onnx.load(external.source), path)
    return freeze(load_model(path))


def digest(frozen: FrozenModel, budget: int | None, store: Path) -> tuple[str, int]:
    settings = CalibrationSettings(micro_batch=2, shard_samples=2, memory_budget_bytes=budget)
    job = prepare(frozen, SOURCE, settings, EXECUTION)
    merged = calibrate_here(job, SOURCE, create_store(store, job.identity))
    n_segments = len(job.observer.segments)
    if n_segments > 1:
        assert any(f"the model runs in {n_segments} segments" in note for note in merged.notes)
        assert budget is not None
        assert all(segment.estimate_bytes <= budget for segment in job.observer.segments)
    return merged.record.digest, n_segments


def test_external_weights_in_segments(external: FrozenModel, tmp_path: Path) -> None:
    plain, one = digest(external, None, tmp_path / "plain")
    roomy, still_one = digest(external, 4096 * MIB, tmp_path / "roomy")
    # The spool takes a sixteenth of the budget.
    tight, several = digest(external, (BASE_BYTES + 18 * MIB) * 16 // 15, tmp_path / "tight")
    assert (one, still_one) == (1, 1)
    assert several > 1
    assert plain == roomy == tight


def test_weights_inside_the_graph_in_segments(inline: FrozenModel, tmp_path: Path) -> None:
    plain, _ = digest(inline, None, tmp_path / "plain")
    budget = (BASE_BYTES + (N_LAYERS * 4 + 24) * MIB) * 16 // 15
    tight, several = digest(inline, budget, tmp_path / "tight")
    assert several > 1
    assert plain == tight


def test_a_budget_is_no_part_of_the_identity(external: FrozenModel, tmp_path: Path) -> None:
    """Half of it measured with a budget, the rest without."""
    budget = (BASE_BYTES + 18 * MIB) * 16 // 15
    few = HeldSamples(samples=SOURCE.samples[:4])
    settings = CalibrationSettings(micro_batch=2, shard_samples=2, memory_budget_bytes=budget)
    first = prepare(external, few, settings, EXECUTION)
    calibrate_here(first, few, create_store(tmp_path / "s", first.identity))
    found, _ = digest(external, None, tmp_path / "s")
    assert found == digest(external, None, tmp_path / "plain")[0]


@pytest.mark.parametrize("budget", [1, 100 * MIB, BASE_BYTES + MIB])
def test_an_impossible_budget_is_refused_in_advance(external: FrozenModel, budget: int) -> None:
    settings = CalibrationSettings(micro_batch=2, memory_budget_bytes=budget)
    with pytest.raises(ModelError) as caught:
        prepare(external, SOURCE, settings, EXECUTION)
    assert caught.value.code == "QD211"
    text = str(caught.value)
    assert "matmul" in text
    assert "weight w" in text
    assert "raise the memory budget to" in text


def test_the_budget_that_the_refusal_names_is_enough(external: FrozenModel) -> None:
    """A user who does as told is not told again."""
    settings = CalibrationSettings(micro_batch=2, memory_budget_bytes=100 * MIB)
    with pytest.raises(ModelError) as caught:
        prepare(external, SOURCE, settings, EXECUTION)
    words = str(caught.value).split("raise the memory budget to ")[1].split()
    assert words[1] == "MiB"
    told = CalibrationSettings(micro_batch=2, memory_budget_bytes=int(words[0]) * MIB)
    assert prepare(external, SOURCE, told, EXECUTION).observer.segments
