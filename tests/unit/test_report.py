"""Tables, charts and the page: what they say, and that nothing a model names can break them."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console, RenderableType

from qdist.emit.qdq import emit_qdq
from qdist.errors import ArtifactError, ModelError
from qdist.evaluate.compare import Deviation, LayerComparison
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan
from qdist.plan.planner import Planner
from qdist.plan.target import ProjectedPlan
from qdist.report import charts, tables, text
from qdist.report.page import render_page, write_page
from qdist.report.values import Summary, TrialRow
from qdist.stats.record import CalibrationRecord
from tests.onnx_models import (
    ANY_TARGET,
    frozen_from,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)

NASTY = '<script>alert("x")</script>[bold]&\'"'


def deviation(sqnr_db: float) -> Deviation:
    relative = 0.0 if sqnr_db == math.inf else 10 ** (-sqnr_db / 20)
    return Deviation(
        cosine=max(-1.0, 1 - relative**2 / 2),
        relative_l2=relative,
        mse=relative,
        mae=relative,
        sqnr_db=sqnr_db,
    )


def layer(name: str, in_place: float, alone: float = 40.0) -> LayerComparison:
    return LayerComparison(
        name=name,
        op_type="MatMul",
        precision="int8",
        tensor=f"{name}_output",
        alone=deviation(alone),
        in_place=deviation(in_place),
    )


def summary(**changes: object) -> Summary:
    base = Summary(
        title="a run",
        model="net",
        float_score=0.9,
        quantized_score=0.88,
        metric="top1",
        higher_is_better=True,
        n_samples=600,
        float_bytes=4_000_000,
        quantized_bytes=1_040_000,
        precision_counts={"float32": 2, "int8": 6},
        coverage="5 of 6 matmul- and conv-like layers, 9 activations",
        beside={"agreement": 0.9955, "sqnr_db": math.inf, "cosine": 0.99991},
        worst_layers=(layer("head", 12.5),),
        places=(("artifact", "out/model.onnx"), ("plan", "my plan.json")),
        notes=("one layer keeps a float input",),
        seconds=61.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def trial(
    number: int, score: float | None, n_bytes: int = 1_000_000, **changes: object
) -> TrialRow:
    row = TrialRow(
        number=number,
        label=f"try {number}",
        score=score,
        metrics={} if score is None else {"top1": score},
        n_bytes=n_bytes if score is not None else 0,
        counts={"int8": 8},
        changed=(),
        status="failed" if score is None else "ok",
        reason="it broke" if score is None else "",
        seconds=1.5,
        is_best=False,
        is_baseline=number == 0,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def printed(renderable: RenderableType, width: int = 80) -> str:
    """What a pipe gets."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in output.splitlines())
    return "\n".join(line.rstrip() for line in output.splitlines()) + "\n"


def head_in_4_bits(planner: Planner) -> ProjectedPlan:
    chosen = {
        layer.name: LayerChoice(precision="w4a8" if layer.name == "[red]head" else "int8")
        for layer in planner.layers
    }
    return ANY_TARGET.project(planner.plan(chosen))


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], "a/very/long/name/of/a/layer/MatMul"),
        onnx.helper.make_node("Add", ["h", "b"], ["s"], "bias"),
        onnx.helper.make_node("Relu", ["s"], ["r"], "relu"),
        onnx.helper.make_node("MatMul", ["r", "v"], ["y"], "[red]head"),
        onnx.helper.make_node("Exp", ["y"], ["z"], "exponential"),
    ]
    constants = {"w": normal(8, 16), "b": normal(16, seed=2), "v": normal(16, 4, seed=3)}
    proto = model(nodes, [value("x", ["n", 8])], [value("z", ["n", 4])], constants)
    return planner_for(frozen_from(proto, tmp_path / "m.onnx"), samples_of("x", 8), tmp_path / "s")


