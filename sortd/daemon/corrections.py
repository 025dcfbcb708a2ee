"""What the user did with handled images: corrections and confirmations of their class, and repaired files in Rejected/.

A file in ``Dataset/<class>/`` that the journal knows, by inode or by content, at another place was moved by the user.
It is corrected if it is in another class than the journal has, and confirmed if it comes from Review/ and was guessed.
An image of Dataset/ that was assigned to another class by request is treated as if the user had moved it.
Dataset/ may hold a million images, so it is scanned in slices, and only where something changed. The findings of a
slice are recorded in one commit. Nothing but the journal is written.

A rejected image is tried again when its file changed or a limit was raised. The journal contains the version that was
rejected; a version that is rejected again replaces it, so that each is tried once. Files in Rejected/ that sortd did
not put there are ignored. Methods raise JournalError if the journal cannot be read or written.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from time import monotonic, time_ns

from sortd.config import Decoding
from sortd.events import Outcome, Refusal, Stamp
from sortd.files import open_regular
from sortd.images.decode import DECODER_VERSION
from sortd.layout import Area, Layout, rule_below, rule_for, rule_for_folder
from sortd.moving.plan import images_apart
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import PLACES_FACT, Record
from sortd.watch.scan import Clock, IncrementalScan, looked_at_until, scan_steps, stamp

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
        found = version_at(path)
        if known is None or found is None or found.is_same_version(known):
            return None
        return found

    def scan(self, now_ns: int) -> Iterator[tuple[str, Stamp] | None]:
        """Yield the path and version of each image to try again, and None for each other file.

        Only files that changed since the last scan are looked up in the journal; after a limit was raised all files,
        until each image rejected by it was tried. ``now_ns`` is in nanoseconds since the epoch.
        """
        since = looked_at_until(self._journal.history.number(REJECTS_SCANNED_FACT), now_ns)
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
        if (found := version_at(entry.path)) is not None:
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
        return put_there(self._journal.history, Area.REJECTED.value, name) if folder == self._folder else None


def put_there(history: History, folder: str, name: str) -> Record | None:
    """Return the move by which sortd put a file into a folder of Rejected/; None if another file has the name now."""
    put, gone = history.last_put(folder, name), history.last_moved(folder, name)
    return put if put is not None and (gone is None or gone.id < put.id) else None


def _is_gone(path: str) -> bool:
    """Return whether nothing has a path; False if the disk does not respond."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def version_at(path: str) -> Stamp | None:
    """Return the version of the file at a path; None if there is none, or it cannot be read."""
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


SCANNED_FACT = "corrections_scanned_at"
"""The fact in the journal of when Dataset/ was last scanned, in nanoseconds since the epoch."""

CHUNK_BYTES = 4 << 20  # hashed in one step
HANDLED_SLICE = 500  # files in one turn of the loop: two milliseconds if none changed
MOST_WANTED = 20_000  # scheduled inspections; beyond, everything is scanned
PAUSE_SECONDS = 1.0  # between two scheduled scans, so that a storm of renames can pass
MOST_FOLLOWED = 50  # images whose companions are searched in one turn of the loop
FOLLOW_NS = 2 * 10**9  # after the user moved an image, in which its companions are left alone

_HANDLED = frozenset({Area.DATASET.value, Area.REVIEW.value, Area.REJECTED.value})


@dataclass(frozen=True, slots=True)
class Correction:
    """An image that the user moved to another class, or out of Review/ to the class that was the best guess."""

    path: str
    label: str
    corrected: str
    is_taken_back: bool = False  # the image is back where it was, or in Review/

    @property
    def is_confirmation(self) -> bool:
        """Whether the best guess was right."""
        return self.corrected == self.label


