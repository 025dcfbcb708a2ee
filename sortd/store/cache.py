"""The cache of embeddings by content and encoder, contents by stamp, and the last prototypes.

Everything here can be computed again, so no error of the cache stops sortd. A row with a wrong checksum is ignored; a
damaged file is renamed and replaced by an empty one, a deleted file is created again; on a full disk sortd works
without a cache. Each problem is reported once, and again only after a successful write. A cache is used by one thread;
other processes may use the same file.

Prototypes are files, not rows: those of 100,000 references are 200 MB, which SQLite would write twice.
"""

import hashlib
import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from sortd.arrays import FloatArray
from sortd.classify.prototypes import PrototypeSet
from sortd.events import Stamp
from sortd.files import identity_of, read_regular, write_atomic

CACHE_FILE, PROTOTYPES_FOLDER = "embeddings.sqlite", "prototypes"  # in the cache directory
MAX_BYTES = 1_000_000_000  # about 450,000 embeddings of 512 dimensions
DAY_SECONDS = 86_400
_BUSY_SECONDS = 5.0
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}

_INVALID_ROW = (ValueError, TypeError, AttributeError, LookupError, OverflowError)
"""Errors raised by rows that sortd did not write: a SQLite column may have any value, for example after a bit flip."""

_LOG = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

SCHEMA_VERSION = 2
PRUNED_SHARE = 0.2  # of the rows, the oldest: pruning is rare, and the size stays near the limit
KEYS_A_QUERY = 500  # below the smallest default limit of SQLite on parameters

_SCHEMA = """
CREATE TABLE IF NOT EXISTS encoders (number INTEGER PRIMARY KEY, encoder_id TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS embeddings (
    encoder INTEGER NOT NULL, content BLOB NOT NULL, vector BLOB NOT NULL, checksum INTEGER NOT NULL,
    used_day INTEGER NOT NULL, PRIMARY KEY (encoder, content)
);
CREATE INDEX IF NOT EXISTS embeddings_by_age ON embeddings (used_day);
CREATE TABLE IF NOT EXISTS contents (
    inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, device INTEGER NOT NULL,
    path BLOB NOT NULL, content BLOB NOT NULL, ctime_ns INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (inode, size, mtime_ns, device)
) WITHOUT ROWID;
"""

_ENCODER_NUMBER = """
INSERT INTO encoders (encoder_id) VALUES (?) ON CONFLICT DO UPDATE SET encoder_id = excluded.encoder_id RETURNING number
"""

_FROM_1 = "ALTER TABLE contents ADD COLUMN ctime_ns INTEGER NOT NULL DEFAULT 0;"

KIND = b"sortd prototypes "
MAGIC = KIND + b"3"
"""The first bytes of a file; the number increases when a prototype set gets other arrays or metadata."""
MOST_BYTES = 4 << 30
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """The numbers of rows and the size of a cache."""

    embeddings: int
    contents: int
    size_bytes: int


