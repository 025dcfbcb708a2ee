"""A command of the operator in a process group of its own, with a time limit, a message on stdin and no shell."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

STEP_SECONDS = 0.1  # between two looks at whether the process has ended, or sortd stops
MOST_ERROR_BYTES = 65_536
"""What a command may write to stderr; then the pipe is closed, which usually ends it."""
MOST_QUOTED = 200
NICENESS = 10  # of the process: moves are made first
_KILLED_SECONDS = 2.0  # for a process that was killed; one that waits for a disk may need longer

INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
)  # fmt: skip
"""The environment variables that a command gets."""


def run_limited(
    command: Sequence[str],
    message: bytes,
    *,
    seconds: float,
    environment: Mapping[str, str],
    is_stopping: Callable[[], bool] = lambda: False,
    output: IO[bytes] | None = None,
    folder: str | None = "/",
) -> str | None:
    """Run a command with ``message`` on stdin, and kill its process group in the end.

    Args:
        command: the program and its arguments.
        message: given as a file in memory, so that nobody waits for a command that does not read it.
        seconds: the time limit.
        environment: all variables of the process.
        is_stopping: asked ten times a second; true ends the command.
        output: gets its stdout, which is dropped otherwise.
        folder: its working directory; None: that of sortd.

    Returns:
        What went wrong, with the last line on stderr; None for exit code 0.
    """
    try:
        given = _memory_file(message)
    except OSError as error:
        return f"cannot be started: {error.strerror}"
    try:
        process = subprocess.Popen(  # noqa: S603 -- the operator configured it; no shell reads it
            command,
            stdin=given,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"cannot be started: {getattr(error, 'strerror', None) or error}"
    finally:
        os.close(given)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    assert process.stderr is not None
    said = bytearray()
    with process.stderr as errors:
        problem = _wait(process, errors, said, time.monotonic() + seconds, is_stopping)
        with suppress(ProcessLookupError):  # of the group, before its number is free again
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_SECONDS)
        if not errors.closed:
            _read(errors, said, 0.0)
    if problem is not None or not process.returncode:
        return problem
    ended = f"exit code {process.returncode}" if process.returncode > 0 else f"ended by signal {-process.returncode}"
    return f"{ended}{_last_line(said)}"


def _memory_file(content: bytes) -> int:
    """Return the descriptor of a file in memory, to be read from its begin."""
    descriptor = os.memfd_create("message", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _wait(
    process: subprocess.Popen[bytes],
    errors: IO[bytes],
    said: bytearray,
    until: float,
    is_stopping: Callable[[], bool],
) -> str | None:
    """Wait for the end of the process, which stays a zombie; return why it is to be killed, or None."""
    began = time.monotonic()
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        now = time.monotonic()
        if is_stopping():
            return "killed, because sortd stops"
        if now >= until:
            return f"killed, because it did not end within {until - began:.3g} s"
        wait = min(until - now, STEP_SECONDS)
        if errors.closed:
            time.sleep(wait)
        elif not _read(errors, said, wait) or len(said) >= MOST_ERROR_BYTES:
            errors.close()
    return None


def _read(errors: IO[bytes], said: bytearray, seconds: float) -> bool:
    """Add what arrives within this time; return whether more can arrive."""
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(errors, select.POLLIN)
    if not poll.poll(1e3 * seconds):
        return True
    piece = os.read(errors.fileno(), MOST_ERROR_BYTES)
    said += piece
    return bool(piece)


def _last_line(said: bytearray) -> str:
    lines = said[-MOST_ERROR_BYTES:].decode("utf-8", "replace").strip().splitlines()
    line = "".join(character if character.isprintable() else "?" for character in lines[-1].strip()) if lines else ""
    return f": {line[:MOST_QUOTED]}" if line else ""
