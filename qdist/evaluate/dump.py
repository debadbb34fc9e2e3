"""Comparison files in the layout of SlimAI's ``output_debug``, for the tools that read it.

Everything here is our reading of the vendor's documentation; no file was loaded by the vendor's
tools. The levels, each with what the one before writes:

- 0: nothing.
- 1: ``output_control.octrl`` (the outputs in order) and the float model's outputs,
  ``<model>_ref/<sample>_<output>.blob``.
- 2: the quantized model's outputs in ``<model>_<tag>/``, its activation ranges in
  ``<model>_<tag>.yaml``, and ``BestProfile.txt`` which names that file. The vendor's
  ``ProfileList.txt`` and ``FixedPoint_Results.txt`` are not written: their content is not
  documented.
- 3: the outputs of every layer of both models, ``<model>_ref/layers/<sample>_<layer>.blob`` and
  ``<model>_<tag>/layers/...``, and ``similarity.txt``.

``names.json`` (from level 1 on) maps what stands in file names to samples, outputs and layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.source import DataSource, Feeds
from qdist.errors import ConfigError, DataError
from qdist.evaluate.blob import as_nchw, file_names, sample_names, write_blob
from qdist.evaluate.builtin import EvalBatch, Runner, batches
from qdist.evaluate.compare import Sums
from qdist.files import make_folder, write_json, write_text
from qdist.model.freeze import FrozenModel
from qdist.model.loading import load_model
from qdist.model.session import Execution, run, scoring_session
from qdist.plan.dialects.glow_profile import profile_lines, widest
from qdist.plan.plan import QuantizationPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan

LEVELS = (0, 1, 2, 3)
_PROFILE_HEADING = (
    "# Written by qdist after our reading of the vendor's documentation. The vendor's tool",
    "# does not load this file: it checks GraphPreLowerHash, which only the tool itself can",
    "# compute. Copy Min and Max by node into a profile that it has dumped.",
)
Tensors = dict[str, NDArray[Any]]
"""Tensor -> value."""


def dump_comparison(
    frozen: FrozenModel,
    projected: ProjectedPlan,
    artifact_path: Path,
    source: DataSource,
    execution: Execution,
    folder: Path,
    level: int,
    *,
    model_name: str,
    tag: str,
    max_samples: int = 4,
) -> list[Path]:
    """Write the files of ``level`` below ``folder``; returns them in the order written.

    The float values are the frozen model's, the quantized ones those of the file at
    ``artifact_path``, for the first ``max_samples`` of ``source``. ``tag``: what tells this
    quantized model from others in the same folder.

    Raises `ConfigError` QD104, `DataError` (QD302 without samples), QD201 to QD205, QD603.
    """
    _check(level, max_samples)
    if level == 0:
        return []
    stem = file_names([model_name])[model_name]
    names = _names(frozen, projected.plan, source, level, max_samples)
    reference = folder / f"{stem}_ref"
    quantized = folder / file_names([f"{stem}_{tag}"])[f"{stem}_{tag}"]
    written = [
        write_text(
            make_folder(folder) / "output_control.octrl",
            f"[{' '.join(names.outputs.values())}] save\n",
        ),
        write_json(folder / "names.json", names.to_json()),
    ]
    similarity = dict.fromkeys(names.layers, 0.0)
    float_model = _Taps.of_frozen(frozen, names, execution)
    quantized_model = _Taps.of_file(artifact_path, names, execution) if level >= 2 else None
    inputs = Runner(frozen.source, execution).inputs
    for batch in _runs(source, inputs, names):
        expected = _split(float_model.run(batch.feeds), batch.keys)
        found = _split(quantized_model.run(batch.feeds), batch.keys) if quantized_model else {}
        for key in batch.keys:
            if key not in names.samples:
                continue
            written += _write(reference, names, key, expected[key])
            if key in found:
                written += _write(quantized, names, key, found[key])
                for layer, tensor in names.tensors.items():
                    similarity[layer] += _cosine(expected[key][tensor], found[key][tensor])
    if level >= 2:
        profile = folder / f"{quantized.name}.yaml"
        written.append(write_text(profile, profile_text(projected.plan)))
        written.append(write_text(folder / "BestProfile.txt", f"{profile.name}\n"))
    if level >= 3:
        n = len(names.samples)
        lines = (similarity_line(names.layers[k], total / n) for k, total in similarity.items())
        written.append(write_text(folder / "similarity.txt", "".join(lines)))
    return written


def similarity_line(layer: str, cosine: float) -> str:
    """One line of ``similarity.txt``."""
    return f"The similarity of {layer} between fixed and float model is: {cosine:.6f}\n"


def profile_text(plan: QuantizationPlan) -> str:
    """The range of every quantized activation, as a Glow profile of three documents.

    ``Min`` and ``Max`` are the smallest and the largest value that the tensor's integers stand
    for, over all layers that quantize it. Our reading of the vendor's documentation: Glow refuses
    a profile whose ``GraphPreLowerHash`` is not that of its own graph, which cannot be computed
    here, so the file is for reading and for copying ranges from. Histograms are left out.
    """
    ranges = widest(plan, _extremes)
    lines = profile_lines(_PROFILE_HEADING, ranges, _yaml_float)
    if not ranges:
        lines.append("[]")
    return "\n".join([*lines, "...", ""])


def _extremes(found: Quantizer) -> tuple[float, float]:
    """The smallest and the largest value that the integers stand for."""
    pairs = list(zip(found.scales, found.zero_points, strict=True))
    low = min((found.low - zero) * scale for scale, zero in pairs)
    return low, max((found.high - zero) * scale for scale, zero in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What is dumped: key, tensor or layer -> its part of a file name. ``tensors``: layer -> its
    first output that is used."""

    samples: dict[str, str]
    outputs: dict[str, str]
    layers: dict[str, str]
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> list[str]:
        """Every tensor once."""
        return list(dict.fromkeys([*self.outputs, *self.tensors.values()]))

    def to_json(self) -> dict[str, dict[str, str]]:
        """Part of a file name -> what it stands for."""
        groups = {"samples": self.samples, "outputs": self.outputs, "layers": self.layers}
        return {
            group: {part: name for name, part in names.items()} for group, names in groups.items()
        }


