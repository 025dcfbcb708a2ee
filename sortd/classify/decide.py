"""Decide: a label, or the reason for none, for each row of embeddings or logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, BoolArray, IntArray
from sortd.classify.calibration import Calibration, log_softmax
from sortd.classify.gaussian import squared_distances
from sortd.classify.kernel import first_best, kernel_scores, plain_scores
from sortd.classify.library import unit_rows
from sortd.classify.open_set import Gate, OpenSetScores, nearest_cosines
from sortd.classify.prototypes import BlendRule, Classifier, FinetunedClassifier, PrototypeSet, Whitening
from sortd.classify.types import BLENDED, FEWEST_FOR_ONE_CLASS
from sortd.events import Abstained, Assigned, ClassifierKind, DecidedBy, Decision, Mode

NEIGHBOUR_WEIGHT, NEIGHBOUR_SCALE = 4.0, 0.5
"""Weight of the familiarity of the neighbours, and what the sum is divided by, less 1. On four public sets 60 %
of known images were filed, and 15 % of near strangers, with a fifth of the classes left out (docs/decisions.md)."""


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """The scores of B images for C classes; the last fields are None for plain modes and logits."""

    scores: Array  # (B, C): cosines or log probabilities; -inf for a class that cannot be chosen
    probabilities: Array  # (B, C)
    reported: Array  # (B, C): cosines or probabilities
    best: IntArray  # (B,)
    whitened: Array | None = None  # (B, d)
    distances: Array | None = None  # (B, C): squared whitened distances
    placed: Array | None = None  # (B, d): unit rows in the standardised space
    open_set: OpenSetScores | None = None  # what ``open_set_scores`` returned for the gate in force, if it was asked

    @property
    def confidence(self) -> Array:
        """(B,): the probability of the best class."""
        return self.probabilities[np.arange(len(self.best)), self.best]

    def second(self, at: int) -> int | None:
        """Return the second-best class of an image, or None if there is none."""
        others = self.scores[at].copy()
        others[self.best[at]] = -np.inf
        second = int(others.argmax())
        return second if np.isfinite(others[second]) else None

    def margin(self, at: int) -> float:
        """Return the difference of the two best reported scores of an image."""
        row, second = self.reported[at], self.second(at)
        return float(row[self.best[at]] - (0.0 if second is None else row[second]))


@dataclass(frozen=True, eq=False)
class Near:
    """The familiarity of the neighbours of B images."""

    familiarity: Array  # (B,): mean of the neighbours
    share: float  # of their full weight; less while few images are known

    def added_to(self, familiarity: Array) -> Array:
        """Return (B,) familiarity of images with that of their neighbours, on the scale of the former."""
        weight = NEIGHBOUR_WEIGHT * self.share
        return np.asarray((familiarity + weight * self.familiarity) / (1.0 + NEIGHBOUR_SCALE * self.share))


def decide_by(classifier: Classifier, rows: npt.ArrayLike, turned_away: Sequence[int] | None = None) -> list[Decision]:
    """Return one decision for each row of embeddings (B, d) or logits (B, C); arguments and errors as ``decide``."""
    if isinstance(classifier, PrototypeSet):
        return decide(classifier, rows, turned_away)
    batch, calibration = score_logits(classifier, rows), classifier.calibration
    is_unsure = batch.confidence < (-np.inf if classifier.abstain is None else calibration.confidence)
    reasons = ["margin" if unsure else None for unsure in is_unsure]
    return [
        _decision(classifier.labels, ClassifierKind.FINETUNED, calibration, batch, at, reason)
        for at, reason in enumerate(reasons)
    ]


def decide(
    prototypes: PrototypeSet,
    embeddings: npt.ArrayLike,
    turned_away: Sequence[int] | None = None,
    *,
    near: Near | None = None,
    batch: ScoredBatch | None = None,
) -> list[Decision]:
    """Return one decision for each embedding (B, d); raise ValueError for another shape or non-finite values.

    Args:
        prototypes: what decides.
        embeddings: of the images.
        turned_away: (B,) the generation that took an image for one of no class, 0 for other images. Such an image is
            filed only if its cosine to the references that its class has gained since is at least that of known images.
        near: the familiarity of the neighbours of the images.
        batch: the scores of the images, if they are known.
    """
    queries = checked_rows(embeddings, prototypes.matrix.shape[1])
    mode = prototypes.settings.mode
    if not len(prototypes.labels) or not len(queries):
        return [Abstained("no_classes", None, 0.0, 0.0, None, mode) for _ in queries]
    batch = score_batch(prototypes, queries, mode) if batch is None else batch
    facts = prototypes.labels, mode, prototypes.calibration
    familiar = familiarity(prototypes, queries, batch)
    if familiar is not None and near is not None:
        familiar = near.added_to(familiar)
    reasons = _reasons(prototypes, queries, batch, familiar)
    if prototypes.settings.abstain is not None and turned_away is not None and any(turned_away):
        reasons[_is_still_strange(prototypes, queries, batch, np.asarray(turned_away)) & (reasons == None)] = "stranger"  # noqa: E711 -- elementwise
    likeness = [None] * len(queries) if familiar is None else [float(value) for value in familiar]
    return [_decision(*facts, batch, at, reason, likeness[at]) for at, reason in enumerate(reasons)]


def checked_rows(rows: npt.ArrayLike, width: int) -> Array:
    """Return rows as float64 (B, width), or raise ValueError for another shape or a value that is not finite."""
    checked = np.asarray(rows, dtype=np.float64)
    if checked.ndim != 2 or checked.shape[1] != width:  # noqa: PLR2004 - a matrix
        raise ValueError(f"rows have shape {checked.shape}, but the classifier needs (B, {width})")
    broken = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if broken.size:
        raise ValueError(f"row {broken[0]} of the batch holds a value that is not finite")
    return checked


def score_batch(prototypes: PrototypeSet, queries: Array, mode: Mode) -> ScoredBatch:
    """Return scores and probabilities of finite embeddings (B, d) under any mode."""
    rule = prototypes.mixed if mode is Mode.MIXED else prototypes.best
    if mode in BLENDED and prototypes.whitening is not None and rule is not None:
        return _score_blend(prototypes.whitening, rule, queries)
    if mode in BLENDED:  # no class has a reference
        mode = Mode.TEXT if mode is Mode.MIXED else Mode.MEAN
    table = plain_scores(mode, queries, prototypes.plain)
    return ScoredBatch(table, np.exp(log_softmax(prototypes.temperature * table)), table, first_best(table))


def score_logits(classifier: FinetunedClassifier, rows: npt.ArrayLike) -> ScoredBatch:
    """Return the probabilities of logits (B, C); raise as ``decide``."""
    logits = checked_rows(rows, len(classifier.labels))
    probabilities = np.asarray(np.exp(log_softmax(logits / classifier.temperature)), dtype=np.float64)
    return ScoredBatch(probabilities, probabilities, probabilities, probabilities.argmax(axis=1))


def _score_blend(whitening: Whitening, rule: BlendRule, queries: Array) -> ScoredBatch:
    placed = whitening.space.place(queries)
    whitened = placed @ whitening.whitener
    distances = squared_distances(whitened, rule.shrunk, rule.shrunk_norms)
    logits = -0.5 * rule.gaussian_weight * distances
    if rule.kernel_weight:
        logits += rule.kernel_weight * kernel_scores(whitened, rule.kernel(whitening))
    logits[:, ~rule.competes] = -np.inf
    distances[:, ~rule.competes] = np.inf
    table = log_softmax(logits)
    probabilities = np.exp(table)
    return ScoredBatch(table, probabilities, probabilities, first_best(table), whitened, distances, placed)


def familiarity(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) familiarity, without the odds of images below the least confidence; None without a gate."""
    gate = prototypes.calibration.gate
    if gate is None:
        return None
    open_set, confidence = open_set_scores(prototypes, queries, judged, gate), judged.confidence
    is_unsure = confidence < prototypes.calibration.confidence
    return np.where(is_unsure, gate.familiarity(open_set, None), gate.familiarity(open_set, confidence))


