"""Writing files so that they are complete or absent, with errors a user can act on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdist.errors import ArtifactError, QdistError


def make_folder(path: Path) -> Path:
    """Create ``path`` (and parents) and prove that it can be written. Raises QD603."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise unwritable(path, error, "a folder that this user can write") from error
    return path


def unwritable(path: Path, error: OSError, expected: str) -> ArtifactError:
    """The QD603 that says why ``path`` cannot be written, to be raised."""
    return ArtifactError(
        "QD603",
        where=str(path),
        got=error.strerror or str(error),
        expected=expected,
        mend="free some space, change its permissions, or choose another place with "
        "output.folder=PATH",
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place if the block succeeds."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except QdistError:
        # Some of these are OSErrors too, and already say what is wrong.
        raise
    except OSError as error:
        raise unwritable(path, error, "a file that this user can write") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
