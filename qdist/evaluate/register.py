"""Functions that a user's script registers by name, as Knight's scripts do::

    from qdist.evaluate.register import onnx_infer_func

    @onnx_infer_func.register("infer_cls_model")
    def infer_cls_model(executor): ...

A script that imports Knight's own ``onnx_quantize_tool.common.register`` runs unchanged: where that
package is not installed, this registry stands in for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from qdist.errors import ConfigError
from qdist.targets import load_module, load_target

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMES = "__qdist_registered__"
_VENDOR = "onnx_quantize_tool.common.register"


class Registry:
    """Names for functions; each lives in the module that its function was defined in."""

    def register(self, name: str) -> Callable[[_Function], _Function]:
        """A decorator that leaves the function as it is. A later one of the name wins."""

        def keep(function: _Function) -> _Function:
            function.__globals__.setdefault(_NAMES, {})[name] = function
            return function

        return keep


onnx_infer_func = Registry()
"""Under the vendor's name."""


def load_function(target: str) -> Callable[..., Any]:
    """The function of "module:name", "file.py:name" or "file.py" with one registered function.

    A registered name comes before one that is only defined. Raises `ConfigError` QD108.
    """
    place, _, name = target.rpartition(":")
    is_file = target.endswith(".py")
    with _vendor_module():
        if not is_file and not place.endswith(".py"):
            return load_target(target)
        module = load_module(Path(target if is_file else place))
    registered: dict[str, Callable[..., Any]] = vars(module).get(_NAMES, {})
    if not is_file:
        return registered[name] if name in registered else load_target(target)
    if len(registered) != 1:
        raise ConfigError(
            "QD108",
            where=target,
            got=f"registered functions: {', '.join(registered) or 'none'}",
            expected="one function registered in the file, or the name of one",
            mend="add the name, as in FILE.py:NAME, or @onnx_infer_func.register(NAME)",
        )
    return next(iter(registered.values()))


@contextmanager
def _vendor_module() -> Iterator[None]:
    """Let imports of Knight's registry find ours, unless theirs is installed."""
    top = _VENDOR.partition(".")[0]
    if top in sys.modules or importlib.util.find_spec(top) is not None:
        yield
        return
    parts = _VENDOR.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for name in names:
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = []
    vars(sys.modules[_VENDOR])["onnx_infer_func"] = onnx_infer_func
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
