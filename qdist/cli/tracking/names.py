"""Names that MLflow accepts, and values cut to what it takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Literal

Family = Literal["metrics", "params", "tags"]
"""What a name belongs to; the names of one family are apart from those of the others."""

_N_NAME_CHARACTERS = 250
_N_VALUE_CHARACTERS = {"params": 500, "tags": 4_000}  # the least that any MLflow server accepts


class Names:
    """The names of one run, rewritten to what MLflow accepts, no two of them to the same."""

    def __init__(self) -> None:
        self._originals: dict[tuple[Family, str], str] = {}

    def name(self, family: Family, name: str) -> str:
        """A name that MLflow accepts and that no other name of this run was rewritten to."""
        clean = _clean(name)
        if self._originals.setdefault((family, clean), name) != name:
            clean = _marked(clean, name)
        return clean

    def fitted(
        self, family: Literal["params", "tags"], values: Mapping[str, str]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Values cut to what MLflow takes, and the whole texts of the cut ones by artifact."""
        limit = _N_VALUE_CHARACTERS[family]
        short: dict[str, str] = {}
        whole: dict[str, str] = {}
        for raw, value in values.items():
            name = self.name(family, raw)
            if len(value) > limit:
                artifact = f"{family}/{name.replace('/', '_')}.txt"
                whole[artifact] = value
                note = f"\u2026 ({len(value)} characters, see {artifact})"
                value = value[: max(0, limit - len(note))] + note
            short[name] = value
        return short, whole


def _clean(name: str) -> str:
    """``name`` with what MLflow rejects replaced by ``_``, at most 250 characters.

    A colon goes too: servers on Windows reject it. Empty and dotted path parts are dropped,
    since MLflow insists that names, read as paths, are normal and relative.
    """
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    kept = "/".join(part for part in parts if part.strip() not in ("", ".", "..")).strip()
    if len(kept) > _N_NAME_CHARACTERS:
        return _marked(kept, name)
    return kept or "unnamed"


def _marked(clean: str, name: str) -> str:
    """``clean``, cut to leave room for a short digest of ``name``, and that digest."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return clean[: _N_NAME_CHARACTERS - 9].rstrip("/. ") + f"-{digest}"
