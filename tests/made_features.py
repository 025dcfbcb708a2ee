"""Embeddings for the tests of the decision core: made, and the real ones that are there."""

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sortd.classify.types import SupportSet

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

FEATURES = Path(__file__).parents[2] / "shared" / "data" / "features"
"""Where the files of real CLIP embeddings lie; tests take those that are there, beside made ones."""
NAMES = ("caltech101", "dtd", "oxford_pets", "ucf101")


def unit(rows: npt.ArrayLike) -> Array:
    """Return rows of unit length."""
    exact = np.asarray(rows, dtype=np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=-1, keepdims=True), dtype=np.float32)


class Blobs:
    """Classes as Gaussian clouds around a common direction, as CLIP has it; a seed gives the same ones always."""

    def __init__(self, classes: int, *, width: int = 64, spread: float = 1.0, seed: int = 0) -> None:
        """Place the centres; ``spread`` is how far images lie from them."""
        self.generator = np.random.default_rng(seed)
        self.common = 2.0 * self.generator.standard_normal(width)
        self.centres = self.generator.standard_normal((classes, width))
        self.spread = spread

    def draw(self, labels: npt.ArrayLike) -> Array:
        """Return an image of each label."""
        index = np.asarray(labels, dtype=np.int64)
        noise = self.spread * self.generator.standard_normal((len(index), self.centres.shape[1]))
        return unit(self.common + self.centres[index] + noise)

    def strangers(self, count: int) -> Array:
        """Return images of no class."""
        width = self.centres.shape[1]
        return unit(self.common + np.sqrt(2.0) * self.generator.standard_normal((count, width)))

    def names(self, noise: float) -> tuple[Array, Array]:
        """Return text prototypes that know the centres but for some noise, on their side of a gap, and their mean."""
        gap = 3.0 * self.generator.standard_normal(self.centres.shape[1])
        raw = gap + self.centres + noise * self.generator.standard_normal(self.centres.shape)
        return unit(raw), np.asarray(gap / np.linalg.norm(raw, axis=1).mean(), dtype=np.float32)


def support_set(
    embeddings: Array,
    classes: npt.ArrayLike,
    labels: int | None = None,
    *,
    text: Array | None = None,
    text_mean: Array | None = None,
    strangers: Array | None = None,
) -> SupportSet:
    """Return a support set with labels ``a000``, ``a001`` and so on."""
    index = np.asarray(classes, dtype=np.int64)
    count = labels if labels is not None else int(index.max(initial=-1)) + 1
    return SupportSet(
        labels=tuple(f"a{label:03d}" for label in range(count)),
        embeddings=embeddings,
        classes=index,
        sources=tuple(f"Clases/a{label:03d}/{row}.png" for row, label in enumerate(index)),
        text=text,
        text_mean=text_mean,
        strangers=np.zeros((0, embeddings.shape[1]), np.float32) if strangers is None else strangers,
        encoder_id="made up",
    )


def worlds(*real: str) -> list[str]:
    """Return names of worlds for ``load_world``: a made one always, and those of these real ones that are there."""
    return ["made", *(name for name in real if (FEATURES / f"{name}.npz").is_file())]


def load_world(name: str, each: int, *, seed: int = 0) -> tuple[SupportSet, Array, IntArray]:
    """Return a support set with ``each`` references a class, and queries (n, d) with their classes (n,).

    ``made`` and names that begin with it are drawn: 40 classes that differ in all directions, and vary most in twelve
    that say nothing of the class, as light and background do. All other names are files of real CLIP embeddings.
    """
    if name.startswith("made"):
        return _made_world(each, seed=zlib.crc32(name.encode()) + seed)
    with np.load(FEATURES / f"{name}.npz") as data:
        pool, labels = unit(data["reference_pool"]), data["reference_labels"].astype(np.int64)
        queries, right = unit(data["queries"]), data["query_labels"].astype(np.int64)
    generator = np.random.default_rng(seed)
    rows = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == label))[:each] for label in range(int(labels.max()) + 1)]
    )
    return support_set(pool[rows], labels[rows]), queries, right


def _made_world(each: int, *, seed: int) -> tuple[SupportSet, Array, IntArray]:
    classes, queries, width, directions = 60, 12, 96, 12
    generator = np.random.default_rng(seed)
    common, centres = 2.0 * generator.standard_normal(width), generator.standard_normal((classes, width))
    shared = np.linalg.qr(generator.standard_normal((width, directions)))[0].T * np.sqrt(width / directions)

    def draw(labels: IntArray) -> Array:
        own = 1.6 * generator.standard_normal((len(labels), width))
        return unit(common + centres[labels] + own + generator.standard_normal((len(labels), directions)) @ shared)

    references, asked = np.repeat(np.arange(classes), each), np.repeat(np.arange(classes), queries)
    return support_set(draw(references), references), draw(asked), asked
