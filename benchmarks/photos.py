"""Measure the accuracy of every mode on real photos with the packaged model, in per cent, as the mean of five draws.

    python -m benchmarks.photos FOLDER... [--model MODEL] [--references 6] [--json]

Each FOLDER holds one folder of images a class; references are drawn by seed, every other image is a query. The encoder,
the decoding and the prompts are those of sortd, so what is printed is what the daemon would do with ``abstain: off``.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sortd.classify.build import build
from sortd.classify.decide import score_batch
from sortd.classify.prompts import GENERIC_NOUNS, prompts
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.config import DEFAULT_TEMPLATES
from sortd.encoder.backends import load_encoder
from sortd.encoder.base import Encoder
from sortd.events import Mode
from sortd.images.decode import DecodeLimits, decode_file

Rows = npt.NDArray[np.float32]
BATCH = 64


def embed_folder(encoder: Encoder, folder: Path) -> tuple[Rows, npt.NDArray[np.int64], list[str]]:
    """Return rows (N, d), their classes (N,) and the classes' names."""
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(index, path) for index, label in enumerate(labels) for path in sorted((folder / label).iterdir())]
    pixels = [decode_file(str(path), encoder.preprocessing, DecodeLimits()) for _, path in files]
    batches = [np.stack(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    rows = np.concatenate([encoder.encode_images(batch) for batch in batches])
    return rows, np.array([index for index, _ in files]), labels


def measure(encoder: Encoder, folder: Path, *, references: int, draws: int = 5) -> dict[str, float]:
    """Return the accuracy of each mode in per cent."""
    rows, classes, labels = embed_folder(encoder, folder)
    names = np.stack([encoder.encode_texts(prompts(label, (), DEFAULT_TEMPLATES)).mean(axis=0) for label in labels])
    text = (names / np.linalg.norm(names, axis=1, keepdims=True)).astype(np.float32)
    generic = encoder.encode_texts([p for noun in GENERIC_NOUNS for p in prompts(noun, (), DEFAULT_TEMPLATES)])
    right: dict[Mode, list[float]] = {mode: [] for mode in Mode}
    for seed in range(draws):
        dice = np.random.default_rng(seed)
        drawn = [dice.permutation(np.flatnonzero(classes == index))[:references] for index in range(len(labels))]
        chosen = np.concatenate(drawn)
        queries = np.setdiff1d(np.arange(len(rows)), chosen)
        support = SupportSet(
            labels=tuple(labels),
            embeddings=rows[chosen],
            classes=classes[chosen],
            sources=tuple(map(str, chosen)),
            text=text,
            text_mean=generic.mean(axis=0).astype(np.float32),
            strangers=np.zeros((0, rows.shape[1]), np.float32),
            encoder_id=encoder.encoder_id,
            fingerprint=str(seed),
        )
        prototypes = build(support, DecisionSettings(abstain=None), generation=1)
        for mode in Mode:
            best = score_batch(prototypes, rows[queries].astype(np.float64), mode).best
            right[mode].append(100 * float((best == classes[queries]).mean()))
    return {mode.value: round(float(np.mean(values)), 2) for mode, values in right.items()}


def main() -> None:
    """Measure every folder and print the accuracies and their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--references", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    encoder = load_encoder(arguments.model)
    results = {folder.name: measure(encoder, folder, references=arguments.references) for folder in arguments.folders}
    mean = {mode.value: round(float(np.mean([row[mode.value] for row in results.values()])), 2) for mode in Mode}
    results["mean"] = mean
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, row in results.items():
        print(f"{name:16s} " + "  ".join(f"{mode} {value:5.1f}" for mode, value in row.items()))


if __name__ == "__main__":
    main()
