"""The file that keeps what MLflow did not take."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdist.cli.tracking.sink import Kind
from qdist.files import make_folder

SPOOL_NAME = "mlflow-spool.jsonl"


class Spool:
    """An append-only file of records; files are copied beside it, into ``mlflow-spool/``."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.path = folder / SPOOL_NAME
        self.n_records = 0
        self._warn = warn

    def add(self, run: str, kind: Kind, payload: dict[str, Any], error: str) -> None:
        """Append one record. Raises QD603 or `OSError`: nothing else would keep the record."""
        make_folder(self.path.parent)
        if kind == "file":
            payload = {**payload, "path": str(self._kept(run, Path(payload["path"])))}
        record = {"run": run, "kind": kind, "payload": payload, "error": error}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.n_records += 1
        if self.n_records == 1:
            self._warn(f"MLflow takes no records ({error}); the run goes on, see {self.path}")

    def _kept(self, run: str, source: Path) -> Path:
        # The source may be a temporary file that is gone by the time of a replay.
        folder = self.path.with_suffix("") / run / uuid.uuid4().hex
        folder.mkdir(parents=True)
        if source.is_dir():
            return Path(shutil.copytree(source, folder / source.name))
        return Path(shutil.copy2(source, folder / source.name))
