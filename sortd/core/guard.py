"""The guard: after a change of prototypes, the decisions for a large first batch are checked before any image moves.

The dataset is held if far more images are abstained from than the references predict, or if nearly all images are
assigned to one class with low confidence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sortd.events import Assigned, Decision

MORE_ABSTENTIONS = 0.5  # the share of abstentions may exceed the expected one by this much
ONE_CLASS = 0.9  # from this share of assigned images in one class on, their confidence is checked
LESS_CONFIDENCE = 0.25  # the mean confidence may be this far below the accuracy among the references
SMALLER_AFTER_HOLD = 10  # after a hold, a batch of this many times fewer images is large


class Expectation(Protocol):
    """The shares that a calibration measured among the references; None: not measured."""

    @property
    def filed_expected(self) -> float | None:
        """The share of images that are filed."""

    @property
    def accuracy(self) -> float | None:
        """The share of correct decisions."""


class CheckedClassifier(Protocol):
    """What the core knows of a classifier."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes."""

    @property
    def encoder_id(self) -> str:
        """The encoder of the rows that it decides."""

    @property
    def generation(self) -> int:
        """The number of the rebuild that made it."""

    @property
    def calibration(self) -> Expectation:
        """What is expected of its decisions."""


@dataclass(frozen=True, slots=True)
class GuardState:
    """What the guard writes to the journal, and so knows after a restart."""

    trusted: int = 0  # the last generation that was the first one, passed its trial or was released
    held: int = 0  # the generation that is held; 0: none
    reason: str = ""  # of the hold, in a sentence; empty once another generation is to be checked

    def released(self) -> "GuardState":
        """Return the state after a release by the operator: the held generation is trusted."""
        return GuardState(self.held) if self.reason else self


class Guard:
    """Checks the first large batch of each generation; with ``images=0`` it checks none.

    A hold concerns one generation and lasts until it is released. Another generation is checked in turn, on a smaller
    batch.
    """

    def __init__(self, images: int, state: GuardState) -> None:
        """Start in ``state``, which the caller writes down whenever it changes; a batch is large from ``images`` on."""
        self.state = state
        self._images = images
        self._classifier: CheckedClassifier | None = None
        self._trial: list[Decision] = []

    @property
    def reason(self) -> str | None:
        """Why nothing may move, in a sentence; None without a hold."""
        return self.state.reason or None

    def configure(self, images: int) -> None:
        """Change the size of a large batch for later trials; a hold stays."""
        self._images = images

    def serve(self, classifier: CheckedClassifier) -> None:
        """Note the classifier that decides from now on: a new generation is checked, the first one is trusted."""
        generation, state = classifier.generation, self.state
        if self._classifier is None or generation != self._classifier.generation:
            self._trial = []
        self._classifier = classifier
        if state.held not in {0, generation}:
            self.state = replace(state, reason="")
        elif not state.trusted:
            self.state = replace(state, trusted=generation)

    def is_active(self, waiting: int) -> bool:
        """Return whether decisions must be checked first, with ``waiting`` images in the backlog."""
        if self._classifier is None or self._classifier.generation == self.state.trusted or not self._images:
            return False
        enough = self._images // SMALLER_AFTER_HOLD if self.state.held else self._images
        return waiting >= enough or bool(self._trial)

    def observe(self, decisions: Sequence[Decision], *, left: int) -> bool:
        """Add decisions to the trial and return whether it is over; ``reason`` is then its result.

        The trial ends early when no images are ``left`` to decide.
        """
        self._trial.extend(decisions)
        if self._classifier is None or not self._trial or (len(self._trial) < self._images and left > 0):
            return False
        reason, generation = verdict(self._trial, self._classifier), self._classifier.generation
        self._trial = []
        self.state = GuardState(generation) if reason is None else GuardState(self.state.trusted, generation, reason)
        return True

    def release(self) -> None:
        """Release the hold."""
        self.state = self.state.released()


def verdict(decisions: Sequence[Decision], classifier: CheckedClassifier) -> str | None:
    """Return how decisions differ from what the calibration predicts, as a sentence, or None."""
    assigned = [decision for decision in decisions if isinstance(decision, Assigned)]
    abstained = 1 - len(assigned) / max(len(decisions), 1)
    filed = classifier.calibration.filed_expected
    expected = 0.0 if filed is None else 1 - filed
    if abstained - expected > MORE_ABSTENTIONS:
        count = len(decisions)
        return f"{abstained:.0%} of {count} images would go to review; the references predict {expected:.0%}"
    accuracy = classifier.calibration.accuracy
    if not assigned or accuracy is None or len(classifier.labels) < 3:  # noqa: PLR2004 -- of two classes one is the larger
        return None
    label, count = Counter(decision.label for decision in assigned).most_common(1)[0]
    confidence = sum(decision.confidence for decision in assigned) / len(assigned)
    if count / len(assigned) >= ONE_CLASS and accuracy - confidence > LESS_CONFIDENCE:
        return (
            f"{count / len(assigned):.0%} of {len(assigned)} images would go to {label!r} with low confidence"
            f" (mean {confidence:.0%}; the accuracy among the references is {accuracy:.0%})"
        )
    return None
