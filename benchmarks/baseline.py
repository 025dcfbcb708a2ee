"""Compare sortd with the script that it replaced, and with the upper bound of the machine.

    python -m benchmarks.baseline [--photos 300] [--references 200] [--classes 20] [--pixels 4000x3000]
                                  [--backends torch onnx] [--json]

The script, written anew from its description: for each photo one ``model.encode(Image.open(path))``, then every
reference's cached embedding read again from JSON and one cosine call each, then the move to the class with the highest
mean (``avg``) or the highest single one (``max``). Beside it, in one run on the same photos: ``sortd once`` with each
backend. Model loading counts on neither side, nor does the embedding of the references, which both have cached.

    bound     one over (seconds of a bare forward at its best batch + seconds of decoding over the cores), measured in
              the same run on the same photos; what is reached of it tells how much time goes elsewhere
    classes   by ``avg`` and ``max``, the script's against those of sortd, decoding in full and by draft

The floors: four times the script's images per second with torch, six times with ONNX int8; 85 % of the bound; the same
classes in full with torch, and 99 % of them by draft.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import argument_parser, print_json, write_config
from benchmarks.workload import (
    OnceRun,
    forward_seconds,
    make_model,
    make_photos,
    make_references,
    onnx_forward,
    put,
    run_once,
    torch_forward,
)
from sortd.events import Preprocessing
from sortd.images.decode import DecodeLimits, Jpeg
from sortd.images.pool import DecodedImage, DecoderPool
from sortd.watch.scan import scan

FLOORS = {"torch": 4.0, "onnx": 6.0}
"""Times the script's images per second."""
FLOOR_OF_BOUND = 0.85
FLOOR_OF_DRAFT = 0.99
CLIP_SEES = Preprocessing(224, 224, 224)
RULES = ("avg", "max")


@dataclass
class Script:
    """What the script did."""

    classes: dict[str, dict[str, str]] = field(default_factory=lambda: {rule: {} for rule in RULES})
    """The class of each photo, by rule and name."""
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Milliseconds per image."""


def cache_embeddings(model: Any, clases: Path) -> None:  # noqa: ANN401 -- sentence-transformers publishes no types
    """Write each reference's embedding next to it, as the script expects."""
    for path in sorted(clases.rglob("*.jpg")):
        path.with_suffix(".json").write_text(json.dumps(model.encode(Image.open(path)).tolist()), encoding="utf-8")


def run_script(model: Any, clases: Path, inbox: Path, target: Path) -> Script:  # noqa: ANN401 -- as above
    """Classify and move every photo of an inbox, one after the other."""
    from sentence_transformers import util

    done, clock = Script(), time.perf_counter
    photos = sorted(inbox.iterdir())
    for path in photos:
        began = clock()
        image = Image.open(path)
        image.load()
        decoded = clock()
        embedding = model.encode(image, show_progress_bar=False)
        encoded = clock()
        similarities: dict[str, list[float]] = {}
        reading = 0.0
        for label in sorted(os.listdir(clases)):
            similarities[label] = []
            for name in sorted(os.listdir(clases / label)):
                if name.endswith(".json"):
                    before = clock()
                    reference = json.loads((clases / label / name).read_text(encoding="utf-8"))
                    reading += clock() - before
                    similarities[label].append(float(util.cos_sim(embedding, reference)))
        compared = clock()
        best = {
            "avg": max(similarities, key=lambda label: statistics.fmean(similarities[label])),
            "max": max(similarities, key=lambda label: max(similarities[label])),
        }
        (target / best["avg"]).mkdir(parents=True, exist_ok=True)
        path.rename(target / best["avg"] / path.name)
        moved = clock()
        for rule, label in best.items():
            done.classes[rule][path.name] = label
        stages = {
            "decode": decoded - began,
            "encode": encoded - decoded,
            "read": reading,
            "compare": compared - encoded - reading,
            "move": moved - compared,
        }
        for stage, seconds in stages.items():
            done.stages[stage] += 1e3 * seconds / len(photos)
        done.seconds += moved - began
    return done


def decode_seconds(folder: Path, *, jpeg: Jpeg, most: int = 40) -> float:
    """Return the seconds per photo of one decoding process, including reading and hashing."""
    files = sorted(scan(str(folder), report=_raise))[:most]
    with DecoderPool(1, CLIP_SEES, DecodeLimits(), jpeg=jpeg) as pool:
        list(pool.decode_all(files[:2]))
        taken = [answer.decode_seconds for answer in pool.decode_all(files) if isinstance(answer, DecodedImage)]
    return statistics.fmean(taken)


def _raise(error: OSError) -> None:
    raise error


