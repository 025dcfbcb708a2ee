"""The decoder pool: files to pixels in processes of their own, so that no image can take the daemon down with it.

An image whose decoding ends its process, by a crash, by a signal or at the time limit, is tried once more, and is
poison then until the file changes. The images that waited behind it are decoded elsewhere.

Memory is bounded for all processes together: a process sends a large image back with the room that it takes, and it is
given again when there is so much beside the others; the largest image that is allowed fills it.
"""

import fcntl
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Self

import numpy as np

from sortd.arrays import Pixels
from sortd.errors import StartupError
from sortd.events import ImageRefused, Preprocessing, Refusal, Stamp
from sortd.files import stamp_of
from sortd.images.decode import Jpeg, Limits
from sortd.images.decoder_process import (
    CROWDED,
    DECODED,
    READY_SLOT,
    REFUSALS,
    REPLY,
    REQUEST,
    ROOM_UNASKED_PIXELS,
    SLOTS,
    Order,
    Result,
    decode_content,
)
from sortd.images.formats import open_version

POISON_KEPT = 10_000  # versions of files that are remembered as having ended a process
STARTS = 3  # processes in a row that did not start; after them no other is tried
NOISE_BYTES = 2_000  # of what decoders print to stderr, kept for the message should the process die
START_SECONDS = 60.0  # a process that has said nothing for so long is given up
GRACE_SECONDS = 5.0  # the process ends itself at the time limit; so long after it the pool ends it

