"""Against the next token: the cross-entropy of a text under the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.evaluate.metrics.batch import Batch, Parts, unfit
from qdist.evaluate.metrics.blocks import blocks, log_softmax


def cross_entropy(batch: Batch) -> Parts:
    logits = batch.outputs[0]
    tokens = _token_ids(batch)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise unfit(
            batch,
            got=f"a first output {logits.shape} for tokens {tokens.shape}",
            expected="logits [b, s, V] for tokens [b, s]",
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < logits.shape[2]):
        raise unfit(
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
        for rows in blocks(*scores.shape):
            log_q = log_softmax(scores[rows].astype(np.float64))
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
        raise unfit(
            batch,
            got=f"integer inputs {', '.join(integers) or 'none'}"
            + (f", and {name!r} named" if batch.token_input is not None else ""),
            expected="one input of token ids",
            mend="set token_input to the input that holds the token ids, or choose another metric",
        )
    return batch.feeds[name]
