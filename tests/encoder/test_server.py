"""The server of ``sortd encode``: batches across clients, and clients that do not keep to the protocol."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sortd.encoder import server as server_module
from sortd.encoder.remote import HEADER, MAGIC, TEXTS_BYTES, VERSION, MessageKind, RemoteEncoder
from sortd.encoder.server import REQUEST_BYTES, EncoderServer, most_images
from sortd.errors import ModelError
from tests.daemon_process import PATIENCE_SECONDS
from tests.encoder_service import GatedEncoder, RawClient, encoder_server, images
from tests.fake_encoder import SIDE, FakeEncoder

IMAGE_BYTES = SIDE * SIDE * 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket is."""
    return tmp_path / "encoder.sock"


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for a state of another thread."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


def header(kind: int, count: int, size: int, *, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    """Return the header of a message."""
    return HEADER.pack(magic, version, kind, count, size)


def images_request(count: int) -> bytes:
    """Return a request of images."""
    return header(MessageKind.IMAGES, count, count * IMAGE_BYTES) + images(count).tobytes()


def serves(path: Path) -> None:
    """Check that other clients are served."""
    encoder = RemoteEncoder(path)
    assert np.array_equal(encoder.encode_images(images(3)), FakeEncoder().encode_images(images(3)))
    encoder.close()


# ---------------------------------------------------------------- batches


def test_server_encodes_what_waits_in_one_forward_pass(path: Path) -> None:
    """While one pass runs, the images of other clients gather, up to the batch; each client receives its own rows."""
    gated = GatedEncoder()
    with encoder_server(path, gated, batch_size=8) as server:
        gated.batches.clear()
        gated.gate.clear()
        gated.is_waiting.clear()
        rows: dict[int, npt.NDArray[np.float32]] = {}

        def ask(seed: int) -> None:
            encoder = RemoteEncoder(path)
            rows[seed] = encoder.encode_images(images(3, seed))
            encoder.close()

        asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
        asking[0].start()
        assert gated.is_waiting.wait(PATIENCE_SECONDS)
        for thread in asking[1:]:
            thread.start()
        wait_until(lambda: len(server._waiting) == 4)
        gated.gate.set()
        for thread in asking:
            thread.join()
    assert gated.batches == [3, 6, 6]
    for seed, found in rows.items():
        assert np.array_equal(found, FakeEncoder().encode_images(images(3, seed)))


def test_server_takes_the_oldest_request_first(path: Path) -> None:
    """Texts and images in the order of arrival: no client waits for ever."""
    order: list[str] = []

    class Noting(GatedEncoder):
        """The order of the forward passes."""

        def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            """Note it."""
            order.append(f"images {len(pixels)}")
            return super().encode_images(pixels)

        def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            """Note it."""
            order.append("texts")
            return super().encode_texts(texts)

    gated = Noting()
    with encoder_server(path, gated) as server:
        order.clear()
        gated.gate.clear()
        gated.is_waiting.clear()
        texts = json.dumps(["red"]).encode()
        requests = [images_request(1), header(MessageKind.TEXTS, 1, len(texts)) + texts, images_request(2)]
        clients = [RawClient(path) for _ in requests]
        for at, (client, request) in enumerate(zip(clients, requests, strict=True)):
            client.read()
            client.socket.sendall(request)
            wait_until(lambda at=at: gated.is_waiting.is_set() and len(server._waiting) == at)  # type: ignore[misc]
        gated.gate.set()
        for client in clients:
            answer = client.read()
            assert answer is not None
            assert answer[0] is MessageKind.ROWS
            client.socket.close()
    assert order == ["images 1", "texts", "images 2"]


def test_most_images_limits_the_bytes_of_a_request() -> None:
    """The batch of the configuration, unless the images are large."""
    assert most_images(FakeEncoder(), 32) == 32
    assert most_images(FakeEncoder(), 10**6) * IMAGE_BYTES <= REQUEST_BYTES


# ---------------------------------------------------------------- clients at fault


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        os.urandom(1) * 100,
        header(MessageKind.IMAGES, 1, IMAGE_BYTES, version=VERSION + 1),
        header(99, 1, IMAGE_BYTES),
        header(MessageKind.GREETING, 0, 0),
        header(MessageKind.ROWS, 1, 192),
        header(MessageKind.IMAGES, 0, 0),
        header(MessageKind.IMAGES, 1, IMAGE_BYTES - 1),
        header(MessageKind.IMAGES, 1, 1 << 62),
        header(MessageKind.IMAGES, 33, 33 * IMAGE_BYTES),
        header(MessageKind.IMAGES, 2**32 - 1, (2**32 - 1) * IMAGE_BYTES),
        header(MessageKind.TEXTS, 1, TEXTS_BYTES + 1),
        header(MessageKind.TEXTS, 65, 10),
        header(MessageKind.TEXTS, 1, 2) + b"[]",
        header(MessageKind.TEXTS, 1, 3) + b"[1]",
        header(MessageKind.TEXTS, 1, 5) + b"\xff\xfe[]]",
        header(MessageKind.TEXTS, 1, 200_000) + b"[" * 200_000,
    ],
    ids=range(17),
)
def test_server_refuses_garbage_and_serves_the_others(path: Path, sent: bytes) -> None:
    """The client is told, if it still listens, and disconnected; nothing is allocated for what it announced."""
    with encoder_server(path) as server:
        with RawClient(path) as client:
            greeting = client.read()
            assert greeting is not None
            assert greeting[0] is MessageKind.GREETING
            client.socket.sendall(sent)
            answer = client.read()
            assert answer is None or answer[0] is MessageKind.REFUSED
            assert answer is None or client.read() is None
        serves(path)
        assert 'sortd_encoder_refused_total{cause="protocol"} 1.0' in server.metrics.text()


