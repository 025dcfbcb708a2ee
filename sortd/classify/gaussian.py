"""The Gaussian of a library: classes with a shared covariance in a standardised space; see docs/decisions.md."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.classify.library import Pause, class_means, no_pause, unit_rows

PSEUDO_ROWS = 5.0
"""Pseudo-observations, of the mean variance, in the variance of each dimension."""
MEAN_SHRINKAGE = 1.0
"""kappa: number of references that the common mean counts as in each class mean."""
LEAST_SPREAD = 0.1
"""Least standard deviation assumed for the cosine of unrelated directions (1 / sqrt(100 dimensions))."""


@dataclass(frozen=True, eq=False)
class Space:
    """The standardised space: embeddings are centred and all dimensions have the same variance."""

    center: Array  # (d,): the class-balanced mean; zero with a single class
    scale: Array  # (d,): inverse class-balanced standard deviation of each dimension

    def place(self, embeddings: Array) -> Array:
        """Return unit rows (B, d) of embeddings (B, d) in this space."""
        return unit_rows((embeddings - self.center) * self.scale)

    def remoteness(self, embeddings: Array) -> Array:
        """Return (B,) distance of embeddings (B, d) to the centre, before they are scaled to unit length."""
        return np.asarray(np.linalg.norm((embeddings - self.center) * self.scale, axis=1), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Classes with a common covariance, in whitened coordinates."""

    whitener: Array  # (d, d): placed rows times this have unit covariance within their class
    rows: Array  # (N, d): the whitened references
    classes: IntArray  # (N,)
    counts: IntArray  # (C,): references of each class; 0 is allowed
    means: Array  # (C, d): whitened class means; zero where there is no reference
    middle: Array  # (d,): the whitened mean of class means
    freedom: int  # degrees of freedom of the covariance
    ambient: int  # dimensions of the embedding, which can be more than the coordinates used
    background: Array  # (d, d): whitener of all images whatever their class
    background_middle: Array  # (d,): the mean of class means in background coordinates


@dataclass(frozen=True, eq=False)
class PlacedNames:
    """The class names in the standardised space of the images."""

    rows: Array  # (C, d): the common mean plus rho times the centred name
    gain: float  # rho: slope of class means on names; near zero if names do not predict images
    evidence: float  # standard errors by which classes agree better with their own name than with other names


def fit_space(rows: Array, classes: IntArray, counts: IntArray) -> Space:
    """Return the space of unit rows (N, d); all classes have equal weight."""
    width = rows.shape[1]
    present = np.flatnonzero(counts)
    if present.size < 2:  # noqa: PLR2004 - nothing to centre between
        return Space(center=np.zeros(width), scale=np.ones(width))
    center = class_means(rows, classes, counts)[present].mean(axis=0)
    weights = 1.0 / counts[classes] / present.size
    variance = weights @ np.square(rows - center)
    return Space(center=center, scale=np.sqrt(inverse_spreads(variance, len(rows))))


def inverse_spreads(variance: Array, rows: int) -> Array:
    """Return (..., d): the mean variance divided by the variance of each dimension (..., d), after PSEUDO_ROWS."""
    typical = np.maximum(variance.mean(axis=-1, keepdims=True), 1e-12)
    steady = (rows * np.maximum(variance, 0.0) + PSEUDO_ROWS * typical) / (rows + PSEUDO_ROWS)
    return np.asarray(typical / steady, dtype=np.float64)


def fit_gaussian(
    placed: Array, classes: IntArray, counts: IntArray, *, ambient: int | None = None, pause: Pause = no_pause
) -> Gaussian:
    """Return the Gaussian of unit rows (N, r) of the standardised space.

    The covariance within classes is shrunk to the isotropic one with ``ambient`` (default: r) pseudo-observations.
    """
    width = placed.shape[1] if ambient is None else ambient
    present = np.flatnonzero(counts)
    means = class_means(placed, classes, counts)
    middle = means[present].mean(axis=0) if present.size else np.zeros(placed.shape[1])
    residuals = placed - means[classes]
    pause()
    freedom = int(len(placed) - present.size)
    between = means[present] - middle
    spread = between.T @ between / max(present.size - 1, 1)
    if freedom:
        within = residuals.T @ residuals / freedom
        typical = float(np.trace(within)) / width
    else:
        within = np.zeros_like(spread)
        typical = (1.0 - float(middle @ middle)) / width
    pause()
    whitener = _whitener(within, typical, freedom, width)
    pause()
    total = within + spread
    background = _whitener(total, float(np.trace(total)) / width, len(placed), width)
    pause()
    return Gaussian(
        whitener=whitener,
        rows=placed @ whitener,
        classes=classes,
        counts=counts,
        means=means @ whitener,
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
    lower = np.linalg.cholesky(shrunk)
    return np.asarray(np.linalg.inv(lower).T, dtype=np.float64)


def place_names(space: Space, text: Array, text_mean: Array | None, means: Array, counts: IntArray) -> PlacedNames:
    """Return the names in the space of the images; ``means`` are class means (C, d) in that space.

    Text and images are centred separately, which removes the modality gap; ``rho`` is the least-squares slope of the
    centred class means on the centred names. Without ``text_mean`` (d,) the mean of the names is used.
    """
    generic = text.mean(axis=0) if text_mean is None else text_mean
    directions = unit_rows((text - generic) * space.scale)
    directions = directions - directions.mean(axis=0)
    present = np.flatnonzero(counts)
    if present.size < 2:  # noqa: PLR2004 - no direction between classes to compare with
        middle = means[present].mean(axis=0) if present.size else np.zeros(text.shape[1])
        return PlacedNames(rows=middle + directions, gain=1.0, evidence=0.0)
    middle = means[present].mean(axis=0)
    offsets = means[present] - middle
    known = directions[present] - directions[present].mean(axis=0)
    strength = max(float(np.square(known).sum()), 1e-12)
    gain = max(float((offsets * known).sum()) / strength, 0.0)
    return PlacedNames(rows=middle + gain * directions, gain=gain, evidence=_evidence(offsets, known))


def _evidence(offsets: Array, names: Array) -> float:
    size = len(offsets)
    cosines = unit_rows(offsets) @ unit_rows(names).T
    mine = float(np.trace(cosines)) / size
    theirs = (cosines.sum() - np.trace(cosines)) / (size * (size - 1))
    others = cosines[~np.eye(size, dtype=bool)]
    spread = max(float(others.std()), LEAST_SPREAD)
    return float((mine - theirs) / (spread * size / (size - 1) / np.sqrt(size - 1)))
