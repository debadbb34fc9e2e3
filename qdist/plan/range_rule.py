"""How the range of one tensor comes about: found by a method, scaled, or given.

``range = th_scale * found``; a fixed threshold, or a fixed range, takes the place of what would be
found and is not scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.granularity import ACTIVATION_FORMS, ACTIVATION_KINDS, parse_granularity
from qdist.plan.quantizer import Quantizer
from qdist.plan.tensor_settings import TensorSettings
from qdist.stats.histogram import Density
from qdist.threshold.adjust import fixed_threshold, scale_threshold
from qdist.threshold.clip import Levels, Threshold, scale_and_zero
from qdist.threshold.error import measured

FIXED = "fixed"
"""Name of the method where a rule gives the range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRule:
    """``method`` and ``th_scale``, or one of ``threshold`` (largest magnitude) and ``bounds``;
    in how many bits the tensor is carried at most, how many of them are in use (None: all), and
    what shares a scale (`qdist.plan.granularity`)."""

    method: str
    th_scale: float = 1.0
    threshold: float | None = None
    bounds: tuple[float, float] | None = None
    most_bits: int | None = None
    range_bits: int | None = None
    granularity: str = "tensor"

    @classmethod
    def of(
        cls, choice: LayerChoice, settings: TensorSettings | None, *, where: str, bits: int
    ) -> RangeRule:
        """What a layer's choice and the settings of the tensor (which go first) come to.

        Raises QD507 for what a plan has no place for: a threshold per channel, blocks.
        """
        settings = settings or TensorSettings()
        _refuse_unknown(settings, where, bits)
        threshold = settings.threshold[0] if settings.threshold else None
        if not settings.is_fixed and settings.th_scale is None and settings.saturation is None:
            threshold = choice.threshold
        return cls(
            method=settings.saturation or choice.saturation,
            th_scale=choice.th_scale if settings.th_scale is None else settings.th_scale,
            threshold=threshold,
            bounds=settings.bounds,
            most_bits=settings.most_bits,
            range_bits=_fewest(
                settings.range_bits,
                choice.activation_range_bits,
                # A tensor carried in fewer bits has no more levels than these hold.
                min(bits, settings.most_bits or bits),
            ),
            granularity=settings.granularity or choice.activation_granularity,
        )

    @property
    def is_fixed(self) -> bool:
        """Whether the range is given, rather than found."""
        return self.threshold is not None or self.bounds is not None

    def fixed(self, density: Density, levels: Levels) -> Threshold:
        """The given range. A threshold bounds only the sides that have values."""
        if self.bounds is not None:
            return measured(density, *self.bounds, levels, method=FIXED)
        return fixed_threshold(self.threshold or 0.0, density, levels)

    def scaled(self, found: Threshold, density: Density, levels: Levels) -> Threshold:
        """The range that was found, times ``th_scale``. A given one stays."""
        if self.th_scale == 1.0 or self.is_fixed:
            return found
        return scale_threshold(found, self.th_scale, density, levels)

    def without_statistics(self, levels: Levels) -> Threshold:
        """The given bounds of a tensor that was not measured: what they cost is not known (NaN)."""
        low, high = self.bounds or (0.0, 0.0)
        return Threshold(
            low=low, high=high, method=FIXED, clipped_share=math.nan, expected_mse=math.nan
        )


def activation_quantizer(threshold: Threshold, levels: Levels, bits: int) -> Quantizer:
    """The quantizer that maps a range onto ``levels``, stored in ``bits``."""
    scale, zero = scale_and_zero(threshold.low, threshold.high, levels)
    is_known = not math.isnan(threshold.expected_mse)
    return Quantizer(
        bits=bits,
        low=levels.low,
        high=levels.high,
        scales=(scale,),
        zero_points=(zero,),
        axis=None,
        method=threshold.method,
        bounds=(threshold.low, threshold.high),
        clipped_share=threshold.clipped_share if is_known else None,
        expected_mse=threshold.expected_mse if is_known else None,
    )


def fixed_weight(found: Quantizer, settings: TensorSettings, *, where: str) -> Quantizer:
    """A weight's quantizer with the ranges that rules give or scale; its cost is not computed.

    Raises QD507 where thresholds do not fit the channels.
    """
    _refuse_unknown(settings, where, found.bits, is_weight=True)
    n = len(found.scales)
    given = settings.threshold
    if given is None and settings.bounds is not None:
        given = (max(-settings.bounds[0], settings.bounds[1]),)
    if given is not None:
        if len(given) not in (1, n):
            raise PlanError(
                "QD507",
                where=f"{where} ({settings.why})",
                got=f"{len(given)} thresholds",
                expected=f"1 or {n}, as many as the weight has scales",
                mend="give as many, or change the granularity of the layer",
            )
        bounds = np.broadcast_to(np.asarray(given, np.float64), n)
        method = FIXED
    elif settings.th_scale is not None:
        bounds = np.asarray(found.scales) * found.high * settings.th_scale
        method = found.method
    else:
        return found
    widest = float(bounds.max())
    return replace(
        found,
        scales=tuple(float(bound) / found.high for bound in bounds),
        method=method,
        bounds=(-widest, widest),
        clipped_share=None,
        expected_mse=None,
    )


def _fewest(*bits: int | None) -> int | None:
    """The least of these that is fewer than the last, the storage; None where all are in use."""
    least = min(n for n in bits if n is not None)
    return None if least == bits[-1] else least


def _is_known(granularity: str | None, is_weight: bool) -> bool:
    """Whether a tensor can have this granularity, unlike its layer."""
    if granularity is None:
        return True
    found = parse_granularity(granularity)
    return found is not None and found.kind in (("tensor",) if is_weight else ACTIVATION_KINDS)


def _refuse_unknown(
    settings: TensorSettings, where: str, bits: int, *, is_weight: bool = False
) -> None:
    """Raise QD507 for what a plan has no place for."""
    got = ""
    if is_weight and settings.range_bits is not None and settings.range_bits < bits:
        got = f"{settings.range_bits} of {bits} bits of one weight (value_range)"
    elif not is_weight and settings.threshold is not None and len(settings.threshold) > 1:
        got = f"{len(settings.threshold)} thresholds for an activation"
    elif not _is_known(settings.granularity, is_weight):
        got = f"granularity {settings.granularity}"
    if got:
        raise PlanError(
            "QD507",
            where=f"{where} ({settings.why})",
            got=got,
            expected=f"{ACTIVATION_FORMS} for an activation; for a weight the granularity and "
            "weight_range_bits of its layer",
            mend="write one of these there, or a rule for the layer",
        )
