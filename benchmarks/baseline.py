"""Compare sortd with the script that it replaced, and with the upper bound of the machine.

    python -m benchmarks.baseline [--photos 96] [--piece 24] [--references 200] [--classes 20] [--pixels 4000x3000]
                                  [--backends torch onnx-int8] [--rounds 6] [--json]

The script, written anew from its description: for each photo one ``model.encode(Image.open(path))``, then every
reference's cached embedding read again from JSON and one cosine call each, then the move to the class with the highest
mean (``avg``) or the highest single one (``max``). ``sortd run`` files copies of the same photos in the same rounds,
with each backend. Model loading counts on neither side, nor does the embedding of the references, which both have
cached.

    bound     one over (seconds of a bare forward at its best batch + seconds of decoding over the cores), both measured
              in each round; what is reached of it tells how much time goes elsewhere
    classes   by ``avg`` and ``max``, the script's against those of sortd, decoding in full and by draft

The floors: six times the script's images per second with torch, ten times with ONNX int8; 95 % of the bound; the same
classes in full with torch, and 99 % of them by draft.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.comparison import (
    Claim,
    Piece,
    Side,
    alternate,
    claim_of_ratio,
    conclude,
    interval_of_median,
    say,
    summary,
    timed,
)
from benchmarks.harness import argument_parser
from benchmarks.workload import Filing, Material, add_options, forward_side, original_name, put, run_once
from sortd.events import Preprocessing
from sortd.images.decode import DecodeLimits, Jpeg
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.watch.scan import scan

FLOORS = {"torch": 6.0, "onnx": 6.0, "onnx-int8": 10.0}
"""Times the script's images per second."""
FLOOR_OF_BOUND = 0.95
FLOOR_OF_DRAFT = 0.99
CLIP_SEES = Preprocessing(224, 224, 224)
RULES = ("avg", "max")
SCRIPT, DECODING = "script", "decoding, one process"


class Script:
    """The side of the script, which takes a third of the photos that the other sides take."""

    def __init__(self, material: Material) -> None:
        """Load the model, and write each reference's embedding next to it, as the script expects."""
        from sentence_transformers import SentenceTransformer

        self._material, self._folder = material, material.folder / "script"
        put(material.clases, self._folder / "Clases")
        self._model = SentenceTransformer(str(material.model), device="cpu", local_files_only=True)
        say("the script embeds its references")
        for path in sorted(self._folder.glob("Clases/*/*.jpg")):
            row = self._model.encode(Image.open(path), show_progress_bar=False).tolist()
            path.with_suffix(".json").write_text(json.dumps(row), encoding="utf-8")
        self.classes: dict[str, dict[str, str]] = {rule: {} for rule in RULES}
        """The class of each photo, by rule and name of the original."""

    def side(self, count: int) -> Side:
        """Return a side that classifies and moves so many photos, one after the other."""

        def side() -> Piece:
            photos = self._material.photos.copy_next(self._folder / "Images", count)
            return timed(lambda: sum(1 for path in photos if self._file(path)))()

        return side

    def _file(self, path: Path) -> bool:
        from sentence_transformers import util

        embedding = self._model.encode(Image.open(path), show_progress_bar=False)
        similarities: dict[str, list[float]] = defaultdict(list)
        clases = self._folder / "Clases"
        for label in sorted(os.listdir(clases)):
            for name in sorted(os.listdir(clases / label)):
                if name.endswith(".json"):
                    reference = json.loads((clases / label / name).read_text(encoding="utf-8"))
                    similarities[label].append(float(util.cos_sim(embedding, reference)))
        best = {
            "avg": max(similarities, key=lambda label: statistics.fmean(similarities[label])),
            "max": max(similarities, key=lambda label: max(similarities[label])),
        }
        for rule, label in best.items():
            self.classes[rule][original_name(path.name)] = label
        target = self._folder / "Dataset" / best["avg"]
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
        return True


