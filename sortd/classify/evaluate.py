"""Evaluate references by leave-one-out: accuracy of all modes, suspect references, and advice."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sortd.arrays import IntArray
from sortd.classify.blend import Blend, fit_blends
from sortd.classify.build import build, held_out_open_set
from sortd.classify.calibration import (
    HeldOutOutcomes,
    balanced_accuracy,
    balanced_weights,
    calibrate_knowns,
    corrected_confidence,
    precision_curve,
)
from sortd.classify.decide import decide
from sortd.classify.held_out import LARGEST_ROWS, LeaveOneOutResult, leave_out_blend, leave_out_plain
from sortd.classify.library import Library, duplicate_distance, make_library, parts, unit_rows
from sortd.classify.open_set import leave_classes_out, nearest_cosines
from sortd.classify.proportions import estimated
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import BLENDED, AbstainSettings, DecisionSettings, Evidence, SupportSet
from sortd.events import Mode

LEAST_JUDGED = 20  # references from which class names are compared with chance
UNREAD_REMEDY = "describe the classes in English (class.txt), or set a `text_model` for their language (docs/models.md)"
PREFERRED = (Mode.MIXED, Mode.BEST, Mode.MEAN, Mode.MAX, Mode.AVG, Mode.TEXT)
"""Of equally accurate modes, the first is advised."""
PRECISIONS = (0.8, 0.9, 0.95, 0.98, 0.99)
ENOUGH_FILED = 0.5
"""Share of filed images below which more references are advised."""
FEW = 4
LOW_RECALL = 0.6
GROWTH = 0.03
"""Gain of accuracy by doubling the references from which more references are advised."""
SURE = 0.9
"""Probability of another class from which a reference counts as mislabelled."""
SPREADS = 3.5
"""Robust standard deviations below the median of its class from which a reference is an outlier (Iglewicz, Hoaglin)."""
FEWEST_FOR_OUTLIERS = 4
MOST_SUSPECTS = 100
"""Largest number of suspects of each kind."""
BLOCK = 16_000_000


@dataclass(frozen=True)
class ModeReport:
    """Leave-one-out results of one mode."""

    mode: str
    judged: int  # references that could be left out: those of classes with two or more
    right: int
    accuracy: float | None
    balanced_accuracy: float | None
    distinct_accuracy: float | None  # balanced, near-duplicates left out together: an estimate for new images
    distinct_judged: int  # references of the line above; near-duplicates count once
    curve: tuple[tuple[float, float, float], ...]  # (least confidence, share filed, precision)


@dataclass(frozen=True)
class ClassReport:
    """One class under the mode in force."""

    label: str
    references: int
    distinct: int  # references with near-duplicates counted once
    recall: float | None
    judged: int  # references that could be left out
    precision: float | None
    decided: int  # references that were decided to be of this class
    f1: float | None  # harmonic mean of recall and precision; None without judged references
    confused_with: str | None  # the most frequent wrong class of its references
    needs_images: str | None  # why it needs more images, or None


@dataclass(frozen=True)
class Suspect:
    """A reference that may be wrong."""

    kind: str  # mislabelled, duplicate (in two classes) or outlier (unlike the rest of its class)
    source: str
    label: str
    other_label: str | None  # the more probable class, or the class of the duplicate
    other_source: str | None  # the duplicate
    score: float  # probability of the other class, cosine to the duplicate, or cosine to its own class


@dataclass(frozen=True)
class TradeOff:
    """The share of filed images, and their expected precision, for a wanted precision."""

    precision: float
    filed: float
    expected: float | None
    is_attained: bool
    held_out: int  # images behind ``filed``
    judged: int  # images behind ``expected``


@dataclass(frozen=True)
class Advice:
    """The advised mode and precision, with reasons."""

    mode: str
    precision: float
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """The leave-one-out evaluation of a support set."""

    encoder_id: str
    classes: int
    references: int
    distinct: int
    mode: str  # the mode of class_reports, confusion, trade_offs and suspects
    modes: tuple[ModeReport, ...]
    class_reports: tuple[ClassReport, ...]
    macro_f1: float | None  # mean F1 of the classes that have one
    confusion: tuple[tuple[str, str, int], ...]  # (class, decided class, count); errors first, largest first
    trade_offs: tuple[TradeOff, ...]
    suspects: tuple[Suspect, ...]
    half_accuracy: float | None  # balanced accuracy on one half of the references with the other half
    half_judged: int  # the references of that half
    whole_accuracy: float | None  # distinct accuracy with all references
    whole_judged: int
    is_labelled_enough: bool | None  # whether the difference of the two is below GROWTH
    advice: Advice
    calibration: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping with every field."""
        return asdict(self)


