"""Held-out decisions: the decisions of a mode on references that are left out, and comparisons of two such sets.

``agreement`` compares the embeddings of two encoders, ``refuse_reload`` a new generation with the old one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.classify.blend import Blend
from sortd.classify.build import build_with_blends, plain_temperature
from sortd.classify.calibration import top_classes
from sortd.classify.decide import score_batch
from sortd.classify.kernel import Plain, plain_held_out
from sortd.classify.leave_one_out import LARGEST_TABLE, choose_held_out
from sortd.classify.library import Library, class_means, parts
from sortd.classify.proportions import estimated
from sortd.classify.prototypes import PrototypeSet
from sortd.classify.types import BLENDED, DecisionSettings, SupportSet
from sortd.events import Mode

LARGEST_ROWS = 20_000
LEAST_SAME = 0.99
"""Least share of the filed references with the same label. MLPerf requires 99 % of the exact model's accuracy from a
quantized model (Reddi et al., 2020); equal labels are stricter, since errors do not cancel."""
LEAST_COSINE = 0.99
"""Least mean cosine between the two embeddings of an image. On CLIP features of four public datasets, noise with a mean
cosine of 0.99 changed no filed reference and at most 1.4 % of all decisions; 0.98 changed 3 % (docs/backends.md)."""
FEWEST_FILED = 30
"""Least number of filed references for a verdict. If none of n differs, fewer than 3 / n of all do with 95 % confidence
(Hanley & Lippman-Hand, JAMA, 1983)."""
FILED_TO_SETTLE = 300
"""Number of filed references, none of them with another label, after which the others need not be compared: by the
same rule, fewer than 1 - LEAST_SAME of all have another label."""
MOST_LOST = 0.10
"""Loss of leave-one-out accuracy, on the common classes, that a rebuild may cause."""
STANDARD_ERRORS = 2.0
"""A larger loss is accepted if it is below this many standard errors."""
ABSTENTIONS = 2.0
MORE_ABSTENTIONS = 0.10
"""A rebuild is refused if it abstains ABSTENTIONS times as often as before, and by more than this share of images and
STANDARD_ERRORS. Shares of other classes cannot be compared: those of a class with its first two images are new."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Decisions of one mode on R references that are left out."""

    rows: IntArray  # (R,): indices of the prototype set
    own: IntArray  # (R,)
    best: IntArray  # (R,)
    confidence: Array  # (R,)


@dataclass(frozen=True, eq=False)
class LeaveOneOutResult:
    """Decisions on references left out alone, and on one of each group left out together with its near-duplicates."""

    alone: LeftOut
    distinct: LeftOut


def leave_out_plain(mode: Mode, prototypes: PrototypeSet, library: Library) -> LeaveOneOutResult:
    """Return the exact leave-one-out decisions of a plain mode."""
    plain = prototypes.plain
    sample = choose_held_out(plain.counts, plain.classes)
    temperature = plain_temperature(plain_held_out(mode, sample, plain), plain.classes[sample])
    judged = np.arange(len(plain.rows)) if mode is Mode.TEXT else np.flatnonzero(plain.counts[plain.classes] > 1)
    alone = LeftOut(judged, plain.classes[judged], *_plain_decisions(mode, plain, judged, temperature))
    if len(library.rows) == len(plain.rows):  # there are no near-duplicates
        return LeaveOneOutResult(alone, alone)
    apart = np.flatnonzero(library.counts[library.classes] > 1)
    means = class_means(library.rows, library.classes, library.counts)
    merged = Plain(library.rows, library.classes, library.counts, means, plain.text)
    decisions = _plain_decisions(mode, merged, apart, temperature)
    return LeaveOneOutResult(alone, LeftOut(library.leaders[apart], library.classes[apart], *decisions))


