"""Sessions: what is refused, how fast, and what a worker sees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

import qdist
from actors.session import (
    ClusterSpec,
    RaySession,
    count_places,
    crowding_notes,
    machine_cores,
    ray_session,
    worker_runtime_env,
)
from qdist.errors import ClusterError

ROOT = Path(qdist.__file__).resolve().parents[1]


def run_elsewhere(code: str, cwd: Path, *arguments: str, root: Path = ROOT, **env: str) -> str:
    """Standard output of ``code`` in a fresh process in ``cwd``, with our packages in ``root``."""
    script = cwd / "driver.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n" + textwrap.dedent(code))
    hidden = ("RAY_", "PYTHONPATH")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_initialised_ray_is_reused_and_stays_up(cluster: RaySession) -> None:
    spec = ClusterSpec(address="127.0.0.1:1", n_workers=1, cpus_per_worker=0.5)
    with ray_session(spec) as session:
        assert not session.owned
        assert session.resources["CPU"] == 2
        assert session.n_nodes == 1
    assert cluster.owned
    assert ray.is_initialized()


def test_infeasible_resources_are_refused(cluster: RaySession) -> None:
    spec = ClusterSpec(address=None, n_workers=3, cpus_per_worker=1)
    with pytest.raises(ClusterError) as caught, ray_session(spec):
        pytest.fail("the session opened")
    assert caught.value.code == "QD802"
    assert "room for 2 such workers on 1 node(s) with 2 CPU" in caught.value.got
    assert "3 workers with 1 CPU" in caught.value.expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "does not answer"),
        ("ray://127.0.0.1:1", "does not answer"),
        ("no-port", "no-port"),
    ],
)
def test_wrong_address_is_refused_quickly(tmp_path: Path, address: str, text: str) -> None:
    code = """
        from actors.session import ClusterSpec, ray_session
        from qdist.errors import ClusterError
        try:
            with ray_session(ClusterSpec(address=sys.argv[1], n_workers=1, cpus_per_worker=1)):
                pass
        except ClusterError as error:
            print(error.code, error.where, error.got)
    """
    begin = time.monotonic()
    printed = run_elsewhere(code, tmp_path, address)
    assert time.monotonic() - begin < 15
    assert printed.startswith(f"QD801 cluster.address={address} ")
    assert text in printed


OWN_CLUSTER = """
    import json, os
    from pathlib import Path
    from actors.pool import WorkerPool
    from actors.session import ClusterSpec, ray_session
    import ray

    class Where:
        def setup(self):
            import actors, qdist
            return {"qdist": qdist.__file__, "threads": os.environ["NUMBA_NUM_THREADS"],
                    "extra": os.environ["EXTRA"]}
        def run(self, task):
            return task + 1

    spec = ClusterSpec(address=None, n_workers=1, cpus_per_worker=0.5,
                       worker_env={"EXTRA": "yes"})
    with ray_session(spec) as session:
        assert session.owned
        with WorkerPool(spec, Where, name="where") as pool:
            pool.submit(1)
            event = pool.next_event(30)
            facts = dict(pool.facts[0])
    home = [str(p) for p in Path.home().rglob("*")]
    print(json.dumps([facts, event.result, ray.is_initialized(), home]))
"""


def test_own_cluster_from_another_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    home, checkout, cwd = tmp_path / "home", tmp_path / "checkout", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    # A copy, since the code under test may be installed where every worker finds it anyway.
    for package in ("actors", "qdist"):
        shutil.copytree(
            ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    facts, result, is_up, in_home = json.loads(
        run_elsewhere(OWN_CLUSTER, cwd, root=checkout, HOME=str(home))
    )
    assert Path(facts["qdist"]) == (checkout / "qdist" / "__init__.py").resolve()
    assert (facts["threads"], facts["extra"], result) == ("1", "yes", 2)
    assert not is_up
    assert in_home == [], "Ray wrote to the user's home"


LOST_NODE = """
    import json, os, secrets, time
    for key in ("initial_delay", "period", "timeout"):
        os.environ[f"RAY_health_check_{key}_ms"] = "500"
    os.environ["RAY_health_check_failure_threshold"] = "3"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from actors.pool import Completed, WorkerPool
    from actors.session import ClusterSpec, ray_session
    from ray.cluster_utils import Cluster

    class Sleeper:
        def setup(self):
            import qdist
            return {"qdist": qdist.__file__}
        def run(self, task):
            time.sleep(0.25)
            return -task

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    spec = ClusterSpec(
        address=cluster.address, n_workers=2, cpus_per_worker=1, max_attempts=2, ship_code=True
    )
    seen, kinds = {}, set()
    with ray_session(spec) as session:
        with WorkerPool(spec, Sleeper, name="far") as pool:
            for number in range(24):
                pool.submit(number)
            while pool.n_pending:
                event = pool.next_event(1.0)
                if isinstance(event, Completed):
                    assert event.task not in seen
                    seen[event.task] = event.result
                    if len(seen) == 4:
                        cluster.remove_node(other, allow_graceful=False)
                elif event is not None:
                    kinds.add(type(event).__name__)
            facts = pool.facts
    cluster.shutdown()
    print(json.dumps([sorted(seen.items()), sorted(kinds), facts, session.n_nodes]))