class TestText:
    def test_shortening_keeps_both_ends_and_the_width(self) -> None:
        name = "/blocks.0/attention/MatMul_1"
        for width in range(1, len(name)):
            shown = text.shorten(name, width)
            assert len(shown) == width
            assert text.ELLIPSIS in shown
        assert text.shorten(name, 13) == "/block…tMul_1"
        assert text.shorten(name, len(name)) == name

    @pytest.mark.parametrize(
        ("n_bytes", "shown"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (230_415, "230 kB"),
            (999_600, "1.00 MB"),
            (12_345_678, "12.3 MB"),
            (7_000_000_000, "7.00 GB"),
            (5 * 10**15, "5000 TB"),
        ],
    )
    def test_sizes(self, n_bytes: int, shown: str) -> None:
        assert text.size_text(n_bytes) == shown

    @pytest.mark.parametrize(
        ("seconds", "shown"),
        [
            (0.0, "0.00 s"),
            (9.994, "9.99 s"),
            (59.9, "59.9 s"),
            (59.99, "1 min 00 s"),
            (3599.6, "1 h 00 min"),
            (7805, "2 h 10 min"),
        ],
    )
    def test_durations(self, seconds: float, shown: str) -> None:
        assert text.duration_text(seconds) == shown

    def test_scores_and_their_changes(self) -> None:
        assert text.score_text(None) == text.UNKNOWN
        assert text.score_text(0.98611) == "0.9861"
        assert text.score_text(23.456789) == "23.457"
        assert text.score_text(0.00001234) == "1.234e-05"
        assert text.change_text(-0.005) == f"{text.MINUS}0.0050"
        assert text.change_text(0.25) == "+0.2500"
        assert text.change_text(0.0) == "±0"

    def test_a_share_that_is_not_zero_never_reads_as_zero(self) -> None:
        assert text.share_text(0.0) == "0.00 %"
        assert text.share_text(1e-7) == "<0.01 %"
        assert text.share_text(5e-5) == "0.01 %"

    def test_metrics_have_their_units(self) -> None:
        assert text.metric_text("sqnr_db", 24.314) == "24.31 dB"
        assert text.metric_text("sqnr_db", math.inf) == "exact"
        assert text.metric_text("agreement", 0.9955) == "99.55 %"
        assert text.metric_text("cosine", 0.999912) == "0.99991"
        assert text.metric_text("perplexity", 17.5) == "17.5"

    def test_precisions_run_from_narrow_to_float_and_none_is_lost(self) -> None:
        counts = {"float32": 1, "int8": 3, "w4a8": 2, "int16": 0, "fp8": 4}
        assert text.counts_text(counts) == "2 w4a8, 3 int8, 1 float32, 4 fp8"


class TestValues:
    def test_change_is_positive_for_the_better_in_both_directions(self) -> None:
        assert summary().change == pytest.approx(-0.02)
        assert summary(higher_is_better=False).change == pytest.approx(0.02)
        assert summary(float_score=None).change is None

    def test_contradictions_are_refused(self) -> None:
        with pytest.raises(ValueError, match="status"):
            trial(1, 0.5, status="odd")
        with pytest.raises(ValueError, match="failed with score"):
            trial(1, 0.5, status="failed")
        with pytest.raises(ValueError, match="best"):
            trial(1, None, is_best=True)
        with pytest.raises(ValueError, match="seconds"):
            summary(seconds=-1.0)


