"""The decoder pool: decodes files in separate processes, so that no image can crash the daemon.

An image during whose decoding the process ends (a crash, a signal, the time limit) is tried once more, and is then
refused as poison until the file changes. Images queued behind it go to another process.

Memory is bounded for all processes together: a process returns a large image with the budget that it needs, and gets it
again when the budgets of all large images fit into ``max_pixels``.
"""

import errno
import math
import os
import select
import signal
import socket
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Self

import numpy as np

from sortd.arrays import Pixels
from sortd.errors import StartupError
from sortd.events import ImageRefused, Preprocessing, Refusal, Stamp
from sortd.files import stamp_of
from sortd.images.decode import DecodeLimits, Jpeg, open_file
from sortd.images.decoder_process import (
    CROWDED,
    DECODED,
    DEFAULT_BUDGET_PIXELS,
    READY_SLOT,
    REFUSALS,
    REPLY,
    REQUEST,
    SLOTS,
    DecodeResult,
    DecodeSettings,
    ProcessEnds,
    give_settings,
    start_process,
)
from sortd.images.formats import HEAD_BYTES, looks_like_image

RESOURCE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""This process or the machine is out of a resource; the file is not the cause."""
_POISON_KEPT = 10_000  # versions of files that are remembered because they ended a process
_MAX_FAILED_STARTS = 3  # consecutive processes that did not start; after that no other is started
_STDERR_BYTES = 2_000  # of what decoders print to stderr, kept for the message if the process dies
_START_SECONDS = 60.0  # a process that has not reported in this time is killed
_GRACE_SECONDS = 5.0  # the process ends itself at the time limit; after this the pool kills it


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of one version of a file in the size of the pool: uint8 (height, width, 3), read-only."""

    path: str
    stamp: Stamp
    pixels: Pixels
    content: str  # hexadecimal sha256 of the bytes
    decode_seconds: float = 0.0


Answer = DecodedImage | ImageRefused


@dataclass(slots=True, eq=False)
class Batch:
    """Images of one caller and their answers so far; images may be added at any time."""

    waiting: deque[tuple[str, Stamp]] = field(default_factory=deque)  # not given to a process yet
    answers: deque[Answer] = field(default_factory=deque)  # in the order of completion; the caller removes them
    unanswered: int = 0  # images that the processes have
    is_wanted: bool = True

    @property
    def is_done(self) -> bool:
        """Whether every image has its answer and every answer was removed."""
        return not (self.waiting or self.unanswered or self.answers)


@dataclass(slots=True, eq=False)
class _Job:
    """One open file that is to be decoded."""

    path: str
    stamp: Stamp
    descriptor: int
    batch: Batch
    needed_pixels: int = 0  # the memory budget that it needs, if that is more than the default
    slot: int = 0  # of the shared memory of its process
    since: float = 0.0  # when its process could begin it, on the monotonic clock
    is_open: bool = True

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        if self.is_open:
            self.is_open = False
            os.close(self.descriptor)


class _ProcessLostError(Exception):
    """The process has died or its replies are invalid: it must be ended and its jobs given to another one."""


