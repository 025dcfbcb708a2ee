"""Collect the facts of ``sortd status`` from the status file, the journals and the folders."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sortd import errors
from sortd.commands.console import interval
from sortd.commands.journals import JournalPlace, journals
from sortd.commands.promotion import serving_facts
from sortd.config import Config
from sortd.daemon.reporting import LISTED
from sortd.errors import JournalError
from sortd.layout import Area, Layout, Reason, Why, owner_of, rule_below, rule_for_folder
from sortd.moving.fs import is_version
from sortd.service import read_status
from sortd.store.history import History
from sortd.store.records import FiledImages, Selection
from sortd.watch.scan import scan, scan_all, why_unfinished

Row = dict[str, str]
"""A file or folder that stays in Images/: its ``path``, ``reason`` and ``message``."""

STATUS_KEYS = (
    "pid", "version", "model", "encoder_id", "ready", "loading", "config_problem", "watching", "written_at", "ended_by",
)  # fmt: skip
NOT_KNOWN = {"deciding": "prototypes", "model_id": None, "refusal": None}
"""The classifier of a missing dataset, of which only the journal is known."""


def overview(config: Config, *, status: Callable[[Path], dict[str, Any] | None] = read_status) -> dict[str, Any]:
    """Return all facts as plain values; if no sortd runs or a dataset is not mounted, those of the journals."""
    last = status(config.state_dir)
    is_alive = last is not None and last["alive"]
    run: dict[str, Any] = {
        "running": is_alive,
        "ended": None if is_alive else _ended(last),
        "root": str(config.root),
        "state_dir": str(config.state_dir),
    }
    if last is not None:
        run |= {key: last.get(key) for key in STATUS_KEYS}
        run["started_at"] = _started_at(last.get("started_ticks")) if is_alive else None
        run["other_root"] = last["root"] if last.get("root") not in {None, str(config.root)} else None
    live = (last or {}).get("datasets", {})
    places = [place for place in journals(config) if place.root is not None or place.is_there]
    datasets = {
        place.dataset: _dataset(config, place, live.get(place.dataset, {}), is_alive=bool(is_alive))
        for place in reversed(places)
    }
    return run | {"datasets": dict(sorted(datasets.items()))}


def _ended(last: dict[str, Any] | None) -> str:
    """Return how the last run ended, according to its status file."""
    if last is None:
        return "never ran"
    return "died" if last.get("running") else "failed" if last.get("ended_by") else "stopped"


def _dataset(config: Config, place: JournalPlace, live: dict[str, Any], *, is_alive: bool) -> dict[str, Any]:
    """Return one dataset's facts; those that only a running sortd knows are missing if none runs."""
    facts: dict[str, Any] = {"root": None if place.root is None else str(place.root)}
    if not (is_alive and "classifier" in live):  # a running sortd reports the classifier that decides
        facts["classifier"] = NOT_KNOWN if place.root is None else serving_facts(config, Layout(place.root))
    if is_alive:
        facts |= live
    else:
        facts |= {key: live[key] for key in ("problem", "generation", "classes", "references", "mode") if key in live}
    journal, held = _from_journal(place)
    facts |= journal
    if place.root is not None:
        layout = Layout(place.root)
        facts["in_images"], left = _look_through(layout)
        facts["left"] = _left([*left, *held], facts.get("left"))
        facts["in_review"] = _count_review(layout)
    if not is_alive and facts.get("hold"):  # newer than the problem in the status file
        facts["problem"] = facts["hold"]
    return facts


def _from_journal(place: JournalPlace) -> tuple[dict[str, Any], list[Row]]:
    """Return the facts of a journal, and its held files that have not changed since."""
    facts: dict[str, Any] = {"total": {}, "held": 0, "last_move_at": None, "accuracy": {}}
    if not place.is_there:
        return facts, []
    try:
        with History.open(place.file) as history:
            last, held = history.moves(Selection(limit=1)), history.held()
            facts = {
                "total": history.counts(),
                "held": len(held),
                "hold": history.guard().reason or None,
                "last_move_at": last[0].ended_at if last else None,
                "accuracy": {label: _filed_facts(filed) for label, filed in history.accuracy().items()},
            }
    except JournalError as error:
        return facts | {"journal_problem": str(error)}, []
    rows = []
    for relative, mark in held.items():
        path = f"{place.root}/{relative}"
        with suppress(OSError):
            if is_version(os.lstat(path), mark):
                rows.append(
                    _row(
                        path,
                        Reason.HELD,
                        "it is held after an undo until it changes or is released: sortd release PATH",
                    )
                )
    return facts, rows


def _filed_facts(filed: FiledImages) -> dict[str, Any]:
    """Return the counts of a class as plain values, with the precision and its interval if some images are checked."""
    if not filed.checked:
        return {**asdict(filed), "right": None, "interval": None}
    bounds = tuple(round(bound, 4) for bound in interval(filed.right, filed.checked))
    return {**asdict(filed), "right": round(filed.right / filed.checked, 4), "interval": bounds}


def _look_through(layout: Layout) -> tuple[int | None, list[Row]]:
    """Return the number of files in Images/ to sort, or None if it cannot be listed, and the entries that stay."""
    images, root = os.fspath(layout.area(Area.IMAGES)), os.fspath(layout.root)
    refused: list[OSError] = []
    count, rows, owners = 0, [], set()
    for path, found in scan_all(images, report=refused.append):
        if isinstance(found, Why):
            rows.append(_row(path, found.reason, found.message))
            if (owner := owner_of(path)) is not None:
                owners.add(owner)
        else:
            count += 1
    for owner in sorted(owners):
        why = why_unfinished(owner, root) if os.path.lexists(owner) and not rule_below(owner, root) else None
        if why is not None:
            rows.append(_row(owner, why.reason, why.message))
            count -= os.path.isfile(owner)
    rows += [_row(error.filename, "unreadable", errors.unreadable(error)) for error in refused]
    is_listed = images not in {error.filename for error in refused}
    return count if is_listed else None, rows


def _left(rows: Sequence[Row], live: Mapping[str, Any] | None) -> dict[str, Any]:
    """Count the entries that stay in Images/ by reason: the rows of this scan, and those of the running sortd."""
    seen = {row["path"] for row in rows}
    looked_into: list[Row] = [] if live is None else live["files"]
    reasons = Counter(row["reason"] for row in rows)
    reasons.update({} if live is None else live["reasons"])
    reasons.subtract(row["reason"] for row in looked_into if row["path"] in seen)
    files = [*rows, *(row for row in looked_into if row["path"] not in seen)]
    counted = {reason: count for reason, count in sorted(reasons.items()) if count > 0}
    return {"total": sum(counted.values()), "reasons": counted, "files": files[:LISTED]}


def _row(path: str, reason: str, message: str) -> Row:
    return {"path": path, "reason": str(reason), "message": message}


def _count_review(layout: Layout) -> int | None:
    """Return the number of files in Review/, or None if it cannot be listed."""
    refused: list[OSError] = []
    review = os.fspath(layout.area(Area.REVIEW))
    count = sum(1 for _ in scan(review, report=refused.append, rule_at_top=rule_for_folder))
    return None if refused else count


def _started_at(ticks: int | None) -> float | None:
    """Convert clock ticks since boot (see proc_pid_stat(5)) to seconds since the epoch."""
    if ticks is None:
        return None
    with open("/proc/stat", encoding="ascii", errors="replace") as lines:
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime"))
    return booted + ticks / os.sysconf("SC_CLK_TCK")
