"""Prefill and decode steps: on decoders that run, against one pass over all tokens."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdist.data.checks import InputSpec, check_sample
from qdist.data.decoder import Decoder, Phased, find_decoder
from qdist.data.manifest import SampleManifest
from qdist.data.source import DataSource
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError

WIDTH, HEADS, HEAD, VOCABULARY, LAYERS = 8, 2, 4, 13, 2
STYLES = {
    "optimum": ("past_key_values.{i}.{what}", "present.{i}.{what}"),
    "onnxconfig": ("past_key_values.{i}.{what}", "present_key_values.{i}.{what}"),
    "short": ("past_{what}_{i}", "present_{what}_{i}"),
    "dotted": ("past_{i}.{what}", "present_{i}.{what}"),
    "stacked": ("past_{i}", "present_{i}"),
}
node = helper.make_node


def _value(name: str, dtype: int, shape: list[int | str] | None) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def _layer(i: int, style: str) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Nodes, weights, inputs and outputs of one attention layer with a cache."""
    random = np.random.default_rng(i)
    past, present = STYLES[style]
    parts = ("q", "k", "v", "o")
    weights = [
        numpy_helper.from_array(
            (random.standard_normal((WIDTH, WIDTH)) / 2).astype(np.float32), f"w_{p}_{i}"
        )
        for p in parts
    ]
    nodes = []
    for p in parts[:3]:
        nodes += [
            node("MatMul", [f"h_{i}", f"w_{p}_{i}"], [f"{p}_flat_{i}"]),
            node("Reshape", [f"{p}_flat_{i}", "split"], [f"{p}_split_{i}"]),
            node("Transpose", [f"{p}_split_{i}"], [f"{p}_{i}"], perm=[0, 2, 1, 3]),
        ]
    names = {what: past.format(i=i, what=what) for what in ("key", "value")}
    outs = {what: present.format(i=i, what=what) for what in ("key", "value")}
    shape: list[int | str] = ["batch", HEADS, "past_sequence", HEAD]
    if style == "stacked":
        nodes += [
            node("Split", [names["key"]], [f"pk5_{i}", f"pv5_{i}"], axis=0, num_outputs=2),
            node("Squeeze", [f"pk5_{i}", "axis_0"], [f"pk_{i}"]),
            node("Squeeze", [f"pv5_{i}", "axis_0"], [f"pv_{i}"]),
            node("Concat", [f"pk_{i}", f"k_{i}"], [f"keys_{i}"], axis=2),
            node("Concat", [f"pv_{i}", f"v_{i}"], [f"values_{i}"], axis=2),
            node("Unsqueeze", [f"keys_{i}", "axis_0"], [f"keys5_{i}"]),
            node("Unsqueeze", [f"values_{i}", "axis_0"], [f"values5_{i}"]),
            node("Concat", [f"keys5_{i}", f"values5_{i}"], [outs["key"]], axis=0),
        ]
        inputs = [_value(names["key"], TensorProto.FLOAT, [2, *shape])]
        outputs = [_value(outs["key"], TensorProto.FLOAT, None)]
    else:
        nodes += [
            node("Concat", [names["key"], f"k_{i}"], [outs["key"]], axis=2),
            node("Concat", [names["value"], f"v_{i}"], [outs["value"]], axis=2),
            node("Identity", [outs["key"]], [f"keys_{i}"]),
            node("Identity", [outs["value"]], [f"values_{i}"]),
        ]
        inputs = [_value(names[what], TensorProto.FLOAT, shape) for what in names]
        outputs = [_value(outs[what], TensorProto.FLOAT, None) for what in outs]
    nodes += [
        node("Transpose", [f"keys_{i}"], [f"kt_{i}"], perm=[0, 1, 3, 2]),
        node("MatMul", [f"q_{i}", f"kt_{i}"], [f"scores_{i}"]),
        node("Where", ["allowed", f"scores_{i}", "low"], [f"masked_{i}"]),
        node("Softmax", [f"masked_{i}"], [f"weights_{i}"], axis=-1),
        node("MatMul", [f"weights_{i}", f"values_{i}"], [f"mixed_{i}"]),
        node("Transpose", [f"mixed_{i}"], [f"together_{i}"], perm=[0, 2, 1, 3]),
        node("Reshape", [f"together_{i}", "join"], [f"joined_{i}"]),
        node("MatMul", [f"joined_{i}", f"w_o_{i}"], [f"out_{i}"]),
        node("Add", [f"h_{i}", f"out_{i}"], [f"h_{i + 1}"]),
    ]
    return nodes, weights, inputs, outputs


