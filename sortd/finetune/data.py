"""The data of a fine-tuning: labelled images, their split, and the plan in the work folder.

Images in ``Clases/``, and images in ``Dataset/`` that a person placed, have weight 1. Images that sortd filed have
weight 0.5 and are not used for evaluation, which would measure the agreement with the prototypes.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sortd import errors
from sortd.arrays import Array, BoolArray, FloatArray, IntArray, Pixels
from sortd.classify.library import ROUNDING, duplicate_distance
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import STRANGERS_FOLDER, ReferencesAbsentError, class_folders
from sortd.errors import DataError, DestinationError
from sortd.events import EmbeddedImage, ImageRefused, Outcome, Preprocessing, Refusal, Stamp
from sortd.files import write_json
from sortd.finetune.recipe import LabelledImage, Recipe, Source
from sortd.layout import JOURNAL_FILE, Area, Layout
from sortd.store.history import History
from sortd.watch.scan import stamp

PLACED, FILED = 1.0, 0.5
"""Weights of images placed by a person and of images filed by sortd."""
LARGEST_SHARE = 0.25
"""A group of near-duplicates with more than this share of a class is divided by half the distance, repeatedly: such a
class is not a burst of one scene, but all its images are similar to the encoder."""
ROWS_AT_ONCE = 1024
PARTS = ("train", "validation", "test")
"""Validation images choose the checkpoint, the averaging and the temperature; nothing is chosen by test images."""
PLAN_FILE, ARRAYS_FILE, START_FILE = "plan.json", "plan.npz", "start.safetensors"

ImageFile = tuple[str, Stamp]
Features = npt.NDArray[np.float16]
"""(N, ...): inputs of the first trained block of a network."""
Split = Mapping[str, IntArray]
"""Disjoint sets of image indices, int64 and ascending, of each of ``PARTS``."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be an image of a class."""

    path: str
    stamp: Stamp
    label: str
    is_placed: bool = True  # whether a person placed it


