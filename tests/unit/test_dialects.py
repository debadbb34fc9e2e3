"""Vendors' files: golden ones, round trips, templates that change nothing, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects import glow_profile, icraft, knight, sophgo
from qdist.plan.dialects.forms import FORMS, TEMPLATES, form_of, read_file
from qdist.plan.dialects.reading import Before
from qdist.plan.dtype_name import DtypeName
from qdist.plan.layer_index import LayerIndex
from qdist.plan.precision import PRECISIONS
from qdist.plan.rules import Assignment, Rule, apply_rules
from qdist.plan.scope import NO_INTEGER_FORM
from tests.unit.test_selectors import plain_layer
from tests.vendor_models import GOLDEN, before, block_index

INT8 = LayerChoice()
Case = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LayerIndex:
    return block_index(tmp_path_factory.mktemp("block"))


def applied(given: Before, name: str) -> Assignment:
    found = read_file(GOLDEN / name, None, given)
    return apply_rules(given.index, given.choices, found.rules)


def changed(given: Before, found: Assignment) -> dict[str, LayerChoice]:
    return {n: c for n, c in found.choices.items() if c != given.choices[n]}


# --- golden files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("icraft_mix_sample.csv", "icraft"),
        ("icraft_mix_3_33.csv", "icraft"),
        ("icraft_mix_manual.csv", "icraft"),
        ("icraft_net_ftmps.csv", "icraft_saturation"),
        ("icraft_net_raws.csv", "icraft_saturation"),
        ("knight_mix.json", "knight"),
        ("slimai_nodename.yaml", "slimai"),
        ("slimai_nodekind.yaml", "slimai"),
        ("slimai_profile.yaml", "slimai_profile"),
        ("sophgo_test_fp32.prototxt", "sophgo"),
    ],
)
def test_a_form_is_recognised_by_content(name: str, form: str) -> None:
    text = (GOLDEN / name).read_text()
    assert form_of(Path("renamed.txt"), text) == form
    assert [n for n, f in FORMS.items() if f.recognises("renamed.txt", text)] == [form]


def test_icraft_sample_layout(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "icraft_mix_sample.csv")
    assert changed(given, found) == {
        "block/conv1": LayerChoice(
            precision="int16", granularity="tensor", weight_saturation="mse"
        ),
        "cat": LayerChoice(precision="float32"),
    }
    # The row of the stem asks for kl; that of its ReLU, which gives the map, for max.
    assert {n: s.saturation for n, s in found.tensors.items()} == {"r0": "max", "r1": "max"}
    assert found.why["cat"] == "rule layer:cat (icraft_mix_sample.csv line 6)"


def test_icraft_new_layout(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "icraft_mix_3_33.csv")
    assert changed(given, found) == {"head": LayerChoice(precision="int16")}
    assert {n: s.saturation for n, s in found.tensors.items()} == {"h": "max"}
    notes = read_file(GOLDEN / "icraft_mix_3_33.csv", None, given).notes
    assert notes == ("icraft_mix_3_33.csv: 13 of 16 operators have no row, and keep defaults",)


def test_icraft_manual_layout_parses_types_that_plans_may_lack() -> None:
    text = (GOLDEN / "icraft_mix_manual.csv").read_text()
    rows = icraft.parse(text, "f").rows
    assert [row.dtype for row in rows] == ["int8", "int8", "bf16", "fp16", "tf32"]
    assert rows[0].bits == (6, 7)
    assert rows[0].per == ("channel", "tensor")
    assert rows[2].per == ("tensor", "group=4")
    assert rows[2].saturation == ("null", "null")


def test_icraft_saturation_points(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "icraft_net_ftmps.csv")
    assert {n: s.threshold for n, s in found.tensors.items()} == {"x": (2.5,), "r0": (6.0,)}
    (note,) = read_file(GOLDEN / "icraft_net_ftmps.csv", None, given).notes
    assert note.endswith("no quantized layer reads, such as p")
    found = applied(given, "icraft_net_raws.csv")
    assert found.tensors["w0"].threshold == (1.5, 1.6, 1.7, 1.8)


def test_knight_file(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "knight_mix.json")
    assert changed(given, found) == {
        "stem": LayerChoice(saturation="kl"),
        "block/conv1": LayerChoice(precision="int16", saturation="max"),
    }
    (note,) = read_file(GOLDEN / "knight_mix.json", None, given).notes
    assert note == "knight_mix.json: 7 layers are not in it: block/sum, left, right"


def test_slimai_by_name_and_by_kind(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "slimai_nodekind.yaml")
    convolutions = ["stem", "block/conv1", "block/conv2", "left"]
    assert changed(given, found) == dict.fromkeys(convolutions, LayerChoice(precision="int16"))
    found = applied(given, "slimai_nodename.yaml")
    assert changed(given, found) == {
        **dict.fromkeys(["block/conv1", "block/conv2", "left"], LayerChoice(precision="int16")),
        "head": LayerChoice(precision="w8a16"),
    }
    assert found.tensors == {}


def test_slimai_names_go_before_kinds_and_outputs_are_carried(index: LayerIndex) -> None:
    given = before(index)
    text = """---
