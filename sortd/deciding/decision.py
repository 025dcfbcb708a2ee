"""Decisions: embeddings and a prototype set become a label for each image, or the reason for none."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, IntArray
from sortd.deciding.confidence import log_softmax
from sortd.deciding.duplicates import unit
from sortd.deciding.familiarity import Gate, Looks
from sortd.deciding.gaussian import Space, squared_distances
from sortd.deciding.kernel import kernel_scores
from sortd.deciding.plain import first_best, plain_scores
from sortd.deciding.prototype_set import PrototypeSet, Rule, Whitening
from sortd.deciding.strangers import nearest_cosines
from sortd.deciding.support import ClassifierKind, Mode

DecidedBy = Mode | Literal[ClassifierKind.FINETUNED]
"""The rule over prototypes that decided, or that a fine-tuned model did."""

FEWEST_FOR_ONE_CLASS = 4
"""Held-out references without which a library of one class cannot tell what does not belong to it."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The image belongs to ``label``."""

    label: str
    score: float
    """The cosine of the rule; for best, mixed and a fine-tuned model the probability of the class."""
    margin: float
    """The score less the second one's."""
    second_label: str | None
    mode: DecidedBy
    confidence: float = 1.0
    """Probability of the class among the known ones."""
    precision: float | None = None
    """Share of right ones among held-out images with this confidence or more; None without calibration."""


@dataclass(frozen=True, slots=True)
class Abstained:
    """Not sure enough to file.

    ``reason`` is one of: ``no_classes``, ``name_only`` (the best class has no reference), ``too_few`` (one class with
    too few references), ``stranger`` (as much like what belongs nowhere), ``typicality`` (unlike all references of the
    best class), ``margin`` (another class is too near).
    """

    reason: str
    best_label: str | None
    score: float
    margin: float
    second_label: str | None
    mode: DecidedBy
    confidence: float = 0.0
    precision: float | None = None


Decision = Assigned | Abstained


@dataclass(frozen=True, eq=False)
class Judged:
    """A batch under one rule: arrays over B images and C classes."""

    scores: Array
    """(B, C): cosines or log probabilities, -inf for a class that cannot be chosen."""
    probabilities: Array
    """(B, C)"""
    best: IntArray
    """(B,)"""
    whitened: Array | None
    """(B, d), for best and mixed."""
    distances: Array | None
    """(B, C): squared whitened distances, for best and mixed."""
    placed: Array | None = None
    """(B, d): unit rows in the space of the prototypes, for best and mixed."""


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


def judge(prototypes: PrototypeSet, queries: Array, mode: Mode) -> Judged:
    """Return scores and probabilities of a checked batch (B, d) under any rule."""
    rule = prototypes.mixed if mode is Mode.MIXED else prototypes.best
    if mode in {Mode.BEST, Mode.MIXED} and prototypes.whitening is not None and rule is not None:
        return _judge_blend(prototypes.whitening, rule, queries)
    if mode in {Mode.BEST, Mode.MIXED}:  # no reference anywhere: only names can speak
        mode = Mode.TEXT if mode is Mode.MIXED else Mode.MEAN
    table = plain_scores(mode, queries, prototypes.plain)
    probabilities = np.exp(log_softmax(prototypes.temperature * table))
    return Judged(table, probabilities, first_best(table), None, None)


