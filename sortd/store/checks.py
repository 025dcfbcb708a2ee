"""What a person has checked, as the journal knows it: the table, its queries and their results.

A filed image is checked if an audit drew it and was answered, if a person corrected it or took it back, or if a person
did so with a later image of its class: whoever does has looked at that class. An image that an audit found wrong is no
sign of a look at its class. Images in Review/ are apart: a correction whose two labels are equal confirms their guess.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sortd.events import LIKE_NO_CLASS

if TYPE_CHECKING:
    import sqlite3

TABLE = """checks (
    move INTEGER PRIMARY KEY REFERENCES moves (id) ON DELETE CASCADE,
    is_right INTEGER NOT NULL,
    at REAL NOT NULL
) STRICT"""
"""The answers of audits, of filed images."""
PRUNED_TABLE = """pruned (
    outcome TEXT NOT NULL,
    label BLOB NOT NULL,
    images INTEGER NOT NULL,
    filed INTEGER NOT NULL,
    checked INTEGER NOT NULL,
    PRIMARY KEY (outcome, label)
) STRICT, WITHOUT ROWID"""
"""How many moves were removed because of their age; of these, the filed images, and those that count as checked."""

SAME_CONTENT = "substr(content, 1, 16) = substr(?, 1, 16) AND +content = ? AND content != ''"
"""The condition of a move of a content, which is given twice; the index has the start of each. Without the plus, the
planner replaces ``content`` in the first term by the value, and scans the table."""

# CROSS JOIN keeps the planner from reading all filed images: https://www.sqlite.org/optoverview.html.
_FILED = (
    "+moves.progress = 'done' AND +moves.outcome IN ('filed', 'refiled') AND moves.id NOT IN (SELECT id FROM replaced)"
)
"""The condition of a filed image; one that a later decision moved to another class counts there only."""
_REPLACED = """WITH replaced AS (
    SELECT moves.id AS id FROM moves AS refiled CROSS JOIN moves
        ON substr(moves.content, 1, 16) = substr(refiled.content, 1, 16) AND moves.content = refiled.content
        AND moves.content != '' AND moves.id < refiled.id
    WHERE refiled.progress = 'done' AND refiled.outcome = 'refiled' AND refiled.undone_by IS NULL
)"""
_LOOKED = f"""{_REPLACED}, acted AS (
    SELECT corrections.move AS move, corrections.at AS at, 1 AS is_corrected FROM corrections
    UNION ALL
    SELECT undoes, ended_at, 0 FROM moves WHERE progress = 'done' AND outcome = 'undone'
        AND undoes NOT IN (SELECT move FROM corrections)
), looked AS (
    SELECT moves.label AS label, max(acted.at) AS at FROM acted CROSS JOIN moves ON moves.id = acted.move
    WHERE {_FILED} AND moves.id NOT IN (SELECT move FROM checks) GROUP BY moves.label
)"""  # noqa: S608 - our own words only
_JUDGED = f"""{_LOOKED}, checked AS (
    SELECT move AS id FROM checks UNION SELECT move FROM acted UNION
    SELECT recent.id FROM {{recent}} JOIN looked ON looked.label = recent.label
    WHERE {{newest}} AND recent.progress = 'done' AND recent.ended_at <= looked.at
), judged AS (
    SELECT moves.id AS id, moves.label AS label, moves.mode AS mode, moves.score AS score,
        checks.move IS NOT NULL AS audited,
        ifnull(acted.is_corrected, 0) AS corrected, ifnull(1 - acted.is_corrected, 0) AS undone,
        acted.move IS NULL AND ifnull(checks.is_right, 1) = 0 AS found_wrong
    FROM checked CROSS JOIN moves ON moves.id = checked.id LEFT JOIN checks ON checks.move = checked.id
        LEFT JOIN acted ON acted.move = checked.id
    WHERE {_FILED}
) """  # noqa: S608 - our own words only
_NEWEST = "recent.id > (SELECT max(id) FROM moves) - 20000"  # the loop of the daemon waits for this query
_ACCURACY = f"""SELECT label, count(*) - count(id) AS filed, count(id) AS checked, total(audited) AS audited,
    total(audited AND corrected + undone + found_wrong = 0) AS audited_right,
    total(corrected) AS corrected, total(undone) AS undone, total(found_wrong) AS found_wrong
FROM (SELECT * FROM judged UNION ALL SELECT NULL, label, NULL, NULL, 0, 0, 0, 0 FROM moves WHERE {_FILED})
GROUP BY label"""  # noqa: S608 - our own words only
ACCURACY = f"""{_JUDGED.format(recent="moves AS recent", newest="TRUE")}
SELECT label, sum(filed) AS filed, sum(checked) AS checked, sum(audited) AS audited,
    sum(audited_right) AS audited_right, sum(corrected) AS corrected, sum(undone) AS undone,
    sum(found_wrong) AS found_wrong
