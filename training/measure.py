"""`python -m training.measure`: the accuracies of an exported folder, measured with sentence-transformers.

Zero-shot: held-out images (index in their file modulo 10 is 9) classified among all names of their set, each name being
the mean of its templates. Few-shot: six random classes, five images each, a shared-covariance Gaussian.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.concepts import TEMPLATES, Vocabulary
from training.data import held_out_images, read_library
from training.evaluate import few_shot_accuracy

Rows = npt.NDArray[np.float64]


def unit(rows: npt.NDArray[Any]) -> Rows:
    """Return rows scaled to length 1, float64 (n, d)."""
    wide = rows.astype(np.float64)
    scaled: Rows = wide / np.linalg.norm(wide, axis=-1, keepdims=True)
    return scaled


def name_rows(model: Any, vocabulary: Vocabulary, concepts: list[int]) -> Rows:  # noqa: ANN401 - the library is untyped.
    """Embed each concept as the mean of its first name in all templates, (concepts, d)."""
    names = [vocabulary.concepts[concept].names[0] for concept in concepts]
    texts = [template.format(name) for name in names for template in TEMPLATES]
    rows = unit(model.encode(texts, batch_size=256, show_progress_bar=False))
    return unit(rows.reshape(len(names), len(TEMPLATES), -1).mean(axis=1))


def main(values: list[str] | None = None) -> int:
    """Measure a folder and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m training.measure", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of *.npz and class_names.json")
    parser.add_argument("--decoded", type=Path, help="cache of decoded images, for example `decoded` of a run")
    parser.add_argument("--set", dest="data_set", default="tinyimagenet")
    parser.add_argument("--at-most", type=int, default=100_000, help="maximum number of images, an even sample")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(values)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(options.model), device="cpu", local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        library = read_library(options.data, options.decoded or Path(scratch))
        pixels, truth = held_out_images(library, options.data_set, at_most=options.at_most)
    images = [Image.fromarray(image) for image in pixels.numpy()]
    rows = unit(model.encode(images, batch_size=64, show_progress_bar=False))
    known = sorted({concept for concept in library.vocabulary.of_label[options.data_set] if concept >= 0})
    guess = np.array(known)[(rows @ name_rows(model, library.vocabulary, known).T).argmax(axis=1)]
    facts = {
        "set": options.data_set,
        "images": len(images),
        "names": len(known),
        "zero_shot_top1": round(100 * float((guess == truth.numpy()).mean()), 2),
        "few_shot_gda_5": round(few_shot_accuracy(rows, truth.numpy()), 2),
    }
    print(json.dumps(facts) if options.json else "\n".join(f"{name:16s} {value}" for name, value in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
