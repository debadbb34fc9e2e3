"""The files that keep what MLflow did not take: what waits for it, and what it refused for good."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qdist.cli.tracking.sink import Kind
from qdist.files import make_folder, write_json, write_text

SPOOL_NAME = "mlflow-spool.jsonl"
REFUSED_NAME = "mlflow-refused.jsonl"


class Spool:
    """An append-only file of records; files are copied beside it, into ``mlflow-spool/``.

    ``address``: where the records are to go; those of another address stay until a command with
    that one comes. ``mlflow-spool.runs.json`` says which run of MLflow each run that was created
    late has become. What MLflow will never take moves to ``mlflow-refused.jsonl``.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None], *, address: str = "") -> None:
        self.path = folder / SPOOL_NAME
        self.refused_path = folder / REFUSED_NAME
        self._address = address
        self._runs_path = self.path.with_suffix(".runs.json")
        self._warn = warn
        self._has_warned = False
        self._n_sent = 0
        self.n_refused = 0
        self.runs = self._known_runs()
        self.n_waiting = sum(self._is_ours(record) for _, record in self._lines())

    @property
    def n_records(self) -> int:
        """Records that wait, or that MLflow refused since this process began."""
        return self.n_waiting + self.n_refused

    def add(self, run: str, kind: Kind, payload: dict[str, Any], error: str) -> None:
        """Append one record. Raises QD603 or `OSError`: nothing else would keep the record."""
        self._append(self.path, run, kind, payload, error)
        self.n_waiting += 1

    def refuse(self, run: str, kind: Kind, payload: dict[str, Any], error: str) -> None:
        """Keep a record that sending again would not help. Raises as `add`."""
        self._append(self.refused_path, run, kind, payload, error)
        self.n_refused += 1

    def _append(
        self, path: Path, run: str, kind: Kind, payload: dict[str, Any], error: str
    ) -> None:
        make_folder(path.parent)
        if kind == "file":
            payload = {**payload, "path": str(self._kept(path, run, Path(payload["path"])))}
        record = {"run": run, "kind": kind, "payload": payload, "error": error}
        if self._address:
            record["to"] = self._address
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"MLflow takes no records ({error}); the run goes on, see {path}")

    def waiting(self) -> Iterator[dict[str, Any]]:
        """The records that wait, in order."""
        n_left_out = self._n_sent
        for _, record in self._lines():
            if record is not None and self._is_ours(record):
                if not n_left_out:
                    yield record
                n_left_out = max(0, n_left_out - 1)

    def sent(self) -> None:
        """The first record that waits was sent. `save` keeps that; until then it may be sent once
        more after a crash, which does no harm."""
        self._n_sent += 1
        self.n_waiting -= 1

    def save(self) -> None:
        """Take what was sent out of the file, whole or not at all; the file goes when none is left.
        Raises QD603."""
        if not self._n_sent:
            return
        write_json(self._runs_path, self.runs)
        kept: list[str] = []
        for text, record in self._lines():
            is_sent = record is not None and self._is_ours(record) and self._n_sent > 0
            if is_sent and record is not None:
                self._n_sent -= 1
                if record["kind"] == "file":
                    shutil.rmtree(Path(record["payload"]["path"]).parent, ignore_errors=True)
            elif record is not None:
                kept.append(text)
        if kept:
            write_text(self.path, "".join(kept))
            return
        self.path.unlink(missing_ok=True)
        self._runs_path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_suffix(""), ignore_errors=True)
        self._has_warned = False

    def _is_ours(self, record: dict[str, Any] | None) -> bool:
        return record is not None and record.get("to", self._address) == self._address

    def _lines(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Every line and its record; None for one that a kill cut off."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    yield text, dict(json.loads(text))
                except (TypeError, ValueError):
                    yield text, None

    def _known_runs(self) -> dict[str, str]:
        try:
            value = json.loads(self._runs_path.read_text(encoding="utf-8"))
            return {str(k): str(v) for k, v in value.items()}
        except (OSError, AttributeError, ValueError):
            return {}

    def _kept(self, path: Path, run: str, source: Path) -> Path:
        # The source may be a temporary file that is gone by the time of a replay.
        folder = path.with_suffix("") / run / uuid.uuid4().hex
        folder.mkdir(parents=True)
        if source.is_dir():
            return Path(shutil.copytree(source, folder / source.name))
        return Path(shutil.copy2(source, folder / source.name))
