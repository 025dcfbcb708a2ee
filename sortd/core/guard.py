"""The guard: after a change of prototypes, a large batch is decided on trial before any of it moves.

Nothing moves until somebody looks where there are far more abstentions than the references foretell, or nearly
everything goes to one class with low confidence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sortd.classify.prototypes import Classifier
from sortd.classify.types import Assigned, Decision

MORE_ABSTENTIONS = 0.5  # of all images than expected are too many; some strangers are no sign
ONE_CLASS = 0.9  # share of the assigned in one class from which their confidence is looked at
LESS_CONFIDENCE = 0.25  # than the accuracy among the references, on the mean, is unsure
LESS_AFTER_A_HOLD = 10  # times fewer images are a large batch for the generation that follows one which was held


@dataclass(frozen=True, slots=True)
class GuardState:
    """What must be known of the guard after a restart, however the run before it ended."""

    trusted: int = 0
    """The last generation that decided without being held: the first one, one whose trial is over, or one released."""
    held: int = 0  # a generation that was held and not released since; 0: none
    reason: str = ""
    """Why nothing moves, in a sentence; empty where another generation than the one that was held is to be tried."""

    def released(self) -> "GuardState":
        """Return the state after somebody has looked: what was held is let go; else nothing changes."""
        return GuardState(self.held) if self.reason else self


class Guard:
    """Watches over the first large batch of each generation; with ``images=0`` over none.

    A hold is about one generation: it lasts until it is released, and another generation has a trial of its own, for
    which fewer images are enough then.
    """

    def __init__(self, images: int, state: GuardState) -> None:
        """Begin where the last run ended."""
        self.state = state  # what is to be written down as soon as it changes
        self._images = images
        self._classifier: Classifier | None = None
        self._trial: list[Decision] = []

    @property
    def reason(self) -> str | None:
        """Why nothing may move, in a sentence; None while nothing is wrong."""
        return self.state.reason or None

    def configure(self, images: int) -> None:
        """Take over how many images are a large batch, for the trials from now on; a hold stays."""
        self._images = images

    def serve(self, classifier: Classifier) -> None:
        """Take over what decides from now on; a new generation is looked at, the first one is not."""
        generation, state = classifier.generation, self.state
        if self._classifier is None or generation != self._classifier.generation:
            self._trial = []
        self._classifier = classifier
        if state.held not in {0, generation}:
            self.state = replace(state, reason="")
        elif not state.trusted:
            self.state = replace(state, trusted=generation)

    def is_active(self, waiting: int) -> bool:
        """Tell whether decisions are to be tried before they count, with so many images waiting."""
        if self._classifier is None or self._classifier.generation == self.state.trusted or not self._images:
            return False
        enough = self._images // LESS_AFTER_A_HOLD if self.state.held else self._images
        return waiting >= enough or bool(self._trial)

    def observe(self, decisions: Sequence[Decision], *, left: int) -> bool:
        """Take decisions in; tell whether the trial is over, with ``reason`` as its verdict.

        With no images ``left`` to be decided the trial ends early.
        """
        self._trial.extend(decisions)
        if self._classifier is None or (len(self._trial) < self._images and left > 0):
            return False
        reason, generation = verdict(self._trial, self._classifier), self._classifier.generation
        self._trial = []
        self.state = GuardState(generation) if reason is None else GuardState(self.state.trusted, generation, reason)
        return True

    def release(self) -> None:
        """Let everything move that the guard holds: somebody has looked."""
        self.state = self.state.released()


def verdict(decisions: Sequence[Decision], classifier: Classifier) -> str | None:
    """Return what is far from what the calibration foretells, as a sentence, or None."""
    assigned = [decision for decision in decisions if isinstance(decision, Assigned)]
    abstained = 1 - len(assigned) / max(len(decisions), 1)
    filed = classifier.calibration.filed_expected
    expected = 0.0 if filed is None else 1 - filed
    if abstained - expected > MORE_ABSTENTIONS:
        count = len(decisions)
        return f"{abstained:.0%} of {count} images would go to review, where the references foretell {expected:.0%}"
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
