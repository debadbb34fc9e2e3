"""A function or a class of the user's own that failed: the error that says where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qdist.data.executor import place_of
from qdist.errors import EvaluationError


def code_failed(error: BaseException, name: str, code: Callable[..., Any]) -> EvaluationError:
    """The QD705 error, to be raised: ``code``, a function or a class that the user knows as
    ``name``, raised ``error``. Called by what called the code."""
    return EvaluationError(
        "QD705",
        where=place_of(error, code),
        got=f"{type(error).__name__}: {error}",
        expected=f"{name} to return its metric",
        mend=f"correct the {'class' if isinstance(code, type) else 'function'} there",
    )
