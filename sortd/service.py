"""A run as a service: signals as messages, notifications to systemd, the status file, its process, its sockets.

See sd_notify(3) and sd_listen_fds(3).
"""

import errno
import fcntl
import grp
import ipaddress
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from sortd.config import Config
from sortd.errors import AlreadyRunningError, StartupError
from sortd.files import open_folder, read_regular, write_json

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

    def ready(self, status: str = "") -> None:
        """Notify that the start, or a reload, is complete."""
        self._send("READY=1", status and f"STATUS={status}")

    def status(self, text: str) -> None:
        """Set the status line of ``systemctl status``."""
        self._send(f"STATUS={text}")

    def reloading(self, *, clock: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC)) -> None:
        """Notify that a reload begins, which ``ready`` ends; Type=notify-reload requires the time, in nanoseconds."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={clock() // 1_000}")

    def extend(self, seconds: float) -> None:
        """Extend the start timeout to this many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        """Reset the watchdog timer."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Notify that the process is stopping."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        """Send one datagram; if it is not accepted, systemd's timeouts apply."""
        if not self._address:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines if line)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(1.0)
            with suppress(OSError):
                sender.sendto(message.encode("utf-8", "backslashreplace"), self._address)


STATUS_FILE = "status.json"


class Status:
    """The status file in the state directory; the loop writes it when a fact has changed."""

    def __init__(self, state: Path) -> None:
        """Write into ``state``, which the first write creates."""
        self._path = state / STATUS_FILE
        self._last: Mapping[str, Any] | None = None

    def write(self, facts: Mapping[str, Any]) -> bool:
        """Write the facts if they differ from the last ones; return whether they did. Raises OSError."""
        if facts == self._last:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {**facts, "written_at": round(time.time(), 3)}, indent=1, durable=False)
        self._last = dict(facts)
        return True


