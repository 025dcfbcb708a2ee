"""Build: a calibrated prototype set from a support set."""

from dataclasses import replace
from typing import Any

import numpy as np

from sortd.arrays import Array, FloatArray, IntArray
from sortd.classify.blend import Blend, fit_blends
from sortd.classify.calibration import (
    NEVER,
    NOTHING_FILED,
    Calibration,
    HeldOutOutcomes,
    balanced_accuracy,
    balanced_weights,
    calibrate_knowns,
    calibrate_strangers,
    fit_temperature,
    top_classes,
)
from sortd.classify.kernel import BLOCK, Plain, plain_held_out
from sortd.classify.leave_one_out import background_distances, remoteness_left_out
from sortd.classify.library import Library, Pause, class_means, count_classes, make_library, no_pause, parts, unit_rows
from sortd.classify.open_set import OpenSetScores, Strangers, leave_classes_out, nearest_cosines
from sortd.classify.prototypes import BlendRule, PrototypeSet, Whitening
from sortd.classify.types import BLENDED, FEWEST_FOR_ONE_CLASS, DecisionSettings, Evidence, SupportSet
from sortd.events import Mode

TYPICAL_TEMPERATURE = 50.0
"""Prior median of the factor from cosines to log probabilities; CLIP was trained with 100."""
TEMPERATURE_SPREAD = 1.0
FOREIGN_SAMPLE = 2000


def build(support: SupportSet, settings: DecisionSettings, *, generation: int, pause: Pause = no_pause) -> PrototypeSet:
    """Return the prototypes of a support set; all modes are fitted, and the mode of the settings is calibrated."""
    return build_with_blends(support, settings, generation=generation, pause=pause)[0]


def build_with_blends(
    support: SupportSet, settings: DecisionSettings, *, generation: int, pause: Pause = no_pause
) -> tuple[PrototypeSet, Library, tuple[Blend, Blend] | None]:
    """Return the prototypes as ``build`` does, with their library and blends; None without references."""
    order = np.argsort(support.classes, kind="stable")
    references, classes = support.embeddings[order], support.classes[order]
    counts = count_classes(classes, len(support.labels))
    means = class_means(references, classes, counts, pause=pause)
    matrix = unit_rows(means)
    if support.text is not None:
        matrix[counts == 0] = support.text[counts == 0]
    pause()
    library = make_library(references, classes, len(counts), support.text, support.text_mean, pause=pause)
    prototypes = PrototypeSet(
        labels=support.labels,
        matrix=matrix.astype(np.float32),
        means=means,
        counts=counts,
        generation=generation,
        encoder_id=support.encoder_id,
        fingerprint=support.fingerprint,
        settings=settings,
        calibration=Calibration() if settings.abstain is None else Calibration(confidence=NEVER, **NOTHING_FILED),
        sources=tuple(support.sources[index] for index in order),
        references=references.astype(np.float32),
        classes=classes,
        added=np.zeros(len(classes), np.int64),
        text=np.zeros((0, references.shape[1]), np.float32) if support.text is None else support.text,
        temperature=TYPICAL_TEMPERATURE,
        recall=np.full(len(support.labels), np.nan),
    )
    if not len(references):
        return prototypes, library, None
    best, mixed = fit_blends(library, pause=pause)
    pause()
    best_rule = _rule(best)
    prototypes = replace(
        prototypes,
        whitening=_whitening(best, references, support.strangers, pause),
        best=best_rule,
        mixed=best_rule if mixed is best else _rule(mixed),
    )
    pause()
    blend = mixed if settings.mode is Mode.MIXED else best
    return _calibrate(prototypes, library, blend, support.evidence, pause), library, (best, mixed)


def _whitening(blend: Blend, references: FloatArray, strangers: FloatArray, pause: Pause) -> Whitening:
    gaussian, space = blend.fit.gaussian, blend.fit.space
    placed = space.place(strangers, pause=pause) @ gaussian.whitener
    return Whitening(
        center=space.center,
        scale=space.scale,
        whitener=gaussian.whitener,
        background=gaussian.background,
        background_middle=gaussian.background_middle,
        kernel_rows=blend.kernel.rows,
        kernel_classes=blend.kernel.classes,
        kernel_counts=blend.kernel.counts,
        strangers=unit_rows(placed).astype(np.float32),
        remoteness=space.remoteness(references, pause=pause).astype(np.float32),
    )


def _rule(blend: Blend) -> BlendRule:
    named, trial = blend.kernel.named, blend.trial
    return BlendRule(
        shrunk=blend.shrunk,
        named=np.zeros((0, blend.shrunk.shape[1]), np.float32) if named is None else named,
        competes=blend.competes,
        text_weight=trial.text_weight,
        gaussian_weight=trial.gaussian_weight,
        kernel_weight=trial.kernel_weight,
    )


