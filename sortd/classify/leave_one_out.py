"""Leave-one-out scores of the references.

Removing reference i of class c changes the class mean by -u/(n-1), the common mean by -u/(C(n-1)) and the shrunk
covariance A, up to a factor, by the rank one matrix r u u' with u = z - M_c and r = n / ((n-1)(d + dof)). By the
Sherman-Morrison formula, every distance follows from products already computed. Centre and scale are kept. Libraries of
at most REFIT_UP_TO references, for which that is too inaccurate, are fitted again without each reference.
"""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.classify.gaussian import (
    MEAN_SHRINKAGE,
    ClassMoments,
    Gaussian,
    fit_gaussian,
    fit_space,
    inverse_spreads,
    place_names,
    shrink_means,
    squared_distances,
    squared_norms,
)
from sortd.classify.kernel import Kernel, kernel_scores, kernel_sums, log_kernel_means, make_kernel
from sortd.classify.library import Library, Pause, class_means, no_pause, parts, unit_rows
from sortd.classify.open_set import nearest_cosines

LARGEST_ROWS = 4000
LARGEST_TABLE = 20_000_000
BLOCK = 1_000_000
"""Cells of a table of references and neighbours that is computed at once."""
REFIT_UP_TO = 64
"""Largest library that is fitted again without each reference; 64 fits take a quarter of a second."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Removal of R chosen references, one at a time."""

    chosen: IntArray  # (R,): references of the Gaussian
    own: IntArray  # (R,): their classes
    rows: Array  # (R, d): whitened
    residuals: Array  # (R, d): u, the whitened difference to the class mean
    gain: Array  # (R,): tau = r / (1 - r |u|^2)
    factor: float  # of squared distances, for the lost observation
    mean_step: Array  # (R,): change of the common mean in units of u


