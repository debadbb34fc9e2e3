"""Metrics of a model's outputs, against labels or against the float model's outputs.

Every metric is a ratio: for each sample a numerator and a denominator (correct answers over
answers, squared error over elements, cross-entropy over tokens), both summed over the samples in
float64, then a function of the quotient. So the result does not depend on how the samples were
cut into batches, and the per-sample parts that paired intervals need are there for the asking.

``registry``        every metric by its name.
``metric``          what a metric is, and a running measurement of one.
``batch``           the arrays that are measured, and the errors of those that do not fit.
``classification``  against labels: top-1, top-5.
``language``        against the next token: cross-entropy, perplexity.
``closeness``       against the float model's outputs: agreement, energies, distances.
``blocks``          how much is turned into float64 at a time.
"""

from qdist.evaluate.metrics.closeness import SQNR_CEILING_DB
from qdist.evaluate.metrics.metric import Accumulator, Metric
from qdist.evaluate.metrics.registry import METRICS, find_metric

__all__ = ["METRICS", "SQNR_CEILING_DB", "Accumulator", "Metric", "find_metric"]
