"""Samples from a user's own Python function."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class FunctionSource:
    """The samples that ``target`` returns when called with ``arguments``.

    ``target``     "package.module:function" or "path/to/file.py:function".
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
        function = load_function(self.target)
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
            None if label is None else _as_label(label, where),
        )


def load_function(target: str) -> Callable[..., Any]:
    """What "module:function" or "file.py:function" names. Raises QD108."""
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise _not_loaded(
            target,
            "no module or no function name",
            "'package.module:function' or 'path/to/file.py:function'",
            "write both, with a colon between",
        )
    module = _load_module(target, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(
            known
            for known, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        )
        raise _not_loaded(
            target,
            f"no function {name!r} in {place}",
            f"one of the functions there: {', '.join(known) or 'none'}",
            "correct the name after the colon",
        )
    return function


def _load_module(target: str, place: str) -> ModuleType:
    is_file = place.endswith(".py")
    path = Path(place).resolve()
    if is_file and not path.is_file():
        raise _not_loaded(
            target,
            f"no file {path}",
            "an existing Python file",
            "check the path; relative paths start at the working directory",
        )
    try:
        return _execute_file(path) if is_file else importlib.import_module(place)
    except Exception as error:
        raise _not_loaded(
            target,
            f"{type(error).__name__}: {_last_line(error)}",
            "a module that imports without an error",
            f"run 'python {place}' to see the whole traceback"
            if is_file
            else f"run 'python -c \"import {place}\"' to see the whole traceback",
        ) from error


def _execute_file(path: Path) -> ModuleType:
    """The module of one file, under a name made from its path and content."""
    seed = str(path).encode() + b"\0" + path.read_bytes()
    name = f"qdist_user_{path.stem}_{hashlib.sha256(seed).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up here while and after it is executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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


def _as_label(value: Any, where: str) -> NDArray[np.int64]:
    label = np.asarray(value)
    if label.dtype.kind not in "biu":
        raise DataError(
            "QD308",
            where=where,
            got=f"a label of dtype {label.dtype}",
            expected="an integer, or an array of integers",
            mend="return class numbers as integers",
        )
    return label.astype(np.int64)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"


def _bad_sample(where: str, got: str, expected: str) -> DataError:
    return DataError(
        "QD306", where=where, got=got, expected=expected, mend="change what the function returns"
    )


def _not_loaded(target: str, got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError("QD108", where=target, got=got, expected=expected, mend=mend)
