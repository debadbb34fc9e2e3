"""Addresses of MLflow: servers, SQLite databases, experiments."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_SQLITE = "sqlite:///"


def is_usable(uri: str) -> bool:
    """Whether ``uri`` is ``sqlite:///PATH`` or ``http(s)://SERVER``."""
    if uri.startswith(_SQLITE):
        return uri.removeprefix(_SQLITE) not in ("", ":memory:") and "?" not in uri
    return uri.startswith(("http://", "https://")) and bool(urlsplit(uri).hostname)


def database_path(uri: str) -> Path | None:
    """Absolute path of the SQLite database at ``uri``; None for a server."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).expanduser().absolute()


def database_uri(path: Path) -> str:
    """``sqlite:///PATH``."""
    return f"{_SQLITE}{path}"


def shown(uri: str) -> str:
    """``uri`` without user name and password, fit for screens and logs."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return uri if host == parts.netloc else urlunsplit(parts._replace(netloc=host))


def experiment_page(uri: str, experiment: str) -> str:
    """The page of the experiment with the id ``experiment`` on the server at ``uri``."""
    return f"{shown(uri).rstrip('/')}/#/experiments/{experiment}"
