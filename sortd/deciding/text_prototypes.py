"""Names among images: text prototypes, brought to where the images of the same classes lie."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.deciding.duplicates import unit
from sortd.deciding.gaussian import Space, class_means

LEAST_SPREAD = 0.1
"""Spread of the cosine of unrelated directions that is assumed at least, about one over the root of 100 dimensions."""


@dataclass(frozen=True, eq=False)
class Names:
    """What the names say, in the placed space of the images."""

    rows: Array
    """float64 (C, d): the common mean plus rho times the centred name."""
    gain: float
    """rho: the slope of class means on names; near zero where the names tell nothing."""
    evidence: float
    """By how many standard errors a class agrees better with its own name than with the others'."""


def place_names(space: Space, text: Array, text_mean: Array | None, means: Array, counts: IntArray) -> Names:
    """Return the names placed among the images.

    The modality gap goes away by centring either side by itself; ``rho`` is the least-squares slope of the centred
    class means on the centred names, so that names which know nothing of the images shrink to the common mean.

    Args:
        space: the space of the images.
        text: (C, d) unit rows.
        text_mean: (d,) mean of generic nouns, or None to use the mean of the names.
        means: (C, d) means of placed rows of each class.
        counts: (C,) references of each class.
    """
    generic = text.mean(axis=0) if text_mean is None else text_mean
    directions = unit((text - generic) * space.scale)
    directions = directions - directions.mean(axis=0)
    present = np.flatnonzero(counts)
    if present.size < 2:  # noqa: PLR2004 - no direction between classes to compare with
        middle = means[present].mean(axis=0) if present.size else np.zeros(text.shape[1])
        return Names(rows=middle + directions, gain=1.0, evidence=0.0)
    middle = means[present].mean(axis=0)
    offsets = means[present] - middle
    known = directions[present] - directions[present].mean(axis=0)
    strength = max(float(np.square(known).sum()), 1e-12)
    gain = max(float((offsets * known).sum()) / strength, 0.0)
    return Names(rows=middle + gain * directions, gain=gain, evidence=_evidence(offsets, known))


def placed_means(space: Space, rows: Array, classes: IntArray, counts: IntArray) -> Array:
    """Return (C, d) means of placed rows."""
    return class_means(space.place(rows), classes, counts)


def _evidence(offsets: Array, names: Array) -> float:
    size = len(offsets)
    cosines = unit(offsets) @ unit(names).T
    mine = float(np.trace(cosines)) / size
    theirs = (cosines.sum() - np.trace(cosines)) / (size * (size - 1))
    others = cosines[~np.eye(size, dtype=bool)]
    spread = max(float(others.std()), LEAST_SPREAD)
    return float((mine - theirs) / (spread * size / (size - 1) / np.sqrt(size - 1)))
