"""The command ``history``: the moves in the journals, and what a person made of them, newest first; and ``--prune``.

Records are read and printed one after the other: a journal may have millions.
"""

import csv
import heapq
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from time import time
from typing import Any

from sortd.commands.console import (
    counted,
    decimals,
    format_time,
    json_document,
    json_values,
    megabytes,
    print_line,
    print_table,
    printable,
    say,
    show,
)
from sortd.commands.moves import JournalPlace, journals, narrowed, record_facts, relative_to_dataset
from sortd.config import Config
from sortd.daemon.dataset_lock import inspect_dataset, lock_dataset
from sortd.daemon.learnt import CONFIRMED, CORRECTED, is_reference, learnt_images
from sortd.daemon.upkeep import record_all_places
from sortd.errors import DataError, JournalError, SortdError
from sortd.events import LIKE_NO_CLASS
from sortd.files import readable_json, text_of
from sortd.layout import Layout
from sortd.store.history import History
from sortd.store.prune import Pruning, rewrite
from sortd.store.records import Record, Selection

CSV_COLUMNS = (
    *("id", "dataset", "run", "at", "outcome", "label", "from", "to", "action", "size", "companions", "score"),
    *("margin", "second_label", "mode", "reason", "generation", "encoder_id", "content", "undoes", "undone_by", "lost"),
    "learnt",
)
"""The keys of ``record_facts``, and whether an image that a person moved is a reference."""

GIVEN = frozenset({CORRECTED, CONFIRMED})
"""The outcomes of images that a person moved to a class."""

STYLES = {"sent to review": "yellow", "rejected": "red", "undone": "cyan"}
AT_ONCE = 500  # records in memory

Row = Mapping[str, Any]


def show_history(
    config: Config,
    *,
    dataset: str | None,
    file: Path | None,
    limit: int,
    format_name: str,
    **conditions: Any,  # noqa: ANN401 -- of Selection
) -> None:
    """Print the records that meet the conditions, newest first, as ``table``, ``csv`` or ``json``.

    Raises the first JournalError after the records of the other journals are printed.
    """
    refusals: list[JournalError] = []
    dataset, relative = narrowed(config, dataset, file)
    selection = Selection(path=relative, limit=limit or None, **conditions)
    with ExitStack() as streams:
        read = [
            streams.enter_context(closing(_recorded(config, place, selection, refusals)))
            for place in journals(config, dataset)
        ]
        newest, printed = islice(heapq.merge(*read, key=_when, reverse=True), limit or None), count()
        rows = (row for row, _ in zip(newest, printed, strict=False))
        {"csv": _print_csv, "json": _print_json}.get(format_name, _print_records)(rows)
    if (number := next(printed)) == 0 and format_name == "table":
        say("sortd: the journal has no such move")
    if limit and number == limit and format_name != "json":
        say(f"sortd: these are the newest {limit} moves; --limit 0 shows all")
    if refusals:
        raise refusals[0]


def _when(row: Row) -> tuple[float, int]:
    return row["at"], row["id"]


def _recorded(
    config: Config, place: JournalPlace, selection: Selection, refusals: list[JournalError]
) -> Generator[Row]:
    """Yield the selected moves by sortd, and those of images to which a person gave a class, newest first."""
    try:
        with place.open() as history:
            streams = [] if selection.outcome in GIVEN else [_moved(place, history, selection)]
            if selection.outcome in {None, *GIVEN} and selection.run is None:
                streams.append(_given(config, place, history, selection))
            yield from heapq.merge(*streams, key=_when, reverse=True)
    except JournalError as error:
        refusals.append(error)


def _moved(place: JournalPlace, history: History, selection: Selection) -> Iterator[Row]:
    numbers = history.numbers(selection)
    for start in range(0, len(numbers), AT_ONCE):
        records = {record.id: record for record in history.finished(numbers[start : start + AT_ONCE])}
        yield from (record_facts(place, records[one]) for one in numbers[start : start + AT_ONCE] if one in records)


def _given(config: Config, place: JournalPlace, history: History, selection: Selection) -> Iterator[Row]:
    learns = config.dataset(place.dataset).learn_from_corrections
    learnt: set[tuple[str, str]] | None = None
    for record, corrected, path, at in history.corrected(
        selection if selection.path is None else replace(selection, limit=None)
    ):
        if selection.path not in {None, path, record.destination_path}:
            continue
        facts = _given_facts(place, record, corrected, path)
        is_learnt = False
        if place.root is not None and is_reference(Layout(place.root), corrected, f"{place.root}/{path}"):
            if learnt is None:
                images = learnt_images(Layout(place.root), history, with_corrections=learns)
                learnt = {(one.label, one.path) for one in images}
            is_learnt = (corrected, f"{place.root}/{path}") in learnt
        yield facts | {"at": at, "learnt": is_learnt}


def _given_facts(place: JournalPlace, record: Record, corrected: str, path: str) -> dict[str, object]:
    """Return what a person did with an image that sortd moved, as plain values like those of ``record_facts``."""
    facts = record_facts(place, record)
    unknown = dict.fromkeys(("score", "margin", "second_label", "mode", "undoes", "undone_by"))
    guess = facts["label"]
    moved = {"from": facts["to"], "to": path if place.root is None else f"{place.root}/{path}", "label": corrected}
    outcome = CONFIRMED if corrected == guess else CORRECTED
    reason = f"by a person; sortd's class: {guess or 'none'}"
    own = {"run": "", "action": "move", "outcome": outcome, "reason": reason, "companions": [], "lost": []}
    return facts | unknown | moved | own


