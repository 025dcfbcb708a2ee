"""The journals of all datasets, and the commands about moves: ``history``, ``undo``, ``release`` and ``rebuild``.

The last three send a request to the running sortd, so only one process moves files; without one, ``undo`` and
``release`` take the dataset's lock.
"""

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sortd.commands.console import counted, print_line, printable, say, show
from sortd.config import Config
from sortd.daemon.assign import forget_made_classes
from sortd.daemon.control import NotRunningError, ask, release_reply, undo_facts, undo_records
from sortd.daemon.dataset_lock import inspect_dataset, lock_dataset
from sortd.errors import DataError, LayoutError, SortdError, StartupError
from sortd.events import Stamp
from sortd.layout import JOURNAL_FILE, Layout, find_datasets
from sortd.store.history import History
from sortd.store.journal import LATER, SCHEMA
from sortd.store.records import Record, Selection
from sortd.watch.scan import whole_files

File = tuple[str, Stamp]
_STATE_FOLDER = re.compile(r"(.+)-[0-9a-f]{8}")
"""Form of the names that ``Layout.state_folder`` gives."""


@dataclass(frozen=True, slots=True)
class JournalPlace:
    """One dataset's journal."""

    dataset: str
    root: Path | None
    """The dataset's folder; None if it is missing or not mounted."""
    file: Path

    @property
    def is_there(self) -> bool:
        """Tell whether the dataset has ever been used with this state directory."""
        return self.file.is_file()

    @contextmanager
    def open(self) -> Iterator[History]:
        """Yield what the journal says; one that does not exist is empty. Raises JournalError."""
        with History.open(self.file) if self.is_there else _empty_history() as history:
            yield history

    def moves(self, selection: Selection) -> list[dict[str, object]]:
        """Return the selected moves, newest first, as ``record_facts`` returns them; raises JournalError."""
        with self.open() as history:
            return [record_facts(self, record) for record in history.moves(selection)]


def _empty_history() -> History:
    connection = sqlite3.connect(":memory:")
    connection.executescript(";\n".join((SCHEMA, *LATER)))
    return History(connection, Path(":memory:"))


def journal_of(config: Config, layout: Layout) -> JournalPlace:
    """Return the journal of a dataset that is there."""
    return JournalPlace(layout.name, layout.root, layout.state_folder(config.state_dir) / JOURNAL_FILE)


def journals(config: Config, dataset: str | None = None) -> list[JournalPlace]:
    """Return the journals of all datasets, or of one, by name; those of missing datasets come last.

    Raises DataError: there is no dataset of that name; StartupError: the state directory cannot be read.
    """
    if config.state_dir.exists() and not os.access(config.state_dir, os.R_OK | os.X_OK, effective_ids=True):
        raise StartupError(
            f"{config.state_dir} cannot be read; run the command as the user that runs sortd, or as root"
        )
    places = [journal_of(config, layout) for layout in datasets_there(config)]
    known = {place.file for place in places}
    places += [
        JournalPlace(named[1], None, file)
        for file in sorted(config.state_dir.glob(f"*/{JOURNAL_FILE}"))
        if file not in known and (named := _STATE_FOLDER.fullmatch(file.parent.name))
    ]
    if dataset is None:
        return places
    chosen = [place for place in places if place.dataset == dataset]
    if not chosen:
        there = ", ".join(sorted({place.dataset for place in places})) or "none"
        raise DataError(f"there is no dataset {dataset!r} in {config.root}; there are: {there}")
    return chosen


def datasets_there(config: Config) -> list[Layout]:
    """Return the datasets below the root; none if it cannot be listed, as when it is not mounted."""
    with suppress(LayoutError):
        return find_datasets(config.root)
    return []


