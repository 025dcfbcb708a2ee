"""The formats of ``sortd export``: what is known of each image as rows, folders and Parquet of other programs."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from sortd.arrays import FloatArray
from sortd.errors import DataError
from sortd.files import open_regular, readable_json, text_of
from sortd.images.decode import DecodeLimits, image_size

IMAGES_OF_A_ROW_GROUP = 64


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


def _splits(images: Images) -> list[str]:
    return sorted({image.split for image in images})


def _parts(images: Images, target: Path) -> Iterator[tuple[Path, list[int]]]:
    """Yield the folder of each part, made, and the images of it; without a split, the target and all images."""
    for part in _splits(images):
        folder = target / part if part else target
        folder.mkdir(parents=True)
        yield folder, [at for at, image in enumerate(images) if image.split == part]


def _facts(image: ExportedImage) -> dict[str, Any]:
    """Return what a file of a folder is described by: all but its place."""
    return {key: value for key, value in _row(image).items() if key not in {"path", "split", "file_name"}}


def _write_imagefolder(
    images: Images, target: Path, options: ExportOptions, rows: FloatArray | None, tell: Tell
) -> None:
    """Write ``<split>/<class>/<file>``, and in each part the ``metadata.jsonl`` of ``load_dataset("imagefolder")``.

    ``README.md`` names the parts: otherwise ``datasets`` takes every folder and file with "test" in its name for one.
    """
    parts = [{"split": part or "train", "path": f"{part}/**" if part else "**"} for part in _splits(images)]
    for folder, chosen in _parts(images, target):
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
            for at in chosen:
                name = text_of(images[at].file_name)
                _put(images[at].path, folder / name, options.link)
                embedding = {} if rows is None else {"embedding": rows[at].tolist()}
                file.write(json.dumps({"file_name": name, **_facts(images[at]), **embedding}) + "\n")
                tell("writing", at + 1, len(images))
    described = json.dumps([{"config_name": "default", "data_files": parts}])  # JSON is YAML
    (target / "README.md").write_text(f"---\nconfigs: {described}\n---\n", encoding="utf-8")


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
    for part in _splits(images):
        chosen = [at for at, image in enumerate(images) if image.split == part]
        file = target / "data" / f"{part or 'train'}-00000-of-00001.parquet"
        with parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, len(chosen), IMAGES_OF_A_ROW_GROUP):
                some = chosen[start : start + IMAGES_OF_A_ROW_GROUP]
                cells = [_cells(images[at], labels, None if rows is None else rows[at]) for at in some]
                writer.write_table(pa.Table.from_pylist(cells, schema=schema))
                tell("writing", some[-1] + 1, len(images))


def _cells(image: ExportedImage, labels: Sequence[str], row: FloatArray | None) -> dict[str, Any]:
    try:
        with open(open_regular(image.path), "rb") as file:
            content = {"bytes": file.read(), "path": os.path.basename(text_of(image.file_name))}
    except FileNotFoundError as error:
        raise DataError(f"{image.path} has moved during the export; export again") from error
    embedding = {} if row is None else {"embedding": row.tolist()}
    return {**_row(image), "image": content, "label": labels.index(image.label), **embedding}


def _put(source: str, target: Path, link: Link) -> None:
    """Make an image appear at a new place without following links.

    Raises:
        DataError: it has moved meanwhile, the name is taken, or a hard link would lead to another disk.
        OSError: any other error.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link is Link.HARD:
            os.link(source, target, follow_symlinks=False)
        elif link is Link.SYMBOLIC:
            os.symlink(source, target)
        else:
            with open(open_regular(source), "rb") as read, target.open("xb") as written:
                shutil.copyfileobj(read, written)
    except FileExistsError as error:
        raise DataError(
            f"{source}: this name, as UTF-8, is taken in the export; rename the file or its class"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{source} has moved during the export; export again") from error
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise DataError(f"{source} is on another disk than the export: use --link copy") from error
        raise


WRITERS: Mapping[ExportFormat, Callable[[Images, Path, ExportOptions, FloatArray | None, Tell], None]] = {
    ExportFormat.CSV: _write_csv,
    ExportFormat.JSONL: _write_jsonl,
    ExportFormat.PARQUET: _write_parquet,
    ExportFormat.IMAGEFOLDER: _write_imagefolder,
    ExportFormat.COCO: _write_coco,
    ExportFormat.FIFTYONE: _write_fiftyone,
    ExportFormat.DATASETS: _write_datasets,
}
