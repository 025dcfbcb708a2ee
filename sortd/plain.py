"""The plain rules: avg, max, mean and text, as anybody would write them, and each reference left out of them exactly."""

import numpy as np
import numpy.typing as npt

from sortd.duplicates import unit
from sortd.gaussian import class_means
from sortd.support import Mode

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BLOCK = 8_000_000


def plain_scores(
    mode: Mode, queries: Array, rows: Array, classes: IntArray, counts: IntArray, text: Array | None
) -> Array:
    """Return (B, C) cosine scores; -inf where a class has nothing to be compared with.

    Args:
        mode: avg, max, mean or text.
        queries: float64 (B, d).
        rows: float64 (N, d), the references, sorted by class.
        classes: int64 (N,), ascending.
        counts: int64 (C,).
        text: float64 (C, d), or None.
    """
    empty = counts == 0
    match mode:
        case Mode.MAX:
            result = np.full((len(queries), len(counts)), -np.inf)
            starts = np.searchsorted(classes, np.flatnonzero(~empty))
            size = max(1, BLOCK // max(len(rows), 1))
            for start in range(0, len(queries) if starts.size else 0, size):
                part = slice(start, start + size)
                result[part, ~empty] = np.maximum.reduceat(queries[part] @ rows.T, starts, axis=1)
            return result
        case Mode.TEXT:
            if text is None:
                return np.full((len(queries), len(counts)), -np.inf)
            return np.asarray(queries @ text.T, dtype=np.float64)
        case _:
            means = class_means(rows, classes, counts)
            result = queries @ (means if mode is Mode.AVG else unit(means)).T
    result[:, empty] = -np.inf
    return np.asarray(result, dtype=np.float64)


def plain_held_out(
    mode: Mode, chosen: IntArray, rows: Array, classes: IntArray, counts: IntArray, text: Array | None
) -> Array:
    """Return (R, C) scores of chosen references, each as if it had not been there; arguments as above."""
    queries, own = rows[chosen], classes[chosen]
    at = np.arange(len(chosen))
    if mode is Mode.MAX:
        result = np.full((len(chosen), len(counts)), -np.inf)
        starts = np.searchsorted(classes, np.flatnonzero(counts))
        size = max(1, BLOCK // max(len(rows), 1))
        for start in range(0, len(chosen), size):
            part = slice(start, start + size)
            similarities = queries[part] @ rows.T
            similarities[np.arange(len(similarities)), chosen[part]] = -np.inf
            result[part, counts > 0] = np.maximum.reduceat(similarities, starts, axis=1)
        return result
    result = plain_scores(mode, queries, rows, classes, counts, text)
    if mode is Mode.TEXT:
        return result
    sums = class_means(rows, classes, counts)[own] * counts[own][:, None] - queries
    rest = sums / np.maximum(counts[own] - 1, 1)[:, None] if mode is Mode.AVG else unit(sums)
    result[at, own] = np.where(counts[own] > 1, np.einsum("ij,ij->i", queries, rest), -np.inf)
    return result


def first_best(scores: Array, *, tolerance: float = 1e-12) -> IntArray:
    """Return (B,) the first class whose score is the highest, as a loop over classes finds it.

    A matrix product may round equal columns differently; within the tolerance they are equal.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(np.argmax(scores >= scores.max(axis=1, keepdims=True) - tolerance, axis=1), dtype=np.int64)
