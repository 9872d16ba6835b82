"""ROUGE on examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gpt.text.rouge import ROUGE_KEYS, aggregate, paired_loss, score_texts


def _f(matches: int, reference: int, prediction: int) -> float:
    precision, recall = matches / prediction, matches / reference
    return 100 * 2 * precision * recall / (precision + recall)


def test_worked_example() -> None:
    """6 and 5 words; shared: the, cat, the, mat; pairs: "the cat", "the mat"; in order: the cat the mat."""
    (scores,) = score_texts(["the cat sat on the mat"], ["the cat and the mat"])
    assert tuple(scores) == ROUGE_KEYS
    assert scores["rouge1"] == pytest.approx(_f(4, 6, 5))
    assert scores["rouge2"] == pytest.approx(_f(2, 5, 4))
    assert scores["rougeL"] == pytest.approx(_f(4, 6, 5))
    assert scores["rougeLsum"] == pytest.approx(_f(4, 6, 5))


def test_sum_variant_works_line_by_line() -> None:
    """Lines swapped: the longest common subsequence of the whole is one line, the union over lines is everything."""
    (scores,) = score_texts(["one two three\nfour five six"], ["four five six\none two three"])
    assert scores["rougeL"] == pytest.approx(50)
    assert scores["rougeLsum"] == pytest.approx(100)


def test_no_stemming_but_case_and_punctuation_do_not_count() -> None:
    stems, marks, nothing = score_texts(["running dogs", "Running, dogs!", "x"], ["run dog", "running dogs", ""])
    assert stems["rouge1"] == 0
    assert marks["rouge1"] == pytest.approx(100)
    assert nothing["rouge1"] == 0


def test_aggregate_is_the_seeded_bootstrap_median() -> None:
    """Checked against the resampling written out here, with the keys drawing one after the other."""
    values = {key: np.arange(12.0) * (index + 1) for index, key in enumerate(ROUGE_KEYS)}
    rows = [{key: float(values[key][row]) for key in ROUGE_KEYS} for row in range(12)]
    generator = np.random.RandomState(0)
    for key, result in aggregate(rows).items():
        means = [values[key][generator.choice(12, size=12)].mean() for _ in range(1000)]
        assert result == pytest.approx(float(np.median(means)))


def test_aggregate_leaves_the_global_generator_alone() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    rows = [dict.fromkeys(ROUGE_KEYS, 50.0)]
    assert aggregate(rows) == pytest.approx(rows[0])
    assert np.random.random(3).tolist() == expected.tolist()  # noqa: NPY002


def test_paired_losses() -> None:
    """Texts lose or gain a point: the scatter between texts, which is far larger, cancels; the interval is that of the
    mean of n values, 1.96 deviations over the root of n."""
    generator = np.random.RandomState(1)
    before = generator.uniform(0, 100, 300)
    losses = generator.choice([-1.0, 1.0], 300, p=[0.4, 0.6])
    loss = paired_loss(before.tolist(), (before - losses).tolist())
    assert loss.mean == pytest.approx(losses.mean())
    half = 1.96 * losses.std() / 300**0.5
    assert (loss.low, loss.high) == pytest.approx((loss.mean - half, loss.mean + half), abs=0.1 * half)
    assert str(paired_loss([2, 2], [1, 1])) == "+1.00 (+1.00 to +1.00)"
