"""The scans of one dataset's Images/ and Review/ and the looks at single files: what they find is told to its core."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from time import monotonic

from sortd import events
from sortd.core.schedule import Throttle
from sortd.core.sorter import Sorter
from sortd.core.state import Refusals
from sortd.daemon.dataset_log import DatasetLog
from sortd.daemon.presence import Presence
from sortd.events import Stamp, Writer
from sortd.layout import Area, Layout
from sortd.moving.fs import writer_of
from sortd.names import Why, rule_below, rule_for_folder
from sortd.store.history import History
from sortd.watch.observer import FileEvent
from sortd.watch.scan import FolderScans, IncrementalScan, scan_steps, stamp, why_left, why_unfinished

LEFT_SECONDS = 5.0  # in which a file may be renamed before it is told of that its name is not looked at
TOLD_SLICE = 500  # files that are told of in one turn of the loop
MOST_LEFT = 100_000  # files that wait to be told of; the next scan finds the others
REVIEW_SLICE = 200  # images of Review/ looked at in one turn: each costs a question to the journal, some 0.1 ms


class LeftFiles:
    """What a scan or an event named in Images/ and nobody looks at: named in the log once, with the reason."""

    def __init__(self, root: str, log: DatasetLog, *, clock: Callable[[], float] = monotonic) -> None:
        """Begin with nothing to tell of the dataset at ``root``; ``clock`` tells seconds."""
        self._root, self._log, self._clock = root, log, clock
        self._seen: dict[str, float] = {}  # path, by when it was seen first

    @property
    def deadline(self) -> float:
        """When there is something to tell; infinity: nothing waits."""
        return next(iter(self._seen.values()), float("inf")) + LEFT_SECONDS

    def takes(self, path: str) -> bool:
        """Tell whether what an event names is left out by its name; if so, take note of it."""
        if rule_below(path, self._root) is None:
            return False
        self.note(path)
        return True

    def writer_of(self, path: str) -> Writer:
        """Tell whether a file that has held still may be taken for finished; say so of one that is not."""
        why = why_unfinished(path, self._root)
        if why is None:
            return writer_of(path)
        self._log.stays(path, why)
        return Writer.UNFINISHED

    def note(self, path: str, why: Why | None = None) -> None:
        """Take note of a path, if it was not told of before for this reason."""
        if len(self._seen) < MOST_LEFT and not (why is not None and self._log.has_told(path, why)):
            self._seen.setdefault(path, self._clock())

    def tell(self, *, at_once: bool = False) -> None:
        """Say why each that waited for its time stays, if it still stands there; ``at_once``: all of them."""
        if not at_once and self._clock() < self.deadline:
            return
        until = float("inf") if at_once else self._clock() - LEFT_SECONDS
        some = islice(self._seen.items(), None if at_once else TOLD_SLICE)
        for path in [path for path, seen in some if seen <= until]:
            del self._seen[path]
            try:
                why = why_left(path, self._root)
            except OSError as error:
                self._log.unreadable(error)
                continue
            if why is not None:
                self._log.stays(path, why)


class DatasetScans:
    """What looks at the files of one dataset, in slices."""

    def __init__(
        self,
        layout: Layout,
        sorter: Sorter,
        *,
        receive: Callable[[events.Event], None],
        log: DatasetLog,
        history: History,
        presence: Presence,
    ) -> None:
        """Prepare; ``receive`` hands an event to the core and carries out what that asks for."""
        self._root, self._sorter, self._receive, self._log = layout.root, sorter, receive, log
        self._history, self._presence = history, presence
        self.left_files = LeftFiles(os.fspath(layout.root), log)
        self._inbox = FolderScans(os.fspath(layout.area(Area.IMAGES)), log.unreadable, left=self.left_files.note)
        self._forgetting = Throttle(1.0)
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._looks: IncrementalScan[None] = IncrementalScan(self._look_at_wanted)
        self._missing: set[str] = set()
        review = os.fspath(layout.area(Area.REVIEW))
        self.review = IncrementalScan(
            lambda: scan_steps(review, report=log.unreadable, rule_at_top=rule_for_folder),
            most=REVIEW_SLICE,
            pause_seconds=1.0,
        )
        self._foreign = Refusals()  # versions in Review/ that sortd did not put there
        self.count = 0  # files that were looked at since the start

    @property
    def is_under_way(self) -> bool:
        """Tell whether a scan of all of Images/ is under way."""
        return self._inbox.whole.is_under_way

    @property
    def has_more(self) -> bool:
        """Tell whether there is something left to look at, or to be told of as missing."""
        return self._inbox.has_more or self.review.is_under_way or bool(self._wanted or self._missing)

    @property
    def deadline(self) -> float:
        """When there is something to do though nothing was told; infinity where nothing waits for its time."""
        return min(self.left_files.deadline, self.review.asked.deadline)

    # ------------------------------------------------------------ single files

    def event_in_inbox(self, event: FileEvent) -> None:
        """Look at what an event in Images/ is about, unless another look will see what happened."""
        if self.left_files.takes(event.path):
            return
        if event.directory:
            self._inbox.want(event.path, event.at)
            return
        will_look = self._sorter.looks_soon_at(event.path, monotonic())
        if event.closed or not (will_look or self._inbox.will_list(os.path.dirname(event.path))):
            self.look(event.path, closed=event.closed, since=event.at or None)

    def want(self, path: str) -> None:
        """Ask for a look that tells the core whether a file may be taken."""
        self._wanted[path] = None

    def take_looks(self) -> None:
        """Take the next slice of the looks that were asked for."""
        if self._wanted:
            self._looks.begin()
        self._looks.take()

    def _look_at_wanted(self) -> Iterator[None]:
        """Look at what was asked for: newest first, every other the oldest, as images are encoded."""
        while self._wanted:
            path, _ = self._wanted.popitem(last=len(self._wanted) % 2 == 0)
            self.look(path, closed=False, inspect=True)
            yield None

    def look(self, path: str, *, closed: bool, inspect: bool = False, since: float | None = None) -> None:
        """Look at one file and tell the core of it; with ``inspect`` also whether a writer has it open.

        ``closed``: a writer has just closed it; ``since``: when it came, on the monotonic clock.
        """
        try:
            mark = stamp(path)
        except OSError as error:
            self._log.unreadable(error)
            self._receive(events.LookRefused(path))
            return
        if mark is None:
            if path in self._sorter.images:
                self._missing.add(path)
            self.left_files.note(path)
            return
        self.count += 1
        self._missing.discard(path)
        writer = self.left_files.writer_of(path) if inspect else None
        self._receive(events.ImageSeen(path, mark, writer, closed, since=since))

    def tell_missing(self) -> None:
        """Let the core forget what was not there, unless all of it is away: asked once for all, after the looks."""
        missing, self._missing = self._missing, set()
        if missing and self._presence.problem() is None:  # else: absent is not gone, and what is known of it holds
            for path in missing:
                self._receive(events.ImageGone(path))

    # ------------------------------------------------------------ Images/

    def begin(self) -> None:
        """Begin to scan Images/, unless a scan is under way: then another one follows it."""
        if self._inbox.begin():
            self._receive(events.ScanStarted())

    def continue_inbox(self) -> None:
        """Take the next slice of the scans under way: of folders that events named, then of all of Images/."""
        below = self._inbox.take_below()
        self.count += len(below)
        for path, mark, since in below:
            self._receive(events.ImageSeen(path, mark, since=since or None))
        if self.is_under_way:
            found = self._inbox.take()
            self.count += len(found)
            for path, mark in found:
                self._receive(events.ImageSeen(path, mark))
            if self._sorter.images.overflowed:
                self._inbox.end()
            elif not self.is_under_way:
                self._receive(events.ScanFinished())
                self._log.scanned()
        if self._inbox.whole.is_wanted_again and not self.is_under_way:
            self.begin()
        self._forget_gone()

    def _forget_gone(self) -> None:
        """Let the core ask for what rested in folders that are gone, once for all that went within a second."""
        if self._inbox.gone:
            self._forgetting.ask()
        if not self._forgetting.is_due(now := monotonic()):
            return
        self._forgetting.begin(now)
        gone, self._inbox.gone = frozenset(self._inbox.gone), set()
        if self._presence.problem() is None:
            self._receive(events.FoldersGone(gone))
        self._forgetting.end(monotonic())

    # ------------------------------------------------------------ Review/

    def begin_review(self) -> None:
        """Begin to look which images of Review/ are gone, and which are there of those that sortd put there."""
        if self.review.begin():
            self._receive(events.ScanStarted(in_review=True))
        else:
            self.review.asked.ask()

    def continue_review(self) -> None:
        """Take the next slice of the look through Review/, or begin one that events asked for.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self.review.is_due:
            self.begin_review()
        if not self.review.is_under_way:
            return
        for path, found in self.review.take():
            if isinstance(found, Stamp) and (generation := self._generation_of(path, found)) is not None:
                self._receive(events.ReviewSeen(path, found, generation))
        if not self.review.is_under_way:
            self._log.review_full(is_full=self._sorter.images.is_review_full, is_all=True)
            self._receive(events.ScanFinished(in_review=True))

    def _generation_of(self, path: str, mark: Stamp) -> int | None:
        """Return the generation that could not decide an image; None: sortd did not put it there."""
        if self._foreign.has(path, mark):
            return None
        images = self._sorter.images
        if path in images or not images.has_room_in_review:
            return 0  # the core notes that it was named, or that there is no room for it
        record = self._history.last_known(mark)
        if record is not None and os.path.join(self._root, record.destination_path) == path:
            return record.move_reason.generation
        self._foreign.note(path, mark)
        return None
