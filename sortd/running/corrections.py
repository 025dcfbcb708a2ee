"""Corrections: images that sortd put into one class and that the user moved to another.

A file that stands in ``Dataset/<class>/`` and that the journal knows, by inode or by content, as put elsewhere was
moved by a person: the best teaching there is. Nothing is written anywhere but in the journal.
"""

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from stat import S_ISDIR, S_ISREG

from sortd.files import open_regular
from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.moving.plan import PLACES_FACT, images_apart
from sortd.names import rule_below, rule_for, rule_for_folder
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import Record
from sortd.watching.scanning import stamp

SCANNED_FACT = "corrections_scanned_at"
"""The journal's note of when Dataset/ was last looked through, in nanoseconds since the epoch."""

_HANDLED = frozenset({Area.DATASET.value, Area.REVIEW.value, Area.REJECTED.value})

CLOCK_SLACK_NS = 5_000_000_000
"""File systems stamp with a coarser clock than ours, and other machines with another one."""


CHUNK_BYTES = 4 << 20
"""Bytes of a file that are hashed between two chances to stop."""


@dataclass(frozen=True, slots=True)
class Correction:
    """An image that a person moved: from what sortd had decided to what it is."""

    path: str
    label: str
    corrected: str
    was_filed: bool


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
        return (self.record.grounds.label or "") if is_home else self.relative.split("/")[1]


