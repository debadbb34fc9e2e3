"""Workers, nodes and drivers that die while `qdist tune` runs on two nodes.

Whatever happens, the trials end up the same, none is lost or counted twice, no plan that was
finished is scored again, and the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Command, RayCluster, wait_until
from tests.e2e.tracked import client_for, made_uri, sqlite_uri

pytestmark = pytest.mark.slow

N_TRIALS = 8
SCORE = """
import pathlib, time
import onnx

def score(executor, folder):
    model = onnx.load(executor.model_path)
    plan = {entry.key: entry.value for entry in model.metadata_props}.get("qdist.plan", "float")
    with (pathlib.Path(folder) / "begun").open("a") as file:
        file.write(plan + "\\n")
    time.sleep(0.7)
    with (pathlib.Path(folder) / "scored").open("a") as file:
        file.write(plan + "\\n")
    return int(plan[:6], 16) / 16**6 if plan != "float" else 1.0
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes of one CPU."""
    made = RayCluster(tmp_path_factory.mktemp("cluster"), n_others=1)
    try:
        yield made
    finally:
        made.close()


class Job:
    """One search in ``folder``, started as often as one likes."""

    def __init__(self, nodes: RayCluster, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        folder.mkdir(exist_ok=True)
        (folder / "score.py").write_text(SCORE)
        self.words = (
            *("tune", "search=greedy", "model=digits_cnn", "data=digits"),
            "data.calibration.limit=8",
            *("evaluation=function", f"evaluation.target={folder / 'score.py'}:score"),
            f"evaluation.arguments={{folder: '{folder}'}}",
            *(f"search.max_trials={N_TRIALS}", "search.saturations=[max,kl,percentile]"),
            *("search.sensitivity_samples=2", "compare.samples=2", "output.folder=out"),
            *(f"tracking.uri={made_uri(folder)}", f"cluster.address={nodes.address}"),
            *("cluster.workers=2", "cluster.ready_timeout_s=60"),
        )

    def start(self) -> Command:
        return Command(*self.words, folder=self.folder, extra=self.nodes.extra)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return [x for x in path.read_text().split() if x != "float"] if path.exists() else []

    def n_finished(self) -> int:
        return len(list(self.folder.glob("out/trials/trial-*/trial.json")))

    def trials(self) -> list[dict[str, Any]]:
        found = sorted((self.folder / "out" / "trials").glob("trial-*/trial.json"))
        return [json.loads(path.read_text()) for path in found]

    def answer(self) -> list[tuple[int, str, str]]:
        """What is to be the same however the search went."""
        return [(t["number"], t["label"], t["plan"]) for t in self.trials()]

    def children(self) -> list[Any]:
        client = client_for(sqlite_uri(self.folder))
        (experiment,) = client.search_experiments(filter_string="name = 'qdist'")
        runs = client.search_runs([experiment.experiment_id], max_results=200)
        assert {run.info.status for run in runs} == {"FINISHED"}
        parents = {run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags}
        children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == parents
        assert len(parents) == 1
        return children

    def check(self, expected: list[tuple[int, str, str]]) -> None:
        assert [entry[0] for entry in self.answer()] == list(range(N_TRIALS))
        assert [e[1] for e in self.answer()] == [e[1] for e in expected]
        assert [e[2] for e in self.answer()] == [e[2] for e in expected]
        assert set(Counter(self.lines("scored")).values()) == {1}
        numbers = Counter(run.data.tags["qdist.number"] for run in self.children())
        assert numbers == Counter(str(n) for n in range(N_TRIALS))
        assert wait_until(lambda: not self.nodes.workers()), "workers outlived their run"


@pytest.fixture(scope="module")
def expected(nodes: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answer of a search that nothing happens to."""
    job = Job(nodes, tmp_path_factory.mktemp("whole"))
    job.start().finish()
    job.check(job.answer())
    return job.answer()


def test_a_killed_worker_and_a_killed_driver(
    nodes: RayCluster, expected: Any, tmp_path: Path
) -> None:
    job = Job(nodes, tmp_path)
    first = job.start()
    first.wait_until(lambda: job.n_finished() >= 2)
    os.kill(nodes.workers()[0], signal.SIGKILL)
    first.wait_until(lambda: job.n_finished() >= 4)
    first.kill()
    assert wait_until(lambda: not nodes.workers()), "workers outlived their driver"
    assert "is gone" in first.output
    before = job.lines("scored")
    assert len(before) < len({entry[2] for entry in expected})
    again = job.start().finish()
    assert "were tried before" in again
    job.check(expected)
    assert job.lines("scored")[: len(before)] == before
    assert not (tmp_path / "out" / "trials-1").exists()


def test_a_killed_node(nodes: RayCluster, expected: Any, tmp_path: Path) -> None:
    job = Job(nodes, tmp_path)
    run = job.start()
    run.wait_until(lambda: job.n_finished() >= 2)
    nodes.kill_node()
    try:
        printed = run.finish()
    finally:
        nodes.add_node()
    assert "is gone" in printed
    job.check(expected)


CLASS = """
import pathlib, time
from metric import metric_register, custom_metric_base

@metric_register
class slow_at_the_end(custom_metric_base):
    def init_params(self, metric_input):
        self.folder = pathlib.Path(metric_input)

    def load_and_analysis(self, blobsfile, imglist):
        if (self.folder / "out" / "model.onnx").exists():
            (self.folder / "asleep").touch()
            time.sleep(120)
        return 0.5, 1

    def accumulate_results(self, result):
        return result
"""


def test_ctrl_c_after_the_search_leaves_the_report(nodes: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "slow_at_the_end.py").write_text(CLASS)
    run = Command(
        *("tune", "search=greedy", "model=digits_cnn", "data=digits", "search.max_trials=2"),
        *("data.calibration.limit=8", "data.evaluation.limit=16", "search.sensitivity_samples=2"),
        *(
            "evaluation=class",
            "evaluation.metric_cls=slow_at_the_end",
            f"evaluation.folder={tmp_path}",
        ),
        *(f"evaluation.metric_input='{tmp_path}'", "evaluation.search_share=0.5"),
        *("compare.samples=2", "output.folder=out", f"tracking.uri={made_uri(tmp_path)}"),
        *(f"cluster.address={nodes.address}", "cluster.ready_timeout_s=60"),
        folder=tmp_path,
        extra=nodes.extra,
    )
    run.wait_until((tmp_path / "asleep").exists)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130, run.output
    assert "leaves out what the search did not see" in run.output
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= {"model.onnx", "plan.json", "report.html", "front.html"}
    assert "unseen.json" not in found


def test_ctrl_c_leaves_the_best_so_far(nodes: RayCluster, expected: Any, tmp_path: Path) -> None:
    job = Job(nodes, tmp_path)
    run = job.start()
    run.wait_until(lambda: job.n_finished() >= 3)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130, run.output
    assert "stopped by Ctrl-C" in run.output
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        *("model.onnx", "plan.json", "report.html", "front.html")
    }
    client = client_for(sqlite_uri(tmp_path))
    (experiment,) = client.search_experiments(filter_string="name = 'qdist'")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`qdist.stopped` != ''")
    assert parent.info.status == "KILLED"
    assert parent.data.tags["qdist.stopped"] == "interrupt"
    assert "best_score" in parent.data.metrics
    job.start().finish()
    job.check(expected)
