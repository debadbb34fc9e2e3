"""Starting a local Ray or connecting to a cluster, and leaving it as it was found.

What goes wrong here says so at once: Ray itself waits for minutes on an address that does not
answer, and for ever on resources that no node has.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address

import actors
import qdist
from qdist.errors import ClusterError

_PROBE_TIMEOUT_S = 5.0
_CLIENT_PORT = 10001
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Where to run and what every worker gets.

    ``address`` is None for a Ray of our own on this machine, else ``auto``, ``HOST:PORT`` or
    ``ray://HOST:PORT``. ``n_workers`` >= 1; ``cpus_per_worker`` > 0 and ``gpus_per_worker`` >= 0
    are shares of cores and devices. A worker has ``ready_timeout_s`` to start and a task
    ``task_timeout_s`` to finish; a task gets ``max_attempts`` attempts, and waits for up to
    ``store_patience_s`` (>= 0) for a store that cannot be reached. ``worker_env`` is added
    to the environment of the workers and wins over what is set there by default. With
    ``ship_code`` this very code is sent to the nodes of a remote cluster; without it qdist has
    to be installed there. With ``pipeline`` a calibration gives each worker some of the model's
    segments, so that none holds all of it.

    Raises `ValueError` on numbers out of range.
    """

    address: str | None
    n_workers: int
    cpus_per_worker: float
    gpus_per_worker: float = 0
    memory_bytes_per_worker: int | None = None
    ready_timeout_s: float = 60
    task_timeout_s: float = 3600
    max_attempts: int = 3
    store_patience_s: float = 120
    worker_env: Mapping[str, str] = field(default_factory=dict)
    ship_code: bool = False
    pipeline: bool = False

    def __post_init__(self) -> None:
        for name in ("n_workers", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        for name in ("cpus_per_worker", "ready_timeout_s", "task_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("gpus_per_worker", "store_patience_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if self.memory_bytes_per_worker is not None and self.memory_bytes_per_worker < 1:
            raise ValueError(
                f"memory_bytes_per_worker: got {self.memory_bytes_per_worker}, expected 1 or more"
            )
        object.__setattr__(self, "worker_env", dict(self.worker_env))

    @property
    def is_local(self) -> bool:
        """Whether Ray is to be started on this machine."""
        return self.address in (None, "local")

    @property
    def needs(self) -> dict[str, float]:
        """Ray's resource names -> what one worker takes; memory in bytes."""
        needs = {"CPU": float(self.cpus_per_worker)}
        if self.gpus_per_worker:
            needs["GPU"] = float(self.gpus_per_worker)
        if self.memory_bytes_per_worker is not None:
            needs["memory"] = float(self.memory_bytes_per_worker)
        return needs


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """A Ray that is up. ``owned`` says whether this session shuts it down.

    ``resources`` are the totals of the cluster under Ray's names (memory in bytes). ``notes`` say
    what the user should know about them.
    """

    address: str
    owned: bool
    n_nodes: int
    resources: Mapping[str, float]
    notes: tuple[str, ...] = ()


@contextmanager
def ray_session(spec: ClusterSpec) -> Iterator[RaySession]:
    """A Ray with room for the workers of ``spec``, for as long as the block runs.

    A Ray that this process has already initialised is used whatever ``spec.address`` says, and
    stays up afterwards. Raises `ClusterError`: QD801 when the address does not answer or Ray does
    not start, QD802 when the workers do not fit.
    """
    owned = not ray.is_initialized()
    if owned and spec.is_local:
        _start_local(spec)
    elif owned:
        _connect(spec)
    try:
        check_resources(spec)
        yield RaySession(
            address="local" if spec.is_local else str(spec.address),
            owned=owned,
            n_nodes=len(node_resources()),
            resources=MappingProxyType(dict(ray.cluster_resources())),
            notes=crowding_notes(spec, n_cores=machine_cores()),
        )
    finally:
        if owned:
            ray.shutdown()


def worker_runtime_env(spec: ClusterSpec) -> dict[str, Any]:
    """The ``runtime_env`` of a worker: one thread in every numerical library, and our code.

    On this machine the workers find the code through ``PYTHONPATH``, wherever the driver was
    started from.
    """
    env = {**dict.fromkeys(_THREAD_LIMITS, "1"), **spec.worker_env}
    if spec.is_local:
        inherited = env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        paths = [*_code_folders(), *inherited.split(os.pathsep)]
        if found := os.pathsep.join(path for path in paths if path):
            env["PYTHONPATH"] = found
    return {"env_vars": env}


def machine_cores() -> int:
    """How many cores this process may use; a container's share counts, rounded up."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = _CGROUP_CPU.read_text(encoding="ascii").split()
        share = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        share = n_cores or 1
    return max(1, min(n_cores or 1, share))


def crowding_notes(spec: ClusterSpec, *, n_cores: int) -> tuple[str, ...]:
    """A note if the workers take turns on the ``n_cores`` of this machine.

    A Ray of our own believes what it is told about cores, so nothing is refused.

    >>> crowding_notes(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1), n_cores=2)
    ()
    """
    n_used = _local_cpus(spec)
    if not spec.is_local or n_used <= n_cores:
        return ()
    return (
        f"{spec.n_workers} workers with {spec.cpus_per_worker:g} CPU each share the {n_cores} "
        "cores of this machine: more workers than cores are no faster and need more memory",
    )


def node_resources() -> list[dict[str, float]]:
    """The resources of every node that is alive, under Ray's names."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def count_places(needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers that take ``needs`` fit on ``nodes``, none of them across two nodes.

    >>> count_places({"CPU": 2.0}, [{"CPU": 3.0}, {"CPU": 5.0}])
    3
    """
    # A little is added because shares such as 0.1 are not exact in binary.
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items())
        for node in nodes
    )


def check_resources(spec: ClusterSpec) -> None:
    """Raise QD802 unless all workers fit on the nodes that are up, busy or not.

    Ray would wait silently for a node that can take them. An autoscaling cluster therefore has
    to be up before.
    """
    nodes = node_resources()
    n_places = count_places(spec.needs, nodes)
    if n_places < spec.n_workers:
        found = ", ".join(_amounts(spec.needs, node) for node in nodes) or "no node"
        raise ClusterError(
            "QD802",
            where="cluster",
            got=f"room for {n_places} such workers on {len(nodes)} node(s) with {found}",
            expected=f"room for {spec.n_workers} workers with {_amounts(spec.needs, spec.needs)}",
            mend="ask for fewer or smaller workers (cluster.workers, cluster.cpus_per_worker), "
            "or add nodes to the cluster",
        )


def _amounts(names: Mapping[str, float], node: Mapping[str, float]) -> str:
    """``2 CPU + 4.00 GB memory``: the amounts that ``node`` has of ``names``."""
    return " + ".join(
        f"{node.get(name, 0.0) / 1e9:.2f} GB memory"
        if name == "memory"
        else f"{node.get(name, 0.0):g} {name}"
        for name in names
    )


def _code_folders() -> list[str]:
    """The folders that hold ``actors`` and ``qdist``, unless they are installed packages."""
    folders = [Path(str(package.__file__)).resolve().parents[1] for package in (actors, qdist)]
    # Installed code is found anyway, and site-packages must not come before the standard library.
    return list(
        dict.fromkeys(str(f) for f in folders if f.name not in ("site-packages", "dist-packages"))
    )


def _local_cpus(spec: ClusterSpec) -> int:
    """The cores that the workers of ``spec`` need: each runs a thread of its own."""
    return max(spec.n_workers, math.ceil(spec.n_workers * spec.cpus_per_worker))


def _start_local(spec: ClusterSpec) -> None:
    """Start a Ray of our own with room for every worker. Raises QD801."""
    # Ray protects a local cluster with a token, and would save one in the user's home for later
    # clusters to trip over. Setting RAY_AUTH_MODE as well fails if Ray was imported before. The
    # token stays set: Ray caches it, and a second session of this process needs the same.
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        ray.init(
            address="local",
            num_cpus=_local_cpus(spec),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ClusterError(
            "QD801",
            where="a local Ray",
            got=_shorten(str(error)),
            expected="Ray to start on this machine",
            mend="free memory and space in /tmp and /dev/shm, or connect to a running cluster "
            "with cluster.address=HOST:PORT",
        ) from error


def _connect(spec: ClusterSpec) -> None:
    """Connect to the cluster at ``spec.address``. Raises QD801."""
    address = str(spec.address)
    try:
        _probe(address)
        with _few_retries():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"py_modules": [qdist, actors]} if spec.ship_code else None,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        cause = str(error.__cause__).strip().splitlines()[-1:] if error.__cause__ else []
        raise ClusterError(
            "QD801",
            where=f"cluster.address={address}",
            got=_shorten(" ".join([str(error), *cause])),
            expected="a running Ray cluster at auto, HOST:PORT (usually port 6379) "
            f"or ray://HOST:PORT (usually port {_CLIENT_PORT}, needs the package ray[client])",
            mend="start it with 'ray start --head', correct the address, give the cluster's token "
            "in RAY_AUTH_TOKEN, or set cluster.address=null to use this machine",
        ) from error


def _probe(address: str) -> None:
    """Raise `OSError` or `ValueError` unless something listens at ``address``.

    Ray would try for a quarter of an hour.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address.startswith("ray://"):
        target, default_port = address.removeprefix("ray://").split("/")[0], _CLIENT_PORT
    else:
        target, default_port = str(canonicalize_bootstrap_address(address)), None
    host, separator, port = target.rpartition(":")
    if not separator and default_port is not None:
        host, port = target, str(default_port)
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is not an address with a port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"{host}:{port} does not answer: {error}") from error


@contextmanager
def _few_retries() -> Iterator[None]:
    """Let Ray try three times to connect, not twenty; each can take 40 s."""
    name = "RAY_gcs_server_port_wait_time_s"
    before = os.environ.get(name)
    os.environ[name] = before or "3"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _shorten(text: str, limit: int = 400) -> str:
    """One line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
