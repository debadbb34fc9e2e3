"""End-to-end divergences with the float prefix reused: as by whole runs of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdist.demo import demo_file
from qdist.emit.writer import write_model
from qdist.evaluate import end_to_end
from qdist.evaluate.end_to_end import DivergenceTask, divergences, in_order
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.session import scoring_session
from qdist.plan.planner import Planner
from qdist.simulate.assemble import assemble
from qdist.simulate.twins import only
from tests.onnx_models import EXECUTION, HeldSamples, planner_for, projected, samples_of

Case = tuple[FrozenModel, Planner, HeldSamples]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    frozen = freeze(load_model(demo_file("digits_vit.onnx")))
    source = samples_of("images", 1, 8, 8, n=6)
    return frozen, planner_for(frozen, source, tmp_path_factory.mktemp("vit") / "store"), source


def tasks_of(planner: Planner, *precisions: str) -> list[DivergenceTask]:
    """Every fifth layer alone, and two pairs of layers, at each precision."""
    names = [layer.name for layer in planner.choosable()]
    groups = [(name,) for name in names[::9]] + [(names[1], names[-1]), (names[4], names[5])]
    return [
        DivergenceTask(key=f"{precision} {i}", names=group, projected=projected(planner, precision))
        for precision in precisions
        for i, group in enumerate(groups)
    ]


def whole_run(case: Case, task: DivergenceTask, folder: Path, kind: str) -> float:
    """By running both models from their inputs, with the measure written out."""
    frozen, _, source = case
    graph = assemble(frozen, only(task.projected, set(task.names)))
    path = write_model(graph, folder / "model.onnx").path
    x = np.stack([sample["images"] for sample in source.samples])
    quantized = scoring_session(path, EXECUTION)
    exact = scoring_session(frozen.graph_bytes, EXECUTION, frozen.data_folder)
    q, f = (s.run(None, {"images": x})[0].astype(np.float64) for s in (quantized, exact))
    if kind == "relative":
        return float(((q - f) ** 2).sum() / (f**2).sum())
    p, r = (t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in (f, q))
    return float((np.exp(p) * (p - r)).sum(-1).mean())


@pytest.mark.parametrize("measure", ["relative", "kl"])
def test_the_reused_prefix_gives_what_whole_runs_give(
    vit: Case, tmp_path: Path, measure: str
) -> None:
    frozen, planner, source = vit
    tasks = tasks_of(planner, "int8", "w4a8")
    found = divergences(frozen, tasks[::-1], source, EXECUTION, measure=measure, batch=4)
    assert found.keys() == {task.key for task in tasks}
    for task in tasks:
        expected = whole_run(vit, task, tmp_path, measure)
        assert found[task.key] == pytest.approx(expected, rel=5e-2, abs=1e-9), task.key
    assert max(found.values()) > 10 * min(found.values())


def test_float_layers_run_once_for_all_tasks(vit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, planner, source = vit
    tasks = tasks_of(planner, "int8")
    sizes: list[int] = []
    original = scoring_session

    def counted(model: bytes | Path, *rest: object) -> object:
        session = original(model, *rest)  # type: ignore[arg-type]
        if isinstance(model, bytes):
            sizes.append(len(ModelProto.FromString(model).graph.node))
        return session

    monkeypatch.setattr(end_to_end, "scoring_session", counted)
    divergences(frozen, tasks, source, EXECUTION)
    whole, *parts = sizes
    assert len(parts) > 3
    assert sum(parts) <= whole


def test_neighbours_come_together_and_nothing_gives_nothing(vit: Case) -> None:
    frozen, planner, source = vit
    tasks = tasks_of(planner, "int8", "w4a8")
    order = [layer.name for layer in planner.layers]
    places = [min(map(order.index, task.names)) for task in in_order(frozen, tasks)]
    assert places == sorted(places)
    assert divergences(frozen, [], source, EXECUTION) == {}
    with pytest.raises(ValueError, match="measure must be one of"):
        divergences(frozen, tasks, source, EXECUTION, measure="top1")
