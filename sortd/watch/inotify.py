"""How far inotify sees on this machine: where it is blind, what the kernel grants, which folders it does not watch.

Everything is read from /proc; nothing here watches. ``sortd check`` and ``sortd status`` use it, too.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sortd.names import rule_below

# Changes made by another machine, or by the host of a virtual one, raise no event here: inotify(7), "Limitations".
_BLIND_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "davfs"),
        *("9p", "v9fs", "drvfs", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "fakeowner", "gfs2", "ocfs2"),
        *("fuse.sshfs", "fuse.rclone", "fuse.davfs2", "fuse.s3fs", "fuse.goofys", "fuse.gcsfuse", "fuse.ceph"),
        *("fuse.glusterfs", "fuse.gvfsd-fuse", "fuse.vmhgfs-fuse", "fuse.grpcfuse", "fuse.osxfs", "fuse.smbnetfs"),
        *("fuse.curlftpfs", "fuse.mergerfs-nfs", "fuse.juicefs", "fuse.seaweedfs"),
    }
)
_OCTAL = re.compile(rb"\\([0-7]{3})")  # how the kernel writes a space in a mount point: \040


@dataclass(frozen=True, slots=True)
class Limits:
    """What the kernel grants each user (inotify(7)); ``None`` where /proc does not say."""

    max_user_watches: int | None
    max_user_instances: int | None
    max_queued_events: int | None


def limits(folder: str = "/proc/sys/fs/inotify") -> Limits:
    """Read the limits in force."""
    return Limits(**{name: _number(os.path.join(folder, name)) for name in Limits.__slots__})


def is_blind(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """Name the file system below ``path`` where inotify misses what other machines do there, else ``None``.

    Raises:
        OSError: The table of mounts cannot be read.
    """
    kind = file_system_of(path, mountinfo=mountinfo)
    return kind if kind in _BLIND_FILE_SYSTEMS else None


def file_system_of(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Name the type of the file system that ``path`` (which need not exist yet) lies on, as mount(8) calls it."""
    real = os.fsencode(os.path.realpath(path))
    best, kind = b"", ""
    with open(mountinfo, "rb") as table:
        for line in table:
            before, _, after = line.partition(b" - ")  # optional fields end with a lone dash: proc(5)
            point = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), before.split()[4])
            # Of two mounts on one point the later covers the earlier.
            if len(point) >= len(best) and (real + b"/").startswith(point.rstrip(b"/") + b"/"):
                best, kind = point, after.split()[0].decode()
    return kind


def instances() -> frozenset[int]:
    """List the inotify descriptors that this process has open."""
    return frozenset(
        int(name) for name in os.listdir("/proc/self/fd") if _target(f"/proc/self/fd/{name}").endswith("inotify")
    )


def watched_inodes(descriptors: Iterable[int]) -> frozenset[int]:
    """List the inodes that these inotify descriptors watch: what is really so, whatever a library believes."""
    found: set[int] = set()
    for descriptor in descriptors:
        try:
            with open(f"/proc/self/fdinfo/{descriptor}") as lines:
                found.update(int(line.split("ino:")[1].split()[0], 16) for line in lines if line.startswith("inotify"))
        except FileNotFoundError:  # closed meanwhile
            continue
    return frozenset(found)


def unwatched(folder: str, watched: frozenset[int]) -> Iterator[str | None]:
    """Yield the folders at and below ``folder`` that can be listed and are not watched, and None for each entry.

    inotify_add_watch fails for a sub-folder (limit, rights, a race) without a word from watchdog. Where the file system
    shows other numbers of inodes than it uses (some overlays), nothing is claimed.
    """
    if _inode(folder) not in watched:
        return
    for below in folders_of(folder):
        is_missed = below is not None and _inode(below) not in watched and not _is_left_out(below, folder)
        yield below if is_missed else None


def advice(error: OSError, *, folders: int | None = None, granted: Limits | None = None) -> str:
    """Say in a sentence what stopped inotify and which setting mends it.

    "No space left on device" is the limit of watches, not a full disk. ``folders`` are to be watched, where known.
    """
    granted = granted or limits()
    if error.errno == errno.ENOSPC:
        wanted = max(524_288, 2 * (folders or 0))
        return (
            f"the limit of watches for this user is reached (fs.inotify.max_user_watches = "
            f"{granted.max_user_watches}); raise it: sysctl -w fs.inotify.max_user_watches={wanted}, "
            f"and for good in /etc/sysctl.d/60-sortd.conf"
        )
    if error.errno == errno.EMFILE:
        return (
            f"the limit of inotify instances for this user (fs.inotify.max_user_instances = "
            f"{granted.max_user_instances}) or of open files (ulimit -n, LimitNOFILE=) is reached; raise it: "
            f"sysctl -w fs.inotify.max_user_instances=1024, and for good in /etc/sysctl.d/60-sortd.conf"
        )
    return f"{os.strerror(error.errno)}" if error.errno else str(error)


def folders_of(folder: str, *, leave_out: frozenset[str] = frozenset()) -> Iterator[str | None]:
    """Yield the folders at and below ``folder`` that can be listed, None for each entry; links are not followed."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    yield None
                    if entry.is_dir(follow_symlinks=False) and entry.path not in leave_out:
                        waiting.append(entry.path)
        except OSError:  # vanished, or not ours to list: nothing below it can be handled anyway, and the scan says so
            continue
        yield current


def _is_left_out(path: str, folder: str) -> bool:
    return rule_below(path, os.path.dirname(folder)) is not None


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
