"""Scans name every file that stands in a folder, whole or slice by slice; watching only hurries them along.

What ``names.py`` has a rule for is left out, with the reason. Nothing is opened, so a placeholder of a cloud drive is
not fetched by looking.
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
from sortd.events import Stamp
from sortd.names import CONTROLS, Reason, Rule, Why, owner_of, rule_below, rule_for, rule_for_folder

Listing = Callable[[str], AbstractContextManager[Iterable["os.DirEntry[str]"]]]  # lists a folder; ``os.scandir`` does

_LINK = Why(Reason.SYMBOLIC_LINK, "it is a symbolic link, which is not followed; put the file itself in its place")
_SPECIAL = Why(Reason.SPECIAL_FILE, "it is no regular file but a pipe, a socket or a device")


def stamp(path: str, *, stat: Callable[[str], os.stat_result] = os.lstat) -> Stamp | None:
    """Return the stamp of the file at ``path``; ``None`` where nothing stands there, or no regular file.

    Raises:
        OSError: The disk or the rights refused the look; nothing is known about the file then.
    """
    try:
        found = stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _stamp_of(found) if mode.S_ISREG(found.st_mode) else None


def scan(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp]]:
    """Name every eligible regular file below ``folder`` with its stamp; arguments as for ``scan_steps``."""
    for step in scan_steps(folder, report=report, rule_at_top=rule_at_top, scandir=scandir):
        if step is not None and isinstance(step[1], Stamp):
            yield step[0], step[1]


def scan_all(
    folder: str, *, report: Callable[[OSError], None], rule_at_top: Callable[[str], Rule | None] = rule_for
) -> Iterator[tuple[str, Stamp | Why]]:
    """Scan like ``scan``, and name what is left out, too, with the reason."""
    return (step for step in scan_steps(folder, report=report, rule_at_top=rule_at_top) if step is not None)


def scan_steps(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp | Why] | None]:
    """Name everything that stands below ``folder``, at any depth, lazily and in no order, but for ordinary folders.

    A folder that is left out comes once for all that is in it. No symbolic link is followed; nothing is opened.

    Args:
        folder: Where to look; an absolute path.
        report: Told why a folder or file (``error.filename``) could not be looked at. ``folder`` itself is told of
            even when it is only absent; a folder below that vanishes meanwhile is not.
        rule_at_top: Judges the folders directly in ``folder``; ``rule_for_folder`` where they are classes.
        scandir: How a folder is listed.

    Yields:
        The path, and the stamp of a file or why it is left out; None for whatever else was looked at.
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
            error.filename = error.filename or current  # readdir(3) does not know what it lists
            report(error)


def whole_files(folder: str, *, report: Callable[[OSError], None]) -> list[tuple[str, Stamp]]:
    """List what ``scan`` names, but for what a control file beside it, or beside its folder, says is unfinished."""
    files, owners = [], set()
    for path, found in scan_all(folder, report=report):
        if isinstance(found, Stamp):
            files.append((path, found))
        elif (owner := owner_of(path)) is not None:
            owners.add(owner)
    above = tuple(f"{owner}/" for owner in owners)
    return [(path, mark) for path, mark in files if not (path in owners or path.startswith(above))]


