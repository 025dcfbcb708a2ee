"""The fine-tuned classifier: rows of logits become decisions by the calibrated probability of the best class.

It takes the place of a prototype set: the rows that are cached for an image are the model's logits, and the
probability of a class is softmax(row / temperature) (Guo et al. 2017, "On Calibration of Modern Neural Networks"). The
threshold for filing comes from the images that the training held out, by the same estimate as for prototypes
(``confidence.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, BoolArray, IntArray
from sortd.deciding.calibration import Calibration
from sortd.deciding.confidence import balanced_weights, choose_threshold, log_softmax, precision_curve
from sortd.deciding.decision import Abstained, Assigned, Decision, check_embeddings
from sortd.deciding.support import Abstain, ClassifierKind

NAMES_SAID = 5
"""Of classes that differ, how many a sentence names."""


@dataclass(frozen=True, eq=False)
class HeldOutOutcomes:
    """What a model made of the R images that its training held out.

    Raises:
        ValueError: the arrays have other lengths, or a probability is none.
    """

    confidence: Array
    """float64 (R,): the calibrated probability of the class that it chose."""
    right: BoolArray
    """bool (R,): whether that was the right class."""
    own: IntArray
    """int64 (R,): the right class, an index into the labels."""

    def __post_init__(self) -> None:
        """Check lengths and ranges, so that nothing below has to."""
        if not self.confidence.shape == self.right.shape == self.own.shape == (len(self.own),):
            raise ValueError(
                f"held-out outcomes have shapes {self.confidence.shape}, {self.right.shape} and {self.own.shape}"
            )
        if not ((self.confidence >= 0) & (self.confidence <= 1)).all():
            raise ValueError("a held-out probability lies outside of 0 to 1")
        if len(self.own) and self.own.min() < 0:
            raise ValueError("a held-out class is negative")


@dataclass(frozen=True, eq=False)
class FinetunedClassifier:
    """What turns rows of logits into decisions for one dataset; C classes.

    Raises:
        ValueError: the temperature is not above zero, or there are no two classes.
    """

    labels: tuple[str, ...]
    """The class of each logit, in the model's order."""
    temperature: float
    """What logits are divided by before the softmax."""
    encoder_id: str
    """The model's identity, by which its rows are cached and its decisions logged."""
    generation: int
    calibration: Calibration
    abstain: Abstain | None
    """When to abstain; None files everything."""

    def __post_init__(self) -> None:
        """Refuse what cannot decide."""
        if not self.temperature > 0 or not np.isfinite(self.temperature):
            raise ValueError(f"the temperature is {self.temperature}, but must be above zero")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:  # noqa: PLR2004 -- a choice
            raise ValueError(f"{len(self.labels)} labels, but a classifier needs two or more, each once")

    def serving(self, generation: int) -> "FinetunedClassifier":
        """Return it under the number of the generation that it serves in."""
        return replace(self, generation=generation)


def build_classifier(
    labels: Sequence[str],
    *,
    temperature: float,
    encoder_id: str,
    outcomes: HeldOutOutcomes,
    abstain: Abstain | None,
    generation: int,
) -> FinetunedClassifier:
    """Return a classifier that abstains as the held-out outcomes and the settings ask.

    It is a pure function: equal arguments give equal classifiers.

    Args:
        labels: the C classes in the order of the logits.
        temperature: what logits are divided by.
        encoder_id: the identity of the model.
        outcomes: what the model made of held-out images, its probabilities calibrated by that temperature.
        abstain: how sure it must be; None files everything.
        generation: the generation that it serves in.

    Raises:
        ValueError: the labels or the temperature cannot serve.
    """
    return FinetunedClassifier(
        labels=tuple(labels),
        temperature=temperature,
        encoder_id=encoder_id,
        generation=generation,
        calibration=calibrate_outcomes(outcomes, abstain, classes=len(labels)),
        abstain=abstain,
    )


