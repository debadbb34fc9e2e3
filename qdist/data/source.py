"""Where samples come from: the protocol every data source follows."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
"""Model input name -> array. For one sample: without the batch axis."""


@runtime_checkable
class DataSource(Protocol):
    """An ordered, random-access set of samples.

    Implementations are cheap to construct and to pickle (they hold paths and settings, and open
    files on first use), so that a worker on another node can rebuild its own. They are used by
    one thread at a time.
    """

    def keys(self) -> list[str]:
        """Stable, unique names of the samples, in the order in which they are calibrated.

        Raises `qdist.errors.DataError`: QD301 nothing there, QD302 an empty set.
        """
        ...

    def content_digest(self, key: str) -> str:
        """Hex SHA-256 of what the sample is made of (file bytes, array bytes), before
        preprocessing. Raises QD306 when it cannot be read."""
        ...

    def preprocessing(self) -> dict[str, Any]:
        """Every setting that changes the arrays made from the same content, as JSON."""
        ...

    def load(self, key: str) -> Feeds:
        """The preprocessed arrays of one sample, keyed by model input name. Raises QD306."""
        ...

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The label of one sample (any shape), or None where the set has no labels."""
        ...
