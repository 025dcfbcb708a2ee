"""The plain modes (avg, max, mean, text) and the whitened kernel; see docs/decisions.md."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray
from sortd.classify.gaussian import Gaussian
from sortd.classify.library import Pause, count_classes, no_pause, parts, unit_rows
from sortd.events import Mode

BLOCK = 4_000_000
ROUNDING_OF_SINGLE = 1e-5
"""Upper bound of the rounding error of a cosine in single precision."""
SHARPNESS = 10.0
"""beta: the weight of a reference is exp(-beta (1 - whitened cosine))."""
LARGEST = 6000
"""References that the kernel keeps; more would slow every decision and change little."""
FEWEST_OF_A_CLASS = 4
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Plain:
    """The references as the plain modes use them."""

    rows: npt.NDArray[np.floating]  # (N, d), sorted by class; float32 or float64
    classes: IntArray  # (N,), ascending
    counts: IntArray  # (C,)
    means: Array  # (C, d)
    text: Array | None  # (C, d)

    @cached_property
    def single(self) -> FloatArray:
        """(N, d): the rows in single precision."""
        return self.rows.astype(np.float32, copy=False)

    @cached_property
    def directions(self) -> Array:
        """(C, d): the means at unit length."""
        return unit_rows(self.means)


def plain_scores(mode: Mode, queries: Array, plain: Plain) -> Array:
    """Return (B, C) cosine scores of queries (B, d); -inf for a class without references or name."""
    if mode is Mode.TEXT:
        if plain.text is None:
            return np.full((len(queries), len(plain.counts)), -np.inf)
        return np.asarray(queries @ plain.text.T, dtype=np.float64)
    if mode is Mode.MAX:
        return _largest(queries, plain)
    result = queries @ (plain.means if mode is Mode.AVG else plain.directions).T
    result[:, plain.counts == 0] = -np.inf
    return np.asarray(result, dtype=np.float64)


def plain_held_out(mode: Mode, chosen: IntArray, plain: Plain) -> Array:
    """Return (R, C) leave-one-out scores of the chosen references."""
    queries, own = plain.rows[chosen].astype(np.float64), plain.classes[chosen]
    if mode is Mode.MAX:
        return _largest(queries, plain, chosen)
    result = plain_scores(mode, queries, plain)
    if mode is Mode.TEXT:
        return result
    others = plain.counts[own] - 1
    sums = plain.means[own] * plain.counts[own][:, None] - queries
    rest = sums / np.maximum(others, 1)[:, None] if mode is Mode.AVG else unit_rows(sums)
    result[np.arange(len(own)), own] = np.where(others > 0, np.einsum("ij,ij->i", queries, rest), -np.inf)
    return result


def _largest(queries: Array, plain: Plain, itself: IntArray | None = None) -> Array:
    """Return (B, C) largest cosines; query i is not compared with reference ``itself[i]``.

    The cosines are computed in single precision, and again in double precision where two classes are close, so that
    the best class is that of a loop in double precision.
    """
    result = np.full((len(queries), len(plain.counts)), -np.inf)
    present = np.flatnonzero(plain.counts)
    if not present.size:
        return result
    starts = np.searchsorted(plain.classes, present)
    single = plain.single
    size = max(1, BLOCK // len(single))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        products = queries[part].astype(np.float32) @ single.T
        if itself is not None:
            products[np.arange(len(products)), itself[part]] = -np.inf
        result[part, present] = np.maximum.reduceat(products, starts, axis=1)
    top = result.max(axis=1, keepdims=True)
    rivals = result >= top - ROUNDING_OF_SINGLE * np.maximum(np.abs(top), 1.0)
    for at in np.flatnonzero(rivals.sum(axis=1) > 1):
        for index in np.flatnonzero(rivals[at]):
            members = np.arange(*np.searchsorted(plain.classes, [index, index + 1]))
            if itself is not None:
                members = members[members != itself[at]]
            exact = plain.rows[members].astype(np.float64) @ queries[at]
            result[at, index] = float(exact.max(initial=-np.inf))
    return result


def first_best(scores: Array, *, tolerance: float = 1e-12) -> IntArray:
    """Return (B,) the first class with the highest score; scores within the tolerance are equal."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.argmax(scores >= scores.max(axis=1, keepdims=True) - tolerance, axis=1), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The references that the kernel sums over, sorted by class."""

    rows: FloatArray  # (R, d): whitened unit rows
    chosen: IntArray  # (R,): their rows in the Gaussian
    classes: IntArray  # (R,), ascending
    counts: IntArray  # (C,): rows of each class
    named: FloatArray | None  # (C, d): whitened unit names, used for classes without a reference


