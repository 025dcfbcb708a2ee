"""Reading and atomic writing of small files in folders that other users may own; stamps and hashes.

A link, a pipe or a huge file under the name of such a file must not be written through, waited for or read into memory.
"""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from sortd.events import Stamp, signed

_HALF = 2**63
MOST_BYTES = 64 << 20  # default size limit of files with settings, facts or a model's configuration

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})

Name = str | os.PathLike[str]


@contextmanager
def open_folder(path: Name, *, follow: bool = False) -> Iterator[int]:
    """Yield a descriptor of a folder, which must not be a symbolic link unless ``follow``.

    Raises:
        OSError: it cannot be opened; ``filename`` is the path.
    """
    with _naming(path):
        descriptor = os.open(path, _FOLDER_FLAGS if follow else _FOLDER_FLAGS | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_descriptor(path: Name, flags: int, mode: int = 0o666, *, folder: int | None = None) -> Iterator[int]:
    """Yield a descriptor of a file, by its path or by its name in a folder. Raises OSError."""
    descriptor = os.open(path, flags, mode, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_regular(path: Name, *, limit: int = MOST_BYTES, folder: int | None = None, follow: bool = False) -> bytes:
    """Return the content of a regular file without blocking.

    Args:
        path: the file; with ``folder``, a descriptor, only its last component is used.
        limit: the largest size in bytes.
        folder: descriptor of its folder.
        follow: whether the file may be a symbolic link.

    Raises:
        OSError: it is not a regular file, is larger than the limit, or cannot be read; ``filename`` is the path.
    """
    with _naming(path):
        descriptor = open_regular(path, folder=folder, follow=follow)
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")
        return content


def open_regular(path: Name, *, folder: int | None = None, follow: bool = False) -> int:
    """Open a regular file for reading without blocking, and return its descriptor; see ``read_regular``."""
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
    """Create or replace a file, also a link, atomically.

    Args:
        path: the file; with ``folder``, only its last component is used.
        content: the new content.
        folder: descriptor of its folder; default: the path's folder, which may be a link.
        mode: its permissions; default: 0666 without the umask.
        durable: whether to sync the file and its name.

    Raises:
        OSError: it cannot be written; an existing file is unchanged, and ``filename`` is the path.
    """
    own = nullcontext(folder) if folder is not None else open_folder(os.path.dirname(path) or os.curdir, follow=True)
    with _naming(path), own as place:
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
            with suppress(OSError):  # the disk may refuse this as well; no other file has this name
                os.unlink(beside, dir_fd=place)
            raise
        if durable:
            sync_folder(place)


def _name(path: Name, folder: int | None) -> str:
    return os.fspath(path) if folder is None else os.path.basename(path)


@contextmanager
def _naming(path: Name) -> Iterator[None]:
    """Set the path in every OSError, instead of a descriptor or a temporary name."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None
        raise


def sync_folder(folder: int) -> None:
    """Sync the names in an open folder, if its file system supports that. Raises OSError."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def text_of(text: str) -> str:
    """Return a text as UTF-8 has it; the bytes of names that are not UTF-8 are written in hexadecimal."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def readable_json(facts: object, *, encoding: str | None = "utf-8", **options: Any) -> str:  # noqa: ANN401 -- of json.dumps
    """Return JSON with unescaped letters of every language, so that names can be searched for.

    Characters that are not printable, such as terminal controls, and bytes that are not UTF-8 are escaped; if
    ``encoding`` is not UTF-8, all characters outside ASCII.
    """
    if (encoding or "utf-8").replace("-", "").lower() != "utf8":
        return json.dumps(facts, **options)
    text = json.dumps(facts, ensure_ascii=False, **options)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def write_json(
    path: Name,
    facts: Mapping[str, Any],
    *,
    folder: int | None = None,
    mode: int | None = None,
    durable: bool = True,
    indent: int | None = None,
) -> None:
    """Create or replace a file with JSON in UTF-8, as ``write_atomic`` does; bytes that are not UTF-8 are escaped."""
    text = json.dumps(facts, indent=indent, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode("utf-8", "backslashreplace"), folder=folder, mode=mode, durable=durable)


def sync_folder_at(path: Name) -> None:
    """Sync the names in a folder. Raises OSError."""
    with open_folder(path, follow=True) as folder:
        os.fsync(folder)


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file's status, its times modulo 2**64."""
    mtime_ns, ctime_ns = status.st_mtime_ns, status.st_ctime_ns
    if not (-_HALF <= mtime_ns < _HALF and -_HALF <= ctime_ns < _HALF):
        mtime_ns, ctime_ns = signed(mtime_ns), signed(ctime_ns)
    return Stamp(status.st_dev, status.st_ino, status.st_size, mtime_ns, ctime_ns)


def sha256_of(file: int | Name, *, folder: int | None = None) -> str:
    """Return the hexadecimal sha256 of a regular file, or of an open one, which stays open.

    With ``folder``, a descriptor, only the last component of the path is used, and a symbolic link is not followed.
    Raises OSError.
    """
    descriptor = file if isinstance(file, int) else open_regular(file, folder=folder, follow=folder is None)
    with open(descriptor, "rb", closefd=descriptor != file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def identity_of(path: Name, *, follow: bool = True) -> tuple[int, int] | None:
    """Return device and inode of a path; None if it does not exist or cannot be read."""
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def shipped(name: str) -> str:
    """Return the path of a file that is distributed with sortd: in the package, in a checkout beside it."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "shipped", name)
    return inside if os.path.exists(inside) else os.path.join(os.path.dirname(package), name)