def _print_json(rows: Iterable[Row]) -> None:
    """Print one document with the list ``moves``, each on a line, as they are read."""
    encoding = sys.stdout.encoding
    before, _, after = readable_json(json_document({"moves": []}), encoding=encoding, indent=2).rpartition("]")
    sys.stdout.write(before)
    separator = "\n    "
    for row in rows:
        sys.stdout.write(separator + readable_json(json_values(row), encoding=encoding))
        separator = ",\n    "
    sys.stdout.write(f"]{after}\n")


def _print_csv(rows: Iterable[Row]) -> None:
    """Print records as CSV with a header; several values in one cell are separated by semicolons."""
    writer = csv.DictWriter(sys.stdout, CSV_COLUMNS)
    writer.writeheader()
    clean = printable if sys.stdout.isatty() else text_of  # a file gets the names as they are
    for row in rows:
        cells = {key: ";".join(cell) if isinstance(cell, list) else cell for key, cell in row.items()}
        writer.writerow({key: clean(cell) if isinstance(cell, str) else cell for key, cell in cells.items()})


def _print_records(rows: Iterable[Row]) -> None:
    columns = map(_columns, rows)
    if sys.stdout.isatty():  # so many columns would be too wide
        for row in columns:
            _print_record(*row)
    else:
        print_table(("when", "dataset", "outcome", "from", "to", "score", "margin", "reason", "run"), columns)


def _print_record(when: str, dataset: str, outcome: str, source: str, destination: str, *facts: str) -> None:
    score, margin, reason, run = facts
    why = [f"score {score}, margin {margin}"] if score else []
    shown = ", ".join([*why, *([reason] if reason else []), *([f"run {run}"] if run else [])])
    line = f"{when}  {dataset}  {outcome}: {source} -> {destination}  ({shown})"
    print_line(printable(line), style=STYLES.get(outcome.partition(" (")[0], ""))


def _columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    action = "" if record["action"] == "move" else f" ({record['action']})"
    return (
        format_time(record["at"]),
        record["dataset"],
        f"{record['outcome'].replace('_', ' ')}{action}" + (" (undone)" if record["undone_by"] else ""),
        relative_to_dataset(record["from"]),
        relative_to_dataset(record["to"]),
        decimals(record["score"]),
        decimals(record["margin"]),
        _reason(record),
        record["run"],
    )


def _reason(record: Mapping[str, Any]) -> str:
    """Return the reason, with the best guess where no folder names it, and whether something was learnt."""
    guess = f", best guess: {record['label']}" if record["reason"] in LIKE_NO_CLASS and record["label"] else ""
    return f"{record['reason'] or ''}{guess}{', learnt' if record.get('learnt') else ''}"


def prune_history(config: Config, dataset: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Remove the old moves that nothing needs, or with ``dry_run`` count them, and print how many, by dataset.

    Raises:
        DataError: the configuration keeps all moves.
        SortdError: the first error of a dataset, after the others are done; a running sortd has it locked.
    """
    keep_seconds = config.journal.keep_seconds
    if keep_seconds is None:
        raise DataError("the configuration keeps all moves (`journal: {keep: forever}`); set for how long, such as 2y")
    before, refusal = time() - keep_seconds, None
    facts: dict[str, dict[str, int]] = {}
    for place in journals(config, dataset):
        if place.is_there and place.root is not None:
            try:
                facts[place.dataset] = _pruned(config, place, Layout(place.root), before, removes=not dry_run)
            except SortdError as error:
                refusal = refusal or error
    show({"dry_run": dry_run, "before_at": before, "datasets": facts}, _print_pruned, as_json=as_json)
    if refusal is not None:
        raise refusal


def _pruned(config: Config, place: JournalPlace, layout: Layout, before: float, *, removes: bool) -> dict[str, int]:
    size = place.file.stat().st_size
    with (lock_dataset if removes else inspect_dataset)(layout, config.state_dir) as opened:
        opened.presence.require()
        if removes:
            record_all_places(layout, opened.journal)
        pruning = Pruning(opened.journal, layout.root, before, removes=removes)
        is_under_way = True
        while is_under_way:
            opened.presence.require()  # a disk may go meanwhile, and its images would be taken for removed ones
            is_under_way = pruning.step()
        if removes:
            rewrite(opened.journal)
    after = place.file.stat().st_size
    return {"records": pruning.removed, "kept": pruning.kept, "bytes_before": size, "bytes_after": after}


def _print_pruned(facts: Mapping[str, Any]) -> None:
    would = "would be removed" if facts["dry_run"] else "removed"
    for name, one in facts["datasets"].items():
        sizes = "" if facts["dry_run"] else f"; {megabytes(one['bytes_before'])} -> {megabytes(one['bytes_after'])}"
        kept = f"{one['kept']:,} older ones are still needed"
        print_line(f"{printable(name)}: {counted(one['records'], 'move')} {would}, {kept}{sizes}")
    say(f"sortd: moves that ended before {format_time(facts['before_at'])}")
