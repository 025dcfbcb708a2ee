"""The decoding process: a sandbox with few rights, in which alone untrusted image files are decoded.

``start_process`` runs this module as a program. Over a socket the process receives its settings and the memory that it
shares with the daemon, then descriptors of files; it writes pixels to that memory, and answers each file with a packet
of fixed size. It can write no file and open few, and its memory and time are limited; a decoder that crashes ends only
this process.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Final, NamedTuple

from sortd.arrays import Pixels
from sortd.errors import CrowdedError, ImageError, NotAnImageError, TooLargeError, UnreadableError
from sortd.events import Fit, Preprocessing, Refusal
from sortd.files import sha256_of
from sortd.images.decode import DecodeLimits, Jpeg, decode_image, load_decoders
from sortd.images.formats import HEAD_BYTES, format_of

SETTINGS_BYTES = 4096  # of the first packet, at most
REQUEST = struct.Struct("<IQ")
"""Slot of the shared memory, and memory budget in pixels; the file's descriptor is sent with it."""
REPLY = struct.Struct("<IB32sdQHHH400s")
"""Slot, status, sha256 of the content, seconds, needed budget in pixels, height and width of the pixels, length of the
message, message (UTF-8)."""
READY_SLOT = 0xFFFF_FFFF  # in the first packet, which reports that the process has started
DECODED = 0  # status of a decoded image, whose pixels are in its slot; 1 and up are the refusals, in this order
REFUSALS: Final = (Refusal.UNREADABLE, Refusal.TOO_LARGE, Refusal.NOT_AN_IMAGE, Refusal.DENIED)
CROWDED = 0xFF  # status of an image that needs a larger budget; it is to be sent again with that
MESSAGE_BYTES = 400
SLOTS = 32
"""Images that one process may have decoded or queued before any is fetched: two batches of the encoder."""
DEFAULT_BUDGET_PIXELS = 4_000_000
"""Memory budget of the first try. Most photos need less: JPEG is decoded at a smaller scale."""