def decoder_model(style: str = "optimum", *, branch: bool = False) -> bytes:
    """A causal decoder whose new token i sees cached and new tokens up to itself, if unmasked.

    ``branch``: with ``use_cache_branch``, which only says whether the output ``cached`` is 1.
    """
    random = np.random.default_rng(9)

    def table(name: str, rows: int) -> Any:
        values = random.standard_normal((rows, WIDTH)).astype(np.float32)
        return numpy_helper.from_array(values, name)

    def integers(name: str, *values: int) -> Any:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    weights = [
        table("tokens", VOCABULARY),
        table("places", 40),
        integers("split", 0, 0, HEADS, HEAD),
        integers("join", 0, 0, WIDTH),
        integers("axis_0", 0),
        integers("axis_1", 1),
        integers("axes_12", 1, 2),
        integers("axes_01", 0, 1),
        numpy_helper.from_array(np.array(0, np.int64), "zero"),
        numpy_helper.from_array(np.array(1, np.int64), "one"),
        numpy_helper.from_array(np.array(-1e9, np.float32), "low"),
        numpy_helper.from_array(
            random.uniform(-0.2, 0.2, (WIDTH, VOCABULARY)).astype(np.float32), "head"
        ),
    ]
    nodes = [
        node("Gather", ["tokens", "input_ids"], ["embedded"]),
        node("Gather", ["places", "position_ids"], ["placed"]),
        node("Add", ["embedded", "placed"], ["h_0"]),
        # Rows of the causal mask: the new tokens are the last of all.
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "one"], ["n_all"]),
        node("Shape", ["input_ids"], ["ids_shape"]),
        node("Gather", ["ids_shape", "one"], ["n_new"]),
        node("Sub", ["n_all", "n_new"], ["n_past"]),
        node("Range", ["zero", "n_all", "one"], ["columns"]),
        node("Range", ["n_past", "n_all", "one"], ["rows_1"]),
        node("Unsqueeze", ["rows_1", "axis_1"], ["rows"]),
        node("LessOrEqual", ["columns", "rows"], ["causal_2"]),
        node("Unsqueeze", ["causal_2", "axes_01"], ["causal"]),
        node("Cast", ["attention_mask"], ["mask_2"], to=TensorProto.BOOL),
        node("Unsqueeze", ["mask_2", "axes_12"], ["mask_4"]),
        node("And", ["causal", "mask_4"], ["allowed"]),
    ]
    inputs = [
        _value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        _value("attention_mask", TensorProto.INT64, ["batch", "total"]),
        _value("position_ids", TensorProto.INT64, ["batch", "sequence"]),
    ]
    outputs = [_value("logits", TensorProto.FLOAT, None)]
    if branch:
        inputs.append(_value("use_cache_branch", TensorProto.BOOL, [1]))
        nodes.append(node("Cast", ["use_cache_branch"], ["cached"], to=TensorProto.FLOAT))
        outputs.append(_value("cached", TensorProto.FLOAT, [1]))
    for i in range(LAYERS):
        more = _layer(i, style)
        nodes += more[0]
        weights += more[1]
        inputs += more[2]
        outputs += more[3]
    nodes.append(node("MatMul", [f"h_{LAYERS}", "head"], ["logits"]))
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return model.SerializeToString()


TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(bool)": "bool"}


def _opened(model: bytes) -> tuple[ort.InferenceSession, list[InputSpec], list[str]]:
    session = ort.InferenceSession(model)
    specs = [
        InputSpec(name=i.name, dtype=TYPES[i.type], shape=tuple(i.shape))
        for i in session.get_inputs()
    ]
    return session, specs, [output.name for output in session.get_outputs()]