def _names(
    frozen: FrozenModel, plan: QuantizationPlan, source: DataSource, level: int, max_samples: int
) -> _Names:
    graph = frozen.proto().graph
    outputs = file_names(value.name for value in graph.output)
    tensors: dict[str, str] = {}
    if level >= 3:
        first = {node.name: name for node in graph.node for name in reversed(node.output) if name}
        tensors = {layer.name: first[layer.name] for layer in plan.layers if layer.name in first}
    layers = file_names(tensors)
    keys = list(source.keys())[:max_samples]
    if not keys:
        raise DataError(
            "QD302",
            where="the evaluation data",
            got="no sample",
            expected="at least one",
            mend="check the path and the limit of the data set",
        )
    samples = sample_names(keys, [list(outputs.values()), list(layers.values())])
    return _Names(samples=samples, outputs=outputs, layers=layers, tensors=tensors)


class _Taps:
    """A model whose outputs are the tensors to dump."""

    def __init__(
        self, proto: onnx.ModelProto, folder: Path, wanted: Sequence[str], execution: Execution
    ) -> None:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        self._session = scoring_session(proto.SerializeToString(), execution, folder)
        self._wanted = list(wanted)

    @classmethod
    def of_frozen(cls, frozen: FrozenModel, names: _Names, execution: Execution) -> _Taps:
        return cls(frozen.proto(), frozen.data_folder, names.wanted, execution)

    @classmethod
    def of_file(cls, path: Path, names: _Names, execution: Execution) -> _Taps:
        model = load_model(path)
        return cls(model.proto(), model.folder, names.wanted, execution)

    def run(self, feeds: Feeds) -> Tensors:
        """Tensor -> value."""
        return dict(zip(self._wanted, run(self._session, self._wanted, feeds), strict=True))


def _runs(source: DataSource, inputs: tuple[InputSpec, ...], names: _Names) -> Iterator[EvalBatch]:
    """The samples to dump, one at a time; a batch, and so maybe more, where its size is fixed."""
    n = 0
    for batch in batches(source, inputs, 1):
        yield batch
        n += len(batch.keys)
        if n >= len(names.samples):
            return


def _split(values: Tensors, keys: tuple[str, ...]) -> dict[str, Tensors]:
    """Key -> its own part of every tensor; all of a tensor that has no batch axis."""
    if len(keys) == 1:
        return {keys[0]: values}
    return {
        key: {
            name: value[i : i + 1] if value.shape[:1] == (len(keys),) else value
            for name, value in values.items()
        }
        for i, key in enumerate(keys)
    }


def _write(folder: Path, names: _Names, key: str, values: Tensors) -> list[Path]:
    sample = names.samples[key]
    written = [
        write_blob(folder / f"{sample}_{part}.blob", as_nchw(values[name], is_output=True))
        for name, part in names.outputs.items()
    ]
    written += [
        write_blob(
            folder / "layers" / f"{sample}_{part}.blob",
            as_nchw(values[names.tensors[layer]], is_output=False),
        )
        for layer, part in names.layers.items()
    ]
    return written


def _cosine(expected: NDArray[Any], found: NDArray[Any]) -> float:
    sums = Sums()
    sums.add(expected, found)
    return sums.deviation().cosine


def _yaml_float(value: float) -> str:
    """Nine digits and a point, without which YAML takes ``1e-05`` for a word."""
    text = f"{value:.9g}"
    if "." in text:
        return text
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}.0{exponent}{power}"


def _check(level: int, max_samples: int) -> None:
    for where, value, good, expected in (
        ("compare.dump", level, level in LEVELS, "0, 1, 2 or 3"),
        ("compare.dump_samples", max_samples, max_samples >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(
                "QD104",
                where=where,
                got=str(value),
                expected=expected,
                mend=f"set {where} to {expected}",
            )
