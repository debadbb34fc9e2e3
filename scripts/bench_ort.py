"""ONNX Runtime's own calibrators, on equal terms.

They get the same model file, the same micro-batches read in the same way, and as many threads as we
get workers. Both sides end with a range for the same tensors: what ONNX Runtime measures by itself,
as far as we have a range for it. A view (the result of a Reshape, say) has that of its source with
us, and is measured like any other tensor with them. On request they are also given the distinct
tensors alone. Start-up is excluded: sessions are loaded and have run before.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import onnxruntime as ort
from bench_engine import Subject, find_thresholds, merge_at, new_store
from bench_timing import Role, ratio
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    EntropyCalibrater,
    PercentileCalibrater,
)

OUR_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "percentile": ("percentile", {"percent": 99.999}),
    "entropy": ("kl", {"bins": 128}),
}
"""ONNX Runtime's name of a method -> ours, with the parameters that ONNX Runtime has by default.

With 128 bins and 128 levels there is one candidate, so its entropy is no search; ours has 2,048
bins unless told otherwise, which takes longer and is timed apart.
"""
ALL_CORES = 2


class SampleReader(CalibrationDataReader):  # type: ignore[misc]
    """Gives micro-batch after micro-batch, read when it is asked for."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._left = subject.batches()

    def get_next(self) -> dict[str, Any] | None:
        """The feeds of the next micro-batch."""
        return self._subject.feeds(self._left.pop(0)) if self._left else None


def make_calibrator(
    method: str,
    model: str,
    folder: Path,
    tensors: Collection[str] | None = None,
    n_threads: int = 1,
) -> Any:
    """A calibrator that is ready to be given data, with the defaults of `create_calibrator`.

    ``tensors``: the only ones to measure, as far as the given model has them under these names;
    None measures all float tensors, as ONNX Runtime does by itself.
    """
    base = {"percentile": PercentileCalibrater, "entropy": EntropyCalibrater}[method]

    class Calibrator(base):  # type: ignore[misc, valid-type]
        def select_tensors_to_calibrate(self, model: Any) -> Any:
            found, infos = super().select_tensors_to_calibrate(model)
            return (found if tensors is None else found & set(tensors)), infos

        def create_inference_session(self) -> None:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = n_threads
            self.infer_session = ort.InferenceSession(
                self.augmented_model_path, options, self.execution_providers
            )

    calibrator = Calibrator(
        Path(model),
        augmented_model_path=str(folder / f"{method}.onnx"),
        symmetric=method == "percentile",
    )
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def collect(calibrator: Any, subject: Subject) -> int:
    """Run all samples and compute the ranges; how many there are."""
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator.collect_data(SampleReader(subject))
        return len(calibrator.compute_data().data)


def _seconds_of(calibrator: Any, subject: Subject) -> float:
    begin = time.perf_counter()
    collect(calibrator, subject)
    return time.perf_counter() - begin


class Crew:
    """Warm workers, each a process with one thread, that share the shards of one calibration.

    Beside them as many plain float runs, which share the samples: no calibration that runs the
    model can take less.
    """

    def __init__(self, subject: Subject, folder: Path, sizes: Iterable[int]) -> None:
        """``sizes``: how many workers there are to be, each number a crew of its own."""
        self._job = subject.job("all")
        self._folder = folder
        arguments = {
            "case": subject.case.to_json(),
            "n_samples": len(subject.source.keys()),
            "folder": str(folder),
            "n_turns": ALL_CORES,
        }
        self._roles = {
            n_workers: [
                Role("shards", {**arguments, "turn": turn, "n_turns": n_workers})
                for turn in range(n_workers)
            ]
            for n_workers in set(sizes)
        }
        self._float_roles = [
            Role("float runs", {**arguments, "turn": turn, "n_turns": ALL_CORES})
            for turn in range(ALL_CORES)
        ]

    def wait_until_warm(self) -> None:
        """Until every worker has measured a shard."""
        for role in self._all():
            role.answer()

    def calibrate(self, n_workers: int, method: str) -> float:
        """Measure all shards, merge, and find all ranges; seconds."""
        path = self._folder / "crew.zarr"
        new_store(path, self._job)
        begin = time.perf_counter()
        for role in self._roles[n_workers]:
            role.ask(str(path))
        for role in self._roles[n_workers]:
            role.answer()
        merged = merge_at(self._job, path)
        find_thresholds(merged.record, *OUR_METHODS[method])
        seconds = time.perf_counter() - begin
        shutil.rmtree(path)
        return seconds

    def run_floats(self) -> float:
        """Run the float model over all samples in as many processes as there are cores; seconds."""
        begin = time.perf_counter()
        for role in self._float_roles:
            role.ask(None)
        for role in self._float_roles:
            role.answer()
        return time.perf_counter() - begin

    @property
    def tensors(self) -> tuple[str, ...]:
        """What is measured."""
        return self._job.taps.tensors

    @property
    def covered(self) -> tuple[str, ...]:
        """What has a range in the end: views too."""
        return (*self._job.taps.tensors, *self._job.taps.aliases)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for role in self._all():
            role.__exit__()

    def _all(self) -> list[Role]:
        return [*self._float_roles, *(role for roles in self._roles.values() for role in roles)]