def evaluate(
    support: SupportSet,
    settings: DecisionSettings | None = None,
    *,
    keep: Callable[[PrototypeSet], None] = lambda _: None,
) -> EvaluationReport:
    """Return the evaluation of a support set; ``keep`` receives its prototypes.

    Plain modes are exact; ``best`` and ``mixed`` use the space and the parameters that were fitted on all references.
    """
    settings = DecisionSettings() if settings is None else settings
    support = _part(support, np.argsort(support.classes, kind="stable"))
    prototypes = build(support, settings, generation=0)
    keep(prototypes)
    references, classes = prototypes.references, prototypes.classes
    library = make_library(references, classes, len(support.labels), support.text, support.text_mean)
    judgements, blends = _judgements(prototypes, support, library)
    reports = tuple(_mode_report(mode, judgement, len(support.labels)) for mode, judgement in judgements.items())
    mode = settings.mode if settings.mode in judgements else Mode.MEAN
    mine = judgements.get(mode)
    half, half_judged = _half_accuracy(support, replace(settings, abstain=None))
    in_force = [report for report in reports if report.mode == mode.value]
    whole = in_force[0].distinct_accuracy if in_force else None
    trade_offs = (
        ()
        if mine is None
        else _trade_offs(library, mine, mode, blends[mode is Mode.MIXED], settings.abstain, support.evidence)
    )
    class_reports = _class_reports(prototypes, library, mine)
    scores = [one.f1 for one in class_reports if one.f1 is not None]
    return EvaluationReport(
        encoder_id=support.encoder_id,
        classes=len(support.labels),
        references=len(support.sources),
        distinct=len(library.rows),
        mode=mode.value,
        modes=reports,
        class_reports=class_reports,
        macro_f1=float(np.mean(scores)) if scores else None,
        confusion=_confusion(support.labels, mine) if mine is not None else (),
        trade_offs=trade_offs,
        suspects=_suspects(support, library, mine) if mine is not None else (),
        half_accuracy=half,
        half_judged=half_judged,
        whole_accuracy=whole,
        whole_judged=in_force[0].distinct_judged if in_force else 0,
        is_labelled_enough=None if half is None or whole is None else whole - half < GROWTH,
        advice=_advice(reports, trade_offs, prototypes),
        calibration=prototypes.calibration.to_json(),
    )


def _part(support: SupportSet, rows: IntArray) -> SupportSet:
    sources = tuple(support.sources[row] for row in rows)
    return replace(support, embeddings=support.embeddings[rows], classes=support.classes[rows], sources=sources)


def _judgements(
    prototypes: PrototypeSet, support: SupportSet, library: Library
) -> tuple[dict[Mode, LeaveOneOutResult], tuple[Blend, ...]]:
    """Return the results by mode, and the blends of ``best`` and ``mixed``; nothing without references."""
    if not len(support.sources):
        return {}, ()
    plain = [Mode.AVG, Mode.MAX, Mode.MEAN] + ([Mode.TEXT] if support.text is not None else [])
    found = {mode: leave_out_plain(mode, prototypes, library) for mode in plain}
    best, mixed = fit_blends(library, largest=LARGEST_ROWS)
    found[Mode.BEST] = leave_out_blend(Mode.BEST, prototypes, library, best)
    is_same = mixed is best
    found[Mode.MIXED] = found[Mode.BEST] if is_same else leave_out_blend(Mode.MIXED, prototypes, library, mixed)
    return found, (best, mixed)


def _mode_report(mode: Mode, judgement: LeaveOneOutResult, classes: int) -> ModeReport:
    right = judgement.alone.best == judgement.alone.own
    apart = judgement.distinct.best == judgement.distinct.own
    weights, confidence = balanced_weights(judgement.distinct.own, classes), judgement.distinct.confidence
    return ModeReport(
        mode=mode.value,
        judged=len(right),
        right=int(right.sum()),
        accuracy=float(right.mean()) if len(right) else None,
        balanced_accuracy=balanced_accuracy(right, judgement.alone.own, classes),
        distinct_accuracy=balanced_accuracy(apart, judgement.distinct.own, classes),
        distinct_judged=len(apart),
        curve=tuple(precision_curve(confidence, corrected_confidence(confidence, apart, weights), apart, weights)),
    )


