"""Metrics against their formulas written out, and the law that batches do not matter."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.errors import DataError, EvaluationError
from qdist.evaluate.metrics import METRICS, SQNR_CEILING_DB, Accumulator, find_metric

Arrays = list[NDArray[Any]]
LABEL_FREE = [name for name, metric in METRICS.items() if metric.needs_reference]


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    result: NDArray[Any] = e / e.sum(axis=-1, keepdims=True)
    return result


def images(seed: int, n: int = 12) -> tuple[Arrays, dict[str, NDArray[Any]], NDArray[Any], Arrays]:
    """Outputs [n, 7], [n, 3, 4] and an integer one; feeds; labels; the float model's outputs."""
    rng = np.random.default_rng(seed)
    reference: Arrays = [
        rng.normal(size=(n, 7)).astype(np.float32),
        rng.normal(size=(n, 3, 4)).astype(np.float32),
        rng.integers(0, 9, (n, 2)),
    ]
    outputs: Arrays = [
        (a + rng.normal(size=a.shape) * 0.3).astype(a.dtype) if a.dtype.kind == "f" else a + 1
        for a in reference
    ]
    feeds = {"image": rng.normal(size=(n, 3)).astype(np.float32)}
    return outputs, feeds, rng.integers(0, 7, n), reference


def texts(seed: int, n: int = 6) -> tuple[Arrays, dict[str, NDArray[Any]]]:
    """Logits [n, 9, 11] and tokens [n, 9]."""
    rng = np.random.default_rng(seed)
    feeds = {"tokens": rng.integers(0, 11, (n, 9))}
    return [rng.normal(size=(n, 9, 11), scale=3).astype(np.float32)], feeds


def measured(name: str, *batch: Any) -> Accumulator:
    accumulator = find_metric(name).make()
    accumulator.update(*batch)
    return accumulator


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_counts_labels_among_the_greatest(k: int) -> None:
    outputs, feeds, labels, _ = images(1)
    order = np.argsort(-outputs[0], axis=1)[:, :k]
    hits = (order == labels[:, None]).any(axis=1)
    accumulator = measured(f"top{k}", outputs, feeds, labels)
    assert accumulator.result() == hits.mean()
    assert accumulator.per_sample().tolist() == hits.tolist()
    assert 0 < hits.mean() < 1


def test_ties_go_to_the_lower_class_as_argmax_has_it() -> None:
    outputs = [np.zeros((2, 6), np.float32)]
    feeds = {"x": np.zeros((2, 1))}
    assert measured("top1", outputs, feeds, np.array([0, 1])).per_sample().tolist() == [1, 0]
    assert measured("top5", outputs, feeds, np.array([4, 5])).per_sample().tolist() == [1, 0]


def test_top_k_takes_convolutional_logits_and_column_labels() -> None:
    outputs, feeds, labels, _ = images(2)
    plain = measured("top1", outputs, feeds, labels).result()
    shaped = measured("top1", [outputs[0][:, :, None, None]], feeds, labels[:, None]).result()
    assert shaped == plain


def test_nll_and_perplexity_aggregate_over_tokens() -> None:
    outputs, feeds = texts(3)
    tokens = feeds["tokens"]
    p = softmax(outputs[0])
    losses = [-math.log(p[i, t, tokens[i, t + 1]]) for i in range(len(tokens)) for t in range(8)]
    assert measured("nll", outputs, feeds).result() == pytest.approx(np.mean(losses), rel=1e-12)
    accumulator = measured("perplexity", outputs, feeds)
    assert accumulator.result() == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
    per_sample = np.exp(np.reshape(losses, (-1, 8)).mean(axis=1))
    np.testing.assert_allclose(accumulator.per_sample(), per_sample, rtol=1e-12)
    # The mean of the samples' perplexities is another number.
    assert accumulator.result() != pytest.approx(per_sample.mean(), rel=1e-3)


def test_texts_of_different_lengths_weigh_by_their_tokens() -> None:
    outputs, feeds = texts(4, n=2)
    accumulator = find_metric("nll").make()
    accumulator.update([outputs[0][:1, :3]], {"tokens": feeds["tokens"][:1, :3]})
    accumulator.update([outputs[0][1:]], {"tokens": feeds["tokens"][1:]})
    short, long = accumulator.per_sample()
    assert accumulator.result() == pytest.approx((2 * short + 8 * long) / 10, rel=1e-12)
    numerators, denominators = accumulator.parts()
    assert denominators.tolist() == [2, 8]
    np.testing.assert_allclose(numerators, [2 * short, 8 * long], rtol=1e-12)


