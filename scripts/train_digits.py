"""Train the two demo models on scikit-learn's handwritten digits and export them to ONNX.

The digits are 1,797 real 8x8 scans with pixel values 0..16: the test set of UCI's "Optical
Recognition of Handwritten Digits", which scikit-learn ships, so nothing is downloaded. The
script writes three files into ``--out``:

* ``digits.npz``: the 160 calibration and 600 test images (uint8, 0..16) with their labels; the
  remaining 1,037 images are the training set, and no other image is trained on;
* ``digits_vit.onnx``: a small vision transformer, opset 17;
* ``digits_cnn.onnx``: a small convolutional network, opset 13.

Both models take ``images`` (float32 ``[batch, 1, 8, 8]``, ``(pixel / 16 - MEAN) / STD``) and give
``logits`` (``[batch, 10]``). This is the only part of the project that needs PyTorch and
scikit-learn. Use an environment of its own::

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install 'torch>=2.8,<3' scikit-learn onnx onnxruntime numpy
    /tmp/torchenv/bin/python scripts/train_digits.py --out qdist/demo

A seed gives the same weights again on the same CPU type and PyTorch release; another CPU may
round differently, so the last digits of the weights, and with them the digests, may differ.
"""

# PyTorch is not in the environment that type-checks the project, so its classes are Any there.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

# Round numbers near the mean and standard deviation of pixel / 16 over the training images,
# which are 0.304 and 0.376.
MEAN = 0.3
STD = 0.37
PIXEL_SCALE = 16.0

CALIBRATION_COUNT = 160
TEST_COUNT = 600
# Apart from --seed, so that models trained with other seeds share one test set.
SPLIT_SEED = 20240229

BATCH = 64
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images (uint8 ``[n, 1, 8, 8]``, 0..16) and labels (int64) of the three parts."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    calibration_images: NDArray[np.uint8]
    calibration_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How one model is built, trained and exported."""

    name: str
    build: Callable[[], Any]
    opset: int
    learning_rate: float


class Attention(nn.Module):
    """Multi-head self-attention from plain matrix products and a softmax.

    ``F.scaled_dot_product_attention`` is avoided on purpose: written out, each of the two
    activation-by-activation products is a MatMul node that a quantizer can see.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.scale = 1.0 / math.sqrt(self.head_width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Any) -> Any:
        """Map ``[batch, tokens, width]`` to the same shape."""
        count, width = VisionTransformer.TOKENS, self.heads * self.head_width
        query, key, value = self.qkv(tokens).split([width] * 3, dim=-1)
        # -1 for the batch and constants elsewhere keep shape arithmetic out of the graph.
        query = query.reshape(-1, count, self.heads, self.head_width).permute(0, 2, 1, 3)
        key = key.reshape(-1, count, self.heads, self.head_width).permute(0, 2, 3, 1)
        value = value.reshape(-1, count, self.heads, self.head_width).permute(0, 2, 1, 3)
        weights = torch.softmax(torch.matmul(query, key) * self.scale, dim=-1)
        mixed = torch.matmul(weights, value).permute(0, 2, 1, 3).reshape(-1, count, width)
        return self.proj(mixed)


class Mlp(nn.Module):
    """The two-layer perceptron of a transformer block, with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Any) -> Any:
        """Map ``[batch, tokens, width]`` to the same shape."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, tokens: Any) -> Any:
        """Map ``[batch, tokens, width]`` to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """A vision transformer: 2x2 patches, 16 patch tokens and a class token."""

    PATCHES = 16
    TOKENS = PATCHES + 1

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.width = width
        self.patch_embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        # Row 0 is the class token and its position in one: only their sum ever matters.
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Any) -> Any:
        """Map ``[batch, 1, 8, 8]`` to ``[batch, 10]``."""
        patches = self.patch_embed(images).reshape(-1, self.width, self.PATCHES).permute(0, 2, 1)
        # A zero row in front leaves room for the class token; expanding the token itself over
        # the batch would add Shape, Where and Expand nodes to the exported graph.
        tokens = F.pad(patches, (0, 0, 1, 0)) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class ConvUnit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()

    def forward(self, maps: Any) -> Any:
        """Map ``[batch, inputs, h, w]`` to ``[batch, outputs, h / stride, w / stride]``."""
        return self.act(self.bn(self.conv(maps)))


class Residual(nn.Module):
    """Two convolutions beside an identity, joined by an Add and a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvUnit(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, maps: Any) -> Any:
        """Map ``[batch, channels, h, w]`` to the same shape."""
        return self.act(maps + self.bn2(self.conv2(self.conv1(maps))))


