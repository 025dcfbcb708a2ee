"""Measure the accuracy of every mode on real photos with the packaged model, in per cent, as the mean of five draws.

    python -m benchmarks.photos FOLDER... [--model MODEL] [--references 6] [--fit crop|stretch|whole] [--json]

Each FOLDER holds one folder of images a class; references are drawn by seed, every other image is a query. The encoder,
the decoding and the prompts are those of sortd, so what is printed is what the daemon would do with ``abstain: off``.
``--fit`` replaces the model's way of resizing; ``whole`` fills the image up to a square with white (letterboxing).
After each accuracy stands the standard deviation of the draws.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.decisions import Features, support_of
from benchmarks.harness import argument_parser, print_json
from sortd.arrays import Pixels
from sortd.classify.build import build
from sortd.classify.decide import score_batch
from sortd.classify.prompts import GENERIC_NOUNS, prompts
from sortd.classify.types import DecisionSettings
from sortd.config import DEFAULT_TEMPLATES
from sortd.encoder.backends import load_model
from sortd.encoder.clip import Encoder
from sortd.events import Fit, Mode, Preprocessing
from sortd.images.decode import DecodeLimits, decode_file

BATCH = 64
DRAWS = 5


def photos_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the index of the class and the path of each photo, in order."""
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return [(index, path) for index, label in enumerate(labels) for path in sorted((folder / label).iterdir())]


def filled(pixels: Pixels, wanted: Preprocessing) -> Pixels:
    """Return an image in the middle of a white one of the model's size."""
    canvas = np.full((wanted.crop_height, wanted.crop_width, 3), 255, np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip(canvas.shape[:2], pixels.shape[:2], strict=True))
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def embed_files(encoder: Encoder, paths: list[Path], fit: Fit | None = None) -> npt.NDArray[np.float32]:
    """Return the embeddings (B, d) of images as the daemon would make them, or resized in another way."""
    wanted = encoder.preprocessing if fit is None else replace(encoder.preprocessing, fit=fit)
    pixels = [filled(decode_file(str(path), wanted, DecodeLimits()), wanted) for path in paths]
    batches = [np.stack(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    return np.concatenate([encoder.encode_images(batch) for batch in batches])


def embed_folder(encoder: Encoder, folder: Path, fit: Fit | None = None) -> Features:
    """Return the photos of a folder, which are pool and queries, and the names of its classes."""
    files = photos_of(folder)
    rows = embed_files(encoder, [path for _, path in files], fit)
    classes = np.array([index for index, _ in files])
    labels = sorted({path.parent.name for _, path in files})
    names = np.stack([encoder.encode_texts(prompts(label, (), DEFAULT_TEMPLATES)).mean(axis=0) for label in labels])
    text = (names / np.linalg.norm(names, axis=1, keepdims=True)).astype(np.float32)
    generic = encoder.encode_texts([p for noun in GENERIC_NOUNS for p in prompts(noun, (), DEFAULT_TEMPLATES)])
    return Features(folder.name, rows, classes, rows, classes, text, generic.mean(axis=0).astype(np.float32))


def measure(photos: Features, *, references: int) -> dict[str, tuple[float, float]]:
    """Return the accuracy of each mode in per cent, and its standard deviation."""
    rows, classes = photos.pool, photos.pool_labels
    right: dict[Mode, list[float]] = {mode: [] for mode in Mode}
    for seed in range(DRAWS):
        dice = np.random.default_rng(seed)
        drawn = [dice.permutation(np.flatnonzero(classes == index))[:references] for index in range(photos.classes)]
        chosen = np.concatenate(drawn)
        queries = np.setdiff1d(np.arange(len(rows)), chosen)
        support = support_of(photos, chosen, np.arange(photos.classes))
        prototypes = build(support, DecisionSettings(abstain=None), generation=1)
        for mode in Mode:
            best = score_batch(prototypes, rows[queries].astype(np.float64), mode).best
            right[mode].append(100 * float((best == classes[queries]).mean()))
    return {mode.value: (round(float(np.mean(v)), 2), round(float(np.std(v)), 2)) for mode, v in right.items()}


def main() -> None:
    """Measure every folder and print the accuracies and their mean."""
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--references", type=int, default=6)
    parser.add_argument("--fit", type=Fit, choices=list(Fit), help="default: the model's own")
    arguments = parser.parse_args()
    encoder = load_model(arguments.model)
    results = {
        folder.name: measure(embed_folder(encoder, folder, arguments.fit), references=arguments.references)
        for folder in arguments.folders
    }
    mean = {mode.value: round(float(np.mean([row[mode.value][0] for row in results.values()])), 2) for mode in Mode}
    if arguments.json:
        print_json({**results, "mean": mean}, n=DRAWS)
        return
    for name, row in results.items():
        print(
            f"{name:16s} " + "  ".join(f"{mode} {value:5.1f} ± {spread:3.1f}" for mode, (value, spread) in row.items())
        )
    print(f"{'mean':16s} " + "  ".join(f"{mode} {value:5.1f}      " for mode, value in mean.items()))


if __name__ == "__main__":
    main()