class TestTables:
    def test_layers_fit_80_columns_and_keep_every_number(self) -> None:
        name = "/model/decoder/layers.11/self_attention/query_key_value/MatMul"
        rows = [layer(name, -123.45, math.inf), replace(layer("b", 9.5), op_type="G" * 40)]
        shown = printed(tables.layer_table(rows, None))
        for number in ("-123.45", "exact", "9.50", "40.00"):
            assert number in shown.split()
        assert re.search(r"/model/\S*…\S*MatMul", shown)
        assert name in printed(tables.layer_table(rows, None), width=200)

    def test_layers_beyond_the_limit_are_counted(self) -> None:
        shown = printed(tables.layer_table([layer(f"l{i}", float(i)) for i in range(5)], 2))
        assert "2 of 5 layers" in shown
        assert "l1" in shown
        assert "l2" not in shown

    def test_summary_says_everything(self) -> None:
        shown = printed(tables.summary_table(summary()))
        for part in (
            "0.9000",
            "0.8800",
            f"{text.MINUS}0.0200",
            "600 samples",
            "1.04 MB",
            "26% of 4.00 MB",
        ):
            assert part in shown
        for part in ("6 int8, 2 float32", "5 of 6", "99.55 %", "12.50 dB", "my plan.json"):
            assert part in shown
        assert "note: one layer keeps a float input" in shown
        assert "1 min 01 s" in shown

    def test_summary_without_scores_has_no_change(self) -> None:
        shown = printed(tables.summary_table(summary(quantized_score=None, n_samples=None)))
        assert "is better" not in shown

    def test_trials_mark_the_best_and_say_why_others_failed(self) -> None:
        rows = [trial(0, 0.5), trial(1, 0.75, is_best=True), trial(2, None, label=NASTY)]
        shown = printed(tables.trial_table(rows))
        assert re.search(r"\* 1\s+try 1\s+0.7500\s+1.00 MB", shown)
        wide = printed(tables.trial_table(rows), width=200)
        assert f"{NASTY}: failed, it broke" in wide
        assert "failed," in shown

    def test_record_counts_zeros_and_nan(self) -> None:
        table = np.zeros(1 << 16, np.uint64)
        table[[0, 0x3F80, 0x7FC0]] = [1, 2, 1]  # a zero, two ones, a NaN
        extrema = np.array([[0.0, 1.0], [np.inf, -np.inf]], np.float32)
        record = CalibrationRecord.from_dense(
            ["seen", "never"], [table, np.zeros(1 << 16, np.uint64)], extrema, 4
        )
        lines = printed(tables.record_table(record)).splitlines()
        (seen,) = (line.split() for line in lines if "seen" in line)
        (never,) = (line.split() for line in lines if "never" in line)
        assert seen == ["seen", "4", "0", "1", "25.00", "%", "1", "3"]
        assert never == ["never", "0", text.UNKNOWN, text.UNKNOWN, text.UNKNOWN, "0", "0"]
        assert "1 of 2 tensors, 4 samples" in printed(tables.record_table(record, 1))

    def test_plan_shows_numbers_fusion_and_reasons(self, planner: Planner) -> None:
        plan = projected(planner).plan
        shown = printed(tables.plan_table(plan))
        quantized = next(entry for entry in plan.layers if entry.activations)
        q = quantized.activations[0].quantizer
        assert f"{q.scales[0]:.4g}" in shown
        assert f"{q.bounds[0]:.4g}" in shown
        assert f"{q.zero_points[0]}" in shown.split()
        assert "weights int8 x 16, max" in shown
        assert "[red]head" in shown
        assert re.search(r"bias\s+as that", shown)
        assert "- Exp has no integer form: exponential" in shown
        assert f"1 of {len(plan.layers)} layers" in printed(tables.plan_table(plan, 1))

    def test_plans_differ_where_a_choice_or_a_number_does(self, planner: Planner) -> None:
        a = projected(planner).plan
        b = head_in_4_bits(planner).plan
        shown = printed(tables.plan_difference_table(a, b))
        assert re.search(r"\[red\]head\s+precision\s+int8\s+w4a8", shown)
        assert f"1 of {len(a.layers)} layers differ" in shown
        same = printed(tables.plan_difference_table(a, a))
        assert same.strip() == f"0 of {len(a.layers)} layers differ"
        moved = replace(a, layers=tuple(_scaled(entry) for entry in a.layers))
        shown = printed(tables.plan_difference_table(a, moved))
        assert "threshold" in shown
        assert re.search(r"thresholds moved, by [\d.e-]+ % in the median", shown)
        fewer = QuantizationPlan(model_digest="0" * 64, statistics_digest="1" * 64, layers=())
        shown = printed(tables.plan_difference_table(a, fewer))
        assert "absent" in shown
        assert "two models" in shown
        assert "two calibrations" in shown

    def test_artifact_counts_pairs_and_integer_weights(
        self, planner: Planner, tmp_path: Path
    ) -> None:
        plan = head_in_4_bits(planner)
        artifact = emit_qdq(planner.graph.model, plan, tmp_path / "a.onnx")
        proto = onnx.load(artifact.path)
        n_pairs = sum(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        shown = printed(tables.artifact_table(artifact.path), width=120)
        assert re.search(rf"Q/DQ pairs\s+{n_pairs}\n", shown)
        assert re.search(r"quantized weights\s+1 int8, 1 int4", shown)
        assert plan.plan.digest in shown
        assert f"ai.onnx {artifact.opset}" in shown
        assert str(artifact.n_bytes) in shown

    def test_a_float_model_has_no_pairs_and_no_plan(self, planner: Planner) -> None:
        shown = printed(tables.artifact_table(planner.graph.model.source), width=120)
        assert re.search(r"Q/DQ pairs\s+0\n", shown)
        assert "not written by qdist" in shown

    def test_what_is_no_artifact_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="QD604"):
            tables.artifact_table(tmp_path / "none.onnx")
        (tmp_path / "text.onnx").write_text("not a model")
        with pytest.raises(ModelError, match="QD202"):
            tables.artifact_table(tmp_path / "text.onnx")


