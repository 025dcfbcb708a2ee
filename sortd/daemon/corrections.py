"""Corrections: images that sortd put into one class and that the user moved to another; mended images, too.

A file in ``Dataset/<class>/`` that the journal knows, by inode or by content, as put elsewhere was moved by a person.
Dataset/ may hold a million images, so they are looked at slice by slice, and only where something changed. What is
found in a slice is recorded in one commit. Nothing is written anywhere but in the journal.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from time import monotonic, time_ns

from sortd.daemon.rejected import Rejects
from sortd.events import Stamp
from sortd.files import open_regular
from sortd.layout import Area, Layout
from sortd.moving.plan import PLACES_FACT, images_apart
from sortd.names import rule_below, rule_for_folder
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import Record
from sortd.watch.scan import Clock, IncrementalScan, looked_at_until, scan_steps, stamp

SCANNED_FACT = "corrections_scanned_at"
"""The journal's note of when Dataset/ was last looked through, in nanoseconds since the epoch."""

CHUNK_BYTES = 4 << 20  # of a file that are hashed between two chances to stop
HANDLED_SLICE = 500  # files looked at in one turn of the loop, at most: two milliseconds where none changed
MOST_WANTED = 20_000  # single files to be looked at; where more changed, everything is looked through
PAUSE_SECONDS = 1.0  # between two looks that events asked for: much of what a storm of renames names is gone by then
MOST_FOLLOWED = 50  # images whose companions are looked for in one turn of the loop
FOLLOW_NS = 2 * 10**9  # after a person moved an image, in which its companions are left alone

_HANDLED = frozenset({Area.DATASET.value, Area.REVIEW.value, Area.REJECTED.value})


@dataclass(frozen=True, slots=True)
class Correction:
    """An image that a person moved: from what sortd had decided to what it is."""

    path: str
    label: str
    corrected: str
    was_filed: bool


