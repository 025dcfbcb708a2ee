"""The decoder pool: files to pixels in processes of their own, so that no image can take the daemon down with it.

The rule for an image whose decoding ends its process, be it by a crash, by a signal or at the time limit: it is tried
once more, and then it is poison, until the file changes. The images that waited behind it are not to blame.

What decoding takes is bounded for all processes together: a process sends a large image back with the room that it
takes, and it is given again when there is so much beside the others; the greatest image that is allowed fills it.
"""

import os
import select
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from types import TracebackType
from typing import Self

from sortd.decoding.decoder_handle import DecoderHandle, DecoderLostError
from sortd.decoding.decoder_process import Order, Result, decode_content
from sortd.decoding.files import open_version, stamp_of
from sortd.errors import StartupError
from sortd.events import ImageRefused, Preprocessing, Refusal, Stamp
from sortd.images import Jpeg, Limits, Pixels

POISON_KEPT = 10_000
"""How many versions of files are remembered as having ended a process."""

STARTS = 3
"""After so many processes in a row that did not come up there is no use in another."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of one version of one file, as the encoder wants them: uint8 (height, width, 3), not to be changed."""

    path: str
    stamp: Stamp
    pixels: Pixels
    content: str  # hexadecimal sha256 of the bytes
    decode_seconds: float = 0.0


Answer = DecodedImage | ImageRefused


@dataclass(slots=True, eq=False)
class Batch:
    """Images that somebody asked for, and their answers so far; more may be added at any time."""

    waiting: deque[tuple[str, Stamp]] = field(default_factory=deque)
    """What no process has been given yet."""
    answers: deque[Answer] = field(default_factory=deque)
    """What is done, in the order in which it was done; whoever asked takes it from here."""
    unanswered: int = 0
    """How many images the processes have."""
    is_wanted: bool = True

    @property
    def is_done(self) -> bool:
        """Has every image its answer, and was every answer taken?"""
        return not (self.waiting or self.unanswered or self.answers)


@dataclass(slots=True)
class _Job:
    """One open file on its way."""

    path: str
    stamp: Stamp
    descriptor: int
    batch: Batch
    wanted_pixels: int = 0
    """The room that it takes, where that is more than is given unasked."""
    is_open: bool = True

    def close(self) -> None:
        """Close the file, once."""
        if self.is_open:
            self.is_open = False
            os.close(self.descriptor)


