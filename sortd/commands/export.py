"""The command ``export``: the filed images of a dataset with all that is known of them, in formats of other programs.

Every file below Dataset/ is exported with the class of the folder in which it lies now; what sortd decided comes from
the journal. An image of Images/ that has its class by a symbolic link or by keywords is exported from there. Nothing in
the dataset is changed, and nothing that exists is overwritten.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sortd.arrays import FloatArray
from sortd.classify.types import PROBABILISTIC
from sortd.commands.console import bar, counted, say, show
from sortd.commands.export_formats import WRITERS, ExportedImage, ExportFormat, ExportOptions, Link
from sortd.commands.moves import journal_of
from sortd.config import Config
from sortd.daemon.corrections import version_at
from sortd.daemon.learnt import learnt_images
from sortd.daemon.resources import Resources
from sortd.errors import DataError, ImageError, LayoutError
from sortd.events import EmbeddedImage
from sortd.files import sha256_of
from sortd.finetune.data import Candidate, find_candidates, near_duplicate_groups, split_by_group
from sortd.finetune.recipe import Source
from sortd.images.decode import DecodeLimits, image_size
from sortd.layout import Layout, enclosing_dataset
from sortd.moving.fs import rename_new
from sortd.store.records import MoveReason, Record

AUDITED = "audited"
AT_FDCWD = -100  # of fcntl.h: paths are relative to the working directory
SEED = 0
"""Of the split: the same images give the same parts."""
EXTRA = "pip install 'sortd-images[export]'"


def export_dataset(config: Config, layout: Layout, options: ExportOptions, *, as_json: bool) -> None:
    """Export the filed images of a dataset and print what was written.

    Raises:
        DataError: there is nothing to export, something has the name of ``out``, or a package is missing.
        JournalError: the journal cannot be read.
        ModelError: a split or embeddings need the model, which cannot be loaded.
    """
    _check(options)
    with bar("reading") as tell:
        images = exported_images(config, layout, checked_only=options.checked_only, tell=tell)
        if not images:
            what = "image that a person has checked" if options.checked_only else "image"
            raise DataError(f"{layout.root}/Dataset has no {what}")
        rows = None
        if options.with_embeddings or options.train is not None:
            images, rows = _embedded(config, images, tell)
        if options.train is not None and rows is not None:
            images = with_split(images, rows, options.train)
        with _placed(options.out) as target:
            WRITERS[options.format](images, target, options, rows if options.with_embeddings else None, tell)
    facts = {
        "dataset": layout.name,
        "out": os.fspath(options.out),
        "format": options.format.value,
        "images": len(images),
        "checked": sum(one.checked for one in images),
        "splits": {part: sum(one.split == part for one in images) for part in ("train", "test")},
    }
    show(facts, _print_exported, as_json=as_json)


def _print_exported(facts: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{name} {number}" for name, number in facts["splits"].items() if number)
    where = f" ({parts})" if parts else ""
    say(f"sortd: {counted(facts['images'], 'image')}{where}, {facts['checked']} checked, written to {facts['out']}")


def _check(options: ExportOptions) -> None:
    """Raise DataError for options that contradict each other, and for a place that cannot be written to."""
    out, kind = options.out, options.format
    if options.with_embeddings and kind in {ExportFormat.CSV, ExportFormat.COCO, ExportFormat.FIFTYONE}:
        raise DataError(f"--format {kind} has no place for embeddings; use parquet, jsonl, imagefolder or datasets")
    if options.link is not Link.COPY and (kind.is_file or kind is ExportFormat.DATASETS):
        raise DataError(f"--link is for folders of images; --format {kind} has none")
    if os.path.lexists(out):
        raise DataError(f"{out} exists; nothing is overwritten, so name another path or move it away")
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out.absolute().parent} is no folder; create it, or name another path")
    if (around := enclosing_dataset(out)) is not None:
        raise LayoutError(f"{out} lies inside the dataset {around}; name a path outside of it")
    if kind in {ExportFormat.PARQUET, ExportFormat.DATASETS} and find_spec("pyarrow") is None:
        raise DataError(f"--format {kind} needs pyarrow: {EXTRA}")


# ------------------------------------------------------------ what is known


def exported_images(
    config: Config,
    layout: Layout,
    *,
    checked_only: bool = False,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> list[ExportedImage]:
    """Return the files of Dataset/ by path, with what the journal knows; files that are no images are left out.

    Raises DataError: a folder cannot be read; JournalError.
    """
    candidates, _ = find_candidates(layout, Source.DATASET, config.state_dir)
    found = list[ExportedImage | None]()
    with journal_of(config, layout).open() as history:
        given = {one.path: one.how for one in learnt_images(layout, history, with_corrections=True)}
        audited = history.audited_right()
        for number, candidate in enumerate(sorted(candidates, key=lambda one: one.path), 1):
            found.append(_exported(layout, candidate, history.last_known(candidate.stamp), given, audited))
            tell("reading", number, len(candidates))
        found += [_exported_in_place(layout, record, audited) for record in history.filed_in_place()]
    return [image for image in found if image is not None and (image.checked or not checked_only)]


def _exported(
    layout: Layout, candidate: Candidate, record: Record | None, given: Mapping[str, str], audited: frozenset[int]
) -> ExportedImage | None:
    try:
        image_size(candidate.path, DecodeLimits())
        reason = MoveReason("") if record is None else record.move_reason
        content = reason.content or sha256_of(candidate.path)
    except (ImageError, OSError):
        return None  # a sidecar, a film, or a file that has just gone
    how = given.get(candidate.path, "")
    if not how and record is not None and record.id in audited:
        how = AUDITED
    return ExportedImage(
        path=candidate.path,
        file_name=os.path.relpath(candidate.path, layout.root / "Dataset"),
        label=candidate.label,
        split="",
        checked=bool(how),
        checked_by=how,
        predicted=None if reason.mode is None else reason.label,
        probability=reason.score if reason.mode in _PROBABILISTIC else None,
        score=reason.score,
        margin=reason.margin,
        outcome=reason.outcome or None,
        mode=reason.mode,
        encoder_id=reason.encoder_id or None,
        generation=reason.generation or None,
        moved_at=None if record is None else record.ended_at,
        content=content,
        size=candidate.stamp.size,
    )


def _exported_in_place(layout: Layout, record: Record, audited: frozenset[int]) -> ExportedImage | None:
    """Return an image that stayed in Images/, if this version and its link, if it has one, are still there."""
    move, label = record.move, record.move_reason.label
    path, link = os.path.join(layout.root, record.source_path), os.path.join(layout.root, record.destination_path)
    version = version_at(path)
    if label is None or version is None or not version.is_same_version(move.image.stamp) or not os.path.lexists(link):
        return None
    image = _exported(layout, Candidate(path, version, label), record, {}, audited)
    inside = os.path.relpath(link, layout.root / "Dataset") if link != path else f"{label}/{record.source_path}"
    return None if image is None else replace(image, file_name=inside)


_PROBABILISTIC = frozenset(mode.value for mode in PROBABILISTIC)


def _embedded(
    config: Config, images: Sequence[ExportedImage], tell: Callable[[str, int, int], None]
) -> tuple[list[ExportedImage], FloatArray]:
    """Return the N images that can be decoded, and (N, d) their embeddings by the configured model.

    Raises ModelError; DataError: no image can be decoded.
    """
    with Resources(config) as resources:
        files = [(image.path, version) for image in images if (version := version_at(image.path)) is not None]
        rows: dict[str, FloatArray] = {}
        for number, answer in enumerate(resources.embedder().embed(files), 1):
            if isinstance(answer, EmbeddedImage):
                rows[answer.path] = answer.embedding
            tell("encoding", number, len(files))
    kept = [image for image in images if image.path in rows]
    if not kept:
        raise DataError(f"none of the {len(images)} images can be decoded")
    return kept, np.stack([rows[image.path] for image in kept])


def with_split(images: Sequence[ExportedImage], rows: FloatArray, train: float) -> list[ExportedImage]:
    """Return the images with their parts, ``train`` and ``test``; near-duplicates are in one part."""
    labels = sorted({image.label for image in images})
    classes = np.array([labels.index(image.label) for image in images], np.int64)
    groups = near_duplicate_groups(rows, classes)
    everywhere = np.ones(len(images), np.bool_)
    split = split_by_group(classes, groups, everywhere, test=1.0 - train, validation=0.0, seed=SEED)
    tested = set(split["test"].tolist())
    return [replace(image, split="test" if at in tested else "train") for at, image in enumerate(images)]


# ------------------------------------------------------------ writing


@contextmanager
def _placed(out: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``out``, and rename it in the end; after an error nothing is left.

    Raises DataError: it cannot be written, or something has taken the name meanwhile.
    """
    parent = out.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".sortd-export-", dir=parent, ignore_cleanup_errors=True) as folder:
            target = Path(folder) / out.name
            yield target
            _rename_new(target, out)
    except FileExistsError as error:
        raise DataError(f"{out} exists; nothing is overwritten") from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error} ({error.filename})") from error


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder; raise FileExistsError if the name is taken."""
    try:
        rename_new(AT_FDCWD, os.fspath(source), AT_FDCWD, os.fspath(target))
    except FileExistsError:
        raise
    except OSError:  # NFS, for example, cannot do it; file systems without hard links can
        if source.is_dir():
            source.rename(target)  # fails if there is anything but an empty folder
        else:
            os.link(source, target)