def make_kernel(gaussian: Gaussian, *, pause: Pause = no_pause) -> Kernel:
    """Return the kernel over the references of a Gaussian."""
    chosen = choose_rows(gaussian.classes, gaussian.counts)
    classes = gaussian.classes[chosen]
    rows = np.empty((len(chosen), gaussian.placed.shape[1]), np.float32)
    for part in parts(len(rows), rows.shape[1], pause=pause):
        rows[part] = unit_rows(gaussian.whitened(chosen[part]))
    return Kernel(
        rows=rows,
        chosen=chosen,
        classes=classes,
        counts=count_classes(classes, len(gaussian.counts)),
        named=None,
    )


def choose_rows(classes: IntArray, counts: IntArray) -> IntArray:
    """Return the indices of at most LARGEST references, sorted by class; large classes are thinned evenly."""
    order = np.argsort(classes, kind="stable").astype(np.int64)
    if len(classes) <= LARGEST:
        return order
    limits = range(int(counts.max()), FEWEST_OF_A_CLASS, -1)
    limit = next((one for one in limits if int(np.minimum(counts, one).sum()) <= LARGEST), FEWEST_OF_A_CLASS)
    kept = np.minimum(counts, limit)
    starts, steps = np.cumsum(counts) - counts, (counts - 1) / np.maximum(kept - 1, 1)
    rank = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
    spread = (rank * np.repeat(steps, kept) + np.repeat(starts, kept)).astype(np.int64)
    is_last = (rank > 0) & (rank == np.repeat(kept - 1, kept))
    return order[np.where(is_last, np.repeat(starts + counts - 1, kept), spread)]


def kernel_scores(whitened: Array, kernel: Kernel) -> Array:
    """Return (B, C) log mean kernel values over beta of whitened rows (B, d)."""
    rows = unit_rows(whitened).astype(np.float32)
    summed = kernel_sums(rows @ kernel.rows.T, kernel)
    return log_kernel_means(summed, np.broadcast_to(kernel.counts, summed.shape), rows, kernel)


def kernel_sums(cosines: npt.NDArray[np.floating], kernel: Kernel) -> Array:
    """Return (B, C) sums of exp(-beta (1 - cosine)) over the references of each class."""
    weights = cosines - np.float32(1.0)
    weights *= SHARPNESS
    np.exp(weights, out=weights)
    result = np.zeros((len(cosines), len(kernel.counts)))
    present = np.flatnonzero(kernel.counts)
    if present.size:
        starts = np.searchsorted(kernel.classes, present)
        result[:, present] = np.add.reduceat(weights, starts, axis=1)
    return result


def log_kernel_means(summed: Array, counts: npt.NDArray[np.generic], rows: FloatArray, kernel: Kernel) -> Array:
    """Turn sums (B, C) into log mean kernel values over beta, with names for classes without rows, and return them."""
    total = np.asarray(counts, dtype=np.float64)
    empty = kernel.counts == 0
    if kernel.named is not None and empty.any():
        summed[:, empty] = np.exp(SHARPNESS * (rows @ kernel.named[empty].T - np.float32(1.0)))
    summed /= np.maximum(total, 1.0)
    np.log(np.maximum(summed, TINY, out=summed), out=summed)
    summed /= SHARPNESS
    return summed
