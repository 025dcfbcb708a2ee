"""Agreement: do quick, rounded embeddings file a user's own references as the exact ones do?

Each reference is left out and decided by the others, once in the space of the exact rows and once in that of the quick
ones; the two are never mixed. What counts is the label of those that the exact rows are sure enough of to file, under
the settings in force: that is where images go without anybody looking. What would go to Review is a toss between two
classes that any rounding turns over, and counts only where nothing ever goes to Review (``abstain: off``). How far the
rows themselves moved counts too, for it tells of damage before labels do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sortd.deciding.held_out import Judgement, fit_wide, judge_blend, judge_plain, merge
from sortd.prototypes import DecisionSettings, Mode, SupportSet, build

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

    references: int
    """Rows that were compared."""
    judged: int
    """References that could be left out and decided: those of classes with two that differ, or all of them by name."""
    filed: int
    """Of these, the ones that the exact rows are sure enough of to file."""
    same: int
    """Of the filed, those to which the quick rows give the same label."""
    right_exact: int
    """Of the judged, those that the exact rows decide right."""
    right_quick: int
    """Of the judged, those that the quick rows decide right."""
    cosines: float
    """Sum of the cosines between the two rows of each reference."""
    lowest_cosine: float
    """The least of them; 1 where there is none."""

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

    Args:
        exact: the rows to be held to.
        quick: the rows that want to serve, of the same images in the same order.
        settings: how the dataset decides, and when it abstains.

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
    return Agreement(
        references=sum(part.references for part in parts.values()),
        judged=sum(part.judged for part in parts.values()),
        filed=sum(part.filed for part in parts.values()),
        same=sum(part.same for part in parts.values()),
        right_exact=sum(part.right_exact for part in parts.values()),
        right_quick=sum(part.right_quick for part in parts.values()),
        cosines=sum(part.cosines for part in parts.values()),
        lowest_cosine=min((part.lowest_cosine for part in parts.values()), default=1.0),
    )


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