def why_left(path: str, root: str) -> Why | None:
    """Return why what stands at ``path`` in the dataset at ``root`` is not looked at; None: it is, or nothing is there.

    Raises:
        OSError: The disk or the rights refused the look.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    place, why = path, None
    if (left := rule_below(path, root)) is not None:
        place, why = left[0], left[1].why
    elif (link := _link_above(path, root)) is not None:
        place, why = link, _LINK
    elif mode.S_ISLNK(found.st_mode):
        return _LINK
    elif not (mode.S_ISREG(found.st_mode) or mode.S_ISDIR(found.st_mode)):
        return _SPECIAL
    if why is None:
        return why_unfinished(path, root)
    return why if place == path else replace(why, message=f"it lies in {place}: {why.message}")


def why_unfinished(path: str, root: str) -> Why | None:
    """Return which control file says that ``path``, or a folder between it and ``root``, is not whole yet; or None."""
    while len(path) > len(root):
        for rule in CONTROLS:
            if os.path.lexists(path + rule.ending):
                message = f"{rule.program} has not finished it: {path}{rule.ending} stands beside it"
                return Why(Reason.UNFINISHED, f"{message}; it is looked at again when that is gone")
        path = os.path.dirname(path)
    return None


def _link_above(path: str, root: str) -> str | None:
    above = os.path.dirname(path)
    while len(above) > len(root):
        if os.path.islink(above):
            return above
        above = os.path.dirname(above)
    return None


def _look(entry: "os.DirEntry[str]", report: Callable[[OSError], None]) -> Stamp | None:
    """Stamp one entry; ``None`` where it vanished since the listing."""
    try:
        return _stamp_of(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return None
    except OSError as error:
        report(error)
        return None


def _stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


SLICE = 2000  # files taken in one turn of the loop, at most: about ten milliseconds
SLICE_SECONDS = 0.02  # that one slice may take: a disk across a network answers fewer looks
MOST_FOLDERS = 20_000  # of which it is remembered that they are to be scanned, or how they looked when they were
CLOCK_SLACK_NS = 5_000_000_000  # file systems and other machines stamp with other clocks than ours

Clock = Callable[[], float]
_T = TypeVar("_T")


class IncrementalScan(Generic[_T]):
    """One scan at a time, taken slice by slice, so that a million files do not keep the loop from its work."""

    def __init__(
        self,
        looks: Callable[[], Iterator[_T | None]],
        *,
        most: int = SLICE,
        pause_seconds: float = 0.0,
        clock: Clock = monotonic,
    ) -> None:
        """Prepare; nothing is looked at yet.

        Args:
            looks: begins a scan: what it finds, and None for whatever else it looks at.
            most: looks in one slice, at most.
            pause_seconds: between two scans that were asked for, at least.
            clock: seconds; what is left after ``SLICE_SECONDS`` waits for another slice.
        """
        self.most = most
        self._looks, self._clock = looks, clock
        self.asked = Throttle(pause_seconds)
        """Whether a scan is asked for; whoever takes the slices begins it when ``is_due``."""
        self._under_way: Iterator[_T | None] | None = None
        self.is_wanted_again = False  # whether another scan was asked for while this one was under way

    @property
    def is_under_way(self) -> bool:
        """Tell whether there is more to look at."""
        return self._under_way is not None

    @property
    def is_due(self) -> bool:
        """Tell whether a scan that was asked for is to begin."""
        return self._under_way is None and self.asked.is_due(self._clock())

    def begin(self) -> bool:
        """Begin, and tell so; where a scan is under way another one is to follow it instead."""
        self.is_wanted_again = self.is_under_way
        if self._under_way is None:
            self.asked.begin(self._clock())
            self._under_way = self._looks()
        return not self.is_wanted_again

    def take(self) -> list[_T]:
        """Return what the next slice finds; after the last one no scan is under way."""
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
        """Take no more of it."""
        self._under_way, self.is_wanted_again = None, False


class FolderScans:
    """The scans of one folder, and of folders below it alone, that are under way.

    A folder that an event names is scanned alone. A tree that is moved in raises an event for each of its folders: what
    was listed already and has not changed since is not listed again.
    """

    def __init__(
        self,
        folder: str,
        report: Callable[[OSError], None],
        *,
        left: Callable[[str, Why], None] = lambda *_: None,
        clock: Clock = monotonic,
    ) -> None:
        """Prepare to scan ``folder``; ``report`` is told what cannot be looked at, ``left`` what is left out."""
        self._folder, self._report, self._left = folder, report, left
        self.whole = IncrementalScan(lambda: scan_steps(folder, report=report), clock=clock)
        """The scan of the whole folder."""
        self._below = IncrementalScan(self._scans_below, clock=clock)
        self._wanted: OrderedDict[str, float] = OrderedDict()
        self._listed: dict[str, tuple[int, int]] = {}  # inode and mtime of a folder when it was listed
        self.gone: set[str] = set()
        """Folders that were wanted and are not there any more; whoever takes note of them takes them out."""

    @property
    def has_more(self) -> bool:
        """Tell whether any scan has files left to take."""
        whole = self.whole.is_under_way or self.whole.is_wanted_again
        return whole or self._below.is_under_way or bool(self._wanted)

    def begin(self) -> bool:
        """Begin to scan the whole folder, and tell so; where that is under way another one is to follow it instead."""
        if not self.whole.begin():
            return False
        self._wanted.clear()
        self._listed.clear()
        return True

    def want(self, folder: str, at: float = 0.0) -> None:
        """Scan a folder below, at any depth of it, before the rest; ``take_below`` gives ``at`` with what it finds."""
        if folder == self._folder or len(self._wanted) >= MOST_FOLDERS:
            self.whole.is_wanted_again = True
            self._wanted.clear()
        elif not self.will_list(os.path.dirname(folder)):
            self._wanted[folder] = at

    def will_list(self, folder: str) -> bool:
        """Tell whether a folder is about to be listed, or one that it lies in."""
        while self._wanted and len(folder) > len(self._folder):
            if folder in self._wanted:
                return True
            folder = os.path.dirname(folder)
        return False

    def end(self) -> None:
        """Take no more: what is left does not fit into the backlog, and is found by another scan."""
        self.whole.end()
        self._below.end()
        self._wanted.clear()
        self._listed.clear()

    def take(self) -> list[tuple[str, Stamp]]:
        """Return the files that the next slice of the whole folder finds, and tell of what is left out."""
        return [found for step in self.whole.take() if (found := self._file_of(step)) is not None]

    def take_below(self) -> list[tuple[str, Stamp, float]]:
        """Take the next slice of the folders that were wanted: path, stamp, and when the folder was asked for."""
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

    def _scans_below(self) -> Iterator[tuple[str, Stamp, float] | None]:
        while self._wanted:
            folder, at = self._wanted.popitem(last=False)
            for step in scan_steps(folder, report=self._report_below, scandir=self._list_changed):
                found = self._file_of(step)
                yield None if found is None else (*found, at)

    def _report_below(self, error: OSError) -> None:
        """Take note of a folder that is gone, which is no trouble; tell of any other."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            self._report(error)
            return
        self._listed.clear()  # it may come back as it was, and what was known of its files is forgotten meanwhile
        if len(self.gone) < MOST_FOLDERS:
            self.gone.add(os.fsdecode(error.filename))

    def _list_changed(self, folder: str) -> "AbstractContextManager[Iterator[os.DirEntry[str]]]":
        """List a folder, or nothing where it has not changed since it was listed."""
        found = os.lstat(folder)
        if not mode.S_ISDIR(found.st_mode):
            raise NotADirectoryError(0, "no folder", folder)
        looks = found.st_ino, found.st_mtime_ns
        if self._listed.get(folder) == looks:
            return nullcontext(iter(()))
        if len(self._listed) >= MOST_FOLDERS:
            self._listed.clear()
        self._listed[folder] = looks
        return os.scandir(folder)


