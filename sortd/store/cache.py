"""The cache: embeddings by content and encoder, contents by stamp, the last prototypes; all can be made again.

So nothing here ever stops sortd. A row whose checksum does not fit is as if it were not there; a broken file is set
aside and begun anew; a deleted one too, even while it is open; a full disk means working without. Each is reported
once, and again only after things went well in between. One thread uses a cache; other processes may read and write.

The last prototypes are files, not rows: those of 100,000 references are 200 MB, which SQLite would write twice.
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

MAX_BYTES = 1_000_000_000  # about 450,000 embeddings of 512 dimensions

DAY_SECONDS = 86_400
_BUSY_SECONDS = 5.0
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}

_OF_ODD_ROWS = (ValueError, TypeError, AttributeError, LookupError, OverflowError)
"""What rows raise that sortd did not write: SQLite lets any column hold anything, also after a flipped bit."""

_LOG = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

SCHEMA_VERSION = 2
PRUNED_SHARE = 0.2  # of the rows, the oldest: pruning is rare, and never far from the limit
KEYS_A_QUERY = 500  # below SQLite's oldest limit on parameters

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

_FROM_1 = "ALTER TABLE contents ADD COLUMN ctime_ns INTEGER NOT NULL DEFAULT 0;"

KIND = b"sortd prototypes "
MAGIC = KIND + b"2"
"""What a file begins with: its number is raised when a prototype set has other arrays or facts than before."""
MOST_BYTES = 4 << 30
KINDS = "biufU"  # what an array may hold: numbers and text, no Python objects
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a cache holds."""

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
        """Open, or begin, the cache.

        Args:
            path: the SQLite file; prototypes lie in a folder beside it.
            max_bytes: what the file may grow to; beyond it the rows that were not used for longest go.
            report: is told, a sentence each, what went wrong and what was done about it.
            clock: seconds since the epoch, for the age of rows.
        """
        self._path, self._max_bytes, self._report, self._clock = path, max_bytes, report, clock
        self._database: sqlite3.Connection | None = None
        self._files: tuple[tuple[int, int] | None, ...] = ()
        self._told: set[str] = set()
        self._prototypes = PrototypeFiles(path.parent / "prototypes", self._tell)
        self._run(lambda _: None, None)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):  # whatever was not written can be made again
                database.close()

    # ------------------------------------------------------------ what is remembered

    def contents(self, images: Sequence[tuple[str, Stamp]]) -> dict[tuple[str, Stamp], str]:
        """Return the content (hexadecimal sha256) of each of these versions of files that was read before.

        They carry no checksum: one that is damaged names a content that no embedding has.
        """
        query = "SELECT path, content, ctime_ns FROM contents WHERE (inode, size, mtime_ns, device) = (?, ?, ?, ?)"

        def read(database: sqlite3.Connection) -> dict[tuple[str, Stamp], str]:
            found = {}
            for path, stamp in images:
                row = database.execute(query, _key(stamp)).fetchone()
                if row is not None and _is_the_same(path, stamp, row[0], row[2]):
                    found[path, stamp] = row[1].hex()
            return found

        return self._run(read, {})

    def remember_contents(self, contents: Mapping[tuple[str, Stamp], str]) -> None:
        """Remember what these versions of files hold, as hexadecimal sha256."""
        insert = "REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?)"

        def write(database: sqlite3.Connection) -> None:
            rows = [
                (*_key(stamp), os.fsencode(path), bytes.fromhex(content), stamp.ctime_ns)
                for (path, stamp), content in contents.items()
            ]
            database.executemany(insert, rows)

        self._run(write, None)

    def embeddings(self, contents: Collection[str], encoder_id: str) -> dict[str, FloatArray]:
        """Return the known embeddings, float32 (d,) each and read-only, by content, of one encoder.

        Those whose checksums do not fit are left out; of the others it is noted that they were used today.
        """
        today = self._today()

        def read(database: sqlite3.Connection) -> dict[str, FloatArray]:
            encoder = _number(database, encoder_id)
            found: dict[str, FloatArray] = {}
            stale = []
            wanted = [bytes.fromhex(content) for content in contents] if encoder else []
            for start in range(0, len(wanted), KEYS_A_QUERY):
                for key, vector, checksum, used_day in _rows_of(
                    database, encoder, wanted[start : start + KEYS_A_QUERY]
                ):
                    if checksum != _checksum(encoder_id, key, vector):
                        continue  # as if it were not there: it is computed again and written over
                    found[key.hex()] = np.frombuffer(vector, "<f4")
                    if used_day != today:
                        stale.append((today, encoder, key))
            if stale:
                # A reader on a read-only or full disk still gets its rows; only their age is not noted.
                with suppress(sqlite3.OperationalError):
                    database.executemany("UPDATE embeddings SET used_day = ? WHERE encoder = ? AND content = ?", stale)
            return found

        return self._run(read, {})

    def remember_embeddings(self, embeddings: Mapping[str, FloatArray], encoder_id: str) -> None:
        """Remember embeddings by content (hexadecimal sha256); beyond the size limit the oldest rows go."""
        today = self._today()

        def write(database: sqlite3.Connection) -> None:
            database.execute("INSERT OR IGNORE INTO encoders (encoder_id) VALUES (?)", (encoder_id,))
            encoder = _number(database, encoder_id)
            rows = []
            for content, embedding in embeddings.items():
                key, vector = bytes.fromhex(content), np.ascontiguousarray(embedding, "<f4").tobytes()
                rows.append((encoder, key, vector, _checksum(encoder_id, key, vector), today))
            database.executemany("REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?)", rows)
            if _size(database) > self._max_bytes:
                _prune(database)

        self._run(write, None)

    def prototypes(self, key: str) -> PrototypeSet | None:
        """Return the prototypes that were remembered last under a key, or None."""
        return self._prototypes.read(key)

    def forget_prototypes(self, key: str) -> None:
        """Forget a dataset's prototypes: another dataset stands in its place."""
        self._prototypes.remove(key)

    def remember_prototypes(self, key: str, prototypes: PrototypeSet) -> None:
        """Remember a dataset's prototypes in place of the ones before."""
        self._prototypes.write(key, prototypes)

    def facts(self) -> CacheFacts:
        """Return what the cache holds."""

        def read(database: sqlite3.Connection) -> CacheFacts:
            (embeddings,) = database.execute("SELECT count(*) FROM embeddings").fetchone()
            (contents,) = database.execute("SELECT count(*) FROM contents").fetchone()
            return CacheFacts(embeddings, contents, _size(database))

        return self._run(read, CacheFacts(0, 0, 0))

    # ------------------------------------------------------------ one operation

    def _run(self, operation: Callable[[sqlite3.Connection], _Answer], otherwise: _Answer) -> _Answer:
        """Do one operation in a transaction; where the file does not let us, answer ``otherwise`` and go on."""
        for _ in range(2):
            try:
                database = self._open()
                before = database.total_changes
                with database:
                    answer = operation(database)
            except (sqlite3.Error, *_OF_ODD_ROWS) as error:
                if not self._is_mended(error):
                    return otherwise
            except OSError as error:
                self._tell(f"the cache {self._path} cannot be used: {error.strerror}; working without it")
                return otherwise
            else:
                if database.total_changes > before:  # reading goes well on a full disk too
                    self._told.clear()
                return answer
        return otherwise

    def _is_mended(self, error: Exception) -> bool:
        """Set a broken file aside, so that the operation can be tried on a new one; anything else is told and waits."""
        self.close()
        is_odd = isinstance(error, _OF_ODD_ROWS)
        if not is_odd and getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BROKEN:
            self._tell(f"the cache {self._path} cannot be used: {error}; working without it until it can")
            return False
        aside = self._path.with_name(self._path.name + ".broken")
        with suppress(OSError):  # if it cannot be moved, opening it again fails, and that is told
            self._path.replace(aside)
            for suffix in ("-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._tell(f"the cache {self._path} is damaged ({error}): set aside as {aside.name} and begun anew")
        return True

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._report(message)

    def _open(self) -> sqlite3.Connection:
        """Return the open file, opened anew where somebody took it away below us."""
        if self._database is not None and self._files == self._standing():
            return self._database
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            _prepare(database)
        except sqlite3.Error:
            database.close()
            raise
        self._database, self._files = database, self._standing()
        return database

    def _standing(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(identity_of(f"{self._path}{suffix}") for suffix in ("", "-wal"))

    def _today(self) -> int:
        return int(self._clock() // DAY_SECONDS)


def _prepare(database: sqlite3.Connection) -> None:
    """Make the tables where there are none.

    Raises:
        sqlite3.Error: the file is broken, or of another version (code SQLITE_SCHEMA).
    """
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version == 1:  # its rows are believed as they were
        database.executescript(f"BEGIN IMMEDIATE; {_FROM_1} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        return
    if version != 0:
        error = sqlite3.DatabaseError(f"made by another sortd, schema {version}")
        error.sqlite_errorcode = sqlite3.SQLITE_SCHEMA
        raise error
    database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _key(stamp: Stamp) -> tuple[int, int, int, int]:
    device, inode, size, mtime_ns = stamp.columns
    return inode, size, mtime_ns, device


def _is_the_same(path: str, stamp: Stamp, known_path: bytes, known_ctime_ns: int) -> bool:
    """Tell whether what was known is this version.

    A file that was renamed, or written with its old time put back, shows another time of change: it is read again.
    Where that is not known, another file with the same inode, size and mtime would need the same nanosecond, which
    happens only where times are whole seconds: there the name must be the same as well.
    """
    if 0 not in {known_ctime_ns, stamp.ctime_ns} and known_ctime_ns != stamp.ctime_ns:
        return False
    return bool(stamp.mtime_ns % 1_000_000_000) or os.fsencode(path) == known_path


def _rows_of(database: sqlite3.Connection, encoder: int, keys: Sequence[bytes]) -> sqlite3.Cursor:
    marks = ",".join("?" * len(keys))
    query = f"SELECT content, vector, checksum, used_day FROM embeddings WHERE encoder = ? AND content IN ({marks})"  # noqa: S608 - question marks only
    return database.execute(query, (encoder, *keys))


def _prune(database: sqlite3.Connection) -> None:
    """Let the rows go that were not used for longest; the space is used again."""
    (rows,) = database.execute("SELECT count(*) FROM embeddings").fetchone()
    doomed = max(1, int(rows * PRUNED_SHARE))
    database.execute(
        "DELETE FROM embeddings WHERE rowid IN (SELECT rowid FROM embeddings ORDER BY used_day, rowid LIMIT ?)",
        (doomed,),
    )
    database.execute("DELETE FROM contents WHERE content NOT IN (SELECT content FROM embeddings)")


def _number(database: sqlite3.Connection, encoder_id: str) -> int:
    row = database.execute("SELECT number FROM encoders WHERE encoder_id = ?", (encoder_id,)).fetchone()
    return 0 if row is None else int(row[0])


def _size(database: sqlite3.Connection) -> int:
    (pages,), (free,), (size,) = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _checksum(encoder_id: str, content: bytes, vector: bytes) -> int:
    """Tie a vector to its key: a row that slipped to another key is as wrong as a flipped bit."""
    return zlib.crc32(vector, zlib.crc32(content, zlib.crc32(encoder_id.encode())))


class PrototypeFiles:
    """A folder with one file for each key."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        """Keep files in ``folder``, which is made when it is needed; ``tell`` hears of what went wrong."""
        self._folder, self._tell = folder, tell

    def read(self, key: str) -> PrototypeSet | None:
        """Return what was written last, or None where there is nothing or it is damaged."""
        file = self._file(key)
        try:
            content = read_regular(file, limit=MOST_BYTES)
            return PrototypeSet.from_arrays(*unpacked(content))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"the cached prototypes {file} cannot be read: {error.strerror}; they are built anew")
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # damaged, or made by an older sortd
            self._tell(f"the cached prototypes {file} do not serve ({error}); they are built anew")
        return None

    def written_at_ns(self, key: str) -> int:
        """Return when a key's prototypes were written, in nanoseconds since the epoch; 0 where there are none."""
        try:
            return self._file(key).stat().st_mtime_ns
        except OSError:
            return 0

    def write(self, key: str, prototypes: PrototypeSet) -> None:
        """Replace what was written before; a reader sees the one or the other."""
        file = self._file(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, packed(*prototypes.to_arrays()), durable=False)
        except OSError as error:
            self._tell(f"the prototypes cannot be cached in {file}: {error.strerror}; the next start builds them anew")

    def remove(self, key: str) -> None:
        """Remove what was written; nothing written is no mistake."""
        file = self._file(key)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"the cached prototypes {file} cannot be removed: {error.strerror}")

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / f"{name}.prototypes"


def packed(arrays: dict[str, Array], metadata: dict[str, Any]) -> bytes:
    """Return arrays and JSON-able metadata as bytes.

    Raises:
        ValueError: An array holds something else than numbers and text.
    """
    parts, shapes = [], []
    for name, array in arrays.items():
        if array.dtype.kind not in KINDS:
            raise ValueError(f"array {name} holds {array.dtype}, which is neither numbers nor text")
        plain = np.ascontiguousarray(array)
        shapes.append([name, plain.dtype.str, list(array.shape)])
        parts.append(plain.tobytes())
    header = json.dumps({"arrays": shapes, "metadata": metadata}).encode("ascii")
    body = b"".join([f"{len(header)}\n".encode(), header, *parts])
    return b"\n".join([MAGIC, hashlib.sha256(body).hexdigest().encode(), body])


def unpacked(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return what ``packed`` took; the arrays are read-only views of ``content``.

    Raises:
        ValueError: A single byte differs from what was written, or another version of sortd wrote it.
    """
    magic, checksum, body = [*content.split(b"\n", 2), b"", b""][:3]
    if magic != MAGIC and magic.startswith(KIND):
        raise ValueError("another version of sortd wrote them")
    if magic != MAGIC or hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("the checksum does not fit")
    length, _, rest = body.partition(b"\n")
    header = json.loads(rest[: int(length)])
    arrays: dict[str, Array] = {}
    offset = int(length)
    for name, kind, shape in header["arrays"]:
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64))
        # Alignment is not given in the middle of bytes; BLAS wants it, so each array is copied once.
        arrays[name] = np.frombuffer(rest, dtype, count, offset).reshape(shape).copy()
        offset += count * dtype.itemsize
    return arrays, header["metadata"]