@dataclass(frozen=True, eq=False)
class Photos:
    """The N images of a dataset's C classes, each content once."""

    labels: tuple[str, ...]
    files: tuple[ImageFile, ...]
    classes: IntArray  # int64 (N,)
    weights: Array  # float64 (N,): ``PLACED`` or ``FILED``
    embeddings: FloatArray  # float32 (N, d), by the encoder of the prototypes
    strangers: FloatArray  # float32 (S, d): embeddings of images of no class
    stranger_files: tuple[ImageFile, ...]
    left_out: tuple[Mapping[str, str], ...]  # ``path`` and ``why`` of files that are not trained on

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each class."""
        held = np.bincount(self.classes, minlength=len(self.labels))
        return dict(zip(self.labels, held.tolist(), strict=True))


def find_candidates(layout: Layout, source: Source, state: Path) -> tuple[list[Candidate], list[Candidate]]:
    """Return the files of the classes, and those of no class (``_none``); ``state`` is the state directory.

    Raises:
        DataError: a folder cannot be read.
        JournalError: the journal cannot be read.
    """
    found: list[Candidate] = []
    for area in source.areas:
        unreadable: list[OSError] = []
        try:
            folders, _ = class_folders(layout.area(area), report=unreadable.append)
        except ReferencesAbsentError as error:
            raise DataError(f"{error}; correct this, or choose other folders with --from") from error
        if unreadable:
            raise DataError(errors.unreadable(unreadable[0]))
        files = [Candidate(path, mark, one.label) for one in folders for path, mark in one.files]
        found += _with_origin(layout, files, state) if area is Area.DATASET else files
    known = [one for one in found if one.label != STRANGERS_FOLDER]
    return known, [one for one in found if one.label == STRANGERS_FOLDER]


def candidates_of(images: Sequence[LabelledImage]) -> list[Candidate]:
    """Return the files of labelled images as candidates; files that are gone are left out."""
    found = ((one, stamp(one.path)) for one in images)
    return [Candidate(one.path, mark, one.label, one.is_placed) for one, mark in found if mark is not None]


def _with_origin(layout: Layout, candidates: list[Candidate], state: Path) -> list[Candidate]:
    """Return files of ``Dataset/`` with ``is_placed`` from the journal."""
    journal = layout.state_folder(state) / JOURNAL_FILE
    if not journal.is_file():
        return candidates
    with History.open(journal) as history:
        records = [history.last_known(one.stamp) for one in candidates]
    return [
        replace(
            one,
            is_placed=record is None
            or record.move_reason.outcome not in {Outcome.FILED.value, Outcome.REFILED.value}
            or os.path.join(layout.root, record.destination_path) != one.path,
        )
        for one, record in zip(candidates, records, strict=True)
    ]


def gather(candidates: Sequence[Candidate], strangers: Sequence[Candidate], embedder: Embedder) -> Photos:
    """Read and embed the files, and return the images that can be trained on.

    Raises:
        DataError: fewer than two classes have an image.
    """
    files = sorted({(one.path, one.stamp) for one in (*candidates, *strangers)}, key=lambda file: file[0])
    answers = {(one.path, one.stamp): one for one in embedder.embed(files)}
    kept, left_out = _deduplicated(candidates, answers)
    labels = tuple(sorted({one.label for one, _ in kept}))
    if len(labels) < 2:  # noqa: PLR2004 - a choice
        raise DataError(_lacking(labels, len(candidates), left_out))
    found = (answers[one.path, one.stamp] for one in strangers)
    odd = {image.content: image for image in found if isinstance(image, EmbeddedImage)}.values()
    none = np.zeros((0, embedder.encoder.dimensions), np.float32)
    return Photos(
        labels=labels,
        files=tuple((one.path, one.stamp) for one, _ in kept),
        classes=np.array([labels.index(one.label) for one, _ in kept], np.int64),
        weights=np.array([PLACED if one.is_placed else FILED for one, _ in kept]),
        embeddings=np.stack([image.embedding for _, image in kept]),
        strangers=np.stack([image.embedding for image in odd]) if odd else none,
        stranger_files=tuple((image.path, image.stamp) for image in odd),
        left_out=tuple(left_out),
    )


def _deduplicated(
    candidates: Sequence[Candidate], answers: Mapping[ImageFile, EmbeddedImage | ImageRefused]
) -> tuple[list[tuple[Candidate, EmbeddedImage]], list[dict[str, str]]]:
    """Return each content once, and the files left out: unreadable ones, and contents in two classes."""
    left_out: list[dict[str, str]] = []
    by_content: defaultdict[str, list[tuple[Candidate, EmbeddedImage]]] = defaultdict(list)
    for one in candidates:
        answer = answers[one.path, one.stamp]
        if isinstance(answer, EmbeddedImage):
            by_content[answer.content].append((one, answer))
        elif answer.refusal not in {Refusal.NOT_AN_IMAGE, Refusal.VANISHED}:
            left_out.append({"path": one.path, "why": answer.message})
    kept = []
    for same in by_content.values():
        placed = [pair for pair in same if pair[0].is_placed] or same
        labels = {one.label for one, _ in placed}
        if len(labels) == 1:
            kept.append(placed[0])
            continue
        for one, _ in placed:
            others = ", ".join(sorted(labels - {one.label}))
            left_out.append({"path": one.path, "why": f"the same image is also in {others}"})
    return sorted(kept, key=lambda pair: (pair[0].label, pair[0].path)), left_out


def _lacking(labels: Sequence[str], files: int, left_out: Sequence[Mapping[str, str]]) -> str:
    skipped = ""
    if left_out:
        skipped = f" ({len(left_out)} left out, first: {left_out[0]['path']}: {left_out[0]['why']})"
    if labels:
        return f"only the class {labels[0]!r} has images{skipped}; put images into the folder of a second class"
    state = f"none of the {files} files is a readable image{skipped}" if files else "there is no image"
    return f"{state}; put images into the folders of at least two classes, Clases/<class>/"


def split_photos(photos: Photos, recipe: Recipe) -> Split:
    """Return the split of photos; near-duplicates are in the same part.

    Raises:
        DataError: the test or validation part has fewer than two classes.
    """
    groups = near_duplicate_groups(photos.embeddings, photos.classes)
    shares = {"test": recipe.test, "validation": recipe.validation}
    split = split_by_group(photos.classes, groups, photos.weights == PLACED, **shares, seed=recipe.seed)
    for part in shares:
        if len(np.unique(photos.classes[split[part]])) < 2:  # noqa: PLR2004 - one class cannot be confused
            few = ", ".join(f"{label} {number}" for label, number in photos.counts.items())
            raise DataError(
                f"too few different images placed by a person for the {part} part ({few}): fine-tuning needs at least "
                "three images of two classes; with so few, the prototypes decide better"
            )
    return split


def near_duplicate_groups(embeddings: FloatArray, classes: IntArray) -> IntArray:
    """Return the group (N,) of each of N unit rows; chains of near-duplicates, of any class, form one group."""
    groups = np.zeros(len(embeddings), np.int64)
    largest = np.maximum(2, LARGEST_SHARE * np.bincount(classes))
    distance = max(duplicate_distance(embeddings.astype(np.float64)), ROUNDING)
    waiting, found = [(np.arange(len(embeddings)), distance)], 0
    while waiting:
        members, limit = waiting.pop()
        parts = _components(embeddings[members], limit)
        for part in np.unique(parts):
            chosen = members[parts == part]
            if len(chosen) > largest[classes[chosen]].max() and limit > ROUNDING:
                waiting.append((chosen, max(limit / 2, ROUNDING)))
            else:
                groups[chosen], found = found, found + 1
    return groups


def _components(rows: FloatArray, limit: float) -> IntArray:
    """Return (N,) the component of each row, in order of first rows; rows within distance ``limit`` are joined."""
    labels = np.arange(len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        first, second = np.nonzero(rows[start : start + ROWS_AT_ONCE] @ rows.T >= np.float32(1.0 - limit))
        joined = (np.ones(len(first), np.int8), (labels[first + start], labels[second]))
        labels = connected_components(coo_array(joined, (len(rows), len(rows))), directed=False)[1][labels]
    return labels


def split_by_group(
    classes: IntArray, groups: IntArray, may_evaluate: BoolArray, *, test: float, validation: float, seed: int
) -> Split:
    """Split images by class and in whole groups; ``test`` and ``validation`` are shares of each class.

    ``train`` gets at least one group of each class, and all groups with several classes or with an image that may not
    be used for evaluation.
    """
    dice = np.random.default_rng(seed)
    side = np.zeros(len(classes), np.int64)  # index of ``PARTS``
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        of_class = dice.permutation(np.unique(groups[members]))
        whole = [np.flatnonzero(groups == group) for group in of_class]
        free = [group for group in whole if (classes[group] == label).all() and may_evaluate[group].all()]
        spare = len(of_class) - 1  # at least one group is trained on
        for number, share in ((2, test), (1, validation)):
            taken = _take(free, round(share * len(members)), most=spare) if share > 0 else []
            side[[index for group in taken for index in group]] = number
            spare -= len(taken)
            free = [group for group in free if side[group[0]] == 0]
    return {part: np.flatnonzero(side == number) for number, part in enumerate(PARTS)}


def _take(free: list[IntArray], wanted: int, *, most: int) -> list[IntArray]:
    """Return at most ``most`` groups, and at least one if possible, with about ``wanted`` images together."""
    taken: list[IntArray] = []
    images = 0
    for group in free:
        if len(taken) >= most or images >= wanted:
            break
        if images + len(group) - wanted <= wanted - images:  # the excess is not larger than the deficit
            taken.append(group)
            images += len(group)
    return taken or sorted(free, key=len)[: min(1, most)]


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of one classifier for N test images and S images of no class."""

    name: str
    probabilities: Array  # float64 (N, C)
    strangers: Array  # float64 (S,): top probabilities

    @property
    def best(self) -> IntArray:
        """int64 (N,): the class of each image."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class TrainDataset:
    """Images with classes and weights, for torch's data loader."""

    pixels: npt.NDArray[Any]  # uint8 (N, h, w, 3), or features of all images in each view; maybe mapped from a file
    classes: IntArray
    weights: FloatArray
    views: int = 1

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.classes)

    def __getitems__(self, indices: Sequence[int]) -> "TrainDataset":
        """Return a part of the images, each in a random view."""
        if self.views == 1:
            return TrainDataset(self.pixels[indices], self.classes[indices], self.weights[indices])
        import torch

        drawn = torch.randint(self.views, (len(indices),)).numpy()  # the Trainer resumes torch's random state
        rows = drawn * len(self) + np.asarray(indices)
        return TrainDataset(self.pixels[rows], self.classes[indices], self.weights[indices])


