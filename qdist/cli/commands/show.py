"""``qdist show``: what is in a store, a plan, an artifact or a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qdist.cli.commands import show_thresholds
from qdist.errors import ConfigError
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.layers import find_layers
from qdist.model.loading import load_model
from qdist.plan.plan import load_plan
from qdist.report.tables import (
    artifact_table,
    plan_difference_table,
    plan_table,
    record_table,
)
from qdist.store.location import is_url
from qdist.store.zarr_store import open_store


def run(words: list[str], console: Console) -> None:
    """Print what the paths hold. Raises QD104 to QD106 for words that are no paths."""
    if words[:1] == ["thresholds"]:
        left, rows = _rows(words[1:])
        show_thresholds.run(left, console, rows)
        return
    given, rows = _parse(words)
    if is_url(given[0]):
        _show_store(given[0], console, rows)
        return
    paths = [Path(word).expanduser().absolute() for word in given]
    if len(paths) == 2:
        console.print(plan_difference_table(load_plan(paths[0]), load_plan(paths[1]), rows))
        return
    path = paths[0]
    if path.is_dir():
        _show_store(str(path), console, rows)
    elif path.suffix == ".json":
        console.print(plan_table(load_plan(path), rows))
    elif path.suffix == ".onnx":
        _show_model(path, console, rows)
    else:
        raise ConfigError(
            "QD104",
            where=str(path),
            got="nothing there" if not path.exists() else f"a file ending in {path.suffix!r}",
            expected="a store (folder or URL), a plan (.json) or a model (.onnx)",
            mend="give the path of one of these",
        )


def _show_model(path: Path, console: Console, rows: int | None) -> None:
    console.print(artifact_table(path))
    model = load_model(path)
    if any(node.op_type == "DequantizeLinear" for node in model.proto().graph.node):
        return
    layers = find_layers(Graph(freeze(model)))
    table = Table(title=f"{len(layers)} layers")
    for title in ("layer", "op", "activations", "weights"):
        table.add_column(title, overflow="fold")
    for layer in layers[:rows]:
        table.add_row(
            layer.name,
            layer.op_type,
            ", ".join(entry.tensor for entry in layer.activations),
            ", ".join(entry.tensor for entry in layer.weights),
        )
    console.print(table)


def _show_store(location: str, console: Console, rows: int | None) -> None:
    merge = open_store(location).latest()
    console.print(record_table(merge.record, rows))
    console.print(
        f"{merge.record.n_samples} samples in {merge.about.get('n_shards')} shards; "
        f"{len(merge.taps.aliases)} more tensors share these rows",
        highlight=False,
    )
    n_groups = [len(merge.record.groups(tensor)) for tensor in merge.record.tensors]
    if any(n_groups):
        console.print(
            f"{sum(map(bool, n_groups))} tensors have histograms per channel or group too",
            highlight=False,
        )


def _rows(words: list[str]) -> tuple[list[str], int | None]:
    """The other words, and the number of rows to print."""
    rows: int | None = 40
    left = list(words)
    if "--rows" in left:
        i = left.index("--rows")
        value = left[i + 1] if i + 1 < len(left) else ""
        if not value.isdigit():
            raise ConfigError(
                "QD104",
                where="--rows",
                got=repr(value),
                expected="a number, 0 for all",
                mend="write --rows 100",
            )
        rows = int(value) or None
        del left[i : i + 2]
    return left, rows


def _parse(words: list[str]) -> tuple[list[str], int | None]:
    left, rows = _rows(words)
    left = [word for word in left if word not in ("store", "plan", "artifact", "model")]
    if not 1 <= len(left) <= 2:
        raise ConfigError(
            "QD105",
            where="qdist show",
            got=f"{len(left)} paths",
            expected="one path, or two plans",
            mend="write qdist show PATH; qdist show --help explains",
        )
    return left, rows
