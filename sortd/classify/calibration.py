"""Calibration: held-out scores become probabilities, and the thresholds above which an image is filed."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.kernel import first_best
from sortd.classify.library import Pause, no_pause, parts
from sortd.classify.open_set import Gate, OpenSetScores, Strangers, foreign_gate, known_gate
from sortd.classify.types import AbstainSettings

EXAMINED = 32
"""Best scores of a row that enter its normaliser while temperatures are tried; the rest weighs nothing."""
SHARE_OF_ERRORS = 0.75
"""Of the errors that ``precision`` allows, the share that leave-one-out may show: references resemble each other more
than what arrives resembles them (on two of four public sets leave-one-out flatters by 3 to 6 points of accuracy)."""
PSEUDO_REFERENCES = 20.0
"""References' worth of trust in the calibrated confidence itself, beside the count of right ones: three right ones out
of three prove little, and one mistake in a small library does not close it."""
CURVE_POINTS = 48
CAUTIOUS_CLASSES = 20
"""With this many classes the cut for strangers is made at half of the share in force: strangers differ by class, and
without it classes left out for good were filed up to three times as often as wanted."""


@dataclass(frozen=True)
class Threshold:
    """The least confidence that files an image."""

    confidence: float
    attainable: float  # the largest precision that these references can prove
    is_attained: bool  # whether the wanted precision is proved


@dataclass(frozen=True)
class Calibration:
    """The thresholds in force and what the held-out images can prove; plain facts, JSON-able."""

    held_out: int = 0  # images that could be left out and judged
    accuracy: float | None = None  # held-out accuracy, every class counting once; None where nothing was left out
    confidence: float = 0.0  # least confidence of a filed image
    precision_wanted: float | None = None
    precision_attainable: float | None = None  # the largest precision that the held-out images can prove
    precision_expected: float | None = None  # held-out precision of what is filed
    filed_expected: float | None = None  # held-out share of known images that is filed
    gate: Gate | None = None
    strangers_wanted: float | None = None
    strangers_attainable: float | None = None  # the smallest share of strangers that leaving classes out can prove
    strangers_used: float | None = None  # the share in force: the wanted one, or the attainable one
    strangers_cut: float | None = None  # the share of left-out strangers where the cut is made: less for few classes
    text_weight: float = 0.0  # how many references a class's name counts as
    text_evidence: float | None = None  # standard errors by which names agree with their own images
    kernel_share: float = 0.0
    curve: tuple[tuple[float, float, float], ...] = ()  # points (least confidence, share filed, precision)
    notes: tuple[str, ...] = ()  # sentences on what was asked and cannot be honoured

    def precision_at(self, confidence: float) -> float | None:
        """Return the estimated share of right ones among what is as sure as this; None without a curve."""
        reached = [precision for least, _, precision in self.curve if least <= confidence]
        return reached[0] if reached else (self.curve[-1][2] if self.curve else None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Calibration":
        """Return what ``to_json`` wrote, also after JSON has made lists of the tuples."""
        curve = tuple((float(a), float(b), float(c)) for a, b, c in facts["curve"])
        gate = None if facts["gate"] is None else Gate.from_json(facts["gate"])
        return cls(**{**facts, "curve": curve, "gate": gate, "notes": tuple(facts["notes"])})


@dataclass(frozen=True, eq=False)
class HeldOutOutcomes:
    """What a classifier made of R images that it had not learnt.

    Raises:
        ValueError: the arrays have other lengths, or a probability or a class is out of range.
    """

    confidence: Array  # (R,): the calibrated probability of the class that it chose
    right: BoolArray  # (R,): whether that was the right class
    own: IntArray  # (R,): the right class, an index into the labels
    open_set: OpenSetScores | None = None  # None for a fine-tuned model

    def __post_init__(self) -> None:
        """Check lengths and ranges."""
        if not self.confidence.shape == self.right.shape == self.own.shape == (len(self.own),):
            raise ValueError(
                f"held-out outcomes have shapes {self.confidence.shape}, {self.right.shape} and {self.own.shape}"
            )
        if not ((self.confidence >= 0) & (self.confidence <= 1)).all():
            raise ValueError("a held-out probability lies outside of 0 to 1")
        if len(self.own) and self.own.min() < 0:
            raise ValueError("a held-out class is negative")


def log_softmax(logits: Array) -> Array:
    """Return (B, C) log probabilities; -inf stays -inf, and a row without any finite score becomes -inf."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    shifted = logits - np.where(np.isfinite(top), top, 0.0)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.where(total > 0.0, total, 1.0)), dtype=np.float64)


def top_classes(table: Array, temperature: float, *, pause: Pause = no_pause) -> tuple[IntArray, Array]:
    """Return (R,) the best class of each row of scores (R, C), and its probability."""
    best, confidence = np.empty(len(table), np.int64), np.empty(len(table))
    for part in parts(*table.shape):
        best[part] = first_best(table[part])
        probabilities = np.exp(log_softmax(temperature * table[part]))
        confidence[part] = probabilities[np.arange(len(probabilities)), best[part]]
        pause()
    return best, confidence


