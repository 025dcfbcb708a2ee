"""The encoder of another process, ``sortd encode``, over a Unix socket: the messages, and the client.

A message is ``HEADER`` and its content. The server sends ``GREETING`` (JSON) to each client; then a client sends one
request at a time, ``IMAGES`` (pixels, uint8 (count, H, W, 3)) or ``TEXTS`` (a JSON list), and receives ``ROWS``
(float32 (count, d)) or ``REFUSED`` (the reason). Numbers are those of this machine, which both processes share.

While the service is away, the client waits, tries again and repeats the request: no caller sees that it was away.
"""

import json
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Final, TypeVar

import numpy as np
from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter

from sortd.arrays import FloatArray, Pixels
from sortd.encoder.clip import are_of_unit_length, check_pixels
from sortd.errors import ModelError
from sortd.events import Preprocessing
from sortd.files import text_of

HEADER: Final = struct.Struct("=4sHHIQ")
"""Magic, version of the protocol, kind, number of images, texts or rows, and bytes of the content."""
MAGIC: Final = b"sort"
VERSION: Final = 1
MOST_TEXTS: Final = 64
"""In one request."""
MOST_CHARACTERS: Final = 10_000
"""Of a text: the client cuts longer ones. No model that sortd reads takes as many; the longest takes 512 tokens."""
TEXTS_BYTES: Final = MOST_TEXTS * (12 * MOST_CHARACTERS + 4)  # in JSON, a character takes up to twelve bytes
REASON_BYTES: Final = 8192
GREETING_BYTES: Final = 1 << 20
MOST_PIXELS: Final = 4096
"""Of a side of the input, which the decoding processes of a client allocate."""
UNREADABLE: Final = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors of a greeting that is none."""

COMMAND_SECONDS: Final = 10.0
"""How long a command waits for a service that is away; the daemon waits for ever."""
_POLL_SECONDS: Final = 0.1  # between two calls of ``Waiting.on_wait``
_MOST_PAUSE_SECONDS: Final = 2.0  # between two attempts to connect
_SILENT_SECONDS: Final = 3.0  # without a greeting; then the service counts as away
_LOADING_SECONDS: Final = 60.0  # the same for a command, which waits while a service that was just started loads
_SLOW_SECONDS: Final = 60.0  # without an answer; the requests of other clients come before it
_SAME_COSINE: Final = 0.999  # of the rows of the probe images, as in ``backends``

_T = TypeVar("_T")


class MessageKind(IntEnum):
    """What a message is."""

    GREETING = 1
    IMAGES = 2
    TEXTS = 3
    ROWS = 4
    REFUSED = 5


class ConnectionLostError(Exception):
    """The other process closed the connection, or cannot be reached; the message is the reason."""


class ProtocolError(Exception):
    """The other process sent what is no message of this protocol; the message is the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Greeting:
    """What a client needs to know of the encoder."""

    encoder_id: str
    dimensions: int
    preprocessing: Annotated[  # one with other fields is of another version
        Preprocessing, PlainValidator(Preprocessing.from_fields), PlainSerializer(asdict)
    ]
    has_text: bool
    decoding: str  # how the images of this ``encoder_id`` must be decoded: draft or full
    runs_on: str  # CPU, CUDA, ...
    description: Annotated[str, PlainSerializer(text_of)]  # of the model and its backend, for people
    most_images: Annotated[int, Field(ge=1)]  # in one request
    known_rows: Annotated[  # (2, d), those of the probe images
        FloatArray, PlainValidator(lambda rows: np.asarray(rows, np.float32)), PlainSerializer(np.ndarray.tolist)
    ]

    def __post_init__(self) -> None:
        """Raise ValueError for rows that no encoder makes, or images that are too large."""
        rows, seen = self.known_rows, self.preprocessing
        if rows.shape != (2, self.dimensions) or not are_of_unit_length(rows):
            raise ValueError(f"rows of shape {rows.shape} for {self.dimensions} dimensions, or not of unit length")
        if not all(0 < side <= MOST_PIXELS for side in (seen.shortest_edge, seen.crop_height, seen.crop_width)):
            raise ValueError(f"images of {seen.crop_height} x {seen.crop_width} pixels")

    def difference(self, other: "Greeting") -> str | None:
        """Return how another encoder differs from this one; None if their rows are the same."""
        if other.encoder_id != self.encoder_id:
            return f"{other.encoder_id} instead of {self.encoder_id}"
        cosine = float((self.known_rows * other.known_rows).sum(axis=1).min())
        return None if cosine >= _SAME_COSINE else f"{self.encoder_id} with other rows, cosine {cosine:.4f}"