@dataclass(frozen=True, eq=False)
class Plan:
    """The input of a training, kept in the work folder ``work``; the pixels of each part are in separate files."""

    work: Path
    dataset: str
    labels: tuple[str, ...]
    base: str
    side: int | None
    recipe: Recipe
    extra: tuple[str, ...]
    created: str
    decoding: str
    preprocessing: Preprocessing
    source: Preprocessing
    """The size of the stored training images: larger than the network's input, for random crops."""
    data: Mapping[str, Any]  # counts, files left out and notes, as plain values
    classes: Mapping[str, IntArray]  # int64 (N,) for each of ``PARTS``
    weights: FloatArray  # float32 (N,) of the training images
    baselines: tuple[Predictions, ...]  # of each mode of the prototypes

    def size_of(self, part: str) -> Preprocessing:
        """Return the size of the stored images of a part."""
        return self.source if part == "train" else self.preprocessing

    def images_of(self, part: str) -> TrainDataset:
        """Return the images of one of ``PARTS``; raise DataError as ``pixels_of``."""
        weights = self.weights if part == "train" else np.ones(len(self.classes[part]), np.float32)
        return TrainDataset(self.pixels_of(part), self.classes[part], weights)

    def pixels_of(self, part: str) -> Pixels:
        """Return uint8 (N, h, w, 3), memory-mapped from the file of a part or of ``strangers``.

        Raises:
            DataError: the file is missing or has a wrong size.
        """
        size, file = self.size_of(part), pixels_file(self.work, part)
        shape = (size.crop_height, size.crop_width, 3)
        try:
            images = file.stat().st_size // int(np.prod(shape))
            if part in self.classes and images != len(self.classes[part]):
                raise DataError(f"{file} is incomplete; run `sortd finetune` without --resume")
            if not images:
                return np.zeros((0, *shape), np.uint8)
            return np.memmap(file, np.uint8, mode="r", shape=(images, *shape))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); run `sortd finetune` without --resume") from error

    def write(self) -> None:
        """Write the plan after its pixels; ``plan.json``, written last, marks it complete. Raises DestinationError."""
        arrays: dict[str, Any] = {f"classes_{part}": self.classes[part] for part in PARTS}
        arrays |= {f"champion_{one.name}": one.probabilities for one in self.baselines}
        arrays |= {f"strangers_{one.name}": one.strangers for one in self.baselines}
        apart = {"work", "classes", "weights", "baselines"}
        facts = {key: value for key, value in asdict(self).items() if key not in apart}
        facts["modes"] = [one.name for one in self.baselines]
        with disk_errors_translated(self.work):
            np.savez(self.work / ARRAYS_FILE, weights=self.weights, **arrays)
            write_json(self.work / PLAN_FILE, facts, indent=1)


