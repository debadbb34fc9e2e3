"""Tables for the terminal.

They read well at 80 columns and in a file as well: numbers are never cut, long layer names lose
their middle. Names come from models and may hold anything, so nothing is parsed as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from qdist.errors import ArtifactError
from qdist.evaluate.compare import LayerComparison
from qdist.model.loading import load_model
from qdist.plan.difference import compare_plans, moved_text, range_text
from qdist.plan.plan import LayerPlan, QuantizationPlan
from qdist.plan.quantizer import Quantizer
from qdist.report import text
from qdist.report.cells import Name, add_fact, fact_table, plain_table
from qdist.report.values import Summary, TrialRow, UnseenRow
from qdist.stats.record import CalibrationRecord

_QUANTIZED_TYPES = {
    getattr(TensorProto, name): name.lower()
    for name in ("INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16")
}


def summary_table(summary: Summary) -> RenderableType:
    """What a run came to: scores, size, precisions, the worst layers, where everything is."""
    table = fact_table(summary.title)
    better = "higher" if summary.higher_is_better else "lower"
    samples = "" if summary.n_samples is None else f", {summary.n_samples} samples"
    add_fact(table, f"{summary.metric}, float", text.score_text(summary.float_score))
    quantized = text.score_text(summary.quantized_score)
    if summary.change is not None:
        difference = (summary.quantized_score or 0.0) - (summary.float_score or 0.0)
        quantized += f"  ({text.change_text(difference)}; {better} is better{samples})"
    add_fact(table, f"{summary.metric}, quantized", quantized)
    for name, value in summary.beside.items():
        add_fact(table, name, text.metric_text(name, value))
    size = text.size_text(summary.quantized_bytes)
    if summary.size_share is not None:
        size += f"  ({summary.size_share:.0%} of {text.size_text(summary.float_bytes)})"
    add_fact(table, "size", size)
    add_fact(table, "layers", text.counts_text(summary.precision_counts))
    add_fact(table, "quantized", summary.coverage)
    for i, layer in enumerate(summary.worst_layers):
        shown = f"{text.db_text(layer.in_place.sqnr_db)} dB  {layer.op_type}, {layer.precision}  "
        add_fact(table, "worst layers" if i == 0 else "", shown + layer.name)
    for label, place in summary.places:
        add_fact(table, label, place)
    add_fact(table, "time", text.duration_text(summary.seconds))
    return Group(table, *_notes(summary.notes))


def layer_table(comparisons: Sequence[LayerComparison], limit: int | None) -> RenderableType:
    """The first ``limit`` layers (None: all), in the order given: SQNR in dB, cosine."""
    table = plain_table(_share_title(len(comparisons), limit, "layers, the worst in place first"))
    table.add_column("layer")
    table.add_column("op", max_width=12)
    table.add_column("precision", no_wrap=True)
    for title in ("in place\nSQNR dB", "in place\ncosine", "alone\nSQNR dB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in comparisons[:limit]:
        table.add_row(
            Name(row.name),
            Name(row.op_type, "dim"),
            Text(row.precision),
            Text(text.db_text(row.in_place.sqnr_db)),
            Text(text.cosine_text(row.in_place.cosine)),
            Text(text.db_text(row.alone.sqnr_db)),
        )
    return table


def trial_table(rows: Sequence[TrialRow]) -> RenderableType:
    """Every trial: score, size, layers of each precision; the best is marked with a star."""
    table = plain_table(f"{len(rows)} trials")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("what")
    for title in ("score", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("layers")
    for row in rows:
        style = "bold green" if row.is_best else "dim" if row.score is None else ""
        what = f"{row.label} (baseline)" if row.is_baseline and row.number else row.label
        table.add_row(
            Text(f"{'* ' if row.is_best else ''}{row.number}", style),
            Text(what if row.score is not None else f"{what}: failed, {row.reason}", style),
            Text(text.score_text(row.score), style),
            Text(text.size_text(row.n_bytes) if row.n_bytes else text.UNKNOWN, style),
            Text(text.counts_text(row.counts), style),
        )
    return table


def unseen_table(rows: Sequence[UnseenRow], n_samples: int) -> RenderableType:
    """The front on samples that the search did not see: each trial's score, and how much better it
    is than the plain plan and the float model, with intervals. What counts is bold."""
    table = plain_table(f"{n_samples} samples that the search did not see")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("what")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("better than the plain plan", justify="right")
    table.add_column("than the float model", justify="right")
    table.caption = "intervals of 95 %, paired by sample; bold where a difference counts"
    for row in rows:
        style = "bold green" if row.is_best else ""
        table.add_row(
            Text(f"{'* ' if row.is_best else ''}{row.number}", style),
            Text(row.label, style),
            Text(text.score_text(row.score), style),
            Text(text.difference_text(row.over_plain), "bold" if row.sure_plain else ""),
            Text(text.difference_text(row.over_float), "bold" if row.sure_float else ""),
        )
    return table


def record_table(record: CalibrationRecord, limit: int | None = None) -> RenderableType:
    """The first ``limit`` tensors of a calibration (None: all). Bins: distinct ones that were hit.

    Raises nothing: a tensor without finite values has no extrema.
    """
    title = _share_title(len(record.tensors), limit, "tensors")
    table = plain_table(f"{title}, {record.n_samples} samples")
    table.add_column("tensor")
    for heading in ("values", "min", "max", "zeros", "NaN", "bins"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in record.tensors[:limit]:
        histogram = record.histogram(tensor)
        n, finite = histogram.n_values, histogram.minimum <= histogram.maximum
        nan = (
            f"{histogram.n_nan}"
            if not histogram.n_infinite
            else (f"{histogram.n_nan} + {histogram.n_infinite} inf")
        )
        table.add_row(
            Name(tensor),
            Text(str(n)),
            Text(text.number_text(histogram.minimum) if finite else text.UNKNOWN),
            Text(text.number_text(histogram.maximum) if finite else text.UNKNOWN),
            Text(text.share_text(histogram.n_zero / n if n else None)),
            Text(nan, "bold red" if nan != "0" else "dim"),
            Text(str(histogram.bins.size)),
        )
    return table


def plan_table(plan: QuantizationPlan, limit: int | None = None) -> RenderableType:
    """The first ``limit`` layers of a plan (None: all), a line for each quantized activation.

    Below a layer's name: its operator and how its weights are quantized. What stays float, and
    why, follows the table by reason, for all layers.
    """
    title = _share_title(len(plan.layers), limit, "layers")
    table = plain_table(f"{title} of plan {plan.digest[:12]}")
    table.caption = f"{text.counts_text(plan.counts())}; {plan.coverage()}"
    if plan.smoothing is not None:
        n, alpha = len(plan.smoothing.exponents), plan.smoothing.alpha
        table.caption += f"; {n} tensors smoothed with alpha {alpha:g}"
    table.add_column("layer")
    table.add_column("precision\nmethod", no_wrap=True)
    for heading in ("scale", "zero", "low", "high", "clipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in plan.layers[:limit]:
        lines: list[RenderableType] = [Name(layer.name)]
        lines += [Padding(Text(line, "dim"), (0, 0, 0, 2)) for line in _about(layer)]
        quantizers = [entry.quantizer for entry in layer.activations]
        precision = layer.choice.precision if layer.is_quantized else "float32"
        if layer.fused_with is not None:
            lines.append(Padding(Text("computed together with", "dim"), (0, 0, 0, 2)))
            lines.append(Padding(Name(layer.fused_with, "dim"), (0, 0, 0, 2)))
            precision = "as that"
        methods = dict.fromkeys(quantizer.method for quantizer in quantizers)
        table.add_row(
            Group(*lines),
            Text("\n".join([precision, *methods])),
            *(Text("\n".join(column)) for column in _columns(quantizers)),
        )
    return Group(table, *_left_float(plan.layers))


def plan_difference_table(
    a: QuantizationPlan, b: QuantizationPlan, limit: int | None = None
) -> RenderableType:
    """The layers that two plans treat differently (the first ``limit`` of them; None: all): what
    each has of what differs, and how far thresholds moved."""
    found = compare_plans(a, b)
    title = f"plan {a.digest[:12]} beside {b.digest[:12]}"
    if limit is not None and limit < len(found.layers):
        title = f"{_share_title(len(found.layers), limit, 'differing layers')}, {title}"
    table = plain_table(title)
    table.add_column("layer")
    for heading in ("what", "first plan", "second plan"):
        table.add_column(heading, overflow="fold")
    table.add_column("moved", justify="right", no_wrap=True)
    shown = set(found.layers[:limit])
    last = ""
    for change in found.changes:
        if change.layer not in shown:
            continue
        label: RenderableType = Name(change.layer) if change.layer != last else Text("")
        last = change.layer
        what: RenderableType = Text(change.what)
        if change.tensor:
            what = Group(what, Padding(Name(change.tensor, "dim"), (0, 0, 0, 2)))
        moved = "" if change.moved is None else moved_text(change.moved)
        table.add_row(label, what, Text(change.before), Text(change.after), Text(moved))
    lines = [f"{len(found.layers)} of {found.n_layers} layers differ", found.summary()]
    if not found.same_model:
        lines.append(f"they are for two models: {a.model_digest[:12]} and {b.model_digest[:12]}")
    if not found.same_statistics:
        lines.append("their ranges come from two calibrations")
    return Group(*([table] if found.layers else []), *(Text(line) for line in lines if line))


def artifact_table(path: Path) -> RenderableType:
    """Facts of an ONNX file, read without its weights.

    Raises `ArtifactError` QD604 when there is no such file, `ModelError` QD202 to QD204.
    """
    if not path.is_file():
        raise ArtifactError(
            "QD604",
            where=str(path),
            got="a folder" if path.is_dir() else "nothing there",
            expected="an ONNX file",
            mend="give the path of the .onnx file that qdist quantize, tune or emit wrote",
        )
    model = load_model(path)
    proto = model.proto()
    ops = Counter(node.op_type for node in proto.graph.node)
    domains = sorted((e.domain or "ai.onnx", e.version) for e in proto.opset_import)
    digests = [entry.value for entry in proto.metadata_props if entry.key == "qdist.plan"]
    weights = _quantized_weights(proto)
    table = fact_table(path.name)
    add_fact(table, "file", str(path))
    add_fact(table, "size", f"{text.size_text(model.n_bytes)} ({model.n_bytes} bytes)")
    add_fact(table, "opset", ", ".join(f"{domain} {version}" for domain, version in domains))
    add_fact(table, "inputs", ", ".join(value.name for value in proto.graph.input))
    add_fact(table, "outputs", ", ".join(value.name for value in proto.graph.output))
    add_fact(table, "nodes", f"{len(proto.graph.node)}: {_tally(ops)}")
    add_fact(table, "Q/DQ pairs", str(_n_pairs(proto)))
    add_fact(table, "quantized weights", _tally(weights) if weights else "none")
    add_fact(table, "plan", digests[0] if digests else "none: not written by qdist")
    return table


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [Padding(Text(f"note: {note}", "yellow"), (0, 0, 0, 1)) for note in notes]


def _share_title(n: int, limit: int | None, what: str) -> str:
    return f"{n} {what}" if limit is None or limit >= n else f"{limit} of {n} {what}"


def _about(layer: LayerPlan) -> list[str]:
    """Below a layer's name: operator, weights, and where the choice comes from."""
    lines = [layer.op_type]
    for entry in layer.weights:
        quantizer = entry.quantizer
        lines.append(f"weights {quantizer.dtype} {quantizer.grain}, {quantizer.method}")
    if layer.bias_add is not None:
        result, bias = (entry.quantizer for entry in layer.bias_add.entries)
        lines.append(f"bias {bias.dtype} added apart, {bias.method}")
        lines.append(f"before it {result.dtype}, {range_text(result)}")
    if layer.why and layer.why != "default":
        lines.append(layer.why)
    ruled = (entry for entry in (*layer.activations, *layer.weights) if entry.provenance.rule)
    return [*lines, *(f"{entry.tensor}: {entry.provenance.rule}" for entry in ruled)]