def choose_held_out(counts: IntArray, classes: IntArray, *, largest: int = LARGEST_ROWS) -> IntArray:
    """Return at most ``largest`` rows of classes with two references or more, evenly from all classes."""
    eligible = np.flatnonzero(counts[classes] > 1)
    limit = int(min(largest, max(LARGEST_TABLE // max(len(counts), 1), 256)))
    if len(eligible) <= limit:
        return eligible.astype(np.int64)
    order = eligible[np.argsort(classes[eligible], kind="stable")]
    starts = np.flatnonzero(np.diff(classes[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return np.sort(order[np.lexsort((classes[order], rank))][:limit]).astype(np.int64)


def hold_out(gaussian: Gaussian, chosen: IntArray, *, pause: Pause = no_pause) -> HeldOut:
    """Return the changes of a Gaussian by the removal of each chosen reference."""
    own = gaussian.classes[chosen]
    counts = gaussian.counts[own].astype(np.float64)
    rows = gaussian.whitened(chosen, pause=pause)
    residuals = rows - gaussian.means[own]
    others = np.maximum(counts - 1.0, 1.0)
    observations = float(gaussian.ambient + gaussian.freedom)
    rate = counts / others / observations
    norms = np.square(residuals).sum(axis=1)
    present = max(int(np.count_nonzero(gaussian.counts)), 1)
    return HeldOut(
        chosen=chosen,
        own=own,
        rows=rows,
        residuals=residuals,
        gain=rate / np.maximum(1.0 - rate * norms, 1e-3),
        factor=(observations - 1.0) / observations,
        mean_step=-1.0 / (present * others),
    )


class HeldOutProducts:
    """Products of the held-out rows with the means of all classes, for any weight of the names.

    The shrunk means are sums of references and names over their number, so two products serve all weights.
    """

    def __init__(self, gaussian: Gaussian, held: HeldOut, named: Array | None, *, pause: Pause = no_pause) -> None:
        """Multiply the R rows with the unweighted means (C, d) and with the whitened names (C, d)."""
        self._counts = gaussian.counts + MEAN_SHRINKAGE
        self._tables = []
        for means in (shrink_means(gaussian), named):
            if means is not None:
                table = np.empty((len(held.rows), len(means)))
                for part in parts(*table.shape, pause=pause):
                    np.matmul(held.rows[part], means.T, out=table[part])
                self._tables.append(table)

    def of(self, weight: float, part: slice) -> Array:
        """Return products (B, C) of a part of the rows with the means of classes with a reference."""
        if not weight:
            return self._tables[0][part].copy()
        total = self._counts + weight
        products = self._tables[1][part] * (weight / total)
        products += self._tables[0][part] * (self._counts / total)
        return products


def gaussian_table(
    gaussian: Gaussian,
    held: HeldOut,
    shrunk: Array,
    named: Array | None = None,
    weight: float = 0.0,
    part: slice = slice(None),
    products: Array | None = None,
) -> Array:
    """Return leave-one-out Gaussian scores (minus half of the squared distance) of a part of the R rows, (B, C).

    ``shrunk`` are the means that ``shrink_means`` returns for the same ``named`` and ``weight``, and ``products``
    (B, C), which are overwritten, those of the rows with them.
    """
    rows, own, residuals = held.rows[part], held.own[part], held.residuals[part]
    gain, mean_step = held.gain[part], held.mean_step[part]
    weight = 0.0 if named is None else weight
    pull = MEAN_SHRINKAGE / (gaussian.counts + MEAN_SHRINKAGE + weight)
    pull = np.where(gaussian.counts > 0, pull, 0.0)
    norms = np.square(residuals).sum(axis=1)
    distances = rows @ shrunk.T if products is None else products
    # with t = shift and e = (rows - shrunk + t u) u, the distance is (rows - shrunk)^2 - 2 t e - t^2 u^2 + gain e^2
    used, index = np.unique(own, return_inverse=True)
    along = (gaussian.means[used] @ shrunk.T)[index]
    along -= distances
    along += np.einsum("ij,ij->i", rows, residuals)[:, None]
    shift = mean_step[:, None] * pull
    along -= shift * norms[:, None]
    distances *= -2.0
    distances += np.square(rows).sum(axis=1)[:, None]
    distances += squared_norms(shrunk)
    distances -= np.square(shift) * norms[:, None]
    shift *= -2.0
    shift += gain[:, None] * along
    shift *= along
    distances += shift
    others = gaussian.counts[own].astype(np.float64)[:, None] - 1.0
    rest = others * gaussian.means[own] - residuals  # (n - 1) times the mean of the others
    middle = gaussian.middle + mean_step[:, None] * residuals
    mine = rest + MEAN_SHRINKAGE * middle
    if named is not None and weight:
        mine += weight * named[own]
    difference = rows - mine / (others + MEAN_SHRINKAGE + weight)
    kept = np.einsum("ij,ij->i", difference, residuals)
    distances[np.arange(len(own)), own] = np.square(difference).sum(axis=1) + gain * np.square(kept)
    distances *= -0.5 * held.factor
    return distances


def kernel_table(gaussian: Gaussian, held: HeldOut, kernel: Kernel, *, pause: Pause = no_pause) -> Array:
    """Return (R, C) leave-one-out kernel scores."""
    result = np.empty((len(held.chosen), len(gaussian.counts)))
    neighbours = kernel.rows
    itself = np.minimum(np.searchsorted(kernel.chosen, held.chosen), max(len(kernel.chosen) - 1, 0))
    for part in parts(len(result), len(neighbours), BLOCK, pause=pause):
        rows, own = held.rows[part].astype(np.float32), held.own[part]
        residuals, gain = held.residuals[part].astype(np.float32), held.gain[part].astype(np.float32)[:, None]
        products = rows @ neighbours.T
        pause()
        used, index = np.unique(own, return_inverse=True)
        along = (gaussian.means[used].astype(np.float32) @ neighbours.T)[index]
        np.subtract(products, along, out=along)  # of the residuals and the neighbours
        mine = np.einsum("ij,ij->i", rows, residuals)[:, None]
        scaled = along * (gain * mine)
        products += scaled
        np.multiply(along, along, out=along)
        along *= gain
        along += np.float32(1.0)
        np.sqrt(along, out=along)
        products /= along
        products /= np.sqrt(np.square(rows).sum(axis=1)[:, None] + gain * np.square(mine))
        pause()
        at = np.flatnonzero(kernel.chosen[itself[part]] == held.chosen[part])
        products[at, itself[part][at]] = -np.inf
        counts = np.tile(kernel.counts, (len(rows), 1))
        counts[at, own[at]] -= 1
        asking = unit_rows(rows.astype(np.float64)).astype(np.float32)
        result[part] = log_kernel_means(kernel_sums(products, kernel), counts, asking, kernel)
    return result


def background_distances(gaussian: Gaussian, held: HeldOut, *, pause: Pause = no_pause) -> Array:
    """Return (R,) leave-one-out squared distances to the Gaussian of all images.

    Of the total covariance, only the part within classes is corrected.
    """
    size, result = len(gaussian.placed), np.empty(len(held.chosen))
    for part in parts(len(result), gaussian.placed.shape[1], pause=pause):
        placed, own = gaussian.placed[held.chosen[part]], held.own[part]
        offsets = placed @ gaussian.background - gaussian.background_middle
        directions = (placed - gaussian.placed_means[own]) @ gaussian.background
        counts = gaussian.counts[own].astype(np.float64)
        rate = size / (size + gaussian.ambient) * counts / np.maximum(counts - 1.0, 1.0) / max(gaussian.freedom, 1)
        gain = rate / np.maximum(1.0 - rate * np.square(directions).sum(axis=1), 1e-3)
        along = np.einsum("ij,ij->i", offsets, directions)
        result[part] = np.square(offsets).sum(axis=1) + gain * np.square(along)
    return result


def remoteness_left_out(
    rows: Array,
    classes: IntArray,
    counts: IntArray,
    chosen: IntArray,
    moments: ClassMoments,
    *,
    pause: Pause = no_pause,
) -> Array:
    """Return (R,) distance of each chosen unit row to the centre of a space fitted without it.

    The second-order product of the changes of centre and variance is neglected. At least two classes have a row.
    """
    result = np.empty(len(chosen))
    present = np.flatnonzero(counts)
    mean_square = moments.squares[present].mean(axis=0)
    for part in parts(len(chosen), rows.shape[1], pause=pause):
        own, asking = classes[chosen[part]], rows[chosen[part]]
        shares = present.size * (counts[own] - 1.0)[:, None]
        offsets = asking - moments.center
        variance = mean_square + (moments.squares[own] - np.square(offsets)) / shares
        offsets += (asking - moments.means[own]) / shares
        result[part] = np.sqrt((np.square(offsets) * inverse_spreads(variance, len(rows) - 1)).sum(axis=1))
    return result


@dataclass(frozen=True, eq=False)
class Refitted:
    """Leave-one-out scores of R references by refitting."""

    gaussian: dict[float, Array]  # (R, C) by weight of the names: minus half of the squared distance
    kernel: Array  # (R, C)
    background: Array  # (R,): squared distance to the Gaussian of all images
    remoteness: Array  # (R,): distance to the centre of the library
    cosine: Array  # (R, C): to the nearest references of each class, in the standardised space


def refit_tables(
    library: Library, chosen: IntArray, weights: tuple[float, ...], *, pause: Pause = no_pause
) -> Refitted:
    """Return leave-one-out scores of R chosen rows by refitting, for each weight of the names.

    All rows are first expressed in their own span (the Cholesky factor of their Gram matrix), so that a fit takes
    O(rows^3) instead of O(dimensions^3).
    """
    rows, classes, counts = library.rows, library.classes, library.counts
    shape = (len(chosen), len(counts))
    tables = {weight: np.empty(shape) for weight in weights}
    result = Refitted(tables, np.empty(shape), np.empty(len(chosen)), np.empty(len(chosen)), np.empty(shape))
    for index, left_out in enumerate(chosen):
        others = np.arange(len(rows)) != left_out
        fewer = counts.copy()
        fewer[classes[left_out]] -= 1
        space = fit_space(rows[others], classes[others], fewer)
        placed = space.place(rows)
        named: Array | None = None
        if library.text is not None:
            means = class_means(space.place(rows[others]), classes[others], fewer)
            named = place_names(space, library.text, library.text_mean, means, fewer).rows
        turned = _span(placed if named is None else np.concatenate([placed, named]))
        gaussian = fit_gaussian(turned[: len(rows)][others], classes[others], fewer, ambient=rows.shape[1])
        names = None if named is None else turned[len(rows) :] @ gaussian.whitener
        query = turned[left_out : left_out + 1] @ gaussian.whitener
        for weight in weights:
            tables[weight][index] = -0.5 * squared_distances(query, shrink_means(gaussian, names, weight))[0]
        result.kernel[index] = kernel_scores(query, make_kernel(gaussian))[0]
        offset = turned[left_out] @ gaussian.background - gaussian.background_middle
        result.background[index] = np.square(offset).sum()
        result.remoteness[index] = space.remoteness(rows[left_out : left_out + 1])[0]
        asking = np.broadcast_to(placed[left_out], (len(counts), placed.shape[1]))
        result.cosine[index] = nearest_cosines(asking, np.arange(len(counts)), placed[others], classes[others])
        pause()
    return result


def _span(rows: Array) -> Array:
    products = rows @ rows.T
    products[np.diag_indices_from(products)] += 1e-9
    return np.asarray(np.linalg.cholesky(products), dtype=np.float64)
