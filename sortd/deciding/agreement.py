"""Agreement: do quick, rounded embeddings file a user's own references as the exact ones do?

Each reference is left out and decided by the others, once in the space of the exact rows and once in that of the quick
ones. Counted are the labels of those that the exact rows are sure enough of to file, under the settings in force: that
is where images go without anybody looking. Between two classes that are nearly equal any rounding decides, and such
images go to Review, so they count with ``abstain: off`` alone. How far the rows moved counts too: damage shows there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.deciding.held_out import Judgement, fit_wide, judge_blend, judge_plain, merge
from sortd.prototypes import DecisionSettings, Mode, SupportSet, build

IntArray = npt.NDArray[np.int64]

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


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found for one dataset, or for several together."""

    references: int  # rows that were compared
    judged: int  # references that could be left out and decided: of classes with two that differ, or by name
    filed: int  # of the judged, those that the exact rows are sure enough of to file
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
    """Compare two support sets, made by two encoders of the same references in the same order.

    Raises:
        ValueError: they are not of the same references.
    """
    if exact.sources != quick.sources or exact.labels != quick.labels:
        raise ValueError("the two support sets hold other references, so there is nothing to compare")
    cosines = (exact.embeddings.astype(np.float64) * quick.embeddings).sum(axis=1)
    before, least_confidence = _decided(exact, settings)
    now, _ = _decided(quick, replace(settings, abstain=None))
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


def pooled(parts: Mapping[str, Agreement]) -> Agreement:
    """Return what several datasets say together."""
    sums = {name: sum(getattr(part, name) for part in parts.values()) for name in Agreement.__slots__}
    return Agreement(**sums | {"lowest_cosine": min((part.lowest_cosine for part in parts.values()), default=1.0)})


def figures(parts: Mapping[str, Agreement]) -> dict[str, Any]:
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


def refuse_quick(parts: Mapping[str, Agreement]) -> str | None:
    """Return why the quick rows may not serve these datasets, as a sentence, or None where they may.

    All of them together must be enough to tell, and each by itself must agree: a small library is not outvoted.
    """
    whole = pooled(parts)
    if whole.filed < FEWEST_FILED:
        return (
            f"{whole.filed} references that are left out and filed by the others are too few to tell; "
            f"{FEWEST_FILED} are needed"
        )
    for name, part in sorted(parts.items()):
        if part.mean_cosine is not None and not part.mean_cosine >= LEAST_COSINE:
            return f"the rows of {name} moved too far: mean cosine {part.mean_cosine:.4f}, needed {LEAST_COSINE}"
        if part.share is not None and part.share < LEAST_SAME:
            return (
                f"{part.filed - part.same} of the {part.filed} references of {name} that are filed would go elsewhere: "
                f"{part.share:.1%} alike, needed {LEAST_SAME:.0%}"
            )
    return None


def _decided(support: SupportSet, settings: DecisionSettings) -> tuple[Judgement, float]:
    """Return what each reference is taken for when it is left out, and from which confidence on it would be filed."""
    if not len(support.sources):
        none = np.zeros(0, np.int64)
        nothing = np.zeros(0)
        return Judgement(none, none, none, nothing, none, none, nothing, none), 0.0
    prototypes = build(support, settings, generation=0)
    least_confidence = prototypes.calibration.confidence
    merged = merge(prototypes, support)
    mode = Mode.MEAN if settings.mode is Mode.TEXT and support.text is None else settings.mode
    if mode not in {Mode.BEST, Mode.MIXED}:
        return judge_plain(mode, prototypes, merged), least_confidence
    best, mixed = fit_wide(merged.library)
    return judge_blend(mode, prototypes, merged, best if mode is Mode.BEST else mixed), least_confidence
