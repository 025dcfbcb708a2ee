"""One decoding process, seen from the daemon: started, fed with open files, heard, and ended."""

import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

import numpy as np

from sortd.decoding.decoder_process import (
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
)

NOISE_BYTES = 2_000
"""How much of what decoders print to stderr is kept, for the message should the process die of it."""

START_SECONDS = 60.0
"""After so long without a word a process that was started is given up."""

GRACE_SECONDS = 5.0
"""The process ends itself at the time limit; so long after it, it is ended from here."""

_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4000000", "MALLOC_TRIM_THRESHOLD_": "4000000"}
"""One heap, and what is free goes back: else glibc keeps 64 MB for each thread and as much that was freed, which counts
against the memory that an image may take (mallopt(3))."""

_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "COVERAGE_PROCESS_START")

Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Answered(Generic[Job]):
    """One file's answer."""

    job: Job
    result: Result
    decode_seconds: float


class DecoderLostError(Exception):
    """The process has died, or talks nonsense: it is to be closed, and its jobs are to go elsewhere."""


@dataclass(slots=True)
class _Given(Generic[Job]):
    """A job that the process has, the slot its pixels go into, and the room it was given by its own wish, if any."""

    job: Job
    slot: int
    wanted_pixels: int
    since: float = field(default_factory=monotonic)


class DecoderHandle(Generic[Job]):
    """A running decoder; jobs are answered in the order in which they were given."""

    def __init__(self, order: Order) -> None:
        """Start the process; it says by itself when it is ready."""
        self._order = order
        self._given: deque[_Given[Job]] = deque()
        self._free = list(range(SLOTS))
        self._noise = b""
        self._started = monotonic()
        self.is_ready = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("sortd-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._noise_end, noise = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.ftruncate(memory, SLOTS * order.pixel_bytes)
            # Without the seals the process could shrink the memory under our feet, and reading it would kill us.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory = mmap.mmap(memory, 0, prot=mmap.PROT_READ)
            self._process = subprocess.Popen(  # noqa: S603 -- this very Python, and arguments of our own
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
    def process_id(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def descriptors(self) -> tuple[int, int]:
        """What to wait for: the answers, and the noise."""
        return self._control.fileno(), self._noise_end

    @property
    def jobs(self) -> list[Job]:
        """What it has been given and has not answered."""
        return [given.job for given in self._given]

    @property
    def load(self) -> int:
        """How many jobs it has."""
        return len(self._given)

    @property
    def has_room(self) -> bool:
        """Can it take another job?"""
        return bool(self._free)

    def deadline(self) -> float | None:
        """When it is to be ended, on the monotonic clock; None while it has nothing to do."""
        if not self.is_ready:
            return self._started + START_SECONDS
        if not self._given:
            return None
        return self._given[0].since + self._order.timeout_seconds + GRACE_SECONDS

    def give(self, job: Job, descriptor: int, wanted_pixels: int = 0) -> None:
        """Hand over an open file; the caller keeps and closes its own descriptor.

        Args:
            job: what it is known by.
            descriptor: the open file.
            wanted_pixels: the room that a process has asked for, for this file; 0: none has.

        Raises:
            DecoderLostError: The process is gone.
        """
        slot = self._free[-1]
        try:
            socket.send_fds(self._control, [REQUEST.pack(slot, wanted_pixels or ROOM_UNASKED_PIXELS)], [descriptor])
        except OSError as error:
            raise DecoderLostError(str(error)) from error
        self._free.pop()
        self._given.append(_Given(job, slot, wanted_pixels))

    def answers(self) -> Iterator[Answered[Job]]:
        """Yield the answers that are there, without waiting.

        Raises:
            DecoderLostError: The process is gone, talks nonsense, or is over its time.
        """
        self._listen_to_noise()
        while True:
            try:
                reply = self._control.recv(REPLY.size + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise DecoderLostError(str(error)) from error
            yield from self._understood(reply)
        deadline = self.deadline()
        if deadline is not None and monotonic() > deadline:
            raise DecoderLostError("over its time")

    def _understood(self, reply: bytes) -> Iterator[Answered[Job]]:
        if len(reply) != REPLY.size:
            raise DecoderLostError("its end of the socket is closed" if not reply else "a reply of another size")
        slot, status, digest, seconds, wanted_pixels, length, message = REPLY.unpack(reply)
        if slot == READY_SLOT and not self.is_ready:
            self.is_ready = True
            self._restart_clock()
            return
        if not self._given or slot != self._given[0].slot or length > len(message):
            raise DecoderLostError("a reply that makes no sense")
        asks_once = not self._given[0].wanted_pixels and 0 < wanted_pixels <= self._order.limits.max_pixels
        if not (asks_once if status == CROWDED else status <= len(REFUSALS)):
            raise DecoderLostError("a reply that makes no sense")
        given = self._given.popleft()
        self._free.append(slot)
        self._restart_clock()
        text = message[:length].decode("utf-8", "replace")
        if status == CROWDED:
            yield Answered(given.job, Result("", wanted_pixels=wanted_pixels), seconds)
            return
        if status != DECODED:
            yield Answered(given.job, Result(digest.hex(), None, REFUSALS[status - 1], text), seconds)
            return
        size, preprocessing = self._order.pixel_bytes, self._order.preprocessing
        pixels = np.frombuffer(self._memory[slot * size : (slot + 1) * size], np.uint8)
        shape = (preprocessing.crop_height, preprocessing.crop_width, 3)
        yield Answered(given.job, Result(digest.hex(), pixels.reshape(shape)), seconds)

    def _restart_clock(self) -> None:
        if self._given:
            self._given[0].since = monotonic()

    def _listen_to_noise(self) -> None:
        with suppress(BlockingIOError):
            while heard := os.read(self._noise_end, 65_536):
                self._noise = (self._noise + heard)[-NOISE_BYTES:]

    def end(self) -> tuple[list[Job], str]:
        """End the process at once and free all that belongs to it.

        Returns:
            The jobs that it did not answer, the one it was at first; and a sentence on how it ended.
        """
        overdue = self.deadline()
        was_late = overdue is not None and monotonic() > overdue
        self._control.close()
        self._process.kill()
        code = self._process.wait()
        self._listen_to_noise()
        os.close(self._noise_end)
        self._memory.close()
        jobs = self.jobs
        self._given.clear()
        return jobs, self._account(code, was_late=was_late)

    def _account(self, code: int, *, was_late: bool) -> str:
        if code in {-signal.SIGALRM, -signal.SIGXCPU} or was_late:
            account = f"it took longer than {self._order.timeout_seconds:g} s"
        elif code < 0:
            account = f"the process ended by signal {signal.Signals(-code).name}"
        else:
            account = f"the process ended with code {code}"
        said = self._noise.decode("utf-8", "replace").strip()
        return f"{account}; it said: {said[-300:]}" if said else account


def _command(order: Order, control: int, memory: int) -> list[str]:
    # -P: whatever lies in the working directory is not imported.
    module = ("-P", "-m", "sortd.decoding.decoder_process")
    return [sys.executable, *module, order.to_argument(), str(control), str(memory)]


def _environment() -> dict[str, str]:
    """Hand on where modules are found and little else: no secrets, and one thread."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, "PYTHONPATH": path, **one_thread, **_MALLOC}
