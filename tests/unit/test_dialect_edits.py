"""Vendors' own files with a plan's choices written into them, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects import glow_profile, sophgo
from qdist.plan.dialects.forms import read_file, write_into
from qdist.plan.dialects.prototext import parse
from qdist.plan.dialects.prototext_edit import edited
from qdist.plan.dialects.reading import Before
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.rules import apply_rules
from tests.onnx_models import HeldSamples, frozen_from, model, normal, planner_for, value
from tests.unit.test_simulate_integers import node

NETWORK = """# my network  { not a layer }
name: "net"
input: "x"
layer {
\tname: "one"   # the first
\ttype: "Convolution"
\tconvolution_param { num_output: 4 name: "inner" }
\tth_strategy: USE_KL  # mine
\tbottom: ["x", "z"]
}
layer { name: "two" type: "TanH" }
layer {
  name: 'thr' "ee"
  th_scale: 0.9
  forward_with_float: true
}
layer {
  name: "elsewhere"
  threshold: 3.5 }
"""
LAYERS = ("layer", "layers")


def test_values_are_replaced_and_new_fields_come_last() -> None:
    changes = {
        "one": {"th_strategy": "USE_MAX", "forward_with_float": "true"},
        "two": {"th_strategy": "USE_MAX", "th_scale": "0.5"},
        "elsewhere": {"threshold": "4.0", "th_scale": "2.0"},
        "inner": {"num_output": "9"},
    }
    found = edited(NETWORK, changes, "f", LAYERS)
    expected = (
        NETWORK.replace("USE_KL  # mine", "USE_MAX  # mine")
        .replace('"z"]\n}', '"z"]\n\tforward_with_float: true\n}')
        .replace('"TanH" }', '"TanH" th_strategy: USE_MAX th_scale: 0.5 }')
        .replace("threshold: 3.5 }", "threshold: 4.0 th_scale: 2.0 }")
    )
    assert found == expected
    assert edited(NETWORK, {}, "f", LAYERS) == NETWORK


def test_line_ends_and_marks_stay() -> None:
    text = "\ufeff" + NETWORK.replace("\n", "\r\n")
    found = edited(text, {"one": {"forward_with_float": "true"}}, "f", LAYERS)
    assert found == text.replace('"z"]\r\n}', '"z"]\r\n\tforward_with_float: true\r\n}')
    assert edited("layer {\n}\n", {"": {"th_scale": "2.0"}}, "f", LAYERS) == (
        "layer {\n  th_scale: 2.0\n}\n"
    )


_NAMES = st.sampled_from(["one", "two", "three", "four"])
_FIELDS = st.sampled_from(["th_scale", "th_strategy", "threshold", "other"])
_WORDS = st.sampled_from(["1.5", "USE_MAX", "true", "-3", '"te { xt"'])
_LINE = st.builds("{}: {}".format, _FIELDS, _WORDS) | st.sampled_from(
    ["param { name: 'two' th_scale: 7 }", "# th_scale: 8 }", "shape <dim: [1, 2]>"]
)


@st.composite
def networks(draw: st.DrawFn) -> str:
    text = ""
    for _ in range(draw(st.integers(1, 4))):
        lines = [f'name: "{draw(_NAMES)}"', *draw(st.lists(_LINE, max_size=4))]
        if draw(st.booleans()) and not any("#" in line for line in lines):
            text += f"layer {{ {' '.join(lines)} }}\n"
        else:
            text += "layer {\n  " + "\n  ".join(lines) + "\n}\n"
    return text


@given(text=networks(), name=_NAMES, field=_FIELDS, word=_WORDS)
def test_what_is_read_is_what_was_written(text: str, name: str, field: str, word: str) -> None:
    found = edited(text, {name: {field: word}}, "f", LAYERS)
    before, after = parse(text, "f"), parse(found, "f")
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        is_named = next(f.scalar for f in one.fields if f.name == "name") == name
        values = [f.scalar for f in other.fields if f.name == field]
        others = [f for f in one.fields if f.name != field]
        assert [f for f in other.fields if f.name != field] == others
        if is_named:
            assert values[0] == word.strip('"')
            assert len(values) == max(1, sum(f.name == field for f in one.fields))
        else:
            assert one == other
    assert edited(found, {name: {field: word}}, "f", LAYERS) == found


# --- a model's own files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    folder = tmp_path_factory.mktemp("edits")
    proto = model(
        [
            node("Conv", ["x", "w"], ["a"], "one"),
            node("Tanh", ["a"], ["b"], "two"),
            node("Conv", ["b", "v"], ["y"], "three"),
        ],
        [value("x", ["n", 3, 6, 6])],
        [value("y", ["n", 4, 6, 6])],
        {"w": normal(4, 3, 1, 1), "v": normal(4, 4, 1, 1)},
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [{"x": normal(3, 6, 6, seed=i)} for i in range(12)]
    return planner_for(frozen, HeldSamples(samples=samples), folder / "store", PlanSettings())


def choices(planner: Planner) -> dict[str, LayerChoice]:
    found = {layer.name: LayerChoice(saturation="kl") for layer in planner.layers}
    return found | {
        "two": LayerChoice(saturation="max"),
        "three": LayerChoice(precision="float32"),
    }


def test_a_networks_own_prototxt_says_what_the_layers_have(
    planner: Planner, tmp_path: Path
) -> None:
    path = tmp_path / "net.prototxt"
    text = NETWORK.replace("  forward_with_float: true\n", "")
    path.write_bytes(text.encode())
    before = Before(index=planner.index, choices=choices(planner))
    found, notes = write_into(path, "sophgo", before, None)
    assert notes == ()
    # What reads layer one has max; what reads two is float and has kl.
    assert found == text.replace("USE_KL  # mine", "USE_MAX  # mine").replace(
        "th_scale: 0.9\n", "th_scale: 0.9\n  forward_with_float: true\n"
    )
    path.write_bytes(found.encode())
    assert write_into(path, "sophgo", before, None)[0] == found
    plain = {name: LayerChoice(saturation="kl") for name in before.choices}
    rules = sophgo.read(
        "\n".join(line for line in found.splitlines()).replace(
            'layer {\n  name: "elsewhere"\n  threshold: 3.5 }', ""
        ),
        "f",
        Before(index=planner.index, choices=plain),
    ).rules
    assert apply_rules(planner.index, plain, rules).choices["three"].bits.is_float
    path.write_text('layer { name: "strange" }')
    with pytest.raises(PlanError, match=r"QD508.*none of the model's layers"):
        write_into(path, "sophgo", before, None)
    path.write_text('layer { name: "two" }')
    assert "2 layers of the model are not in it" in write_into(path, "sophgo", before, None)[1][0]
    with pytest.raises(PlanError, match=r"QD508.*written as a whole"):
        write_into(path, "knight", before, None)


PROFILE = """---
GlowToolsVersion: 'v1'
...
---
GraphPreLowerHash: 0x1234ABCD
...
---
# dumped
- NodeOutputName:  'Conv_one__1:0'
  Min:             -3.0
  Max:             2.0
  Histogram:       [ 0, 1, 2 ]
