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

_STRAY = b"HighsMipSolverData::"
_STDOUT = 1
_lock = threading.Lock()


@contextmanager
def without_stray_lines() -> Iterator[None]:
    """Keep the solver's stray lines from standard output. What others write there meanwhile comes
    out when the block is left. Where standard output is closed nothing happens."""
    with _lock, tempfile.TemporaryFile() as caught:
        _flush()
        try:
            before = os.dup(_STDOUT)
        except OSError:
            before = None
        if before is None:
            yield
            return
        os.dup2(caught.fileno(), _STDOUT)
        try:
            yield
        finally:
            # Off a terminal printf only fills a buffer; it has to go while it goes to the file.
            _flush()
            os.dup2(before, _STDOUT)
            os.close(before)
            caught.seek(0)
            for line in caught:
                if not line.startswith(_STRAY):
                    _write(line)


def _flush() -> None:
    """The C library's buffers, of all its streams."""
    ctypes.CDLL(None).fflush(None)


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDOUT, text) :]
