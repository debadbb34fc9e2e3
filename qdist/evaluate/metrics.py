"""Metrics of a model's outputs, against labels or against the float model's outputs.

Every metric is a ratio: for each sample a numerator and a denominator (correct answers over
answers, squared error over elements, cross-entropy over tokens), both summed over the samples in
float64, then a function of the quotient. So the result does not depend on how the samples were
cut into batches, and the per-sample parts that paired intervals need are there for the asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.errors import DataError, EvaluationError
from qdist.evaluate.report import unusable

Floats = NDArray[np.float64]
Parts = tuple[Floats, Floats]
"""Numerators and denominators, each float64 [b]."""

SQNR_CEILING_DB = 300.0
"""What ``sqnr_db`` gives for outputs equal to the reference, so that the float model itself can
be ranked. Outputs that differ by one float32 rounding are at about 150 dB."""

_BLOCK = 1 << 16
"""Elements of one sample that are turned into float64 at a time. The blocks of a sample do not
depend on its batch, so that neither do its sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a metric measures: the arrays of b samples, axis 0 being the sample.

    outputs: the model's outputs in the graph's order. feeds: its inputs by name. labels: int64
    [b, ...] or None. reference: the float model's outputs, as ``outputs``, or None.
    token_input: the input that holds token ids, where the user named one.
    """

    metric: str
    outputs: Sequence[NDArray[Any]]
    feeds: Feeds
    labels: NDArray[Any] | None
    reference: Sequence[NDArray[Any]] | None
    token_input: str | None

    @property
    def n_samples(self) -> int:
        first = next(iter(self.feeds.values()), None)
        return len(self.outputs[0] if first is None else first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named metric. ``make()`` starts a measurement.

    needs_labels, needs_reference: whether ``update`` must be given labels, or the float model's
    outputs. measure: a batch -> the parts of its samples. finish: quotients -> values of the
    metric, element by element.
    """

    name: str
    higher_is_better: bool
    needs_labels: bool
    needs_reference: bool
    description: str
    measure: Callable[[Batch], Parts]
    finish: Callable[[Floats], Floats]

    def make(self, *, token_input: str | None = None) -> Accumulator:
        """A new measurement. ``token_input`` names the input of token ids, for text metrics."""
        return Accumulator(metric=self, token_input=token_input)