def _plain_decisions(mode: Mode, plain: Plain, chosen: IntArray, temperature: float) -> tuple[IntArray, Array]:
    best, confidence = np.zeros(len(chosen), np.int64), np.zeros(len(chosen))
    for part in parts(len(chosen), len(plain.counts), LARGEST_TABLE):
        best[part], confidence[part] = top_classes(plain_held_out(mode, chosen[part], plain), temperature)
    return best, confidence


def leave_out_blend(mode: Mode, prototypes: PrototypeSet, library: Library, blend: Blend) -> LeaveOneOutResult:
    """Return the leave-one-out decisions of ``best`` or ``mixed``.

    A reference with near-duplicates that is left out alone is decided by the whole rule, since its duplicates remain.
    """
    held = blend.fit.held
    best, confidence = top_classes(blend.held_out_logits(), 1.0) if len(held.own) else (held.own, np.zeros(0))
    size = np.bincount(library.group, minlength=len(library.rows))
    at_row = np.full(len(library.rows), -1)
    at_row[held.chosen] = np.arange(len(held.chosen))
    position = at_row[library.group]
    is_double = size[library.group] > 1
    judged = np.flatnonzero((prototypes.counts[prototypes.classes] > 1) & (is_double | (position >= 0)))
    # Position -1 (not held out) reads the appended value; those references have duplicates and are decided below.
    whole_best = np.append(best, 0)[position[judged]]
    whole_confidence = np.append(confidence, 0.0)[position[judged]]
    doubles = np.flatnonzero(is_double[judged])
    if len(doubles):
        seen = score_batch(prototypes, prototypes.references[judged[doubles]].astype(np.float64), mode)
        whole_best[doubles], whole_confidence[doubles] = seen.best, seen.confidence
    alone = LeftOut(judged, prototypes.classes[judged], whole_best, whole_confidence)
    return LeaveOneOutResult(alone, LeftOut(library.leaders[held.chosen], held.own, best, confidence))


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of an exact and a quick encoder on one or several datasets."""

    references: int
    judged: int  # references that could be left out
    filed: int  # judged references that the exact embeddings file
    same: int  # filed references with the same label under both
    right_exact: int  # judged references that the exact embeddings decide correctly
    right_quick: int
    cosines: float  # sum of the cosines between the two embeddings of each reference
    lowest_cosine: float  # 1 without references

    @property
    def share(self) -> float | None:
        """Share of the filed references with the same label; None without any."""
        return self.same / self.filed if self.filed else None

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine between the two embeddings of a reference; None without any."""
        return self.cosines / self.references if self.references else None


def agreement(exact: SupportSet, quick: SupportSet, settings: DecisionSettings) -> Agreement:
    """Return the agreement of two support sets of the same references by two encoders.

    Each reference is left out and decided by the others. Labels are compared only for references that the exact
    embeddings file, since any rounding may change the label of the others.

    Raises:
        ValueError: the references differ.
    """
    if exact.sources != quick.sources or exact.labels != quick.labels:
        raise ValueError("the two support sets have different references")
    if not len(exact.sources):
        return pooled({})
    cosines = (exact.embeddings.astype(np.float64) * quick.embeddings).sum(axis=1)
    before, least_confidence = _judged(exact, settings)
    now, _ = _judged(quick, replace(settings, abstain=None))
    shared, left, right = np.intersect1d(before.rows, now.rows, return_indices=True)
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


def _judged(support: SupportSet, settings: DecisionSettings) -> tuple[LeftOut, float]:
    """Return the leave-one-out decisions of a support set, and the least confidence of those that are compared.

    That is the precision wanted where the references support none, since a verdict is needed there too.
    """
    prototypes, library, blends = build_with_blends(support, settings, generation=0)
    mode = Mode.MEAN if settings.mode is Mode.TEXT and support.text is None else settings.mode
    if mode in BLENDED and blends is not None:
        found = leave_out_blend(mode, prototypes, library, blends[0] if mode is Mode.BEST else blends[1])
    else:
        found = leave_out_plain(mode, prototypes, library)
    least = prototypes.calibration.confidence
    return found.alone, least if settings.abstain is None else min(least, settings.abstain.precision)


