#!/usr/bin/env python3
"""Calibrate, quantize and evaluate models from a folder of real ones, and print their scores.

    scripts/score_models.py --assets FOLDER [NAME ...] [--json FILE] [-- OVERRIDE ...]

The folder holds ``models/`` and ``data/`` as `MODELS` below names them. Every step is the ``qdist``
command that a user would type; it is printed before it runs. Words after ``--`` go to
``qdist quantize``, as in ``-- quantization.saturation=kl``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Overrides of one model; ``{assets}`` is the folder. ``evaluation``: of ``evaluate``."""

    model: str
    data: tuple[str, ...]
    evaluation: tuple[str, ...]


_IMAGENET = "mean=[0.485,0.456,0.406]", "std=[0.229,0.224,0.225]"

MODELS: dict[str, Case] = {
    "squeezenet1.1": Case(
        model="{assets}/models/squeezenet1.1.onnx",
        data=("data=images", "data.path={assets}/data/imagenet100"),
        evaluation=("evaluation=accuracy",),
    ),
    "cifar10_resnet20": Case(
        model="{assets}/models/cifar10_resnet20.onnx",
        data=(
            "data=cifar10",
            "data.path={assets}/data/cifar10_clean242_vnncomp.npz",
            *(f"data.calibration.preprocess.{setting}" for setting in _IMAGENET),
        ),
        evaluation=("evaluation=accuracy",),
    ),
    "cifar10_vit": Case(
        model="{assets}/models/cifar10_vit_ibp_3_3_8.onnx",
        data=("data=cifar10", "data.path={assets}/data/cifar10_clean242_vnncomp.npz"),
        evaluation=("evaluation=accuracy",),
    ),
    "stories260K": Case(
        model="{assets}/models/stories260K/model.onnx",
        data=(
            "data=text",
            "data.path={assets}/data/tinystories_120k.txt",
            "data.tokenizer={assets}/models/stories260K/tok512.bin",
        ),
        evaluation=("evaluation=perplexity",),
    ),
    "kws": Case(
        model="{assets}/models/mlperf_tiny_kws_dscnn.onnx",
        data=(
            "data=arrays",
            "data.path={assets}/data/kws01_mfcc.npz",
            "data.calibration.inputs={input: x_int8}",
            "data.calibration.limit=128",
            "data.evaluation.start=128",
            "data.evaluation.labels=y",
            *(
                f"data.{part}.preprocess={{mean: [83.0], std: [1.7102704], dtype: float32}}"
                for part in ("calibration", "evaluation")
            ),
        ),
        evaluation=("evaluation=accuracy",),
    ),
    # Pictures with boxes are too few, so it is scored without labels: by how close its outputs are
    # to the float model's.
    "yolox_nano": Case(
        model="{assets}/models/yolox_nano_coco.onnx",
        data=(
            "data=images",
            "data.path={assets}/data/imagenet100",
            "data.calibration.input_name=images",
            "data.calibration.preprocess={scale: 1.0, mean: [], std: []}",
            "data.calibration.limit=30",
            "data.evaluation.labels_file=null",
            "data.evaluation.limit=24",
            *(
                f"data.{part}.{setting}"
                for part in ("calibration", "evaluation")
                for setting in ("crop=null", "letterbox=[416,416,114]", "color=BGR")
            ),
        ),
        evaluation=("evaluation=metric", "evaluation.metric=sqnr_db", "evaluation.batch=1"),
    ),
}


def main() -> int:
    """Run the chosen models; exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--assets", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--json", type=Path, help="write the scores here")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qdist-scores-") as folder:
        for name in options.names or MODELS:
            status = _score(name, options.assets.absolute(), Path(folder), words[cut + 1 :])
            if status:
                return status
            report = Path(folder) / name / "evaluation.json"
            scores[name] = json.loads(report.read_text(encoding="utf-8"))
    _print(scores)
    if options.json is not None:
        options.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


def _score(name: str, assets: Path, folder: Path, extra: list[str]) -> int:
    case = MODELS[name]
    model = [f"model.path={case.model}", f"model.name={name}"]
    common = [f"output.root={folder}", "tracking=none"]
    for command, words in (
        ("calibrate", [*model, *case.data]),
        ("quantize", [*model, *extra]),
        ("evaluate", [*model, *case.data, *case.evaluation]),
    ):
        filled = [word.replace("{assets}", str(assets)) for word in words]
        print(f"$ qdist {command} {shlex.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "qdist.cli", command, *filled, *common], check=False
        )
        if done.returncode:
            return done.returncode
    return 0


def _print(scores: dict[str, Any]) -> None:
    print("| model | metric | float | int8 | agreement | output SQNR |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in scores.items():
        before, after = found["float"], found["quantized"]
        beside = after["metrics"]
        print(
            f"| {name} | {after['metric']} | {before['score']:.4f} | {after['score']:.4f} "
            f"| {beside['agreement']:.4f} | {beside['sqnr_db']:.1f} dB |"
        )


if __name__ == "__main__":
    sys.exit(main())