GREETINGS = TypeAdapter(Greeting)
"""Parses (``validate_json``, which raises one of ``UNREADABLE``) and writes (``dump_json``) the message."""


# ---------------------------------------------------------------- messages

Patience = Callable[[], float | None]
"""Called before each wait for the other process: returns its longest time in seconds (None: no limit), or raises."""


def receive(connection: socket.socket, buffer: memoryview, patience: Patience) -> None:
    """Fill a buffer of bytes. Raises ConnectionLostError."""
    while buffer:
        connection.settimeout(patience())
        try:
            count = connection.recv_into(buffer)
        except TimeoutError:
            continue
        except OSError as error:
            raise ConnectionLostError(error.strerror or str(error)) from error
        if not count:
            raise ConnectionLostError("it closed the connection")
        buffer = buffer[count:]


def send_message(
    connection: socket.socket, kind: MessageKind, content: bytes | memoryview, patience: Patience, *, count: int = 0
) -> None:
    """Send a message. Raises ConnectionLostError."""
    content = memoryview(content)
    for part in (memoryview(HEADER.pack(MAGIC, VERSION, kind, count, content.nbytes)), content):
        left = part
        while left:
            connection.settimeout(patience())
            try:
                sent = connection.send(left)
            except TimeoutError:
                continue
            except OSError as error:
                raise ConnectionLostError(error.strerror or str(error)) from error
            left = left[sent:]


def parse_header(header: bytes | bytearray) -> tuple[MessageKind, int, int]:
    """Return kind, count and bytes of the content. Raises ProtocolError."""
    magic, version, kind, count, size = HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError("it does not use the protocol of sortd encode")
    if version != VERSION:
        raise ProtocolError(f"it uses version {version} of the protocol, and this sortd version {VERSION}")
    try:
        return MessageKind(kind), count, size
    except ValueError as error:
        raise ProtocolError(f"there is no message of kind {kind}") from error


def bytes_of(array: Pixels | FloatArray) -> memoryview:
    """Return the content of a contiguous array as bytes."""
    return array.data.cast("B")


# ---------------------------------------------------------------- the client


@dataclass(frozen=True, slots=True)
class Waiting:
    """How a client waits for the service and for its answers.

    ``on_wait`` is called several times a second with the reason why the service is away, or None while it is not; it
    may raise, which ends the request. After ``most_seconds`` without the service the client gives up (None: never).
    """

    on_wait: Callable[[str | None], None] = lambda _: None
    most_seconds: float | None = COMMAND_SECONDS


AS_COMMAND: Final = Waiting()
"""How a command waits."""


