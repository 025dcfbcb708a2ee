"""Confidence: leave-one-out scores become probabilities, and a probability above which enough are right."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray
from sortd.deciding.steps import Steps, finish, parts

EXAMINED = 32
"""Best scores of a row that enter its normaliser while temperatures are tried; the rest weighs nothing."""
SHARE_OF_ERRORS = 0.75
"""Of the errors that ``precision`` allows, the share that leave-one-out may show: references resemble each other more
than what arrives resembles them (on two of four public sets leave-one-out flatters by 3 to 6 points of accuracy)."""
PSEUDO_REFERENCES = 20.0
"""References' worth of trust in the calibrated confidence itself, beside the count of right ones: three right ones out
of three prove little, and one mistake in a small library does not close it."""
CURVE_POINTS = 48


@dataclass(frozen=True)
class Threshold:
    """The least confidence that files an image, and what stands behind it."""

    confidence: float
    attainable: float
    """The largest precision that these references can vouch for."""
    is_attained: bool
    """Whether the wanted precision is vouched for."""


def log_softmax(logits: Array) -> Array:
    """Return (B, C) log probabilities; -inf stays -inf, and a row without any finite score becomes -inf."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    shifted = logits - np.where(np.isfinite(top), top, 0.0)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.where(total > 0.0, total, 1.0)), dtype=np.float64)


def fit_temperature(
    table: Array, own: IntArray, weights: Array, *, typical: float, spread: float
) -> tuple[float, Array]:
    """Return the factor for scores that makes their softmax the likeliest, and each row's log loss under it.

    Args:
        table: (R, C) leave-one-out scores.
        own: (R,) the right classes.
        weights: (R,) how much each row counts; they sum to R.
        typical: the factor that is assumed before seeing anything.
        spread: standard deviation of its logarithm.
    """
    return finish(temperature_steps(table, own, weights, typical=typical, spread=spread))


def temperature_steps(
    table: Array, own: IntArray, weights: Array, *, typical: float, spread: float
) -> Steps[tuple[float, Array]]:
    """Take the steps to ``fit_temperature``."""
    mine = table[np.arange(len(table)), own]
    examined = table
    if table.shape[1] > EXAMINED:
        examined = np.empty((len(table), EXAMINED + 1))
        for part in parts(*table.shape):
            examined[part, :-1] = np.partition(table[part], table.shape[1] - EXAMINED, axis=1)[:, -EXAMINED:]
            yield
        examined[:, -1] = np.where(mine >= examined[:, :-1].min(axis=1), -np.inf, mine)
    top = examined.max(axis=1, keepdims=True)
    gaps, behind = examined - top, mine - top[:, 0]
    best: tuple[float, float, Array] | None = None
    for step in np.linspace(-4.0, 4.0, 49):
        factor = typical * float(np.exp(step * spread))
        losses = np.log(np.exp(gaps * factor).sum(axis=1)) - behind * factor
        cost = float(losses @ weights) + 0.5 * step * step
        if best is None or cost < best[0]:
            best = (cost, factor, losses)
        yield
    assert best is not None
    return best[1], best[2]


def balanced_weights(own: IntArray, count: int) -> Array:
    """Return weights (R,) by which every class counts once, summing to R."""
    if not len(own):
        return np.zeros(0)
    raw = 1.0 / np.bincount(own, minlength=count)[own]
    return np.asarray(raw * (len(own) / raw.sum()), dtype=np.float64)


def choose_threshold(confidence: Array, right: BoolArray, weights: Array, wanted: float) -> Threshold:
    """Return the least confidence at which the references vouch for the wanted precision.

    Where no confidence reaches it, the threshold is beyond every error that was seen, and at least the wanted
    precision itself.
    """
    order = np.argsort(-confidence, kind="stable")
    estimate = _estimates(confidence[order], right[order], weights[order])
    target = 1.0 - (1.0 - wanted) * SHARE_OF_ERRORS
    attainable = float(estimate.max(initial=0.0))
    fulfils = np.flatnonzero(estimate >= target)
    if fulfils.size:
        last = int(fulfils[-1])
        return Threshold(_just_below(confidence[order], last), attainable, is_attained=True)
    wrong = confidence[~right]
    beyond = float(np.nextafter(wrong.max(), 2.0)) if wrong.size else 0.0
    return Threshold(max(beyond, wanted), attainable, is_attained=False)


def precision_curve(confidence: Array, right: BoolArray, weights: Array) -> list[tuple[float, float, float]]:
    """Return points (least confidence, share filed, precision) from the most confident to all."""
    if not len(confidence):
        return []
    order = np.argsort(-confidence, kind="stable")
    estimate = _estimates(confidence[order], right[order], weights[order])
    filed = np.cumsum(weights[order]) / weights.sum()
    points = np.unique(np.linspace(0, len(order) - 1, CURVE_POINTS).astype(np.int64))
    return [(float(confidence[order][at]), float(filed[at]), float(estimate[at])) for at in points]


def _estimates(confidence: Array, right: BoolArray, weights: Array) -> Array:
    """Return the estimated share of right ones among the first 1, 2, 3… of descending confidence."""
    counted = np.cumsum(weights)
    believed = PSEUDO_REFERENCES * np.cumsum(weights * confidence) / counted
    return np.asarray((np.cumsum(weights * right) + believed) / (counted + PSEUDO_REFERENCES), dtype=np.float64)


def _just_below(confidence: Array, last: int) -> float:
    if last + 1 < len(confidence):
        return float((confidence[last] + confidence[last + 1]) / 2.0)
    return float(confidence[last]) * 0.9
