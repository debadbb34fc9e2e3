"""Where runs are recorded, and which of their files: the user's settings, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdist.cli.tracking.address import database_path, is_usable, shown
from qdist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSpec:
    """Where runs are recorded.

    ``uri`` is ``sqlite:///PATH`` (artifacts land in ``mlartifacts`` beside the database) or
    ``http(s)://SERVER``. ``artifacts`` says which files are sent: ``all``; ``best``: those of
    parent runs and those logged with ``best=True``; ``front``: the same, where the caller gives
    ``best=True`` to all that are on the front too; ``none``. Configurations, JSON, text and
    tables are always sent. Raises QD104.
    """

    uri: str
    experiment: str
    artifacts: Literal["all", "front", "best", "none"]
    enabled: bool
    run_name: str | None

    def __post_init__(self) -> None:
        if self.artifacts not in ("all", "front", "best", "none"):
            raise _bad_value("tracking.artifacts", self.artifacts, "all, front, best or none")
        if not self.enabled:
            return
        if not self.experiment.strip():
            raise _bad_value("tracking.experiment", self.experiment, "a name")
        if not is_usable(self.uri):
            raise _bad_value(
                "tracking.uri", shown(self.uri), "sqlite:///FOLDER/mlflow.db or http(s)://SERVER"
            )

    @property
    def database(self) -> Path | None:
        """Absolute path of the SQLite database; None for a server."""
        return database_path(self.uri)


def _bad_value(where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD104", where=where, got=repr(got), expected=expected, mend=f"set {where}=VALUE"
    )
