"""Find the journals of all datasets, including missing datasets, and return their records as plain values."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sortd.config import Config
from sortd.errors import DataError, LayoutError, StartupError
from sortd.layout import JOURNAL_FILE, Layout, find_datasets
from sortd.store.records import Record, Role

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


def journals(config: Config, dataset: str | None = None) -> list[JournalPlace]:
    """Return the journals of all datasets, or of one, by name; those of missing datasets come last.

    Raises:
        DataError: there is no dataset of that name.
        StartupError: the state directory cannot be read.
    """
    if config.state_dir.exists() and not os.access(config.state_dir, os.R_OK | os.X_OK, effective_ids=True):
        raise StartupError(
            f"{config.state_dir} cannot be read; run the command as the user that runs sortd, or as root"
        )
    try:
        layouts = find_datasets(config.root)
    except LayoutError:
        layouts = []  # not mounted: the journals can still be read
    places = [JournalPlace(one.name, one.root, one.state_folder(config.state_dir) / JOURNAL_FILE) for one in layouts]
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


def dataset_at(config: Config, path: Path) -> tuple[Layout, str] | None:
    """Return the dataset that a path lies in, and the path relative to it; None if it lies in none.

    Raises:
        LayoutError: the root cannot be listed.
    """
    absolute = os.path.abspath(path)
    unlinked = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    for layout in find_datasets(config.root):
        for spelled in (absolute, unlinked):
            for root in (os.fspath(layout.root), os.path.realpath(layout.root)):
                if spelled.startswith(root + os.sep):
                    return layout, spelled.removeprefix(root + os.sep)
    return None


def record_facts(place: JournalPlace, record: Record) -> dict[str, object]:
    """Return a record as plain values, its paths absolute where the dataset is there."""
    reason, image = record.move_reason, record.move.image
    others = [file for file in record.move.files if file.role is not Role.IMAGE]
    root = "" if place.root is None else f"{place.root}/"
    return {
        "id": record.id,
        "dataset": place.dataset,
        "run": record.run,
        "at": record.ended_at,
        "outcome": reason.outcome,
        "label": reason.label,
        "from": f"{root}{record.source_path}",
        "to": f"{root}{record.destination_path}",
        "size": image.stamp.size,
        "companions": [file.final or file.name for file in others],
        "score": reason.score,
        "margin": reason.margin,
        "second_label": reason.second_label,
        "mode": reason.mode,
        "reason": reason.reason,
        "generation": reason.generation,
        "encoder_id": reason.encoder_id,
        "content": reason.content,
        "undoes": reason.undoes,
        "undone_by": record.undone_by,
        "lost": list(record.move.lost),
    }


def narrowed(config: Config, dataset: str | None, path: Path | None) -> tuple[str | None, str | None]:
    """Return the dataset to search and the path relative to it; a path determines its dataset.

    Raises:
        DataError: the path lies in no dataset.
    """
    if path is None:
        return dataset, None
    found = dataset_at(config, path)
    if found is None:
        raise DataError(f"{path} lies in no dataset below {config.root}; name the present or a former path of the file")
    return found[0].name, found[1]
