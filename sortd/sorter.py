"""The core of one dataset: events in, commands out; it knows no file, clock, thread, log or model.

``receive(event, now)`` takes one fact and returns what shall be done about it; ``next_deadline()`` says how long the
caller may sleep before it owes a ``Tick``. Embed ahead, decide late: while a rebuild is due or running, images are
embedded but none is moved, so that every decision is made by the prototypes that the folder now shows.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from sortd.backlog import Backlog
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import Classifier, FinetunedClassifier, PrototypeSet
from sortd.classify.types import Abstained, Decision
from sortd.messages import (
    Command,
    DatasetAbsent,
    DatasetReleased,
    Embed,
    Embedded,
    EmbeddedImage,
    Event,
    FoldersGone,
    Hold,
    ImageGone,
    ImageHeld,
    ImageRefused,
    ImageSeen,
    Inspect,
    Leave,
    LookRefused,
    Move,
    Moved,
    MoveFailed,
    MoveFailure,
    Outcome,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    Refusal,
    Released,
    ReviewSeen,
    Scan,
    ScanFinished,
    ScanStarted,
    Stamp,
    StopRequested,
    Tick,
)
from sortd.sorting.entry import Entry, State
from sortd.sorting.guard import Guard, GuardState
from sortd.sorting.orders import SET_ASIDE, order_aside, order_for
from sortd.sorting.pause import FolderPauses
from sortd.sorting.rebuilds import Rebuilds
from sortd.sorting.settings import SorterSettings

ROOM_FOR_A_SCAN = 1 / 8
"""What did not fit is looked for when no more than this share of the backlog waits: a scan takes time, too."""

MOST_LOOKS = 10_000
"""Settling images that one ``Tick`` asks to be looked at; the next ones are due at once."""


class Sorter:
    """The sans-IO core of one dataset."""

    def __init__(self, settings: SorterSettings, *, guard: GuardState | None = None) -> None:
        """Begin without prototypes, with a rebuild due at once, and the guard as the last run left it."""
        self._settings = settings
        self._backlog = Backlog(settle_seconds=settings.settle_seconds, limit=settings.backlog_limit)
        self.prototypes: PrototypeSet | None = None
        self.finetuned: FinetunedClassifier | None = None
        self.references_absent = False
        self._rebuilds = Rebuilds()
        self._absent_in = 0  # the rebuild that ran, or had run last, when the dataset was found absent
        self._move_pauses = FolderPauses()
        self.guard = Guard(settings.guard_images, guard or GuardState())
        self._stopping = False

    # ------------------------------------------------------------ questions

    def next_deadline(self) -> float | None:
        """Return the time, in seconds of the caller's clock, by which a ``Tick`` is owed; None: no hurry."""
        if self._stopping:
            return None
        times = (self._backlog.next_deadline(), *self._rebuilds.deadlines, self._move_pauses.until)
        return min((time for time in times if time is not None), default=None)

    def configure(self, settings: SorterSettings, now: float) -> None:
        """Take over changed settings; the prototypes are built anew, since their settings may have changed too."""
        self._settings = settings
        self._backlog.configure(settle_seconds=settings.settle_seconds, limit=settings.backlog_limit)
        self.guard.configure(settings.guard_images)
        self._touch(now)

    @property
    def classifier(self) -> Classifier | None:
        """What decides: the fine-tuned model that was promoted, else the prototypes; None before either is there."""
        return self.finetuned or self.prototypes

    @property
    def counts(self) -> dict[str, int]:
        """Count the images by state."""
        return {state.value: self._backlog.count(state) for state in State}

    @property
    def refused(self) -> list[Entry]:
        """List the images that stay where they are, each with the reason; beyond the limit of the backlog not all."""
        return self._backlog.in_state(State.REFUSED)

    @property
    def waiting(self) -> int:
        """Count the images that are work."""
        return self._backlog.waiting

    def looks_soon_at(self, path: str, now: float) -> bool:
        """Tell whether an image settles and is to be looked at within the settle time, whatever happens to it."""
        return not self._stopping and self._backlog.is_due_soon(path, now)

    @property
    def is_rebuilding(self) -> bool:
        """Tell whether a rebuild is due or running."""
        return self._rebuilds.is_pending

    @property
    def known(self) -> int:
        """Count the images that are remembered, waiting or resting."""
        return len(self._backlog)

    @property
    def is_overflowed(self) -> bool:
        """Tell whether the scan under way, or a hint since, named more than fits: the rest is asked for in time."""
        return self._backlog.overflowed

    @property
    def is_review_full(self) -> bool:
        """Tell whether an image in Review/ is not remembered for want of room; the next scan of it tries again."""
        return self._backlog.is_review_full

    @property
    def has_room_in_review(self) -> bool:
        """Tell whether one more image of Review/ would be remembered."""
        return self._backlog.has_room_in_review

    def knows(self, path: str) -> bool:
        """Tell whether an image under this path is remembered."""
        return self._backlog.get(path) is not None

    @property
    def is_drained(self) -> bool:
        """Tell whether nothing is left to do until something else happens: a writer closing its file, say."""
        return not (self.is_rebuilding or self.waiting > self._backlog.busy + self.refused_by_disks)

    @property
    def refused_by_disks(self) -> int:
        """Count the images that are decided and wait for a folder that refuses again and again: a full disk, say."""
        return self._backlog.count(State.EMBEDDED) if self._may_decide and self._move_pauses.are_lasting else 0

    @property
    def is_stopped(self) -> bool:
        """Tell whether, after ``StopRequested``, no move is under way any more."""
        return self._stopping and not self._backlog.count(State.MOVING)

    @property
    def may_move(self) -> bool:
        """Tell whether an answered image would move now, wherever to."""
        return self._may_decide and self._move_pauses.until is None

    @property
    def _may_decide(self) -> bool:
        return (
            self.prototypes is not None
            and not self.is_rebuilding
            and not self.references_absent
            and self.guard.reason is None
            and not self._stopping
        )

    # ------------------------------------------------------------ events in, commands out

    def receive(self, event: Event, now: float) -> list[Command]:
        """Take in one fact; return what shall be done, in order."""
        commands = self._take(event, now)
        if not self._stopping:
            self._try_places()
            commands += self._embed()
            if self._backlog.overflowed and self._backlog.waiting <= self._settings.backlog_limit * ROOM_FOR_A_SCAN:
                self._backlog.overflowed = False
                commands.append(Scan())
        return commands

    def _take(self, event: Event, now: float) -> list[Command]:  # noqa: C901, PLR0911, PLR0912 -- the table of events: one arm each
        match event:
            case ImageSeen():
                self._backlog.see(
                    event.path,
                    event.stamp,
                    now,
                    writer=event.writer,
                    closed=event.closed,
                    is_aside=event.is_aside,
                    since=event.since,
                )
            case ReviewSeen(path, stamp, generation):
                self._rest_in_review(path, stamp, now, generation)
            case ImageHeld(path, stamp):
                self._backlog.hold(path, stamp, now)
            case ImageGone(path):
                self._backlog.forget(path)
            case FoldersGone(folders):
                return [Inspect(path) for path in self._backlog.resting_below(folders)]
            case LookRefused(path):
                self._backlog.lose_sight(path)
            case ReferencesTouched():
                self._touch(now)
            case Embedded():
                return self._embedded(event)
            case ImageRefused():
                return self._refused(event, now)
            case PrototypesBuilt():
                self._built(event)
            case RebuildFailed():
                self._rebuild_failed(event, now)
            case DatasetAbsent():
                self._absent(now)
            case Moved():
                self._moved(event, now)
            case MoveFailed():
                return self._move_failed(event, now)
            case Released(path):
                self._backlog.release(path, now)
            case DatasetReleased():
                self.guard.release()
                self._resume()
            case ScanStarted(in_review):
                self._backlog.start_scan(in_review=in_review)
            case ScanFinished(in_review):
                if not in_review:
                    self._backlog.retry_denied(now)
                return [Inspect(path) for path in self._backlog.unseen_by_scan(in_review=in_review)]
            case Tick():
                return self._tick(now)
            case StopRequested():
                self._stopping = True
        return []

    def _tick(self, now: float) -> list[Command]:
        if self._stopping:
            return []
        due = islice(self._backlog.due(now), MOST_LOOKS)
        commands: list[Command] = [Inspect(path) for path in due]
        if (job := self._rebuilds.begin(now)) is not None:
            commands.append(Rebuild(job))
        self._move_pauses.end_due(now)
        return commands

    # ------------------------------------------------------------ references

    def _touch(self, now: float) -> None:
        self._rebuilds.touch(now, settle_seconds=self._settings.settle_seconds)

    def _built(self, event: PrototypesBuilt) -> None:
        if not self._rebuilds.is_running(event.job):
            return
        self._rebuilds.succeed()
        self.references_absent = event.job <= self._absent_in
        served = self.classifier
        self.prototypes, self.finetuned = event.prototypes, event.finetuned
        classifier = event.finetuned or event.prototypes
        self.guard.serve(classifier)
        if served is None or served.generation != classifier.generation:
            self._backlog.reconsider(classifier.generation)
        self._resume()

    def _rebuild_failed(self, event: RebuildFailed, now: float) -> None:
        if not self._rebuilds.is_running(event.job):
            return
        self._rebuilds.fail(now, is_lasting=event.is_lasting)
        self.references_absent = event.references_absent or event.job <= self._absent_in
        self._resume()

    def _absent(self, now: float) -> None:
        self.references_absent = True
        self._absent_in = self._rebuilds.job
        self._rebuilds.retry(now)

    def _resume(self) -> None:
        if self._may_decide:
            self._backlog.resume()

    def _try_places(self) -> None:
        """Let one image try each folder whose pause is over: if it moves, those that wait for the folder follow."""
        for place in self._backlog.places:
            if self._may_decide and not self._move_pauses.holds(place):
                self._backlog.try_place(place)

    # ------------------------------------------------------------ the way of one image

    def _embed(self) -> list[Command]:
        commands: list[Command] = []
        size = self._settings.batch_size
        while self._backlog.count(State.ENCODING) <= size * (self._settings.batches_in_flight - 1):
            batch = self._backlog.take_batch(size, is_paused=self._move_pauses.holds)
            if not batch:
                break
            commands.append(Embed(tuple((entry.path, entry.stamp) for entry in batch)))
        return commands

    def _embedded(self, event: Embedded) -> list[Command]:
        answered = [(image, self._backlog.answered(image.path, image.stamp)) for image in event.images]
        known = [(image, entry) for image, entry in answered if entry is not None]
        if not known:
            return []
        classifier = self.classifier
        if classifier is None or not self._may_decide or classifier.encoder_id != event.encoder_id:
            for _, entry in known:
                self._backlog.embedded(entry)
            self._resume()  # rows of an encoder that another has taken over from since: embedded again by that one
            return []
        decisions = decide_by(classifier, np.stack([image.embedding for image, _ in known]))
        if self.guard.wants(self.waiting):
            return self._try_out([entry for _, entry in known], decisions)
        moves = [
            self._decided(image, entry, decision, classifier)
            for (image, entry), decision in zip(known, decisions, strict=True)
        ]
        return [move for move in moves if move is not None]

    def _try_out(self, entries: Sequence[Entry], decisions: Sequence[Decision]) -> list[Command]:
        """Decide without moving; when the trial is over all of it is decided again, from cached embeddings."""
        for entry in entries:
            self._backlog.embedded(entry)
        waits = self._backlog.count(State.EMBEDDED) + self._backlog.busy
        if not self.guard.try_out(decisions, left=self.waiting - waits):
            return []
        self._resume()
        return [Hold(self.guard.reason)] if self.guard.reason is not None else []

    def _decided(self, image: EmbeddedImage, entry: Entry, decision: Decision, classifier: Classifier) -> Move | None:
        if isinstance(decision, Abstained) and entry.in_review:
            self._backlog.abstain_again(entry, generation=classifier.generation)
            return None
        entry.generation = classifier.generation
        return self._ordered(entry, order_for(image, decision, classifier, settle_seconds=entry.settle_seconds))

    def _ordered(self, entry: Entry, move: Move) -> Move | None:
        """Let an image move, unless one of its folders refuses for now: then it waits, and keeps no other waiting."""
        places = (move.folder, _folder_of(entry.path))
        if refusing := [place for place in places if self._move_pauses.holds(place)]:
            self._backlog.embedded(entry, refusing[0])
            return None
        self._backlog.moving(entry, move.folder)
        return move

    def _refused(self, event: ImageRefused, now: float) -> list[Command]:
        entry = self._backlog.answered(event.path, event.stamp)
        if entry is None:
            return []
        match event.refusal:
            case Refusal.VANISHED:
                self._backlog.forget(event.path)
                return []
            case Refusal.CHANGED:
                self._backlog.settle_again(entry, now)
                return [Inspect(event.path)]
            case refusal if refusal in SET_ASIDE and self._is_set_aside(entry):
                return self._set_aside(event, entry)
            case refusal:
                is_news = self._backlog.refuse(entry, refusal, event.message)
                return [Leave(event.path, refusal, event.message, event.stamp)] if is_news else []

    def _is_set_aside(self, entry: Entry) -> bool:
        return self._settings.set_rejected_aside and not (entry.in_review or entry.is_aside)

    def _set_aside(self, event: ImageRefused, entry: Entry) -> list[Command]:
        if self.references_absent or self._stopping:
            self._backlog.embedded(entry)
            return []
        move = self._ordered(entry, order_aside(event, settle_seconds=entry.settle_seconds))
        return [move] if move else []

    def _moved(self, event: Moved, now: float) -> None:
        entry = self._backlog.moved(event.path, event.stamp)
        if entry is None:
            return
        for place in (entry.folder, _folder_of(entry.path)):
            if self._move_pauses.clear(place):
                self._backlog.wake(place)
        if event.outcome is Outcome.REVIEW:
            self._rest_in_review(event.destination, event.moved_stamp, now, entry.generation)

    def _rest_in_review(self, path: str, stamp: Stamp, now: float, generation: int) -> None:
        """Remember an image in Review/; one that an older generation could not decide is decided again at once."""
        self._backlog.rest_in_review(path, stamp, now, generation=generation)
        if self.classifier is not None:
            self._backlog.reconsider_one(path, self.classifier.generation)

    def _move_failed(self, event: MoveFailed, now: float) -> list[Command]:
        entry = self._backlog.move_failed(event.path, event.stamp)
        if entry is None or self._stopping:
            return []
        is_known = self._backlog.get(event.path) is entry and entry.state is State.EMBEDDED
        match event.failure:
            case MoveFailure.DESTINATION | MoveFailure.SOURCE as failure:
                place = entry.folder if failure is MoveFailure.DESTINATION else _folder_of(entry.path)
                self._move_pauses.begin(place, now)
                if is_known:
                    self._backlog.embedded(entry, place)
            case MoveFailure.VANISHED if is_known:
                self._backlog.forget(event.path)
            case MoveFailure.CHANGED | MoveFailure.BUSY if is_known:
                self._backlog.settle_again(entry, now)
                return [Inspect(event.path)]
        return []


def _folder_of(path: str) -> str:
    """Return the folder in which an image lies: an absolute path, which no folder of a move is."""
    return path.rpartition("/")[0]