FROM ({_ACCURACY} UNION ALL SELECT nullif(label, x''), filed, checked, 0, 0, 0, 0, 0 FROM pruned WHERE filed > 0)
GROUP BY label ORDER BY label"""  # noqa: S608 - our own words only
COUNTS = """SELECT outcome, sum(n) AS n FROM (
    SELECT outcome, count(*) AS n FROM moves WHERE progress = 'done' GROUP BY outcome
    UNION ALL SELECT outcome, images FROM pruned
) GROUP BY outcome"""
LOOKED = f"""{_LOOKED} SELECT label, at FROM looked WHERE label IS NOT NULL"""  # noqa: S608 - our own words only
"""When a person last looked at each class: its images that were filed before count as checked."""
IS_REPLACED = f"""SELECT 1 FROM moves WHERE {SAME_CONTENT} AND id > ?
AND +progress = 'done' AND +outcome = 'refiled' AND undone_by IS NULL"""  # noqa: S608 - our own words only
ADD_PRUNED = """INSERT INTO pruned VALUES (?, ?, 1, ?, ?) ON CONFLICT (outcome, label) DO UPDATE SET
images = images + 1, filed = filed + excluded.filed, checked = checked + excluded.checked"""
NEWEST_CHECKED = f"""{_JUDGED.format(recent="moves AS recent NOT INDEXED", newest=_NEWEST)}
SELECT score, audited, corrected + undone > 0 AS acted, corrected + undone + found_wrong = 0 AS is_right
FROM judged WHERE mode = ? AND score IS NOT NULL ORDER BY id DESC LIMIT ?"""  # noqa: S608 - our own words only
TO_AUDIT = f"""{_REPLACED}
SELECT id FROM moves WHERE {_FILED} AND undone_by IS NULL
AND id NOT IN (SELECT move FROM corrections) AND id NOT IN (SELECT move FROM checks)"""  # noqa: S608 - our own words only
_LIKE_NO_CLASS = ", ".join(f"'{reason}'" for reason in sorted(LIKE_NO_CLASS))
GUESSES = f"""SELECT total(is_right) AS confirmed, count(*) AS judged FROM (
    SELECT corrections.label IS corrections.corrected
        OR corrections.corrected = ?1 AND moves.reason IN ({_LIKE_NO_CLASS}) AS is_right
    FROM corrections JOIN moves ON moves.id = corrections.move WHERE moves.outcome = 'sent_to_review'
    UNION ALL
    SELECT guessed IS assigned OR assigned = ?1 AND reason IN ({_LIKE_NO_CLASS}) FROM (
        SELECT guess.label AS guessed, guess.reason AS reason, moves.label AS assigned, max(guess.id) FROM moves
            JOIN members ON members.move = moves.id AND members.position = 0
            JOIN members AS put ON put.final = members.name AND put.position = 0 AND put.moved_inode = members.inode
            JOIN moves AS guess ON guess.id = put.move AND guess.destination = moves.source
        WHERE moves.progress = 'done' AND moves.outcome = 'assigned' AND moves.undone_by IS NULL
            AND guess.outcome = 'sent_to_review' GROUP BY moves.id
    )
)"""  # noqa: S608 - our own words only
"""Saying that an image is of no class confirms the decision that it looks like none. An image that was sent to Review/
twice counts once: as bare columns beside ``max``, its label and reason are the newest."""

GIVEN_SINCE = """WITH assigned AS (
    SELECT moves.id, ended_at, moved_inode, CAST(destination || '/' || final AS BLOB) AS path
    FROM moves JOIN members ON members.move = moves.id AND position = 0
    WHERE ended_at >= ?1 - 3600 AND +progress = 'done' AND +outcome = 'assigned' AND undone_by IS NULL
)
SELECT 'assigned' AS how, count(DISTINCT moved_inode) AS images FROM assigned
WHERE ended_at >= ?1 AND id NOT IN (SELECT move FROM corrections)
UNION ALL
SELECT iif(corrected = label, 'confirmed', 'corrected') AS how, count(*) FROM corrections
WHERE at >= ?1 AND path NOT IN (SELECT path FROM assigned) GROUP BY how"""
"""An image that a person corrected by a request counts as assigned only; its correction was recorded soon after. The
open pages ask once a second, so that older moves must not be read."""

BY_DAY = """SELECT date(quarter * 900, 'unixepoch', 'localtime') AS day, outcome, sum(images) AS n FROM (
    SELECT CAST(ended_at / 900 AS INTEGER) AS quarter, outcome, count(*) AS images FROM moves
    WHERE ended_at >= ? AND +progress = 'done' AND undone_by IS NULL GROUP BY quarter, outcome
) GROUP BY day, outcome ORDER BY day"""
"""By quarters of an hour first, at which local days begin everywhere, since ``date`` is slow."""
FILED_AT = """SELECT destination, final, ended_at FROM members JOIN moves ON moves.id = members.move
WHERE final IN ({}) AND position = 0 AND +progress = 'done' AND undone_by IS NULL
AND +outcome IN ('filed', 'refiled') ORDER BY ended_at"""


@dataclass(frozen=True, slots=True)
class FiledImages:
    """How many images filed into one class a person has checked, and what was wrong with them."""

    filed: int
    checked: int
    corrected: int  # moved to another class by a person
    undone: int  # by ``sortd undo``
    found_wrong: int = 0  # by ``sortd audit``, and neither corrected nor undone
    audited: int = 0  # checked in a random sample
    audited_right: int = 0

    @property
    def right(self) -> int:
        """The number of checked images that were not found to be wrong."""
        return self.checked - self.corrected - self.undone - self.found_wrong


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A filed image that a person has checked."""

    score: float
    is_audited: bool
    is_acted_on: bool  # corrected or undone
    is_right: bool


def let_read_without_checks(connection: "sqlite3.Connection") -> None:
    """Let the queries run on a journal that was written before there were the tables of this module."""
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    missing = [table for table in (TABLE, PRUNED_TABLE) if table.partition(" ")[0] not in found]
    if missing:
        connection.execute("PRAGMA temp_store = MEMORY")
    for table in missing:
        connection.execute(f"CREATE TEMP TABLE {table}")
