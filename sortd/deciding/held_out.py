"""Held-out judgements: what every mode makes of every reference that it has not seen."""

from dataclasses import dataclass

import numpy as np

from sortd.arrays import Array, IntArray
from sortd.deciding.blend import Blend, Library, fit_blends
from sortd.deciding.confidence import balanced_weights, fit_temperature, log_softmax
from sortd.deciding.decision import judge
from sortd.deciding.duplicates import merge_duplicates, unit
from sortd.deciding.gaussian import class_means
from sortd.deciding.leaveoneout import LARGEST_TABLE, choose_held_out
from sortd.deciding.plain import Plain, first_best, plain_held_out
from sortd.deciding.support import Mode, SupportSet
from sortd.prototypes import TEMPERATURE_SPREAD, TYPICAL_TEMPERATURE, PrototypeSet

LARGEST_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Judgement:
    """What one mode takes references for; arrays are over the R references that could be left out."""

    judged: IntArray
    """(R,) references, in the order of the prototype set."""
    own: IntArray
    best: IntArray
    """(R,) the class when each is left out by itself."""
    confidence: Array
    distinct_best: IntArray
    """(S,) the class when near-duplicates are left out together, over distinct references."""
    distinct_own: IntArray
    distinct_confidence: Array
    distinct_rows: IntArray
    """(S,) one reference for each."""


@dataclass(frozen=True, eq=False)
class Merge:
    """The library without near-duplicates, and where each reference went."""

    library: Library
    group: IntArray
    """(N,): row of the library for each reference of the prototype set."""
    leaders: IntArray
    """(R,): one reference for each row."""


def merge(prototypes: PrototypeSet, support: SupportSet) -> Merge:
    """Return the merged library of a prototype set."""
    merged = merge_duplicates(unit(prototypes.references.astype(np.float64)), prototypes.classes)
    _, leaders = np.unique(merged.group, return_index=True)
    library = Library(
        rows=merged.rows,
        classes=merged.classes,
        counts=np.bincount(merged.classes, minlength=len(prototypes.labels)).astype(np.int64),
        text=None if support.text is None else support.text.astype(np.float64),
        text_mean=None if support.text_mean is None else support.text_mean.astype(np.float64),
    )
    return Merge(library, merged.group, leaders.astype(np.int64))


def judge_plain(mode: Mode, prototypes: PrototypeSet, merged: Merge) -> Judgement:
    """Return what avg, max, mean or text make of the references, exactly."""
    library = merged.library
    plain = prototypes.plain
    means = class_means(library.rows, library.classes, library.counts)
    distinct = Plain(library.rows, library.classes, library.counts, means, plain.text)
    sample = choose_held_out(plain.counts, plain.classes)
    temperature = _temperature(plain_held_out(mode, sample, plain), plain.classes[sample])
    everywhere = (
        np.flatnonzero(plain.counts[plain.classes] > 1) if mode is not Mode.TEXT else np.arange(len(plain.rows))
    )
    apart = np.flatnonzero(library.counts[library.classes] > 1)
    best, confidence = _in_blocks(mode, plain, everywhere, temperature)
    if len(library.rows) == len(plain.rows):  # no near-duplicates: the same question
        distinct_best, distinct_confidence, apart = best, confidence, everywhere
    else:
        distinct_best, distinct_confidence = _in_blocks(mode, distinct, apart, temperature)
    return Judgement(
        judged=everywhere,
        own=plain.classes[everywhere],
        best=best,
        confidence=confidence,
        distinct_best=distinct_best,
        distinct_own=library.classes[apart],
        distinct_confidence=distinct_confidence,
        distinct_rows=merged.leaders[apart],
    )


def fit_wide(library: Library) -> tuple[Blend, Blend]:
    """Return best and mixed with as many references left out as an evaluation wants."""
    return fit_blends(library, largest=LARGEST_ROWS)


def judge_blend(mode: Mode, prototypes: PrototypeSet, merged: Merge, blend: Blend) -> Judgement:
    """Return what best or mixed make of the references.

    A reference with near-duplicates in its class is judged with them in place when it is left out by itself, which is
    what the whole rule does; all others by leave-one-out.
    """
    held = blend.held
    table = np.exp(log_softmax(blend.table))
    best = first_best(blend.table) if len(held.own) else held.own
    confidence = table[np.arange(len(best)), best]
    size = np.bincount(merged.group, minlength=len(merged.library.rows))
    at_row = np.full(len(merged.library.rows), -1)
    at_row[held.chosen] = np.arange(len(held.chosen))
    position = at_row[merged.group]
    is_double = size[merged.group] > 1
    judged = np.flatnonzero((prototypes.counts[prototypes.classes] > 1) & (is_double | (position >= 0)))
    # Position -1, of what was not held out, names one more place; those references have doubles and are judged below.
    whole_best = np.append(best, 0)[position[judged]]
    whole_confidence = np.append(confidence, 0.0)[position[judged]]
    doubles = np.flatnonzero(is_double[judged])
    if len(doubles):
        seen = judge(prototypes, prototypes.references[judged[doubles]].astype(np.float64), mode)
        whole_best[doubles] = seen.best
        whole_confidence[doubles] = seen.probabilities[np.arange(len(doubles)), seen.best]
    return Judgement(
        judged=judged,
        own=prototypes.classes[judged],
        best=whole_best,
        confidence=whole_confidence,
        distinct_best=best,
        distinct_own=held.own,
        distinct_confidence=confidence,
        distinct_rows=merged.leaders[held.chosen],
    )


def _temperature(table: Array, own: IntArray) -> float:
    if not len(own) or not np.isfinite(table).any():
        return TYPICAL_TEMPERATURE
    weights = balanced_weights(own, table.shape[1])
    factor, _ = fit_temperature(table, own, weights, typical=TYPICAL_TEMPERATURE, spread=TEMPERATURE_SPREAD)
    return factor


def _in_blocks(mode: Mode, plain: Plain, chosen: IntArray, temperature: float) -> tuple[IntArray, Array]:
    best, confidence = np.zeros(len(chosen), np.int64), np.zeros(len(chosen))
    size = max(1, LARGEST_TABLE // max(len(plain.counts), 1))
    for start in range(0, len(chosen), size):
        part = slice(start, start + size)
        table = plain_held_out(mode, chosen[part], plain)
        best[part] = first_best(table)
        confidence[part] = np.exp(log_softmax(temperature * table))[np.arange(len(table)), best[part]]
    return best, confidence