def read_plan(work: Path) -> Plan:
    """Read a plan; raise DataError if it is incomplete."""
    try:
        facts = json.loads((work / PLAN_FILE).read_text("utf-8"))
        with np.load(work / ARRAYS_FILE, allow_pickle=False) as held:
            arrays = dict(held)
        modes = facts.pop("modes")
        facts |= {key: tuple(facts[key]) for key in ("labels", "extra")}
        facts |= {key: Preprocessing.from_fields(facts[key]) for key in ("preprocessing", "source")}
        facts["recipe"] = Recipe(**facts["recipe"])
        return Plan(
            work=work,
            **facts,
            classes={part: arrays[f"classes_{part}"] for part in PARTS},
            weights=arrays["weights"],
            baselines=tuple(Predictions(m, arrays[f"champion_{m}"], arrays[f"strangers_{m}"]) for m in modes),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the training in {work} is incomplete ({error}); remove it and run `sortd finetune` without --resume"
        ) from error


def features_file(work: Path, part: str) -> Path:
    """Return the file of the features of a part: float16, one image after the other."""
    return work / f"{part}.features"


def pixels_file(work: Path, part: str) -> Path:
    """Return the file of the pixels of a part: raw bytes, one image after the other."""
    return work / f"{part}.pixels"


@contextmanager
def disk_errors_translated(folder: Path) -> Iterator[None]:
    """Raise DestinationError with the path for an OSError in the block."""
    try:
        yield
    except OSError as error:
        where = os.fspath(error.filename or folder)
        raise DestinationError(
            f"{where} cannot be written: {error.strerror or error}; free space, change the permissions, or choose "
            "another folder with --output"
        ) from error
