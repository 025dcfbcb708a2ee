"""The library: the references of a dataset as rows sorted by class, near-duplicates merged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray

Pause = Callable[[], None]
"""Called between the parts of a long computation, so that its thread can answer other requests."""

CELLS = 250_000
"""Cells of a table computed at once: the intermediate results then fit into the processor's cache."""
LARGEST_DISTANCE = 0.05
"""Largest cosine distance of near-duplicates. On CLIP ViT-B/32 features of four public sets, 5 % of the references have
another reference of their class within it, and merging them cost no accuracy."""
SHARE_OF_MEDIAN = 0.125
"""The same limit as a share of the median distance, for encoders whose embeddings lie closer together."""
SAMPLE = 512
ROUNDING = 1e-6
"""Cosine distance within which two references are always duplicates."""


def no_pause() -> None:
    """Do nothing."""


def parts(rows: int, columns: int, cells: int | None = None, *, pause: Pause = no_pause) -> Iterator[slice]:
    """Yield consecutive row slices of at most ``cells`` cells (default: CELLS), at least one row; pause after each."""
    size = max((CELLS if cells is None else cells) // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
        pause()


def unit_rows(rows: Array) -> Array:
    """Return rows (…, d) scaled to unit length; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), dtype=np.float64)


def count_classes(classes: IntArray, labels: int) -> IntArray:
    """Return (C,) the number of rows of each class."""
    return np.bincount(classes, minlength=labels).astype(np.int64)


def class_means(
    rows: npt.NDArray[np.floating],
    classes: IntArray,
    counts: IntArray,
    *,
    about: Array | None = None,
    pause: Pause = no_pause,
) -> Array:
    """Return (C, d) means of rows that are sorted by class, or of their squared differences from ``about`` (d,).

    The mean of a class is zero if its count is, even if it has rows.
    """
    sums = np.zeros((len(counts), rows.shape[1]))
    for part in parts(*rows.shape, pause=pause):
        starts = np.flatnonzero(np.diff(classes[part], prepend=-1))
        block = rows[part].astype(np.float64, copy=False)
        if about is not None:
            block = np.square(block - about)
        sums[classes[part][starts]] += np.add.reduceat(block, starts, axis=0)
    sums[counts == 0] = 0.0
    sums /= np.maximum(counts, 1)[:, None]
    return sums


@dataclass(frozen=True, eq=False)
class Library:
    """References with near-duplicates merged, and the text embeddings of the class names if there are any."""

    rows: Array  # (R, d) unit rows, sorted by class: the unit mean of each group
    classes: IntArray  # (R,), ascending
    counts: IntArray  # (C,)
    text: Array | None = None  # (C, d) unit rows
    text_mean: Array | None = None  # (d,)
    group: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,): the row of each reference

    @cached_property
    def leaders(self) -> IntArray:
        """(R,): the first reference of each row."""
        return np.unique(self.group, return_index=True)[1].astype(np.int64)


def make_library(
    references: FloatArray,
    classes: IntArray,
    labels: int,
    text: FloatArray | None = None,
    text_mean: FloatArray | None = None,
    *,
    pause: Pause = no_pause,
) -> Library:
    """Return the library of unit rows (N, d); near-duplicates within a class become one row.

    Each reference joins the first earlier one of its class within the distance; chains are not merged as a whole.
    """
    rows: Array = np.empty_like(references, dtype=np.float64)
    for part in parts(len(rows), rows.shape[1], pause=pause):
        rows[part] = unit_rows(references[part].astype(np.float64))
    group, leaders = _groups(rows, classes, 1.0 - max(duplicate_distance(rows), ROUNDING), pause)
    pause()
    sums = np.empty((len(leaders), rows.shape[1]))
    for part in parts(len(sums), sums.shape[1], pause=pause):
        sums[part] = rows[leaders[part]]
    joined = np.ones(len(rows), dtype=bool)
    joined[leaders] = False
    np.add.at(sums, group[joined], rows[joined])
    for part in parts(len(sums), sums.shape[1], pause=pause):
        sums[part] = unit_rows(sums[part])
    merged = classes[leaders]
    return Library(
        rows=sums,
        classes=merged,
        counts=count_classes(merged, labels),
        text=None if text is None else text.astype(np.float64),
        text_mean=None if text_mean is None else text_mean.astype(np.float64),
        group=group,
    )


def duplicate_distance(embeddings: Array) -> float:
    """Return the largest cosine distance of near-duplicates among unit rows (N, d)."""
    if len(embeddings) < 2:  # noqa: PLR2004 - a pair
        return 0.0
    sample = embeddings[np.unique(np.linspace(0, len(embeddings) - 1, SAMPLE).astype(np.int64))]
    above = np.triu_indices(len(sample), 1)
    median = float(np.median(1.0 - (sample @ sample.T)[above]))
    return min(LARGEST_DISTANCE, SHARE_OF_MEDIAN * max(median, 0.0))


def _groups(rows: Array, classes: IntArray, least_cosine: float, pause: Pause) -> tuple[IntArray, IntArray]:
    """Return the group of each row (N,), and the first row of each group (R,)."""
    order = np.argsort(classes, kind="stable")
    bounds = [*np.flatnonzero(np.diff(classes[order], prepend=-1)), len(order)]
    first = np.arange(len(order))  # by position in the order: the position of the first row of its group
    for start, stop in pairwise(bounds):
        members = rows[order[start:stop]]
        size = stop - start
        waiting = np.ones(size, dtype=bool)
        for part in parts(size, size, pause=pause) if size > 1 else ():
            asking = part.start + np.flatnonzero(waiting[part])
            near = members[asking] @ members.T >= least_cosine
            near[np.arange(len(asking)), asking] = True
            for at in np.flatnonzero(np.count_nonzero(near, axis=1) > 1):
                position = asking[at]
                if waiting[position]:
                    joined = waiting & near[at]
                    joined[:position] = False
                    first[start + np.flatnonzero(joined)] = start + position
                    waiting &= ~joined
    leading, group_in_order = np.unique(first, return_inverse=True)
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = group_in_order
    return group, order[leading]
