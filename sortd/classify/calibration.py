"""Calibration: temperature and filing thresholds from held-out scores; see docs/decisions.md."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.kernel import first_best
from sortd.classify.library import Pause, no_pause, parts
from sortd.classify.open_set import Gate, OpenSetScores, Strangers, foreign_gate, known_gate
from sortd.classify.types import AbstainSettings

EXAMINED = 32
"""Highest scores of a row that enter the softmax while the temperature is fitted; the rest is negligible."""
SHARE_OF_ERRORS = 0.75
"""Share of the errors that ``precision`` allows which may occur in leave-one-out: references resemble each other more
than new images resemble them (on two of four public sets leave-one-out accuracy is 3 to 6 points too high)."""
PSEUDO_REFERENCES = 20.0
"""Weight, in references, of the calibrated confidence as a prior of the precision, since few held-out references prove
little."""
CURVE_POINTS = 48
CAUTIOUS_CLASSES = 20
"""Number of classes with which the threshold for strangers is half of the share in force: strangers differ by class,
and without this, strangers were filed up to three times as often as wanted."""


@dataclass(frozen=True)
class Threshold:
    """The least confidence that files an image."""

    confidence: float
    attainable: float  # largest estimated precision of any threshold
    is_attained: bool  # whether the wanted precision is reached


@dataclass(frozen=True)
class Calibration:
    """The thresholds in force, and the estimates from held-out images; JSON-able."""

    held_out: int = 0  # number of held-out images
    accuracy: float | None = None  # balanced held-out accuracy; None if there are no held-out images
    confidence: float = 0.0  # least confidence of a filed image
    precision_wanted: float | None = None
    precision_attainable: float | None = None  # largest estimated precision of any threshold
    precision_expected: float | None = None  # held-out precision of what is filed
    filed_expected: float | None = None  # held-out share of known images that is filed
    gate: Gate | None = None
    strangers_wanted: float | None = None
    strangers_attainable: float | None = None  # smallest share that leaving classes out can guarantee
    strangers_used: float | None = None  # the share in force: the larger of the two above
    strangers_cut: float | None = None  # threshold of the share in stranger scores; smaller with few classes
    text_weight: float = 0.0  # number of references that a class name counts as
    text_evidence: float | None = None  # see PlacedNames
    kernel_share: float = 0.0
    curve: tuple[tuple[float, float, float], ...] = ()  # points (least confidence, share filed, precision)
    notes: tuple[str, ...] = ()  # sentences about settings that cannot be met

    def precision_at(self, confidence: float) -> float | None:
        """Return the estimated precision of images with at least this confidence; None without a curve."""
        reached = [precision for least, _, precision in self.curve if least <= confidence]
        return reached[0] if reached else (self.curve[-1][2] if self.curve else None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Calibration":
        """Return the calibration from ``to_json``'s mapping, before or after JSON."""
        curve = tuple((float(a), float(b), float(c)) for a, b, c in facts["curve"])
        gate = None if facts["gate"] is None else Gate.from_json(facts["gate"])
        return cls(**{**facts, "curve": curve, "gate": gate, "notes": tuple(facts["notes"])})


@dataclass(frozen=True, eq=False)
class HeldOutOutcomes:
    """The decisions of a classifier on R images that it was not fitted on."""

    confidence: Array  # (R,): calibrated probability of the chosen class
    right: BoolArray  # (R,): whether the chosen class is correct
    own: IntArray  # (R,): the correct class
    open_set: OpenSetScores | None = None  # None for a fine-tuned model

    def __post_init__(self) -> None:
        """Raise ValueError if lengths differ or a value is out of range."""
        if not self.confidence.shape == self.right.shape == self.own.shape == (len(self.own),):
            raise ValueError(
                f"held-out outcomes have shapes {self.confidence.shape}, {self.right.shape} and {self.own.shape}"
            )
        if not ((self.confidence >= 0) & (self.confidence <= 1)).all():
            raise ValueError("a held-out probability lies outside of 0 to 1")
        if len(self.own) and self.own.min() < 0:
            raise ValueError("a held-out class is negative")


def log_softmax(logits: Array) -> Array:
    """Return (B, C) log probabilities; -inf stays -inf, also in a row without any finite score."""
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    shifted = logits - np.where(np.isfinite(top), top, 0.0)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.where(total > 0.0, total, 1.0)), dtype=np.float64)


def top_classes(table: Array, temperature: float, *, pause: Pause = no_pause) -> tuple[IntArray, Array]:
    """Return the best class (R,) of each row of scores (R, C), and its probability (R,)."""
    best, confidence = np.empty(len(table), np.int64), np.empty(len(table))
    for part in parts(*table.shape):
        best[part] = first_best(table[part])
        probabilities = np.exp(log_softmax(temperature * table[part]))
        confidence[part] = probabilities[np.arange(len(probabilities)), best[part]]
        pause()
    return best, confidence


