"""A scan names every file that stands in a folder: the truth which the watcher's hints only hurry along.

What ``names.py`` has a rule for is left out, with the reason: what browsers, sync clients, editors and file managers
write while they are not done, or for themselves. Nothing is ever opened, so a placeholder of a cloud drive is not
fetched by looking.
"""

import os
import stat as mode
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from sortd.files import stamp_of
from sortd.messages import Stamp
from sortd.names import CONTROLS, Reason, Rule, Why, owner_of, rule_below, rule_for

Listing = Callable[[str], AbstractContextManager[Iterable["os.DirEntry[str]"]]]
"""Lists a folder; ``os.scandir`` does."""

_LINK = Why(Reason.SYMBOLIC_LINK, "it is a symbolic link, which is not followed; put the file itself in its place")
_SPECIAL = Why(Reason.SPECIAL_FILE, "it is no regular file but a pipe, a socket or a device")


def stamp(path: str, *, stat: Callable[[str], os.stat_result] = os.lstat) -> Stamp | None:
    """Stamp the version of the file that stands at ``path`` now.

    Returns:
        The stamp, or ``None`` where nothing stands there or what does is no regular file (a link, a folder, a pipe).

    Raises:
        OSError: The disk or the rights refused the look; nothing is known about the file then.
    """
    try:
        found = stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stamp_of(found) if mode.S_ISREG(found.st_mode) else None


def scan(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp]]:
    """Name every eligible regular file at any depth below ``folder``, lazily, in no order, with its stamp.

    Takes what ``scan_steps`` takes, and leaves out what that gives a reason for.
    """
    for path, found in scan_all(folder, report=report, rule_at_top=rule_at_top, scandir=scandir):
        if isinstance(found, Stamp):
            yield path, found


def scan_all(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp | Why]]:
    """Scan like ``scan``, and name what is left out, too, with the reason."""
    steps = scan_steps(folder, report=report, rule_at_top=rule_at_top, scandir=scandir)
    return (step for step in steps if step is not None)


def scan_steps(
    folder: str,
    *,
    report: Callable[[OSError], None],
    rule_at_top: Callable[[str], Rule | None] = rule_for,
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp | Why] | None]:
    """Name everything that stands below ``folder``, at any depth, lazily and in no order, but for ordinary folders.

    What a rule of ``names.py`` leaves out, and what is no regular file, comes with the reason; a folder that is left
    out comes once for all that is in it. No symbolic link is followed below ``folder``; nothing is opened.

    Args:
        folder: Where to look; an absolute path.
        report: Told why a folder or file (``error.filename``) could not be looked at. ``folder`` itself is told of
            even when it is only absent: absent is not empty. A folder below that vanishes meanwhile is not.
        rule_at_top: Judges the folders directly in ``folder``; ``rule_for_folder`` where they are classes.
        scandir: How a folder is listed.

    Yields:
        The path, and the stamp of a file or why it is left out; None for whatever else was looked at: a caller may stop
        between any two.
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
    """List what ``scan`` names, but for what a control file beside it, or beside its folder, says is unfinished.

    For folders whose files are few enough to be held at once.
    """
    files, owners = [], set()
    for path, found in scan_all(folder, report=report):
        if isinstance(found, Stamp):
            files.append((path, found))
        elif (owner := owner_of(path)) is not None:
            owners.add(owner)
    above = tuple(f"{owner}/" for owner in owners)
    return [(path, mark) for path, mark in files if not (path in owners or path.startswith(above))]


def why_left(path: str, root: str) -> Why | None:
    """Return why what stands at ``path`` is not looked at, from a look at the disk; None: it is, or nothing is there.

    Args:
        path: Of a file or folder in a dataset; absolute.
        root: The dataset.

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
    """Return which file says that ``path``, or a folder between it and ``root``, is not whole yet; None: none does.

    A program that writes into a file of its final name and size keeps beside it what is missing; of a download of many
    files, beside their folder.
    """
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
        return stamp_of(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return None
    except OSError as error:
        report(error)
        return None
