"""ROUGE as summarisation papers report it, computed here: no metric script, no download.

F-measures in per cent, without stemming.  The score of a set is the median of 1000 bootstrap means with a fixed seed,
close to but not exactly the mean of its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUGE_KEYS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Scores = dict[str, float]
_RESAMPLINGS = 10_000


@dataclass(frozen=True)
class Loss:
    """How many points predictions score less than others of the same texts: the mean, and from where to where it is in
    95 of 100 drawings of as many texts with replacement."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def score_texts(references: Sequence[str], predictions: Sequence[str]) -> list[Scores]:
    """The scores of each prediction against its reference, 0 to 100 per key of ROUGE_KEYS."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_KEYS, use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    return [{key: 100 * score.fmeasure for key, score in scorer.score(*pair).items()} for pair in pairs]


def aggregate(scores: Sequence[Scores]) -> Scores:
    """The score of the whole set, 0 to 100 per key.  `scores` must not be empty."""
    import numpy as np
    from rouge_score.scoring import BootstrapAggregator, Score

    aggregator = BootstrapAggregator()
    for row in scores:
        aggregator.add_scores({key: Score(row[key], row[key], row[key]) for key in ROUGE_KEYS})
    state = np.random.get_state()  # noqa: NPY002 - the aggregator draws from numpy's global generator
    np.random.seed(0)  # noqa: NPY002
    try:
        return {key: float(score.mid.fmeasure) for key, score in aggregator.aggregate().items()}
    finally:
        np.random.set_state(state)  # noqa: NPY002


def paired_loss(before: Sequence[float], after: Sequence[float]) -> Loss:
    """before, after: the scores of each text, not empty.  The seed of the drawings is fixed."""
    import numpy as np

    losses = np.subtract(before, after)
    drawn = np.random.default_rng(0).integers(len(losses), size=(_RESAMPLINGS, len(losses)))
    low, high = np.percentile(losses[drawn].mean(1), (2.5, 97.5))
    return Loss(float(losses.mean()), float(low), float(high))
