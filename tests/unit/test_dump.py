"""Dumps in SlimAI's layout: which files there are, what they hold, and that they can be read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.emit.qdq import Artifact, emit_qdq
from qdist.errors import ConfigError, DataError
from qdist.evaluate.blob import as_nchw, file_names, read_blob, sample_names, write_blob
from qdist.evaluate.builtin import Runner, batches
from qdist.evaluate.compare import compare_layers
from qdist.evaluate.dump import dump_comparison, profile_text
from qdist.model.freeze import FrozenModel
from qdist.plan.target import ProjectedPlan
from tests.onnx_models import (
    EXECUTION,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its quantized file and the samples both run on."""

    frozen: FrozenModel
    plan: ProjectedPlan
    artifact: Artifact
    source: HeldSamples

    def dump(self, folder: Path, level: int, **options: Any) -> list[Path]:
        settings = {"model_name": "net", "tag": "92", **options}
        return dump_comparison(
            self.frozen,
            self.plan,
            self.artifact.path,
            self.source,
            EXECUTION,
            folder,
            level,
            **settings,
        )

    def outputs(self, path: Path, key: int) -> list[NDArray[Any]]:
        runner = Runner(path, EXECUTION)
        (batch,) = batches(HeldSamples(samples=[self.source.samples[key]]), runner.inputs, 1)
        return runner.run(batch.feeds)


def case(tmp_path: Path, batch: int | str = "n", source: HeldSamples | None = None) -> Case:
    """Conv, Relu, a reduction and a matmul, with an image and a vector as outputs."""
    nodes = [
        onnx.helper.make_node("Conv", ["x", "k"], ["/conv/out:0"], "/conv 1", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["/conv/out:0"], ["map"], "/relu"),
        onnx.helper.make_node("GlobalAveragePool", ["map"], ["pooled"], "/pool"),
        onnx.helper.make_node("Flatten", ["pooled"], ["flat"], "/flatten"),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["log/its"], "/head"),
    ]
    outputs = [value("map", [batch, 4, 5, 6]), value("log/its", [batch, 3])]
    constants = {"k": normal(4, 2, 3, 3, seed=3), "w": normal(4, 3, seed=4)}
    proto = model(nodes, [value("x", [batch, 2, 5, 6])], outputs, constants)
    frozen = frozen_from(proto, tmp_path / "net.onnx")
    source = source or samples_of("x", 2, 5, 6, n=6)
    plan = projected(planner_for(frozen, source, tmp_path / "store"))
    artifact = emit_qdq(frozen, plan, tmp_path / "quantized.onnx")
    return Case(frozen=frozen, plan=plan, artifact=artifact, source=source)


def recurrent(tmp_path: Path) -> Case:
    """An LSTM of which only the last state is used, and a matmul."""
    nodes = [
        onnx.helper.make_node("LSTM", ["x", "w", "r"], ["", "last"], "lstm", hidden_size=4),
        onnx.helper.make_node("MatMul", ["last", "k"], ["y"], "head"),
    ]
    proto = model(
        nodes,
        [value("x", [5, 1, 3])],
        [value("last", [1, 1, 4]), value("y", [1, 1, 2])],
        {"w": normal(1, 16, 3, seed=3), "r": normal(1, 16, 4, seed=4), "k": normal(4, 2, seed=5)},
    )
    frozen = frozen_from(proto, tmp_path / "net.onnx")
    source = HeldSamples(samples=[{"x": normal(5, 1, 3, seed=i)} for i in range(4)])
    plan = projected(planner_for(frozen, source, tmp_path / "store"))
    artifact = emit_qdq(frozen, plan, tmp_path / "quantized.onnx")
    return Case(frozen=frozen, plan=plan, artifact=artifact, source=source)


def below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


