"""What the journal of a dataset says for the pages: the classes last used, the last runs, and what audits found."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sortd.layout import JOURNAL_FILE, Layout
from sortd.store.damage import translated
from sortd.store.history import open_for_reading
from sortd.store.records import label_from

RUNS_SHOWN = 20
NEWEST_MOVES = 20_000
"""The moves in which the last runs are looked for."""
NEWEST_ANSWERS = 500
"""The answers in which the classes last used are looked for."""

_LABELS = """SELECT label, max(id) AS newest FROM (
    SELECT label, id FROM moves WHERE progress = 'done' AND outcome = 'assigned' ORDER BY id DESC LIMIT ?
) WHERE label IS NOT NULL GROUP BY label ORDER BY newest DESC"""
_RUNS = """SELECT run, outcome, count(*) AS number, min(ended_at) AS first, max(ended_at) AS last,
    min(id) AS first_id, max(id) AS last_id,
    total(undone_by IS NULL AND outcome NOT IN ('undone', 'followed')) AS standing
FROM moves WHERE id > (SELECT max(id) FROM moves) - ? AND +progress = 'done' GROUP BY run, outcome"""
_FILED_BECAUSE = """SELECT id FROM moves WHERE ended_at >= ? AND generation > ? AND generation <= ?
AND +progress = 'done' AND +outcome = 'filed' AND undone_by IS NULL
AND (source = CAST('Review' AS BLOB) OR substr(source, 1, 7) = CAST('Review/' AS BLOB))"""
_WEEKS = """SELECT date(at, 'unixepoch', 'localtime', 'weekday 0', '-6 days') AS day, total(is_right) AS right,
    count(*) AS judged FROM checks GROUP BY day ORDER BY day DESC LIMIT ?"""
_WRONG = """SELECT move FROM checks WHERE is_right = 0 AND move NOT IN (SELECT move FROM corrections)
AND move NOT IN (SELECT id FROM moves WHERE undone_by IS NOT NULL) ORDER BY move DESC LIMIT ?"""


@dataclass(slots=True)
class RunSummary:
    """The moves of one run of sortd, among the newest ones."""

    run: str
    first: float  # seconds since the epoch
    last: float
    first_id: int  # in the journal
    last_id: int
    counts: dict[str, int] = field(default_factory=dict)  # by outcome
    standing: int = 0  # moves that can be undone


class Activity:
    """Queries of one dataset's journal for the pages; each raises JournalError if it cannot be read."""

    def __init__(self, state: Path, layout: Layout) -> None:
        """Name the journal, which need not exist; it is then as if empty."""
        self._file = layout.state_folder(state) / JOURNAL_FILE

    def recent_labels(self) -> list[str]:
        """Return the classes to which a person last assigned images, the last one first."""
        return [label_from(row["label"]) or "" for row in self._rows(_LABELS, NEWEST_ANSWERS)]

    def runs(self) -> list[RunSummary]:
        """Return the last runs, the newest first."""
        found: dict[str, RunSummary] = {}
        for row in self._rows(_RUNS, NEWEST_MOVES):
            facts = [row[name] for name in ("run", "first", "last", "first_id", "last_id")]
            run = found.setdefault(row["run"], RunSummary(*facts))
            run.first, run.last = min(run.first, row["first"]), max(run.last, row["last"])
            run.first_id, run.last_id = min(run.first_id, row["first_id"]), max(run.last_id, row["last_id"])
            run.counts[row["outcome"]] = row["number"]
            run.standing += int(row["standing"])
        return sorted(found.values(), key=lambda run: -run.last)[:RUNS_SHOWN]

    def checked_by_week(self, most: int) -> list[tuple[str, int, int]]:
        """Return the Monday, right and judged images of each of the last weeks with answers of audits, oldest first."""
        return [(row["day"], int(row["right"]), row["judged"]) for row in reversed(self._rows(_WEEKS, most))]

    def found_wrong(self, most: int) -> list[int]:
        """Return the newest moves whose images audits found wrong and nobody has corrected."""
        return [row["move"] for row in self._rows(_WRONG, most)]

    def filed_because(self, since: float, after: int, last: int) -> list[int]:
        """Return the moves that filed images of Review/ since a time, by a generation after one, up to the last."""
        return [row["id"] for row in self._rows(_FILED_BECAUSE, since, after, last)]

    def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:  # noqa: ANN401 - values of SQLite
        if not self._file.is_file():
            return []
        with translated(self._file), closing(open_for_reading(self._file)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(statement, values).fetchall()
