"""How loops are compiled: Numba, cached on disk, without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function as machine code, made on its first call.

    What it calls in turn must lie in the same file, since the cache is renewed by file.
    """
    return numba.njit(cache=True, nogil=True)(function)
