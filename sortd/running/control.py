"""Control: what ``undo``, ``release`` and ``rebuild`` do, in the daemon or, where none runs, by themselves.

The daemon calls ``answer`` from its loop, the thread that moves files; see ``requests.py`` for what is asked.
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import structlog

from sortd.errors import AlreadyRunningError, DataError, StorageError
from sortd.layout import Area, Layout
from sortd.logs import MOVE_UNDONE
from sortd.messages import Event, ImageGone, ImageHeld, Released
from sortd.moving.mover import Mover
from sortd.moving.plan import belongs_to
from sortd.moving.undo import UndoResult
from sortd.running.requests import Reply, Request, RequestError
from sortd.store.history import History
from sortd.store.records import Record

LAST_RECORD = (1 << 63) - 1
"""SQLite numbers records up to here."""

CHUNK = 64
"""Images that are put back in one turn of the loop: a batch of the journal."""

Steps = Generator[None, None, Reply]
"""An answer that takes long: does a step each time it is asked for the next one, and returns the reply in the end."""


class DatasetAtWork(Protocol):
    """What is asked of a dataset of the daemon."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def layout(self) -> Layout:
        """Its folders."""

    @property
    def filing(self) -> Mover:
        """What moves its files."""

    @property
    def history(self) -> History:
        """What its journal can be asked."""

    def receive(self, event: Event) -> None:
        """Hand an event to its core."""

    def release(self) -> str | None:
        """Let the dataset go that the guard holds; return why it was held, None where it was not."""

    @property
    def held_because(self) -> str | None:
        """Why the guard holds the dataset; None where it does not."""

    def lock_problem(self) -> str | None:
        """Why another sortd has it now, in a sentence; None where none has."""

    def rebuild(self, *, force: bool) -> None:
        """Build its prototypes anew; with ``force`` also where the reload gate would keep the old ones."""


class DaemonAtWork(Protocol):
    """What is asked of the daemon."""

    @property
    def datasets(self) -> Mapping[str, DatasetAtWork]:
        """The datasets that it works on, by name."""

    def why_held(self, name: str) -> str | None:
        """Say why a dataset is held and not among them; None: it is not held."""

    def answering(self, name: str) -> AbstractContextManager[None]:
        """Do what was asked of a dataset; where its journal or disk fails, hold it, and raise that."""


def answer(daemon: DaemonAtWork, request: Request) -> Reply | Steps:
    """Do what a request asks for, and say what was done; what takes long is returned to be done step by step.

    Raises:
        RequestError: it asks for nothing that can be done.
        DataError: it names a dataset or a record that is not there.
        StorageError: the journal or the disk of a dataset failed, or holds it; the other ones go on.
    """
    match request:
        case {"do": "undo", "datasets": dict(datasets), "dry_run": bool(dry_run)}:
            return _undo(daemon, datasets, dry_run=dry_run)
        case {"do": "release", "datasets": list() | None as names, "path": str() | None as path}:
            return _release(daemon, _chosen(daemon, names), path)
        case {"do": "rebuild", "datasets": list() | None as names, "force": bool(force)}:
            chosen = _chosen(daemon, names)
            for dataset in chosen:
                with daemon.answering(dataset.name):
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
        raise DataError(f"the journal has no record {missing[0]}")
    newest_first = sorted(set(identifiers), reverse=True)
    asked_for = set(newest_first)
    foretold: set[str] = set()
    for start in range(0, len(newest_first), CHUNK):
        chosen = history.finished(newest_first[start : start + CHUNK])
        late = history.followers([belongs_to(record) for record in chosen])
        if late:
            # What followed an image from the inbox goes back with it, and stays with one that cannot go back.
            back = filing.rehearse_undo(chosen, set(foretold))
            apart = {belongs_to(one.record) for one in back if one.restored is None}
            late = [one for one in late if one.grounds.reason not in apart and _is_from_inbox(one)]
        followers = [one for one in late if one.id not in asked_for]
        records = sorted([*chosen, *followers], key=lambda record: record.id, reverse=True)
        told = filing.rehearse_undo(records, foretold) if dry_run else filing.undo(records)
        yield told, len(records) - len(told)


