"""The command ``bulk plan``: the manifest of a run, a list of images in parts, and where everything of a run lies."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sortd.bulk.storage import StoredFile, list_images, local_path, uri_of
from sortd.commands.console import counted, printable, say
from sortd.errors import DataError, DestinationError
from sortd.files import read_regular, text_of, write_atomic, write_json

VERSION = 1
"""Of the form of a run."""
PLAN_FILE, MANIFEST, DECISIONS = "plan.json", "manifest", "decisions"
FEWEST_ROWS, MOST_ROWS = 256, 4096
"""Images of a part: the unit that is decided again after a failure."""
PARTS_BEFORE = 64
"""A part holds at most this fraction of what stands before it, so that many machines are busy until the end."""
MANIFEST_SCHEMA = pa.schema([
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    ("mtime_ns", pa.int64()),
    ("etag", pa.string()),
])  # fmt: skip
DECISIONS_SCHEMA = pa.schema([
    pa.field("id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    ("label", pa.string()),
    ("probability", pa.float64()),
    ("margin", pa.float64()),
    ("familiarity", pa.float64()),
    ("reason", pa.string()),
    ("mode", pa.string()),
    ("encoder_id", pa.string()),
    ("embedding", pa.list_(pa.float16())),
    ("sha256", pa.string()),
])  # fmt: skip
"""Of the images that could not be read, all but id, uri and reason are null."""
_PART = re.compile(r"part-(\d{5,})\.parquet")

Tell = Callable[[str, int, int], None]


def version_id(image: StoredFile) -> str:
    """Return the id of one version of an image: 128 bits of the hash of its URI, size and mtime or etag."""
    facts = json.dumps([image.uri, image.size, image.mtime_ns, image.etag])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def part_name(number: int) -> str:
    """Return the file name of a part of the manifest, and of its decisions."""
    return f"part-{number:05}.parquet"


def parts_of(folder: Path) -> dict[int, Path]:
    """Return the complete parts in a folder of a run by number, sorted; none if there is no folder."""
    names = os.listdir(folder) if folder.is_dir() else ()
    return dict(sorted((int(found[1]), folder / name) for name in names if (found := _PART.fullmatch(name))))


def read_run(run: Path) -> dict[str, Any]:
    """Return the version, source, time and number of images of a run; raise DataError if it has no valid plan."""
    try:
        facts: dict[str, Any] = json.loads(read_regular(run / PLAN_FILE))
        if facts["version"] != VERSION or not isinstance(facts["count"], int):
            raise DataError(f"{run} is of another version of sortd; plan it again")
    except FileNotFoundError as error:
        raise DataError(f"{run} has no complete plan; make one: sortd bulk plan SOURCE --out {run}") from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{run / PLAN_FILE} cannot be read: {error}") from error
    return facts


def write_table(file: Path, table: pa.Table) -> None:
    """Write a Parquet file, which has its name only when it is complete and durable; raises DestinationError."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    try:
        write_atomic(file, sink.getvalue())
    except OSError as error:
        raise DestinationError(f"{file} cannot be written: {error.strerror}; free space or name another run") from error


def make_plan(
    source: str, run: Path, *, fewest_rows: int = FEWEST_ROWS, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """List the images of a source into the manifest of a new run; return its facts and what could not be read.

    No more names than those of one part are held in memory.

    Raises DataError: the source cannot be listed or has no image, or the run exists; DestinationError.
    """
    if os.path.lexists(run) and not (run.is_dir() and not any(run.iterdir())):
        raise DataError(f"{run} exists; nothing is overwritten, so name another folder or move it away")
    unread: list[str] = []
    errors = 0

    def report(error: OSError) -> None:
        nonlocal errors
        errors += 1
        if len(unread) < 10:  # noqa: PLR2004 -- examples are enough
            unread.append(text_of(str(error)))

    images = list_images(source, report=report)
    path, count, parts = local_path(source), 0, 0
    while rows := list(islice(images, min(MOST_ROWS, max(fewest_rows, count // PARTS_BEFORE)))):
        if not parts:  # a source that cannot be listed leaves no folder behind
            try:
                (run / MANIFEST).mkdir(parents=True)
            except OSError as error:
                raise DestinationError(f"{run} cannot be made: {error.strerror}; name another folder") from error
        table = pa.Table.from_pylist([{"id": version_id(one), **asdict(one)} for one in rows], schema=MANIFEST_SCHEMA)
        write_table(run / MANIFEST / part_name(parts), table)
        count, parts = count + len(rows), parts + 1
        tell("listing", count, 0)
    if not count:
        raise DataError(f"{source} has no image" + (f"; {unread[0]}" if unread else ""))
    facts = {
        "version": VERSION,
        "source": source if path is None else uri_of(os.path.abspath(path)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "count": count,
    }
    write_json(run / PLAN_FILE, facts)  # the last file: it says that the manifest is complete
    return {**facts, "run": os.fspath(run), "parts": parts, "errors": errors, "examples": unread}


def decided_rows(run: Path, columns: Sequence[str], *, at_once: int = 1_000) -> Iterator[list[dict[str, Any]]]:
    """Yield columns of the decisions of a run, in lists of ``at_once`` rows; raise DataError if they are damaged."""
    for path in parts_of(run / DECISIONS).values():
        try:
            with pq.ParquetFile(path) as part:
                _require_columns(part, columns)
                for batch in part.iter_batches(at_once, columns=list(columns), use_threads=False):
                    yield batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete it, and decide again") from error


def _require_columns(part: pq.ParquetFile, columns: Sequence[str]) -> None:
    found = {field.name: field.type for field in part.schema_arrow}
    if other := [name for name in columns if found.get(name) != DECISIONS_SCHEMA.field(name).type]:
        raise ValueError(f"it has no valid {', '.join(other)}")


def print_planned(facts: dict[str, Any]) -> None:
    """Print what ``make_plan`` returned."""
    for example in facts["examples"]:
        say(f"sortd: {printable(example)}")
    unread = f"; {counted(facts['errors'], 'entry')} could not be read" if facts["errors"] else ""
    say(f"sortd: {counted(facts['count'], 'image')} in {counted(facts['parts'], 'part')} of {facts['run']}{unread}")
