"""The Ray actor: a plain class, wrapped by `ray.remote` where a pool starts it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.events import Worker
from qdist.errors import QdistError


class Host:
    """Holds one worker and turns a `QdistError` into a value."""

    def __init__(self) -> None:
        self._worker: Worker[Any, Any] | None = None

    def start(self, make_worker: Callable[[], Worker[Any, Any]]) -> dict[str, Any] | QdistError:
        try:
            self._worker = make_worker()
            facts = dict(self._worker.setup())
        except QdistError as error:
            return error
        return facts | {
            "node_id": ray.get_runtime_context().get_node_id(),
            "node_ip": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }

    def run(self, task: Any) -> tuple[Any, float] | QdistError:
        if self._worker is None:
            raise RuntimeError("run() before start()")
        begin = time.perf_counter()
        try:
            result = self._worker.run(task)
        except QdistError as error:
            return error
        return result, time.perf_counter() - begin