def against_ort(
    subject: Subject,
    folder: Path,
    n_rounds: int,
    say: Callable[[str], None],
    one_thread: bool = False,
    is_distinct: bool = False,
) -> dict[str, Any]:
    """Speed-ups over ONNX Runtime's percentile and entropy calibrators.

    Two threads against two workers, ``n_rounds`` times; with ``one_thread`` one thread against one
    worker, once. The limits are the speed-ups of a plain float run and nothing else. With
    ``is_distinct`` also beside calibrators that are given the distinct tensors alone, once.
    """
    turns = [ALL_CORES] * n_rounds + [1] * one_thread
    ours: dict[tuple[str, int], list[float]] = {}
    theirs: dict[tuple[str, int], list[float]] = {}
    floats: dict[str, list[float]] = {}
    with Crew(subject, folder, turns) as crew:
        crew.wait_until_warm()
        for index, n_threads in enumerate(turns):
            for method in OUR_METHODS:
                calibrator = make_calibrator(
                    method, subject.case.model, folder, crew.covered, n_threads
                )
                key = (method, n_threads)
                if index % 2 == 0:
                    ours.setdefault(key, []).append(crew.calibrate(n_threads, method))
                theirs.setdefault(key, []).append(_seconds_of(calibrator, subject))
                if index % 2 == 1:
                    ours.setdefault(key, []).append(crew.calibrate(n_threads, method))
                plain = ""
                if n_threads == ALL_CORES:
                    floats.setdefault(method, []).append(crew.run_floats())
                    plain = f", float run {floats[method][-1]:.2f} s"
                say(
                    f"{method}, {n_threads} threads: ours {ours[key][-1]:.2f} s, "
                    f"ONNX Runtime {theirs[key][-1]:.2f} s{plain} ({index + 1}/{len(turns)})"
                )
        distinct = {
            method: _seconds_of(
                make_calibrator(method, subject.case.model, folder, crew.tensors, ALL_CORES),
                subject,
            )
            for method in OUR_METHODS
            if is_distinct
        }
        n_ours, covered = len(crew.tensors), set(crew.covered)
    by_itself = make_calibrator("percentile", subject.case.model, folder)
    result: dict[str, Any] = {
        "ort": {
            "n_tensors": {
                "ours": n_ours,
                "ours, with views": len(covered),
                "ONNX Runtime, as measured": len(by_itself.tensors_to_calibrate & covered),
                "ONNX Runtime, by itself": len(by_itself.tensors_to_calibrate),
            },
            "n_rounds": n_rounds,
            "seconds": {
                f"{method}, {n_threads} threads": {
                    "ours": statistics.median(ours[method, n_threads]),
                    "ONNX Runtime": statistics.median(theirs[method, n_threads]),
                }
                for method, n_threads in ours
            },
        }
    }
    for method in OUR_METHODS:
        if is_distinct:
            one_of_ours = statistics.median(ours[method, ALL_CORES])
            result[f"speedup_vs_ort_{method}_distinct"] = distinct[method] / one_of_ours
            say(f"{method}, distinct tensors alone: ONNX Runtime {distinct[method]:.2f} s")
        result[f"limit_vs_ort_{method}"] = ratio(theirs[method, ALL_CORES], floats[method])
        for n_threads, ending in ((ALL_CORES, ""), (1, "_1_thread")):
            key = (method, n_threads)
            if key not in ours:
                continue
            result[f"speedup_vs_ort_{method}{ending}"] = ratio(theirs[key], ours[key])
    return result
