"""Learnt images: those in Dataset/ that are references where they lie, because a person gave them their class.

A person assigns images to a class by request, or to no class as examples of it, moves filed ones to another class
(corrections), and moves those in Review/ to the class of their best guess (confirmations). The last two count with
``learn_from_corrections``.
"""

import os
from collections import Counter
from dataclasses import dataclass

from sortd.events import NO_CLASS
from sortd.layout import Area, Layout
from sortd.store.history import History

ASSIGNED, CORRECTED, CONFIRMED = "assigned", "corrected", "confirmed"


@dataclass(frozen=True, slots=True)
class LearntImage:
    """An image that a person gave a class."""

    label: str
    path: str
    how: str  # ASSIGNED, CORRECTED or CONFIRMED


def learnt_images(layout: Layout, history: History, *, with_corrections: bool) -> list[LearntImage]:
    """Return the images whose classes a person gave: assigned ones, and maybe corrected and confirmed ones.

    Those that were removed since are among them, unless sortd has filed another image where they were.
    """
    given = history.corrections() if with_corrections else []
    found: dict[str, tuple[str | None, float, str]] = {
        path: (corrected, at, CONFIRMED if corrected == label else CORRECTED) for label, corrected, path, at in given
    }
    found |= {path: (label, at, ASSIGNED) for label, path, at in history.assigned()}  # each may be a correction as well
    filed_at = history.filed_at(list(found))
    return [
        LearntImage(label, os.path.join(layout.root, path), how)
        for path, (label, at, how) in found.items()
        if label is not None and filed_at.get(path, 0.0) <= at
    ]


def is_reference(layout: Layout, label: str, path: str) -> bool:
    """Return whether an image of this class is a reference: it exists, and so does the folder of the class, if any."""
    return os.path.lexists(path) and (label == NO_CLASS or os.path.isdir(layout.area(Area.CLASES) / label))


def labelled_images(layout: Layout, history: History, *, with_corrections: bool) -> tuple[tuple[str, str], ...]:
    """Return class and path of each of the ``learnt_images``."""
    return tuple((one.label, one.path) for one in learnt_images(layout, history, with_corrections=with_corrections))


def learnt_counts(layout: Layout, history: History, *, with_corrections: bool) -> dict[str, dict[str, int]]:
    """Return how many of the ``learnt_images`` are references of each class, by how it was given."""
    images = learnt_images(layout, history, with_corrections=with_corrections)
    there = [one for one in images if is_reference(layout, one.label, one.path)]
    counts = Counter((one.label, one.how) for one in there)
    labels = sorted({one.label for one in there})
    return {label: {how: counts[label, how] for how in (CORRECTED, CONFIRMED, ASSIGNED)} for label in labels}
