"""Compare the speed of the packaged model with a CLIP ViT-B/32 (with random weights, on which speed does not depend).

    python -m benchmarks.encoder [--model FOLDER] [--images 5] [--rounds 8] [--threads N] [--json]

Both embed the same photo, one at a time through `SentenceTransformer.encode`. The floor: the packaged model embeds four
times as many images in the same time.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.comparison import Side, alternate, claim_of_ratio, conclude, summary, timed
from benchmarks.harness import argument_parser

FLOOR = 4.0
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


def sides_of(packaged: Path, *, images: int) -> dict[str, Side]:
    """Return a side for each model, which embeds a photo so many times."""
    from sentence_transformers import SentenceTransformer

    noise = np.random.default_rng(0).integers(0, 256, (*reversed(PHOTO_SIDES), 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    with tempfile.TemporaryDirectory() as scratch:
        reference = SentenceTransformer(str(build_reference(Path(scratch))), device="cpu", local_files_only=True)
    small = SentenceTransformer(str(packaged), device="cpu", local_files_only=True)

    def side(model: SentenceTransformer) -> Side:
        def work() -> int:
            for _ in range(images):
                model.encode([photo], show_progress_bar=False)
            return images

        work()  # the first passes take longer
        return timed(work)

    return {"packaged": side(small), "ViT-B/32": side(reference)}


def main() -> int:
    """Print the comparison; exit 1 if the floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=8)
    parser.add_argument("--model", type=Path, default=PACKAGED)
    parser.add_argument("--images", type=int, default=5, help="for each model and round")
    parser.add_argument("--threads", type=int, help="threads of torch; default: all cores")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    pieces = alternate(sides_of(options.model, images=options.images), rounds=options.rounds)
    claim = claim_of_ratio("packaged model over CLIP ViT-B/32", pieces, "packaged", "ViT-B/32", least=FLOOR)
    return conclude(summary(pieces), [claim], as_json=options.json, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main())