_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4000000", "MALLOC_TRIM_THRESHOLD_": "4000000"}
"""One heap, and what is free goes back: else glibc keeps 64 MB for each thread and as much that was freed, which counts
against the memory that an image may take (mallopt(3))."""
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "COVERAGE_PROCESS_START")


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of one version of one file, as the encoder wants them: uint8 (height, width, 3), read-only."""

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
    """Answers in the order in which they came; whoever asked takes them from here."""
    unanswered: int = 0
    """How many images the processes have."""
    is_wanted: bool = True

    @property
    def is_done(self) -> bool:
        """Has every image its answer, and was every answer taken?"""
        return not (self.waiting or self.unanswered or self.answers)


@dataclass(slots=True, eq=False)
class _Job:
    """One open file on its way to pixels."""

    path: str
    stamp: Stamp
    descriptor: int
    batch: Batch
    wanted_pixels: int = 0
    """The room that it takes, where that is more than is given unasked."""
    slot: int = 0
    """Where in the memory of the process that has it its pixels go."""
    since: float = 0.0
    """When its process could begin with it, on the monotonic clock."""
    is_open: bool = True

    def close(self) -> None:
        """Close the file, once."""
        if self.is_open:
            self.is_open = False
            os.close(self.descriptor)


class _LostError(Exception):
    """The process has died, or its answers make no sense: it is to be ended, and its jobs are to go elsewhere."""


class _Decoder:
    """One decoding process; jobs are answered in the order in which they were given."""

    def __init__(self, order: Order) -> None:
        """Start the process; it says by itself when it is ready."""
        self._order = order
        self.jobs: deque[_Job] = deque()
        """What it has been given and has not answered."""
        self._free = list(range(SLOTS))
        self._noise = b""
        self._started = monotonic()
        self.is_ready = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("sortd-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._noise_end, noise = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.ftruncate(memory, SLOTS * order.pixel_bytes)
            # Without the seals the process could shrink the memory that is read here, and that would kill the daemon.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory = mmap.mmap(memory, 0, prot=mmap.PROT_READ)
            self.process = subprocess.Popen(  # noqa: S603 -- this very Python, and arguments of our own
                _command(order, theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=noise,
                pass_fds=(theirs.fileno(), memory),
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._control.close()
            os.close(self._noise_end)
            raise
        finally:
            theirs.close()
            os.close(memory)
            os.close(noise)

    @property
    def descriptors(self) -> tuple[int, int]:
        """What to wait for: the answers, and what it prints to stderr."""
        return self._control.fileno(), self._noise_end

    @property
    def has_room(self) -> bool:
        """Can it take another job?"""
        return bool(self._free)

    def seconds_left(self) -> float:
        """Return in how many seconds it is to be ended."""
        if not self.is_ready:
            return self._started + START_SECONDS - monotonic()
        if not self.jobs:
            return math.inf
        return self.jobs[0].since + self._order.timeout_seconds + GRACE_SECONDS - monotonic()

    def give(self, job: _Job) -> None:
        """Hand over an open file, which the caller closes; raise _LostError where the process is gone."""
        slot = self._free[-1]
        request = REQUEST.pack(slot, job.wanted_pixels or ROOM_UNASKED_PIXELS)
        try:
            socket.send_fds(self._control, [request], [job.descriptor])
        except OSError as error:
            raise _LostError(str(error)) from error
        self._free.pop()
        job.slot, job.since = slot, monotonic()
        self.jobs.append(job)

    def answers(self) -> Iterator[tuple[_Job, Result, float]]:
        """Yield the answers that are there, with the seconds that each took; raise _LostError where it cannot serve."""
        self._keep_noise()
        while True:
            try:
                reply = self._control.recv(REPLY.size + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise _LostError(str(error)) from error
            yield from self._understood(reply)
        if self.seconds_left() < 0:
            raise _LostError("over its time")

    def _understood(self, reply: bytes) -> Iterator[tuple[_Job, Result, float]]:
        if len(reply) != REPLY.size:
            raise _LostError("its end of the socket is closed" if not reply else "a reply of another size")
        slot, status, digest, seconds, wanted_pixels, length, message = REPLY.unpack(reply)
        if slot == READY_SLOT and not self.is_ready:
            self.is_ready = True
            self._restart_clock()
            return
        if not self.jobs or slot != self.jobs[0].slot or length > len(message):
            raise _LostError("a reply that makes no sense")
        asks_once = not self.jobs[0].wanted_pixels and 0 < wanted_pixels <= self._order.limits.max_pixels
        if not (asks_once if status == CROWDED else status <= len(REFUSALS)):
            raise _LostError("a reply that makes no sense")
        job = self.jobs.popleft()
        self._free.append(slot)
        self._restart_clock()
        if status == CROWDED:
            result = Result("", wanted_pixels=wanted_pixels)
        elif status == DECODED:
            size, seen = self._order.pixel_bytes, self._order.preprocessing
            pixels = np.frombuffer(self._memory[slot * size : (slot + 1) * size], np.uint8)
            result = Result(digest.hex(), pixels.reshape(seen.crop_height, seen.crop_width, 3))
        else:
            result = Result(digest.hex(), None, REFUSALS[status - 1], message[:length].decode("utf-8", "replace"))
        yield job, result, seconds

    def _restart_clock(self) -> None:
        if self.jobs:
            self.jobs[0].since = monotonic()

    def _keep_noise(self) -> None:
        with suppress(BlockingIOError):
            while heard := os.read(self._noise_end, 65_536):
                self._noise = (self._noise + heard)[-NOISE_BYTES:]

    def end(self) -> tuple[list[_Job], str]:
        """End the process at once; return its unanswered jobs, the one in hand first, and how it ended."""
        was_late = self.seconds_left() < 0
        self._control.close()
        self.process.kill()
        code = self.process.wait()
        self._keep_noise()
        os.close(self._noise_end)
        self._memory.close()
        jobs = list(self.jobs)
        self.jobs.clear()
        if code in {-signal.SIGALRM, -signal.SIGXCPU} or was_late:
            account = f"it took longer than {self._order.timeout_seconds:g} s"
        elif code < 0:
            account = f"the process ended by signal {signal.Signals(-code).name}"
        else:
            account = f"the process ended with code {code}"
        said = self._noise.decode("utf-8", "replace").strip()
        return jobs, f"{account}; it said: {said[-300:]}" if said else account


def _command(order: Order, control: int, memory: int) -> list[str]:
    # -P: whatever lies in the working directory is not imported.
    module = ("-P", "-m", "sortd.images.decoder_process")
    return [sys.executable, *module, order.to_argument(), str(control), str(memory)]


def _environment() -> dict[str, str]:
    """Return where modules are found and little else: no secrets, and one thread."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **_MALLOC}


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
            workers: how many; 0 decodes in the calling thread, which starts at once and protects from nothing.
            preprocessing: the size that the encoder sees.
            limits: what is refused.
            timeout_seconds: the time limit for one image.
            jpeg: see ``decode.decode``.
            kills: how often one version of a file may end its process before it is poison.
        """
        self._order = Order(preprocessing, limits, jpeg, timeout_seconds)
        self._most_kills = kills
        self._kills: dict[Stamp, int] = {}
        self._again: deque[_Job] = deque()
        self._large: deque[_Job] = deque()
        self._failed_starts = 0
        self._is_closed = False
        self.workers = workers
        """How many processes decode; 0: none, it is done in the thread that asks."""
        self._decoders: list[_Decoder] = []
        try:
            self._start_missing()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the pool, which is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The numbers of the decoding processes."""
        return tuple(decoder.process.pid for decoder in self._decoders)

    def decode_all(self, images: Sequence[tuple[str, Stamp]]) -> Iterator[Answer]:
        """Yield exactly one answer for each image, in the order in which they are done.

        The processes go on while the caller is busy with an answer. What is left when the caller stops is dropped.

        Args:
            images: paths, and the stamps of the versions that are meant; another version is refused as changed.

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
        """Close the files of a batch that nobody wants any more; what is decoded of it is thrown away."""
        batch.is_wanted = False
        batch.waiting.clear()
        for job in [*self._again, *self._large, *(job for decoder in self._decoders for job in decoder.jobs)]:
            if job.batch is batch:
                job.close()

    def close(self) -> None:
        """End the processes and close all files; what was under way is dropped."""
        self._is_closed = True
        for decoder in self._decoders:
            for job in decoder.end()[0]:
                job.close()
        for job in (*self._again, *self._large):
            job.close()
        self._decoders.clear()
        self._again.clear()
        self._large.clear()

    def _start_missing(self) -> None:
        while len(self._decoders) < self.workers:
            self._decoders.append(_Decoder(self._order))

    def feed(self, batch: Batch) -> None:
        """Give the processes as much of a batch as they take, to the one with least first; raises as ``decode_all``."""
        if self._is_closed:
            raise ValueError("the decoder pool is closed")
        if self.workers == 0:
            self._decode_here(batch)
            return
        self._start_missing()
        while (queue := self._next_queue()) is not None or batch.waiting:
            decoder = min(self._decoders, key=lambda decoder: len(decoder.jobs))
            if not decoder.has_room:
                return
            job = self._opened(*batch.waiting.popleft(), batch) if queue is None else queue.popleft()
            if job is None or not job.batch.is_wanted:
                continue
            try:
                decoder.give(job)
            except _LostError:  # it died idle: the job never got there
                self._put_back(job)
                self._lose(decoder)
                self._start_missing()

    def _next_queue(self) -> deque[_Job] | None:
        """Return which of the jobs that came back are next; None for none, or where a large one has to wait."""
        if self._large:
            taken = sum(job.wanted_pixels for decoder in self._decoders for job in decoder.jobs)
            if taken + self._large[0].wanted_pixels <= self._order.limits.max_pixels:
                return self._large
        return self._again or None

    def _put_back(self, *jobs: _Job) -> None:
        for job in jobs:
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
            if (job := self._opened(*batch.waiting.popleft(), batch)) is not None:
                began = perf_counter()
                self._settle(job, decode_content(job.descriptor, self._order), perf_counter() - began)

    def collect(self, timeout_seconds: float | None, *, wake_descriptor: int | None = None) -> None:
        """Take in what the processes have to say, into the batches that it is about.

        Args:
            timeout_seconds: how long to wait for one of them at most; None: until one speaks or is over its time.
            wake_descriptor: a descriptor that ends the wait as soon as it can be read.

        Raises:
            StartupError: the decoding processes do not start.
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
                self._take_in(decoder)
            except _LostError:
                self._lose(decoder)
            else:
                self._failed_starts = 0 if decoder.is_ready else self._failed_starts

    def _take_in(self, decoder: _Decoder) -> None:
        for job, result, seconds in decoder.answers():
            if not result.wanted_pixels:
                self._settle(job, result, seconds)
            elif job.batch.is_wanted:
                job.wanted_pixels = result.wanted_pixels
                self._put_back(job)

    def _lose(self, decoder: _Decoder) -> None:
        """End a process that was lost, and put back the images that it had; the first was the one in hand."""
        with suppress(_LostError):
            self._take_in(decoder)
        self._decoders.remove(decoder)
        jobs, account = decoder.end()
        if not decoder.is_ready:
            self._failed_starts += 1
        elif jobs:
            self._blame(jobs.pop(0), account)
        self._put_back(*jobs)
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
