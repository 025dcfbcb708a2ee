"""Requests: how ``undo``, ``release`` and ``rebuild`` reach the process that moves files, and its answers.

A request is a file in the state directory and a SIGUSR1 to wake the daemon; the answer is a file beside it. The
directory belongs to the daemon's user and nobody else may write there: whoever can ask could as well move the files.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sortd.errors import StartupError
from sortd.status import read_status

FOLDER = "requests"
ANSWER_SECONDS = 30.0
"""How long an asker waits: an undo of many files takes a while."""


class Requests:
    """The daemon's side: takes requests in the order in which they came."""

    def __init__(self, state: Path) -> None:
        """Serve the requests below ``state``."""
        self._folder = state / FOLDER

    def open(self) -> None:
        """Make the folder, for the daemon's user alone.

        Raises:
            OSError: it cannot be made.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def serve(self, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> int:
        """Answer every request that waits; return how many did."""
        waiting = sorted(self._folder.glob("*.request"), key=lambda path: path.stat().st_mtime_ns)
        for path in waiting:
            try:
                request = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
                reply = answer(request)
            except (ValueError, KeyError, TypeError) as error:
                reply = {"error": f"{path.name} is no request: {error}"}
            write_json(path.with_suffix(".answer"), reply)
            path.unlink()
        return len(waiting)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader never sees half; names that are not UTF-8 survive as escapes."""
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(beside, path)


def ask(state: Path, request: Mapping[str, Any], *, seconds: float = ANSWER_SECONDS) -> dict[str, Any] | None:
    """Ask the running daemon and return its answer; None where none runs.

    Raises:
        StartupError: it runs, but does not answer or may not be asked.
    """
    status = read_status(state)
    if status is None or not status["alive"]:
        return None
    path = state / FOLDER / f"{uuid.uuid4().hex}.request"
    try:
        write_json(path, request)
        os.kill(status["pid"], signal.SIGUSR1)
    except PermissionError as error:
        raise StartupError(f"sortd runs as another user ({error}); ask it as that user or as root") from error
    answer = path.with_suffix(".answer")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer.exists():
            reply: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            answer.unlink()
            return reply
        time.sleep(0.02)
    path.unlink(missing_ok=True)
    raise StartupError(f"sortd (pid {status['pid']}) did not answer within {seconds:.0f} s; see its log")