def _class_reports(
    prototypes: PrototypeSet, library: Library, judgement: LeaveOneOutResult | None
) -> tuple[ClassReport, ...]:
    count = len(prototypes.labels)
    empty = np.zeros(0, np.int64)
    own, best = (empty, empty) if judgement is None else (judgement.alone.own, judgement.alone.best)
    judged, taken = np.bincount(own, minlength=count), np.bincount(best, minlength=count)
    right = np.bincount(own[own == best], minlength=count)
    reports = []
    for index, label in enumerate(prototypes.labels):
        recall = float(right[index] / judged[index]) if judged[index] else None
        wrong = best[(own == index) & (best != index)]
        reports.append(
            ClassReport(
                label=label,
                references=int(prototypes.counts[index]),
                distinct=int(library.counts[index]),
                recall=recall,
                judged=int(judged[index]),
                precision=float(right[index] / taken[index]) if taken[index] else None,
                decided=int(taken[index]),
                f1=float(2 * right[index] / (judged[index] + taken[index])) if judged[index] else None,
                confused_with=prototypes.labels[int(np.bincount(wrong).argmax())] if len(wrong) else None,
                needs_images=_need(int(library.counts[index]), recall, int(judged[index])),
            )
        )
    return tuple(reports)


def _need(distinct: int, recall: float | None, judged: int) -> str | None:
    if distinct == 0:
        return "no images"
    if distinct < FEW:
        return f"only {distinct} different images" if distinct > 1 else "only one image"
    if recall is not None and recall < LOW_RECALL:
        return f"recall {estimated(recall, judged)}"
    return None


def _confusion(labels: tuple[str, ...], judgement: LeaveOneOutResult) -> tuple[tuple[str, str, int], ...]:
    pairs, numbers = np.unique(np.column_stack([judgement.alone.own, judgement.alone.best]), axis=0, return_counts=True)
    found = [(int(own), int(best), int(number)) for (own, best), number in zip(pairs, numbers, strict=True)]
    found.sort(key=lambda entry: (entry[0] == entry[1], -entry[2], entry[:2]))
    return tuple((labels[own], labels[best], number) for own, best, number in found)


def _suspects(support: SupportSet, library: Library, judgement: LeaveOneOutResult) -> tuple[Suspect, ...]:
    """Return references that are probably mislabelled, are in two classes, or are outliers of their class."""

    def suspect(kind: str, row: int, score: float, other: int | None = None, source: str | None = None) -> Suspect:
        other_label = None if other is None else support.labels[other]
        label = support.labels[support.classes[row]]
        return Suspect(kind, support.sources[row], label, other_label, source, score)

    best, confidence = judgement.distinct.best, judgement.distinct.confidence
    claimed = np.flatnonzero((best != judgement.distinct.own) & (confidence >= SURE))
    claimed = claimed[np.argsort(-confidence[claimed], kind="stable")]
    rows = judgement.distinct.rows
    return (
        *(suspect("mislabelled", rows[at], float(confidence[at]), int(best[at])) for at in claimed[:MOST_SUSPECTS]),
        *(
            suspect("duplicate", one, -distance, int(support.classes[other]), support.sources[other])
            for distance, one, other in sorted(_duplicates(support))[:MOST_SUSPECTS]
        ),
        *(suspect("outlier", row, cosine) for cosine, row in sorted(_outliers(library))[:MOST_SUSPECTS]),
    )


def _duplicates(support: SupportSet) -> list[tuple[float, int, int]]:
    """Return (minus cosine, reference, reference) of near-duplicates in different classes."""
    least = np.float32(1.0 - duplicate_distance(unit_rows(support.embeddings.astype(np.float64))))
    rows, classes = support.embeddings.astype(np.float32), support.classes
    found: list[tuple[float, int, int]] = []
    for part in parts(len(rows), len(rows), BLOCK):
        similarities = rows[part] @ rows.T
        near = (similarities >= least) & (classes[part][:, None] < classes)
        found += [
            (-float(similarities[one, other]), int(one) + part.start, int(other)) for one, other in np.argwhere(near)
        ]
    return found


def _outliers(library: Library) -> list[tuple[float, int]]:
    """Return (mean cosine to the nearest others of its class, reference) of the outliers of each class."""
    alone = np.flatnonzero(library.counts[library.classes] > 1)
    cosine = nearest_cosines(library.rows[alone], library.classes[alone], library.rows, library.classes, alone)
    far: list[tuple[float, int]] = []
    for label in np.flatnonzero(library.counts >= FEWEST_FOR_OUTLIERS):
        members = np.flatnonzero(library.classes[alone] == label)
        median = float(np.median(cosine[members]))
        spread = max(float(np.median(np.abs(cosine[members] - median))) * 1.4826, 0.01)
        least = median - SPREADS * spread
        far += [(float(cosine[at]), int(library.leaders[alone[at]])) for at in members if cosine[at] < least]
    return far


