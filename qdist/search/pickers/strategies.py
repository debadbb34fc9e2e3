"""The pickers by name, several together, and what vendors do unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdist.errors import ConfigError
from qdist.search.pickers.picking import Picked

PICKERS = ("initial", "io_high", "hawq", "cosine", "end_to_end", "variance", "lstm")
RUNS_MODEL = frozenset({"hawq", "cosine", "end_to_end"})
"""Pickers that run the model on samples; the others read the graph and stored statistics."""

ICRAFT_DEFAULTS: dict[str, tuple[str, ...]] = {
    "buyi": ("variance",),
    "zhuge": ("cosine", "lstm"),
}
"""What Icraft's ``mix_precision = "auto"`` is, by architecture."""
_ICRAFT_HIGHER: dict[str, dict[str, str]] = {
    "buyi": {"int8": "int16", "int16": "float32"},
    "zhuge": {"int8": "fp16", "bf16": "tf32", "fp16": "tf32"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Names of pickers (`PICKERS`) whose picks are joined, and the precision to raise to."""

    strategies: tuple[str, ...]
    high: str

    @property
    def runs_model(self) -> bool:
        """Whether samples are needed."""
        return not RUNS_MODEL.isdisjoint(self.strategies)


def find_mix(strategies: Sequence[str], high: str, base: str) -> Mix:
    """The pickers of these names and the precision that they raise ``base`` to.

    ``buyi`` and ``zhuge`` stand for what Icraft does by default on these architectures. ``high``:
    a precision, or ``auto`` for the next one up: as Icraft has it where one of its names is given
    (int8 to fp16 on Zhuge, to int16 on Buyi, 16-bit floats to tf32), else int16 above 8 bits.
    Raises QD104 for a name that is unknown, QD107 where there is nothing above.
    """
    names: list[str] = []
    architecture = ""
    for name in strategies:
        if name in ICRAFT_DEFAULTS:
            architecture = name
        elif name not in PICKERS:
            raise ConfigError(
                "QD104",
                where="quantization.mix.strategy",
                got=repr(name),
                expected=f"some of {', '.join((*PICKERS, *ICRAFT_DEFAULTS))}",
                mend="choose some of these",
            )
        names += ICRAFT_DEFAULTS.get(name, (name,))
    if high == "auto":
        high = _next(base, architecture)
    return Mix(strategies=tuple(dict.fromkeys(names)), high=high)


def joined(picks: Sequence[Picked]) -> Picked:
    """The layers that any of several pickers raises; the first one's reason counts."""
    raised = frozenset[str]().union(*(picked.raised for picked in picks))
    why: dict[str, str] = {}
    scores: Mapping[str, float] = picks[0].scores if len(picks) == 1 else {}
    for picked in reversed(picks):
        why |= picked.why
    notes = tuple(note for picked in picks for note in picked.notes)
    return Picked(raised=raised, scores=scores, why=why, notes=notes)


def _next(base: str, architecture: str) -> str:
    known = _ICRAFT_HIGHER.get(architecture)
    if known is None:
        known = {"w4a8": "int8", "int8": "int16", "w8a16": "int16", "bf16": "tf32", "fp16": "tf32"}
    if base not in known:
        raise ConfigError(
            "QD107",
            where="quantization.mix.high",
            got=f"auto above {base}",
            expected=f"one of {', '.join(known)} as quantization.precision",
            mend="name the precision to raise to with quantization.mix.high",
        )
    return known[base]