- nodes: [head]
  intypes: [s16]
- nodes: [MatMul, Softmax]
  intypes: [s8]
- nodes: [LayerNormalization]
  intypes: [s8]
  outtypes: [s8]
"""
    found = FORMS["slimai"].read(text, "f", given)
    assignment = apply_rules(index, given.choices, found.rules)
    assert changed(given, assignment) == {"head": LayerChoice(precision="int16")}
    assert {n: s.most_bits for n, s in assignment.tensors.items()} == {"n": 8}
    assert found.notes == (
        "f: 1 outputs are carried in 8 bits, though a layer after reads more: norm",
    )


def test_glow_profile_gives_ranges_that_hold_zero(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "slimai_profile.yaml")
    assert {n: s.bounds for n, s in found.tensors.items()} == {"s": (-3.0, 2.0), "x": (0.0, 4.0)}
    (note,) = read_file(GOLDEN / "slimai_profile.yaml", None, given).notes
    assert "1 of 3 nodes are not in the model" in note
    assert "Lowered_thing__7:0" in note


def test_sophgo_fields(index: LayerIndex) -> None:
    given = before(index)
    found = applied(given, "sophgo_test_fp32.prototxt")
    assert changed(given, found) == {"prob": LayerChoice(precision="float32")}
    # What a layer gives behind the ReLU that it is computed with.
    assert found.tensors["r0"].saturation == "max"
    assert found.tensors["r1"].th_scale == 0.9
    assert found.tensors["s"].threshold == (2.5,)
    assert len(found.tensors) == 3


def test_sophgo_options_keep_parts_float(index: LayerIndex) -> None:
    rules = sophgo.float_rules(["stem"], ["head"], ["right"])
    found = apply_rules(index, INT8, rules).choices
    floats = {n for n, c in found.items() if c.precision == "float32"}
    # From Sigmoid on there is no convolution until the matmul.
    assert floats == {"stem", "relu0", "head", "bias", "prob", "right", "cat", "norm"}


# --- templates --------------------------------------------------------------------------------

MIXED = {
    "icraft": {
        "block/conv1": LayerChoice(precision="int16"),
        "prob": LayerChoice(precision="float32"),
    },
    "knight": {
        "block/conv1": LayerChoice(precision="int16", saturation="max"),
        "stem": LayerChoice(precision="int16", saturation="kl"),
        "block/conv2": LayerChoice(precision="int16"),
    },
    "slimai": {"block/sum": LayerChoice(precision="int16"), "head": LayerChoice(precision="w8a16")},
    "sophgo": {"prob": LayerChoice(precision="float32"), "left": LayerChoice(precision="float32")},
}


@pytest.mark.parametrize("name", [name for name, form in TEMPLATES.items() if form.template])
@pytest.mark.parametrize("method", ["mse", "max", "kl"])
def test_a_template_that_nobody_edited_changes_nothing(
    index: LayerIndex, name: str, method: str, tmp_path: Path
) -> None:
    given = before(index, LayerChoice(saturation=method))
    form = TEMPLATES[name]
    assert form.template is not None
    path = tmp_path / f"m{form.suffix}"
    path.write_text(form.template(given))
    assert form_of(path, path.read_text()) == name.partition("_")[0]
    found = read_file(path, None, given)
    assert found.rules == ()
    assert apply_rules(index, given.choices, found.rules).choices == given.choices


@pytest.mark.parametrize("name", MIXED)
def test_a_template_of_mixed_choices_makes_them_again(index: LayerIndex, name: str) -> None:
    mixed = before(index, INT8, **MIXED[name])
    form = TEMPLATES[name]
    assert form.template is not None
    plain = before(index)
    found = form.read(form.template(mixed), "f", plain)
    choices = apply_rules(index, plain.choices, found.rules).choices
    hosts = {layer.name for layer in index.choosable}
    assert {n: choices[n] for n in hosts} == {n: mixed.choices[n] for n in hosts}


@pytest.mark.parametrize("name", ["icraft", "knight", "slimai", "sophgo"])
def test_an_edited_template_changes_what_was_edited(index: LayerIndex, name: str) -> None:
    given = before(index)
    form = FORMS[name]
    assert form.template is not None
    text = form.template(given)
    old, new = {
        "icraft": ("7,Conv,int8,8;8", "7,Conv,int16,16;16"),
        "knight": (
            '"left": {\n        "bitwidth": 8',
            '"left": {\n        "bitwidth": 16',
        ),
        "slimai": ("[left]\n  intypes: [s8]", "[left]\n  intypes: [s16]"),
        "sophgo": (
            '"left"\n  type: "Conv"\n  th_strategy: USE_DEFAULT\n  th_scale: 1.0\n'
            "  forward_with_float: false",
            '"left"\n  type: "Conv"\n  th_strategy: USE_DEFAULT\n  th_scale: 1.0\n'
            "  forward_with_float: true",
        ),
    }[name]
    assert old in text
    edited = text.replace(old, new)
    if name == "knight":
        # Both inputs of the Concat go together.
        edited = edited.replace(
            '"right": {\n        "bitwidth": 8', '"right": {\n        "bitwidth": 16'
        )
    found = form.read(edited, "f", given)
    assignment = apply_rules(index, given.choices, found.rules)
    wanted = "float32" if name == "sophgo" else "int16"
    assert assignment.choices["left"].precision == wanted
    expected = {"left", "right"} if name == "knight" else {"left"}
    assert set(changed(given, assignment)) == expected


@pytest.mark.parametrize(
    ("name", "choice", "got"),
    [
        ("knight", LayerChoice(precision="w4a8"), "precision w4a8"),
        ("knight", LayerChoice(precision="float32"), "precision float32"),
        ("slimai", LayerChoice(precision="w4a8"), "precision w4a8"),
        ("sophgo", LayerChoice(precision="int16"), "precision int16"),
        ("icraft", LayerChoice(precision="w8a16"), "precision w8a16"),
        ("icraft", LayerChoice(saturation="percentile"), "threshold method percentile"),
    ],
)
def test_a_choice_without_a_word_is_refused_by_layer(
    index: LayerIndex, name: str, choice: LayerChoice, got: str
) -> None:
    template: Callable[[Before], str] | None = TEMPLATES[name].template
    assert template is not None
    with pytest.raises(PlanError) as caught:
        template(before(index, left=choice, prob=choice))
    assert caught.value.code == "QD507"
    assert caught.value.got == got


# --- mistakes ---------------------------------------------------------------------------------

HEAD = "op_id,op_type,dtype,value_range_in_bits,saturation,per,order\n"
KL8 = '{"bitwidth": 8, "mode": "kl"}'
MISTAKES: list[Case] = [
    ("icraft", "", "f.csv", "an empty file"),
    ("icraft", "op_id,op_type\n", "f.csv line 1", "no column 'dtype'"),
    ("icraft", "op_id,dtype,color\n", "f.csv line 1", "a column 'color'"),
    ("icraft", HEAD + "1,Conv,int8\n", "f.csv line 2", "3 cells"),
    ("icraft", HEAD + "one,Conv,int8,,,,\n", "f.csv line 2", "op_id 'one'"),
    ("icraft", HEAD + "99,Conv,int8,,,,\n", "f.csv line 2", "op_id 99"),
    ("icraft", HEAD + "1,relu,int8,,,,\n", "f.csv line 2", "op_id 1 of type 'relu'"),
    ("icraft", HEAD + "1,Conv,int8,,,,\n1,Conv,int8,,,,\n", "f.csv line 3", "op_id 1 again"),
    ("icraft", HEAD + "1,Conv,int7,,,,\n", "f.csv line 2", "'int7'"),
    ("icraft", HEAD + "1,Conv,int8,9;8,,,\n", "f.csv line 2", "9 bits of range"),
    ("icraft", HEAD + "1,Conv,int8,8,,,\n", "f.csv line 2", "value_range_in_bits '8'"),
    ("icraft", HEAD + "1,Conv,int8,8;x,,,\n", "f.csv line 2", "value_range_in_bits 'x'"),
    ("icraft", HEAD + "1,Conv,int8,,kl;kl,,\n", "f.csv line 2", "saturation 'kl'"),
    ("icraft", HEAD + "1,Conv,int8,,,tensor;group=0,\n", "f.csv line 2", "per 'group=0'"),
    ("icraft_saturation", "ftmp_id,size\n", "f.csv line 1", "ftmp_id,size"),
    ("icraft_saturation", "raw_id,size,sat\n0,9,1\n", "f.csv line 2", "9 values"),
    ("icraft_saturation", "ftmp_id,sat\n0,-1\n", "f.csv line 2", "sat '-1'"),
    ("icraft_saturation", "ftmp_id,sat\n0,a\n", "f.csv line 2", "sat 'a'"),
    ("icraft_saturation", "ftmp_id,sat\ny,1\n", "f.csv line 2", "id 'y'"),
    ("knight", '{\n"stem": ', "f.csv line 2", "Expecting value"),
    ("knight", "[]", "f.csv", "list"),
    ("knight", f'{{"stem": {KL8},\n"stem": {KL8}}}', "f.csv line 2", "'stem' twice"),
    ("knight", '{"a": {"bitwidth": 8}}', "f.csv line 1", "'a' with bitwidth"),
    ("knight", '{\n\n"stem": {"bitwidth": 4, "mode": "kl"}}', "f.csv line 3", "bitwidth 4"),
    ("knight", '{"stem": {"bitwidth": 8, "mode": "max"}}', "f.csv line 1", "mode 'max'"),
    ("knight", f'{{\n"stm": {KL8}}}', "f.csv line 2", "no layer 'stm'"),
    ("knight", f'{{"relu0": {KL8}}}', "f.csv line 1", "computed with stem"),
    ("slimai", "---\nnodes: [a]\n", "f.csv line 2", "nodes before any entry"),
    ("slimai", "- nodes: [stem]\n", "f.csv line 1", "an entry without intypes"),
    ("slimai", "- nodes: [stem]\n  intypes: [s9]\n", "f.csv line 1", "intypes 's9'"),
    ("slimai", "- nodes: stem\n", "f.csv line 1", "'- nodes: stem'"),
    ("slimai", "- nodes: [stm]\n  intypes: [s8]\n", "f.csv line 1", "no node 'stm'"),
    ("slimai", "- nodes: [stem]\n  intypes: [s8,s16]\n", "f.csv line 1", "intypes s8, s16"),
    ("slimai", "- nodes: [stem]\n  nodes: [left]\n", "f.csv line 2", "nodes twice"),
    ("slimai_profile", "---\n", "f.csv", "no NodeOutputName"),
    ("slimai_profile", "- NodeOutputName: 'x'\n  Min: 1\n", "f.csv line 1", "without Max"),
    ("slimai_profile", "- NodeOutputName: x\n  Min: 2\n  Max: 1\n", "f.csv line 1", "Min 2"),
    ("slimai_profile", "- NodeOutputName: x\n  Min: a\n", "f.csv line 2", "Min 'a'"),
    ("slimai_profile", "- NodeOutputName: q\n  Min: 0\n  Max: 1\n", "f.csv", "such as 'q'"),
    ("sophgo", "layer {\n  name: 'stem'\n", "f.csv line 2", "the end of the file"),
    ("sophgo", 'layer {\n  type: "a"\n}', "f.csv line 1", "a layer without a name"),
    ("sophgo", 'layer { name: "a\n" }', "f.csv line 1", "'\"a"),
    ("sophgo", 'layer { name: "stm" th_scale: 2 }', "f.csv line 1", "no layer 'stm'"),
    ("sophgo", 'layer { name: "stem"\nth_scale: 0 }', "f.csv line 2", "th_scale '0'"),
    ("sophgo", 'layer { name: "stem"\nthreshold: x }', "f.csv line 2", "threshold 'x'"),
    ("sophgo", 'layer { name: "stem"\nth_strategy: KL }', "f.csv line 2", "th_strategy 'KL'"),
    ("sophgo", 'layer { name: "stem"\nforward_with_float: 2}', "f.csv line 2", "float '2'"),
    ("sophgo", 'layer { name: "stem" name: "left" }', "f.csv line 1", "name twice"),
]


@pytest.mark.parametrize(("form", "text", "where", "got"), MISTAKES)
def test_a_mistake_is_told_in_one_line_with_its_place(
    index: LayerIndex, tmp_path: Path, form: str, text: str, where: str, got: str
) -> None:
    path = tmp_path / "f.csv"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_file(path, form, before(index))
    error = caught.value
    assert error.code == ("QD506" if "int7" in text else "QD508")
    assert error.where == where
    assert got in error.got
    assert "\n" not in str(error)


def test_a_file_of_no_form_lists_the_forms(index: LayerIndex, tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    path.write_text("hello")
    with pytest.raises(PlanError, match=r"QD508.*icraft, icraft_saturation, knight"):
        read_file(path, None, before(index))
    with pytest.raises(PlanError, match=r"QD508.*nothing there"):
        read_file(tmp_path / "none", None, before(index))
    with pytest.raises(PlanError, match=r"QD508.*rules_form.*'latin'"):
        read_file(path, "latin", before(index))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="QD508"):
        read_file(path, None, before(index))


@pytest.mark.parametrize("name", ["int4", "UINT4"])
def test_four_bit_rows_are_plans_of_four_bits(name: str, index: LayerIndex) -> None:
    given = before(index)
    rows = f"{HEAD}1,Conv,{name},,,,\n"
    found = icraft.read(rows, "f.csv", given)
    assert found.rules[0].settings["precision"] == name.lower()
    choice = apply_rules(index, given.choices, found.rules).choices["stem"]
    assert (choice.bits.activation_bits, choice.bits.weight_bits) == (4, 4)


def test_every_type_that_files_can_name_can_be_planned() -> None:
    assert {name.precision for name in DtypeName} <= set(PRECISIONS)


def test_icraft_rows_reach_types_levels_and_granularities(index: LayerIndex) -> None:
    given = before(index)
    text = """op_id,op_type,dtype,value_range_in_bits,saturation,per
