"""The cache of pictures: JPEGs that sortd made of images, by content and size, in a folder with a size limit.

Everything here can be made again, so an error of the cache is only a warning. Several processes may use one folder.
"""

import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sortd.files import open_folder, read_regular, write_atomic

PICTURES_FOLDER = "pictures"  # in the cache directory
MAX_PICTURE_BYTES = 256_000_000
"""Size limit of the cache: about 40,000 small pictures with 500 large ones, less than the embeddings may take."""
_KEPT_SHARE = 0.8  # of the limit is kept when the oldest are removed, so that this is rare
_WRITTEN_SHARE = 1 / 8  # of the limit may be written by one process before the size is read again
_USED_SECONDS = 3600.0  # a use is noted once in this time, as the file's mtime
_MOST_BYTES = 4 << 20  # larger than any picture of 1024 x 1024 pixels
_START, _END = b"\xff\xd8\xff", b"\xff\xd9"  # of a JPEG, ITU-T T.81 annex B
_OWN_FILE = re.compile(r"[0-9a-f]{64}-[0-9]+\.jpg|\.sortd-[0-9a-f]{16}\.part")  # nothing else is removed

_LOG = logging.getLogger(__name__)


class PictureCache:
    """JPEGs in one folder, of which nobody else may be the owner; used by any number of threads."""

    def __init__(
        self,
        folder: str,
        *,
        max_bytes: int = MAX_PICTURE_BYTES,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Use a folder, which is created when needed.

        Args:
            folder: it must belong to this user, and others must not be able to write to it.
            max_bytes: size limit, above which ``prune`` removes the least recently used pictures.
            report: called with one sentence about the first problem.
        """
        self._folder, self._max_bytes, self._report = folder, max_bytes, report
        self._lock = threading.Lock()
        self._is_pruning = threading.Lock()
        self._unmeasured_bytes = max_bytes  # written since the size was read; the first ``prune`` reads it
        self._is_reported = False

    def read(self, key: str, side: int) -> bytes | None:
        """Return a picture and note its use; None if it is not there, damaged, or cannot be read.

        ``key`` has 64 hexadecimal digits; ``side`` is the longer side, in pixels.
        """
        name = _name(key, side)
        try:
            with self._private_folder(key[:2]) as folder:
                content = read_regular(name, limit=_MOST_BYTES, folder=folder)
                if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > _USED_SECONDS:
                    with suppress(OSError):  # of a read-only folder the pictures are still of use
                        os.utime(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report_once(error)
            return None
        return content if content.startswith(_START) and content.endswith(_END) else None

    def write(self, key: str, side: int, content: bytes) -> None:
        """Store a picture, unless that is not possible."""
        try:
            os.makedirs(os.path.dirname(self._folder), exist_ok=True)
            for folder in (self._folder, os.path.join(self._folder, key[:2])):
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
            with self._private_folder(key[:2]) as opened:
                write_atomic(_name(key, side), content, folder=opened, mode=0o600, durable=False)
        except OSError as error:
            self._report_once(error)
            return
        with self._lock:
            self._unmeasured_bytes += len(content)

    def prune(self) -> None:
        """Remove the least recently used pictures if all are over the limit; returns at once if few are new."""
        if self._unmeasured_bytes < self._max_bytes * _WRITTEN_SHARE or not self._is_pruning.acquire(blocking=False):
            return
        try:
            with self._lock:
                self._unmeasured_bytes = 0
            files = sorted(self._files())
            size = sum(size for _, size, _ in files)
            if size <= self._max_bytes:
                return
            for _, file_size, path in files:
                if size <= self._max_bytes * _KEPT_SHARE:
                    break
                with suppress(FileNotFoundError):  # removed by another process
                    os.unlink(path)
                size -= file_size
        except OSError as error:
            self._report_once(error)
        finally:
            self._is_pruning.release()

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield the time of the last use, in nanoseconds, the size and the path of each file of the cache."""
        for number in range(256):
            with suppress(OSError), self._private_folder(f"{number:02x}") as folder:
                for name in filter(_OWN_FILE.fullmatch, os.listdir(folder)):
                    try:
                        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # another process has removed it
                    if stat.S_ISREG(status.st_mode):
                        yield status.st_mtime_ns, status.st_size, os.path.join(self._folder, f"{number:02x}", name)

    @contextmanager
    def _private_folder(self, name: str) -> Iterator[int]:
        """Yield a descriptor of a folder of the cache; a file in it is one that this user wrote.

        Raises:
            OSError: it cannot be opened, belongs to somebody else, or others may write to it.
        """
        with open_folder(self._folder) as whole, open_folder(os.path.join(self._folder, name)) as part:
            for status in (os.fstat(whole), os.fstat(part)):
                if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise PermissionError(errno.EPERM, "it belongs to another user, or others may write to it")
            yield part

    def _report_once(self, error: OSError) -> None:
        with self._lock:
            is_new, self._is_reported = not self._is_reported, True
        if is_new:
            self._report(f"pictures are not cached in {self._folder}: {error.strerror}; each is made when it is needed")


def _name(key: str, side: int) -> str:
    return f"{key}-{side}.jpg"
