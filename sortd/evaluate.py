"""Evaluate a library on its own references: every mode by leave-one-out, doubtful references, and what to change."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array
from sortd.deciding.calibration import Evidence, calibrate_knowns
from sortd.deciding.confidence import balanced_weights, precision_curve
from sortd.deciding.duplicates import duplicate_distance, unit
from sortd.deciding.evaluation import Advice, ClassReport, EvaluationReport, ModeReport, Suspect, TradeOff
from sortd.deciding.familiarity import Looks
from sortd.deciding.held_out import Judgement, Merge, fit_wide, judge_blend, judge_plain, merge
from sortd.deciding.strangers import nearest_cosines
from sortd.deciding.suspects import find_doubles, find_mislabelled, find_outliers
from sortd.prototypes import Abstain, DecisionSettings, Mode, PrototypeSet, SupportSet, build, decide

PREFERRED = (Mode.MIXED, Mode.BEST, Mode.MEAN, Mode.MAX, Mode.AVG, Mode.TEXT)
"""Among modes that do equally well the first is advised."""
PRECISIONS = (0.8, 0.9, 0.95, 0.98, 0.99)
ENOUGH_FILED = 0.5
"""A sorter that sends more than half to review is not used."""
FEW = 4
LOW_RECALL = 0.6
GROWTH = 0.03
"""Accuracy that doubling the references must still bring for more of them to be asked for."""


def evaluate(
    support: SupportSet,
    settings: DecisionSettings | None = None,
    *,
    keep: Callable[[PrototypeSet], None] = lambda _: None,
) -> EvaluationReport:
    """Return what leave-one-out tells of a support set under some settings; ``keep`` takes the prototypes of it.

    It is pure and takes seconds for 10,000 references. ``avg``, ``max``, ``mean`` and ``text`` are exact; ``best`` and
    ``mixed`` keep the centre and the scale of the space, and what was chosen on all references.
    """
    settings = DecisionSettings() if settings is None else settings
    support = _sorted(support)
    prototypes = build(support, settings, generation=0)
    keep(prototypes)
    merged = merge(prototypes, support)
    judgements = _judgements(prototypes, support, merged)
    reports = tuple(_mode_report(mode, judgement, len(support.labels)) for mode, judgement in judgements.items())
    mode = settings.mode if settings.mode in judgements else Mode.MEAN
    mine = judgements.get(mode)
    half = _half_accuracy(support, replace(settings, abstain=None))
    whole = next((report.distinct_accuracy for report in reports if report.mode == mode.value), None)
    trade_offs = _trade_offs(prototypes, merged, mine, settings.abstain) if mine is not None else ()
    return EvaluationReport(
        encoder_id=support.encoder_id,
        classes=len(support.labels),
        references=len(support.sources),
        distinct=len(merged.leaders),
        mode=mode.value,
        modes=reports,
        class_reports=_class_reports(prototypes, merged, mine),
        confusion=_confusion(support.labels, mine),
        trade_offs=trade_offs,
        suspects=_suspects(support, merged, mine),
        half_accuracy=half,
        whole_accuracy=whole,
        is_labelled_enough=None if half is None or whole is None else whole - half < GROWTH,
        advice=_advice(reports, trade_offs, settings),
        calibration=prototypes.calibration.to_json(),
    )


def _sorted(support: SupportSet) -> SupportSet:
    order = np.argsort(support.classes, kind="stable")
    return replace(
        support,
        embeddings=support.embeddings[order],
        classes=support.classes[order],
        sources=tuple(support.sources[index] for index in order),
    )


def _judgements(prototypes: PrototypeSet, support: SupportSet, merged: Merge) -> dict[Mode, Judgement]:
    if not len(support.sources):
        return {}
    plain = [Mode.AVG, Mode.MAX, Mode.MEAN] + ([Mode.TEXT] if support.text is not None else [])
    found = {mode: judge_plain(mode, prototypes, merged) for mode in plain}
    best, mixed = fit_wide(merged.library)
    found[Mode.BEST] = judge_blend(Mode.BEST, prototypes, merged, best)
    same = mixed is best
    found[Mode.MIXED] = found[Mode.BEST] if same else judge_blend(Mode.MIXED, prototypes, merged, mixed)
    return found


def _mode_report(mode: Mode, judgement: Judgement, classes: int) -> ModeReport:
    right = judgement.best == judgement.own
    weights = balanced_weights(judgement.own, classes)
    apart = judgement.distinct_best == judgement.distinct_own
    distinct_weights = balanced_weights(judgement.distinct_own, classes)
    return ModeReport(
        mode=mode.value,
        judged=len(right),
        right=int(right.sum()),
        accuracy=float(right.mean()) if len(right) else None,
        balanced_accuracy=_weighted(right, weights),
        distinct_accuracy=_weighted(apart, distinct_weights),
        distinct_judged=len(apart),
        curve=tuple(precision_curve(judgement.distinct_confidence, apart, distinct_weights)),
    )


def _weighted(right: npt.NDArray[np.bool_], weights: Array) -> float | None:
    return float(weights @ right / weights.sum()) if len(right) else None


def _class_reports(prototypes: PrototypeSet, merged: Merge, judgement: Judgement | None) -> tuple[ClassReport, ...]:
    count = len(prototypes.labels)
    empty = np.zeros(0, np.int64)
    own = judgement.own if judgement is not None else empty
    best = judgement.best if judgement is not None else empty
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
                distinct=int(merged.library.counts[index]),
                recall=recall,
                judged=int(judged[index]),
                precision=float(right[index] / taken[index]) if taken[index] else None,
                confused_with=prototypes.labels[int(np.bincount(wrong).argmax())] if len(wrong) else None,
                needs_images=_need(int(merged.library.counts[index]), recall),
            )
        )
    return tuple(reports)


def _need(distinct: int, recall: float | None) -> str | None:
    if distinct == 0:
        return "it has a name only"
    if distinct < FEW:
        return f"it has {distinct} that differ" if distinct > 1 else "it has one"
    if recall is not None and recall < LOW_RECALL:
        return f"only {recall:.0%} of its own are recognised"
    return None


def _confusion(labels: tuple[str, ...], judgement: Judgement | None) -> tuple[tuple[str, str, int], ...]:
    if judgement is None:
        return ()
    pairs, numbers = np.unique(np.column_stack([judgement.own, judgement.best]), axis=0, return_counts=True)
    found = [(int(own), int(best), int(number)) for (own, best), number in zip(pairs, numbers, strict=True)]
    found.sort(key=lambda entry: (entry[0] == entry[1], -entry[2], entry[:2]))
    return tuple((labels[own], labels[best], number) for own, best, number in found)


def _suspects(support: SupportSet, merged: Merge, judgement: Judgement | None) -> tuple[Suspect, ...]:
    if judgement is None:
        return ()
    rows = unit(support.embeddings.astype(np.float64))
    distance = duplicate_distance(rows)
    library = merged.library
    alone = np.flatnonzero(library.counts[library.classes] > 1)
    cosine = nearest_cosines(library.rows[alone], library.classes[alone], library.rows, library.classes, alone)
    return (
        *find_mislabelled(support, judgement.distinct_rows, judgement.distinct_best, judgement.distinct_confidence),
        *find_doubles(support, distance),
        *find_outliers(support, merged.leaders[alone], cosine),
    )


def _trade_offs(
    prototypes: PrototypeSet, merged: Merge, judgement: Judgement, abstain: Abstain | None
) -> tuple[TradeOff, ...]:
    library = merged.library
    alone = np.flatnonzero(np.isin(merged.leaders, judgement.distinct_rows))
    evidence = Evidence(
        own=judgement.distinct_own,
        best=judgement.distinct_best,
        confidence=judgement.distinct_confidence,
        looks=Looks(
            nearest_cosines(library.rows[alone], judgement.distinct_best, library.rows, library.classes, alone),
            None,
            None,
        ),
        classes=len(prototypes.labels),
    )
    found = []
    for precision in sorted({*PRECISIONS, *(() if abstain is None else (abstain.precision,))}):
        facts = calibrate_knowns(evidence, Abstain(precision=precision), np.zeros(0))
        if "filed_expected" in facts:
            found.append(
                TradeOff(precision, facts["filed_expected"], facts["precision_expected"], "notes" not in facts)
            )
    return tuple(found)


def _half_accuracy(support: SupportSet, settings: DecisionSettings) -> float | None:
    """Return the balanced accuracy on every other reference of each class when only the rest is there."""
    starts = np.searchsorted(support.classes, np.arange(len(support.labels)))
    rank = np.arange(len(support.classes)) - starts[support.classes]
    kept = rank % 2 == 0
    if not (~kept).any():
        return None
    half = replace(
        support,
        embeddings=support.embeddings[kept],
        classes=support.classes[kept],
        sources=tuple(source for source, keep in zip(support.sources, kept, strict=True) if keep),
    )
    prototypes = build(half, settings, generation=0)
    decisions = decide(prototypes, support.embeddings[~kept])
    own = support.classes[~kept]
    right = np.array(
        [getattr(one, "label", None) == support.labels[index] for one, index in zip(decisions, own, strict=True)]
    )
    return _weighted(right, balanced_weights(own, len(support.labels)))


def _advice(reports: tuple[ModeReport, ...], trade_offs: tuple[TradeOff, ...], settings: DecisionSettings) -> Advice:
    """Advise the mode in force unless another one decides more right by over a standard error: chance is no reason."""
    precision = settings.abstain.precision if settings.abstain is not None else Abstain().precision
    known = {Mode(one.mode): one for one in reports if one.distinct_accuracy is not None}
    if not known:
        return Advice(settings.mode.value, precision, ("no class has two images that differ: add some",))
    accuracy = {mode: one.distinct_accuracy or 0.0 for mode, one in known.items()}
    top, judged = max(accuracy.values()), max(one.distinct_judged for one in known.values())
    error = float(np.sqrt(max(top * (1.0 - top), 0.25 / judged) / judged))
    mode = next(mode for mode in (settings.mode, *PREFERRED) if accuracy.get(mode, -1.0) >= top - error)
    figures = f"{accuracy[mode]:.1%} of {known[mode].distinct_judged:,} references right, left out one by one"
    if mode is settings.mode:
        said = [f"keep mode {mode.value}: it decides {figures}, and no other mode is better by more than chance"]
    else:
        there = (
            "" if settings.mode not in accuracy else f", where {settings.mode.value} has {accuracy[settings.mode]:.1%}"
        )
        said = [f"use mode {mode.value}: it decides {figures}{there}"]
    wanted = [one for one in trade_offs if settings.abstain is not None and one.precision == precision]
    if wanted and wanted[0].filed < ENOUGH_FILED:
        said.append(f"precision {precision:g} files {wanted[0].filed:.0%} of known images: add references")
        enough = [one for one in trade_offs if one.filed >= ENOUGH_FILED]
        if enough:
            best = max(enough, key=lambda one: one.precision)
            said.append(f"precision {best.precision:g} would file {best.filed:.0%}")
    return Advice(mode.value, precision, tuple(said))