def _run_phases(
    session: ort.InferenceSession, outputs: list[str], decoder: Decoder, phases: list[Any]
) -> list[dict[str, NDArray[Any]]]:
    results: list[dict[str, NDArray[Any]]] = []
    for feeds in phases:
        carried = {i: results[-1][o] for i, o in decoder.carry} if results else {}
        assert not set(carried) & set(feeds)
        values = session.run(None, {**feeds, **carried})
        results.append(dict(zip(outputs, values, strict=True)))
    return results


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_prefill_and_decode_give_the_logits_of_one_pass(style: str, n_steps: int) -> None:
    session, specs, outputs = _opened(decoder_model(style))
    found = find_decoder(specs, outputs, n_steps=n_steps)
    assert found is not None
    decoder = pickle.loads(pickle.dumps(found))
    assert decoder == found
    assert len(decoder.carry) == LAYERS * (1 if style == "stacked" else 2)
    assert set(outputs) == {"logits", *(output for _, output in decoder.carry)}
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (3, 9))
    results = _run_phases(session, outputs, decoder, decoder.phases({"input_ids": ids}))
    assert len(results) == 1 + n_steps
    assert [r["logits"].shape[1] for r in results] == [9 - n_steps, *[1] * n_steps]
    whole = find_decoder(specs, outputs, n_steps=0)
    assert whole is not None
    (full,) = _run_phases(session, outputs, whole, whole.phases({"input_ids": ids}))
    logits = np.concatenate([result["logits"] for result in results], axis=1)
    assert np.abs(logits - full["logits"]).max() < 1e-5
    for _, output in decoder.carry:
        assert results[-1][output].shape == full[output].shape
        assert np.abs(results[-1][output] - full[output]).max() < 1e-5


def test_left_padding_masks_and_positions_are_carried_through_the_phases() -> None:
    session, specs, outputs = _opened(decoder_model())
    decoder = find_decoder(specs, outputs, n_steps=3)
    assert decoder is not None
    ids = np.array([[7, 7, 1, 2, 3, 4, 5, 6]])
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = decoder.phases({"input_ids": ids, "attention_mask": mask})
    assert [feeds["attention_mask"].shape[1] for feeds in padded] == [5, 6, 7, 8]
    assert [feeds["position_ids"].tolist() for feeds in padded] == [
        [[0, 0, 0, 1, 2]],
        [[3]],
        [[4]],
        [[5]],
    ]
    bare = decoder.phases({"input_ids": ids[:, 2:]})
    one, other = (_run_phases(session, outputs, decoder, p) for p in (padded, bare))
    for i, (left, right) in enumerate(zip(one, other, strict=True)):
        logits = left["logits"][:, 2:] if i == 0 else left["logits"]
        assert np.abs(logits - right["logits"]).max() < 1e-5
    given = decoder.phases({"input_ids": ids, "position_ids": np.arange(8)[None] + 10})
    assert [feeds["position_ids"].ravel().tolist() for feeds in given] == [
        [10, 11, 12, 13, 14],
        [15],
        [16],
        [17],
    ]


def test_a_merged_decoder_is_told_when_there_is_a_cache() -> None:
    session, specs, outputs = _opened(decoder_model(branch=True))
    decoder = find_decoder(specs, outputs, n_steps=2)
    assert decoder is not None
    phases = decoder.phases({"input_ids": np.array([[1, 2, 3, 4]])})
    assert [feeds["use_cache_branch"].tolist() for feeds in phases] == [[False], [True], [True]]
    results = _run_phases(session, outputs, decoder, phases)
    assert [result["cached"].tolist() for result in results] == [[0.0], [1.0], [1.0]]


def test_samples_give_tokens_and_may_give_mask_and_positions() -> None:
    _, specs, outputs = _opened(decoder_model(branch=True))
    decoder = find_decoder(specs, outputs)
    assert decoder is not None
    ids = np.arange(6)
    assert [spec.name for spec in decoder.sample_specs({"input_ids": ids})] == ["input_ids"]
    feeds = {"input_ids": ids, "attention_mask": np.ones(6, np.int64)}
    check_sample("0", feeds, decoder.sample_specs(feeds))
    with pytest.raises(DataError, match="QD307"):
        check_sample("0", {"ids": ids}, decoder.sample_specs({"ids": ids}))