- NodeOutputName:  'strange__1:0'
  Min:             -1.0
  Max:             1.0
- NodeOutputName:  y
  Min:             -1.5
  Max:             1.5
...
"""


def plan_of(planner: Planner) -> QuantizationPlan:
    plain = {layer.name: LayerChoice(saturation="kl") for layer in planner.layers}
    return planner.plan({**plain, "three": LayerChoice(precision="float32")})


def test_a_dumped_profile_gets_the_ranges_of_a_plan(planner: Planner, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    plan = plan_of(planner)
    before = Before(index=planner.index, choices={la.name: la.choice for la in plan.layers})
    found, notes = write_into(path, "slimai_profile", before, plan)
    low, high = next(
        e.quantizer.bounds for la in plan.layers for e in la.activations if e.tensor == "a"
    )
    assert found == PROFILE.replace("-3.0", repr(low)).replace(" 2.0", f" {high!r}")
    assert glow_profile.graph_hash(found) == "0x1234ABCD"
    assert "1 nodes are not in the model, and stay" in notes[0]
    assert "1 nodes have no range in the plan, and stay" in notes[1]
    path.write_text(found)
    rules = read_file(path, None, before).rules
    assert rules[0].settings["bounds"] == (low, high)
    assert write_into(path, "slimai_profile", before, plan)[0] == found
