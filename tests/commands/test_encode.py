"""``sortd encode`` as a process: its socket, signals, systemd, and what it says."""

import grp
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sortd.commands.encode import serve_encoder
from sortd.config import read_config
from sortd.encoder.remote import RemoteEncoder
from sortd.errors import AlreadyRunningError, StartupError
from tests.command_line import logs_as_before, sortd, write_config
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess
from tests.encoder_service import encoder_server, images
from tests.fake_encoder import FakeEncoder


@pytest.fixture
def private() -> Iterator[Path]:
    """A folder of this user with a short path."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def path(private: Path) -> Path:
    """Where the socket is."""
    return private / "encoder.sock"


def encode(folder: Path, *arguments: str, **environment: str) -> DaemonProcess:
    """Start ``sortd encode`` with the encoder of the tests."""
    return DaemonProcess(write_config(folder), "encode", *arguments, environment=environment)


def answers(path: Path) -> None:
    """Check that the encoder of the tests is served."""
    client = RemoteEncoder(path)
    assert np.array_equal(client.encode_images(images(2)), FakeEncoder().encode_images(images(2)))
    client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_encode_serves_until_a_signal(private: Path, path: Path, number: signal.Signals) -> None:
    """Only this user can connect; a client that is connected does not delay the end, after which no socket is left."""
    with encode(private, "--socket", str(path)) as process:
        ready = process.wait_for("encoder.ready")
        assert (ready["listens_on"], ready["encoder_id"]) == ([str(path)], FakeEncoder().encoder_id)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        answers(path)
        client = RemoteEncoder(path)
        assert process.stop(number) == 0
        assert process.events("encoder.stopped")
        client.close()
    assert not path.exists()


def test_encode_replaces_the_socket_of_a_killed_one_and_no_other(private: Path, path: Path) -> None:
    """A second service on one socket would take the clients of the first."""
    with encode(private, "--socket", str(path)) as killed:
        killed.wait_for("encoder.ready")
        killed.send(signal.SIGKILL)
    assert path.exists()
    with encode(private, "--socket", str(path)) as process:
        process.wait_for("encoder.ready")
        answers(path)
        ran = sortd("encode", "--config", write_config(private), "--socket", path)
        assert ran.code == AlreadyRunningError.exit_code
        assert "another program listens" in ran.err
        answers(path)


def test_encode_with_the_configuration_of_a_client_listens_where_it_connects(private: Path, path: Path) -> None:
    """One file may configure both; the model is then loaded by `auto`."""
    config = write_config(private, backend=f"socket:{path}")
    with DaemonProcess(config, "encode") as process:
        process.wait_for("encoder.ready")
        answers(path)


def test_encode_without_a_socket_is_wrong_usage(private: Path) -> None:
    """It says which option, and which key."""
    ran = sortd("encode", "--config", write_config(private))
    assert ran.code == 2
    assert "--socket PATH" in ran.err


def test_encode_group_can_connect(private: Path, path: Path) -> None:
    """If it is named; an unknown one is refused, and no socket stays."""
    group = grp.getgrgid(os.getgid()).gr_name
    with encoder_server(private / "other.sock"):
        config = read_config(write_config(private), os.environ)
        with logs_as_before(), pytest.raises(StartupError, match="there is no such group"):
            serve_encoder(config, socket=path, group="no-such-group", environ={})
    assert not path.exists()
    with DaemonProcess(write_config(private), "encode", "--socket", str(path), "--group", group) as process:
        process.wait_for("encoder.ready")
        assert stat.S_IMODE(path.lstat().st_mode) == 0o660
        assert path.lstat().st_gid == os.getgid()
        answers(path)


def test_encode_notifies_systemd_and_writes_metrics(private: Path, path: Path) -> None:
    """READY when clients are answered, the watchdog while the encoder works, STOPPING at the end."""
    notified, textfile = private / "notify", private / "encoder.prom"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(notified))
        manager.settimeout(PATIENCE_SECONDS)
        variables = {"NOTIFY_SOCKET": os.fspath(notified), "WATCHDOG_USEC": "1000000"}
        arguments = ("--socket", str(path), "--metrics", str(textfile))
        with encode(private, *arguments, **variables) as process:
            said = [manager.recv(4096).decode() for _ in range(3)]
            assert said[0].startswith("READY=1\nSTATUS=listens on ")
            assert said[1:] == ["WATCHDOG=1", "WATCHDOG=1"]
            process.wait_until(textfile.exists, "the metrics")
            assert process.stop() == 0
        while said[-1] != "STOPPING=1":
            said.append(manager.recv(4096).decode())
    names = {"sortd_encoder_clients", "sortd_encoder_encoded", "sortd_encoder_refused", "sortd_encoder_forward_seconds"}
    assert names <= set(re.findall(r"^# HELP (\w+?)(?:_total)? ", textfile.read_text(), re.MULTILINE))


def test_encode_uses_the_socket_that_systemd_passes(private: Path, path: Path) -> None:
    """It was open before, keeps its permissions, and stays; a port is refused."""
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
        "sys.argv = ['sortd', 'encode', '-c', sys.argv[2]]; from tests.fast_sortd import main; main()"
    )
    config = write_config(private)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        code = _run(program, listener.fileno(), config, path)
        assert code == 0
        assert path.exists()
    with socket.create_server(("127.0.0.1", 0)) as port:
        assert _run(program, port.fileno(), config, None) == StartupError.exit_code


def _run(program: str, descriptor: int, config: Path, path: Path | None) -> int:
    """Start a program with a descriptor; ask it at a path and stop it, or wait for its end; return the exit code."""
    command = [sys.executable, "-c", program, str(descriptor), str(config)]
    with subprocess.Popen(command, pass_fds=[descriptor], cwd=Path(__file__).parents[2]) as process:
        if path is not None:
            answers(path)
            process.terminate()
        return process.wait(PATIENCE_SECONDS)
