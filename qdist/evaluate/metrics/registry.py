"""Every metric by its name."""

from __future__ import annotations

import numpy as np

from qdist.errors import EvaluationError
from qdist.evaluate.metrics import closeness
from qdist.evaluate.metrics.classification import top
from qdist.evaluate.metrics.language import cross_entropy
from qdist.evaluate.metrics.metric import Metric

_ALL = (
    Metric(
        name="top1",
        higher_is_better=True,
        description="share of samples whose label has the greatest logit",
        measure=top(1),
        needs_labels=True,
    ),
    Metric(
        name="top5",
        higher_is_better=True,
        description="share of samples whose label is among the five greatest logits",
        measure=top(5),
        needs_labels=True,
    ),
    Metric(
        name="nll",
        higher_is_better=False,
        description="mean cross-entropy of the next token, in nats, over all tokens",
        measure=cross_entropy,
    ),
    Metric(
        name="perplexity",
        higher_is_better=False,
        description="exp of the mean cross-entropy of the next token over all tokens",
        measure=cross_entropy,
        finish=np.exp,
    ),
    Metric(
        name="agreement",
        higher_is_better=True,
        description="share of positions whose argmax is the float model's",
        measure=closeness.agreement,
        needs_reference=True,
    ),
    Metric(
        name="cosine",
        higher_is_better=True,
        description="cosine of the outputs and the float model's, mean over samples",
        measure=closeness.cosine,
        needs_reference=True,
    ),
    Metric(
        name="sqnr_db",
        higher_is_better=True,
        description="energy of the float outputs over that of the error, overall, in dB",
        measure=closeness.relative_energy,
        finish=closeness.decibels,
        needs_reference=True,
    ),
    Metric(
        name="relative_l2",
        higher_is_better=False,
        description="norm of the error over that of the float outputs, overall",
        measure=closeness.relative_energy,
        finish=np.sqrt,
        needs_reference=True,
    ),
    Metric(
        name="mse",
        higher_is_better=False,
        description="mean squared error against the float outputs",
        measure=closeness.squared_error,
        needs_reference=True,
    ),
    Metric(
        name="mae",
        higher_is_better=False,
        description="mean absolute error against the float outputs",
        measure=closeness.absolute_error,
        needs_reference=True,
    ),
    Metric(
        name="kl",
        higher_is_better=False,
        description="KL divergence of the softmax of the last axis from the float model's, "
        "in nats, mean over positions",
        measure=closeness.divergence,
        needs_reference=True,
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
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
