"""A process that has imported sortd and forks itself for each process that a test starts: a start costs a tenth.

Run as ``python -m tests.launcher FD`` with a Unix socket as descriptor FD. Each message on it is a JSON list of the
module, its arguments and its environment, with four descriptors: standard input, output and error, and a pipe into
which the exit status, as waitpid(2) returns it, is written in decimal when the process has ended.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PRELOADED = {
    "tests.fast_sortd": ["sortd.daemon.daemon"],
    "tests.broken_sortd": ["sortd.daemon.daemon"],
    "tests.review.served": [],
    "sortd.cli": ["sortd.review.app", "sortd.review.server"],
}
"""The modules that can be started by their ``main``, and what these import when they run.

All is imported before the first fork, once, not in each child, where it takes most of the start.
"""
MESSAGE_BYTES = 1 << 20


class LaunchedProcess:
    """A forked process, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, pid: int, status: int, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        """Take over the descriptor that tells the exit status, and the streams that are pipes."""
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._returncode_within(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raise ``subprocess.TimeoutExpired`` after so many seconds."""
        code = self._returncode_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(["launched"], timeout or 0)
        return code

    def _returncode_within(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            told = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(int(told))
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if the process still runs."""
        self.send_signal(signal.SIGKILL)


class Launcher:
    """The launching process as a test sees it; it ends when this process does."""

    def __init__(self) -> None:
        """Start it."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.launcher", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._one_at_a_time = threading.Lock()

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None = None
    ) -> LaunchedProcess:
        """Fork a process that does what ``python -m MODULE ARGUMENTS`` does; its output goes to a file, or to pipes."""
        status, their_status = os.pipe()
        pipes = [] if output is not None else [os.pipe() for _ in range(2)]
        nothing = os.open(os.devnull, os.O_RDONLY)
        ends = [write for _, write in pipes]
        message = json.dumps([module, list(arguments), dict(environment)]).encode()
        with self._one_at_a_time:
            streams = ends if output is None else 2 * [output.fileno()]
            socket.send_fds(self._socket, [message], [nothing, *streams, their_status])
            pid = int(self._socket.recv(16))
        for descriptor in (nothing, *ends, their_status):
            os.close(descriptor)
        ours: list[IO[str] | None] = [open(read, errors="surrogateescape") for read, _ in pipes]  # noqa: SIM115
        return LaunchedProcess(pid, status, *(ours or [None, None]))

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait()


def serve(requests: socket.socket) -> str | None:
    """Fork for each request, and tell how each child ended; return the module to run in a child, None at the end."""
    running: dict[int, tuple[int, int]] = {}
    while True:
        ready = set(select.select([requests.fileno(), *running], [], [])[0])
        for pidfd in ready & running.keys():
            pid, status = running.pop(pidfd)
            os.write(status, str(os.waitpid(pid, 0)[1]).encode())
            os.close(status)
            os.close(pidfd)
        if requests.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
        if not message:
            return None
        module, arguments, environment = json.loads(message)
        for name in {module, *PRELOADED[module]} - sys.modules.keys():
            importlib.import_module(name)
        gc.freeze()  # a child that collects garbage would copy the pages of all that was imported
        pid = os.fork()
        if pid == 0:
            _become(requests, running, descriptors, [module, *arguments], environment)
            return str(module)
        requests.send(str(pid).encode())
        running[os.pidfd_open(pid)] = (pid, descriptors[3])
        for descriptor in descriptors[:3]:
            os.close(descriptor)


def _become(
    requests: socket.socket,
    running: Mapping[int, tuple[int, int]],
    descriptors: Sequence[int],
    arguments: list[str],
    environment: Mapping[str, str],
) -> None:
    requests.close()
    for pidfd, (_, status) in running.items():
        os.close(pidfd)
        os.close(status)
    for target, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.argv = arguments


if __name__ == "__main__":
    module_name = serve(socket.socket(fileno=int(sys.argv[1])))
    if module_name is not None:
        importlib.import_module(module_name).main()
