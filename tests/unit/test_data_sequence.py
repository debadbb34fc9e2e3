"""Padding cut off, made up to buckets, and left out when counting: on a transformer that runs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from qdist.data.arrays import ArraySource
from qdist.data.checks import InputSpec
from qdist.data.manifest import SampleManifest
from qdist.data.positions import MaskDims, feature_widths, kept_positions
from qdist.data.sequence import Bucketed, Trimmed, sequence_axes
from qdist.data.shards import micro_batches, stack
from qdist.data.source import DataSource
from qdist.digest import digest_json
from qdist.errors import ConfigError, DataError

LENGTH, WIDTH, HEADS, HEAD, VOCABULARY = 7, 12, 2, 6, 11
TAPS = ("embedded", "hidden", "query", "scores", "biased", "weights", "mixed", "merged", "logits")


def transformer(
    length: int | str, *, batch: int | str = "batch", width: int = WIDTH, flat: bool = False
) -> bytes:
    """One attention layer with a mask. ``flat``: the tokens pass as [batch * length, width]."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)

    head = width // HEADS
    constants = [
        weight("table", VOCABULARY, width),
        weight("places", 64, width),
        weight("w_q", width, width),
        weight("w_k", width, width),
        weight("w_v", width, width),
        weight("w_o", width, VOCABULARY),
        numpy_helper.from_array(np.array([0, 0, HEADS, head], np.int64), "split"),
        numpy_helper.from_array(np.array([0, 0, width], np.int64), "join"),
        numpy_helper.from_array(np.array([-1, width], np.int64), "rows"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(-1e9, np.float32), "low"),
    ]
    node = helper.make_node
    split = [
        part
        for name in ("q", "k", "v")
        for part in (
            node("MatMul", ["hidden", f"w_{name}"], [f"{name}_flat"]),
            node("Reshape", [f"{name}_flat", "split"], [f"{name}_heads"]),
        )
    ]
    last = ["merged", "rows"] if flat else ["merged", "join"]
    nodes = [
        node("Gather", ["table", "ids"], ["embedded"]),
        node("Gather", ["places", "positions"], ["placed"]),
        node("Add", ["embedded", "placed"], ["hidden"]),
        *split,
        node("Transpose", ["q_heads"], ["query"], perm=[0, 2, 1, 3]),
        node("Transpose", ["k_heads"], ["key"], perm=[0, 2, 3, 1]),
        node("Transpose", ["v_heads"], ["value"], perm=[0, 2, 1, 3]),
        node("MatMul", ["query", "key"], ["scores"]),
        node("Cast", ["mask"], ["mask_float"], to=TensorProto.FLOAT),
        node("Sub", ["one", "mask_float"], ["hole"]),
        node("Mul", ["hole", "low"], ["bias"]),
        node("Unsqueeze", ["bias", "axes"], ["bias_wide"]),
        node("Add", ["scores", "bias_wide"], ["biased"]),
        node("Softmax", ["biased"], ["weights"], axis=-1),
        node("MatMul", ["weights", "value"], ["mixed"]),
        node("Transpose", ["mixed"], ["together"], perm=[0, 2, 1, 3]),
        node("Reshape", ["together", "join"], ["merged"]),
        node("Reshape", last, ["rows_out"]),
        node("MatMul", ["rows_out", "w_o"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "transformer",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, [batch, length])
            for name in ("ids", "mask", "positions")
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in TAPS],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def run(model: bytes, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options)
    return dict(zip(TAPS, session.run(list(TAPS), feeds), strict=True))


def specs(length: int | str | None) -> list[InputSpec]:
    return [
        InputSpec(name=name, dtype="int64", shape=("batch", length))
        for name in ("ids", "mask", "positions")
    ]


def samples(n: int, *, left: bool = False) -> tuple[list[dict[str, NDArray[Any]]], list[slice]]:
    """Padded to LENGTH with noise under the mask, and where their tokens are."""
    random = np.random.default_rng(3)
    found, kept = [], []
    for i in range(n):
        length = 2 + i % (LENGTH - 1)
        place = slice(LENGTH - length, LENGTH) if left else slice(0, length)
        mask = np.zeros(LENGTH, np.int64)
        mask[place] = 1
        positions = np.full(LENGTH, 63)
        positions[place] = np.arange(length)
        ids = random.integers(0, VOCABULARY, LENGTH)
        found.append({"ids": ids, "mask": mask, "positions": positions})
        kept.append(place)
    return found, kept


@dataclass
class Memory:
    """A source of the samples above."""

    samples: list[dict[str, NDArray[Any]]]

    def keys(self) -> list[str]:
        return [str(i) for i in range(len(self.samples))]

    def content_digest(self, key: str) -> str:
        return digest_json({name: a.tolist() for name, a in self.samples[int(key)].items()})

    def preprocessing(self) -> dict[str, Any]:
        return {"kind": "memory"}

    def load(self, key: str) -> dict[str, NDArray[Any]]:
        return dict(self.samples[int(key)])

    def label(self, key: str) -> NDArray[np.int64] | None:
        return np.array(int(key))


def _names(model: bytes, length: int | str) -> tuple[MaskDims, dict[str, tuple[Any, ...]]]:
    proto = shape_inference.infer_shapes(helper.ModelProto.FromString(model), data_prop=True)
    dims: dict[str, tuple[Any, ...]] = {}
    for value in [*proto.graph.value_info, *proto.graph.output]:
        shape = value.type.tensor_type.shape
        dims[value.name] = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape.dim
        )
    widths = feature_widths(proto.graph)
    return MaskDims(batch="batch", sequence=length, widths=widths), dims


