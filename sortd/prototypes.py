"""Prototypes: a support set becomes a frozen ``PrototypeSet``; ``decide`` turns embeddings into decisions.

This is the door of the decision core; what it hands out is written down in docs/decisions.md.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from sortd.arrays import Array, FloatArray, IntArray
from sortd.deciding.blend import Blend, Library, blend_steps
from sortd.deciding.calibration import Calibration, Evidence, calibrate_knowns, calibrate_strangers
from sortd.deciding.confidence import balanced_weights, log_softmax, temperature_steps
from sortd.deciding.decision import Abstained, Assigned, Decision, decide, scores
from sortd.deciding.duplicates import merge_steps, unit
from sortd.deciding.familiarity import Looks
from sortd.deciding.gaussian import class_means
from sortd.deciding.leaveoneout import background_distances, remoteness_left_out
from sortd.deciding.plain import BLOCK, Plain, first_best, plain_held_out
from sortd.deciding.prototype_set import PrototypeSet, Rule, Whitening
from sortd.deciding.steps import Steps, finish, parts
from sortd.deciding.strangers import Strangers, nearest_cosine_steps, stranger_steps
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
    "build_steps",
    "decide",
    "scores",
]


TYPICAL_TEMPERATURE = 50.0
"""Factor from cosines to log probabilities before any reference says better; CLIP itself was trained with 100."""
TEMPERATURE_SPREAD = 1.0
FOREIGN_SAMPLE = 2000


def build(support: SupportSet, settings: DecisionSettings, *, generation: int) -> PrototypeSet:
    """Return the prototypes of a support set, calibrated on its references alone.

    Every rule is fitted, so that ``explain`` can say what each would have decided; only the mode of the settings is
    calibrated. It is a pure function: equal arguments give equal prototypes.
    """
    return finish(build_steps(support, settings, generation=generation))


def build_steps(support: SupportSet, settings: DecisionSettings, *, generation: int) -> Steps[PrototypeSet]:
    """Take the steps to ``build``, which takes many seconds where there are a thousand classes."""
    order = np.argsort(support.classes, kind="stable")
    references, classes = support.embeddings[order], support.classes[order]
    counts = np.bincount(classes, minlength=len(support.labels)).astype(np.int64)
    means = class_means(references.astype(np.float64), classes, counts)
    matrix = unit(means)
    if support.text is not None:
        matrix[counts == 0] = support.text[counts == 0]
    yield
    library = yield from _library(support, references, classes)
    blends = (yield from blend_steps(library)) if len(references) else None
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
    yield
    best_rule = _rule(best)
    prototypes = replace(
        prototypes,
        whitening=_whitening(best, references, support.strangers),
        best=best_rule,
        mixed=best_rule if mixed is best else _rule(mixed),
    )
    yield
    return (yield from _calibrate(prototypes, library, mixed if settings.mode is Mode.MIXED else best))


def _library(support: SupportSet, references: FloatArray, classes: IntArray) -> Steps[Library]:
    merged = yield from merge_steps(unit(references.astype(np.float64)), classes)
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


def _calibrate(prototypes: PrototypeSet, library: Library, blend: Blend) -> Steps[PrototypeSet]:
    """Return the prototypes with temperature, recall, gates and what the library can honour."""
    settings = prototypes.settings
    if settings.mode in {Mode.BEST, Mode.MIXED}:
        evidence = yield from _blend_evidence(library, blend)
    else:
        evidence, temperature = yield from _plain_evidence(prototypes, library, blend)
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
    foreign = (yield from _foreign_cosines(library)) if not right.any() else np.zeros(0)
    facts |= calibrate_knowns(evidence, settings.abstain, foreign)
    if settings.abstain.strangers != "auto":
        null = yield from stranger_steps(library.rows, library.classes, library.counts)
        facts |= calibrate_strangers(null, settings.abstain.strangers, facts.get("notes", ()))
    return replace(prototypes, calibration=Calibration(**facts), recall=recall, null=null)


def _blend_evidence(library: Library, blend: Blend) -> Steps[Evidence]:
    own = blend.held.own
    best, confidence = yield from _surest(blend.table, 1.0)
    looks = yield from _looks(library, blend, best, with_typicality=True)
    return Evidence(own, best, confidence, looks, classes=len(library.counts))


def _surest(table: Array, temperature: float) -> Steps[tuple[IntArray, Array]]:
    """Take the steps to the best class of each row (R, C) and its probability."""
    best, confidence = np.empty(len(table), np.int64), np.empty(len(table))
    for part in parts(*table.shape):
        best[part] = first_best(table[part])
        probabilities = np.exp(log_softmax(temperature * table[part]))
        confidence[part] = probabilities[np.arange(len(probabilities)), best[part]]
        yield
    return best, confidence


def _looks(library: Library, blend: Blend, best: IntArray, *, with_typicality: bool) -> Steps[Looks]:
    """Return the looks of the held-out references beside their best class (R,); typicality is known of blends only."""
    rows, classes, chosen = library.rows, library.classes, blend.held.chosen
    if np.count_nonzero(library.counts) < 2 or not len(chosen):  # noqa: PLR2004 - no centre between classes
        return Looks((yield from nearest_cosine_steps(rows[chosen], best, rows, classes, chosen)), None, None)
    if blend.refitted is not None:
        background = blend.refitted.background
        cosine, remoteness = blend.refitted.cosine[np.arange(len(best)), best], blend.refitted.remoteness
    else:
        placed = blend.space.place(rows)
        yield
        background = background_distances(blend.gaussian, placed, blend.held) if with_typicality else np.zeros(0)
        yield
        cosine = yield from nearest_cosine_steps(placed[chosen], best, placed, classes, chosen)
        remoteness = remoteness_left_out(rows, classes, library.counts, chosen)
    return Looks(cosine, background - blend.distances if with_typicality else None, remoteness)


def _plain_evidence(prototypes: PrototypeSet, library: Library, blend: Blend) -> Steps[tuple[Evidence, float]]:
    chosen = blend.held.chosen
    own = library.classes[chosen]
    means = class_means(library.rows, library.classes, library.counts)
    plain = Plain(library.rows, library.classes, library.counts, means, library.text)
    table = np.empty((len(chosen), len(library.counts)))
    for part in parts(len(chosen), len(library.rows), BLOCK):  # as ``max`` does by itself: rounded the same
        table[part] = plain_held_out(prototypes.settings.mode, chosen[part], plain)
        yield
    temperature = TYPICAL_TEMPERATURE
    judged = bool(len(own)) and bool(np.isfinite(table).any())
    if judged:
        weights = balanced_weights(own, len(library.counts))
        temperature, _ = yield from temperature_steps(
            table, own, weights, typical=TYPICAL_TEMPERATURE, spread=TEMPERATURE_SPREAD
        )
    best, confidence = yield from _surest(table, temperature)
    if not judged:
        best = own
    looks = yield from _looks(library, blend, best, with_typicality=False)
    return Evidence(own, best, confidence, looks, classes=len(library.counts)), temperature


def _foreign_cosines(library: Library) -> Steps[Array]:
    """Return (S,) cosine of references to the nearest one of another class."""
    sample = np.unique(np.linspace(0, len(library.rows) - 1, FOREIGN_SAMPLE).astype(np.int64))
    if np.count_nonzero(library.counts) < 2:  # noqa: PLR2004 - no other class
        return np.zeros(0)
    nearest = np.empty(len(sample))
    for part in parts(len(sample), len(library.rows)):
        similarities = library.rows[sample[part]] @ library.rows.T
        similarities[library.classes[sample[part]][:, None] == library.classes] = -1.0
        nearest[part] = similarities.max(axis=1)
        yield
    return nearest
