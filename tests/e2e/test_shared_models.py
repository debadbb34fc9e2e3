"""Real models, from the file to an artifact that runs. Skipped where the folder is absent."""

from __future__ import annotations

import gzip
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qdist.calibration import first_feeds, input_specs
from qdist.data.source import Feeds
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.builtin import Runner
from qdist.model.difference import frozen_difference
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.taps import find_taps
from tests.onnx_models import EXECUTION, HeldSamples, planner_for, projected

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
DATA = SHARED / "data"
N_SAMPLES = 3

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real models is absent"),
]


def cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> list[NDArray[np.float32]]:
    with np.load(DATA / "cifar10_clean242_vnncomp.npz") as archive:
        images = next(array for array in map(archive.get, archive.files) if array.ndim == 4)
    images = images[:N_SAMPLES]
    if images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    scaled = images.astype(np.float32) / (255 if images.max() > 1 else 1)
    shape = (1, 3, 1, 1)
    whitened = (scaled - np.reshape(mean, shape)) / np.reshape(std, shape)
    return list(whitened.astype(np.float32))


def resnet() -> list[Feeds]:
    return [{"input": x} for x in cifar((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def vit() -> list[Feeds]:
    return [{"input": x} for x in cifar((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]


def keywords() -> list[Feeds]:
    with np.load(DATA / "kws01_mfcc.npz") as archive:
        features = next(a for a in map(archive.get, archive.files) if a.size // len(a) == 490)
    scaled = (features[:N_SAMPLES].astype(np.float32) - 83) * 0.5847029
    return [{"input": x.reshape(1, 49, 10).astype(np.float32)} for x in scaled]


def mnist() -> list[Feeds]:
    with gzip.open(DATA / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(16 + 784 * N_SAMPLES), np.uint8, offset=16)
    return [{"Input3": x} for x in raw.astype(np.float32).reshape(-1, 1, 28, 28)]


def speech() -> list[Feeds]:
    """Chunks of 512 with 64 before them; they bring their batch axis, as ``sr`` has none."""
    with wave.open(str(DATA / "speech_20s.wav")) as file:
        signal = np.frombuffer(file.readframes(48_000), "<i2").astype(np.float32) / 32768
    return [
        {
            "input": signal[None, start : start + 576],
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000, np.int64),
        }
        for start in (16_000, 24_000, 32_000)
    ]


def photos() -> list[Feeds]:
    samples = []
    for path in sorted((DATA / "imagenet100").glob("*.jpg"))[:N_SAMPLES]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((224, 224)), np.float32) / 255
        x = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        samples.append({"input": x.transpose(2, 0, 1).astype(np.float32)})
    return samples


def streets() -> list[Feeds]:
    samples = []
    for path in sorted((DATA / "coco8" / "images").glob("*.jpg"))[:2]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((416, 416)), np.float32)
        samples.append({"images": np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1))})
    return samples


def stories() -> list[Feeds]:
    """Random tokens after a BOS, of different lengths."""
    rng = np.random.default_rng(5)
    return [{"input_ids": np.append(1, rng.integers(3, 512, n))} for n in (15, 15, 40)]


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """``sqnr_db``: what the first output has to reach at int8, w8a16 and w4a8 on the calibration
    samples: well below what good wiring gives, and well above what bad wiring does."""

    file: str
    samples: Callable[[], list[Feeds]]
    sqnr_db: tuple[float, float, float]


REAL_MODELS = (
    RealModel(file="cifar10_resnet20.onnx", samples=resnet, sqnr_db=(25, 30, 5)),
    RealModel(file="cifar10_vit_ibp_3_3_8.onnx", samples=vit, sqnr_db=(15, 25, 5)),
    RealModel(file="mlperf_tiny_kws_dscnn.onnx", samples=keywords, sqnr_db=(25, 30, 5)),
    RealModel(file="mnist-8_cntk.onnx", samples=mnist, sqnr_db=(30, 30, 10)),
    RealModel(file="silero_vad_16k_op15.onnx", samples=speech, sqnr_db=(10, 10, 3)),
    RealModel(file="squeezenet1.1.onnx", samples=photos, sqnr_db=(20, 20, 2)),
    RealModel(file="stories260K/model.onnx", samples=stories, sqnr_db=(15, 30, 8)),
    RealModel(file="yolox_nano_coco.onnx", samples=streets, sqnr_db=(5, 15, 2)),
)


def test_every_model_of_the_folder_is_tried() -> None:
    models = SHARED / "models"
    present = {path.relative_to(models).as_posix() for path in models.rglob("*.onnx")}
    assert present == {real.file for real in REAL_MODELS}


@pytest.mark.parametrize("real", REAL_MODELS, ids=lambda real: real.file)
def test_model_goes_all_the_way(real: RealModel, tmp_path: Path) -> None:
    frozen = freeze(load_model(SHARED / "models" / real.file))
    source = HeldSamples(samples=real.samples())
    graph = Graph(frozen)
    inputs = input_specs(graph)
    every = [first_feeds(HeldSamples(samples=[sample]), inputs) for sample in source.samples]
    for feeds in every:
        assert frozen_difference(frozen, feeds, EXECUTION) <= 1e-6
    assert len(find_taps(graph).points) >= 10
    planner = planner_for(frozen, source, tmp_path / "store")
    runner = Runner(frozen.source, EXECUTION)
    expected = [runner.run(feeds) for feeds in every]
    for precision, least_db in zip(("int8", "w8a16", "w4a8"), real.sqnr_db, strict=True):
        plan = projected(planner, precision)
        coverage = plan.plan.coverage()
        assert coverage.n_quantized == coverage.n_compute > 0
        artifact = emit_qdq(frozen, plan, tmp_path / f"{precision}.onnx")
        assert artifact.n_bytes < frozen.n_source_bytes * (1 if precision == "w4a8" else 1.5)
        quantized = Runner(artifact.path, EXECUTION)
        found = [quantized.run(feeds) for feeds in every]
        assert all(np.isfinite(array).all() for outputs in found for array in outputs)
        assert sqnr_db(expected, found) > least_db, precision


def sqnr_db(
    expected: list[list[NDArray[np.float32]]], found: list[list[NDArray[np.float32]]]
) -> float:
    """Of the first output over all samples."""
    pairs = [(e[0].astype(np.float64), f[0]) for e, f in zip(expected, found, strict=True)]
    signal = sum(float(np.square(e).sum()) for e, _ in pairs)
    noise = sum(float(np.square(e - f).sum()) for e, f in pairs)
    return float(10 * np.log10(signal / noise))
