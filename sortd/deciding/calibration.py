"""Calibration: when to abstain, found out from the references alone at every rebuild."""

from dataclasses import asdict, dataclass
from typing import Any

from sortd.arrays import Array, IntArray
from sortd.deciding.confidence import balanced_weights, choose_threshold, precision_curve
from sortd.deciding.familiarity import Gate, Looks, foreign_gate, known_gate
from sortd.deciding.strangers import Strangers
from sortd.deciding.support import Abstain

CAUTIOUS_CLASSES = 20
"""With this many classes the cut for strangers is made at half of the share in force: strangers differ by class, and
without it classes left out for good were filed up to three times as often as wanted."""


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
            gate = Gate.from_json(gate)
        return cls(**{**facts, "curve": curve, "gate": gate, "notes": tuple(facts["notes"])})


@dataclass(frozen=True, eq=False)
class Evidence:
    """What leave-one-out tells of the held-out references; arrays are (R,)."""

    own: IntArray
    best: IntArray
    confidence: Array
    looks: Looks
    classes: int


def gate_of(evidence: Evidence, confidence: float, foreign_cosines: Array) -> Gate | None:
    """Return the gate on familiarity, or None where nothing tells what is familiar.

    Args:
        evidence: leave-one-out of the references.
        confidence: least confidence of a filed image.
        foreign_cosines: (N,) cosine of references to the nearest one of another class, used where no class has two
            images that are not near-duplicates.
    """
    right = evidence.best == evidence.own
    if right.any():
        return known_gate(
            evidence.looks, evidence.confidence, right, least_confidence=confidence, classes=evidence.classes
        )
    return foreign_gate(foreign_cosines) if len(foreign_cosines) else None


def calibrate_knowns(evidence: Evidence, abstain: Abstain, foreign_cosines: Array) -> dict[str, Any]:
    """Return the fields of a calibration that tell of known images; arguments as for ``gate_of``."""
    weights = balanced_weights(evidence.own, evidence.classes)
    right = evidence.best == evidence.own
    facts: dict[str, Any] = {"held_out": len(right), "precision_wanted": abstain.precision}
    if not len(right):
        note = "no class has two images that differ, so nothing vouches for a precision"
        gate = gate_of(evidence, abstain.precision, foreign_cosines)
        return {**facts, "confidence": abstain.precision, "gate": gate, "notes": (note,)}
    threshold = choose_threshold(evidence.confidence, right, weights, abstain.precision)
    gate = gate_of(evidence, threshold.confidence, foreign_cosines)
    filed = evidence.confidence >= threshold.confidence
    if gate is not None:
        filed &= gate.familiarity(evidence.looks, evidence.confidence) >= gate.least
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