@dataclass(slots=True, kw_only=True)
class Accumulator:
    """A running measurement of one metric on one model. Used by one thread.

    Law: the result is the same for every partition of the same samples into batches. Memory is
    16 bytes per sample.
    """

    metric: Metric
    token_input: str | None = None
    _parts: list[Parts] = field(default_factory=list)

    def update(
        self,
        outputs: Sequence[NDArray[Any]],
        feeds: Feeds,
        labels: NDArray[Any] | None = None,
        reference: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        """Add a batch; see `Batch` for the arrays.

        Raises `qdist.errors.DataError` QD308 (labels missing, or not fitting the outputs),
        `qdist.errors.EvaluationError` QD704 (outputs this metric cannot be computed from) and
        `ValueError` (a reference is needed, and was not given). After an error nothing was added.
        """
        if self.metric.needs_labels and labels is None:
            raise _labels_do_not_fit(
                self.metric.name, got="samples without labels", expected="one label per sample"
            )
        if self.metric.needs_reference and reference is None:
            raise ValueError(f"{self.metric.name} needs the float model's outputs")
        batch = Batch(
            metric=self.metric.name,
            outputs=outputs,
            feeds=feeds,
            labels=labels,
            reference=reference,
            token_input=self.token_input,
        )
        with np.errstate(invalid="ignore", over="ignore"):
            self._parts.append(self.metric.measure(batch))

    @property
    def n_samples(self) -> int:
        """How many samples were added."""
        return sum(len(numerators) for numerators, _ in self._parts)

    def parts(self) -> Parts:
        """Numerators and denominators of every sample, float64 [n_samples] each, in order."""
        if not self._parts:
            return np.empty(0), np.empty(0)
        numerators, denominators = zip(*self._parts, strict=True)
        return np.concatenate(numerators), np.concatenate(denominators)

    def per_sample(self) -> Floats:
        """The metric of each sample by itself, float64 [n_samples], in the order of updates.

        NaN where a sample has nothing to measure (a text of one token) or holds NaN.
        """
        return self._finish(*self.parts())

    def result(self) -> float:
        """The metric over all samples. NaN when there are none, or when any output is NaN."""
        numerators, denominators = self.parts()
        return float(self._finish(np.sum(numerators), np.sum(denominators)))

    def _finish(self, numerators: Any, denominators: Any) -> Any:
        with np.errstate(all="ignore"):
            return self.metric.finish(np.divide(numerators, denominators))


def _top(k: int) -> Callable[[Batch], Parts]:
    def measure(batch: Batch) -> Parts:
        logits = batch.outputs[0]
        n = batch.n_samples
        if logits.ndim < 2 or logits.shape[0] != n or logits.size != n * logits.shape[1]:
            raise _unfit(batch, got=f"a first output {logits.shape}", expected=f"logits [{n}, C]")
        scores = logits.reshape(n, -1).astype(np.float64)
        labels = _class_labels(batch, n, scores.shape[1])
        own = scores[np.arange(n), labels][:, None]
        # Ties go to the lower class, as argmax has it.
        earlier = np.arange(scores.shape[1]) < labels[:, None]
        rank = np.sum((scores > own) | ((scores == own) & earlier), axis=1)
        hits = np.where(np.isnan(scores).any(axis=1), np.nan, rank < k)
        return hits, np.ones(n)

    return measure


def _class_labels(batch: Batch, n: int, n_classes: int) -> NDArray[np.intp]:
    labels = np.asarray(batch.labels)
    if labels.size != n or labels.dtype.kind not in "iu":
        got = f"labels {labels.dtype} {labels.shape}"
        raise _labels_do_not_fit(batch.metric, got=got, expected=f"integer labels [{n}]")
    labels = labels.reshape(n).astype(np.intp)
    if n and not (labels.min() >= 0 and labels.max() < n_classes):
        raise _labels_do_not_fit(
            batch.metric,
            got=f"labels from {labels.min()} to {labels.max()}",
            expected=f"classes 0 to {n_classes - 1}, since the model has {n_classes} outputs",
        )
    return labels


def _cross_entropy(batch: Batch) -> Parts:
    logits = batch.outputs[0]
    tokens = _token_ids(batch)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise _unfit(
            batch,
            got=f"a first output {logits.shape} for tokens {tokens.shape}",
            expected="logits [b, s, V] for tokens [b, s]",
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < logits.shape[2]):
        raise _unfit(
            batch,
            got=f"token ids from {tokens.min()} to {tokens.max()}",
            expected=f"ids 0 to {logits.shape[2] - 1}, since the model has that vocabulary",
        )
    counted = np.ones(tokens[:, 1:].shape, bool)
    mask = batch.feeds.get("attention_mask")
    if mask is not None and mask.shape == tokens.shape:
        counted = mask[:, 1:] != 0
    losses = np.zeros(len(tokens))
    for i, (scores, targets) in enumerate(zip(logits[:, :-1], tokens[:, 1:], strict=True)):
        for rows in _blocks(*scores.shape):
            log_q = _log_softmax(scores[rows].astype(np.float64))
            loss = -np.take_along_axis(log_q, targets[rows, None].astype(np.intp), axis=1)[:, 0]
            losses[i] += loss[counted[i, rows]].sum()
    return losses, counted.sum(axis=1).astype(np.float64)


def _token_ids(batch: Batch) -> NDArray[Any]:
    """The input of token ids, [b, s]: the one named, or the only integer input, or input_ids."""
    integers = [name for name, array in batch.feeds.items() if array.dtype.kind in "iu"]
    if batch.token_input is not None:
        name = batch.token_input
    elif len(integers) == 1:
        name = integers[0]
    else:
        name = "input_ids"
    if name not in integers:
        raise _unfit(
            batch,
            got=f"integer inputs {', '.join(integers) or 'none'}"
            + (f", and {name!r} named" if batch.token_input is not None else ""),
            expected="one input of token ids",
            mend="set token_input to the input that holds the token ids, or choose another metric",
        )
    return batch.feeds[name]


def _agreement(batch: Batch) -> Parts:
    def same(q: Floats, r: Floats) -> Floats:
        equal = np.argmax(q, axis=1) == np.argmax(r, axis=1)
        return np.where(np.isnan(q).any(axis=1) | np.isnan(r).any(axis=1), np.nan, equal)

    return _over_positions(batch, same)


def _divergence(batch: Batch) -> Parts:
    def kl(q: Floats, r: Floats) -> Floats:
        log_p, log_q = _log_softmax(r), _log_softmax(q)
        p = np.exp(log_p)
        # A logit of -inf has no probability, and 0 * log 0 is 0.
        return np.sum(np.where(p == 0, 0.0, p * (log_p - log_q)), axis=1)

    return _over_positions(batch, kl)


def _cosine(batch: Batch) -> Parts:
    dot, qq, rr, _ = _sums(batch, 3, lambda q, r: (q * r, q * q, r * r))
    with np.errstate(all="ignore"):
        cosine = dot / (np.sqrt(qq) * np.sqrt(rr))
    # Without a direction: equal to its like, at right angles to all else.
    cosine = np.where((qq == 0) | (rr == 0), ((qq == 0) & (rr == 0)).astype(np.float64), cosine)
    return np.where(np.isnan(qq + rr), np.nan, cosine), np.ones(batch.n_samples)


def _relative_energy(batch: Batch) -> Parts:
    noise, signal, _ = _sums(batch, 2, lambda q, r: ((r - q) ** 2, r * r))
    return noise, signal


def _squared_error(batch: Batch) -> Parts:
    error, n_elements = _sums(batch, 1, lambda q, r: ((r - q) ** 2,))
    return error, n_elements


def _absolute_error(batch: Batch) -> Parts:
    error, n_elements = _sums(batch, 1, lambda q, r: (np.abs(r - q),))
    return error, n_elements


def _sums(
    batch: Batch, n_terms: int, terms: Callable[[Floats, Floats], tuple[Floats, ...]]
) -> list[Floats]:
    """Per sample, over all float outputs: the sum of each term, and last the elements' number."""
    n = batch.n_samples
    totals = [np.zeros(n) for _ in range(n_terms)]
    count = 0
    for outputs, reference in _pairs(batch):
        q, r = outputs.reshape(n, -1), reference.reshape(n, -1)
        count += q.shape[1]
        for start in range(0, q.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            found = terms(q[:, columns].astype(np.float64), r[:, columns].astype(np.float64))
            for total, term in zip(totals, found, strict=True):
                total += term.sum(axis=1)
    return [*totals, np.full(n, float(count))]


def _over_positions(batch: Batch, measure: Callable[[Floats, Floats], Floats]) -> Parts:
    """Per sample, over all float outputs: a measure of the last axis, summed; the positions."""
    n = batch.n_samples
    totals = np.zeros(n)
    count = 0
    for outputs, reference in _pairs(batch):
        # An output of one number per sample has no axis but the samples': its last axis is 1.
        width = 1 if outputs.shape == (n,) else outputs.shape[-1]
        n_positions = outputs.size // (n * width) if width else 0
        shape = (n, n_positions, width)
        q, r = outputs.reshape(shape), reference.reshape(shape)
        count += n_positions
        for i in range(n):
            for rows in _blocks(n_positions, width):
                values = measure(q[i, rows].astype(np.float64), r[i, rows].astype(np.float64))
                totals[i] += values.sum()
    return totals, np.full(n, float(count))


def _pairs(batch: Batch) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Each float output beside the float model's. Every one divides evenly into the samples."""
    reference = batch.reference or ()
    shapes, expected = [[a.shape for a in arrays] for arrays in (batch.outputs, reference)]
    if shapes != expected:
        raise _unfit(batch, got=f"outputs {shapes}", expected=f"the float model's {expected}")
    pairs = [
        (np.atleast_1d(q), np.atleast_1d(r))
        for q, r in zip(batch.outputs, reference, strict=True)
        if r.dtype.kind == "f"
    ]
    n = batch.n_samples
    uneven = [q.shape for q, _ in pairs if q.shape[0] != n and n != 1]
    if uneven or not pairs:
        raise _unfit(
            batch,
            got=f"outputs {shapes}" if pairs else "no output of floating point",
            expected=f"float outputs whose axis 0 is the {n} samples",
            mend="evaluate one sample at a time (batch size 1)" if pairs else _ANOTHER,
        )
    return pairs


def _blocks(n_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, width))
    return (slice(start, start + step) for start in range(0, n_rows, step))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


_ANOTHER = "choose a metric that fits this model"


def _unfit(batch: Batch, *, got: str, expected: str, mend: str = _ANOTHER) -> EvaluationError:
    return unusable(f"metric {batch.metric}", got=got, expected=expected, mend=mend)


def _labels_do_not_fit(metric: str, *, got: str, expected: str) -> DataError:
    return DataError(
        "QD308",
        where=f"metric {metric}",
        got=got,
        expected=expected,
        mend="correct the data set's labels, or choose a metric that needs none",
    )


def _same(quotient: Floats) -> Floats:
    return quotient


def _decibels(quotient: Floats) -> Floats:
    floor = 10.0 ** (-SQNR_CEILING_DB / 10)
    decibels: Floats = -10 * np.log10(np.maximum(quotient, floor))
    return decibels


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="top1",
            higher_is_better=True,
            needs_labels=True,
            needs_reference=False,
            description="share of samples whose label has the greatest logit",
            measure=_top(1),
            finish=_same,
        ),
        Metric(
            name="top5",
            higher_is_better=True,
            needs_labels=True,
            needs_reference=False,
            description="share of samples whose label is among the five greatest logits",
            measure=_top(5),
            finish=_same,
        ),
        Metric(
            name="nll",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=False,
            description="mean cross-entropy of the next token, in nats, over all tokens",
            measure=_cross_entropy,
            finish=_same,
        ),
        Metric(
            name="perplexity",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=False,
            description="exp of the mean cross-entropy of the next token over all tokens",
            measure=_cross_entropy,
            finish=np.exp,
        ),
        Metric(
            name="agreement",
            higher_is_better=True,
            needs_labels=False,
            needs_reference=True,
            description="share of positions whose argmax is the float model's",
            measure=_agreement,
            finish=_same,
        ),
        Metric(
            name="cosine",
            higher_is_better=True,
            needs_labels=False,
            needs_reference=True,
            description="cosine of the outputs and the float model's, mean over samples",
            measure=_cosine,
            finish=_same,
        ),
        Metric(
            name="sqnr_db",
            higher_is_better=True,
            needs_labels=False,
            needs_reference=True,
            description="energy of the float outputs over that of the error, overall, in dB",
            measure=_relative_energy,
            finish=_decibels,
        ),
        Metric(
            name="relative_l2",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=True,
            description="norm of the error over that of the float outputs, overall",
            measure=_relative_energy,
            finish=np.sqrt,
        ),
        Metric(
            name="mse",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=True,
            description="mean squared error against the float outputs",
            measure=_squared_error,
            finish=_same,
        ),
        Metric(
            name="mae",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=True,
            description="mean absolute error against the float outputs",
            measure=_absolute_error,
            finish=_same,
        ),
        Metric(
            name="kl",
            higher_is_better=False,
            needs_labels=False,
            needs_reference=True,
            description="KL divergence of the softmax of the last axis from the float model's, "
            "in nats, mean over positions",
            measure=_divergence,
            finish=_same,
        ),
    )
}
"""Every metric by its name."""


def find_metric(name: str) -> Metric:
    """The metric of this name. Raises `qdist.errors.EvaluationError` QD701."""
    if name not in METRICS:
        raise EvaluationError(
            "QD701",
            where=name,
            got=repr(name),
            expected=f"one of {', '.join(METRICS)}",
            mend="choose one of these, or score with a command or a function of your own",
        )
    return METRICS[name]
