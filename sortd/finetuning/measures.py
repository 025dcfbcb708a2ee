"""Measures of a classifier on images that it has not seen: accuracy, calibration, strangers, paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray

BINS = 15
"""Bins of equal width of the expected calibration error, as Guo et al. (2017) have them."""
KNOWN_KEPT = 0.95


@dataclass(frozen=True, eq=False)
class Judged:
    """What one classifier says of the test images, and of strangers where there are any."""

    name: str
    probabilities: Array
    """float64 (N, C)."""
    strangers: Array
    """float64 (S,): the top probability of images of no class."""

    @property
    def best(self) -> IntArray:
        """int64 (N,): the class of each image."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def confidence(self) -> Array:
        """float64 (N,): the top probability of each image."""
        return np.asarray(self.probabilities.max(axis=1), dtype=np.float64)


def figures(judged: Judged, own: IntArray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the measures of a classifier as plain values, shares between 0 and 1.

    Args:
        judged: what it says.
        own: int64 (N,): the right classes.
        labels: the C names.
    """
    best, right = judged.best, judged.best == own
    classes = per_class(best, own, labels)
    scored = [row["f1"] for row in classes if row["images"]]
    return {
        "images": len(own),
        "accuracy": _mean(right),
        "balanced_accuracy": _mean([row["recall"] for row in classes if row["images"]]),
        "macro_f1": _mean(scored),
        "calibration_error": calibration_error(judged.confidence, right),
        "log_loss": _mean(-np.log(np.maximum(judged.probabilities[np.arange(len(own)), own], 1e-12))),
        "open_set": open_set(judged.confidence, judged.strangers),
    }


def per_class(best: IntArray, own: IntArray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class; None where nothing can be said."""
    rows = []
    for index, label in enumerate(labels):
        hit = int(((best == index) & (own == index)).sum())
        images, taken = int((own == index).sum()), int((best == index).sum())
        rows.append(
            {
                "label": label,
                "images": images,
                "precision": hit / taken if taken else None,
                "recall": hit / images if images else None,
                "f1": 2 * hit / (images + taken) if images + taken else None,
            }
        )
    return rows


def confusion(best: IntArray, own: IntArray, count: int) -> IntArray:
    """Return int64 (C, C): how many images of each class (rows) went to each class (columns)."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (own, best), 1)
    return table


def calibration_error(confidence: Array, right: BoolArray) -> float | None:
    """Return the expected calibration error: the mean gap between confidence and accuracy over bins."""
    if not len(confidence):
        return None
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def open_set(known: Array, strangers: Array) -> dict[str, Any] | None:
    """Return how well confidence tells images of the classes from strangers; None where there are none of either.

    ``auroc`` is the share of pairs in which the known image is the more confident one (ties count half); ``accepted``
    the share of strangers above the confidence that keeps 95 % of the known images (FPR95).
    """
    if not len(known) or not len(strangers):
        return None
    ordered = np.sort(strangers)
    below, upto = np.searchsorted(ordered, known, "left"), np.searchsorted(ordered, known, "right")
    kept = float(np.quantile(known, 1.0 - KNOWN_KEPT))
    return {
        "strangers": len(strangers),
        "auroc": float((below + upto).sum() / (2 * len(known) * len(strangers))),
        "accepted": float((strangers >= kept).mean()),
    }


def mcnemar(first: BoolArray, second: BoolArray) -> dict[str, Any]:
    """Return McNemar's exact test of two classifiers on the same images.

    Two-sided binomial test of the images that only one of the two gets right, which under no difference fall to each
    with probability one half (McNemar 1947; exact form as in Fagerland et al. 2013).
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, number) for number in range(fewer + 1))
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": min(1.0, 2 * tail / 2**differing),
    }


def _mean(values: Sequence[float] | Array | BoolArray) -> float | None:
    return float(np.mean(values)) if len(values) else None
