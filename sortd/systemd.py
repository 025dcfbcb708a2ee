"""The service manager: signals as messages, and what systemd is told over NOTIFY_SOCKET, see sd_notify(3)."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP = frozenset({signal.SIGTERM, signal.SIGINT})  # ask for an orderly end; the second one acts as in any program
HEARD = (*STOP, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal arrived."""

    number: int


@contextmanager
def signals_posted(post: Callable[[Signalled], None]) -> Iterator[None]:
    """Post every signal heard, from the main thread, and put the handlers back at the end.

    ``post`` runs between two instructions of the main thread, so it must be reentrant: ``queue.SimpleQueue.put`` is.
    """
    before = {number: signal.getsignal(number) for number in HEARD}

    def handle(number: int, _frame: FrameType | None) -> None:
        if number in STOP:
            signal.signal(number, before[signal.Signals(number)])
        post(Signalled(number))

    for number in HEARD:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Notifier:
    """Speaks to the service manager that started this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ, *, process: int | None = None) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; without the first nothing is ever sent."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @ stands for an abstract socket
        is_meant = environ.get("WATCHDOG_PID", str(process or os.getpid())) == str(process or os.getpid())
        microseconds = environ.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(microseconds) / 1e6 if address and is_meant and microseconds.isdigit() else 0.0
        """``watchdog`` has to be called more often than every so many seconds; 0.0: never."""

    def ready(self, status: str = "") -> bool:
        """Tell that the start, or a reload, is complete."""
        return self._send("READY=1", status and f"STATUS={status}")

    def status(self, text: str) -> bool:
        """Tell in one line what goes on; ``systemctl status`` shows it."""
        return self._send(f"STATUS={text}")

    def reloading(self, *, clock: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC)) -> bool:
        """Tell that a reload begins; ``ready`` ends it. The time in nanoseconds is what Type=notify-reload asks for."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={clock() // 1_000}")

    def extend(self, seconds: float) -> bool:
        """Ask for so much more time to start in: sd_notify(3), which counts it from now and never shortens by it."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> bool:
        """Tell that work goes on."""
        return self._send("WATCHDOG=1")

    def stopping(self) -> bool:
        """Tell that the end has begun."""
        return self._send("STOPPING=1")

    def _send(self, *lines: str) -> bool:
        """Send one datagram; tell whether it was taken. Where not, systemd's own time-outs act: nothing is hidden."""
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
