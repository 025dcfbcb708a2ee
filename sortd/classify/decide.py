"""Decide: rows and a classifier become a label for each image, or the reason for none."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.calibration import log_softmax
from sortd.classify.gaussian import squared_distances
from sortd.classify.kernel import first_best, kernel_scores, plain_scores
from sortd.classify.library import unit_rows
from sortd.classify.open_set import Gate, OpenSetScores, nearest_cosines
from sortd.classify.prototypes import BlendRule, Classifier, FinetunedClassifier, PrototypeSet, Whitening
from sortd.classify.types import BLENDED, Abstained, Assigned, ClassifierKind, Decision, Mode

FEWEST_FOR_ONE_CLASS = 4
"""Held-out references without which a library of one class cannot tell what does not belong to it."""


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """A batch under one rule: arrays over B images and C classes; the last three are of best and mixed only."""

    scores: Array  # (B, C): cosines or log probabilities, -inf for a class that cannot be chosen
    probabilities: Array  # (B, C)
    best: IntArray  # (B,)
    whitened: Array | None = None  # (B, d)
    distances: Array | None = None  # (B, C): squared whitened distances
    placed: Array | None = None  # (B, d): unit rows in the standardised space

    @property
    def shown(self) -> Array:
        """(B, C): the scores as they are told, cosines or probabilities."""
        return self.scores if self.whitened is None else self.probabilities

    @property
    def confidence(self) -> Array:
        """(B,): the probability of the best class."""
        return self.probabilities[np.arange(len(self.best)), self.best]


def decide_by(classifier: Classifier, rows: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row (B, d): embeddings for prototypes, logits for a fine-tuned model.

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    if isinstance(classifier, FinetunedClassifier):
        return decide_rows(classifier, rows)
    return decide(classifier, rows)


def decide(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row of ``embeddings`` (B, d).

    Raises:
        ValueError: embeddings of another shape, or a value that is not finite.
    """
    queries = check_embeddings(embeddings, prototypes.matrix.shape[1])
    mode = prototypes.settings.mode
    if not len(prototypes.labels) or not len(queries):
        return [Abstained("no_classes", None, 0.0, 0.0, None, mode) for _ in queries]
    judged = score_batch(prototypes, queries, mode)
    reasons = _reasons(prototypes, queries, judged)
    return [_decision(prototypes, judged, at, reason) for at, reason in enumerate(reasons)]


