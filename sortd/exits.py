"""The end of a command: standard streams, and errors that become a message and an exit code (sysexits(3))."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from sortd import errors
from sortd.commands.console import JSON_VERSION, json_command, printable
from sortd.errors import SortdError
from sortd.files import readable_json

REFUSED = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ENXIO,
})  # fmt: skip
"""Errors of disks, permissions and limits: they are reported without a traceback, since they are no defect of sortd."""

REFUSED_CODE = 74
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit on an error of the block, after a message on stderr, or a log line if stderr is JSON."""
    try:
        yield
    except SortdError as error:
        report_error(str(error), error.exit_code)
        leave(error.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        leave(0)
    except OSError as error:
        if error.errno not in REFUSED:
            report_error(repr(error), 1, error)
            raise
        silence(sys.stdout)
        report_error(refusal(error), REFUSED_CODE)
        leave(REFUSED_CODE)
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except Exception as error:
        report_error(repr(error), 1, error)
        raise


def report_error(message: str, exit_code: int, defect: Exception | None = None) -> None:
    """Write the error that ends sortd to stderr: in the format of the log, or as a line of JSON with ``--json``.

    With an unexpected error, ``defect``, exit if that is JSON; else return, and Python prints the traceback.
    """
    logs: Any = sys.modules.get("sortd.logs")  # imported only by commands that write a log
    command = json_command()
    if command is not None and defect is None:
        error = {"command": command, "schema": JSON_VERSION, "error": message, "exit_code": exit_code}
        print(readable_json(error, encoding=sys.stderr.encoding), file=sys.stderr)
    elif logs is not None and logs.is_json():
        logs.say_failed(message, exit_code, defect)
        if defect is not None:
            leave(exit_code)
    elif defect is None:
        print(f"sortd: {message}", file=sys.stderr)


def open_missing_streams() -> None:
    """Open /dev/null for each closed standard stream: the next opened file would get its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(STANDARD_OUTPUT, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end
    sys.stderr = sys.stderr or open(STANDARD_ERROR, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end


def silence(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to /dev/null, so that its last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refusal(error: OSError) -> str:
    """Return a message with the path, the error, and what to do."""
    if error.filename is None:
        return f"the output cannot be written: {error.strerror}; check that there is space for it"
    advice = errors.advice_for_write(error) or "check its disk and the space on it"
    if isinstance(error, PermissionError):
        advice = "correct its permissions, or run the command as the user that runs sortd"
    return f"{printable(os.fsdecode(error.filename))}: {error.strerror}; {advice}"


def leave(code: int) -> None:
    """Exit; with torch loaded, without its teardown, which can take longer than a stop timeout."""
    if "torch" not in sys.modules:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
