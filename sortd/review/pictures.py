"""Pictures of images for the review page: JPEGs that sortd makes itself, of two sizes.

An image is decoded in a sandboxed process only, and what is sent is encoded again from its pixels: neither its bytes
nor its metadata reach a browser. Each size has decoding processes of its own, so that a page of small pictures does not
wait for a large one, and one thread that starts them when they are needed and ends them when they are not.
"""

import hashlib
import logging
import os
import re
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

from sortd.config import Config
from sortd.errors import StartupError
from sortd.events import ImageRefused, Refusal, Stamp
from sortd.files import stamp_of
from sortd.images.decode import DecodeLimits
from sortd.images.pool import Answer, Batch, DecoderPool
from sortd.images.thumbnails import jpeg_of, whole_image
from sortd.store.pictures import PICTURES_FOLDER, PictureCache

SIDES = (160, 1024)
"""The longer sides of the pictures, in pixels: one of many on a page, and one alone."""
PROCESSES = 2  # of each size while several pictures are wanted: an image that hangs does not stop the others
DECODE_SECONDS = 10.0  # time limit for one image; nobody looks at an empty place for longer
WAIT_SECONDS = 30.0  # after which a request is answered without its picture, which is made nevertheless
IDLE_SECONDS = 300.0  # after which the processes end; each takes 50 MB
_REFUSED_KEPT = 10_000  # versions of files that are not tried again
_LASTING = frozenset({Refusal.UNREADABLE, Refusal.TOO_LARGE, Refusal.POISON, Refusal.NOT_AN_IMAGE, Refusal.EMPTY})
"""Refusals that stay the same until the file changes."""
_SHA256 = re.compile("[0-9a-f]{64}")

_LOG = logging.getLogger(__name__)

File = tuple[str, Stamp]


class Pictures:
    """JPEGs of versions of files; used by any number of threads."""

    def __init__(
        self,
        config: Config,
        *,
        decode_seconds: float = DECODE_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
        report: Callable[[str], None] = _LOG.warning,
    ) -> None:
        """Start nothing: ``start`` or the first picture starts the processes.

        An image has ``decode_seconds``, unless the configured limit is lower; the processes end after ``idle_seconds``
        without a request. ``report`` is called with one sentence about each problem.
        """
        self._cache = PictureCache(os.path.join(config.cache_dir, PICTURES_FOLDER), report=report)
        limits = DecodeLimits.of(config.decoding)
        seconds = min(decode_seconds, config.decoding.timeout_seconds)

        def start_pool(side: int) -> DecoderPool:
            return DecoderPool(1, whole_image(side), limits, seconds, kills=1)

        self._makers = {
            side: _Maker(side, partial(start_pool, side), self._cache, idle_seconds, report) for side in SIDES
        }

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def start(self) -> None:
        """Start the process that decodes small pictures, unless it runs, without waiting for it.

        That takes 0.4 s, which the first picture would have to wait.
        """
        self._makers[SIDES[0]].start()

    def close(self) -> None:
        """End the processes; requests that wait are answered with None. Idempotent."""
        for maker in self._makers.values():
            maker.close()

    def jpeg(self, path: str, stamp: Stamp, content: str, side: int) -> bytes | None:
        """Return the picture of one version of a file as JPEG: all of it, upright, never enlarged.

        ``content`` is its hexadecimal sha256, or "" if it is not known; ``side`` the longer side in pixels, one of
        ``SIDES``. Returns None if the file has changed or vanished, cannot be decoded, or takes too long.
        """
        maker = self._makers[side]
        if not _is_there(path, stamp):
            return None
        key = content if _SHA256.fullmatch(content) else ""
        known = self._cache.read(key or _key_of(path, stamp), side)
        if known is not None:
            return known
        try:
            return maker.ask((path, stamp), is_content_known=bool(key)).result(WAIT_SECONDS)
        except TimeoutError:
            return None


def _is_there(path: str, stamp: Stamp) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and stamp_of(status).agrees_with(stamp)


