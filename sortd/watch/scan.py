"""Scans of a folder: every file in it, completely or slice by slice; nothing is opened.

What ``layout.py`` has a rule for is left out, with the reason. Placeholders of cloud drives are not downloaded.
"""

import os
import stat as mode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import monotonic
from typing import Generic, TypeVar

from sortd.core.schedule import Throttle
from sortd.events import Stamp, Writer
from sortd.files import stamp_of
from sortd.layout import CONTROLS, Reason, Rule, Why, owner_of, rule_below, rule_for, rule_for_folder

Listing = Callable[[str], AbstractContextManager[Iterable["os.DirEntry[str]"]]]

COARSE_NS = 2_000_000_000  # by which times in whole seconds may be too old, as on ext3

_LINK = Why(Reason.SYMBOLIC_LINK, "it is a symbolic link, which is not followed; replace it with the file itself")
_SPECIAL = Why(Reason.SPECIAL_FILE, "it is a pipe, a socket or a device, not a regular file")


def stamp(path: str, *, stat: Callable[[str], os.stat_result] = os.lstat) -> Stamp | None:
    """Return the stamp of the regular file at ``path``; None if there is none.

    Raises:
        OSError: The disk or the permissions do not allow it; nothing is known about the file.
    """
    try:
        found = stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stamp_of(found) if mode.S_ISREG(found.st_mode) else None


def still_seconds(mark: Stamp, now_ns: int) -> float:
    """Return for how long a file has not changed, by mtime and ctime; no program can set ctime, and a rename sets it.

    ``now_ns`` is the time in nanoseconds since the epoch. Times in the future give 0: a clock was set back.
    """
    coarseness_ns = 0 if mark.ctime_ns % 1_000_000_000 else COARSE_NS
    return max(0, now_ns - max(mark.mtime_ns, mark.ctime_ns) - coarseness_ns) / 1e9


def scan(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp]]:
    """Yield the path and stamp of every eligible file below ``folder``; arguments as for ``scan_steps``."""
    for step in scan_steps(folder, report=report, rule_at_top=rule_at_top, scandir=scandir):
        if step is not None and isinstance(step[1], Stamp):
            yield step[0], step[1]


def scan_all(
    folder: str, *, report: Callable[[OSError], None], rule_at_top: Callable[[str], Rule | None] = rule_for
) -> Iterator[tuple[str, Stamp | Why]]:
    """Yield what ``scan`` yields, and what is left out, with the reason."""
    return filter(None, scan_steps(folder, report=report, rule_at_top=rule_at_top))


def scan_steps(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp | Why] | None]:
    """Yield what is below ``folder``, at any depth, lazily and in no order, except ordinary folders.

    A folder that is left out is yielded instead of its content. No symbolic link is followed.

    Args:
        folder: An absolute path.
        report: Called with the error (``error.filename``) for what cannot be read, and if ``folder`` does not exist;
            not for a folder below that vanishes meanwhile.
        rule_at_top: Judges the folders directly in ``folder``; ``rule_for_folder`` where they are classes.
        scandir: Lists a folder.

    Yields:
        The path, and the stamp of a file or why it is left out; None for anything else.
    """
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        judge = rule_at_top if current == folder else rule_for
        yield None
        try:
            with scandir(current) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    rule = (judge if is_folder else rule_for)(entry.name)
                    if rule is not None:
                        yield entry.path, rule.why
                    elif is_folder:
                        waiting.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        yield entry.path, _LINK if entry.is_symlink() else _SPECIAL
                    else:
                        found = _look(entry, report)
                        yield None if found is None else (entry.path, found)
        except (FileNotFoundError, NotADirectoryError) as error:
            if current == folder:
                report(error)
        except OSError as error:
            error.filename = error.filename or current  # errors of readdir(3) have no file name
            report(error)


def whole_files(folder: str, *, report: Callable[[OSError], None]) -> list[tuple[str, Stamp]]:
    """Return what ``scan`` yields, except files that a control file marks as unfinished, or whose folder it marks."""
    files, owners = [], set()
    for path, found in scan_all(folder, report=report):
        if isinstance(found, Stamp):
            files.append((path, found))
        elif (owner := owner_of(path)) is not None:
            owners.add(owner)
    above = tuple(f"{owner}/" for owner in owners)
    return [(path, mark) for path, mark in files if not (path in owners or path.startswith(above))]


