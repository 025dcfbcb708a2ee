"""The cache's tables and what is asked of them; every function works in the transaction of its caller."""

import os
import sqlite3
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sortd.events import FloatArray, Stamp

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


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a cache holds."""

    embeddings: int
    contents: int
    size_bytes: int


def prepare(database: sqlite3.Connection) -> None:
    """Make the tables where there are none.

    Raises:
        sqlite3.Error: The file is broken, or of another version (code SQLITE_SCHEMA).
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


def contents(database: sqlite3.Connection, images: Sequence[tuple[str, Stamp]]) -> dict[tuple[str, Stamp], str]:
    """Return the known contents, as hexadecimal sha256.

    They carry no checksum: one that is damaged names a content that no embedding has.
    """
    query = "SELECT path, content, ctime_ns FROM contents WHERE inode = ? AND size = ? AND mtime_ns = ? AND device = ?"
    found = {}
    for path, stamp in images:
        row = database.execute(query, _key(stamp)).fetchone()
        if row is not None and _is_the_same(path, stamp, row[0], row[2]):
            found[path, stamp] = row[1].hex()
    return found


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


def embeddings(
    database: sqlite3.Connection, contents: Collection[str], encoder_id: str, today: int
) -> dict[str, FloatArray]:
    """Return the known embeddings of one encoder whose checksums fit, and note that they were used today."""
    encoder = _number(database, encoder_id)
    found: dict[str, FloatArray] = {}
    stale = []
    wanted = [bytes.fromhex(content) for content in contents] if encoder else []
    for start in range(0, len(wanted), KEYS_A_QUERY):
        keys = wanted[start : start + KEYS_A_QUERY]
        marks = ",".join("?" * len(keys))
        rows = database.execute(
            f"SELECT content, vector, checksum, used_day FROM embeddings WHERE encoder = ? AND content IN ({marks})",  # noqa: S608 - question marks only
            (encoder, *keys),
        )
        for key, vector, checksum, used_day in rows:
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


def insert_contents(database: sqlite3.Connection, contents: Mapping[tuple[str, Stamp], str]) -> None:
    """Write what versions of files hold."""
    rows = [
        (*_key(stamp), os.fsencode(path), bytes.fromhex(content), stamp.ctime_ns)
        for (path, stamp), content in contents.items()
    ]
    database.executemany("REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def insert_embeddings(
    database: sqlite3.Connection, embeddings: Mapping[str, FloatArray], encoder_id: str, today: int, max_bytes: int
) -> None:
    """Write embeddings, and let old ones go where the tables outgrow ``max_bytes``."""
    database.execute("INSERT OR IGNORE INTO encoders (encoder_id) VALUES (?)", (encoder_id,))
    encoder = _number(database, encoder_id)
    rows = []
    for content, embedding in embeddings.items():
        key, vector = bytes.fromhex(content), np.ascontiguousarray(embedding, "<f4").tobytes()
        rows.append((encoder, key, vector, _checksum(encoder_id, key, vector), today))
    database.executemany("REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?)", rows)
    if _size(database) > max_bytes:
        _prune(database)


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


def facts(database: sqlite3.Connection) -> CacheFacts:
    """Return what the tables hold."""
    (embeddings,) = database.execute("SELECT count(*) FROM embeddings").fetchone()
    (contents,) = database.execute("SELECT count(*) FROM contents").fetchone()
    return CacheFacts(embeddings, contents, _size(database))


def _checksum(encoder_id: str, content: bytes, vector: bytes) -> int:
    """Tie a vector to its key: a row that slipped to another key is as wrong as a flipped bit."""
    return zlib.crc32(vector, zlib.crc32(content, zlib.crc32(encoder_id.encode())))