def _scaled(entry: LayerPlan) -> LayerPlan:
    """The layer with slightly other scales and the same choice."""
    changed = tuple(
        replace(one, quantizer=replace(one.quantizer, scales=(one.quantizer.scales[0] * 1.0001,)))
        for one in entry.activations
    )
    return replace(entry, activations=changed)


class TestCharts:
    @pytest.mark.parametrize(
        "values",
        [[], [0.5], [0.0], [0.9851, 0.9853], [-3.0, 120.0], [1e-9, 1e9], [math.inf, -math.inf]],
    )
    def test_an_axis_covers_its_values_with_round_ticks(self, values: list[float]) -> None:
        axis = charts.make_axis(values, 10, 110)
        assert axis.low < axis.high
        for v in values:
            assert 10 <= axis.at(v) <= 110
            assert axis.low <= v <= axis.high or math.isinf(v)
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 12
        assert len({tick.label for tick in ticks}) == len(ticks)
        assert ticks == sorted(ticks, key=lambda tick: tick.at)

    def test_bars_are_as_long_as_their_values_from_zero(self) -> None:
        chart = charts.layer_chart([layer("a", -10.0, 20.0), layer("b", 30.0, math.inf)])
        a, b = chart.bars
        assert a.in_place[0] + a.in_place[1] == pytest.approx(chart.zero)
        assert b.in_place[0] == a.alone[0] == chart.zero
        assert b.in_place[1] == pytest.approx(1.5 * a.alone[1], abs=0.2)
        assert b.alone[0] + b.alone[1] == pytest.approx(880)
        assert b.alone_text == "exact"

    def test_only_the_worst_are_drawn(self) -> None:
        chart = charts.layer_chart([layer(f"l{i}", 100.0 - i) for i in range(50)])
        assert [bar.name for bar in chart.bars] == [f"l{i}" for i in range(49, 19, -1)]

    def test_the_best_so_far_follows_the_metric(self) -> None:
        rows = [trial(0, 3.0), trial(1, 5.0), trial(2, None), trial(3, 2.0)]
        for higher, best_at in ((True, 1), (False, 3)):
            marked = [replace(row, is_best=row.number == best_at) for row in rows]
            chart = charts.progress_chart(summary(higher_is_better=higher, float_score=4), marked)
            best = next(mark for mark in chart.marks if mark.kind == "best")
            assert float(chart.steps.rsplit("V", 1)[1]) == best.y
            failed = next(mark for mark in chart.marks if mark.kind == "failed")
            assert failed.y == chart.bottom
            assert chart.marks[-1] is best
            assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3"]

    def test_sizes_leave_failed_trials_out(self) -> None:
        rows = [trial(0, 0.5, is_best=True), trial(1, None), trial(2, 0.4, 2_000_000)]
        chart = charts.size_chart(summary(), rows)
        assert [mark.kind for mark in chart.marks] == ["other", "both"]
        assert chart.x_title == "artifact size, MB"
        assert chart.marks[0].x > chart.marks[1].x
        assert chart.marks[0].y > chart.marks[1].y


