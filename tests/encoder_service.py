"""The server of ``sortd encode`` in a thread, over a real socket, with an encoder of the tests."""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from sortd.commands.encode import greeting_of
from sortd.config import Config
from sortd.encoder.clip import Encoder
from sortd.encoder.remote import HEADER, MessageKind, parse_header
from sortd.encoder.server import EncoderMetrics, EncoderServer
from sortd.service import unix_socket
from tests.daemon_process import PATIENCE_SECONDS
from tests.fake_encoder import SIDE, FakeEncoder


@dataclass
class GatedEncoder:
    """The fake encoder, which notes the size of each forward pass, and waits in each while the gate is closed."""

    inner: FakeEncoder = field(default_factory=FakeEncoder)
    batches: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    is_waiting: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Open the gate."""
        self.gate.set()
        self.encoder_id, self.dimensions = self.inner.encoder_id, self.inner.dimensions
        self.preprocessing, self.has_text = self.inner.preprocessing, self.inner.has_text

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See ``Encoder``."""
        self.batches.append(len(pixels))
        self.is_waiting.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        return self.inner.encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """See ``Encoder``."""
        return self.inner.encode_texts(texts)


@contextmanager
def encoder_server(
    path: Path, encoder: Encoder | None = None, *, batch_size: int = 32, stalled_seconds: float = PATIENCE_SECONDS
) -> Iterator[EncoderServer]:
    """Serve an encoder at a path until the block ends."""
    encoder = encoder or FakeEncoder()
    config = Config(root=path.parent, state_dir=path.parent, cache_dir=path.parent, batch_size=batch_size)
    greeting = greeting_of(encoder, config, "a fake")
    server = EncoderServer(encoder, greeting, metrics=EncoderMetrics(), stalled_seconds=stalled_seconds)
    with unix_socket(path) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), kwargs={"on_turn": lambda: None})
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


def images(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return pixels for the fake encoder."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


class RawClient:
    """A client of raw bytes."""

    def __init__(self, path: Path) -> None:
        """Connect."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(os.fspath(path))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.socket.close()

    def read(self) -> tuple[MessageKind, int, bytes] | None:
        """Return the next message; None at the end of the connection."""
        try:
            header = self._exactly(HEADER.size)
            if header is None:
                return None
            kind, count, size = parse_header(header)
            return kind, count, self._exactly(size) or b""
        except ConnectionResetError:  # the server did not read all that was sent
            return None

    def _exactly(self, size: int) -> bytes | None:
        content = b""
        while len(content) < size:
            part = self.socket.recv(size - len(content))
            if not part:
                return None
            content += part
        return content