def open_set_scores(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch, gate: Gate) -> OpenSetScores:
    """Return the statistics of a batch that the gate uses."""
    if judged.open_set is not None:
        return judged.open_set
    relative = _typicality(prototypes, queries, judged) if gate.typicality is not None else None
    whitening = prototypes.whitening
    remoteness = None if gate.remoteness is None or whitening is None else whitening.space.remoteness(queries)
    return OpenSetScores(_gate_cosines(prototypes, queries, judged, gate), relative, remoteness)


def _gate_cosines(
    prototypes: PrototypeSet, queries: Array, judged: ScoredBatch, gate: Gate, used: BoolArray | None = None
) -> Array:
    """Return (B,) the cosine that the gate uses, to the references of the best class, or those ``used`` (N,) of it."""
    rows, classes, whitening = prototypes.references, prototypes.classes, prototypes.whitening
    rows, classes = (rows, classes) if used is None else (rows[used], classes[used])
    if gate.remoteness is None or whitening is None:
        return nearest_cosines(unit_rows(queries).astype(np.float32), judged.best, rows, classes)
    placed = whitening.space.place(queries) if judged.placed is None else judged.placed
    directions = (placed * whitening.scale).astype(np.float32)  # cheaper than placing all references
    lengths = whitening.remoteness if used is None else whitening.remoteness[used]
    centred = directions @ whitening.center.astype(np.float32), lengths
    return nearest_cosines(directions, judged.best, rows, classes, centred=centred)