@pytest.mark.parametrize("left", [False, True])
def test_trimmed_samples_give_exactly_the_tensors_of_unpadded_ones(left: bool) -> None:
    model = transformer("length")
    padded, places = samples(12, left=left)
    axes = sequence_axes(specs("length"), "mask", padded[0])
    assert axes == {"ids": (-1,), "mask": (-1,), "positions": (-1,)}
    source = Trimmed(source=Memory(padded), mask_input="mask", axes=axes)
    assert isinstance(source, DataSource)
    for i, key in enumerate(source.keys()):
        trimmed = source.load(key)
        bare = {name: array[places[i]] for name, array in padded[i].items()}
        assert all((trimmed[name] == bare[name]).all() for name in bare)
        one, other = (run(model, stack([feeds])) for feeds in (trimmed, bare))
        assert all(one[name].tobytes() == other[name].tobytes() for name in TAPS)
        assert trimmed["ids"].shape == (places[i].stop - places[i].start,)
        assert source.label(key) == i


def test_trimming_is_part_of_the_ids_and_leaves_the_source_alone() -> None:
    padded, _ = samples(3)
    axes = {"ids": (-1,), "mask": (-1,), "positions": (-1,)}
    source = Trimmed(source=Memory(padded), mask_input="mask", axes=axes)
    whole, cut = (SampleManifest.first(s) for s in (Memory(padded), source))
    assert not set(whole.ids) & set(cut.ids)
    assert [dict(entry.shapes)["ids"] for entry in cut] == [(2,), (3,), (4,)]
    assert padded[0]["ids"].shape == (LENGTH,)
    assert SampleManifest.first(pickle.loads(pickle.dumps(source))) == cut


@pytest.mark.parametrize("model_length", ["length", LENGTH])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_padded_positions_are_not_counted(model_length: int | str, n: int, flat: bool) -> None:
    model = transformer(model_length, flat=flat)
    names, dims = _names(model, model_length)
    assert LENGTH not in names.widths
    padded, places = samples(n)
    outputs = run(model, stack(padded))
    mask = np.stack([sample["mask"] for sample in padded]) != 0
    bare_model = transformer("length", flat=flat)
    alone = [
        run(bare_model, stack([{name: a[place] for name, a in sample.items()}]))
        for sample, place in zip(padded, places, strict=True)
    ]
    for tap in TAPS:
        kept = kept_positions(mask, outputs[tap].shape, tensor=tap, dims=dims[tap], names=names)
        assert kept is not None
        counted = outputs[tap][np.broadcast_to(kept, outputs[tap].shape)]
        chosen = []
        for row, place in enumerate(places):
            if tap == "logits" and flat:
                array = outputs[tap].reshape(n, LENGTH, -1)[row, place]
            elif outputs[tap].ndim == 3:
                array = outputs[tap][row, place]
            elif tap in ("scores", "biased", "weights"):
                array = outputs[tap][row, :, place, place]
            else:
                array = outputs[tap][row, :, place]
            chosen.append(array.ravel())
        by_hand = np.concatenate(chosen)
        assert counted.shape == by_hand.shape
        assert (np.sort(counted) == np.sort(by_hand)).all()
        bare = np.concatenate([output[tap].ravel() for output in alone])
        assert bare.size == counted.size
        assert np.allclose(np.sort(bare), np.sort(counted), atol=1e-5)
        assert counted.size < outputs[tap].size


def test_a_mask_of_ones_and_tensors_without_a_sequence_keep_everything() -> None:
    assert kept_positions(np.ones((2, 5), bool), (2, 5, 3), tensor="t") is None
    mask = np.array([[True, True, False]])
    assert kept_positions(mask, (1, 8), tensor="pooled") is None
    assert kept_positions(mask, (), tensor="number") is None
    assert kept_positions(mask, (1, 3, 4), tensor="t", axes=()) is None


