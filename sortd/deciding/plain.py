"""The plain rules: avg, max, mean and text, as anybody would write them, and each reference left out exactly."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, IntArray
from sortd.deciding.duplicates import unit
from sortd.deciding.support import Mode

BLOCK = 8_000_000
ROUNDING = 1e-5
"""More than single precision can be wrong by in a cosine."""


@dataclass(frozen=True, eq=False)
class Plain:
    """What the plain rules compare with."""

    rows: npt.NDArray[np.floating]
    """(N, d), the references, sorted by class; float32 as they came, or float64."""
    classes: IntArray
    """int64 (N,), ascending."""
    counts: IntArray
    """int64 (C,)."""
    means: Array
    """float64 (C, d)."""
    text: Array | None
    """float64 (C, d), or None."""

    @cached_property
    def directions(self) -> Array:
        """(C, d): the means at unit length."""
        return unit(self.means)


def plain_scores(mode: Mode, queries: Array, plain: Plain) -> Array:
    """Return (B, C) cosine scores of queries (B, d); -inf where a class has nothing to be compared with.

    ``max`` is computed in single precision first; rows where two classes come near each other are computed again in
    double, so that the class is that of a plain loop.
    """
    if mode is Mode.TEXT:
        if plain.text is None:
            return np.full((len(queries), len(plain.counts)), -np.inf)
        return np.asarray(queries @ plain.text.T, dtype=np.float64)
    if mode is Mode.MAX:
        return _largest(queries, plain)
    result = queries @ (plain.means if mode is Mode.AVG else plain.directions).T
    result[:, plain.counts == 0] = -np.inf
    return np.asarray(result, dtype=np.float64)


def _largest(queries: Array, plain: Plain, itself: IntArray | None = None) -> Array:
    """Return (B, C) largest cosines, of queries that are references without themselves."""
    result = np.full((len(queries), len(plain.counts)), -np.inf)
    present = np.flatnonzero(plain.counts)
    if not present.size:
        return result
    starts = np.searchsorted(plain.classes, present)
    single = plain.rows.astype(np.float32, copy=False)
    size = max(1, BLOCK // len(single))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        products = queries[part].astype(np.float32) @ single.T
        if itself is not None:
            products[np.arange(len(products)), itself[part]] = -np.inf
        result[part, present] = np.maximum.reduceat(products, starts, axis=1)
    top = result.max(axis=1, keepdims=True)
    rivals = result >= top - ROUNDING * np.maximum(np.abs(top), 1.0)
    for at in np.flatnonzero(rivals.sum(axis=1) > 1):
        for index in np.flatnonzero(rivals[at]):
            members = np.arange(*np.searchsorted(plain.classes, [index, index + 1]))
            if itself is not None:
                members = members[members != itself[at]]
            exact = plain.rows[members].astype(np.float64) @ queries[at]
            result[at, index] = float(exact.max(initial=-np.inf))
    return result


def plain_held_out(mode: Mode, chosen: IntArray, plain: Plain) -> Array:
    """Return (R, C) scores of chosen references, each exactly as if it had not been there."""
    queries, own = plain.rows[chosen].astype(np.float64), plain.classes[chosen]
    if mode is Mode.MAX:
        return _largest(queries, plain, chosen)
    result = plain_scores(mode, queries, plain)
    if mode is Mode.TEXT:
        return result
    others = plain.counts[own] - 1
    sums = plain.means[own] * plain.counts[own][:, None] - queries
    rest = sums / np.maximum(others, 1)[:, None] if mode is Mode.AVG else unit(sums)
    result[np.arange(len(own)), own] = np.where(others > 0, np.einsum("ij,ij->i", queries, rest), -np.inf)
    return result


def first_best(scores: Array, *, tolerance: float = 1e-12) -> IntArray:
    """Return (B,) the first class whose score is the highest, as a loop over classes finds it.

    A matrix product may round equal columns differently; within the tolerance they are equal.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(np.argmax(scores >= scores.max(axis=1, keepdims=True) - tolerance, axis=1), dtype=np.int64)
