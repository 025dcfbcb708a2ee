"""Compare the speed of ``sortd once`` with that of the bare model, for images that decode fast.

    python -m benchmarks.efficiency [--photos 600] [--pixels 640x480] [--backends torch onnx] [--json]

The bare forward on tensors that are ready, at its best batch, is measured before and after ``sortd once`` files JPEGs
of 0.3 megapixels, each run in turn; images filed per second over images forwarded per second is the efficiency: all
that reading, decoding, hashing, caching, deciding, journaling and moving take away. Loading the model and embedding
the references do not count. The floors: 0.85 with torch, 0.7 with ONNX int8.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_json, write_config
from benchmarks.workload import (
    forward_seconds,
    make_model,
    make_photos,
    make_references,
    onnx_forward,
    put,
    run_once,
    torch_forward,
)

FLOORS = {"torch": 0.85, "onnx": 0.7}
CLASSES = 10
REFERENCES = 40


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Create the data, and yield each backend with its figures."""
    width, height = (int(side) for side in arguments.pixels.split("x"))
    model, dataset = arguments.model or make_model(folder / "model"), folder / "Data" / "Photos"
    make_references(dataset / "Clases", classes=CLASSES, references=REFERENCES, size=(width, height))
    make_photos(folder / "photos", classes=CLASSES, photos=arguments.photos, size=(width, height))
    for backend in arguments.backends:
        yield backend, _measure_backend(folder, dataset, model, backend, arguments)


def _measure_backend(
    folder: Path, dataset: Path, model: Path, backend: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    config = write_config(
        folder,
        model=model,
        backend=backend,
        abstain="off",
        settle_seconds=0.1,
    )
    for area in ("Images", "Dataset"):
        shutil.rmtree(dataset / area, ignore_errors=True)
    run_once(config)
    bare = torch_forward(model) if backend == "torch" else onnx_forward(model, folder / "cache")
    before = forward_seconds(bare, seconds=arguments.forward_seconds)
    put(folder / "photos", dataset / "Images")
    run = run_once(config)
    after = forward_seconds(bare, seconds=arguments.forward_seconds)
    forward = {size: statistics.fmean((before[size], after[size])) for size in before}
    best = min(forward, key=lambda size: forward[size])
    return {
        "encoder_id": run.encoder_id,
        "photos": len(run.outcomes),
        "images_per_second": round(run.images_per_second, 2),
        "forward_per_second": round(1 / forward[best], 2),
        "best_batch": best,
        "efficiency": round(run.images_per_second * forward[best], 3),
        "floor": FLOORS[backend],
        "stages_ms": {name: round(value, 1) for name, value in run.stages.items()},
        "start_seconds": round(run.start_seconds, 1),
        "resident_mebibytes": round(run.resident_mebibytes),
    }


def main() -> int:
    """Print the figures; exit 1 if a floor is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--pixels", default="640x480")
    parser.add_argument("--backends", nargs="*", choices=sorted(FLOORS), default=["torch", "onnx"])
    parser.add_argument("--model", type=Path, help="model folder; default: a ViT-B/32 with random weights")
    parser.add_argument("--forward-seconds", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-bench-", dir=arguments.folder) as name:
        facts = {}
        for backend, measured in measure(Path(name), arguments):
            facts[backend] = measured
            if not arguments.json:
                print(backend, json.dumps(measured), flush=True)
    if arguments.json:
        print_json(facts, n=1)
    return 0 if all(facts[backend]["efficiency"] >= FLOORS[backend] for backend in facts) else 1


if __name__ == "__main__":
    sys.exit(main())
