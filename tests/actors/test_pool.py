"""The pool against a real Ray, and the retry policy without one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.pool import (
    Completed,
    Duplicated,
    Event,
    Failed,
    Retried,
    WorkerJoined,
    WorkerLost,
    WorkerPool,
)
from actors.retry import RetryPolicy
from actors.session import ClusterSpec, RaySession
from actors.stragglers import StragglerPolicy
from qdist.errors import DataError, ModelError, QdistError, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a `Probe` is to do with ``number``; ``marker`` is where it leaves traces."""

    number: int
    action: str = "square"
    marker: str = ""
    seconds: float = 600.0


class Probe:
    """A worker that squares numbers and misbehaves on request."""

    def __init__(self, folder: str, ballast: bytes = b"") -> None:
        self.folder = Path(folder)
        self.n_ballast_bytes = len(ballast)

    def setup(self) -> dict[str, Any]:
        with open(self.folder / "setups", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return {"fingerprint": "probe", "n_ballast_bytes": self.n_ballast_bytes}

    def run(self, task: Task) -> int:
        if task.action == "bad input":
            raise DataError(
                "QD303", where=f"sample {task.number}", got="(1,)", expected="(2,)", mend="resize"
            )
        if task.action == "store":
            need_store(self.folder)
        if task.action == "raise":
            raise KeyError(f"no {task.number}")
        if task.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.action == "die once" and self._is_first(task):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.action == "hang once" and self._is_first(task):
            time.sleep(600)
        if task.action == "nap":
            time.sleep(0.2)
        if task.action == "slow once":
            with open(task.marker, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")
            if len(Path(task.marker).read_text().split()) == 1:
                time.sleep(task.seconds)
        if task.action == "raise on the first, slow":
            if self._is_first(task):
                time.sleep(1.5)
                raise KeyError("the first copy")
            time.sleep(2.5)
        if task.action == "environment":
            return sum(int(os.environ[f"{kind}_NUM_THREADS"]) for kind in ("OMP", "OPENBLAS"))
        return task.number**2

    @staticmethod
    def _is_first(task: Task) -> bool:
        try:
            Path(task.marker).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def need_store(folder: Path) -> None:
    """As a store does that is there when ``folder`` holds a file ``store``."""
    if not (folder / "store").exists():
        raise StoreError(
            "QD408", where=str(folder), got="no store", expected="a store", mend="mount it"
        )


class StoreProbe(Probe):
    """A worker that needs the store for its setup."""

    def setup(self) -> dict[str, Any]:
        need_store(self.folder)
        return super().setup()


class BrokenProbe(Probe):
    """A worker whose setup fails in the way that it is told."""

    def setup(self) -> dict[str, Any]:
        if self.folder.name == "bad input":
            raise ModelError("QD201", where="model.onnx", got="nothing", expected="x", mend="y")
        if self.folder.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("in setup")


class DiesAfterTheFirst(Probe):
    """A worker of which no replacement starts."""

    def setup(self) -> dict[str, Any]:
        facts = super().setup()
        if len((self.folder / "setups").read_text().split()) > 1:
            raise OSError("no second worker")
        return facts


Events = list[Event[Task, int]]
MakePool = Callable[..., WorkerPool[Task, int]]


@pytest.fixture
def make_pool(cluster: RaySession, tmp_path: Path) -> MakePool:
    def make(
        kind: type[Probe] = Probe,
        *,
        n_workers: int = 2,
        prefetch: int = 1,
        policy: RetryPolicy | None = None,
        duplicate: bool | StragglerPolicy = False,
        **spec: Any,
    ) -> WorkerPool[Task, int]:
        values: dict[str, Any] = {"cpus_per_worker": 1, "ready_timeout_s": 30} | spec
        return WorkerPool(
            ClusterSpec(address=None, n_workers=n_workers, **values),
            partial(kind, str(tmp_path), b"x" * 1000),
            name="probe",
            prefetch=prefetch,
            policy=policy,
            duplicate=duplicate,
        )

    return make


def drain(pool: WorkerPool[Task, int], limit_s: float = 40) -> Events:
    """Every event until nothing is pending; fails rather than hangs."""
    events: Events = []
    deadline = time.monotonic() + limit_s
    while pool.n_pending:
        if time.monotonic() > deadline:
            pytest.fail(f"{pool.n_pending} tasks still pending after {limit_s} s: {events}")
        if (event := pool.next_event(0.5)) is not None:
            events.append(event)
    return events


def results(events: Events) -> dict[int, int]:
    completed = [event for event in events if isinstance(event, Completed)]
    assert len({event.task for event in completed}) == len(completed), "a result came twice"
    return {event.task.number: event.result for event in completed}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], limit_s: float = 10) -> list[int]:
    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