_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4000000", "MALLOC_TRIM_THRESHOLD_": "4000000"}
"""One heap, and free memory is returned: otherwise glibc keeps 64 MB a thread and as much freed memory, which counts
against the limit of the process (mallopt(3))."""
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "COVERAGE_PROCESS_START")
_REFUSAL_OF: Mapping[type[ImageError], Refusal] = {
    UnreadableError: Refusal.UNREADABLE,
    TooLargeError: Refusal.TOO_LARGE,
    NotAnImageError: Refusal.NOT_AN_IMAGE,
}
_OPEN_FILES = 64
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """The settings of a decoding process."""

    preprocessing: Preprocessing
    limits: DecodeLimits
    jpeg: Jpeg
    timeout_seconds: float

    @property
    def pixel_bytes(self) -> int:
        """The size of one decoded image; the largest with ``Fit.WHOLE``."""
        return self.preprocessing.crop_height * self.preprocessing.crop_width * 3

    def may_return(self, height: int, width: int) -> bool:
        """Return whether a decoded image may have this size."""
        highest, widest = self.preprocessing.crop_height, self.preprocessing.crop_width
        if self.preprocessing.fit is Fit.WHOLE:
            return 0 < height <= highest and 0 < width <= widest
        return (height, width) == (highest, widest)

    def to_packet(self) -> bytes:
        """Return the settings as the first packet to the process."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_packet(packet: bytes) -> "DecodeSettings":
        """Parse what ``to_packet`` returned."""
        given = json.loads(packet)
        preprocessing = Preprocessing.from_fields(given["preprocessing"])
        return DecodeSettings(preprocessing, DecodeLimits(**given["limits"]), given["jpeg"], given["timeout_seconds"])


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """The result of one file: pixels, uint8 (height, width, 3), a refusal with its message, or the needed budget."""

    content: str  # hexadecimal sha256, "" if the file could not be read
    pixels: Pixels | None = None
    refusal: Refusal | None = None
    message: str = ""
    needed_pixels: int = 0


# ------------------------------------------------------------ in the daemon


class ProcessEnds(NamedTuple):
    """What the daemon holds of a decoding process."""

    process: "subprocess.Popen[bytes]"
    control: socket.socket
    stderr: int  # a descriptor; reading it does not block

    def end(self) -> int:
        """Kill the process and return its exit code; ``stderr`` stays open."""
        self.control.close()
        self.process.kill()
        return self.process.wait()

    def discard(self) -> None:
        """Kill the process and close all ends."""
        self.end()
        os.close(self.stderr)


def start_process() -> ProcessEnds:
    """Start a decoding process, which loads its libraries and waits for ``give_settings``."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stderr, their_stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        process = subprocess.Popen(  # noqa: S603 -- this Python, with arguments of sortd
            _command(theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=their_stderr,
            pass_fds=(theirs.fileno(),),
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        return ProcessEnds(process, control, stderr)
    except BaseException:
        control.close()
        os.close(stderr)
        raise
    finally:
        theirs.close()
        os.close(their_stderr)


def give_settings(ends: ProcessEnds, settings: DecodeSettings) -> mmap.mmap:
    """Send a process its settings; its first packet reports that it is ready. Return the pixels of its slots.

    If this raises, the process has been ended.
    """
    try:
        memory = os.memfd_create("sortd-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, SLOTS * settings.pixel_bytes)
            # Without the seals the process could shrink the memory; reading it here would then kill the daemon.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            with contextlib.suppress(ConnectionError):  # it has ended: the next packet shows that
                socket.send_fds(ends.control, [settings.to_packet()], [memory])
            return mmap.mmap(memory, 0, prot=mmap.PROT_READ)
        finally:
            os.close(memory)
    except BaseException:
        ends.discard()
        raise


def _command(control: int) -> list[str]:
    # -P: modules in the working directory are not imported.
    return [sys.executable, "-P", "-m", "sortd.images.decoder_process", str(control)]


def _environment() -> dict[str, str]:
    """Return the environment of the processes: the module path, one thread, and no secrets."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **_MALLOC}


# ------------------------------------------------------------ in the process


def _decode_content(descriptor: int, budget_pixels: int, settings: DecodeSettings) -> DecodeResult:
    """Decode and hash an open file, unless it needs more than the budget."""
    preprocessing, limits, jpeg = settings.preprocessing, settings.limits, settings.jpeg
    pixels, refusal, message = None, None, ""
    try:
        try:
            pixels = decode_image(descriptor, preprocessing, limits, jpeg=jpeg, budget_pixels=budget_pixels)
        except CrowdedError as error:
            return DecodeResult("", needed_pixels=error.pixels)
        except ImageError as error:
            refusal, message = _REFUSAL_OF[type(error)], str(error)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return DecodeResult(sha256_of(descriptor), pixels, refusal, message)
    except OSError as error:
        return DecodeResult("", None, Refusal.DENIED, f"the disk cannot be read: {error.strerror}; check its health")


def run_decoder(control_descriptor: int) -> None:
    """Decode the files that come over the socket until it is closed."""
    # The daemon handles these signals, and ends this process by closing the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=control_descriptor) as control:
        load_decoders()
        packet, descriptors, _flags, _address = socket.recv_fds(control, SETTINGS_BYTES, 1)
        if not packet:
            return
        with mmap.mmap(descriptors[0], 0) as memory:
            os.close(descriptors[0])
            _answer_requests(control, memory, DecodeSettings.from_packet(packet))


def _answer_requests(control: socket.socket, memory: mmap.mmap, settings: DecodeSettings) -> None:
    in_use = _drop_privileges(settings.limits)
    control.send(REPLY.pack(READY_SLOT, DECODED, b"", 0.0, 0, 0, 0, 0, b""))
    while True:
        request, descriptors, _flags, _address = socket.recv_fds(control, REQUEST.size, 1)
        if not request:
            return
        slot, budget_pixels = REQUEST.unpack(request)
        try:
            _limit_memory(descriptors[0], settings, in_use)
            reply = _serve(slot, descriptors[0], budget_pixels, memory, settings)
        finally:
            os.close(descriptors[0])
        control.send(reply)


def _drop_privileges(limits: DecodeLimits) -> int:
    """Limit memory, file size, core dumps, descriptors and privileges; return the address space in use, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        in_use = int(pages.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, in_use + limits.memory_bytes(None)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return in_use


def _limit_memory(descriptor: int, settings: DecodeSettings, in_use: int) -> None:
    """Limit memory to what an image of the file's format may take; a file that cannot be read fails later."""
    with contextlib.suppress(OSError):
        most = in_use + settings.limits.memory_bytes(format_of(os.pread(descriptor, HEAD_BYTES, 0)))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(most, hard), hard))


def _serve(slot: int, descriptor: int, budget_pixels: int, memory: mmap.mmap, settings: DecodeSettings) -> bytes:
    """Decode one file into its slot and return the reply; at the time limit the alarm ends this process."""
    began = perf_counter()
    signal.setitimer(signal.ITIMER_REAL, settings.timeout_seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + settings.timeout_seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    result = _decode_content(descriptor, budget_pixels, settings)
    signal.setitimer(signal.ITIMER_REAL, 0)
    height, width = 0, 0
    if result.pixels is not None:
        height, width, _ = result.pixels.shape
        start = slot * settings.pixel_bytes
        memory[start : start + result.pixels.nbytes] = result.pixels.tobytes()
    status = DECODED if result.refusal is None else 1 + REFUSALS.index(result.refusal)
    if result.needed_pixels:
        status = CROWDED
    message = result.message.encode("utf-8", "replace")[:MESSAGE_BYTES]
    digest = bytes.fromhex(result.content)
    seconds, needed = perf_counter() - began, result.needed_pixels
    return REPLY.pack(slot, status, digest, seconds, needed, height, width, len(message), message)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the daemon has ended
        run_decoder(int(sys.argv[1]))
