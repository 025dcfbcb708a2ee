"""The notifications to systemd, and their absence without a socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortd.service import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens as the manager does, and its address as NOTIFY_SOCKET gives it."""
    address = os.fspath(tmp_path / "notify") if request.param == "path" else f"@sortd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address.replace("@", "\0", 1))
        listener.settimeout(5.0)
        yield listener, address


def test_notifier_messages_follow_sd_notify(manager: tuple[socket.socket, str]) -> None:
    """Each message is one datagram, to a path or to an abstract address."""
    listener, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("3 datasets")
    notifier.status("two\nlines")
    notifier.reloading(clock=lambda: 1_234_567_890)
    notifier.watchdog()
    notifier.extend(90)
    notifier.stopping()
    assert [listener.recv(1000).decode() for _ in range(6)] == [
        "READY=1\nSTATUS=3 datasets",
        "STATUS=two lines",
        "RELOADING=1\nMONOTONIC_USEC=1234567",
        "WATCHDOG=1",
        "EXTEND_TIMEOUT_USEC=90000000",
        "STOPPING=1",
    ]


def test_notifier_name_that_is_not_utf8_is_sent(manager: tuple[socket.socket, str]) -> None:
    """A status may contain the name of a dataset, which can be any bytes."""
    listener, address = manager
    Notifier({"NOTIFY_SOCKET": address}).status("caf\udce9")
    assert listener.recv(1000) == rb"STATUS=caf\udce9"


def test_notifier_without_service_manager_does_nothing(tmp_path: Path) -> None:
    """In a terminal there is no address; where nobody listens, the daemon continues."""
    for environment in ({}, {"NOTIFY_SOCKET": os.fspath(tmp_path / "gone")}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.watchdog()
        assert notifier.watchdog_seconds == 0.0


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "77"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "78"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_notifier_watchdog_of_another_process_is_off(environment: dict[str, str], seconds: float) -> None:
    """A child must not reset the watchdog of its parent, which WATCHDOG_PID names."""
    assert Notifier({"NOTIFY_SOCKET": "/run/n", **environment}, process=77).watchdog_seconds == seconds
