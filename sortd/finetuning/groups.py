"""Groups of near-duplicates: images that must stay on one side of a split, so that no test is a memory."""

import numpy as np

from sortd.arrays import FloatArray, IntArray
from sortd.classify.library import ROUNDING, duplicate_distance

LARGEST_SHARE = 0.25
"""A group of more than this share of a class is no burst of one scene but a class that the encoder sees as one: it is
taken apart by half the distance, again and again, until what is left are copies."""
ROWS_AT_ONCE = 1024


def near_duplicate_groups(embeddings: FloatArray, classes: IntArray) -> IntArray:
    """Return int64 (N,): the group of each image, equal for images that are joined by a chain of near-duplicates.

    Args:
        embeddings: float32 (N, d), unit rows.
        classes: int64 (N,); a group may hold images of several.
    """
    groups = np.zeros(len(embeddings), np.int64)
    if not len(embeddings):
        return groups
    distance = max(duplicate_distance(embeddings.astype(np.float64)), ROUNDING)
    largest = np.maximum(2, LARGEST_SHARE * np.bincount(classes))
    waiting = [(np.arange(len(embeddings)), distance)]
    found = 0
    while waiting:
        members, limit = waiting.pop()
        parts = _components(embeddings[members], limit)
        for part in range(int(parts.max()) + 1):
            chosen = members[parts == part]
            if len(chosen) > largest[classes[chosen]].max() and limit > ROUNDING:
                waiting.append((chosen, max(limit / 2, ROUNDING)))
            else:
                groups[chosen] = found
                found += 1
    return np.unique(groups, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _components(rows: FloatArray, limit: float) -> IntArray:
    """Return int64 (N,): the connected component of each row where rows within ``limit`` (cosine) are joined."""
    labels = np.arange(len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        near = rows[start : start + ROWS_AT_ONCE] @ rows.T >= np.float32(1.0 - limit)
        first, second = np.nonzero(near)
        _join(labels, first + start, second)
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _join(labels: IntArray, first: IntArray, second: IntArray) -> None:
    """Let every edge's ends, and all that was joined to them before, carry the lowest of their labels."""
    while True:
        lower = np.minimum(labels[first], labels[second])
        target = labels.copy()
        for ends in (first, second):
            np.minimum.at(target, labels[ends], lower)
        while not np.array_equal(target, target[target]):
            target = target[target]
        after = target[labels]
        if np.array_equal(after, labels):
            return
        labels[:] = after
