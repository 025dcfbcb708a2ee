"""Detection of images in Rejected/ that must be tried again: they were repaired, or a limit was raised.

The journal contains the version that was rejected; a version that is rejected again replaces it, so that each is tried
once. Files that sortd did not put there are ignored. An image rejected because of a limit is tried once more when that
limit is raised. Methods raise JournalError if the journal cannot be read or written.
"""

import json
import os
from collections.abc import Iterator, Mapping

from sortd.config import Decoding
from sortd.events import Refusal, Stamp
from sortd.images.decode import DECODER_VERSION
from sortd.layout import Area, Layout
from sortd.names import rule_for
from sortd.store.journal import Journal
from sortd.store.records import Record
from sortd.watch.scan import looked_at_until, stamp

REJECTS_SCANNED_FACT = "rejects_scanned_at"  # when Rejected/ was last scanned, in nanoseconds since the epoch
LIMITS_FACT = "rejects_limits"  # the limits by which the files in Rejected/ were rejected, as JSON

_REFUSED_BY = {
    "max_pixels": {Refusal.TOO_LARGE},
    "max_side_pixels": {Refusal.TOO_LARGE},
    "max_bytes": {Refusal.TOO_LARGE},
    "timeout_seconds": {Refusal.POISON},
    "draft": {Refusal.TOO_LARGE},
    "decoders": {Refusal.TOO_LARGE, Refusal.POISON, Refusal.UNREADABLE},
}
"""Reasons of rejection by limit: images with these reasons are tried again when the limit is raised."""


def limits_of(decoding: Decoding) -> dict[str, float]:
    """Return the decoding limits, each such that a higher value accepts more images; by the keys of ``_REFUSED_BY``."""
    numbers = decoding.model_dump(include={"max_pixels", "max_side_pixels", "max_bytes", "timeout_seconds"})
    return {**numbers, "draft": int(decoding.jpeg == "draft"), "decoders": DECODER_VERSION}


class Rejects:
    """Finds repaired images in Rejected/ of one dataset, and those that a raised limit may allow."""

    def __init__(self, layout: Layout, journal: Journal, limits: Mapping[str, float] | None = None) -> None:
        """Read nothing yet; ``limits`` are the configured ones, see ``limits_of``."""
        self._folder = os.fspath(layout.area(Area.REJECTED))
        self._journal = journal
        self.files_scanned = 0
        self._limits = limits or {}
        self._tried: set[str] = set()  # names returned because of a limit
        self._unanswered: set[str] = set()  # those neither rejected again nor gone yet

    def look(self, path: str) -> Stamp | None:
        """Return the version of a file in Rejected/, if it is not the rejected one."""
        record = self._record(path)
        known = None if record is None else record.move.image.moved_stamp
        found = _version_at(path)
        if known is None or found is None or found.is_same_version(known):
            return None
        return found

    def scan(self, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        """Yield the path and version of each image to try again, and None for each other file.

        Only files that changed since the last scan are looked up in the journal; after a limit was raised all files,
        until each image rejected by it was tried. ``now_ns`` is in nanoseconds since the epoch.
        """
        return self._scan_since(looked_at_until(self._journal.history.number(REJECTS_SCANNED_FACT), now_ns), now_ns)

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
            return  # missing: scanned when it is back
        self._journal.note(REJECTS_SCANNED_FACT, str(now_ns))
        self._unanswered &= there
        if allowed and not self._unanswered:
            self._journal.note(LIMITS_FACT, json.dumps(self._limits))
            self._tried.clear()

    def _refusals_to_try(self) -> set[Refusal]:
        """Return the reasons of rejection that the configured limits may have removed."""
        noted = self._noted()
        raised = [key for key, limit in self._limits.items() if limit > noted.get(key, 0)]
        if not raised and noted != self._limits:
            self._journal.note(LIMITS_FACT, json.dumps(self._limits))  # a lowered limit may be raised again
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
        """Return the version of a file rejected for one of these reasons, unless it was already tried again."""
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
        """Record that this version of a file in Rejected/ was rejected again, so that it is not tried any more."""
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
        return record if gone is None or gone.id < record.id else None  # otherwise this is another file


def _version_at(path: str) -> Stamp | None:
    """Return the version at a path; None if it cannot be read, until the next scan."""
    try:
        return stamp(path)
    except OSError:
        return None


def _changed_ns(entry: "os.DirEntry[str]") -> int:
    """Return the ctime of a file (inode(7)), which a rename sets as well; -1 if the file is gone."""
    try:
        return entry.stat(follow_symlinks=False).st_ctime_ns
    except OSError:
        return -1
