"""Small files of sortd's own, read and written where other people may own the folder; what tells versions apart.

A link, a pipe or a huge file that somebody put under the name of such a file must not be written through, waited for
or read into memory. What is written is whole or not there, whatever ends the process.
"""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sortd.events import Stamp

MOST_BYTES = 64 << 20  # the most that a file of settings, facts or a model's configuration may have

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})

Name = str | os.PathLike[str]


@contextmanager
def open_folder(path: Name) -> Iterator[int]:
    """Yield a descriptor of a folder whose last component is no symbolic link.

    Raises:
        OSError: there is no such folder; ``filename`` is the path.
    """
    with _naming(path):
        descriptor = os.open(path, _FOLDER_FLAGS | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_regular(path: Name, *, limit: int = MOST_BYTES, folder: int | None = None, follow: bool = False) -> bytes:
    """Return the content of a regular file without ever waiting for it.

    Args:
        path: the file; with ``folder``, only its last component is used.
        limit: the most bytes that it may have.
        folder: descriptor of the folder that it is looked for in.
        follow: whether it may be a symbolic link.

    Raises:
        OSError: it is absent, no regular file, larger than the limit, or cannot be read; ``filename`` is the path.
    """
    with _naming(path):
        descriptor = open_regular(path, folder=folder, follow=follow)
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")
        return content


def open_regular(path: Name, *, folder: int | None = None, follow: bool = False) -> int:
    """Open a regular file for reading without ever waiting for it, and return its descriptor; see ``read_regular``.

    Raises:
        OSError: it is absent, no regular file, or cannot be opened; ``filename`` is the path.
    """
    with _naming(path):
        flags = _READ_FLAGS if follow else _READ_FLAGS | os.O_NOFOLLOW
        try:
            descriptor = os.open(_name(path, folder), flags, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP and not follow:
                raise OSError(errno.ELOOP, "it is a symbolic link") from error
            raise
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            os.close(descriptor)
            if stat.S_ISDIR(kind):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor


def write_atomic(
    path: Name, content: bytes, *, folder: int | None = None, mode: int | None = None, durable: bool = True
) -> None:
    """Put a file in the place of whatever stands under its name, link or not; a reader sees the old one or the new.

    Args:
        path: the file; with ``folder``, only its last component is used.
        content: all of it.
        folder: descriptor of the folder that it is to lie in; else the path's folder is opened, which may be a link.
        mode: its permissions; 0666 less the umask otherwise.
        durable: whether it is to survive a power cut before this returns.

    Raises:
        OSError: it cannot be written; what stood there is untouched, and ``filename`` is the path.
    """
    with _naming(path), _opened(path, folder) as place:
        beside = f".sortd-{secrets.token_hex(8)}.part"
        descriptor = os.open(beside, _WRITE_FLAGS, 0o666 if mode is None else mode, dir_fd=place)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if mode is not None:
                    os.fchmod(descriptor, mode)
                if durable:
                    os.fsync(descriptor)
            os.replace(beside, _name(path, place), src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with suppress(OSError):  # whatever refused the writing may refuse this; the name is nobody's
                os.unlink(beside, dir_fd=place)
            raise
        if durable:
            sync_folder(place)


def _name(path: Name, folder: int | None) -> str:
    return os.fspath(path) if folder is None else os.path.basename(path)


@contextmanager
def _opened(path: Name, folder: int | None) -> Iterator[int]:
    """Yield a descriptor of the folder that a path lies in."""
    if folder is not None:
        yield folder
        return
    descriptor = os.open(os.path.dirname(path) or os.curdir, _FOLDER_FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Name) -> Iterator[None]:
    """Let every error name the file that it is about, not the descriptor or the temporary name."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None
        raise


def sync_folder(folder: int) -> None:
    """Make the names in an open folder survive a power cut, where its file system can be asked to.

    Raises:
        OSError: the disk refused.
    """
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def readable_json(facts: object, *, encoding: str | None = "utf-8", **options: Any) -> str:  # noqa: ANN401 -- of json.dumps
    """Return JSON in which letters of every language stand as they are, so that a name can be searched for.

    Escaped are characters that cannot be seen, among them those that paint a terminal, and bytes that are no UTF-8.

    Args:
        facts: what to write.
        encoding: of the stream; where it is not UTF-8, everything beyond ASCII is escaped.
        options: of ``json.dumps``.
    """
    if (encoding or "utf-8").replace("-", "").lower() != "utf8":
        return json.dumps(facts, **options)
    text = json.dumps(facts, ensure_ascii=False, **options)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def sync_folder_at(path: Name) -> None:
    """Make the names in a folder survive a power cut.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, _FOLDER_FLAGS)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of the version that was looked at."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def sha256_of(file: int | Name) -> str:
    """Return the sha256, in hexadecimal, of a regular file's bytes, or of an open file's, which stays open.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = file if isinstance(file, int) else open_regular(file, follow=True)
    with open(descriptor, "rb", closefd=descriptor != file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def identity_of(path: Name, *, follow: bool = True) -> tuple[int, int] | None:
    """Return device and inode of what stands under a path; None where nothing can be seen."""
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError:
        return None
    return found.st_dev, found.st_ino
