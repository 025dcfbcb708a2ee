"""The client of an encoder in another process: the same rows, patience, and what it refuses."""

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sortd.commands.encode import greeting_of
from sortd.config import Config
from sortd.encoder.backends import KNOWN_ROWS, connect, load_fastest
from sortd.encoder.remote import COMMAND_SECONDS, GREETINGS, HEADER, MAGIC, VERSION, MessageKind, RemoteEncoder, Waiting
from sortd.errors import ConfigError, ModelError
from tests.daemon_process import PATIENCE_SECONDS
from tests.encoder_service import GatedEncoder, encoder_server, images
from tests.fake_encoder import FakeEncoder

BRIEF = Waiting(most_seconds=0.3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket is."""
    return tmp_path / "encoder.sock"


@pytest.fixture
def client(path: Path) -> Iterator[RemoteEncoder]:
    """A client of a server with the fake encoder, batches of four."""
    with encoder_server(path, batch_size=4):
        encoder = RemoteEncoder(path)
        yield encoder
        encoder.close()


def config_for(path: Path, **keys: object) -> Config:
    """Return the configuration of a client."""
    folder = path.parent
    values = {"root": folder, "state_dir": folder, "cache_dir": folder, "backend": f"socket:{path}", **keys}
    return Config.model_validate(values)


def test_remote_encoder_has_the_facts_of_the_encoder(client: RemoteEncoder) -> None:
    """The daemon keeps embeddings by these, and decodes by these."""
    local = FakeEncoder()
    for name in ("encoder_id", "dimensions", "preprocessing", "has_text"):
        assert getattr(client, name) == getattr(local, name)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_remote_encoder_rows_are_those_of_the_encoder(client: RemoteEncoder, count: int) -> None:
    """Also of more images than fit into one request, and of none."""
    pixels = images(count)
    assert np.array_equal(client.encode_images(pixels), FakeEncoder().encode_images(pixels))
    texts = [f"a red thing {number}" for number in range(20 * count)]
    assert np.array_equal(client.encode_texts(texts), FakeEncoder().encode_texts(texts))


def test_remote_encoder_takes_any_text(client: RemoteEncoder) -> None:
    """Names of folders need not be UTF-8; a text of any length is cut at a length that no model reads."""
    texts = ["\udcff\udcfe", "", "red \0 blue", "€" * 10_000]
    assert np.array_equal(client.encode_texts(texts), FakeEncoder().encode_texts(texts))
    assert np.isfinite(client.encode_texts(["𝄞" * 50_000] * 70)).all()


def test_remote_encoder_wrong_pixels_raise(client: RemoteEncoder) -> None:
    """As with any encoder."""
    with pytest.raises(ValueError, match="not uint8"):
        client.encode_images(np.zeros((1, 8, 8, 3), np.uint8))


def test_remote_encoder_of_images_only_refuses_texts(path: Path) -> None:
    """As with any encoder."""
    with encoder_server(path, replace(FakeEncoder(), has_text=False)):
        encoder = RemoteEncoder(path)
        with pytest.raises(ModelError, match="takes images only"):
            encoder.encode_texts(["red"])
        encoder.close()


# ---------------------------------------------------------------- away


def test_remote_encoder_of_an_absent_service_gives_up(path: Path) -> None:
    """A command says what to start."""
    with pytest.raises(ModelError, match=r"is away .*sortd encode --socket"):
        RemoteEncoder(path, BRIEF)


def test_remote_encoder_waits_for_the_service(path: Path) -> None:
    """It tells the reason while it waits, then that the service is back, and answers as if nothing had been."""
    told: list[str | None] = []
    is_told = threading.Event()

    def on_wait(problem: str | None) -> None:
        told.append(problem)
        if problem is not None:
            is_told.set()

    with encoder_server(path):
        encoder = RemoteEncoder(path, Waiting(on_wait, None))
    rows: list[np.ndarray] = []
    asking = threading.Thread(target=lambda: rows.append(encoder.encode_images(images(5))))
    asking.start()
    assert is_told.wait(60)
    with encoder_server(path):
        asking.join()
        encoder.close()
    assert np.array_equal(rows[0], FakeEncoder().encode_images(images(5)))
    away = [problem for problem in told if problem is not None]
    assert "is away" in away[0]
    assert told[0] is None
    assert told[-1] is None


def test_remote_encoder_of_a_restarted_service_is_not_away(path: Path) -> None:
    """The connection is opened again at once."""
    told: list[str | None] = []
    with encoder_server(path):
        encoder = RemoteEncoder(path, Waiting(told.append, None))
        first = encoder.encode_images(images(2))
    with encoder_server(path):
        assert np.array_equal(encoder.encode_images(images(2)), first)
        encoder.close()
    assert set(told) == {None}


def test_remote_encoder_of_a_service_that_is_back_waits_for_its_answer(path: Path) -> None:
    """A command gives up on a service that is away, not on one that computes after it was."""
    is_away, is_back, is_computing = (threading.Event() for _ in range(3))

    def on_wait(problem: str | None) -> None:
        if problem is not None:
            is_away.set()
            assert is_back.wait(PATIENCE_SECONDS)
        if is_computing.is_set():
            gated.gate.set()

    gated = GatedEncoder()
    with encoder_server(path):
        encoder = RemoteEncoder(path, Waiting(on_wait))
    rows: list[np.ndarray] = []

    def ask() -> None:
        with suppress(ModelError):
            rows.append(encoder.encode_images(images(1)))

    asking = threading.Thread(target=ask)
    asking.start()
    assert is_away.wait(PATIENCE_SECONDS)
    with encoder_server(path, gated):
        gated.gate.clear()
        gated.is_waiting.clear()
        is_back.set()
        assert gated.is_waiting.wait(PATIENCE_SECONDS)
        encoder._asked_at -= COMMAND_SECONDS  # as if the request had been made so long ago
        is_computing.set()
        asking.join(PATIENCE_SECONDS)
        encoder.close()
    assert len(rows) == 1


def test_remote_encoder_wait_can_be_ended(path: Path) -> None:
    """What ``on_wait`` raises ends the request, also while the service computes, and the next one works."""

    class StopError(Exception):
        """The daemon stops."""

    is_ending = threading.Event()

    def on_wait(_: str | None) -> None:
        if is_ending.is_set():
            raise StopError

    gated = GatedEncoder()
    with encoder_server(path, gated):
        encoder = RemoteEncoder(path, Waiting(on_wait, None))
        gated.gate.clear()
        gated.is_waiting.clear()

        def end() -> None:
            assert gated.is_waiting.wait(PATIENCE_SECONDS)
            is_ending.set()

        ending = threading.Thread(target=end)
        ending.start()
        with pytest.raises(StopError):
            encoder.encode_images(images(1))
        ending.join()
        is_ending.clear()
        gated.gate.set()
        assert np.array_equal(encoder.encode_images(images(3)), FakeEncoder().encode_images(images(3)))
        encoder.close()


def test_remote_encoder_of_another_model_raises(path: Path) -> None:
    """Embeddings of two models must not mix: the daemon ends, and systemd starts it again."""
    with encoder_server(path):
        encoder = RemoteEncoder(path)
    with (
        encoder_server(path, replace(FakeEncoder(), encoder_id="fake-other")),
        pytest.raises(ModelError, match=r"another model .*fake-other instead of fake-48"),
    ):
        encoder.encode_images(images(1))


class _Reversed(FakeEncoder):
    """The fake encoder, with other rows under the same id."""

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Return the rows of the negative."""
        return super().encode_images(255 - pixels)


def test_remote_encoder_of_other_rows_raises(path: Path) -> None:
    """Also if they have the same id."""
    with encoder_server(path):
        encoder = RemoteEncoder(path)
    with encoder_server(path, _Reversed()), pytest.raises(ModelError, match="other rows"):
        encoder.encode_images(images(1))


# ---------------------------------------------------------------- what is no encoder service


def _greeting(**changed: object) -> bytes:
    """Return the message of a greeting with some facts changed."""
    encoder = FakeEncoder()
    config = Config(root=Path("/"), state_dir=Path("/"), cache_dir=Path("/"))
    facts = json.loads(GREETINGS.dump_json(greeting_of(encoder, config, "a fake")))
    for name, value in changed.items():
        facts[name] = facts[name] | value if isinstance(value, dict) else value
    content = json.dumps(facts).encode()
    return HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, len(content)) + content


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not use the protocol"),
        (HEADER.pack(MAGIC, VERSION + 1, 1, 0, 0), f"version {VERSION + 1}"),
        (HEADER.pack(MAGIC, VERSION, 99, 0, 0), "no message of kind 99"),
        (HEADER.pack(MAGIC, VERSION, MessageKind.ROWS, 0, 0), "does not begin with a greeting"),
        (HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, 1 << 40), "does not begin with a greeting"),
        (HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, 2) + b"[]", "greeting cannot be read"),
        (HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, 3) + b"\xff{}", "greeting cannot be read"),
        (HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, 2) + b"{}", "greeting cannot be read"),
        (_greeting(dimensions=float("inf")), "greeting cannot be read"),
        (_greeting(dimensions=0, known_rows=[[], []]), "greeting cannot be read"),
        (_greeting(known_rows=[[float("nan")] * 48] * 2), "greeting cannot be read"),
        (_greeting(known_rows=[[1.0] * 48] * 2), "greeting cannot be read"),
        (_greeting(known_rows=[[10**400] * 48] * 2), "greeting cannot be read"),
        (_greeting(preprocessing={"crop_height": 10**9}), "greeting cannot be read"),
        (_greeting(preprocessing={"of_a_newer_version": 1}), "greeting cannot be read"),
        (_greeting(preprocessing=[]), "greeting cannot be read"),
    ],
    ids=range(16),
)
def test_remote_encoder_of_another_program_raises(path: Path, sent: bytes, match: str) -> None:
    """It says so at once, and takes nothing for a model."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(sent)
                with suppress(ConnectionResetError):  # not all of it was read
                    connection.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ModelError, match=match):
            RemoteEncoder(path)
        thread.join()


def test_remote_encoder_in_a_folder_of_all_raises(tmp_path: Path) -> None:
    """Any user could have put the socket there, would see the images, and decide where they go."""
    path = tmp_path / "shared" / "encoder.sock"
    path.parent.mkdir()
    with encoder_server(path):
        path.parent.chmod(0o1777)
        with pytest.raises(ModelError, match="any user can write"):
            RemoteEncoder(path)


@pytest.mark.parametrize(
    "rows",
    [
        HEADER.pack(MAGIC, VERSION, MessageKind.ROWS, 1, 48 * 4),
        HEADER.pack(MAGIC, VERSION, MessageKind.ROWS, 2, 48),
        HEADER.pack(MAGIC, VERSION, MessageKind.IMAGES, 2, 2 * 48 * 4),
        struct.pack("=20s", b"garbage"),
    ],
)
def test_remote_encoder_wrong_rows_raise(path: Path, tmp_path: Path, rows: bytes) -> None:
    """An answer of another size is no answer."""
    with encoder_server(tmp_path / "true.sock"):
        true = RemoteEncoder(tmp_path / "true.sock")
        greeting = GREETINGS.dump_json(true.greeting)
        true.close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(HEADER.pack(MAGIC, VERSION, MessageKind.GREETING, 0, len(greeting)) + greeting)
                connection.recv(HEADER.size + 2 * 16 * 16 * 3, socket.MSG_WAITALL)
                connection.sendall(rows)
                with suppress(ConnectionResetError):
                    connection.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        encoder = RemoteEncoder(path)
        with pytest.raises(ModelError, match="cannot be used"):
            encoder.encode_images(images(2))
        thread.join()


# ---------------------------------------------------------------- the configured backend


def test_load_fastest_connects_to_the_service(path: Path) -> None:
    """The model of the configuration need not be on this machine."""
    with encoder_server(path):
        encoder = load_fastest(config_for(path, model="/nowhere"), report=lambda _: None)
        assert isinstance(encoder, RemoteEncoder)
        assert np.array_equal(encoder.encode_images(images(3)), FakeEncoder().encode_images(images(3)))
        encoder.close()


def test_connect_compares_the_rows_of_the_probe_images(path: Path) -> None:
    """They are stored as those of an encoder in this process, and other ones are refused."""
    with encoder_server(path):
        connect(config_for(path), path).close()
    assert [*json.loads((path.parent / KNOWN_ROWS).read_text())] == ["fake-48"]
    with encoder_server(path, _Reversed()), pytest.raises(ModelError, match="gives other embeddings"):
        connect(config_for(path), path)


@pytest.mark.parametrize(
    ("keys", "match"),
    [({"mode": "text"}, "`mode: text` decides by class names"), ({"decoding": {"jpeg": "full"}}, "set both alike")],
)
def test_connect_refuses_a_configuration_that_does_not_fit(path: Path, keys: dict[str, object], match: str) -> None:
    """A mode that the model does not support, and images decoded otherwise than for its other clients."""
    with encoder_server(path, replace(FakeEncoder(), has_text=False)), pytest.raises(ConfigError, match=match):
        connect(config_for(path, **keys), path)
