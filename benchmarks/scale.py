"""Measure a large library: its prototypes, one added reference, no change, and a decision among ten thousand classes.

python -m benchmarks.scale [build] [rebuild] [decide] [--repeats 3] [--references 10000] [--library 100000]
    [--classes 10000] [--json]

build     random embeddings of 512 dimensions with names: 20,000 references of 200 classes and 4,000 of 1,000, each
          with ``strangers`` auto and 0.05. The fastest of the repeats, in seconds and in seconds of a processor, and
          the longest time between two pauses, in which the worker does nothing else, in the repeat where it is least

rebuild   small pictures on the disk as references of a hundred classes, through the decoders, the cache and an
          encoder that counts the images it sees; then one reference more; then no change. The floor: one more
          costs fewer than three forwards of an image, no change none
decide    random embeddings of 512 dimensions in so many classes; a lone decision and one of a batch of 16, in
          milliseconds, each as a multiple of what one product of the batch with all references takes, measured
          in the same run
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.harness import argument_parser, print_json
from sortd.classify.build import build
from sortd.classify.decide import decide
from sortd.classify.types import AbstainSettings, DecisionSettings, SupportSet
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import References, ReferenceSettings
from sortd.events import Mode, Preprocessing
from sortd.images.decode import DecodeLimits
from sortd.images.pool import DecoderPool
from sortd.store.cache import Cache

DIMENSIONS = 512
SIDE = 16
REBUILD_CLASSES = 100
MOST_FORWARDS = 3
BUILT = ((20_000, 200), (4_000, 1_000))
STRANGERS: tuple[float | Literal["auto"], ...] = ("auto", 0.05)
BATCH = 16


class CountingEncoder:
    """Encoder that projects small pictures at random, and counts them."""

    encoder_id = "counting-512"
    dimensions = DIMENSIONS
    preprocessing = Preprocessing(SIDE, SIDE, SIDE)
    has_text = False

    def __init__(self) -> None:
        """Start the count at zero."""
        self.images = 0
        self._projection = np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, DIMENSIONS)).astype(np.float32)

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pixels (B, 16, 16, 3) as unit rows (B, 512)."""
        self.images += len(pixels)
        rows = (pixels.reshape(len(pixels), -1).astype(np.float32) - 128.0) @ self._projection
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed no text."""
        raise NotImplementedError(texts)  # `has_text` is False, so asking is a mistake of the caller


def made_library(references: int, classes: int, *, named: bool) -> SupportSet:
    """Return random embeddings of classes that share a direction, and maybe names that resemble them."""
    dice = np.random.default_rng(0)
    looks = dice.standard_normal((classes, DIMENSIONS), np.float32)
    of = np.sort(np.arange(references) % classes)
    return SupportSet(
        labels=tuple(f"class {number:05}" for number in range(classes)),
        embeddings=_unit(2.0 + looks[of] + 2.0 * dice.standard_normal((references, DIMENSIONS), np.float32)),
        classes=of,
        sources=tuple(f"{number}.png" for number in range(references)),
        text=_unit(looks + dice.standard_normal(looks.shape, np.float32) - 1.0) if named else None,
        text_mean=np.full(DIMENSIONS, -0.03, np.float32) if named else None,
        encoder_id="random",
    )


def measure_build(repeats: int) -> dict[str, Any]:
    """Return the seconds of a build of two libraries, and the longest time between two of its pauses."""
    facts: dict[str, Any] = {"n": repeats}
    for references, classes in BUILT:
        support = made_library(references, classes, named=True)
        for strangers in STRANGERS:
            settings = DecisionSettings(Mode.MIXED, AbstainSettings(0.95, strangers))
            each = [_timed_build(support, settings) for _ in range(repeats)]
            facts[f"{references} references, {classes} classes, strangers {strangers}"] = {
                name: round(min(one[name] for one in each), 3) for name in each[0]
            }
    return facts


def _timed_build(support: SupportSet, settings: DecisionSettings) -> dict[str, float]:
    busy, paused = time.process_time(), [time.perf_counter()]
    build(support, settings, generation=1, pause=lambda: paused.append(time.perf_counter()))
    paused.append(time.perf_counter())
    return {
        "seconds": paused[-1] - paused[0],
        "processor_seconds": time.process_time() - busy,
        "longest_between_pauses": float(np.diff(paused).max()),
        "pauses": len(paused) - 2,
    }


def write_reference(clases: Path, number: int) -> None:
    """Write one small picture of a class: its look, and noise."""
    label = number % REBUILD_CLASSES
    look = np.random.default_rng(label).integers(60, 196, (SIDE, SIDE, 3))
    noise = np.random.default_rng([1, number]).normal(0, 25, look.shape)
    folder = clases / f"class {label:03}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(look + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")


def measure_rebuild(folder: Path, references: int) -> dict[str, Any]:
    """Return the seconds and encoded images of a build, of one with one more reference, and of one without a change."""
    clases = folder / "Clases"
    for number in range(references):
        write_reference(clases, number)
    encoder, reference_settings = (
        CountingEncoder(),
        ReferenceSettings(DecisionSettings(Mode.BEST, AbstainSettings(0.95, "auto"))),
    )
    facts: dict[str, Any] = {"references": references, "floor_forwards": MOST_FORWARDS}
    with DecoderPool(2, encoder.preprocessing, DecodeLimits()) as pool, Cache(folder / "embeddings.sqlite") as cache:
        embedder, read = Embedder(encoder, pool, cache), References(clases)
        previous = None
        for generation, name in enumerate(("first", "one_more", "no_change"), 1):
            if name == "one_more":
                write_reference(clases, references)
            before, began = encoder.images, time.perf_counter()
            rebuilt = read.rebuild(embedder, reference_settings, previous=previous, generation=generation)
            facts[f"{name}_seconds"] = round(time.perf_counter() - began, 3)
            facts[f"{name}_images_encoded"] = encoder.images - before
            previous = rebuilt.prototypes
    return facts


def measure_decide(references: int, classes: int) -> dict[str, Any]:
    """Measure decisions in two modes, and a bare product with all references."""
    dice = np.random.default_rng(0)
    looks = dice.standard_normal((classes, DIMENSIONS), np.float32)
    of = np.sort(np.arange(references) % classes)
    rows = looks[of] + dice.standard_normal((references, DIMENSIONS), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = looks[:BATCH] + dice.standard_normal((BATCH, DIMENSIONS), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    product = {size: _milliseconds(lambda part: part @ rows.T, queries[:size]) for size in (1, BATCH)}
    facts: dict[str, Any] = {"references": references, "classes": classes}
    for mode in (Mode.MAX, Mode.BEST):
        support = SupportSet(
            labels=tuple(f"class {number:05}" for number in range(classes)),
            embeddings=rows,
            classes=of,
            sources=tuple(f"{number}.png" for number in range(references)),
            encoder_id="random",
        )
        began = time.perf_counter()
        prototypes = build(support, DecisionSettings(mode, AbstainSettings(0.95, "auto")), generation=1)
        built = time.perf_counter() - began
        taken = {size: _milliseconds(partial(decide, prototypes), queries[:size]) for size in (1, BATCH)}
        facts[mode.value] = {
            "build_seconds": round(built, 1),
            "alone_ms": round(taken[1], 2),
            "of_a_batch_ms": round(taken[BATCH] / BATCH, 2),
            "alone_in_products": round(taken[1] / product[1], 1),
            "batch_in_products": round(taken[BATCH] / product[BATCH], 1),
        }
    return facts


def _milliseconds(work: Callable[[npt.NDArray[np.float32]], object], batch: npt.NDArray[np.float32]) -> float:
    work(batch)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        work(batch)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def main() -> int:
    """Print the requested measurements; exit 1 if a limit is not met."""
    parser = argument_parser(__doc__)
    parser.add_argument("what", nargs="*", default=["build", "rebuild", "decide"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--library", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=10_000)
    arguments = parser.parse_args()
    facts: dict[str, Any] = {}
    if "build" in arguments.what:
        facts["build"] = measure_build(arguments.repeats)
    if "rebuild" in arguments.what:
        with tempfile.TemporaryDirectory(prefix="sortd-bench-") as name:
            facts["rebuild"] = measure_rebuild(Path(name), arguments.references)
    if "decide" in arguments.what:
        facts["decide"] = measure_decide(arguments.library, arguments.classes)
    print_json(facts, n=1)
    rebuilt = facts.get("rebuild", {"one_more_images_encoded": 0, "no_change_images_encoded": 0})
    is_reached = rebuilt["one_more_images_encoded"] < MOST_FORWARDS and rebuilt["no_change_images_encoded"] == 0
    return 0 if is_reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