class TestLevels:
    def test_0_writes_nothing(self, tmp_path: Path) -> None:
        assert case(tmp_path).dump(tmp_path / "out", 0) == []
        assert not (tmp_path / "out").exists()

    def test_1_is_the_float_reference(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        folder = tmp_path / "out"
        written = net.dump(folder, 1, max_samples=2)
        assert (folder / "output_control.octrl").read_text() == "[map log_its] save\n"
        blobs = {f"net_ref/000{i}_{name}.blob" for i in (0, 1) for name in ("map", "log_its")}
        assert below(folder) == {"output_control.octrl", "names.json", *blobs}
        assert {path.relative_to(folder).as_posix() for path in written} == below(folder)
        image, vector = net.outputs(net.frozen.source, 1)
        coefficient, found = read_blob(folder / "net_ref" / "0001_log_its.blob")
        assert coefficient == 1.0
        np.testing.assert_allclose(found, vector.reshape(1, 3, 1, 1), atol=1e-5)
        _, found = read_blob(folder / "net_ref" / "0001_map.blob")
        np.testing.assert_allclose(found, image.transpose(0, 3, 1, 2), atol=1e-5)

    def test_2_adds_what_ships_and_its_ranges(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        folder = tmp_path / "out"
        net.dump(folder, 1, max_samples=1)
        first = below(folder)
        net.dump(folder, 2, max_samples=1)
        assert below(folder) - first == {
            "net_92/0000_map.blob",
            "net_92/0000_log_its.blob",
            "net_92.yaml",
            "BestProfile.txt",
        }
        assert (folder / "BestProfile.txt").read_text() == "net_92.yaml\n"
        _, vector = net.outputs(net.artifact.path, 0)
        _, found = read_blob(folder / "net_92" / "0000_log_its.blob")
        np.testing.assert_allclose(found.ravel(), vector.ravel(), atol=1e-6)
        _, reference = read_blob(folder / "net_ref" / "0000_log_its.blob")
        assert not np.array_equal(found, reference)

    def test_3_adds_every_layer_and_its_similarity(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        folder = tmp_path / "out"
        net.dump(folder, 3, max_samples=3)
        names = ["conv_1", "relu", "pool", "head"]
        for side in ("net_ref", "net_92"):
            layers = {p.name for p in (folder / side / "layers").iterdir()}
            assert layers == {f"000{i}_{name}.blob" for i in range(3) for name in names}
        lines = (folder / "similarity.txt").read_text().splitlines()
        form = r"The similarity of (\S+) between fixed and float model is: (-?\d\.\d{6})"
        found = [re.fullmatch(form, line) for line in lines]
        assert [match and match[1] for match in found] == names
        # The mean over samples of the cosine of what the blobs hold.
        for match in found:
            assert match is not None
            cosines = []
            for i in range(3):
                pair = [
                    read_blob(folder / side / "layers" / f"000{i}_{match[1]}.blob")[1].ravel()
                    for side in ("net_ref", "net_92")
                ]
                norms = np.linalg.norm(pair[0]) * np.linalg.norm(pair[1])
                cosines.append(float(pair[0] @ pair[1] / norms))
            assert float(match[2]) == pytest.approx(np.mean(cosines), abs=2e-5)
            assert 0.9 < float(match[2]) < 1.0

    def test_one_sample_gives_the_cosine_of_the_comparison(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        net.dump(tmp_path / "out", 3, max_samples=1)
        text = (tmp_path / "out" / "similarity.txt").read_text()
        rows = compare_layers(net.frozen, net.plan, net.source, EXECUTION, batch=1, n_samples=1)
        head = next(row for row in rows if row.name == "/head")
        assert f"of head between fixed and float model is: {head.in_place.cosine:.6f}\n" in text

    def test_inner_images_stay_as_onnx_has_them(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        net.dump(tmp_path / "out", 3, max_samples=1)
        image, _ = net.outputs(net.frozen.source, 0)
        _, found = read_blob(tmp_path / "out" / "net_ref" / "layers" / "0000_relu.blob")
        np.testing.assert_allclose(found, image, atol=1e-5)

    def test_a_layer_whose_first_output_is_unused_has_its_next(self, tmp_path: Path) -> None:
        net = recurrent(tmp_path)
        net.dump(tmp_path / "out", 3, max_samples=1)
        _, found = read_blob(tmp_path / "out" / "net_ref" / "layers" / "0000_lstm.blob")
        last, _ = net.outputs(net.frozen.source, 0)
        np.testing.assert_allclose(found.ravel(), last.ravel(), atol=1e-5)

    def test_a_fixed_batch_is_split_into_its_samples(self, tmp_path: Path) -> None:
        (tmp_path / "fixed").mkdir()
        (tmp_path / "free").mkdir()
        case(tmp_path / "fixed", batch=2).dump(tmp_path / "a", 3, max_samples=3)
        case(tmp_path / "free").dump(tmp_path / "b", 3, max_samples=3)
        assert below(tmp_path / "a") == below(tmp_path / "b")
        for name in ("net_ref/0002_log_its.blob", "net_92/layers/0001_relu.blob"):
            (_, a), (_, b) = (read_blob(tmp_path / side / name) for side in ("a", "b"))
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_file_names_can_be_traced_back(self, tmp_path: Path) -> None:
        net = case(tmp_path)
        net.dump(tmp_path / "out", 3, max_samples=1, model_name="my/net", tag="a b")
        assert (tmp_path / "out" / "my_net_a_b.yaml").is_file()
        names = yaml.safe_load((tmp_path / "out" / "names.json").read_text())
        assert names["outputs"] == {"map": "map", "log_its": "log/its"}
        assert names["layers"]["conv_1"] == "/conv 1"
        assert names["samples"] == {"0000": "0000"}

    @pytest.mark.parametrize(("level", "n"), [(4, 1), (-1, 1), (3, 0)])
    def test_other_levels_are_refused(self, tmp_path: Path, level: int, n: int) -> None:
        with pytest.raises(ConfigError, match="QD104"):
            case(tmp_path).dump(tmp_path / "out", level, max_samples=n)
        assert not (tmp_path / "out").exists()

    def test_no_samples_are_refused(self, tmp_path: Path) -> None:
        net = replace(case(tmp_path), source=HeldSamples(samples=[]))
        with pytest.raises(DataError, match="QD302"):
            net.dump(tmp_path / "out", 1)


class TestProfile:
    def test_gives_back_the_quantizers(self, tmp_path: Path) -> None:
        plan = case(tmp_path).plan.plan
        text = profile_text(plan)
        version, header, nodes = yaml.safe_load_all(text)
        assert version == {"GlowToolsVersion": ""}
        assert header == {"GraphPreLowerHash": 0}
        quantizers = {e.tensor: e.quantizer for layer in plan.layers for e in layer.activations}
        assert {node["NodeOutputName"] for node in nodes} == set(quantizers)
        for node in nodes:
            q = quantizers[node["NodeOutputName"]]
            scale = (node["Max"] - node["Min"]) / (q.high - q.low)
            assert scale == pytest.approx(q.scales[0], rel=1e-6)
            assert q.low - node["Min"] / scale == pytest.approx(q.zero_points[0], abs=1e-3)

    def test_says_that_the_vendors_tool_does_not_load_it(self, tmp_path: Path) -> None:
        head = profile_text(case(tmp_path).plan.plan).split("---")[0]
        assert all(line.startswith("#") for line in head.splitlines())
        assert "does not load" in head

    def test_small_and_whole_ranges_stay_numbers(self, tmp_path: Path) -> None:
        plan = case(tmp_path).plan.plan
        layers = []
        for i, layer in enumerate(plan.layers):
            scale = 2.0**-40 if i else 1.0
            layers.append(
                replace(
                    layer,
                    activations=tuple(
                        replace(
                            e, quantizer=replace(e.quantizer, scales=(scale,), zero_points=(0,))
                        )
                        for e in layer.activations
                    ),
                )
            )
        *_, nodes = yaml.safe_load_all(profile_text(replace(plan, layers=tuple(layers))))
        assert nodes[0]["Min"] == -128.0
        for node in nodes:
            assert isinstance(node["Min"], float)
            assert isinstance(node["Max"], float)

    def test_a_tensor_with_two_quantizers_has_the_range_of_both(self, tmp_path: Path) -> None:
        plan = case(tmp_path).plan.plan
        first = next(layer for layer in plan.layers if layer.activations)
        entry = first.activations[0]
        twice = [
            replace(entry, quantizer=replace(entry.quantizer, scales=(s,), zero_points=(z,)))
            for s, z in ((1.0, 100), (0.5, -100))
        ]
        layers = tuple(replace(first, activations=(one,)) for one in twice)
        *_, nodes = yaml.safe_load_all(profile_text(replace(plan, layers=layers)))
        (node,) = nodes
        assert (node["NodeOutputName"], node["Min"], node["Max"]) == (entry.tensor, -228.0, 113.5)

    def test_a_float_plan_has_no_nodes(self, tmp_path: Path) -> None:
        plan = replace(case(tmp_path).plan.plan, layers=())
        assert list(yaml.safe_load_all(profile_text(plan)))[2] == []


SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=6).map(tuple)


class TestBlob:
    def test_has_the_documented_form(self, tmp_path: Path) -> None:
        values = np.zeros((1, 1, 5618, 15), np.float32)
        values[0, 0, :4, 0] = [0.996356, 0.998880, 0.997434, 0.997196]
        path = write_blob(tmp_path / "a.blob", as_nchw(values, is_output=True))
        first, second = path.read_text().splitlines()
        assert first == "1.00000000e+00 5618 1 15 1 F32"
        assert second.startswith("0.996356 0.998880 0.997434 0.997196 0.000000 ")
        assert len(second.split(" ")) == 5618 * 15

    @given(shape=SHAPES, is_output=st.booleans(), seed=st.integers(0, 9))
    def test_round_trip(
        self, tmp_path_factory: pytest.TempPathFactory, shape: Any, is_output: bool, seed: int
    ) -> None:
        values = (1000 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
        nchw = as_nchw(values, is_output=is_output)
        path = write_blob(tmp_path_factory.mktemp("blob") / "a.blob", nchw)
        coefficient, found = read_blob(path)
        assert coefficient == 1.0
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, nchw, rtol=1e-7, atol=5.1e-7)

    @given(shape=SHAPES, is_output=st.booleans())
    def test_every_value_has_one_place(self, shape: Any, is_output: bool) -> None:
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        nchw = as_nchw(values, is_output=is_output)
        assert nchw.ndim == 4
        assert sorted(nchw.ravel().tolist()) == sorted(values.ravel().tolist())
        assert len(shape) < 2 or nchw.shape[0] == shape[0]

    @pytest.mark.parametrize(
        ("shape", "is_output", "nchw"),
        [
            ((), True, (1, 1, 1, 1)),
            ((7,), True, (1, 7, 1, 1)),
            ((2, 7), True, (2, 7, 1, 1)),
            ((2, 5, 7), True, (2, 7, 1, 5)),
            ((2, 5, 7), False, (2, 7, 1, 5)),
            ((2, 3, 5, 7), True, (2, 7, 3, 5)),
            ((2, 3, 5, 7), False, (2, 3, 5, 7)),
            ((2, 3, 4, 5, 7), True, (2, 7, 12, 5)),
            ((2, 3, 4, 5, 7), False, (2, 3, 20, 7)),
        ],
    )
    def test_ranks(self, shape: tuple[int, ...], is_output: bool, nchw: tuple[int, ...]) -> None:
        assert as_nchw(np.zeros(shape), is_output=is_output).shape == nchw

    def test_infinity_and_nan_can_be_read_back(self, tmp_path: Path) -> None:
        values = np.array([np.inf, -np.inf, np.nan, 1.5], np.float32).reshape(1, 1, 1, 4)
        _, found = read_blob(write_blob(tmp_path / "a.blob", values))
        np.testing.assert_array_equal(found, values)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "1.0 2 1 1 1 F32\n1.0",
            "1.0 2 1 1 F32\n1.0 2.0",
            "1.0 2 1 1 1 S8\n1 2",
            "1.0 2 1 1 1 F32\n1.0 two",
        ],
    )
    def test_what_is_no_blob_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.blob").write_text(content)
        with pytest.raises(DataError, match="QD306"):
            read_blob(tmp_path / "a.blob")

    def test_a_missing_blob_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="QD306"):
            read_blob(tmp_path / "none.blob")


class TestNames:
    def test_are_safe_and_tell_names_apart(self) -> None:
        names = ["/a/b", "a_b", "A_B", "a b", "..", "", "x" * 400 + "1", "x" * 400 + "2", "层/一"]
        parts = file_names(names)
        assert parts["/a/b"] == "a_b"
        assert parts["层/一"] == "层_一"
        assert len({part.casefold() for part in parts.values()}) == len(names)
        for part in parts.values():
            assert re.fullmatch(r"\w[\w.-]*", part)
            assert len(part.encode()) <= 100

    @given(st.lists(st.text(max_size=12), unique=True, max_size=12))
    def test_no_two_are_equal(self, names: list[str]) -> None:
        parts = file_names(names)
        assert list(parts) == names
        assert len({part.casefold() for part in parts.values()}) == len(names)

    def test_samples_lose_the_extension_of_an_image(self) -> None:
        keys = ["val/ILSVRC2012_val_00000001.png", "a.jpg", "a.png", "000007", "v1.5"]
        parts = sample_names(keys, [["out"]])
        assert list(parts.values()) == ["val_ILSVRC2012_val_00000001", "a", "a.2", "000007", "v1.5"]

    def test_a_sample_and_an_output_never_meet_another_pair(self) -> None:
        outputs = ["c", "b_c"]
        parts = sample_names(["a", "a_b"], [outputs, ["layer"]])
        files = [f"{part}_{name}" for part in parts.values() for name in outputs]
        assert len(set(files)) == 4
