"""The core of one dataset: events in, commands out, without files, clocks, threads, logs or models.

``receive(event, now)`` takes one event and returns commands; ``next_deadline()`` returns by when the caller owes a
``Tick``. While a rebuild is due or running, images are embedded but not moved, so that each decision is made by the
prototypes of the current references.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sortd import events
from sortd.core.guard import CheckedClassifier, Guard, GuardState
from sortd.core.schedule import FolderBackoffs, RebuildSchedule
from sortd.core.state import Image, Images, State
from sortd.events import Abstained, Assigned, Decision


@dataclass(frozen=True, slots=True)
class SorterSettings:
    """The settings of the backlog; those of decisions are part of the prototypes."""

    settle_seconds: float = 1.0
    batch_size: int = 8  # images per request: half of a forward, so that the newest do not wait long
    batches_in_flight: int = 3  # one encoded, one decoded meanwhile, one being delivered
    backlog_limit: int = 100_000
    action: events.Action = "move"
    set_rejected_aside: bool = True
    guard_images: int = 200


SET_ASIDE = frozenset({events.Refusal.UNREADABLE, events.Refusal.TOO_LARGE, events.Refusal.POISON})
"""Refusals of complete files; these images go to Rejected/."""


def leaves_doubtful(action: events.Action) -> bool:
    """Return whether images without a class stay in Images/ with this action, without a file for them in Review/."""
    return action in {"symlink", "keywords"}


def order_for(
    image: events.EmbeddedImage,
    decision: Decision,
    classifier: CheckedClassifier,
    *,
    settle_seconds: float,
    action: events.Action = "move",
) -> events.Move:
    """Return the move to Dataset/<class>, Review/<best guess> or Review/_none for a decision."""
    match decision:
        case Assigned(label=label):
            folder, outcome, reason = f"Dataset/{label}", events.Outcome.FILED, ""
        case Abstained(reason=reason):
            folder, outcome = f"Review/{decision.review_folder}", events.Outcome.REVIEW
    return events.Move(
        path=image.path,
        stamp=image.stamp,
        folder=folder,
        outcome=outcome,
        decision=decision,
        reason=reason,
        content=image.content,
        encoder_id=classifier.encoder_id,
        generation=classifier.generation,
        milliseconds=_milliseconds(settle=settle_seconds, decode=image.decode_seconds, encode=image.encode_seconds),
        action=action,
    )


def order_aside(refused: events.ImageRefused, *, settle_seconds: float) -> events.Move:
    """Return the move to Rejected/ for an image that cannot be decoded."""
    return events.Move(
        path=refused.path,
        stamp=refused.stamp,
        folder="Rejected",
        outcome=events.Outcome.REJECTED,
        reason=f"{refused.refusal.value}: {refused.message}",
        milliseconds=_milliseconds(settle=settle_seconds),
    )


def _milliseconds(**seconds: float) -> dict[str, float]:
    return {stage: round(1e3 * value, 1) for stage, value in seconds.items()}


ROOM_FOR_A_SCAN = 1 / 8
"""The share of ``backlog_limit`` down to which the backlog must shrink before a scan for what did not fit."""

MOST_LOOKS = 10_000  # settling images that one ``Tick`` inspects, at most


class Sorter:
    """The sans-IO core of one dataset."""

    def __init__(self, settings: SorterSettings, *, decide: events.Decide, guard: GuardState | None = None) -> None:
        """Start without prototypes, with a rebuild due, and with the guard in the state of the last run."""
        self._settings, self._decide = settings, decide
        self.images = Images(settle_seconds=settings.settle_seconds, limit=settings.backlog_limit)
        self.built: events.PrototypesBuilt | None = None  # the last rebuild, whose classifier decides
        self.references_absent = False
        self.rebuilds = RebuildSchedule()
        self._absent_in = 0  # the last rebuild that was started before the dataset was found absent
        self._move_pauses = FolderBackoffs()
        self.guard = Guard(settings.guard_images, guard or GuardState())
        self._stopping = False

    def next_deadline(self) -> float | None:
        """Return the time by which a ``Tick`` is owed; None: no deadline."""
        if self._stopping:
            return None
        times = (self.images.next_deadline, *self.rebuilds.deadlines, self._move_pauses.until)
        return min((time for time in times if time is not None), default=None)

    def configure(self, settings: SorterSettings, now: float) -> None:
        """Apply changed settings, and rebuild the prototypes, whose settings may have changed too."""
        self._settings = settings
        self.images.configure(settle_seconds=settings.settle_seconds, limit=settings.backlog_limit)
        self.guard.configure(settings.guard_images)
        self._touch(now)

    @property
    def settle_seconds(self) -> float:
        """The time without a change after which a file is settled."""
        return self._settings.settle_seconds

    def looks_soon_at(self, path: str, now: float) -> bool:
        """Return whether a settling image will be inspected within the settle time anyway."""
        return not self._stopping and self.images.is_due_soon(path, now)

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left to do until another event arrives, such as the close of a file."""
        return not (self.rebuilds.is_pending or self.images.waiting > self.images.busy + self.refused_by_disks)

    @property
    def refused_by_disks(self) -> int:
        """The number of decided images whose folders have failed repeatedly, for example because a disk is full."""
        return self.images.counts[State.EMBEDDED] if self._may_decide and self._move_pauses.are_lasting else 0

    @property
    def is_stopped(self) -> bool:
        """Whether, after ``StopRequested``, all moves have ended."""
        return self._stopping and not self.images.counts[State.MOVING]

    @property
    def may_move(self) -> bool:
        """Whether an embedded image would be moved now, into any folder."""
        return self._may_decide and self._move_pauses.until is None

    @property
    def _may_decide(self) -> bool:
        return (
            self.built is not None
            and not self.rebuilds.is_pending
            and not self.references_absent
            and self.guard.reason is None
            and not self._stopping
        )

    def receive(self, event: events.Event, now: float) -> list[events.Command]:
        """Process one event and return the commands that follow, in order."""
        commands = self._take(event, now)
        if not self._stopping:
            self._try_places()
            commands += self._embed()
            if self.images.overflowed and self.images.waiting <= self._settings.backlog_limit * ROOM_FOR_A_SCAN:
                self.images.overflowed = False
                commands.append(events.Scan())
        return commands

    def _take(self, event: events.Event, now: float) -> list[events.Command]:  # noqa: C901, PLR0911, PLR0912 -- the table of events: one arm each
        match event:
            case events.ImageSeen():
                self.images.see(event, now)
            case events.ReviewSeen(path, stamp, generation, is_unfamiliar):
                self._rest_in_review(path, stamp, now, generation, is_unfamiliar=is_unfamiliar)
            case events.ImageHeld(path, stamp):
                self.images.hold(path, stamp, now)
            case events.ImageGone(path):
                self.images.forget(path)
            case events.FoldersGone(folders):
                return [events.Inspect(path) for path in self.images.resting_below(folders)]
            case events.LookRefused(path):
                self.images.lose_sight(path)
            case events.ReferencesTouched():
                self._touch(now)
            case events.Embedded():
                return self._embedded(event)
            case events.ImageRefused():
                return self._refused(event, now)
            case events.PrototypesBuilt():
                self._built(event)
            case events.RebuildFailed():
                self._rebuild_failed(event, now)
            case events.DatasetAbsent():
                self.references_absent, self._absent_in = True, self.rebuilds.job
                self.rebuilds.retry(now)
            case events.Moved():
                self._moved(event, now)
            case events.MoveFailed():
                return self._move_failed(event, now)
            case events.Released(path):
                self.images.release(path, now)
            case events.DatasetReleased():
                self.guard.release()
                self._resume()
            case events.ScanStarted(in_review):
                self.images.start_scan(in_review=in_review)
            case events.ScanFinished(in_review):
                if not in_review:
                    self.images.retry_denied(now)
                return [events.Inspect(path) for path in self.images.unseen_by_scan(in_review=in_review)]
            case events.Tick():
                return self._tick(now)
            case events.StopRequested():
                self._stopping = True
        return []

    def _tick(self, now: float) -> list[events.Command]:
        if self._stopping:
            return []
        due = islice(self.images.due(now), MOST_LOOKS)
        commands: list[events.Command] = [events.Inspect(path) for path in due]
        if (job := self.rebuilds.begin(now)) is not None:
            commands.append(events.Rebuild(job))
        self._move_pauses.end_due(now)
        return commands

    def _touch(self, now: float) -> None:
        self.rebuilds.touch(now, settle_seconds=self._settings.settle_seconds)

    def _built(self, event: events.PrototypesBuilt) -> None:
        if not self.rebuilds.is_running(event.job):
            return
        self.rebuilds.succeed()
        self.references_absent = event.job <= self._absent_in
        served, self.built, classifier = self.built, event, event.classifier
        self.guard.serve(classifier)
        if served is None or served.classifier.generation != classifier.generation:
            self.images.reconsider(classifier.generation)
        self._resume()

    def _rebuild_failed(self, event: events.RebuildFailed, now: float) -> None:
        if not self.rebuilds.is_running(event.job):
            return
        self.rebuilds.fail(now, is_lasting=event.is_lasting)
        self.references_absent = event.references_absent or event.job <= self._absent_in
        self._resume()

    def _resume(self) -> None:
        if self._may_decide:
            self.images.resume()

    def _try_places(self) -> None:
        """Let one image try each folder whose delay is over; if it is moved, the others follow."""
        for place in self.images.places:
            if self._may_decide and not self._move_pauses.holds(place):
                self.images.try_place(place)

    def _embed(self) -> list[events.Command]:
        commands: list[events.Command] = []
        size = self._settings.batch_size
        while self.images.counts[State.ENCODING] <= size * (self._settings.batches_in_flight - 1):
            batch = self.images.take_batch(size, is_paused=self._move_pauses.holds)
            if not batch:
                break
            commands.append(events.Embed(tuple((image.path, image.stamp) for image in batch)))
        return commands

    def _embedded(self, event: events.Embedded) -> list[events.Command]:
        answered = [(answer, self.images.answered(answer.path, answer.stamp)) for answer in event.images]
        known = [(answer, image) for answer, image in answered if image is not None]
        if not known:
            return []
        classifier = None if self.built is None else self.built.classifier
        if classifier is None or not self._may_decide or classifier.encoder_id != event.encoder_id:
            for _, image in known:
                self.images.embedded(image)
            self._resume()  # rows of a replaced encoder are embedded again by the current one
            return []
        turned_away = [image.turned_away if image.has_abstained else 0 for _, image in known]
        decisions = self._decide(classifier, np.stack([answer.embedding for answer, _ in known]), turned_away)
        if self.guard.is_active(self.images.waiting):
            return self._observe([image for _, image in known], decisions, classifier.generation)
        commands = [
            self._decided(answer, image, decision, classifier)
            for (answer, image), decision in zip(known, decisions, strict=True)
        ]
        return [command for command in commands if command is not None]

    def _observe(self, images: Sequence[Image], decisions: Sequence[Decision], generation: int) -> list[events.Command]:
        """Check decisions without moving; after the trial the images are decided again, from cached embeddings.

        An image that abstained before and abstains again is no part of the trial: nothing moves, and nobody expected
        it to be filed.
        """
        tried = []
        for image, decision in zip(images, decisions, strict=True):
            if image.has_abstained and isinstance(decision, Abstained):
                self.images.abstain_again(image, generation=generation)
                continue
            self.images.embedded(image)
            tried.append(decision)
        waits = self.images.counts[State.EMBEDDED] + self.images.busy
        if not self.guard.observe(tried, left=self.images.waiting - waits):
            return []
        self._resume()
        return [events.Hold(self.guard.reason)] if self.guard.reason is not None else []

    def _decided(
        self, answer: events.EmbeddedImage, image: Image, decision: Decision, classifier: CheckedClassifier
    ) -> events.Move | events.Leave | None:
        action = "move" if image.is_put_away else self._settings.action
        if isinstance(decision, Abstained):
            if image.in_review:
                self.images.abstain_again(image, generation=classifier.generation)
                return None
            if not image.is_doubtful:
                image.turned_away = classifier.generation if decision.reason in events.LIKE_NO_CLASS else 0
            if leaves_doubtful(action):
                return self._abstain_in_place(image, decision, classifier.generation)
        image.generation = classifier.generation
        settled = image.settle_seconds
        return self._move_or_wait(image, order_for(answer, decision, classifier, settle_seconds=settled, action=action))

    def _abstain_in_place(self, image: Image, decision: Abstained, generation: int) -> events.Leave | None:
        guess = "" if decision.best_label is None else f", best guess: {decision.best_label}"
        message = f"{decision.reason}{guess}"
        is_news = self.images.abstain_in_place(image, message, generation=generation)
        return events.Leave(image.path, events.Refusal.ABSTAINED, message) if is_news else None

    def _move_or_wait(self, image: Image, move: events.Move) -> events.Move | None:
        """Mark an image as moving, or let it wait if the delay of its source or destination folder is running."""
        places = (move.folder, _folder_of(image.path))
        if refusing := [place for place in places if self._move_pauses.holds(place)]:
            self.images.embedded(image, refusing[0])
            return None
        self.images.moving(image, move.folder)
        return move

    def _refused(self, event: events.ImageRefused, now: float) -> list[events.Command]:
        image = self.images.answered(event.path, event.stamp)
        if image is None:
            return []
        match event.refusal:
            case events.Refusal.VANISHED:
                self.images.forget(event.path)
                return []
            case events.Refusal.CHANGED:
                self.images.settle_again(image, now)
                return [events.Inspect(event.path)]
            case refusal if refusal in SET_ASIDE and self._settings.set_rejected_aside and not image.is_put_away:
                return self._set_aside(event, image)
            case refusal:
                is_news = self.images.refuse(image, refusal, event.message)
                return [events.Leave(event.path, refusal, event.message, event.stamp)] if is_news else []

    def _set_aside(self, event: events.ImageRefused, image: Image) -> list[events.Command]:
        if self.references_absent or self._stopping:
            self.images.embedded(image)
            return []
        move = self._move_or_wait(image, order_aside(event, settle_seconds=image.settle_seconds))
        return [move] if move else []

    def _moved(self, event: events.Moved, now: float) -> None:
        image = self.images.moved(event.path, event.stamp)
        if image is None:
            return
        for place in (image.folder, _folder_of(image.path)):
            if self._move_pauses.clear(place):
                self.images.wake(place)
        if event.outcome is events.Outcome.REVIEW:
            destination, stamp = event.destination, event.moved_stamp
            self._rest_in_review(destination, stamp, now, image.generation, is_unfamiliar=image.turned_away > 0)

    def _rest_in_review(
        self, path: str, stamp: events.Stamp, now: float, generation: int, *, is_unfamiliar: bool
    ) -> None:
        """Add an image of Review/; if an older generation could not decide it, it is decided again."""
        self.images.rest_in_review(path, stamp, now, generation=generation, is_unfamiliar=is_unfamiliar)
        if self.built is not None:
            self.images.reconsider_one(path, self.built.classifier.generation)

    def _move_failed(self, event: events.MoveFailed, now: float) -> list[events.Command]:
        image = self.images.move_failed(event.path, event.stamp)
        if image is None or self._stopping:
            return []
        is_known = self.images.get(event.path) is image and image.state is State.EMBEDDED
        match event.failure:
            case events.MoveFailure.DESTINATION | events.MoveFailure.SOURCE as failure:
                place = image.folder if failure is events.MoveFailure.DESTINATION else _folder_of(image.path)
                self._move_pauses.begin(place, now)
                if is_known:
                    self.images.embedded(image, place)
            case events.MoveFailure.VANISHED if is_known:
                self.images.forget(event.path)
            case events.MoveFailure.CHANGED | events.MoveFailure.BUSY if is_known:
                self.images.settle_again(image, now)
                return [events.Inspect(event.path)]
        return []


def _folder_of(path: str) -> str:
    """Return the source folder of an image; it is absolute, so it cannot equal a destination folder."""
    return path.rpartition("/")[0]
