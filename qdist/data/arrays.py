"""Samples in NumPy files: one .npz or .npy for all, or a folder with one file per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.label import as_label
from qdist.data.numpy_file import read_arrays
from qdist.data.preprocess import Preprocess
from qdist.data.source import Feeds
from qdist.data.stored import unreadable
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError

_MEND_LABEL = "store class numbers as integers, or choose another labels key"


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """Samples from ``path``: sample i is ``array[i]`` of every array that ``inputs`` maps.

    ``path``        an .npz file; an .npy file; or a folder of .npz (or .npy) files, each of which
                    is one sample without a leading sample axis.
    ``inputs``      model input name -> key in the .npz. For .npy: one input mapped to "".
    ``labels``      key of the labels in the .npz (integers, first axis = samples), or None.
    ``preprocess``  one for every input, or one per input; an input that the mapping leaves out is
                    passed on unchanged.
    ``start``, ``limit``  skip the first samples, then take at most ``limit``.

    An .npy file and the members that `numpy.savez` wrote are memory-mapped; what
    `numpy.savez_compressed` wrote has to be held in memory whole.

    Raises QD104 (bad limit), QD301, QD302, QD306 (unreadable, arrays of different lengths),
    QD307 (no such key or input), QD308 (labels do not fit), on first use.
    """

    path: Path
    inputs: Mapping[str, str]
    labels: str | None = None
    preprocess: Preprocess | Mapping[str, Preprocess] = field(default_factory=Preprocess)
    limit: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or (self.limit is not None and self.limit < 1):
            raise ConfigError(
                "QD104",
                where=str(self.path),
                got=f"start={self.start}, limit={self.limit}",
                expected="a start of at least 0 and a limit of at least 1",
                mend="change start or limit",
            )
        settings = {} if isinstance(self.preprocess, Preprocess) else self.preprocess
        unknown = sorted(set(settings) - set(self.inputs))
        if unknown or not self.inputs:
            raise DataError(
                "QD307",
                where=str(self.path),
                got=f"preprocessing for {', '.join(unknown)}" if unknown else "no inputs at all",
                expected=f"the inputs {', '.join(self.inputs) or 'of the model'}",
                mend="map each model input to an array with inputs={NAME: KEY}",
            )

    def __getstate__(self) -> dict[str, Any]:
        # Leaves the opened arrays behind: the process that unpickles opens its own.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes by construction."""
        return not self.path.is_dir()

    def keys(self) -> list[str]:
        """File names of a folder; otherwise the index in the file as six or more digits."""
        if self.path.is_dir():
            return list(self._files)
        return [f"{index:06d}" for index in self._range]

    def content_digest(self, key: str) -> str:
        """Over dtype, shape and bytes of the stored arrays, by model input name."""
        return digest_arrays(self._stored(key).items())

    def preprocessing(self) -> dict[str, Any]:
        """Settings of each input."""
        return {
            "kind": "arrays",
            "inputs": {name: self._preprocess(name).as_json() for name in sorted(self.inputs)},
        }

    def load(self, key: str) -> Feeds:
        """The preprocessed arrays of one sample."""
        return {
            name: self._preprocess(name).apply(array, where=f"{self.path}, sample {key}, {name}")
            for name, array in self._stored(key).items()
        }

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The labels array's row for this sample, or the label stored in its file."""
        if self.labels is None:
            return None
        if self.path.is_dir():
            stored = read_arrays(self._files[key], [self.labels])[self.labels]
            where = f"{self.path}, sample {key}, {self.labels}"
            return as_label(stored, where, mend=_MEND_LABEL)
        labels = self._arrays[self.labels]
        where = f"{self.path}, {self.labels}"
        return as_label(labels[self._index(key)], where, mend=_MEND_LABEL)

    def _preprocess(self, name: str) -> Preprocess:
        if isinstance(self.preprocess, Preprocess):
            return self.preprocess
        return self.preprocess.get(name, Preprocess(dtype="keep"))

    def _stored(self, key: str) -> Feeds:
        """Model input name -> the stored array of one sample, in native byte order."""
        if self.path.is_dir():
            if key not in self._files:
                raise _no_such_sample(self.path, key)
            arrays = read_arrays(self._files[key], list(self.inputs.values()))
            return {name: _native(arrays[member]) for name, member in self.inputs.items()}
        index = self._index(key)
        return {name: _native(self._arrays[member][index]) for name, member in self.inputs.items()}

    def _index(self, key: str) -> int:
        if not key.isdecimal() or int(key) not in self._range:
            raise _no_such_sample(self.path, key)
        return int(key)

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Key -> whole array, all of the same length."""
        labels = [] if self.labels is None else [self.labels]
        arrays = read_arrays(self.path, [*self.inputs.values(), *labels])
        for key, array in arrays.items():
            if array.ndim == 0:
                raise DataError(
                    "QD306",
                    where=f"{self.path}, array {key!r}",
                    got="a single number",
                    expected="an array whose first axis counts the samples",
                    mend="choose another key, or add the sample axis",
                )
        n = len(arrays[next(iter(self.inputs.values()))])
        for key, array in arrays.items():
            if len(array) != n:
                raise DataError(
                    "QD308" if key == self.labels else "QD306",
                    where=f"{self.path}, array {key!r}",
                    got=f"{len(array)} entries beside {n} samples",
                    expected="the same number of entries in every array",
                    mend="save arrays that belong together, or choose other keys",
                )
        return arrays

    @cached_property
    def _range(self) -> range:
        n = len(self._arrays[next(iter(self.inputs.values()))])
        return _selected(self.path, n, self.start, self.limit)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """File name -> path, sorted by name, for a folder."""
        suffix = ".npy" if list(self.inputs.values()) == [""] else ".npz"
        found = sorted(path.name for path in self.path.iterdir() if path.suffix == suffix)
        chosen = _selected(self.path, len(found), self.start, self.limit, suffix)
        return {found[index]: self.path / found[index] for index in chosen}


def _selected(path: Path, n: int, start: int, limit: int | None, suffix: str = "") -> range:
    chosen = range(n)[start:] if limit is None else range(n)[start : start + limit]
    if not chosen:
        what = f"{suffix} files" if suffix else "samples"
        raise DataError(
            "QD302",
            where=str(path),
            got=f"{n} {what}, of which the first {start} are skipped",
            expected=f"at least one of the {what} to be left",
            mend="choose another file or folder, or a lower start",
        )
    return chosen


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """A plain array in native byte order that owns its memory; values unchanged."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _no_such_sample(path: Path, key: str) -> DataError:
    return unreadable(
        path,
        f"no sample {key!r}",
        "a key that keys() lists",
        "look the sample up by a key of this data set",
    )
