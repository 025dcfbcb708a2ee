"""Control: what ``undo``, ``release`` and ``rebuild`` do, in the daemon or, where none runs, by themselves.

The daemon calls ``answer`` from its loop, the thread that moves files; see ``requests.py`` for what is asked.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from sortd.errors import AlreadyRunningError, DataError
from sortd.journaling.history import History
from sortd.journaling.records import Record, Selection
from sortd.layout import Layout
from sortd.logs import MOVE_UNDONE
from sortd.messages import Event, ImageGone, ImageHeld, Released
from sortd.running.filing import Filing
from sortd.running.latecomers import belongs_to
from sortd.running.requests import Reply, Request, RequestError
from sortd.running.undoing import PutBack

LAST_RECORD = (1 << 63) - 1
"""SQLite numbers records up to here."""

CHUNK = 256
"""Images that are put back between two signs of life: four batches of the journal, a few seconds on a slow disk."""


class DatasetAtWork(Protocol):
    """What is asked of a dataset of the daemon."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def layout(self) -> Layout:
        """Its folders."""

    @property
    def filing(self) -> Filing:
        """What moves its files."""

    @property
    def history(self) -> History:
        """What its journal can be asked."""

    def receive(self, event: Event) -> None:
        """Hand an event to its core."""

    def lock_problem(self) -> str | None:
        """Why another sortd has it now, in a sentence; None where none has."""

    def rebuild(self, *, force: bool) -> None:
        """Build its prototypes anew; with ``force`` also where the reload gate would keep the old ones."""


class DaemonAtWork(Protocol):
    """What is asked of the daemon."""

    @property
    def datasets(self) -> Mapping[str, DatasetAtWork]:
        """The datasets that it works on, by name."""

    def show_life(self) -> None:
        """Feed the watchdog in the middle of a long answer: it waits for the disk, but gets on."""


def answer(daemon: DaemonAtWork, request: Request) -> Reply:
    """Do what a request asks for, and say what was done.

    Raises:
        RequestError: it asks for nothing that can be done.
        DataError: it names a dataset or a record that is not there.
        JournalError: the journal cannot be written; the daemon must stop.
    """
    match request:
        case {"do": "undo", "datasets": dict(datasets), "dry_run": bool(dry_run)}:
            return _undo(daemon, datasets, dry_run=dry_run)
        case {"do": "release", "datasets": list() | None as names, "path": str() | None as path}:
            return {"released": {one.name: _release(one, path) for one in _chosen(daemon, names)}}
        case {"do": "rebuild", "datasets": list() | None as names, "force": bool(force)}:
            chosen = _chosen(daemon, names)
            for dataset in chosen:
                dataset.rebuild(force=force)
            return {"rebuilding": [dataset.name for dataset in chosen]}
    raise RequestError(f"nothing is known of {request.get('do')!r:.100} with {', '.join(sorted(request))}")


def put_back(
    filing: Filing,
    history: History,
    identifiers: Sequence[int],
    *,
    dry_run: bool,
    show_life: Callable[[], None] = lambda: None,
) -> tuple[list[PutBack], int]:
    """Undo the moves of these records, or say what would be; return what became of them, and how many end later.

    A hundred thousand images that were filed wrongly take long: they go back chunk by chunk, newest first.

    Raises:
        DataError: a record is not there.
        JournalError: the journal cannot be read or written.
    """
    chosen = [_record(history, identifier) for identifier in identifiers]
    known = {record.id for record in chosen}
    late = [one for record in chosen for one in history.followers(belongs_to(record)) if one.id not in known]
    # What followed an image goes back with it.
    records = sorted([*chosen, *late], key=lambda record: record.id, reverse=True)
    if dry_run:
        return filing.rehearse_undo(records), 0
    told: list[PutBack] = []
    for start in range(0, len(records), CHUNK):
        told += filing.undo(records[start : start + CHUNK])
        show_life()
    return told, len(records) - len(told)


def put_back_facts(dataset: str, layout: Layout, one: PutBack) -> dict[str, Any]:
    """Return what became of an undo as plain values."""
    was = os.path.join(layout.root, one.record.destination_path)
    return {"dataset": dataset, "id": one.record.id, "was": was, "restored": one.restored, "message": one.message}


def _undo(daemon: DaemonAtWork, datasets: Mapping[str, Any], *, dry_run: bool) -> Reply:
    undone: list[dict[str, Any]] = []
    later = 0
    for name, (root, records) in {name: _wanted(name, wanted) for name, wanted in datasets.items()}.items():
        (dataset,) = _chosen(daemon, [name])
        if os.path.realpath(root) != os.path.realpath(dataset.layout.root):
            raise DataError(f"the sortd that runs works on {dataset.layout.root}, not on {root}")
        if (problem := dataset.lock_problem()) is not None and not dry_run:
            raise AlreadyRunningError(problem)
        told, waiting = put_back(dataset.filing, dataset.history, records, dry_run=dry_run, show_life=daemon.show_life)
        later += waiting
        if not dry_run:
            tell_put_back(dataset, told)
        undone += [put_back_facts(name, dataset.layout, one) for one in told]
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


def tell_put_back(dataset: DatasetAtWork, told: Sequence[PutBack]) -> None:
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


def _release(dataset: DatasetAtWork, path: str | None) -> int:
    if path is not None and not path.startswith(f"{dataset.layout.root}{os.sep}"):
        return 0
    count = dataset.filing.release(path)
    dataset.receive(Released(path))
    return count


def _chosen(daemon: DaemonAtWork, names: Sequence[str] | None) -> list[DatasetAtWork]:
    if names is None:
        return list(daemon.datasets.values())
    missing = [name for name in names if name not in daemon.datasets]
    if missing:
        there = ", ".join(sorted(daemon.datasets)) or "none"
        raise DataError(f"the sortd that runs has no dataset {missing[0]!r}; it has: {there}")
    return [daemon.datasets[name] for name in names]


def _record(history: History, identifier: int) -> Record:
    found = history.moves(Selection(id=identifier))
    if not found:
        raise DataError(f"the journal has no record {identifier}")
    return found[0]
