"""Rejects: images that sortd set aside and that somebody mended where they lie are tried again there.

Whether one changed is told by the journal, which holds the version that was set aside; a version that was refused again
takes its place, so that each is tried once, whatever happens in between. What sortd did not put there is left alone.

What was set aside because of a limit is tried once more, as it is, where that limit was raised since.
What reads or writes the journal raises JournalError where that fails.
"""

import json
import os
from collections.abc import Iterator, Mapping

from sortd.events import Refusal, Stamp
from sortd.layout import Area, Layout
from sortd.names import rule_for
from sortd.store.journal import Journal
from sortd.store.records import Record
from sortd.watch.scan import looked_at_until, stamp

SCANNED_FACT = "rejects_scanned_at"
"""The journal's note of when Rejected/ was last looked through, in nanoseconds since the epoch."""

LIMITS_FACT = "rejects_limits"
"""The journal's note of the limits by which all that lies in Rejected/ was refused, as JSON."""

_REFUSED_BY = {
    "max_pixels": {Refusal.TOO_LARGE},
    "max_side_pixels": {Refusal.TOO_LARGE},
    "max_bytes": {Refusal.TOO_LARGE},
    "timeout_seconds": {Refusal.POISON},
    "draft": {Refusal.TOO_LARGE},
    "decoders": {Refusal.TOO_LARGE, Refusal.POISON, Refusal.UNREADABLE},
}
"""What a limit makes of an image: such ones are tried again where the limit is higher than it was."""


class Rejects:
    """Notices mended images of one dataset, and those that limits which were raised since may allow."""

    def __init__(self, layout: Layout, journal: Journal, limits: Mapping[str, float] | None = None) -> None:
        """Watch over ``layout``; nothing is read yet. ``limits`` are those in force, by the keys of ``_REFUSED_BY``."""
        self._folder = os.fspath(layout.area(Area.REJECTED))
        self._journal = journal
        self.files_scanned = 0
        self._limits = limits or {}
        self._tried: set[str] = set()  # names that were found to be tried again because of a limit
        self._unanswered: set[str] = set()  # those of them that were not refused again, and have not left, yet

    def look(self, path: str) -> Stamp | None:
        """Return the version that stands under a path in Rejected/, if it is another one than was set aside there."""
        record = self._record(path)
        known = None if record is None else record.move.image.moved_stamp
        found = _version_at(path)
        if known is None or found is None or found.is_same_version(known):
            return None
        return found

    def scan(self, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        """Look for versions that were mended since the last scan; only files that changed since are looked up.

        After a limit was raised all of them are, until each that it refused was tried.

        Args:
            now_ns: nanoseconds since the epoch.

        Returns:
            A path with the version there, or None for whatever else was looked at: a caller may stop between any two.
        """
        return self._scan_since(looked_at_until(self._journal.history.number(SCANNED_FACT), now_ns), now_ns)

    def _scan_since(self, since: int, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        allowed = self._refusals_to_try()
        there: set[str] = set()
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    self.files_scanned += 1
                    if rule_for(entry.name) is not None:
                        yield None
                        continue
                    found = self.look(entry.path) if _changed_ns(entry) >= since else None
                    if found is None and allowed:
                        there.add(entry.name)
                        found = self._look_again(entry, allowed)
                    yield None if found is None else (entry.path, found)
        except OSError:
            return  # absent: looked through when it is back
        self._journal.note(SCANNED_FACT, str(now_ns))
        self._unanswered &= there
        if allowed and not self._unanswered:
            self._journal.note(LIMITS_FACT, json.dumps(self._limits))
            self._tried.clear()

    def _refusals_to_try(self) -> set[Refusal]:
        """Return why an image may lie in Rejected/ that the limits in force could allow."""
        noted = self._noted()
        raised = [key for key, limit in self._limits.items() if limit > noted.get(key, 0)]
        if not raised and noted != self._limits:
            self._journal.note(LIMITS_FACT, json.dumps(self._limits))  # one was lowered, and may be raised again
        return {refusal for key in raised for refusal in _REFUSED_BY[key]}

    def _noted(self) -> Mapping[str, float]:
        try:
            noted = json.loads(self._journal.history.fact(LIMITS_FACT) or "{}")
        except ValueError:
            return {}
        if not isinstance(noted, dict):
            return {}
        return {key: noted[key] for key in self._limits if isinstance(noted.get(key), int | float)}

    def _look_again(self, entry: "os.DirEntry[str]", allowed: set[Refusal]) -> Stamp | None:
        """Return the version of a file that was refused for one of these reasons, if it was not tried again yet."""
        if entry.name in self._tried:
            return None
        record = self._record(entry.path)
        if record is None or record.move_reason.reason.partition(":")[0] not in allowed:
            return None
        if (found := _version_at(entry.path)) is not None:
            self._tried.add(entry.name)
            self._unanswered.add(entry.name)
        return found

    def keep(self, path: str, refused: Stamp) -> None:
        """Note that this version of a file in Rejected/ was refused again, and is not to be tried any more."""
        self._unanswered.discard(os.path.basename(path))
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
        gone = history.last_moved(Area.REJECTED.value, name)
        return record if gone is None or gone.id < record.id else None  # else that one has left, and this is another


def _version_at(path: str) -> Stamp | None:
    """Return the version that stands under a path; None where it cannot be seen: the next scan looks again."""
    try:
        return stamp(path)
    except OSError:
        return None


def _changed_ns(entry: "os.DirEntry[str]") -> int:
    """Return when a file's bytes or its place in the tree last changed, see inode(7); -1 where it vanished."""
    try:
        return entry.stat(follow_symlinks=False).st_ctime_ns
    except OSError:
        return -1
