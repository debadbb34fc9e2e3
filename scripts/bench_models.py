"""The models that the calibration benchmark runs, and the samples that they are given.

The encoder is made here, from a fixed seed; the other two are real and come from a folder that may
be absent. Every model has a file of samples that a user could have: token ids, or uint8 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from PIL import Image

from qdist.data.tokenizer import BOS, Tokenizer

SEED = 20240501
MICRO_BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """A transformer encoder as BERT has it: normalization after each residual sum."""

    n_layers: int = 6
    width: int = 384
    n_heads: int = 12
    feed_forward: int = 1536
    vocabulary: int = 1000
    length: int = 128

    def __post_init__(self) -> None:
        if self.width % self.n_heads:
            raise ValueError(f"{self.n_heads} heads do not divide a width of {self.width}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and its samples.

    ``samples``: an .npz whose array ``x`` has one sample per row, or a folder with one .npy per
    sample. ``input_name``: of the model. ``scale``, ``mean``, ``std``: of the preprocessing; none
    means that the stored values are passed on as they are.
    """

    name: str
    model: str
    samples: str
    input_name: str
    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    micro_batch: int = MICRO_BATCH

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Case:
        """From `to_json`."""
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})


def encoder_case(
    folder: Path, n_samples: int, shape: EncoderShape | None = None, name: str = "encoder"
) -> Case:
    """Write the encoder and ``n_samples`` random token sequences into ``folder``."""
    shape = shape or EncoderShape()
    folder.mkdir(parents=True, exist_ok=True)
    model, samples = folder / f"{name}.onnx", folder / f"{name}.npz"
    onnx.save(build_encoder(shape), model)
    rng = np.random.default_rng(SEED + 1)
    np.savez(samples, x=rng.integers(0, shape.vocabulary, (n_samples, shape.length)))
    return Case(name=name, model=str(model), samples=str(samples), input_name="input_ids")


