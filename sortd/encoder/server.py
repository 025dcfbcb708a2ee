"""The server of ``sortd encode``: one encoder for the clients of a Unix socket; ``remote.py`` has the messages.

    main      accepts clients, and writes down what they cost
    client    one thread for each: reads its request, waits for the rows, sends them
    encoder   encodes what waits, the requests of several clients in one forward pass, in the order of arrival

Each client has at most one request in memory, of limited size, so no client delays another by more than that request.
"""

import json
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter, sleep
from typing import Final

import numpy as np
import prometheus_client
import structlog

from sortd import logs
from sortd.arrays import FloatArray, Pixels
from sortd.encoder.clip import Encoder, probe
from sortd.encoder.remote import (
    GREETINGS,
    HEADER,
    MOST_TEXTS,
    REASON_BYTES,
    TEXTS_BYTES,
    ConnectionLostError,
    Greeting,
    MessageKind,
    Patience,
    ProtocolError,
    bytes_of,
    parse_header,
    receive,
    send_message,
)
from sortd.files import write_atomic

REQUEST_BYTES: Final = 16_000_000
"""Largest content of a request of images."""
MOST_CLIENTS: Final = 16
"""At once; for one more, the client that has sent nothing for the longest time is disconnected, and connects again when
it needs rows."""
STALLED_SECONDS: Final = 30.0
"""How long a client may take to send a request that it has begun, or to receive its rows."""
STUCK_SECONDS: Final = 300.0
"""After so long in one forward pass, ``makes_progress`` is false."""
_TURN_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.1  # without descriptors
_READABLE_BY_ALL: Final = 0o644
_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class EncoderMetrics:
    """The metrics of one encoder service, in a registry of its own."""

    def __init__(self) -> None:
        """Start all counters at zero."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # not of interest
        self._registry = own = prometheus_client.CollectorRegistry()
        self.clients = prometheus_client.Gauge("sortd_encoder_clients", "Connected clients.", registry=own)
        self.encoded = prometheus_client.Counter(
            "sortd_encoder_encoded", "Images and texts that were encoded.", ("kind",), registry=own
        )
        self.refused = prometheus_client.Counter(
            "sortd_encoder_refused", "Requests and connections that were refused.", ("cause",), registry=own
        )
        self.forward_seconds = prometheus_client.Histogram(
            "sortd_encoder_forward_seconds", "Time of a forward pass.", ("kind",), registry=own, buckets=_BUCKETS
        )

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry).decode()

    def write_textfile(self, path: str) -> None:
        """Replace a file with all metrics, readable by node_exporter's textfile collector. Raises OSError."""
        write_atomic(path, self.text().encode(), mode=_READABLE_BY_ALL, durable=False)


