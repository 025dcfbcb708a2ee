"""One open dataset: its core, and what carries out its commands; used in the thread of the loop.

All inputs become events for the core. Its commands are carried out here or passed to the worker. Moves are collected in
a ``MoveQueue`` and executed in groups: one pair of directory syncs for fifty moves is eighty times as fast as one for
each.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic, time_ns

from sortd import events
from sortd.classify.stream import Stream
from sortd.classify.types import Evidence
from sortd.core.guard import GuardState
from sortd.core.sorter import Sorter, SorterSettings
from sortd.daemon.audit import evidence_of
from sortd.daemon.corrections import Correction, CorrectionScanner, Repaired
from sortd.daemon.dataset_lock import OpenDataset
from sortd.daemon.learnt import labelled_images
from sortd.daemon.metrics import Metrics
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.reporting import DatasetLog
from sortd.daemon.scans import DatasetScans
from sortd.daemon.worker import Answer, EmbedJob, Job, RebuildJob
from sortd.events import DatasetId, ImageGone, Leave, Move, Moved, MoveFailed, MoveFailure, Outcome, Refusal, Stamp
from sortd.layout import Area
from sortd.moving.copy_queue import MoveOrder
from sortd.moving.mover import MoveAnswer, Mover
from sortd.moving.recovery import UndoResult
from sortd.store.history import GENERATION_FACT, GUARD_FACT, History
from sortd.store.records import MoveProgress, MoveRecord, Record
from sortd.watch.scan import FolderComparison
from sortd.watch.watcher import FileEvent

GROUP = 32
"""Moves of one turn of the loop: on a busy disk each takes some five milliseconds, in which nothing else happens."""

Heard = MoveAnswer | ImageGone


class MoveQueue:
    """Carries out the moves of one dataset and writes a line about each."""

    def __init__(self, mover: Mover, log: DatasetLog, *, history: History, root: Path) -> None:
        """Begin with nothing to move; ``log`` writes the lines."""
        self._mover, self._log, self._history, self._root = mover, log, history, root
        self._moves: list[Move] = []
        # Sent and not answered yet, and since when; one version can be asked for again before it was answered.
        self._asked: dict[tuple[str, Stamp], deque[tuple[Move, float]]] = {}

    def add(self, move: Move) -> None:
        """Take a move in; it waits for ``send``."""
        self._moves.append(move)

    @property
    def is_due(self) -> bool:
        """Whether there is something to send: moves that were gathered, or some that waited for a copy to end."""
        return bool(self._moves) or self._mover.can_go_on

    def send(self) -> list[Heard]:
        """Carry out the next group of what was gathered; return what has ended, a line written about each."""
        moves, self._moves = self._moves[:GROUP], self._moves[GROUP:]
        return self.carry_out(moves)

    def carry_out(self, moves: Sequence[Move]) -> list[Heard]:
        """Carry out moves, whatever was gathered; return what has ended, a line written about each."""
        began = monotonic()
        for move in moves:
            self._asked.setdefault((move.path, move.stamp), deque()).append((move, began))
        self.tell_recovered(self._mover.recover())
        results = self._mover.move_all(moves)
        share = (monotonic() - began) / max(1, len(results))
        return [self._told(result, share) for result in results]

    def end(self, orders: Sequence[MoveOrder]) -> list[Heard | UndoResult]:
        """Take note of copies to another file system that have ended; return what became of them."""
        heard: list[Heard | UndoResult] = []
        for answer in self._mover.end(orders):
            if isinstance(answer, UndoResult):
                heard.append(answer)
                continue
            heard.append(self._told(answer, None))
            if isinstance(answer, Moved):
                self._add_new(self._mover.late.left_by(answer.path))
            elif answer.failure is MoveFailure.DESTINATION:
                heard += self._withdraw(answer.message)  # a full disk is not asked again for each that waits
        return heard

    def follow(self, leave: Leave) -> bool:
        """Take in the move of a file that stays, if it is a companion of an image that left before it; tell whether."""
        if leave.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.EMPTY}:
            return False
        move = self._mover.late.move_for(leave.path)
        self._add_new([] if move is None else [move])
        return move is not None

    def awaits_image(self, leave: Leave) -> bool:
        """Tell whether a file stays only until the image goes that it belongs to: nothing is to be said of it."""
        return self._mover.late.awaits_image(leave.path)

    def follow_images(self, found: Sequence[tuple[Record, str]]) -> None:
        """Take the companions in that are to follow images which a person moved."""
        self._add_new(self._mover.late.follow_images(found))

    def _add_new(self, followers: Iterable[Move]) -> None:
        """Take companions in that are to follow, but for those that do so already: they are found in two ways."""
        gathered = {(move.path, move.stamp) for move in self._moves}
        for move in followers:
            if (move.path, move.stamp) not in gathered and (move.path, move.stamp) not in self._asked:
                self._moves.append(move)

    def refuse(self, message: str) -> list[MoveAnswer]:
        """Answer what was gathered, or waits for a copy to end, as failed: the dataset is not there."""
        moves, self._moves = self._moves, []
        return [*(_failed(move, message) for move in moves), *self._withdraw(message)]

    def give_up(self) -> list[MoveAnswer]:
        """Answer what waits for a copy to another file system: sortd stops. The next start moves it."""
        return self._answered(self._mover.give_up())

    def tell_recovered(self, moves: Iterable[MoveRecord]) -> None:
        """Write the lines of images whose moves had been cut short, by a crash or a disk, and have ended now.

        Of those that were taken back nothing is to be said, unless the image is not where it was: whoever looks for it
        is told what is known, the hidden name of a copy that cannot be proven whole, say.
        """
        for move in moves:
            if move.progress is MoveProgress.DONE:
                mark = move.image.moved_stamp
                record = None if mark is None else self._history.last_known(mark)
                if record is not None:
                    self._log.recovered(record, self._root)
            elif move.progress is MoveProgress.FAILED:
                place = self._root / move.source / move.image.name
                if not os.path.lexists(place):
                    self._log.taken_back(move, self._root)

    def _withdraw(self, message: str) -> list[MoveAnswer]:
        """Answer what waits for a copy to end as failed, without a line for each: the core asks for it again."""
        return self._answered([_failed(move, message) for move in self._mover.withdraw()])

    def _answered(self, results: list[MoveAnswer]) -> list[MoveAnswer]:
        for result in results:
            self._taken(result)
        return results

    def _told(self, result: MoveAnswer, seconds: float | None) -> Heard:
        """Write the line of a result; return what the core, which never asked for a companion, is to hear of it."""
        move, began = self._taken(result)
        self._log.moved(move, result, 1e3 * (monotonic() - began if seconds is None else seconds))
        if move.outcome is Outcome.FOLLOWED:
            return ImageGone(move.path)
        if isinstance(result, Moved):
            self._add_new(self._mover.late.parted_from(result))
        return result

    def _taken(self, result: MoveAnswer) -> tuple[Move, float]:
        key = (result.path, result.stamp)
        asked = self._asked[key]
        taken = asked.popleft()
        if not asked:
            del self._asked[key]
        return taken


def _failed(move: Move, message: str) -> MoveAnswer:
    return MoveFailed(move.path, move.stamp, MoveFailure.DESTINATION, message)


class Dataset:
    """The core, scans, moves and log lines of one dataset."""

    def __init__(
        self,
        identity: DatasetId,
        opened: OpenDataset,
        settings: SorterSettings,
        reference_settings: ReferenceSettings,
        *,
        ask: Callable[[Job], None],
        metrics: Metrics,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Keep the collaborators; nothing is read yet. ``limits`` are those of decoding, see ``Rejects``."""
        layout, journal = opened.layout, opened.journal
        self.identity, self.layout, self.name = identity, layout, layout.name
        guard, last_generation = journal.history.guard(), journal.history.last_generation()
        self.sorter = Sorter(settings, decide=Stream().decide, guard=guard)
        self.log = DatasetLog(self.name, metrics)
        self._reference_settings, self._last_generation = reference_settings, last_generation  # the highest ever used
        self._evidence: Evidence | None = None  # of the last rebuild
        self._wishes = self._ordered = (False, False)  # ``force`` and ``afresh`` of the next and of the last rebuild
        self.mover, self.journal, self.presence, self._ask = opened.mover, journal, opened.presence, ask
        self.move_queue = MoveQueue(self.mover, self.log, history=journal.history, root=layout.root)
        self._is_absent = False
        self.closing = ExitStack()  # closes the journal and releases the locks
        self._corrections = CorrectionScanner(layout, journal, self.log.unreadable, limits=limits)
        self._references = FolderComparison(os.fspath(layout.area(Area.CLASES)), self.log.unreadable)
        self.scans = DatasetScans(
            layout, self.sorter, receive=self.receive, log=self.log, history=journal.history, presence=self.presence
        )
        self._commands: deque[events.Command] = deque()
        is_noted = journal.history.fact(GUARD_FACT) is not None
        self._noted_guard, self._noted_generation = guard if is_noted else GuardState(), last_generation

    def receive(self, event: events.Event) -> None:
        """Pass one event to the core and carry out its commands; moves wait for ``flush``."""
        self._tell(event)
        self._write_down()
        while self._commands:
            self._carry_out(self._commands.popleft())
        self.log.review_full(is_full=self.sorter.images.is_review_full)

    def _tell(self, event: events.Event) -> None:
        """Pass one event to the core; its commands are carried out with the next event."""
        self._commands.extend(self.sorter.receive(event, monotonic()))

    def _write_down(self) -> None:
        """Write the generation and the guard to the journal before anything that depends on them is done."""
        if self._last_generation != self._noted_generation:
            self.journal.note(GENERATION_FACT, str(self._last_generation))
            self._noted_generation = self._last_generation
        if self.sorter.guard.state != self._noted_guard:
            self.journal.note_guard(self.sorter.guard.state)
            self._noted_guard = self.sorter.guard.state

    def begin(self) -> None:
        """Pass the held files of the journal to the core, and start the first scans."""
        for path, mark in self.journal.history.held().items():
            self.receive(events.ImageHeld(os.path.join(self.layout.root, path), mark))
        if self.held_because is not None:
            self.log.held(self.held_because, self.layout.root)
        self.scans.begin()
        self.scans.begin_review()

    def file_event(self, event: FileEvent) -> None:
        """Process an event of the watcher: inspect a file in Images/ now, schedule anything else."""
        match self.layout.area_of(event.path):
            case None:
                return
            case Area.CLASES:
                self.receive(events.ReferencesTouched())
            case Area.IMAGES:
                self.scans.event_in_inbox(event)
            case Area.REVIEW if event.directory:
                self.scans.review.asked.ask()
            case Area.REVIEW if not os.path.lexists(event.path):
                if event.path in self.sorter.images:
                    self.scans.look(event.path, closed=event.closed)
                    self._corrections.want(Area.REVIEW, event.path)
            case area if not event.directory:
                self._corrections.want(area, event.path)
            case Area.DATASET:
                self._corrections.ask()

    def check_presence(self) -> None:
        """Pause the dataset while a disk of it is missing or another sortd has its lock, and resume it afterwards."""
        problem = self.presence.problem()
        if (problem is not None) == self._is_absent:
            return
        self._is_absent = problem is not None
        if problem is not None:
            self.log.rebuild_failed(events.RebuildFailed(problem, references_absent=True, job=0))
        self.receive(events.ReferencesTouched() if problem is None else events.DatasetAbsent(problem))

    def answer(self, answer: Answer) -> None:
        """Process an answer of the worker."""
        for event in answer.events:
            if isinstance(event, events.PrototypesBuilt):
                self._last_generation = max(self._last_generation, event.prototypes.generation)
                if answer.rebuilt is not None:
                    self.log.rebuilt(event.prototypes, answer.rebuilt, answer.seconds)
                self.log.decided_by(event.finetuned, answer.refusal)
            elif isinstance(event, events.RebuildFailed):
                if not event.is_lasting:
                    force, afresh = self._ordered  # it is retried
                    self._wish(force=force, afresh=afresh)
                self.log.rebuild_failed(event)
            elif isinstance(event, events.Embedded):
                self.log.embedded(event)
            self.receive(event)

    def copied(self, orders: Sequence[MoveOrder]) -> list[UndoResult]:
        """Process finished copies to another file system; return what they have undone."""
        results = self.move_queue.end(orders)
        for result in results:
            if not isinstance(result, UndoResult):
                self._hear(result)
        return [result for result in results if isinstance(result, UndoResult)]

    def reload(self, settings: SorterSettings, reference_settings: ReferenceSettings) -> None:
        """Apply changed settings."""
        self._reference_settings = reference_settings
        self._wish(afresh=True)
        self.sorter.configure(settings, monotonic())

    def stop(self) -> None:
        """Start nothing new; moves under way are finished, except long copies."""
        self.receive(events.StopRequested())
        for failed in self.move_queue.give_up():
            self.receive(failed)

    def tick(self, now: float) -> None:
        """Let the core process deadlines, and take the next slice of the inspections that it asked for."""
        self.scans.tell_missing()
        deadline = self.sorter.next_deadline()
        if deadline is not None and deadline <= now:
            self.receive(events.Tick())
        self.scans.take_looks()
        self.scans.left_files.tell()

    def flush(self) -> None:
        """Carry out the collected moves, as one group."""
        if not self.move_queue.is_due:
            return
        if (problem := self.presence.problem()) is not None:
            for failed in self.move_queue.refuse(problem):
                self.receive(failed)
            self.receive(events.DatasetAbsent(problem))
            return
        for result in self.move_queue.send():
            self._hear(result)

    def assign(self, moves: Sequence[Move]) -> list[Heard]:
        """Carry out moves that a person ordered; return what has ended."""
        heard = self.move_queue.carry_out(moves)
        for result in heard:
            self._hear(result)
            if isinstance(result, Moved):
                self.receive(ImageGone(result.path))  # it may wait in Images/; the core did not ask for this move
        for correction in self._corrections.look_now([one.destination for one in heard if isinstance(one, Moved)]):
            self.log.corrected(correction)
        return heard

    def _hear(self, result: Heard) -> None:
        """Tell the core of the end of a move; it did not ask for those that a person ordered."""
        if isinstance(result, Moved) and result.outcome is Outcome.ASSIGNED:
            self.receive(ImageGone(result.path))
            self.receive(events.ReferencesTouched())
        else:
            self.receive(result)
            if isinstance(result, Moved):
                self._corrections.note_placed(result.destination, result.moved_stamp)

    def scan_all(self) -> None:
        """Start to scan Images/ and Review/, and to compare Clases/ with its last scan."""
        self.scans.begin()
        self._references.scan.begin()
        self.scans.begin_review()

    def scan_handled(self) -> None:
        """Start to scan for corrections and for repaired files in Rejected/."""
        self._corrections.begin(time_ns())

    def continue_looking(self) -> None:
        """Take the next slice of each scan."""
        self.scans.continue_inbox()
        if self._references.differs():
            self.receive(events.ReferencesTouched())
        self._continue_corrections()
        self.scans.continue_review()
        if moved := self._corrections.take_moved(time_ns()):
            self.move_queue.follow_images(moved)

    def _continue_corrections(self) -> None:
        self._corrections.begin_asked()
        if not self._corrections.is_under_way:
            return
        if self.presence.problem() is not None:
            self._corrections.end()  # everything is scanned when it is back
            return
        corrected = False
        for noticed in self._corrections.take():
            match noticed:
                case Repaired(path, mark):
                    self.receive(events.ImageSeen(path, mark, is_aside=True))
                case Correction():
                    self.log.corrected(noticed)
                    corrected = True
        if corrected and (self._reference_settings.learns_from_corrections or self._has_new_evidence()):
            self.receive(events.ReferencesTouched())

    def _has_new_evidence(self) -> bool:
        """Return whether enough images were checked since the last rebuild for the threshold to follow them."""
        found = evidence_of(self.journal.history, self._reference_settings.settings.mode)
        return found is not None and (self._evidence is None or found.steps != self._evidence.steps)

    def record_checks(self, answers: Sequence[tuple[int, bool]]) -> int:
        """Record whether filed images are right, and return how many of them the journal knows."""
        checked = self.journal.record_checks(answers)
        if self._has_new_evidence():
            self.receive(events.ReferencesTouched())
        return checked

    def _carry_out(self, command: events.Command) -> None:
        match command:
            case events.Inspect(path):
                self.scans.want(path)
            case events.Embed(images):
                self._ask(EmbedJob(self.identity, images))
            case events.Rebuild(job):
                self._rebuild(job)
            case events.Scan():
                self.scans.begin()
            case events.Move():
                self.move_queue.add(command)
            case events.Leave():
                self._leave(command)
            case events.Hold(reason):
                self.log.held(reason, self.layout.root)

    def _leave(self, leave: events.Leave) -> None:
        """Move a file after its image if it is a companion, or log once that it stays."""
        if not self.sorter.references_absent and self.move_queue.follow(leave):
            return
        if not self.move_queue.awaits_image(leave):
            self.log.left(leave)
            if leave.stamp is not None:
                self._corrections.rejects.keep(leave.path, leave.stamp)

    def _rebuild(self, job: int) -> None:
        if (problem := self.presence.problem()) is not None:
            event = events.RebuildFailed(problem, references_absent=True, job=job)
            self.log.rebuild_failed(event)
            self._tell(event)
            return
        settings = self._reference_settings
        learns = settings.learns_from_corrections
        labelled = labelled_images(self.layout, self.journal.history, with_corrections=learns)
        self._evidence = evidence_of(self.journal.history, settings.settings.mode)
        settings = replace(settings, corrections=labelled, evidence=self._evidence)
        (force, afresh), self._wishes = self._wishes, (False, False)
        self._ordered = force, afresh
        clases, generation = self.layout.area(Area.CLASES), self._last_generation
        self._ask(RebuildJob(self.identity, clases, settings, generation, job, force=force, afresh=afresh))

    def _wish(self, *, force: bool = False, afresh: bool = False) -> None:
        """Let the next rebuild skip the reload gate (``force``), or forget what emptied classes held (``afresh``)."""
        self._wishes = self._wishes[0] or force, self._wishes[1] or afresh

    @property
    def has_more_to_look_at(self) -> bool:
        """Whether any scan is running."""
        return self.scans.has_more or self._corrections.is_under_way or self._references.scan.is_under_way

    @property
    def next_deadline(self) -> float:
        """The time of its next work without an event: infinity if there is none, 0 if it has work now."""
        if self.has_more_to_look_at or self.move_queue.is_due:
            return 0.0
        core = self.sorter.next_deadline()
        return min(float("inf") if core is None else core, self.scans.deadline, self._corrections.deadline)

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left to do until another event arrives."""
        waits = self._corrections.has_moved or self.has_more_to_look_at or self.move_queue.is_due
        return not waits and self.sorter.is_drained

    @property
    def is_stuck(self) -> bool:
        """Whether nothing will move until the references are repaired or a hold is released."""
        core = self.sorter
        if self.log.problem is not None and (core.built is None or core.references_absent):
            return True
        return core.guard.reason is not None and not core.rebuilds.is_pending

    def rebuild(self, *, force: bool, afresh: bool = False) -> None:
        """Rebuild the prototypes; ``force`` skips the reload gate, ``afresh`` forgets what emptied classes held."""
        self._wish(force=force, afresh=afresh)
        self.receive(events.ReferencesTouched())

    @property
    def held_because(self) -> str | None:
        """Why the guard holds the dataset; None if it does not."""
        return self.sorter.guard.reason

    def release(self) -> str | None:
        """Release the hold by the guard and return its reason; None if there was none."""
        if (reason := self.held_because) is not None:
            self.receive(events.DatasetReleased())
        return reason

    @property
    def problem(self) -> str | None:
        """Why nothing is moved, in a sentence; None without a problem."""
        return self.held_because or self.log.problem

    def facts(self) -> dict[str, object]:
        """Return the entry of the dataset in ``sortd status``, as plain values."""
        mode = self._reference_settings.settings.mode
        facts = self.log.facts(self.sorter, generation=self._last_generation, mode=mode)
        return {**facts, "files_looked_at": self.scans.count + self._corrections.files_looked_at}
