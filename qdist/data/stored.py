"""Files of a data set: text and bytes, and the errors of those that are missing or unreadable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdist.errors import DataError


def text_lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8 with their ends, which are left as they are stored. Raises QD301, QD306."""
    with _reading_text(path), path.open(encoding="utf-8", newline="\n") as stream:
        yield from stream


def read_lines(path: Path) -> list[str]:
    """All lines without their ends, whatever these are, and without a byte-order mark.

    Raises QD301, QD306.
    """
    with _reading_text(path):
        return path.read_text(encoding="utf-8-sig").splitlines()


@contextmanager
def _reading_text(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise not_found(path, "a text file") from error
    except (OSError, UnicodeDecodeError) as error:
        expected = "a readable text file in UTF-8"
        raise unreadable(path, str(error), expected, "save the file as UTF-8") from error


def read_bytes(path: Path, expected: str) -> bytes:
    """The content of a file, which is ``expected`` to be there. Raises QD301, QD306."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise not_found(path, expected) from error
    except OSError as error:
        got = error.strerror or str(error)
        raise unreadable(path, got, expected, "choose a file that this user can read") from error


def not_found(path: Path, expected: str) -> DataError:
    """The QD301 error."""
    return DataError(
        "QD301",
        where=str(path),
        got="no such file or folder",
        expected=expected,
        mend="check the path; relative paths start at the working directory",
    )


def unreadable(place: Path | str, got: str, expected: str, mend: str) -> DataError:
    """The QD306 error: something is there at ``place``, but not what was expected."""
    return DataError("QD306", where=str(place), got=got, expected=expected, mend=mend)
