"""Control: how ``undo``, ``release``, ``rebuild`` and ``groups`` reach the running daemon, and how it carries them out.

A request is a file in the state directory and a SIGUSR1 that wakes the daemon; the answer is a file beside it. Only the
user of the daemon may write to the directory: whoever can send requests could also move the files. Paths are as
``os.fsdecode`` returns them; bytes that are not UTF-8 are escaped lone surrogates.

    {"do": "undo", "datasets": {name: {"root": path, "records": [id of the journal]}}, "dry_run": bool}
        -> {"undone": [{"dataset", "id", "was", "restored", "message"}], "later": number}
    {"do": "release", "datasets": [name] or null: all, "path": absolute path of a file or a dataset, or null: every one}
        -> {"released": {name: number of held files}, "lifted": {name: why the guard held it}, "still_held": the same};
           the last two only if there are any
    {"do": "rebuild", "datasets": [name] or null: all, "force": bool}
        -> {"rebuilding": [name]}
    {"do": "assign", "dataset": name, "root": path, "label": class, "images": [{"path", "size", "mtime_ns"}]}
        -> {"assigned": [{"path", "destination", "id", "message"}], "later": number};
           the class "_none" is no class, and with "example": true the images are examples of it
    {"do": "refile", "dataset": name, "root": path, "images": as ``refile_facts`` returns them, also of Images/}
        -> {"refiled": as for assign, "later": number}
    {"do": "check", "dataset": name, "root": path, "answers": [[id of the journal, whether its image is right]]}
        -> {"checked": number}
    anything else, or a failure
        -> {"error": sentence, "exit_code": as in sysexits(3)}

``was`` is the old path, ``restored`` or ``destination`` the new one (null: not moved, ``message`` says why), ``id`` the
number of the move in the journal; ``later`` counts images that are being copied to another disk. A request is ignored
after ``expires_at``, seconds since the epoch.
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
from sortd.daemon.assign import Result, assign_images, forget_made_classes
from sortd.daemon.audit import checked_answers
from sortd.daemon.dataset import Dataset
from sortd.daemon.datasets import Datasets
from sortd.daemon.refile import refile_images
from sortd.events import ImageGone, ImageHeld, Released, ReviewSeen
from sortd.files import open_folder, read_regular, write_json
from sortd.layout import Area, Layout
from sortd.logs import MOVE_UNDONE
from sortd.moving.mover import Mover
from sortd.moving.plan import belongs_to
from sortd.moving.recovery import UndoResult, wanted_records
from sortd.service import is_alive, is_of_its_writer, read_status
from sortd.store.history import History

FOLDER = "requests"
ANSWER_SECONDS = 30.0  # default time to wait for an answer
SECONDS_FOR_EACH = 0.05  # additional time to wait for the answer, for each image to be moved
FORGOTTEN_SECONDS = 600.0  # until an answer that was not read is removed
MOST_LISTED = 10_000  # requests taken from one listing of the folder
MOST_BYTES = 8 << 20  # a request to undo a million moves
MOST_QUOTED = 200  # characters of an error message in an answer

_INVALID_REQUEST = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors of an invalid request, whose values, nesting and types are arbitrary."""

Request = Mapping[str, Any]
Reply = Mapping[str, Any]
Steps = Generator[None, None, Reply]  # the steps of a long request, which return the reply in the end
Answering = Callable[[Request], Reply | Steps]

_STOPPED: Reply = {
    "error": "sortd stopped before the request was completed; no move is incomplete: repeat the request",
    "exit_code": errors.StoppedError.exit_code,
}


class RequestError(ValueError):
    """An invalid request."""


class NotRunningError(errors.StartupError):
    """No running sortd can be asked."""

    exit_code = 75


