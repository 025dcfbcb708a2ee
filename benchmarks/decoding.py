"""Measure decoding in separate processes and in the daemon's, and of JPEG in draft and in full.

    python -m benchmarks.decoding [--count 60] [--rounds 6] [--side 1600] [--json]

The images are synthetic JPEGs of smooth colours and grain, 4:3. Each way decodes all of them in each round. The ratios
are of the processor time of all processes together, on which other load has the least influence, if not said otherwise.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.comparison import Claim, Piece, Side, alternate, claim_of_ratio, conclude, summary, timed
from benchmarks.harness import argument_parser, processor_seconds
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


def side_of(way: Way, pool: DecoderPool | None, files: Files) -> Side:
    """Return a side that decodes all files, in this thread if there is no pool."""

    def work() -> int:
        if pool is None:
            for path, _ in files:
                decode_file(path, SEEN, DecodeLimits(), jpeg=way.jpeg)
                sha256_of(Path(path))
            return len(files)
        batches = [[file] for file in files] if way.one_by_one else [files]
        answers = [answer for batch in batches for answer in pool.decode_all(batch)]
        assert all(isinstance(answer, DecodedImage) for answer in answers)
        return len(files)

    return timed(work, processor=lambda: processor_seconds(os.getpid()))


def measure(files: Files, rounds: int) -> dict[str, list[Piece]]:
    """Measure every way."""
    with ExitStack() as stack:
        sides = {}
        for way in WAYS:
            pool = None
            if way.processes:
                pool = stack.enter_context(DecoderPool(way.processes, SEEN, DecodeLimits(), jpeg=way.jpeg))
                list(pool.decode_all(files[:8]))  # the processes start
            sides[way.name] = side_of(way, pool, files)
        return alternate(sides, rounds=rounds)


def claims_of(pieces: dict[str, list[Piece]]) -> list[Claim]:
    """Return the ratios of what an image costs, without limits."""
    here, isolated = "in the thread, draft", "1 process, draft"
    by_processor = partial(claim_of_ratio, pieces=pieces, of_processor_time=True)
    return [
        by_processor("isolation, draft", over=here, under=isolated),
        by_processor("isolation, draft, one by one", over=here, under="1 process, draft, one by one"),
        by_processor("isolation, full", over="in the thread, full", under="1 process, full"),
        by_processor("full to draft", over=here, under="in the thread, full"),
        claim_of_ratio("isolation by the clock, draft", pieces, here, isolated),
        claim_of_ratio("2 processes to 1, images a second", pieces, "2 processes, draft", isolated),
    ]


def main() -> int:
    """Measure, and print."""
    parser = argument_parser(__doc__, rounds=6)
    parser.add_argument("--count", type=int, default=60, help="images")
    parser.add_argument("--side", type=int, default=1600, help="pixels of the longer side")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pieces = measure(draw(Path(folder), asked.count, asked.side), asked.rounds)
    return conclude(summary(pieces), claims_of(pieces), as_json=asked.json, rounds=asked.rounds)


if __name__ == "__main__":
    sys.exit(main())
