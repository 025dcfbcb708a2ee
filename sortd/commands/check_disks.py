"""Checks of the disks: one file system or several, by trying; what moves cost then; room, clock and watching."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sortd.commands.console import counted, megabytes
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.events import Writer
from sortd.layout import Area, Layout
from sortd.moving.renaming import CANNOT_RENAME, rename_new, writer_of
from sortd.watch import inotify

LITTLE_ROOM_BYTES = 1_000_000_000
NO_ROOM_BYTES = 50_000_000
LITTLE_ROOM_SHARE = 0.02
CLOCK_SECONDS = 5.0
"""A file made now whose time differs by more comes from another machine's clock."""

EARLIEST = 1_735_689_600.0
"""2025-01-01: a clock before sortd was written is wrong."""

Rename = Callable[[int, str, int, str], None]


def file_system_findings(layout: Layout, *, rename: Rename = rename_new) -> Iterator[Finding]:
    """Try how a file moves from Images/ to each folder that it may go to, with a file of our own."""
    images = layout.area(Area.IMAGES)
    try:
        folder = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # missing or not ours: the folder checks say so
    name = f".sortd-check-{os.getpid()}.part"
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder))
    except OSError:
        os.close(folder)
        return
    try:
        yield from _trial_findings(layout, folder, name, rename)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        os.close(folder)


def room_findings(places: Sequence[tuple[str, Path]]) -> Iterator[Finding]:
    """Check how much room is left, once for each file system.

    Args:
        places: what is kept there, and the folder; one that is not there yet counts as the nearest above it.
    """
    seen: set[int] = set()
    for kept, folder in places:
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is None or there.stat().st_dev in seen:
            continue
        seen.add(there.stat().st_dev)
        facts = os.statvfs(there)
        free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        if free < NO_ROOM_BYTES:
            yield error(Topic.MACHINE, there, f"its disk is full: {megabytes(free)} left for {kept}", "make room")
        elif free < LITTLE_ROOM_BYTES or free < LITTLE_ROOM_SHARE * whole:
            yield warning(
                Topic.MACHINE, there, f"its disk is nearly full: {megabytes(free)} left for {kept}", "make room"
            )
        if facts.f_files and facts.f_favail < 1000:  # noqa: PLR2004 -- btrfs counts none; a thousand are soon used
            yield warning(Topic.MACHINE, there, f"its disk has only {facts.f_favail} inodes left", "remove small files")


def clock_findings(*, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Check that the clock can be right: the history is told by it."""
    if clock() < EARLIEST:
        shown = time.strftime("%Y-%m-%d", time.gmtime(clock()))
        yield warning(
            Topic.MACHINE, "clock", f"says {shown}: history and undo by time would lie", "set it (timedatectl)"
        )


def watching_findings(
    layouts: Sequence[Layout], polling: str, *, granted: inotify.Limits | None = None
) -> Iterator[Finding]:
    """Check whether changes can be watched or must be polled for, and whether the kernel grants enough watches."""
    granted = granted or inotify.limits()
    watched = []
    for layout in layouts:
        blind = inotify.is_blind(os.fspath(layout.root))
        if blind and polling == "never":
            mend = "set `polling: auto`"
            what = f"lies on {blind}, where changes by other machines raise no event, and polling is off"
            yield warning(Topic.WATCHING, layout.root, what, mend)
        elif blind or polling == "always":
            why = f"lies on {blind}, where changes by other machines raise no event" if blind else "`polling: always`"
            yield note(Topic.WATCHING, layout.root, f"is polled: {why}")
        else:
            watched.append(layout)
    folders = sum(_folders(layout) for layout in watched)
    if granted.max_user_watches is not None and folders > granted.max_user_watches // 2:
        full = OSError(errno.ENOSPC, "")
        worst = error if folders > granted.max_user_watches else warning
        what = f"{counted(folders, 'folder')} are to be watched; " + inotify.advice(
            full, folders=folders, granted=granted
        )
        yield worst(Topic.WATCHING, "fs.inotify.max_user_watches", what, "or set `polling: always`")
    if watched and granted.max_user_instances is not None and len(watched) + 2 > granted.max_user_instances:
        full = OSError(errno.EMFILE, "")
        yield error(Topic.WATCHING, "fs.inotify.max_user_instances", inotify.advice(full, granted=granted))


def _trial_findings(layout: Layout, folder: int, name: str, rename: Rename) -> Iterator[Finding]:
    slow = [
        area for area in (Area.DATASET, Area.REVIEW, Area.REJECTED) if not _moves(layout, area, folder, name, rename)
    ]
    if slow:
        shown = ", ".join(f"{area.value}/" for area in slow)
        yield note(
            Topic.FILE_SYSTEM,
            layout.root,
            f"a rename from Images/ into {shown} is refused: each move there is a copy that is verified and synced "
            "before the original goes, so it takes longer and needs the room twice",
            "to have renames, put both on one file system; in a systemd unit name one common ReadWritePaths=",
        )
    elif all(layout.area(area).is_dir() for area in (Area.DATASET, Area.REVIEW, Area.REJECTED)):
        yield note(Topic.FILE_SYSTEM, layout.root, "moves are renames within one file system")
    path = os.fspath(layout.area(Area.IMAGES) / name)
    if writer_of(path) is Writer.UNKNOWN:
        what = "tells nobody whether a file is still being written, so each one must hold still for 5 s at least"
        yield note(Topic.FILE_SYSTEM, layout.area(Area.IMAGES), what)
    differs = os.stat(name, dir_fd=folder).st_mtime - time.time()
    if abs(differs) > CLOCK_SECONDS:
        what = f"its file server's clock is {abs(differs):.0f} s {'ahead' if differs > 0 else 'behind'}"
        yield warning(Topic.MACHINE, layout.area(Area.IMAGES), what, "synchronise both clocks (NTP)")


def _moves(layout: Layout, area: Area, folder: int, name: str, rename: Rename) -> bool:
    """Rename the trial file into an area and back; True also where the area is not there to be tried."""
    try:
        target = os.open(layout.area(area), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        rename(folder, name, target, name)
    except OSError as refusal:
        os.close(target)
        return refusal.errno not in CANNOT_RENAME  # no rights: the folder checks say so
    try:
        rename(target, name, folder, name)
    except OSError:
        os.unlink(name, dir_fd=target)
        raise
    finally:
        os.close(target)
    return True


def _folders(layout: Layout) -> int:
    """Count the folders that would be watched, links not followed; what is filed lies one level deep."""
    deep = sum(1 for area in (Area.CLASES, Area.IMAGES) for _ in os.walk(layout.area(area)))
    return deep + sum(1 + _count_folders(layout.area(area)) for area in (Area.DATASET, Area.REVIEW, Area.REJECTED))


def _count_folders(folder: Path) -> int:
    with suppress(OSError), os.scandir(folder) as entries:
        return sum(1 for entry in entries if entry.is_dir(follow_symlinks=False))
    return 0