class Tokens:
    """A source of one text."""

    def keys(self) -> list[str]:
        return ["a"]

    def content_digest(self, key: str) -> str:
        return digest_arrays(self.load(key).items())

    def preprocessing(self) -> dict[str, Any]:
        return {"kind": "tokens"}

    def load(self, key: str) -> dict[str, NDArray[Any]]:
        return {"input_ids": np.arange(6)}

    def label(self, key: str) -> None:
        return None


def test_the_phases_are_part_of_a_samples_id() -> None:
    _, specs, outputs = _opened(decoder_model())
    ids: list[str] = []
    for n_steps in (0, 1, 4, 4):
        decoder = find_decoder(specs, outputs, n_steps=n_steps)
        assert decoder is not None
        source = Phased(source=Tokens(), decoder=decoder)
        assert isinstance(source, DataSource)
        assert source.label("a") is None
        ids += SampleManifest.first(source).ids
    assert len(set(ids)) == 3


def test_other_inputs_of_tokens_are_cut_and_others_stay_whole() -> None:
    _, specs, outputs = _opened(decoder_model())
    kinds = InputSpec(name="token_type_ids", dtype="int64", shape=("batch", "sequence"))
    image = InputSpec(name="image", dtype="float32", shape=("batch", 5))
    decoder = find_decoder([*specs, kinds, image], outputs, n_steps=1)
    assert decoder is not None
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.arange(6).reshape(1, 6),
        "token_type_ids": np.arange(6).reshape(1, 6),
        "image": np.zeros((1, 5), np.float32),
    }
    first, second = decoder.phases(feeds)
    assert (first["token_type_ids"] == [[0, 1, 2, 3, 4]]).all()
    assert (second["token_type_ids"] == [[5]]).all()
    assert first["image"].shape == second["image"].shape == (1, 5)


def test_models_without_a_cache_are_no_decoders() -> None:
    spec = InputSpec(name="input_ids", dtype="int64", shape=("b", "s"))
    assert find_decoder([spec], ["logits"]) is None
    past = InputSpec(name="past_year", dtype="float32", shape=("b", 3))
    assert find_decoder([spec, past], ["logits", "forecast"]) is None


def test_what_cannot_be_cut_into_phases() -> None:
    _, specs, outputs = _opened(decoder_model())
    decoder = find_decoder(specs, outputs, n_steps=4)
    assert decoder is not None
    for ids in (np.arange(4).reshape(1, 4), np.arange(6)):
        with pytest.raises(DataError, match=r"QD303.*input_ids.*more than 4"):
            decoder.phases({"input_ids": ids})
    ids = np.arange(6).reshape(1, 6)
    with pytest.raises(DataError, match=r"QD303.*attention_mask"):
        decoder.phases({"input_ids": ids, "attention_mask": np.ones((1, 7), np.int64)})
    with pytest.raises(ConfigError, match=r"QD104.*decode_steps"):
        find_decoder(specs, outputs, n_steps=-1)
    with pytest.raises(DataError, match=r"QD307.*no input ids"):
        find_decoder(specs, outputs, token_input="ids")
    with pytest.raises(DataError, match=r"QD307.*past_key_values\.1\.value"):
        find_decoder(specs, [name for name in outputs if name != "present.1.value"])

    def one(name: str, shape: tuple[Any, ...], output: str) -> Any:
        past = InputSpec(name=name, dtype="float32", shape=shape)
        return find_decoder([*specs[:3], past], ["logits", output])

    with pytest.raises(DataError, match=r"QD307.*encoder"):
        one("past_key_values.0.encoder.key", ("batch", 2, "past", 4), "present.0.encoder.key")
    for shape in (("batch", "heads", "past", 4), ("batch", 2, 16, 4), ("batch", "past")):
        with pytest.raises(DataError, match=r"QD303.*past_0"):
            one("past_0", shape, "present_0")