1,conv,int8,6;7,ems;ems,group=2;tensor
2,relu,int8,8;7,ems;ems,tensor;tensor
3,conv,bf16,14;14,null;null,tensor;tensor
8,sigmoid,int8,8;8,null;null,tensor;channel
"""
    found = icraft.read(text, "f.csv", given)
    assignment = apply_rules(index, given.choices, found.rules)
    assert changed(given, assignment) == {
        "stem": LayerChoice(granularity="group=2", weight_saturation="mse", weight_range_bits=6),
        "block/conv1": LayerChoice(precision="bf16"),
    }
    tensors = assignment.tensors
    assert tensors["r0"].range_bits == 7
    assert (tensors["b"].granularity, tensors["b"].saturation) == ("channel", "max")
    again = Before(index=index, choices=assignment.choices)
    template = icraft.template(again)
    assert "1,Conv,int8,6;8,ems;" in template
    assert icraft.read(template, "f.csv", again).rules == ()
    plain = icraft.read(icraft.template(given), "f.csv", again)
    # Nothing is left of it but that the file names the method of the weights.
    expected = {**given.choices, "stem": LayerChoice(weight_saturation="max")}
    assert apply_rules(index, again.choices, plain.rules).choices == expected


def test_a_layer_without_an_integer_form_can_be_rounded(tmp_path: Path) -> None:
    layers = (plain_layer("a", "Conv", "x"), plain_layer("exp", "Exp", "a.out"))
    index = LayerIndex(layers, left_out={"exp": f"Exp {NO_INTEGER_FORM}"})
    given = before(index)
    found = icraft.read(f"{HEAD}2,Exp,fp16,,,,\n", "f.csv", given)
    assignment = apply_rules(index, given.choices, found.rules)
    assert changed(given, assignment) == {"exp": LayerChoice(precision="fp16")}
    found = icraft.read(f"{HEAD}2,Exp,int8,,,,\n", "f.csv", given)
    assert found.rules == ()
    assert "the dtype of 1 rows means nothing" in found.notes[0]


# --- Knight's neighbours ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "rule"),
    [
        ((), None),
        (("stem",), "the same bits for all inputs of block/sum"),
        (("stem", "block/conv2"), None),
        (("norm",), "the same bits around LayerNormalization"),
        (("cat", "norm"), "the same bits around LayerNormalization"),
        (("cat", "norm", "head"), None),
        (("left",), "the same bits for all inputs of cat"),
    ],
)
def test_neighbours_must_agree(index: LayerIndex, wide: tuple[str, ...], rule: str | None) -> None:
    rows = tuple(
        knight.KnightLayer(name=layer.name, bitwidth=16 if layer.name in wide else 8, mode="mse")
        for layer in index.choosable
    )
    text = knight.render(rows)
    if rule is None:
        found = knight.read(text, "f.json", before(index))
        assert {r.match for r in found.rules} == {f"layer:{name}" for name in wide}
        return
    with pytest.raises(PlanError) as caught:
        knight.read(text, "f.json", before(index))
    assert caught.value.code == "QD509"
    assert caught.value.expected == rule
    assert caught.value.where.startswith("f.json line ")


def test_the_layer_threshold_is_around_layer_normalizations(index: LayerIndex) -> None:
    found = apply_rules(index, INT8, knight.layer_threshold_rules(4.0))
    assert changed(before(index), found) == {"norm": LayerChoice(threshold=4.0)}
    assert {n: s.threshold for n, s in found.tensors.items()} == {"n": (4.0,)}


# --- profiles in place ------------------------------------------------------------------------


def test_a_profile_is_edited_in_place() -> None:
    text = (GOLDEN / "slimai_profile.yaml").read_text()
    same = glow_profile.edited(text, {"x": (0.5, 4.0), "Add_block_sum__1:0": (-3.0, 2.0)})
    assert same == text
    found = glow_profile.edited(text, {"Add_block_sum__1:0": (-2.25, 2.0)})
    assert found == text.replace("Min:             -3.0", "Min:             -2.25")
    assert glow_profile.graph_hash(found) == "0x1234ABCD"
    crlf = text.replace("\n", "\r\n")
    assert glow_profile.edited(crlf, {"x": (0.0, 9.0)}).count("\r\n") == crlf.count("\r\n")
    for ranges in ({"y": (0.0, 1.0)}, {"x": (2.0, 1.0)}, {"x": (0.0, float("inf"))}):
        with pytest.raises(PlanError, match="QD508"):
            glow_profile.edited(text, ranges)


def test_rules_of_files_carry_their_place(index: LayerIndex) -> None:
    (rule,) = knight.read(f'{{\n"stem": {KL8}}}', "k.json", before(index)).rules
    assert rule == Rule(match="layer:stem", settings={"saturation": "kl"}, origin="k.json line 2")
    assert rule.why == "rule layer:stem (k.json line 2)"
