"""Compare the speed of the packaged model with a CLIP ViT-B/32 (with random weights, on which speed does not depend).

    python -m benchmarks.encoder [--model FOLDER] [--images 30] [--threads N] [--json]

Both embed the same photo, one at a time through `SentenceTransformer.encode`, in turns, so that other load falls on
both alike; the medians are compared. The floor: the packaged model takes at most a quarter of the time.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import argument_parser, print_json

FLOOR = 0.25
PACKAGED = Path(__file__).parent.parent / "sortd" / "model"
PHOTO_SIDES = (640, 480)


def build_reference(folder: Path) -> Path:
    """Write a CLIP of ViT-B/32's sizes and random weights, with a vocabulary of a few letters."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizerFast,
    )

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    CLIPModel(CLIPConfig()).eval().save_pretrained(folder)
    return folder


def milliseconds(model: Any, photo: Image.Image) -> float:  # noqa: ANN401 - sentence-transformers publishes no types.
    """Time one embedding of one photo."""
    began = time.perf_counter()
    model.encode([photo], show_progress_bar=False)
    return 1000 * (time.perf_counter() - began)


def compare(packaged: Path, *, images: int) -> dict[str, float]:
    """Time both models in turns; return medians in milliseconds and their ratio."""
    from sentence_transformers import SentenceTransformer

    noise = np.random.default_rng(0).integers(0, 256, (*reversed(PHOTO_SIDES), 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    with tempfile.TemporaryDirectory() as scratch:
        reference = SentenceTransformer(str(build_reference(Path(scratch))), device="cpu", local_files_only=True)
    small = SentenceTransformer(str(packaged), device="cpu", local_files_only=True)
    for model in (small, reference):
        for _ in range(3):
            milliseconds(model, photo)
    pairs = [(milliseconds(small, photo), milliseconds(reference, photo)) for _ in range(images)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "packaged_milliseconds": round(ours, 2),
        "vit_b_32_milliseconds": round(theirs, 2),
        "ratio": round(ours / theirs, 4),
        "floor": FLOOR,
    }


def main() -> int:
    """Print the comparison; exit 1 if the floor is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, default=PACKAGED)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    facts = compare(options.model, images=options.images)
    if options.json:
        print_json(facts, n=options.images)
    else:
        print(f"packaged model    {facts['packaged_milliseconds']:8.2f} ms an image")
        print(f"CLIP ViT-B/32     {facts['vit_b_32_milliseconds']:8.2f} ms an image")
        print(f"ratio             {facts['ratio']:8.3f}    (floor: at most {FLOOR})")
    return 0 if facts["ratio"] <= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
