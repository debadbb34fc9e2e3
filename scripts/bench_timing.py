"""Laps, medians of paired laps, memory of a process, and what machine this is."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One timed run: seconds on the wall, and of processor in all threads of this process."""

    wall_s: float
    cpu_s: float


def lap(action: Callable[[], T]) -> tuple[Lap, T]:
    """Run ``action`` once."""
    cpu, begin = time.process_time(), time.perf_counter()
    result = action()
    return Lap(wall_s=time.perf_counter() - begin, cpu_s=time.process_time() - cpu), result


def paired(
    actions: Mapping[str, Callable[[], Any]],
    n_rounds: int,
    say: Callable[[str], None],
    first: int = 0,
) -> dict[str, list[Lap]]:
    """Run every action once per round; each round begins with another one, from ``first`` on.

    A machine that others use gets slower and faster within minutes, so only laps of one round are
    compared with one another, and the order must favour nobody. An action that runs in another
    process gives its own `Lap`.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in actions}
    names = list(actions)
    for index in range(n_rounds):
        turn = (first + index) % len(names)
        for name in names[turn:] + names[:turn]:
            done, result = lap(actions[name])
            laps[name].append(result if isinstance(result, Lap) else done)
        times = ", ".join(f"{name} {laps[name][-1].wall_s:.2f} s" for name in names)
        say(f"{times} ({index + 1}/{n_rounds})" if n_rounds > 1 else times)
    return laps


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the quotients of pairs."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def wall(laps: Iterable[Lap]) -> list[float]:
    """Seconds on the wall."""
    return [one.wall_s for one in laps]


def cpu(laps: Iterable[Lap]) -> list[float]:
    """Seconds of processor."""
    return [one.cpu_s for one in laps]


def memory_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the peak) of this process, in bytes; Linux."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def machine() -> dict[str, Any]:
    """What these figures were measured on."""
    model, flags = "", ""
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = value
    wanted = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimd")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model or platform.processor(),
        "flags": [flag for flag in wanted if flag in flags.split()],
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


class Role:
    """A part of the benchmark that needs a process of its own: this very script, with a role.

    ``words`` are the role's name and its arguments as JSON. The process answers with one line of
    JSON for each line of JSON that it is sent, the first without being asked.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        script = Path(__file__).with_name("bench_calibration.py")
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(script), "--role", name, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        """Wait for the next line. Raises `RuntimeError` when the process ends without one."""
        if self._process.stdout is None:
            raise RuntimeError("the process has no output")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the process for {self.name} ended with status {status}")
        return json.loads(line)

    def ask(self, value: Any = None) -> None:
        """Send a line, so that the process goes on."""
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Role:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