def test_padding_is_not_counted() -> None:
    outputs, feeds = texts(5, n=1)
    short = measured("nll", [outputs[0][:, :5]], {"input_ids": feeds["tokens"][:, :5]}).result()
    mask = np.array([[1] * 5 + [0] * 4])
    outputs[0][:, 5:] = np.nan
    padded = measured(
        "nll", outputs, {"input_ids": feeds["tokens"], "attention_mask": mask}
    ).result()
    assert padded == pytest.approx(short, rel=1e-12)


def test_the_input_of_tokens_is_named_or_the_only_one() -> None:
    outputs, feeds = texts(6)
    expected = measured("nll", outputs, feeds).result()
    two = {"positions": np.zeros_like(feeds["tokens"]), **feeds}
    with pytest.raises(EvaluationError, match=r"QD704 .*positions, tokens"):
        measured("nll", outputs, two)
    named = find_metric("nll").make(token_input="tokens")
    named.update(outputs, two)
    assert named.result() == expected
    wrong = find_metric("nll").make(token_input="ids")
    with pytest.raises(EvaluationError, match="'ids' named"):
        wrong.update(outputs, two)


def test_label_free_metrics_follow_their_formulas_over_all_float_outputs() -> None:
    outputs, feeds, _, reference = images(7)
    n = len(reference[0])
    q, r = [
        np.concatenate([a.reshape(n, -1) for a in arrays[:2]], axis=1).astype(np.float64)
        for arrays in (outputs, reference)
    ]
    positions = [(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
                 for a, b in zip(outputs[:2], reference[:2], strict=True)]  # fmt: skip
    noise, signal = ((r - q) ** 2).sum(), (r**2).sum()
    kl = [np.sum(softmax(b) * np.log(softmax(b) / softmax(a)), axis=1) for a, b in positions]
    norms = np.linalg.norm(q, axis=1) * np.linalg.norm(r, axis=1)
    expected = {
        "agreement": np.concatenate([a.argmax(1) == b.argmax(1) for a, b in positions]).mean(),
        "cosine": np.mean((q * r).sum(axis=1) / norms),
        "sqnr_db": 10 * np.log10(signal / noise),
        "relative_l2": np.sqrt(noise / signal),
        "mse": noise / q.size,
        "mae": np.abs(r - q).mean(),
        "kl": np.concatenate(kl).mean(),
    }
    assert set(expected) == set(LABEL_FREE)
    for name, value in expected.items():
        got = measured(name, outputs, feeds, None, reference)
        assert got.result() == pytest.approx(value, rel=1e-9), name
        assert got.per_sample().shape == (n,)


def test_equal_outputs_get_the_best_score() -> None:
    _, feeds, _, reference = images(8)
    best = {"agreement": 1, "sqnr_db": SQNR_CEILING_DB, "cosine": 1}
    for name in LABEL_FREE:
        got = measured(name, reference, feeds, None, reference).result()
        assert got == pytest.approx(best.get(name, 0), abs=1e-12), name


def test_cosine_of_zero_vectors() -> None:
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    q, r = np.concatenate([zero, zero, one]), np.concatenate([zero, one, zero])
    accumulator = measured("cosine", [q], {"x": q}, None, [r])
    assert accumulator.per_sample().tolist() == [1, 0, 0]


def test_kl_knows_masked_logits() -> None:
    r = np.array([[0.0, 1.0, -np.inf]], np.float32)
    q = np.array([[0.5, 1.0, -np.inf]], np.float32)
    p, s = softmax(r[:, :2]), softmax(q[:, :2])
    expected = (p * np.log(p / s)).sum()
    assert measured("kl", [q], {"x": q}, None, [r]).result() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", list(METRICS))
def test_nan_in_the_outputs_is_not_hidden(name: str) -> None:
    if name in {"nll", "perplexity"}:
        (outputs, feeds), labels, reference = texts(9), None, None
    else:
        outputs, feeds, labels, reference = images(9)
    outputs[0][0, 0] = np.nan
    accumulator = measured(name, outputs, feeds, labels, reference)
    assert math.isnan(accumulator.result())
    assert np.isnan(accumulator.per_sample()).tolist() == [True] + [False] * (len(outputs[0]) - 1)


@pytest.mark.parametrize("name", list(METRICS))
def test_nothing_measured_is_nan(name: str) -> None:
    accumulator = find_metric(name).make()
    assert math.isnan(accumulator.result())
    assert accumulator.per_sample().shape == (0,)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.sets(st.integers(1, 11)))