@dataclass(frozen=True, slots=True)
class Mended:
    """An image in Rejected/ that is to be tried again: another version than was set aside, or a limit was raised."""

    path: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A handled image that the journal knows at another place, where nothing stands any more."""

    path: str
    record: Record
    relative: str

    @property
    def corrected(self) -> str:
        """The class that it was found in; the first one again for an image that is back in its place."""
        is_home = self.relative == self.record.destination_path
        return (self.record.move_reason.label or "") if is_home else self.relative.split("/")[1]


class CorrectionScanner:
    """Notices what the user did with the handled images of one dataset; one look through them at a time."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        report: Callable[[OSError], None],
        *,
        clock: Clock = monotonic,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare; ``report`` is told what cannot be looked at, ``limits`` are for ``Rejects``."""
        self._layout, self._journal, self._report = layout, journal, report
        self._rejects = Rejects(layout, journal, limits)
        self._moved: dict[int, tuple[Record, str]] = {}  # by record: images that a person moved, and where they are
        self._wanted: OrderedDict[str, Area] = OrderedDict()
        self._singles: IncrementalScan[Misplaced | Mended] = IncrementalScan(
            self._look_at_wanted, most=HANDLED_SLICE, pause_seconds=PAUSE_SECONDS, clock=clock
        )
        self._all: IncrementalScan[Misplaced | Mended] = IncrementalScan(
            self._look_at_all, most=HANDLED_SLICE, pause_seconds=PAUSE_SECONDS, clock=clock
        )
        self._began_ns = self._since_ns = 0
        self._mended: Iterator[tuple[str, Stamp] | None] = iter(())
        self._wanted_at: int | None = None
        self._looked_at = 0

    def want(self, area: Area, path: str) -> None:
        """Let one handled file be looked at: at once, or with all that are wanted after a pause."""
        if len(self._wanted) < MOST_WANTED:
            self._wanted[path] = area
            self._singles.asked.ask()
        else:
            self._wanted.clear()
            self.ask()

    def ask(self) -> None:
        """Let everything be looked through, once for all that ask: soon, but not again and again."""
        self._all.asked.ask()

    @property
    def deadline(self) -> float:
        """When what was asked for is to begin, on the clock; infinity where nobody asked, or looks are under way."""
        if self.is_under_way:
            return float("inf")
        return min(self._all.asked.deadline, self._singles.asked.deadline)

    @property
    def has_moved(self) -> bool:
        """Tell whether images were found that a person moved, and ``take_moved`` has not told of yet."""
        return bool(self._moved)

    def take_moved(self, now_ns: int) -> list[tuple[Record, str]]:
        """Return images that a person moved: what had put each into its place, and where it is, as ``moved`` says.

        One that was moved just now waits: a file manager takes its companions along one after the other.
        """
        taken = []
        for record, place in list(islice(self._moved.values(), MOST_FOLLOWED)):
            try:
                changed_ns = os.lstat(self._layout.root / place).st_ctime_ns
            except OSError:
                changed_ns = 0  # gone again
            if 0 <= now_ns - changed_ns < FOLLOW_NS:
                continue
            del self._moved[record.id]
            taken += [(record, place)] if changed_ns else []
        return taken

    def keep(self, path: str, refused: Stamp) -> None:
        """Note that a file in Rejected/ was refused again; see ``Rejects.keep``."""
        self._rejects.keep(path, refused)

    def learnt(self) -> tuple[tuple[str, str], ...]:
        """Return every correction: the label, and the path where the image stood then."""
        return corrected_images(self._layout, self._journal.history)

    @property
    def files_looked_at(self) -> int:
        """Count the files that were looked at since the start."""
        return self._looked_at + self._rejects.files_scanned

    @property
    def is_under_way(self) -> bool:
        """Tell whether files are left to look at."""
        return self._all.is_under_way or self._singles.is_under_way

    def begin(self, now_ns: int) -> None:
        """Begin; where one is under way another one follows it, since it may have passed what happened just now.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self._all.is_under_way:
            self._wanted_at = now_ns
            return
        self._began_ns = now_ns
        self._since_ns = looked_at_until(self._journal.history.number(SCANNED_FACT), now_ns)
        self._mended = self._rejects.scan(now_ns)
        self._all.begin()

    def begin_asked(self) -> None:
        """Begin what events asked for, where its time has come: files that they named, and a look through all."""
        if self._singles.is_due:
            self._singles.begin()
        if self._all.is_due:
            self.begin(time_ns())

    def end(self) -> None:
        """Look at no more; the next scan begins where this one did."""
        self._all.end()
        self._singles.end()
        self._wanted_at = None
        self._wanted.clear()

    def take(self) -> list[Correction | Mended]:
        """Look at the next slice; return what was noticed.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        if self._singles.is_under_way:
            return self._noticed(self._singles.take())
        if not self._all.is_under_way:
            return []
        noticed = self._noticed(self._all.take())
        if not self._all.is_under_way:
            self._journal.note(SCANNED_FACT, str(self._began_ns))  # once what was found is recorded
            again, self._wanted_at = self._wanted_at, None
            if again is not None:
                self.begin(again)
        return noticed

    def _noticed(self, looks: list[Misplaced | Mended]) -> list[Correction | Mended]:
        misplaced = [look for look in looks if isinstance(look, Misplaced)]
        return [*self.record(misplaced), *(look for look in looks if isinstance(look, Mended))]

    def _look_at_wanted(self) -> Iterator[Misplaced | Mended | None]:
        while self._wanted:
            path, area = self._wanted.popitem(last=False)
            self._looked_at += 1
            if area is Area.REJECTED and (found := self._rejects.look(path)) is not None:
                yield Mended(path, found)
            else:
                yield from self.look(path)
            yield None

    def _look_at_all(self) -> Iterator[Misplaced | Mended | None]:
        for place in images_apart(self._journal.history):
            yield from self.look(os.path.join(self._layout.root, place))
        for path in self._changed_since(self._since_ns):
            if path is not None:
                yield from self.look(path)
            yield None
        for mended in self._mended:
            yield None if mended is None else Mended(*mended)

    def look(self, path: str) -> Iterator[Misplaced | None]:
        """Look at a handled file; yield it if a person moved it there, and None while more is to be read of it.

        Raises:
            JournalError: the journal cannot be read.
        """
        relative = os.path.relpath(path, self._layout.root).split(os.sep)
        is_elsewhere = len(relative) < (2 if relative[0] == Area.REJECTED else 3) or relative[0] not in _HANDLED
        if is_elsewhere or rule_below(path, os.fspath(self._layout.root)) is not None:
            return
        try:
            found = stamp(path)
        except OSError as error:
            self._report(error)
            return
        record, place = None if found is None else (yield from self._record(path, found)), "/".join(relative)
        if record is not None and self._was_moved(record, place):
            yield Misplaced(path, record, place)

    def _was_moved(self, record: Record, place: str) -> bool:
        """Tell whether a person moved an image from where sortd had put it, be it there and back again."""
        if record.destination_path == place:
            return self._journal.history.fact(f"{PLACES_FACT}{record.id}") is not None
        try:
            os.lstat(os.path.join(self._layout.root, record.destination_path))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # a disk that does not answer says nothing
        return False  # a copy or a second link: the image still stands where sortd put it

    def record(self, misplaced: Sequence[Misplaced]) -> list[Correction]:
        """Note in one commit what was found; return the corrections that are news.

        Raises:
            JournalError: the journal cannot be written.
        """
        self._moved |= {one.record.id: (one.record, one.relative) for one in misplaced}
        misplaced = [one for one in misplaced if one.relative.startswith(f"{Area.DATASET}/")]
        found = [(one.record, one.corrected, one.relative) for one in misplaced]
        news = self._journal.record_corrections(found) if found else []
        return [
            Correction(one.path, label, one.corrected, one.record.destination_path.startswith(f"{Area.DATASET}/"))
            for one, is_news in zip(misplaced, news, strict=True)
            if is_news and one.corrected != (label := one.record.move_reason.label or "")
        ]

    def _record(self, path: str, found: Stamp) -> Generator[None, None, Record | None]:
        """Return what put this very file into its place, or one of its name and bytes: it was copied and removed."""
        known = self._journal.history.last_known(found)
        if known is not None:
            return known
        named = self._journal.history.last_named(os.path.basename(path), found.size)
        if named is None or not named.move_reason.content:
            return None
        content = hashlib.sha256()
        try:
            with open(open_regular(path), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    content.update(chunk)
                    yield None
        except OSError as error:
            self._report(error)
            return None
        return named if content.hexdigest() == named.move_reason.content else None

    def _changed_since(self, since_ns: int) -> Iterator[str | None]:
        """Yield the path of each image that changed, and None for whatever else was looked at.

        A rename changes the folder's mtime and the file's ctime, see rename(2) and inode(7).
        """
        areas = [os.fspath(self._layout.area(area)) for area in (Area.DATASET, Area.REVIEW, Area.REJECTED)]

        def listed(folder: str) -> AbstractContextManager[Iterator["os.DirEntry[str]"]]:
            if folder in areas[:2]:
                return os.scandir(folder)
            if folder not in areas and os.lstat(folder).st_mtime_ns < since_ns:
                return nullcontext(iter(()))
            return _files_in(folder)

        def report(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                self._report(error)

        for area in areas:
            for step in scan_steps(area, report=report, rule_at_top=rule_for_folder, scandir=listed):
                match step:
                    case (path, Stamp(ctime_ns=changed_ns)):
                        self._looked_at += 1
                        yield path if changed_ns >= since_ns else None
                    case _:
                        yield None


@contextmanager
def _files_in(folder: str) -> Iterator[Iterator["os.DirEntry[str]"]]:
    """List what stands in a folder, but for folders; lazily, since there may be a million files."""
    with os.scandir(folder) as entries:
        yield (entry for entry in entries if not entry.is_dir(follow_symlinks=False))


def corrected_images(layout: Layout, history: History) -> tuple[tuple[str, str], ...]:
    """Return the label of each corrected image, and the path where it stood when it was noticed.

    Raises:
        JournalError: the journal cannot be read.
    """
    root = os.fspath(layout.root)
    return tuple((label, os.path.join(root, path)) for _, label, path, _ in history.corrections())
