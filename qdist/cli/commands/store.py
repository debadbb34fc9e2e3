"""``qdist store``: export, import and tidy up calibration stores."""

from __future__ import annotations

from rich.console import Console

from qdist.cli.commands.steps import CHECKS
from qdist.cli.domain import absolute, location
from qdist.errors import ConfigError
from qdist.report.text import size_text
from qdist.store.portable import export_statistics, import_statistics, read_statistics
from qdist.store.sweep import sweep
from qdist.store.zarr_store import open_store

USAGE = {
    "export": ("STORE", "FILE"),
    "import": ("FILE", "STORE"),
    "sweep": ("STORE",),
}
"""Action -> what it takes."""
HOUR_S = 3600.0
KEPT_MERGES = 32
"""Prefixes and blocks of one calibration are merges too."""


def run(words: list[str], console: Console) -> None:
    """Do what the first word says. Raises QD104, QD105, and what the store raises."""
    action, given = _parse(words)
    if action == "export":
        path = export_statistics(
            open_store(location(given[0])), absolute(given[1]), documents=(CHECKS,)
        )
        merge = read_statistics(path).merge
        _say(console, f"{merge.record.n_samples} samples, {len(merge.record.tensors)} tensors")
        _say(console, f"written to {path} ({size_text(path.stat().st_size)})")
    elif action == "import":
        found = import_statistics(absolute(given[0]), location(given[1]), None)
        state = "put into" if found.is_new else "were already in"
        _say(
            console,
            f"{found.n_samples} samples, {found.n_tensors} tensors {state} {found.location}",
        )
    else:
        swept = sweep(open_store(location(given[0])), older_than_s=HOUR_S, keep_merges=KEPT_MERGES)
        _say(console, f"{len(swept.removed)} leftovers removed, {size_text(swept.n_bytes)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _parse(words: list[str]) -> tuple[str, list[str]]:
    action = words[0] if words else ""
    if action not in USAGE:
        raise ConfigError(
            "QD104" if words else "QD105",
            where="qdist store",
            got=repr(action) if words else "no action",
            expected=f"one of {', '.join(USAGE)}",
            mend="write qdist store export STORE FILE; qdist store --help explains",
        )
    given = words[1:]
    if len(given) != len(USAGE[action]):
        raise ConfigError(
            "QD105",
            where=f"qdist store {action}",
            got=f"{len(given)} words after it",
            expected=" ".join(USAGE[action]),
            mend=f"write qdist store {action} {' '.join(USAGE[action])}",
        )
    return action, given
