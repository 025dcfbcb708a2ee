"""Prototypes: a support set becomes a frozen ``PrototypeSet``; ``decide`` turns embeddings into decisions.

This is the door of the decision core; what it hands out is written down in docs/decisions.md.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.deciding.blend import Blend, Library, fit_blends
from sortd.deciding.calibration import Calibration, Evidence, calibrate_knowns, calibrate_strangers
from sortd.deciding.confidence import balanced_weights, fit_temperature, log_softmax
from sortd.deciding.decision import Abstained, Assigned, Decision, decide, scores
from sortd.deciding.duplicates import merge_duplicates, unit
from sortd.deciding.familiarity import Looks
from sortd.deciding.gaussian import class_means
from sortd.deciding.leaveoneout import background_distances, remoteness_left_out
from sortd.deciding.plain import Plain, first_best, plain_held_out
from sortd.deciding.prototype_set import PrototypeSet, Rule, Whitening
from sortd.deciding.strangers import Strangers, leave_classes_out, nearest_cosines
from sortd.deciding.support import Abstain, DecisionSettings, Mode, SupportSet

__all__ = [
    "Abstain",
    "Abstained",
    "Assigned",
    "Calibration",
    "Decision",
    "DecisionSettings",
    "Mode",
    "PrototypeSet",
    "SupportSet",
    "build",
    "decide",
    "scores",
]

Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

TYPICAL_TEMPERATURE = 50.0
"""Factor from cosines to log probabilities before any reference says better; CLIP itself was trained with 100."""
TEMPERATURE_SPREAD = 1.0
FOREIGN_SAMPLE = 2000


def build(support: SupportSet, settings: DecisionSettings, *, generation: int) -> PrototypeSet:
    """Return the prototypes of a support set, calibrated on its references alone.

    Every rule is fitted, so that ``explain`` can say what each would have decided; only the mode of the settings is
    calibrated. It is a pure function: equal arguments give equal prototypes.
    """
    order = np.argsort(support.classes, kind="stable")
    references, classes = support.embeddings[order], support.classes[order]
    counts = np.bincount(classes, minlength=len(support.labels)).astype(np.int64)
    means = class_means(references.astype(np.float64), classes, counts)
    matrix = unit(means)
    if support.text is not None:
        matrix[counts == 0] = support.text[counts == 0]
    library = _library(support, references, classes)
    blends = fit_blends(library) if len(references) else None
    prototypes = PrototypeSet(
        labels=support.labels,
        matrix=matrix.astype(np.float32),
        means=means,
        counts=counts,
        generation=generation,
        encoder_id=support.encoder_id,
        fingerprint=support.fingerprint,
        settings=settings,
        calibration=Calibration(),
        sources=tuple(support.sources[index] for index in order),
        references=references.astype(np.float32),
        classes=classes,
        text=_text(support),
        temperature=TYPICAL_TEMPERATURE,
        recall=np.full(len(support.labels), np.nan),
    )
    if blends is None:
        confidence = settings.abstain.precision if settings.abstain is not None else 0.0
        return replace(prototypes, calibration=Calibration(confidence=confidence))
    best, mixed = blends
    best_rule = _rule(best)
    prototypes = replace(
        prototypes,
        whitening=_whitening(best, references, support.strangers),
        best=best_rule,
        mixed=best_rule if mixed is best else _rule(mixed),
    )
    return _calibrate(prototypes, library, mixed if settings.mode is Mode.MIXED else best)


def _library(support: SupportSet, references: FloatArray, classes: IntArray) -> Library:
    merged = merge_duplicates(unit(references.astype(np.float64)), classes)
    return Library(
        rows=merged.rows,
        classes=merged.classes,
        counts=np.bincount(merged.classes, minlength=len(support.labels)).astype(np.int64),
        text=None if support.text is None else support.text.astype(np.float64),
        text_mean=None if support.text_mean is None else support.text_mean.astype(np.float64),
    )


def _text(support: SupportSet) -> FloatArray:
    return np.zeros((0, support.embeddings.shape[1]), np.float32) if support.text is None else support.text


def _whitening(blend: Blend, references: FloatArray, strangers: FloatArray) -> Whitening:
    gaussian, space = blend.gaussian, blend.space
    placed = space.place(strangers.astype(np.float64)) @ gaussian.whitener
    return Whitening(
        center=space.center,
        scale=space.scale,
        whitener=gaussian.whitener,
        background=gaussian.background,
        background_middle=gaussian.background_middle,
        kernel_rows=blend.kernel.rows,
        kernel_classes=blend.kernel.classes,
        kernel_counts=blend.kernel.counts,
        strangers=unit(placed).astype(np.float32),
        remoteness=space.remoteness(references.astype(np.float64)).astype(np.float32),
    )


def _rule(blend: Blend) -> Rule:
    named = blend.kernel.named
    return Rule(
        shrunk=blend.shrunk,
        named=np.zeros((0, blend.shrunk.shape[1]), np.float32) if named is None else named,
        competes=blend.competes,
        text_weight=blend.text_weight,
        gaussian_weight=blend.gaussian_weight,
        kernel_weight=blend.kernel_weight,
    )


def _calibrate(prototypes: PrototypeSet, library: Library, blend: Blend) -> PrototypeSet:
    """Return the prototypes with temperature, recall, gates and what the library can honour."""
    settings = prototypes.settings
    if settings.mode in {Mode.BEST, Mode.MIXED}:
        evidence = _blend_evidence(library, blend)
    else:
        evidence, temperature = _plain_evidence(prototypes, library, blend)
        prototypes = replace(prototypes, temperature=temperature)
    own, right = evidence.own, evidence.best == evidence.own
    held = np.bincount(own, minlength=len(library.counts))
    with np.errstate(invalid="ignore"):
        recall = np.bincount(own, weights=right, minlength=len(library.counts)) / held
    facts: dict[str, Any] = {
        "text_weight": blend.text_weight,
        "text_evidence": None if blend.names is None else blend.names.evidence,
        "kernel_share": blend.share,
    }
    if settings.abstain is None:
        weights = balanced_weights(own, len(library.counts))
        accuracy = float(weights @ right / weights.sum()) if len(own) else None
        calibration = Calibration(held_out=len(own), accuracy=accuracy, filed_expected=1.0, **facts)
        return replace(prototypes, calibration=calibration, recall=recall)
    null: Strangers | None = None
    foreign = _foreign_cosines(library) if not right.any() else np.zeros(0)
    facts |= calibrate_knowns(evidence, settings.abstain, foreign)
    if settings.abstain.strangers != "auto":
        null = leave_classes_out(library.rows, library.classes, library.counts)
        facts |= calibrate_strangers(null, settings.abstain.strangers, facts.get("notes", ()))
    return replace(prototypes, calibration=Calibration(**facts), recall=recall, null=null)


def _blend_evidence(library: Library, blend: Blend) -> Evidence:
    held = blend.held
    probabilities = np.exp(log_softmax(blend.table))
    best = first_best(blend.table) if len(held.own) else held.own
    return Evidence(
        own=held.own,
        best=best,
        confidence=probabilities[np.arange(len(best)), best],
        looks=_looks(library, blend, best, with_typicality=True),
        classes=len(library.counts),
    )


def _looks(library: Library, blend: Blend, best: IntArray, *, with_typicality: bool) -> Looks:
    """Return the looks of the held-out references beside their best class (R,); typicality is known of blends only."""
    rows, classes, chosen = library.rows, library.classes, blend.held.chosen
    if np.count_nonzero(library.counts) < 2 or not len(chosen):  # noqa: PLR2004 - no centre between classes
        return Looks(nearest_cosines(rows[chosen], best, rows, classes, chosen), None, None)
    if blend.refitted is not None:
        background = blend.refitted.background
        cosine, remoteness = blend.refitted.cosine[np.arange(len(best)), best], blend.refitted.remoteness
    else:
        placed = blend.space.place(rows)
        background = background_distances(blend.gaussian, placed, blend.held) if with_typicality else np.zeros(0)
        cosine = nearest_cosines(placed[chosen], best, placed, classes, chosen)
        remoteness = remoteness_left_out(rows, classes, library.counts, chosen)
    return Looks(cosine, background - blend.distances if with_typicality else None, remoteness)


def _plain_evidence(prototypes: PrototypeSet, library: Library, blend: Blend) -> tuple[Evidence, float]:
    chosen = blend.held.chosen
    own = library.classes[chosen]
    means = class_means(library.rows, library.classes, library.counts)
    plain = Plain(library.rows, library.classes, library.counts, means, library.text)
    table = plain_held_out(prototypes.settings.mode, chosen, plain)
    judged = bool(len(own)) and bool(np.isfinite(table).any())
    temperature = TYPICAL_TEMPERATURE
    best = first_best(table) if judged else own
    if judged:
        weights = balanced_weights(own, len(library.counts))
        temperature, _ = fit_temperature(table, own, weights, typical=TYPICAL_TEMPERATURE, spread=TEMPERATURE_SPREAD)
    probabilities = np.exp(log_softmax(temperature * table))
    evidence = Evidence(
        own=own,
        best=best,
        confidence=probabilities[np.arange(len(best)), best],
        looks=_looks(library, blend, best, with_typicality=False),
        classes=len(library.counts),
    )
    return evidence, temperature


def _foreign_cosines(library: Library) -> Array:
    """Return (S,) cosine of references to the nearest one of another class."""
    sample = np.unique(np.linspace(0, len(library.rows) - 1, FOREIGN_SAMPLE).astype(np.int64))
    if np.count_nonzero(library.counts) < 2:  # noqa: PLR2004 - no other class
        return np.zeros(0)
    similarities = library.rows[sample] @ library.rows.T
    similarities[library.classes[sample][:, None] == library.classes] = -1.0
    return np.asarray(similarities.max(axis=1), dtype=np.float64)