"""


@pytest.mark.slow
def test_lost_node_of_a_cluster_that_was_sent_the_code(tmp_path: Path) -> None:
    printed = run_elsewhere(LOST_NODE, tmp_path)
    seen, kinds, facts, n_nodes = json.loads(printed.splitlines()[-1])
    assert seen == [[number, -number] for number in range(24)]
    assert "Retried" in kinds
    assert n_nodes == 2
    assert len({fact["node_id"] for fact in facts}) == 2, "workers are spread over the nodes"
    assert all("py_modules" in fact["qdist"] for fact in facts)


@pytest.mark.parametrize(
    ("needs", "nodes", "n_places"),
    [
        ({"CPU": 1.0}, [{"CPU": 4.0}], 4),
        ({"CPU": 0.1}, [{"CPU": 0.3}], 3),
        ({"CPU": 8.0}, [{"CPU": 4.0}, {"CPU": 4.0}], 0),
        ({"CPU": 1.0, "GPU": 1.0}, [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}], 2),
        ({"CPU": 1.0, "memory": 3e9}, [{"CPU": 4.0, "memory": 7e9}], 2),
        ({"CPU": 1.0}, [], 0),
    ],
)
def test_places_on_nodes(
    needs: dict[str, float], nodes: list[dict[str, float]], n_places: int
) -> None:
    assert count_places(needs, nodes) == n_places


@pytest.mark.parametrize(
    ("n_workers", "cpus_per_worker", "n_cores", "is_crowded"),
    [(2, 1, 2, False), (3, 1, 2, True), (2, 2, 2, True), (4, 0.25, 2, True), (2, 0.25, 2, False)],
)
def test_workers_that_share_cores_are_noted(
    n_workers: int, cpus_per_worker: float, n_cores: int, is_crowded: bool
) -> None:
    spec = ClusterSpec(address=None, n_workers=n_workers, cpus_per_worker=cpus_per_worker)
    notes = crowding_notes(spec, n_cores=n_cores)
    assert len(notes) == is_crowded
    assert all(f"{n_workers} workers" in note and f"{n_cores} cores" in note for note in notes)
    elsewhere = replace(spec, address="head:6379")
    assert crowding_notes(elsewhere, n_cores=n_cores) == (), "its nodes know what they have"
    assert 1 <= machine_cores() <= (os.cpu_count() or 1)


def test_a_session_notes_more_workers_than_cores(
    cluster: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)
    monkeypatch.setattr("actors.session.machine_cores", lambda: 1)
    with ray_session(spec) as session:
        assert session.notes == crowding_notes(spec, n_cores=1)
        assert len(session.notes) == 1


def test_worker_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    local = ClusterSpec(
        address=None, n_workers=1, cpus_per_worker=1, worker_env={"OMP_NUM_THREADS": "4"}
    )
    env = worker_runtime_env(local)["env_vars"]
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert env["PYTHONPATH"].split(os.pathsep)[-1] == "/elsewhere"
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("4", "1")
    remote = ClusterSpec(address="head:6379", n_workers=1, cpus_per_worker=1)
    assert "PYTHONPATH" not in worker_runtime_env(remote)["env_vars"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_workers", 0),
        ("max_attempts", 0),
        ("cpus_per_worker", 0),
        ("cpus_per_worker", float("nan")),
        ("gpus_per_worker", -1),
        ("memory_bytes_per_worker", 0),
        ("ready_timeout_s", 0),
        ("task_timeout_s", -1),
        ("store_patience_s", -1),
        ("store_patience_s", float("nan")),
    ],
)
def test_spec_refuses_numbers_out_of_range(name: str, value: float) -> None:
    values: dict[str, Any] = {"address": None, "n_workers": 1, "cpus_per_worker": 1}
    with pytest.raises(ValueError, match=name):
        ClusterSpec(**(values | {name: value}))