@dataclass(slots=True, eq=False)
class _Request:
    """Pixels or texts, and their answer: the rows, the reason of a refusal, or None if the server stops."""

    content: Pixels | list[str]
    answer: FloatArray | str | None = None
    is_done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class _Client:
    """A connection with its thread; ``idle_since`` is None while a request is under way."""

    connection: socket.socket
    idle_since: float | None = None
    thread: threading.Thread | None = None

    def disconnect(self) -> None:
        """End the connection; its thread sees that."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def most_images(encoder: Encoder, batch_size: int) -> int:
    """Return how many images a request and a forward pass may have."""
    image_bytes = encoder.preprocessing.crop_height * encoder.preprocessing.crop_width * 3
    return max(1, min(batch_size, REQUEST_BYTES // image_bytes))


class EncoderServer:
    """Serves one encoder until ``stop``."""

    def __init__(
        self,
        encoder: Encoder,
        greeting: Greeting,
        *,
        metrics: EncoderMetrics,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        """Prepare; ``run`` serves."""
        self.metrics = metrics
        self._encoder, self._greeting = encoder, greeting
        self._stalled_seconds = stalled_seconds
        self._clients: set[_Client] = set()
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()  # of the two above, and of stopping
        self._is_stopping = False
        self._failure: Exception | None = None
        self._busy_since: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._log: structlog.stdlib.BoundLogger = structlog.get_logger()

    @property
    def makes_progress(self) -> bool:
        """Whether the present forward pass, if any, has not lasted for too long."""
        since = self._busy_since
        return since is None or monotonic() - since < STUCK_SECONDS

    def stop(self) -> None:
        """Make ``run`` return; may be called by a signal handler."""
        self._is_stopping = True
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def run(self, listeners: Sequence[socket.socket], *, on_turn: Callable[[], None]) -> None:
        """Serve until ``stop``; ``on_turn`` is called about once a second.

        Raises:
            Exception: the encoder does not work any more.
        """
        worker = threading.Thread(target=self._encode_waiting, name="encoder")
        worker.start()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake, selectors.EVENT_READ)
                for listener in listeners:
                    listener.setblocking(False)
                    selector.register(listener, selectors.EVENT_READ)
                while not self._is_stopping:
                    for key, _ in selector.select(_TURN_SECONDS):
                        if isinstance(key.fileobj, socket.socket):
                            self._accept(key.fileobj)
                    on_turn()
        finally:
            self._end(worker)
        if self._failure is not None:
            raise self._failure

    def _end(self, worker: threading.Thread) -> None:
        """Disconnect all clients, and end all threads after the present forward pass."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            clients = list(self._clients)
        worker.join()
        for client in clients:
            client.disconnect()
        for client in clients:
            if client.thread is not None:
                client.thread.join()
        wake, self._wake = self._wake, -1  # a signal may call ``stop`` once more
        os.close(wake)

    # ------------------------------------------------------------ clients

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: a client must go before another one comes
            self._refused("descriptors", str(error.strerror))
            self._disconnect_idle()
            sleep(_PAUSE_SECONDS)
            return
        client = _Client(connection)
        with self._changed:
            is_full = len(self._clients) >= MOST_CLIENTS
            if not is_full or self._disconnect_idle():
                client.thread = threading.Thread(target=self._serve, args=(client,), name="client")
                with suppress(RuntimeError):  # a limit on threads
                    client.thread.start()
                    self._clients.add(client)
                    self.metrics.clients.set(len(self._clients))
                    return
        connection.close()
        self._refused("clients", f"no more than {len(self._clients)} clients can be served now")

    def _disconnect_idle(self) -> bool:
        """Disconnect the client that has been idle for the longest time; return whether there was one."""
        with self._changed:
            idle = [(client.idle_since, client) for client in self._clients if client.idle_since is not None]
            if not idle:
                return False
            _, client = min(idle, key=lambda one: one[0])
            self._clients.discard(client)
        client.disconnect()
        return True

    def _serve(self, client: _Client) -> None:
        try:
            with client.connection:
                self._converse(client)
        except ConnectionLostError:
            pass
        finally:
            with self._changed:
                self._clients.discard(client)
                self.metrics.clients.set(len(self._clients))

    def _converse(self, client: _Client) -> None:
        """Greet a client, and answer its requests until it leaves."""
        connection = client.connection
        send_message(connection, MessageKind.GREETING, GREETINGS.dump_json(self._greeting), self._patience())
        while True:
            try:
                request = self._read_request(client)
            except ProtocolError as error:
                self._refused("protocol", str(error))
                self._refuse(connection, str(error))
                return
            answer = self._answer(request)
            if answer is None:
                return
            if isinstance(answer, str):
                self._refuse(connection, answer)
            else:
                send_message(connection, MessageKind.ROWS, bytes_of(answer), self._patience(), count=len(answer))

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        send_message(
            connection, MessageKind.REFUSED, reason.encode("utf-8", "replace")[:REASON_BYTES], self._patience()
        )

    def _refused(self, cause: str, error: str) -> None:
        self.metrics.refused.labels(cause).inc()
        self._log.warning(logs.ENCODER_REFUSED, cause=cause, error=error)

    def _patience(self) -> Patience:
        """Return the limit of time of one message."""
        until = monotonic() + self._stalled_seconds

        def patience() -> float:
            left = until - monotonic()
            if left <= 0:
                self._refused("stalled", f"a message took longer than {self._stalled_seconds:g} s")
                raise ConnectionLostError("stalled")
            return left

        return patience

    def _read_request(self, client: _Client) -> _Request:
        """Wait for the next request of a client; raise ProtocolError before its content is read if it is not valid."""
        header = memoryview(bytearray(HEADER.size))
        client.idle_since = monotonic()
        receive(client.connection, header[:1], lambda: None)
        client.idle_since = None
        patience = self._patience()
        receive(client.connection, header[1:], patience)
        kind, count, size = parse_header(bytes(header))
        match kind:
            case MessageKind.IMAGES if 1 <= count <= self._greeting.most_images:
                seen = self._greeting.preprocessing
                pixels = np.empty((count, seen.crop_height, seen.crop_width, 3), np.uint8)
                if size != pixels.nbytes:
                    raise ProtocolError(f"{count} images take {pixels.nbytes} bytes, not {size}")
                receive(client.connection, bytes_of(pixels), patience)
                return _Request(pixels)
            case MessageKind.TEXTS if 1 <= count <= MOST_TEXTS and size <= TEXTS_BYTES:
                content = bytearray(size)
                receive(client.connection, memoryview(content), patience)
                return _Request(_texts_of(bytes(content), count))
        raise ProtocolError(f"a request of kind {kind.name} with {count} items and {size} bytes is not allowed")

    def _answer(self, request: _Request) -> FloatArray | str | None:
        """Wait until a request is encoded; None if the server stops."""
        with self._changed:
            if self._is_stopping:
                return None
            self._waiting.append(request)
            self._changed.notify_all()
        request.is_done.wait()
        return request.answer

    # ------------------------------------------------------------ the encoder

    def _encode_waiting(self) -> None:
        """Encode until the server stops; whoever still waits then gets no answer."""
        batch: list[_Request] | None = None
        try:
            while (batch := self._next_batch()) is not None:
                self._busy_since = monotonic()
                self._encode(batch)
                self._busy_since = None
        except Exception as error:  # noqa: BLE001 -- ``run`` raises it
            self._failure = error
        with self._changed:
            self._is_stopping = True
            left = [*(batch or ()), *self._waiting]
            self._waiting.clear()
        for request in left:
            request.is_done.set()
        self.stop()

    def _next_batch(self) -> list[_Request] | None:
        """Wait for requests and return those of the next forward pass; None if the server stops.

        The oldest one is always among them; those of images that wait behind it fill the batch.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            if self._is_stopping:
                return None
            batch, left = [self._waiting.popleft()], self._greeting.most_images
            left -= len(batch[0].content)
            if isinstance(batch[0].content, list):
                return batch
            for request in list(self._waiting):
                if isinstance(request.content, np.ndarray) and len(request.content) <= left:
                    self._waiting.remove(request)
                    batch.append(request)
                    left -= len(request.content)
            return batch

    def _encode(self, batch: Sequence[_Request]) -> None:
        """Encode requests in one forward pass; if it fails, each alone, so that only the one at fault is refused."""
        try:
            rows = self._rows([request.content for request in batch])
        except Exception as error:  # noqa: BLE001 -- whatever torch raises for what one client sent
            if len(batch) == 1:
                probe(self._encoder, texts=())  # the encoder still works; otherwise this error ends the server
                self._refused("encoding", str(error))
                self._finish(batch[0], f"{error}")
                return
            for request in batch:
                self._encode([request])
            return
        ends = np.cumsum([len(request.content) for request in batch])
        for request, part in zip(batch, np.split(rows, ends[:-1]), strict=True):
            self._finish(request, np.ascontiguousarray(part))

    def _rows(self, contents: Sequence[Pixels | list[str]]) -> FloatArray:
        began, first = perf_counter(), contents[0]
        if isinstance(first, list):
            kind, rows = "text", self._encoder.encode_texts(first)
        else:
            pixels = first if len(contents) == 1 else np.concatenate([np.asarray(one) for one in contents])
            kind, rows = "image", self._encoder.encode_images(pixels)
        self.metrics.forward_seconds.labels(kind).observe(perf_counter() - began)
        self.metrics.encoded.labels(kind).inc(len(rows))
        return rows

    @staticmethod
    def _finish(request: _Request, answer: FloatArray | str) -> None:
        request.answer = answer
        request.is_done.set()


def _texts_of(content: bytes, count: int) -> list[str]:
    """Return the texts of a request. Raises ProtocolError."""
    try:
        texts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a request of texts is no JSON") from error
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise ProtocolError(f"a request of texts is no list of {count} texts")
    return texts
