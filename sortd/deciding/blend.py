"""The rules ``best`` and ``mixed``: a Gaussian and a kernel over the references, weighed by leave-one-out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, IntArray
from sortd.deciding.confidence import balanced_weights, temperature_steps
from sortd.deciding.gaussian import (
    Gaussian,
    Space,
    class_means,
    fit_space,
    gaussian_steps,
    shrink_means,
    squared_distances,
)
from sortd.deciding.kernel import Kernel, kernel_scores, make_kernel
from sortd.deciding.leaveoneout import (
    LARGEST_ROWS,
    HeldOut,
    choose_held_out,
    gaussian_table,
    hold_out,
    kernel_table_steps,
)
from sortd.deciding.refitting import REFIT_UP_TO, Refitted, refit_steps
from sortd.deciding.steps import Steps, finish, parts
from sortd.deciding.text_prototypes import Names, place_names

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How much the kernel may weigh against the Gaussian: little, unless leave-one-out says more by a standard error.
Leave-one-out flatters the kernel, since references resemble each other more than what arrives resembles them."""
TEXT_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""How many references a name may count as (kT), besides none."""
UNTRIED_WEIGHT = 4.0
"""The same where no class has two images to try it on: the names were brought to the images by a slope that is small
where they know little, so that even poor names may count for much."""
TYPICAL_DIMENSIONS = 23.0
"""The Gaussian's scores, times this over the dimensions, are log probabilities before any reference says better: on the
four public sets the likeliest factor lay within 0.6 and 2 times this, from 1 to 16 references and 5 to 101 classes."""
TEMPERATURE_SPREAD = 0.5
LEAST_EVIDENCE = 2.0
"""Standard errors by which names must agree with their own images before they have a say."""


@dataclass(frozen=True, eq=False)
class Library:
    """References without near-duplicates, with the names where an encoder knows them; rows are float64."""

    rows: Array
    classes: IntArray
    counts: IntArray
    text: Array | None = None
    text_mean: Array | None = None


@dataclass(frozen=True, eq=False)
class Blend:
    """The fitted rule, and its leave-one-out table."""

    space: Space
    gaussian: Gaussian
    kernel: Kernel
    names: Names | None
    text_weight: float
    shrunk: Array
    """(C, d) whitened means."""
    share: float
    """The kernel's weight against the Gaussian's."""
    gaussian_weight: float
    kernel_weight: float
    competes: npt.NDArray[np.bool_]
    """(C,): classes that can be chosen."""
    held: HeldOut
    table: Array
    """(R, C): leave-one-out logits of the held-out references."""
    distances: Array
    """(R,): leave-one-out squared distance of each to its best class."""
    refitted: Refitted | None
    """What leave-one-out by brute force found, where it was that."""

    def logits(self, whitened: Array) -> Array:
        """Return (B, C) log probabilities up to a constant for whitened rows (B, d); -inf for absent classes."""
        result = -0.5 * self.gaussian_weight * squared_distances(whitened, self.shrunk)
        if self.kernel_weight:
            result += self.kernel_weight * kernel_scores(whitened, self.kernel)
        result[:, ~self.competes] = -np.inf
        return np.asarray(result, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Leave-one-out under one weight of the names."""

    text_weight: float
    share: float
    gaussian_weight: float
    kernel_weight: float
    table: Array
    distances: Array
    losses: Array
    """(R,): weighted log losses."""
    right: Array
    """(R,): weighted ones where the class was right."""


class _Fitter:
    """One library's fit, with the tables for any weight of the names."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.names: Names | None = None
        self.named: Array | None = None
        self.refitted: Refitted | None = None

    def fit(self, largest: int) -> Steps[None]:
        """Take the steps to all that does not depend on the weight of the names."""
        library = self.library
        rows, classes, counts = library.rows, library.classes, library.counts
        self.present = counts > 0
        self.space = fit_space(rows, classes, counts)
        yield
        placed = self.space.place(rows)
        yield
        self.gaussian = yield from gaussian_steps(placed, classes, counts)
        if library.text is not None:
            means = class_means(placed, classes, counts)
            self.names = place_names(self.space, library.text, library.text_mean, means, counts)
            self.named = self.names.rows @ self.gaussian.whitener
            yield
        self.held = hold_out(self.gaussian, choose_held_out(counts, classes, largest=largest))
        self.row_weights = balanced_weights(self.held.own, len(counts))
        yield
        if len(rows) <= REFIT_UP_TO:
            text = None if library.text is None else (library.text, library.text_mean)
            weights = (0.0,) if text is None else (0.0, *TEXT_WEIGHTS)
            self.refitted = yield from refit_steps(rows, classes, counts, self.held.chosen, text, weights)
            self.kernel_table = self.refitted.kernel
        else:
            self.kernel_table = yield from kernel_table_steps(self.gaussian, self.held, make_kernel(self.gaussian))
        self.kernel_gaps = yield from self._gaps(self.kernel_table)

    @property
    def parts(self) -> Iterator[slice]:
        """The rows of the tables, some at a time."""
        return parts(len(self.held.own), len(self.present))

    def _gaps(self, table: Array) -> Steps[Array]:
        """Take the steps to how far the best score of each row lies above the middle one (R,)."""
        gaps = np.empty(len(table))
        for part in self.parts:
            scores = table[part][:, self.present]
            if scores.size:
                gaps[part] = scores.max(axis=1) - np.median(scores, axis=1)
            yield
        return gaps

    def _table(self, weight: float) -> Steps[Array]:
        """Take the steps to the Gaussian's scores (R, C): by refitting where that was cheap, else by algebra."""
        table = np.empty((len(self.held.own), len(self.present)))
        named = self.named if weight else None
        shrunk = shrink_means(self.gaussian, named, weight)
        for part in self.parts:
            if self.refitted is not None:
                table[part] = self.refitted.gaussian[weight][part]
            else:
                table[part] = gaussian_table(self.gaussian, self.held, shrunk, named, weight, part)
            yield
        return table

    def try_weight(self, weight: float) -> Steps[_Trial]:
        """Take the steps to leave-one-out with this weight of the names."""
        own, weights = self.held.own, self.row_weights
        table = yield from self._table(weight)
        gaps = yield from self._gaps(table)
        scale = _scale(gaps) / _scale(self.kernel_gaps)
        chosen = np.empty((len(SHARES), len(own)), np.int64)
        for part in self.parts:
            kernel = scale * self.kernel_table[part]
            for at, share in enumerate(SHARES):
                chosen[at, part] = np.where(self.present, table[part] + share * kernel, -np.inf).argmax(axis=1)
            yield
        share = _choose_share(chosen == own, weights)
        best, distances = np.empty(len(own), np.int64), np.empty(len(own))
        for part in self.parts:
            blended = np.where(self.present, table[part] + share * scale * self.kernel_table[part], -np.inf)
            best[part] = blended.argmax(axis=1)
            distances[part] = -2.0 * table[part][np.arange(len(blended)), best[part]]
            table[part] = blended
            yield
        typical = TYPICAL_DIMENSIONS / self.gaussian.ambient / (1.0 + share)
        factor, losses = yield from temperature_steps(table, own, weights, typical=typical, spread=TEMPERATURE_SPREAD)
        table *= factor
        yield
        return _Trial(
            text_weight=weight,
            share=share,
            gaussian_weight=factor,
            kernel_weight=factor * share * scale,
            table=table,
            distances=distances,
            losses=losses * weights,
            right=weights * (best == own),
        )


