"""The estimate for a model that fits no node: where its time, bytes and network go.

Two ways are compared: every node runs all segments over its own samples, or every node keeps some
layers and all samples pass through all nodes. The constants are measured, see `bench_estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench_estimate import (
    Constants,
    DecoderShape,
    Workload,
    decoder_workload,
    record_s,
    stored_bytes,
)

from qdist.calibration.tree import FAN_IN, FEW


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of one kind. ``disk_bytes_s``: reading from the local disk; ``network_bytes_s``: of one
    node, in each direction; ``n_workers``: on one node, each with its share of the cores."""

    n_nodes: int = 64
    n_cores: int = 32
    n_workers: int = 8
    memory_bytes: float = 256e9
    disk_bytes_s: float = 2e9
    network_bytes_s: float = 1.25e9

    @property
    def threads(self) -> int:
        """Threads of one worker."""
        return self.n_cores // self.n_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds by where they go, one after another, and bytes of one node unless it says total."""

    seconds: Mapping[str, float]
    node_bytes: Mapping[str, float]
    store_bytes: float
    memory_bytes: float

    @property
    def total_s(self) -> float:
        """All of it, nothing overlapping."""
        return sum(self.seconds.values())


def spread(workload: Workload, constants: Constants, cluster: Cluster, n_samples: int) -> Estimate:
    """Every worker takes its share of the samples through one segment after another.

    A segment is one layer; a shard is all that a worker gets, so each loads the weights once. The
    workers of a node are about in step, so the page cache serves a segment to all but the first.
    """
    each = math.ceil(n_samples / (cluster.n_nodes * cluster.n_workers))
    n_shards = math.ceil(n_samples / each)
    spooled = 2 * each * cluster.n_workers * (workload.n_layers - 1) * workload.boundary_bytes
    record = stored_bytes(workload, constants)
    sent = record * n_shards / cluster.n_nodes
    return Estimate(
        seconds={
            "weights from the disk": workload.weight_bytes / cluster.disk_bytes_s,
            "matrix products": each * workload.flops * constants.flop_s / cluster.threads,
            "elements": each * workload.elements * constants.element_s,
            "spool": spooled / cluster.disk_bytes_s,
            "commits": workload.n_tensors * constants.commit_s + sent / cluster.network_bytes_s,
            "merge": _merge_s(workload, constants, cluster, n_shards),
        },
        node_bytes={
            "weights read": workload.weight_bytes,
            "spool written and read": spooled,
            "records sent": sent,
        },
        store_bytes=record * n_shards,
        memory_bytes=cluster.n_workers * _worker_bytes(workload),
    )


def pipeline(
    workload: Workload, constants: Constants, cluster: Cluster, n_samples: int
) -> Estimate:
    """Every node keeps its share of the layers; samples pass from node to node.

    The last node begins when the first sample has passed all others. A shard is all that one
    worker of a node measures; a record holds only that node's tensors.
    """
    share = 1 / cluster.n_nodes
    each = math.ceil(n_samples / cluster.n_workers)
    stage_s = share * (
        workload.flops * constants.flop_s / cluster.threads
        + workload.elements * constants.element_s
    )
    passed = n_samples * workload.boundary_bytes
    record = stored_bytes(workload, constants) * share
    sent = record * cluster.n_workers
    return Estimate(
        seconds={
            "weights from the disk": share * workload.weight_bytes / cluster.disk_bytes_s,
            "filling the pipeline": (cluster.n_nodes - 1) * stage_s,
            "matrix products": each * share * workload.flops * constants.flop_s / cluster.threads,
            "elements": each * share * workload.elements * constants.element_s,
            "network": passed / cluster.network_bytes_s,
            "commits": workload.n_tensors * share * constants.commit_s
            + sent / cluster.network_bytes_s,
            "merge": _merge_s(workload, constants, cluster, cluster.n_workers),
        },
        node_bytes={
            "weights read": share * workload.weight_bytes,
            "activations received": passed,
            "activations sent": passed,
            "records sent": sent,
        },
        store_bytes=sent * cluster.n_nodes,
        memory_bytes=share * workload.weight_bytes
        + cluster.n_workers * workload.elements / workload.n_layers * 4,
    )


def large_model(constants: Mapping[str, float]) -> str:
    """The table for a decoder of 70 billion parameters on 64 nodes, with measured constants."""
    workload, cluster, known = decoder_workload(DecoderShape()), Cluster(), Constants(**constants)
    return table(
        {
            f"{name}, {n:,} samples": way(workload, known, cluster, n)
            for n in (512, 4096)
            for name, way in (("spread", spread), ("pipeline", pipeline))
        }
    )


def _worker_bytes(workload: Workload) -> float:
    """One layer's weights and, at one sample, the tensors measured in it."""
    return workload.weight_bytes / workload.n_layers + 4 * workload.elements / workload.n_layers


def _merge_s(workload: Workload, constants: Constants, cluster: Cluster, n_shards: int) -> float:
    """Workers merge groups of records, then groups of these, until the driver can read the rest.

    Each sends what it has merged to the store. The workers of a node share its network.
    """
    own_s, n_bytes = record_s(workload, constants), stored_bytes(workload, constants)
    kept_s = workload.n_tensors * constants.commit_s
    seconds, n_left = 0.0, n_shards
    while n_left > (FEW if n_left == n_shards else FAN_IN):
        n_nodes = math.ceil(n_left / FAN_IN)
        n_rounds = math.ceil(n_nodes / (cluster.n_nodes * cluster.n_workers))
        beside = min(cluster.n_workers, math.ceil(n_nodes / cluster.n_nodes))
        network_s = beside * n_bytes / cluster.network_bytes_s
        seconds += n_rounds * (FAN_IN * (own_s + network_s) + kept_s + network_s)
        n_left = n_nodes
    read_s = n_left * (own_s + n_bytes / cluster.network_bytes_s)
    return seconds + read_s + workload.n_tensors * constants.finish_s


def table(estimates: Mapping[str, Estimate]) -> str:
    """Seconds and bytes of some estimates side by side, as a table."""
    names = list(estimates)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for part in dict.fromkeys(p for e in estimates.values() for p in e.seconds):
        row(f"{part}, s", [_number(e.seconds.get(part)) for e in estimates.values()])
    row("**sum, s**", [_number(e.total_s) for e in estimates.values()])
    for part in dict.fromkeys(p for e in estimates.values() for p in e.node_bytes):
        row(
            f"{part}, per node, GB",
            [_number(e.node_bytes.get(part), 1e9) for e in estimates.values()],
        )
    row("store, GB", [_number(e.store_bytes, 1e9) for e in estimates.values()])
    row("memory, per node, GB", [_number(e.memory_bytes, 1e9) for e in estimates.values()])
    return "\n".join(lines)


def _number(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.3g}"
