"""Against the float model's outputs: agreement, energies and distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.evaluate.metrics.batch import ANOTHER, Batch, Floats, Parts, unfit
from qdist.evaluate.metrics.blocks import BLOCK, blocks, log_softmax

SQNR_CEILING_DB = 300.0
"""What ``sqnr_db`` gives for outputs equal to the reference, so that the float model itself can
be ranked. Outputs that differ by one float32 rounding are at about 150 dB."""


def agreement(batch: Batch) -> Parts:
    def same(q: Floats, r: Floats) -> Floats:
        equal = np.argmax(q, axis=1) == np.argmax(r, axis=1)
        return np.where(np.isnan(q).any(axis=1) | np.isnan(r).any(axis=1), np.nan, equal)

    return _over_positions(batch, same)


def divergence(batch: Batch) -> Parts:
    def kl(q: Floats, r: Floats) -> Floats:
        log_p, log_q = log_softmax(r), log_softmax(q)
        p = np.exp(log_p)
        # A logit of -inf has no probability, and 0 * log 0 is 0.
        return np.sum(np.where(p == 0, 0.0, p * (log_p - log_q)), axis=1)

    return _over_positions(batch, kl)


def cosine(batch: Batch) -> Parts:
    dot, qq, rr, _ = _sums(batch, 3, lambda q, r: (q * r, q * q, r * r))
    with np.errstate(all="ignore"):
        cosine = dot / (np.sqrt(qq) * np.sqrt(rr))
    # Without a direction: equal to its like, at right angles to all else.
    cosine = np.where((qq == 0) | (rr == 0), ((qq == 0) & (rr == 0)).astype(np.float64), cosine)
    return np.where(np.isnan(qq + rr), np.nan, cosine), np.ones(batch.n_samples)


def relative_energy(batch: Batch) -> Parts:
    noise, signal, _ = _sums(batch, 2, lambda q, r: ((r - q) ** 2, r * r))
    return noise, signal


def squared_error(batch: Batch) -> Parts:
    error, n_elements = _sums(batch, 1, lambda q, r: ((r - q) ** 2,))
    return error, n_elements


def absolute_error(batch: Batch) -> Parts:
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
        for start in range(0, q.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
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
            for rows in blocks(n_positions, width):
                values = measure(q[i, rows].astype(np.float64), r[i, rows].astype(np.float64))
                totals[i] += values.sum()
    return totals, np.full(n, float(count))


def _pairs(batch: Batch) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Each float output beside the float model's. Every one divides evenly into the samples."""
    reference = batch.reference or ()
    shapes, expected = [[a.shape for a in arrays] for arrays in (batch.outputs, reference)]
    if shapes != expected:
        raise unfit(batch, got=f"outputs {shapes}", expected=f"the float model's {expected}")
    pairs = [
        (np.atleast_1d(q), np.atleast_1d(r))
        for q, r in zip(batch.outputs, reference, strict=True)
        if r.dtype.kind == "f"
    ]
    n = batch.n_samples
    uneven = [q.shape for q, _ in pairs if q.shape[0] != n and n != 1]
    if uneven or not pairs:
        raise unfit(
            batch,
            got=f"outputs {shapes}" if pairs else "no output of floating point",
            expected=f"float outputs whose axis 0 is the {n} samples",
            mend="evaluate one sample at a time (batch size 1)" if pairs else ANOTHER,
        )
    return pairs


def decibels(quotient: Floats) -> Floats:
    floor = 10.0 ** (-SQNR_CEILING_DB / 10)
    decibels: Floats = -10 * np.log10(np.maximum(quotient, floor))
    return decibels
