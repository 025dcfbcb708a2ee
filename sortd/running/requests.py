"""Requests: how ``undo``, ``release`` and ``rebuild`` reach the process that moves files, and its answers.

A request is a file in the state directory and a SIGUSR1 to wake the daemon; the answer is a file beside it. The
directory belongs to the daemon's user and nobody else may write there: whoever can ask could as well move the files.
Paths are as ``os.fsdecode`` gives them; bytes that are not UTF-8 travel as escapes of lone surrogates.

    {"do": "undo", "datasets": {name: {"root": path, "records": [id of the journal]}}, "dry_run": bool}
        -> {"undone": [{"dataset", "id", "was", "restored", "message"}], "later": number}
    {"do": "release", "datasets": [name] or null: all, "path": absolute path of a file or a dataset, or null: every one}
        -> {"released": {name: number of held files}, "lifted": {name: why the guard held it}, "still_held": the same};
           the last two only where there are any
    {"do": "rebuild", "datasets": [name] or null: all, "force": bool}
        -> {"rebuilding": [name]}
    anything else, or what cannot be done
        -> {"error": sentence, "exit_code": as in sysexits(3)}

``was`` is where the image stood, ``restored`` where it stands now (null: it was not put back, ``message`` says why);
``later`` counts those that are being copied back from another file system and end after the answer.
Every request carries ``expires_at``, seconds since the epoch: nobody waits for an answer after that, so that a daemon
which was stopped in between does not begin to undo what nobody asks for any more.
"""

import json
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from sortd.errors import LayoutError, SortdError, StartupError, StoppedError
from sortd.status import read_status

FOLDER = "requests"
ANSWER_SECONDS = 30.0
"""How long an asker waits, unless it knows that it asks for much."""

FORGOTTEN_SECONDS = 600.0
"""An answer that nobody took for so long is removed: whoever asked was interrupted."""

Request = Mapping[str, Any]
Reply = Mapping[str, Any]
Answering = Callable[[Request], Reply | Generator[None, None, Reply]]
"""Answers a request at once, or returns the steps to an answer that takes long."""


_STOPPED: Reply = {
    "error": "sortd stops before all of it is done; nothing is half done: ask again",
    "exit_code": StoppedError.exit_code,
}


class RequestError(ValueError):
    """A request that makes no sense."""


class NotRunningError(StartupError):
    """No sortd runs that could be asked."""

    exit_code = 75


class Requests:
    """The daemon's side: takes requests in the order in which they came."""

    def __init__(
        self, state: Path, *, report: Callable[[OSError], None], clock: Callable[[], float] = time.time
    ) -> None:
        """Serve the requests below ``state``.

        Args:
            state: the state directory.
            report: told what answer could not be written: what was asked for is done all the same.
            clock: seconds since the epoch.
        """
        self._folder, self._report, self._clock = state / FOLDER, report, clock
        self._waiting: deque[Path] = deque()
        self._at_hand: Path | None = None
        self._steps: Generator[None, None, None] | None = None

    def open(self) -> None:
        """Make the folder, for the daemon's user alone, and forget what was asked of an earlier run.

        Raises:
            LayoutError: it cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise LayoutError(
                f"{self._folder} cannot be used: {error.strerror}; mend its rights, or set state_dir"
            ) from error

    def serve(self, answer: Answering) -> int:
        """Answer every request that waits; return how many did."""
        self.take_in()
        waiting = len(self._waiting)
        while self.is_under_way:
            self.advance(answer)
        return waiting

    def take_in(self) -> None:
        """Note which requests have come, for ``advance``; remove answers that nobody took."""
        known = {self._at_hand, *self._waiting}
        self._waiting += [path for path in sorted(self._folder.glob("*.request"), key=_age) if path not in known]
        for forgotten in self._folder.glob("*.answer"):
            if _age(forgotten) < 1e9 * (self._clock() - FORGOTTEN_SECONDS):
                self._remove(forgotten)

    @property
    def is_under_way(self) -> bool:
        """Tell whether a request is not answered yet."""
        return self._steps is not None or bool(self._waiting)

    def advance(self, answer: Answering) -> None:
        """Do the next step of the request at hand, or the first of the next one; the last step answers it."""
        if self._steps is None:
            if not self._waiting:
                return
            self._at_hand = self._waiting.popleft()
            self._steps = self._serve(self._at_hand, answer)
        try:
            next(self._steps)
        except StopIteration:
            self._steps = self._at_hand = None
        except BaseException:
            self._steps = self._at_hand = None
            raise

    def close(self) -> None:
        """Tell whoever waits that what they asked for is not done, or not to its end."""
        if self._steps is not None:
            self._steps.close()
        self._steps = self._at_hand = None
        while self._waiting:
            self._answer(self._waiting.popleft(), _STOPPED)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._report(error)  # a disk that is read-only now: nobody asks the same twice, see ``expires_at``

    def _serve(self, path: Path, answer: Answering) -> Generator[None, None, None]:
        try:
            request = json.loads(path.read_text(encoding="utf-8"))
            if float(request["expires_at"]) < self._clock():
                self._remove(path)
                return
            answered = answer(request)
            reply = (yield from answered) if isinstance(answered, Generator) else answered
        except FileNotFoundError:
            return  # whoever asked has given up
        except GeneratorExit:
            self._answer(path, _STOPPED)
            raise
        except SortdError as error:
            reply = _refusal(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reply = {"error": f"{path.name} is no request: {error}", "exit_code": 65}
        self._answer(path, reply)

    def _answer(self, path: Path, reply: Reply) -> None:
        self._remove(path)
        try:
            write_json(path.with_suffix(".answer"), reply)
        except OSError as error:
            self._report(error)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader never sees half."""
    beside = path.with_suffix(path.suffix + ".new")
    text = json.dumps(facts, ensure_ascii=False)
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate is escaped
    os.replace(beside, path)


def ask(state: Path, request: Request, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any] | None:
    """Ask the running daemon and return its answer; None where none runs.

    Raises:
        StartupError: it runs, but does not answer or may not be asked.
        AnsweredError: it answered that it cannot do that.
    """
    status = read_status(state)
    if status is None or not status["alive"]:
        return None
    path = state / FOLDER / f"{uuid.uuid4().hex}.request"
    try:
        write_json(path, {**request, "expires_at": time.time() + seconds})
        os.kill(status["pid"], signal.SIGUSR1)
        reply = _await(path.with_suffix(".answer"), status, seconds)
    except ProcessLookupError:
        return None  # it ended just now
    except PermissionError as error:
        raise StartupError(f"sortd runs as another user ({error}); ask it as that user or as root") from error
    except OSError as error:
        raise StartupError(f"sortd (pid {status['pid']}) cannot be asked: {error}; see its log") from error
    finally:
        path.unlink(missing_ok=True)
    if "error" in reply:
        raise AnsweredError(str(reply["error"]), int(reply.get("exit_code", 70)))
    return reply


class AnsweredError(SortdError):
    """The daemon said no, and why."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep what the daemon would have exited with."""
        super().__init__(message)
        self.exit_code = exit_code


def _await(answer: Path, status: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer.exists():
            reply: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            answer.unlink()
            return reply
        time.sleep(0.02)
    raise StartupError(f"sortd (pid {status['pid']}) did not answer within {seconds:.0f} s; see its log")


def _refusal(error: SortdError) -> Reply:
    return {"error": str(error), "exit_code": error.exit_code}


def _age(path: Path) -> int:
    """Return when a file was written, in nanoseconds since the epoch; 0 for one that is gone by now."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