def test_batches_that_are_merged_with_heads_or_stand_second_or_are_missing() -> None:
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    heads = kept_positions(mask, (6, 5, 5), tensor="scores")
    assert heads is not None
    assert [int(heads[i].sum()) for i in range(6)] == [4, 4, 4, 16, 16, 16]
    second = kept_positions(mask, (5, 2, 7), tensor="time first")
    assert second is not None
    assert (second[:, :, 0] == mask.T).all()
    shared = kept_positions(mask, (1, 5, 7), tensor="places")
    assert shared is not None
    assert shared.ravel().tolist() == [True, True, True, True, False]
    names = MaskDims(batch="batch", sequence="length")
    table = kept_positions(mask, (4, 5, 5), tensor="b", dims=(4, "length", "length"), names=names)
    assert table is not None
    assert table.shape == (1, 5, 5)
    flat = kept_positions(mask, (10, 7), tensor="rows")
    assert flat is not None
    assert (flat[:, 0] == mask.ravel()).all()


def test_what_size_alone_would_decide_is_refused_by_name() -> None:
    model = transformer(LENGTH, width=14)
    names, dims = _names(model, LENGTH)
    assert 7 in names.widths  # the heads are as wide as the text is long
    mask = np.array([[True] * 4 + [False] * 3])
    with pytest.raises(DataError, match=r"QD303.*tensor query.*width"):
        kept_positions(mask, (1, 2, 7, 7), tensor="query", dims=dims["query"], names=names)
    chosen = kept_positions(mask, (1, 2, 7, 7), tensor="query", axes=(2,))
    assert chosen is not None
    assert chosen.shape == (1, 1, 7, 1)
    # With names there is nothing to guess.
    names, dims = _names(transformer("length", width=14), "length")
    known = kept_positions(mask, (1, 7, 14), tensor="hidden", dims=dims["hidden"], names=names)
    assert known is not None
    assert known.shape == (1, 7, 1)
    with pytest.raises(DataError, match=r"QD303.*the batch is 3 too"):
        kept_positions(np.eye(3, dtype=bool), (3, 3, 4), tensor="t")
    with pytest.raises(DataError, match=r"QD303.*no axis is the batch of 2"):
        kept_positions(np.eye(2, 6, dtype=bool), (3, 6, 4), tensor="t")


def test_masks_with_holes_lose_their_ends_only() -> None:
    sample = {"ids": np.arange(6), "mask": np.array([0, 1, 0, 1, 1, 0])}
    source = Trimmed(source=Memory([sample]), mask_input="mask", axes={"ids": (-1,), "mask": (-1,)})
    assert source.load("0")["ids"].tolist() == [1, 2, 3, 4]


def test_samples_with_their_own_batch_axis_are_cut_to_their_longest_row() -> None:
    sample = {
        "ids": np.arange(12).reshape(2, 6),
        "mask": np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
        "both": np.ones((2, 6, 6)),
    }
    axes = sequence_axes(
        [
            InputSpec(name="ids", dtype="int64", shape=("n", "length")),
            InputSpec(name="mask", dtype="int64", shape=("n", "length")),
            InputSpec(name="both", dtype="float64", shape=("n", "length", "length")),
        ],
        "mask",
        sample,
    )
    assert axes["both"] == (-2, -1)
    cut = Trimmed(source=Memory([sample]), mask_input="mask", axes=axes).load("0")
    assert [cut[name].shape for name in ("ids", "mask", "both")] == [(2, 3), (2, 3), (2, 3, 3)]


def test_samples_and_models_that_cannot_be_trimmed() -> None:
    axes = {"ids": (-1,), "mask": (-1,)}
    ids = np.arange(4)

    def load(sample: dict[str, NDArray[Any]]) -> Any:
        return Trimmed(source=Memory([sample]), mask_input="mask", axes=axes).load("0")

    with pytest.raises(DataError, match=r"QD306.*zeros alone"):
        load({"ids": ids, "mask": np.zeros(4, int)})
    with pytest.raises(DataError, match="QD307"):
        load({"ids": ids})
    with pytest.raises(DataError, match=r"QD303.*input ids"):
        load({"ids": ids, "mask": np.ones(5, int)})
    with pytest.raises(DataError, match=r"QD303.*input mask"):
        load({"ids": ids, "mask": np.ones((1, 4, 4), int)})
    sample = {"ids": ids, "mask": np.ones(4, int), "positions": ids}
    with pytest.raises(DataError, match=r"QD307.*attention"):
        sequence_axes(specs("length"), "attention", sample)
    with pytest.raises(DataError, match=r"QD303.*fixed length 4"):
        sequence_axes(specs(4), "mask", sample)
    assert sequence_axes(specs(4), "mask", sample, fixed=True)["ids"] == (-1,)
    assert sequence_axes(specs(None), "mask", sample)["ids"] == (-1,)
    picture = InputSpec(name="picture", dtype="float32", shape=("batch", "high", "wide"))
    with pytest.raises(DataError, match=r"QD303.*input picture, dimension high"):
        sequence_axes([*specs("length"), picture], "mask", {**sample, "picture": np.ones((4, 5))})
    square = InputSpec(name="square", dtype="float32", shape=("batch", 4, 4))
    with pytest.raises(DataError, match=r"QD303.*input square"):
        sequence_axes([*specs(4), square], "mask", {**sample, "square": ids}, fixed=True)


