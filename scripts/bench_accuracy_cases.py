"""The models whose accuracy is measured, and the samples that calibrate and score them.

Two lie in the package; the others are real ones out of a folder that may be absent. What calibrates
a model never scores it. All samples of a model have one shape, since the histogram calibrators of
ONNX Runtime fail on others.
"""

from __future__ import annotations

import gzip
import wave
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.arrays import ArraySource
from qdist.data.images import ImageSource
from qdist.data.preprocess import Preprocess
from qdist.data.source import DataSource, Feeds
from qdist.data.subset import Limited
from qdist.data.text import TextSource
from qdist.evaluate.builtin import Outputs, Runner
from qdist.model.session import Execution

DEMO = Path(__file__).resolve().parents[1] / "qdist" / "demo"
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10: Normalization = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
KWS_STEP, KWS_ZERO = 0.5847029, 83.0
LENGTH = 256
"""Tokens of a chunk of text."""
CHUNK, CONTEXT, RATE = 512, 64, 16_000
"""Speech: samples of a chunk, samples before it that are given with it, samples a second."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A source whose samples stay in memory once they were read: dozens of models read them."""

    source: DataSource
    _loaded: dict[str, Feeds] = field(default_factory=dict, repr=False)

    def keys(self) -> list[str]:
        """The source's."""
        return self.source.keys()

    def content_digest(self, key: str) -> str:
        """The source's."""
        return self.source.content_digest(key)

    def preprocessing(self) -> dict[str, Any]:
        """The source's."""
        return self.source.preprocessing()

    def load(self, key: str) -> Feeds:
        """The source's arrays, the same ones every time: they are not to be changed."""
        if key not in self._loaded:
            self._loaded[key] = self.source.load(key)
        return self._loaded[key]

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The source's."""
        return self.source.label(key)


