"""The overview that ``sortd status`` shows: what the running sortd tells, and what the journals know in any case."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sortd.commands.console import interval
from sortd.commands.journals import JournalPlace, journals
from sortd.commands.promotion import serving_facts
from sortd.config import Config
from sortd.errors import JournalError
from sortd.journaling.history import History
from sortd.journaling.records import FiledImages, Selection
from sortd.layout import Area, Layout
from sortd.status import read_status
from sortd.watching.scanning import scan

NOT_KNOWN = {"deciding": "prototypes", "model_id": None, "refusal": None}
"""Who decides a dataset that is gone: nobody, but its journal is told of in the same words."""


def overview(config: Config, *, status: Callable[[Path], dict[str, Any] | None] = read_status) -> dict[str, Any]:
    """Return everything as plain values.

    Works with no sortd running, and with the datasets not mounted: what the journals know is told then.
    """
    told = status(config.state_dir)
    is_alive = told is not None and told["alive"]
    run: dict[str, Any] = {
        "running": is_alive,
        "ended": None if is_alive else _ended(told),
        "root": str(config.root),
        "state_dir": str(config.state_dir),
    }
    if told is not None:
        kept = (
            "pid",
            "version",
            "model",
            "encoder_id",
            "ready",
            "loading",
            "config_problem",
            "watching",
            "written_at",
            "ended_by",
        )
        run |= {key: told.get(key) for key in kept}
        run["started_at"] = _started_at(told.get("started_ticks")) if is_alive else None
        run["other_root"] = told["root"] if told.get("root") not in {None, str(config.root)} else None
    live = (told or {}).get("datasets", {})
    places = [place for place in journals(config) if place.root is not None or place.is_there]
    run["datasets"] = {
        place.dataset: _dataset(config, place, live.get(place.dataset, {}), is_alive=bool(is_alive))
        for place in reversed(places)
    }
    run["datasets"] = dict(sorted(run["datasets"].items()))
    return run


def _ended(told: dict[str, Any] | None) -> str:
    """Return how the last run ended, by what its status file says."""
    if told is None:
        return "never ran"
    if told.get("running"):
        return "died"
    return "failed" if told.get("ended_by") else "stopped"


def _dataset(config: Config, place: JournalPlace, live: dict[str, Any], *, is_alive: bool) -> dict[str, Any]:
    """Return one dataset's facts; what only a running sortd knows is left out where none runs."""
    facts: dict[str, Any] = {"root": None if place.root is None else str(place.root)}
    if not (is_alive and "classifier" in live):  # what would decide; the sortd that runs knows what does
        facts["classifier"] = NOT_KNOWN if place.root is None else serving_facts(config, Layout(place.root))
    if is_alive:
        facts |= live
    else:
        facts |= {key: live[key] for key in ("problem", "generation", "classes", "references", "mode") if key in live}
    if place.root is not None:
        if not is_alive:  # the sortd that runs knows better, and Images/ may be large
            facts["in_images"] = _count(Layout(place.root), Area.IMAGES)
        facts["in_review"] = _count(Layout(place.root), Area.REVIEW)
    known = _from_journal(place)
    if not is_alive and known.get("hold"):  # whatever the last run could write about it
        facts["problem"] = known["hold"]
    return facts | known


def _from_journal(place: JournalPlace) -> dict[str, Any]:
    if not place.is_there:
        return {"total": {}, "held": 0, "last_move_at": None, "accuracy": {}}
    try:
        with History.open(place.file) as history:
            last = history.moves(Selection(limit=1))
            return {
                "total": history.counts(),
                "held": len(history.held()),
                "hold": history.guard().reason or None,
                "last_move_at": last[0].ended_at if last else None,
                "accuracy": {label: _filed_facts(filed) for label, filed in history.accuracy().items()},
            }
    except JournalError as error:
        return {"total": {}, "held": 0, "last_move_at": None, "accuracy": {}, "journal_problem": str(error)}


def _filed_facts(filed: FiledImages) -> dict[str, Any]:
    """Return a class's images as plain values; the share of right ones and its interval only where some are checked."""
    bounds = None if not filed.checked else tuple(round(bound, 4) for bound in interval(filed.right, filed.checked))
    share = None if not filed.checked else round(filed.right / filed.checked, 4)
    return {**asdict(filed), "right": share, "interval": bounds}


def _count(layout: Layout, area: Area) -> int | None:
    """Count the files of an area; None where it cannot be listed."""
    refused: list[OSError] = []
    count = sum(1 for _ in scan(os.fspath(layout.area(area)), report=refused.append))
    return None if refused else count


def _started_at(ticks: int | None) -> float | None:
    """Return when a process started, in seconds since the epoch; from clock ticks since boot, see proc_pid_stat(5)."""
    if ticks is None:
        return None
    with open("/proc/stat", encoding="ascii", errors="replace") as lines:
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime"))
    return booted + ticks / os.sysconf("SC_CLK_TCK")
