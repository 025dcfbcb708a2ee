"""Calibration: when to abstain, found out from the references alone at every rebuild."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.confidence import balanced_weights, choose_threshold, precision_curve
from sortd.strangers import Strangers
from sortd.support import Abstain

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

KNOWN_REFUSED = 0.025
"""Share of known images that each gate may refuse with ``strangers: auto``."""
FEW = 20
"""Held-out references below which a quantile means little, and the lowest value seen is the gate."""
STRANGER_QUANTILE = 0.25
"""Without any class of two images the cosine gate is this quantile of what images of other classes reach."""


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
    cosine_gate: float | None = None
    """Least cosine to the nearest reference of the class."""
    typicality_gate: float | None = None
    """Least relative Mahalanobis distance."""
    strangers_wanted: float | None = None
    strangers_attainable: float | None = None
    """The smallest share of strangers that leaving classes out can vouch for."""
    strangers_used: float | None = None
    """The share in force: the wanted one, or the attainable one."""
    text_weight: float = 0.0
    """How many references a class's name counts as."""
    text_evidence: float | None = None
    """Standard errors by which names agree with their own images."""
    kernel_share: float = 0.0
    curve: tuple[tuple[float, float, float], ...] = ()
    """Points (least confidence, share filed, precision)."""
    notes: tuple[str, ...] = ()
    """Sentences on what was asked and cannot be honoured."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Calibration":
        """Return what ``to_json`` wrote, also after a journey through JSON."""
        curve = tuple((float(a), float(b), float(c)) for a, b, c in facts["curve"])
        return cls(**{**facts, "curve": curve, "notes": tuple(facts["notes"])})


@dataclass(frozen=True, eq=False)
class Evidence:
    """What leave-one-out tells of the held-out references; arrays are (R,)."""

    own: IntArray
    best: IntArray
    confidence: Array
    cosine: Array
    typicality: Array | None
    classes: int


@dataclass(frozen=True)
class Gates:
    """Least values that known images reach."""

    cosine: float | None
    typicality: float | None


def known_gates(evidence: Evidence, foreign_cosines: Array) -> Gates:
    """Return gates that known images pass.

    Args:
        evidence: leave-one-out of the references.
        foreign_cosines: (N,) cosine of references to the nearest one of another class, used where no class has two
            images that are not near-duplicates.
    """
    right = evidence.best == evidence.own
    if not right.any():
        if not len(foreign_cosines):
            return Gates(None, None)
        return Gates(float(np.quantile(foreign_cosines, STRANGER_QUANTILE)), None)
    typicality = None if evidence.typicality is None else _low(evidence.typicality[right])
    return Gates(_low(evidence.cosine[right]), typicality)


def calibrate_precision(evidence: Evidence, abstain: Abstain, gates: Gates) -> dict[str, Any]:
    """Return the fields of a calibration that tell of known images."""
    weights = balanced_weights(evidence.own, evidence.classes)
    right = evidence.best == evidence.own
    facts: dict[str, Any] = {"held_out": len(right), "precision_wanted": abstain.precision}
    if not len(right):
        note = "no class has two images that differ, so nothing vouches for a precision"
        return {**facts, "confidence": abstain.precision, "notes": (note,)}
    threshold = choose_threshold(evidence.confidence, right, weights, abstain.precision)
    filed = evidence.confidence >= threshold.confidence
    if gates.cosine is not None:
        filed &= evidence.cosine >= gates.cosine
    if gates.typicality is not None and evidence.typicality is not None:
        filed &= evidence.typicality >= gates.typicality
    share = float(weights @ filed / weights.sum())
    facts |= {
        "accuracy": float(weights @ right / weights.sum()),
        "confidence": threshold.confidence,
        "precision_attainable": threshold.attainable,
        "precision_expected": float(weights @ (filed & right) / (weights @ filed)) if filed.any() else None,
        "filed_expected": share,
        "curve": tuple(precision_curve(evidence.confidence, right, weights)),
    }
    if not threshold.is_attained:
        facts["notes"] = (
            f"precision {abstain.precision:g} is asked, but {len(right)} references can vouch for"
            f" {threshold.attainable:.3f} at most",
        )
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
        "notes": notes,
    }


def _low(values: Array) -> float:
    if len(values) < FEW:
        return float(values.min())
    return float(np.quantile(values, KNOWN_REFUSED))
