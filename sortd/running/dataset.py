"""A dataset at work: its core, and the hands that carry out what the core asks for.

Lives in the loop thread. Everything that enters is turned into events for the core; every command that comes out is
carried out here or handed to the worker. Moves are gathered and filed as one group a turn, see ``outbox.py``.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    FoldersGone,
    Hold,
    ImageGone,
    ImageHeld,
    ImageSeen,
    Inspect,
    Leave,
    Move,
    PrototypesBuilt,
    Rebuild,
    RebuildFailed,
    ReferencesTouched,
    ReviewSeen,
    Scan,
    ScanFinished,
    ScanStarted,
    StopRequested,
    Tick,
)
from sortd.metrics import Metrics
from sortd.references import ReferenceSettings
from sortd.running.account import Account
from sortd.running.corrections import Correction
from sortd.running.filing import Filing
from sortd.running.left_files import LeftFiles
from sortd.running.looks import Looks
from sortd.running.outbox import Mover, Outbox
from sortd.running.patrol import Mended, Noticed, Patrol
from sortd.running.presence import Presence
from sortd.running.rebuilding import Rebuilding
from sortd.running.relocating import Order
from sortd.running.review_scan import ReviewScan
from sortd.running.sweep import Sweep
from sortd.running.undoing import PutBack
from sortd.running.worker import Answer, EmbedJob, Job
from sortd.sorter import Sorter
from sortd.sorting.guard import GuardState
from sortd.sorting.rounds import Throttle
from sortd.sorting.settings import SorterSettings
from sortd.watch import Hint


class Dataset:
    """One dataset's core, scans, moves and log lines."""

    def __init__(  # noqa: PLR0913 -- its collaborators, each named
        self,
        identity: DatasetId,
        layout: Layout,
        settings: SorterSettings,
        teaching: ReferenceSettings,
        *,
        mover: Mover,
        journal: Journal | None,
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
        self.account = Account(self.name, metrics)
        self.rebuilding = Rebuilding(
            identity, layout, teaching, last_generation=last_generation, report=self.account.unreadable
        )
        self._mover, self._ask, self._journal = mover, ask, journal
        history = None if journal is None else journal.history
        self.outbox = Outbox(mover, self.account, history=history, root=layout.root)
        self._presence = Presence(layout, journal, needs_marker=needs_marker, lock_problem=lock_problem)
        self._is_taken = False
        self._patrol = None if journal is None else Patrol(layout, journal, self.account.unreadable, limits=limits)
        self._commands: deque[Command] = deque()
        self._gone = Throttle(1.0)
        self.left_files = LeftFiles(os.fspath(layout.root), self.account)
        self._looks = Looks(self._tell, self.sorter.knows, self.left_files, self.account.unreadable)
        self._sweep = Sweep(os.fspath(layout.area(Area.IMAGES)), self.account.unreadable, left=self.left_files.note)
        self._review = None if history is None else ReviewScan(layout, history, self.account.unreadable)
        is_noted = journal is not None and journal.history.fact(GUARD_FACT) is not None
        self._noted_guard, self._noted_generation = guard if is_noted else GuardState(), last_generation

    def receive(self, event: Event) -> None:
        """Hand one event to the core and carry out what it asks for; moves wait for ``flush``."""
        self._tell(event)
        self._drain()

    def _tell(self, event: Event) -> None:
        """Hand one event to the core; what it asks for is carried out with the next event."""
        self._commands.extend(self.sorter.receive(event, monotonic()))

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
        """Let the core act on deadlines that have passed, and take the next slice of the looks that it asked for."""
        self._tell_missing()
        deadline = self.sorter.next_deadline()
        if deadline is not None and deadline <= now:
            self.receive(Tick())
        self._looks.take()
        self._drain()
        self.left_files.tell()

    def hint(self, hint: Hint) -> None:
        """Take a watcher's hint: note what is to be looked at; a file in Images/ is looked at now."""
        area = self.layout.area_of(hint.path)
        if area is Area.CLASES:
            self.receive(ReferencesTouched())
        elif area is Area.IMAGES:
            self._hint_inbox(hint)
        elif area is Area.REVIEW:
            self._hint_review(hint)
        elif area is not None and self._patrol is not None:
            if not hint.directory:
                self._patrol.want(area, hint.path)
            elif area is Area.DATASET:
                self._patrol.ask()

    def _hint_review(self, hint: Hint) -> None:
        if hint.directory:
            if self._review is not None:
                self._review.asked.ask()
        elif os.path.lexists(hint.path):
            if self._patrol is not None:
                self._patrol.want(Area.REVIEW, hint.path)
        elif self.sorter.knows(hint.path):
            self._looks.look(hint.path, closed=hint.closed)
            self._drain()

    def _hint_inbox(self, hint: Hint) -> None:
        if self.left_files.takes(hint.path):
            return
        if hint.directory:
            self._sweep.want(hint.path, hint.at)
        # Unless another look than this hint's will see what happened, within the settle time:
        elif hint.closed or not (
            self.sorter.looks_soon_at(hint.path, monotonic()) or self._sweep.will_list(os.path.dirname(hint.path))
        ):
            self._looks.look(hint.path, closed=hint.closed, since=hint.at or None)
            self._drain()

    def check_lock(self) -> None:
        """Hold the dataset while another sortd has its lock, and take it up again when that one has ended."""
        problem = self.lock_problem()
        if (problem is not None) == self._is_taken:
            return
        self._is_taken = problem is not None
        if problem is not None:
            self.account.rebuild_failed(RebuildFailed(problem, references_absent=True, job=0))
        self.receive(ReferencesTouched() if problem is None else DatasetAbsent(problem))

    def scan_handled(self) -> None:
        """Begin to look for what the user did since with images that were handled: moved to another class, mended."""
        if self._patrol is not None:
            self._patrol.begin(time_ns())

    def continue_looking(self) -> None:
        """Look at the next slice of what was handled, and of the references, where that is under way."""
        self._continue_comparing()
        self._continue_patrol()
        self._continue_review()
        if self._patrol is not None and (moved := self._patrol.take_moved(time_ns())):
            self.outbox.follow_images(moved)

    def _continue_patrol(self) -> None:
        if self._patrol is None:
            return
        self._patrol.begin_asked()
        if not self._patrol.is_under_way:
            return
        if self._presence.problem() is not None:
            self._patrol.end()  # absent is not gone: all of it is looked at when it is back
            return
        for noticed in self._patrol.take():
            self._note(noticed)

    def _note(self, noticed: Noticed) -> None:
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

    def reload(self, settings: SorterSettings, teaching: ReferenceSettings) -> None:
        """Take changed settings over."""
        self.rebuilding.reload(teaching)
        self.sorter.configure(settings, monotonic())

    @property
    def is_scanning(self) -> bool:
        """Tell whether a scan of all of Images/ is under way."""
        return self._sweep.is_under_way

    @property
    def has_more_to_look_at(self) -> bool:
        """Tell whether a scan, a patrol or a look at Review/ or the references has files left to look at."""
        is_patrolling = self._patrol is not None and self._patrol.is_under_way
        is_looking = self.is_scanning or self._sweep.has_more or self._looks.has_more
        is_reviewing = self._review is not None and self._review.is_under_way
        return is_looking or is_patrolling or is_reviewing or self.rebuilding.is_comparing

    @property
    def next_deadline(self) -> float:
        """When it has something to do though nothing was told; infinity where nothing waits for its time."""
        core = self.sorter.next_deadline()
        times = [self.left_files.deadline] if core is None else [self.left_files.deadline, core]
        times += [] if self._patrol is None else [self._patrol.deadline]
        times += [] if self._review is None else [self._review.asked.deadline]
        return min(times, default=float("inf"))

    @property
    def is_drained(self) -> bool:
        """Tell whether nothing is left to do until something else happens."""
        waits = self._patrol is not None and self._patrol.has_moved
        return not (waits or self.has_more_to_look_at or self.has_moves) and self.sorter.is_drained

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

    def _continue_comparing(self) -> None:
        if self.rebuilding.has_reason():
            self.receive(ReferencesTouched())

    def continue_scan(self) -> None:
        """Take the next slice of the scans under way: of folders that hints named, then of all of Images/."""
        below = self._sweep.take_below()
        self._looks.count += len(below)
        for path, mark, since in below:
            self.receive(ImageSeen(path, mark, since=since or None))
        if self._sweep.is_under_way:
            found = self._sweep.take()
            self._looks.count += len(found)
            for path, mark in found:
                self.receive(ImageSeen(path, mark))
            if self.sorter.is_overflowed:
                self._sweep.end()
            elif not self._sweep.is_under_way:
                self.receive(ScanFinished())
                self.account.scanned()
        if self._sweep.is_wanted_again and not self._sweep.is_under_way:
            self.begin_scan()
        self._forget_gone()

    def _forget_gone(self) -> None:
        """Let the core ask for what rested in folders that are gone, once for all that went within a second."""
        if self._sweep.has_gone:
            self._gone.ask()
        if not self._gone.is_due(now := monotonic()):
            return
        self._gone.begin(now)
        gone = self._sweep.take_gone()
        if self._presence.problem() is None:
            self.receive(FoldersGone(gone))
        self._gone.end(monotonic())

    def scan_review(self) -> None:
        """Begin to look which images of Review/ are gone, and which are there of those that sortd put there."""
        if self._review is not None and self._review.begin():
            self.receive(ScanStarted(in_review=True))

    def _continue_review(self) -> None:
        """Take the next slice of the look through Review/, or begin one that hints asked for.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self._review is None:
            return
        if self._review.asked.is_due(monotonic()):
            self.scan_review()
        if not self._review.is_under_way:
            return
        for path, mark, generation in self._review.take(self.sorter):
            self.receive(ReviewSeen(path, mark, generation))
        if not self._review.is_under_way:
            self.account.review_full(is_full=self.sorter.is_review_full, is_all=True)
            self.receive(ScanFinished(in_review=True))

    def _carry_out(self, command: Command) -> None:
        match command:
            case Inspect(path):
                self._looks.want(path)
            case Embed(images):
                self._ask(EmbedJob(self.identity, images))
            case Rebuild(job):
                self._rebuild(job)
            case Scan():
                self.begin_scan()
            case Move():
                self.outbox.add(command)
            case Leave():
                stays = self.sorter.references_absent or not self.outbox.follow(command)
                if stays and not self.outbox.awaits_image(command):
                    self._leave(command)
            case Hold(reason):
                self.account.held(reason, self.layout.root)

    def _leave(self, leave: Leave) -> None:
        self.account.left(leave)
        if self._patrol is not None and leave.stamp is not None:
            self._patrol.keep(leave.path, leave.stamp)

    def _tell_missing(self) -> None:
        """Let the core forget what was not there, unless all of it is away: asked once for all, after the looks."""
        missing = self._looks.take_missing()
        if missing and self._presence.problem() is None:  # else: absent is not gone, and what is known of it holds
            for path in missing:
                self.receive(ImageGone(path))

    def _rebuild(self, job: int) -> None:
        if (problem := self._presence.problem()) is not None:
            event = RebuildFailed(problem, references_absent=True, job=job)
            self.account.rebuild_failed(event)
            self._tell(event)
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
        put_back: list[PutBack] = []
        for result in self.outbox.end(orders):
            if isinstance(result, PutBack):
                put_back.append(result)
            else:
                self.receive(result)
        return put_back

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
        if self.account.problem is not None and (core.prototypes is None or core.references_absent):
            return True
        return core.guard.reason is not None and not core.is_rebuilding

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
        if (reason := self.sorter.guard.reason) is not None:
            self.receive(DatasetReleased())
        return reason

    @property
    def problem(self) -> str | None:
        """Why nothing moves, in a sentence; None while all is well."""
        return self.sorter.guard.reason or self.account.problem

    @property
    def files_looked_at(self) -> int:
        """Count the looks at files in the folders of images since the start: by scans, for hints and to settle."""
        return self._looks.count + (0 if self._patrol is None else self._patrol.files_looked_at)

    def facts(self) -> dict[str, object]:
        """Return what ``sortd status`` shows of this dataset, as plain values."""
        facts = self.account.facts(
            self.sorter, generation=self.rebuilding.last_generation, mode=self.rebuilding.teaching.settings.mode
        )
        return {**facts, "files_looked_at": self.files_looked_at}
