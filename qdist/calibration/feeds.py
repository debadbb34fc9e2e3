"""From a micro-batch of samples to what the model is fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from qdist.data.checks import InputSpec, check_sample, fixed_batch, stackable
from qdist.data.decoder import Decoder
from qdist.data.shards import MicroBatch, stack
from qdist.data.source import DataSource, Feeds
from qdist.errors import DataError
from qdist.model.graph import Graph
from qdist.model.half import carried


def input_specs(graph: Graph) -> tuple[InputSpec, ...]:
    """The model's inputs as the data checks want them: float32 where the model reads bfloat16,
    which NumPy has not."""
    specs = []
    for name in graph.input_names:
        found = graph.type_of(name)
        element = carried(found.element if found is not None else TensorProto.FLOAT)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element)).name
        shape = found.shape if found is not None else None
        specs.append(InputSpec(name=name, dtype=dtype, shape=shape))
    return tuple(specs)


def load_batch(batch: MicroBatch, source: DataSource, inputs: tuple[InputSpec, ...]) -> Feeds:
    """The model's feeds for one micro-batch, checked. Raises `DataError` QD303 to QD307."""
    return _joined(batch.keys, batch.load(source), inputs)


def load_phases(
    batch: MicroBatch,
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    decoder: Decoder | None = None,
) -> list[Feeds]:
    """What the model is fed for one micro-batch, run after run: of a decoder with a cache the
    prefill and every decode step, of other models one. Raises `DataError` QD303 to QD307."""
    if decoder is None:
        return [load_batch(batch, source, inputs)]
    samples = batch.load(source)
    return decoder.phases(_joined(batch.keys, samples, decoder.sample_specs(samples[0])))


def first_feeds(source: DataSource, inputs: tuple[InputSpec, ...], n: int = 1) -> Feeds:
    """Feeds of the first ``n`` samples, checked, without a manifest."""
    keys = source.keys()[:n]
    return _joined(keys, [source.load(key) for key in keys], inputs)


def batch_size_for(
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    wanted: int,
    decoder: Decoder | None = None,
) -> int:
    """Samples per run: ``wanted``, unless the model fixes its batch or samples carry their own."""
    key = source.keys()[0]
    feeds = source.load(key)
    inputs = inputs if decoder is None else decoder.sample_specs(feeds)
    check_sample(key, feeds, inputs)
    if not stackable(feeds, inputs):
        return 1
    return fixed_batch(inputs) or wanted


def _joined(keys: Sequence[str], samples: Sequence[Feeds], inputs: Sequence[InputSpec]) -> Feeds:
    """Checked samples behind one batch axis; one that carries its own is taken as it is."""
    for key, feeds in zip(keys, samples, strict=True):
        check_sample(key, feeds, inputs)
    lacking = [stackable(feeds, inputs) for feeds in samples]
    if all(lacking):
        return stack(samples)
    if len(samples) > 1:
        raise DataError(
            "QD303",
            where=f"sample {keys[lacking.index(False)]}",
            got=f"a batch axis of its own, in a micro-batch of {len(samples)} samples",
            expected="no batch axis, as in the first sample of the data",
            mend="give all samples without the batch axis, or set calibration.micro_batch=1",
        )
    return samples[0]
