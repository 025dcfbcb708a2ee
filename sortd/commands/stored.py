"""The stored prototypes: what each dataset decided with last, and whether that is what stands in ``Clases/`` now.

``sortd eval`` keeps what it learnt beside them, for ``sortd check``; nothing decides by that.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from sortd.classify.prototypes import PrototypeSet
from sortd.config import Config, DatasetConfig
from sortd.errors import ImageError
from sortd.events import Stamp
from sortd.images.decode import DecodeLimits, check_header
from sortd.layout import Area, Layout
from sortd.references import DESCRIPTIONS_FILE, STRANGERS_FOLDER, ReferencesAbsentError, class_folders
from sortd.store.cache import PrototypeFiles

PROTOTYPES_FOLDER = "prototypes"
EVALUATED = "evaluated"
SETTINGS = "settings (mode or abstain)"


def stored_prototypes(
    config: Config, layout: Layout, *, report: Callable[[str], None] = lambda _: None
) -> PrototypeSet | None:
    """Return the prototypes that a dataset was served with last, or None.

    Args:
        config: where the cache is.
        layout: the dataset.
        report: is told what is damaged.
    """
    return _files(config, report).read(layout.key)


def evaluated_prototypes(config: Config, layout: Layout) -> PrototypeSet | None:
    """Return what ``sortd eval`` learnt of a dataset last, or None."""
    return _files(config).read(f"{layout.key}/{EVALUATED}")


def keep_evaluated(config: Config, layout: Layout, prototypes: PrototypeSet) -> None:
    """Keep what ``sortd eval`` learnt of a dataset; a cache that cannot be written keeps nothing."""
    _files(config).write(f"{layout.key}/{EVALUATED}", prototypes)


def changed_since(config: Config, layout: Layout, prototypes: PrototypeSet, *, evaluated: bool = False) -> str | None:
    """Say what is other than it was when prototypes were learnt, ``settings`` or ``references``; None: nothing is.

    Args:
        config: the settings now.
        layout: the dataset.
        prototypes: what was learnt.
        evaluated: by ``sortd eval``, not by a sortd that serves.
    """
    if settings_differ(config.dataset(layout.name), prototypes):
        return SETTINGS
    learnt_at = _files(config).written_at_ns(f"{layout.key}/{EVALUATED}" if evaluated else layout.key)
    return "references" if _references_differ(layout, prototypes, learnt_at) else None


def settings_differ(config: DatasetConfig, prototypes: PrototypeSet) -> bool:
    """Tell whether a dataset's settings are others than those that prototypes were learnt under."""
    then, now = prototypes.settings.abstain, config.abstain
    asked = None if now is None else (now.precision, now.strangers)
    return (config.mode, asked) != (
        prototypes.settings.mode.value,
        None if then is None else (then.precision, then.strangers),
    )


def _references_differ(layout: Layout, prototypes: PrototypeSet, learnt_at_ns: int) -> bool:
    """Tell whether a class, or an image that can be read, came, went or was written since."""
    try:
        folders, _ = class_folders(layout.area(Area.CLASES), report=lambda _: None)
    except ReferencesAbsentError:
        return False  # absent is not changed: its own finding says so
    classes = [folder for folder in folders if folder.label != STRANGERS_FOLDER]
    if tuple(folder.label for folder in classes) != prototypes.labels:
        return True
    files = {path: (folder.label, mark) for folder in classes for path, mark in folder.files}
    clases = os.fspath(layout.area(Area.CLASES))
    learnt = {path for path in prototypes.sources if path.startswith(f"{clases}/")}  # corrections stand in Dataset/
    strangers = [mark for folder in folders if folder.label == STRANGERS_FOLDER for _, mark in folder.files]
    marks = [*strangers, *(files[path][1] for path in learnt & files.keys())]
    described = (Path(clases, folder.label, DESCRIPTIONS_FILE) for folder in classes if folder.descriptions)
    return (
        not learnt <= files.keys()
        or any(mark.mtime_ns > learnt_at_ns for mark in marks)
        or any(file.stat().st_mtime_ns > learnt_at_ns for file in described)
        or any(_is_news(path, files, learnt) for path in files.keys() - learnt)
    )


def _is_news(path: str, files: Mapping[str, tuple[str, Stamp]], learnt: Collection[str]) -> bool:
    """Tell whether a file that was not learnt is an image that can be read, and no double of one that was."""
    label, mark = files[path]
    twins = [other for other in learnt if files[other][0] == label and files[other][1].size == mark.size]
    try:
        check_header(path, DecodeLimits())
        return all(_content(other) != _content(path) for other in twins)
    except (ImageError, OSError):
        return False


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(config: Config, report: Callable[[str], None] = lambda _: None) -> PrototypeFiles:
    return PrototypeFiles(config.cache_dir / PROTOTYPES_FOLDER, report)
