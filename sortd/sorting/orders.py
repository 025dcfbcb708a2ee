"""Orders: a decision, or a refusal, becomes the move that carries it out and all that its log line will want."""

from sortd.classify.prototypes import Classifier
from sortd.classify.types import Abstained, Assigned, Decision
from sortd.messages import EmbeddedImage, ImageRefused, Move, Outcome, Refusal

NO_GUESS = "_none"
"""The folder in Review/ for images that not even a guess is made about."""

SET_ASIDE = frozenset({Refusal.UNREADABLE, Refusal.TOO_LARGE, Refusal.POISON})
"""Refusals of images that are complete and will not get better by themselves: they go to Rejected/."""


def order_for(image: EmbeddedImage, decision: Decision, classifier: Classifier, *, settle_seconds: float) -> Move:
    """Return the move to Dataset/<class> or Review/<best guess> that a decision means."""
    match decision:
        case Assigned(label=label):
            folder, outcome, reason = f"Dataset/{label}", Outcome.FILED, ""
        case Abstained(best_label=label, reason=reason):
            folder, outcome = f"Review/{label or NO_GUESS}", Outcome.REVIEW
    return Move(
        path=image.path,
        stamp=image.stamp,
        folder=folder,
        outcome=outcome,
        decision=decision,
        reason=reason,
        content=image.content,
        encoder_id=classifier.encoder_id,
        generation=classifier.generation,
        milliseconds={
            "settle": round(1e3 * settle_seconds, 1),
            "decode": round(1e3 * image.decode_seconds, 1),
            "encode": round(1e3 * image.encode_seconds, 1),
        },
    )


def order_aside(refused: ImageRefused, *, settle_seconds: float) -> Move:
    """Return the move to Rejected/ of an image that will not get better by itself."""
    return Move(
        path=refused.path,
        stamp=refused.stamp,
        folder="Rejected",
        outcome=Outcome.REJECTED,
        reason=f"{refused.refusal.value}: {refused.message}",
        milliseconds={"settle": round(1e3 * settle_seconds, 1)},
    )