class ConvNet(nn.Module):
    """A small CNN: stem, residual block, depthwise-separable block, convolution, classifier."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = ConvUnit(1, channels, 3)
        self.residual = Residual(channels)
        self.depthwise = ConvUnit(channels, channels, 3, stride=2, groups=channels)
        self.pointwise = ConvUnit(channels, 2 * channels, 1)
        self.conv = ConvUnit(2 * channels, 2 * channels, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * channels, CLASSES)

    def forward(self, images: Any) -> Any:
        """Map ``[batch, 1, 8, 8]`` to ``[batch, 10]``."""
        maps = self.residual(self.stem(images))
        maps = self.conv(self.pointwise(self.depthwise(maps)))
        return self.fc(torch.flatten(self.pool(maps), 1))


RECIPES = (
    Recipe(name="digits_vit", build=VisionTransformer, opset=17, learning_rate=1e-3),
    Recipe(name="digits_cnn", build=ConvNet, opset=13, learning_rate=2e-3),
)


def split_digits() -> Split:
    """Split the digits into train, calibration and test, each with the classes in proportion."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, np.newaxis]
    labels = digits.target.astype(np.int64)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_COUNT, stratify=labels, random_state=SPLIT_SEED
    )
    train, calibration = train_test_split(
        rest, test_size=CALIBRATION_COUNT, stratify=labels[rest], random_state=SPLIT_SEED
    )
    return Split(
        images[train], labels[train],
        images[calibration], labels[calibration],
        images[test], labels[test],
    )  # fmt: skip


def normalise(pixels: Any) -> Any:
    """Turn pixel values 0..16 (array or tensor, float) into what the models take."""
    return (pixels / PIXEL_SCALE - MEAN) / STD