def _calibrate(
    prototypes: PrototypeSet, library: Library, blend: Blend, evidence: Evidence | None, pause: Pause
) -> PrototypeSet:
    """Return the prototypes with temperature, recall, thresholds and stranger scores."""
    settings, classes, own = prototypes.settings, len(library.counts), blend.fit.held.own
    if settings.mode in BLENDED:
        best, confidence = top_classes(blend.held_out_logits(pause=pause), 1.0, pause=pause)
    else:
        best, confidence, temperature = _plain_decisions(settings.mode, library, blend, pause)
        prototypes = replace(prototypes, temperature=temperature)
    right = best == own
    with np.errstate(invalid="ignore"):
        recall = np.bincount(own, weights=right, minlength=classes) / np.bincount(own, minlength=classes)
    names = blend.fit.names
    facts: dict[str, Any] = {
        "text_weight": blend.trial.text_weight,
        "text_evidence": None if names is None else names.evidence,
        "kernel_share": blend.trial.share,
    }
    if settings.abstain is None:
        accuracy = balanced_accuracy(right, own, classes)
        facts |= {"filed_held_out": len(own), "right_held_out": int(right.sum())}
        calibration = Calibration(held_out=len(own), accuracy=accuracy, filed_expected=1.0, **facts)
        return replace(prototypes, calibration=calibration, recall=recall)
    null: Strangers | None = None
    if settings.mode in BLENDED or settings.abstain.strangers != "auto":
        null = leave_classes_out(library.rows, library.classes, library.counts, pause=pause)
    open_set = held_out_open_set(library, blend, best, with_typicality=settings.mode in BLENDED, pause=pause)
    facts |= calibrate_knowns(
        HeldOutOutcomes(confidence, right, own, open_set),
        settings.abstain.precision,
        classes=classes,
        foreign_cosines=None if right.any() else _foreign_cosines(library, pause),
        null=null,
        evidence=evidence,
    )
    if np.count_nonzero(library.counts) == 1 and len(own) < FEWEST_FOR_ONE_CLASS:
        note = f"one class needs {FEWEST_FOR_ONE_CLASS} different images, so that others can be told from it"
        facts |= {**NOTHING_FILED, "precision_expected": None, "notes": facts["notes"] or (note,)}
    if settings.abstain.strangers != "auto" and null is not None:
        facts |= calibrate_strangers(null, settings.abstain.strangers, facts["notes"])
        prototypes = replace(prototypes, null=null)
    return replace(prototypes, calibration=Calibration(**facts), recall=recall)


def _plain_decisions(mode: Mode, library: Library, blend: Blend, pause: Pause) -> tuple[IntArray, Array, float]:
    """Return the best class (R,) of held-out rows under a plain mode, its probability (R,), and the temperature."""
    chosen, own = blend.fit.held.chosen, blend.fit.held.own
    plain = Plain(library.rows, library.classes, library.counts, blend.fit.moments.means, library.text)
    table = np.empty((len(chosen), len(library.counts)))
    for part in parts(len(chosen), len(library.rows), BLOCK, pause=pause):  # the blocks of ``max``, for equal rounding
        table[part] = plain_held_out(mode, chosen[part], plain)
    temperature = plain_temperature(table, own, pause=pause)
    best, confidence = top_classes(table, temperature, pause=pause)
    return best if np.isfinite(table).any() else own, confidence, temperature


def plain_temperature(table: Array, own: IntArray, *, pause: Pause = no_pause) -> float:
    """Return the factor from the cosines (R, C) of held-out references to log probabilities."""
    if not np.isfinite(table).any():
        return TYPICAL_TEMPERATURE
    weights, spread = balanced_weights(own, table.shape[1]), TEMPERATURE_SPREAD
    return fit_temperature(table, own, weights, typical=TYPICAL_TEMPERATURE, spread=spread, pause=pause)[0]


def held_out_open_set(
    library: Library, blend: Blend, best: IntArray, *, with_typicality: bool, pause: Pause = no_pause
) -> OpenSetScores:
    """Return the open-set scores of the R held-out references for their best classes (R,)."""
    rows, classes, fit = library.rows, library.classes, blend.fit
    chosen = fit.held.chosen
    if np.count_nonzero(library.counts) < 2 or not len(chosen):  # noqa: PLR2004 - no centre between classes
        return OpenSetScores(nearest_cosines(rows[chosen], best, rows, classes, chosen, pause=pause), None, None)
    if fit.refitted is not None:
        background = fit.refitted.background
        cosine, remoteness = fit.refitted.cosine[np.arange(len(best)), best], fit.refitted.remoteness
    else:
        background = background_distances(fit.gaussian, fit.held, pause=pause) if with_typicality else np.zeros(0)
        placed = fit.gaussian.placed
        cosine = nearest_cosines(placed[chosen], best, placed, classes, chosen, pause=pause)
        remoteness = remoteness_left_out(rows, classes, library.counts, chosen, fit.moments, pause=pause)
    return OpenSetScores(cosine, background - blend.trial.distances if with_typicality else None, remoteness)


def _foreign_cosines(library: Library, pause: Pause) -> Array:
    """Return (S,) cosines of a sample of references to the nearest one of another class."""
    if np.count_nonzero(library.counts) < 2:  # noqa: PLR2004 - no other class
        return np.zeros(0)
    sample = np.unique(np.linspace(0, len(library.rows) - 1, FOREIGN_SAMPLE).astype(np.int64))
    nearest = np.empty(len(sample))
    for part in parts(len(sample), len(library.rows), pause=pause):
        similarities = library.rows[sample[part]] @ library.rows.T
        similarities[library.classes[sample[part]][:, None] == library.classes] = -1.0
        nearest[part] = similarities.max(axis=1)
    return nearest