class TestWorkersThatLive:
    """One pool for the tests in which no worker dies."""

    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("alive")

    @pytest.fixture(scope="class")
    @staticmethod
    def pool(cluster: RaySession, folder: Path) -> Iterator[WorkerPool[Task, int]]:
        spec = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1, max_attempts=2)
        with WorkerPool(spec, partial(Probe, str(folder), b"x" * 1000), name="probe") as pool:
            yield pool

    def test_idle(self, pool: WorkerPool[Task, int]) -> None:
        assert (pool.n_workers_alive, pool.n_idle, pool.n_pending) == (2, 2, 0)
        assert pool.next_event(5.0) is None

    def test_results_come_back_once(self, pool: WorkerPool[Task, int]) -> None:
        for number in range(20):
            pool.submit(Task(number=number))
        assert pool.n_pending == 20
        assert pool.n_idle == 0
        events = drain(pool)
        assert results(events) == {number: number**2 for number in range(20)}
        assert len(events) == 20
        assert pool.n_idle == 2

    def test_setup_runs_once_in_every_actor(
        self, pool: WorkerPool[Task, int], folder: Path
    ) -> None:
        setups = [int(line) for line in (folder / "setups").read_text().split()]
        assert sorted(setups) == sorted(fact["pid"] for fact in pool.facts)
        assert len(set(setups)) == 2
        assert {fact["worker"] for fact in pool.facts} == {"probe-0", "probe-1"}
        assert all(fact["n_ballast_bytes"] == 1000 for fact in pool.facts)
        assert all(fact["node_id"] and fact["fingerprint"] == "probe" for fact in pool.facts)

    def test_numerical_libraries_of_a_worker_run_one_thread(
        self, pool: WorkerPool[Task, int]
    ) -> None:
        pool.submit(Task(number=0, action="environment"))
        (event,) = drain(pool)
        assert isinstance(event, Completed)
        assert event.result == 2

    def test_short_queue_is_not_prefetched(self, pool: WorkerPool[Task, int]) -> None:
        for number in range(4):
            pool.submit(Task(number=number, action="nap"))
        events = [event for event in drain(pool) if isinstance(event, Completed)]
        assert all(event.seconds >= 0.2 for event in events)
        assert sum(event.worker == "probe-0" for event in events) == 2
        assert sum(event.worker == "probe-1" for event in events) == 2

    def test_nothing_runs_twice_unless_it_is_asked_for(
        self, pool: WorkerPool[Task, int], folder: Path
    ) -> None:
        marker = folder / "starts"
        pool.submit(Task(number=50, action="slow once", marker=str(marker), seconds=1.0))
        for number in range(6):
            pool.submit(Task(number=number))
        assert not any(isinstance(event, Duplicated) for event in drain(pool))
        assert len(marker.read_text().split()) == 1

    def test_bad_input_crosses_whole_and_is_not_retried(self, pool: WorkerPool[Task, int]) -> None:
        pool.submit(Task(number=7, action="bad input"))
        pool.submit(Task(number=2))
        events = drain(pool)
        (failed,) = [event for event in events if not isinstance(event, Completed)]
        assert isinstance(failed, Failed)
        assert type(failed.error) is DataError
        error = failed.error
        assert (error.code, error.where, error.got, error.expected, error.mend) == (
            "QD303",
            "sample 7",
            "(1,)",
            "(2,)",
            "resize",
        )
        assert results(events) == {2: 4}

    def test_unexpected_exception_is_retried_elsewhere_and_then_given_up(
        self, pool: WorkerPool[Task, int]
    ) -> None:
        pool.submit(Task(number=1, action="raise"))
        events = drain(pool)
        assert pool.n_workers_alive == 2
        retried, failed = events
        assert isinstance(retried, Retried)
        assert isinstance(failed, Failed)
        assert retried.attempt == 2
        assert failed.error.code == "QD803"
        assert "KeyError: 'no 1'" in failed.error.got
        assert "2 failed attempts" in failed.error.got
        assert "Task(number=1" in failed.error.where
        workers = {name for name in ("probe-0", "probe-1") if name in retried.reason}
        assert len(workers) == 1
        assert not any(name in failed.error.got for name in workers), "it ran twice on one worker"


