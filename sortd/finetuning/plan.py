"""The plan of a fine-tuning: all that training needs, on the disk, so that it can be resumed whatever the dataset does.

It lies in the work folder: ``plan.json``, arrays, the pixels of every image at the size that it is used in, and the
weights that training starts from. Processes of one training (``torchrun``) read it too.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sortd.errors import DataError, DestinationError
from sortd.events import Fit, Preprocessing
from sortd.files import write_atomic
from sortd.finetuning.measures import Judged
from sortd.finetuning.recipe import Recipe
from sortd.finetuning.training import Lesson

Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

PLAN_FILE, ARRAYS_FILE, START_FILE = "plan.json", "plan.npz", "start.safetensors"
PARTS = ("train", "validation", "test", "strangers")
"""The sets of images; the last has no classes."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one training is about; images are in the order of the arrays."""

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
    """At what size training images are kept: larger than what is seen, so that views can be cropped."""
    data: Mapping[str, Any]
    """Counts, what was left out, and what the user should know, as plain values."""
    classes: Mapping[str, IntArray]
    """int64 (N,) for train, validation and test."""
    weights: FloatArray
    """float32 (N,) of the training images."""
    champions: tuple[Judged, ...]
    """What the prototypes say of the test images."""

    def size_of(self, part: str) -> Preprocessing:
        """Return at what size the images of a part are kept."""
        return self.source if part == "train" else self.preprocessing


def write_plan(plan: Plan, work: Path) -> None:
    """Write a plan whose pixels are there already; ``plan.json`` comes last and makes it whole.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    arrays: dict[str, Any] = {f"classes_{part}": plan.classes[part] for part in PARTS[:3]}
    arrays |= {f"champion_{one.name}": one.probabilities for one in plan.champions}
    arrays |= {f"strangers_{one.name}": one.strangers for one in plan.champions}
    said = {
        "dataset": plan.dataset,
        "labels": plan.labels,
        "base": plan.base,
        "side": plan.side,
        "recipe": asdict(plan.recipe),
        "extra": plan.extra,
        "created": plan.created,
        "decoding": plan.decoding,
        "preprocessing": asdict(plan.preprocessing),
        "source": asdict(plan.source),
        "data": plan.data,
        "modes": [one.name for one in plan.champions],
    }
    with writing(work):
        np.savez(work / ARRAYS_FILE, weights=plan.weights, **arrays)
        write_atomic(work / PLAN_FILE, (json.dumps(said, indent=1) + "\n").encode())


def read_plan(work: Path) -> Plan:
    """Read a plan.

    Raises:
        DataError: it is not whole.
    """
    try:
        said = json.loads((work / PLAN_FILE).read_text("utf-8"))
        with np.load(work / ARRAYS_FILE, allow_pickle=False) as held:
            arrays = dict(held)
        champions = (Judged(mode, arrays[f"champion_{mode}"], arrays[f"strangers_{mode}"]) for mode in said["modes"])
        return Plan(
            dataset=said["dataset"],
            labels=tuple(said["labels"]),
            base=said["base"],
            side=said["side"],
            recipe=Recipe(**said["recipe"]),
            extra=tuple(said["extra"]),
            created=said["created"],
            decoding=said["decoding"],
            preprocessing=_preprocessing(said["preprocessing"]),
            source=_preprocessing(said["source"]),
            data=said["data"],
            classes={part: arrays[f"classes_{part}"] for part in PARTS[:3]},
            weights=arrays["weights"],
            champions=tuple(champions),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{work} holds no whole training to resume ({error}); remove it, and run `sortd finetune` without --resume"
        ) from error


def lesson_of(plan: Plan, work: Path, part: str) -> Lesson:
    """Return the images of a part with their classes; their pixels are mapped from the file.

    Raises:
        DataError: the pixels are not there in full.
    """
    pixels = read_pixels(plan, work, part)
    classes = plan.classes[part]
    return Lesson(pixels, classes, plan.weights if part == "train" else np.ones(len(classes), np.float32))


def read_pixels(plan: Plan, work: Path, part: str) -> Pixels:
    """Return uint8 (N, h, w, 3), mapped from the file of a part.

    Raises:
        DataError: the file is missing or has another size.
    """
    size = plan.size_of(part)
    shape = (size.crop_height, size.crop_width, 3)
    file = pixels_file(work, part)
    try:
        held = file.stat().st_size
        if not held:
            return np.zeros((0, *shape), np.uint8)
        pixels: Pixels = np.memmap(file, np.uint8, mode="r", shape=(held // int(np.prod(shape)), *shape))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); run `sortd finetune` without --resume") from error
    if part in plan.classes and len(pixels) != len(plan.classes[part]):
        raise DataError(f"{file} is not whole; run `sortd finetune` without --resume")
    return pixels


def pixels_file(work: Path, part: str) -> Path:
    """Return where the pixels of a part are kept: bytes, one image after the other."""
    return work / f"{part}.pixels"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses into an error that says where.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    try:
        yield
    except OSError as error:
        where = os.fspath(error.filename or folder)
        raise DestinationError(
            f"{where} cannot be written: {error.strerror or error}; make room or mend its rights, or choose another "
            "place with --output"
        ) from error


def _preprocessing(said: Mapping[str, Any]) -> Preprocessing:
    return Preprocessing(**{**said, "fit": Fit(said["fit"])})
