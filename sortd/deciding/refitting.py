"""Refitting: leave-one-out by brute force for a handful of references, where the algebra of the large is too rough."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.deciding.gaussian import fit_gaussian, fit_space, shrink_means, squared_distances
from sortd.deciding.kernel import kernel_scores, make_kernel
from sortd.deciding.steps import Steps, finish
from sortd.deciding.strangers import nearest_cosines
from sortd.deciding.text_prototypes import place_names, placed_means

REFIT_UP_TO = 64
"""References up to which each one is left out by fitting again; 64 fits take a quarter of a second."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """What the R references that were left out scored; float64."""

    gaussian: dict[float, Array]
    """(R, C) by the weight of the names: minus half of the squared distance."""
    kernel: Array
    """(R, C)"""
    background: Array
    """(R,): squared distance to the Gaussian of all images."""
    remoteness: Array
    """(R,): distance to the centre of the library."""
    cosine: Array
    """(R, C): to the nearest references of each class, in the standardised space."""


def refit_tables(
    rows: Array,
    classes: IntArray,
    counts: IntArray,
    chosen: IntArray,
    text: tuple[Array, Array | None] | None,
    weights: tuple[float, ...],
) -> Refitted:
    """Return leave-one-out scores of the Gaussian for each weight of the names, of the kernel, and the looks.

    All rows are turned into their own span first (the triangle of their Gram matrix), so that each fit costs the cube
    of the number of rows and not of the dimensions.

    Args:
        rows: float64 (N, d), unit rows, sorted by class.
        classes: int64 (N,), ascending.
        counts: int64 (C,).
        chosen: int64 (R,), which rows to leave out.
        text: unit rows (C, d) of the names with the mean of generic nouns, or None.
        weights: how many references a name may count as.
    """
    return finish(refit_steps(rows, classes, counts, chosen, text, weights))


def refit_steps(
    rows: Array,
    classes: IntArray,
    counts: IntArray,
    chosen: IntArray,
    text: tuple[Array, Array | None] | None,
    weights: tuple[float, ...],
) -> Steps[Refitted]:
    """Take the steps to ``refit_tables``, one for each reference that is left out."""
    gaussian_rows = {weight: np.empty((len(chosen), len(counts))) for weight in weights}
    kernel_rows, cosines = np.empty((len(chosen), len(counts))), np.empty((len(chosen), len(counts)))
    background, remoteness = np.empty(len(chosen)), np.empty(len(chosen))
    for index, left_out in enumerate(chosen):
        others = np.arange(len(rows)) != left_out
        fewer = counts.copy()
        fewer[classes[left_out]] -= 1
        space = fit_space(rows[others], classes[others], fewer)
        placed = space.place(rows)
        named: Array | None = None
        if text is not None:
            means = placed_means(space, rows[others], classes[others], fewer)
            named = place_names(space, *text, means, fewer).rows
        turned = _span(placed if named is None else np.concatenate([placed, named]))
        gaussian = fit_gaussian(turned[: len(rows)][others], classes[others], fewer, ambient=rows.shape[1])
        names = None if named is None else turned[len(rows) :] @ gaussian.whitener
        query = turned[left_out : left_out + 1] @ gaussian.whitener
        for weight in weights:
            shrunk = shrink_means(gaussian, names, weight)
            gaussian_rows[weight][index] = -0.5 * squared_distances(query, shrunk)[0]
        kernel_rows[index] = kernel_scores(query, make_kernel(gaussian))[0]
        offset = turned[left_out] @ gaussian.background - gaussian.background_middle
        background[index] = np.square(offset).sum()
        remoteness[index] = space.remoteness(rows[left_out : left_out + 1])[0]
        asking = np.broadcast_to(placed[left_out], (len(counts), placed.shape[1]))
        cosines[index] = nearest_cosines(asking, np.arange(len(counts)), placed[others], classes[others])
        yield
    return Refitted(gaussian_rows, kernel_rows, background, remoteness, cosines)


def _span(rows: Array) -> Array:
    products = rows @ rows.T
    products[np.diag_indices_from(products)] += 1e-9
    return np.asarray(np.linalg.cholesky(products), dtype=np.float64)
