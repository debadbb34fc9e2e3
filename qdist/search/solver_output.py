"""What HiGHS prints past its own log level.

HiGHS before 1.13 has a ``printf`` left in ``transformNewIntegerFeasibleSolution`` (ERGO-Code/HiGHS
issue 2783) that no option turns off; SciPy carries such a version.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_STRAY = b"HighsMipSolverData::"
_STDOUT = 1
_lock = threading.Lock()


@contextmanager
def without_stray_lines() -> Iterator[None]:
    """Keep the solver's stray lines from standard output. What others write there meanwhile comes
    out when the block is left. Where standard output is closed nothing happens."""
    with _lock:
        _flush()
        try:
            before = os.dup(_STDOUT)
        except OSError:
            yield
            return
        caught = _catching(os.getpid())
        os.dup2(caught, _STDOUT)
        try:
            yield
        finally:
            # Off a terminal printf only fills a buffer; it has to go while it goes to the file.
            _flush()
            os.dup2(before, _STDOUT)
            os.close(before)
            for line in _taken(caught).splitlines(keepends=True):
                if not line.startswith(_STRAY):
                    _write(line)


@cache
def _catching(process: int) -> int:
    """The open file that catches, one for each process: solves are many, and a child of a fork must
    not share its place in the file with its parent."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _taken(caught: int) -> bytes:
    """What the file holds, which is empty afterwards."""
    size = os.lseek(caught, 0, os.SEEK_CUR)
    if not size:
        return b""
    text = os.pread(caught, size, 0)
    os.lseek(caught, 0, os.SEEK_SET)
    os.ftruncate(caught, 0)
    return text


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _flush() -> None:
    """The C library's buffers, of all its streams."""
    _libc().fflush(None)


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDOUT, text) :]
