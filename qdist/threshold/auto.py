"""The method with the least expected error in the layers that read a tensor (``auto``).

No method wins everywhere (H. Wu et al., "Integer quantization for deep learning inference", 2020:
the entropy range ruins one network and saves another), so several are asked for their range, and
the range whose error hurts the tensor's readers least is taken: the sum over the readers of the
expected error of their outputs, each as a share of its output (`qdist.threshold.consumer`). Where
no reader is known, the error in the tensor alone decides, and the note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdist.stats.histogram import Density
from qdist.threshold.aciq import aciq
from qdist.threshold.clip import Levels
from qdist.threshold.consumer import Consumer, output_error
from qdist.threshold.entropy import entropy, kl_v2, n_halves
from qdist.threshold.error import expected_mse
from qdist.threshold.maximum import maximum
from qdist.threshold.mse import mse
from qdist.threshold.percentile import percentile
from qdist.threshold.root import Root, root_error

Reader = Consumer | Root
"""What reads a tensor, as far as it tells what errors in it cost."""

CANDIDATES: tuple[tuple[str, Callable[..., tuple[float, float]], Mapping[str, Any]], ...] = (
    ("mse", mse, {}),
    ("max", maximum, {}),
    ("percentile", percentile, {"percent": 99.999}),
    ("percentile", percentile, {"percent": 99.99}),
    ("aciq", aciq, {}),
    ("kl", entropy, {}),
    ("kl_v2", kl_v2, {}),
)
"""Method, function, parameters. Of equal errors the first counts."""
TENSOR_ALONE = "by the error in the tensor alone: no layer that reads it is known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A range, the method it is of, its error as `choose` ranks it, and how that was judged."""

    low: float
    high: float
    method: str
    error: float
    note: str


def auto(density: Density, levels: Levels) -> tuple[float, float]:
    """The range of least expected error in the tensor alone; `choose` knows of its readers."""
    found = choose(density, levels)
    return found.low, found.high


def choose(density: Density, levels: Levels, consumers: Sequence[Reader] = ()) -> Chosen:
    """The candidate of least expected error in ``consumers``, or in the tensor without any."""
    ranges: dict[tuple[float, float], str] = {}
    for name, method, parameters in CANDIDATES:
        if name.startswith("kl") and n_halves(levels) >= 2048:
            continue  # More levels than bins: it would be the maximum.
        found = method(density, levels, **parameters)
        ranges.setdefault((min(found[0], 0.0), max(found[1], 0.0)), name)
    if consumers:
        names = ", ".join(consumer.name for consumer in consumers[:3])
        more = f" and {len(consumers) - 3} more" if len(consumers) > 3 else ""
        note = f"least expected error in {names}{more}"
    else:
        note = TENSOR_ALONE
    errors = {
        (low, high): sum(_error(density, low, high, levels, each) for each in consumers)
        if consumers
        else expected_mse(density, low, high, levels)
        for low, high in ranges
    }
    best = min(errors, key=lambda bounds: errors[bounds])
    return Chosen(low=best[0], high=best[1], method=ranges[best], error=errors[best], note=note)


def _error(density: Density, low: float, high: float, levels: Levels, reader: Reader) -> float:
    if isinstance(reader, Root):
        return root_error(density, low, high, levels)
    return output_error(density, low, high, levels, reader)