def without_links(path: Path | str) -> str:
    """Return an absolute path whose folder has no symbolic links; the file may be gone."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def dataset_at(config: Config, path: Path) -> tuple[Layout, str] | None:
    """Return the dataset that a path lies in, and the relative path; None if it lies in none. Raises LayoutError."""
    for layout in find_datasets(config.root):
        for spelled in (os.path.abspath(path), without_links(path)):
            for root in (os.fspath(layout.root), os.path.realpath(layout.root)):
                if spelled.startswith(root + os.sep):
                    return layout, spelled.removeprefix(root + os.sep)
    return None


def files_in(folder: Path) -> list[File]:
    """Return the finished files below a folder, none if it is missing; raise DataError if it cannot be read."""
    refusals: list[OSError] = []
    files = whole_files(os.fspath(folder), report=refusals.append) if os.path.lexists(folder) else []
    if refusals:
        raise DataError(f"{refusals[0].filename} cannot be read: {refusals[0].strerror}")
    return files


def record_facts(place: JournalPlace, record: Record) -> dict[str, object]:
    """Return a record as plain values, its paths absolute where the dataset is there."""
    root = "" if place.root is None else f"{place.root}/"
    return {
        "id": record.id,
        "dataset": place.dataset,
        "run": record.run,
        "at": record.ended_at,
        **asdict(record.move_reason),
        "from": f"{root}{record.source_path}",
        "to": f"{root}{record.destination_path}",
        "size": record.move.image.stamp.size,
        "action": record.move.action,
        "companions": list(dict.fromkeys(file.final or file.name for file in record.move.files[1:])),
        "undone_by": record.undone_by,
        "lost": list(record.move.lost),
    }


def narrowed(config: Config, dataset: str | None, path: Path | None) -> tuple[str | None, str | None]:
    """Return the dataset to search and a path relative to it; raise DataError if the path lies in no dataset."""
    if path is None:
        return dataset, None
    found = dataset_at(config, path)
    if found is None:
        raise DataError(f"{path} lies in no dataset below {config.root}; name the present or a former path of the file")
    return found[0].name, found[1]


def relative_to_dataset(path: str) -> str:
    """Return a path relative to its dataset."""
    for area in ("/Images/", "/Dataset/", "/Review/", "/Rejected/"):
        if area in path:
            return path[path.index(area) + 1 :]
    return path


def undo_moves(
    config: Config,
    file: Path | None,
    *,
    last: int | None,
    dataset: str | None,
    dry_run: bool,
    as_json: bool,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> int:
    """Undo the moves that meet the conditions, print the result of each, and return the exit code."""
    chosen = _undoable(config, file, dataset, limit=1 if file is not None else last, **conditions)
    reply = _undo(config, chosen, dry_run=dry_run)
    failed = sum(1 for one in reply["undone"] if one["restored"] is None)
    show({**reply, "dry_run": dry_run}, _print_undone, as_json=as_json)
    return 65 if failed else 0


def _undoable(
    config: Config,
    path: Path | None,
    dataset: str | None,
    *,
    limit: int | None,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> list[tuple[Layout, list[int]]]:
    """Return the records to undo by dataset, the newest over all; raise DataError if a path has none."""
    dataset, relative = narrowed(config, dataset, path)
    records: list[tuple[Path, Record]] = []
    for place in journals(config, dataset):
        if place.root is not None:
            with place.open() as history:
                here = history.moves(Selection(path=relative, undoable=True, limit=limit, **conditions))
            records += [(place.root, record) for record in here]
    if path is not None and not records:
        raise DataError(f"the journal has no move of {path} that can be undone; see `sortd history --path`")
    records.sort(key=lambda one: one[1].ended_at or 0.0, reverse=True)
    chosen: dict[Path, list[int]] = {}
    for root, record in records[:limit]:
        chosen.setdefault(root, []).append(record.id)
    return [(Layout(root), identifiers) for root, identifiers in chosen.items()]


def undo_records_of(config: Config, layout: Layout, identifiers: Sequence[int]) -> dict[str, Any]:
    """Undo moves of a journal, by the running sortd or in this process; return the reply as ``daemon.control`` has it.

    Raises DataError: the journal has no such move; SortdError: the dataset is not there, or another sortd works on it.
    """
    return _undo(config, [(layout, identifiers)], dry_run=False)


def _undo(config: Config, chosen: Sequence[tuple[Layout, Sequence[int]]], *, dry_run: bool) -> dict[str, Any]:
    """Send the request to the running sortd, or undo the moves in this process."""
    wanted = {
        layout.name: {"root": str(layout.root), "records": list(records)} for layout, records in chosen if records
    }
    if not wanted:
        return {"undone": [], "later": 0}
    request = {"do": "undo", "datasets": wanted, "dry_run": dry_run}
    reply = ask(config.state_dir, request, images=sum(len(records) for _, records in chosen))
    return _undo_here(config, chosen, dry_run=dry_run) if reply is None else reply


def _undo_here(config: Config, chosen: Sequence[tuple[Layout, Sequence[int]]], *, dry_run: bool) -> dict[str, Any]:
    undone: list[dict[str, Any]] = []
    recovered = 0
    for layout, records in chosen:
        with inspect_dataset(layout, config.state_dir) if dry_run else lock_dataset(layout, config.state_dir) as opened:
            for told, _ in undo_records(opened.mover, opened.journal.history, records, dry_run=dry_run):
                undone += [undo_facts(layout.name, layout, one) for one in told]
                if not dry_run:
                    forget_made_classes(layout, opened.journal, told)
            recovered += len(opened.recovered)
    return {"undone": undone, "later": 0, "recovered": recovered}


def print_moves(moves: Iterable[tuple[str, str | None, str]], failed: str) -> int:
    """Print path, new path and message of each image, or that it ``failed`` and why; return how many were moved."""
    done = 0
    for path, destination, message in moves:
        if destination is None:
            print_line(f"{failed}: {printable(message)}", style="yellow")
        else:
            done += 1
            print_line(f"{printable(path)} -> {printable(destination)}" + (f"  ({printable(message)})" * bool(message)))
    return done


def _print_undone(reply: Mapping[str, Any]) -> None:
    if reply.get("recovered"):
        say(f"sortd: first recovered {counted(reply['recovered'], 'move')} that a crash had interrupted")
    done = print_moves(((one["was"], one["restored"], one["message"]) for one in reply["undone"]), "not undone")
    images = counted(done, "image")
    if not reply["undone"] and not reply["later"]:
        say("sortd: there is nothing to undo")
    elif reply["dry_run"]:
        say(f"sortd: {images} would be moved back; nothing was changed")
    elif not done:
        say("sortd: no image was moved back" + (" yet" if reply["later"] else ""))
    elif all(relative_to_dataset(one["restored"] or "Dataset/").startswith("Dataset/") for one in reply["undone"]):
        say(f"sortd: {images} moved back to the former class")
    else:
        say(f"sortd: {images} moved back, and held until they change or are released: sortd release --all")
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} still to be copied back from another file system")


def release_files(config: Config, file: Path | None, *, dataset: str | None, as_json: bool) -> None:
    """Release a held file or dataset, or all if ``file`` is None, and print what was released.

    The running sortd is asked; without one, this process does it. Raises DataError if the path is not held.
    """
    absolute = None
    if file is not None:
        dataset, absolute = _held_place(config, file)
    reply = release_held(config, dataset, absolute)
    if absolute is not None and not any(reply["released"].values()) and not reply.get("lifted"):
        raise DataError(f"{absolute} is not held")
    show(reply, _print_released, as_json=as_json)


def release_held(config: Config, dataset: str | None, absolute: str | None) -> Mapping[str, Any]:
    """Release a held file or dataset by its absolute path, or all, by the running sortd or in this process."""
    names = None if dataset is None else [dataset]
    asked = ask(config.state_dir, {"do": "release", "datasets": names, "path": absolute})
    return _release_here(config, dataset, absolute) if asked is None else asked


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
            with lock_dataset(Layout(place.root), config.state_dir) as opened:
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


def ask_to_rebuild(config: Config, dataset: str | None, *, force: bool, as_json: bool) -> None:
    """Request new prototypes from the running sortd; raise NotRunningError if there is none."""
    asked = {"do": "rebuild", "datasets": None if dataset is None else [dataset], "force": force}
    reply = ask(config.state_dir, asked)
    if reply is None:
        raise NotRunningError("no sortd runs; it builds its prototypes when it starts: sortd run, or sortd once")
    show(reply, _print_rebuilding, as_json=as_json)


def _print_rebuilding(reply: Mapping[str, Any]) -> None:
    names = ", ".join(map(printable, reply["rebuilding"]))
    print_line(f"rebuilding: {names or 'nothing, there is no dataset'}")
    say("sortd: the result is in `sortd status` and in the log (prototypes.rebuilt)")
