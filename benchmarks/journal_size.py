"""Bytes of the journal for each image, by table and index, and the seconds of the queries that read it.

    python -m benchmarks.journal_size [--images 50000] [--json]

The moves are made by the journal itself: an image of 2 MB in eight from a folder of its own day, filed into one of 40
classes with its content and its scores, one in ten with a companion.
"""

import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from benchmarks.harness import argument_parser, print_json
from sortd.events import Stamp
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import MoveFile, MoveProgress, MoveReason, MoveRecord, Role, Selection

AT_ONCE = 500
SECONDS_APART = 3.0
BEGAN = 1_750_000_000.0


def moves(count: int) -> Iterator[tuple[MoveRecord, MoveReason]]:
    """Yield moves that have ended, with their reasons."""
    for number in range(count):
        content = sha256(str(number).encode()).hexdigest()
        name = f"IMG_2026{number % 12 + 1:02}{number % 28 + 1:02}_{number:07}.jpg"
        stamp = Stamp(64_768, 5_000_000 + 3 * number, 2_000_000 + 37 * number, 1_750_000_000_000_000_000 + number)
        file = MoveFile(Role.IMAGE, name, name, stamp, content, final=name, moved_stamp=stamp)
        companion = replace(file, role=Role.COMPANION, name=f"{name}.xmp", wanted=f"{name}.xmp", final=f"{name}.xmp")
        label = f"class_{number % 40:02}"
        source = f"Images/2026-{number % 12 + 1:02}" if number % 8 == 0 else "Images"
        yield (
            MoveRecord(
                content[:16],
                source,
                f"Dataset/{label}",
                (file, companion) if number % 10 == 0 else (file,),
                MoveProgress.DONE,
            ),
            MoveReason(
                *("filed", label, 0.93 + number % 60 / 1000, 0.4, f"class_{(number + 1) % 40:02}", "mixed", ""),
                generation=7,
                encoder_id="clip-512-onnx-fp32-59407d2b58559c06",
                content=content,
            ),
        )


def make_journal(file: Path, count: int) -> None:
    """Write a journal with this many moves."""
    now = BEGAN

    def clock() -> float:
        nonlocal now
        now += SECONDS_APART
        return now

    with Journal(file, clock=clock, run="0123abcd") as journal:
        journal.connection.execute("PRAGMA synchronous = OFF")
        made = list[tuple[MoveRecord, MoveReason]]()
        for one in moves(count):
            made.append(one)
            if len(made) == AT_ONCE:
                _write(journal, made)
                made = []
        _write(journal, made)
        journal.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _write(journal: Journal, made: "list[tuple[MoveRecord, MoveReason]]") -> None:
    journal.intend([(replace(move, progress=MoveProgress.INTENDED), reason) for move, reason in made])
    journal.settle([move for move, _ in made])


def bytes_by_table(file: Path) -> dict[str, int]:
    """Return the bytes of each table and index, by its name."""
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC").fetchall()
    return dict(rows)


def measure(count: int) -> dict[str, object]:
    """Return the bytes for each image and the milliseconds of queries, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal.sqlite"
        make_journal(file, count)
        size, tables = file.stat().st_size, bytes_by_table(file)
        with History.open(file) as history:
            timed = {}
            last = history.moves(Selection(limit=1))[0]
            for name, query in {
                "newest fifty": lambda: history.moves(Selection(limit=50)),
                "by version": lambda: history.last_known(last.move.image.stamp),
                "by content": lambda: history.last_known(content=last.move_reason.content),
                "by place": lambda: history.last_put(last.move.destination, last.move.image.final),
                "by class": lambda: history.moves(Selection(label=last.move_reason.label, limit=50)),
                "counts": history.counts,
            }.items():
                began = time.perf_counter()
                query()
                timed[name] = round(1e3 * (time.perf_counter() - began), 2)
    return {
        "images": count,
        "bytes": size,
        "bytes_per_image": round(size / count, 1),
        "bytes_per_image_by_table": {name: round(one / count, 1) for name, one in tables.items()},
        "milliseconds": timed,
    }


def main() -> None:
    """Print the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    arguments = parser.parse_args()
    figures = measure(arguments.images)
    if arguments.json:
        print_json(figures, n=1)
        return
    print(f"{figures['images']:,} images: {figures['bytes_per_image']} bytes each")
    for key in ("bytes_per_image_by_table", "milliseconds"):
        values = figures[key]
        assert isinstance(values, dict)
        print(key.replace("_", " "))
        for name, value in values.items():
            print(f"  {value:>8} {name}")


if __name__ == "__main__":
    main()
