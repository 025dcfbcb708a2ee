"""Opening the files that may be images: never through a link, never waiting, and only the version that is meant."""

import errno
import os
import stat

from sortd.decoding.formats import HEAD_BYTES, looks_like_image
from sortd.events import ImageRefused, Refusal, Stamp

OUR_OWN_TROUBLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What the kernel answers when this process or the machine has run out of something: no file is to blame for it."""


def open_file(path: str) -> int:
    """Open a file for reading without following a link or waiting for a pipe's writer; returns the descriptor."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of an open file."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def open_version(path: str, stamp: Stamp, max_bytes: int) -> int | ImageRefused:
    """Open one version of a file that looks like an image.

    Args:
        path: of the file.
        stamp: of the version that is meant.
        max_bytes: a larger file is refused.

    Returns:
        The descriptor, or the refusal.

    Raises:
        OSError: This process is out of descriptors or memory, which is no fault of the file.
    """
    try:
        descriptor = open_file(path)
    except OSError as error:
        return ImageRefused(path, stamp, *_why_not_opened(error))
    try:
        refusal = _why_not_taken(path, descriptor, stamp, max_bytes)
    except OSError as error:
        refusal = Refusal.DENIED, f"it cannot be read: {error.strerror}; look at its disk"
    except BaseException:
        os.close(descriptor)
        raise
    if refusal is None:
        return descriptor
    os.close(descriptor)
    return ImageRefused(path, stamp, *refusal)


def _why_not_opened(error: OSError) -> tuple[Refusal, str]:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return Refusal.VANISHED, "nothing stands under that name any more"
        case errno.ELOOP:
            return Refusal.NOT_AN_IMAGE, "it is a symbolic link, and those are not followed"
        case errno.ENXIO | errno.ENODEV:
            return Refusal.NOT_AN_IMAGE, "it is a socket or a device"
        case errno.EACCES | errno.EPERM:
            return Refusal.DENIED, "sortd has no right to read it; grant it, for instance by chmod g+r"
        case number if number in OUR_OWN_TROUBLE:
            raise error
        case _:
            return Refusal.DENIED, f"it cannot be opened: {error.strerror}; look at its disk"


def _why_not_taken(path: str, descriptor: int, stamp: Stamp, max_bytes: int) -> tuple[Refusal, str] | None:
    """Tell what can be told without decoding; None where it is an image to decode."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return Refusal.NOT_AN_IMAGE, "it is no regular file"
    if not stamp_of(status).agrees_with(stamp):
        return Refusal.CHANGED, "another version stands there by now"
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if not looks_like_image(path, head):
        return Refusal.NOT_AN_IMAGE, "neither its name nor its content says image"
    if not head:
        return Refusal.EMPTY, "it is empty"
    if status.st_size > max_bytes:
        return Refusal.TOO_LARGE, f"{status.st_size:,} bytes are over the limit of {max_bytes:,}"
    return None