def _key_of(path: str, stamp: Stamp) -> str:
    """Return the key of a picture whose content is not known."""
    version = (stamp.inode, stamp.size, stamp.mtime_ns, stamp.ctime_ns)
    return hashlib.sha256(repr(version).encode() + os.fsencode(path)).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A picture that is being made; the future is that of all who wait for it."""

    future: "Future[bytes | None]"
    is_content_known: bool


class _Maker:
    """Makes the pictures of one size, in a thread of its own.

    A process gets one image at a time, so that an image that hangs holds up no other one.
    """

    def __init__(
        self,
        side: int,
        start_pool: Callable[[], DecoderPool],
        cache: PictureCache,
        idle_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        """Start nothing; ``Pictures`` describes the arguments."""
        self._side, self._start_pool, self._cache = side, start_pool, cache
        self._idle_seconds, self._report = idle_seconds, report
        self._lock = threading.Lock()  # of all that follows
        self._requests: dict[File, _Request] = {}
        self._queue: deque[File] = deque()  # requests that no process has
        self._refused: dict[File, None] = {}
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def start(self) -> None:
        """Start the thread and a process, unless they run."""
        with self._lock:
            self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None and not self._is_closed:
            thread = threading.Thread(target=self._run, name=f"sortd-pictures-{self._side}")
            thread.start()
            self._thread = thread

    def ask(self, file: File, *, is_content_known: bool) -> "Future[bytes | None]":
        """Return the future of a picture; its key in the cache is its content if the caller knows that."""
        with self._lock:
            if file in self._requests:
                return self._requests[file].future
            future: Future[bytes | None] = Future()
            if self._is_closed or file in self._refused:
                future.set_result(None)
                return future
            self._start_thread()
            self._requests[file] = _Request(future, is_content_known)
            self._queue.append(file)
            os.eventfd_write(self._wake, 1)
        return future

    def close(self) -> None:
        """End the thread and the processes."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            thread = self._thread
            os.eventfd_write(self._wake, 1)
        if thread is not None:
            thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        """Make pictures until it is closed or idle; after an error the next request starts another thread."""
        try:
            with self._start_pool() as pool:
                batch = Batch()
                while self._take(pool, batch):
                    pool.feed(batch)
                    while batch.answers:  # which the processes do not wait for
                        self._finish(batch.answers.popleft())
                    pool.collect(None, wake_descriptor=self._wake)
        except (StartupError, OSError) as error:
            self._report(f"pictures of {self._side} pixels cannot be made now: {error}")
        finally:
            self._drop_all()

    def _take(self, pool: DecoderPool, batch: Batch) -> bool:
        """Add requests to the batch, at most one for each process; wait for the first; return False at the end."""
        while True:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            with self._lock:
                if len(self._queue) + batch.unanswered > pool.workers:
                    pool.workers = PROCESSES
                    pool.grow()
                while self._queue and len(batch.waiting) + batch.unanswered < pool.workers:
                    batch.waiting.append(self._queue.popleft())
                if self._is_closed or not batch.is_done:
                    return not self._is_closed
            self._cache.prune()
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            is_late = not poll.poll(1000 * self._idle_seconds)
            with self._lock:
                if is_late and not self._queue:
                    self._thread = None
                    return False

    def _finish(self, answer: Answer) -> None:
        """Encode, cache and deliver a picture."""
        file = answer.path, answer.stamp
        picture = None
        if isinstance(answer, ImageRefused):
            if answer.refusal in _LASTING:
                self._refuse(file)
        else:
            picture = jpeg_of(answer.pixels)
            is_content_known = self._requests[file].is_content_known
            self._cache.write(answer.content if is_content_known else _key_of(*file), self._side, picture)
        with self._lock:
            request = self._requests.pop(file)
        request.future.set_result(picture)

    def _refuse(self, file: File) -> None:
        with self._lock:
            self._refused[file] = None
            while len(self._refused) > _REFUSED_KEPT:
                self._refused.pop(next(iter(self._refused)))

    def _drop_all(self) -> None:
        """Answer all requests with None, unless another thread makes them."""
        with self._lock:
            if self._thread is not threading.current_thread():
                return
            self._thread = None
            requests = list(self._requests.values())
            self._requests.clear()
            self._queue.clear()
        for request in requests:
            request.future.set_result(None)
