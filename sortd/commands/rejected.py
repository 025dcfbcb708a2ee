"""Rejected images: which there are and why, and trying them again."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from sortd.commands.console import counted, say, show
from sortd.commands.moves import dataset_at, files_in, journal_of, print_moves, release_held, undo_records_of
from sortd.config import Config
from sortd.daemon.corrections import put_there
from sortd.files import read_regular
from sortd.layout import Area, Layout
from sortd.store.records import Record

REASON_ENDING = ".reason.json"
MOST_WRITTEN = 500
"""Characters of the reason in a file, which anybody may have written."""
UNKNOWN = "sortd did not put it there"
GONE = "it is not there"


def rejected_images(config: Config, layout: Layout) -> list[dict[str, Any]]:
    """Return the images in Rejected/ with the reason, newest first, as plain values.

    Returns:
        For each image ``path``, ``size`` and ``mtime_ns`` as they are now, ``reason``, ``from`` (the former path),
        ``at`` (Unix seconds) and ``id`` of its move; the last three are None for an image that the journal does not
        know. Companions of images are not among them.

    Raises DataError: Rejected/ cannot be read; JournalError.
    """
    files = files_in(layout.area(Area.REJECTED))
    records = _rejections(config, layout, [path for path, _ in files])
    beside = {
        f"{layout.root}/{one.move.destination}/{file.final}" for one in records.values() for file in one.move.files
    }
    found: list[dict[str, Any]] = []
    for path, mark in files:
        record = records.get(path)
        if record is None and (path in beside or path.endswith(REASON_ENDING)):
            continue
        facts = {"path": path, "size": mark.size, "mtime_ns": mark.mtime_ns, "reason": _written_reason(path)}
        if record is None:
            found.append({**facts, "from": None, "at": None, "id": None})
        else:
            former = f"{layout.root}/{record.source_path}"
            facts["reason"] = record.move_reason.reason
            found.append({**facts, "from": former, "at": record.ended_at, "id": record.id})
    return sorted(found, key=lambda one: (one["at"] or 0.0, one["path"]), reverse=True)


def _rejections(config: Config, layout: Layout, paths: Sequence[str]) -> dict[str, Record]:
    """Return the moves by which sortd put images where they are in Rejected/, by path."""
    found = dict[str, Record]()
    with journal_of(config, layout).open() as history:
        for path in paths:
            folder, _, name = path.removeprefix(f"{layout.root}/").rpartition("/")
            if (put := put_there(history, folder, name)) is not None:
                found[path] = put
    return found


def _written_reason(path: str) -> str:
    """Return the reason in the file beside an image; empty without a valid one."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads(read_regular(Path(f"{path}{REASON_ENDING}")))["reason"])[:MOST_WRITTEN]
    return ""


def retry_rejected(config: Config, layout: Layout, paths: Sequence[Path | str]) -> dict[str, Any]:
    """Let rejected images be tried again: undo the rejection, and release each in Images/.

    If this is interrupted in between, the image is in Images/ and held; ``sortd release`` releases it.

    Returns:
        ``retried``: for each image ``path``, ``restored`` (None: it was not moved back) and ``message``; ``later``: how
        many are still to be copied back from another file system, and held then.

    Raises:
        SortdError: the dataset is not there, or another sortd works on it.
    """
    places = list(dict.fromkeys(os.fspath(path) for path in paths))
    records = _rejections(config, layout, places)
    identifiers = {record.id: path for path, record in records.items()}
    reply = undo_records_of(config, layout, list(identifiers))
    retried = [
        {"path": path, "restored": None, "message": f"{path}: {UNKNOWN if os.path.lexists(path) else GONE}"}
        for path in places
        if path not in records
    ]
    for one in reply["undone"]:
        if one["restored"] is not None:
            release_held(config, layout.name, one["restored"])
        if one["id"] in identifiers:  # otherwise a companion that followed the image
            retried.append({"path": identifiers[one["id"]], "restored": one["restored"], "message": one["message"]})
    return {"retried": retried, "later": reply["later"]}


def retry_if_rejected(config: Config, path: Path, *, as_json: bool) -> None:
    """Let a file in Rejected/ be tried again, print where it is and exit, with 65 if it was not moved back."""
    found = dataset_at(config, path)
    if found is None or not found[1].startswith(f"{Area.REJECTED}/"):
        return
    layout, relative = found
    reply = retry_rejected(config, layout, [f"{layout.root}/{relative}"])
    show(reply, _print_retried, as_json=as_json)
    raise typer.Exit(65 if any(one["restored"] is None for one in reply["retried"]) else 0)


def _print_retried(reply: Mapping[str, Any]) -> None:
    done = print_moves(((one["path"], one["restored"], one["message"]) for one in reply["retried"]), "not tried again")
    say(f"sortd: {counted(done, 'image')} moved back, to be tried again")
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} still to be copied back, and held then: sortd release --all")
