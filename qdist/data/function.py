"""Samples from a user's own Python function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.label import as_label
from qdist.data.source import Feeds
from qdist.data.stored import unreadable
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError
from qdist.targets import load_target


@dataclass(frozen=True, kw_only=True)
class FunctionSource:
    """The samples that ``target`` returns when called with ``arguments``.

    ``target``     "package.module:function" or "path/to/file.py:function"; see
                   `qdist.targets.load_target`.
    ``arguments``  keyword arguments; they travel to the workers, so they have to pickle.

    The function returns a sequence (an object with ``__len__`` and ``__getitem__`` is asked for one
    sample at a time, so it may load lazily) or any other iterable, which is held in memory whole.
    A sample is a dict {model input: array without batch axis} or a pair (dict, integer label).
    Every worker calls the function for itself: it has to give the same samples each time.

    Raises QD108 (file, module or function not found, or it fails), QD302 (no samples), QD306
    (a sample that is no such dict, or that fails to load), QD308 (a label that is no integer).
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # Leaves the samples behind: the process that unpickles calls the function itself.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def keys(self) -> list[str]:
        """The sample's number as six or more digits."""
        return [f"{index:06d}" for index in range(len(self._samples))]

    def content_digest(self, key: str) -> str:
        """Over the arrays that the function gave."""
        return digest_arrays(self.load(key).items())

    def preprocessing(self) -> dict[str, Any]:
        """Nothing is done to the arrays after the function."""
        return {"kind": "function"}

    def load(self, key: str) -> Feeds:
        """The arrays of one sample, as the function gave them."""
        return self._sample(key)[0]

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The second half of a pair (dict, label), or None."""
        return self._sample(key)[1]

    @cached_property
    def _samples(self) -> Sequence[Any]:
        function = load_target(self.target)
        try:
            given = function(**self.arguments)
            lazy = hasattr(given, "__len__") and hasattr(given, "__getitem__")
            samples: Sequence[Any] = given if lazy else list(_iterable(self.target, given))
            n = len(samples)
        except ConfigError:
            raise
        except Exception as error:
            raise _not_loaded(
                self.target,
                f"{type(error).__name__}: {_last_line(error)}",
                "a function that returns samples for "
                f"the arguments {', '.join(map(repr, self.arguments)) or '(none)'}",
                "call it in a Python shell with the same arguments to see the whole traceback",
            ) from error
        if n == 0:
            raise DataError(
                "QD302",
                where=self.target,
                got="no samples",
                expected="at least one sample",
                mend="check what the function returns for these arguments",
            )
        return samples

    def _sample(self, key: str) -> tuple[Feeds, NDArray[np.int64] | None]:
        where = f"{self.target}, sample {key}"
        if not key.isdecimal() or int(key) >= len(self._samples):
            raise _bad_sample(where, "no such sample", f"a number below {len(self._samples)}")
        try:
            sample = self._samples[int(key)]
        except Exception as error:
            got = f"{type(error).__name__}: {_last_line(error)}"
            raise _bad_sample(where, got, "a sample") from error
        has_label = isinstance(sample, tuple) and len(sample) == 2
        arrays, label = sample if has_label else (sample, None)
        if not isinstance(arrays, Mapping) or not arrays:
            got = f"{type(arrays).__name__}, {len(arrays) if isinstance(arrays, Mapping) else 1}"
            raise _bad_sample(where, got, "a dict of arrays, or a pair (dict, label)")
        return (
            {str(name): _as_array(array, f"{where}, {name}") for name, array in arrays.items()},
            None
            if label is None
            else as_label(label, where, mend="return class numbers as integers"),
        )


def _iterable(target: str, given: Any) -> Iterable[Any]:
    if not isinstance(given, Iterable):
        raise _not_loaded(
            target,
            f"a function that returned {type(given).__name__}",
            "a sequence or an iterable of samples",
            "return a list, or yield the samples",
        )
    return given


def _as_array(value: Any, where: str) -> NDArray[Any]:
    try:
        # A copy: the user's own array may be handed out again.
        array = np.array(value)
    except (TypeError, ValueError) as error:
        raise _bad_sample(where, _last_line(error), "an array of numbers") from error
    if array.dtype.kind in "OUSMm":
        raise _bad_sample(where, f"dtype {array.dtype}", "an array of numbers")
    return array


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _bad_sample(where: str, got: str, expected: str) -> DataError:
    return unreadable(where, got, expected, "change what the function returns")


def _not_loaded(target: str, got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError("QD108", where=target, got=got, expected=expected, mend=mend)
