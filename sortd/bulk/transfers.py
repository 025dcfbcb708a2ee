"""Moves of objects in an object store: copied, verified, journaled in the run's folder, and only then deleted.

The steps of a batch are these; after a crash at any of them the next run continues from the journal.

1. Check that each source has the bytes that were decided on.
2. Journal INTENDED with a free destination.
3. Copy within the store, and verify size and ETag of the copy, or its sha256 where ETags differ.
4. Journal PUBLISHED.
5. Delete each source that still is the verified version.
6. Journal DONE.
"""

import hashlib
import posixpath
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem, FileType

from sortd.errors import AlreadyRunningError, DestinationError, JournalError, SortdError
from sortd.store.records import MoveProgress

JOURNAL = "applied.sqlite"
"""In the folder of the run."""
AT_ONCE = 64  # objects that share three commits
CHUNK_BYTES = 1 << 20
APPLY, UNDO = "apply", "undo"

SCHEMA = """CREATE TABLE IF NOT EXISTS transfers (
    id TEXT NOT NULL,
    action TEXT NOT NULL,
    source TEXT NOT NULL,
    destination TEXT NOT NULL,
    label TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    progress TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (id, action)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transfers_by_destination ON transfers (destination);
"""


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One version of one object."""

    size: int
    etag: str  # empty: the store has none


class ObjectStore:
    """The objects of one store; paths are without the scheme. Every method may raise OSError."""

    def __init__(self, files: FileSystem) -> None:
        """Use a store as ``open_store`` returns it."""
        self._files = files

    def version(self, path: str) -> ObjectVersion | None:
        """Return the present version; None: there is no such object."""
        try:
            with self._files.open_input_stream(path, compression=None) as stream:
                facts = {_text(key): _text(value) for key, value in (stream.metadata() or {}).items()}
        except FileNotFoundError:
            return None
        size = facts.get("Content-Length")
        return ObjectVersion(self._files.get_file_info(path).size if size is None else int(size), facts.get("ETag", ""))

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of an object."""
        with self._files.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def is_free(self, path: str) -> bool:
        """Tell whether nothing has this name."""
        return bool(self._files.get_file_info(path).type == FileType.NotFound)

    def copy(self, source: str, destination: str) -> None:
        """Copy an object within the store."""
        self._files.copy_file(source, destination)

    def delete(self, path: str) -> None:
        """Delete an object."""
        try:
            self._files.delete_file(path)
        except OSError:  # pyarrow then writes an empty object for the folder, which may be refused
            if self.version(path) is not None:
                raise


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


@dataclass(frozen=True, slots=True)
class Transfer:
    """The move of one object, which happens once for each id and action."""

    id: str
    action: str  # APPLY or UNDO
    source: str
    destination: str  # until it is INTENDED, the wanted one
    label: str
    sha256: str
    progress: MoveProgress | None = None  # None: not begun


@dataclass(frozen=True, slots=True)
class TransferResult:
    """What a run did about one transfer: it is DONE, now or before; or ``message`` says why not."""

    transfer: Transfer
    was_done: bool = False
    message: str = ""


