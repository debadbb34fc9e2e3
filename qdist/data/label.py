"""Labels: what a data set gives beside its samples, as int64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import DataError


def as_label(value: Any, where: str, *, mend: str) -> NDArray[np.int64]:
    """An integer or an array of integers. Raises QD308, with ``mend`` as the advice."""
    label = np.asarray(value)
    if label.dtype.kind not in "biu":
        raise DataError(
            "QD308",
            where=where,
            got=f"a label of dtype {label.dtype}",
            expected="an integer, or an array of integers",
            mend=mend,
        )
    return label.astype(np.int64)