class Requests:
    """The server side: processes requests in order, one step of one of them per turn of the loop.

    An invalid request is answered with an error; a file that cannot be removed is reported once and ignored.
    """

    def __init__(
        self, state: Path, *, report: Callable[[OSError], None], clock: Callable[[], float] = time.time
    ) -> None:
        """Serve the requests of ``state``; ``report`` receives errors, ``clock`` returns seconds since the epoch."""
        self._path, self._report, self._clock = state / FOLDER, report, clock
        self._left: set[str] = set()  # names that could not be removed
        self._names: deque[str] = deque()  # not answered yet
        self._steps: Generator[None, None, None] | None = None
        self._is_woken = False

    def open(self) -> None:
        """Create the folder for the user of the daemon only, and remove old requests; raises LayoutError."""
        try:
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open_folder(self._path) as folder:
                if stat.S_IMODE(os.fstat(folder).st_mode) & 0o077:
                    os.fchmod(folder, 0o700)
                for name in os.listdir(folder):
                    self._remove(name, folder)
        except OSError as error:
            raise errors.LayoutError(
                f"{self._path} cannot be used: {error.strerror}; correct its permissions, or set state_dir"
            ) from error

    def wake(self) -> None:
        """Note that there may be a new request."""
        self._is_woken = True

    @property
    def is_due(self) -> bool:
        """Whether ``advance`` has something to do."""
        return self._is_woken or self._steps is not None or bool(self._names)

    def advance(self, answer: Answering) -> None:
        """Do one step of the current request, or of the next one; the last step answers it."""
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
            steps, self._steps = self._steps, None
            with suppress(StopIteration):
                next(steps)
                self._steps = steps

    def close(self) -> None:
        """Answer all open requests as not done, or not completed."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        with suppress(OSError), open_folder(self._path) as folder:
            self._look(folder)
        while self._names:
            self._answer(self._names.popleft(), _STOPPED)

    def _look(self, folder: int) -> None:
        """Find the open requests, oldest first, and remove old answers."""
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
            self._left.add(name)  # a folder or a read-only disk: not answered twice
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
            return  # the request was withdrawn
        except GeneratorExit:
            self._answer(name, _STOPPED)
            raise
        except errors.SortdError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        except _INVALID_REQUEST as error:
            reply = {"error": f"{name} is not a valid request: {str(error)[:MOST_QUOTED]}", "exit_code": 65}
        except OSError as error:
            self._report(error)
            reply = {"error": f"{error.filename or name}: {error.strerror}; see the log of sortd", "exit_code": 74}
        self._answer(name, reply)

    def _answer(self, name: str, reply: Reply) -> None:
        try:
            with open_folder(self._path) as folder:
                self._remove(name, folder)
                write_json((self._path / name).with_suffix(".answer"), reply, folder=folder, durable=False)
        except OSError as error:
            self._report(error)


def _read(path: Path, folder: int) -> Request:
    try:
        request = json.loads(read_regular(path, limit=MOST_BYTES, folder=folder))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror}") from error
    if not isinstance(request, dict):
        raise RequestError("not a mapping")
    return request


def ask(state: Path, request: Request, *, seconds: float = ANSWER_SECONDS, images: int = 0) -> dict[str, Any] | None:
    """Send a request to the running daemon and return its answer; None if none is running.

    The answer is waited for so long, and longer for each of the ``images`` to be moved.

    Raises StartupError: it does not answer, or may not be asked; AnsweredError: it answered with an error.
    """
    seconds += SECONDS_FOR_EACH * images
    status = read_status(state)
    if status is None or not status["alive"]:
        return None
    if not is_of_its_writer(state, status["pid"]):
        raise errors.StartupError(
            f"{state} names process {status['pid']}, which belongs to another user; ask that user, or stop it"
        )
    path = state / FOLDER / f"{uuid.uuid4().hex}.request"
    try:
        with open_folder(path.parent) as folder:
            try:
                # Readable by the user of the daemon, whatever the umask here; others cannot enter the folder.
                asked = {**request, "expires_at": time.time() + seconds}
                write_json(path, asked, folder=folder, mode=0o644, durable=False)
                os.kill(status["pid"], signal.SIGUSR1)
                reply = _await(path.with_suffix(".answer"), folder, status, seconds)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path.name, dir_fd=folder)
    except ProcessLookupError:
        return None  # it has just ended; the caller does what it has not done
    except PermissionError as error:
        raise errors.StartupError(f"sortd runs as another user ({error}); ask it as that user or as root") from error
    except OSError as error:
        raise errors.StartupError(f"sortd (pid {status['pid']}) cannot be asked: {error}; see its log") from error
    if "error" in reply:
        raise AnsweredError(str(reply["error"]), int(reply.get("exit_code", 70)))
    return reply


class AnsweredError(errors.SortdError):
    """The daemon answered with an error; the exit code is the one it gave."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep the exit code."""
        super().__init__(message)
        self.exit_code = exit_code