class Comparison:
    """The same photos through the script and through sortd."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        """Create the model, the references and the photos."""
        size = tuple(int(side) for side in arguments.pixels.split("x"))
        self.folder, self.arguments = folder, arguments
        self._prepared: set[tuple[str, Jpeg]] = set()
        self.model = arguments.model or make_model(folder / "model")
        self.dataset = folder / "Data" / "Photos"
        clases = self.dataset / "Clases"
        small = (size[0] // 4, size[1] // 4)
        make_references(clases, classes=arguments.classes, references=arguments.references, size=small)
        make_photos(folder / "photos", classes=arguments.classes, photos=arguments.photos, size=(size[0], size[1]))

    def script(self) -> Script:
        """Run the script on references and photos of its own."""
        from sentence_transformers import SentenceTransformer

        clases, inbox = self.folder / "script" / "Clases", self.folder / "script" / "Images"
        put(self.dataset / "Clases", clases)
        put(self.folder / "photos", inbox)
        model = SentenceTransformer(str(self.model), device="cpu", local_files_only=True)
        cache_embeddings(model, clases)
        return run_script(model, clases, inbox, self.folder / "script" / "Dataset")

    def sortd(self, *, backend: str, jpeg: Jpeg = "draft", mode: str) -> OnceRun:
        """File the photos; an earlier run embeds the references."""
        config = write_config(
            self.folder,
            model=self.model,
            backend=backend,
            mode=mode,
            abstain="off",
            settle_seconds=0.1,
            decoding={"jpeg": jpeg},
        )
        for area in ("Images", "Dataset"):
            shutil.rmtree(self.dataset / area, ignore_errors=True)
        if (backend, jpeg) not in self._prepared:
            run_once(config)
            self._prepared.add((backend, jpeg))
        put(self.folder / "photos", self.dataset / "Images")
        return run_once(config)

    def forward(self, backend: str) -> float:
        """Return the seconds per image of a bare forward pass with the best batch size."""
        bare = torch_forward(self.model) if backend == "torch" else onnx_forward(self.model, self.folder / "cache")
        return min(forward_seconds(bare, seconds=self.arguments.forward_seconds).values())

    def judge(self, backend: str, script: Script, decode: float) -> dict[str, Any]:
        """Measure one backend against the script and against the bound."""
        runs = {rule: self.sortd(backend=backend, mode=rule) for rule in RULES}  # the second one is cached
        timed = runs[RULES[0]]
        forward, cores = self.forward(backend), len(os.sched_getaffinity(0))
        bound = 1.0 / (forward + decode / cores)
        facts: dict[str, Any] = {
            "encoder_id": timed.encoder_id,
            "images_per_second": round(timed.images_per_second, 2),
            "times_the_script": round(timed.images_per_second * script.seconds / len(timed.outcomes), 2),
            "floor_times": FLOORS[backend],
            "stages_ms": {name: round(value, 1) for name, value in timed.stages.items()},
            "forward_ms": round(1e3 * forward, 2),
            "decode_ms": round(1e3 * decode, 2),
            "bound_images_per_second": round(bound, 2),
            "share_of_bound": round(timed.images_per_second / bound, 3),
            "floor_share_of_bound": FLOOR_OF_BOUND,
            "start_seconds": round(timed.start_seconds, 1),
            "resident_mebibytes": round(timed.resident_mebibytes),
            "same_by_draft": {rule: agreement(runs[rule].outcomes, script.classes[rule]) for rule in RULES},
        }
        if backend == "torch":
            full = {rule: self.sortd(backend=backend, jpeg="full", mode=rule) for rule in RULES}
            facts["same_in_full"] = {rule: agreement(full[rule].outcomes, script.classes[rule]) for rule in RULES}
            facts["images_per_second_in_full"] = round(full[RULES[0]].images_per_second, 2)
        return facts


def agreement(ours: dict[str, str], theirs: dict[str, str]) -> float:
    """Return the share of photos with the same class in both."""
    return sum(ours.get(name) == label for name, label in theirs.items()) / len(theirs)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Create the data, and measure the script, the decoding, and each backend."""
    comparison = Comparison(folder, arguments)
    script = comparison.script()
    decode = decode_seconds(folder / "photos", jpeg="draft")
    facts: dict[str, Any] = {
        "photos": arguments.photos,
        "references": arguments.references,
        "cores": len(os.sched_getaffinity(0)),
        "script": {
            "images_per_second": round(arguments.photos / script.seconds, 2),
            "stages_ms": {name: round(value, 1) for name, value in script.stages.items()},
        },
    }
    print(json.dumps(facts["script"]), file=sys.stderr, flush=True)
    for backend in arguments.backends:
        facts[backend] = comparison.judge(backend, script, decode)
        print(backend, json.dumps(facts[backend]), file=sys.stderr, flush=True)
    return facts


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--pixels", default="4000x3000")
    parser.add_argument("--backends", nargs="*", choices=sorted(FLOORS), default=["torch", "onnx"])
    parser.add_argument("--model", type=Path, help="model folder; default: a ViT-B/32 with random weights")
    parser.add_argument("--forward-seconds", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-bench-", dir=arguments.folder) as name:
        facts = compare(Path(name), arguments)
    print_json(facts, n=1)
    is_reached = True
    for backend in arguments.backends:
        measured = facts[backend]
        is_reached &= measured["times_the_script"] >= FLOORS[backend] and measured["share_of_bound"] >= FLOOR_OF_BOUND
        is_reached &= min(measured["same_by_draft"].values()) >= FLOOR_OF_DRAFT or backend != "torch"
        is_reached &= min(measured.get("same_in_full", {"avg": 1.0}).values()) == 1.0
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
