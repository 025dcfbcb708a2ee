"""The photos of a dataset for training: which image has which label, who says so, and what was left out.

An image counts whole where a person placed it: in ``Clases/``, or in ``Dataset/`` other than where sortd filed it. What
sortd filed into ``Dataset/`` and nobody moved counts half, and never judges a model, which would be asked whether it
agrees with the prototypes.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sortd import mends
from sortd.commands.journals import JOURNAL_FILE
from sortd.daemon.embedder import Embedder
from sortd.errors import DataError
from sortd.events import EmbeddedImage, FloatArray, ImageRefused, Outcome, Refusal, Stamp
from sortd.journaling.history import History
from sortd.layout import Area, Layout
from sortd.references import STRANGERS_FOLDER, ReferencesAbsentError, class_folders

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

PLACED, FILED = 1.0, 0.5
"""How much an image counts that a person placed, and one that sortd filed and nobody took away again."""


class Source(StrEnum):
    """Which folders of a dataset are learnt from."""

    CLASES = "clases"
    DATASET = "dataset"
    BOTH = "both"

    @property
    def areas(self) -> tuple[Area, ...]:
        """The folders; what comes first says whose an image is that lies in both."""
        return {
            Source.CLASES: (Area.CLASES,),
            Source.DATASET: (Area.DATASET,),
            Source.BOTH: (Area.CLASES, Area.DATASET),
        }[self]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One file that may be an image of a class."""

    path: str
    stamp: Stamp
    label: str
    is_placed: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not trained on, and why."""

    path: str
    why: str


@dataclass(frozen=True, eq=False)
class Photos:
    """The images of a dataset, each content once; N images, C classes."""

    labels: tuple[str, ...]
    files: tuple[tuple[str, Stamp], ...]
    """N paths with the versions that were looked at."""
    contents: tuple[str, ...]
    """N hexadecimal sha256 of the bytes."""
    classes: IntArray
    """int64 (N,)."""
    weights: Array
    """float64 (N,): ``PLACED`` or ``FILED``."""
    embeddings: FloatArray
    """float32 (N, d): what the encoder of the prototypes makes of them."""
    strangers: FloatArray
    """float32 (S, d): embeddings of what belongs to no class."""
    stranger_files: tuple[tuple[str, Stamp], ...]
    left_out: tuple[LeftOut, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class."""
        held = np.bincount(self.classes, minlength=len(self.labels))
        return {label: int(number) for label, number in zip(self.labels, held, strict=True)}


def find_candidates(layout: Layout, source: Source, state: Path) -> tuple[list[Candidate], list[Candidate]]:
    """List the images of a dataset's classes, and those of ``Clases/_none``.

    Args:
        layout: the dataset.
        source: which of its folders count.
        state: the state directory, where its journal is.

    Raises:
        DataError: a folder cannot be read.
        JournalError: the journal cannot be read.
    """
    found: list[Candidate] = []
    for area in source.areas:
        folder = layout.area(area)
        unreadable: list[OSError] = []
        try:
            folders, _ = class_folders(folder, report=unreadable.append)
        except ReferencesAbsentError as error:
            raise DataError(f"{error}; choose other folders with --from, or mend it") from error
        if unreadable:
            raise DataError(mends.unreadable(unreadable[0]))
        files = [(path, stamp, one.label) for one in folders for path, stamp in one.files]
        placed = _placed(layout, files, state) if area is Area.DATASET else [True] * len(files)
        found += [Candidate(*file, is_placed) for file, is_placed in zip(files, placed, strict=True)]
    known = [one for one in found if one.label != STRANGERS_FOLDER]
    return known, [one for one in found if one.label == STRANGERS_FOLDER]


