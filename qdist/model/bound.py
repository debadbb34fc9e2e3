"""Sessions that run one after another on memory that stays where it is.

What they put out lies at the same places in every run (ONNX Runtime's I/O binding). So nothing is
allocated, no array is made, and what reads the outputs finds the addresses that it knows from the
run before. Each place is given out again once the last session that reads it has run.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdist.model.session import ORT_ERRORS

Arrays = dict[str, NDArray[Any]]
Form = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and element type of an array."""
Forms = Mapping[str, Form]

_ALIGNED = 256
"""As ONNX Runtime's own arena aligns: what vectorised loops compute may depend on it."""
_KINDS = "fiub"
"""Kinds of elements whose arrays are plain memory."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Made:
    """Some outputs of a run, by name.

    ``is_fixed``: this very object comes again in later runs, with the same arrays at the same
    addresses, which hold other values by then. Otherwise the arrays are the reader's.
    """

    arrays: Arrays
    is_fixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One session's turn. ``reads``: of what is given and of what earlier turns put out.
    ``outputs``: all that it puts out. ``wanted``: those for the caller. ``sends``: those that later
    turns read. ``last``: what no later one reads any more."""

    session: ort.InferenceSession
    reads: tuple[str, ...]
    outputs: list[str]
    wanted: tuple[str, ...]
    sends: tuple[str, ...]
    last: tuple[str, ...]


class Bound:
    """Turns bound to memory, for feeds of one shape. One thread at a time."""

    def __init__(self, turns: Sequence[Turn], forms: Sequence[Forms], most_bytes: int) -> None:
        """``forms``: of what each turn puts out. Raises `ValueError` where an output cannot be
        bound, or outputs take more than ``most_bytes``."""
        if not all(_can_bind(form) for made in forms for form in made.values()):
            raise ValueError("an output is empty, or not of plain numbers")
        places, n_bytes = places_of(turns, forms)
        if n_bytes > most_bytes:
            raise ValueError(f"{n_bytes} bytes of outputs are more than {most_bytes}")
        room = _room(n_bytes)
        self._options = ort.RunOptions()
        # An error that is none of the model's is not the user's: see `BINDING_ERRORS`.
        self._options.log_severity_level = 4
        self._made: Arrays = {}
        self._steps: list[tuple[ort.InferenceSession, ort.IOBinding, tuple[str, ...], Made]] = []
        for turn, own in zip(turns, forms, strict=True):
            binding = turn.session.io_binding()
            for name in turn.reads:
                if name in self._made:
                    binding.bind_cpu_input(name, self._made[name])
            given = tuple(name for name in turn.reads if name not in self._made)
            for name in turn.outputs:
                dims, dtype = own[name]
                held = room[places[name] :][: form_bytes(own[name])].view(dtype).reshape(dims)
                self._made[name] = held
                binding.bind_output(name, "cpu", 0, dtype.type, dims, held.ctypes.data)
            wanted = Made({name: self._made[name] for name in turn.wanted}, is_fixed=True)
            self._steps.append((turn.session, binding, given, wanted))

    def runs(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[Made]:
        """What each turn puts out for the caller, until the next one has its turn. Raises what ONNX
        Runtime raises. The feeds are kept until others take their place."""
        for session, binding, given, wanted in self._steps:
            for name in given:
                if name in feeds:
                    # Not `numpy.ascontiguousarray`, which gives a number an axis.
                    binding.bind_cpu_input(name, np.asarray(feeds[name], order="C"))
            session.run_with_iobinding(binding, self._options)
            yield wanted

    def array(self, name: str) -> NDArray[Any]:
        """An output, as long as a turn that has not run reads it."""
        return self._made[name]


BINDING_ERRORS = (*ORT_ERRORS, RuntimeError, ValueError)
"""What a run on bound memory may raise: most of all, that an output has another shape."""


class _Gaps:
    """Free stretches of memory that grows where none is large enough. The lowest are taken first,
    since what was used last lies in a cache."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        """Where ``size`` bytes are free, which are not any more."""
        for place, (begin, stop) in enumerate(self._free):
            if stop - begin >= size:
                self._free[place : place + 1] = (
                    [(begin + size, stop)] if stop - begin > size else []
                )
                return begin
        begin = self.end
        if self._free and self._free[-1][1] == begin:
            begin, _ = self._free.pop()
        self.end = begin + size
        return begin

    def give(self, begin: int, size: int) -> None:
        """Free ``size`` bytes again."""
        place = bisect(self._free, (begin, 0))
        stop = begin + size
        if place < len(self._free) and self._free[place][0] == stop:
            stop = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == begin:
            place -= 1
            begin = self._free.pop(place)[0]
        self._free.insert(place, (begin, stop))


def places_of(turns: Sequence[Turn], forms: Sequence[Forms]) -> tuple[dict[str, int], int]:
    """Where each output lies while it is read, and how many bytes there are."""
    last = {name: i for i, turn in enumerate(turns) for name in (*turn.outputs, *turn.reads)}
    gaps = _Gaps()
    places: dict[str, int] = {}
    ending: list[list[tuple[int, int]]] = [[] for _ in turns]
    for i, (turn, own) in enumerate(zip(turns, forms, strict=True)):
        for name in turn.outputs:
            size = -(-form_bytes(own[name]) // _ALIGNED) * _ALIGNED
            places[name] = gaps.take(size)
            ending[last[name]].append((places[name], size))
        for begin, size in ending[i]:
            gaps.give(begin, size)
    return places, gaps.end


def _room(n_bytes: int) -> NDArray[np.uint8]:
    room = np.empty(n_bytes + _ALIGNED, np.uint8)
    return room[-room.ctypes.data % _ALIGNED :][:n_bytes]


def _can_bind(form: Form) -> bool:
    dims, dtype = form
    return dtype.kind in _KINDS and 0 not in dims


def form_bytes(form: Form) -> int:
    """Bytes of an array of this form."""
    dims, dtype = form
    return math.prod(dims) * dtype.itemsize