def decoding_side(material: Material, pool: DecoderPool, count: int) -> Side:
    """Return a side that reads, hashes and decodes photos in one process; its time is that of the process."""

    def side() -> Piece:
        material.photos.copy_next(material.folder / "decoded", count)
        files = sorted(scan(str(material.folder / "decoded"), report=_raise))
        taken = [answer.decode_seconds for answer in pool.decode_all(files) if isinstance(answer, DecodedImage)]
        return Piece(len(taken), sum(taken), sum(taken))

    return side


def _raise(error: OSError) -> None:
    raise error


def claims_of(backend: str, pieces: dict[str, list[Piece]]) -> list[Claim]:
    """Return the claims on one backend, against the script and against the bound."""
    cores = len(os.sched_getaffinity(0))
    sortd, bare = pieces[f"{backend}: sortd"], pieces[f"{backend}: bare forward"]
    shares = [
        filed.rate * (1 / forward.rate + 1 / decoded.rate / cores)
        for filed, forward, decoded in zip(sortd, bare, pieces[DECODING], strict=True)
    ]
    return [
        claim_of_ratio(f"{backend}: sortd over the script", pieces, f"{backend}: sortd", SCRIPT, least=FLOORS[backend]),
        Claim(f"{backend}: share of the bound", interval_of_median(shares), least=FLOOR_OF_BOUND),
    ]


def agreement(material: Material, backend: str, jpeg: Jpeg, script: Script) -> dict[str, float]:
    """Return the share of photos that ``sortd once`` files as the script did, by rule; the second rule is cached."""
    found = {}
    for rule in RULES:
        config = material.config(f"{backend} {jpeg}", backend, mode=rule, decoding={"jpeg": jpeg})
        dataset = config.parent / "Data" / "Photos"
        shutil.rmtree(dataset / "Dataset", ignore_errors=True)
        put(material.photos.folder, dataset / "Images")
        ours, theirs = run_once(config).outcomes, script.classes[rule]
        found[rule] = sum(ours[f"{name}.jpg"] == label for name, label in theirs.items()) / len(theirs)
    return found


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Measure, print and return the exit code."""
    material = Material(folder, options, classes=options.classes, references=options.references)
    script = Script(material)
    with ExitStack() as stack:
        pool = stack.enter_context(DecoderPool(1, CLIP_SEES, DecodeLimits(), jpeg="draft"))
        sides = {
            SCRIPT: script.side(max(1, options.piece // 3)),
            DECODING: decoding_side(material, pool, max(1, options.piece // 3)),
        }
        for backend in options.backends:
            filing = stack.enter_context(Filing(material, backend, mode="avg"))
            sides[f"{backend}: sortd"] = filing.side(options.piece)
            sides[f"{backend}: bare forward"] = forward_side(material, backend, options.piece)
        sides[DECODING]()  # the process starts
        pieces = alternate(sides, rounds=options.rounds)
    claims = [claim for backend in options.backends for claim in claims_of(backend, pieces)]
    same: dict[str, Any] = {
        f"{backend}, draft": agreement(material, backend, "draft", script) for backend in options.backends
    }
    if "torch" in options.backends:
        same["torch, full"] = agreement(material, "torch", "full", script)
    more = {"photos_compared": len(script.classes["avg"]), "same_classes": same}
    code = conclude(summary(pieces), claims, as_json=options.json, rounds=options.rounds, more=more)
    is_same = (
        min(same["torch, full"].values()) == 1.0 and min(same["torch, draft"].values()) >= FLOOR_OF_DRAFT
        if "torch" in options.backends
        else True
    )
    return code if is_same else 1


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=6)
    add_options(parser, photos=48, piece=24, pixels="4000x3000")
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--classes", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-bench-", dir=options.folder) as name:
        return compare(Path(name), options)


if __name__ == "__main__":
    sys.exit(main())
