"""Strangers: how well images score when their class is not in the library, by leaving classes out and fitting again."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, IntArray
from sortd.deciding.gaussian import fit_space, gaussian_steps, shrink_means, squared_distances
from sortd.deciding.steps import Steps, finish, parts

FOLDS = 10
COSINE_GATE = 0.15
"""A stranger counts as like a class only if its cosine is among this top share of the strangers' (decision-rules)."""
LARGEST_LIBRARY = 6000
LEAST_LENGTH = 1e-6
"""A row that is the centre itself has no direction."""
NEIGHBOURS = 3
"""References of a class that an image is held against; more than one, so that one odd reference vouches for little."""


@dataclass(frozen=True, eq=False)
class Strangers:
    """Scores of left-out references against the classes that stayed; float64 (S,), with weights."""

    typicality: Array
    margin: Array
    cosine: Array
    likeness: Array
    """The three in one: how much like a class each one looks."""
    weights: Array
    classes: int
    """How many classes took their turn: they, not their images, are what varies between strangers."""

    @property
    def attainable(self) -> float:
        """The smallest share of strangers that these can vouch for."""
        if not len(self.weights):
            return 1.0
        return max(1.0 / (self.classes + 1.0), 2.0 / (len(self.weights) + 1.0))

    def shares(self, typicality: Array, margin: Array, cosine: Array) -> Array:
        """Return (B,) the share of strangers that look as much like a class as each image does."""
        likeness = -np.log(_share(typicality, self.typicality, self.weights))
        likeness -= np.log(_share(margin, self.margin, self.weights))
        likeness[_share(cosine, self.cosine, self.weights) > COSINE_GATE] = 0.0
        return _share(likeness, self.likeness, self.weights)


def leave_classes_out(rows: Array, classes: IntArray, counts: IntArray) -> Strangers:
    """Return the scores of references whose class was taken away before fitting.

    Classes are dealt into at most ten folds; each fold is left out whole, everything is fitted again, and its
    references are scored: they are true strangers to that fit. Every class weighs the same.

    Args:
        rows: float64 (N, d), unit rows without near-duplicates.
        classes: int64 (N,).
        counts: int64 (C,).
    """
    return finish(stranger_steps(rows, classes, counts))


def stranger_steps(rows: Array, classes: IntArray, counts: IntArray) -> Steps[Strangers]:
    """Take the steps to ``leave_classes_out``."""
    present = np.flatnonzero(counts)
    if present.size < 3:  # noqa: PLR2004 - one to leave out, two to choose between
        empty = np.zeros(0)
        return Strangers(empty, empty, empty, empty, empty, 0)
    rows, classes, counts = _thin(rows, classes, counts)
    folds = np.full(len(counts), -1)
    folds[present] = np.random.default_rng(0).permutation(present.size) % min(FOLDS, present.size)
    scored = []
    for fold in range(int(folds.max()) + 1):
        scored.append((yield from _fold(rows, classes, counts, folds == fold)))  # noqa: PERF401 -- no comprehension can yield
    typicality, margin, cosine, weights = (np.concatenate(column) for column in zip(*scored, strict=True))
    likeness = -np.log(_share(typicality, typicality, weights)) - np.log(_share(margin, margin, weights))
    likeness[_share(cosine, cosine, weights) > COSINE_GATE] = 0.0
    return Strangers(typicality, margin, cosine, likeness, weights, int(present.size))


def _fold(
    rows: Array, classes: IntArray, counts: IntArray, left_out: npt.NDArray[np.bool_]
) -> Steps[tuple[Array, Array, Array, Array]]:
    gone = left_out[classes]
    index = np.cumsum(~left_out) - 1
    kept_rows, kept_classes, kept_counts = rows[~gone], index[classes[~gone]], counts[~left_out]
    space = fit_space(kept_rows, kept_classes, kept_counts)
    gaussian = yield from gaussian_steps(space.place(kept_rows), kept_classes, kept_counts)
    placed = space.place(rows[gone])
    distances = squared_distances(placed @ gaussian.whitener, shrink_means(gaussian))
    distances[:, kept_counts == 0] = np.inf
    best = distances.argmin(axis=1)
    two = np.partition(distances, 1, axis=1)
    offsets = placed @ gaussian.background - gaussian.background_middle
    background = np.square(offsets).sum(axis=1)
    yield
    cosines = yield from nearest_cosine_steps(rows[gone], best, kept_rows, kept_classes)
    return background - two[:, 0], two[:, 1] - two[:, 0], cosines, 1.0 / counts[classes[gone]]


