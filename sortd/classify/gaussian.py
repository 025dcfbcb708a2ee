"""The Gaussian of a library: classes with a shared covariance in a standardised space; see docs/decisions.md."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray
from sortd.classify.library import Pause, class_means, no_pause, parts, unit_rows

PSEUDO_ROWS = 5.0
"""Pseudo-observations, of the mean variance, in the variance of each dimension."""
MEAN_SHRINKAGE = 1.0
"""kappa: number of references that the common mean counts as in each class mean."""
LEAST_SPREAD = 0.1
"""Least standard deviation assumed for the cosine of unrelated directions (1 / sqrt(100 dimensions))."""
SMALLEST_HALVED = 64
Rows = npt.NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Space:
    """The standardised space: embeddings are centred and all dimensions have the same variance."""

    center: Array  # (d,): the class-balanced mean; zero with a single class
    scale: Array  # (d,): inverse class-balanced standard deviation of each dimension

    def place(self, embeddings: Rows, *, pause: Pause = no_pause) -> Array:
        """Return unit rows (B, d) of embeddings (B, d) in this space."""
        placed = np.empty(embeddings.shape)
        _place(embeddings, self.center, self.scale, placed, pause)
        return placed

    def place_in_single(self, embeddings: FloatArray, *, pause: Pause = no_pause) -> FloatArray:
        """Return ``place`` in single precision, in half of the time."""
        placed = np.empty_like(embeddings)
        _place(embeddings, self.center.astype(np.float32), self.scale.astype(np.float32), placed, pause)
        return placed

    def remoteness(self, embeddings: Rows, *, pause: Pause = no_pause) -> Array:
        """Return (B,) distance of embeddings (B, d) to the centre, before they are scaled to unit length."""
        distances = np.empty(len(embeddings))
        for part in parts(*embeddings.shape, pause=pause):
            distances[part] = _lengths((embeddings[part] - self.center) * self.scale)
        return distances


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """The means of the rows of each class, and of their squared differences from a common centre."""

    center: Array  # (d,): the mean of the class means
    means: Array  # (C, d)
    squares: Array  # (C, d)

    def space(self, counts: IntArray) -> Space:
        """Return the space of the classes that have a count (C,); all of them have equal weight."""
        present = np.flatnonzero(counts)
        if present.size < 2:  # noqa: PLR2004 - nothing to centre between
            return Space(center=np.zeros(len(self.center)), scale=np.ones(len(self.center)))
        center = self.means[present].mean(axis=0)
        variance = self.squares[present].mean(axis=0) - np.square(center - self.center)
        return Space(center=center, scale=np.sqrt(inverse_spreads(variance, int(counts.sum()))))


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Classes with a common covariance, in whitened coordinates."""

    whitener: Array  # (d, d): placed rows times this have unit covariance within their class
    placed: Rows  # (N, d): the references in the standardised space
    placed_means: Array  # (C, d): their class means; zero where there is no reference
    classes: IntArray  # (N,), ascending
    counts: IntArray  # (C,): references of each class; 0 is allowed
    means: Array  # (C, d): whitened class means; zero where there is no reference
    middle: Array  # (d,): the whitened mean of class means
    freedom: int  # degrees of freedom of the covariance
    ambient: int  # dimensions of the embedding, which can be more than the coordinates used
    background: Array  # (d, d): whitener of all images whatever their class
    background_middle: Array  # (d,): the mean of class means in background coordinates

    def whitened(self, chosen: IntArray, *, pause: Pause = no_pause) -> Array:
        """Return the whitened rows (R, d) of chosen references (R,)."""
        rows = np.empty((len(chosen), self.placed.shape[1]))
        for part in parts(*rows.shape, pause=pause):
            rows[part] = self.placed[chosen[part]] @ self.whitener
        return rows


@dataclass(frozen=True, eq=False)
class PlacedNames:
    """The class names in the standardised space of the images."""

    rows: Array  # (C, d): the common mean plus rho times the centred name
    gain: float  # rho: slope of class means on names; near zero if names do not predict images
    evidence: float  # standard errors by which classes agree better with their own name than with other names