class _Decoder:
    """One decoding process; it answers jobs in the order in which it got them."""

    def __init__(self, settings: DecodeSettings, ends: ProcessEnds) -> None:
        """Give a started process its settings; its first packet reports that it is ready."""
        self._settings, self._ends = settings, ends
        self.jobs: deque[_Job] = deque()  # given and not answered
        self._free = list(range(SLOTS))
        self._started = monotonic()
        self._stderr, self.is_ready = b"", False
        self.process, self._control = ends.process, ends.control
        self._memory = give_settings(ends, settings)

    @property
    def descriptors(self) -> tuple[int, int]:
        """The descriptors to poll: its replies and its stderr."""
        return self._control.fileno(), self._ends.stderr

    def seconds_left(self) -> float:
        """Return the seconds until the process must be killed."""
        if not self.is_ready:
            return self._started + _START_SECONDS - monotonic()
        if not self.jobs:
            return math.inf
        return self.jobs[0].since + self._settings.timeout_seconds + _GRACE_SECONDS - monotonic()

    def give(self, job: _Job) -> None:
        """Send an open file, which the caller closes; raise _ProcessLostError if the process has ended."""
        slot = self._free[-1]
        request = REQUEST.pack(slot, job.needed_pixels or DEFAULT_BUDGET_PIXELS)
        try:
            socket.send_fds(self._control, [request], [job.descriptor])
        except OSError as error:
            raise _ProcessLostError(str(error)) from error
        self._free.pop()
        job.slot, job.since = slot, monotonic()
        self.jobs.append(job)

    def answers(self) -> Iterator[tuple[_Job, DecodeResult, float]]:
        """Yield the replies that have arrived and their seconds; raise _ProcessLostError if the process must end."""
        self._read_stderr()
        while True:
            try:
                reply = self._control.recv(REPLY.size + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise _ProcessLostError(str(error)) from error
            yield from self._parse(reply)
        if self.seconds_left() < 0:
            raise _ProcessLostError("over the time limit")

    def _parse(self, reply: bytes) -> Iterator[tuple[_Job, DecodeResult, float]]:
        if len(reply) != REPLY.size:
            raise _ProcessLostError("it closed its socket" if not reply else "a reply of invalid size")
        slot, status, digest, seconds, needed_pixels, height, width, length, message = REPLY.unpack(reply)
        if slot == READY_SLOT and not self.is_ready:
            self.is_ready = True
            self._restart_clock()
            return
        if not self.jobs or slot != self.jobs[0].slot or length > len(message):
            raise _ProcessLostError("an invalid reply")
        is_first_request = not self.jobs[0].needed_pixels and 0 < needed_pixels <= self._settings.limits.max_pixels
        if not (is_first_request if status == CROWDED else status <= len(REFUSALS)):
            raise _ProcessLostError("an invalid reply")
        if status == DECODED and not self._settings.may_return(height, width):
            raise _ProcessLostError("an invalid reply")
        job = self.jobs.popleft()
        self._free.append(slot)
        self._restart_clock()
        if status == CROWDED:
            result = DecodeResult("", needed_pixels=needed_pixels)
        elif status == DECODED:
            start = slot * self._settings.pixel_bytes
            pixels = np.frombuffer(self._memory[start : start + height * width * 3], np.uint8)
            result = DecodeResult(digest.hex(), pixels.reshape(height, width, 3))
        else:
            result = DecodeResult(digest.hex(), None, REFUSALS[status - 1], message[:length].decode("utf-8", "replace"))
        yield job, result, seconds

    def _restart_clock(self) -> None:
        if self.jobs:
            self.jobs[0].since = monotonic()

    def _read_stderr(self) -> None:
        with suppress(BlockingIOError):
            while text := os.read(self._ends.stderr, 65_536):
                self._stderr = (self._stderr + text)[-_STDERR_BYTES:]

    def end(self) -> tuple[list[_Job], str]:
        """Kill the process; return its unanswered jobs, the current one first, and why it ended."""
        is_late = self.seconds_left() < 0
        code = self._ends.end()
        self._read_stderr()
        os.close(self._ends.stderr)
        self._memory.close()
        jobs = list(self.jobs)
        self.jobs.clear()
        if code in {-signal.SIGALRM, -signal.SIGXCPU} or is_late:
            reason = f"it took longer than {self._settings.timeout_seconds:g} s"
        elif code < 0:
            reason = f"the process was ended by signal {signal.Signals(-code).name}"
        else:
            reason = f"the process ended with code {code}"
        printed = self._stderr.decode("utf-8", "replace").strip()
        return jobs, f"{reason}; it printed: {printed[-300:]}" if printed else reason


class DecoderPool:
    """A pool of decoding processes; used by one thread at a time."""

    def __init__(
        self,
        workers: int,
        preprocessing: Preprocessing,
        limits: DecodeLimits,
        timeout_seconds: float = 20.0,
        *,
        jpeg: Jpeg = "draft",
        kills: int = 2,
        started: Sequence[ProcessEnds] = (),
    ) -> None:
        """Start the processes without waiting for them.

        Args:
            workers: number of processes, at least one; with ``started``, the most that ``grow`` starts.
            preprocessing: the size that the encoder takes, or the largest with ``Fit.WHOLE``.
            limits: larger images are refused.
            timeout_seconds: time limit for one image.
            jpeg: see ``decode_image``.
            kills: how often one version of a file may end its process before it is refused as poison.
            started: processes that were started before, by ``start_process``; they are enough until ``grow``.
        """
        self._settings = DecodeSettings(preprocessing, limits, jpeg, timeout_seconds)
        self._max_kills = kills
        self._kills: dict[Stamp, int] = {}
        self._again: deque[_Job] = deque()
        self._large: deque[_Job] = deque()
        self._failed_starts, self._is_closed = 0, False
        self.workers, self._wanted = workers, len(started) or workers
        self._decoders: list[_Decoder] = []
        try:
            self._decoders += (_Decoder(self._settings, ends) for ends in started)
            self._start_missing()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The process IDs of the decoding processes."""
        return tuple(decoder.process.pid for decoder in self._decoders)

    def decode_all(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[Answer]:
        """Yield exactly one answer for each version of an image, in the order of completion.

        The processes go on while the caller handles an answer. If the caller stops early, the rest is dropped.

        Raises:
            StartupError: the decoding processes do not start.
            OSError: this process is out of descriptors or memory.
            ValueError: the pool is closed.
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
        """Cancel a batch and close its files; later results of it are discarded."""
        batch.is_wanted = False
        batch.waiting.clear()
        for job in [*self._again, *self._large, *(job for decoder in self._decoders for job in decoder.jobs)]:
            if job.batch is batch:
                job.close()

    def close(self) -> None:
        """End the processes and close all files; unanswered images are dropped."""
        self._is_closed = True
        for job in (*(job for decoder in self._decoders for job in decoder.end()[0]), *self._again, *self._large):
            job.close()
        self._decoders.clear()
        self._again.clear()
        self._large.clear()

    def grow(self) -> None:
        """Start one more process, at most ``workers``; if the system refuses one, the others go on."""
        if len(self._decoders) == self._wanted < self.workers:
            with suppress(OSError):
                self._decoders.append(_Decoder(self._settings, start_process()))
                self._wanted += 1

    def _start_missing(self) -> None:
        while len(self._decoders) < self._wanted:
            self._decoders.append(_Decoder(self._settings, start_process()))

    def feed(self, batch: Batch) -> None:
        """Give images to the process with the fewest jobs until all are busy; raises as ``decode_all``."""
        if self._is_closed:
            raise ValueError("the decoder pool is closed")
        self._start_missing()
        while (queue := self._next_queue()) is not None or batch.waiting:
            decoder = min(self._decoders, key=lambda decoder: len(decoder.jobs))
            if len(decoder.jobs) == SLOTS:
                return
            job = self._open(*batch.waiting.popleft(), batch) if queue is None else queue.popleft()
            if job is None or not job.batch.is_wanted:
                continue
            try:
                decoder.give(job)
            except _ProcessLostError:  # it died while idle, so the job is not to blame
                self._requeue(job)
                self._replace(decoder)
                self._start_missing()

    def _next_queue(self) -> deque[_Job] | None:
        """Return the queue of returned jobs to serve next; None if both are empty or the next large job must wait."""
        if self._large:
            taken = sum(job.needed_pixels for decoder in self._decoders for job in decoder.jobs)
            if taken + self._large[0].needed_pixels <= self._settings.limits.max_pixels:
                return self._large
        return self._again or None

    def _requeue(self, *jobs: _Job) -> None:
        for job in jobs:
            (self._large if job.needed_pixels else self._again).append(job)

    def _open(self, path: str, stamp: Stamp, batch: Batch) -> _Job | None:
        """Open a file if it is unchanged and looks like an image; otherwise add its refusal and return None."""
        if self._kills.get(stamp, 0) >= self._max_kills:
            message = "decoding it ended the process before; it is tried again when the file changes"
            opened: int | ImageRefused = ImageRefused(path, stamp, Refusal.POISON, message)
        else:
            opened = _open_version(path, stamp, self._settings.limits.max_bytes)
        if isinstance(opened, ImageRefused):
            batch.answers.append(opened)
            return None
        batch.unanswered += 1
        return _Job(path, stamp, opened, batch)

    def collect(self, timeout_seconds: float | None, *, wake_descriptor: int | None = None) -> None:
        """Read the replies of the processes and add the answers to their batches.

        It waits for ``timeout_seconds`` (None: the time limit of an image), or until ``wake_descriptor`` is readable.
        Raises StartupError.
        """
        busy = [decoder for decoder in self._decoders if decoder.jobs]
        if not busy:
            return
        poll = select.poll()
        descriptors = [descriptor for decoder in busy for descriptor in decoder.descriptors]
        for descriptor in descriptors if wake_descriptor is None else (wake_descriptor, *descriptors):
            poll.register(descriptor, select.POLLIN)
        wait = max(0.0, min(decoder.seconds_left() for decoder in busy)) + 0.01
        poll.poll(1000 * (wait if timeout_seconds is None else min(wait, timeout_seconds)))
        for decoder in busy:
            try:
                self._read_replies(decoder)
            except _ProcessLostError:
                self._replace(decoder)
            else:
                self._failed_starts = 0 if decoder.is_ready else self._failed_starts

    def _read_replies(self, decoder: _Decoder) -> None:
        for job, result, seconds in decoder.answers():
            if not result.needed_pixels:
                self._answer(job, result, seconds)
            elif job.batch.is_wanted:
                job.needed_pixels = result.needed_pixels
                self._requeue(job)

    def _replace(self, decoder: _Decoder) -> None:
        """End a lost process and queue its images again; the first one was being decoded and is blamed."""
        with suppress(_ProcessLostError):
            self._read_replies(decoder)
        self._decoders.remove(decoder)
        jobs, reason = decoder.end()
        if not decoder.is_ready:
            self._failed_starts += 1
        elif jobs:
            self._blame(jobs.pop(0), reason)
        self._requeue(*jobs)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise StartupError(f"the decoding processes do not start: {reason}")

    def _blame(self, job: _Job, reason: str) -> None:
        kills = self._kills[job.stamp] = self._kills.pop(job.stamp, 0) + 1
        while len(self._kills) > _POISON_KEPT:
            self._kills.pop(next(iter(self._kills)))
        if kills < self._max_kills:
            self._requeue(job)
        else:
            refusal = f"decoding it failed {kills} times: {reason}"
            self._answer(job, DecodeResult("", None, Refusal.POISON, refusal), 0.0)

    def _answer(self, job: _Job, result: DecodeResult, seconds: float) -> None:
        """Close a file and answer for it; a file that changed meanwhile is refused."""
        if not job.batch.is_wanted:
            return
        try:
            status = os.fstat(job.descriptor)
        finally:
            job.close()
        job.batch.unanswered -= 1
        path, stamp = job.path, job.stamp
        if status.st_nlink == 0:
            answer: Answer = ImageRefused(path, stamp, Refusal.VANISHED, "it was deleted during decoding")
        elif not stamp_of(status).agrees_with(stamp):
            answer = ImageRefused(path, stamp, Refusal.CHANGED, "it was written to during decoding")
        elif result.refusal is not None or result.pixels is None:
            answer = ImageRefused(path, stamp, result.refusal or Refusal.UNREADABLE, result.message)
        else:
            answer = DecodedImage(path, stamp, result.pixels, result.content, seconds)
        job.batch.answers.append(answer)


# ------------------------------------------------------------ opening


def _open_version(path: str, stamp: Stamp, max_bytes: int) -> int | ImageRefused:
    """Open one version of a file that looks like an image; return its descriptor or the refusal.

    Raises:
        OSError: this process is out of descriptors or memory.
    """
    try:
        descriptor = open_file(path)
    except OSError as error:
        return ImageRefused(path, stamp, *_refusal_of(error))
    try:
        refusal = _check_version(path, descriptor, stamp, max_bytes)
    except OSError as error:
        refusal = Refusal.DENIED, f"it cannot be read: {error.strerror}; check its disk"
    except BaseException:
        os.close(descriptor)
        raise
    if refusal is None:
        return descriptor
    os.close(descriptor)
    return ImageRefused(path, stamp, *refusal)


def _refusal_of(error: OSError) -> tuple[Refusal, str]:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return Refusal.VANISHED, "the file does not exist any more"
        case errno.ELOOP:
            return Refusal.NOT_AN_IMAGE, "it is a symbolic link, which sortd does not follow"
        case errno.ENXIO | errno.ENODEV:
            return Refusal.NOT_AN_IMAGE, "it is a socket or a device"
        case errno.EACCES | errno.EPERM:
            return Refusal.DENIED, "sortd has no permission to read it; grant it, for example by chmod g+r"
        case number if number in RESOURCE_ERRORS:
            raise error
        case _:
            return Refusal.DENIED, f"it cannot be opened: {error.strerror}; check its disk"


def _check_version(path: str, descriptor: int, stamp: Stamp, max_bytes: int) -> tuple[Refusal, str] | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return Refusal.NOT_AN_IMAGE, "it is not a regular file"
    if not stamp_of(status).agrees_with(stamp):
        return Refusal.CHANGED, "the file has changed"
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if not looks_like_image(path, head):
        return Refusal.NOT_AN_IMAGE, "neither its name nor its content is that of an image"
    if not head:
        return Refusal.EMPTY, "it is empty"
    if status.st_size > max_bytes:
        return Refusal.TOO_LARGE, f"{status.st_size:,} bytes are over the limit of {max_bytes:,}"
    return None