def test_dynamic_submission(make_pool: MakePool) -> None:
    seen: list[int] = []
    with make_pool(prefetch=0) as pool:
        next_number = 0
        while pool.n_idle:
            pool.submit(Task(number=next_number, action="nap"))
            next_number += 1
        assert next_number == 2
        while pool.n_pending:
            event = pool.next_event(5.0)
            assert isinstance(event, Completed)
            seen.append(event.task.number)
            assert pool.n_idle == (1 if next_number < 7 else 2 - pool.n_pending)
            if next_number < 7:
                pool.submit(Task(number=next_number, action="nap"))
                next_number += 1
    assert sorted(seen) == list(range(7))


def test_killed_worker_is_replaced_and_its_task_completes(
    make_pool: MakePool, tmp_path: Path
) -> None:
    with make_pool() as pool:
        pool.submit(Task(number=100, action="die once", marker=str(tmp_path / "died")))
        for number in range(12):
            pool.submit(Task(number=number, action="nap"))
        events = drain(pool)
        # On a busy machine the other worker may be through before the new one has started.
        deadline = time.monotonic() + 60
        while not any(isinstance(event, WorkerJoined) for event in events):
            assert time.monotonic() < deadline, events
            if (event := pool.next_event(0.5)) is not None:
                events.append(event)
        assert pool.n_pending == 0
    assert results(events) == {n: n**2 for n in [*range(12), 100]}
    (lost,) = [event for event in events if isinstance(event, WorkerLost)]
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert (retried.task.number, retried.attempt) == (100, 2), "only the culprit lost an attempt"
    assert lost.worker in retried.reason
    (joined,) = [event for event in events if isinstance(event, WorkerJoined)]
    assert joined.worker == f"{lost.worker}.1"
    assert len((tmp_path / "setups").read_text().split()) == 3


def test_task_that_kills_every_worker_is_given_up(make_pool: MakePool) -> None:
    with make_pool(max_attempts=2) as pool:
        pool.submit(Task(number=1, action="die"))
        pool.submit(Task(number=2))
        events = drain(pool)
    assert results(events) == {2: 4}
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.error.code == "QD803"
    assert "the worker died" in failed.error.got
    assert sum(isinstance(event, WorkerLost) for event in events) == 2


def test_task_out_of_time_costs_its_worker_and_an_attempt(
    make_pool: MakePool, tmp_path: Path
) -> None:
    with make_pool(task_timeout_s=1.0) as pool:
        pool.submit(Task(number=9, action="hang once", marker=str(tmp_path / "hung")))
        events = drain(pool)
        hung = [fact["pid"] for fact in pool.facts]
        lost = next(event for event in events if isinstance(event, WorkerLost))
        assert wait_until_gone([f["pid"] for f in pool.facts if f["worker"] == lost.worker]) == []
    assert results(events) == {9: 81}
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert retried.attempt == 2
    assert "longer than 1 s" in retried.reason
    assert wait_until_gone(hung) == []


EARLY = StragglerPolicy(factor=2.0, min_s=0.3, min_completed=2)


