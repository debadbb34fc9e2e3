"""The table of where the two modes disagree."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from qdist.evaluate.modes import ModesReport
from qdist.report import text
from qdist.report.cells import Name, plain_table


def modes_table(report: ModesReport, limit: int | None) -> RenderableType:
    """The first ``limit`` layers (None: all) whose artifact-exact and target-exact results differ
    most, by SQNR between them."""
    rows = sorted(report.layers, key=lambda row: row.deviation.sqnr_db)
    n = len(rows)
    shown = f"{n} layers" if limit is None or limit >= n else f"{limit} of {n} layers"
    table = plain_table(f"artifact-exact against target-exact, {shown}")
    table.caption = f"{report.n_integer} of {n} layers in whole numbers; {report.reading}"
    table.add_column("layer")
    table.add_column("scheme", no_wrap=True)
    for title in ("differing", "most steps", "SQNR dB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows[:limit]:
        table.add_row(
            Name(row.name),
            Text(row.scheme or "float"),
            Text("" if row.differing is None else text.share_text(row.differing)),
            Text("" if row.most_steps is None else str(row.most_steps)),
            Text(text.db_text(row.deviation.sqnr_db)),
        )
    return table
