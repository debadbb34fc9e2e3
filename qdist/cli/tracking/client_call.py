"""One call of MLflow's client: its variables, its silence, and its errors on one line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A dead server costs about three seconds; MLflow's own defaults take four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@contextmanager
def client_call(forced: Mapping[str, str] | None = None) -> Iterator[None]:
    """MLflow's variables and silence for one call; what fails is reported by this package.

    The user's own variables win, except over ``forced``.
    """
    values = {k: v for k, v in _DEFAULTS.items() if k not in os.environ} | dict(forced or {})
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    import mlflow  # noqa: F401  (sets up its loggers, so it comes before they are silenced)

    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def brief(error: BaseException) -> str:
    """The message on one line, without the password that a URL in it may carry."""
    text = re.sub(r"://[^/@\s]+@", "://", " ".join(str(error).split()))
    return text[:400] or type(error).__name__