def _trade_offs(
    library: Library,
    judgement: LeaveOneOutResult,
    mode: Mode,
    blend: Blend,
    abstain: AbstainSettings | None,
    evidence: Evidence | None,
) -> tuple[TradeOff, ...]:
    kept = np.isin(judgement.distinct.rows, library.leaders[blend.fit.held.chosen])
    own, best = judgement.distinct.own[kept], judgement.distinct.best[kept]
    if not len(own):
        return ()
    open_set = held_out_open_set(library, blend, best, with_typicality=mode in BLENDED)
    outcomes = HeldOutOutcomes(judgement.distinct.confidence[kept], best == own, own, open_set)
    null = leave_classes_out(library.rows, library.classes, library.counts) if mode in BLENDED else None
    found = []
    for precision in sorted({*PRECISIONS, *(() if abstain is None else (abstain.precision,))}):
        facts = calibrate_knowns(outcomes, precision, classes=len(library.counts), null=null, evidence=evidence)
        filed, expected, judged = (facts[key] for key in ("filed_expected", "precision_expected", "filed_held_out"))
        judged = facts["checked"] or judged
        found.append(TradeOff(precision, filed, expected, not facts["notes"], len(own), judged))
    return tuple(found)


def _half_accuracy(support: SupportSet, settings: DecisionSettings) -> tuple[float | None, int]:
    """Return the balanced accuracy on every other reference of each class by the rest, and their number."""
    starts = np.searchsorted(support.classes, np.arange(len(support.labels)))
    rank = np.arange(len(support.classes)) - starts[support.classes]
    kept = rank % 2 == 0
    if kept.all():
        return None, 0
    prototypes = build(_part(support, np.flatnonzero(kept)), settings, generation=0)
    own = support.classes[~kept]
    decisions = decide(prototypes, support.embeddings[~kept])
    right = [getattr(one, "label", None) == support.labels[index] for one, index in zip(decisions, own, strict=True)]
    return balanced_accuracy(np.array(right), own, len(support.labels)), len(own)


def unread_names(prototypes: PrototypeSet) -> str | None:
    """Return a clause if the class names alone decide the references no better than chance, and are used; else None.

    The model does not read their language then, or they are too special for it.
    """
    present = np.flatnonzero(prototypes.counts > 0)
    judged, are_used = len(prototypes.classes), prototypes.settings.mode in {Mode.TEXT, Mode.MIXED}
    if not are_used or not len(prototypes.text) or len(present) < 2 or judged < LEAST_JUDGED:  # noqa: PLR2004
        return None
    nearest = present[np.argmax(prototypes.references @ prototypes.text[present].T, axis=1)]
    accuracy = balanced_accuracy(nearest == prototypes.classes, prototypes.classes, len(prototypes.labels)) or 0.0
    chance = 1.0 / len(present)
    if accuracy > chance + np.sqrt(chance * (1.0 - chance) / judged):
        return None
    figures = f"by its name alone {estimated(accuracy, judged, 'references')} get their class, by chance {chance:.1%}"
    return f"the model does not read the class names: {figures}"


def _advice(reports: tuple[ModeReport, ...], trade_offs: tuple[TradeOff, ...], prototypes: PrototypeSet) -> Advice:
    """Return the current mode as advice unless another one is better by more than a standard error."""
    settings = prototypes.settings
    precision = settings.abstain.precision if settings.abstain is not None else AbstainSettings().precision
    known = {Mode(one.mode): one for one in reports if one.distinct_accuracy is not None}
    if not known:
        return Advice(settings.mode.value, precision, ("no class has two different images: add images",))
    accuracy = {mode: one.distinct_accuracy or 0.0 for mode, one in known.items()}
    top, judged = max(accuracy.values()), max(one.distinct_judged for one in known.values())
    error = float(np.sqrt(max(top * (1.0 - top), 0.25 / judged) / judged))
    mode = next(mode for mode in (settings.mode, *PREFERRED) if accuracy.get(mode, -1.0) >= top - error)
    figures = f"leave-one-out accuracy {estimated(accuracy[mode], known[mode].distinct_judged, 'references')}"
    if mode is settings.mode:
        said = [f"keep mode {mode.value}: {figures}; no other mode is significantly better"]
    else:
        own = known.get(settings.mode)
        mine = f", {settings.mode.value}: {estimated(own.distinct_accuracy, own.distinct_judged)}" if own else ""
        said = [f"use mode {mode.value}: {figures}{mine}"]
    wanted = [one for one in trade_offs if settings.abstain is not None and one.precision == precision]
    if wanted and wanted[0].filed < ENOUGH_FILED:
        filed = estimated(wanted[0].filed, wanted[0].held_out, "known images")
        said.append(f"precision {precision:g} files {filed}: add references")
        enough = [one for one in trade_offs if one.filed >= ENOUGH_FILED]
        if enough:
            best = max(enough, key=lambda one: one.precision)
            said.append(f"precision {best.precision:g} would file {estimated(best.filed, best.held_out)}")
    unread = unread_names(prototypes)
    if unread is not None:
        said.append(f"{unread}; {UNREAD_REMEDY}")
    return Advice(mode.value, precision, tuple(said))