def read_status(state: Path) -> dict[str, Any] | None:
    """Return the facts of the last run, with ``alive`` for its process; None if sortd never ran.

    Raises:
        StartupError: the file cannot be read, or is no regular file.
    """
    file = state / STATUS_FILE
    try:
        facts = json.loads(read_regular(file))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        is_denied = isinstance(error, PermissionError)
        advice = "run the command as the user that runs sortd, or as root" if is_denied else "remove it"
        raise StartupError(f"{file} cannot be read: {error.strerror}; {advice}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("pid", 0), int):
        return None
    facts["alive"] = bool(facts.get("running")) and is_alive(facts.get("pid", 0), facts.get("started_ticks"))
    return facts


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def is_of_its_writer(state: Path, pid: int) -> bool:
    """Tell whether the owner of the status file is root or the user of the process.

    Otherwise a user who may write that file could make root signal another user's process.
    """
    try:
        writer = os.lstat(state / STATUS_FILE).st_uid
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    users = next((line.split()[1:] for line in lines if line.startswith("Uid:")), [])
    return writer == 0 or str(writer) in users


def is_alive(pid: int, ticks: int | None) -> bool:
    """Tell whether a process runs and started at ``ticks``, since process numbers are reused."""
    return pid > 0 and ticks is not None and started_ticks(pid) == ticks


def lock_holder(lock: Path) -> int | None:
    """Return the process that holds a lock file, by /proc/locks (see proc(5)); None if there is none.

    The lock is not tried: to hold it for a moment could make a sortd that starts just then fail.
    """
    try:
        inode = lock.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    held = re.findall(rf"WRITE\s+(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", locks)
    return next((int(pid) for pid in held if _has_open(pid, lock)), None)


def _has_open(pid: str, path: Path) -> bool:
    """Tell whether a process has a file open; True for another user's process, since equal inodes are rare."""
    folder, real = f"/proc/{pid}/fd", os.path.realpath(path)
    try:
        return any(os.path.realpath(f"{folder}/{name}") == real for name in os.listdir(folder))
    except OSError as refusal:
        return isinstance(refusal, PermissionError)


def require_to_be_alone(config: Config) -> None:
    """Raise ``AlreadyRunningError`` if another sortd uses this state directory for this root."""
    try:
        status = read_status(config.state_dir)
    except (StartupError, OSError):
        return  # the lock of each dataset still protects it
    if (
        status is not None
        and status["alive"]
        and status["pid"] != os.getpid()
        and status.get("root") == str(config.root)
    ):
        raise AlreadyRunningError(f"another sortd works on {config.root} (pid {status['pid']}); stop it first")


# ---------------------------------------------------------------- sockets

FIRST_PASSED: Final = 3  # SD_LISTEN_FDS_START
WAITING_CONNECTIONS: Final = 64
LOCK_SECONDS: Final = 3.0
"""For the lock of a socket's folder, which another sortd has for a second at most."""
LOCAL_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def passed_sockets(
    environ: MutableMapping[str, str], *, families: Collection[int] = LOCAL_FAMILIES, first: int = FIRST_PASSED
) -> list[socket.socket]:
    """Return the sockets that systemd passed to this process, and remove its variables, as sd_listen_fds(3) does.

    Raises:
        StartupError: one of them is no listening stream socket of these families, is not of loopback, or has no
            permissions.
    """
    process, number = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not number.isdigit():
        return []
    sockets: list[socket.socket] = []
    try:
        for descriptor in range(first, first + int(number)):
            os.set_inheritable(descriptor, False)
            sockets.append(socket.socket(fileno=descriptor))
            _check_passed(sockets[-1], families)
    except (OSError, StartupError) as error:
        for one in sockets:
            one.close()
        if isinstance(error, StartupError):
            raise
        raise StartupError(f"descriptor {descriptor} of systemd is no socket: {error.strerror}") from error
    return sockets


def _check_passed(one: socket.socket, families: Collection[int]) -> None:
    """Raise StartupError unless a socket listens for streams, on loopback or at a path, which has permissions."""
    name = one.getsockname()
    if one.family in {socket.AF_INET, socket.AF_INET6}:
        is_local = ipaddress.ip_address(name[0]).is_loopback
    else:
        is_local = one.family == socket.AF_UNIX and isinstance(name, str) and name.startswith("/")
    is_stream = one.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not (one.family in families and is_local and is_stream and is_listening):
        places = "the path of a Unix socket"
        if socket.AF_INET in families:
            places = f"127.0.0.1, [::1], or {places}"
        raise StartupError(
            f"the socket unit passes {socket_place(one)!r}; this service listens only on {places}: correct "
            "ListenStream="
        )


@contextmanager
def unix_socket(path: Path, *, group: str | None = None, setting: str = "--socket") -> Iterator[socket.socket]:
    """Yield a socket to which only this user can connect, or also the members of a group; remove it at the end.

    ``setting`` is what names the path, for messages.

    Raises:
        StartupError: there can be no such socket, or another program listens on it.
    """
    _check_folder(path.parent, setting)
    try:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            with _locked(path.parent):  # a socket that does not listen yet would seem unused to another process
                _remove_unused(path, setting)
                os.fchmod(listener.fileno(), 0o600)  # bind uses it; the umask would be that of all threads
                listener.bind(os.fspath(path))
                own = os.lstat(path).st_ino
                if group is not None:
                    _give_to_group(path, group)
                listener.listen(WAITING_CONNECTIONS)
            opened = stack.pop_all()
    except OSError as error:  # Python's own, for a long path, has no number
        why = error.strerror or str(error)
        raise StartupError(f"{path} cannot be a socket: {why}; name another path with {setting}") from error
    with opened:
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.lstat(path).st_ino == own:
                    path.unlink()


def _check_folder(folder: Path, setting: str) -> None:
    """Raise StartupError unless a folder is this user's and nobody else can put a socket there."""
    try:
        found = os.stat(folder)
    except OSError as error:
        raise StartupError(f"{folder} cannot be used: {error.strerror}; name another path with {setting}") from error
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise StartupError(
            f"{folder} belongs to another user, or others can write to it; name a path in a folder of your own with "
            f"{setting}, for example in $XDG_RUNTIME_DIR"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which any user who can read it can lock, too. Raises OSError."""
    until = time.monotonic() + LOCK_SECONDS
    with open_folder(folder, follow=True) as descriptor:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise OSError(errno.EAGAIN, f"another program has locked {folder}") from None
                time.sleep(0.05)
        yield


def _remove_unused(path: Path, setting: str) -> None:
    """Remove a socket of this user that nobody listens on. Raises StartupError for anything else of that name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise StartupError(f"{path} exists and is no socket of this user; name another path with {setting}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass
    raise AlreadyRunningError(f"another program listens on {path}; stop it, or name another path with {setting}")


def _give_to_group(path: Path, group: str) -> None:
    """Let the members of a group connect to a socket, before it listens."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid, follow_symlinks=False)
        path.chmod(0o660)
    except (KeyError, OSError) as error:
        path.unlink()
        why = "there is no such group" if isinstance(error, KeyError) else error.strerror
        raise StartupError(f"{path} cannot be given to the group {group}: {why}; name a group of this user") from error


def socket_place(one: socket.socket) -> str:
    """Return the address of a socket."""
    name = one.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else os.fsdecode(name)
