"""``qdist show thresholds``: the ranges of a method, and how well the samples pin them down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from qdist.calibration.blockwise import sample_blocks
from qdist.cli.domain import location
from qdist.cli.progress import bar
from qdist.errors import ConfigError
from qdist.plan.precision import activation_levels
from qdist.report.text import number_text
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import open_store
from qdist.threshold.bootstrap import RESAMPLES, Interval, bootstrap, refuse_extremes
from qdist.threshold.clip import Levels
from qdist.threshold.registry import check_method
from qdist.threshold.sentinel import split_sentinels

_BITS = (4, 8, 16)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """``width``: the relative width that is wanted. ``rows``: how many to print; None for all."""

    store: str
    method: str = "mse"
    bits: int = 8
    symmetric: bool = False
    width: float = 0.05
    resamples: int = RESAMPLES
    rows: int | None = 40


def run(words: Sequence[str], console: Console, rows: int | None) -> None:
    """Print the least certain ranges of a store first.

    Raises QD104, QD105, QD501 for words that cannot be, QD107 for ``max``, QD402 for a store
    without blocks of samples.
    """
    asked = _parse(words, rows)
    check_method(asked.method)
    refuse_extremes(asked.method)
    store = open_store(asked.store)
    merge = store.latest()
    blocks, what = sample_blocks(store, merge)
    levels = activation_levels(asked.bits, symmetric=asked.symmetric)
    found: list[tuple[str, Interval, int]] = []
    with bar(console, "resampling", "tensors") as going:
        for done, tensor in enumerate(merge.record.tensors, 1):
            entry = _interval(tensor, merge.record, blocks, levels, asked)
            if entry is not None:
                found.append((tensor, *entry))
            going.update(done, len(merge.record.tensors))
    found.sort(key=lambda entry: (-entry[1].relative_width, entry[0]))
    console.print(_table(found, asked))
    console.print(
        f"intervals of {found[0][1].confidence:.0%} from {asked.resamples} resamples of {what}, "
        f"{merge.record.n_samples} samples"
        if found
        else "no tensor held a value",
        highlight=False,
    )


def _interval(
    tensor: str,
    record: CalibrationRecord,
    blocks: Sequence[CalibrationRecord],
    levels: Levels,
    asked: _Asked,
) -> tuple[Interval, int] | None:
    """The interval and the number of masked values; None for a tensor without other values."""
    histogram = record.histogram(tensor)
    split = split_sentinels(histogram.finite)
    if split.body.is_empty:
        return None
    interval = bootstrap(
        [block.histogram(tensor) for block in blocks],
        levels,
        asked.method,
        n_samples=record.n_samples,
        resamples=asked.resamples,
    )
    return interval, int(split.n_sentinels) + histogram.n_infinite


def _table(found: Sequence[tuple[str, Interval, int]], asked: _Asked) -> Table:
    table = Table(
        title=f"ranges by {asked.method}, {asked.bits} bits, the least certain first",
        title_justify="left",
    )
    table.add_column("tensor", overflow="fold")
    for heading in ("low", "high", "interval", "more samples", "SQNR", "masked"):
        table.add_column(heading, justify="right")
    for tensor, interval, n_masked in found[: asked.rows]:
        range_, more = interval.threshold, interval.more_samples_for(asked.width)
        table.add_row(
            tensor,
            _bound(range_.low, interval.low),
            _bound(range_.high, interval.high),
            f"{interval.relative_width:.1%}",
            f"{more:,}" if more else "",
            f"{range_.sqnr_db:.1f} dB",
            f"{n_masked:,}" if n_masked else "",
        )
    table.caption = f"more samples: to bring the interval below {asked.width:.0%} of the range"
    return table


def _bound(value: float, interval: tuple[float, float]) -> str:
    if interval == (0.0, 0.0):
        return "0"
    return f"{number_text(value)} ({number_text(interval[0])} .. {number_text(interval[1])})"


def _parse(words: Sequence[str], rows: int | None) -> _Asked:
    left = list(words)
    method = _taken(left, "--method", str) or "mse"
    bits = _taken(left, "--bits", int) or 8
    width = _taken(left, "--width", float) or 0.05
    resamples = _taken(left, "--resamples", int) or RESAMPLES
    symmetric = "--symmetric" in left
    left = [word for word in left if word != "--symmetric"]
    for name, value, fits, expected in (
        ("--bits", bits, bits in _BITS, "4, 8 or 16"),
        ("--width", width, 0 < width < 1, "a share above 0 and below 1"),
        ("--resamples", resamples, 1 <= resamples <= 10_000, "a number from 1 to 10000"),
    ):
        if not fits:
            raise _refusal(name, repr(value), expected)
    if len(left) != 1 or left[0].startswith("-"):
        raise ConfigError(
            "QD105",
            where="qdist show thresholds",
            got=" ".join(left) or "no path",
            expected="the path of one calibration store",
            mend="write qdist show thresholds STORE --method mse; qdist show --help explains",
        )
    return _Asked(
        store=location(left[0]),
        method=method,
        bits=bits,
        symmetric=symmetric,
        width=width,
        resamples=resamples,
        rows=rows,
    )


def _taken(words: list[str], name: str, kind: Callable[[str], _T]) -> _T | None:
    """The value of an option, which is removed with it; None where it is not there."""
    if name not in words:
        return None
    i = words.index(name)
    value = words[i + 1] if i + 1 < len(words) else ""
    del words[i : i + 2]
    try:
        return kind(value)
    except ValueError as error:
        raise _refusal(name, repr(value), "a number") from error


def _refusal(name: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        "QD104",
        where=name,
        got=got,
        expected=expected,
        mend="change it; qdist show --help explains",
    )