def _texts(n: int) -> Memory:
    random = np.random.default_rng(5)
    texts = [random.integers(1, VOCABULARY, 1 + i * 5 % 8) for i in range(n)]
    return Memory([{"ids": ids, "positions": np.arange(len(ids))} for ids in texts])


@pytest.mark.parametrize("side", ["left", "right"])
def test_buckets_pad_to_few_lengths_and_run_together(side: Any) -> None:
    source = Bucketed(
        source=_texts(10),
        mask_input="mask",
        lengths=(4, 8),
        axes={"ids": (-1,), "positions": (-1,), "mask": (-1,)},
        pad_values={"ids": 0, "positions": 3},
        side=side,
    )
    assert isinstance(source, DataSource)
    manifest = SampleManifest.first(source)
    grid = micro_batches(manifest, 3, bucketed=True)
    assert {dict(batch.shapes)["ids"] for batch in grid} == {(4,), (8,)}
    assert len(grid) < len(micro_batches(manifest, 3))
    model = transformer("length")
    names, dims = _names(model, "length")
    for batch in grid:
        feeds = stack(batch.load(source))
        outputs = run(model, feeds)
        mask = feeds["mask"] != 0
        alone = []
        for key, row in zip(batch.keys, mask, strict=True):
            bare = source.source.load(key)
            inner = row.nonzero()[0]
            assert (np.diff(inner) == 1).all()
            assert inner[0 if side == "right" else -1] == (0 if side == "right" else len(row) - 1)
            assert row.sum() == len(bare["ids"])
            alone.append(run(model, stack([{**bare, "mask": np.ones_like(bare["ids"])}])))
        for tap in TAPS:
            array = outputs[tap]
            kept = kept_positions(mask, array.shape, tensor=tap, dims=dims[tap], names=names)
            counted = array if kept is None else array[np.broadcast_to(kept, array.shape)]
            bare_values = np.concatenate([output[tap].ravel() for output in alone])
            assert np.allclose(np.sort(counted.ravel()), np.sort(bare_values), atol=1e-5)


def test_buckets_that_do_not_fit(tmp_path: Path) -> None:
    axes = {"ids": (-1,), "mask": (-1,)}

    def bucketed(**settings: Any) -> Bucketed:
        fields: dict[str, Any] = {
            "source": Memory([{"ids": np.arange(9)}]),
            "mask_input": "mask",
            "lengths": (4, 8),
            "axes": axes,
            "pad_values": {"ids": 0},
        }
        return Bucketed(**{**fields, **settings})

    with pytest.raises(DataError, match=r"QD303.*length 9.*at most 8"):
        bucketed().load("0")
    assert bucketed(lengths=(9,)).load("0")["mask"].tolist() == [1] * 9
    assert bucketed(lengths=(9,)).uniform
    for lengths in ((), (8, 4), (4, 4), (0, 4)):
        with pytest.raises(ConfigError, match=r"QD104.*length_buckets"):
            bucketed(lengths=lengths)
    with pytest.raises(ConfigError, match=r"QD105.*ids"):
        bucketed(pad_values={})
    with pytest.raises(DataError, match="QD307"):
        bucketed(source=Memory([{"other": np.arange(3)}])).load("0")
    own = bucketed(source=Memory([{"ids": np.arange(6).reshape(2, 3)}])).load("0")
    assert own["mask"].tolist() == [[1, 1, 1, 0]] * 2
    np.savez(tmp_path / "a.npz", ids=np.zeros((2, 3), np.int64))
    stored = ArraySource(path=tmp_path / "a.npz", inputs={"ids": "ids"})
    source = bucketed(source=stored, mask_dtype="bool")
    assert pickle.loads(pickle.dumps(source)).load("000000")["mask"].dtype == bool
    assert source.preprocessing() != bucketed(source=stored).preprocessing()
