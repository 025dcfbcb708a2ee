"""The commands ``undo``, ``release`` and ``rebuild``.

They send a request to the running sortd, so only one process moves files; without one they take the dataset's lock.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sortd.commands.console import counted, load_config, print_json, print_line, printable, say
from sortd.commands.journals import JournalPlace, dataset_at, journals, narrowed
from sortd.config import Config
from sortd.daemon.assign import forget_made_classes
from sortd.daemon.control import ANSWER_SECONDS, NotRunningError, ask, release_reply, undo_facts, undo_records
from sortd.daemon.dataset_lock import inspect_dataset, open_dataset
from sortd.errors import DataError, SortdError
from sortd.layout import Layout, find_datasets
from sortd.store.history import History
from sortd.store.records import Record, Selection

SECONDS_FOR_EACH = 0.05
"""Additional time to wait for the answer, for each file to be undone."""

Chosen = Sequence[tuple[JournalPlace, Sequence[Record]]]


def undo_moves(
    path: Path | None,
    file: Path | None,
    *,
    last: int | None,
    dataset: str | None,
    dry_run: bool,
    as_json: bool,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> int:
    """Undo the moves that meet the conditions, print the result of each, and return the exit code."""
    config = load_config(path)
    chosen = _undoable(config, file, dataset, limit=1 if file is not None else last, **conditions)
    reply: Mapping[str, Any] = _undo(config, chosen, dry_run=dry_run) if chosen else {"undone": [], "later": 0}
    failed = sum(1 for one in reply["undone"] if one["restored"] is None)
    if as_json:
        print_json({**reply, "dry_run": dry_run})
    else:
        _print_undone(reply, dry_run=dry_run)
    return 65 if failed else 0


def _undoable(
    config: Config,
    path: Path | None,
    dataset: str | None,
    *,
    limit: int | None,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> Chosen:
    """Return the records to undo, newest first over all datasets; raise DataError if a path has none."""
    dataset, relative = narrowed(config, dataset, path)
    records: list[tuple[JournalPlace, Record]] = []
    for place in journals(config, dataset):
        if place.is_there and place.root is not None:
            with History.open(place.file) as history:
                here = history.moves(Selection(path=relative, undoable=True, limit=limit, **conditions))
            records += [(place, record) for record in here]
    if path is not None and not records:
        raise DataError(f"the journal has no move of {path} that can be undone; see `sortd history --path`")
    records.sort(key=lambda one: one[1].ended_at or 0.0, reverse=True)
    chosen: dict[str, tuple[JournalPlace, list[Record]]] = {}
    for place, record in records[:limit]:
        chosen.setdefault(place.dataset, (place, []))[1].append(record)
    return list(chosen.values())


def _undo(config: Config, chosen: Chosen, *, dry_run: bool) -> Mapping[str, Any]:
    """Send the request to the running sortd, or undo the moves in this process."""
    wanted = {
        place.dataset: {"root": str(place.root), "records": [record.id for record in records]}
        for place, records in chosen
    }
    number = sum(len(records) for _, records in chosen)
    request = {"do": "undo", "datasets": wanted, "dry_run": dry_run}
    reply = ask(config.state_dir, request, seconds=ANSWER_SECONDS + SECONDS_FOR_EACH * number)
    return _undo_here(config, chosen, dry_run=dry_run) if reply is None else reply


def _undo_here(config: Config, chosen: Chosen, *, dry_run: bool) -> Mapping[str, Any]:
    undone: list[dict[str, Any]] = []
    recovered = 0
    for place, records in chosen:
        assert place.root is not None
        layout = Layout(place.root)
        with inspect_dataset(layout, config.state_dir) if dry_run else open_dataset(layout, config.state_dir) as opened:
            identifiers = [record.id for record in records]
            for told, _ in undo_records(opened.mover, opened.journal.history, identifiers, dry_run=dry_run):
                undone += [undo_facts(place.dataset, layout, one) for one in told]
                if not dry_run:
                    forget_made_classes(layout, opened.journal, told)
            recovered += len(opened.recovered)
    return {"undone": undone, "later": 0, "recovered": recovered}


def _print_undone(reply: Mapping[str, Any], *, dry_run: bool) -> None:
    if reply.get("recovered"):
        say(f"sortd: first recovered {counted(reply['recovered'], 'move')} that a crash had interrupted")
    for one in reply["undone"]:
        if one["restored"] is None:
            print_line(f"not undone: {printable(one['message'])}", style="yellow")
            continue
        rest = f"  ({printable(one['message'])})" if one["message"] else ""
        print_line(f"{printable(one['was'])} -> {printable(one['restored'])}{rest}")
    done = sum(1 for one in reply["undone"] if one["restored"] is not None)
    images = counted(done, "image")
    if not reply["undone"] and not reply["later"]:
        say("sortd: there is nothing to undo")
    elif dry_run:
        say(f"sortd: {images} would be moved back; nothing was changed")
    elif not done:
        say("sortd: no image was moved back" + (" yet" if reply["later"] else ""))
    else:
        say(f"sortd: {images} moved back, and held until they change or are released: sortd release --all")
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} still to be copied back from another file system")


def release_files(path: Path | None, file: Path | None, *, dataset: str | None, as_json: bool) -> None:
    """Release a held file or dataset, or all if ``file`` is None, and print what was released."""
    reply = _release(load_config(path), file, dataset)
    if as_json:
        print_json(reply)
    else:
        _print_released(reply)


def _print_released(reply: Mapping[str, Any]) -> None:
    released, lifted, still_held = (reply.get(key, {}) for key in ("released", "lifted", "still_held"))
    for name, number in released.items():
        print_line(f"{printable(name)}: {counted(number, 'held file')} released")
    for name, reason in lifted.items():
        print_line(f"{printable(name)}: the dataset is released; it was held because {reason}")
    for name, reason in still_held.items():
        say(f"sortd: the dataset {printable(name)} is still held, so nothing in it is moved: {reason}")
    if not any(released.values()) and not lifted and not still_held:
        say("sortd: nothing is held")


def _release(config: Config, path: Path | None, dataset: str | None) -> Mapping[str, Any]:
    """Send the request to the running sortd, or release in this process; raise DataError if the path is not held."""
    absolute = None
    if path is not None:
        dataset, absolute = _held_place(config, path)
    names = None if dataset is None else [dataset]
    asked = ask(config.state_dir, {"do": "release", "datasets": names, "path": absolute})
    reply = _release_here(config, dataset, absolute) if asked is None else asked
    if absolute is not None and not any(reply["released"].values()) and not reply.get("lifted"):
        raise DataError(f"{absolute} is not held")
    return reply


def _held_place(config: Config, path: Path) -> tuple[str, str]:
    """Return the dataset that a path is or lies in, and the path below its root; raise DataError if there is none."""
    for layout in find_datasets(config.root):
        if os.path.realpath(path) == os.path.realpath(layout.root):
            return layout.name, os.fspath(layout.root)
    found = dataset_at(config, path)
    if found is None:
        raise DataError(f"{path} lies in no dataset below {config.root}")
    return found[0].name, f"{found[0].root}/{found[1]}"


def _release_here(config: Config, dataset: str | None, absolute: str | None) -> Mapping[str, Any]:
    """Release under the lock of each dataset; an error of one dataset is raised after the others are done."""
    released: dict[str, int] = {}
    lifted: dict[str, str] = {}
    still_held: dict[str, str] = {}
    refusal = None
    for place in journals(config, dataset):
        if not place.is_there or place.root is None:
            continue
        is_whole = absolute == str(place.root)
        try:
            with open_dataset(Layout(place.root), config.state_dir) as opened:
                guard = opened.journal.history.guard()
                released[place.dataset] = 0 if is_whole else opened.mover.release(absolute)
                if guard.reason and (absolute is None or is_whole):
                    opened.journal.note_guard(guard.released())
                    lifted[place.dataset] = guard.reason
                elif guard.reason:
                    still_held[place.dataset] = guard.reason
        except SortdError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return release_reply(released, lifted, still_held)


def ask_to_rebuild(path: Path | None, dataset: str | None, *, force: bool, as_json: bool) -> None:
    """Request new prototypes from the running sortd; raise NotRunningError if there is none."""
    asked = {"do": "rebuild", "datasets": None if dataset is None else [dataset], "force": force}
    reply = ask(load_config(path).state_dir, asked)
    if reply is None:
        raise NotRunningError("no sortd runs; it builds its prototypes when it starts: sortd run, or sortd once")
    if as_json:
        print_json(reply)
    else:
        names = ", ".join(map(printable, reply["rebuilding"]))
        print_line(f"rebuilding: {names or 'nothing, there is no dataset'}")
        say("sortd: the result is in `sortd status` and in the log (prototypes.rebuilt)")