def _columns(quantizers: Sequence[Quantizer]) -> list[list[str]]:
    """Scale, zero point, low, high, clipped share: a line for each activation."""
    columns: list[list[str]] = [[], [], [], [], []]
    for quantizer in quantizers:
        one = quantizer.axis is None
        clipped = quantizer.clipped_share
        cells = (
            text.number_text(quantizer.scales[0]) if one else f"{len(quantizer.scales)} scales",
            str(quantizer.zero_points[0]) if one else "",
            text.number_text(quantizer.bounds[0]),
            text.number_text(quantizer.bounds[1]),
            text.share_text(clipped),
        )
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    return columns


def _left_float(layers: Iterable[LayerPlan]) -> list[RenderableType]:
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.fused_with is not None:
            continue
        for tensor, reason in layer.left_float.items():
            where = f"{layer.name} ({tensor})" if layer.is_quantized else layer.name
            held = reasons.setdefault(reason, [])
            held += [where] if where not in held else []
    lines = [f"{reason}: {text.listing(names, 3)}" for reason, names in reasons.items()]
    if not lines:
        return []
    return [Text("\nWhat stays float, and why:"), *(Text(f"- {line}") for line in lines)]


def _n_pairs(proto: onnx.ModelProto) -> int:
    """QuantizeLinear nodes whose output a DequantizeLinear reads."""
    read = {n.input[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    return sum(
        node.op_type == "QuantizeLinear" and node.output[0] in read for node in proto.graph.node
    )


def _quantized_weights(proto: onnx.ModelProto) -> Counter[str]:
    """Initializers that a DequantizeLinear reads, by element type."""
    read = {n.input[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    return Counter(
        _QUANTIZED_TYPES.get(tensor.data_type, TensorProto.DataType.Name(tensor.data_type).lower())
        for tensor in proto.graph.initializer
        if tensor.name in read
    )


def _tally(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.most_common())
