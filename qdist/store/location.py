"""What a user writes to say where a store is: a folder or a URL."""

from __future__ import annotations

import re
from pathlib import Path

from qdist.errors import ConfigError
from qdist.store.local import LocalPlace
from qdist.store.place import Place
from qdist.store.remote import SCHEMES, RemotePlace

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def is_url(location: str | Path) -> bool:
    """Whether the location is a URL rather than a path."""
    return isinstance(location, str) and _SCHEME.match(location) is not None


def full_location(location: str | Path) -> str:
    """The location so that it means the same in any folder: an absolute path, or a URL.

    ``file://`` gives a path. Raises `ConfigError` QD104 for other schemes and URLs of no bucket.
    """
    match = _SCHEME.match(location) if isinstance(location, str) else None
    if match is None:
        return str(Path(location).absolute())
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file" and rest.startswith("/"):
        return str(Path(rest))
    if scheme not in SCHEMES or not rest.strip("/") or rest.startswith("/"):
        raise ConfigError(
            "QD104",
            where="store.path",
            got=str(location),
            expected="a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX",
            mend="correct store.path",
        )
    return f"{scheme}://{rest.rstrip('/')}"


def open_place(location: str | Path) -> Place:
    """The place that a location names. Raises QD104; QD404 for an incomplete environment."""
    full = full_location(location)
    return RemotePlace(full) if is_url(full) else LocalPlace(Path(full))