@pytest.mark.parametrize("sent", [b"", b"s", header(MessageKind.IMAGES, 2, 2 * IMAGE_BYTES) + b"\0" * 100])
def test_server_client_that_leaves_costs_nothing(path: Path, sent: bytes) -> None:
    """At any point of a request, also before the greeting is read."""
    with encoder_server(path) as server:
        for _ in range(3):
            with RawClient(path) as client:
                client.socket.sendall(sent)
        wait_until(lambda: not server._clients)
        with RawClient(path) as client:
            client.socket.sendall(images_request(2))  # and does not wait for the rows
        serves(path)


def test_server_disconnects_a_client_that_does_not_end_its_request(path: Path) -> None:
    """One that has not begun a request may stay."""
    with encoder_server(path, stalled_seconds=0.2) as server, RawClient(path) as idle, RawClient(path) as stalled:
        assert idle.read() is not None
        assert stalled.read() is not None
        stalled.socket.sendall(images_request(2)[:-1])
        assert stalled.read() is None
        idle.socket.sendall(images_request(2))
        answer = idle.read()
        assert answer is not None
        assert answer[:2] == (MessageKind.ROWS, 2)
        assert 'cause="stalled"} 1.0' in server.metrics.text()


def test_server_disconnects_a_client_that_does_not_read(path: Path) -> None:
    """Its rows, and then its requests, fill the buffers of its socket; the others are served meanwhile."""
    with encoder_server(path, batch_size=4096, stalled_seconds=0.5) as server, RawClient(path) as client:
        request = images_request(4096)
        client.socket.settimeout(0.1)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 -- it sends until it cannot
            while True:
                try:
                    client.socket.sendall(request)
                except TimeoutError:
                    serves(path)
        assert 'cause="stalled"} 1.0' in server.metrics.text()