def fit_space(rows: Array, classes: IntArray, counts: IntArray) -> Space:
    """Return the space of unit rows (N, d); all classes have equal weight."""
    return class_moments(rows, classes, counts).space(counts)


def class_moments(rows: Array, classes: IntArray, counts: IntArray, *, pause: Pause = no_pause) -> ClassMoments:
    """Return the moments of unit rows (N, d) that are sorted by class."""
    means = class_means(rows, classes, counts, pause=pause)
    center = means[counts > 0].mean(axis=0) if counts.any() else np.zeros(rows.shape[1])
    return ClassMoments(center, means, class_means(rows, classes, counts, about=center, pause=pause))


def inverse_spreads(variance: Array, rows: int) -> Array:
    """Return (..., d): the mean variance divided by the variance of each dimension (..., d), after PSEUDO_ROWS."""
    typical = np.maximum(variance.mean(axis=-1, keepdims=True), 1e-12)
    steady = (rows * np.maximum(variance, 0.0) + PSEUDO_ROWS * typical) / (rows + PSEUDO_ROWS)
    return np.asarray(typical / steady, dtype=np.float64)


def fit_gaussian(
    placed: Rows, classes: IntArray, counts: IntArray, *, ambient: int | None = None, pause: Pause = no_pause
) -> Gaussian:
    """Return the Gaussian of unit rows (N, r) of the standardised space, sorted by class.

    Rows of a class whose count is 0 are left out. The covariance within classes is shrunk to the isotropic one with
    ``ambient`` (default: r) pseudo-observations. Of rows in single precision, only sums are made in double precision.
    """
    width = placed.shape[1] if ambient is None else ambient
    present = np.flatnonzero(counts)
    means = class_means(placed, classes, counts, pause=pause)
    middle = means[present].mean(axis=0) if present.size else np.zeros(placed.shape[1])
    size = int(counts.sum())
    freedom = size - present.size
    between = means[present] - middle
    spread = between.T @ between / max(present.size - 1, 1)
    pause()
    within = np.zeros_like(spread)
    if freedom:
        subtracted = means.astype(placed.dtype, copy=False)
        for part in parts(*placed.shape, pause=pause):
            residuals = placed[part] - subtracted[classes[part]]
            residuals[counts[classes[part]] < 2] = 0.0  # noqa: PLR2004 - left out, or the only one
            within += residuals.T @ residuals
        within /= freedom
        typical = float(np.trace(within)) / width
    else:
        typical = (1.0 - float(middle @ middle)) / width
    whitener = _whitener(within, typical, freedom, width)
    pause()
    total = within + spread
    background = _whitener(total, float(np.trace(total)) / width, size, width)
    pause()
    whitened_means = means @ whitener
    pause()
    return Gaussian(
        whitener=whitener,
        placed=placed,
        placed_means=means,
        classes=classes,
        counts=counts,
        means=whitened_means,
        middle=middle @ whitener,
        freedom=freedom,
        ambient=width,
        background=background,
        background_middle=middle @ background,
    )


def shrink_means(gaussian: Gaussian, named: Array | None = None, weight: float = 0.0) -> Array:
    """Return whitened (C, d) means shrunk to the common mean, and to the whitened names (C, d) with weight kT."""
    counts = gaussian.counts[:, None].astype(np.float64)
    sums = counts * gaussian.means + MEAN_SHRINKAGE * gaussian.middle
    if named is None or weight == 0.0:
        return np.asarray(sums / (counts + MEAN_SHRINKAGE), dtype=np.float64)
    mixed = (sums + weight * named) / (counts + MEAN_SHRINKAGE + weight)
    return np.where(counts > 0, mixed, named)


