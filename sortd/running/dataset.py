"""A dataset at work: its core, and the hands that carry out what the core asks for.

Lives in the loop thread. Everything that enters is turned into events for the core; every command that comes out is
carried out here or handed to the worker. Moves are gathered and filed as one group a turn, see ``outbox.py``.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic, time_ns

from sortd.journal import Journal
from sortd.journaling.history import History
from sortd.layout import Area, Layout
from sortd.messages import (
    Command,
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
from sortd.sorting.settings import SorterSettings
from sortd.watch import Hint
from sortd.watching.scanning import is_below_temporary, scan, stamp


class Dataset:
    """One dataset's core, scans, moves and log lines."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        layout: Layout,
        settings: SorterSettings,
        teaching: Teaching,
        *,
        mover: Mover,
        journal: Journal | None,
        ask: Callable[[Job], None],
        metrics: Metrics,
        last_generation: int,
        needs_marker: bool = True,
        lock_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Take the collaborators over; nothing is touched yet."""
        self.layout = layout
        self.name = layout.name
        self.sorter = Sorter(settings, served_generation=last_generation)
        self.account = Account(self.name, metrics)
        self.rebuilding = Rebuilding(layout, teaching, last_generation=last_generation, report=self.account.unreadable)
        self._mover, self._ask, self._journal = mover, ask, journal
        history = None if journal is None else journal.history
        self.outbox = Outbox(mover, self.account, history=history, root=layout.root)
        self._presence = Presence(layout, journal, needs_marker=needs_marker, lock_problem=lock_problem)
        self._is_taken = False
        self._patrol = None if journal is None else Patrol(layout, journal, self.account.unreadable)
        self._commands: deque[Command] = deque()
        self._sweep = Sweep(os.fspath(layout.area(Area.IMAGES)), self.account.unreadable)

    # ------------------------------------------------------------ what comes in

    def receive(self, event: Event) -> None:
        """Hand one event to the core and carry out what it asks for; moves wait for ``flush``."""
        self._commands.extend(self.sorter.receive(event, monotonic()))
        self._drain()

    def _drain(self) -> None:
        while self._commands:
            self._carry_out(self._commands.popleft())

    def begin(self, held: Sequence[tuple[str, Stamp]], reviewed: Sequence[tuple[str, Stamp, int]]) -> None:
        """Tell the core what the journal remembers, and begin the first scan."""
        for path, mark in held:
            self.receive(ImageHeld(path, mark))
        for path, mark, generation in reviewed:
            self.receive(ReviewSeen(path, mark, generation))
        self.begin_scan()

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
        elif area is not None and self._patrol is not None and not hint.directory:
            self._note(self._patrol.look(area, hint.path))
        elif area is Area.DATASET:
            self.scan_handled()

    def check_lock(self) -> None:
        """Hold the dataset while another sortd has its lock, and take it up again when that one has ended."""
        problem = self.lock_problem()
        if (problem is not None) == self._is_taken:
            return
        self._is_taken = problem is not None
        if problem is None:
            self.receive(ReferencesTouched())
        else:
            self._refuse(problem)

    def _refuse(self, problem: str) -> None:
        """Move nothing until a rebuild finds the problem gone; say so."""
        event = RebuildFailed(problem, references_absent=True)
        self.account.rebuild_failed(event)
        self.receive(event)

    def scan_handled(self) -> None:
        """Begin to look for what the user did since with images that were handled: moved to another class, mended."""
        if self._patrol is not None:
            self._patrol.begin(time_ns())
            self._continue_patrol()

    def continue_looking(self) -> None:
        """Look at the next slice of what was handled, and of the references, where that is under way."""
        self._continue_comparing()
        self._continue_patrol()

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
        """Tell whether a scan, a patrol or a look at the references has files left to look at."""
        is_patrolling = self._patrol is not None and self._patrol.is_under_way
        return self.is_scanning or is_patrolling or self.rebuilding.is_comparing

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

    def scan_review(self) -> Iterator[tuple[str, Stamp]]:
        """Yield what stands in Review/, with its stamps."""
        return scan(os.fspath(self.layout.area(Area.REVIEW)), report=self.account.unreadable)

    # ------------------------------------------------------------ what goes out

    def _carry_out(self, command: Command) -> None:
        match command:
            case Inspect(path):
                self._look(path, closed=False, inspect=True)
            case Embed(images):
                self._ask(EmbedJob(self.name, images))
            case Rebuild():
                self._rebuild()
            case Scan():
                self.begin_scan()
            case Move():
                self.outbox.add(command)
            case Leave():
                if self.sorter.references_absent or not self.outbox.follow(command):
                    self._leave(command)
            case Hold(reason):
                self.account.held(reason)

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

    def _rebuild(self) -> None:
        if (problem := self._presence.problem()) is not None:
            event = RebuildFailed(problem, references_absent=True)
            self.account.rebuild_failed(event)
            self._commands.extend(self.sorter.receive(event, monotonic()))
            return
        self._ask(self.rebuilding.order(None if self._patrol is None else self._patrol.learnt))

    def flush(self) -> None:
        """File the moves that were gathered, as one group, and log each."""
        if not self.outbox.is_due:
            return
        if (problem := self._presence.problem()) is not None:
            for failed in self.outbox.refuse(problem):
                self.receive(failed)
            self.receive(RebuildFailed(problem, references_absent=True))
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

    def lock_problem(self) -> str | None:
        """Why another sortd has the dataset now, in a sentence; None where none has."""
        return self._presence.lock_problem()

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
    def problem(self) -> str | None:
        """Why nothing moves, in a sentence; None while all is well."""
        return self.sorter.guard.reason or self.account.problem

    def facts(self) -> dict[str, object]:
        """Return what ``sortd status`` shows of this dataset, as plain values."""
        return self.account.facts(
            self.sorter, generation=self.rebuilding.last_generation, mode=self.rebuilding.teaching.settings.mode
        )