def test_server_makes_room_by_disconnecting_the_idle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that only keeps its connection cannot keep out others, and gets another one when it needs it."""
    monkeypatch.setattr(server_module, "MOST_CLIENTS", 3)
    with encoder_server(path) as server:
        first = RemoteEncoder(path)
        expected = first.encode_images(images(2))
        others = [RawClient(path) for _ in range(8)]
        for client in others:
            client.read()
        serves(path)
        assert np.array_equal(first.encode_images(images(2)), expected)
        assert len(server._clients) <= 3
        first.close()
        for client in others:
            client.socket.close()


def test_server_keeps_clients_with_a_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those have the right to their rows; one more must come again."""
    monkeypatch.setattr(server_module, "MOST_CLIENTS", 2)
    gated = GatedEncoder()
    with encoder_server(path, gated) as server:
        gated.gate.clear()
        busy = [RawClient(path) for _ in range(2)]
        for client in busy:
            client.read()
        wait_until(lambda: [one.idle_since is None for one in server._clients] == [False, False])
        for client in busy:
            client.socket.sendall(images_request(1))
        wait_until(lambda: all(one.idle_since is None for one in server._clients))
        with RawClient(path) as late:
            assert late.read() is None
        gated.gate.set()
        for client in busy:
            answer = client.read()
            assert answer is not None
            assert answer[0] is MessageKind.ROWS
            client.socket.close()


# ---------------------------------------------------------------- an encoder that fails


@dataclass
class Failing(GatedEncoder):
    """An encoder that raises for images that are black in one corner, or for all."""

    error: type[Exception] = ModelError
    is_broken: bool = False

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Raise, or embed."""
        rows = super().encode_images(pixels)
        if self.is_broken or (pixels[:, 0, :3].max(axis=(1, 2)) == 0).any():
            raise self.error("it cannot be encoded")
        return rows


@pytest.mark.parametrize("error", [ModelError, RuntimeError])
def test_server_refuses_only_the_request_at_fault(path: Path, error: type[Exception]) -> None:
    """Those that were in one forward pass with it are encoded alone."""
    failing = Failing(error=error)
    with encoder_server(path, failing) as server:
        failing.gate.clear()
        failing.is_waiting.clear()
        bad = images(2)
        bad[1, 0, :3] = 0
        good = [RawClient(path), RawClient(path)]
        with RawClient(path) as poor:
            for client in (good[0], poor, good[1]):
                client.read()
                content = bad if client is poor else images(2)
                client.socket.sendall(header(MessageKind.IMAGES, 2, 2 * IMAGE_BYTES) + content.tobytes())
                wait_until(failing.is_waiting.is_set)
            wait_until(lambda: len(server._waiting) == 2)
            failing.gate.set()
            for client in good:
                answer = client.read()
                assert answer is not None
                assert answer[:2] == (MessageKind.ROWS, 2)
                client.socket.close()
            assert poor.read() == (MessageKind.REFUSED, 0, b"it cannot be encoded")
            poor.socket.sendall(images_request(1))
            answer = poor.read()
            assert answer is not None
            assert answer[0] is MessageKind.ROWS


@pytest.mark.parametrize("error", [ModelError, RuntimeError])
def test_server_ends_if_its_encoder_is_broken(path: Path, error: type[Exception]) -> None:
    """Then a restart may help: the clients get no answer, and wait for it."""
    failing = Failing(error=error)
    ended: list[BaseException] = []

    def run(server: EncoderServer, listener: socket.socket) -> None:
        try:
            server.run([listener], on_turn=lambda: None)
        except error as why:
            ended.append(why)

    with encoder_server(path.with_name("other"), failing) as other, socket.socket(socket.AF_UNIX) as listener:
        server = EncoderServer(failing, other._greeting, metrics=other.metrics)
        listener.bind(os.fspath(path))
        listener.listen()
        thread = threading.Thread(target=run, args=(server, listener))
        thread.start()
        with RawClient(path) as client:
            client.read()
            failing.is_broken = True
            client.socket.sendall(images_request(1))
            assert client.read() is None
        thread.join(PATIENCE_SECONDS)
    assert [str(why) for why in ended] == ["it cannot be encoded"]
