"""A dataset at work: its core, and what carries out what the core asks for; used in the loop's thread.

Everything that enters becomes events for the core; every command that comes out is carried out here or handed to the
worker. Moves are gathered and made as one group a turn, see ``outbox.py``.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, time_ns

from sortd import events
from sortd.core.guard import GuardState
from sortd.core.sorter import Sorter, SorterSettings
from sortd.daemon.corrections import Correction, CorrectionScanner, Mended
from sortd.daemon.dataset_log import DatasetLog
from sortd.daemon.move_queue import DryRunMover, Outbox
from sortd.daemon.presence import Presence
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.scans import DatasetScans
from sortd.daemon.worker import Answer, EmbedJob, Job, RebuildJob
from sortd.events import DatasetId
from sortd.layout import Area, Layout
from sortd.metrics import Metrics
from sortd.moving.copy_queue import MoveOrder
from sortd.moving.mover import Mover
from sortd.moving.undo import UndoResult
from sortd.store.history import GENERATION_FACT, GUARD_FACT, History
from sortd.store.journal import Journal
from sortd.watch.observer import FileEvent
from sortd.watch.scan import FolderComparison


class Rebuilding:
    """Knows what a dataset is taught by, and makes the jobs that build its prototypes."""

    def __init__(self, identity: DatasetId, clases: Path, teaching: ReferenceSettings, last_generation: int) -> None:
        """Begin; ``last_generation`` is the highest number that was ever used: none is used again."""
        self.teaching, self.last_generation = teaching, last_generation
        self._identity, self._clases = identity, clases
        self._wishes = (False, False)
        """Whether the next rebuild passes the reload gate, and whether it forgets what emptied classes held."""
        self._ordered = (False, False)  # the wishes that the rebuild ordered last is to fulfil

    def wish(self, *, force: bool = False, afresh: bool = False) -> None:
        """Let the next rebuild pass the reload gate (``force``), or forget what emptied classes held (``afresh``)."""
        self._wishes = self._wishes[0] or force, self._wishes[1] or afresh

    def note(self, generation: int) -> None:
        """Take note of a generation that serves."""
        self.last_generation = max(self.last_generation, generation)

    def renew_wishes(self) -> None:
        """Let the next rebuild fulfil what the one ordered last was to: it failed, and is tried again."""
        self.wish(force=self._ordered[0], afresh=self._ordered[1])

    def order(self, job: int, learnt: Callable[[], tuple[tuple[str, str], ...]]) -> RebuildJob:
        """Return the rebuild that is to be done now, numbered ``job``; wishes are fulfilled by it.

        ``learnt`` is asked, where corrections teach, for the label and the path of each.
        """
        teaching = self.teaching
        if teaching.learns_from_corrections:
            teaching = replace(teaching, corrections=learnt())
        (force, afresh), self._wishes = self._wishes, (False, False)
        self._ordered = force, afresh
        return RebuildJob(self._identity, self._clases, teaching, self.last_generation, job, force=force, afresh=afresh)


class Dataset:
    """One dataset's core, scans, moves and log lines."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        identity: DatasetId,
        layout: Layout,
        settings: SorterSettings,
        teaching: ReferenceSettings,
        *,
        mover: Mover | DryRunMover,
        journal: Journal,
        ask: Callable[[Job], None],
        metrics: Metrics,
        last_generation: int,
        guard: GuardState,
        needs_marker: bool = True,
        lock_problem: Callable[[], str | None] = lambda: None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Take the collaborators over; nothing is touched yet. ``limits`` are those of decoding, see ``Rejects``."""
        self.identity, self.layout, self.name = identity, layout, layout.name
        self.sorter = Sorter(settings, guard=guard)
        self.log = DatasetLog(self.name, metrics)
        self.rebuilding = Rebuilding(identity, layout.area(Area.CLASES), teaching, last_generation)
        self._mover, self._ask, self._journal = mover, ask, journal
        self.outbox = Outbox(mover, self.log, history=journal.history, root=layout.root)
        self._presence = Presence(layout, journal, needs_marker=needs_marker, lock_problem=lock_problem)
        self._is_taken = False
        self._corrections = CorrectionScanner(layout, journal, self.log.unreadable, limits=limits)
        self._references = FolderComparison(os.fspath(layout.area(Area.CLASES)), self.log.unreadable)
        self.scans = DatasetScans(
            layout,
            self.sorter,
            receive=self.receive,
            log=self.log,
            history=journal.history,
            presence=self._presence,
        )
        self._commands: deque[events.Command] = deque()
        is_noted = journal.history.fact(GUARD_FACT) is not None
        self._noted_guard, self._noted_generation = guard if is_noted else GuardState(), last_generation

    def receive(self, event: events.Event) -> None:
        """Hand one event to the core and carry out what it asks for; moves wait for ``flush``."""
        self._tell(event)
        self._write_down()
        while self._commands:
            self._carry_out(self._commands.popleft())
        self.log.review_full(is_full=self.sorter.images.is_review_full)

    def _tell(self, event: events.Event) -> None:
        """Hand one event to the core; what it asks for is carried out with the next event."""
        self._commands.extend(self.sorter.receive(event, monotonic()))

    def _write_down(self) -> None:
        """Note what must survive however this run ends, before anything that follows from it is done.

        Raises:
            JournalError: it could not be made durable; the daemon must stop.
        """
        if self.rebuilding.last_generation != self._noted_generation:
            self._journal.note(GENERATION_FACT, str(self.rebuilding.last_generation))
            self._noted_generation = self.rebuilding.last_generation
        if self.sorter.guard.state != self._noted_guard:
            self._journal.note_guard(self.sorter.guard.state)
            self._noted_guard = self.sorter.guard.state

    def begin(self) -> None:
        """Tell the core what the journal remembers, and begin the first scans.

        Raises:
            JournalError: the journal cannot be read.
        """
        for path, mark in self._journal.history.held().items():
            self.receive(events.ImageHeld(os.path.join(self.layout.root, path), mark))
        if self.held_because is not None:
            self.log.held(self.held_because, self.layout.root)
        self.begin_scan()
        self.scans.begin_review()

    def require_journal(self) -> None:
        """See that its journal stands where it was opened.

        Raises:
            JournalError: it was removed or replaced.
        """
        self._journal.require_in_place()

    # ------------------------------------------------------------ what happens outside

    def file_event(self, event: FileEvent) -> None:
        """Take a watcher's event: note what is to be looked at; a file in Images/ is looked at now."""
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
            case area if not event.directory:
                self._corrections.want(area, event.path)
            case Area.DATASET:
                self._corrections.ask()

    def check_lock(self) -> None:
        """Hold the dataset while another sortd has its lock, and take it up again when that one has ended."""
        problem = self.lock_problem()
        if (problem is not None) == self._is_taken:
            return
        self._is_taken = problem is not None
        if problem is not None:
            self.log.rebuild_failed(events.RebuildFailed(problem, references_absent=True, job=0))
        self.receive(events.ReferencesTouched() if problem is None else events.DatasetAbsent(problem))

    def lock_problem(self) -> str | None:
        """Why another sortd has the dataset now, in a sentence; None where none has."""
        return self._presence.lock_problem()

    def answer(self, answer: Answer) -> None:
        """Take the worker's answer."""
        for event in answer.events:
            if isinstance(event, events.PrototypesBuilt):
                self.rebuilding.note(event.prototypes.generation)
                if answer.rebuilt is not None:
                    self.log.rebuilt(event.prototypes, answer.rebuilt, answer.seconds)
                self.log.decided_by(event.finetuned, answer.refusal)
            elif isinstance(event, events.RebuildFailed):
                if not event.is_lasting:
                    self.rebuilding.renew_wishes()
                self.log.rebuild_failed(event)
            elif isinstance(event, events.Embedded):
                self.log.embedded(event)
            self.receive(event)

    def copied(self, orders: Sequence[MoveOrder]) -> list[UndoResult]:
        """Take note of copies to another file system that have ended; return what was undone by them."""
        put_back: list[UndoResult] = []
        for result in self.outbox.end(orders):
            if isinstance(result, UndoResult):
                put_back.append(result)
            else:
                self.receive(result)
        return put_back

    def reload(self, settings: SorterSettings, teaching: ReferenceSettings) -> None:
        """Take changed settings over."""
        self.rebuilding.teaching = teaching
        self.rebuilding.wish(afresh=True)
        self.sorter.configure(settings, monotonic())

    def stop(self) -> None:
        """Begin nothing new; what is on its way to the disk is finished, but for long copies."""
        self.receive(events.StopRequested())
        for failed in self.outbox.give_up():
            self.receive(failed)

    # ------------------------------------------------------------ a turn of the loop

    def tick(self, now: float) -> None:
        """Let the core act on deadlines that have passed, and take the next slice of the looks that it asked for."""
        self.scans.tell_missing()
        deadline = self.sorter.next_deadline()
        if deadline is not None and deadline <= now:
            self.receive(events.Tick())
        self.scans.take_looks()
        self.scans.left_files.tell()

    def flush(self) -> None:
        """Make the moves that were gathered, as one group, and log each."""
        if not self.outbox.is_due:
            return
        if (problem := self._presence.problem()) is not None:
            for failed in self.outbox.refuse(problem):
                self.receive(failed)
            self.receive(events.DatasetAbsent(problem))
            return
        for result in self.outbox.send():
            self.receive(result)

    def begin_scan(self) -> None:
        """Begin to scan Images/, unless a scan is under way: then another one follows it."""
        self.scans.begin()

    def scan_all(self) -> None:
        """Begin to scan Images/ and Review/, and to look whether Clases/ differs from what was last seen of it."""
        self.scans.begin()
        self._references.scan.begin()
        self.scans.begin_review()

    def scan_handled(self) -> None:
        """Begin to look for what the user did since with images that were handled: moved to another class, mended."""
        self._corrections.begin(time_ns())

    def continue_scan(self) -> None:
        """Take the next slice of the scans of Images/."""
        self.scans.continue_inbox()

    def continue_looking(self) -> None:
        """Look at the next slice of what was handled, of Review/ and of the references, where that is under way."""
        if self._references.differs():
            self.receive(events.ReferencesTouched())
        self._continue_corrections()
        self.scans.continue_review()
        if moved := self._corrections.take_moved(time_ns()):
            self.outbox.follow_images(moved)

    def _continue_corrections(self) -> None:
        self._corrections.begin_asked()
        if not self._corrections.is_under_way:
            return
        if self._presence.problem() is not None:
            self._corrections.end()  # absent is not gone: all of it is looked at when it is back
            return
        for noticed in self._corrections.take():
            match noticed:
                case Mended(path, mark):
                    self.receive(events.ImageSeen(path, mark, is_aside=True))
                case Correction():
                    self.log.corrected(noticed)
                    if self.rebuilding.teaching.learns_from_corrections:
                        self.receive(events.ReferencesTouched())

    def _carry_out(self, command: events.Command) -> None:
        match command:
            case events.Inspect(path):
                self.scans.want(path)
            case events.Embed(images):
                self._ask(EmbedJob(self.identity, images))
            case events.Rebuild(job):
                self._rebuild(job)
            case events.Scan():
                self.begin_scan()
            case events.Move():
                self.outbox.add(command)
            case events.Leave():
                self._leave(command)
            case events.Hold(reason):
                self.log.held(reason, self.layout.root)

    def _leave(self, leave: events.Leave) -> None:
        """Let a file follow its image if it is a companion of one, or say once that it stays."""
        if not self.sorter.references_absent and self.outbox.follow(leave):
            return
        if not self.outbox.awaits_image(leave):
            self.log.left(leave)
            if leave.stamp is not None:
                self._corrections.keep(leave.path, leave.stamp)

    def _rebuild(self, job: int) -> None:
        if (problem := self._presence.problem()) is not None:
            event = events.RebuildFailed(problem, references_absent=True, job=job)
            self.log.rebuild_failed(event)
            self._tell(event)
            return
        self._ask(self.rebuilding.order(job, self._corrections.learnt))

    # ------------------------------------------------------------ questions, and what is asked of it

    @property
    def is_scanning(self) -> bool:
        """Tell whether a scan of all of Images/ is under way."""
        return self.scans.is_under_way

    @property
    def has_more_to_look_at(self) -> bool:
        """Tell whether anything has files left to look at."""
        return self.scans.has_more or self._corrections.is_under_way or self._references.scan.is_under_way

    @property
    def next_deadline(self) -> float:
        """When it has something to do though nothing was told; infinity where nothing waits for its time."""
        core = self.sorter.next_deadline()
        return min(float("inf") if core is None else core, self.scans.deadline, self._corrections.deadline)

    @property
    def has_moves(self) -> bool:
        """Tell whether there is something for ``flush`` to do."""
        return self.outbox.is_due

    @property
    def is_drained(self) -> bool:
        """Tell whether nothing is left to do until something else happens."""
        waits = self._corrections.has_moved or self.has_more_to_look_at or self.has_moves
        return not waits and self.sorter.is_drained

    @property
    def is_stuck(self) -> bool:
        """Tell whether nothing will move until somebody mends the references."""
        core = self.sorter
        if self.log.problem is not None and (core.prototypes is None or core.references_absent):
            return True
        return core.guard.reason is not None and not core.is_rebuilding

    @property
    def filing(self) -> Mover:
        """What moves its files; a dry run has none."""
        assert isinstance(self._mover, Mover)
        return self._mover

    @property
    def history(self) -> History:
        """What its journal can be asked."""
        return self._journal.history

    def rebuild(self, *, force: bool) -> None:
        """Build the prototypes anew; with ``force`` also where the reload gate would keep the old ones."""
        self.rebuilding.wish(force=force)
        self.receive(events.ReferencesTouched())

    @property
    def held_because(self) -> str | None:
        """Why the guard holds the dataset; None where it does not."""
        return self.sorter.guard.reason

    def release(self) -> str | None:
        """Let the dataset go that the guard holds; return why it was held, None where it was not."""
        if (reason := self.held_because) is not None:
            self.receive(events.DatasetReleased())
        return reason

    @property
    def problem(self) -> str | None:
        """Why nothing moves, in a sentence; None while all is well."""
        return self.held_because or self.log.problem

    @property
    def files_looked_at(self) -> int:
        """Count the looks at files in the folders of images since the start: by scans, for events and to settle."""
        return self.scans.count + self._corrections.files_looked_at

    def facts(self) -> dict[str, object]:
        """Return what ``sortd status`` shows of this dataset, as plain values."""
        generation, mode = self.rebuilding.last_generation, self.rebuilding.teaching.settings.mode
        facts = self.log.facts(self.sorter, generation=generation, mode=mode)
        return {**facts, "files_looked_at": self.files_looked_at}