class TransferJournal:
    """The transfers of one run, in SQLite with durable commits; one process has it open at a time."""

    def __init__(self, run: Path) -> None:
        """Open or create the journal in the folder of a run.

        Raises AlreadyRunningError: another process has it open; JournalError.
        """
        self._path = run / JOURNAL
        with self._translated():
            self._connection = sqlite3.connect(self._path, timeout=0, isolation_level=None)
        try:
            with self._translated():
                self._prepare()
        except SortdError:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close it; idempotent."""
        self._connection.close()

    def known(self, wanted: Sequence[Transfer]) -> list[Transfer]:
        """Return the transfers as they are journaled, or as they are wanted if they are not."""
        statement = "SELECT * FROM transfers WHERE (id, action) = (?, ?)"
        with self._translated():
            found = [(one, self._connection.execute(statement, (one.id, one.action)).fetchone()) for one in wanted]
            return [one if row is None else _transfer_from(row) for one, row in found]

    def applied(self, *, done: bool) -> Iterator[list[Transfer]]:
        """Yield the APPLY transfers that are DONE, or those that have begun and are not, by id and so many at once."""
        statement = "SELECT * FROM transfers WHERE action = ? AND (progress = ?) = ? AND id > ? ORDER BY id LIMIT ?"
        last = ""
        while True:
            with self._translated():
                rows = self._connection.execute(statement, (APPLY, MoveProgress.DONE, done, last, AT_ONCE)).fetchall()
            if not rows:
                return
            yield [_transfer_from(row) for row in rows]
            last = rows[-1]["id"]

    def is_promised(self, destination: str, to: Transfer) -> bool:
        """Return whether another transfer that has not ended has this destination."""
        statement = "SELECT 1 FROM transfers WHERE destination = ? AND progress != ? AND (id, action) != (?, ?)"
        with self._translated():
            found = self._connection.execute(statement, (destination, MoveProgress.DONE, to.id, to.action)).fetchone()
        return found is not None

    def write(self, transfers: Sequence[Transfer]) -> None:
        """Record the progress of transfers in one durable commit; one without progress is removed."""
        if not transfers:
            return
        with self._translated(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for one in transfers:
                if one.progress is None:
                    self._connection.execute("DELETE FROM transfers WHERE (id, action) = (?, ?)", (one.id, one.action))
                    continue
                columns = (*astuple(one), time.time())
                self._connection.execute("REPLACE INTO transfers VALUES (?,?,?,?,?,?,?,?)", columns)

    def _prepare(self) -> None:
        self._connection.row_factory = sqlite3.Row
        # No WAL: the folder may lie on a network file system. EXTRA also syncs the folder of the journal file.
        for statement in ("locking_mode = EXCLUSIVE", "journal_mode = DELETE", "synchronous = EXTRA"):
            self._connection.execute(f"PRAGMA {statement}")
        self._connection.execute("BEGIN EXCLUSIVE")  # this lock stays until the connection is closed
        self._connection.execute("COMMIT")
        self._connection.executescript(SCHEMA)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            if getattr(error, "sqlite_errorname", "") in {"SQLITE_BUSY", "SQLITE_LOCKED"}:
                raise AlreadyRunningError(f"another sortd applies this run: {self._path} is locked") from error
            raise JournalError(f"{self._path} cannot be used: {error}; check its disk and its permissions") from error


def _transfer_from(row: sqlite3.Row) -> Transfer:
    names = ("id", "action", "source", "destination", "label", "sha256")
    return Transfer(**{name: str(row[name]) for name in names}, progress=MoveProgress(row["progress"]))


def transfer_all(
    store: ObjectStore, journal: TransferJournal, wanted: Sequence[Transfer], pool: Executor
) -> list[TransferResult]:
    """Carry out one batch of transfers, and return the result of each in the given order.

    ``wanted`` have different ids and no progress; ``pool`` runs the requests to the store.

    Raises:
        JournalError: the journal cannot be written; the next run continues.
    """
    states = [_State(one) for one in journal.known(wanted)]
    before = [one.transfer.progress is MoveProgress.DONE for one in states]
    states = list(pool.map(lambda state: _attempt(_find, store, state), states))
    promised: set[str] = set()
    states = [_attempt(lambda _, state: _named(store, journal, state, promised), store, state) for state in states]
    journal.write([one.transfer for one in states if one.is_at(MoveProgress.INTENDED)])
    states = list(pool.map(lambda state: _attempt(_copy, store, state), states))
    journal.write([one.transfer for one in states if one.is_dropped or one.is_at(MoveProgress.PUBLISHED)])
    states = list(pool.map(lambda state: _attempt(_delete, store, state), states))
    journal.write([one.transfer for one in states if one.is_at(MoveProgress.DONE)])
    return [TransferResult(one.transfer, was, one.message) for one, was in zip(states, before, strict=True)]


def dry_run_transfer(store: ObjectStore, known: Transfer) -> TransferResult:
    """Return what ``transfer_all`` would find of a transfer as it is journaled; nothing is written."""
    found = _attempt(_find, store, _State(known))
    return TransferResult(found.transfer, known.progress is MoveProgress.DONE, found.message)


@dataclass(frozen=True, slots=True)
class _State:
    """A transfer in the middle of its batch."""

    transfer: Transfer
    version: ObjectVersion | None = None  # of the source, whose bytes are those that were decided on
    is_dropped: bool = False  # whether the intent is to be removed from the journal
    message: str = ""

    def is_at(self, progress: MoveProgress) -> bool:
        return not self.message and self.transfer.progress is progress

    def at(self, progress: MoveProgress | None, **changes: Any) -> "_State":  # noqa: ANN401 -- of its own fields
        return replace(self, transfer=replace(self.transfer, progress=progress), **changes)


def _attempt(act: Callable[[ObjectStore, _State], _State], store: ObjectStore, state: _State) -> _State:
    """Carry out a step, unless the transfer has failed or is DONE; an error ends this transfer only."""
    if state.message or state.transfer.progress is MoveProgress.DONE:
        return state
    try:
        return act(store, state)
    except DestinationError as error:
        return replace(state, message=str(error))
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        return replace(state, message=f"the store refused it: {getattr(error, 'strerror', None) or error}")


def _find(store: ObjectStore, state: _State) -> _State:
    """Check the source, and for a transfer that had begun, what is at its destination."""
    transfer = state.transfer
    if transfer.source == transfer.destination and transfer.progress is not None:
        raise DestinationError(f"{JOURNAL} is damaged: {transfer.source} is its own destination")
    if transfer.progress is not None and _has_bytes(store, transfer.destination, transfer.sha256):
        return state.at(MoveProgress.PUBLISHED, version=_version_with_bytes(store, transfer))
    found = _version_with_bytes(store, transfer)
    if found is None:
        message = "the object is gone" if store.version(transfer.source) is None else "the object changed"
        return replace(state.at(None), is_dropped=True, message=message)
    return state.at(None, version=found)


def _version_with_bytes(store: ObjectStore, transfer: Transfer) -> ObjectVersion | None:
    """Return the version of the source if it has the decided bytes."""
    found = store.version(transfer.source)
    return found if found is not None and _has_bytes(store, transfer.source, transfer.sha256) else None


def _has_bytes(store: ObjectStore, path: str, sha256: str) -> bool:
    return _sha256_of_object(store, path) == sha256


def _sha256_of_object(store: ObjectStore, path: str) -> str | None:
    digest = hashlib.sha256()
    try:
        for chunk in store.chunks(path):
            digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _named(store: ObjectStore, journal: TransferJournal, state: _State, promised: set[str]) -> _State:
    """Choose a free destination for a transfer that begins."""
    transfer = state.transfer
    if transfer.progress is not None:
        return state
    stem, suffix = posixpath.splitext(transfer.destination)
    for name in (transfer.destination, f"{stem} ({transfer.id[:8]}){suffix}", f"{stem} ({transfer.id}){suffix}"):
        if name not in promised and not journal.is_promised(name, transfer) and store.is_free(name):
            promised.add(name)
            return replace(state, transfer=replace(transfer, destination=name, progress=MoveProgress.INTENDED))
    raise DestinationError(f"{transfer.destination}: this name and those with its id are taken")


def _copy(store: ObjectStore, state: _State) -> _State:
    transfer = state.transfer
    if transfer.progress is not MoveProgress.INTENDED:
        return state
    store.copy(transfer.source, transfer.destination)
    made = store.version(transfer.destination)
    is_equal = made is not None and made == state.version and bool(made.etag)
    if is_equal or _has_bytes(store, transfer.destination, transfer.sha256):
        return state.at(MoveProgress.PUBLISHED)
    copied = _sha256_of_object(store, transfer.destination)
    if copied is not None and _has_bytes(store, transfer.source, copied):
        store.delete(transfer.destination)  # our copy of a later version; anything else is of another program
    return state.at(None, is_dropped=True, message="the object changed while it was copied")


def _delete(store: ObjectStore, state: _State) -> _State:
    transfer = state.transfer
    found = store.version(transfer.source)
    if found is not None and state.version is not None:
        has_changed = found != state.version if found.etag else not _has_bytes(store, transfer.source, transfer.sha256)
        if not has_changed:
            store.delete(transfer.source)
    return state.at(MoveProgress.DONE)