def squared_distances(left: Array, right: Array, right_norms: Array | None = None) -> Array:
    """Return (B, C) squared distances of rows (B, d) and (C, d); ``right_norms`` are ``squared_norms(right)``."""
    products = left @ right.T
    norms = squared_norms(right) if right_norms is None else right_norms
    return np.asarray(np.square(left).sum(axis=1)[:, None] - 2.0 * products + norms, dtype=np.float64)


def squared_norms(rows: Array) -> Array:
    """Return (N,) squared lengths of rows (N, d)."""
    return np.asarray(np.square(rows).sum(axis=1), dtype=np.float64)


def _whitener(covariance: Array, typical: float, freedom: int, width: int) -> Array:
    share = width / (width + freedom)
    shrunk = (1.0 - share) * covariance
    shrunk[np.diag_indices_from(shrunk)] += share * max(typical, 1e-9)
    lower: Array = np.linalg.cholesky(shrunk).astype(np.float64, copy=False)
    return _inverse(lower).T


def _inverse(lower: Array) -> Array:
    """Return the inverse of a lower triangular matrix by halves, which takes a third of the time of ``inv``."""
    size = len(lower)
    if size <= SMALLEST_HALVED:
        return np.asarray(np.linalg.inv(lower), dtype=np.float64)
    half = size // 2
    result = np.zeros_like(lower)
    result[:half, :half] = _inverse(lower[:half, :half])
    result[half:, half:] = _inverse(lower[half:, half:])
    result[half:, :half] = -result[half:, half:] @ (lower[half:, :half] @ result[:half, :half])
    return result


def _lengths(rows: Rows) -> Rows:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))


def _place(embeddings: Rows, center: Rows, scale: Rows, placed: Rows, pause: Pause) -> None:
    for part in parts(*embeddings.shape, pause=pause):
        block = placed[part]
        np.subtract(embeddings[part], center, out=block)
        block *= scale
        block /= np.maximum(_lengths(block), 1e-12)[:, None]


def place_names(
    space: Space,
    text: Array,
    text_mean: Array | None,
    means: Array,
    counts: IntArray,
    *,
    pause: Pause = no_pause,
) -> PlacedNames:
    """Return the names in the space of the images; ``means`` are class means (C, d) in that space.

    Text and images are centred separately, which removes the modality gap; ``rho`` is the least-squares slope of the
    centred class means on the centred names. Without ``text_mean`` (d,) the mean of the names is used.
    """
    generic = text.mean(axis=0) if text_mean is None else text_mean
    directions = unit_rows((text - generic) * space.scale)
    directions = directions - directions.mean(axis=0)
    pause()
    present = np.flatnonzero(counts)
    if present.size < 2:  # noqa: PLR2004 - no direction between classes to compare with
        middle = means[present].mean(axis=0) if present.size else np.zeros(text.shape[1])
        return PlacedNames(rows=middle + directions, gain=1.0, evidence=0.0)
    middle = means[present].mean(axis=0)
    offsets = means[present] - middle
    known = directions[present] - directions[present].mean(axis=0)
    strength = max(float(np.square(known).sum()), 1e-12)
    gain = max(float((offsets * known).sum()) / strength, 0.0)
    pause()
    return PlacedNames(rows=middle + gain * directions, gain=gain, evidence=_evidence(offsets, known))


def _evidence(offsets: Array, names: Array) -> float:
    """Return ``PlacedNames.evidence``; no table of all pairs of classes is made, only its sums."""
    size, pairs = len(offsets), len(offsets) * (len(offsets) - 1)
    offsets, names = unit_rows(offsets), unit_rows(names)
    own = np.einsum("ij,ij->i", offsets, names)
    mine = float(own.mean())
    theirs = float(offsets.sum(axis=0) @ names.sum(axis=0) - own.sum()) / pairs
    squares = float(((offsets.T @ offsets) * (names.T @ names)).sum() - np.square(own).sum()) / pairs
    spread = max(float(np.sqrt(max(squares - theirs * theirs, 0.0))), LEAST_SPREAD)
    return (mine - theirs) / (spread * size / (size - 1) / float(np.sqrt(size - 1)))