@dataclass(frozen=True, slots=True)
class Repaired:
    """An image in Rejected/ to try again: its version changed, or a limit was raised."""

    path: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A handled image that the journal knows at another place, where it is not any more."""

    path: str
    record: Record
    relative: str

    @property
    def corrected(self) -> str | None:
        """The class that the user gave it; None if that is none, or the one that sortd filed it into."""
        if self.relative == self.record.destination_path or not self.relative.startswith(f"{Area.DATASET}/"):
            return None
        label, reason = self.relative.split("/")[1], self.record.move_reason
        return None if label == reason.label and reason.outcome != Outcome.REVIEW else label

    @property
    def says_a_class(self) -> bool:
        """Whether its place says something about its class: every one in Dataset/, and any for one from Review/."""
        return self.relative.startswith(f"{Area.DATASET}/") or self.record.move_reason.outcome == Outcome.REVIEW


class CorrectionScanner:
    """Finds what the user did with the handled images of one dataset."""

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        report: Callable[[OSError], None],
        *,
        clock: Clock = monotonic,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """Prepare; ``report`` receives read errors, ``limits`` are for ``Rejects``."""
        self._layout, self._journal, self._report = layout, journal, report
        self.rejects = Rejects(layout, journal, limits)
        self._moved: dict[int, tuple[Record, str]] = {}  # by record: images that the user moved, and where they are
        self._wanted: OrderedDict[str, Area] = OrderedDict()
        self._placed: OrderedDict[str, Stamp] = OrderedDict()  # by path: the version that sortd put there
        prepare = partial(
            IncrementalScan[Misplaced | Repaired], most=HANDLED_SLICE, pause_seconds=PAUSE_SECONDS, clock=clock
        )
        self._singles, self._all = prepare(self._look_at_wanted), prepare(self._look_at_all)
        self._began_ns = self._since_ns = 0
        self._repaired: Iterator[tuple[str, Stamp] | None] = iter(())
        self._again_at: int | None = None
        self._looked_at = 0

    def want(self, area: Area, path: str) -> None:
        """Schedule the inspection of one handled file."""
        if len(self._wanted) < MOST_WANTED:
            self._wanted[path] = area
            self._singles.asked.ask()
        else:
            self._wanted.clear()
            self.ask()

    def note_placed(self, path: str, mark: Stamp) -> None:
        """Note the version that sortd put at a path, so that its own move needs no search in the journal."""
        self._placed[path] = mark
        if len(self._placed) > MOST_WANTED:
            self._placed.popitem(last=False)

    def ask(self) -> None:
        """Schedule a scan of everything."""
        self._all.asked.ask()

    @property
    def deadline(self) -> float:
        """When scheduled work is due; infinity without any, or while a scan is running."""
        if self.is_under_way:
            return float("inf")
        return min(self._all.asked.deadline, self._singles.asked.deadline)

    @property
    def has_moved(self) -> bool:
        """Whether ``take_moved`` has images left."""
        return bool(self._moved)

    def take_moved(self, now_ns: int) -> list[tuple[Record, str]]:
        """Return the records and current places of images that the user moved; see ``LateCompanions.follow_images``.

        An image moved just now waits: a file manager moves its companions one after the other.
        """
        taken = []
        for record, place in list(islice(self._moved.values(), MOST_FOLLOWED)):
            found = version_at(os.path.join(self._layout.root, place))
            changed_ns = 0 if found is None else found.ctime_ns
            if 0 <= now_ns - changed_ns < FOLLOW_NS:
                continue
            del self._moved[record.id]
            taken += [(record, place)] if changed_ns else []
        return taken

    @property
    def files_looked_at(self) -> int:
        """The number of files that were inspected since the start."""
        return self._looked_at + self.rejects.files_scanned

    @property
    def is_under_way(self) -> bool:
        """Whether a scan is running."""
        return self._all.is_under_way or self._singles.is_under_way

    def begin(self, now_ns: int) -> None:
        """Start a scan; if one is running, schedule another one after it, since it may miss the latest changes."""
        if self._all.is_under_way:
            self._again_at = now_ns
            return
        self._began_ns = now_ns
        self._since_ns = looked_at_until(self._journal.history.number(SCANNED_FACT), now_ns)
        self._repaired = self.rejects.scan(now_ns)
        self._all.begin()

    def begin_asked(self) -> None:
        """Start what is scheduled and due: inspections, and a scan of everything."""
        if self._singles.is_due:
            self._singles.begin()
        if self._all.is_due:
            self.begin(time_ns())

    def end(self) -> None:
        """Stop; the next scan starts where this one did."""
        self._all.end()
        self._singles.end()
        self._again_at = None
        self._wanted.clear()

    def take(self) -> list[Correction | Repaired]:
        """Inspect the next slice and return what was found."""
        if self._singles.is_under_way:
            return self._noticed(self._singles.take())
        if not self._all.is_under_way:
            return []
        noticed = self._noticed(self._all.take())
        if not self._all.is_under_way:
            self._journal.note(SCANNED_FACT, str(self._began_ns))  # after its findings are recorded
            again, self._again_at = self._again_at, None
            if again is not None:
                self.begin(again)
        return noticed

    def _noticed(self, looks: list[Misplaced | Repaired]) -> list[Correction | Repaired]:
        misplaced = [look for look in looks if isinstance(look, Misplaced)]
        return [*self.record(misplaced), *(look for look in looks if isinstance(look, Repaired))]

    def _look_at_wanted(self) -> Iterator[Misplaced | Repaired | None]:
        while self._wanted:
            path, area = self._wanted.popitem(last=False)
            self._looked_at += 1
            if (placed := self._placed.pop(path, None)) is not None and placed == version_at(path):
                pass  # a rename by anybody else would have set its ctime
            elif area is Area.REJECTED and (found := self.rejects.look(path)) is not None:
                yield Repaired(path, found)
            elif _is_gone(path):
                for copy in self._copies_of(path):
                    yield from self.look(copy)
                    yield None
            else:
                yield from self.look(path)
            yield None

    def _look_at_all(self) -> Iterator[Misplaced | Repaired | None]:
        for place in images_apart(self._journal.history):
            yield from self.look(os.path.join(self._layout.root, place))
        for path in self._changed_since(self._since_ns):
            if path is not None:
                yield from self.look(path)
            yield None
        for repaired in self._repaired:
            yield None if repaired is None else Repaired(*repaired)

    def _copies_of(self, path: str) -> Iterator[str]:
        """Yield the files in Dataset/ with the name of one that is gone, which the user may have copied before."""
        try:
            with os.scandir(self._layout.area(Area.DATASET)) as entries:
                folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return  # missing: scanned when it is back
        places = (os.path.join(folder, os.path.basename(path)) for folder in folders)
        yield from filter(os.path.lexists, places)

    def look(self, path: str) -> Iterator[Misplaced | None]:
        """Inspect a handled file; yield it if the user moved it there, and None between chunks of reading."""
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

    def look_now(self, paths: Sequence[str]) -> list[Correction]:
        """Inspect handled files without a schedule and return what was found."""
        return self.record([found for path in paths for found in self.look(path) if found is not None])

    def _was_moved(self, record: Record, place: str) -> bool:
        """Return whether the user moved an image from where sortd had put it, perhaps there and back."""
        if record.destination_path == place:
            history = self._journal.history
            return bool(history.fact(f"{PLACES_FACT}{record.id}") or history.is_corrected(record.id))
        return _is_gone(os.path.join(self._layout.root, record.destination_path))  # else it is a copy or a second link

    def record(self, misplaced: Sequence[Misplaced]) -> list[Correction]:
        """Record findings in one commit; return the new corrections and confirmations, and those taken back."""
        self._moved |= {one.record.id: (one.record, one.relative) for one in misplaced}
        misplaced = [one for one in misplaced if one.says_a_class]
        found = [(one.record, one.corrected, one.relative) for one in misplaced]
        news = self._journal.record_corrections(found) if found else []
        corrections = []
        for one, is_news in zip(misplaced, news, strict=True):
            label, corrected = one.record.move_reason.label or "", one.corrected
            if is_news:
                corrections.append(Correction(one.path, label, corrected or label, is_taken_back=corrected is None))
        return corrections

    def _before_assignments(self, record: Record) -> Record:
        """Return the move before a person assigned an image of Dataset/ to other classes, if there is one."""
        while record.move_reason.outcome == Outcome.ASSIGNED and record.move.source.startswith(Area.DATASET):
            if (earlier := self._journal.history.known_before(record)) is None:
                break
            record = earlier
        return record

    def _record(self, path: str, found: Stamp) -> Generator[None, None, Record | None]:
        """Return the record of this file, or of a file with the same name and bytes, which was copied and removed."""
        known = self._journal.history.last_known(found)
        if known is not None:
            return self._before_assignments(known)
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
        """Yield the path of each changed image, and None for anything else.

        A rename changes the mtime of the folder and the ctime of the file, see rename(2) and inode(7).
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
    """List the entries of a folder except folders, lazily, since there may be a million."""
    with os.scandir(folder) as entries:
        yield (entry for entry in entries if not entry.is_dir(follow_symlinks=False))


def record_places(layout: Layout, journal: Journal, paths: Sequence[str]) -> None:
    """Record what the places of handled images say of their classes now, without waiting for a scan."""
    CorrectionScanner(layout, journal, report=lambda _: None).look_now(paths)
