"""Calibration: temperature and filing thresholds from held-out scores; see docs/decisions.md."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.kernel import first_best
from sortd.classify.library import Pause, no_pause, parts
from sortd.classify.open_set import Gate, OpenSetScores, Strangers, foreign_gate, known_gate
from sortd.classify.types import AbstainSettings, Evidence

EXAMINED = 32
"""Highest scores of a row that enter the softmax while the temperature is fitted; the rest is negligible."""
PSEUDO_REFERENCES = 20.0
"""Weight, in references, of the corrected confidence as a prior of the precision, since few held-out references prove
little."""
PSEUDO_ERRORS = 0.5
"""Errors that are added to those of the held-out references, so that a few right ones do not prove 98 %."""
SHIFTS = np.linspace(-16.0, 3.0, 381)
"""Corrections of the log odds that are tried."""
TYPICAL_SHIFT, SHIFT_SPREAD = -0.5, 1.0
"""Mean and standard deviation of the normal prior of the correction: few references, and they choose the temperature
that judges them, so that their confidence is rather too high than too low."""
SHIFT_LEVEL = 0.1
"""Quantile of the posterior of the correction that is used: its lower bound with 90 % confidence."""
NEW_IMAGES_SHIFT = -1.0
"""Further correction for images that are not references: references resemble each other more than new images resemble
them. This and the five constants above were fitted on the figures of ``benchmarks/promise.py`` (docs/decisions.md)."""
LARGEST_SHIFT = 0.5
"""Largest correction of the log odds by checked images, in place of those above."""
NEVER = 1.1
"""The least confidence with which no image is filed."""
NOTHING_FILED: dict[str, Any] = {"filed_expected": 0.0, "filed_held_out": 0, "right_held_out": 0}
"""The fields of a Calibration with which no image is filed."""
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
    precision_expected: float | None = None  # cautious estimate of the precision of what is filed
    filed_held_out: int = 0  # held-out images that are filed
    right_held_out: int = 0  # of these, the right ones
    checked: int = 0  # filed images that a person has checked and that the threshold follows; 0: it follows none
    right_checked: int = 0  # of these, the right ones
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

    def images_at(self, confidence: float) -> int:
        """Return the number of images behind ``precision_at``."""
        if self.checked:
            return self.checked
        reached = [share for least, share, _ in self.curve if least <= confidence]
        return max(1, round(self.held_out * (reached[0] if reached else 1.0))) if self.held_out else 0

    @property
    def precision_judged(self) -> int:
        """The number of images behind ``precision_expected``."""
        return self.checked or self.filed_held_out or round(self.held_out * (self.filed_expected or 0.0))

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
    for part in parts(*table.shape, pause=pause):
        best[part] = first_best(table[part])
        probabilities = np.exp(log_softmax(temperature * table[part]))
        confidence[part] = probabilities[np.arange(len(probabilities)), best[part]]
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
        for part in parts(*table.shape, pause=pause):
            examined[part, :-1] = np.partition(table[part], table.shape[1] - EXAMINED, axis=1)[:, -EXAMINED:]
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


def corrected_confidence(confidence: Array, right: BoolArray, weights: Array) -> Array:
    """Return (R,) confidence as it should be for new images, from that of held-out images."""
    return _shifted(confidence, confidence_shift(confidence, right, weights))


def confidence_shift(confidence: Array, right: BoolArray, weights: Array, evidence: Evidence | None = None) -> float:
    """Return the correction of the log odds of new images.

    It is a lower bound of the shift that explains the R outcomes (``SHIFTS``), and NEW_IMAGES_SHIFT; with evidence, a
    lower bound of the shift that explains the checked images. Images that nobody drew at random only decrease it:
    errors that a person did not notice count as right there.

    Args:
        confidence: (R,) of held-out images.
        right: (R,) whether the chosen class is correct.
        weights: (R,) those of ``balanced_weights``.
        evidence: new images that a person has checked.
    """
    alike = weights * _share_of_independent(weights)
    shift = NEW_IMAGES_SHIFT + _shift_bound(_log_odds(confidence), right, alike, TYPICAL_SHIFT)
    if evidence is None:
        return shift
    checked, outcomes = _log_odds(np.array(evidence.confidence)), np.array(evidence.right, np.bool_)
    found = _shift_bound(checked, outcomes, np.array(evidence.weight), shift)
    return min(found, LARGEST_SHIFT if evidence.is_random else shift)


def _shifted(confidence: Array, shift: float) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-(_log_odds(confidence) + shift))), dtype=np.float64)


def _log_odds(confidence: Array) -> Array:
    odds = np.log(np.clip(confidence, 1e-6, 1.0)) - np.log(np.clip(1.0 - confidence, 1e-6, 1.0))
    return np.asarray(odds, dtype=np.float64)


def _shift_bound(odds: Array, right: BoolArray, weights: Array, typical: float) -> float:
    """Return a lower bound of the shift of log odds (N,) that explains N outcomes; ``typical`` is its prior mean."""
    shifted = odds[:, None] + SHIFTS
    likelihood = weights @ -np.logaddexp(0.0, np.where(right[:, None], -shifted, shifted))
    likelihood -= 0.5 * np.square((SHIFTS - typical) / SHIFT_SPREAD)
    posterior = np.cumsum(np.exp(likelihood - likelihood.max()))
    return float(np.interp(SHIFT_LEVEL, posterior / posterior[-1], SHIFTS))


def _share_of_independent(weights: Array) -> float:
    """Return the number of equally weighted images that are worth as much as R weighted ones, over R (Kish, 1965)."""
    return float(np.square(weights.sum()) / np.square(weights).sum() / len(weights)) if len(weights) else 1.0


def choose_threshold(
    confidence: Array, corrected: Array, right: Array | BoolArray, weights: Array, wanted: float
) -> Threshold:
    """Return the least confidence at which the estimated precision reaches the wanted one; NEVER if there is none.

    Args:
        confidence: (R,) of held-out images.
        corrected: (R,) what ``corrected_confidence`` makes of it.
        right: (R,) whether the chosen class is correct, or how probable that is.
        weights: (R,) of the images; they sum to R or less.
        wanted: the precision.
    """
    order = np.argsort(-confidence, kind="stable")
    estimate = _estimates(corrected[order], right[order], weights[order])
    attainable = float(estimate.max(initial=0.0))
    fulfils = np.flatnonzero(estimate >= wanted)
    if not fulfils.size:
        return Threshold(NEVER, attainable, is_attained=False)
    return Threshold(_just_below(confidence[order], int(fulfils[-1])), attainable, is_attained=True)


def precision_curve(
    confidence: Array, corrected: Array, right: Array | BoolArray, weights: Array
) -> list[tuple[float, float, float]]:
    """Return points (least confidence, share of all, estimated precision), the highest confidence first."""
    if not len(confidence):
        return []
    order = np.argsort(-confidence, kind="stable")
    estimate = _estimates(corrected[order], right[order], weights[order])
    filed = np.cumsum(weights[order]) / weights.sum()
    points = np.unique(np.linspace(0, len(order) - 1, CURVE_POINTS).astype(np.int64))
    return [(float(confidence[order][at]), float(filed[at]), float(estimate[at])) for at in points]


def _estimates(corrected: Array, right: Array | BoolArray, weights: Array) -> Array:
    """Return the cautious estimate of the precision of the first 1, 2, 3… decisions by descending confidence."""
    weights = weights * _share_of_independent(weights)
    counted = np.cumsum(weights)
    believed = PSEUDO_REFERENCES * np.cumsum(weights * corrected) / counted
    seen = np.cumsum(weights * right) + believed
    return np.asarray(seen / (counted + PSEUDO_REFERENCES + PSEUDO_ERRORS), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _CheckedPrecision:
    """The estimated precision of checked images (N,) by descending confidence."""

    confidence: Array
    estimate: Array

    @classmethod
    def of(cls, evidence: Evidence, shift: float) -> "_CheckedPrecision":
        confidence, right = np.array(evidence.confidence), np.array(evidence.right, np.bool_)
        order = np.argsort(-confidence, kind="stable")
        weights = np.array(evidence.weight)[order]
        return cls(confidence[order], _estimates(_shifted(confidence, shift)[order], right[order], weights))

    def threshold(self, modelled: Threshold, wanted: float, *, is_random: bool) -> Threshold:
        """Return the threshold that the checked images ask for; below the least of them, the modelled one holds."""
        fulfils = np.flatnonzero(self.estimate >= wanted)
        attainable = float(self.estimate.max())
        if not fulfils.size:
            return Threshold(NEVER, attainable, is_attained=False)
        fails = np.flatnonzero(self.estimate[fulfils[0] :] < wanted)  # later ones fulfil it by chance
        if fails.size:
            least = _just_below(self.confidence, int(fulfils[0] + fails[0]) - 1)
        else:
            least = min(float(self.confidence[-1]), modelled.confidence)
        return Threshold(least if is_random else max(least, modelled.confidence), attainable, is_attained=True)

    def at(self, least: float, modelled: float) -> float:
        """Return the precision of images with at least this confidence; the modelled one where none was checked."""
        count = int(np.count_nonzero(self.confidence >= least))
        if not count:
            return modelled
        checked = float(self.estimate[count - 1])
        return checked if count < len(self.confidence) else min(checked, modelled)


def _just_below(confidence: Array, last: int) -> float:
    if last + 1 < len(confidence):
        return float((confidence[last] + confidence[last + 1]) / 2.0)
    return float(confidence[last]) * 0.9


def calibrate_knowns(
    outcomes: HeldOutOutcomes,
    precision: float,
    *,
    classes: int,
    foreign_cosines: Array | None = None,
    null: Strangers | None = None,
    evidence: Evidence | None = None,
) -> dict[str, Any]:
    """Return the fields of a Calibration about known images.

    With evidence, the checked images themselves say from which confidence on enough of them are right. Only for a
    confidence below theirs is it estimated from the held-out images, corrected by the checked ones.

    Args:
        outcomes: R held-out images.
        precision: wanted precision.
        classes: number of classes.
        foreign_cosines: (N,) cosines for ``foreign_gate``, used if no held-out decision is correct.
        null: scores of references whose class is left out, for ``known_gate``.
        evidence: filed images that a person has checked.
    """
    own, right, confidence, open_set = outcomes.own, outcomes.right, outcomes.confidence, outcomes.open_set
    count, weights = len(own), balanced_weights(own, classes)
    gate = None
    is_familiar = np.ones(count, np.bool_)
    if open_set is not None and right.any():
        gate = known_gate(open_set, confidence, right, classes=classes, null=null)
        is_familiar = gate.familiarity(open_set, confidence) >= gate.least
    elif foreign_cosines is not None and len(foreign_cosines):
        gate = foreign_gate(foreign_cosines)
    facts: dict[str, Any] = {"held_out": count, "precision_wanted": precision, "gate": gate}
    if not count:
        why = "the training has no held-out image" if open_set is None else "no class has two different images"
        note = f"{why}, so no precision can be expected"
        return {**facts, **NOTHING_FILED, "confidence": NEVER, "notes": (note,)}
    shift = confidence_shift(confidence, right, weights, evidence)
    corrected = _shifted(confidence, shift)
    seen = corrected if evidence is not None and evidence.is_random else right
    judged = confidence[is_familiar], corrected[is_familiar], seen[is_familiar], weights[is_familiar]
    threshold, curve = choose_threshold(*judged, precision), precision_curve(*judged)
    checked = None if evidence is None else _CheckedPrecision.of(evidence, shift)
    if evidence is not None and checked is not None:
        threshold = checked.threshold(threshold, precision, is_random=evidence.is_random)
        curve = [(least, share, checked.at(least, value)) for least, share, value in curve]
    filed = is_familiar & (confidence >= threshold.confidence)
    expected = float(_estimates(corrected[filed], seen[filed], weights[filed])[-1]) if filed.any() else None
    if checked is not None and expected is not None:
        expected = checked.at(threshold.confidence, expected)
    held_out = "references" if open_set is not None else "held-out images"
    by = f"{count} {held_out}" if evidence is None else f"{len(evidence.right)} checked images"
    note = f"precision {precision:g} is not reached: {by} support at most {threshold.attainable:.3f}"
    return {
        **facts,
        "accuracy": balanced_accuracy(right, own, classes),
        "confidence": threshold.confidence,
        "precision_attainable": threshold.attainable,
        "precision_expected": expected,
        "filed_expected": float(weights @ filed / weights.sum()),
        "filed_held_out": int(filed.sum()),
        "right_held_out": int((filed & right).sum()),
        "checked": 0 if evidence is None else len(evidence.right),
        "right_checked": 0 if evidence is None else sum(evidence.right),
        "curve": tuple((least, share * float(is_familiar @ weights) / count, value) for least, share, value in curve),
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
        accuracy, count = balanced_accuracy(outcomes.right, outcomes.own, classes), len(outcomes.own)
        right = int(outcomes.right.sum())
        return Calibration(
            count, accuracy, filed_expected=1.0, precision_expected=accuracy, filed_held_out=count, right_held_out=right
        )
    facts = calibrate_knowns(outcomes, abstain.precision, classes=classes)
    if abstain.strangers != "auto":
        note = f"strangers {abstain.strangers:g} has no effect: a fine-tuned model decides by its probability alone"
        facts["notes"] = (*facts["notes"], note)
    return Calibration(**facts)
