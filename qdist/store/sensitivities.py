"""Sensitivities beside a calibration: sums of twins, kept under all that they depend on.

::

    sensitivities/<identity>.<write>.<sha>.zip   sums of some twins: a Zarr group, see `container`

``identity`` is the digest of a JSON object (`qdist.evaluate.sensitivity.sensitivity_identity`) of
the model with its weights, the samples, and how they run; the group's attributes say it in full.
The keys of the sums are digests of the quantizers. So a score is met again by what it was measured
for, and by nothing else. Objects are written whole and never again; damaged ones count as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.digest import canonical_json, digest_json
from qdist.store.container import UNREADABLE, Container, checksum
from qdist.store.layout import SENSITIVITIES, write_key, written
from qdist.store.place import Place

_TOTALS = "totals"
_KEYS = "keys"


class SensitivityStore:
    """The sums of one identity. One process writes at a time; any number may read."""

    def __init__(self, place: Place, identity: Mapping[str, Any]) -> None:
        """``identity``: JSON. Raises `StoreError` where the place cannot be reached."""
        self._place = place
        self._identity = dict(identity)
        self.name = digest_json(self._identity)

    def known(self) -> dict[str, NDArray[np.float64]]:
        """All sums by key. Raises QD408 where the place cannot be reached."""
        found: dict[str, NDArray[np.float64]] = {}
        for entry in sorted(self._place.entries(SENSITIVITIES), key=lambda entry: entry.name):
            key = f"{SENSITIVITIES}/{entry.name}"
            name = written(SENSITIVITIES, key)
            if name is not None and name[0] == self.name:
                found |= self._read(key, name[1])
        return found

    def keep(self, totals: Mapping[str, NDArray[np.float64]]) -> None:
        """Add sums, float64[n] each. Raises QD404, QD408."""
        if not totals:
            return
        data = Container(
            arrays={_TOTALS: np.stack([totals[key] for key in totals])},
            attributes={"identity": self._identity},
            documents={_KEYS: list(totals)},
        ).pack()
        self._place.put(write_key(SENSITIVITIES, self.name, checksum(data)), data)

    def _read(self, key: str, sha256: str) -> dict[str, NDArray[np.float64]]:
        data = self._place.get(key)
        if data is None or checksum(data) != sha256:
            return {}
        try:
            held = Container.unpack(data)
            identity, keys = held.attributes["identity"], held.documents[_KEYS]
            rows = np.asarray(held.arrays[_TOTALS], np.float64)
        except UNREADABLE:
            return {}
        if canonical_json(identity) != canonical_json(self._identity) or len(keys) != len(rows):
            return {}
        return {str(name): row for name, row in zip(keys, rows, strict=True)}
