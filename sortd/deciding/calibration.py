"""Calibration: when to abstain, found out from the references alone at every rebuild."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.deciding.confidence import balanced_weights, choose_threshold, precision_curve
from sortd.deciding.strangers import Strangers
from sortd.deciding.support import Abstain

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

KNOWN_REFUSED = 0.10
"""Share of known images that the gate may refuse; many of them are too near to another class anyway."""
SHARE_OF_ODDS = 0.5
"""Weight of the log odds in the familiarity: strangers are mostly less sure, but not always."""
LEAST_COSINE_SPREAD = 0.01
LEAST_ODDS_SPREAD = 1.0
"""Spreads assumed at least: where all references are alike, or certain, a little less so is nothing strange."""
FEW = 20
"""Held-out references below which a quantile means little, and the lowest value seen is the gate."""
CAUTIOUS_CLASSES = 20
"""With this many classes the cut for strangers is made at half of the share in force: strangers differ by class, and
without it classes left out for good were filed up to three times as often as wanted."""
STRANGER_QUANTILE = 0.25
"""Without any class of two images the cosine gate is this quantile of what images of other classes reach."""


@dataclass(frozen=True)
class Gate:
    """How familiar an image must look: cosine, typicality and confidence, in spreads of what known images have."""

    least: float
    """Least familiarity of a filed image."""
    cosine: tuple[float, float]
    """Mean and spread of the cosine to the nearest references of the right class."""
    typicality: tuple[float, float] | None
    """Mean and spread of the relative Mahalanobis distance; None where it is not known."""
    odds: tuple[float, float] | None
    """Mean and spread of the log odds of the class; None where nothing was left out."""

    def familiarity(self, cosine: Array, typicality: Array | None, confidence: Array | None) -> Array:
        """Return (B,) how familiar images look: 0 as known images on average, negative if less so.

        Args:
            cosine: (B,) to the nearest references of the best class.
            typicality: (B,) relative Mahalanobis distance, or None.
            confidence: (B,) probability of the best class, or None to judge by looks alone.
        """
        result = (cosine - self.cosine[0]) / self.cosine[1]
        if self.typicality is not None and typicality is not None:
            result = result + (typicality - self.typicality[0]) / self.typicality[1]
        if self.odds is not None and confidence is not None:
            result = result + SHARE_OF_ODDS * (log_odds(confidence) - self.odds[0]) / self.odds[1]
        return result


@dataclass(frozen=True)
class Calibration:
    """Plain facts, JSON-able: the gates, and what the library can honour."""

    held_out: int = 0
    """References that could be left out and judged."""
    accuracy: float | None = None
    """Leave-one-out accuracy, every class counting once; None where nothing could be left out."""
    confidence: float = 0.0
    """Least confidence of a filed image."""
    precision_wanted: float | None = None
    precision_attainable: float | None = None
    """The largest precision that the references can vouch for."""
    precision_expected: float | None = None
    """Leave-one-out precision of what is filed."""
    filed_expected: float | None = None
    """Leave-one-out share of known images that is filed."""
    gate: Gate | None = None
    strangers_wanted: float | None = None
    strangers_attainable: float | None = None
    """The smallest share of strangers that leaving classes out can vouch for."""
    strangers_used: float | None = None
    """The share in force: the wanted one, or the attainable one."""
    strangers_cut: float | None = None
    """The share of left-out strangers at which the cut is made: smaller, for few classes say little about others."""
    text_weight: float = 0.0
    """How many references a class's name counts as."""
    text_evidence: float | None = None
    """Standard errors by which names agree with their own images."""
    kernel_share: float = 0.0
    curve: tuple[tuple[float, float, float], ...] = ()
    """Points (least confidence, share filed, precision)."""
    notes: tuple[str, ...] = ()
    """Sentences on what was asked and cannot be honoured."""

    def precision_at(self, confidence: float) -> float | None:
        """Return the estimated share of right ones among what is as sure as this; None without a curve."""
        reached = [precision for least, _, precision in self.curve if least <= confidence]
        return reached[0] if reached else (self.curve[-1][2] if self.curve else None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Calibration":
        """Return what ``to_json`` wrote, also after a journey through JSON."""
        curve = tuple((float(a), float(b), float(c)) for a, b, c in facts["curve"])
        gate = facts["gate"]
        if gate is not None:
            pair = gate["typicality"]
            odds = gate["odds"]
            gate = Gate(
                least=gate["least"],
                cosine=tuple(gate["cosine"]),
                typicality=None if pair is None else tuple(pair),
                odds=None if odds is None else tuple(odds),
            )
        return cls(**{**facts, "curve": curve, "gate": gate, "notes": tuple(facts["notes"])})


@dataclass(frozen=True, eq=False)
class Evidence:
    """What leave-one-out tells of the held-out references; arrays are (R,)."""

    own: IntArray
    best: IntArray
    confidence: Array
    cosine: Array
    typicality: Array | None
    classes: int


def log_odds(confidence: Array) -> Array:
    """Return log odds of probabilities, bounded above where more certainty means nothing."""
    return np.asarray(np.log(np.maximum(confidence, 1e-12) / (1.0 - confidence + 1e-4)), dtype=np.float64)


def known_gate(evidence: Evidence, confidence: float, foreign_cosines: Array) -> Gate | None:
    """Return a gate that all but few of the known images which would be filed pass.

    Args:
        evidence: leave-one-out of the references.
        confidence: least confidence of a filed image.
        foreign_cosines: (N,) cosine of references to the nearest one of another class, used where no class has two
            images that are not near-duplicates.
    """
    right = evidence.best == evidence.own
    if not right.any():
        if not len(foreign_cosines):
            return None
        return Gate(float(np.quantile(foreign_cosines, STRANGER_QUANTILE)), (0.0, 1.0), None, None)
    filed = right & (evidence.confidence >= confidence)
    filed = filed if filed.any() else right
    relative = None if evidence.typicality is None else evidence.typicality
    gate = Gate(
        least=0.0,
        cosine=_moments(evidence.cosine[right], LEAST_COSINE_SPREAD),
        typicality=None if relative is None else _moments(relative[right]),
        odds=_moments(log_odds(evidence.confidence[right]), LEAST_ODDS_SPREAD),
    )
    familiarity = gate.familiarity(evidence.cosine, relative, evidence.confidence)
    return replace(gate, least=_low(familiarity[filed]))


def calibrate_knowns(evidence: Evidence, abstain: Abstain, foreign_cosines: Array) -> dict[str, Any]:
    """Return the fields of a calibration that tell of known images; arguments as for ``known_gate``."""
    weights = balanced_weights(evidence.own, evidence.classes)
    right = evidence.best == evidence.own
    facts: dict[str, Any] = {"held_out": len(right), "precision_wanted": abstain.precision}
    if not len(right):
        note = "no class has two images that differ, so nothing vouches for a precision"
        gate = known_gate(evidence, abstain.precision, foreign_cosines)
        return {**facts, "confidence": abstain.precision, "gate": gate, "notes": (note,)}
    threshold = choose_threshold(evidence.confidence, right, weights, abstain.precision)
    gate = known_gate(evidence, threshold.confidence, foreign_cosines)
    filed = evidence.confidence >= threshold.confidence
    if gate is not None:
        filed &= gate.familiarity(evidence.cosine, evidence.typicality, evidence.confidence) >= gate.least
    facts |= {
        "accuracy": float(weights @ right / weights.sum()),
        "confidence": threshold.confidence,
        "gate": gate,
        "precision_attainable": threshold.attainable,
        "precision_expected": float(weights @ (filed & right) / (weights @ filed)) if filed.any() else None,
        "filed_expected": float(weights @ filed / weights.sum()),
        "curve": tuple(precision_curve(evidence.confidence, right, weights)),
    }
    if not threshold.is_attained:
        asked = f"precision {abstain.precision:g} is asked"
        facts["notes"] = (f"{asked}, but {len(right)} references can vouch for {threshold.attainable:.3f} at most",)
    return facts


def calibrate_strangers(null: Strangers, wanted: float, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a calibration that tell of strangers."""
    attainable = null.attainable
    if attainable > wanted:
        notes = (
            *notes,
            f"strangers {wanted:g} is asked, but {null.classes} classes can vouch for {attainable:.3f} at best",
        )
    return {
        "strangers_wanted": wanted,
        "strangers_attainable": attainable,
        "strangers_used": max(wanted, attainable),
        "strangers_cut": max(wanted, attainable) * null.classes / (null.classes + CAUTIOUS_CLASSES),
        "notes": notes,
    }


def _moments(values: Array, least: float = 1e-6) -> tuple[float, float]:
    return float(values.mean()), max(float(values.std()), least)


def _low(values: Array) -> float:
    if len(values) < FEW:
        return float(values.min())
    return float(np.quantile(values, KNOWN_REFUSED))
