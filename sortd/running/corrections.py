"""Corrections: images that sortd put into one class and that the user moved to another.

A file that stands in ``Dataset/<class>/`` and that the journal knows, by inode or by content, as put elsewhere was
moved by a person: the best teaching there is. Nothing is written anywhere but in the journal.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from sortd.journal import Journal
from sortd.journaling.records import Record
from sortd.layout import Area, Layout
from sortd.messages import Stamp
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

    def __init__(self, layout: Layout, journal: Journal) -> None:
        """Watch over ``layout``; nothing is read yet."""
        self._layout, self._journal = layout, journal

    def look(self, path: str) -> Correction | None:
        """Look at one file in Dataset/ and return the correction that it is, if it is one and is news.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        relative = os.path.relpath(path, self._layout.root).split(os.sep)
        if len(relative) < 3 or relative[0] != Area.DATASET:  # noqa: PLR2004 -- area, class, file
            return None
        found = stamp(path)
        record = None if found is None else self._record(path, found)
        if record is None or record.destination_path == "/".join(relative):
            return None
        if os.path.lexists(os.path.join(self._layout.root, record.destination_path)):
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
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
        return named if content == named.grounds.content else None

    def scan(self, now_ns: int) -> Iterator[Correction]:
        """Yield what was corrected since the last scan: only folders and files that changed since are looked at.

        A rename changes the folder's mtime and the file's ctime, see rename(2) and inode(7).

        Args:
            now_ns: nanoseconds since the epoch.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        since = int(self._journal.history.fact(SCANNED_FACT) or 0) - CLOCK_SLACK_NS
        for path in self._changed_since(since):
            if (correction := self.look(path)) is not None:
                yield correction
        self._journal.note(SCANNED_FACT, str(now_ns))

    def learnt(self) -> tuple[tuple[str, str, Stamp], ...]:
        """Return every corrected image that still stands where the user put it: label, path, stamp."""
        learnt = []
        for _, corrected, relative, _ in self._journal.history.corrections():
            path = os.path.join(self._layout.root, relative)
            if (found := stamp(path)) is not None:
                learnt.append((corrected, path, found))
        return tuple(learnt)

    def _changed_since(self, since_ns: int) -> Iterator[str]:
        for folder in _entries(self._layout.area(Area.DATASET)):
            if not folder.is_dir(follow_symlinks=False) or _status(folder).st_mtime_ns < since_ns:
                continue
            for entry in _entries(folder):
                is_image = entry.is_file(follow_symlinks=False) and not is_temporary(entry.name)
                if is_image and _status(entry).st_ctime_ns >= since_ns:
                    yield entry.path


def _entries(folder: "os.PathLike[str]") -> "list[os.DirEntry[str]]":
    """List a folder; one that vanished meanwhile has nothing in it."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Return an entry's own status; one that vanished meanwhile is as old as can be."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return os.stat_result((0,) * 19)