@pytest.mark.parametrize("name", list(METRICS))
def test_any_partition_into_batches_gives_the_same(name: str, seed: int, cuts: set[int]) -> None:
    if name in {"nll", "perplexity"}:
        (outputs, feeds), labels, reference = texts(seed, n=12), None, None
    else:
        outputs, feeds, labels, reference = images(seed)
    whole = measured(name, outputs, feeds, labels, reference)
    parted = find_metric(name).make()
    edges = [0, *sorted(cuts), 12]
    for a, b in pairwise(edges):
        parted.update(
            [x[a:b] for x in outputs],
            {key: x[a:b] for key, x in feeds.items()},
            None if labels is None else labels[a:b],
            None if reference is None else [x[a:b] for x in reference],
        )
    assert parted.n_samples == whole.n_samples == 12
    assert parted.result() == pytest.approx(whole.result(), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(parted.per_sample(), whole.per_sample(), rtol=1e-12, atol=1e-12)


def test_large_outputs_are_measured_in_blocks() -> None:
    rng = np.random.default_rng(10)
    r = rng.normal(size=(2, 3, 70_000)).astype(np.float32)
    q = (r + rng.normal(size=r.shape) * 0.1).astype(np.float32)
    feeds = {"x": np.zeros((2, 1), np.float32)}
    mse = measured("mse", [q], feeds, None, [r]).result()
    assert mse == pytest.approx(np.mean((q.astype(float) - r) ** 2), rel=1e-9)
    kl = (softmax(r) * np.log(softmax(r) / softmax(q))).sum(-1).mean()
    assert measured("kl", [q], feeds, None, [r]).result() == pytest.approx(kl, rel=1e-9)


def test_outputs_without_an_axis_of_samples_need_batches_of_one() -> None:
    boxes = np.ones((5, 4), np.float32)
    one, two = {"x": np.zeros((1, 3))}, {"x": np.zeros((2, 3))}
    assert measured("mse", [boxes + 2], one, None, [boxes]).result() == 4
    with pytest.raises(EvaluationError, match="batch size 1"):
        measured("mse", [boxes], two, None, [boxes])


def test_one_number_per_sample_has_no_axis_to_choose_from() -> None:
    r = np.array([1.0, 5.0, 2.0], np.float32)
    accumulator = measured("agreement", [r[::-1]], {"x": np.zeros((3, 1))}, None, [r])
    assert accumulator.per_sample().tolist() == [1, 1, 1]


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(EvaluationError) as caught:
        find_metric("top2")
    assert caught.value.code == "QD701"
    assert all(name in caught.value.expected for name in METRICS)


def test_labels_that_are_missing_or_do_not_fit() -> None:
    outputs, feeds, labels, _ = images(11)
    for wrong in (None, labels[:-1], labels + 7, labels.astype(np.float32)):
        with pytest.raises(DataError) as caught:
            measured("top1", outputs, feeds, wrong)
        assert caught.value.code == "QD308"


@pytest.mark.parametrize("change", ["shape", "number", "integer"])
def test_references_that_do_not_fit(change: str) -> None:
    outputs, feeds, _, reference = images(12)
    other = {
        "shape": [reference[0][:, :3], *reference[1:]],
        "number": reference[:2],
        "integer": [a.astype(np.int64) for a in reference],
    }[change]
    with pytest.raises(EvaluationError) as caught:
        measured("mse", outputs, feeds, None, other)
    assert caught.value.code == "QD704"
    with pytest.raises(ValueError, match="needs the float model's outputs"):
        measured("mse", outputs, feeds)


def test_text_metrics_refuse_what_is_no_text() -> None:
    outputs, feeds, *_ = images(13)
    with pytest.raises(EvaluationError, match="integer inputs none"):
        measured("nll", outputs, feeds)
    logits, tokens = texts(13)
    with pytest.raises(EvaluationError, match="that vocabulary"):
        measured("nll", logits, {"tokens": tokens["tokens"] + 3})
    with pytest.raises(EvaluationError, match="logits"):
        measured("nll", [logits[0][:, :4]], tokens)


def test_the_documentation_has_every_metric_and_which_way_it_ranks() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| (`.+`) \| (higher|lower) \|", text, re.MULTILINE)
    documented = {name: way for names, way in rows for name in re.findall(r"`(\w+)`", names)}
    ways = {name: "higher" if m.higher_is_better else "lower" for name, m in METRICS.items()}
    assert documented == ways