def nearest_cosines(
    queries: npt.NDArray[np.floating],
    best: IntArray,
    rows: npt.NDArray[np.floating],
    classes: IntArray,
    itself: IntArray | None = None,
    *,
    neighbours: int = NEIGHBOURS,
    centred: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]] | None = None,
) -> Array:
    """Return (B,) the mean cosine of each query to the nearest rows of its best class; -1 for a class without rows.

    Args:
        queries: (B, d) unit rows.
        best: (B,) the class of each query.
        rows: (N, d) unit rows, sorted by class.
        classes: (N,), ascending.
        itself: (B,) the row that each query is and must not be compared with; or None.
        neighbours: how many rows enter the mean, where the class has as many.
        centred: for rows that were not centred, (B,) what is taken from each query's products and (N,) by what each
            row's are divided.
    """
    steps = nearest_cosine_steps(queries, best, rows, classes, itself, neighbours=neighbours, centred=centred)
    return finish(steps)


def nearest_cosine_steps(
    queries: npt.NDArray[np.floating],
    best: IntArray,
    rows: npt.NDArray[np.floating],
    classes: IntArray,
    itself: IntArray | None = None,
    *,
    neighbours: int = NEIGHBOURS,
    centred: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]] | None = None,
) -> Steps[Array]:
    """Take the steps to ``nearest_cosines``."""
    result = np.full(len(queries), -1.0)
    for index in np.unique(best):
        start, stop = np.searchsorted(classes, [index, index + 1])
        if stop <= start:
            continue
        of_class = np.flatnonzero(best == index)
        for part in parts(len(of_class), int(stop - start)):
            asking = of_class[part]
            similarities = queries[asking] @ rows[start:stop].T
            if centred is not None:
                shift, lengths = centred[0][asking][:, None], np.maximum(centred[1][start:stop], LEAST_LENGTH)
                similarities = np.clip((similarities - shift) / lengths, -1.0, 1.0)
            if itself is not None:
                similarities[itself[asking][:, None] == np.arange(start, stop)] = np.nan
            similarities.sort(axis=1)  # what is not a number comes last
            known = np.isfinite(similarities).sum(axis=1)
            asked = np.arange(similarities.shape[1])
            used = (asked < known[:, None]) & (asked >= known[:, None] - neighbours)
            mean = np.where(used, similarities, 0.0).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
            result[asking] = np.where(known > 0, mean, -1.0)
            yield
    return result


def _thin(rows: Array, classes: IntArray, counts: IntArray) -> tuple[Array, IntArray, IntArray]:
    if len(rows) <= LARGEST_LIBRARY:
        return rows, classes, counts
    order = np.argsort(classes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.arange(len(rows)) - starts[classes[order]]
    limit = max(2, LARGEST_LIBRARY // int(np.count_nonzero(counts)))
    kept = order[rank < limit]
    return rows[kept], classes[kept], np.minimum(counts, limit)


def _share(values: Array, null: Array, weights: Array) -> Array:
    mean = float(weights.mean())
    if len(values) == 1:  # one decision: no need to sort what one pass compares
        reached = np.asarray([float(weights @ (null >= values[0]))])
    else:
        order = np.argsort(null)
        above = np.concatenate([np.cumsum(weights[order][::-1])[::-1], [0.0]])
        reached = above[np.searchsorted(null[order], values, side="left")]
    return np.asarray((reached + mean) / (float(weights.sum()) + mean), dtype=np.float64)
