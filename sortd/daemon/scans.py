"""The scans of Images/ and Review/, and the inspections of single files, of one dataset: events for its core."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from time import monotonic, time_ns

from sortd import events
from sortd.core.refusals import Refusals
from sortd.core.schedule import Throttle
from sortd.core.sorter import Sorter
from sortd.daemon.dataset_lock import Presence
from sortd.daemon.reporting import DatasetLog
from sortd.events import Stamp, Writer
from sortd.layout import Area, Layout, Why, rule_below, rule_for_folder
from sortd.moving.fs import writer_of
from sortd.store.history import History
from sortd.watch.inotify import local_device
from sortd.watch.scan import FolderScans, IncrementalScan, scan_steps, stamp, still_seconds, why_left, why_unfinished
from sortd.watch.watcher import FileEvent

LEFT_SECONDS = 5.0  # until a file that is left out is logged: it may be renamed
LOGGED_SLICE = 500  # files that are logged in one turn of the loop
MOST_LEFT = 100_000  # files that wait to be logged, at most
REVIEW_SLICE = 200  # images of Review/ in one turn: each costs a query of the journal, some 0.1 ms


class LeftFiles:
    """Files in Images/ that are not processed; each is logged once, with the reason."""

    def __init__(self, root: str, log: DatasetLog, *, clock: Callable[[], float] = monotonic) -> None:
        """Start empty."""
        self._root, self._log, self._clock = root, log, clock
        self._seen: dict[str, float] = {}  # path: when it was first seen

    @property
    def deadline(self) -> float:
        """When there is something to log; infinity if nothing waits."""
        return next(iter(self._seen.values()), float("inf")) + LEFT_SECONDS

    def takes(self, path: str) -> bool:
        """Return whether a path is left out by its name; if so, note it."""
        if rule_below(path, self._root) is None:
            return False
        self.note(path)
        return True

    def writer_of(self, path: str) -> Writer:
        """Return whether a settled file may be unfinished; log a control file that says so."""
        why = why_unfinished(path, self._root)
        if why is None:
            return writer_of(path)
        self._log.stays(path, why)
        return Writer.UNFINISHED

    def note(self, path: str, why: Why | None = None) -> None:
        """Note a path, unless it was logged for this reason."""
        if len(self._seen) < MOST_LEFT and not (why is not None and self._log.has_logged(path, why)):
            self._seen.setdefault(path, self._clock())

    def tell(self, *, at_once: bool = False) -> None:
        """Log why each path that has waited ``LEFT_SECONDS`` stays, if it still exists; ``at_once``: all paths."""
        if not at_once and self._clock() < self.deadline:
            return
        until = float("inf") if at_once else self._clock() - LEFT_SECONDS
        some = islice(self._seen.items(), None if at_once else LOGGED_SLICE)
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
    """Inspects the files of one dataset, in slices."""

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
        """Prepare; ``receive`` passes an event to the core and carries out its commands."""
        self._root, self._sorter, self._receive, self._log = layout.root, sorter, receive, log
        self._history, self._presence = history, presence
        self.left_files = LeftFiles(os.fspath(layout.root), log)

        def unreadable(error: OSError) -> None:
            if presence.needs_marker or not isinstance(error, FileNotFoundError):  # a dry run makes no folder
                log.unreadable(error)

        inbox = os.fspath(layout.area(Area.IMAGES))
        self._inbox = FolderScans(inbox, unreadable, left=self.left_files.note, inspect=self._writer_of_still_file)
        self._dated_device = local_device(inbox)  # until the first scan has ended; None: only changes count
        self._forgetting = Throttle(1.0)
        self._wanted: OrderedDict[str, None] = OrderedDict()
        self._looks: IncrementalScan[None] = IncrementalScan(self._look_at_wanted)
        self._missing: set[str] = set()
        review = os.fspath(layout.area(Area.REVIEW))
        self.review = IncrementalScan(
            lambda: scan_steps(review, report=unreadable, rule_at_top=rule_for_folder),
            most=REVIEW_SLICE,
            pause_seconds=1.0,
        )
        self._foreign = Refusals()  # versions in Review/ that the user put there
        self._filed = Refusals()  # versions in Images/ that were filed and stay
        self.count = 0  # inspected files since the start

    @property
    def is_under_way(self) -> bool:
        """Whether a scan of all of Images/ is running."""
        return self._inbox.whole.is_under_way

    @property
    def has_more(self) -> bool:
        """Whether anything is left to inspect or to report as missing."""
        return self._inbox.has_more or self.review.is_under_way or bool(self._wanted or self._missing)

    @property
    def deadline(self) -> float:
        """The time of the next work without an event; infinity if there is none."""
        return min(self.left_files.deadline, self.review.asked.deadline)

    def event_in_inbox(self, event: FileEvent) -> None:
        """Inspect the file of an event in Images/, unless a scheduled inspection or scan will do it."""
        if self.left_files.takes(event.path):
            return
        if event.directory:
            self._inbox.want(event.path, event.at)
            return
        will_look = self._sorter.looks_soon_at(event.path, monotonic())
        if event.closed or not (will_look or self._inbox.will_list(os.path.dirname(event.path))):
            self.look(event.path, closed=event.closed, since=event.at or None)

    def want(self, path: str) -> None:
        """Schedule an inspection."""
        self._wanted[path] = None

    def take_looks(self) -> None:
        """Take the next slice of the scheduled inspections."""
        if self._wanted:
            self._looks.begin()
        self._looks.take()

    def _look_at_wanted(self) -> Iterator[None]:
        """Inspect the scheduled files: alternately the newest and the oldest."""
        while self._wanted:
            path, _ = self._wanted.popitem(last=len(self._wanted) % 2 == 0)
            self.look(path, closed=False, inspect=True)
            yield None

    def look(self, path: str, *, closed: bool, inspect: bool = False, since: float | None = None) -> None:
        """Inspect one file and report it to the core; ``inspect``: including whether a writer has it open.

        ``closed``: it was just closed after writing; ``since``: when it arrived, on the monotonic clock.
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
        if self._is_filed(path, mark):
            return
        writer = self.left_files.writer_of(path) if inspect else None
        self._receive(events.ImageSeen(path, mark, writer, closed, since=since))

    def tell_missing(self) -> None:
        """Let the core forget missing files, unless the whole dataset is absent, or was when they were looked for."""
        missing, self._missing = self._missing, set()
        if not missing or self._presence.problem() is not None:
            return
        for path in missing:
            self.look(path, closed=False)
        gone, self._missing = self._missing, set()
        if gone and self._presence.problem() is None:
            for path in gone:
                self._receive(events.ImageGone(path))

    def begin(self) -> None:
        """Start a scan of Images/; if one is running, schedule another one after it."""
        if self._inbox.begin():
            self._receive(events.ScanStarted())

    def continue_inbox(self) -> None:
        """Take the next slices of the scans of folders that events named, and of all of Images/."""
        below = self._inbox.take_below()
        self.count += len(below)
        for path, mark, since in below:
            if not self._is_filed(path, mark):
                self._receive(events.ImageSeen(path, mark, since=since or None))
        if self.is_under_way:
            found = self._inbox.take()
            self.count += len(found)
            for path, mark, writer in found:
                if self._is_filed(path, mark):
                    continue
                self._receive(events.ImageSeen(path, mark, writer, still_seconds=self._still_seconds(mark)))
            if self._sorter.images.overflowed:
                self._inbox.end()
            elif not self.is_under_way:
                self._dated_device = None
                self._receive(events.ScanFinished())
                self._log.scanned()
        if self._inbox.whole.is_wanted_again and not self.is_under_way:
            self.begin()
        self._forget_gone()

    def _is_filed(self, path: str, mark: Stamp) -> bool:
        """Return whether this version in Images/ was filed and stays; asked of the journal once for each version."""
        if path in self._sorter.images:
            return False
        if self._filed.has(path, mark):
            return True
        folder, _, name = os.path.relpath(path, self._root).rpartition("/")
        if not self._history.is_filed_in_place(mark, folder, name):
            return False
        self._filed.note(path, mark)
        return True

    def _still_seconds(self, mark: Stamp) -> float:
        """Return for how long a file of the first scan has not changed; 0 if its times are of another clock."""
        return still_seconds(mark, time_ns()) if mark.device == self._dated_device else 0.0

    def _writer_of_still_file(self, path: str, mark: Stamp) -> Writer | None:
        """Return the writer of a file that has settled by its times; None if it has to wait, or is known."""
        if self._still_seconds(mark) < self._sorter.settle_seconds or path in self._sorter.images:
            return None
        return self.left_files.writer_of(path)

    def _forget_gone(self) -> None:
        """Let the core ask for images in folders that are gone, at most once a second."""
        if self._inbox.gone:
            self._forgetting.ask()
        if not self._forgetting.is_due(now := monotonic()):
            return
        self._forgetting.begin(now)
        gone, self._inbox.gone = frozenset(self._inbox.gone), set()
        if self._presence.problem() is None:
            self._receive(events.FoldersGone(gone))
        self._forgetting.end(monotonic())

    def begin_review(self) -> None:
        """Start a scan of Review/ for images that are gone, and for those that sortd put there."""
        if self.review.begin():
            self._receive(events.ScanStarted(in_review=True))
        else:
            self.review.asked.ask()

    def continue_review(self) -> None:
        """Take the next slice of the scan of Review/; start one that events asked for."""
        if self.review.is_due:
            self.begin_review()
        if not self.review.is_under_way:
            return
        for path, found in self.review.take():
            if isinstance(found, Stamp) and (seen := self._seen_in_review(path, found)) is not None:
                self._receive(seen)
        if not self.review.is_under_way:
            self._log.review_full(is_full=self._sorter.images.is_review_full, is_all=True)
            self._receive(events.ScanFinished(in_review=True))

    def _seen_in_review(self, path: str, mark: Stamp) -> events.ReviewSeen | None:
        """Return that an image was seen, with what its record says; None if sortd did not put it there."""
        if self._foreign.has(path, mark):
            return None
        images = self._sorter.images
        if path in images or not images.has_room_in_review:
            return events.ReviewSeen(path, mark)  # the core notes that it was found, or that it is full
        record = self._history.last_known(mark)
        if record is not None and os.path.join(self._root, record.destination_path) == path:
            reason = record.move_reason
            return events.ReviewSeen(path, mark, reason.generation, reason.reason in events.LIKE_NO_CLASS)
        self._foreign.note(path, mark)
        return None