def squeezenet_case(assets: Path, folder: Path, n_samples: int) -> Case | None:
    """Crops of 224 pixels out of ImageNet's images; None where the files are absent.

    The first 100 samples are the centre crops; what follows are other crops of the same images,
    since a repeated sample counts once.
    """
    model = assets / "models" / "squeezenet1.1.onnx"
    images = sorted((assets / "data" / "imagenet100").glob("*.jpg"))
    if not model.is_file() or not images:
        return None
    samples = folder / "squeezenet"
    samples.mkdir(parents=True, exist_ok=True)
    for index, crop in enumerate(_crops([_pixels(path) for path in images], n_samples)):
        np.save(samples / f"{index:06d}.npy", crop)
    return Case(
        name="squeezenet",
        model=str(model),
        samples=str(samples),
        input_name="input",
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def stories_case(assets: Path, folder: Path, n_samples: int, length: int = 128) -> Case | None:
    """Windows of ``length`` tokens of real stories; None where the files are absent.

    They overlap where the text is too short for as many separate ones.
    """
    model = assets / "models" / "stories260K" / "model.onnx"
    vocabulary = model.with_name("tok512.bin")
    text = assets / "data" / "tinystories_120k.txt"
    if not (model.is_file() and vocabulary.is_file() and text.is_file()):
        return None
    tokens = np.array(Tokenizer.read(vocabulary).encode(text.read_text("utf-8")), np.int64)
    starts = np.linspace(0, len(tokens) - length, n_samples).astype(np.int64)
    windows = np.stack([tokens[start : start + length - 1] for start in starts])
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / "stories260k.npz"
    np.savez(samples, x=np.insert(windows, 0, BOS, axis=1))
    return Case(name="stories260k", model=str(model), samples=str(samples), input_name="input_ids")


def build_encoder(shape: EncoderShape) -> onnx.ModelProto:
    """Token ids int64 [batch, length] -> hidden states float32 [batch, length, width], opset 17.

    GELU is written out with Erf, as exporters do. The gains of the normalizations are log-normal,
    so that some channels are much larger than others, as in trained models.
    """
    make = _Encoder(shape)
    hidden = make.embedding()
    for index in range(shape.n_layers):
        hidden = make.layer(f"layer{index}", hidden)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", shape.length])
    output = helper.make_tensor_value_info(
        hidden, TensorProto.FLOAT, ["batch", shape.length, shape.width]
    )
    graph = helper.make_graph(make.nodes, "encoder", [ids], [output], make.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class _Encoder:
    """Collects nodes and weights. Every method returns the name of the tensor that it made."""

    def __init__(self, shape: EncoderShape) -> None:
        self.shape = shape
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._rng = np.random.default_rng(SEED)
        self._scalar("two_root", 2**0.5)
        self._scalar("one", 1.0)
        self._scalar("half", 0.5)
        self._scalar("root_of_head", (shape.width // shape.n_heads) ** 0.5)
        split = np.array([0, 0, shape.n_heads, shape.width // shape.n_heads])
        self._constant("split", split)
        self._constant("joined", np.array([0, 0, shape.width]))

    def embedding(self) -> str:
        shape = self.shape
        words = self._weight("words", shape.vocabulary, shape.width, scale=1.0)
        places = self._weight("places", shape.length, shape.width, scale=0.2)
        found = self._node("Gather", [words, "input_ids"], "embedded")
        return self._normalized(self._node("Add", [found, places], "placed"), "embedding")

    def layer(self, name: str, hidden: str) -> str:
        attended = self._attention(f"{name}.attention", hidden)
        added = self._node("Add", [hidden, attended], f"{name}.added")
        middle = self._normalized(added, f"{name}.first")
        shape = self.shape
        wide = self._linear(f"{name}.up", middle, shape.width, shape.feed_forward)
        narrow = self._linear(
            f"{name}.down", self._gelu(name, wide), shape.feed_forward, shape.width
        )
        return self._normalized(
            self._node("Add", [middle, narrow], f"{name}.sum"), f"{name}.second"
        )

    def _attention(self, name: str, hidden: str) -> str:
        width = self.shape.width
        query, key, value = (
            self._linear(f"{name}.{part}", hidden, width, width) for part in ("q", "k", "v")
        )
        query, value = (self._heads(part, (0, 2, 1, 3)) for part in (query, value))
        scores = self._node("MatMul", [query, self._heads(key, (0, 2, 3, 1))], f"{name}.scores")
        scaled = self._node("Div", [scores, "root_of_head"], f"{name}.scaled")
        shares = self._node("Softmax", [scaled], f"{name}.shares", axis=-1)
        mixed = self._node("MatMul", [shares, value], f"{name}.mixed")
        back = self._node("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
        joined = self._node("Reshape", [back, "joined"], f"{name}.joined")
        return self._linear(f"{name}.out", joined, width, width)

    def _heads(self, tensor: str, order: tuple[int, ...]) -> str:
        split = self._node("Reshape", [tensor, "split"], f"{tensor}.split")
        return self._node("Transpose", [split], f"{tensor}.heads", perm=list(order))

    def _gelu(self, name: str, tensor: str) -> str:
        divided = self._node("Div", [tensor, "two_root"], f"{name}.gelu.divided")
        error = self._node("Erf", [divided], f"{name}.gelu.erf")
        shifted = self._node("Add", [error, "one"], f"{name}.gelu.shifted")
        product = self._node("Mul", [tensor, shifted], f"{name}.gelu.product")
        return self._node("Mul", [product, "half"], f"{name}.gelu")

    def _linear(self, name: str, tensor: str, n_in: int, n_out: int) -> str:
        weight = self._weight(f"{name}.weight", n_in, n_out, scale=n_in**-0.5)
        bias = self._weight(f"{name}.bias", n_out, scale=0.1)
        product = self._node("MatMul", [tensor, weight], f"{name}.product")
        return self._node("Add", [product, bias], name)

    def _normalized(self, tensor: str, name: str) -> str:
        gain = np.exp(self._rng.normal(0, 0.4, self.shape.width)).astype(np.float32)
        self._constant(f"{name}.gain", gain)
        bias = self._weight(f"{name}.shift", self.shape.width, scale=0.1)
        inputs = [tensor, f"{name}.gain", bias]
        return self._node("LayerNormalization", inputs, f"{name}.normalized", axis=-1)

    def _weight(self, name: str, *shape: int, scale: float) -> str:
        self._constant(name, (self._rng.normal(0, scale, shape)).astype(np.float32))
        return name

    def _scalar(self, name: str, value: float) -> None:
        self._constant(name, np.array(value, np.float32))

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self.constants.append(numpy_helper.from_array(value, name))

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def _pixels(path: Path) -> NDArray[np.uint8]:
    """The shorter side at 256 pixels, [3, height, width]."""
    with Image.open(path) as image:
        shorter = min(image.size)
        size = (image.width * 256 // shorter, image.height * 256 // shorter)
        resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _crops(images: list[NDArray[np.uint8]], n: int, side: int = 224) -> Iterator[Any]:
    rng = np.random.default_rng(SEED + 2)
    for index in range(n):
        image = images[index % len(images)]
        room = np.array(image.shape[1:]) - side
        top, left = room // 2 if index < len(images) else rng.integers(0, room + 1)
        yield image[:, top : top + side, left : left + side]


CaseMaker = Callable[[Path, Path, int], "Case | None"]
"""(assets folder, folder to write to, number of samples) -> the case, where it can be had."""

CASES: dict[str, CaseMaker] = {"squeezenet": squeezenet_case, "stories260k": stories_case}
"""The models that are not made here."""
