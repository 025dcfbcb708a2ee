"""A dataset at work: its core, and the hands that carry out what the core asks for.

Lives in the loop thread. Everything that enters is turned into events for the core; every command that comes out is
carried out here or handed to the worker. Moves are gathered and filed as one group a turn, see ``outbox.py``.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, time_ns

from sortd.journal import Journal
from sortd.journaling.history import GENERATION_FACT, GUARD_FACT, History
from sortd.layout import Area, Layout
from sortd.messages import (
    Command,
    DatasetAbsent,
    DatasetId,
    DatasetReleased,
    Embed,
    Embedded,
    Event,
    Hold,
    ImageGone,
    ImageHeld,
    ImageSeen,
    Inspect,
    Leave,
    LookRefused,
    Move,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    ReviewSeen,
    Scan,
    ScanFinished,
    ScanStarted,
    Stamp,
    StopRequested,
    Tick,
    Writer,
)
from sortd.metrics import Metrics
from sortd.moving.renaming import writer_of
from sortd.references import Teaching
from sortd.running.account import Account
from sortd.running.corrections import Correction
from sortd.running.filing import Filing
from sortd.running.outbox import Mover, Outbox
from sortd.running.patrol import Mended, Noticed, Patrol
from sortd.running.presence import Presence
from sortd.running.rebuilding import Rebuilding
from sortd.running.relocating import Order
from sortd.running.sweep import Sweep
from sortd.running.undoing import PutBack
from sortd.running.worker import Answer, EmbedJob, Job
from sortd.sorter import Sorter
from sortd.sorting.guard import GuardState
from sortd.sorting.refusals import Refusals
from sortd.sorting.settings import SorterSettings
from sortd.watch import Hint
from sortd.watching.scanning import is_below_temporary, stamp


class Dataset:
    """One dataset's core, scans, moves and log lines."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        identity: DatasetId,
        layout: Layout,
        settings: SorterSettings,
        teaching: Teaching,
        *,
        mover: Mover,
        journal: Journal | None,
        ask: Callable[[Job], None],
        metrics: Metrics,
        last_generation: int,
        guard: GuardState,
        needs_marker: bool = True,
    ) -> None:
        """Take the collaborators over; nothing is touched yet."""
        self.identity = identity
        self.layout = layout
        self.name = layout.name
        self.sorter = Sorter(settings, guard=guard)
        self.account = Account(self.name, metrics)
        self.rebuilding = Rebuilding(
            identity, layout, teaching, last_generation=last_generation, report=self.account.unreadable
        )
        self._mover, self._ask, self._journal = mover, ask, journal
        history = None if journal is None else journal.history
        self.outbox = Outbox(mover, self.account, history=history, root=layout.root)
        self._presence = Presence(layout, journal, needs_marker=needs_marker)
        self._patrol = None if journal is None else Patrol(layout, journal, self.account.unreadable)
        self._commands: deque[Command] = deque()
        self._sweep = Sweep(os.fspath(layout.area(Area.IMAGES)), self.account.unreadable)
        self._review = Sweep(os.fspath(layout.area(Area.REVIEW)), self.account.unreadable)
        self._foreign = Refusals()  # versions in Review/ that sortd did not put there
        is_noted = journal is not None and journal.history.fact(GUARD_FACT) is not None
        self._noted_guard, self._noted_generation = guard if is_noted else GuardState(), last_generation

    # ------------------------------------------------------------ what comes in

    def receive(self, event: Event) -> None:
        """Hand one event to the core and carry out what it asks for; moves wait for ``flush``."""
        self._commands.extend(self.sorter.receive(event, monotonic()))
        self._drain()

    def _drain(self) -> None:
        self._write_down()
        while self._commands:
            self._carry_out(self._commands.popleft())
        self.account.review_full(is_full=self.sorter.is_review_full)

    def _write_down(self) -> None:
        """Note what must survive however this run ends, before anything that follows from it is done.

        Raises:
            JournalError: it could not be made durable; the daemon must stop.
        """
        if self._journal is None:
            return
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
        if self._journal is not None:
            for path, mark in self._journal.history.held().items():
                self.receive(ImageHeld(os.path.join(self.layout.root, path), mark))
        if self.sorter.guard.reason is not None:
            self.account.held(self.sorter.guard.reason, self.layout.root)
        self.begin_scan()
        self.scan_review()

    def require_journal(self) -> None:
        """See that its journal stands where it was opened.

        Raises:
            JournalError: it was removed or replaced.
        """
        if self._journal is not None:
            self._journal.require_in_place()

    def tick(self, now: float) -> None:
        """Let the core act on deadlines that have passed."""
        deadline = self.sorter.next_deadline()
        if deadline is not None and deadline <= now:
            self.receive(Tick())

    def hint(self, hint: Hint) -> None:
        """Take a watcher's hint: look at what it names."""
        area = self.layout.area_of(hint.path)
        if area is Area.CLASES:
            self.receive(ReferencesTouched())
        elif area is Area.IMAGES:
            if hint.directory:
                self.begin_scan()
            elif not is_below_temporary(hint.path, os.fspath(self.layout.area(Area.IMAGES))):
                self._look(hint.path, closed=hint.closed)
                self._drain()
        elif area is Area.REVIEW:
            if hint.directory:
                self.scan_review()
            elif self.sorter.knows(hint.path) and not os.path.lexists(hint.path):
                self._look(hint.path, closed=hint.closed)
                self._drain()
        elif area is not None and self._patrol is not None and not hint.directory:
            self._note(self._patrol.look(area, hint.path))
        elif area is Area.DATASET:
            self.scan_handled()

    def scan_handled(self) -> None:
        """Begin to look for what the user did since with images that were handled: moved to another class, mended."""
        if self._patrol is not None:
            self._patrol.begin(time_ns())
            self._continue_patrol()

    def continue_looking(self) -> None:
        """Look at the next slice of what was handled, and of the references, where that is under way."""
        self._continue_comparing()
        self._continue_patrol()
        self._continue_review()

    def _continue_patrol(self) -> None:
        if self._patrol is None or not self._patrol.is_under_way:
            return
        if self._presence.problem() is not None:
            self._patrol.end()  # absent is not gone: all of it is looked at when it is back
            return
        for noticed in self._patrol.take():
            self._note(noticed)

    def _note(self, noticed: Noticed | None) -> None:
        match noticed:
            case Mended(path, mark):
                self.receive(ImageSeen(path, mark, is_aside=True))
            case Correction():
                self.account.corrected(noticed)
                if self.rebuilding.teaching.learns_from_corrections:
                    self.receive(ReferencesTouched())

    def answer(self, answer: Answer) -> None:
        """Take the worker's answer."""
        for event in answer.events:
            if isinstance(event, PrototypesBuilt):
                self.rebuilding.note(event.prototypes.generation)
                if answer.rebuilt is not None:
                    self.account.rebuilt(event.prototypes, answer.rebuilt, answer.seconds)
                self.account.decided_by(event.finetuned, answer.refusal)
            elif isinstance(event, RebuildFailed):
                if not event.is_lasting:
                    self.rebuilding.renew_wishes()
                self.account.rebuild_failed(event)
            elif isinstance(event, Embedded):
                self.account.embedded(event)
            self.receive(event)

    def reload(self, settings: SorterSettings, teaching: Teaching) -> None:
        """Take changed settings over."""
        self.rebuilding.reload(teaching)
        self.sorter.configure(settings, monotonic())

    # ------------------------------------------------------------ scans

    @property
    def is_scanning(self) -> bool:
        """Tell whether a scan is under way."""
        return self._sweep.is_under_way

    @property
    def has_more_to_look_at(self) -> bool:
        """Tell whether a scan, a patrol or a look at Review/ or the references has files left to look at."""
        is_patrolling = self._patrol is not None and self._patrol.is_under_way
        return self.is_scanning or is_patrolling or self.rebuilding.is_comparing or self._review.is_under_way

    @property
    def is_drained(self) -> bool:
        """Tell whether nothing is left to do until something else happens."""
        return not (self.has_more_to_look_at or self.has_moves) and self.sorter.is_drained

    @property
    def has_moves(self) -> bool:
        """Tell whether there is something for ``flush`` to do."""
        return self.outbox.is_due

    def begin_scan(self) -> None:
        """Begin to scan Images/, unless a scan is under way: then another one follows it."""
        if self._sweep.begin():
            self.receive(ScanStarted())

    def compare_references(self) -> None:
        """Begin to look whether Clases/ differs from what was last seen of it: a hint may have been lost."""
        self.rebuilding.compare()
        self._continue_comparing()

    def _continue_comparing(self) -> None:
        if self.rebuilding.has_reason():
            self.receive(ReferencesTouched())

    def continue_scan(self) -> None:
        """Take the next slice of the scan under way."""
        if not self._sweep.is_under_way:
            return
        for path, mark in self._sweep.take():
            self.receive(ImageSeen(path, mark))
        if self.sorter.is_overflowed:
            self._sweep.end()
        elif not self._sweep.is_under_way:
            self.receive(ScanFinished())
            self.account.scanned()
            if self._sweep.is_wanted_again:
                self.begin_scan()

    def scan_review(self) -> None:
        """Begin to look which images of Review/ are gone, and which are there of those that sortd put there."""
        if self._journal is not None and self._review.begin():
            self.receive(ScanStarted(in_review=True))

    def _continue_review(self) -> None:
        """Take the next slice of the look through Review/.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self._journal is None or not self._review.is_under_way:
            return
        for path, mark in self._review.take():
            generation = self._generation_of(path, mark, self._journal.history)
            if generation is not None:
                self.receive(ReviewSeen(path, mark, generation))
        if not self._review.is_under_way:
            self.account.review_full(is_full=self.sorter.is_review_full, is_all=True)
            self.receive(ScanFinished(in_review=True))
            if self._review.is_wanted_again:
                self.scan_review()

    def _generation_of(self, path: str, mark: Stamp, history: History) -> int | None:
        """Return the generation that could not decide an image in Review/; None: sortd did not put it there."""
        if self._foreign.has(path, mark):
            return None
        if self.sorter.knows(path) or not self.sorter.has_room_in_review:
            return 0  # the core notes that it was named, or that there is no room for it
        record = history.last_known(mark)
        if record is not None and os.path.join(self.layout.root, record.destination_path) == path:
            return record.grounds.generation
        self._foreign.note(path, mark)
        return None

    # ------------------------------------------------------------ what goes out

    def _carry_out(self, command: Command) -> None:
        match command:
            case Inspect(path):
                self._look(path, closed=False, inspect=True)
            case Embed(images):
                self._ask(EmbedJob(self.identity, images))
            case Rebuild(job):
                self._rebuild(job)
            case Scan():
                self.begin_scan()
            case Move():
                self.outbox.add(command)
            case Leave():
                if self.sorter.references_absent or not self.outbox.follow(command):
                    self._leave(command)
            case Hold(reason):
                self.account.held(reason, self.layout.root)

    def _leave(self, leave: Leave) -> None:
        self.account.left(leave)
        if self._patrol is not None and leave.stamp is not None:
            self._patrol.keep(leave.path, leave.stamp)

    def _look(self, path: str, *, closed: bool, inspect: bool = False) -> None:
        try:
            mark = stamp(path)
        except OSError as error:
            self.account.unreadable(error)
            self._commands.extend(self.sorter.receive(LookRefused(path), monotonic()))
            return
        if mark is None and self._presence.problem() is not None:
            return  # absent is not gone: what is known of it holds when it is back
        writer = (writer_of(path) or Writer.UNKNOWN) if inspect and mark is not None else None
        event = ImageGone(path) if mark is None else ImageSeen(path, mark, writer, closed)
        self._commands.extend(self.sorter.receive(event, monotonic()))

    def _rebuild(self, job: int) -> None:
        if (problem := self._presence.problem()) is not None:
            event = RebuildFailed(problem, references_absent=True, job=job)
            self.account.rebuild_failed(event)
            self._commands.extend(self.sorter.receive(event, monotonic()))
            return
        self._ask(self.rebuilding.order(job, None if self._patrol is None else self._patrol.learnt))

    def flush(self) -> None:
        """File the moves that were gathered, as one group, and log each."""
        if not self.outbox.is_due:
            return
        if (problem := self._presence.problem()) is not None:
            for failed in self.outbox.refuse(problem):
                self.receive(failed)
            self.receive(DatasetAbsent(problem))
            return
        for result in self.outbox.send():
            self.receive(result)

    def copied(self, orders: Sequence[Order]) -> list[PutBack]:
        """Take note of copies to another file system that have ended; return what was undone by them."""
        ended = self.outbox.end(orders)
        for result in ended:
            if not isinstance(result, PutBack):
                self.receive(result)
        return [result for result in ended if isinstance(result, PutBack)]

    def stop(self) -> None:
        """Begin nothing new; what is on its way to the disk is finished, but for long copies."""
        self.receive(StopRequested())
        for failed in self.outbox.give_up():
            self.receive(failed)

    @property
    def is_stuck(self) -> bool:
        """Tell whether nothing will move until somebody mends the references."""
        core = self.sorter
        is_blocked = core.prototypes is None or core.references_absent or core.guard.reason is not None
        return self.problem is not None and is_blocked

    @property
    def filing(self) -> Filing:
        """What moves its files; a rehearsal has none."""
        assert isinstance(self._mover, Filing)
        return self._mover

    @property
    def history(self) -> History:
        """What its journal can be asked; a rehearsal has none."""
        assert self._journal is not None
        return self._journal.history

    def rebuild(self, *, force: bool) -> None:
        """Build the prototypes anew; with ``force`` also where the reload gate would keep the old ones."""
        if force:
            self.rebuilding.force()
        self.receive(ReferencesTouched())

    @property
    def held_because(self) -> str | None:
        """Why the guard holds the dataset; None where it does not."""
        return self.sorter.guard.reason

    def release(self) -> str | None:
        """Let the dataset go that the guard holds; return why it was held, None where it was not."""
        reason = self.sorter.guard.reason
        if reason is not None:
            self.receive(DatasetReleased())
        return reason

    @property
    def problem(self) -> str | None:
        """Why nothing moves, in a sentence; None while all is well."""
        return self.sorter.guard.reason or self.account.problem

    def facts(self) -> dict[str, object]:
        """Return what ``sortd status`` shows of this dataset, as plain values."""
        return self.account.facts(
            self.sorter, generation=self.rebuilding.last_generation, mode=self.rebuilding.teaching.settings.mode
        )