class TestLateTasks:
    """One pool whose tasks may run twice; the test that blocks a worker for good comes last."""

    @pytest.fixture(scope="class")
    @staticmethod
    def pool(
        cluster: RaySession, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[WorkerPool[Task, int]]:
        spec = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1, max_attempts=2)
        make = partial(Probe, str(tmp_path_factory.mktemp("late")), b"")
        with WorkerPool(spec, make, name="probe", duplicate=EARLY) as pool:
            yield pool

    def test_second_answer_is_dropped_and_its_worker_works_on(
        self, pool: WorkerPool[Task, int], tmp_path: Path
    ) -> None:
        slow = Task(number=50, action="slow once", marker=str(tmp_path / "starts"), seconds=1.5)
        for task in (slow, Task(number=1), Task(number=2)):
            pool.submit(task)
        events = drain(pool)
        assert results(events) == {1: 1, 2: 4, 50: 2500}
        # Long enough for the second answer to come in.
        for number in range(10, 22):
            pool.submit(Task(number=number, action="nap"))
        more = drain(pool)
        assert results(more) == {number: number**2 for number in range(10, 22)}
        assert {e.worker for e in more if isinstance(e, Completed)} == {"probe-0", "probe-1"}
        (node,) = pool.nodes()
        assert node.n_completed == 15
        assert node.busy_s >= 1.5 + 12 * 0.2

    def test_copy_goes_on_when_the_first_one_fails(
        self, pool: WorkerPool[Task, int], tmp_path: Path
    ) -> None:
        slow = Task(number=50, action="raise on the first, slow", marker=str(tmp_path / "started"))
        for task in (slow, Task(number=1), Task(number=2)):
            pool.submit(task)
        events = drain(pool)
        assert results(events) == {1: 1, 2: 4, 50: 2500}
        (retried,) = [event for event in events if isinstance(event, Retried)]
        assert "the first copy" in retried.reason
        assert "its copy goes on" in retried.reason
        duplicated = [event.task for event in events if isinstance(event, Duplicated)]
        assert duplicated.count(slow) == 1

    def test_first_answer_counts_and_nothing_waits_behind_what_is_late(
        self, pool: WorkerPool[Task, int], tmp_path: Path
    ) -> None:
        marker = tmp_path / "starts"
        slow = Task(number=50, action="slow once", marker=str(marker))
        for task in (slow, *(Task(number=number) for number in range(6))):
            pool.submit(task)
        events = drain(pool)
        assert results(events) == {number: number**2 for number in [*range(6), 50]}
        assert not any(isinstance(event, Retried | WorkerLost) for event in events)
        assert pool.n_workers_alive == 2, "the worker that is late is left alone"
        duplicated = [event for event in events if isinstance(event, Duplicated)]
        assert slow in {event.task for event in duplicated}
        (other,) = {event.worker for event in duplicated}
        (late,) = {"probe-0", "probe-1"} - {other}
        assert all(late in event.reason for event in duplicated)
        answers = {e.task: e.worker for e in events if isinstance(e, Completed)}
        assert all(answers[event.task] == other for event in duplicated)
        assert len(set(marker.read_text().split())) == 2, "it ran in two processes"
        # The worker that is still at it gets nothing that would have to wait there.
        assert pool.n_idle == 1
        for number in range(100, 108):
            pool.submit(Task(number=number))
        more = drain(pool)
        assert results(more) == {number: number**2 for number in range(100, 108)}
        assert {e.worker for e in more if isinstance(e, Completed)} == {other}


def test_copy_that_kills_its_worker_as_the_first_did_ends_with_an_error(
    make_pool: MakePool, tmp_path: Path
) -> None:
    task = Task(number=50, action="hang once", marker=str(tmp_path / "hung"))
    # Without the file, the copy hangs as well, and both run out of time.
    with make_pool(duplicate=EARLY, max_attempts=1, task_timeout_s=2.0) as pool:
        for other in (task, Task(number=1), Task(number=2)):
            pool.submit(other)
        events: Events = []
        while not any(isinstance(event, Duplicated) for event in events):
            (tmp_path / "hung").unlink(missing_ok=True)
            if (event := pool.next_event(0.05)) is not None:
                events.append(event)
        events += drain(pool)
    finals = [event for event in events if isinstance(event, Completed | Failed)]
    assert sorted(event.task.number for event in finals) == [1, 2, 50], "each reported once"
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.error.code == "QD803"
    assert "longer than 2 s" in failed.error.got


QUICK = RetryPolicy(max_attempts=1, backoff_s=0.2, max_backoff_s=0.4, patience_s=20.0)


