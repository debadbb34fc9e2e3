"""What makes two evaluations the same one: everything that can change a score."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qdist.data.source import DataSource
from qdist.digest import digest_bytes, digest_json
from qdist.evaluate.register import load_function
from qdist.evaluate.scorer import Evaluation

_NO_MATTER = frozenset({"timeout_s", "keep"})
"""Settings of evaluations that change no score."""


def evaluation_identity(evaluation: Evaluation, options: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation as JSON: its settings, its data by content, the user's own files by name, size
    and time. ``options``: of the scorer. Raises `DataError` for samples that cannot be read, QD108
    for a function that cannot be loaded."""
    found: dict[str, Any] = {"kind": type(evaluation).__name__, "options": _plain(options)}
    for field in fields(evaluation):
        if field.name in _NO_MATTER:
            continue
        value = getattr(evaluation, field.name)
        if isinstance(value, DataSource):
            found[field.name] = source_identity(value)
        else:
            found[field.name] = _plain(value)
            found[f"{field.name} files"] = _files(field.name, value)
    dataset = options.get("dataset")
    found["dataset files"] = _stats([Path(str(dataset))] if dataset else [])
    return found


def source_identity(source: DataSource) -> dict[str, Any]:
    """Samples and labels, in order, and how they are made ready."""
    digests = []
    keys = source.keys()
    for key in keys:
        label = source.label(key)
        digests.append([key, source.content_digest(key), None if label is None else label.tolist()])
    return {"samples": digest_json(digests), "preprocessing": source.preprocessing()}


def _files(name: str, value: Any) -> Any:
    """What the files are that a setting refers to."""
    if name == "target" and isinstance(value, str):
        return _code(value)
    if name in ("command", "folder", "folders", "path"):
        words = value if isinstance(value, tuple | list) else [value]
        return _stats(Path(str(word)) for word in words if word)
    return None


def _code(target: str) -> list[str]:
    """Of the file that ``target`` names, and of the one that defines what it names."""
    module = sys.modules.get(getattr(load_function(target), "__module__", None) or "")
    named = target.rpartition(":")[0]
    files = [Path(named).expanduser()] if named.endswith(".py") else []
    files.append(Path(getattr(module, "__file__", None) or ""))
    return sorted({digest_bytes(file.read_bytes()) for file in files if file.is_file()})


def _stats(paths: Iterable[Path]) -> str | None:
    """Over names, sizes and times of files and of those in folders; None where there are none."""
    found: list[list[Any]] = []
    for path in paths:
        try:
            places = [path] if path.is_file() else []
            if path.is_dir() and path.is_absolute():
                places = [Path(top, name) for top, _, names in os.walk(path) for name in names]
            found += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in places]
        except OSError:
            # What is no path, or goes while we look, is named by the settings themselves.
            continue
    return digest_json(sorted(found)) if found else None


def _plain(value: Any) -> Any:
    """``value`` as JSON; what JSON has no form for by its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    return str(value)
