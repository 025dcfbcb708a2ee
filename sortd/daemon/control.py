"""Control: how ``undo``, ``release`` and ``rebuild`` reach the process that moves files, and what it does and answers.

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
``later`` counts those that are being copied back from another file system and end after the answer. Every request
carries ``expires_at``, seconds since the epoch: after that nobody waits for an answer, and it is not done any more.
"""

import json
import os
import signal
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from sortd import errors
from sortd.daemon.dataset import Dataset
from sortd.daemon.datasets import Datasets
from sortd.events import ImageGone, ImageHeld, Released
from sortd.files import open_folder, read_regular, write_atomic
from sortd.layout import Area, Layout
from sortd.logs import MOVE_UNDONE
from sortd.moving.mover import Mover
from sortd.moving.plan import belongs_to
from sortd.moving.undo import UndoResult
from sortd.status import is_of_its_writer, read_status
from sortd.store.history import History

FOLDER = "requests"
ANSWER_SECONDS = 30.0  # that an asker waits, unless it knows that it asks for much
FORGOTTEN_SECONDS = 600.0  # after which an answer that nobody took is removed
MOST_LISTED = 10_000  # requests that are remembered of one look at the folder
MOST_BYTES = 8 << 20  # of a request to undo a million moves
MOST_TOLD = 200  # characters of what is wrong with a request that are told

_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file that is no request raises; numbers, nesting and types are whatever somebody wrote."""

Request = Mapping[str, Any]
Reply = Mapping[str, Any]
Steps = Generator[None, None, Reply]
"""An answer that takes long: does a step each time it is asked for the next one, and returns the reply in the end."""

Answering = Callable[[Request], Reply | Steps]
"""Answers a request at once, or returns the steps to an answer that takes long."""

_STOPPED: Reply = {
    "error": "sortd stops before all of it is done; nothing is half done: ask again",
    "exit_code": errors.StoppedError.exit_code,
}


class RequestError(ValueError):
    """A request that makes no sense."""


class NotRunningError(errors.StartupError):
    """No sortd runs that could be asked."""

    exit_code = 75


class Requests:
    """The daemon's side: takes requests in the order in which they came, one step of one of them a turn.

    A file that is no request is answered with what is wrong; what cannot be removed is told once and left alone.
    """

    def __init__(
        self, state: Path, *, report: Callable[[OSError], None], clock: Callable[[], float] = time.time
    ) -> None:
        """Serve the requests in the folder of ``state``.

        ``report`` is told what could not be read, written or removed; ``clock`` tells seconds since the epoch.
        """
        self._path, self._report, self._clock = state / FOLDER, report, clock
        self._left: set[str] = set()  # names that could not be removed
        self._names: deque[str] = deque()  # found, and not answered yet
        self._steps: Generator[None, None, None] | None = None
        self._is_woken = False

    def open(self) -> None:
        """Make the folder, for the daemon's user alone, and forget what was asked of an earlier run.

        Raises:
            LayoutError: it cannot be made.
        """
        try:
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open_folder(self._path) as folder:
                if stat.S_IMODE(os.fstat(folder).st_mode) & 0o077:
                    os.fchmod(folder, 0o700)
                for name in os.listdir(folder):
                    self._remove(name, folder)
        except OSError as error:
            raise errors.LayoutError(
                f"{self._path} cannot be used: {error.strerror}; mend its rights, or set state_dir"
            ) from error

    def wake(self) -> None:
        """Note that somebody asked: ``advance`` is due."""
        self._is_woken = True

    @property
    def is_due(self) -> bool:
        """Tell whether a request is not answered yet, or requests may wait."""
        return self._is_woken or self._steps is not None or bool(self._names)

    def advance(self, answer: Answering) -> None:
        """Do the next step of the request at hand, or the first of the next one; the last step answers it."""
        try:
            if self._steps is None and not self._names and self._is_woken:
                with open_folder(self._path) as folder:
                    self._look(folder)
        except OSError as error:
            self._is_woken = False
            self._report(error)
        if self._steps is None and self._names:
            self._steps = self._serve(self._names.popleft(), answer)
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
            except BaseException:
                self._steps = None
                raise

    def close(self) -> None:
        """Tell whoever waits that what they asked for is not done, or not to its end."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        with suppress(OSError), open_folder(self._path) as folder:
            self._look(folder)
        while self._names:
            self._answer(self._names.popleft(), _STOPPED)

    def _look(self, folder: int) -> None:
        """Find the requests that wait, the oldest first; answers that nobody took are removed."""
        found: list[tuple[int, str]] = []
        forgotten = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in self._left:
                    continue
                if entry.name.endswith(".request"):
                    if len(found) < MOST_LISTED:
                        found.append((_age(entry), entry.name))
                elif _age(entry) < 1e9 * (self._clock() - FORGOTTEN_SECONDS):
                    forgotten.append(entry.name)
        for name in forgotten:
            self._remove(name, folder)
        known = set(self._names)
        self._names.extend(name for _, name in sorted(found) if name not in known)
        self._is_woken = len(found) == MOST_LISTED

    def _remove(self, name: str, folder: int) -> None:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError as error:
            self._left.add(name)  # a folder, or a disk that is read-only now: nobody is answered twice
            error.filename = os.fspath(self._path / name)
            self._report(error)

    def _serve(self, name: str, answer: Answering) -> Generator[None, None, None]:
        try:
            with open_folder(self._path) as folder:
                request = _read(self._path / name, folder)
                if float(request["expires_at"]) < self._clock():
                    self._remove(name, folder)
                    return
            answered = answer(request)
            reply = (yield from answered) if isinstance(answered, Generator) else answered
        except FileNotFoundError:
            return  # whoever asked has given up
        except GeneratorExit:
            self._answer(name, _STOPPED)
            raise
        except errors.SortdError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        except _NONSENSE as error:
            reply = {"error": f"{name} is no request: {str(error)[:MOST_TOLD]}", "exit_code": 65}
        except OSError as error:
            self._report(error)
            reply = {"error": f"{error.filename or name}: {error.strerror}; see the log of sortd", "exit_code": 74}
        self._answer(name, reply)

    def _answer(self, name: str, reply: Reply) -> None:
        try:
            with open_folder(self._path) as folder:
                self._remove(name, folder)
                write_json((self._path / name).with_suffix(".answer"), reply, folder)
        except OSError as error:
            self._report(error)


