"""Draw the sample data: reference images of four kinds of screw heads, and a batch of images to sort.

    python Data/draw.py references [--into FOLDER] [--each 6] [--seed 1]   classes with their images
    python Data/draw.py incoming [--truth FILE] [--again]                  40 images into Images/, one of them broken

The same seed draws the same bytes with the same Pillow and numpy. No file is overwritten: both are drawn only if they
are missing; ``--again`` draws 40 more with other names.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grounds import Random
from PIL import Image
from screws import KINDS, screw
from strangers import STRANGERS

DATASET = Path(os.path.relpath(Path(__file__).parent / "Tornillos"))

INCOMING = 40
STRANGE = 9
BROKEN = 1
EXIF_ORIENTATION = 0x0112

SUFFIXES = (".jpg",) * 6 + (".JPG", ".png", ".webp", ".jpeg")
"""File suffixes and their proportions."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A file to write: its name, its bytes, and its class ("" if it belongs to none)."""

    name: str
    content: bytes
    label: str


def names(random: Random, count: int, taken: frozenset[str] = frozenset()) -> list[str]:
    """Draw names like those of a camera, which do not depend on the content."""
    numbers = [number for number in random.permutation(9_000) + 1_000 if f"IMG_{number}" not in taken]
    return [f"IMG_{number}" for number in numbers[:count]]


def encoded(picture: Image.Image, suffix: str, *, turned: bool = False) -> bytes:
    """Encode a picture in the format of a suffix; ``turned`` stores it rotated, with an EXIF orientation."""
    exif = Image.Exif()
    if turned:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[EXIF_ORIENTATION] = 6
    target = io.BytesIO()
    match suffix.lower():
        case ".png":
            picture.quantize(128).save(target, "PNG", optimize=True)
        case ".webp":
            picture.save(target, "WEBP", quality=80, exif=exif)
        case _:
            picture.save(target, "JPEG", quality=82, exif=exif)
    return target.getvalue()


def draw_references(seed: int, kind: str, each: int) -> Iterator[Drawn]:
    """Draw the reference images of one class, the first of them a PNG."""
    random = np.random.default_rng([seed, KINDS.index(kind)])
    for number, name in enumerate(names(random, each)):
        suffix = ".png" if number == 0 else ".jpg"
        yield Drawn(name + suffix, encoded(screw(kind, random), suffix), kind)


def draw_incoming(seed: int, taken: frozenset[str] = frozenset()) -> Iterator[Drawn]:
    """Draw the images to sort: mostly screws in equal parts, some strangers, and a truncated file."""
    random = np.random.default_rng([seed, len(KINDS)])
    screws = INCOMING - STRANGE - BROKEN
    subjects = [KINDS[number % len(KINDS)] for number in range(screws)] + [""] * (STRANGE + BROKEN)
    order, strange = random.permutation(INCOMING), 0
    lying, cut = (int(place) for place in np.flatnonzero(order < screws)[[3, 11]])
    for place, (name, subject) in enumerate(zip(names(random, INCOMING, taken), order, strict=True)):
        label = subjects[subject]
        if label or subject == INCOMING - 1:
            picture = screw(label or KINDS[place % len(KINDS)], random)
        else:
            picture = STRANGERS[strange % len(STRANGERS)](random)
            strange += 1
        suffix = ".jpg" if place in {lying, cut} or not label else str(random.choice(SUFFIXES))
        content = encoded(picture, suffix, turned=place == lying)
        if subject == INCOMING - 1:
            content = content[: len(content) // 3]
        yield Drawn(name + suffix, content, label)


def write(folder: Path, drawn: Drawn) -> None:
    """Write one file under a free name: under a temporary name first, since sortd may be watching."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{drawn.name}.part"
    part.write_bytes(drawn.content)
    try:
        os.link(part, folder / drawn.name)
    finally:
        part.unlink()


def files_below(*folders: Path) -> list[Path]:
    """List the files below some folders, except hidden ones."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]


def make_references(into: Path, each: int, seed: int) -> None:
    """Draw the classes that have no images yet."""
    for kind in KINDS:
        if files_below(into / kind):
            print(f"{into / kind} has its images already; nothing drawn")
            continue
        for drawn in draw_references(seed, kind, each):
            write(into / kind, drawn)
        print(f"{into / kind}: {each} images")


def make_incoming(dataset: Path, truth: Path | None, *, seed: int, again: bool) -> None:
    """Draw a batch into ``Images/``, unless the images of an earlier one exist, sorted or not."""
    there = files_below(*(dataset / area for area in ("Images", "Dataset", "Review", "Rejected")))
    if there and not again:
        again_draws = f"`{sys.executable} {sys.argv[0]} incoming --again` draws {INCOMING} more"
        print(f"{dataset} holds {len(there)} files of a batch that was drawn before; nothing drawn: {again_draws}")
        return
    batch = list(draw_incoming(seed + len(there), frozenset(path.stem for path in there)))
    for drawn in batch:
        write(dataset / "Images", drawn)
    if truth:
        truth.write_text(json.dumps({drawn.name: drawn.label for drawn in batch}, indent=1) + "\n", encoding="utf-8")
    print(f"{dataset / 'Images'}: {len(batch)} images to be sorted")


def main(arguments: list[str]) -> None:
    """Draw the requested images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    references = commands.add_parser("references", help="draw a folder of images for each class")
    references.add_argument("--into", type=Path, default=DATASET / "Clases")
    references.add_argument("--each", type=int, default=6, help="images per class")
    incoming = commands.add_parser("incoming", help="draw images to sort")
    incoming.add_argument("--dataset", type=Path, default=DATASET)
    incoming.add_argument("--truth", type=Path, help="write the class of each file to this JSON file")
    incoming.add_argument("--again", action="store_true", help="draw another batch if one exists")
    for command in (references, incoming):
        command.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    if asked.command == "references":
        make_references(asked.into, asked.each, asked.seed)
    else:
        make_incoming(asked.dataset, asked.truth, seed=asked.seed, again=asked.again)


if __name__ == "__main__":
    main(sys.argv[1:])