def scores(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> Array:
    """Return (B, C) scores of the mode: cosines, or probabilities for best and mixed; -inf or 0 if a class cannot win.

    Raises:
        ValueError: embeddings of another shape, or a value that is not finite.
    """
    queries = check_embeddings(embeddings, prototypes.matrix.shape[1])
    if not len(prototypes.labels):
        return np.zeros((len(queries), 0))
    judged = judge(prototypes, queries, prototypes.settings.mode)
    return judged.scores if judged.whitened is None else judged.probabilities


def decide(prototypes: PrototypeSet, embeddings: npt.ArrayLike) -> list[Decision]:
    """Return one decision for each row of ``embeddings`` (B, d).

    Raises:
        ValueError: embeddings of another shape, or a value that is not finite.
    """
    queries = check_embeddings(embeddings, prototypes.matrix.shape[1])
    mode = prototypes.settings.mode
    if not len(prototypes.labels) or not len(queries):
        return [Abstained("no_classes", None, 0.0, 0.0, None, mode) for _ in queries]
    judged = judge(prototypes, queries, mode)
    table = judged.scores if judged.whitened is None else judged.probabilities
    reasons = _reasons(prototypes, queries, judged)
    return [_decision(prototypes, table[at], judged, at, reasons[at]) for at in range(len(queries))]


def closeness(prototypes: PrototypeSet, queries: Array, judged: Judged) -> Array:
    """Return (B,) cosine of each query to the nearest references of its best class; -1 for a name only."""
    directions = unit(queries).astype(np.float32)
    return nearest_cosines(directions, judged.best, prototypes.references, prototypes.classes)


def typicality(prototypes: PrototypeSet, queries: Array, judged: Judged) -> Array | None:
    """Return (B,) relative Mahalanobis distance: how much nearer the best class is than images at large, or None."""
    whitening = prototypes.whitening
    if whitening is None or judged.distances is None:
        return None
    placed = judged.placed
    if placed is None:
        placed = Space(whitening.center, whitening.scale).place(queries)
    offsets = placed @ whitening.background - whitening.background_middle
    nearest = judged.distances[np.arange(len(queries)), judged.best]
    return np.asarray(np.square(offsets).sum(axis=1) - nearest, dtype=np.float64)


def looks_of(prototypes: PrototypeSet, queries: Array, judged: Judged, gate: Gate) -> Looks:
    """Return what the gate asks of a batch: the cosine to the nearest references, typicality and remoteness."""
    relative = typicality(prototypes, queries, judged) if gate.typicality is not None else None
    whitening = prototypes.whitening
    if gate.remoteness is None or whitening is None:
        return Looks(closeness(prototypes, queries, judged), relative, None)
    space = Space(whitening.center, whitening.scale)
    placed = space.place(queries) if judged.placed is None else judged.placed
    directions = (placed * whitening.scale).astype(np.float32)  # instead of placing all references
    cosine = nearest_cosines(
        directions,
        judged.best,
        prototypes.references,
        prototypes.classes,
        centred=(directions @ whitening.center.astype(np.float32), whitening.remoteness),
    )
    return Looks(cosine, relative, space.remoteness(queries))


def _judge_blend(whitening: Whitening, rule: Rule, queries: Array) -> Judged:
    placed = Space(whitening.center, whitening.scale).place(queries)
    whitened = placed @ whitening.whitener
    distances = squared_distances(whitened, rule.shrunk, rule.shrunk_norms)
    logits = -0.5 * rule.gaussian_weight * distances
    if rule.kernel_weight:
        logits += rule.kernel_weight * kernel_scores(whitened, rule.kernel(whitening))
    logits[:, ~rule.competes] = -np.inf
    distances[:, ~rule.competes] = np.inf
    table = log_softmax(logits)
    return Judged(table, np.exp(table), first_best(table), whitened, distances, placed)


def _reasons(prototypes: PrototypeSet, queries: Array, judged: Judged) -> list[str | None]:
    """Return for each image why it is not filed, the first of the reasons; None where it is."""
    abstain, facts = prototypes.settings.abstain, prototypes.calibration
    at = np.arange(len(queries))
    reasons = np.full(len(queries), None, dtype=object)
    impossible = ~np.isfinite(judged.scores[at, judged.best])
    if abstain is not None:
        confidence = judged.probabilities[at, judged.best]
        is_unsure = confidence < facts.confidence
        reasons[is_unsure] = "margin"
        has_images = prototypes.counts[judged.best] > 0
        if facts.gate is not None:
            looks = looks_of(prototypes, queries, judged, facts.gate)
            bare, whole = facts.gate.familiarity(looks, None), facts.gate.familiarity(looks, confidence)
            is_strange = np.where(is_unsure, bare, whole) < facts.gate.least
            reasons[has_images & is_strange] = "typicality"
        if prototypes.null is not None and facts.strangers_cut is not None:
            cosine = closeness(prototypes, queries, judged)
            shares = stranger_shares(prototypes, queries, judged, cosine)
            reasons[shares > facts.strangers_cut] = "stranger"
        if prototypes.whitening is not None and len(prototypes.whitening.strangers):
            reasons[_nearer_to_strangers(prototypes.whitening, queries, judged)] = "stranger"
        if np.count_nonzero(prototypes.counts) == 1 and facts.held_out < FEWEST_FOR_ONE_CLASS:
            reasons[:] = "too_few"
        if prototypes.settings.mode is not Mode.TEXT:
            reasons[~has_images] = "name_only"
    reasons[impossible] = "no_classes"
    return list(reasons)


def stranger_shares(prototypes: PrototypeSet, queries: Array, judged: Judged, cosine: Array) -> Array:
    """Return (B,) the share of strangers that would look as much like a class; zeros where nothing was left out."""
    null, whitening, best = prototypes.null, prototypes.whitening, prototypes.best
    if null is None or whitening is None or best is None or not len(null.weights):
        return np.zeros(len(queries))
    if judged.distances is None:
        blended = _judge_blend(whitening, best, queries)
        judged = Judged(judged.scores, judged.probabilities, judged.best, blended.whitened, blended.distances)
    relative = typicality(prototypes, queries, judged)
    assert relative is not None
    assert judged.distances is not None
    two = np.partition(judged.distances, 1, axis=1)
    return null.shares(relative, two[:, 1] - two[:, 0], cosine)


def _nearer_to_strangers(whitening: Whitening, queries: Array, judged: Judged) -> npt.NDArray[np.bool_]:
    whitened = judged.whitened
    if whitened is None:
        whitened = Space(whitening.center, whitening.scale).place(queries) @ whitening.whitener
    rows = unit(whitened).astype(np.float32)
    known = nearest_cosines(rows, judged.best, whitening.kernel_rows, whitening.kernel_classes, neighbours=1)
    return np.asarray((rows @ whitening.strangers.T).max(axis=1) >= known, dtype=np.bool_)


def _decision(prototypes: PrototypeSet, row: Array, judged: Judged, at: int, reason: str | None) -> Decision:
    mode = prototypes.settings.mode
    if reason == "no_classes":
        return Abstained(reason, None, 0.0, 0.0, None, mode)
    best = int(judged.best[at])
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
