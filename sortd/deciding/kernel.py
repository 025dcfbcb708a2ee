"""The kernel rule: a class is as near as its references are, each by itself, so a folder may hold unlike things."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray
from sortd.deciding.duplicates import unit
from sortd.deciding.gaussian import Gaussian

SHARPNESS = 10.0
"""beta: how fast a reference loses its say with the whitened cosine distance."""
LARGEST = 6000
"""References that the kernel keeps; more cost time at every decision and add little."""
FEWEST_OF_A_CLASS = 4
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Kernel:
    """The references that vote, sorted by class."""

    rows: FloatArray
    """float32 (R, d): whitened unit rows."""
    chosen: IntArray
    """int64 (R,): which row of the Gaussian each one is, ascending by class."""
    classes: IntArray
    """int64 (R,), ascending."""
    counts: IntArray
    """int64 (C,): voters of each class."""
    named: FloatArray | None
    """float32 (C, d): whitened unit prototypes of the names, which speak for classes without a reference; or None."""


def choose_rows(classes: IntArray, counts: IntArray) -> IntArray:
    """Return indices of the references that vote: all of them, or evenly spread ones of each large class."""
    order = np.argsort(classes, kind="stable").astype(np.int64)
    if len(classes) <= LARGEST:
        return order
    limit = _water_level(counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    spread = [
        np.unique(np.linspace(start, stop - 1, min(limit, stop - start)).astype(np.int64))
        for start, stop in pairwise(starts)
        if stop > start
    ]
    return order[np.concatenate(spread)]


def make_kernel(gaussian: Gaussian, named: Array | None = None) -> Kernel:
    """Return the kernel over the references of a Gaussian; names speak for classes that have none."""
    chosen = choose_rows(gaussian.classes, gaussian.counts)
    classes = gaussian.classes[chosen]
    return Kernel(
        rows=unit(gaussian.rows[chosen]).astype(np.float32),
        chosen=chosen,
        classes=classes,
        counts=np.bincount(classes, minlength=len(gaussian.counts)).astype(np.int64),
        named=None if named is None else unit(named).astype(np.float32),
    )


def votes(cosines: npt.NDArray[np.floating], kernel: Kernel) -> Array:
    """Return (B, C) sums of exp(-beta (1 - cosine)) over the references of each class."""
    weights = np.exp(SHARPNESS * (cosines - np.float32(1.0)))
    result = np.zeros((len(cosines), len(kernel.counts)))
    present = np.flatnonzero(kernel.counts)
    if present.size:
        starts = np.searchsorted(kernel.classes, present)
        result[:, present] = np.add.reduceat(weights, starts, axis=1)
    return result


def kernel_scores(whitened: Array, kernel: Kernel) -> Array:
    """Return (B, C) log mean votes over beta, for whitened rows (B, d); very low where nobody votes."""
    rows = unit(whitened).astype(np.float32)
    summed = votes(rows @ kernel.rows.T, kernel)
    return finish_votes(summed, np.broadcast_to(kernel.counts, summed.shape), rows, kernel)


def finish_votes(summed: Array, counts: npt.NDArray[np.generic], rows: FloatArray, kernel: Kernel) -> Array:
    """Return log mean votes over beta, after the names have voted too; ``counts`` is (B, C)."""
    total = np.asarray(counts, dtype=np.float64)
    silent = kernel.counts == 0
    if kernel.named is not None and silent.any():
        summed[:, silent] = np.exp(SHARPNESS * (rows @ kernel.named[silent].T - np.float32(1.0)))
    mean = np.maximum(summed / np.maximum(total, 1.0), TINY)
    return np.asarray(np.log(mean) / SHARPNESS, dtype=np.float64)


def _water_level(counts: IntArray) -> int:
    """Return the largest number of voters a class may have so that all together stay within the limit."""
    for limit in range(int(counts.max()), FEWEST_OF_A_CLASS, -1):
        if int(np.minimum(counts, limit).sum()) <= LARGEST:
            return limit
    return FEWEST_OF_A_CLASS