def _read(path: Path, folder: int) -> Request:
    """Return what a file asks for.

    Raises:
        FileNotFoundError: it is gone.
        RequestError: it cannot be read, or is no mapping.
    """
    try:
        request = json.loads(read_regular(path, limit=MOST_BYTES, folder=folder))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequestError(f"it cannot be read: {error.strerror}") from error
    if not isinstance(request, dict):
        raise RequestError("it is no mapping")
    return request


def write_json(path: Path, facts: Mapping[str, Any], folder: int, *, mode: int | None = None) -> None:
    """Write beside and rename, so that a reader never sees half.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")  # a lone surrogate is escaped
    write_atomic(path, text, folder=folder, mode=mode, durable=False)


def ask(state: Path, request: Request, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any] | None:
    """Ask the running daemon and return its answer; None where none runs.

    Raises:
        StartupError: it runs, but does not answer or may not be asked.
        AnsweredError: it answered that it cannot do that.
    """
    status = read_status(state)
    if status is None or not status["alive"]:
        return None
    if not is_of_its_writer(state, status["pid"]):
        raise errors.StartupError(
            f"{state} names process {status['pid']}, which is another user's; ask that user, or stop it"
        )
    path = state / FOLDER / f"{uuid.uuid4().hex}.request"
    try:
        with open_folder(path.parent) as folder:
            try:
                # The daemon's user reads it whatever the umask of whoever asks; the folder is closed to all others.
                write_json(path, {**request, "expires_at": time.time() + seconds}, folder, mode=0o644)
                os.kill(status["pid"], signal.SIGUSR1)
                reply = _await(path.with_suffix(".answer"), folder, status, seconds)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path.name, dir_fd=folder)
    except ProcessLookupError:
        return None  # it ended just now
    except PermissionError as error:
        raise errors.StartupError(f"sortd runs as another user ({error}); ask it as that user or as root") from error
    except OSError as error:
        raise errors.StartupError(f"sortd (pid {status['pid']}) cannot be asked: {error}; see its log") from error
    if "error" in reply:
        raise AnsweredError(str(reply["error"]), int(reply.get("exit_code", 70)))
    return reply


class AnsweredError(errors.SortdError):
    """The daemon said no, and why."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep what the daemon would have exited with."""
        super().__init__(message)
        self.exit_code = exit_code


