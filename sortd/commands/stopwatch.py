"""The stopwatch: each stage of an image's way timed by itself, on files that stay as they are and on copies."""

import os
import shutil
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np

from sortd.arrays import FloatArray, Pixels
from sortd.classify.decide import decide
from sortd.classify.prototypes import PrototypeSet
from sortd.commands.stored import stored_prototypes
from sortd.config import Config
from sortd.encoder.base import Encoder
from sortd.errors import DataError, LayoutError
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.layout import Area, Layout, find_datasets
from sortd.messages import EmbeddedImage, Move, Outcome, Stamp
from sortd.running.embedding import Embedder
from sortd.running.holding import hold
from sortd.watching.scanning import stamp

FORWARD_SECONDS = 6.0
DECODE_SECONDS = 6.0
"""How long the long stages may take, about."""

LEAST_DECODED = 4
LEAST_ROUNDS = 3

File = tuple[str, Stamp]


def read_milliseconds(files: Sequence[File]) -> float:
    """Return the milliseconds that reading an image takes, from the disk where the system lets go of its memory."""
    times = []
    for path, _ in files:
        with suppress(OSError), open(path, "rb") as file:  # it may be gone by now
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = perf_counter()
            while file.read(1 << 20):
                pass
            times.append(perf_counter() - began)
    return 1e3 * statistics.fmean(times) if times else 0.0


def decode(config: Config, encoder: Encoder, files: Sequence[File]) -> tuple[float, Pixels]:
    """Return the milliseconds that one process takes an image, and pixels (B, height, width, 3).

    Raises:
        DataError: none of the files can be decoded.
    """
    decoding, decoded = config.decoding, list[DecodedImage]()
    limits = DecodeLimits(
        max_pixels=decoding.max_pixels, max_side=decoding.max_side_pixels, max_bytes=decoding.max_bytes
    )
    with DecoderPool(1, encoder.preprocessing, limits, decoding.timeout_seconds, jpeg=decoding.jpeg) as pool:
        list(pool.decode_all(files[:1]))  # it has started now
        until = perf_counter() + DECODE_SECONDS
        for answer in pool.decode_all(files):
            if isinstance(answer, DecodedImage):
                decoded.append(answer)
            if perf_counter() > until and len(decoded) >= LEAST_DECODED:
                break
    if not decoded:
        raise DataError(f"none of {len(files)} images can be decoded; `sortd check` says more")
    return 1e3 * statistics.fmean(one.decode_seconds for one in decoded), np.stack([one.pixels for one in decoded])


def forward_milliseconds(encoder: Encoder, pixels: Pixels, *, most: int) -> dict[int, float]:
    """Return, by batch size, the milliseconds an image that a forward takes: medians, the sizes in turn."""
    sizes = sorted({1, min(8, most), most})
    batches = {size: np.resize(pixels, (size, *pixels.shape[1:])) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    encoder.encode_images(batches[most])
    until = perf_counter() + FORWARD_SECONDS
    while len(times[most]) < LEAST_ROUNDS or perf_counter() < until:
        for size, batch in batches.items():
            began = perf_counter()
            encoder.encode_images(batch)
            times[size].append(1e3 * (perf_counter() - began) / size)
    return {size: statistics.median(taken) for size, taken in times.items()}


def embed(embedder: Embedder, files: Sequence[File]) -> tuple[FloatArray, float]:
    """Return the embeddings (B, d) of files through the pipeline, and the seconds that it took.

    Raises:
        DataError: none of the files can be decoded.
    """
    began = perf_counter()
    answers = [answer for answer in embedder.embed(files) if isinstance(answer, EmbeddedImage)]
    seconds = perf_counter() - began
    if not answers:
        raise DataError(f"none of {len(files)} images can be decoded; `sortd check` says more")
    return np.stack([answer.embedding for answer in answers]), seconds


def decide_milliseconds(config: Config, encoder: Encoder, rows: FloatArray) -> float | None:
    """Time decisions by the largest of the prototypes that serve; None where none fits this encoder."""
    kept: list[PrototypeSet | None] = []
    with suppress(LayoutError):  # images of any folder can be measured without a dataset
        kept = [stored_prototypes(config, layout) for layout in find_datasets(config.root)]
    fitting = [one for one in kept if one is not None and one.encoder_id == encoder.encoder_id]
    if not fitting:
        return None
    largest = max(fitting, key=lambda one: len(one.references))
    batch = rows[: max(1, config.batch_size // 2)]
    times = []
    for _ in range(10):
        began = perf_counter()
        decide(largest, batch)
        times.append(1e3 * (perf_counter() - began) / len(batch))
    return statistics.median(times)


def move_milliseconds(scratch: Path, files: Sequence[File]) -> float | None:
    """Move copies from one folder of a scratch dataset to another, journal and all, as one group."""
    layout = Layout(scratch / "Data" / "bench")
    layout.root.mkdir(parents=True)
    layout.make()
    inbox, moves = layout.area(Area.IMAGES), []
    for number, (path, _) in enumerate(files):
        copy = inbox / f"{number}{os.path.splitext(path)[1]}"
        with suppress(FileNotFoundError):
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())  # it would have been written long before it is moved
        mark = stamp(os.fspath(copy))
        if mark is not None:
            moves.append(Move(os.fspath(copy), mark, "Dataset/bench", Outcome.FILED))
    with hold(layout, scratch / "state", run="bench") as held:
        began = perf_counter()
        held.filing.move_all(moves)
        return 1e3 * (perf_counter() - began) / len(moves) if moves else None
