"""A data set in two parts: one that a search sees, and one that is reported."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from qdist.data.subset import Subset
from qdist.digest import digest_bytes
from qdist.errors import ConfigError, DataError

PartName = Literal["search", "report"]


@dataclass(frozen=True, kw_only=True)
class Part(Subset):
    """The samples of one part. A sample's content alone says which part it is in, so equal samples
    are in one part, and neither names, order nor further samples move any.

    part: "search" or "report". share: of all samples that the search sees, in (0, 1); met on
    average, as each sample is a draw by its digest. Raises QD104 for another share; QD302, when
    the keys are asked for, where the part is empty.
    """

    part: PartName
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                "QD104",
                where="evaluation.search_share",
                got=str(self.share),
                expected="above 0 and below 1",
                mend="give the share of the samples that the search sees, or null for all",
            )

    def chosen(self, keys: list[str]) -> list[str]:
        """Those whose content falls into the part."""
        is_seen = self.part == "search"
        found = [key for key in keys if self._is_seen(key) is is_seen]
        if not found:
            raise DataError(
                "QD302",
                where=f"the {self.part} part of the evaluation set",
                got=f"none of {len(keys)} samples",
                expected="at least one in each part",
                mend="give more samples, or a share nearer to 0.5",
            )
        return found

    def _is_seen(self, key: str) -> bool:
        # Hashed again, so that the draw is no plain function of digests that others sort by.
        digest = digest_bytes(b"qdist search part", self.source.content_digest(key).encode())
        return Fraction(int(digest[:16], 16), 1 << 64) < Fraction(self.share)
