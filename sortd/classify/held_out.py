"""Held-out judgements: what a mode makes of references that it has not seen, and two sets of them compared.

``agreement`` compares an encoder's rounded rows with the exact ones, ``refuse_reload`` a new generation with the old.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.classify.blend import Blend, fit_blends
from sortd.classify.build import build, plain_temperature
from sortd.classify.calibration import top_classes
from sortd.classify.decide import score_batch
from sortd.classify.kernel import Plain, plain_held_out
from sortd.classify.leave_one_out import LARGEST_TABLE, choose_held_out
from sortd.classify.library import Library, class_means, make_library, parts
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import BLENDED, DecisionSettings, Mode, SupportSet

LARGEST_ROWS = 20_000
LEAST_SAME = 0.99
"""Share of the filed references that both must give one label. MLPerf holds a quantized classifier to 99 % of the exact
one's accuracy (Reddi et al., MLPerf Inference Benchmark, 2020); one label is the stricter claim, for no two errors
cancel."""
LEAST_COSINE = 0.99
"""Mean cosine between an image's two rows. On CLIP features of four public datasets, rows moved by noise to a mean
cosine of 0.99 still filed every reference alike, and at most 1.4 % of all were decided wrong that had been right; 0.98
made it 3 % (docs/backends.md)."""
FEWEST_FILED = 30
"""References that must have been filed before agreement says anything. When none of n differs, fewer than 3 / n of all
do, with 95 % confidence: here a tenth (Hanley & Lippman-Hand, If nothing goes wrong, is everything all right?, JAMA,
1983)."""
MOST_LOST = 0.10
"""Leave-one-out accuracy, on the classes that both share, that a rebuild may lose."""
STANDARD_ERRORS = 2.0
"""A loss must also be this many standard errors large: four references more or less are no proof."""
ABSTENTIONS = 2.0
"""A rebuild may not abstain this many times as often as before,"""
MORE_ABSTENTIONS = 0.10
"""if that is also this much more of all known images."""


@dataclass(frozen=True, eq=False)
class LeaveOneOutResult:
    """What one mode takes references for: R left out by themselves, and S left out with their near-duplicates."""

    judged: IntArray  # (R,) references, in the order of the prototype set
    own: IntArray  # (R,)
    best: IntArray  # (R,)
    confidence: Array  # (R,)
    distinct_rows: IntArray  # (S,) one reference of each group of near-duplicates
    distinct_own: IntArray  # (S,)
    distinct_best: IntArray  # (S,)
    distinct_confidence: Array  # (S,)


def merge_references(prototypes: PrototypeSet, support: SupportSet) -> Library:
    """Return the library of a prototype set, with the names of the support set that it was built of."""
    labels = len(prototypes.labels)
    return make_library(prototypes.references, prototypes.classes, labels, support.text, support.text_mean)


def fit_wide(library: Library) -> tuple[Blend, Blend]:
    """Return best and mixed with as many references left out as an evaluation wants."""
    return fit_blends(library, largest=LARGEST_ROWS)


def leave_out_plain(mode: Mode, prototypes: PrototypeSet, library: Library) -> LeaveOneOutResult:
    """Return what avg, max, mean or text make of the references, exactly."""
    plain = prototypes.plain
    sample = choose_held_out(plain.counts, plain.classes)
    temperature = plain_temperature(plain_held_out(mode, sample, plain), plain.classes[sample])
    judged = np.arange(len(plain.rows)) if mode is Mode.TEXT else np.flatnonzero(plain.counts[plain.classes] > 1)
    best, confidence = _plain_decisions(mode, plain, judged, temperature)
    apart, distinct_best, distinct_confidence = judged, best, confidence
    if len(library.rows) != len(plain.rows):  # near-duplicates: another question
        apart = np.flatnonzero(library.counts[library.classes] > 1)
        means = class_means(library.rows, library.classes, library.counts)
        distinct = Plain(library.rows, library.classes, library.counts, means, plain.text)
        distinct_best, distinct_confidence = _plain_decisions(mode, distinct, apart, temperature)
    return LeaveOneOutResult(
        judged=judged,
        own=plain.classes[judged],
        best=best,
        confidence=confidence,
        distinct_rows=library.leaders[apart],
        distinct_own=library.classes[apart],
        distinct_best=distinct_best,
        distinct_confidence=distinct_confidence,
    )


def _plain_decisions(mode: Mode, plain: Plain, chosen: IntArray, temperature: float) -> tuple[IntArray, Array]:
    best, confidence = np.zeros(len(chosen), np.int64), np.zeros(len(chosen))
    for part in parts(len(chosen), len(plain.counts), LARGEST_TABLE):
        best[part], confidence[part] = top_classes(plain_held_out(mode, chosen[part], plain), temperature)
    return best, confidence


def leave_out_blend(mode: Mode, prototypes: PrototypeSet, library: Library, blend: Blend) -> LeaveOneOutResult:
    """Return what best or mixed make of the references.

    A reference with near-duplicates in its class is judged with them in place when it is left out by itself, which is
    what the whole rule does; all others by leave-one-out.
    """
    held = blend.fit.held
    best, confidence = top_classes(blend.trial.table, 1.0) if len(held.own) else (held.own, np.zeros(0))
    size = np.bincount(library.group, minlength=len(library.rows))
    at_row = np.full(len(library.rows), -1)
    at_row[held.chosen] = np.arange(len(held.chosen))
    position = at_row[library.group]
    is_double = size[library.group] > 1
    judged = np.flatnonzero((prototypes.counts[prototypes.classes] > 1) & (is_double | (position >= 0)))
    # Position -1, of what was not held out, names one more place; those references have doubles and are judged below.
    whole_best = np.append(best, 0)[position[judged]]
    whole_confidence = np.append(confidence, 0.0)[position[judged]]
    doubles = np.flatnonzero(is_double[judged])
    if len(doubles):
        seen = score_batch(prototypes, prototypes.references[judged[doubles]].astype(np.float64), mode)
        whole_best[doubles], whole_confidence[doubles] = seen.best, seen.confidence
    return LeaveOneOutResult(
        judged=judged,
        own=prototypes.classes[judged],
        best=whole_best,
        confidence=whole_confidence,
        distinct_rows=library.leaders[held.chosen],
        distinct_own=held.own,
        distinct_best=best,
        distinct_confidence=confidence,
    )


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison of two encoders' rows found for one dataset, or for several together."""

    references: int  # rows that were compared
    judged: int  # references that could be left out and decided
    filed: int  # of these, the ones that the exact rows are sure enough of to file
    same: int  # of the filed, those to which the quick rows give the same label
    right_exact: int  # of the judged, those that the exact rows decide right
    right_quick: int  # of the judged, those that the quick rows decide right
    cosines: float  # sum of the cosines between the two rows of each reference
    lowest_cosine: float  # the least of them; 1 where there is none

    @property
    def share(self) -> float | None:
        """Labelled alike, of the filed; None without any."""
        return self.same / self.filed if self.filed else None

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine between the two rows of a reference; None without any."""
        return self.cosines / self.references if self.references else None


def agreement(exact: SupportSet, quick: SupportSet, settings: DecisionSettings) -> Agreement:
    """Compare two support sets of the same references, made by two encoders.

    Each reference is left out and decided by the others, in either space by itself. Labels count only for those that
    the exact rows would file: what would go to Review is a toss between two classes that any rounding turns over.

    Args:
        exact: the rows to be held to.
        quick: the rows that are to serve, of the same images in the same order.
        settings: how the dataset decides, and when it abstains.

    Raises:
        ValueError: they are not of the same references.
    """
    if exact.sources != quick.sources or exact.labels != quick.labels:
        raise ValueError("the two support sets hold other references, so there is nothing to compare")
    if not len(exact.sources):
        return pooled({})
    cosines = (exact.embeddings.astype(np.float64) * quick.embeddings).sum(axis=1)
    before, least_confidence = _judged(exact, settings)
    now, _ = _judged(quick, replace(settings, abstain=None))
    shared, left, right = np.intersect1d(before.judged, now.judged, return_indices=True)
    own, labels, quick_labels = before.own[left], before.best[left], now.best[right]
    is_filed = before.confidence[left] >= least_confidence
    return Agreement(
        references=len(cosines),
        judged=len(shared),
        filed=int(np.count_nonzero(is_filed)),
        same=int(np.count_nonzero((labels == quick_labels) & is_filed)),
        right_exact=int(np.count_nonzero(labels == own)),
        right_quick=int(np.count_nonzero(quick_labels == own)),
        cosines=float(cosines.sum()),
        lowest_cosine=float(cosines.min(initial=1.0)),
    )


def _judged(support: SupportSet, settings: DecisionSettings) -> tuple[LeaveOneOutResult, float]:
    """Return what each reference is taken for when it is left out, and the least confidence of a filed one."""
    prototypes = build(support, settings, generation=0)
    library = merge_references(prototypes, support)
    mode = Mode.MEAN if settings.mode is Mode.TEXT and support.text is None else settings.mode
    if mode in BLENDED:
        best, mixed = fit_wide(library)
        found = leave_out_blend(mode, prototypes, library, best if mode is Mode.BEST else mixed)
    else:
        found = leave_out_plain(mode, prototypes, library)
    return found, prototypes.calibration.confidence


def pooled(compared: Mapping[str, Agreement]) -> Agreement:
    """Return what several datasets say together."""
    added = ("references", "judged", "filed", "same", "right_exact", "right_quick", "cosines")
    sums = {name: sum(getattr(one, name) for one in compared.values()) for name in added}
    return Agreement(**sums, lowest_cosine=min((one.lowest_cosine for one in compared.values()), default=1.0))


def agreement_figures(parts: Mapping[str, Agreement]) -> dict[str, Any]:
    """Return several datasets together, and each by itself, as plain values."""
    return {**_figures(pooled(parts)), "datasets": {name: _figures(part) for name, part in sorted(parts.items())}}


def _figures(part: Agreement) -> dict[str, Any]:
    return {
        "references": part.references,
        "judged": part.judged,
        "right_fp32": part.right_exact,
        "right_int8": part.right_quick,
        "filed": part.filed,
        "same": part.same,
        "share": None if part.share is None else round(part.share, 4),
        "mean_cosine": None if part.mean_cosine is None else round(part.mean_cosine, 5),
        "lowest_cosine": round(part.lowest_cosine, 5),
    }


def refuse_quick(compared: Mapping[str, Agreement]) -> str | None:
    """Return why the quick rows may not serve these datasets, as a sentence, or None where they may.

    All of them together must be enough to tell, and each by itself must agree: a small library is not outvoted.
    """
    filed = pooled(compared).filed
    if filed < FEWEST_FILED:
        few = "references that are left out and filed by the others are too few to tell"
        return f"{filed} {few}; {FEWEST_FILED} are needed"
    for name, one in sorted(compared.items()):
        if one.mean_cosine is not None and not one.mean_cosine >= LEAST_COSINE:
            return f"the rows of {name} moved too far: mean cosine {one.mean_cosine:.4f}, needed {LEAST_COSINE}"
        if one.share is not None and one.share < LEAST_SAME:
            return (
                f"{one.filed - one.same} of the {one.filed} references of {name} that are filed would go elsewhere: "
                f"{one.share:.1%} alike, needed {LEAST_SAME:.0%}"
            )
    return None


def refuse_reload(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the old generation should stay, as a sentence, or None if the new one may serve.

    Classes that went away or came are not held against the new generation: what the user did is obeyed. With another
    encoder or other settings there is nothing to compare, for that was asked for.
    """
    if old.encoder_id != new.encoder_id or old.settings != new.settings:
        return None
    return _worse_accuracy(old, new) or _more_abstentions(old, new)


