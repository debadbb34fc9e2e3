"""Values as MLflow and JSON can hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def as_text(value: Any) -> str:
    """One value on one line: mappings and lists as JSON, None as an empty text."""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(as_plain(value), default=str)
    return "" if value is None else str(value)


def as_plain(value: Any) -> Any:
    """``value`` as JSON can hold it; what JSON has no form for is left to ``default=str``."""
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items: Iterable[Any] = value
        return [as_plain(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
