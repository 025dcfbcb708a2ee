"""The images of a bulk run with classes, for ``sortd finetune --manifest``; objects of a store are downloaded first."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sortd.bulk.plan import MANIFEST, decided_rows, parts_of, version_id
from sortd.bulk.storage import StoredFile, local_path, read_bytes
from sortd.commands.console import counted, printable, say
from sortd.companions import IMAGES
from sortd.config import Config
from sortd.daemon.references import class_name_problem
from sortd.errors import DataError
from sortd.finetune.recipe import LabelledImage, LabelSource
from sortd.watch.scan import stamp

THREADS = 16


@contextmanager
def training_images(run: Path, labels: LabelSource, config: Config) -> Iterator[tuple[LabelledImage, ...]]:
    """Yield the images of a run that have a class; objects of a store are on this disk until the block ends.

    Images that are gone, changed or unreadable are left out; their number is printed. Objects are downloaded into the
    state directory.

    Raises:
        DataError: the run is damaged, or none of its images has a class.
    """
    rows = list(_decided(run) if labels is LabelSource.DECISIONS else _in_folders(run))
    if not rows:
        raise DataError(f"no image of {run} has a class by its {labels}")
    config.state_dir.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix="training-", dir=config.state_dir) as folder,
        ThreadPoolExecutor(THREADS, "bulk") as pool,
    ):
        paths = list(pool.map(lambda row: _file_of(row, Path(folder), config.decoding.max_bytes), rows))
        found = [(path, row["label"]) for path, row in zip(paths, rows, strict=True) if path is not None]
        if left_out := len(rows) - len(found):
            say(f"sortd: {counted(left_out, 'image')} of {printable(str(run))} left out: gone, changed or unreadable")
        yield tuple(LabelledImage(path, label, labels is LabelSource.FOLDERS) for path, label in found)


def _decided(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the assigned images of a run."""
    for rows in decided_rows(run, ("id", "uri", "label", "sha256")):
        for row in rows:
            if row["label"] is not None and class_name_problem(row["label"]) is None:
                yield row


def _in_folders(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the images of a run with the names of their folders."""
    for file in parts_of(run / MANIFEST).values():
        try:
            rows = pq.read_table(file, columns=["id", "uri"], use_threads=False).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} cannot be read: {error}; plan the run again") from error
        for row in rows:
            label = os.path.basename(os.path.dirname(local_path(row["uri"]) or row["uri"]))
            if class_name_problem(label) is None:
                yield {**row, "label": label, "sha256": None}


def _file_of(row: Mapping[str, Any], folder: Path, max_bytes: int) -> str | None:
    """Return a file on this disk with the planned, or decided, bytes of an image; None if there is none."""
    uri: str = row["uri"]
    path = local_path(uri)
    try:
        if path is not None:
            found = stamp(path)
            is_it: bool = found is not None and version_id(StoredFile(uri, found.size, found.mtime_ns)) == row["id"]
            return path if is_it else None
        content = read_bytes(uri, limit=max_bytes)
    except (OSError, ValueError):
        return None
    if row["sha256"] not in {None, hashlib.sha256(content).hexdigest()}:
        return None
    suffix = os.path.splitext(uri)[1].lower()
    own = folder / (hashlib.sha256(row["id"].encode()).hexdigest() + (suffix if suffix in IMAGES else ""))
    own.write_bytes(content)
    return os.fspath(own)