class FolderComparison:
    """Scans of a folder of classes that tell whether it differs from the last one."""

    def __init__(self, folder: str, report: Callable[[OSError], None], *, clock: Clock = monotonic) -> None:
        """Prepare to look at ``folder``; ``report`` is told what cannot be looked at."""
        self.scan = IncrementalScan(lambda: scan_steps(folder, report=report, rule_at_top=rule_for_folder), clock=clock)
        self._sum = 0
        self._seen: int | None = None

    def differs(self) -> bool:
        """Look at the next slice; with the last, tell whether other versions stand there than at the last scan.

        The first scan tells of no difference.
        """
        if not self.scan.is_under_way:
            return False
        found = (step for step in self.scan.take() if isinstance(step[1], Stamp))
        self._sum = (self._sum + sum(map(hash, found))) % 2**64  # in whatever order they are named
        if self.scan.is_under_way:
            return False
        before, self._seen, self._sum = self._seen, self._sum, 0
        return before is not None and before != self._seen


def looked_at_until(noted_ns: int, now_ns: int) -> int:
    """Return from when on changes may not have been looked at yet, by the noted time of the last scan.

    All times are nanoseconds since the epoch. Where the clock was set back since, that is the beginning.
    """
    return 0 if noted_ns > now_ns else noted_ns - CLOCK_SLACK_NS
