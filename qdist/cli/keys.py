"""Every key of a command's configuration, with its description and its default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qdist.cli.groups import config_folder
from qdist.cli.schema import CommandSettings

KIND = "kind"
_REQUIRED = "???"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """``name``: as in ``name=value``. ``default``: as users write it; empty for a group of keys,
    None for what has to be given. ``kinds``: of a group of several kinds, those that have the key;
    empty for a key that all have."""

    name: str
    description: str
    default: str | None
    kinds: tuple[str, ...] = ()


def keys_of(command: str, schema: type[CommandSettings]) -> Iterator[Key]:
    """The keys of ``command`` in the order of its groups.

    Defaults are those of the choice of every group that the command starts with. What an entry of
    a list, or a mapping, may hold is left to the description of the whole.
    """
    given = _group_values(config_folder(), command)
    printed: set[type[BaseModel]] = set()
    for name, field in schema.model_fields.items():
        members = _members(field.annotation)
        if members:
            yield from _keys_of_group(name, members, given.get(name), printed)
        else:
            yield _key(name, field, given.get(name))


def _keys_of_group(
    name: str, members: list[type[BaseModel]], given: Any, printed: set[type[BaseModel]]
) -> Iterator[Key]:
    """Of several kinds, what more than one of them has in the same way comes once."""
    printed.update(members)
    values = given if isinstance(given, dict) else {}
    kinds: dict[Key, list[str]] = {}
    for member in members:
        kind = _kind(member)
        # Values of the default choice say nothing of the other kinds.
        own = values if values.get(KIND, kind) == kind else {}
        for key, field in member.model_fields.items():
            if key != KIND:
                for found in _keys_of_field(f"{name}.{key}", field, own.get(key), printed):
                    kinds.setdefault(found, []).append(kind)
    order = list(dict.fromkeys(found.name for found in kinds))
    for found in sorted(kinds, key=lambda found: order.index(found.name)):
        having = kinds[found]
        yield found if len(having) == len(members) else replace(found, kinds=tuple(having))


def _keys_of_field(
    name: str, field: FieldInfo, given: Any, printed: set[type[BaseModel]]
) -> Iterator[Key]:
    inner = _members(field.annotation)
    # Evaluation sets are of the kinds that calibration sets are, without some of their keys.
    is_known = len(inner) > 1 and all(any(issubclass(p, m) for p in printed) for m in inner)
    if not inner or field.description:
        yield _key(name, field, given)
    if inner and not is_known:
        values = _plain(field.default) if given is None else given
        yield from _keys_of_group(name, inner, values, printed)


def _key(name: str, field: FieldInfo, given: Any) -> Key:
    return Key(name=name, description=field.description or "", default=_default(field, given))


def _default(field: FieldInfo, given: Any) -> str | None:
    """What the key is unless the user says otherwise, in one line; None where it is required."""
    if given is None and field.is_required():
        return None
    value = given if given is not None else _plain(field.default)
    if value == _REQUIRED:
        return None
    if isinstance(value, dict) and _members(field.annotation):
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _kind(member: type[BaseModel]) -> str:
    field = member.model_fields.get(KIND)
    return "" if field is None else str(get_args(field.annotation)[0])


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The groups of settings that a key may hold, not those in a list or mapping of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return []


def _group_values(folder: Path, command: str) -> dict[str, Any]:
    """What the command's groups hold before the user says anything; references as they stand."""
    own = _read(folder / f"{command}.yaml")
    values: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, Mapping):
            given = {str(g): str(c) for g, c in entry.items() if c is not None}
            values |= {g: _choice(folder / g, c) for g, c in given.items()}
    return values | own


def _choice(group: Path, name: str) -> dict[str, Any]:
    """A group file over those that it names in its own ``defaults``."""
    own = _read(group / f"{name}.yaml")
    values: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            values |= _choice(group, entry)
    return values | own


def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
