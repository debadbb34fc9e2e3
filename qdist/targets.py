"""Functions that users name in their settings: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from qdist.digest import digest_bytes
from qdist.errors import ConfigError

_LOADING = threading.RLock()
"""Held while a file runs, since a module is registered before it is complete."""


def load_target(target: str) -> Callable[..., Any]:
    """The callable that ``target`` names. Nothing is called.

    ``package.module:function`` is imported as Python would. ``folder/file.py:function`` is run
    from the file, once for each content, under a module name made from its path and content: two
    files of the same name do not collide, and an edited file is read again. It finds the modules
    beside it, as a script does. The function's name may be dotted (``Class.method``).

    Raises `qdist.errors.ConfigError` QD108 when the target is not of this form, when there is no
    such module, file or function, when the module raises while it is imported, or when what is
    named cannot be called.
    """
    place, separator, name = target.rpartition(":")
    if not separator or not place or not all(part.isidentifier() for part in name.split(".")):
        raise _unloadable(
            target,
            got=f"{name!r}, which is no name"
            if place and name
            else "no module or no function name",
            expected="module:function or file.py:function",
            mend="write both, with a colon between, for example evaluate.py:accuracy",
        )
    if place.endswith(".py"):
        with _LOADING:
            module = _load_file(target, Path(place))
    else:
        module = _import(target, place)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        known = _functions(module)
        raise _unloadable(
            target,
            got=f"no {name!r} there" if found is None else f"a {type(found).__name__}",
            expected=f"one of the functions {', '.join(known)}" if known else "a function",
            mend=f"define {name} in {place}, or name a function that it has",
        )
    return found


def load_module(file: Path) -> ModuleType:
    """The module of one file, run once for each content. Raises `ConfigError` QD108."""
    with _LOADING:
        return _load_file(str(file), file)


def _import(target: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise _unloadable(
            target,
            got=f"{type(error).__name__}: {error}",
            expected="a module that can be imported",
            mend="install it, put its folder on PYTHONPATH, or name its file: PATH.py:FUNCTION"
            if isinstance(error, ModuleNotFoundError)
            else f"run 'python -c \"import {place}\"' to see the whole traceback",
        ) from error


def _load_file(target: str, file: Path) -> ModuleType:
    path = file.expanduser().resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unloadable(
            target,
            got=f"{path}: {error.strerror or error}",
            expected="a Python file that this user can read",
            mend="check the path; a relative one starts at the current folder",
        ) from error
    name = f"_qdist_target_{path.stem}_{digest_bytes(str(path).encode(), content)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        return _run_file(name, path, content)
    except (Exception, SystemExit) as error:
        raise _unloadable(
            target,
            got=f"{type(error).__name__}: {error}",
            expected="a file that runs to its end",
            mend=f"run 'python {shlex.quote(str(path))}' to see the whole traceback",
        ) from error


def _run_file(name: str, path: Path, content: bytes) -> ModuleType:
    """The module ``name`` of one file. Raises whatever the file raises."""
    module = ModuleType(name)
    module.__file__ = str(path)
    # Registered before it runs: dataclasses and pickle look a class's module up by name.
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        # Compiled here rather than by Python's loader, whose cached bytecode goes by size and
        # time in seconds, and so may be older than the content that was just read.
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    # Last, so that imports inside its functions find the modules beside it, and nobody else's
    # imports are shadowed by them.
    if folder not in sys.path:
        sys.path.append(folder)
    return module


def _functions(module: ModuleType) -> list[str]:
    """Public callables that were defined in the module itself: functions by name, then classes."""
    own = [
        (isinstance(value, type), name)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]
    return [name for _, name in sorted(own)]


def _unloadable(target: str, *, got: str, expected: str, mend: str) -> ConfigError:
    return ConfigError("QD108", where=target, got=got, expected=expected, mend=mend)