class Corrections:
    """Notices corrections of one dataset and remembers them in its journal."""

    def __init__(self, layout: Layout, journal: Journal, report: Callable[[OSError], None]) -> None:
        """Watch over ``layout``; nothing is read yet. ``report`` is told what cannot be looked at."""
        self._layout, self._journal, self._report = layout, journal, report
        self.files_scanned = 0
        self.moved: dict[int, tuple[Record, str]] = {}
        """By record: images that a person moved, and where they are; whoever moves their companions takes them out."""

    def look(self, path: str) -> Iterator[Misplaced | None]:
        """Look at a handled file; yield it if a person moved it there, and None while more is to be read of it.

        Raises:
            JournalError: the journal cannot be read.
        """
        relative = os.path.relpath(path, self._layout.root).split(os.sep)
        is_elsewhere = len(relative) < (2 if relative[0] == Area.REJECTED else 3) or relative[0] not in _HANDLED
        if is_elsewhere or rule_below(path, os.fspath(self._layout.root)) is not None:
            return
        found, place = self._stamp(path), "/".join(relative)
        record = None if found is None else (yield from self._record(path, found))
        if record is not None and self._was_moved(record, place):
            yield Misplaced(path, record, place)

    def _was_moved(self, record: Record, place: str) -> bool:
        """Tell whether a person moved an image from where sortd had put it, be it there and back again."""
        if record.destination_path == place:
            return self._journal.history.fact(f"{PLACES_FACT}{record.id}") is not None
        # Else it is a copy or a second link: the image still stands where sortd put it.
        return _is_gone(os.path.join(self._layout.root, record.destination_path))

    def record(self, misplaced: Sequence[Misplaced]) -> list[Correction]:
        """Note in one commit what was found; return the corrections that are news.

        Raises:
            JournalError: the journal cannot be written.
        """
        self.moved |= {one.record.id: (one.record, one.relative) for one in misplaced}
        misplaced = [one for one in misplaced if one.relative.startswith(f"{Area.DATASET}/")]
        found = [(one.record, one.corrected, one.relative) for one in misplaced]
        news = self._journal.record_corrections(found) if found else []
        return [
            Correction(
                one.path,
                one.record.grounds.label or "",
                one.corrected,
                was_filed=one.record.destination_path.startswith(f"{Area.DATASET}/"),
            )
            for one, is_news in zip(misplaced, news, strict=True)
            if is_news and one.corrected != (one.record.grounds.label or "")
        ]

    def _record(self, path: str, found: Stamp) -> Generator[None, None, Record | None]:
        """Return what put this very file into its place, or one of its name and bytes: it was copied and removed."""
        known = self._journal.history.last_known(found)
        if known is not None:
            return known
        named = self._journal.history.last_named(os.path.basename(path), found.size)
        if named is None or not named.grounds.content:
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
        return named if content.hexdigest() == named.grounds.content else None

    def _stamp(self, path: str) -> Stamp | None:
        try:
            return stamp(path)
        except OSError as error:
            self._report(error)
            return None

    def scan(self, now_ns: int) -> Iterator[Misplaced | None]:
        """Look for what was moved since the last scan: only folders and files that changed since are looked up.

        A rename changes the folder's mtime and the file's ctime, see rename(2) and inode(7).

        Args:
            now_ns: nanoseconds since the epoch.

        Returns:
            Each file that a person moved, and None for whatever else was looked at: a caller may stop between any two.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._scan_since(looked_through_until(self._journal, SCANNED_FACT, now_ns))

    def _scan_since(self, since_ns: int) -> Iterator[Misplaced | None]:
        for place in images_apart(self._journal.history):
            yield from self.look(os.path.join(self._layout.root, place))
        for path in self._changed_since(since_ns):
            if path is not None:
                yield from self.look(path)
            yield None

    def note_scan(self, now_ns: int) -> None:
        """Note that everything was looked through, once what was found is recorded.

        Raises:
            JournalError: the journal cannot be written.
        """
        self._journal.note(SCANNED_FACT, str(now_ns))

    def learnt(self) -> tuple[tuple[str, str], ...]:
        """Return every correction: the label, and the path where the image stood then.

        Raises:
            JournalError: the journal cannot be read.
        """
        return corrected_images(self._layout, self._journal.history)

    def _changed_since(self, since_ns: int) -> Iterator[str | None]:
        """Yield the path of each image that changed, and None for each that did not."""
        for area in (Area.DATASET, Area.REVIEW):
            for folder in self._entries(self._layout.area(area)):
                found = None if rule_for_folder(folder.name) else self._status(folder)
                yield None
                if found is not None and S_ISDIR(found.st_mode) and found.st_mtime_ns >= since_ns:
                    yield from self._changed_in(folder, since_ns)
        yield from self._changed_in(self._layout.area(Area.REJECTED), since_ns)

    def _changed_in(self, folder: "os.PathLike[str]", since_ns: int) -> Iterator[str | None]:
        for entry in self._entries(folder):
            self.files_scanned += 1
            found = None if rule_for(entry.name) else self._status(entry)
            is_changed = found is not None and S_ISREG(found.st_mode) and found.st_ctime_ns >= since_ns
            yield entry.path if is_changed else None

    def _entries(self, folder: "os.PathLike[str]") -> "Iterator[os.DirEntry[str]]":
        """List a folder; one that vanished meanwhile has nothing in it, and of one that cannot be read that is said."""
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except FileNotFoundError:
            return
        except OSError as error:
            error.filename = error.filename or os.fspath(folder)  # readdir(3) does not know what it lists
            self._report(error)

    def _status(self, entry: "os.DirEntry[str]") -> os.stat_result | None:
        """Return what an entry itself is; None for one that vanished or cannot be looked at."""
        try:
            return entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report(error)
            return None


def looked_through_until(journal: Journal, fact: str, now_ns: int) -> int:
    """Return from when on changes may not have been looked at yet, in nanoseconds since the epoch.

    Where the clock was set back since, nothing is known of what happened in between: all of it is looked at.

    Args:
        journal: the dataset's.
        fact: under which the time of the last look is noted.
        now_ns: nanoseconds since the epoch.

    Raises:
        JournalError: the journal cannot be read.
    """
    noted = journal.history.number(fact)
    return 0 if noted > now_ns else noted - CLOCK_SLACK_NS


def corrected_images(layout: Layout, history: History) -> tuple[tuple[str, str], ...]:
    """Return the label of each corrected image, and the path where it stood when it was noticed.

    Raises:
        JournalError: the journal cannot be read.
    """
    root = os.fspath(layout.root)
    return tuple((label, os.path.join(root, path)) for _, label, path, _ in history.corrections())


def _is_gone(path: str) -> bool:
    """Whether nothing stands under a path; a disk that does not answer says nothing of the kind."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
