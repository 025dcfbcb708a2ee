"""The commands that ask for something: ``undo``, ``release`` and ``rebuild``.

While a sortd runs they ask it, so that one process moves files; where none runs, they do it under the dataset's lock.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sortd.commands.console import (
    ConfigOption,
    DatasetOption,
    JsonOption,
    SinceOption,
    UntilOption,
    counted,
    load_config,
    moment_option,
    print_json,
    print_line,
    printable,
    say,
)

if TYPE_CHECKING:
    from sortd.commands.journals import JournalPlace
    from sortd.config import Config
    from sortd.journaling.records import Record

SECONDS_FOR_EACH = 0.05
"""How much longer than usual an asker waits for each file that is to be put back."""

Chosen = Sequence[tuple["JournalPlace", Sequence["Record"]]]


def undo(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    path: Annotated[
        Path | None, typer.Argument(help="A file where sortd put it, or the place that it came from.")
    ] = None,
    config: ConfigOption = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="The last so many moves.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="All of one run; `sortd history` names the runs.")] = None,
    dataset: DatasetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and touch nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put images back to where they were, and hold them there until they change or are released."""
    ways = [path is not None, last is not None, since is not None or until is not None, run is not None]
    if sum(ways) == 0:
        raise typer.BadParameter("say what: a PATH, --last N, --since or --until, or --run")
    if sum(ways) > 1 and (path is not None or last is not None):
        raise typer.BadParameter("a PATH and --last stand alone; --since, --until and --run go together")
    loaded = load_config(config)
    conditions = {"since": moment_option("--since", since), "until": moment_option("--until", until), "run": run}
    chosen = _undoable(loaded, path, dataset, limit=1 if path is not None else last, **conditions)
    reply: Mapping[str, Any] = _undo(loaded, chosen, dry_run=dry_run) if chosen else {"undone": [], "later": 0}
    failed = sum(1 for one in reply["undone"] if one["restored"] is None)
    if as_json:
        print_json({**reply, "dry_run": dry_run})
    else:
        _print_undone(reply, dry_run=dry_run)
    raise typer.Exit(65 if failed else 0)