def _as_found(outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyCase:
    """A model with its data. ``metric``: of the score; ``batch``: samples a run when scoring;
    ``loss_of_a_point``: by how much the score gets worse with what counts as one point;
    ``n_ranking``: calibration samples that pickers run the model on;
    ``decision``: outputs -> the arrays whose largest entry along the last axis is what the model
    decides, for agreement."""

    name: str
    model: Path
    calibration: DataSource
    evaluation: DataSource
    metric: str
    batch: int = 32
    micro_batch: int = 4
    loss_of_a_point: float = 0.01
    n_ranking: int = 8
    decision: Callable[[Outputs], Outputs] = _as_found

    def kept(self) -> AccuracyCase:
        """The same with all samples in memory once they were read."""
        return replace(
            self, calibration=Kept(source=self.calibration), evaluation=Kept(source=self.evaluation)
        )

    def shortened(self, n_calibration: int, n_evaluation: int) -> AccuracyCase:
        """The same model with the first samples of both sets alone."""
        return replace(
            self,
            calibration=Limited(source=self.calibration, max_samples=n_calibration),
            evaluation=Limited(source=self.evaluation, max_samples=n_evaluation),
        )


def _digits(name: str) -> AccuracyCase:
    preprocess = Preprocess(scale=0.0625, mean=(0.3,), std=(0.37,))
    path = DEMO / "digits.npz"
    return AccuracyCase(
        name=name,
        model=DEMO / f"{name}.onnx",
        calibration=ArraySource(
            path=path, inputs={"images": "calibration_images"}, preprocess=preprocess
        ),
        evaluation=ArraySource(
            path=path,
            inputs={"images": "test_images"},
            labels="test_labels",
            preprocess=preprocess,
        ),
        metric="top1",
    )


def _squeezenet(assets: Path, folder: Path) -> AccuracyCase:
    mean, std = IMAGENET
    images = assets / "data" / "imagenet100"

    def source(start: int, limit: int | None) -> ImageSource:
        return ImageSource(
            folder=images,
            labels_file=images / "labels.csv",
            input_name="input",
            crop=224,
            start=start,
            limit=limit,
            preprocess=Preprocess(scale=1 / 255, mean=mean, std=std),
        )

    return AccuracyCase(
        name="squeezenet1.1",
        model=assets / "models" / "squeezenet1.1.onnx",
        calibration=source(0, 40),
        evaluation=source(40, None),
        metric="top1",
        batch=8,
    )


def _arrays_case(
    name: str,
    model: Path,
    data: Path,
    keys: tuple[str, str, str],
    preprocess: Preprocess,
    limits: tuple[int, int | None],
    batch: int = 32,
    micro_batch: int = 4,
) -> AccuracyCase:
    """``keys``: of the model's input, the samples and the labels; ``limits``: how many samples
    calibrate, and how many of the others score."""
    input_name, samples, labels = keys
    inputs = {input_name: samples}
    n, n_scored = limits
    return AccuracyCase(
        name=name,
        model=model,
        calibration=ArraySource(path=data, inputs=inputs, preprocess=preprocess, limit=n),
        evaluation=ArraySource(
            path=data,
            inputs=inputs,
            labels=labels,
            preprocess=preprocess,
            start=n,
            limit=n_scored,
        ),
        metric="top1",
        batch=batch,
        micro_batch=micro_batch,
    )


def _cifar(assets: Path, name: str, model: str, normalization: Normalization) -> AccuracyCase:
    mean, std = normalization
    return _arrays_case(
        name,
        assets / "models" / model,
        assets / "data" / "cifar10_clean242_vnncomp.npz",
        ("input", "x", "y"),
        Preprocess(transpose=(2, 0, 1), scale=1 / 255, mean=mean, std=std),
        (64, None),
    )


def _resnet(assets: Path, folder: Path) -> AccuracyCase:
    return _cifar(assets, "cifar10_resnet20", "cifar10_resnet20.onnx", IMAGENET)


def _vit(assets: Path, folder: Path) -> AccuracyCase:
    return _cifar(assets, "cifar10_vit", "cifar10_vit_ibp_3_3_8.onnx", CIFAR10)


def _keywords(assets: Path, folder: Path) -> AccuracyCase:
    return _arrays_case(
        "kws_dscnn",
        assets / "models" / "mlperf_tiny_kws_dscnn.onnx",
        assets / "data" / "kws01_mfcc.npz",
        ("input", "x_int8", "y"),
        Preprocess(mean=(KWS_ZERO,), std=(1 / KWS_STEP,)),
        (128, None),
    )


def _mnist(assets: Path, folder: Path) -> AccuracyCase:
    kept = folder / "mnist.npz"
    if not kept.exists():
        data = assets / "data" / "mnist"
        images = gzip.decompress((data / "t10k-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((data / "t10k-labels-idx1-ubyte.gz").read_bytes())
        np.savez(
            kept,
            x=np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28),
            y=np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
        )
    return _arrays_case(
        "mnist8",
        assets / "models" / "mnist-8_cntk.onnx",
        kept,
        ("Input3", "x", "y"),
        Preprocess(),
        (128, 2000),
        batch=1,
        micro_batch=1,
    )


def _stories(assets: Path, folder: Path) -> AccuracyCase:
    model = assets / "models" / "stories260K" / "model.onnx"

    def source(n_samples: int, start_token: int) -> TextSource:
        return TextSource(
            path=assets / "data" / "tinystories_120k.txt",
            tokenizer_path=model.with_name("tok512.bin"),
            input_name="input_ids",
            lengths=(LENGTH,),
            n_samples=n_samples,
            start_token=start_token,
        )

    n_scored = 100
    return AccuracyCase(
        name="stories260K",
        model=model,
        calibration=source(32, n_scored * LENGTH),
        evaluation=source(n_scored, 0),
        metric="nll",
        batch=4,
        micro_batch=1,
    )


def _yolox(assets: Path, folder: Path) -> AccuracyCase:
    """No labels: boxes would have to be decoded first. Its score is the SQNR of its output."""

    def source(start: int) -> ImageSource:
        return ImageSource(
            folder=assets / "data" / "coco8" / "images",
            input_name="images",
            letterbox=(416, 416, 114),
            color="BGR",
            start=start,
            limit=4,
            preprocess=Preprocess(),
        )

    return AccuracyCase(
        name="yolox_nano",
        model=assets / "models" / "yolox_nano_coco.onnx",
        calibration=source(0),
        evaluation=source(4),
        metric="sqnr_db",
        batch=1,
        micro_batch=1,
        n_ranking=1,  # A run for each of its many layers takes minutes a sample.
    )


def _speech(assets: Path, folder: Path) -> AccuracyCase:
    """No labels either, and chunks are no samples of their own: the state that comes with each is
    what the float model made of all chunks before it. The first half calibrates."""
    model = assets / "models" / "silero_vad_16k_op15.onnx"
    kept = folder / "speech"
    if model.is_file() and not kept.exists():
        kept.mkdir()
        _write_chunks(model, assets / "data" / "speech_20s.wav", kept)
    names = {name: name for name in ("input", "state", "sr")}
    n = len(list(kept.glob("*.npz"))) // 2

    def source(start: int, limit: int | None) -> ArraySource:
        return ArraySource(
            path=kept, inputs=names, preprocess=Preprocess(dtype="keep"), start=start, limit=limit
        )

    return AccuracyCase(
        name="silero_vad",
        model=model,
        calibration=source(0, n),
        evaluation=source(n, None),
        metric="sqnr_db",
        batch=1,
        micro_batch=1,
        decision=_is_speech,
    )


def _write_chunks(model: Path, recording: Path, folder: Path) -> None:
    """A file for every chunk of a recording (16 bits, mono), with the state it meets."""
    with wave.open(str(recording)) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    signal = np.concatenate([np.zeros(CONTEXT, np.float32), raw.astype(np.float32) / 32768])
    runner = Runner(model, Execution())
    state = np.zeros((2, 1, 128), np.float32)
    for i, start in enumerate(range(0, raw.size - CHUNK + 1, CHUNK)):
        feeds: Feeds = {
            "input": signal[None, start : start + CONTEXT + CHUNK],
            "state": state,
            "sr": np.array(RATE, np.int64),
        }
        np.savez(folder / f"{i:04d}.npz", allow_pickle=False, **feeds)
        state = runner.run(feeds)[runner.output_names.index("stateN")]


def _is_speech(outputs: Outputs) -> Outputs:
    """The first output is the probability of speech, [b, 1]."""
    return [np.concatenate([1 - outputs[0], outputs[0]], axis=-1)]


Maker = Callable[[Path, Path], AccuracyCase]
CASES: dict[str, Maker] = {
    "stories260K": _stories,
    "yolox_nano": _yolox,
    "squeezenet1.1": _squeezenet,
    "cifar10_vit": _vit,
    "cifar10_resnet20": _resnet,
    "kws_dscnn": _keywords,
    "mnist8": _mnist,
    "silero_vad": _speech,
    "digits_vit": lambda assets, folder: _digits("digits_vit"),
    "digits_cnn": lambda assets, folder: _digits("digits_cnn"),
}
"""Name -> function of (assets, folder for what has to be made) that gives the case; what takes
longest comes first, so that runs side by side end together."""


def make_case(name: str, assets: Path, folder: Path) -> AccuracyCase | None:
    """The case, or None where its model is not there."""
    if not name.startswith("digits") and not assets.is_dir():
        return None
    case = CASES[name](assets, folder)
    return case.kept() if case.model.is_file() else None
