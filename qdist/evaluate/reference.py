"""The float model's outputs on disk: written once, read run by run by everyone who compares.

One file of NumPy records: for each run the number of outputs, then the outputs. Neither writing
nor reading holds more than one run's outputs in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


def append_outputs(file: BinaryIO, outputs: Sequence[NDArray[Any]]) -> None:
    """Append the outputs of one run. Of strings, which nothing is measured on, only the shape."""
    np.save(file, np.int64(len(outputs)))
    for array in outputs:
        np.save(file, np.zeros(array.shape, np.bool_) if array.dtype.hasobject else array)


def read_outputs(path: Path) -> Iterator[list[NDArray[Any]]]:
    """The outputs of every run, in the order in which they were appended."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            n_outputs = int(np.load(file))
            yield [np.load(file) for _ in range(n_outputs)]
