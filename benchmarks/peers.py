"""Compare sortd with the ways in which two other programs embed photos, on the same model file and the same photos.

    python -m benchmarks.peers [--sizes 640x480 4000x3000] [--backends onnx onnx-int8] [--rounds 6] [--json]

Both ways are written anew from these descriptions; sortd also decides about each photo, journals it and moves it.

    indexer   the way of rclip's indexer: two threads read files, hash the first 64 kB of each with SHA-256, decode in
              full and resize, up to three batches ahead; ONNX Runtime with its default options embeds batches of eight;
              rows go to SQLite, committed once for each folder
    service   the way of immich's service: two clients send a file each by HTTP to a server (starlette, uvicorn), which
              decodes it in full, embeds it alone (two threads for each pass, no arena) and returns its row as JSON

Each side runs in processes of its own, started before the rounds. The floors, in times the images a second: with photos
of 0.3 megapixels 1.1 times the indexer with float32, 1.2 times with int8; with larger photos 2.3 times both. With small
photos and int8, sortd's processes have at most 280 MiB of resident memory while they file; what they share counts for
each. From the line ``model.loaded`` of ``sortd once`` to its first image pass at most the settle time and 0.3 s.
"""

import argparse
import math
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison import (
    Claim,
    Piece,
    Side,
    alternate,
    claim_of_ratio,
    conclude,
    interval_of_median,
    say,
    summary,
    timed,
)
from benchmarks.harness import Helper, argument_parser, peak_mebibytes, processor_seconds, reset_peaks
from benchmarks.peer_programs import BATCH, send_all
from benchmarks.workload import SETTLE_SECONDS, Filing, Material, add_options, run_once, size_of
from sortd.encoder.onnx_encoder import Precision, tower_file

SMALL_PIXELS = 1_000_000
SMALL_FLOORS = {"onnx": 1.1, "onnx-int8": 1.2}
FLOOR = 2.3
MOST_MEBIBYTES = 280
MOST_FIRST_SECONDS = SETTLE_SECONDS + 0.3


def peer_side(helper: Helper, material: Material, name: str, count: int) -> Side:
    """Return a side that has a peer embed so many photos."""
    folder = material.folder / name
    port = helper.ask("port") if name == "service" else None

    def side() -> Piece:
        files = material.photos.copy_next(folder, count)
        work = partial(helper.ask, folder) if port is None else partial(send_all, port, files)
        return timed(work, processor=partial(processor_seconds, helper.pid))()

    return side


def with_peak(side: Side, pid: int, peaks: list[float]) -> Side:
    """Return a side that appends the peak of its processes' memory to a list each time."""

    def watched() -> Piece:
        reset_peaks(pid)
        piece = side()
        peaks.append(peak_mebibytes(pid))
        return piece

    return watched


def measure(
    material: Material, backend: str, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], list[Claim]]:
    """Compare sortd with both peers on one model file; return what each side did, and the claims."""
    title, is_small = f"{options.pixels}, {backend}", math.prod(size_of(options.pixels)) < SMALL_PIXELS
    tower = material.export() / tower_file("image", Precision.INT8 if backend == "onnx-int8" else Precision.FP32)
    piece = options.piece if is_small else max(1, options.piece // 3)
    say(title)
    with ExitStack() as stack:
        filing = stack.enter_context(Filing(material, backend))
        sides, pids = {"sortd": filing.side(piece)}, {"sortd": filing.pid}
        for name in ("indexer", "service"):
            database = material.folder / f"{backend}.sqlite"
            helper = stack.enter_context(Helper("benchmarks.peer_programs", name, str(tower), str(database)))
            sides[name] = peer_side(helper, material, name, piece)
            sides[name]()  # the first pass takes longer
            pids[name] = helper.pid
        peaks: dict[str, list[float]] = {name: [] for name in sides}
        watched = {name: with_peak(side, pids[name], peaks[name]) for name, side in sides.items()}
        pieces = alternate(watched, rounds=options.rounds)
    floors = (SMALL_FLOORS[backend], None) if is_small else (FLOOR, FLOOR)
    claims = [
        claim_of_ratio(f"{title}: sortd over the {name}", pieces, "sortd", name, least=floor)
        for name, floor in zip(("indexer", "service"), floors, strict=True)
    ]
    for name, found in peaks.items():
        most = MOST_MEBIBYTES if is_small and name == "sortd" and backend == "onnx-int8" else None
        claims.append(Claim(f"{title}: peak memory of {name}, MiB", interval_of_median(found), most=most))
    return {f"{title}: {name}": done for name, done in summary(pieces).items()}, claims


def first_line(material: Material, backend: str, options: argparse.Namespace) -> Claim:
    """Return the seconds from ``model.loaded`` to the first image's line of ``sortd once``."""
    config, found = material.config(f"once {backend}", backend), []
    for number in range(options.rounds + 1):
        material.photos.copy_next(config.parent / "Data" / "Photos" / "Images", BATCH)
        run = run_once(config)
        found += [run.first_seconds] if number else []  # the first one embeds the references
    what = f"{options.pixels}, {backend}: seconds from model.loaded to the first image's line"
    return Claim(what, interval_of_median(found), most=MOST_FIRST_SECONDS)


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Measure, print and return the exit code."""
    sides: dict[str, dict[str, Any]] = {}
    claims: list[Claim] = []
    options.keep = options.keep or folder / "kept"
    for pixels in options.sizes:
        options.pixels = pixels
        material = Material(folder / pixels, options)
        for backend in options.backends:
            found, claimed = measure(material, backend, options)
            sides |= found
            claims += claimed
            if math.prod(size_of(pixels)) < SMALL_PIXELS:
                claims.append(first_line(material, backend, options))
    return conclude(sides, claims, as_json=options.json, rounds=options.rounds)


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=6)
    add_options(parser, photos=48, piece=48, backends=("onnx", "onnx-int8"))
    parser.add_argument("--sizes", nargs="+", default=["640x480", "4000x3000"], help="sizes of photos, each measured")
    options = parser.parse_args()
    if "torch" in options.backends:
        parser.error("the peers run ONNX files")
    with tempfile.TemporaryDirectory(prefix="sortd-bench-", dir=options.folder) as name:
        return compare(Path(name), options)


if __name__ == "__main__":
    sys.exit(main())
