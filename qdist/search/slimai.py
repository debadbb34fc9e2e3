"""SlimAI's smart search: every ``accuracy_level`` with every value of ``range``.

The vendor's guide names the two and that their combinations are searched for the best score. It
does not say what they are; docs/search-vendors.md has our reading: an accuracy level is a precision
and a granularity (`ACCURACY_LEVELS`), and a range of N makes every activation's clipping range N
percent of its largest magnitude.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qdist.errors import ConfigError
from qdist.plan.choice import LayerChoice
from qdist.search.problem import SearchProblem
from qdist.search.proposals import Proposals
from qdist.search.trial import Candidate, Trial

ACCURACY_LEVELS: dict[int, tuple[str, str]] = {
    0: ("int8", "tensor"),
    1: ("int8", "channel"),
    2: ("int16", "channel"),
}
"""Level -> precision and granularity of weights. That level 0 has no scales per channel and that a
level settles the number formats are the guide's words; the rest is our reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlimAISettings:
    """``accuracy_levels``: of `ACCURACY_LEVELS`. ``ranges``: percentages, 1 to 100. ``max_trials``:
    the plain plan included. ``time_limit_s``: for whoever runs the trials; the strategy has no
    clock, but asks for ranges far apart first, so that it may be ended at any time. ``notes``: what
    had no effect."""

    accuracy_levels: tuple[int, ...] = (0, 1)
    ranges: tuple[int, ...] = (96, 97, 98, 99)
    max_trials: int = 1000
    time_limit_s: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.accuracy_levels or not set(self.accuracy_levels) <= set(ACCURACY_LEVELS):
            raise ValueError(f"accuracy levels {self.accuracy_levels}")
        if not self.ranges or not all(1 <= value <= 100 for value in self.ranges):
            raise ValueError(f"ranges {self.ranges}")


class SmartSearch:
    """The strategy. The first round is the plain plan; every further one has all levels with the
    ranges that halve what lies between those before. A layer without an option of the level stays
    as in the plain plan."""

    def __init__(self, problem: SearchProblem, settings: SlimAISettings) -> None:
        self._problem = problem
        self._settings = settings
        self._proposals = Proposals(problem, settings.max_trials)
        self._rounds = halved(settings.ranges)

    def ask(self) -> list[Candidate]:
        """The next round; empty when the search is over."""
        self._proposals.next_round()
        if self._proposals.round == 0:
            plain = self._proposals.make("plain", self._problem.plain)
            return [plain] if plain else []
        while self._rounds and not self._proposals.is_full:
            found = [
                self._candidate(level, value)
                for value in self._rounds.pop(0)
                for level in self._settings.accuracy_levels
            ]
            if candidates := [candidate for candidate in found if candidate is not None]:
                return candidates
        return []

    def tell(self, trials: Iterable[Trial]) -> None:
        """Nothing depends on the trials."""

    def _candidate(self, level: int, value: int) -> Candidate | None:
        problem = self._problem
        choices = dict(problem.plain)
        for layer in problem.layers:
            option = _option(level, problem.options[layer.name], has_weights=layer.n_weights > 0)
            if option is not None:
                choices[layer.name] = replace(option, saturation="max", th_scale=value / 100)
        return self._proposals.make(f"accuracy_level {level}, range {value}", choices)