class Cache:
    """Embeddings, contents and prototypes in one folder."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        report: Callable[[str], None] = _LOG.warning,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the cache.

        Args:
            path: the SQLite file; prototypes are in a folder beside it.
            max_bytes: size limit of the file, above which the least recently used rows are removed.
            report: called with one sentence about each problem and what was done.
            clock: seconds since the epoch, for the age of rows.
        """
        self._path, self._max_bytes, self._report, self._clock = path, max_bytes, report, clock
        self._database: sqlite3.Connection | None = None
        self._files: tuple[tuple[int, int] | None, ...] = ()
        self._reported: set[str] = set()
        self.prototypes = PrototypeFiles(path.parent / PROTOTYPES_FOLDER, self._report_once)
        self._run(lambda _: None, None)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the file; idempotent."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):  # whatever was not written can be computed again
                database.close()

    def contents(self, images: Sequence[tuple[str, Stamp]]) -> dict[tuple[str, Stamp], str]:
        """Return the known contents (hexadecimal sha256) of these file versions, given by path and stamp.

        They have no checksum: a damaged one is a content without an embedding.
        """
        query = "SELECT path, content, ctime_ns FROM contents WHERE (inode, size, mtime_ns, device) = (?, ?, ?, ?)"

        def read(database: sqlite3.Connection) -> dict[tuple[str, Stamp], str]:
            found = {}
            for path, stamp in images:
                row = database.execute(query, _key(stamp)).fetchone()
                if row is not None and _is_same(path, stamp, row[0], row[2]):
                    found[path, stamp] = row[1].hex()
            return found

        return self._run(read, {})

    def remember_contents(self, contents: Mapping[tuple[str, Stamp], str]) -> None:
        """Store the contents (hexadecimal sha256) of file versions."""
        insert = "REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?)"

        def write(database: sqlite3.Connection) -> None:
            rows = [
                (*_key(stamp), os.fsencode(path), bytes.fromhex(content), stamp.ctime_ns)
                for (path, stamp), content in contents.items()
            ]
            database.executemany(insert, rows)

        self._run(write, None)

    def embeddings(self, contents: Collection[str], encoder_id: str) -> dict[str, FloatArray]:
        """Return the known embeddings of one encoder by content, each read-only float32 (d,), and mark them as used."""
        today = self._today()

        def read(database: sqlite3.Connection) -> dict[str, FloatArray]:
            found: dict[str, FloatArray] = {}
            stale = []
            wanted = [bytes.fromhex(content) for content in contents]
            for start in range(0, len(wanted), KEYS_A_QUERY):
                rows = _rows_of(database, encoder_id, wanted[start : start + KEYS_A_QUERY])
                for encoder, key, vector, checksum, used_day in rows:
                    if checksum != _checksum(encoder_id, key, vector):
                        continue  # it will be computed again and overwritten
                    found[key.hex()] = np.frombuffer(vector, "<f4")
                    if used_day != today:
                        stale.append((today, encoder, key))
            if stale:
                # On a read-only or full disk the rows are still returned, only their age is not updated.
                with suppress(sqlite3.OperationalError):
                    database.executemany("UPDATE embeddings SET used_day = ? WHERE encoder = ? AND content = ?", stale)
            return found

        return self._run(read, {})

    def remember_embeddings(self, embeddings: Mapping[str, FloatArray], encoder_id: str) -> None:
        """Store embeddings by content (hexadecimal sha256); above the size limit the oldest rows are removed."""
        today = self._today()

        def write(database: sqlite3.Connection) -> None:
            # The update changes nothing; it makes RETURNING give the number of a row that was there as well.
            (encoder,) = database.execute(_ENCODER_NUMBER, (encoder_id,)).fetchone()
            rows = []
            for content, embedding in embeddings.items():
                key, vector = bytes.fromhex(content), np.ascontiguousarray(embedding, "<f4").tobytes()
                rows.append((encoder, key, vector, _checksum(encoder_id, key, vector), today))
            database.executemany("REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?)", rows)
            if _size(database) > self._max_bytes:
                _prune(database)

        self._run(write, None)

    def facts(self) -> CacheFacts:
        """Return the numbers of rows and the size."""

        def read(database: sqlite3.Connection) -> CacheFacts:
            (embeddings,) = database.execute("SELECT count(*) FROM embeddings").fetchone()
            (contents,) = database.execute("SELECT count(*) FROM contents").fetchone()
            return CacheFacts(embeddings, contents, _size(database))

        return self._run(read, CacheFacts(0, 0, 0))

    def _run(self, operation: Callable[[sqlite3.Connection], _Answer], otherwise: _Answer) -> _Answer:
        """Run an operation in a transaction and return its result; return ``otherwise`` after an error."""
        for _ in range(2):
            try:
                database = self._open()
                before = database.total_changes
                with database:
                    answer = operation(database)
            except (sqlite3.Error, *_INVALID_ROW) as error:
                if not self._was_replaced(error):
                    return otherwise
            except OSError as error:
                self._report_once(f"the cache {self._path} cannot be used: {error.strerror}; sortd works without it")
                return otherwise
            else:
                if database.total_changes > before:  # reading succeeds on a full disk as well
                    self._reported.clear()
                return answer
        return otherwise

    def _was_replaced(self, error: Exception) -> bool:
        """Rename a damaged file, so that the operation can be repeated on a new one; report any other error."""
        self.close()
        if not isinstance(error, _INVALID_ROW) and getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BROKEN:
            self._report_once(f"the cache {self._path} cannot be used: {error}; sortd works without it until it can")
            return False
        aside = self._path.with_name(self._path.name + ".broken")
        with suppress(OSError):  # if it cannot be renamed, opening it again fails, which is reported
            self._path.replace(aside)
            for suffix in ("-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._report_once(f"the cache {self._path} is damaged ({error}): renamed to {aside.name}, a new one begins")
        return True

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self._report(message)

    def _open(self) -> sqlite3.Connection:
        """Return the connection, reopened if the file was removed or replaced."""
        if self._database is not None and self._files == self._identities():
            return self._database
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            _prepare(database)
        except sqlite3.Error:
            database.close()
            raise
        self._database, self._files = database, self._identities()
        return database

    def _identities(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(identity_of(f"{self._path}{suffix}") for suffix in ("", "-wal"))

    def _today(self) -> int:
        return int(self._clock() // DAY_SECONDS)


def _prepare(database: sqlite3.Connection) -> None:
    """Create missing tables.

    Raises:
        sqlite3.Error: the file is damaged, or has another version (code SQLITE_SCHEMA).
    """
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version == 1:  # its rows stay valid
        database.executescript(f"BEGIN IMMEDIATE; {_FROM_1} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        return
    if version != 0:
        error = sqlite3.DatabaseError(f"it has schema {version} of another version of sortd")
        error.sqlite_errorcode = sqlite3.SQLITE_SCHEMA
        raise error
    database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _key(stamp: Stamp) -> tuple[int, int, int, int]:
    device, inode, size, mtime_ns = stamp.columns
    return inode, size, mtime_ns, device


def _is_same(path: str, stamp: Stamp, known_path: bytes, known_ctime_ns: int) -> bool:
    """Tell whether a stored content is that of this file version.

    A file that was renamed, or changed and given its old mtime, has another ctime and is read again. If a ctime is
    unknown, mtime identifies the version; where mtime has whole seconds, the path must be equal as well.
    """
    if 0 not in {known_ctime_ns, stamp.ctime_ns} and known_ctime_ns != stamp.ctime_ns:
        return False
    return bool(stamp.mtime_ns % 1_000_000_000) or os.fsencode(path) == known_path


def _rows_of(database: sqlite3.Connection, encoder_id: str, keys: Sequence[bytes]) -> sqlite3.Cursor:
    marks = ",".join("?" * len(keys))
    columns = "SELECT encoder, content, vector, checksum, used_day FROM embeddings"
    query = f"{columns} JOIN encoders ON number = encoder WHERE encoder_id = ? AND content IN ({marks})"
    return database.execute(query, (encoder_id, *keys))


def _prune(database: sqlite3.Connection) -> None:
    """Remove the least recently used rows; SQLite reuses their space."""
    (rows,) = database.execute("SELECT count(*) FROM embeddings").fetchone()
    oldest = "SELECT rowid FROM embeddings ORDER BY used_day, rowid LIMIT ?"
    database.execute(f"DELETE FROM embeddings WHERE rowid IN ({oldest})", (max(1, int(rows * PRUNED_SHARE)),))  # noqa: S608 - constants
    database.execute("DELETE FROM contents WHERE content NOT IN (SELECT content FROM embeddings)")


def _size(database: sqlite3.Connection) -> int:
    (pages,), (free,), (size,) = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _checksum(encoder_id: str, content: bytes, vector: bytes) -> int:
    """Return a checksum of a vector with its key, which detects a vector under a wrong key, too."""
    return zlib.crc32(vector, zlib.crc32(content, zlib.crc32(encoder_id.encode())))


class PrototypeFiles:
    """A folder with one file of prototypes for each key."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        """Use ``folder``, which is created when needed; ``report`` is called with each problem."""
        self._folder, self._report = folder, report

    def read(self, key: str) -> PrototypeSet | None:
        """Return the last prototypes of a key; None if there are none or they are damaged."""
        file = self._file(key)
        try:
            content = read_regular(file, limit=MOST_BYTES)
            return PrototypeSet.from_arrays(*unpacked(content))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report(f"the cached prototypes {file} cannot be read: {error.strerror}; sortd builds new ones")
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # damaged, or of an older version
            self._report(f"the cached prototypes {file} cannot be used ({error}); sortd builds new ones")
        return None

    def written_at_ns(self, key: str) -> int:
        """Return when the prototypes of a key were written, in nanoseconds since the epoch; 0 if there are none."""
        try:
            return self._file(key).stat().st_mtime_ns
        except OSError:
            return 0

    def write(self, key: str, prototypes: PrototypeSet) -> None:
        """Replace the prototypes of a key atomically."""
        file = self._file(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, packed(*prototypes.to_arrays()), durable=False)
        except OSError as error:
            self._report(f"the prototypes cannot be cached in {file}: {error.strerror}; the next start builds new ones")

    def remove(self, key: str) -> None:
        """Remove the prototypes of a key, if any."""
        file = self._file(key)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._report(f"the cached prototypes {file} cannot be removed: {error.strerror}")

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / f"{name}.prototypes"


def packed(arrays: dict[str, Array], metadata: dict[str, Any]) -> bytes:
    """Return arrays of numbers and JSON-serialisable metadata as bytes: a line of JSON, then safetensors."""
    from safetensors.numpy import save

    tensors = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    body = b"\n".join([json.dumps(metadata).encode("ascii"), tensors])
    return b"\n".join([MAGIC, hashlib.sha256(body).hexdigest().encode(), body])


def unpacked(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reverse ``packed``.

    Raises:
        ValueError: a byte differs from what was written, or another version of sortd wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    magic, checksum, body = [*content.split(b"\n", 2), b"", b""][:3]
    if magic != MAGIC and magic.startswith(KIND):
        raise ValueError("another version of sortd wrote them")
    if magic != MAGIC or hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("wrong checksum")
    metadata, _, tensors = body.partition(b"\n")
    try:
        return load(tensors), json.loads(metadata)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
