"""The cache: embeddings by content and encoder, contents by stamp, the last prototypes; all can be made again.

So nothing here ever stops sortd. A row whose checksum does not fit is as if it were not there; a broken file is set
aside and begun anew; a deleted one too, even while it is open; a full disk means working without. Each is reported
once, and again only after things went well in between. One thread uses a cache; other processes may read and write.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sortd.caching import tables
from sortd.caching.stored_prototypes import PrototypeFiles
from sortd.caching.tables import CacheFacts
from sortd.events import FloatArray, Stamp
from sortd.prototypes import PrototypeSet

MAX_BYTES = 1_000_000_000
"""About 450,000 embeddings of 512 dimensions."""

DAY_SECONDS = 86_400
BUSY_SECONDS = 5.0
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}

_OF_ODD_ROWS = (ValueError, TypeError, AttributeError, LookupError, OverflowError)
"""What rows raise that sortd did not write: SQLite lets any column hold anything, also after a flipped bit."""

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """Return the content (hexadecimal sha256) of each of these versions of files that was read before."""
        return self._run(lambda database: tables.contents(database, images), {})

    def remember_contents(self, contents: Mapping[tuple[str, Stamp], str]) -> None:
        """Remember what these versions of files hold, as hexadecimal sha256."""
        self._run(lambda database: tables.insert_contents(database, contents), None)

    def embeddings(self, contents: Collection[str], encoder_id: str) -> dict[str, FloatArray]:
        """Return the known embeddings, float32 (d,) each and read-only, by content, of one encoder."""
        return self._run(lambda database: tables.embeddings(database, contents, encoder_id, self._today()), {})

    def remember_embeddings(self, embeddings: Mapping[str, FloatArray], encoder_id: str) -> None:
        """Remember embeddings by content (hexadecimal sha256); beyond the size limit the oldest rows go."""
        today, limit = self._today(), self._max_bytes
        self._run(lambda database: tables.insert_embeddings(database, embeddings, encoder_id, today, limit), None)

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
        return self._run(tables.facts, CacheFacts(0, 0, 0))

    # ------------------------------------------------------------ one operation

    def _run(self, operation: Callable[[sqlite3.Connection], Answer], otherwise: Answer) -> Answer:
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
        database = sqlite3.connect(self._path, timeout=BUSY_SECONDS)
        try:
            tables.prepare(database)
        except sqlite3.Error:
            database.close()
            raise
        self._database, self._files = database, self._standing()
        return database

    def _standing(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_identity(f"{self._path}{suffix}") for suffix in ("", "-wal"))

    def _today(self) -> int:
        return int(self._clock() // DAY_SECONDS)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