def _placed(layout: Layout, files: Sequence[tuple[str, Stamp, str]], state: Path) -> list[bool]:
    """Tell for files in ``Dataset/`` whether a person put them where they lie: the journal knows what sortd did."""
    journal = layout.state_folder(state) / JOURNAL_FILE
    if not journal.is_file():
        return [True] * len(files)
    with History.open(journal) as history:
        records = [history.last_known(stamp) for _, stamp, _ in files]
    return [
        record is None
        or record.grounds.outcome != Outcome.FILED.value
        or os.path.join(layout.root, record.destination_path) != path
        for (path, _, _), record in zip(files, records, strict=True)
    ]


def gather(candidates: Sequence[Candidate], strangers: Sequence[Candidate], embedder: Embedder) -> Photos:
    """Read every candidate once, and put together what can be trained on.

    Raises:
        DataError: fewer than two classes have an image.
    """
    files = {(one.path, one.stamp) for one in (*candidates, *strangers)}
    answers = {(one.path, one.stamp): one for one in embedder.embed(sorted(files, key=lambda file: file[0]))}
    kept, left_out = _once_each(candidates, answers)
    labels = tuple(sorted({one.label for one, _ in kept}))
    _see_that_there_is_a_choice(labels, len(candidates), left_out)
    odd = {image.content: image for image in _images(strangers, answers)}
    none = np.zeros((0, embedder.encoder.dimensions), np.float32)
    return Photos(
        labels=labels,
        files=tuple((one.path, one.stamp) for one, _ in kept),
        contents=tuple(image.content for _, image in kept),
        classes=np.array([labels.index(one.label) for one, _ in kept], np.int64),
        weights=np.array([PLACED if one.is_placed else FILED for one, _ in kept]),
        embeddings=np.stack([image.embedding for _, image in kept]),
        strangers=np.stack([image.embedding for image in odd.values()]) if odd else none,
        stranger_files=tuple((image.path, image.stamp) for image in odd.values()),
        left_out=tuple(left_out),
    )


def _images(
    candidates: Iterable[Candidate], answers: Mapping[tuple[str, Stamp], EmbeddedImage | ImageRefused]
) -> list[EmbeddedImage]:
    found = (answers[one.path, one.stamp] for one in candidates)
    return [answer for answer in found if isinstance(answer, EmbeddedImage)]


def _once_each(
    candidates: Sequence[Candidate], answers: Mapping[tuple[str, Stamp], EmbeddedImage | ImageRefused]
) -> tuple[list[tuple[Candidate, EmbeddedImage]], list[LeftOut]]:
    """Keep each content once; one that lies in two classes teaches neither."""
    left_out: list[LeftOut] = []
    by_content: defaultdict[str, list[tuple[Candidate, EmbeddedImage]]] = defaultdict(list)
    for one in candidates:
        answer = answers[one.path, one.stamp]
        if isinstance(answer, EmbeddedImage):
            by_content[answer.content].append((one, answer))
        elif answer.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.VANISHED}:
            left_out.append(LeftOut(one.path, answer.message))
    kept = []
    for same in by_content.values():
        placed = [pair for pair in same if pair[0].is_placed] or same
        if len({one.label for one, _ in placed}) == 1:
            kept.append(placed[0])
            continue
        for one, _ in placed:
            others = sorted({other.label for other, _ in placed} - {one.label})
            left_out.append(LeftOut(one.path, f"the same image is in {', '.join(others)} too"))
    return sorted(kept, key=lambda pair: (pair[0].label, pair[0].path)), left_out


def _see_that_there_is_a_choice(labels: Sequence[str], files: int, left_out: Sequence[LeftOut]) -> None:
    if len(labels) >= 2:  # noqa: PLR2004 - a choice
        return
    skipped = (
        f" ({len(left_out)} were left out, the first is {left_out[0].path}: {left_out[0].why})" if left_out else ""
    )
    if not labels:
        state = f"none of the {files} files is an image that can be read{skipped}" if files else "there is no image"
        raise DataError(f"{state}; put images into the class folders, Clases/<class>/, of two classes or more")
    raise DataError(
        f"only the class {labels[0]!r} has images{skipped}; a classifier needs two classes: fill a second folder"
    )