def scores(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> Array:
    """Return (B, C) scores of the mode: cosines, or probabilities for best and mixed; -inf or 0 if a class cannot win.

    Raises:
        ValueError: embeddings of another shape, or a value that is not finite.
    """
    queries = check_embeddings(embeddings, prototypes.matrix.shape[1])
    if not len(prototypes.labels):
        return np.zeros((len(queries), 0))
    return score_batch(prototypes, queries, prototypes.settings.mode).shown


def check_embeddings(embeddings: npt.ArrayLike, width: int) -> Array:
    """Return embeddings as float64 (B, d).

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    queries = np.asarray(embeddings, dtype=np.float64)
    if queries.ndim != 2 or queries.shape[1] != width:  # noqa: PLR2004 - a matrix
        raise ValueError(f"embeddings have shape {queries.shape}, but the prototypes need (B, {width})")
    broken = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if broken.size:
        raise ValueError(f"embedding {broken[0]} of the batch holds a value that is not finite")
    return queries


def score_batch(prototypes: PrototypeSet, queries: Array, mode: Mode) -> ScoredBatch:
    """Return scores and probabilities of a checked batch (B, d) under any rule."""
    rule = prototypes.mixed if mode is Mode.MIXED else prototypes.best
    if mode in BLENDED and prototypes.whitening is not None and rule is not None:
        return _judge_blend(prototypes.whitening, rule, queries)
    if mode in BLENDED:  # no reference anywhere: only names can speak
        mode = Mode.TEXT if mode is Mode.MIXED else Mode.MEAN
    table = plain_scores(mode, queries, prototypes.plain)
    probabilities = np.exp(log_softmax(prototypes.temperature * table))
    return ScoredBatch(table, probabilities, first_best(table))


def _judge_blend(whitening: Whitening, rule: BlendRule, queries: Array) -> ScoredBatch:
    placed = whitening.space.place(queries)
    whitened = placed @ whitening.whitener
    distances = squared_distances(whitened, rule.shrunk, rule.shrunk_norms)
    logits = -0.5 * rule.gaussian_weight * distances
    if rule.kernel_weight:
        logits += rule.kernel_weight * kernel_scores(whitened, rule.kernel(whitening))
    logits[:, ~rule.competes] = -np.inf
    distances[:, ~rule.competes] = np.inf
    table = log_softmax(logits)
    return ScoredBatch(table, np.exp(table), first_best(table), whitened, distances, placed)


def familiarity(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) the familiarity that the gate is asked for, or None without a gate.

    Images below the least confidence are asked for their open-set scores alone.
    """
    gate = prototypes.calibration.gate
    if gate is None:
        return None
    open_set, confidence = open_set_scores(prototypes, queries, judged, gate), judged.confidence
    is_unsure = confidence < prototypes.calibration.confidence
    return np.where(is_unsure, gate.familiarity(open_set, None), gate.familiarity(open_set, confidence))


def open_set_scores(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch, gate: Gate) -> OpenSetScores:
    """Return what the gate asks of a batch: the cosine to the nearest references, typicality and remoteness."""
    relative = _typicality(prototypes, queries, judged) if gate.typicality is not None else None
    whitening = prototypes.whitening
    if gate.remoteness is None or whitening is None:
        return OpenSetScores(_closeness(prototypes, queries, judged), relative, None)
    placed = whitening.space.place(queries) if judged.placed is None else judged.placed
    directions = (placed * whitening.scale).astype(np.float32)  # instead of placing all references
    cosine = nearest_cosines(
        directions,
        judged.best,
        prototypes.references,
        prototypes.classes,
        centred=(directions @ whitening.center.astype(np.float32), whitening.remoteness),
    )
    return OpenSetScores(cosine, relative, whitening.space.remoteness(queries))


def stranger_shares(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) the share of strangers that would look as much like a class, or None where that is not asked.

    Zeros where no class was left out.
    """
    null, whitening, best = prototypes.null, prototypes.whitening, prototypes.best
    if null is None or prototypes.calibration.strangers_cut is None:
        return None
    if whitening is None or best is None or not len(null.weights):
        return np.zeros(len(queries))
    if judged.distances is None:
        judged = replace(_judge_blend(whitening, best, queries), best=judged.best)
    relative = _typicality(prototypes, queries, judged)
    assert relative is not None
    assert judged.distances is not None
    two = np.partition(judged.distances, 1, axis=1)
    return null.shares(relative, two[:, 1] - two[:, 0], _closeness(prototypes, queries, judged))


def _closeness(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array:
    """Return (B,) cosine of each query to the nearest references of its best class; -1 for a name only."""
    directions = unit_rows(queries).astype(np.float32)
    return nearest_cosines(directions, judged.best, prototypes.references, prototypes.classes)


def _typicality(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) relative Mahalanobis distance: how much nearer the best class is than images at large, or None."""
    whitening = prototypes.whitening
    if whitening is None or judged.distances is None:
        return None
    placed = whitening.space.place(queries) if judged.placed is None else judged.placed
    offsets = placed @ whitening.background - whitening.background_middle
    nearest = judged.distances[np.arange(len(queries)), judged.best]
    return np.asarray(np.square(offsets).sum(axis=1) - nearest, dtype=np.float64)


def _nearer_to_strangers(whitening: Whitening, queries: Array, judged: ScoredBatch) -> BoolArray:
    whitened = judged.whitened
    if whitened is None:
        whitened = whitening.space.place(queries) @ whitening.whitener
    rows = unit_rows(whitened).astype(np.float32)
    known = nearest_cosines(rows, judged.best, whitening.kernel_rows, whitening.kernel_classes, neighbours=1)
    return np.asarray((rows @ whitening.strangers.T).max(axis=1) >= known, dtype=np.bool_)


def _reasons(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> list[str | None]:
    """Return for each image why it is not filed, the first of the reasons; None where it is."""
    facts = prototypes.calibration
    reasons = np.full(len(queries), None, dtype=object)
    if prototypes.settings.abstain is not None:
        reasons[judged.confidence < facts.confidence] = "margin"
        has_images = prototypes.counts[judged.best] > 0
        familiar = familiarity(prototypes, queries, judged)
        if familiar is not None and facts.gate is not None:
            reasons[has_images & (familiar < facts.gate.least)] = "typicality"
        shares = stranger_shares(prototypes, queries, judged)
        if shares is not None and facts.strangers_cut is not None:
            reasons[shares > facts.strangers_cut] = "stranger"
        if prototypes.whitening is not None and len(prototypes.whitening.strangers):
            reasons[_nearer_to_strangers(prototypes.whitening, queries, judged)] = "stranger"
        if np.count_nonzero(prototypes.counts) == 1 and facts.held_out < FEWEST_FOR_ONE_CLASS:
            reasons[:] = "too_few"
        if prototypes.settings.mode is not Mode.TEXT:
            reasons[~has_images] = "name_only"
    reasons[~np.isfinite(judged.scores[np.arange(len(queries)), judged.best])] = "no_classes"
    return list(reasons)


def _decision(prototypes: PrototypeSet, judged: ScoredBatch, at: int, reason: str | None) -> Decision:
    mode = prototypes.settings.mode
    if reason == "no_classes":
        return Abstained(reason, None, 0.0, 0.0, None, mode)
    row, best = judged.shown[at], int(judged.best[at])
    second = _second(judged.scores[at], best)
    label = prototypes.labels[best]
    confidence = float(judged.probabilities[at, best])
    facts: dict[str, Any] = {
        "score": float(row[best]),
        "margin": float(row[best] - (0.0 if second is None else row[second])),
        "second_label": None if second is None else prototypes.labels[second],
        "mode": mode,
        "confidence": confidence,
        "precision": prototypes.calibration.precision_at(confidence),
    }
    return Assigned(label, **facts) if reason is None else Abstained(reason, label, **facts)


def _second(row: Array, best: int) -> int | None:
    others = row.copy()
    others[best] = -np.inf
    second = int(others.argmax())
    return second if np.isfinite(others[second]) else None


def class_probabilities(classifier: FinetunedClassifier, rows: npt.ArrayLike) -> Array:
    """Return (B, C) probabilities of rows of logits (B, C).

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    logits = check_embeddings(rows, len(classifier.labels))
    return np.asarray(np.exp(log_softmax(logits / classifier.temperature)), dtype=np.float64)


def decide_rows(classifier: FinetunedClassifier, rows: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row of logits (B, C); of equal classes the first wins.

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    return [_decision_by_logits(classifier, row) for row in class_probabilities(classifier, rows)]


def _decision_by_logits(classifier: FinetunedClassifier, row: Array) -> Decision:
    best, second = (int(at) for at in np.argsort(-row, kind="stable")[:2])
    confidence = float(row[best])
    facts: dict[str, Any] = {
        "score": confidence,
        "margin": confidence - float(row[second]),
        "second_label": classifier.labels[second],
        "mode": ClassifierKind.FINETUNED,
        "confidence": confidence,
        "precision": classifier.calibration.precision_at(confidence),
    }
    if classifier.abstain is not None and confidence < classifier.calibration.confidence:
        return Abstained("margin", classifier.labels[best], **facts)
    return Assigned(classifier.labels[best], **facts)