def _is_still_strange(
    prototypes: PrototypeSet, queries: Array, judged: ScoredBatch, turned_away: IntArray
) -> BoolArray:
    """Return (B,) whether an image was taken for one of no class and no new reference of its class is near."""
    gate, strange = prototypes.calibration.gate, turned_away > 0
    if gate is None:
        return np.asarray(strange, dtype=np.bool_)
    for generation in np.unique(turned_away[strange]):
        cosines = _gate_cosines(prototypes, queries, judged, gate, prototypes.added > generation)
        strange &= ~((turned_away == generation) & (cosines >= gate.cosine[0]))
    return np.asarray(strange, dtype=np.bool_)


def stranger_shares(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) ``Strangers.shares``, zeros if no class was left out; None if ``strangers`` is ``auto``."""
    null, whitening, best = prototypes.null, prototypes.whitening, prototypes.best
    if null is None or prototypes.calibration.strangers_cut is None:
        return None
    if whitening is None or best is None or not len(null.weights):
        return np.zeros(len(queries))
    if judged.distances is None:
        judged = replace(_score_blend(whitening, best, queries), best=judged.best)
    relative = _typicality(prototypes, queries, judged)
    assert relative is not None
    assert judged.distances is not None
    two = np.partition(judged.distances, 1, axis=1)
    directions = unit_rows(queries).astype(np.float32)
    cosine = nearest_cosines(directions, judged.best, prototypes.references, prototypes.classes)
    return null.shares(relative, two[:, 1] - two[:, 0], cosine)


def _typicality(prototypes: PrototypeSet, queries: Array, judged: ScoredBatch) -> Array | None:
    """Return (B,) relative Mahalanobis distances, or None for plain modes."""
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


def _reasons(
    prototypes: PrototypeSet, queries: Array, judged: ScoredBatch, familiar: Array | None
) -> npt.NDArray[np.object_]:
    """Return (B,) the reason why each image is not filed, or None; later assignments take precedence."""
    facts = prototypes.calibration
    reasons = np.full(len(queries), None, dtype=object)
    if prototypes.settings.abstain is not None:
        reasons[judged.confidence < facts.confidence] = "margin"
        has_images = prototypes.counts[judged.best] > 0
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
    return reasons


def _decision(
    labels: tuple[str, ...],
    mode: DecidedBy,
    calibration: Calibration,
    batch: ScoredBatch,
    at: int,
    reason: str | None,
    familiar: float | None = None,
) -> Decision:
    if reason == "no_classes":
        return Abstained(reason, None, 0.0, 0.0, None, mode)
    best, second = int(batch.best[at]), batch.second(at)
    confidence = float(batch.probabilities[at, best])
    facts: dict[str, Any] = {
        "score": float(batch.reported[at, best]),
        "margin": batch.margin(at),
        "second_label": None if second is None else labels[second],
        "mode": mode,
        "confidence": confidence,
        "precision": calibration.precision_at(confidence),
        "familiarity": familiar,
    }
    return Assigned(labels[best], **facts) if reason is None else Abstained(reason, labels[best], **facts)
