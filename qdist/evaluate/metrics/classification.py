"""Against labels: is the label among the classes of the greatest logits?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qdist.evaluate.metrics.batch import Batch, Parts, labels_do_not_fit, unfit


def top(k: int) -> Callable[[Batch], Parts]:
    def measure(batch: Batch) -> Parts:
        logits = batch.outputs[0]
        n = batch.n_samples
        if logits.ndim < 2 or logits.shape[0] != n or logits.size != n * logits.shape[1]:
            raise unfit(batch, got=f"a first output {logits.shape}", expected=f"logits [{n}, C]")
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
        raise labels_do_not_fit(batch.metric, got=got, expected=f"integer labels [{n}]")
    labels = labels.reshape(n).astype(np.intp)
    if n and not (labels.min() >= 0 and labels.max() < n_classes):
        raise labels_do_not_fit(
            batch.metric,
            got=f"labels from {labels.min()} to {labels.max()}",
            expected=f"classes 0 to {n_classes - 1}, since the model has {n_classes} outputs",
        )
    return labels