class _Collector(HTMLParser):
    """Elements, and the text of table cells and of titles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "srcset", "action")]
        if tag == "td":
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def parsed(page: str) -> _Collector:
    collector = _Collector()
    collector.feed(page)
    return collector


class TestPage:
    def test_holds_numbers_layers_and_trials(self, tmp_path: Path) -> None:
        rows = [trial(0, 0.88), trial(1, 0.91, is_best=True), trial(2, None)]
        layers = [layer("good", 33.0), layer("bad", 7.25)]
        path = write_page(tmp_path / "out" / "report.html", summary(), layers, rows)
        assert [p.name for p in path.parent.iterdir()] == ["report.html"]
        page = path.read_text("utf-8")
        found = parsed(page)
        for part in ("0.8800", f"{text.MINUS}0.0200", "26.0% of 4.00 MB", "99.55 %", "it broke"):
            assert part in page
        assert found.cells.index("bad") < found.cells.index("good")
        assert found.tags.count("svg") == 3
        assert "qdist show &#39;my plan.json&#39;" in page

    def test_a_failed_trial_says_how_its_evaluation_went(self) -> None:
        run = EvaluationRun(exit_status=3, seconds=61.0, output_tail=f"loading\n{NASTY}")
        late = EvaluationRun(exit_status=None, seconds=2.5)
        rows = [
            trial(0, 0.5, is_best=True, evaluation=replace(run, exit_status=0)),
            trial(1, None, evaluation=run),
            trial(2, None, evaluation=late),
            trial(3, None),
        ]
        page = render_page(summary(), [], rows)
        assert "<script>alert" not in page
        failed = [cell for cell in parsed(page).cells if "failed" in cell]
        said = [" ".join(cell.split()) for cell in failed]
        assert said == [
            "try 1failedit brokeevaluation: exit status 3, 1 min 01 s the end of its output"
            f"loading {NASTY}",
            "try 2failedit brokeevaluation: 2.50 s",
            "try 3failedit broke",
        ]

    def test_needs_nothing_from_anywhere(self) -> None:
        page = render_page(summary(), [layer("a", 3.0)], [trial(0, 0.5, is_best=True)])
        found = parsed(page)
        assert found.links == ["data:,"]
        assert not {"link", "img", "iframe"} & (set(found.tags) - {"link"})
        assert found.tags.count("link") == 1
        assert not re.search(r"@import|url\(|fetch\(|https?://", page)
        assert "default-src 'none'" in page

    def test_escapes_every_text(self) -> None:
        page = render_page(
            summary(
                title=NASTY,
                model=NASTY,
                metric=NASTY,
                coverage=NASTY,
                notes=(NASTY,),
                places=((NASTY, "javascript:alert(1)"), ("plan", NASTY), ("artifact", NASTY)),
                precision_counts={NASTY: 3},
                beside={NASTY: 1.0},
            ),
            [replace(layer(NASTY, 3.0), op_type=NASTY, precision=NASTY)],
            [trial(0, None, label=NASTY, reason=NASTY), trial(1, 0.5, changed=(NASTY,))],
        )
        assert "<script>alert" not in page
        found = parsed(page)
        assert found.tags.count("script") == 1
        assert "javascript:" not in "".join(found.links)
        assert NASTY in found.cells

    def test_only_web_addresses_become_links(self) -> None:
        page = render_page(summary(places=(("dashboard", "http://127.0.0.1:5000/#/x"),)), [])
        assert parsed(page).links == ["data:,", "http://127.0.0.1:5000/#/x"]

    def test_leaves_out_what_there_is_none_of(self) -> None:
        bare = summary(notes=(), places=(), beside={}, float_score=None, quantized_score=None)
        page = render_page(bare, [])
        found = parsed(page)
        assert "svg" not in found.tags
        assert "table" not in found.tags
        assert "Worth knowing" not in page

    def test_charts_are_well_formed(self) -> None:
        layers = [layer(NASTY, -math.inf, math.inf), layer("b", 3.0)]
        rows = [trial(0, 0.5, is_best=True), trial(1, None, reason=NASTY)]
        page = render_page(summary(), layers, rows)
        drawings = re.findall(r"<svg.*?</svg>", page, re.S)
        assert len(drawings) == 3
        for drawing in drawings:
            numbers = [
                float(v)
                for element in ElementTree.fromstring(drawing).iter()
                for k, v in element.attrib.items()
                if k in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")
            ]
            assert numbers
            assert all(map(math.isfinite, numbers))

    def test_equal_input_gives_equal_pages(self) -> None:
        arguments = (summary(), [layer("a", 3.0)], [trial(0, 0.5, is_best=True)])
        assert render_page(*arguments) == render_page(*arguments)

    def test_a_page_is_whole_or_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match="QD603"):
            write_page(tmp_path / "file" / "report.html", summary(), [])
