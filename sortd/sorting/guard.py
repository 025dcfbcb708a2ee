"""The guard: after a change of prototypes, a large batch is decided on trial before any of it moves.

A library that was spoilt, or another encoder, shows in the pattern of decisions: far more abstentions than the
references foretold, or nearly everything in one class and unsurely so. Then nothing moves until somebody looks.
A card full of pictures of one thing is no alarm: those are decided surely.
"""

from collections import Counter
from collections.abc import Sequence

from sortd.deciding.classifier import Classifier
from sortd.prototypes import Assigned, Decision

MORE_ABSTENTIONS = 0.5
"""So much more of all images than foretold is too much; holiday pictures hold strangers, so a little is no sign."""

ONE_CLASS = 0.9
"""A share of the assigned in one class from which it is asked how sure they are."""

LESS_CONFIDENCE = 0.25
"""So much less than the accuracy among the references, on the mean, is unsure."""


class Guard:
    """Watches over the first large batch of each generation; ``images=0`` never minds."""

    def __init__(self, images: int, *, served_generation: int) -> None:
        """Begin with the generation that decided last, 0 where none ever did."""
        self.reason: str | None = None
        """Why nothing may move, in a sentence; None while nothing is wrong."""
        self._images = images
        self._generation = served_generation
        self._is_armed = False
        self._classifier: Classifier | None = None
        self._trial: list[Decision] = []

    def serve(self, classifier: Classifier) -> None:
        """Take over what decides from now on; a new generation is looked at, the first one is not."""
        if classifier.generation != self._generation:
            self._is_armed = self._generation > 0 and self._images > 0
            self.reason, self._trial = None, []
        self._generation, self._classifier = classifier.generation, classifier

    def wants(self, waiting: int) -> bool:
        """Tell whether decisions are to be tried before they count, with so many images waiting."""
        return self._is_armed and (waiting >= self._images or bool(self._trial))

    def try_out(self, decisions: Sequence[Decision], *, left: int) -> bool:
        """Take decisions in; tell whether the trial is over, with ``reason`` as its verdict.

        Args:
            decisions: what the new generation makes of some images.
            left: images that are still to be decided; with none left the trial ends early.
        """
        self._trial.extend(decisions)
        if self._classifier is None or (len(self._trial) < self._images and left > 0):
            return False
        self.reason = verdict(self._trial, self._classifier)
        self._is_armed, self._trial = False, []
        return True

    def release(self) -> None:
        """Let everything move: somebody has looked."""
        self.reason, self._is_armed, self._trial = None, False, []


def verdict(decisions: Sequence[Decision], classifier: Classifier) -> str | None:
    """Return what is far from what the calibration foretells, as a sentence, or None."""
    assigned = [decision for decision in decisions if isinstance(decision, Assigned)]
    abstained = 1 - len(assigned) / max(len(decisions), 1)
    filed = classifier.calibration.filed_expected
    foretold = 0.0 if filed is None else 1 - filed
    if abstained - foretold > MORE_ABSTENTIONS:
        count = len(decisions)
        return f"{abstained:.0%} of {count} images would go to review, where the references foretell {foretold:.0%}"
    accuracy = classifier.calibration.accuracy
    if not assigned or accuracy is None or len(classifier.labels) < 3:  # noqa: PLR2004 -- of two classes one is the larger
        return None
    label, count = Counter(decision.label for decision in assigned).most_common(1)[0]
    confidence = sum(decision.confidence for decision in assigned) / len(assigned)
    if count / len(assigned) >= ONE_CLASS and accuracy - confidence > LESS_CONFIDENCE:
        return (
            f"{count / len(assigned):.0%} of {len(assigned)} images would go to {label!r}, and unsurely"
            f" (confidence {confidence:.0%}, where the references are told apart {accuracy:.0%} of the time)"
        )
    return None
