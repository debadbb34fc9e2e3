"""Some of a source's samples: the first ones, all but some, or those that a file lists.

What these leave out changes no id of what they leave in, so a calibration is extended by wanting
more of the same source.
"""

from __future__ import annotations

import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import DataSource, Feeds
from qdist.data.stored import read_lines, unreadable
from qdist.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Subset(ABC):
    """The samples of ``source`` whose keys a subclass chooses, each exactly as ``source`` has it.

    Digests, settings, arrays and labels are the source's. Raises QD302 where nothing is left,
    QD306 for the key of a sample that was left out, and what the source raises.
    """

    source: DataSource

    def __getstate__(self) -> dict[str, Any]:
        # Leaves the chosen keys behind: the process that unpickles chooses them itself.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def chosen(self, keys: list[str]) -> list[str]:
        """Which of the source's ``keys`` are left in, in the order in which they are used."""

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes by construction."""
        return bool(getattr(self.source, "uniform", False))

    def keys(self) -> list[str]:
        """The chosen keys."""
        return list(self._keys)

    def content_digest(self, key: str) -> str:
        """The source's."""
        return self.source.content_digest(self._known(key))

    def preprocessing(self) -> dict[str, Any]:
        """The source's: choosing samples changes none of their arrays."""
        return self.source.preprocessing()

    def load(self, key: str) -> Feeds:
        """The source's arrays."""
        return self.source.load(self._known(key))

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The source's label."""
        return self.source.label(self._known(key))

    @cached_property
    def _keys(self) -> dict[str, None]:
        there = self.source.keys()
        chosen = self.chosen(there)
        if not chosen:
            raise DataError(
                "QD302",
                where=type(self).__name__,
                got=f"none of {len(there)} samples left",
                expected="at least one",
                mend="leave fewer samples out",
            )
        return dict.fromkeys(chosen)

    def _known(self, key: str) -> str:
        if key not in self._keys:
            raise unreadable(
                f"sample {key}",
                "a sample that is not among the chosen ones",
                "a key that keys() lists",
                "look the sample up by a key of this data set",
            )
        return key


@dataclass(frozen=True, kw_only=True)
class Limited(Subset):
    """The first ``max_samples`` of the source in its order, or all where it has fewer.

    Raises QD104 for a number below 1.
    """

    max_samples: int

    def __post_init__(self) -> None:
        if self.max_samples < 1:
            raise ConfigError(
                "QD104",
                where="max_samples",
                got=str(self.max_samples),
                expected="at least 1",
                mend="raise it, or leave it out to use all samples",
            )

    def chosen(self, keys: list[str]) -> list[str]:
        """The first ones."""
        return keys[: self.max_samples]


@dataclass(frozen=True, kw_only=True)
class Excluded(Subset):
    """All samples but those that an entry of ``exclude`` names: a key, or an `fnmatch` pattern.

    An entry that is a key means that sample alone, even where it reads as a pattern; upper and
    lower case differ. Raises QD104, with keys that come close, for an entry that matches nothing.
    """

    exclude: tuple[str, ...]

    def chosen(self, keys: list[str]) -> list[str]:
        """What is left."""
        there = set(keys)
        gone: set[str] = set()
        for entry in self.exclude:
            # Not `fnmatch.filter`, which folds case on some systems.
            patterned = (key for key in keys if fnmatch.fnmatchcase(key, entry))
            matched = [entry] if entry in there else list(patterned)
            if not matched:
                raise ConfigError(
                    "QD104",
                    where=f"exclude, entry {entry!r}",
                    got="a key or pattern that matches no sample",
                    expected=_close(entry, keys),
                    mend="correct the entry, or remove it",
                )
            gone.update(matched)
        return [key for key in keys if key not in gone]


@dataclass(frozen=True, kw_only=True)
class Listed(Subset):
    """The samples that ``list_file`` names, one key a line, in the file's order.

    Empty lines count for nothing. Raises QD301 (no such file), QD306 with the line's number for a
    key that the source does not have or that was named before.
    """

    list_file: Path

    def chosen(self, keys: list[str]) -> list[str]:
        """The file's keys."""
        there = set(keys)
        lines: dict[str, int] = {}
        for number, line in enumerate(read_lines(self.list_file), start=1):
            key = line if line in there else line.strip()
            if not key:
                continue
            where = f"{self.list_file}, line {number}"
            if key in lines:
                raise unreadable(
                    where,
                    f"{key} for the second time, after line {lines[key]}",
                    "every sample once",
                    "remove one of the two lines",
                )
            if key not in there:
                raise unreadable(
                    where,
                    f"{key!r}, which is no sample of the data set",
                    _close(key, keys),
                    "correct the line, or remove it",
                )
            lines[key] = number
        return list(lines)


def _close(wanted: str, keys: Collection[str]) -> str:
    """The keys most like ``wanted``, or else the first ones."""
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.5)
    shown = near or list(keys)[:3]
    return f"a key such as {', '.join(shown)}" if shown else "a key of the data set"