def shared_recalls(old: PrototypeSet, new: PrototypeSet) -> list[tuple[str, float, float]]:
    """Return (label, recall before, recall now) of the classes that both generations could judge."""
    now = dict(zip(new.labels, new.recall.tolist(), strict=True))
    then = zip(old.labels, old.recall.tolist(), strict=True)
    pairs = [(label, before, now.get(label, np.nan)) for label, before in then]
    return [pair for pair in pairs if np.isfinite(pair[1]) and np.isfinite(pair[2])]


def _worse_accuracy(old: PrototypeSet, new: PrototypeSet) -> str | None:
    shared = shared_recalls(old, new)
    if not shared:
        return None
    before, now = (float(np.mean([pair[at] for pair in shared])) for at in (1, 2))
    judged = {label for label, _, _ in shared}
    sizes = [
        sum(int(count) for label, count in zip(one.labels, one.counts, strict=True) if label in judged)
        for one in (old, new)
    ]
    error = float(np.sqrt(sum(0.25 / max(size, 1) for size in sizes)))
    if before - now <= max(MOST_LOST, STANDARD_ERRORS * error):
        return None
    worst = max(shared, key=lambda pair: pair[1] - pair[2])
    return (
        f"the new references decide {now:.0%} of their own images right, left out one by one, where the old ones"
        f" decided {before:.0%} on the same classes; {worst[0]!r} fell from {worst[1]:.0%} to {worst[2]:.0%}"
    )


def _more_abstentions(old: PrototypeSet, new: PrototypeSet) -> str | None:
    if old.calibration.filed_expected is None or new.calibration.filed_expected is None:
        return None
    before, now = 1.0 - old.calibration.filed_expected, 1.0 - new.calibration.filed_expected
    if now <= ABSTENTIONS * before or now - before <= MORE_ABSTENTIONS:
        return None
    return f"the new references would send {now:.0%} of known images to review, where the old ones sent {before:.0%}"
