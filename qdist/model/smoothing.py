"""How much of each channel's range moves from an activation into the weights that read it.

SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438). The factors are powers of two, so
moving them changes no bit of any other tensor (`qdist.model.smoothed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.digest import digest_json


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The factors of a model.

    ``alpha``: the strength that they were found with, 0..1. ``exponents``: tensor -> for each
    channel of its last axis the ``e`` of the factor 2^e by which the tensor is divided, and the
    rows of the weights that read it are multiplied.
    """

    alpha: float
    exponents: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the factors, however they were found."""
        return digest_json({name: list(own) for name, own in sorted(self.exponents.items())})

    def of(self, tensor: str) -> NDArray[np.int32]:
        """int32[channels]: the exponents of one tensor. Raises `KeyError`."""
        return np.asarray(self.exponents[tensor], np.int32)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; the exponents of a tensor are one text of numbers."""
        return {
            "alpha": self.alpha,
            "digest": self.digest,
            "exponents": {name: " ".join(map(str, own)) for name, own in self.exponents.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Smoothing:
        """From `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        found = cls(
            alpha=float(value["alpha"]),
            exponents={
                str(name): tuple(int(e) for e in text.split())
                for name, text in value["exponents"].items()
            },
        )
        if found.digest != value["digest"]:
            raise ValueError("factors of smoothing that do not have the digest beside them")
        return found


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless 0..1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"a strength of smoothing lies in 0..1, got {alpha}")
