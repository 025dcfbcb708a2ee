"""The stored prototypes of datasets, and those of the last ``sortd eval``, which only ``sortd check`` uses."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sortd.classify.prototypes import PrototypeSet
from sortd.config import Config, DatasetConfig
from sortd.daemon.references import DESCRIPTIONS_FILE, STRANGERS_FOLDER, ReferencesAbsentError, class_folders
from sortd.errors import ImageError
from sortd.events import Stamp
from sortd.images.decode import DecodeLimits, check_header
from sortd.layout import Area, Layout
from sortd.store.cache import PrototypeFiles

PROTOTYPES_FOLDER = "prototypes"
EVALUATED = "evaluated"
SETTINGS = "settings (mode or abstain)"


def stored_prototypes(
    config: Config, layout: Layout, *, report: Callable[[str], None] = lambda _: None
) -> PrototypeSet | None:
    """Return the last prototypes of a dataset, or None; call ``report`` with a message about damaged files."""
    return _files(config, report).read(layout.key)


def evaluated_prototypes(config: Config, layout: Layout) -> PrototypeSet | None:
    """Return the prototypes of the last ``sortd eval`` of a dataset, or None."""
    return _files(config).read(f"{layout.key}/{EVALUATED}")


def keep_evaluated(config: Config, layout: Layout, prototypes: PrototypeSet) -> None:
    """Store the prototypes of ``sortd eval``, if the cache is writable."""
    _files(config).write(f"{layout.key}/{EVALUATED}", prototypes)


def changed_since(config: Config, layout: Layout, prototypes: PrototypeSet, *, evaluated: bool = False) -> str | None:
    """Return what changed since the prototypes were built, SETTINGS or ``references``, or None.

    ``evaluated``: the prototypes are those of ``sortd eval``.
    """
    if settings_differ(config.dataset(layout.name), prototypes):
        return SETTINGS
    built_at = _files(config).written_at_ns(f"{layout.key}/{EVALUATED}" if evaluated else layout.key)
    return "references" if _references_differ(layout, prototypes, built_at) else None


def settings_differ(config: DatasetConfig, prototypes: PrototypeSet) -> bool:
    """Return whether mode or abstain of a dataset differ from those of its prototypes."""
    old, new = (
        None if one is None else (one.precision, one.strangers) for one in (prototypes.settings.abstain, config.abstain)
    )
    return (config.mode, new) != (prototypes.settings.mode.value, old)


def _references_differ(layout: Layout, prototypes: PrototypeSet, built_at_ns: int) -> bool:
    """Return whether a class or a readable image was added, removed or modified since."""
    try:
        folders, _ = class_folders(layout.area(Area.CLASES), report=lambda _: None)
    except ReferencesAbsentError:
        return False  # reported by another check
    classes = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if tuple(folder.label for folder in classes) != prototypes.labels:
        return True
    files = {path: (folder.label, mark) for folder in classes for path, mark in folder.files}
    clases = os.fspath(layout.area(Area.CLASES))
    known = {path for path in prototypes.sources if path.startswith(f"{clases}/")}  # corrections are in Dataset/
    strangers = [mark for folder in folders if folder.label == STRANGERS_FOLDER for _, mark in folder.files]
    marks = [*strangers, *(files[path][1] for path in known & files.keys())]
    described = (Path(clases, folder.label, DESCRIPTIONS_FILE) for folder in classes if folder.descriptions)
    return (
        not known <= files.keys()
        or any(mark.mtime_ns > built_at_ns for mark in marks)
        or any(file.stat().st_mtime_ns > built_at_ns for file in described)
        or any(_is_new(path, files, known) for path in files.keys() - known)
    )


def _is_new(path: str, files: Mapping[str, tuple[str, Stamp]], known: Collection[str]) -> bool:
    """Return whether an unknown file is a readable image and not a copy of a known one."""
    label, mark = files[path]
    copies = [other for other in known if files[other][0] == label and files[other][1].size == mark.size]
    try:
        check_header(path, DecodeLimits())
        return all(_content(other) != _content(path) for other in copies)
    except (ImageError, OSError):
        return False


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(config: Config, report: Callable[[str], None] = lambda _: None) -> PrototypeFiles:
    return PrototypeFiles(config.cache_dir / PROTOTYPES_FOLDER, report)
