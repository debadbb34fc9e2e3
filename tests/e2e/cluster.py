"""A Ray cluster of several raylets on this machine, and `qdist` as a process that is disturbed.

Run as a module, this is the cluster's own process: it prints the address and does what it reads,
a line each, until its input ends. So nothing of it is left when the tests are gone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.command_line import command, environment

_MARK = "QDIST_TEST_MARK"


class Marked:
    """A process whose descendants are found by a mark in their environment."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            argv, env={**env, _MARK: self._mark}, start_new_session=True, **options
        )

    def family(self, title: str = "") -> list[int]:
        """It and its descendants, as far as they run and ``title`` is in their command lines."""
        mark = f"{_MARK}={self._mark}\0".encode()
        return [
            pid
            for pid in (
                int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()
            )
            if mark in _of(pid, "environ")
            and b"\nState:\tZ" not in _of(pid, "status")
            and title.encode() in _of(pid, "cmdline")
        ]

    def kill_family(self) -> None:
        """Kill whatever is left of it."""
        for pid in self.family():
            _kill(pid)
        self.process.wait()


class RayCluster(Marked):
    """A head and ``n_others`` further nodes of one CPU each. Lost nodes are noticed in 2 s."""

    def __init__(self, folder: Path, *, n_others: int) -> None:
        fast = {f"RAY_health_check_{k}_ms": "500" for k in ("initial_delay", "period", "timeout")}
        self.extra = {
            **fast,
            "RAY_health_check_failure_threshold": "3",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        with (folder / "cluster.txt").open("wb") as log:
            super().__init__(
                [sys.executable, "-m", "tests.e2e.cluster", str(n_others)],
                {k: v for k, v in environment(self.extra).items() if k != "RAY_ADDRESS"},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = str(self._answer())

    def kill_node(self) -> None:
        """Kill a node that is not the head, without notice."""
        self._ask("kill")

    def add_node(self) -> None:
        """Add a node of one CPU."""
        self._ask("add")

    def workers(self) -> list[int]:
        """The processes of actors that hold a worker."""
        return self.family("ray::Host")

    def close(self) -> None:
        """Stop all of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.kill_family()

    def _ask(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self._answer() == what

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)["answer"]
        raise AssertionError("the cluster ended")


class Command(Marked):
    """`qdist` as a process; what it prints goes to a file of its own in ``folder``."""

    def __init__(self, *words: str, folder: Path, extra: Mapping[str, str] | None = None) -> None:
        self._output = folder / f"output-{uuid.uuid4().hex}.txt"
        with self._output.open("wb") as output:
            super().__init__(
                command(*words),
                environment(extra),
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 60) -> None:
        """Until ``condition``; fails if the command ends or ``limit_s`` pass before."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def finish(self, limit_s: float = 120) -> str:
        """Wait for it to succeed; what it printed."""
        assert self.process.wait(limit_s) == 0, self.output
        return self.output

    def kill(self) -> None:
        """SIGKILL to the driver alone; its children are on their own."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(10) == -signal.SIGKILL


def statistics(printed: str) -> str:
    """The digest that ``qdist calibrate`` printed, shortened as it prints it."""
    (found,) = re.findall(r"statistics\W+([0-9a-f]{16})\b", printed)
    return str(found)


def wait_until(condition: Callable[[], bool], limit_s: float = 40) -> bool:
    """Whether ``condition`` came true within ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


def _of(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes() + b"\0"
    except OSError:
        return b""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _serve(n_others: int) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    others = [cluster.add_node(num_cpus=1, wait=False) for _ in range(n_others)]
    cluster.wait_for_nodes()
    print(json.dumps({"answer": cluster.address}), flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(others.pop(), allow_graceful=False)
        else:
            others.append(cluster.add_node(num_cpus=1))
        print(json.dumps({"answer": line.strip()}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