def pooled(compared: Mapping[str, Agreement]) -> Agreement:
    """Return the agreement on several datasets together."""
    added = ("references", "judged", "filed", "same", "right_exact", "right_quick", "cosines")
    sums = {name: sum(getattr(one, name) for one in compared.values()) for name in added}
    return Agreement(**sums, lowest_cosine=min((one.lowest_cosine for one in compared.values()), default=1.0))


def agreement_figures(parts: Mapping[str, Agreement]) -> dict[str, Any]:
    """Return the agreement on all datasets together and on each one, as plain values."""
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
    """Return why the quick encoder must not be used for these datasets, or None; each dataset must agree."""
    filed = pooled(compared).filed
    if filed < FEWEST_FILED:
        return f"only {filed} left-out references are filed; {FEWEST_FILED} are needed for a comparison"
    for name, one in sorted(compared.items()):
        if one.mean_cosine is not None and not one.mean_cosine >= LEAST_COSINE:
            return f"the embeddings of {name} differ: mean cosine {one.mean_cosine:.4f}, needed {LEAST_COSINE}"
        if one.share is not None and one.share < LEAST_SAME:
            different = f"{one.filed - one.same} of the {one.filed} filed references of {name}"
            return f"{different} get another label: {one.share:.1%} equal, needed {LEAST_SAME:.0%}"
    return None


def is_settled(compared: Mapping[str, Agreement], *, largest: int) -> bool:
    """Return whether a sample of the references decides as all of them, at most ``largest``, would.

    The quick encoder is used if none of FILED_TO_SETTLE filed references gets another label, and refused if more do
    than may in the largest comparison, or if the rows differ. Otherwise more references are needed.
    """
    everything = pooled(compared)
    different = max((one.filed - one.same for one in compared.values()), default=0)
    if different == 0 and refuse_quick(compared) is None:
        return everything.filed >= FILED_TO_SETTLE
    means = [one.mean_cosine for one in compared.values() if one.mean_cosine is not None]
    return different > (1 - LEAST_SAME) * largest or not all(mean >= LEAST_COSINE for mean in means)


def refuse_reload(old: PrototypeSet, new: PrototypeSet) -> str | None:
    """Return why the new generation must not replace the old one, or None.

    Only common classes are compared; after a change of encoder or settings nothing is.
    """
    if old.encoder_id != new.encoder_id or old.settings != new.settings:
        return None
    follows_others = old.calibration.checked != new.calibration.checked  # its threshold follows other checked images
    return _worse_accuracy(old, new) or (None if follows_others else _more_abstentions(old, new))


def shared_recalls(old: PrototypeSet, new: PrototypeSet) -> list[tuple[str, float, float]]:
    """Return (label, old recall, new recall) of the classes whose recall is known in both generations."""
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
        f"leave-one-out accuracy on the common classes falls from {estimated(before, sizes[0], 'references')} to"
        f" {estimated(now, sizes[1], 'references')}; recall of {worst[0]!r} falls from {worst[1]:.0%} to {worst[2]:.0%}"
    )


def _more_abstentions(old: PrototypeSet, new: PrototypeSet) -> str | None:
    if old.calibration.filed_expected is None or new.calibration.filed_expected is None:
        return None
    judged = [
        {label for label, known in zip(one.labels, np.isfinite(one.recall), strict=True) if known} for one in (old, new)
    ]
    if not judged[1] <= judged[0]:
        return None
    before, now = 1.0 - old.calibration.filed_expected, 1.0 - new.calibration.filed_expected
    error = float(np.sqrt(sum(0.25 / max(one.calibration.held_out, 1) for one in (old, new))))
    if now <= ABSTENTIONS * before or now - before <= max(MORE_ABSTENTIONS, STANDARD_ERRORS * error):
        return None
    then, later = (estimated(share, one.calibration.held_out) for share, one in ((before, old), (now, new)))
    return f"the share of known images sent to review rises from {then} to {later}"