def balanced_weights(own: IntArray, count: int) -> Array:
    """Return weights (R,) by which every class counts once, summing to R."""
    if not len(own):
        return np.zeros(0)
    raw = 1.0 / np.bincount(own, minlength=count)[own]
    return np.asarray(raw * (len(own) / raw.sum()), dtype=np.float64)


def balanced_accuracy(right: BoolArray, own: IntArray, count: int) -> float | None:
    """Return the share of right ones (R,) with every class counting once; None of none."""
    weights = balanced_weights(own, count)
    return float(weights @ right / weights.sum()) if len(right) else None


def fit_temperature(
    table: Array, own: IntArray, weights: Array, *, typical: float, spread: float, pause: Pause = no_pause
) -> tuple[float, Array]:
    """Return the factor for scores that makes their softmax the likeliest, and each row's log loss under it.

    Args:
        table: (R, C) leave-one-out scores.
        own: (R,) the right classes.
        weights: (R,) how much each row counts; they sum to R.
        typical: the median of the factor's prior.
        spread: standard deviation of its logarithm.
        pause: called between the parts.
    """
    mine = table[np.arange(len(table)), own]
    examined = table
    if table.shape[1] > EXAMINED:
        examined = np.empty((len(table), EXAMINED + 1))
        for part in parts(*table.shape):
            examined[part, :-1] = np.partition(table[part], table.shape[1] - EXAMINED, axis=1)[:, -EXAMINED:]
            pause()
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
        pause()
    assert best is not None
    return best[1], best[2]


def choose_threshold(confidence: Array, right: BoolArray, weights: Array, wanted: float) -> Threshold:
    """Return the least confidence at which the references prove the wanted precision.

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


def calibrate_knowns(
    outcomes: HeldOutOutcomes, precision: float, *, classes: int, foreign_cosines: Array, nothing_held_out: str
) -> dict[str, Any]:
    """Return the fields of a calibration that tell of known images.

    Args:
        outcomes: R held-out images.
        precision: the wanted one.
        classes: how many there are.
        foreign_cosines: (N,) cosine of references to the nearest one of another class, for the gate where no held-out
            image is right.
        nothing_held_out: the note where R is 0.
    """
    own, right, confidence, open_set = outcomes.own, outcomes.right, outcomes.confidence, outcomes.open_set
    count, weights = len(own), balanced_weights(own, classes)
    threshold = choose_threshold(confidence, right, weights, precision)
    gate = None
    if open_set is not None and right.any():
        gate = known_gate(open_set, confidence, right, least_confidence=threshold.confidence, classes=classes)
    elif len(foreign_cosines):
        gate = foreign_gate(foreign_cosines)
    facts: dict[str, Any] = {"held_out": count, "precision_wanted": precision, "gate": gate}
    if not count:
        return {**facts, "confidence": precision, "notes": (f"{nothing_held_out}, so nothing vouches for a precision",)}
    filed = confidence >= threshold.confidence
    if gate is not None and open_set is not None:
        filed &= gate.familiarity(open_set, confidence) >= gate.least
    held_out = "references" if open_set is not None else "held-out images"
    attainable = f"{count} {held_out} can vouch for {threshold.attainable:.3f} at most"
    return {
        **facts,
        "accuracy": balanced_accuracy(right, own, classes),
        "confidence": threshold.confidence,
        "precision_attainable": threshold.attainable,
        "precision_expected": float(weights @ (filed & right) / (weights @ filed)) if filed.any() else None,
        "filed_expected": float(weights @ filed / weights.sum()),
        "curve": tuple(precision_curve(confidence, right, weights)),
        "notes": () if threshold.is_attained else (f"precision {precision:g} is asked, but {attainable}",),
    }


def calibrate_strangers(null: Strangers, wanted: float, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a calibration that tell of strangers, with the notes that are there before."""
    attainable = null.attainable
    if attainable > wanted:
        proved = f"{null.classes} classes can vouch for {attainable:.3f} at best"
        notes = (*notes, f"strangers {wanted:g} is asked, but {proved}")
    return {
        "strangers_wanted": wanted,
        "strangers_attainable": attainable,
        "strangers_used": max(wanted, attainable),
        "strangers_cut": max(wanted, attainable) * null.classes / (null.classes + CAUTIOUS_CLASSES),
        "notes": notes,
    }


def calibrate_outcomes(outcomes: HeldOutOutcomes, abstain: AbstainSettings | None, *, classes: int) -> Calibration:
    """Return the calibration of a fine-tuned model by the images that its training held out.

    Args:
        outcomes: R held-out images.
        abstain: how sure it must be; None files everything.
        classes: how many classes there are.
    """
    if abstain is None:
        accuracy = balanced_accuracy(outcomes.right, outcomes.own, classes)
        return Calibration(len(outcomes.own), accuracy, filed_expected=1.0, precision_expected=accuracy)
    nothing = "the training held no image out"
    facts = calibrate_knowns(
        outcomes, abstain.precision, classes=classes, foreign_cosines=np.zeros(0), nothing_held_out=nothing
    )
    if abstain.strangers != "auto":
        asked = f"strangers {abstain.strangers:g} is asked"
        note = f"{asked}, but a fine-tuned model tells them by its probability alone, which promises no share"
        facts["notes"] = (*facts["notes"], note)
    return Calibration(**facts)
