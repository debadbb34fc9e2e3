"""Samples that a user's own inference function feeds to the model.

The function is called once, in one process, with an executor that runs the float model and keeps
every batch that it is given. The samples lie in a folder from then on, and every worker reads them
there.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.executor import executor_for, place_of
from qdist.data.numpy_file import read_arrays
from qdist.data.source import Feeds
from qdist.data.stored import not_found, read_bytes, unreadable
from qdist.digest import digest_arrays, digest_bytes, digest_json
from qdist.errors import ConfigError, DataError, QdistError
from qdist.files import make_folder, replacing, write_json
from qdist.model.graph import Graph
from qdist.model.half import widened
from qdist.model.session import Execution, run, scoring_session
from qdist.targets import load_target

SCHEMA = 1
INDEX = "captured.json"


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Which function is called, and with what.

    ``target``      "package.module:function" or "path/to/file.py:function".
    ``arguments``   keyword arguments after the executor; JSON values.
    ``batch_size``, ``iteration``, ``dataset``  as the executor has them. No more than
                    ``iteration`` batches are kept: the function is stopped where it feeds more.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    iteration: int | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.iteration is not None and self.iteration < 1):
            raise ConfigError(
                "QD104",
                where=self.target,
                got=f"batch_size={self.batch_size}, iteration={self.iteration}",
                expected="a batch size and a number of iterations of at least 1",
                mend="raise them",
            )

    def made_from(self, model_digest: str) -> dict[str, Any]:
        """What a captured folder depends on, as JSON: another value, another capture.

        The function's file counts by content, ``dataset`` (where it is a path) by the sizes and
        times of its files; modules that the function's file imports do not count.
        """
        return {
            "schema": SCHEMA,
            "target": self.target,
            "files": _source_digests(self.target),
            "arguments": json.loads(json.dumps(dict(self.arguments), sort_keys=True, default=repr)),
            "batch_size": self.batch_size,
            "iteration": self.iteration,
            "dataset": self.dataset,
            "dataset_files": _files_digest(self.dataset),
            "model": model_digest,
        }


@dataclass(frozen=True, kw_only=True)
class CapturedSource:
    """The samples in a folder that `capture` filled, in the order in which they were first fed.

    Keys are digests of content. Raises QD301 (no such folder), QD306 (a damaged index or sample).
    """

    folder: Path

    def __getstate__(self) -> dict[str, Any]:
        # Leaves the index behind: the process that unpickles reads its own.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def keys(self) -> list[str]:
        """The samples' names."""
        return list(self._index)

    def content_digest(self, key: str) -> str:
        """Over the arrays as they lie there now."""
        return digest_arrays(self.load(key).items())

    def preprocessing(self) -> dict[str, Any]:
        """Nothing is done to what the function fed."""
        return {"kind": "captured"}

    def load(self, key: str) -> Feeds:
        """The arrays that the function fed, by model input."""
        if key not in self._index:
            raise unreadable(
                self.folder,
                f"no sample {key!r}",
                "a key that keys() lists",
                "look the sample up by a key of this data set",
            )
        names = self._index[key]
        arrays = read_arrays(self.folder / f"{key}.npz", [f"a{i}" for i in range(len(names))])
        return {name: np.array(arrays[f"a{i}"]) for i, name in enumerate(names)}

    def label(self, key: str) -> NDArray[np.int64] | None:
        """None: the function keeps labels to itself."""
        return None

    @cached_property
    def _index(self) -> dict[str, list[str]]:
        """Key -> model inputs, in the order of the arrays in the file."""
        about = _read_index(self.folder)
        if about is None:
            raise not_found(self.folder / INDEX, "the index of captured samples")
        return {key: list(about["inputs"]) for key in about["samples"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """What `capture` did. ``reused``: the samples were there already, and nothing was called.

    ``n_forwards``  batches that the function fed; ``n_repeated``  samples among them that had been
    fed before and count once.
    """

    source: CapturedSource
    n_samples: int
    n_forwards: int
    n_repeated: int
    reused: bool


def capture(
    call: Capture,
    graph: Graph,
    inputs: Sequence[InputSpec],
    execution: Execution,
    folder: Path,
) -> Captured:
    """Call the user's function on the float model, once, and keep what it feeds in ``folder``.

    A batch of B becomes B samples where every input has a dynamic batch axis (or one of 1);
    otherwise it is one sample with its own batch axis. What lies in ``folder`` is used again when
    `Capture.made_from` is unchanged. Two processes that capture into the same folder take turns,
    and the second uses what the first left.

    Raises QD108 (the function cannot be loaded), QD302 (it fed nothing), QD310 (it raised; with its
    file and line), QD603 (the folder cannot be written). A `QdistError` that it lets through, such
    as QD205 for arrays that the model does not take, is raised as it is.
    """
    made_from = call.made_from(graph.model.digest)
    make_folder(folder)
    with _alone(folder):
        about = _read_index(folder)
        reused = about is not None and about["made_from"] == made_from
        if about is None or not reused:
            about = _captured(call, graph, inputs, execution, folder)
            about["made_from"] = made_from
            # Last, so that a folder without an index holds no capture.
            write_json(folder / INDEX, about)
    return Captured(
        source=CapturedSource(folder=folder),
        n_samples=len(about["samples"]),
        n_forwards=int(about["n_forwards"]),
        n_repeated=int(about["n_repeated"]),
        reused=reused,
    )


class _Enough(BaseException):
    """Ends a function that feeds on after the last iteration. No `Exception`, which the user's own
    handlers might catch."""


class _Recorder:
    """Runs the model, and writes what it was fed."""

    def __init__(
        self,
        model: Callable[[Feeds], list[NDArray[Any]]],
        inputs: Sequence[InputSpec],
        folder: Path,
        limit: int | None,
    ) -> None:
        self.n_forwards = 0
        self.n_samples = 0
        self.samples: dict[str, None] = {}
        self._model = model
        self._splits = all(spec.shape and not _is_block(spec.shape[0]) for spec in inputs)
        self._folder = folder
        self._limit = limit

    @property
    def full(self) -> bool:
        """Whether the iterations asked for are done."""
        return self._limit is not None and self.n_forwards >= self._limit

    def __call__(self, feeds: Feeds) -> list[NDArray[Any]]:
        if self.full:
            raise _Enough
        outputs = self._model(feeds)
        self.n_forwards += 1
        for sample in self._samples_of(feeds):
            self._keep(sample)
        return outputs

    def _samples_of(self, feeds: Feeds) -> Iterator[Feeds]:
        sizes = {array.shape[0] if array.ndim else None for array in feeds.values()}
        (size, *others) = sizes
        if self._splits and size is not None and not others:
            for row in range(size):
                yield {name: array[row] for name, array in feeds.items()}
        else:
            yield feeds

    def _keep(self, sample: Feeds) -> None:
        self.n_samples += 1
        arrays = {name: np.ascontiguousarray(array) for name, array in sample.items()}
        # `ascontiguousarray` makes a single number one-dimensional.
        arrays = {name: array.reshape(sample[name].shape) for name, array in arrays.items()}
        key = digest_arrays(arrays.items())[:32]
        if key in self.samples:
            return
        self.samples[key] = None
        with replacing(self._folder / f"{key}.npz") as temporary, temporary.open("wb") as stream:
            members = {f"a{i}": array for i, array in enumerate(arrays.values())}
            np.savez(stream, allow_pickle=False, **members)


def _is_block(size: int | str | None) -> bool:
    """Whether a model insists on batches of several samples. Those are kept whole: single samples
    that repeat would leave fewer than the model needs."""
    return isinstance(size, int) and size != 1


def _captured(
    call: Capture, graph: Graph, inputs: Sequence[InputSpec], execution: Execution, folder: Path
) -> dict[str, Any]:
    """The index, without what it was made from."""
    (folder / INDEX).unlink(missing_ok=True)
    for stale in folder.glob("*.npz"):
        stale.unlink()
    folder_of_weights = graph.model.data_folder
    proto = widened(graph.model.proto(), folder_of_weights, execution)
    session = scoring_session(proto.SerializeToString(), execution, folder_of_weights)
    recorder = _Recorder(lambda feeds: run(session, None, feeds), inputs, folder, call.iteration)
    _call(call, graph, recorder)
    if not recorder.samples:
        raise DataError(
            "QD302",
            where=call.target,
            got="a function that never called executor.forward",
            expected="at least one batch",
            mend="feed the model with executor.forward(...)",
        )
    return {
        "inputs": list(graph.input_names),
        "samples": list(recorder.samples),
        "n_forwards": recorder.n_forwards,
        "n_repeated": recorder.n_samples - len(recorder.samples),
    }


def _call(call: Capture, graph: Graph, recorder: _Recorder) -> None:
    function = load_target(call.target)
    executor = executor_for(
        graph,
        recorder,
        batch_size=call.batch_size,
        iteration=call.iteration,
        dataset=call.dataset,
    )

    def forward(feeds: Feeds) -> list[NDArray[Any]]:
        outputs = recorder(feeds)
        executor.early_stop_flag = recorder.full
        return outputs

    executor.run = forward
    try:
        function(executor, **call.arguments)
    except _Enough:
        pass
    except QdistError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(
            "QD310",
            where=place_of(error, function),
            got=f"{type(error).__name__}: {error}",
            expected=f"{call.target} to run to its end",
            mend="correct the function there",
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine captures into ``folder``."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index, or None where there is none. Raises QD306."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        about = json.loads(read_bytes(path, "the index of captured samples"))
        if not all(key in about for key in ("made_from", "inputs", "samples", "n_forwards")):
            raise ValueError("an index without all of its keys")
    except (ValueError, TypeError) as error:
        raise unreadable(
            path,
            str(error),
            "the index that a capture wrote",
            "remove the folder, so that the samples are captured again",
        ) from error
    return dict(about)


def _source_digests(target: str) -> list[str]:
    """Of the file that ``target`` names and of the one that defines the function."""
    function = load_target(target)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    named = target.rpartition(":")[0]
    files = [Path(named).expanduser()] if named.endswith(".py") else []
    files.append(Path(getattr(module, "__file__", None) or ""))
    return [digest_bytes(file.read_bytes()) for file in files if file.is_file()]


def _files_digest(dataset: str | None) -> str | None:
    """Over names, sizes and times of the file or folder ``dataset``; None where it is no path."""
    if not dataset or not Path(dataset).exists():
        return None
    root = Path(dataset)
    found = [(".", root.stat())] if root.is_file() else []
    for place, _, names in os.walk(root):
        for name in names:
            path = Path(place, name)
            if path.is_file():
                found.append((path.relative_to(root).as_posix(), path.stat()))
    return digest_json(sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in found))
