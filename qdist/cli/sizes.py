"""Amounts of memory as users write them: 2GB, 512 MiB, 2e9."""

from __future__ import annotations

import re

from qdist.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**i for i, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**i for i, letter in enumerate("kmgt", start=1)},
    **{letter: 1000**i for i, letter in enumerate("kmgt", start=1)},
}


def n_bytes(key: str, value: int | str) -> int:
    """Bytes of what the user gave for ``key``. Raises QD104 for anything else.

    >>> n_bytes("calibration.memory_budget", "1.5 GiB")
    1610612736
    """
    if isinstance(value, int):
        amount, unit = float(value), ""
    else:
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", value.lower())
        amount, unit = _number(found.group(1)) if found else 0.0, found.group(2) if found else ""
    size = amount * _UNITS.get(unit, 0)
    if not 1 <= size < 1 << 62:
        raise ConfigError(
            "QD104",
            where=key,
            got=repr(value),
            expected="an amount of memory such as 2GB, 512MiB or a number of bytes",
            mend=f"write {key}=2GB",
        )
    return int(size)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
