"""A scan names every file that stands in a folder: the truth which the watcher's hints only hurry along.

Names are judged here too: what browsers, sync clients, editors and file managers write while they are not done, or
for themselves, is no file of the user's and is left out until it is renamed. Nothing is ever opened, so a placeholder
of a cloud drive is not fetched by looking.
"""

import os
import re
import stat as mode
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache

from sortd.messages import Stamp

Listing = Callable[[str], AbstractContextManager[Iterable["os.DirEntry[str]"]]]
"""Lists a folder; ``os.scandir`` does."""

# A name that says "not done yet" by its ending.
_UNFINISHED_SUFFIXES = (
    ".crdownload",  # Chrome, Edge; "Unconfirmed 1234.crdownload" too
    ".crswap",  # Chrome's File System Access API
    ".opdownload",  # Opera
    ".part",  # Firefox, KDE, curl wrappers, Nextcloud
    ".partial",  # old Edge, Internet Explorer, rclone
    ".download",  # Safari: a folder of that name holds the file
    ".filepart",  # WinSCP
    ".tmp",
    ".temp",
    ".incomplete",
    ".aria2",
    ".!sync",  # Resilio
    ".!ut",  # uTorrent
    ".!qb",  # qBittorrent
    ".swp",
    ".lock",
    "~",  # backups of Emacs, gedit, `cp --backup`
)
_PREFIXES = (
    ".",  # hidden: rsync's .name.XXXXXX, .syncthing.*, .stfolder, ._*, .DS_Store, .~lock.*, .nfs*, .fuse_hidden*
    "~$",  # owner files of Office
    "~syncthing~",
)
# What file managers, servers and sync clients keep beside the user's files. Lower case: compared so.
_FURNITURE = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",  # Synology
        "@tmp",
        "@recycle",  # QNAP
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__macosx",
    }
)
# `sed -i` writes beside the file and renames: six letters of both cases and digits, so that "sediment1" is none.
_SED_BACKUP = re.compile(r"sed(?=.*[A-Z])[A-Za-z0-9]{6}")


def is_temporary(name: str) -> bool:
    """Tell whether a file or folder of this name is hidden, unfinished or a program's own, so not the user's.

    Args:
        name: One component of a path, as ``os.fsdecode`` gives it.
    """
    if name.startswith(_PREFIXES):
        return True
    lowered = name.lower()
    return lowered.endswith(_UNFINISHED_SUFFIXES) or lowered in _FURNITURE or _SED_BACKUP.fullmatch(name) is not None


def is_below_temporary(path: str, root: str) -> bool:
    """Tell whether ``path`` or any folder between it and ``root`` has a temporary or hidden name.

    Only what lies below ``root`` counts: a dataset may itself live in ``~/.local/share``.
    """
    folder, _, name = path.rpartition(os.sep)
    return path != root and (is_temporary(name) or _is_folder_below_temporary(folder, root))


@lru_cache(maxsize=1024)  # asked for each event of a storm, most of which are about a few folders
def _is_folder_below_temporary(folder: str, root: str) -> bool:
    return any(is_temporary(name) for name in os.path.relpath(folder, root).split(os.sep) if name != os.curdir)


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
    return _stamp_of(found) if mode.S_ISREG(found.st_mode) else None


def scan(
    folder: str,
    *,
    report: Callable[[OSError], None],
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp]]:
    """Name every eligible regular file at any depth below ``folder``, lazily, in no order, with its stamp.

    Eligible is what is not ``is_temporary``. No symbolic link is followed below ``folder``; nothing is opened.

    Args:
        folder: Where to look; an absolute path.
        report: Told why a folder or file (``error.filename``) could not be looked at. ``folder`` itself is told of
            even when it is only absent: absent is not empty. A folder below that vanishes meanwhile is not.
        scandir: How a folder is listed.

    Yields:
        The path and the stamp of each file.
    """
    return (found for found in scan_steps(folder, report=report, scandir=scandir) if found is not None)


def scan_steps(
    folder: str,
    *,
    report: Callable[[OSError], None],
    scandir: Listing = os.scandir,
) -> Iterator[tuple[str, Stamp] | None]:
    """Scan like ``scan``, and yield None for whatever else was looked at: a caller may stop between any two."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        yield None
        try:
            with scandir(current) as entries:
                for entry in entries:
                    if is_temporary(entry.name):
                        yield None
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found = _look(entry, report)
                        yield None if found is None else (entry.path, found)
        except (FileNotFoundError, NotADirectoryError) as error:
            if current == folder:
                report(error)
        except OSError as error:
            error.filename = error.filename or current  # readdir(3) does not know what it lists
            report(error)


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