def _undoable(
    config: "Config",
    path: Path | None,
    dataset: str | None,
    *,
    limit: int | None,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> Chosen:
    """Choose the records to undo, newest first over all datasets.

    Raises:
        DataError: the journal knows nothing of the path.
    """
    from sortd.commands.journals import journals, narrowed
    from sortd.errors import DataError
    from sortd.journaling.history import History
    from sortd.journaling.records import Selection

    dataset, relative = narrowed(config, dataset, path)
    records: list[tuple[JournalPlace, Record]] = []
    for place in journals(config, dataset):
        if place.is_there and place.root is not None:
            with History.open(place.file) as history:
                here = history.moves(Selection(path=relative, undoable=True, limit=limit, **conditions))
            records += [(place, record) for record in here]
    if path is not None and not records:
        raise DataError(f"the journal knows of no move of {path} that could be undone; see `sortd history --path`")
    records.sort(key=lambda one: one[1].ended_at or 0.0, reverse=True)
    chosen: dict[str, tuple[JournalPlace, list[Record]]] = {}
    for place, record in records[:limit]:
        chosen.setdefault(place.dataset, (place, []))[1].append(record)
    return list(chosen.values())


def _undo(config: "Config", chosen: Chosen, *, dry_run: bool) -> Mapping[str, Any]:
    """Ask the sortd that runs, or undo it here."""
    from sortd.daemon.control import ANSWER_SECONDS, ask

    wanted = {
        place.dataset: {"root": str(place.root), "records": [record.id for record in records]}
        for place, records in chosen
    }
    number = sum(len(records) for _, records in chosen)
    request = {"do": "undo", "datasets": wanted, "dry_run": dry_run}
    reply = ask(config.state_dir, request, seconds=ANSWER_SECONDS + SECONDS_FOR_EACH * number)
    return _undo_here(config, chosen, dry_run=dry_run) if reply is None else reply


def _undo_here(config: "Config", chosen: Chosen, *, dry_run: bool) -> Mapping[str, Any]:
    from sortd.daemon.control import put_back, put_back_facts
    from sortd.layout import Layout
    from sortd.running.holding import hold, look_at

    undone: list[dict[str, Any]] = []
    recovered = 0
    for place, records in chosen:
        assert place.root is not None
        layout = Layout(place.root)
        with look_at(layout, config.state_dir) if dry_run else hold(layout, config.state_dir) as holding:
            identifiers = [record.id for record in records]
            for told, _ in put_back(holding.filing, holding.journal.history, identifiers, dry_run=dry_run):
                undone += [put_back_facts(place.dataset, layout, one) for one in told]
            recovered += len(holding.recovered)
    return {"undone": undone, "later": 0, "recovered": recovered}


def _print_undone(reply: Mapping[str, Any], *, dry_run: bool) -> None:
    if reply.get("recovered"):
        say(f"sortd: first recovered {counted(reply['recovered'], 'move')} that a crash had cut short")
    for one in reply["undone"]:
        if one["restored"] is None:
            print_line(f"not put back: {printable(one['message'])}", style="yellow")
            continue
        rest = f"  ({printable(one['message'])})" if one["message"] else ""
        print_line(f"{printable(one['was'])} -> {printable(one['restored'])}{rest}")
    done = sum(1 for one in reply["undone"] if one["restored"] is not None)
    if not reply["undone"] and not reply["later"]:
        say("sortd: there is nothing to undo")
    elif dry_run:
        say(f"sortd: {counted(done, 'image')} would be put back; nothing was touched")
    elif not done:
        say("sortd: no image was put back" + (" yet" if reply["later"] else ""))
    else:
        say(
            f"sortd: {counted(done, 'image')} put back, and held until they change or are released: sortd release --all"
        )
    if reply["later"]:
        say(f"sortd: {counted(reply['later'], 'image')} more are being copied back from another file system")


def release(
    path: Annotated[
        Path | None, typer.Argument(help="A held file, or the folder of a dataset that the guard holds.")
    ] = None,
    config: ConfigOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every held file, and every dataset that the guard holds.")
    ] = False,
    dataset: DatasetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let files that an undo holds, and datasets that the guard holds, be decided and moved again."""
    if (path is None) != everything:
        raise typer.BadParameter("say which: a PATH, or --all")
    loaded = load_config(config)
    reply = _release(loaded, path, dataset)
    if as_json:
        print_json(reply)
    else:
        _print_released(reply)


def _print_released(reply: Mapping[str, Any]) -> None:
    released, lifted, still_held = (reply.get(key, {}) for key in ("released", "lifted", "still_held"))
    for name, number in released.items():
        print_line(f"{printable(name)}: {counted(number, 'held file')} released")
    for name, reason in lifted.items():
        print_line(f"{printable(name)}: the hold of the whole dataset is lifted, which was held because {reason}")
    for name, reason in still_held.items():
        say(f"sortd: {printable(name)} stays held as a whole, so nothing moves there yet: {reason}")
    if not any(released.values()) and not lifted and not still_held:
        say("sortd: nothing is held")


def _release(config: "Config", path: Path | None, dataset: str | None) -> Mapping[str, Any]:
    """Ask the sortd that runs, or release here.

    Raises:
        DataError: the path lies in no dataset, or nothing holds it.
    """
    from sortd.daemon.control import ask
    from sortd.errors import DataError

    absolute = None
    if path is not None:
        dataset, absolute = _held_place(config, path)
    names = None if dataset is None else [dataset]
    asked = ask(config.state_dir, {"do": "release", "datasets": names, "path": absolute})
    reply = _release_here(config, dataset, absolute) if asked is None else asked
    if absolute is not None and not any(reply["released"].values()) and not reply.get("lifted"):
        raise DataError(f"{absolute} is not held")
    return reply


def _held_place(config: "Config", path: Path) -> tuple[str, str]:
    """Return the dataset that a path is, or lies in, and the path as sortd spells it.

    Raises:
        DataError: it lies in no dataset.
    """
    from sortd.commands.journals import dataset_at
    from sortd.errors import DataError
    from sortd.layout import find_datasets

    for layout in find_datasets(config.root):
        if os.path.realpath(path) == os.path.realpath(layout.root):
            return layout.name, os.fspath(layout.root)
    found = dataset_at(config, path)
    if found is None:
        raise DataError(f"{path} lies in no dataset below {config.root}")
    return found[0].name, f"{found[0].root}/{found[1]}"


def _release_here(config: "Config", dataset: str | None, absolute: str | None) -> Mapping[str, Any]:
    from sortd.commands.journals import journals
    from sortd.daemon.control import release_reply
    from sortd.errors import SortdError
    from sortd.layout import Layout
    from sortd.running.holding import hold

    released: dict[str, int] = {}
    lifted: dict[str, str] = {}
    still_held: dict[str, str] = {}
    refusal = None
    for place in journals(config, dataset):
        if not place.is_there or place.root is None:
            continue
        is_whole = absolute == str(place.root)
        try:
            with hold(Layout(place.root), config.state_dir) as holding:
                guard = holding.journal.history.guard()
                released[place.dataset] = 0 if is_whole else holding.filing.release(absolute)
                if guard.reason and (absolute is None or is_whole):
                    holding.journal.note_guard(guard.released())
                    lifted[place.dataset] = guard.reason
                elif guard.reason:
                    still_held[place.dataset] = guard.reason
        except SortdError as error:  # of one dataset: the files of the others are released
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return release_reply(released, lifted, still_held)


def rebuild(
    dataset: Annotated[str | None, typer.Argument(help="Only this dataset.")] = None,
    config: ConfigOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take the new prototypes even where they look worse than the old ones.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let the sortd that runs learn its classes anew."""
    from sortd.daemon.control import NotRunningError, ask

    loaded = load_config(config)
    names = None if dataset is None else [dataset]
    reply = ask(loaded.state_dir, {"do": "rebuild", "datasets": names, "force": force})
    if reply is None:
        raise NotRunningError("no sortd runs; it learns its classes when it starts: sortd run, or sortd once")
    if as_json:
        print_json(reply)
    else:
        print_line(
            f"being built anew: {', '.join(map(printable, reply['rebuilding'])) or 'nothing, there is no dataset'}"
        )
        say("sortd: see how it went in `sortd status` or the log (prototypes.rebuilt)")
