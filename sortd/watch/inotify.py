"""inotify on this machine: file systems without events, kernel limits, the folders to watch and those really watched.

What the kernel knows is read from /proc. ``sortd check`` and ``sortd status`` use this module, too.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sortd.layout import rule_below

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
# Their times are of this machine's clock, and they store a ctime: FAT and exFAT do not. Other types may be remote.
_LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "f2fs", "jfs", "nilfs2", "zfs", "tmpfs", "ramfs", "overlay"}
)
DEEP = ("Images", "Clases")  # watched at any depth
STANDARD = (*DEEP, "Dataset", "Review", ".sortd")
_OCTAL = re.compile(rb"\\([0-7]{3})")  # an escape in a mount point, such as \040 for a space


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of each user (inotify(7)); None if /proc does not list them."""

    max_user_watches: int | None
    max_user_instances: int | None


def limits(folder: str = "/proc/sys/fs/inotify") -> Limits:
    """Read the current limits."""
    return Limits(**{name: _number(os.path.join(folder, name)) for name in Limits.__slots__})


def is_blind(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """Return the type of the file system of ``path`` if inotify misses changes by other machines on it, else None.

    Raises OSError.
    """
    kind = file_system_of(path, mountinfo=mountinfo)
    return kind if kind in _BLIND_FILE_SYSTEMS else None


def local_device(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> int | None:
    """Return the device number of a path whose file times are of this machine's clock; None if another may set them."""
    try:
        is_local = file_system_of(path, mountinfo=mountinfo) in _LOCAL_FILE_SYSTEMS
        return os.stat(path).st_dev if is_local else None
    except OSError:
        return None


def file_system_of(path: str, *, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system of ``path``, which need not exist, as named by mount(8)."""
    real = os.fsencode(os.path.realpath(path))
    best, kind = b"", ""
    with open(mountinfo, "rb") as table:
        for line in table:
            before, _, after = line.partition(b" - ")  # optional fields end with a lone dash: proc(5)
            point = _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), before.split()[4])
            # The later of two mounts on one point hides the earlier.
            if len(point) >= len(best) and (real + b"/").startswith(point.rstrip(b"/") + b"/"):
                best, kind = point, after.split()[0].decode()
    return kind


def instances() -> frozenset[int]:
    """Return the inotify descriptors of this process."""
    return frozenset(
        int(name) for name in os.listdir("/proc/self/fd") if _target(f"/proc/self/fd/{name}").endswith("inotify")
    )


def watched_inodes(descriptors: Iterable[int]) -> frozenset[int]:
    """Return the inodes that these inotify descriptors watch, according to the kernel."""
    found: set[int] = set()
    for descriptor in descriptors:
        try:
            with open(f"/proc/self/fdinfo/{descriptor}") as lines:
                found.update(int(line.split("ino:")[1].split()[0], 16) for line in lines if line.startswith("inotify"))
        except FileNotFoundError:  # closed meanwhile
            continue
    return frozenset(found)


def unwatched(folder: str, watched: frozenset[int]) -> Iterator[str | None]:
    """Yield the listable folders at and below ``folder`` that are not watched, and None for each entry.

    watchdog does not report a failed inotify_add_watch for a sub-folder (limit, permissions, race). Nothing is yielded
    where the file system shows other inode numbers than it uses (some overlays).
    """
    if _inode(folder) not in watched:
        return
    for below in folders_of(folder):
        is_missed = below and _inode(below) not in watched and rule_below(below, os.path.dirname(folder)) is None
        yield below if is_missed else None


def advice(error: OSError, *, folders: int | None = None, granted: Limits | None = None) -> str:
    """Return a sentence that names the limit that inotify reached, and how to raise it for ``folders``.

    "No space left on device" means the limit of watches, not a full disk.
    """
    granted = granted or limits()
    if error.errno == errno.ENOSPC:
        wanted = max(524_288, 2 * (folders or 0))
        return (
            f"the limit of watches of this user is reached (fs.inotify.max_user_watches = "
            f"{granted.max_user_watches}); raise it: sysctl -w fs.inotify.max_user_watches={wanted}, "
            f"permanently in /etc/sysctl.d/60-sortd.conf"
        )
    if error.errno == errno.EMFILE:
        return (
            f"the limit of inotify instances of this user (fs.inotify.max_user_instances = "
            f"{granted.max_user_instances}) or of open files (ulimit -n, LimitNOFILE=) is reached; raise it: "
            f"sysctl -w fs.inotify.max_user_instances=1024, permanently in /etc/sysctl.d/60-sortd.conf"
        )
    return f"{os.strerror(error.errno)}" if error.errno else str(error)


def folders_of(folder: str, *, leave_out: frozenset[str] = frozenset()) -> Iterator[str | None]:
    """Yield the listable folders at and below ``folder``, and None for each entry; links are not followed."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    yield None
                    if entry.is_dir(follow_symlinks=False) and entry.path not in leave_out:
                        waiting.append(entry.path)
        except OSError:  # the scan reports it
            continue
        yield current


@dataclass(frozen=True, slots=True)
class Place:
    """One folder to watch."""

    path: str
    recursive: bool


def places_of_dataset(root: str, *, max_folders: int = 2_000, max_entries: int = 200_000) -> tuple[Place, ...]:
    """Return the folders to watch: the whole dataset, unless it is too large to walk at each start.

    One recursive watch pairs our moves from Images/ into Dataset/; two would delay each by half a second. But a tree of
    900,000 folders costs gigabytes and hours: then Images/ and Clases/ are watched at any depth, the rest at its first
    level, and the scan finds corrections deeper in Dataset/.
    """
    deep = [os.path.join(root, name) for name in DEEP]
    if _is_small(root, leave_out=frozenset(deep), max_folders=max_folders, max_entries=max_entries):
        return (Place(root, recursive=True),)
    standard = [path for name in STANDARD if os.path.isdir(path := os.path.join(root, name))]
    return Place(root, recursive=False), *(Place(path, path in deep) for path in standard)


def _is_small(root: str, *, leave_out: frozenset[str], max_folders: int, max_entries: int) -> bool:
    """Return whether a tree is small enough to watch recursively; stops walking as soon as it is not."""
    folders = entries = 0
    for folder in folders_of(root, leave_out=leave_out):
        folders, entries = folders + (folder is not None), entries + (folder is None)
        if folders > max_folders or entries > max_entries:
            return False
    return True


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