def fit_blends(library: Library, *, largest: int = LARGEST_ROWS) -> tuple[Blend, Blend]:
    """Return the rules ``best`` and ``mixed`` of a library of at least one reference; without names they are one.

    At most ``largest`` references are left out, evenly from all classes.
    """
    return finish(blend_steps(library, largest=largest))


def blend_steps(library: Library, *, largest: int = LARGEST_ROWS) -> Steps[tuple[Blend, Blend]]:
    """Take the steps to ``fit_blends``."""
    fitter = _Fitter(library)
    yield from fitter.fit(largest)
    present = fitter.present
    has_voice = fitter.names is not None and fitter.names.evidence >= LEAST_EVIDENCE
    if not len(fitter.held.own) or present.sum() < 2:  # noqa: PLR2004 - nothing to choose between
        trial = _untried(fitter, 0.0)
        best = _assemble(fitter, present, trial)
        return best, _assemble(fitter, present | True, _untried(fitter, UNTRIED_WEIGHT)) if has_voice else best
    alone = yield from fitter.try_weight(0.0)
    best = _assemble(fitter, present, alone)
    yield
    if not has_voice:
        return best, best
    chosen = alone
    for weight in TEXT_WEIGHTS:
        trial = yield from fitter.try_weight(weight)
        if _is_better(alone, trial) and float(trial.losses.sum()) < float(chosen.losses.sum()):
            chosen = trial
    return best, _assemble(fitter, present | True, chosen)


def _untried(fitter: _Fitter, weight: float) -> _Trial:
    """Return what is assumed where nothing can be left out."""
    rows = len(fitter.held.own)
    return _Trial(
        text_weight=weight,
        share=0.0,
        gaussian_weight=TYPICAL_DIMENSIONS / fitter.gaussian.ambient,
        kernel_weight=0.0,
        table=np.where(fitter.gaussian.counts > 0, np.zeros((rows, 1)), -np.inf),
        distances=np.zeros(rows),
        losses=np.zeros(rows),
        right=np.zeros(rows),
    )


def _assemble(fitter: _Fitter, competes: npt.NDArray[np.bool_], trial: _Trial) -> Blend:
    voices = fitter.named if competes.all() else None
    shrunk = shrink_means(fitter.gaussian, voices, trial.text_weight)
    if voices is not None:
        silent = fitter.gaussian.counts == 0
        shrunk[silent] = voices[silent]
    return Blend(
        space=fitter.space,
        gaussian=fitter.gaussian,
        kernel=make_kernel(fitter.gaussian, voices),
        names=fitter.names,
        text_weight=trial.text_weight,
        shrunk=shrunk,
        share=trial.share,
        gaussian_weight=trial.gaussian_weight,
        kernel_weight=trial.kernel_weight,
        competes=competes,
        held=fitter.held,
        table=trial.table,
        distances=trial.distances,
        refitted=fitter.refitted,
    )


def _choose_share(right: npt.NDArray[np.bool_], weights: Array) -> float:
    """Return the smallest share whose accuracy is within a standard error of the best share's; ``right`` is (S, R)."""
    rights = [weights * row for row in right]
    best = max(rights, key=np.sum)
    for share, right_ones in zip(SHARES, rights, strict=True):
        lost = best - right_ones
        if float(lost.mean()) <= float(lost.std()) / np.sqrt(len(lost)):
            return share
    return SHARES[-1]


def _scale(gaps: Array) -> float:
    return max(float(np.median(gaps)), 1e-9)


def _is_better(alone: _Trial, trial: _Trial) -> bool:
    """Return whether names lower the log loss by more than chance, and the accuracy not at all."""
    gains = alone.losses - trial.losses
    error = float(gains.std()) / np.sqrt(len(gains))
    return float(gains.mean()) > error and float(trial.right.sum()) >= float(alone.right.sum())
