"""What a calibration costs before it runs: formulas, their constants, and a check of both.

The constants are measured on four small encoders, then used to predict the time of the benchmark's
encoder, which is larger than all of them in every respect. With constants that hold, the same
formulas give the estimate for a large model on many nodes in docs/benchmarks.md.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import (
    Spent,
    Subject,
    calibrate_once,
    merging_s,
    new_observer,
    plain_session,
    store_bytes,
)
from bench_models import SEED, EncoderShape, encoder_case
from bench_timing import lap
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

Say = Callable[[str], None]

SMALL = (
    EncoderShape(n_layers=2, width=192, n_heads=6, feed_forward=768, length=64),
    EncoderShape(n_layers=2, width=96, n_heads=12, feed_forward=192, length=192),
    EncoderShape(n_layers=1, width=320, n_heads=4, feed_forward=1280, length=64),
    EncoderShape(n_layers=4, width=128, n_heads=4, feed_forward=512, length=96),
)
"""What the constants come from: short and long, narrow and wide, with few and many tensors."""
BUDGET_BYTES = 560_000_000
"""A memory budget that cuts the benchmark's encoder into several segments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one sample asks of a model.

    ``flops``: of its matrix products, a multiplication and an addition counting 2. ``elements``:
    of all measured tensors. ``n_tensors``: measured. ``n_channels``: of the last axis, summed over
    the measured tensors. ``weight_bytes``: float32. ``boundary_bytes``: of the tensor that crosses
    from one layer to the next, float32. ``n_layers``: places where the model can be cut, plus 1.
    """

    flops: float
    elements: float
    n_tensors: int
    n_channels: int
    weight_bytes: float
    boundary_bytes: float
    n_layers: int


def encoder_workload(shape: EncoderShape) -> Workload:
    """The workload of the benchmark's encoder, by its architecture."""
    length, width, wide = shape.length, shape.width, shape.feed_forward
    scores = shape.n_heads * length * length
    # 15 tensors of the width, 7 inside the feed-forward part, and 3 of the attention's scores.
    per_layer = 15 * length * width + 7 * length * wide + 3 * scores
    weights = 4 * width * width + 2 * width * wide
    channels = 14 * width + width // shape.n_heads + 7 * wide + 3 * length
    return Workload(
        flops=shape.n_layers * (2 * length * weights + 4 * length * length * width),
        elements=3 * length * width + shape.n_layers * per_layer,
        n_tensors=3 + 25 * shape.n_layers,
        n_channels=3 * width + shape.n_layers * channels,
        weight_bytes=4.0 * (shape.n_layers * weights + (shape.vocabulary + length) * width),
        boundary_bytes=4.0 * length * width,
        n_layers=shape.n_layers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """A decoder as Llama has it, as exporters write it: normalization and rotation in pieces."""

    n_layers: int = 80
    width: int = 8192
    n_heads: int = 64
    n_key_heads: int = 8
    feed_forward: int = 28672
    vocabulary: int = 128_256
    length: int = 2048


def decoder_workload(shape: DecoderShape) -> Workload:
    """The workload of a decoder in prefill."""
    length, width, wide = shape.length, shape.width, shape.feed_forward
    head = width // shape.n_heads
    narrow = shape.n_key_heads * head
    # Of the width: 3 in each of two normalizations, the query and 4.5 of its rotation, keys and
    # values repeated for all heads, context, output, its sum, the last product and its sum.
    # Of the keys' width: key, value and 4.5 of the rotation. Scores: raw, scaled, masked, softmax.
    per_layer = (
        18.5 * length * width
        + 6.5 * length * narrow
        + 5 * length * wide
        + 4 * shape.n_heads * length * length
    )
    weights = 2 * width * width + 2 * width * narrow + 3 * width * wide
    vocabulary = shape.vocabulary * width
    # The heads' tensors have the head's channels; the others have those of their width.
    channels = int(10 * width + 14 * head + 5 * wide + 4 * length)
    return Workload(
        flops=shape.n_layers * (2.0 * length * weights + 4.0 * length * length * width)
        + 2.0 * length * vocabulary,
        elements=shape.n_layers * per_layer + length * (4 * width + shape.vocabulary),
        n_tensors=35 * shape.n_layers + 5,
        n_channels=shape.n_layers * channels + 4 * width + shape.vocabulary,
        weight_bytes=4.0 * (shape.n_layers * weights + 2 * vocabulary),
        boundary_bytes=4.0 * length * width,
        n_layers=shape.n_layers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What a worker with one thread on one machine needs.

    ``flop_s`` per floating-point operation of a matrix product, ``element_s`` per element of a
    measured tensor (made, returned and counted), ``tensor_s`` per tensor and run. ``commit_s`` per
    row of a record that is committed; ``merge_s`` per row that is read and merged, and
    ``merge_channel_s`` per channel of its tensor; ``finish_s`` per row of the merge, once.
    ``row_bytes`` and ``channel_bytes``: of a stored record per row, and per channel.
    """

    flop_s: float
    element_s: float
    tensor_s: float
    commit_s: float
    merge_s: float
    merge_channel_s: float
    finish_s: float
    row_bytes: float
    channel_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A small case: seconds per sample to measure, per row to commit, per record to read and merge,
    per row of the merge to finish it; in all."""

    workload: Workload
    micro_batch: int
    sample_s: float
    commit_s: float
    record_s: float
    finish_s: float
    total_s: float
    record_bytes: float


class SmallCase:
    """An encoder that is calibrated again and again."""

    def __init__(
        self,
        name: str,
        shape: EncoderShape,
        n_samples: int,
        folder: Path,
        budget_bytes: int | None = None,
    ) -> None:
        self.workload = encoder_workload(shape)
        self._case = encoder_case(folder, n_samples, shape, name)
        self._store = folder / f"{name}.zarr"
        self._subject = Subject(self._case, n_samples)
        self._job = self._subject.job("all", budget_bytes)
        self._observer = new_observer(self._job)
        self._spent: list[Spent] = []
        self._record_bytes = 0.0
        self._record_s = math.inf
        self.lap()
        self._spent.clear()

    @property
    def n_segments(self) -> int:
        """Pieces that the model runs in."""
        return len(self._job.observer.segments)

    def lap(self) -> float:
        """Calibrate once; seconds."""
        spent = calibrate_once(self._job, self._observer, self._subject.source, self._store)
        # The merged record lies beside those of the shards.
        self._record_bytes = store_bytes(self._store) / (spent.n_shards + 1)
        self._record_s = min(self._record_s, merging_s(self._store, 8))
        shutil.rmtree(self._store)
        self._spent.append(spent)
        return spent.total_s

    def measured(self) -> Measured:
        """The quickest lap, which other users of the machine disturbed least."""
        spent = min(self._spent, key=lambda one: one.total_s)
        n_samples = len(self._job.manifest)
        n_tensors = len(self._job.taps.points)
        return Measured(
            workload=self.workload,
            micro_batch=self._case.micro_batch,
            sample_s=(spent.total_s - spent.commit_s - spent.finish_s) / n_samples,
            commit_s=spent.commit_s / n_tensors / spent.n_shards,
            record_s=self._record_s,
            finish_s=max(0.0, spent.finish_s - self._record_s * spent.n_shards) / n_tensors,
            total_s=spent.total_s,
            record_bytes=self._record_bytes,
        )


def fit(cases: Sequence[Measured], flop_s: float) -> Constants:
    """The constants that explain the cases best, in relative terms, none of them negative.

    ``flop_s`` is given: in small models products and elements grow together, so that the two could
    not be told apart.
    """
    time = np.array([[c.workload.elements, c.workload.n_tensors / c.micro_batch] for c in cases])
    seconds = np.array([c.sample_s for c in cases])
    products = np.array([c.workload.flops * flop_s for c in cases])
    element_s, tensor_s = _relative(time, seconds - products, seconds)
    space = np.array([[c.workload.n_tensors, c.workload.n_channels] for c in cases], float)
    sizes = np.array([c.record_bytes for c in cases])
    row_bytes, channel_bytes = _relative(space, sizes, sizes)
    reading = np.array([c.record_s for c in cases])
    merge_s, merge_channel_s = _relative(space, reading, reading)
    return Constants(
        flop_s=flop_s,
        element_s=element_s,
        tensor_s=tensor_s,
        commit_s=statistics.median(c.commit_s for c in cases),
        merge_s=merge_s,
        merge_channel_s=merge_channel_s,
        finish_s=statistics.median(c.finish_s for c in cases),
        row_bytes=row_bytes,
        channel_bytes=channel_bytes,
    )


def predicted_s(
    workload: Workload, constants: Constants, *, n_samples: int, shard_samples: int, batch: int
) -> dict[str, float]:
    """Seconds of one worker for the whole calibration, by where they go."""
    n_shards = math.ceil(n_samples / shard_samples)
    rows = n_shards * workload.n_tensors
    parts = {
        "products": n_samples * workload.flops * constants.flop_s,
        "elements": n_samples * workload.elements * constants.element_s,
        "tensors": n_samples * workload.n_tensors / batch * constants.tensor_s,
        "commits": rows * constants.commit_s,
        "merge": n_shards * record_s(workload, constants) + workload.n_tensors * constants.finish_s,
    }
    return {**parts, "total": sum(parts.values())}


def check(folder: Path, n_samples: int, n_rounds: int, say: Say) -> dict[str, Any]:
    """Measure the constants, predict the encoder, measure it too: predicted over measured.

    All cases take turns, so that all of them see the machine at the same times.
    """
    small = [
        SmallCase(f"small{index}", shape, n_samples, folder) for index, shape in enumerate(SMALL)
    ]
    target = SmallCase("target", EncoderShape(), n_samples, folder)
    cut = SmallCase("cut", EncoderShape(), n_samples, folder, BUDGET_BYTES)
    flop_s = []
    for index in range(n_rounds):
        flop_s.append(product_flop_s())
        seconds = [case.lap() for case in (*small, target, cut)]
        times = ", ".join(f"{one:.2f}" for one in seconds)
        say(f"{times} s; {flop_s[-1] * 1e12:.1f} ps per operation ({index + 1}/{n_rounds})")
    constants = fit([case.measured() for case in small], min(flop_s))
    found = target.measured()
    foretold = predicted_s(
        found.workload,
        constants,
        n_samples=n_samples,
        shard_samples=16,
        batch=found.micro_batch,
    )
    say(f"predicted {foretold['total']:.2f} s, measured {found.total_s:.2f} s")
    record_bytes = stored_bytes(found.workload, constants)
    return {
        "constants": asdict(constants),
        "predicted_s": foretold,
        "measured_s": found.total_s,
        "predicted_over_measured": foretold["total"] / found.total_s,
        "in_segments": {
            "n_segments": cut.n_segments,
            "measured_s": cut.measured().total_s,
            "predicted_over_measured": _in_one_shard(found, constants, n_samples)
            / cut.measured().total_s,
        },
        "record_bytes_predicted_over_measured": record_bytes / found.record_bytes,
    }


def _in_one_shard(case: Measured, constants: Constants, n_samples: int) -> float:
    """What a run in segments should take: it has one shard, and the small weights and the spool
    stay in memory, where they cost nothing that can be told from noise."""
    return predicted_s(
        case.workload,
        constants,
        n_samples=n_samples,
        shard_samples=n_samples,
        batch=case.micro_batch,
    )["total"]


def stored_bytes(workload: Workload, constants: Constants) -> float:
    """Bytes of one shard's record in the store."""
    rows = workload.n_tensors * constants.row_bytes
    return rows + workload.n_channels * constants.channel_bytes


def record_s(workload: Workload, constants: Constants) -> float:
    """Seconds to read one shard's record, but for the network, and to merge it."""
    rows = workload.n_tensors * constants.merge_s
    return rows + workload.n_channels * constants.merge_channel_s


def product_flop_s(
    n_laps: int = 7, rows: int = 512, inner: int = 384, columns: int = 1536
) -> float:
    """Seconds per operation of one matrix product in ONNX Runtime, in one thread; the quickest."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])
    rng = np.random.default_rng(SEED)
    weight = numpy_helper.from_array(rng.standard_normal((inner, columns), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [given], [made], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = plain_session(model.SerializeToString())
    feeds = {"x": rng.standard_normal((rows, inner), np.float32)}
    laps = [lap(lambda: [session.run(None, feeds) for _ in range(20)])[0] for _ in range(n_laps)]
    flops = 20 * 2 * rows * inner * columns
    return min(one.wall_s for one in laps) / flops


def _relative(terms: Any, wanted: Any, unit: Any) -> list[float]:
    """Non-negative factors whose sums come closest to ``wanted``, in proportion to ``unit``."""
    scale = terms.max(axis=0)
    factors, _ = nnls(terms / scale / unit[:, None], wanted / unit)
    return [float(f) for f in factors / scale]
