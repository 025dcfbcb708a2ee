"""Rejects: images that sortd set aside and that somebody mended where they lie are tried again there.

Whether one changed is told by the journal, which holds the version that was set aside; a version that was refused again
takes its place, so that each is tried once, whatever happens in between. What sortd did not put there is left alone.
"""

import os
from collections.abc import Iterator

from sortd.journal import Journal
from sortd.journaling.records import Record
from sortd.layout import Area, Layout
from sortd.messages import Stamp
from sortd.names import rule_for
from sortd.running.corrections import looked_through_until
from sortd.watching.scanning import stamp

SCANNED_FACT = "rejects_scanned_at"
"""The journal's note of when Rejected/ was last looked through, in nanoseconds since the epoch."""


class Rejects:
    """Notices mended images of one dataset."""

    def __init__(self, layout: Layout, journal: Journal) -> None:
        """Watch over ``layout``; nothing is read yet."""
        self._folder = os.fspath(layout.area(Area.REJECTED))
        self._journal = journal
        self.files_scanned = 0

    def look(self, path: str) -> Stamp | None:
        """Return the version that stands under a path in Rejected/, if it is another one than was set aside there.

        Raises:
            JournalError: the journal cannot be read.
        """
        record = self._record(path)
        known = None if record is None else record.relocation.image.moved_stamp
        try:
            found = stamp(path)
        except OSError:
            return None  # the next scan looks again
        if known is None or found is None:
            return None
        return None if found.is_same_version(known) else found

    def scan(self, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        """Look for versions that were mended since the last scan; only files that changed since are looked up.

        Args:
            now_ns: nanoseconds since the epoch.

        Returns:
            A path with the version there, or None for whatever else was looked at: a caller may stop between any two.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        return self._scan_since(looked_through_until(self._journal, SCANNED_FACT, now_ns), now_ns)

    def _scan_since(self, since: int, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    self.files_scanned += 1
                    is_changed = rule_for(entry.name) is None and _changed_ns(entry) >= since
                    found = self.look(entry.path) if is_changed else None
                    yield None if found is None else (entry.path, found)
        except OSError:
            return  # absent: looked through when it is back
        self._journal.note(SCANNED_FACT, str(now_ns))

    def keep(self, path: str, refused: Stamp) -> None:
        """Note that this version of a file in Rejected/ was refused again, and is not to be tried any more.

        Raises:
            JournalError: it could not be made durable.
        """
        record = self._record(path)
        if record is not None:
            self._journal.follow(record, refused)

    def _record(self, path: str) -> Record | None:
        folder, _, name = path.rpartition("/")
        if folder != self._folder:
            return None
        history = self._journal.history
        record = history.last_put(Area.REJECTED.value, name)
        if record is None:
            return None
        gone = history.last_moved(Area.REJECTED.value, (name,), since=0.0)
        return record if gone is None or gone.id < record.id else None  # else that one has left, and this is another


def _changed_ns(entry: "os.DirEntry[str]") -> int:
    """Return when a file's bytes or its place in the tree last changed, see inode(7); -1 where it vanished."""
    try:
        return entry.stat(follow_symlinks=False).st_ctime_ns
    except OSError:
        return -1
