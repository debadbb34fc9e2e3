"""Icraft's mix-precision csv (``mix_precision = "FILE.csv"``).

Public samples and the vendor's manual show three column layouts; all are read by column name. A
cell ``a;b`` is for parameters and for the output feature map: ``6;7`` bits of range, ``kld;null``
saturation methods, ``tensor;group=4`` granularities (a group is along the last axis). ``op_id``
numbers the operators of the network: here 0 is the input, then come the nodes of the frozen graph
in order, then the output; that numbering is our reading, so types are checked beside numbers. Rows
of operators that only move data are for the vendor's tool; they change nothing here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from qdist.plan.dialects.reading import (
    Before,
    FileRules,
    cannot_write,
    known_dtype,
    line_of,
    note_of,
    refuse,
)
from qdist.plan.dtype_name import DtypeName, dtype_name
from qdist.plan.layer_index import LayerIndex
from qdist.plan.precision import PRECISIONS
from qdist.plan.rules import Rule
from qdist.threshold import registry as threshold_registry

LAYOUTS: dict[str, tuple[str, ...]] = {
    "3.33": (
        "op_id",
        "op_type",
        "dtype",
        "value_range_in_bits",
        "saturation",
        "per",
        "order",
    ),
    "sample": (
        "op_id",
        "op_type",
        "dtype",
        "variance",
        "cal_amount_percent",
        "value_range_in_bits",
        "saturation",
        "per",
    ),
    "manual": ("op_id", "type", "dtype", "value_range_in_bits", "per", "saturation"),
}
"""By name: that of version 3.33 and later, that of a public sample, that of the manual."""
METHODS = {
    # Icraft's own definition of KL has a name of its own where there is one.
    "kld": "kld" if "kld" in threshold_registry.METHODS else "kl",
    "ems": "mse",
    "null": "max",
}
"""Icraft's saturation methods in our words."""
_KLD = ("kl", "kld")
"""Methods that are written as ``kld``, and stay what they are where a file says so."""
_ICRAFT_METHODS = {"mse": "ems", "max": "null", **dict.fromkeys(_KLD, "kld")}
_FLOAT_QDTYPES = ("bf16", "fp16", "tf32")
_PASSED_ON = ("variance", "cal_amount_percent", "order")
_PAIRS = ("value_range_in_bits", "saturation", "per")
_REQUIRED = ("op_id", "dtype")
_KINDS = {
    "conv": "Conv",
    "deconv": "ConvTranspose",
    "convtranspose": "ConvTranspose",
    "batchnorm": "BatchNormalization",
    "layernorm": "LayerNormalization",
    "multiply": "Mul",
    "avgpool": "AveragePool",
    "swaporder": "Transpose",
    "pixelshuffle": "DepthToSpace",
    "upsample": "Resize",
    "pruneaxis": "Squeeze",
    "globalavgpool": "GlobalAveragePool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixRow:
    """One operator. ``bits``, ``saturation`` and ``per`` are pairs (parameters, output) or None for
    an empty cell; ``extra`` holds the columns that mean nothing to a plan. ``line`` counts from 1.
    """

    op_id: int
    op_type: str
    dtype: str
    bits: tuple[int, int] | None = None
    saturation: tuple[str, str] | None = None
    per: tuple[str, str] | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixTable:
    """A file: its columns in order, and its rows."""

    columns: tuple[str, ...]
    rows: tuple[MixRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator as Icraft numbers them: its ONNX type (``Input``, ``Output``), and the layer that
    it is, if it is one; or the layer whose values it moves, if it moves any."""

    op_type: str
    layer: str | None = None
    source: str | None = None


def recognises(name: str, text: str) -> bool:
    """Whether the file looks like one of this form."""
    header = text.lstrip("\ufeff").partition("\n")[0].replace(" ", "").lower()
    return header.startswith("op_id,") and "dtype" in header


def parse(text: str, file: str) -> MixTable:
    """The rows of a file. Raises QD506 for a dtype, QD508 for anything else, with the line."""
    reader = csv.reader(io.StringIO(text.lstrip("\ufeff"), newline=""), skipinitialspace=True)
    columns: tuple[str, ...] = ()
    rows: list[MixRow] = []
    seen: dict[int, int] = {}
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = line_of(file, reader.line_num)
            if not columns:
                columns = _columns(cells, where)
                continue
            row = _row(columns, cells, reader.line_num, where)
            if row.op_id in seen:
                raise refuse(where, f"op_id {row.op_id} again", f"once (line {seen[row.op_id]})")
            seen[row.op_id] = reader.line_num
            rows.append(row)
    except csv.Error as error:
        raise refuse(line_of(file, reader.line_num), str(error), "comma-separated cells") from error
    if not columns:
        raise refuse(file, "an empty file", f"a header such as {','.join(LAYOUTS['3.33'])}")
    return MixTable(columns=columns, rows=tuple(rows))


def render(table: MixTable) -> str:
    """The text of a file, with lines that end in ``\\n``."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        cells = {
            "op_id": str(row.op_id),
            "op_type": row.op_type,
            "type": row.op_type,
            "dtype": row.dtype,
            "value_range_in_bits": "" if row.bits is None else f"{row.bits[0]};{row.bits[1]}",
            "saturation": ";".join(row.saturation or ()),
            "per": ";".join(row.per or ()),
            **row.extra,
        }
        writer.writerow([cells.get(column, "") for column in table.columns])
    return out.getvalue()


def read(text: str, file: str, before: Before) -> FileRules:
    """The rules of a file for a model.

    Raises QD506 and QD508 as `parse` does, and QD508 for a row that does not fit the model's
    operators, or int8 beside a float default (which Icraft refuses).
    """
    table = parse(text, file)
    known = operators(before.index)
    rules: list[Rule] = []
    dtypes: dict[str, DtypeName] = {}
    for row in table.rows:
        where = line_of(file, row.line)
        operator = _checked(row, known, where)
        rules += _rules(row, operator, before, where)
        if operator.layer is not None:
            dtypes[operator.layer] = known_dtype(row.dtype, where)
    idle = _idle(dtypes, before.index)
    what = (
        f"{file}: the dtype of {len(idle)} rows means nothing, since their operators stay "
        "float or are computed with another:"
    )
    notes = [*note_of(what, idle)]
    missing = len(known) - len(table.rows)
    if missing:
        notes.append(f"{file}: {missing} of {len(known)} operators have no row, and keep defaults")
    return FileRules(rules=tuple(rules), notes=tuple(notes))


def template(before: Before, layout: str = "3.33") -> str:
    """A file that says what every layer has. Raises QD507 for a precision without an Icraft name,
    and for a bias that is split off, which Icraft's own search does and no column says.

    Where layers read one tensor with different threshold methods, the row of what makes it has the
    method of the first.
    """
    rows = (
        _template_row(i, operator, before) for i, operator in enumerate(operators(before.index))
    )
    return render(MixTable(columns=LAYOUTS[layout], rows=tuple(rows)))


def operators(index: LayerIndex) -> list[Operator]:
    """The operators of the model in Icraft's order: input, nodes, output."""
    if index.graph is None:
        nodes = [(layer.op_type, layer.name, layer.outputs) for layer in index.layers]
    else:
        proto = index.graph.proto.graph
        nodes = [(node.op_type, node.name, tuple(node.output)) for node in proto.node]
    inner = [
        Operator(op_type=op_type, layer=name)
        if name in index.by_name
        else Operator(op_type=op_type, source=next(iter(index.adjacency.makers(outputs[0])), None))
        for op_type, name, outputs in nodes
    ]
    return [Operator(op_type="Input"), *inner, Operator(op_type="Output")]


def _columns(cells: list[str], where: str) -> tuple[str, ...]:
    columns = tuple(cell.strip().lower() for cell in cells)
    known = {"op_id", "op_type", "type", "dtype", *_PAIRS, *_PASSED_ON}
    missing = [name for name in _REQUIRED if name not in columns]
    strange = [name for name in columns if name not in known]
    if missing or strange or len(set(columns)) < len(columns):
        got = ",".join(columns)
        if strange:
            got = f"a column {strange[0]!r}"
        elif missing:
            got = f"no column {missing[0]!r}"
        layouts = "; ".join(",".join(names) for names in LAYOUTS.values())
        raise refuse(where, got, f"one of the layouts {layouts}")
    return columns


def _row(columns: tuple[str, ...], cells: list[str], line: int, where: str) -> MixRow:
    if len(cells) != len(columns):
        raise refuse(where, f"{len(cells)} cells", f"{len(columns)}, as in the header")
    by_name = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
    op_id = by_name["op_id"]
    if not op_id.isdigit():
        raise refuse(where, f"op_id {op_id!r}", "a number from 0 on")
    known_dtype(by_name["dtype"], where)
    pair = partial(_pair, by_name, where)
    bits = pair("value_range_in_bits")
    saturation, per = pair("saturation"), pair("per")
    for value in bits or ():
        if not value.isdigit() or int(value) < 1:
            raise refuse(where, f"value_range_in_bits {value!r}", "a number of bits, as in 6;7")
    for value in saturation or ():
        if value not in METHODS:
            raise refuse(where, f"saturation {value!r}", f"one of {', '.join(METHODS)}")
    for value in per or ():
        if not re.fullmatch(r"tensor|channel|group=[1-9]\d*", value):
            raise refuse(where, f"per {value!r}", "tensor, channel or group=N")
    return MixRow(
        op_id=int(op_id),
        op_type=by_name.get("op_type", by_name.get("type", "")),
        dtype=by_name["dtype"],
        bits=None if bits is None else (int(bits[0]), int(bits[1])),
        saturation=saturation,
        per=per,
        extra={name: by_name[name] for name in _PASSED_ON if name in by_name},
        line=line,
    )


def _pair(cells: Mapping[str, str], where: str, name: str) -> tuple[str, str] | None:
    text = cells.get(name, "")
    if not text:
        return None
    parts = [part.strip() for part in text.split(";")]
    if len(parts) != 2 or not all(parts):
        raise refuse(where, f"{name} {text!r}", "two values, PARAMETERS;OUTPUT, such as 8;8")
    return parts[0], parts[1]


def _checked(row: MixRow, known: list[Operator], where: str) -> Operator:
    """The operator that a row is about. Raises QD508 where number and type do not go together."""
    if row.op_id >= len(known):
        raise refuse(
            where,
            f"op_id {row.op_id}",
            f"0 to {len(known) - 1}: the input, the {len(known) - 2} nodes in order, the output",
            "write a template for this model with qdist quantize --template icraft",
        )
    operator = known[row.op_id]
    if row.op_type and _kind(row.op_type) != _kind(operator.op_type):
        name = f" ({operator.layer})" if operator.layer else ""
        raise refuse(
            where,
            f"op_id {row.op_id} of type {row.op_type!r}",
            f"{operator.op_type}{name}, which has that number in this model",
            "write a template for this model with qdist quantize --template icraft",
        )
    return operator


def _kind(name: str) -> str:
    """Operator types of both worlds in one spelling."""
    short = re.sub(r"^icraft::xir::|Node$", "", name.strip()).lower()
    short = re.sub(r"(1d|2d|3d)$", "", short)
    return _KINDS.get(short, short).lower()


def _idle(dtypes: Mapping[str, DtypeName], index: LayerIndex) -> list[str]:
    """Layers whose row asks for what is decided elsewhere: by another row, or by the scope."""
    return [
        name
        for name, dtype in dtypes.items()
        if (name in index.fused and dtype is not dtypes.get(index.fused[name], dtype))
        or (name in index.left_out and name not in index.fused and not _is_kept(name, dtype, index))
    ]


def _is_kept(name: str, dtype: DtypeName, index: LayerIndex) -> bool:
    """Whether a layer that the scope leaves out can have a row of this type."""
    if dtype.precision not in PRECISIONS:
        return False
    return dtype is DtypeName.FP32 or index.can_have(index.by_name[name], dtype.precision)


def _rules(row: MixRow, operator: Operator, before: Before, where: str) -> list[Rule]:
    dtype = known_dtype(row.dtype, where)
    default = next(iter(before.choices.values()), None)
    if default is not None and default.precision in _FLOAT_QDTYPES and dtype is DtypeName.INT8:
        raise refuse(where, "int8", f"a float type, as quantization.precision={default.precision}")
    output = _output_settings(row, dtype, where)
    if operator.layer is None:
        graph = before.index.graph
        if operator.op_type != "Input" or graph is None:
            return []
        found = (before.input_rule(name, output, where, _KLD) for name in graph.input_names)
        return [rule for rules in found for rule in rules]
    index = before.index
    name = operator.layer
    if not index.is_choosable(index.by_name[name]):
        if dtype is not DtypeName.FP32 and name in index.left_out and _is_kept(name, dtype, index):
            # A floating-point type rounds every result, whatever the operator.
            return before.layer_rule(name, {"precision": dtype.precision}, where)
        # What it gives is the feature map that a layer after it reads.
        return before.output_rule(operator.layer, output, where, _KLD)
    settings: dict[str, object] = {"precision": dtype.precision}
    if dtype.is_integer:
        if row.saturation is not None:
            settings["weight_saturation"] = METHODS[row.saturation[0]]
        if row.per is not None and index.by_name[operator.layer].weights:
            settings["granularity"] = row.per[0]
        if row.bits is not None:
            settings["weight_range_bits"] = _bits(row.bits[0], dtype, where)
    return [
        *before.layer_rule(operator.layer, settings, where),
        *before.output_rule(operator.layer, output, where, _KLD),
    ]


def _bits(bits: int, dtype: DtypeName, where: str) -> int | None:
    """Bits in use; None for all that the type has."""
    if bits > dtype.bits:
        raise refuse(where, f"{bits} bits of range", f"at most {dtype.bits}, as {dtype} has")
    return None if bits == dtype.bits else bits


def _output_settings(row: MixRow, dtype: DtypeName, where: str) -> dict[str, object]:
    found: dict[str, object] = {}
    if dtype.is_integer:
        bits = None if row.bits is None else _bits(row.bits[1], dtype, where)
        if bits is not None:
            found["range_bits"] = bits
        if row.saturation is not None:
            found["saturation"] = METHODS[row.saturation[1]]
        if row.per is not None and row.per[1] != "tensor":
            found["granularity"] = row.per[1]
    return found


def _template_row(op_id: int, operator: Operator, before: Before) -> MixRow:
    index = before.index
    dtype, weight_method, granularity = DtypeName.FP32, "max", "tensor"
    used: int | None = None
    children: Iterable[str] = ()
    if operator.layer is not None:
        host = index.adjacency.host(operator.layer)
        children = index.adjacency.children[host]
        if host not in index.left_out:
            choice = before.choices[host]
            if choice.splits_bias:
                raise cannot_write(
                    "Icraft's csv", host, "split_bias", "the bias in the convolution"
                )
            dtype = _dtype(choice.precision, host)
            # Icraft has no word for a method's parameters.
            weight_method = (
                choice.weight_saturation if choice.weight_parameters else choice.weight_method
            )
            used = choice.weight_range_bits if dtype.is_integer else None
            granularity = choice.granularity if index.by_name[operator.layer].weights else "tensor"
    elif operator.source is not None and operator.source not in index.left_out:
        dtype = _dtype(before.choices[operator.source].precision, operator.source)
    elif operator.op_type == "Input" and index.graph is not None:
        children = [name for t in index.graph.input_names for name in before.readers(t)]
    method = before.method_after(children) or "max"
    for name in (weight_method, method):
        if name not in _ICRAFT_METHODS:
            raise cannot_write(
                "Icraft's csv",
                operator.layer or operator.op_type,
                f"threshold method {name}",
                ", ".join(METHODS.values()),
            )
    return MixRow(
        op_id=op_id,
        op_type=operator.op_type,
        dtype=dtype.value,
        bits=(used or dtype.bits, dtype.bits),
        saturation=(_ICRAFT_METHODS[weight_method], _ICRAFT_METHODS[method]),
        per=(granularity, "tensor"),
        extra={},
    )


def _dtype(precision: str, layer: str) -> DtypeName:
    found = dtype_name(precision)
    if found is None:
        raise cannot_write(
            "Icraft's csv", layer, f"precision {precision}", f"one of {', '.join(DtypeName)}"
        )
    return found
