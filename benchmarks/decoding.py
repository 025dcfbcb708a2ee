"""Measure decoding in separate processes and in the daemon's, and of JPEG in draft and in full.

    python -m benchmarks.decoding [--count 60] [--rounds 5] [--side 1600] [--json]

The images are synthetic JPEGs of smooth colours and grain, 4:3. Each way decodes all of them, in turns, and the figures
are medians over the rounds: milliseconds per image, by the clock and of processor time (all processes together). The
ratios are of processor time, on which other load has the least influence.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import argument_parser, print_json, processor_seconds
from sortd.events import Preprocessing, Stamp
from sortd.files import sha256_of, stamp_of
from sortd.images.decode import DecodeLimits, Jpeg, decode_file
from sortd.images.pool import DecodedImage, DecoderPool

SEEN = Preprocessing(224, 224, 224)

Files = Sequence[tuple[str, Stamp]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode."""

    name: str
    processes: int
    jpeg: Jpeg
    one_by_one: bool = False


WAYS = (
    Way("in the thread, draft", 0, "draft"),
    Way("in the thread, full", 0, "full"),
    Way("1 process, draft", 1, "draft"),
    Way("1 process, draft, one by one", 1, "draft", one_by_one=True),
    Way("1 process, full", 1, "full"),
    Way("2 processes, draft", 2, "draft"),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds per image."""

    clock: float
    processor: float


def draw(folder: Path, count: int, side: int) -> Files:
    """Draw JPEGs of ``side`` by three quarters of it."""
    random = np.random.default_rng(0)
    size = (side, side * 3 // 4)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
        pixels = np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=88)
    return [(os.fspath(path), stamp_of(path.stat())) for path in sorted(folder.iterdir())]


def decode(way: Way, pool: DecoderPool | None, files: Files) -> None:
    """Decode all files, in this thread if there is no pool."""
    if pool is None:
        for path, _ in files:
            decode_file(path, SEEN, DecodeLimits(), jpeg=way.jpeg)
            sha256_of(Path(path))
        return
    batches = [[file] for file in files] if way.one_by_one else [files]
    answers = [answer for batch in batches for answer in pool.decode_all(batch)]
    assert all(isinstance(answer, DecodedImage) for answer in answers)


def measure(files: Files, rounds: int) -> dict[str, Cost]:
    """Measure every way, in turns."""
    pools = {
        way: DecoderPool(way.processes, SEEN, DecodeLimits(), jpeg=way.jpeg) if way.processes else None for way in WAYS
    }
    costs: dict[Way, list[Cost]] = {way: [] for way in WAYS}
    try:
        for way, pool in pools.items():
            decode(way, pool, files[:8])
        for _ in range(rounds):
            for way, pool in pools.items():
                began, spent = time.perf_counter(), processor_seconds(os.getpid())
                decode(way, pool, files)
                clock = time.perf_counter() - began
                processor = processor_seconds(os.getpid()) - spent
                costs[way].append(Cost(1e3 * clock / len(files), 1e3 * processor / len(files)))
    finally:
        for pool in pools.values():
            if pool is not None:
                pool.close()
    return {
        way.name: Cost(
            statistics.median(cost.clock for cost in rounds_of), statistics.median(cost.processor for cost in rounds_of)
        )
        for way, rounds_of in costs.items()
    }


def ratios(costs: dict[str, Cost]) -> dict[str, float]:
    """Return the ratios of processor time."""
    here, isolated = costs["in the thread, draft"], costs["1 process, draft"]
    return {
        "isolation, draft": isolated.processor / here.processor,
        "isolation, draft, one by one": costs["1 process, draft, one by one"].processor / here.processor,
        "isolation, full": costs["1 process, full"].processor / costs["in the thread, full"].processor,
        "full to draft": costs["in the thread, full"].processor / here.processor,
        "isolation by the clock, draft": isolated.clock / here.clock,
        "2 processes to 1, images a second": isolated.clock / costs["2 processes, draft"].clock,
    }


def main() -> None:
    """Measure, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=60, help="images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=1600, help="pixels of the longer side")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(draw(Path(folder), asked.count, asked.side), asked.rounds)
    if asked.json:
        milliseconds = {name: asdict(cost) for name, cost in costs.items()}
        print_json({"milliseconds": milliseconds, "ratios": ratios(costs)}, n=asked.rounds)
        return
    for name, cost in costs.items():
        print(f"{name:32s} {cost.clock:7.2f} ms  {cost.processor:7.2f} ms of processors")
    for name, ratio in ratios(costs).items():
        print(f"{name:36s} {ratio:6.2f}")


if __name__ == "__main__":
    main()
