"""The command ``export``: the filed images of a dataset with all that is known of them, in formats of other programs.

Every file below Dataset/ is exported with the class of the folder in which it lies now; what sortd decided comes from
the journal. Nothing in the dataset is changed, and nothing that exists is overwritten.
"""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sortd.arrays import FloatArray
from sortd.classify.types import PROBABILISTIC
from sortd.commands.console import bar, counted, say, show
from sortd.config import Config
from sortd.daemon.learnt import learnt_images
from sortd.daemon.resources import Resources
from sortd.errors import DataError, ImageError, LayoutError
from sortd.events import ImageRefused, Stamp
from sortd.files import open_regular, readable_json, sha256_of
from sortd.finetune.data import Candidate, find_candidates, near_duplicate_groups, split_by_group
from sortd.finetune.recipe import Source
from sortd.images.decode import DecodeLimits, image_size
from sortd.layout import JOURNAL_FILE, Layout, enclosing_dataset
from sortd.store.history import History
from sortd.store.records import Record

AUDITED = "audited"
SEED = 0
"""Of the split: the same images give the same parts."""
IMAGES_OF_A_ROW_GROUP = 64
EXTRA = "pip install 'sortd-images[export]'"


class ExportFormat(StrEnum):
    """A format of an export."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    IMAGEFOLDER = "imagefolder"
    COCO = "coco"
    FIFTYONE = "fiftyone"
    DATASETS = "datasets"

    @property
    def is_file(self) -> bool:
        """Whether it is one file without the images."""
        return self in {ExportFormat.CSV, ExportFormat.JSONL, ExportFormat.PARQUET}


class Link(StrEnum):
    """How the images get into an exported folder."""

    COPY = "copy"
    HARD = "hard"  # the same file under a second name: whoever changes one changes both
    SYMBOLIC = "symbolic"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported, and how."""

    format: ExportFormat
    out: Path
    checked_only: bool = False
    train: float | None = None  # share of the training part; None: no split
    link: Link = Link.COPY
    with_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """One file of Dataset/, with the class of its folder and what is known of it."""

    path: str  # absolute
    file_name: str  # below Dataset/
    label: str
    split: str  # train or test; "" without a split
    checked: bool
    checked_by: str  # assigned, corrected, confirmed, audited, or "" if nobody has said that the class is right
    predicted: str | None  # the class that sortd decided or guessed; None: it never decided this file
    probability: float | None  # of that class; None for modes whose score is none
    score: float | None
    margin: float | None
    outcome: str | None  # of the move: filed, refiled, assigned
    mode: str | None
    encoder_id: str | None
    generation: int | None
    moved_at: float | None  # seconds since the epoch
    content: str  # sha256 of the file
    size: int  # bytes


COLUMNS = tuple(one.name for one in fields(ExportedImage))


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
        rows = _embeddings(config, images, tell) if options.with_embeddings or options.train is not None else None
        if options.train is not None and rows is not None:
            images = with_split(images, rows, options.train)
        with _placed(options.out) as target:
            _WRITERS[options.format](images, target, options, rows if options.with_embeddings else None, tell)
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

    Raises:
        DataError: a folder cannot be read.
        JournalError: the journal cannot be read.
    """
    candidates, _ = find_candidates(layout, Source.DATASET, config.state_dir)
    journal = layout.state_folder(config.state_dir) / JOURNAL_FILE
    given: dict[str, str] = {}
    audited: frozenset[int] = frozenset()
    found = []
    with _history(journal) as history:
        if history is not None:
            given = {one.path: one.how for one in learnt_images(layout, history, with_corrections=True)}
            audited = history.audited_right()
        for number, candidate in enumerate(sorted(candidates, key=lambda one: one.path), 1):
            record = None if history is None else history.last_known(candidate.stamp)
            image = _exported(layout, candidate, record, given, audited)
            if image is not None and (image.checked or not checked_only):
                found.append(image)
            tell("reading", number, len(candidates))
    return found


@contextmanager
def _history(journal: Path) -> Iterator[History | None]:
    if not journal.is_file():
        yield None
        return
    with History.open(journal) as history:
        yield history


def _exported(
    layout: Layout, candidate: Candidate, record: Record | None, given: Mapping[str, str], audited: frozenset[int]
) -> ExportedImage | None:
    try:
        image_size(candidate.path, DecodeLimits())
        content = "" if record is None else record.move_reason.content
        content = content or sha256_of(candidate.path)
    except (ImageError, OSError):
        return None  # a sidecar, a film, or a file that has just gone
    how = given.get(candidate.path, "")
    if not how and record is not None and record.id in audited:
        how = AUDITED
    reason = None if record is None else record.move_reason
    score = None if reason is None else reason.score
    return ExportedImage(
        path=candidate.path,
        file_name=os.path.relpath(candidate.path, layout.root / "Dataset"),
        label=candidate.label,
        split="",
        checked=bool(how),
        checked_by=how,
        predicted=None if reason is None or reason.mode is None else reason.label,
        probability=score if reason is not None and reason.mode in _PROBABILISTIC else None,
        score=score,
        margin=None if reason is None else reason.margin,
        outcome=None if reason is None else reason.outcome,
        mode=None if reason is None else reason.mode,
        encoder_id=None if reason is None else reason.encoder_id or None,
        generation=None if reason is None else reason.generation or None,
        moved_at=None if record is None else record.ended_at,
        content=content,
        size=candidate.stamp.size,
    )


_PROBABILISTIC = frozenset(mode.value for mode in PROBABILISTIC)


def _embeddings(config: Config, images: Sequence[ExportedImage], tell: Callable[[str, int, int], None]) -> FloatArray:
    """Return (n, d) the embeddings by the configured model, from its cache where they are there.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: an image cannot be decoded any more.
    """
    resources = Resources(config)
    try:
        embedder, _, _ = resources.load()
        files: dict[str, Stamp] = {}
        for image in images:
            found = os.lstat(image.path)
            files[image.path] = Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        rows: dict[str, FloatArray] = {}
        for answer in embedder.embed(list(files.items())):
            if isinstance(answer, ImageRefused):
                raise DataError(f"{answer.path}: {answer.message}")
            rows[answer.path] = answer.embedding
            tell("encoding", len(rows), len(files))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    finally:
        resources.unload()
    return np.stack([rows[image.path] for image in images])


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
    """Yield a temporary name beside ``out``, renamed to it at the end; after an error nothing is left.

    Raises:
        DataError: it cannot be written, or something has taken the name meanwhile.
    """
    parent = out.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".sortd-export-", dir=parent, ignore_cleanup_errors=True) as folder:
            target = Path(folder) / out.name
            yield target
            if target.is_dir():
                target.rename(out)  # fails if there is anything but an empty folder
            else:
                os.link(target, out)  # as a rename, but fails if the name is taken
    except FileExistsError as error:
        raise DataError(f"{out} exists; nothing is overwritten") from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error} ({error.filename})") from error


def text_of(text: str) -> str:
    """Return a text as UTF-8 has it; the bytes of names that are not UTF-8 are written in hexadecimal."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _row(image: ExportedImage) -> dict[str, Any]:
    return {key: text_of(value) if isinstance(value, str) else value for key, value in asdict(image).items()}