def _await(answer: Path, folder: int, status: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    until, has_ended = time.monotonic() + seconds, False
    while time.monotonic() < until:
        try:
            reply: dict[str, Any] = dict(json.loads(read_regular(answer, folder=folder)))
        except FileNotFoundError:
            if has_ended:
                raise ProcessLookupError from None
            has_ended = not is_alive(status["pid"], status.get("started_ticks"))  # it may have answered before
            time.sleep(0.02)
        except _INVALID_REQUEST as error:
            raise errors.StartupError(f"{answer} is not a valid answer: {error}") from error
        else:
            os.unlink(answer.name, dir_fd=folder)
            return reply
    raise errors.StartupError(f"sortd (pid {status['pid']}) did not answer within {seconds:.0f} s; see its log")


def _age(entry: "os.DirEntry[str]") -> int:
    """Return the mtime of a file in nanoseconds since the epoch; 0 if it is gone."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0


CHUNK = 64  # moves undone in one turn of the loop: a batch of the journal


def answer(datasets: Datasets, request: Request) -> Reply | Steps:
    """Carry out a request and return the reply, or the steps to it if it takes long.

    Raises:
        RequestError: The request is invalid.
        DataError: It names an unknown dataset or record.
        StorageError: The journal or the disk of a dataset failed, or the dataset is held.
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
        case {"do": "assign", "dataset": str(name), "root": str(root), "label": str(label), "images": list(images)}:
            if not isinstance(example := request.get("example", False), bool):
                raise RequestError(f"{example!r:.100} is not whether the images are examples")
            dataset = _chosen_at(datasets, name, root)
            steps = assign_images(dataset.layout, dataset.journal, dataset.assign, label, images, is_example=example)
            return _move(datasets, dataset, steps, "assigned")
        case {"do": "refile", "dataset": str(name), "root": str(root), "images": list(images)}:
            dataset = _chosen_at(datasets, name, root)
            steps = refile_images(dataset.layout, dataset.journal.history, dataset.assign, images)
            return _move(datasets, dataset, steps, "refiled")
        case {"do": "check", "dataset": str(name), "root": str(root), "answers": list(answers)}:
            with datasets.answering(dataset := _chosen_at(datasets, name, root)):
                dataset.presence.require()
                return {"checked": dataset.record_checks(checked_answers(answers))}
    raise RequestError(f"unknown request {request.get('do')!r:.100} with {', '.join(sorted(request))}")


def undo_records(
    mover: Mover, history: History, identifiers: Sequence[int], *, dry_run: bool
) -> Iterator[tuple[list[UndoResult], int]]:
    """Undo the moves of these records, newest first, or predict the result; in chunks, since it can take minutes.

    Yields:
        The results of a chunk, and how many of its moves end later.

    Raises DataError: a record does not exist; nothing was undone; JournalError: the journal cannot be read or written.
    """
    if missing := history.missing(identifiers):
        raise errors.DataError(f"the journal has no record {missing[0]}")
    newest_first = sorted(set(identifiers), reverse=True)
    asked_for = set(newest_first)
    predicted: set[str] = set()
    inbox = f"{Area.IMAGES}/"
    for start in range(0, len(newest_first), CHUNK):
        chosen = history.finished(newest_first[start : start + CHUNK])
        late = history.followers([belongs_to(record) for record in chosen])
        if late:
            # Companions from the inbox are moved back with their image, and stay if it cannot be moved.
            back = mover.preview_undo(chosen, set(predicted))
            apart = {belongs_to(one.record) for one in back if one.restored is None}
            late = [one for one in late if one.move_reason.reason not in apart and one.source_path.startswith(inbox)]
        followers = [one for one in late if one.id not in asked_for]
        records = sorted([*chosen, *followers], key=lambda record: record.id, reverse=True)
        results = mover.preview_undo(records, predicted) if dry_run else mover.undo(records)
        yield results, len(records) - len(results)


def undo_facts(dataset: str, layout: Layout, one: UndoResult) -> dict[str, Any]:
    """Return the result of an undo as plain values."""
    was = os.path.join(layout.root, one.record.destination_path)
    return {"dataset": dataset, "id": one.record.id, "was": was, "restored": one.restored, "message": one.message}


def _undo(datasets: Datasets, wanted: Mapping[str, Any], *, dry_run: bool) -> Steps:
    """Undo in chunks; between two of them the loop runs, and a dataset may be closed."""
    undone: list[dict[str, Any]] = []
    later = 0
    for name, (root, records) in {name: wanted_records(name, one) for name, one in wanted.items()}.items():
        dataset = _chosen_at(datasets, name, root)
        if (problem := dataset.presence.lock_problem()) is not None and not dry_run:
            raise errors.AlreadyRunningError(problem)
        chunks = undo_records(dataset.mover, dataset.journal.history, records, dry_run=dry_run)
        while True:
            with datasets.answering(dataset):
                if (done := next(chunks, None)) is None:
                    break
                results, waiting = done
                if not dry_run:
                    apply_undo_results(dataset, results)
            later += waiting
            undone += [undo_facts(name, dataset.layout, one) for one in results]
            yield
            if datasets.by_name.get(name) is not dataset:
                raise errors.DataError(
                    f"{name} was closed meanwhile, after {len(undone)} images were restored; repeat the request"
                )
    return {"undone": undone, "later": later}


def _move(datasets: Datasets, dataset: Dataset, steps: Iterator[tuple[list[Result], int]], key: str) -> Steps:
    """Move images to the classes that a request names, some in each turn of the loop; ``key`` is that of the reply."""
    moved, later = list[Result](), 0
    while True:
        with datasets.answering(dataset):
            dataset.presence.require(f"; {len(moved)} images were {key} before" if moved else "")
            if (done := next(steps, None)) is None:
                return {key: moved, "later": later}
        moved, later = moved + done[0], later + done[1]
        yield
        if datasets.by_name.get(dataset.name) is not dataset:
            raise errors.DataError(f"{dataset.name} was closed meanwhile; {len(moved)} images were {key}")


def apply_undo_results(dataset: Dataset, results: Sequence[UndoResult]) -> None:
    """Hold the restored files in the core before a file event arrives for them, and log each result."""
    log = structlog.get_logger().bind(dataset=dataset.name)
    for one in results:
        was = os.path.join(dataset.layout.root, one.record.destination_path)
        if one.restored is None:
            log.warning(MOVE_UNDONE, path=was, destination=None, reason=one.message)
            continue
        dataset.receive(ImageGone(was))
        if (held := dataset.mover.held_version(one.restored)) is not None:
            if dataset.layout.area_of(one.restored) is Area.REVIEW:
                dataset.receive(ReviewSeen(one.restored, held, one.record.move_reason.generation))
            dataset.receive(ImageHeld(one.restored, held))
        log.info(MOVE_UNDONE, path=was, destination=one.restored, reason=one.message)
    if forget_made_classes(dataset.layout, dataset.journal, results):
        dataset.rebuild(force=True, afresh=True)  # otherwise the class would keep what it had


def _release(datasets: Datasets, chosen: Sequence[Dataset], path: str | None) -> Reply:
    """Release one held file; or, given its folder, one dataset held by the guard; or, without a path, everything."""
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
    """Return the reply to a release: held files by dataset, and why the guard held, or holds, datasets."""
    guarded = {"lifted": lifted, "still_held": still_held}
    return {"released": released, **{key: one for key, one in guarded.items() if one}}


def _chosen_at(datasets: Datasets, name: str, root: str) -> Dataset:
    (dataset,) = _chosen(datasets, [name])
    if os.path.realpath(root) != os.path.realpath(dataset.layout.root):
        raise errors.DataError(f"the running sortd works on {dataset.layout.root}, not on {root}")
    return dataset


def _chosen(datasets: Datasets, names: Sequence[str] | None) -> list[Dataset]:
    if names is None:
        return list(datasets)
    for name in names:
        if name in datasets.held:
            raise errors.StorageError(f"the dataset {name!r} is held: {datasets.held[name].cause}")
        if name not in datasets.by_name:
            there = ", ".join(sorted(datasets.by_name)) or "none"
            raise errors.DataError(f"the running sortd has no dataset {name!r}; it has: {there}")
    return [datasets.by_name[name] for name in names]