def _is_from_inbox(record: Record) -> bool:
    return record.relocation.source.partition("/")[0] == Area.IMAGES


def put_back_facts(dataset: str, layout: Layout, one: UndoResult) -> dict[str, Any]:
    """Return what became of an undo as plain values."""
    was = os.path.join(layout.root, one.record.destination_path)
    return {"dataset": dataset, "id": one.record.id, "was": was, "restored": one.restored, "message": one.message}


def _undo(daemon: DaemonAtWork, datasets: Mapping[str, Any], *, dry_run: bool) -> Steps:
    """Undo chunk by chunk; between two of them the loop has its turns, and a dataset may be let go."""
    undone: list[dict[str, Any]] = []
    later = 0
    for name, (root, records) in {name: _wanted(name, wanted) for name, wanted in datasets.items()}.items():
        (dataset,) = _chosen(daemon, [name])
        if os.path.realpath(root) != os.path.realpath(dataset.layout.root):
            raise DataError(f"the sortd that runs works on {dataset.layout.root}, not on {root}")
        if (problem := dataset.lock_problem()) is not None and not dry_run:
            raise AlreadyRunningError(problem)
        chunks = put_back(dataset.filing, dataset.history, records, dry_run=dry_run)
        while True:
            with daemon.answering(name):
                if (done := next(chunks, None)) is None:
                    break
                told, waiting = done
                if not dry_run:
                    tell_put_back(dataset, told)
            later += waiting
            undone += [put_back_facts(name, dataset.layout, one) for one in told]
            yield
            if daemon.datasets.get(name) is not dataset:
                raise DataError(f"{name} was let go meanwhile: {len(undone)} images were put back before; ask again")
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


def tell_put_back(dataset: DatasetAtWork, told: Sequence[UndoResult]) -> None:
    """Tell the core which files are to rest where they are, before a watcher's hint makes them work again."""
    log = structlog.get_logger().bind(dataset=dataset.name)
    for one in told:
        was = os.path.join(dataset.layout.root, one.record.destination_path)
        if one.restored is None:
            log.warning(MOVE_UNDONE, path=was, destination=None, reason=one.message)
            continue
        dataset.receive(ImageGone(was))
        if (held := dataset.filing.held_version(one.restored)) is not None:
            dataset.receive(ImageHeld(one.restored, held))
        log.info(MOVE_UNDONE, path=was, destination=one.restored, reason=one.message)


def _release(daemon: DaemonAtWork, datasets: Sequence[DatasetAtWork], path: str | None) -> Reply:
    """Let one held file go; or, by its folder, one dataset that the guard holds; or, without a path, all of both."""
    released: dict[str, int] = {}
    lifted: dict[str, str] = {}
    still_held: dict[str, str] = {}
    for dataset in datasets:
        root = os.fspath(dataset.layout.root)
        is_file = path is not None and path.startswith(f"{root}{os.sep}")
        released[dataset.name] = 0
        with daemon.answering(dataset.name):
            if path is None or is_file:
                released[dataset.name] = dataset.filing.release(path)
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


def _chosen(daemon: DaemonAtWork, names: Sequence[str] | None) -> list[DatasetAtWork]:
    if names is None:
        return list(daemon.datasets.values())
    missing = [name for name in names if name not in daemon.datasets]
    if missing:
        if (cause := daemon.why_held(missing[0])) is not None:
            raise StorageError(f"the dataset {missing[0]!r} is held: {cause}")
        there = ", ".join(sorted(daemon.datasets)) or "none"
        raise DataError(f"the sortd that runs has no dataset {missing[0]!r}; it has: {there}")
    return [daemon.datasets[name] for name in names]
