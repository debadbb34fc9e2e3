"""Icraft's ftmps and raws csv, read as fixed saturation points (``ftmp_csv``, ``raw_csv``).

``sat`` is the saturation point of an activation or weight, one number or one per channel,
separated by spaces; the range becomes ``-sat .. sat``. Ids number the feature maps (model inputs,
then what nodes make, in order) and the weights (in the order of the layers that read them); that
numbering is our reading, and a name may stand in an id's place.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from qdist.plan.dialects.reading import Before, FileRules, exactly, line_of, note_of, refuse
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule
from qdist.plan.selector import close

FTMPS = ("ftmp_id", "size", "max", "sat", "normratio", "scale", "exp")
RAWS = ("raw_id", "size", "max", "sat", "scale", "exp")
Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturationRow:
    """One tensor: a cell is a tuple of numbers, empty for an empty cell. ``normratio`` is that of a
    feature map. ``line`` counts from 1."""

    id: str
    size: int | None
    max: Numbers
    sat: Numbers
    scale: Numbers = ()
    exp: Numbers = ()
    normratio: Numbers = ()
    line: int = field(default=0, compare=False)


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like one of these two."""
    return text.lstrip("\ufeff \t").lower().startswith(("ftmp_id,", "raw_id,"))


def parse(text: str, file: str) -> tuple[SaturationRow, ...]:
    """The rows of either file. Raises QD508 with the line."""
    reader = csv.reader(io.StringIO(text.lstrip("\ufeff"), newline=""), skipinitialspace=True)
    columns: list[str] = []
    rows = []
    for cells in reader:
        where = line_of(file, reader.line_num)
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [cell.strip().lower() for cell in cells]
            if "sat" not in columns or columns[0] not in (FTMPS[0], RAWS[0]):
                raise refuse(where, ",".join(cells), f"{','.join(FTMPS)} or {','.join(RAWS)}")
        elif len(cells) != len(columns):
            raise refuse(where, f"{len(cells)} cells", f"{len(columns)}, as in the header")
        else:
            rows.append(_row(dict(zip(columns, cells, strict=True)), reader.line_num, where))
    if not columns:
        raise refuse(file, "an empty file", f"a header such as {','.join(FTMPS)}")
    return tuple(rows)


def render(rows: Sequence[SaturationRow], columns: Sequence[str] = FTMPS) -> str:
    """The text of a file, with lines that end in ``\\n``."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = {
            columns[0]: row.id,
            "size": "" if row.size is None else str(row.size),
            **{n: _text(getattr(row, n)) for n in ("max", "sat", "normratio", "scale", "exp")},
        }
        writer.writerow([cells[column] for column in columns])
    return out.getvalue()


def read(text: str, file: str, before: Before) -> FileRules:
    """A fixed threshold for every tensor of the file that a quantized layer reads.

    Raises QD508 for a row that fits no tensor of the model, or has another size.
    """
    is_weights = text.lstrip("\ufeff \t").lower().startswith("raw_id")
    names = weights(before.index) if is_weights else feature_maps(before.index)
    read_by_layers = {
        entry.tensor
        for layer in before.index.choosable
        for entry in (*layer.activations, *layer.weights)
    }
    makers = {name for layer in before.index.choosable for name in _outputs(before, layer.name)}
    rules, idle = [], []
    for row in parse(text, file):
        where = line_of(file, row.line)
        name = _tensor(row, names, where)
        _check_size(row, name, before.index, where)
        if name not in read_by_layers and name not in makers:
            idle.append(name)
            continue
        settings = {"threshold": row.sat}
        rules.append(Rule(match=f"tensor:{exactly(name)}", settings=settings, origin=where))
    what = (
        f"{file}: {len(idle)} saturation points are of tensors that no quantized layer reads, "
        "such as"
    )
    return FileRules(rules=tuple(rules), notes=note_of(what, idle))


def feature_maps(index: LayerIndex) -> tuple[str, ...]:
    """The feature maps in Icraft's order: inputs, then what nodes make; floats alone."""
    if index.graph is None:
        return tuple(name for layer in index.layers for name in layer.outputs)
    graph = index.graph
    made = [name for node in graph.proto.graph.node for name in node.output if name]
    return tuple(n for n in [*graph.input_names, *made] if graph.is_float(n))


def weights(index: LayerIndex) -> tuple[str, ...]:
    """The weights in the order of the layers that read them first."""
    return tuple(dict.fromkeys(w.tensor for layer in index.layers for w in layer.weights))


def _outputs(before: Before, layer: str) -> tuple[str, ...]:
    """What a layer gives, where a layer that can be quantized reads it, perhaps through a view."""
    adjacency = before.index.adjacency
    children = adjacency.children[adjacency.host(layer)]
    read = any(name not in before.index.left_out for name in children)
    return adjacency.outputs(layer) if read else ()


def _row(cells: dict[str, str], line: int, where: str) -> SaturationRow:
    size = cells.get("size", "").strip()
    if size and not size.isdigit():
        raise refuse(where, f"size {size!r}", "a number of values")
    sat = _numbers(cells["sat"], "sat", where)
    if not sat or not all(value > 0 for value in sat):
        raise refuse(where, f"sat {cells['sat']!r}", "positive numbers, separated by spaces")
    id_column = FTMPS[0] if FTMPS[0] in cells else RAWS[0]
    others = {
        name: _numbers(cells.get(name, ""), name, where)
        for name in ("max", "normratio", "scale", "exp")
    }
    return SaturationRow(
        id=cells[id_column].strip(), size=int(size) if size else None, sat=sat, line=line, **others
    )


def _numbers(text: str, name: str, where: str) -> Numbers:
    try:
        found = tuple(float(part) for part in text.split())
    except ValueError as error:
        raise refuse(where, f"{name} {text!r}", "numbers, separated by spaces") from error
    if not all(map(math.isfinite, found)):
        raise refuse(where, f"{name} {text!r}", "finite numbers")
    return found


def _text(values: Numbers) -> str:
    return " ".join(repr(value) for value in values)


def _tensor(row: SaturationRow, names: tuple[str, ...], where: str) -> str:
    if row.id in names:
        return row.id
    if row.id.isdigit() and int(row.id) < len(names):
        return names[int(row.id)]
    expected = f"0 to {len(names) - 1}, or a name such as {', '.join(close(row.id, names))}"
    raise refuse(where, f"id {row.id!r}", expected)


def _check_size(row: SaturationRow, name: str, index: LayerIndex, where: str) -> None:
    if row.size is None or index.graph is None:
        return
    found = index.graph.type_of(name)
    dims = () if found is None or found.shape is None else found.shape
    fixed = [d for d in dims if isinstance(d, int)]
    if found is None or found.shape is None or len(fixed) < len(dims):
        return
    size = math.prod(fixed)
    if size != row.size:
        raise refuse(
            where, f"{row.size} values", f"{size}, as {name} has, which has that id in this model"
        )
