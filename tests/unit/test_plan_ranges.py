"""Rules about ranges as they reach a plan: factors, fixed ranges, methods, bits carried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects import glow_profile
from qdist.plan.dialects.forms import read_file
from qdist.plan.dialects.reading import Before
from qdist.plan.difference import compare_plans
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput, load_plan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.rules import Rule, apply_rules
from tests.onnx_models import (
    ANY_TARGET,
    frozen_from,
    integers,
    model,
    planner_for,
    samples_of,
    value,
)
from tests.vendor_models import block_model


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    folder = tmp_path_factory.mktemp("ranges")
    frozen = frozen_from(block_model(), folder / "block.onnx")
    return planner_for(frozen, samples_of("x", 3, 4, 4, n=8), folder / "store")


def planned(planner: Planner, *rules: Rule, choice: LayerChoice | None = None) -> QuantizationPlan:
    found = apply_rules(planner.index, choice or LayerChoice(saturation="max"), rules)
    ruled = planner.with_rules(found.tensors)
    ruled.check_rules(rules)
    return ruled.plan(found.choices, found.why)


def layer(plan: QuantizationPlan, name: str) -> LayerPlan:
    return next(entry for entry in plan.layers if entry.name == name)


def read_by(plan: QuantizationPlan, name: str) -> QuantizedInput:
    return layer(plan, name).activations[0]


def rule(match: str, **settings: Any) -> Rule:
    return Rule(match=match, settings=settings, origin="f.csv line 2")


def test_a_factor_scales_what_is_found(planner: Planner) -> None:
    plain = read_by(planned(planner), "block/conv1").quantizer
    found = planned(planner, rule("output:stem", th_scale=0.5))
    entry = read_by(found, "block/conv1")
    assert entry.quantizer.bounds == (0.5 * plain.bounds[0], 0.5 * plain.bounds[1])
    assert entry.quantizer.method == "max"
    assert entry.quantizer.clipped_share is not None
    assert entry.quantizer.clipped_share > 0
    assert entry.provenance.rule == "rule output:stem (f.csv line 2)"
    # Whichever layer reads the tensor: the sum does too.
    assert layer(found, "block/sum").activations[0].quantizer == entry.quantizer
    by_layer = read_by(planned(planner, rule("block/conv1", th_scale=0.5)), "block/conv1")
    assert by_layer.quantizer == entry.quantizer
    assert by_layer.provenance.rule == ""


def test_a_fixed_threshold_takes_the_place_of_what_is_found(planner: Planner) -> None:
    # Behind a ReLU there is nothing below zero to bound.
    found = planned(planner, rule("output:stem", threshold=(3.0,), th_scale=0.5))
    quantizer = read_by(found, "block/conv1").quantizer
    assert (quantizer.bounds, quantizer.method) == ((0.0, 3.0), "fixed")
    assert quantizer.scales == (3.0 / 255,)
    assert quantizer.expected_mse is not None
    both = read_by(planned(planner, rule("tensor:x", threshold=(2.0,))), "stem").quantizer
    assert both.bounds == (-2.0, 2.0)
    assert found.notes == ()
    given = read_by(planned(planner, rule("tensor:x", bounds=(-1.0, 3.0))), "stem").quantizer
    assert given.bounds == (-1.0, 3.0)
    by_layer = read_by(planned(planner, rule("stem", threshold=2.0)), "stem").quantizer
    assert by_layer == both


def test_a_tensor_goes_before_the_layer_that_reads_it(planner: Planner) -> None:
    choice = LayerChoice(saturation="max", threshold=9.0)
    found = planned(planner, rule("tensor:x", saturation="mse"), choice=choice)
    assert read_by(found, "stem").quantizer.method == "mse"
    assert read_by(found, "block/conv1").quantizer.bounds == (0.0, 9.0)


def test_a_view_shares_the_range_of_its_source(planner: Planner) -> None:
    found = planned(planner, rule("output:cat", bounds=(-1.0, 1.0)))
    assert read_by(found, "norm").tensor == "flat"
    assert read_by(found, "norm").quantizer.bounds == (-1.0, 1.0)


def test_parts_of_a_tensor_have_its_rules(tmp_path: Path) -> None:
    node = helper.make_node
    proto = model(
        [
            node("Relu", ["x"], ["r"], name="relu"),
            node("Split", ["r", "sizes"], ["a", "b"], name="split", axis=1),
            node("Transpose", ["b"], ["c"], name="turn", perm=[0, 1]),
            node("Add", ["a", "c"], ["y"], name="sum"),
        ],
        [value("x", ["n", 4])],
        [value("y", ["n", 2])],
        {"sizes": integers([2, 2])},
    )
    frozen = frozen_from(proto, tmp_path / "m.onnx")
    split = planner_for(frozen, samples_of("x", 4), tmp_path / "store")
    assert split.index.moved_from("c") == ("b", "r")
    found = planned(
        split, rule("output:relu", bounds=(0.0, 7.0)), rule("tensor:c", threshold=(5.0,))
    )
    a, c = layer(found, "sum").activations
    assert (a.quantizer.bounds, a.provenance.rule) == (
        (0.0, 7.0),
        "rule output:relu (f.csv line 2)",
    )
    assert c.quantizer.bounds == (0.0, 5.0)


def test_a_tensor_is_carried_in_the_bits_that_a_rule_says(planner: Planner) -> None:
    wide = LayerChoice(saturation="max", precision="int16")
    found = planned(planner, rule("output:cat", most_bits=8), choice=wide)
    assert read_by(found, "norm").quantizer.bits == 8
    assert read_by(found, "head").quantizer.bits == 16
    assert ANY_TARGET.project(found).plan.digest


def test_saturation_points_of_weights_are_fixed_per_channel(planner: Planner) -> None:
    points = (1.5, 1.6, 1.7, 1.8)
    (weight,) = layer(planned(planner, rule("tensor:w0", threshold=points)), "stem").weights
    assert weight.quantizer.scales == tuple(p / 127 for p in points)
    assert (weight.quantizer.method, weight.quantizer.bounds) == ("fixed", (-1.8, 1.8))
    assert weight.provenance.statistics is None
    (plain,) = layer(planned(planner), "stem").weights
    (half,) = layer(planned(planner, rule("tensor:w0", th_scale=0.5)), "stem").weights
    np.testing.assert_allclose(half.quantizer.scales, np.multiply(plain.quantizer.scales, 0.5))
    with pytest.raises(PlanError, match=r"QD507.*weight w0.*2 thresholds.*1 or 4"):
        planned(planner, rule("tensor:w0", threshold=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"granularity": "block=4"}, "granularity block=4"),
        ({"threshold": (1.0, 2.0)}, "2 thresholds for an activation"),
    ],
)
def test_what_plans_have_no_place_for_is_refused_with_the_rule(
    planner: Planner, settings: dict[str, Any], got: str
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(planner, rule("tensor:x", **settings))
    assert caught.value.code == "QD507"
    assert caught.value.where == "tensor x (rule tensor:x (f.csv line 2))"
    assert got in caught.value.got


def test_a_tensor_may_use_fewer_bits_and_have_several_scales(planner: Planner) -> None:
    plan = planned(planner, rule("tensor:x", range_bits=7, granularity="group=2"))
    found = {e.tensor: e.quantizer for layer in plan.layers for e in layer.activations}["x"]
    assert (found.bits, found.high) == (8, 63)
    assert found.axis is not None
    assert len(set(found.scales)) == 2
    wide = LayerChoice(precision="int16", activation_range_bits=12)
    plan = planned(planner, rule("output:cat", most_bits=8), choice=wide)
    narrow = read_by(plan, "norm").quantizer
    assert (narrow.bits, narrow.high) == (8, 127)
    assert read_by(plan, "head").quantizer.high == 2047
    with pytest.raises(PlanError, match=r"QD507.*7 of 8 bits of one weight"):
        planned(planner, rule("tensor:w0", range_bits=7))


def test_a_rule_for_a_tensor_that_nothing_reads_is_an_error(planner: Planner) -> None:
    for match in ("tensor:c0", "output:prob"):
        with pytest.raises(PlanError, match=r"QD503.*no effect on the 1 tensors") as caught:
            planned(planner, rule(match, th_scale=0.5))
        assert "f.csv line 2" in caught.value.where


def test_provenance_names_the_statistics_of_each_tensor(planner: Planner) -> None:
    plan = planned(planner)
    digests = {e.tensor: e.provenance.statistics for x in plan.layers for e in x.activations}
    assert all(digest and len(digest) == 64 for digest in digests.values())
    # Branches with other values have other statistics.
    assert len(set(digests.values())) == len(digests)


def test_a_plan_of_a_later_trial_still_names_the_rules(planner: Planner) -> None:
    found = apply_rules(planner.index, LayerChoice(), [rule("head", precision="int16")])
    ruled = planner.with_rules(found.tensors, found.why)
    plan = ruled.plan(found.choices, {"stem": "trial 3"})
    assert layer(plan, "head").why == "rule head (f.csv line 2)"
    assert (layer(plan, "stem").why, layer(plan, "left").why) == ("trial 3", "default")


def test_settings_of_tensors_go_where_the_planner_goes(planner: Planner) -> None:
    found = apply_rules(planner.index, LayerChoice(), [rule("tensor:x", th_scale=0.5)])
    ruled = planner.with_rules(found.tensors)
    again = Planner(ruled.graph, ruled.record, ruled.taps, ruled.settings)
    assert again.plan(found.choices) == ruled.plan(found.choices)
    assert isinstance(ruled.settings, PlanSettings)
    assert planner.settings.tensors == {}


def test_a_profile_of_a_plan_read_back_keeps_its_numbers(planner: Planner, tmp_path: Path) -> None:
    choices = {x.name: LayerChoice(saturation="mse") for x in planner.layers}
    plan = planner.plan(choices)
    path = tmp_path / "p.yaml"
    path.write_text(glow_profile.template(plan))
    found = read_file(path, None, Before(index=planner.index, choices=choices))
    assert found.notes == ()
    again = planned(planner, *found.rules, choice=LayerChoice(saturation="mse"))
    for old, new in zip(plan.layers, again.layers, strict=True):
        for a, b in zip(old.activations, new.activations, strict=True):
            assert a.quantizer.key == b.quantizer.key
            assert b.quantizer.method == "fixed"
            assert b.quantizer.expected_mse == a.quantizer.expected_mse
            assert "p.yaml line" in b.provenance.rule


# --- differences ------------------------------------------------------------------------------


def test_a_difference_tells_how_far_thresholds_moved(planner: Planner, tmp_path: Path) -> None:
    a = planned(planner)
    b = planned(
        planner,
        rule("output:stem", th_scale=0.9),
        rule("tensor:x", saturation="mse"),
        rule("head", precision="int16"),
        rule("prob", precision="float32"),
    )
    found = compare_plans(a, load_plan(b.save(tmp_path / "b.json")))
    changes = {(c.layer, c.what, c.tensor): c for c in found.changes}
    moved = changes["block/conv1", "threshold", "r0"]
    assert moved.moved == pytest.approx(-0.1)
    assert changes["block/sum", "threshold", "r0"].moved == moved.moved
    assert (changes["stem", "method", "x"].before, changes["stem", "method", "x"].after) == (
        "max",
        "mse",
    )
    assert changes["head", "precision", ""].after == "int16"
    assert changes["head", "type", "n"].after == "int16"
    assert changes["prob", "type", "h"].after == "float"
    assert changes["stem", "rule", "x"].after == "rule tensor:x (f.csv line 2)"
    assert "r0" in {change.tensor for change in found.moved}
    assert found.summary().startswith(f"{len(found.moved)} thresholds moved, by ")
    assert found.same_model
    assert found.same_statistics
    assert found.to_json()["changes"][0]["layer"] == "stem"
    back = {(c.layer, c.what, c.tensor): c for c in compare_plans(b, a).changes}
    assert set(back) == set(changes)
    assert back["block/conv1", "threshold", "r0"].moved == pytest.approx(1 / 0.9 - 1)
    assert compare_plans(a, a).changes == ()
    assert compare_plans(a, a).summary() == ""


def test_plans_of_schema_1_are_read(planner: Planner) -> None:
    plan = planned(planner)
    document = plan.to_json()
    document["qdist_plan"] = 1
    for entry in document["layers"]:
        for name in ("th_scale", "threshold"):
            del entry["choice"][name]
        for tensor in (*entry["activations"], *entry["weights"]):
            del tensor["provenance"]
    old = QuantizationPlan.from_json(document)
    assert compare_plans(old, plan).changes == ()
