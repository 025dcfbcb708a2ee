"""Training images: small RGB images with their concepts, read from npz files and cached on disk after decoding."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from training.concepts import Vocabulary, read_vocabulary

PIXELS = 64
HELD_OUT_EVERY = 10
REPEATS = {"imagenet1k": 4, "caltech101": 2}
"""Repetitions an epoch of the images of small data sets with many names."""

UNSPLIT = frozenset({"imagenet1k"})
"""Data sets with one image a class, which hold out none."""


@dataclass(frozen=True, slots=True)
class PhotoSet:
    """The images of one file: `pixels` uint8 (n, 64, 64, 3), `labels` int64 (n,) into the names of `data_set`."""

    data_set: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def held_out(self) -> npt.NDArray[np.bool_]:
        """Return which images are held out: those whose index in the file is 9 modulo 10."""
        if self.data_set in UNSPLIT:
            return np.zeros(len(self.labels), bool)
        last: npt.NDArray[np.bool_] = np.arange(len(self.labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return last


@dataclass(frozen=True, slots=True)
class Library:
    """All photo sets and their vocabulary."""

    photo_sets: tuple[PhotoSet, ...]
    vocabulary: Vocabulary

    def data_sets(self) -> tuple[str, ...]:
        """Return the names of the data sets in the order of their first file."""
        return tuple(dict.fromkeys(photo_set.data_set for photo_set in self.photo_sets))


def read_library(folder: Path, cache: Path) -> Library:
    """Read every npz file of a folder; decoded images are cached in `cache`."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.npz files")
    vocabulary = read_vocabulary(folder / "class_names.json")
    return Library(tuple(read_photo_set(file, cache) for file in files), vocabulary)


def read_photo_set(file: Path, cache: Path) -> PhotoSet:
    """Decode one npz file (`webp`, `offsets`, `labels`) to a memory map, or open the map of an earlier run."""
    with np.load(file, allow_pickle=False) as content:
        labels = content["labels"].astype(np.int64)
        decoded = cache / f"{file.stem}.npy"
        if not decoded.exists():
            cache.mkdir(parents=True, exist_ok=True)
            decode(content["webp"].tobytes(), content["offsets"], decoded)
    pixels = np.load(decoded, mmap_mode="r", allow_pickle=False)
    if pixels.shape != (len(labels), PIXELS, PIXELS, 3):
        raise ValueError(f"{decoded} does not belong to {file}: delete it and run again")
    return PhotoSet(file.stem.split("-")[0], pixels, labels)


def decode(stream: bytes, offsets: npt.NDArray[np.int64], target: Path) -> None:
    """Write the images of a stream atomically as one uint8 array (n, 64, 64, 3)."""
    partial = target.with_suffix(".partial")
    shape = (len(offsets) - 1, PIXELS, PIXELS, 3)
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)

    def put(index: int) -> None:
        image = Image.open(io.BytesIO(stream[offsets[index] : offsets[index + 1]]))
        pixels[index] = np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(put, range(shape[0]), chunksize=256):
            pass
    pixels.flush()
    partial.rename(target)


@dataclass(frozen=True, slots=True)
class Batch:
    """`pixels` uint8 (b, 64, 64, 3), `concepts` int64 (b,), `sources` int64 (b,) into `Library.data_sets()`."""

    pixels: torch.Tensor
    concepts: torch.Tensor
    sources: torch.Tensor


class Shuffler:
    """Endless batches of training images, in an order that depends only on seed and epoch, so that a run can resume."""

    def __init__(self, library: Library, *, batch: int, seed: int, includes_held_out: bool = False) -> None:
        """List the images that have a concept and, unless they are included, are not held out."""
        self._library, self._batch, self._seed = library, batch, seed
        data_sets = library.data_sets()
        rows = []
        for index, photo_set in enumerate(library.photo_sets):
            concepts = np.asarray(library.vocabulary.of_label[photo_set.data_set])[photo_set.labels]
            usable = includes_held_out | ~photo_set.held_out()
            shown = np.flatnonzero(usable & (concepts >= 0))
            source = np.full(len(shown), data_sets.index(photo_set.data_set))
            row = np.stack([np.full(len(shown), index), shown, concepts[shown], source], axis=1)
            rows += [row] * REPEATS.get(photo_set.data_set, 1)
        self._rows = np.concatenate(rows)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """The number of complete batches in an epoch."""
        return len(self._rows) // self._batch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yield the batches from a step on."""
        step = first_step
        while True:
            yield self.at(step)
            step += 1

    def at(self, step: int) -> Batch:
        """Return the batch of one step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        rows = self._rows[self._order[place * self._batch : (place + 1) * self._batch]]
        pixels = np.empty((len(rows), PIXELS, PIXELS, 3), np.uint8)
        for index, photo_set in enumerate(self._library.photo_sets):
            mine = rows[:, 0] == index
            pixels[mine] = photo_set.pixels[rows[mine, 1]]
        return Batch(torch.from_numpy(pixels), torch.from_numpy(rows[:, 2].copy()), torch.from_numpy(rows[:, 3].copy()))


def held_out_images(library: Library, data_set: str, *, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an even sample of a data set's held-out images, uint8 (n, 64, 64, 3), and concepts, int64 (n,)."""
    pixels, concepts = [], []
    for photo_set in library.photo_sets:
        if photo_set.data_set == data_set:
            meant = np.asarray(library.vocabulary.of_label[data_set])[photo_set.labels]
            chosen = np.flatnonzero(photo_set.held_out() & (meant >= 0))
            pixels.append(photo_set.pixels[chosen])
            concepts.append(meant[chosen])
    if not pixels:
        return torch.empty(0, PIXELS, PIXELS, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    all_pixels, all_concepts = np.concatenate(pixels), np.concatenate(concepts)
    thin = np.linspace(0, len(all_concepts) - 1, min(at_most, len(all_concepts))).astype(np.int64)
    return torch.from_numpy(all_pixels[thin]), torch.from_numpy(all_concepts[thin])
