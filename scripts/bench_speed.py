"""A calibration beside a plain run of the float model, and counting beside copying."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import Subject, counter
from bench_timing import Lap, Role, cpu, paired, ratio, wall

NS_PER_ELEMENT = 0.6
"""What counting one element may take in the bound for the models other than the encoder."""
KERNEL_BYTES = 1 << 28
"""Activations that the kernel is timed on: more than a core's caches hold."""

Say = Callable[[str], None]


class _Sides:
    """What is calibrated and what runs the float model, each in a process of its own as a user has
    it, in which nothing else takes memory or caches; one at a time."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        arguments = {"case": subject.case.to_json(), "n_samples": len(subject.source.keys())}
        self.calibrations = {
            taps: Role(
                "calibrations", {**arguments, "taps": taps, "store": str(folder / f"{taps}.zarr")}
            )
            for taps in ("compute", "all")
        }
        self._plain = Role("float runs", arguments)
        self.n_taps: dict[str, int] = {}
        self.spent: dict[str, list[dict[str, float]]] = {taps: [] for taps in self.calibrations}

    def __enter__(self) -> _Sides:
        self.n_taps = {taps: role.answer() for taps, role in self.calibrations.items()}
        self._plain.answer()
        return self

    def __exit__(self, *_: object) -> None:
        for role in (*self.calibrations.values(), self._plain):
            role.__exit__()

    def plain(self) -> Lap:
        """One run of the user's model over all samples."""
        return _lap_of(self._plain)[0]

    def calibrated(self, taps: str) -> Lap:
        """One calibration."""
        done, found = _lap_of(self.calibrations[taps])
        self.spent[taps].append(found)
        return done


def _lap_of(role: Role) -> tuple[Lap, dict[str, float]]:
    role.ask()
    found: dict[str, float] = role.answer()
    return Lap(wall_s=found["wall_s"], cpu_s=found["cpu_s"]), found


def speed(
    subject: Subject, folder: Path, n_rounds: int, say: Say, *, wants_bound: bool
) -> dict[str, Any]:
    """Ratios to the plain float run, CPU-seconds per sample and the share of commits; with
    ``wants_bound`` also beside a run that returns all taps and a time for each element."""
    n = len(subject.source.keys())
    sessions: dict[str, Any] = {}
    if wants_bound:
        sessions = {
            "frozen": subject.frozen_session(),
            "returned": subject.tapped_session(optimized=False),
            "returned, optimized": subject.tapped_session(optimized=True),
        }
    batches = subject.batches()

    def float_run(session: Any) -> None:
        for keys in batches:
            session.run(None, subject.feeds(keys))

    with _Sides(subject, folder) as sides:
        actions: dict[str, Callable[[], Lap | None]] = {
            "plain": sides.plain,
            "compute taps": lambda: sides.calibrated("compute"),
            "all taps": lambda: sides.calibrated("all"),
            **{name: partial(float_run, session) for name, session in sessions.items()},
        }
        for action in actions.values():
            action()
        for found in sides.spent.values():
            found.clear()
        say("warm")
        laps = paired(actions, n_rounds, say)
    spent = sides.spent["all"]
    n_elements = _n_elements(sessions["returned"], subject) if sessions else 0
    walls = {name: wall(found) for name, found in laps.items()}
    cpus = {name: cpu(found) for name, found in laps.items()}
    return {
        "ratio_compute_taps": ratio(walls["compute taps"], walls["plain"]),
        "ratio_all_taps": ratio(walls["all taps"], walls["plain"]),
        "ratio_compute_taps_cpu": ratio(cpus["compute taps"], cpus["plain"]),
        "ratio_all_taps_cpu": ratio(cpus["all taps"], cpus["plain"]),
        **(_beside_bound(walls, n_elements) if sessions else {}),
        "commit_share": statistics.median(s["commit_s"] / s["wall_s"] for s in spent),
        "cpu_s_per_sample": {name: statistics.median(found) / n for name, found in cpus.items()},
        "detail": {
            "n_samples": n,
            "n_rounds": n_rounds,
            "n_taps": sides.n_taps,
            **({"elements_per_sample": n_elements / n} if sessions else {}),
            "seconds": {name: statistics.median(found) for name, found in walls.items()},
            "of_all_taps_s": {
                "commit": statistics.median(s["commit_s"] for s in spent),
                "finish": statistics.median(s["finish_s"] for s in spent),
            },
        },
    }


def _beside_bound(walls: Mapping[str, Sequence[float]], n_elements: int) -> dict[str, float]:
    """What is left of the bound: ratios to a run that returns all taps + a time per element."""
    returned = [
        min(pair) for pair in zip(walls["returned"], walls["returned, optimized"], strict=True)
    ]
    strict = [
        plain_s + max(0.0, returned_s - frozen_s)
        for plain_s, returned_s, frozen_s in zip(
            walls["plain"], walls["returned"], walls["frozen"], strict=True
        )
    ]
    counting_s = n_elements * NS_PER_ELEMENT * 1e-9
    return {
        "all_taps_vs_bound": ratio(walls["all taps"], [one + counting_s for one in returned]),
        "all_taps_vs_strict_bound": ratio(walls["all taps"], [one + counting_s for one in strict]),
    }


def kernel(subject: Subject, n_rounds: int, say: Say) -> dict[str, Any]:
    """The histogram kernel beside `numpy.copyto` of the same activations, both in one thread."""
    session = subject.tapped_session(optimized=False)
    arrays: list[Any] = []
    batches = subject.batches()
    while sum(array.nbytes for array in arrays) < KERNEL_BYTES and batches:
        outputs = session.run(None, subject.feeds(batches.pop(0)))
        arrays += [array for array in outputs if array.dtype == np.float32]
    copies = [np.empty_like(array) for array in arrays]

    def copy() -> None:
        for target, array in zip(copies, arrays, strict=True):
            np.copyto(target, array)

    actions = {
        "copy": copy,
        "kernel": counter(arrays, channels=False),
        "kernel with channels": counter(arrays, channels=True),
    }
    for action in actions.values():
        action()
    laps = paired(actions, n_rounds, say)
    n_elements = sum(array.size for array in arrays)
    return {
        "kernel_vs_copy": ratio(wall(laps["kernel"]), wall(laps["copy"])),
        "kernel_with_channels_vs_copy": ratio(
            wall(laps["kernel with channels"]), wall(laps["copy"])
        ),
        "ns_per_element": {
            name: statistics.median(wall(found)) / n_elements * 1e9 for name, found in laps.items()
        },
    }


def _n_elements(session: Any, subject: Subject) -> int:
    """Elements that all taps of all samples have; samples of one case have one shape."""
    keys = subject.batches()[0]
    feeds = subject.feeds(keys)
    given = sum(array.size for array in feeds.values() if array.dtype.kind == "f")
    n = sum(array.size for array in session.run(None, feeds)) + given
    return int(n / len(keys) * len(subject.source.keys()))