def balanced_weights(own: IntArray, count: int) -> Array:
    """Return weights (R,) that give all classes equal weight and sum to R."""
    if not len(own):
        return np.zeros(0)
    raw = 1.0 / np.bincount(own, minlength=count)[own]
    return np.asarray(raw * (len(own) / raw.sum()), dtype=np.float64)


def balanced_accuracy(right: BoolArray, own: IntArray, count: int) -> float | None:
    """Return the balanced accuracy of R decisions; None if R is 0."""
    weights = balanced_weights(own, count)
    return float(weights @ right / weights.sum()) if len(right) else None


def fit_temperature(
    table: Array, own: IntArray, weights: Array, *, typical: float, spread: float, pause: Pause = no_pause
) -> tuple[float, Array]:
    """Return the factor that minimises the log loss of the softmax of scores, and each row's log loss (R,).

    Args:
        table: (R, C) leave-one-out scores.
        own: (R,) correct classes.
        weights: (R,) weights of the rows; they sum to R.
        typical: median of the factor's log-normal prior.
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
    """Return the least confidence at which the estimated precision reaches the wanted one.

    If there is none, the threshold is above the confidence of every error, and at least the wanted precision.
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
    """Return points (least confidence, share filed, precision), the highest confidence first."""
    if not len(confidence):
        return []
    order = np.argsort(-confidence, kind="stable")
    estimate = _estimates(confidence[order], right[order], weights[order])
    filed = np.cumsum(weights[order]) / weights.sum()
    points = np.unique(np.linspace(0, len(order) - 1, CURVE_POINTS).astype(np.int64))
    return [(float(confidence[order][at]), float(filed[at]), float(estimate[at])) for at in points]


def _estimates(confidence: Array, right: BoolArray, weights: Array) -> Array:
    """Return the estimated precision of the first 1, 2, 3… decisions by descending confidence."""
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
    """Return the fields of a Calibration about known images.

    Args:
        outcomes: R held-out images.
        precision: wanted precision.
        classes: number of classes.
        foreign_cosines: (N,) cosines for ``foreign_gate``, used if no held-out decision is correct.
        nothing_held_out: the note if R is 0.
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
        return {**facts, "confidence": precision, "notes": (f"{nothing_held_out}, so no precision can be estimated",)}
    filed = confidence >= threshold.confidence
    if gate is not None and open_set is not None:
        filed &= gate.familiarity(open_set, confidence) >= gate.least
    held_out = "references" if open_set is not None else "held-out images"
    note = f"precision {precision:g} is not reached: {count} {held_out} allow at most {threshold.attainable:.3f}"
    return {
        **facts,
        "accuracy": balanced_accuracy(right, own, classes),
        "confidence": threshold.confidence,
        "precision_attainable": threshold.attainable,
        "precision_expected": float(weights @ (filed & right) / (weights @ filed)) if filed.any() else None,
        "filed_expected": float(weights @ filed / weights.sum()),
        "curve": tuple(precision_curve(confidence, right, weights)),
        "notes": () if threshold.is_attained else (note,),
    }


def calibrate_strangers(null: Strangers, wanted: float, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a Calibration about strangers, with a note added to ``notes`` if necessary."""
    used = max(wanted, null.attainable)
    if used > wanted:
        note = f"strangers {wanted:g} is not reached: {null.classes} classes allow at least {used:.3f}"
        notes = (*notes, note)
    return {
        "strangers_wanted": wanted,
        "strangers_attainable": null.attainable,
        "strangers_used": used,
        "strangers_cut": used * null.classes / (null.classes + CAUTIOUS_CLASSES),
        "notes": notes,
    }


def calibrate_outcomes(outcomes: HeldOutOutcomes, abstain: AbstainSettings | None, *, classes: int) -> Calibration:
    """Return the calibration of a fine-tuned model from its held-out images."""
    if abstain is None:
        accuracy = balanced_accuracy(outcomes.right, outcomes.own, classes)
        return Calibration(len(outcomes.own), accuracy, filed_expected=1.0, precision_expected=accuracy)
    nothing = "the training has no held-out image"
    facts = calibrate_knowns(
        outcomes, abstain.precision, classes=classes, foreign_cosines=np.zeros(0), nothing_held_out=nothing
    )
    if abstain.strangers != "auto":
        note = f"strangers {abstain.strangers:g} has no effect: a fine-tuned model decides by its probability alone"
        facts["notes"] = (*facts["notes"], note)
    return Calibration(**facts)
