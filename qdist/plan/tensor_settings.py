"""What rules say about one tensor, whichever layers read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from qdist.threshold.registry import check_method


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSettings:
    """Overrides for one activation or weight; None leaves it to the layers that read it.

    ``saturation``: threshold method. ``th_scale``: factor on the range that is found.
    ``threshold``: largest magnitude, one number or one per channel, in place of what is found.
    ``bounds``: the range itself, in place of what is found. ``most_bits``: the tensor is carried
    in so many bits, whatever a layer that reads it would take. ``range_bits``: levels in use, in
    bits. ``granularity``: ``tensor``, ``channel`` or ``group=N``. ``why``: the rules.
    """

    saturation: str | None = None
    th_scale: float | None = None
    threshold: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None
    most_bits: int | None = None
    range_bits: int | None = None
    granularity: str | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if self.saturation is not None:
            check_method(self.saturation)
        if self.th_scale is not None and not (self.th_scale > 0 and math.isfinite(self.th_scale)):
            raise ValueError(f"th_scale must be a positive number, got {self.th_scale}")
        if self.threshold is not None and (
            not self.threshold or not all(t > 0 and math.isfinite(t) for t in self.threshold)
        ):
            raise ValueError(f"a threshold must be a positive number, got {self.threshold}")
        if self.bounds is not None:
            low, high = self.bounds
            if not (math.isfinite(low) and math.isfinite(high) and low <= 0.0 <= high):
                raise ValueError(f"a range must be finite and hold zero, got {low}..{high}")

    @property
    def is_fixed(self) -> bool:
        """Whether the range is given, rather than found."""
        return self.threshold is not None or self.bounds is not None

    def over(self, other: TensorSettings) -> TensorSettings:
        """These settings where they say something, ``other`` elsewhere."""
        given = {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None and field.name != "why"
        }
        if "threshold" in given or "bounds" in given:
            # One of the two forms of a fixed range takes the place of the other.
            given = {"threshold": None, "bounds": None, **given}
        return replace(other, **given, why=", ".join(filter(None, (other.why, self.why))))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without what is None."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