def calibrate_outcomes(outcomes: HeldOutOutcomes, abstain: Abstain | None, *, classes: int) -> Calibration:
    """Return the threshold for filing and what the held-out images can vouch for, every class counting once.

    Args:
        outcomes: R held-out images.
        abstain: how sure it must be; None files everything.
        classes: how many classes there are.
    """
    count = len(outcomes.own)
    weights = balanced_weights(outcomes.own, classes)
    accuracy = float(weights @ outcomes.right / weights.sum()) if count else None
    if abstain is None:
        return Calibration(held_out=count, accuracy=accuracy, filed_expected=1.0, precision_expected=accuracy)
    notes = _notes_on_strangers(abstain)
    if not count:
        note = "the training held no image out, so nothing vouches for a precision"
        return Calibration(confidence=abstain.precision, precision_wanted=abstain.precision, notes=(note, *notes))
    threshold = choose_threshold(outcomes.confidence, outcomes.right, weights, abstain.precision)
    if not threshold.is_attained:
        asked = f"precision {abstain.precision:g} is asked"
        notes = (f"{asked}, but {count} held-out images can vouch for {threshold.attainable:.3f} at most", *notes)
    filed = outcomes.confidence >= threshold.confidence
    facts: dict[str, Any] = {
        "held_out": count,
        "accuracy": accuracy,
        "confidence": threshold.confidence,
        "precision_wanted": abstain.precision,
        "precision_attainable": threshold.attainable,
        "precision_expected": float(weights @ (filed & outcomes.right) / (weights @ filed)) if filed.any() else None,
        "filed_expected": float(weights @ filed / weights.sum()),
        "curve": tuple(precision_curve(outcomes.confidence, outcomes.right, weights)),
        "notes": notes,
    }
    return Calibration(**facts)


def _notes_on_strangers(abstain: Abstain) -> tuple[str, ...]:
    if abstain.strangers == "auto":
        return ()
    asked = f"strangers {abstain.strangers:g} is asked"
    return (f"{asked}, but a fine-tuned model tells them by its probability alone, which promises no share",)


def probabilities_of(classifier: FinetunedClassifier, rows: npt.ArrayLike) -> Array:
    """Return float64 (B, C) probabilities of rows of logits (B, C).

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    logits = check_embeddings(rows, len(classifier.labels))
    return np.asarray(np.exp(log_softmax(logits / classifier.temperature)), dtype=np.float64)


def decide_rows(classifier: FinetunedClassifier, rows: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row of logits (B, C); of equal classes the first wins.

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    return [_decision(classifier, row) for row in probabilities_of(classifier, rows)]


def _decision(classifier: FinetunedClassifier, row: Array) -> Decision:
    best, second = (int(at) for at in np.argsort(-row, kind="stable")[:2])
    confidence = float(row[best])
    facts: dict[str, Any] = {
        "score": confidence,
        "margin": confidence - float(row[second]),
        "second_label": classifier.labels[second],
        "mode": ClassifierKind.FINETUNED,
        "confidence": confidence,
        "precision": classifier.calibration.precision_at(confidence),
    }
    if classifier.abstain is not None and confidence < classifier.calibration.confidence:
        return Abstained("margin", classifier.labels[best], **facts)
    return Assigned(classifier.labels[best], **facts)


def difference_of_labels(known: Sequence[str], present: Sequence[str]) -> str | None:
    """Say how the classes that a model knows differ from the folders that are there; None where they do not.

    Args:
        known: the model's labels.
        present: the class folders in ``Clases/``.
    """
    added, removed = sorted(set(present) - set(known)), sorted(set(known) - set(present))
    said = []
    if added:
        said.append(f"Clases/ has {_named(added)}, which the model does not know")
    if removed:
        said.append(f"the model knows {_named(removed)}, which Clases/ has not")
    return "; ".join(said) or None


def _named(labels: Sequence[str]) -> str:
    shown = [repr(label) for label in labels[:NAMES_SAID]]
    if len(labels) > NAMES_SAID:
        shown.append(f"{len(labels) - NAMES_SAID} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
