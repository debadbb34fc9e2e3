"""Intervals of a difference of two models on the same samples."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from qdist.evaluate import paired as module
from qdist.evaluate.metrics import find_metric
from qdist.evaluate.metrics.batch import Parts
from qdist.evaluate.paired import Difference, Resampled, discordant, paired

AGREEMENT = find_metric("agreement")


def parts(right: NDArray[np.bool_]) -> Parts:
    return right.astype(np.float64), np.ones(right.size)


def test_an_interval_holds_the_difference_and_knows_equals() -> None:
    rng = np.random.default_rng(5)
    one = rng.random(400) < 0.9
    other = np.where(rng.random(400) < 0.95, one, ~one)
    same = paired(AGREEMENT, parts(one), parts(one))
    assert same == Difference(mean=0.0, low=0.0, high=0.0)
    assert not same.is_sure
    found = paired(AGREEMENT, parts(one), parts(other))
    assert found.mean == pytest.approx(one.mean() - other.mean())
    assert found.low < found.mean < found.high
    # Pairs that mostly agree leave less to chance than the samples of either model do.
    difference = one.astype(float) - other
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * difference.std() / np.sqrt(difference.size), rel=0.15
    )
    back = paired(AGREEMENT, parts(other), parts(one))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert back.turned().mean == pytest.approx(found.mean)


def test_a_ratio_is_resampled_as_one() -> None:
    """Texts of different lengths: the difference of perplexities is not that of their means."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 50, 60).astype(np.float64)
    ours, theirs = (rng.gamma(2.0, 1.0, 60) * lengths for _ in range(2))
    metric = find_metric("perplexity")
    found = paired(metric, (ours, lengths), (theirs, lengths))
    expected = np.exp(ours.sum() / lengths.sum()) - np.exp(theirs.sum() / lengths.sum())
    assert found.mean == pytest.approx(expected)
    assert found.low < expected < found.high


def test_draws_in_pieces_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    three = [parts(rng.random(50) < share) for share in (0.5, 0.7, 0.9)]
    whole = Resampled(AGREEMENT, three)
    monkeypatch.setattr(module, "_DRAWN_ELEMENTS", 50 * 7)
    pieces = Resampled(AGREEMENT, three)
    for i, j in ((0, 1), (2, 0), (1, 2)):
        expected = whole.difference(i, j)
        assert pieces.difference(i, j) == expected
        assert expected == pytest.approx(paired(AGREEMENT, three[i], three[j]))
    with pytest.raises(ValueError, match=r"\[4, 50\] samples"):
        Resampled(AGREEMENT, (three[0], parts(np.ones(4, bool))))


def test_few_samples_that_one_model_alone_gets_right_prove_nothing() -> None:
    one = np.ones(600, bool)
    other = one.copy()
    other[:4] = False
    found = discordant(parts(one), parts(other))
    assert found is not None
    assert (found.ours, found.theirs) == (4, 0)
    assert found.p == pytest.approx(2 / 16)
    assert paired(AGREEMENT, parts(one), parts(other)).is_sure
    mixed = parts(np.arange(30) < 12), parts((np.arange(30) < 3) | (np.arange(30) > 25))
    assert (apart := discordant(*mixed)) is not None
    assert apart.p == pytest.approx(binomtest(apart.ours, apart.ours + apart.theirs).pvalue)
    assert discordant((np.array([0.5]), np.ones(1)), parts(np.ones(1, bool))) is None
