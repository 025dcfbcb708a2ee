"""The interface to the service manager: signals as messages, and notifications to NOTIFY_SOCKET, see sd_notify(3)."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP = frozenset({signal.SIGTERM, signal.SIGINT})  # request an orderly stop; a second one has the default effect
HANDLED = (*STOP, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal arrived."""

    number: int


@contextmanager
def signals_posted(post: Callable[[Signalled], None]) -> Iterator[None]:
    """Post every signal of ``HANDLED`` from the main thread, and restore the handlers at the end.

    ``post`` runs between two instructions of the main thread, so it must be reentrant: ``queue.SimpleQueue.put`` is.
    """
    before = {number: signal.getsignal(number) for number in HANDLED}

    def handle(number: int, _frame: FrameType | None) -> None:
        if number in STOP:
            signal.signal(number, before[signal.Signals(number)])
        post(Signalled(number))

    for number in HANDLED:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Notifier:
    """Sends notifications to the service manager that started this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ, *, process: int | None = None) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; without NOTIFY_SOCKET nothing is sent."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @: an abstract socket
        is_meant = environ.get("WATCHDOG_PID", str(process or os.getpid())) == str(process or os.getpid())
        microseconds = environ.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(microseconds) / 1e6 if address and is_meant and microseconds.isdigit() else 0.0
        """``watchdog`` must be called more often than this; 0.0: never."""

    def ready(self, status: str = "") -> bool:
        """Notify that the start, or a reload, is complete."""
        return self._send("READY=1", status and f"STATUS={status}")

    def status(self, text: str) -> bool:
        """Set the status line of ``systemctl status``."""
        return self._send(f"STATUS={text}")

    def reloading(self, *, clock: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC)) -> bool:
        """Notify that a reload begins, which ``ready`` ends; Type=notify-reload requires the time, in nanoseconds."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={clock() // 1_000}")

    def extend(self, seconds: float) -> bool:
        """Extend the start timeout to this many seconds from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> bool:
        """Reset the watchdog timer."""
        return self._send("WATCHDOG=1")

    def stopping(self) -> bool:
        """Notify that the process is stopping."""
        return self._send("STOPPING=1")

    def _send(self, *lines: str) -> bool:
        """Send one datagram and return whether it was accepted; if not, systemd's timeouts apply."""
        if not self._address:
            return False
        message = "\n".join(line.replace("\n", " ") for line in lines if line)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(1.0)
            try:
                sender.sendto(message.encode("utf-8", "backslashreplace"), self._address)
            except OSError:
                return False
        return True