def test_store_out_of_reach_costs_no_attempt(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool(policy=QUICK) as pool:
        for number in range(8):
            pool.submit(Task(number=number, action="store"))
        events: Events = []
        while sum(isinstance(event, Retried) for event in events) < 6:
            event = pool.next_event(5.0)
            assert event is not None
            events.append(event)
        assert pool.n_idle == 0
        assert not any(isinstance(event, Completed | Failed) for event in events)
        (tmp_path / "store").touch()
        events += drain(pool)
    assert results(events) == {number: number**2 for number in range(8)}
    retried = [event for event in events if isinstance(event, Retried)]
    assert all(event.attempt == 1 for event in retried)
    assert all("QD408 the store cannot be reached" in event.reason for event in retried)
    assert all("next try in" in event.reason for event in retried)
    assert len({event.task for event in retried[4:]}) == 1, "one task finds out for all"


def test_store_that_stays_out_of_reach_is_the_error_as_it_is(
    make_pool: MakePool, tmp_path: Path
) -> None:
    policy = RetryPolicy(backoff_s=0.1, max_backoff_s=0.2, patience_s=1.0)
    with make_pool(n_workers=1, policy=policy) as pool:
        for number in range(6):
            pool.submit(Task(number=number, action="store"))
        events = drain(pool)
    failed = [event for event in events if isinstance(event, Failed)]
    assert len(failed) == 6
    assert {(event.error.code, event.error.mend) for event in failed} == {("QD408", "mount it")}
    assert sum(isinstance(event, Retried) for event in events) >= 5


def test_worker_whose_setup_needs_the_store_waits_for_it(
    make_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "store").touch()
    with make_pool(StoreProbe, n_workers=1, policy=replace(QUICK, max_attempts=2)) as pool:
        pool.submit(Task(number=1, action="die once", marker=str(tmp_path / "died")))
        events: Events = []
        while not any(isinstance(event, WorkerLost) for event in events):
            (tmp_path / "store").unlink(missing_ok=True)
            event = pool.next_event(10.0)
            assert event is not None
            events.append(event)
        while not any("QD408" in e.reason for e in events if isinstance(e, WorkerLost)):
            event = pool.next_event(20.0)
            assert event is not None
            events.append(event)
        (tmp_path / "store").touch()
        events += drain(pool)
    assert results(events) == {1: 1}


def test_pool_does_not_open_without_the_store(make_pool: MakePool) -> None:
    policy = RetryPolicy(backoff_s=0.2, patience_s=0.5)
    with pytest.raises(StoreError) as caught, make_pool(StoreProbe, n_workers=1, policy=policy):
        pytest.fail("the pool opened")
    assert caught.value.code == "QD408"


def test_no_worker_left_raises_qd804(make_pool: MakePool) -> None:
    with make_pool(DiesAfterTheFirst, n_workers=1, max_attempts=2) as pool:
        pool.submit(Task(number=1, action="die"))
        with pytest.raises(QdistError) as caught:
            drain(pool)
    assert caught.value.code == "QD804"
    assert "no second worker" in caught.value.got


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("bad input", "QD201", "model.onnx"),
        ("raises", "QD803", "ZeroDivisionError: in setup"),
        ("dies", "QD804", "each of 2 starts"),
    ],
)
def test_workers_that_cannot_start(
    cluster: RaySession, tmp_path: Path, how: str, code: str, text: str
) -> None:
    spec = ClusterSpec(
        address=None, n_workers=1, cpus_per_worker=1, max_attempts=2, ready_timeout_s=30
    )
    pool: WorkerPool[Task, int] = WorkerPool(
        spec, partial(BrokenProbe, str(tmp_path / how)), name="broken"
    )
    with pytest.raises(QdistError) as caught, pool:
        pytest.fail("the pool opened")
    assert caught.value.code == code
    assert text in str(caught.value)


def test_infeasible_workers_are_refused_at_once(make_pool: MakePool) -> None:
    begin = time.monotonic()
    with pytest.raises(QdistError) as caught, make_pool(n_workers=1, cpus_per_worker=64):
        pytest.fail("the pool opened")
    assert caught.value.code == "QD802"
    assert "2 CPU" in caught.value.got
    assert "64 CPU" in caught.value.expected
    assert time.monotonic() - begin < 5


def test_workers_without_room_are_refused_in_time(make_pool: MakePool) -> None:
    with make_pool() as first:
        begin = time.monotonic()
        with pytest.raises(QdistError) as caught, make_pool(ready_timeout_s=1.5):
            pytest.fail("the pool opened")
        assert time.monotonic() - begin < 6
        first.submit(Task(number=5))
        assert results(drain(first)) == {5: 25}
    assert caught.value.code == "QD802"
    assert "0 of 2 workers ready after 1.5 s" in caught.value.got


def test_no_actor_outlives_an_interrupt(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool()

    def interrupted() -> None:
        with pool:
            pool.submit(Task(number=1, action="hang once", marker=str(tmp_path / "hung")))
            assert pool.next_event(0.3) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    pids = [fact["pid"] for fact in pool.facts]
    assert len(pids) == 2
    assert wait_until_gone(pids) == []
    assert ray.is_initialized()
    with pytest.raises(RuntimeError, match="outside"):
        pool.submit(Task(number=1))
