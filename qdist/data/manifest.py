"""The samples of a calibration, named by content, in append-only generations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from qdist.data.source import DataSource
from qdist.digest import canonical_json, digest_json
from qdist.errors import DataError, StoreError

SCHEMA = 1

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""(model input, shape of the sample) pairs, sorted by name."""

Probe = Literal["all", "first"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEntry:
    """One sample. ``id`` is `sample_id` of what it is; ``key`` is where its source has it."""

    id: str
    key: str
    shapes: Shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleManifest:
    """Which samples were calibrated, in which order, and what they are.

    ``preprocessing``  canonical JSON of the source's settings; part of every id.
    ``generations``    generation 0 is the first source's order; each later one holds the samples
                       that were new when the set was extended, in the source's order.
    ``duplicates``     keys, as of the last source seen, whose content another key already gave.
    ``absent``         ids of samples that the last source seen no longer has, in manifest order.
                       They keep their places, so that one that comes back is used again there;
                       `present` is what is in use, and `digest` tells the two apart.

    Laws: an id depends on that sample's content and the preprocessing alone, so adding, renaming
    or reordering files changes no existing id; `extend` changes no id, shape or position of an
    earlier generation; ``from_json(to_json(m)) == m``.
    """

    preprocessing: str
    generations: tuple[tuple[SampleEntry, ...], ...]
    duplicates: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = [entry.id for entry in self]
        twice = len(ids) - len(set(ids))
        if twice or not ids or not all(self.generations):
            raise StoreError(
                "QD403",
                where="sample manifest",
                got=f"{len(ids)} samples, {twice} of them repeated, in generations of "
                f"{[len(generation) for generation in self.generations]}",
                expected="every sample once, and no empty generation",
                mend="calibrate again into a new store",
            )
        unknown = set(self.absent) - set(ids)
        if unknown or len(self.absent) == len(ids):
            raise StoreError(
                "QD403",
                where="sample manifest",
                got=f"{len(self.absent)} samples of {len(ids)} named absent, "
                f"{len(unknown)} of them unknown",
                expected="absent samples that the manifest has, and one that is present",
                mend="calibrate again into a new store",
            )

    @classmethod
    def first(
        cls,
        source: DataSource,
        *,
        probe: Probe | None = None,
        on_progress: OnProgress | None = None,
    ) -> SampleManifest:
        """Generation 0: every sample of ``source``.

        ``probe`` says how shapes are learned: "all" loads every sample once, "first" loads one and
        gives its shapes to all; None chooses by `default_probe`. ``on_progress(done, total)`` is
        called after each sample. Raises what the source raises.
        """
        scan = _scan(source, probe, on_progress)
        return cls(
            preprocessing=canonical_json(source.preprocessing()),
            generations=(scan.new,),
            duplicates=scan.duplicates,
        )

    def extend(
        self,
        source: DataSource,
        *,
        probe: Probe | None = None,
        on_progress: OnProgress | None = None,
    ) -> SampleManifest:
        """This manifest, with the samples of ``source`` that are not in it as a new generation.

        Earlier samples stay where they are; only the key of one that was renamed follows it.
        Without new samples no generation is added. Raises QD401 where the source's preprocessing
        is another one.
        """
        self._check_preprocessing(source)
        scan = _scan(source, probe, on_progress, frozenset(self.ids))
        earlier = tuple(
            tuple(replace(entry, key=scan.keys.get(entry.id, entry.key)) for entry in generation)
            for generation in self.generations
        )
        return replace(
            self,
            generations=(*earlier, scan.new) if scan.new else earlier,
            duplicates=scan.duplicates,
            absent=tuple(id for id in self.ids if id not in scan.keys),
        )

    def __len__(self) -> int:
        return sum(len(generation) for generation in self.generations)

    def __iter__(self) -> Iterator[SampleEntry]:
        for generation in self.generations:
            yield from generation

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples in order, absent ones included."""
        return tuple(entry.id for entry in self)

    @property
    def present(self) -> tuple[SampleEntry, ...]:
        """The samples in use: all but the absent ones, in order."""
        absent = set(self.absent)
        return tuple(entry for entry in self if entry.id not in absent)

    @property
    def preprocessing_digest(self) -> str:
        """The half of every id that the samples have in common."""
        return digest_json(json.loads(self.preprocessing))

    @property
    def digest(self) -> str:
        """Over ids, shapes, generations and which samples are absent.

        Where samples lie and duplicates are no part of it.
        """
        generations = [
            [[entry.id, entry.shapes] for entry in generation] for generation in self.generations
        ]
        return digest_json({"generations": generations, "absent": sorted(self.absent)})

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads."""
        return {
            "kind": "qdist.samples",
            "schema": SCHEMA,
            "preprocessing": json.loads(self.preprocessing),
            "generations": [
                [
                    {
                        "id": entry.id,
                        "key": entry.key,
                        "shapes": {name: list(shape) for name, shape in entry.shapes},
                    }
                    for entry in generation
                ]
                for generation in self.generations
            ],
            "duplicates": list(self.duplicates),
            "absent": list(self.absent),
        }

    @classmethod
    def from_json(cls, value: Any) -> SampleManifest:
        """What `to_json` gave. Raises QD403 (damaged), QD405 (another schema)."""
        try:
            if value["kind"] != "qdist.samples" or not isinstance(value["schema"], int):
                raise ValueError(f"kind {value['kind']!r}, schema {value['schema']!r}")
            if value["schema"] != SCHEMA:
                raise _other_schema(value["schema"])
            return cls(
                preprocessing=canonical_json(value["preprocessing"]),
                generations=tuple(
                    tuple(_entry(entry) for entry in generation)
                    for generation in value["generations"]
                ),
                duplicates=tuple(str(key) for key in value["duplicates"]),
                absent=tuple(str(id) for id in value["absent"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                "QD403",
                where="sample manifest",
                got=f"{type(error).__name__}: {error}",
                expected="a sample manifest as this version writes it",
                mend="restore the file, or calibrate again into a new store",
            ) from error

    def _check_preprocessing(self, source: DataSource) -> None:
        before, now = json.loads(self.preprocessing), source.preprocessing()
        if canonical_json(now) == self.preprocessing:
            return
        differing = sorted(
            name for name in {*before, *now} if before.get(name) != _plain(now.get(name))
        )
        raise StoreError(
            "QD401",
            where="preprocessing of the samples",
            got="; ".join(f"{name}={json.dumps(now.get(name))}" for name in differing),
            expected="; ".join(f"{name}={json.dumps(before.get(name))}" for name in differing),
            mend="use the earlier settings to extend this calibration, or start a new store",
        )


def sample_id(content_digest: str, preprocessing_digest: str) -> str:
    """Hex SHA-256 over what a sample is made of and what is done to it."""
    return digest_json([content_digest, preprocessing_digest])


def default_probe(source: DataSource) -> Probe:
    """ "first" for a source that says by ``uniform`` that all its shapes are equal, else "all"."""
    return "first" if getattr(source, "uniform", False) else "all"


def check_unchanged(source: DataSource, *, id: str, key: str) -> None:
    """That ``source`` still has under ``key`` the content that ``id`` was made from.

    Raises QD306 where it does not: a shard's result is filed under the sample's content.
    """
    found = sample_id(source.content_digest(key), digest_json(source.preprocessing()))
    if found != id:
        raise DataError(
            "QD306",
            where=f"sample {key}",
            got=f"content with id {found[:12]}",
            expected=f"id {id[:12]}, as the sample manifest has it",
            mend="restore the file or the settings, or extend the calibration with the new content",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scan:
    """One pass over a source: ``keys`` maps every id to the first key with that content."""

    keys: dict[str, str]
    new: tuple[SampleEntry, ...]
    duplicates: tuple[str, ...]


def _scan(
    source: DataSource,
    probe: Probe | None,
    on_progress: OnProgress | None,
    known: frozenset[str] = frozenset(),
) -> _Scan:
    """Entries for what is not ``known``, in the source's order; loads what ``probe`` asks for."""
    each = (probe or default_probe(source)) == "all"
    preprocessing = digest_json(source.preprocessing())
    all_keys = source.keys()
    keys: dict[str, str] = {}
    new: list[SampleEntry] = []
    duplicates: list[str] = []
    for done, key in enumerate(all_keys, start=1):
        id = sample_id(source.content_digest(key), preprocessing)
        if id in keys:
            duplicates.append(key)
        elif id not in known:
            shapes = _shapes(source, key) if each or not new else new[0].shapes
            new.append(SampleEntry(id=id, key=key, shapes=shapes))
        keys.setdefault(id, key)
        if on_progress is not None:
            on_progress(done, len(all_keys))
    return _Scan(keys=keys, new=tuple(new), duplicates=tuple(duplicates))


def _shapes(source: DataSource, key: str) -> Shapes:
    return tuple(sorted((name, array.shape) for name, array in source.load(key).items()))


def _entry(value: Any) -> SampleEntry:
    id, key, shapes = value["id"], value["key"], value["shapes"]
    if not (isinstance(id, str) and isinstance(key, str)):
        raise TypeError(f"id {id!r} and key {key!r} are not both text")
    return SampleEntry(
        id=id,
        key=key,
        shapes=tuple(
            sorted((str(name), tuple(int(n) for n in shape)) for name, shape in shapes.items())
        ),
    )


def _plain(value: Any) -> Any:
    """The value as JSON would give it back, so that a tuple equals the list it became."""
    return json.loads(canonical_json(value))


def _other_schema(found: int) -> StoreError:
    return StoreError(
        "QD405",
        where="sample manifest",
        got=f"schema {found}",
        expected=f"schema {SCHEMA}",
        mend="use the version of qdist that wrote it, or calibrate again into a new store",
    )