def why_left(path: str, root: str) -> Why | None:
    """Return why ``path`` in the dataset at ``root`` is not processed; None if it is, or does not exist.

    Raises:
        OSError: The disk or the permissions do not allow to find out.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    place, why = path, None
    if (left := rule_below(path, root)) is not None:
        place, why = left[0], left[1].why
    elif (link := next(filter(os.path.islink, _upwards(os.path.dirname(path), root)), None)) is not None:
        place, why = link, _LINK
    elif mode.S_ISLNK(found.st_mode):
        return _LINK
    elif not (mode.S_ISREG(found.st_mode) or mode.S_ISDIR(found.st_mode)):
        return _SPECIAL
    if why is None:
        return why_unfinished(path, root)
    return why if place == path else replace(why, message=f"it is in {place}: {why.message}")


def why_unfinished(path: str, root: str) -> Why | None:
    """Return which control file marks ``path``, or a folder between it and ``root``, as unfinished; or None."""
    for place in _upwards(path, root):
        for rule in CONTROLS:
            if os.path.lexists(place + rule.ending):
                message = f"{rule.program} has not finished it: {place}{rule.ending} exists"
                return Why(Reason.UNFINISHED, f"{message}; it is processed when that file is gone")
    return None


def _upwards(path: str, root: str) -> Iterator[str]:
    """Yield a path and the folders around it, up to ``root``, which is left out."""
    while len(path) > len(root):
        yield path
        path = os.path.dirname(path)


def _look(entry: "os.DirEntry[str]", report: Callable[[OSError], None]) -> Stamp | None:
    try:
        return stamp_of(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return None
    except OSError as error:
        report(error)
        return None


SLICE = 2000  # steps in one turn of the loop, at most: about ten milliseconds
SLICE_SECONDS = 0.02  # for one slice; network file systems are slower
MOST_FOLDERS = 20_000  # that are scheduled, and that are remembered as listed
CLOCK_SLACK_NS = 5_000_000_000  # between the clocks of file systems, other machines and this one

Clock = Callable[[], float]
_T = TypeVar("_T")


class IncrementalScan(Generic[_T]):
    """One scan at a time, in slices, so that a million files do not block the loop."""

    def __init__(
        self,
        looks: Callable[[], Iterator[_T | None]],
        *,
        most: int = SLICE,
        pause_seconds: float = 0.0,
        clock: Clock = monotonic,
    ) -> None:
        """Prepare; ``looks`` starts a scan, which yields what it finds, and None for anything else that it inspects.

        A slice ends after ``most`` steps, or ``SLICE_SECONDS``; ``pause_seconds`` lie between two requested scans.
        """
        self.most = most
        self._looks, self._clock = looks, clock
        self.asked = Throttle(pause_seconds)  # the caller starts the scan when ``is_due``
        self._under_way: Iterator[_T | None] | None = None
        self.is_wanted_again = False  # another scan is to follow the running one

    @property
    def is_under_way(self) -> bool:
        """Whether a scan is running."""
        return self._under_way is not None

    @property
    def is_due(self) -> bool:
        """Whether a requested scan is to begin."""
        return self._under_way is None and self.asked.is_due(self._clock())

    def begin(self) -> bool:
        """Start a scan and return True; if one is running, note that another one was requested, and return False."""
        self.is_wanted_again = self.is_under_way
        if self._under_way is None:
            self.asked.begin(self._clock())
            self._under_way = self._looks()
        return not self.is_wanted_again

    def take(self) -> list[_T]:
        """Return what the next slice finds; the last one ends the scan."""
        until, found = self._clock() + SLICE_SECONDS, []
        for count, look in enumerate(self._under_way or (), start=1):
            if look is not None:
                found.append(look)
            if count >= self.most or self._clock() >= until:
                return found
        if self._under_way is not None:
            self._under_way = None
            self.asked.end(self._clock())
        return found

    def end(self) -> None:
        """Stop the scan."""
        self._under_way, self.is_wanted_again = None, False


class FolderScans:
    """The scans of one folder, and of single folders below it that events name.

    A tree that is moved in causes an event for each of its folders: a folder that has not changed since it was listed
    is not listed again.
    """

    def __init__(
        self,
        folder: str,
        report: Callable[[OSError], None],
        *,
        left: Callable[[str, Why], None] = lambda *_: None,
        inspect: Callable[[str, Stamp], Writer | None] = lambda *_: None,
        clock: Clock = monotonic,
    ) -> None:
        """Prepare; ``report`` receives errors, ``left`` what is left out.

        ``inspect`` is called for each file of the whole folder, within its slice.
        """
        self._folder, self._report, self._left, self._inspect = folder, report, left, inspect
        self.whole = IncrementalScan(self._scan_whole, clock=clock)
        self._below = IncrementalScan(self._scans_below, clock=clock)
        self._wanted: OrderedDict[str, float] = OrderedDict()
        self._listed: dict[str, tuple[int, int]] = {}  # inode and mtime of a folder when it was listed
        self.gone: set[str] = set()  # scheduled folders that do not exist any more; the caller removes them

    @property
    def has_more(self) -> bool:
        """Whether any scan is running or scheduled."""
        whole = self.whole.is_under_way or self.whole.is_wanted_again
        return whole or self._below.is_under_way or bool(self._wanted)

    def begin(self) -> bool:
        """Start a scan of the whole folder and return True; if one is running, schedule another one after it."""
        if not self.whole.begin():
            return False
        self._wanted.clear()
        self._listed.clear()
        return True

    def want(self, folder: str, at: float = 0.0) -> None:
        """Scan one folder below before the rest; ``take_below`` returns ``at`` with its files."""
        if folder == self._folder or len(self._wanted) >= MOST_FOLDERS:
            self.whole.is_wanted_again = True
            self._wanted.clear()
        elif not self.will_list(os.path.dirname(folder)):
            self._wanted[folder] = at

    def will_list(self, folder: str) -> bool:
        """Return whether a folder, or one above it, is scheduled."""
        return bool(self._wanted) and any(above in self._wanted for above in _upwards(folder, self._folder))

    def end(self) -> None:
        """Stop all scans, when the backlog is full."""
        self.whole.end()
        self._below.end()
        self._wanted.clear()
        self._listed.clear()

    def take(self) -> list[tuple[str, Stamp, Writer | None]]:
        """Return the files of the next slice of the whole folder, with what ``inspect`` returned."""
        return self.whole.take()

    def take_below(self) -> list[tuple[str, Stamp, float]]:
        """Return path, stamp and ``at`` of the files of the next slice of the scheduled folders."""
        if self._wanted or self._below.is_under_way:
            self._below.begin()
        return self._below.take()

    def _file_of(self, step: tuple[str, Stamp | Why] | None) -> tuple[str, Stamp] | None:
        match step:
            case (path, Stamp() as mark):
                return path, mark
            case (path, Why() as why):
                self._left(path, why)
        return None

    def _scan_whole(self) -> Iterator[tuple[str, Stamp, Writer | None] | None]:
        for step in scan_steps(self._folder, report=self._report):
            found = self._file_of(step)
            yield None if found is None else (*found, self._inspect(*found))

    def _scans_below(self) -> Iterator[tuple[str, Stamp, float] | None]:
        while self._wanted:
            folder, at = self._wanted.popitem(last=False)
            for step in scan_steps(folder, report=self._report_below, scandir=self._list_changed):
                found = self._file_of(step)
                yield None if found is None else (*found, at)

    def _report_below(self, error: OSError) -> None:
        """Note a folder that is gone; report any other error."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            self._report(error)
            return
        self._listed.clear()  # it may come back unchanged after its files were forgotten
        if len(self.gone) < MOST_FOLDERS:
            self.gone.add(os.fsdecode(error.filename))

    def _list_changed(self, folder: str) -> "AbstractContextManager[Iterator[os.DirEntry[str]]]":
        """List a folder; return nothing if it has not changed since it was listed."""
        found = os.lstat(folder)
        if not mode.S_ISDIR(found.st_mode):
            raise NotADirectoryError(0, "not a folder", folder)
        looks = found.st_ino, found.st_mtime_ns
        if self._listed.get(folder) == looks:
            return nullcontext(iter(()))
        if len(self._listed) >= MOST_FOLDERS:
            self._listed.clear()
        self._listed[folder] = looks
        return os.scandir(folder)


class FolderComparison:
    """Scans of a folder of classes that detect changes since the last scan."""

    def __init__(self, folder: str, report: Callable[[OSError], None], *, clock: Clock = monotonic) -> None:
        """Prepare; ``report`` receives errors."""
        self.scan = IncrementalScan(lambda: scan_steps(folder, report=report, rule_at_top=rule_for_folder), clock=clock)
        self._sum = 0
        self._seen: int | None = None

    def differs(self) -> bool:
        """Take the next slice; return whether the scan has ended and found other versions than the one before."""
        if not self.scan.is_under_way:
            return False
        found = (step for step in self.scan.take() if isinstance(step[1], Stamp))
        self._sum = (self._sum + sum(map(hash, found))) % 2**64  # independent of their order
        if self.scan.is_under_way:
            return False
        before, self._seen, self._sum = self._seen, self._sum, 0
        return before is not None and before != self._seen


def looked_at_until(noted_ns: int, now_ns: int) -> int:
    """Return the time from which changes may not have been seen, from the noted time of the last scan.

    Times are nanoseconds since the epoch. If the clock was set back since, this is 0.
    """
    return 0 if noted_ns > now_ns else noted_ns - CLOCK_SLACK_NS
