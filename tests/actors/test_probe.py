"""End-to-end sensitivities over a real pool."""

from __future__ import annotations

from pathlib import Path

from actors.probe import ProbeSetup, probe
from actors.session import ClusterSpec, RaySession
from qdist.demo import demo_file
from qdist.evaluate.end_to_end import DivergenceTask, divergences
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from tests.onnx_models import EXECUTION, planner_for, projected, samples_of


def test_workers_of_a_pool_find_what_one_process_finds(cluster: RaySession, tmp_path: Path) -> None:
    frozen = freeze(load_model(demo_file("digits_cnn.onnx")))
    source = samples_of("images", 1, 8, 8, n=6)
    planner = planner_for(frozen, source, tmp_path / "store")
    plan = projected(planner)
    tasks = [
        DivergenceTask(key=layer.name, names=(layer.name,), projected=plan)
        for layer in planner.choosable()
    ]
    setup = ProbeSetup(frozen=frozen, source=source, execution=EXECUTION)
    heard: dict[str, float] = {}
    spec = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)
    found = probe(setup, tasks, spec, on_done=heard.update)
    assert heard == found == divergences(frozen, tasks, source, EXECUTION)
    assert list(found) == [task.key for task in tasks]
    assert all(value > 0 for value in found.values())
