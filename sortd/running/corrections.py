"""Corrections: images that sortd put into one class and that the user moved to another.

A file that stands in ``Dataset/<class>/`` and that the journal knows, by inode or by content, as put elsewhere was
moved by a person: the best teaching there is. Nothing is written anywhere but in the journal.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from stat import S_ISDIR, S_ISREG

from sortd.journal import Journal
from sortd.journaling.records import Record
from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.moving.renaming import FILE_FLAGS
from sortd.watching.scanning import is_temporary, stamp

SCANNED_FACT = "corrections_scanned_at"
"""The journal's note of when Dataset/ was last looked through, in nanoseconds since the epoch."""

CLOCK_SLACK_NS = 5_000_000_000
"""File systems stamp with a coarser clock than ours, and other machines with another one."""


@dataclass(frozen=True, slots=True)
class Correction:
    """An image that a person moved: from what sortd had decided to what it is."""

    path: str
    label: str
    corrected: str
    was_filed: bool


class Corrections:
    """Notices corrections of one dataset and remembers them in its journal."""

    def __init__(self, layout: Layout, journal: Journal, report: Callable[[OSError], None]) -> None:
        """Watch over ``layout``; nothing is read yet. ``report`` is told what cannot be looked at."""
        self._layout, self._journal, self._report = layout, journal, report

    def look(self, path: str) -> Correction | None:
        """Look at one file in Dataset/ and return the correction that it is, if it is one and is news.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        relative = os.path.relpath(path, self._layout.root).split(os.sep)
        if len(relative) < 3 or relative[0] != Area.DATASET:  # noqa: PLR2004 -- area, class, file
            return None
        found = self._stamp(path)
        record = None if found is None else self._record(path, found)
        if record is None or record.destination_path == "/".join(relative):
            return None
        if not _is_gone(os.path.join(self._layout.root, record.destination_path)):
            return None  # a copy or a second link: the image still stands where sortd put it
        label, corrected = record.grounds.label or "", relative[1]
        if not self._journal.record_correction(record, corrected, "/".join(relative)) or corrected == label:
            return None
        return Correction(path, label, corrected, was_filed=record.destination_path.startswith(f"{Area.DATASET}/"))

    def _record(self, path: str, found: Stamp) -> Record | None:
        """Return what put this very file into its place, or one of its name and bytes: it was copied and removed."""
        known = self._journal.history.last_known(found)
        if known is not None:
            return known
        named = self._journal.history.last_named(os.path.basename(path), found.size)
        if named is None or not named.grounds.content:
            return None
        try:
            content = _sha256_of(path)
        except OSError as error:
            self._report(error)
            return None
        return named if content == named.grounds.content else None

    def _stamp(self, path: str) -> Stamp | None:
        try:
            return stamp(path)
        except OSError as error:
            self._report(error)
            return None

    def scan(self, now_ns: int) -> Iterator[Correction | None]:
        """Look for what was corrected since the last scan: only folders and files that changed since are looked up.

        A rename changes the folder's mtime and the file's ctime, see rename(2) and inode(7).

        Args:
            now_ns: nanoseconds since the epoch.

        Yields:
            A correction, or None for whatever else was looked at: whoever asks may stop between any two.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        since = looked_through_until(self._journal, SCANNED_FACT, now_ns)
        for path in self._changed_since(since):
            yield None if path is None else self.look(path)
        self._journal.note(SCANNED_FACT, str(now_ns))

    def learnt(self) -> tuple[tuple[str, str, Stamp], ...]:
        """Return every corrected image that still stands where the user put it: label, path, stamp."""
        learnt = []
        for _, corrected, relative, _ in self._journal.history.corrections():
            path = os.path.join(self._layout.root, relative)
            if (found := self._stamp(path)) is not None:
                learnt.append((corrected, path, found))
        return tuple(learnt)

    def _changed_since(self, since_ns: int) -> Iterator[str | None]:
        """Yield the path of each image that changed, and None for each that did not."""
        for folder in self._entries(self._layout.area(Area.DATASET)):
            found = self._status(folder)
            if found is None or not S_ISDIR(found.st_mode) or found.st_mtime_ns < since_ns:
                continue
            for entry in self._entries(folder):
                found = None if is_temporary(entry.name) else self._status(entry)
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


def _sha256_of(path: str) -> str:
    descriptor = os.open(path, FILE_FLAGS)
    try:
        with open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(descriptor)  # a folder cannot be made a file of, and would stay open


def _is_gone(path: str) -> bool:
    """Whether nothing stands under a path; a disk that does not answer says nothing of the kind."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
