"""What the terminal's tables are made of."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qdist.report import text

_LEAST_NAME = 12


class Name:
    """A name in a cell: whole where there is room, else without its middle."""

    def __init__(self, name: str, style: str = "") -> None:
        self._name = " ".join(name.split())
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = text.shorten(self._name, options.max_width)
        yield Text(shown, self._style, no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = cell_len(self._name)
        return Measurement(min(width, _LEAST_NAME), width).with_maximum(options.max_width)


def plain_table(title: str) -> Table:
    """A table without vertical rules, whose columns lie one space apart."""
    return Table(
        title=Text(title),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )


def fact_table(title: str) -> Table:
    """Two columns without headings: labels and values, to be filled with `add_fact`."""
    table = Table(title=Text(title, "bold"), box=None, show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def add_fact(table: Table, label: str, value: str) -> None:
    """Add one line to a `fact_table`, which is changed."""
    table.add_row(Text(label), Text(value))
