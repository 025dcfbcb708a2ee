"""Images for training: small RGB pictures with their concepts, read from the npz files and kept decoded on disk."""

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
"""How often an epoch shows the images of small data sets, so that their many names are learnt."""

UNSPLIT = frozenset({"imagenet1k"})
"""One image a class: nothing to hold out."""


@dataclass(frozen=True, slots=True)
class PhotoSet:
    """Images of one file: `pixels` uint8 (n, 64, 64, 3), `labels` int64 (n,) into the names of `data_set`."""

    data_set: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def held_out(self) -> npt.NDArray[np.bool_]:
        """Say which images are never trained on: index in the file modulo 10 is 9."""
        if self.data_set in UNSPLIT:
            return np.zeros(len(self.labels), bool)
        last: npt.NDArray[np.bool_] = np.arange(len(self.labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return last


@dataclass(frozen=True, slots=True)
class Library:
    """All photo sets with the vocabulary that their labels mean."""

    photo_sets: tuple[PhotoSet, ...]
    vocabulary: Vocabulary

    def data_sets(self) -> tuple[str, ...]:
        """Name the data sets in the order of their first file."""
        return tuple(dict.fromkeys(photo_set.data_set for photo_set in self.photo_sets))


def read_library(folder: Path, cache: Path) -> Library:
    """Read every npz of a folder, decoding each once into `cache`."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.npz to train from")
    vocabulary = read_vocabulary(folder / "class_names.json")
    return Library(tuple(read_photo_set(file, cache) for file in files), vocabulary)


def read_photo_set(file: Path, cache: Path) -> PhotoSet:
    """Decode one npz (`webp`, `offsets`, `labels`) into a memory map, or open the map that an earlier run left."""
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
    """Write images of a stream as one uint8 array (n, 64, 64, 3), whole or not at all."""
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
    """Endless batches of training images, in an order that depends on seed and epoch alone, so a run can resume."""

    def __init__(self, library: Library, *, batch: int, seed: int) -> None:
        """List what may be shown: not held out, with a concept."""
        self._library, self._batch, self._seed = library, batch, seed
        data_sets = library.data_sets()
        rows = []
        for index, photo_set in enumerate(library.photo_sets):
            concepts = np.asarray(library.vocabulary.of_label[photo_set.data_set])[photo_set.labels]
            shown = np.flatnonzero(~photo_set.held_out() & (concepts >= 0))
            source = np.full(len(shown), data_sets.index(photo_set.data_set))
            row = np.stack([np.full(len(shown), index), shown, concepts[shown], source], axis=1)
            rows += [row] * REPEATS.get(photo_set.data_set, 1)
        self._rows = np.concatenate(rows)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Count the whole batches of an epoch."""
        return len(self._rows) // self._batch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Give batches from a step on."""
        step = first_step
        while True:
            yield self.at(step)
            step += 1

    def at(self, step: int) -> Batch:
        """Give the batch of one step."""
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
    """Give held-out images of a data set, evenly thinned: uint8 (n, 64, 64, 3), int64 concepts (n,)."""
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