class DecoderPool:
    """Warm decoding processes; used by one thread at a time."""

    def __init__(
        self,
        workers: int,
        preprocessing: Preprocessing,
        limits: Limits,
        timeout_seconds: float = 20.0,
        *,
        jpeg: Jpeg = "draft",
        kills: int = 2,
    ) -> None:
        """Start the processes, without waiting for them.

        Args:
            workers: how many; 0 decodes in the calling thread, which is quick to start and protects from nothing.
            preprocessing: what the encoder sees.
            limits: what is refused.
            timeout_seconds: what one image may take.
            jpeg: see ``images.decode``.
            kills: how often one version of a file may end its process before it is poison.
        """
        self._order = Order(preprocessing, limits, jpeg, timeout_seconds)
        self._most_kills = kills
        self._kills: dict[Stamp, int] = {}
        self._again: deque[_Job] = deque()
        self._large: deque[_Job] = deque()
        self._failed_starts = 0
        self._is_closed = False
        self._workers = workers
        self._handles: list[DecoderHandle[_Job]] = []
        try:
            self._man()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the pool, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the pool."""
        self.close()

    @property
    def workers(self) -> int:
        """How many processes decode; 0: none, it is done in the thread that asks."""
        return self._workers

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The numbers of the decoding processes."""
        return tuple(handle.process_id for handle in self._handles)

    def decode_all(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[Answer]:
        """Yield exactly one answer for each image, in the order in which they are done.

        The processes go on while the caller is busy with an answer. What is left when the caller
        stops is dropped, and its files are closed at once.

        Args:
            images: paths, and the stamps of the versions that are meant; another version is refused as changed.

        Raises:
            StartupError: The decoding processes do not come up.
            OSError: This process is out of descriptors or memory.
            ValueError: The pool is closed.
        """
        batch = Batch(deque(images))
        try:
            while not batch.is_done:
                self.feed(batch)
                self.collect(0 if batch.answers else None)
                while batch.answers:
                    yield batch.answers.popleft()
                    self.feed(batch)
                    self.collect(0)
        finally:
            self.drop(batch)

    def drop(self, batch: Batch) -> None:
        """Close the files of a batch that nobody wants any more; what is decoded of it is thrown away."""
        batch.is_wanted = False
        batch.waiting.clear()
        for job in [*self._again, *self._large, *(job for handle in self._handles for job in handle.jobs)]:
            if job.batch is batch:
                job.close()

    def close(self) -> None:
        """End the processes and close all files; what was under way is dropped."""
        self._is_closed = True
        for handle in self._handles:
            for job in handle.end()[0]:
                job.close()
        for job in (*self._again, *self._large):
            job.close()
        self._handles.clear()
        self._again.clear()
        self._large.clear()

    # ------------------------------------------------------------ to the processes

    def _man(self) -> None:
        while len(self._handles) < self._workers:
            self._handles.append(DecoderHandle(self._order))

    def feed(self, batch: Batch) -> None:
        """Give every process as much of a batch as it takes, those first that have least.

        Raises:
            StartupError, OSError, ValueError: see ``decode_all``.
        """
        if self._is_closed:
            raise ValueError("the decoder pool is closed")
        if self._workers == 0:
            self._decode_here(batch)
            return
        self._man()
        while (queue := self._next_queue()) is not None or batch.waiting:
            handle = min(self._handles, key=lambda handle: handle.load)
            if not handle.has_room:
                return
            job = self._opened(*batch.waiting.popleft(), batch) if queue is None else queue.popleft()
            if job is None or not job.batch.is_wanted:
                continue
            try:
                handle.give(job, job.descriptor, job.wanted_pixels)
            except DecoderLostError:  # it died idle: the job never got there
                self._put_back(job)
                self._lose(handle)
                self._man()

    def _next_queue(self) -> deque[_Job] | None:
        """Return which of the jobs that came back are next; None for none, or where a large one has to wait."""
        if self._large:
            taken = sum(job.wanted_pixels for handle in self._handles for job in handle.jobs)
            if taken + self._large[0].wanted_pixels <= self._order.limits.max_pixels:
                return self._large
        return self._again or None

    def _put_back(self, job: _Job) -> None:
        (self._large if job.wanted_pixels else self._again).append(job)

    def _opened(self, path: str, stamp: Stamp, batch: Batch) -> _Job | None:
        """Open a file that is what it was and looks like an image; otherwise answer, and return None."""
        if self._kills.get(stamp, 0) >= self._most_kills:
            message = "its decoding ended the process before; it is tried again when the file changes"
            batch.answers.append(ImageRefused(path, stamp, Refusal.POISON, message))
            return None
        opened = open_version(path, stamp, self._order.limits.max_bytes)
        if isinstance(opened, ImageRefused):
            batch.answers.append(opened)
            return None
        batch.unanswered += 1
        return _Job(path, stamp, opened, batch)

    def _decode_here(self, batch: Batch) -> None:
        while batch.waiting and not batch.answers:
            job = self._opened(*batch.waiting.popleft(), batch)
            if job is not None:
                began = perf_counter()
                result = decode_content(job.descriptor, self._order)
                self._settle(job, result, perf_counter() - began)

    # ------------------------------------------------------------ from the processes

    def collect(self, timeout_seconds: float | None, *, bell: int | None = None) -> None:
        """Take in what the processes have to say, into the batches that it is about.

        Args:
            timeout_seconds: how long to wait for one of them at most; None: until one speaks or is over its time.
            bell: a descriptor that ends the wait as soon as it can be read.

        Raises:
            StartupError: The decoding processes do not come up.
        """
        busy = [handle for handle in self._handles if handle.load]
        if not busy:
            return
        poll = select.poll()
        if bell is not None:
            poll.register(bell, select.POLLIN)
        for handle in busy:
            for descriptor in handle.descriptors:
                poll.register(descriptor, select.POLLIN)
        deadlines = [deadline for handle in busy if (deadline := handle.deadline()) is not None]
        wait = max(0.0, min(deadlines) - monotonic()) + 0.01
        poll.poll(1000 * (wait if timeout_seconds is None else min(wait, timeout_seconds)))
        for handle in busy:
            try:
                self._take_in(handle)
            except DecoderLostError:
                self._lose(handle)
            else:
                self._failed_starts = 0 if handle.is_ready else self._failed_starts

    def _take_in(self, handle: DecoderHandle[_Job]) -> None:
        for answered in handle.answers():
            job, wanted_pixels = answered.job, answered.result.wanted_pixels
            if not wanted_pixels:
                self._settle(job, answered.result, answered.decode_seconds)
            elif job.batch.is_wanted:
                job.wanted_pixels = wanted_pixels
                self._large.append(job)

    def _lose(self, handle: DecoderHandle[_Job]) -> None:
        """Put a process away that was lost, and see to the images that it had: the first was the one in hand."""
        with suppress(DecoderLostError):
            self._take_in(handle)
        self._handles.remove(handle)
        jobs, account = handle.end()
        if not handle.is_ready:
            self._failed_starts += 1
        elif jobs:
            self._blame(jobs.pop(0), account)
        for job in jobs:
            self._put_back(job)
        if self._failed_starts >= STARTS:
            raise StartupError(f"the processes that decode images do not come up: {account}")

    def _blame(self, job: _Job, account: str) -> None:
        kills = self._kills[job.stamp] = self._kills.pop(job.stamp, 0) + 1
        while len(self._kills) > POISON_KEPT:
            self._kills.pop(next(iter(self._kills)))
        if kills < self._most_kills:
            self._put_back(job)
            return
        self._settle(job, Result("", None, Refusal.POISON, f"decoding it failed {kills} times: {account}"), 0.0)

    def _settle(self, job: _Job, result: Result, seconds: float) -> None:
        """Answer for a file, if it still is the version that was asked for, and close it."""
        if not job.batch.is_wanted:
            return
        try:
            status = os.fstat(job.descriptor)
        finally:
            job.close()
        job.batch.unanswered -= 1
        path, stamp = job.path, job.stamp
        if status.st_nlink == 0:
            answer: Answer = ImageRefused(path, stamp, Refusal.VANISHED, "it was deleted while it was decoded")
        elif not stamp_of(status).agrees_with(stamp):
            answer = ImageRefused(path, stamp, Refusal.CHANGED, "it was written to while it was decoded")
        elif result.refusal is not None or result.pixels is None:
            answer = ImageRefused(path, stamp, result.refusal or Refusal.UNREADABLE, result.message)
        else:
            answer = DecodedImage(path, stamp, result.pixels, result.content, seconds)
        job.batch.answers.append(answer)
