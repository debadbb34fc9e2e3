"""What a pool tells its caller, and what it asks of a worker."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from qdist.errors import QdistError

TaskT = TypeVar("TaskT", bound=Hashable)
ResultT = TypeVar("ResultT")
TaskT_contra = TypeVar("TaskT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Worker(Protocol[TaskT_contra, ResultT_co]):
    """What an actor wraps: a plain class that lives in one process and is used by one thread.

    Both methods may raise a `QdistError` for bad input; it reaches the driver as it is and is
    not retried, unless its code is one of `actors.retry.TRANSIENT_CODES`. Any other exception is.
    """

    def setup(self) -> dict[str, Any]:
        """Get ready; called once, before any task. Returns JSON facts about the worker."""

    def run(self, task: TaskT_contra) -> ResultT_co:
        """Do one task. May be called again for a task that failed here or elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Generic[TaskT, ResultT]):
    """``task`` gave ``result`` on ``worker`` after ``seconds`` of work there."""

    task: TaskT
    result: ResultT
    worker: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Generic[TaskT]):
    """``task`` will not be tried again: bad input, a store that stays out of reach, or QD803
    after the last attempt."""

    task: TaskT
    error: QdistError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Generic[TaskT]):
    """``task`` goes back into the queue as attempt number ``attempt``, or, if it was duplicated,
    runs on as that attempt where its copy is."""

    task: TaskT
    reason: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicated(Generic[TaskT]):
    """``task`` is late, so idle ``worker`` runs it as well; whichever is first answers."""

    task: TaskT
    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """``worker`` is gone; another takes its place under another name, unless that fails too."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A replacement is ready; it gets tasks from now on. ``facts`` as in `WorkerPool.facts`."""

    worker: str
    facts: Mapping[str, Any]


Event: TypeAlias = (
    Completed[TaskT, ResultT]
    | Failed[TaskT]
    | Retried[TaskT]
    | Duplicated[TaskT]
    | WorkerLost
    | WorkerJoined
)