Tell = Callable[[str, int, int], None]
Images = Sequence[ExportedImage]


def _write_csv(images: Images, target: Path, _: ExportOptions, __: FloatArray | None, ___: Tell) -> None:
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_row, images))


def _write_jsonl(images: Images, target: Path, _: ExportOptions, rows: FloatArray | None, __: Tell) -> None:
    with target.open("w", encoding="utf-8") as file:
        for at, image in enumerate(images):
            row = _row(image) if rows is None else {**_row(image), "embedding": rows[at].tolist()}
            file.write(readable_json(row) + "\n")


def _write_parquet(images: Images, target: Path, _: ExportOptions, rows: FloatArray | None, __: Tell) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist([_row(image) for image in images], schema=_schema(pa))
    if rows is not None:
        cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        table = table.append_column("embedding", cells)
    parquet.write_table(table, target)


def _schema(pa: Any) -> Any:  # noqa: ANN401 -- pyarrow publishes no types
    kinds = {str: pa.string(), bool: pa.bool_(), float: pa.float64(), int: pa.int64()}
    return pa.schema([(one.name, kinds[_kind(one.type)]) for one in fields(ExportedImage)])


def _kind(annotation: Any) -> type:  # noqa: ANN401 -- a type, or a union of one with None
    return next(one for one in (str, bool, float, int) if one is annotation or annotation == one | None)


def _parts(images: Images, target: Path) -> Iterator[tuple[Path, list[int]]]:
    """Yield the folder of each part, made, and the images of it; without a split, the target and all images."""
    for part in sorted({image.split for image in images}):
        folder = target / part if part else target
        folder.mkdir(parents=True)
        yield folder, [at for at, image in enumerate(images) if image.split == part]


def _facts(image: ExportedImage) -> dict[str, Any]:
    """Return what a file of a folder is described by: all but its place."""
    return {key: value for key, value in _row(image).items() if key not in {"path", "split", "file_name"}}


def _write_imagefolder(
    images: Images, target: Path, options: ExportOptions, rows: FloatArray | None, tell: Tell
) -> None:
    """Write ``<split>/<class>/<file>``, and in each part the ``metadata.jsonl`` of ``load_dataset("imagefolder")``."""
    for folder, chosen in _parts(images, target):
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
            for at in chosen:
                name = text_of(images[at].file_name)
                _put(images[at].path, folder / name, options.link)
                embedding = {} if rows is None else {"embedding": rows[at].tolist()}
                file.write(json.dumps({"file_name": name, **_facts(images[at]), **embedding}) + "\n")
                tell("writing", at + 1, len(images))


