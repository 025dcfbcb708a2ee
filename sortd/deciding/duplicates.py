"""Near-duplicates among the references: a burst of shots of one thing is one piece of evidence, not ten."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.deciding.steps import Steps, finish, parts

LARGEST_DISTANCE = 0.05
"""Cosine distance within which two references of one class can count as one. On CLIP ViT-B/32 features of four public
sets 5 % of references lie this near to another one of their class, and merging them cost no accuracy."""
SHARE_OF_MEDIAN = 0.125
"""The same as a share of the median distance between references, for encoders whose embeddings lie closer together."""
SAMPLE = 512
ROUNDING = 1e-6
"""Cosine distance within which two references are the same in any library."""


@dataclass(frozen=True, eq=False)
class Merged:
    """References after near-duplicates became one row each, sorted by class."""

    rows: Array
    """float64 (R, d), unit rows: the unit mean of each group."""
    classes: IntArray
    """int64 (R,), ascending."""
    group: IntArray
    """int64 (N,): the row that each reference went into."""


def duplicate_distance(embeddings: Array) -> float:
    """Return the cosine distance up to which references are near-duplicates, for unit rows (N, d)."""
    if len(embeddings) < 2:  # noqa: PLR2004 - a pair
        return 0.0
    sample = embeddings[np.unique(np.linspace(0, len(embeddings) - 1, SAMPLE).astype(np.int64))]
    above = np.triu_indices(len(sample), 1)
    median = float(np.median(1.0 - (sample @ sample.T)[above]))
    return min(LARGEST_DISTANCE, SHARE_OF_MEDIAN * max(median, 0.0))


def merge_duplicates(embeddings: Array, classes: IntArray) -> Merged:
    """Return one row for each group of near-duplicates within a class.

    Every reference joins the first earlier one of its class that lies within the distance, so that a chain of frames
    does not collapse as a whole.

    Args:
        embeddings: float64 (N, d), unit rows.
        classes: int64 (N,).
    """
    return finish(merge_steps(embeddings, classes))


def merge_steps(embeddings: Array, classes: IntArray) -> Steps[Merged]:
    """Take the steps to ``merge_duplicates``."""
    limit = 1.0 - max(duplicate_distance(embeddings), ROUNDING)
    group = np.empty(len(embeddings), dtype=np.int64)
    leaders: list[int] = []
    order = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.diff(classes[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        waiting = np.ones(len(members), dtype=bool)
        for part in parts(len(members), len(members)):
            asking = part.start + np.flatnonzero(waiting[part])
            similarities = embeddings[members[asking]] @ embeddings[members].T
            for position, row in zip(asking, similarities, strict=True):
                if waiting[position]:
                    joined = waiting & (row >= limit)
                    joined[position] = True
                    group[members[joined]] = len(leaders)
                    waiting &= ~joined
                    leaders.append(int(members[position]))
            yield
    sums = np.zeros((len(leaders), embeddings.shape[1]))
    np.add.at(sums, group, embeddings)
    return Merged(rows=unit(sums), classes=classes[np.array(leaders, dtype=np.int64)], group=group)


def unit(rows: Array) -> Array:
    """Return rows (…, d) scaled to unit length; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), dtype=np.float64)