class RemoteEncoder:
    """The encoder of ``sortd encode``; see ``Encoder``."""

    def __init__(self, path: Path, waiting: Waiting = AS_COMMAND) -> None:
        """Connect.

        Raises:
            ModelError: the service is away for too long, or is none of this version of sortd.
        """
        self._path, self._waiting = path, waiting
        self._connection: socket.socket | None = None
        self._problem: str | None = None
        self._asked_at = 0.0
        self._first: Greeting | None = None  # that of the first connection
        self.greeting = greeting = self._repeated(self._connected)
        self.encoder_id, self.dimensions = greeting.encoder_id, greeting.dimensions
        self.preprocessing, self.has_text = greeting.preprocessing, greeting.has_text
        self.runs_on = greeting.runs_on

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def encode_images(self, pixels: Pixels) -> FloatArray:
        """See ``Encoder``."""
        check_pixels(pixels, self.preprocessing)
        most = self.greeting.most_images
        parts = [np.ascontiguousarray(pixels[start : start + most]) for start in range(0, len(pixels), most)]
        return self._stacked([self._ask(MessageKind.IMAGES, bytes_of(part), len(part)) for part in parts])

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """See ``Encoder``."""
        if not self.has_text:
            raise ModelError(f"model {self.encoder_id} takes images only; serve a CLIP by `sortd encode`")
        cut = [text[:MOST_CHARACTERS] for text in texts]
        parts = [cut[start : start + MOST_TEXTS] for start in range(0, len(cut), MOST_TEXTS)]
        return self._stacked([self._ask(MessageKind.TEXTS, json.dumps(part).encode(), len(part)) for part in parts])

    def _stacked(self, parts: Sequence[FloatArray]) -> FloatArray:
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.dimensions), np.float32), *parts])

    def _ask(self, kind: MessageKind, content: bytes | memoryview, count: int) -> FloatArray:
        """Send a request until it is answered, and return its rows."""

        def exchange() -> FloatArray:
            self._connected()
            assert self._connection is not None
            patience = self._patience(_SLOW_SECONDS)
            send_message(self._connection, kind, content, patience, count=count)
            return self._receive_rows(self._connection, count, patience)

        return self._repeated(exchange)

    def _repeated(self, act: Callable[[], _T]) -> _T:
        """Call ``act`` until the connection lasts, with growing pauses; the first repetition follows at once."""
        self._asked_at, pause_seconds = monotonic(), 0.0
        while True:
            try:
                result = act()
            except ConnectionLostError as lost:
                self.close()
                if pause_seconds:
                    self._pause(pause_seconds, str(lost))
                pause_seconds = min(2 * pause_seconds or _POLL_SECONDS, _MOST_PAUSE_SECONDS)
            except ProtocolError as error:
                self.close()
                raise ModelError(
                    f"the encoder service at {self._path} cannot be used: {error}; start `sortd encode` and this sortd "
                    f"from the same version"
                ) from error
            except BaseException:  # the request may be half sent
                self.close()
                raise
            else:
                self._tell(None)
                return result

    def _tell(self, problem: str | None) -> None:
        """Tell whether the service is away."""
        self._problem = problem
        self._waiting.on_wait(problem)

    def _wait(self, problem: str) -> None:
        """Tell that the service is away; raise ModelError if it is for too long."""
        self._tell(problem)
        most = self._waiting.most_seconds
        if most is not None and monotonic() - self._asked_at > most:
            raise ModelError(
                f"{problem}; start it (`sortd encode --socket {self._path}`, or its unit), or set `backend: auto` to "
                f"load the model in this process"
            )

    def _pause(self, seconds: float, why: str) -> None:
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            self._wait(f"the encoder service at {self._path} is away ({why})")
            sleep(min(left, _POLL_SECONDS))

    def _patience(self, limit_seconds: float) -> Patience:
        """Return what waits for a message: after the limit the service counts as away."""
        began = monotonic()

        def patience() -> float:
            if monotonic() - began > limit_seconds:
                self._wait(f"the encoder service at {self._path} has not answered for {limit_seconds:.0f} s")
            else:
                self._tell(self._problem)  # it is connected, so no command gives up yet
            return _POLL_SECONDS

        return patience

    def _connected(self) -> Greeting:
        """Return the greeting of the open connection; open one if there is none."""
        if self._connection is None:
            self._check_folder()
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._connection.settimeout(_SILENT_SECONDS)
            try:
                self._connection.connect(str(self._path))
            except OSError as error:
                raise ConnectionLostError(error.strerror or str(error)) from error
            found = self._receive_greeting(self._connection)
            difference = None if self._first is None else self._first.difference(found)
            if difference is not None:
                raise ModelError(
                    f"the encoder service at {self._path} serves another model since it was started again "
                    f"({difference}); restart sortd, which then uses that one"
                )
            self._first = self._first or found
        assert self._first is not None
        return self._first

    def _check_folder(self) -> None:
        """Raise ModelError if any user could have put the socket there: whoever listens sees the images."""
        with suppress(OSError):  # it may be made later
            if self._path.parent.stat().st_mode & stat.S_IWOTH:
                raise ModelError(
                    f"any user can write to {self._path.parent}, the folder of the encoder service's socket; use one "
                    "that belongs to the user of the service"
                )

    def _receive_greeting(self, connection: socket.socket) -> Greeting:
        patience = self._patience(_SILENT_SECONDS if self._waiting.most_seconds is None else _LOADING_SECONDS)
        kind, _, size = self._receive_header(connection, patience)
        if kind is not MessageKind.GREETING or size > GREETING_BYTES:
            raise ProtocolError("it does not begin with a greeting")
        content = bytearray(size)
        receive(connection, memoryview(content), patience)
        try:
            return GREETINGS.validate_json(bytes(content))
        except UNREADABLE as error:
            said = " ".join(str(error).split())
            raise ProtocolError(f"its greeting cannot be read ({said:.300})") from error

    def _receive_rows(self, connection: socket.socket, count: int, patience: Patience) -> FloatArray:
        kind, found, size = self._receive_header(connection, patience)
        if kind is MessageKind.REFUSED and size <= REASON_BYTES:
            reason = bytearray(size)
            receive(connection, memoryview(reason), patience)
            raise ModelError(f"the encoder service at {self._path}: {reason.decode('utf-8', 'replace')}")
        rows = np.empty((count, self.dimensions), np.float32)
        if kind is not MessageKind.ROWS or found != count or size != rows.nbytes:
            raise ProtocolError(f"it answered {count} images or texts with {kind.name}, {found}, {size} bytes")
        receive(connection, bytes_of(rows), patience)
        return rows

    @staticmethod
    def _receive_header(connection: socket.socket, patience: Patience) -> tuple[MessageKind, int, int]:
        header = bytearray(HEADER.size)
        receive(connection, memoryview(header), patience)
        return parse_header(header)