def _write_coco(images: Images, target: Path, options: ExportOptions, _: FloatArray | None, tell: Tell) -> None:
    """Write ``<split>/images`` and ``<split>/annotations.json``: each image has one box of its whole size."""
    labels = sorted({image.label for image in images})
    categories = [{"id": number, "name": text_of(label)} for number, label in enumerate(labels, 1)]
    for folder, chosen in _parts(images, target):
        pictures, annotations = [], []
        for at in chosen:
            image, name = images[at], text_of(images[at].file_name)
            _put(image.path, folder / "images" / name, options.link)
            tell("writing", at + 1, len(images))
            width, height = image_size(image.path, DecodeLimits())
            pictures.append({"id": at + 1, "file_name": name, "width": width, "height": height, "sortd": _facts(image)})
            box = {"bbox": [0, 0, width, height], "area": width * height, "iscrowd": 0}
            numbers = {"id": at + 1, "image_id": at + 1, "category_id": labels.index(image.label) + 1}
            annotations.append(numbers | box)
        content = {"images": pictures, "annotations": annotations, "categories": categories}
        (folder / "annotations.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_fiftyone(images: Images, target: Path, options: ExportOptions, _: FloatArray | None, tell: Tell) -> None:
    """Write ``<split>/data`` and ``<split>/labels.json`` of FiftyOne's FiftyOneImageClassificationDataset.

    https://docs.voxel51.com/user_guide/import_datasets.html#fiftyoneimageclassificationdataset
    """
    labels = sorted({image.label for image in images})
    for folder, chosen in _parts(images, target):
        known: dict[str, dict[str, Any]] = {}
        for at in chosen:
            name, extension = os.path.splitext(text_of(images[at].file_name))
            identity = f"{name.replace(os.sep, '__')}-{at:06d}"
            _put(images[at].path, folder / "data" / (identity + extension), options.link)
            tell("writing", at + 1, len(images))
            known[identity] = {
                "label": labels.index(images[at].label),
                "confidence": images[at].probability,
                "attributes": _facts(images[at]),
            }
        content = {"classes": [text_of(label) for label in labels], "labels": known}
        (folder / "labels.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_datasets(images: Images, target: Path, _: ExportOptions, rows: FloatArray | None, tell: Tell) -> None:
    """Write ``data/<split>-….parquet`` with the images in them, as ``load_dataset(folder)`` of Hugging Face reads.

    The features are in the metadata of the files, as ``Dataset.to_parquet`` writes them.
    """
    import pyarrow as pa
    from pyarrow import parquet

    labels = sorted({image.label for image in images})
    names = [one.name for one in fields(ExportedImage) if one.name not in {"path", "split", "label"}]
    kinds = {str: "string", bool: "bool", float: "float64", int: "int64"}
    types = {one.name: kinds[_kind(one.type)] for one in fields(ExportedImage) if one.name in names}
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": [text_of(label) for label in labels], "_type": "ClassLabel"},
        **{name: {"dtype": types[name], "_type": "Value"} for name in names},
    }
    columns = [
        ("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        ("label", pa.int64()),
        *((name, _schema(pa).field(name).type) for name in names),
    ]
    if rows is not None:
        features["embedding"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
        columns.append(("embedding", pa.list_(pa.float32())))
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(columns, metadata=described)
    (target / "data").mkdir(parents=True)
    for part in sorted({image.split for image in images}):
        chosen = [at for at, image in enumerate(images) if image.split == part]
        file = target / "data" / f"{part or 'train'}-00000-of-00001.parquet"
        with parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(chosen), IMAGES_OF_A_ROW_GROUP):
                some = chosen[start : start + IMAGES_OF_A_ROW_GROUP]
                cells = [_cells(images[at], labels, None if rows is None else rows[at]) for at in some]
                writer.write_table(pa.Table.from_pylist(cells, schema=schema))
                tell("writing", some[-1] + 1, len(images))


def _cells(image: ExportedImage, labels: Sequence[str], row: FloatArray | None) -> dict[str, Any]:
    with open(open_regular(image.path), "rb") as file:
        content = {"bytes": file.read(), "path": os.path.basename(text_of(image.file_name))}
    embedding = {} if row is None else {"embedding": row.tolist()}
    return {**_row(image), "image": content, "label": labels.index(image.label), **embedding}


def _put(source: str, target: Path, link: Link) -> None:
    """Make an image appear at a new place without following links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link is Link.HARD:
        os.link(source, target, follow_symlinks=False)
    elif link is Link.SYMBOLIC:
        os.symlink(source, target)
    else:
        with open(open_regular(source), "rb") as read, target.open("xb") as written:
            shutil.copyfileobj(read, written)


_WRITERS: Mapping[ExportFormat, Callable[[Images, Path, ExportOptions, FloatArray | None, Tell], None]] = {
    ExportFormat.CSV: _write_csv,
    ExportFormat.JSONL: _write_jsonl,
    ExportFormat.PARQUET: _write_parquet,
    ExportFormat.IMAGEFOLDER: _write_imagefolder,
    ExportFormat.COCO: _write_coco,
    ExportFormat.FIFTYONE: _write_fiftyone,
    ExportFormat.DATASETS: _write_datasets,
}