def halved(values: tuple[int, ...]) -> list[list[int]]:
    """The values in rounds: first and last, then the middle of each gap, until none is left.

    >>> halved((92, 93, 94, 95, 96))
    [[92, 96], [94], [93, 95]]
    """
    order = sorted(set(values))
    rounds = [[order[0], order[-1]] if len(order) > 1 else order]
    gaps = [(0, len(order) - 1)]
    while gaps := [(low, high) for low, high in gaps if high - low > 1]:
        rounds.append([order[(low + high) // 2] for low, high in gaps])
        gaps = [
            half
            for low, high in gaps
            for half in ((low, (low + high) // 2), ((low + high) // 2, high))
        ]
    return rounds


def parse(text: str, file: str, *, max_trials: int = 1000) -> SlimAISettings:
    """The settings of a SlimAI ``cfg``: ``accuracy_level`` (``0,1``) and ``range`` (``96:99`` or
    ``96:99:1``, both ends included) of ``[quantization]``, ``time_limit`` in seconds and
    ``smart_search_level`` of ``[smart_search]``. Other sections and keys are not read here.

    Raises QD106 for what is no such file, QD105 without a range or a level, QD104 for values out of
    range, QD107 with ``histogram_bins``, which puts ``range`` out of effect.
    """
    reader = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#",))
    try:
        reader.read_string(text.removeprefix("\ufeff"), source=file)
    except configparser.Error as error:
        raise _refuse("QD106", file, str(error), "sections of KEY = VALUE") from error
    for key in ("accuracy_level", "range"):
        if not reader.has_option("quantization", key):
            raise _refuse("QD105", f"{file}, [quantization] {key}", "nothing", "a value")
    if reader.has_option("quantization", "histogram_bins"):
        raise _refuse("QD107", f"{file}, range", "histogram_bins beside it", "one of the two")
    limit = reader.get("smart_search", "time_limit", fallback=None)
    smart = reader.get("smart_search", "smart_search_level", fallback="0")
    where = f"{file}, [smart_search] smart_search_level"
    if _integer(smart, where) not in (0, 1):
        raise _refuse("QD104", where, smart, "0 or 1")
    note = (
        f"{file}: smart_search_level = 1 has no effect: what it searches in maskrcnn, unet and "
        "deeplab the vendor does not say"
    )
    return SlimAISettings(
        accuracy_levels=_levels(reader.get("quantization", "accuracy_level"), file),
        ranges=_ranges(reader.get("quantization", "range"), file),
        max_trials=max_trials,
        time_limit_s=None if limit is None else _seconds(limit, file),
        notes=(note,) if _integer(smart, where) else (),
    )


def _option(
    level: int, options: tuple[LayerChoice, ...], *, has_weights: bool
) -> LayerChoice | None:
    """The first option of a level; of a layer without weights any granularity is the level's."""
    precision, granularity = ACCURACY_LEVELS[level]
    wanted = [
        option
        for option in options
        if option.precision == precision and (option.granularity == granularity or not has_weights)
    ]
    return wanted[0] if wanted else None


def _levels(text: str, file: str) -> tuple[int, ...]:
    where = f"{file}, [quantization] accuracy_level"
    levels = tuple(dict.fromkeys(_integer(part, where) for part in text.split(",")))
    if not set(levels) <= set(ACCURACY_LEVELS):
        raise _refuse("QD104", where, text, f"some of {', '.join(map(str, ACCURACY_LEVELS))}")
    return levels


def _ranges(text: str, file: str) -> tuple[int, ...]:
    where = f"{file}, [quantization] range"
    parts = [_integer(part, where) for part in text.split(":")]
    if not 1 <= len(parts) <= 3:
        raise _refuse("QD104", where, text, "LOW:HIGH or LOW:HIGH:STEP")
    low, high, step = parts[0], parts[min(1, len(parts) - 1)], parts[2] if len(parts) > 2 else 1
    if not (1 <= low <= high <= 100 and step >= 1):
        raise _refuse("QD104", where, text, "percentages from 1 to 100, the lower one first")
    return tuple(range(low, high + 1, step))


def _seconds(text: str, file: str) -> float:
    where = f"{file}, [smart_search] time_limit"
    seconds = _integer(text, where)
    if seconds < 1:
        raise _refuse("QD104", where, text, "at least 1 second")
    return float(seconds)


def _integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _refuse("QD104", where, repr(text), "an integer") from None


def _refuse(code: str, where: str, got: str, expected: str) -> ConfigError:
    return ConfigError(code, where=where, got=got, expected=expected, mend="correct the file there")
