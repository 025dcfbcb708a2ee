"""An explanation of what a fine-tuned model decided, with what the prototypes have to say beside it."""

import numpy as np
import numpy.typing as npt

from sortd.deciding.explanation import ClassScore, Explanation, OtherMode, Threshold, explain
from sortd.deciding.finetuned_classifier import FinetunedClassifier, decide_rows, probabilities_of
from sortd.deciding.support import ClassifierKind
from sortd.prototypes import PrototypeSet


def explain_finetuned(
    classifier: FinetunedClassifier,
    row: npt.ArrayLike,
    *,
    prototypes: PrototypeSet,
    embedding: npt.ArrayLike | None,
) -> Explanation:
    """Explain the decision on one row of logits (classes,).

    Args:
        classifier: what decides.
        row: the logits of the image.
        prototypes: what would decide without it, of the same folders.
        embedding: the image as the prototypes see it, a unit row (d,); without it nothing is said of neighbours and of
            the modes.

    Raises:
        ValueError: a row has another shape, or a value that is not finite.
    """
    logits = np.asarray(row, np.float64)[None]
    (decision,) = decide_rows(classifier, logits)
    beside = None if embedding is None else explain(prototypes, embedding)
    others: tuple[OtherMode, ...] = ()
    if beside is not None:
        own = OtherMode(beside.mode, beside.label, beside.decision.score, beside.decision.margin)
        others = (own, *beside.others)
    return Explanation(
        decision=decision,
        scores=_scores(classifier, logits, prototypes, beside),
        neighbours=() if beside is None else beside.neighbours,
        thresholds=_thresholds(classifier, decision.confidence),
        text_share=0.0,
        others=others,
        generation=classifier.generation,
        encoder_id=classifier.encoder_id,
        mode=ClassifierKind.FINETUNED.value,
        held_out=classifier.calibration.held_out,
    )


def _scores(
    classifier: FinetunedClassifier,
    logits: npt.NDArray[np.float64],
    prototypes: PrototypeSet,
    beside: Explanation | None,
) -> tuple[ClassScore, ...]:
    probabilities = probabilities_of(classifier, logits)[0]
    counts = dict(zip(prototypes.labels, prototypes.counts.tolist(), strict=True))
    nearest = {} if beside is None else {one.label: one.nearest for one in beside.scores}
    return tuple(
        ClassScore(label, float(probabilities[index]), int(counts.get(label, 0)), nearest.get(label))
        for index in np.argsort(-probabilities, kind="stable")
        for label in (classifier.labels[index],)
    )


def _thresholds(classifier: FinetunedClassifier, confidence: float) -> tuple[Threshold, ...]:
    if classifier.abstain is None:
        return ()
    asked = classifier.calibration.confidence
    return (Threshold("confidence", confidence, asked, confidence >= asked),)