def _await(answer: Path, folder: int, status: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            reply: dict[str, Any] = dict(json.loads(read_regular(answer, folder=folder)))
        except FileNotFoundError:
            time.sleep(0.02)
        except _NONSENSE as error:
            raise errors.StartupError(f"{answer} is no answer of sortd's: {error}") from error
        else:
            os.unlink(answer.name, dir_fd=folder)
            return reply
    raise errors.StartupError(f"sortd (pid {status['pid']}) did not answer within {seconds:.0f} s; see its log")


def _age(entry: "os.DirEntry[str]") -> int:
    """Return when a file was written, in nanoseconds since the epoch; 0 for one that is gone by now."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0


LAST_RECORD = (1 << 63) - 1  # SQLite numbers records up to here
CHUNK = 64  # images that are put back in one turn of the loop: a batch of the journal


def answer(datasets: Datasets, request: Request) -> Reply | Steps:
    """Do what a request asks for, and say what was done; what takes long is returned to be done step by step.

    Raises:
        RequestError: it asks for nothing that can be done.
        DataError: it names a dataset or a record that is not there.
        StorageError: the journal or the disk of a dataset failed, or holds it; the other ones go on.
    """
    match request:
        case {"do": "undo", "datasets": dict(wanted), "dry_run": bool(dry_run)}:
            return _undo(datasets, wanted, dry_run=dry_run)
        case {"do": "release", "datasets": list() | None as names, "path": str() | None as path}:
            return _release(datasets, _chosen(datasets, names), path)
        case {"do": "rebuild", "datasets": list() | None as names, "force": bool(force)}:
            chosen = _chosen(datasets, names)
            for dataset in chosen:
                with datasets.answering(dataset):
                    dataset.rebuild(force=force)
            return {"rebuilding": [dataset.name for dataset in chosen]}
    raise RequestError(f"nothing is known of {request.get('do')!r:.100} with {', '.join(sorted(request))}")


def put_back(
    filing: Mover, history: History, identifiers: Sequence[int], *, dry_run: bool
) -> Iterator[tuple[list[UndoResult], int]]:
    """Undo the moves of these records, newest first, or say what would be: chunk by chunk, since it can take minutes.

    Yields:
        What became of a chunk, and how many of it end later.

    Raises:
        DataError: a record is not there; nothing was undone.
        JournalError: the journal cannot be read or written.
    """
    if missing := history.missing(identifiers):
        raise errors.DataError(f"the journal has no record {missing[0]}")
    newest_first = sorted(set(identifiers), reverse=True)
    asked_for = set(newest_first)
    foretold: set[str] = set()
    inbox = f"{Area.IMAGES}/"
    for start in range(0, len(newest_first), CHUNK):
        chosen = history.finished(newest_first[start : start + CHUNK])
        late = history.followers([belongs_to(record) for record in chosen])
        if late:
            # What followed an image from the inbox goes back with it, and stays with one that cannot go back.
            back = filing.preview_undo(chosen, set(foretold))
            apart = {belongs_to(one.record) for one in back if one.restored is None}
            late = [one for one in late if one.move_reason.reason not in apart and one.source_path.startswith(inbox)]
        followers = [one for one in late if one.id not in asked_for]
        records = sorted([*chosen, *followers], key=lambda record: record.id, reverse=True)
        told = filing.preview_undo(records, foretold) if dry_run else filing.undo(records)
        yield told, len(records) - len(told)


def put_back_facts(dataset: str, layout: Layout, one: UndoResult) -> dict[str, Any]:
    """Return what became of an undo as plain values."""
    was = os.path.join(layout.root, one.record.destination_path)
    return {"dataset": dataset, "id": one.record.id, "was": was, "restored": one.restored, "message": one.message}


def _undo(datasets: Datasets, wanted: Mapping[str, Any], *, dry_run: bool) -> Steps:
    """Undo chunk by chunk; between two of them the loop has its turns, and a dataset may be let go."""
    undone: list[dict[str, Any]] = []
    later = 0
    for name, (root, records) in {name: _wanted(name, one) for name, one in wanted.items()}.items():
        (dataset,) = _chosen(datasets, [name])
        if os.path.realpath(root) != os.path.realpath(dataset.layout.root):
            raise errors.DataError(f"the sortd that runs works on {dataset.layout.root}, not on {root}")
        if (problem := dataset.lock_problem()) is not None and not dry_run:
            raise errors.AlreadyRunningError(problem)
        chunks = put_back(dataset.mover, dataset.history, records, dry_run=dry_run)
        while True:
            with datasets.answering(dataset):
                if (done := next(chunks, None)) is None:
                    break
                told, waiting = done
                if not dry_run:
                    tell_put_back(dataset, told)
            later += waiting
            undone += [put_back_facts(name, dataset.layout, one) for one in told]
            yield
            if datasets.by_name.get(name) is not dataset:
                raise errors.DataError(
                    f"{name} was let go meanwhile: {len(undone)} images were put back before; ask again"
                )
    return {"undone": undone, "later": later}


def _wanted(name: str, wanted: object) -> tuple[str, list[int]]:
    """Return the root and the records, each once, of what is to be undone in a dataset.

    Raises:
        RequestError: there is no root, or what should be a record cannot be one.
    """
    match wanted:
        case {"root": str(root), "records": list(records)}:
            odd = [one for one in records if type(one) is not int or not 0 < one <= LAST_RECORD]
            if odd:
                raise RequestError(f"{odd[0]!r:.100} is no record of {name}")
            return root, list(dict.fromkeys(records))
    raise RequestError(f"what is to be undone in {name} is not said by root and records")


def tell_put_back(dataset: Dataset, told: Sequence[UndoResult]) -> None:
    """Tell the core which files are to rest where they are, before a file event makes them work again."""
    log = structlog.get_logger().bind(dataset=dataset.name)
    for one in told:
        was = os.path.join(dataset.layout.root, one.record.destination_path)
        if one.restored is None:
            log.warning(MOVE_UNDONE, path=was, destination=None, reason=one.message)
            continue
        dataset.receive(ImageGone(was))
        if (held := dataset.mover.held_version(one.restored)) is not None:
            dataset.receive(ImageHeld(one.restored, held))
        log.info(MOVE_UNDONE, path=was, destination=one.restored, reason=one.message)


def _release(datasets: Datasets, chosen: Sequence[Dataset], path: str | None) -> Reply:
    """Let one held file go; or, by its folder, one dataset that the guard holds; or, without a path, all of both."""
    released: dict[str, int] = {}
    lifted: dict[str, str] = {}
    still_held: dict[str, str] = {}
    for dataset in chosen:
        root = os.fspath(dataset.layout.root)
        is_file = path is not None and path.startswith(f"{root}{os.sep}")
        released[dataset.name] = 0
        with datasets.answering(dataset):
            if path is None or is_file:
                released[dataset.name] = dataset.mover.release(path)
                dataset.receive(Released(path))
            if is_file and (reason := dataset.held_because) is not None:
                still_held[dataset.name] = reason
            elif path in {None, root} and (reason := dataset.release()) is not None:
                lifted[dataset.name] = reason
    return release_reply(released, lifted, still_held)


def release_reply(released: Mapping[str, int], lifted: Mapping[str, str], still_held: Mapping[str, str]) -> Reply:
    """Return what a release did: the held files by dataset, and why the guard held, or holds, which datasets."""
    holds = {"lifted": lifted, "still_held": still_held}
    return {"released": released, **{name: reasons for name, reasons in holds.items() if reasons}}


def _chosen(datasets: Datasets, names: Sequence[str] | None) -> list[Dataset]:
    if names is None:
        return list(datasets)
    for name in names:
        if name in datasets.held:
            raise errors.StorageError(f"the dataset {name!r} is held: {datasets.held[name].cause}")
        if name not in datasets.by_name:
            there = ", ".join(sorted(datasets.by_name)) or "none"
            raise errors.DataError(f"the sortd that runs has no dataset {name!r}; it has: {there}")
    return [datasets.by_name[name] for name in names]
