"""The classifier of a dataset: its prototypes, or the fine-tuned model that was promoted; either decides on rows."""

import numpy.typing as npt

from sortd.deciding.decision import Decision, decide
from sortd.deciding.finetuned_classifier import FinetunedClassifier, decide_rows
from sortd.deciding.prototype_set import PrototypeSet

Classifier = PrototypeSet | FinetunedClassifier
"""Both have ``labels``, ``encoder_id`` (of the rows that they take), ``generation`` and ``calibration``."""


def decide_by(classifier: Classifier, rows: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row (B, d): embeddings for prototypes, logits for a fine-tuned model.

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    if isinstance(classifier, FinetunedClassifier):
        return decide_rows(classifier, rows)
    return decide(classifier, rows)