def augment(pixels: Any) -> Any:
    """Shift, turn, scale and blur with noise a batch of float images with values 0..16."""
    count = len(pixels)
    angle = (torch.rand(count) * 2 - 1) * math.radians(10)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    # The sampling grid spans -1..1, so one pixel of eight is 0.25.
    shift = (torch.rand(count, 2) * 2 - 1) * 0.25
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (
        torch.stack((cosine, -sine, shift[:, 0]), dim=1),
        torch.stack((sine, cosine, shift[:, 1]), dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False)
    return (moved + 0.5 * torch.randn_like(moved)).clamp(0, PIXEL_SCALE)


def train(recipe: Recipe, split: Split, *, seed: int, epochs: int) -> Any:
    """Train one model on the training part and return it in evaluation mode.

    The number of epochs is fixed in advance: picking an epoch by its score on the test part would
    make the reported accuracy too good.
    """
    torch.manual_seed(seed)
    model = recipe.build()
    images = torch.from_numpy(split.train_images).float()
    labels = torch.from_numpy(split.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(labels)).split(BATCH):
            logits = model(normalise(augment(images[picked])))
            loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: Any, recipe: Recipe, path: Path) -> None:
    """Write ``model`` as ONNX with a free batch axis and nothing about this machine in it."""
    exported = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated, yet its node names follow the module tree,
        # which is what a reader of a quantization report looks for. It also warns about
        # constants that it leaves unfolded; fold_constants sees to those.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            exported,
            dynamo=False,
            opset_version=recipe.opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    proto = onnx.load_from_string(exported.getvalue())
    proto.graph.name = recipe.name
    fold_constants(proto)
    name_weights(proto)
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def fold_constants(proto: Any) -> None:
    """Replace every node that only depends on constants by an initializer, and drop unused ones.

    Without this the amounts of Pad are computed by a dozen shape nodes at run time.
    """
    graph = proto.graph
    known = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    kept = []
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(evaluate(proto, node, known))
        else:
            kept.append(node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    used = dict.fromkeys(name for node in kept for name in node.input if name in known)
    graph.initializer.extend(numpy_helper.from_array(known[name], name) for name in used)


def evaluate(proto: Any, node: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The outputs of one node whose inputs are all known."""
    names = [name for name in node.input if name]
    inputs = [numpy_helper.from_array(known[name], name) for name in names]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "constant", [], outputs, inputs)
    model = helper.make_model(graph, opset_imports=proto.opset_import)
    results = ReferenceEvaluator(model).run(None, {})
    return {name: np.asarray(value) for name, value in zip(node.output, results, strict=True)}


def name_weights(proto: Any) -> None:
    """Give weights that the exporter numbered (transposed, or folded) the name of their layer."""
    names: dict[str, str] = {}
    for node in proto.graph.node:
        layer = ".".join(node.name.strip("/").split("/")[:-1])
        if node.op_type not in {"Conv", "Gemm", "MatMul"}:
            continue
        for position, name in enumerate(node.input):
            if name.startswith("onnx::"):
                names[name] = f"{layer}.{'weight' if position == 1 else 'bias'}"
                node.input[position] = names[name]
    for item in proto.graph.initializer:
        item.name = names.get(item.name, item.name)
    taken = [item.name for item in proto.graph.initializer]
    if len(set(taken)) != len(taken):
        raise SystemExit("two weights would share a name")


def strip(proto: Any) -> None:
    """Remove what an exporter may fill with local paths: doc strings and metadata."""
    for holder in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The fraction of rows whose largest logit is at the label."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def verify(model: Any, path: Path, split: Split) -> tuple[float, float]:
    """Test accuracy of the ONNX file, once it is shown to compute what ``model`` computes.

    Returns the accuracy and the largest difference of a logit.
    """
    images = normalise(split.test_images.astype(np.float32))
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    exact, measured = (accuracy(rows, split.test_labels) for rows in (expected, logits))
    difference = float(np.max(np.abs(expected - logits)))
    if exact != measured or difference > 1e-3:
        raise SystemExit(
            f"{path.name}: ONNX Runtime gives accuracy {measured}, PyTorch {exact}; "
            f"logits differ by up to {difference}"
        )
    return measured, difference


def operators(path: Path) -> dict[str, int]:
    """Number of nodes by operator type."""
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def describe(path: Path) -> dict[str, Any]:
    """Size and digest of a written file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def make_model(recipe: Recipe, split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """Train, export and verify one model; return what to report about it."""
    start = time.monotonic()
    model = train(recipe, split, seed=args.seed, epochs=args.epochs)
    path = args.out / f"{recipe.name}.onnx"
    export(model, recipe, path)
    measured, difference = verify(model, path, split)
    return {
        "test_accuracy": round(measured, 4),
        "largest_logit_difference": difference,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operators": operators(path),
        "seconds": round(time.monotonic() - start, 1),
        **describe(path),
    }


def save_split(split: Split, path: Path) -> dict[str, Any]:
    """Write the calibration and test parts; return what to report about the file."""
    np.savez_compressed(
        path,
        calibration_images=split.calibration_images,
        calibration_labels=split.calibration_labels,
        test_images=split.test_images,
        test_labels=split.test_labels,
    )
    counts = {
        "train": len(split.train_labels),
        "calibration": len(split.calibration_labels),
        "test": len(split.test_labels),
    }
    return {**counts, **describe(path)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train and export the demo models.")
    parser.add_argument("--out", type=Path, default=Path("qdist/demo"), help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and augmentation")
    parser.add_argument("--epochs", type=int, default=200, help="epochs for each model")
    return parser.parse_args(argv)


def main() -> None:
    """Write the three files and print a JSON report."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    # One thread: sums in another order would give other weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    split = split_digits()
    report: dict[str, Any] = {
        "mean": MEAN,
        "std": STD,
        "digits.npz": save_split(split, args.out / "digits.npz"),
    }
    for recipe in RECIPES:
        report[f"{recipe.name}.onnx"] = make_model(recipe, split, args)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
