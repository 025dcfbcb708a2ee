"""Suspects: references that may be in the wrong class, in two classes, or in none."""

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.deciding.evaluation import Suspect
from sortd.deciding.support import SupportSet

SURE = 0.9
"""Probability of another class from which a reference counts as mislabelled."""
SPREADS = 3.5
"""Robust standard deviations below the median of its class from which a reference is an outlier (Iglewicz, Hoaglin)."""
FEWEST = 4
"""References of a class without which nothing is an outlier."""
MOST = 100
"""Suspects of each kind that are named."""
BLOCK = 16_000_000


def find_mislabelled(support: SupportSet, judged: IntArray, best: IntArray, confidence: Array) -> list[Suspect]:
    """Return references that another class claims with great confidence, the surest first.

    Args:
        support: where they come from.
        judged: (R,) references that were left out.
        best: (R,) the class that each was taken for.
        confidence: (R,) with what probability.
    """
    claimed = np.flatnonzero((best != support.classes[judged]) & (confidence >= SURE))
    claimed = claimed[np.argsort(-confidence[claimed], kind="stable")][:MOST]
    return [
        Suspect(
            kind="mislabelled",
            source=support.sources[judged[at]],
            label=support.labels[support.classes[judged[at]]],
            other_label=support.labels[best[at]],
            other_source=None,
            score=float(confidence[at]),
        )
        for at in claimed
    ]


def find_doubles(support: SupportSet, distance: float) -> list[Suspect]:
    """Return pairs of references in two classes within a cosine distance, the nearest first."""
    rows, classes = support.embeddings.astype(np.float32), support.classes
    size = max(1, BLOCK // max(len(rows), 1))
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(rows), size):
        similarities = rows[start : start + size] @ rows.T
        near = similarities >= np.float32(1.0 - distance)
        near &= classes[start : start + size][:, None] < classes
        left, right = np.nonzero(near)
        found += [
            (float(similarities[one, other]), int(one) + start, int(other))
            for one, other in zip(left, right, strict=True)
        ]
    return [
        Suspect(
            kind="duplicate",
            source=support.sources[one],
            label=support.labels[classes[one]],
            other_label=support.labels[classes[other]],
            other_source=support.sources[other],
            score=similarity,
        )
        for similarity, one, other in sorted(found, key=lambda pair: (-pair[0], pair[1:]))[:MOST]
    ]


def find_outliers(support: SupportSet, judged: IntArray, cosine: Array) -> list[Suspect]:
    """Return references far from the rest of their class, the farthest first.

    Args:
        support: where they come from.
        judged: (R,) references that were left out.
        cosine: (R,) mean cosine of each to the nearest others of its own class.
    """
    own = support.classes[judged]
    far: list[tuple[float, int]] = []
    for label in np.unique(own):
        members = np.flatnonzero(own == label)
        if len(members) < FEWEST:
            continue
        values = cosine[members]
        median = float(np.median(values))
        spread = max(float(np.median(np.abs(values - median))) * 1.4826, 0.01)
        far += [(float(cosine[at]), int(at)) for at in members if cosine[at] < median - SPREADS * spread]
    return [
        Suspect(
            kind="outlier",
            source=support.sources[judged[at]],
            label=support.labels[own[at]],
            other_label=None,
            other_source=None,
            score=value,
        )
        for value, at in sorted(far)[:MOST]
    ]
