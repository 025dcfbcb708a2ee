"""The stream: the images that a dataset decided lately, whose familiarity says something about the next ones.

Strangers come in groups, as known images do. An image is looked up among the last ones, never learnt from: what nobody
has confirmed is no reference.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sortd.arrays import Array, FloatArray
from sortd.classify.decide import Near, ScoredBatch, decide, decide_by, open_set_scores, score_batch
from sortd.classify.library import unit_rows
from sortd.classify.prototypes import Classifier, PrototypeSet
from sortd.events import Decision

KEPT = 2048
"""Number of images that are remembered, some 8 MB."""
NEIGHBOURS = 8
FROM = 8
"""Images of the stream for each class from which neighbours have weight, which is full with twice as many: among few
images, the nearest ones are not near."""
LEAST = -4.0
"""Least familiarity of a neighbour, so that a few images of noise have no great effect."""
JUDGED_AGAIN = 256
"""Remembered images that a new generation judges with each batch, since all of them at once would take too long."""
JUDGED_CELLS = 5_000_000
"""The same as products of images and references: the loop waits for them."""
SAME = 0.999
"""Cosine from which two rows are one image, which is no neighbour of itself when it is decided again."""
SAME_ROW = 0.99999
"""The same for embeddings, since a new generation has not judged all of them yet."""


class Stream:
    """Decides the images of one dataset and remembers them; see ``decide``."""

    def __init__(self, kept: int = KEPT) -> None:
        """Start empty."""
        self._kept = kept
        self._classifier: PrototypeSet | None = None
        self._rows: FloatArray = np.zeros((0, 0), np.float32)  # (S, d) embeddings, the oldest first
        self._places = np.zeros((0, 0), np.float32)  # (J, d) whitened unit rows of the newest J that are judged
        self._familiarity = np.zeros(0)  # (J,)

    def __len__(self) -> int:
        """Return the number of remembered images."""
        return len(self._rows)

    def decide(self, classifier: Classifier, rows: FloatArray, turned_away: Sequence[int]) -> list[Decision]:
        """Return one decision for each row, as ``decide_by``; an image is as familiar as its neighbours here are."""
        if not isinstance(classifier, PrototypeSet) or not self._has_use_for(classifier, rows):
            return decide_by(classifier, rows, turned_away)
        if classifier is not self._classifier:
            is_same_space = self._classifier is not None and self._classifier.encoder_id == classifier.encoder_id
            self._rows = self._rows if is_same_space else np.zeros((0, rows.shape[1]), np.float32)
            self._classifier = classifier
            self._places, self._familiarity = np.zeros((0, rows.shape[1]), np.float32), np.zeros(0)
        self._judge_again(classifier)
        batch, places, familiarity = _judged(classifier, rows)
        known = np.concatenate([self._places, places])
        cosines = places @ known.T
        values = np.maximum(np.concatenate([self._familiarity, familiarity]), LEAST)
        share = min(1.0, max(0.0, len(known) / (FROM * max(len(classifier.labels), 1)) - 1.0))
        is_new = ~(cosines[:, : len(self._places)] >= SAME).any(axis=1)
        is_new &= ~(rows.astype(np.float32) @ self._rows.T >= SAME_ROW).any(axis=1)
        near = Near(_of_neighbours(cosines, values), share)
        self._rows = np.concatenate([self._rows, rows[is_new].astype(np.float32)])[-self._kept :]
        self._places = np.concatenate([self._places, places[is_new]])[-self._kept :]
        self._familiarity = np.concatenate([self._familiarity, familiarity[is_new]])[-self._kept :]
        return decide(classifier, rows, turned_away, near=near, batch=batch)

    def _has_use_for(self, classifier: PrototypeSet, rows: FloatArray) -> bool:
        """Return whether neighbours can count: a gate of known images, few enough classes, and rows that are valid.

        Without known images, familiarity has no mean of 0 that neighbours could be measured by.
        """
        gate, enough = classifier.calibration.gate, FROM * len(classifier.labels)
        if gate is None or gate.odds is None or enough >= self._kept or not len(rows):
            return False
        return rows.shape[1:] == classifier.matrix.shape[1:] and bool(np.isfinite(rows).all())

    def _judge_again(self, classifier: PrototypeSet) -> None:
        """Judge some more of the remembered rows by the present generation, the newest first."""
        stop = len(self._rows) - len(self._familiarity)
        count = min(JUDGED_AGAIN, max(1, JUDGED_CELLS // len(classifier.references)))
        part = self._rows[max(0, stop - count) : stop]
        if len(part):
            _, places, familiarity = _judged(classifier, part)
            self._places = np.concatenate([places, self._places])
            self._familiarity = np.concatenate([familiarity, self._familiarity])


def _of_neighbours(cosines: FloatArray, familiarity: Array) -> Array:
    """Return (B,) mean familiarity of the nearest of K images, from cosines (B, K), which are changed; 0 for none."""
    cosines[cosines >= SAME] = -np.inf
    count = min(NEIGHBOURS, cosines.shape[1])
    nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    is_other = np.isfinite(np.take_along_axis(cosines, nearest, axis=1))
    total = np.where(is_other, familiarity[nearest], 0.0).sum(axis=1)
    return np.asarray(total / np.maximum(is_other.sum(axis=1), 1), dtype=np.float64)


def _judged(prototypes: PrototypeSet, rows: FloatArray) -> tuple[ScoredBatch, FloatArray, Array]:
    """Return the scores of a batch, its whitened unit rows (B, d), and its familiarity (B,)."""
    gate, whitening = prototypes.calibration.gate, prototypes.whitening
    assert gate is not None
    queries = rows.astype(np.float64)
    batch = score_batch(prototypes, queries, prototypes.settings.mode)
    open_set = open_set_scores(prototypes, queries, batch, gate)
    whitened = batch.whitened
    if whitened is None:
        whitened = queries if whitening is None else whitening.space.place(queries) @ whitening.whitener
    familiarity = gate.familiarity(open_set, batch.confidence)
    return replace(batch, open_set=open_set), unit_rows(whitened).astype(np.float32), familiarity
