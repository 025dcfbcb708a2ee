"""The process that decodes: the one place where hostile bytes are read, with as few rights as it needs.

``pool.py`` starts it as ``python -P -m sortd.images.decoder_process``. It gets descriptors of files over a socket, puts
pixels into memory that it shares with the daemon, and answers each file with a packet of fixed size. It can write no
file, open few, and take no more memory or time than it was given; a decoder that crashes ends this process alone.
"""

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Final

from sortd.arrays import Pixels
from sortd.errors import CrowdedError, NotAnImageError, TooLargeError, UnreadableError
from sortd.images.decode import DecodeLimits, Jpeg, decode_image, load_decoders
from sortd.images.formats import HEAD_BYTES, format_of
from sortd.messages import Fit, Preprocessing, Refusal

REQUEST = struct.Struct("<IQ")
"""A slot of the shared memory, and the room that decoding may take, in pixels; the file's descriptor comes along."""
REPLY = struct.Struct("<IB32sdQH400s")
"""Slot, status, sha256 of the content, seconds, room wanted in pixels, length of the message, message (UTF-8)."""
READY_SLOT = 0xFFFF_FFFF  # of the first packet, which says that the process has started
DECODED = 0  # status of an image whose pixels lie in their slot; 1 and up stand for refusals, in this order
REFUSALS: Final = (Refusal.UNREADABLE, Refusal.TOO_LARGE, Refusal.NOT_AN_IMAGE, Refusal.DENIED)
CROWDED = 0xFF  # status of an image that takes more room than it was given: it is to be given again with that
MESSAGE_BYTES = 400
SLOTS = 32
"""Images that one process may have decoded, or have waiting, while nobody fetches them: all of a forward."""
DEFAULT_BUDGET_PIXELS = 4_000_000
"""So much decoding may take without asking: most photos, which JPEG can decode at a smaller scale, take less."""

_CHUNK_BYTES = 1 << 20
_OPEN_FILES = 64
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How images are to be decoded, and in what time."""

    preprocessing: Preprocessing
    limits: DecodeLimits
    jpeg: Jpeg
    timeout_seconds: float

    @property
    def pixel_bytes(self) -> int:
        """What the pixels of one image take."""
        return self.preprocessing.crop_height * self.preprocessing.crop_width * 3

    def to_argument(self) -> str:
        """Write it as one argument of a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_argument(argument: str) -> "DecodeSettings":
        """Read what ``to_argument`` wrote."""
        given = json.loads(argument)
        fields = given["preprocessing"]
        preprocessing = Preprocessing(**{**fields, "fit": Fit(fields["fit"])})
        return DecodeSettings(preprocessing, DecodeLimits(**given["limits"]), given["jpeg"], given["timeout_seconds"])


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What became of one file: pixels, uint8 (height, width, 3), or a refusal with its message, or more room wanted."""

    content: str  # hexadecimal sha256, "" where the file could not be read
    pixels: Pixels | None = None
    refusal: Refusal | None = None
    message: str = ""
    wanted_pixels: int = 0


def decode_content(descriptor: int, order: DecodeSettings, *, room_pixels: int | None = None) -> DecodeResult:
    """Decode and hash an open file, if it takes no more than the room that it is given; None: whatever it takes."""
    try:
        result = _decoded(descriptor, order, room_pixels)
        return result if result.wanted_pixels else replace(result, content=hash_content(descriptor))
    except OSError as error:
        return DecodeResult("", None, Refusal.DENIED, f"the disk cannot be read: {error.strerror}; look at its health")


def _decoded(descriptor: int, order: DecodeSettings, room_pixels: int | None) -> DecodeResult:
    try:
        pixels = decode_image(descriptor, order.preprocessing, order.limits, jpeg=order.jpeg, room_pixels=room_pixels)
    except CrowdedError as error:
        return DecodeResult("", wanted_pixels=error.pixels)
    except TooLargeError as error:
        return DecodeResult("", None, Refusal.TOO_LARGE, str(error))
    except NotAnImageError as error:
        return DecodeResult("", None, Refusal.NOT_AN_IMAGE, str(error))
    except UnreadableError as error:
        return DecodeResult("", None, Refusal.UNREADABLE, str(error))
    return DecodeResult("", pixels)


def hash_content(descriptor: int) -> str:
    """Return the hexadecimal sha256 of a whole file, leaving its position where it was."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def run_decoder(argument: str, control_descriptor: int, memory_descriptor: int) -> None:
    """Decode what comes over the socket until it is closed."""
    # The daemon's signals are the daemon's: it ends this process by closing the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    order = DecodeSettings.from_argument(argument)
    with socket.socket(fileno=control_descriptor) as control, mmap.mmap(memory_descriptor, 0) as memory:
        os.close(memory_descriptor)
        load_decoders()
        in_use = _renounce(order.limits)
        control.send(REPLY.pack(READY_SLOT, DECODED, b"", 0.0, 0, 0, b""))
        while received := _receive(control):
            slot, room_pixels, descriptor = received
            try:
                _limit_memory(descriptor, order, in_use)
                reply = _serve(slot, descriptor, room_pixels, memory, order)
            finally:
                os.close(descriptor)
            control.send(reply)


def _renounce(limits: DecodeLimits) -> int:
    """Give up what decoding does not need; return the address space that the process has in use, in bytes."""
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


def _limit_memory(descriptor: int, order: DecodeSettings, in_use: int) -> None:
    """Allow what an image of its format may take, and no more; a file that cannot be read says so later."""
    with contextlib.suppress(OSError):
        most = in_use + order.limits.memory_bytes(format_of(os.pread(descriptor, HEAD_BYTES, 0)))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(most, hard), hard))


def _receive(control: socket.socket) -> tuple[int, int, int] | None:
    request, descriptors, _flags, _address = socket.recv_fds(control, REQUEST.size, 1)
    if not request:
        return None
    slot, room_pixels = REQUEST.unpack(request)
    return slot, room_pixels, descriptors[0]


def _serve(slot: int, descriptor: int, room_pixels: int, memory: mmap.mmap, order: DecodeSettings) -> bytes:
    """Decode one file into its slot and write the reply; where it takes too long, the alarm ends this process."""
    began = perf_counter()
    signal.setitimer(signal.ITIMER_REAL, order.timeout_seconds)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    most = int(spent.ru_utime + spent.ru_stime + order.timeout_seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    result = decode_content(descriptor, order, room_pixels=room_pixels)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if result.pixels is not None:
        memory[slot * order.pixel_bytes : (slot + 1) * order.pixel_bytes] = result.pixels.tobytes()
    status = DECODED if result.refusal is None else 1 + REFUSALS.index(result.refusal)
    if result.wanted_pixels:
        status = CROWDED
    message = result.message.encode("utf-8", "replace")[:MESSAGE_BYTES]
    digest = bytes.fromhex(result.content)
    return REPLY.pack(slot, status, digest, perf_counter() - began, result.wanted_pixels, len(message), message)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the daemon is gone: so are we
        run_decoder(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
