"""Compare torch and ONNX Runtime in float32 and int8 with the same model.

    python -m benchmarks.onnx [--model FOLDER] [--cache FOLDER] [--images 96] [--threads N] [--no-daemon] [--json]
    python -m benchmarks.onnx --verdict [--photos FOLDER ...] [--references 20] [--model FOLDER] [--json]

Without ``--model`` it is a CLIP ViT-B/32 with random weights, on which speed does not depend. Each backend runs in its
own processes, in turns. Measured are the load (imports, files, first pass), images
per second of the bare encoder on ready pixels at its best batch size, and the resident memory afterwards; then, by the
real program on a small dataset, the seconds from start to READY and the daemon's resident memory there.

Floors: int8 embeds at least 1.7 times torch's images per second, is READY in at most a third of torch's time, and takes
at most half of torch's memory.

``--verdict`` measures the seconds of the verdict on int8, without the export: with an empty cache, and with the rows
that torch left there. References are drawn pictures of three classes, or photos, a dataset for each folder.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoder import build_reference
from benchmarks.harness import argument_parser, print_json, resident_mebibytes, used_seconds, write_config
from sortd.commands.precision import judge_int8
from sortd.config import Config, read_config
from sortd.daemon.references import References
from sortd.daemon.resources import Resources, reference_settings_of
from sortd.encoder import models
from sortd.encoder import onnx_encoder as exports
from sortd.encoder.export import make_exports
from sortd.layout import Area, find_datasets
from tests.daemon_process import DaemonProcess, make_dataset

BACKENDS = ("torch", "onnx", "onnx-int8")
BATCHES = (1, 8, 32)
FLOORS = {"images_per_second": 1.7, "ready_seconds": 1 / 3, "daemon_mebibytes": 1 / 2}


def measure_here(model: str, cache: Path, backend: str, images: int, threads: int) -> dict[str, float]:
    """Load one backend in this process and time it; seconds are of the clock on the wall, ``cpu`` of the processor."""
    began, began_cpu = time.perf_counter(), time.process_time()
    from sortd.encoder.backends import load_encoder

    encoder = load_encoder(model, backend=backend, cache_dir=cache, threads=threads)
    facts = {"load_seconds": time.perf_counter() - began, "load_cpu_seconds": time.process_time() - began_cpu}
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, 3), dtype=np.uint8)
    for batch in BATCHES:
        encoder.encode_images(pixels[:batch])
        count = max(1, images // batch)
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            encoder.encode_images(pixels[:batch])
        facts[f"images_per_second_{batch}"] = count * batch / (time.perf_counter() - began)
        facts[f"cpu_milliseconds_{batch}"] = 1000 * (time.process_time() - began_cpu) / count / batch
    return {**facts, "mebibytes": resident_mebibytes()}


def measure(model: str, cache: Path, backend: str, images: int, threads: int) -> dict[str, float]:
    """Measure one backend in a new process."""
    inner = ["--inner", backend, "--model", model, "--cache", str(cache), "--images", str(images)]
    command = [sys.executable, "-m", "benchmarks.onnx", *inner, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def start_daemon(model: str, cache: Path, backend: str, scratch: Path, threads: int) -> dict[str, float]:
    """Start sortd on a small dataset; return seconds to READY and its memory then, decoders not counted."""
    config = scratch / f"{backend}.yaml"
    if not (scratch / "Data").exists():
        make_dataset(scratch / "Data", references=12)
    values = {"root": scratch / "Data", "model": model, "state_dir": scratch / "state", "cache_dir": cache}
    values |= {"backend": backend.partition("-")[0], "threads": threads, "mode": "max"}
    config.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), "utf-8")
    began = time.perf_counter()
    environment = {} if not threads else {"OMP_NUM_THREADS": str(threads)}
    with DaemonProcess(config, program="sortd", environment=environment) as daemon:
        ready = daemon.wait_for("daemon.ready", seconds=600)
        facts = {
            "ready_seconds": time.perf_counter() - began,
            "daemon_mebibytes": resident_mebibytes(daemon.process.pid),
        }
        if backend not in ready["encoder_id"]:
            raise SystemExit(f"{backend} was to serve, but {ready['model']} does")
        daemon.stop()
    return facts


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure; the best batch size decides on images per second."""
    facts = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    speeds = {key: value for key, value in facts.items() if key.startswith("images_per_second_")}
    return facts | ({"images_per_second": max(speeds.values())} if speeds else {})


def compare(model: str, cache: Path, options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Measure all backends in turns."""
    folder = models.locate_pair(model, None, cache)
    began = time.perf_counter()
    found = exports.find_exports(folder) or make_exports(folder)
    print(f"exports: {found.size_bytes / 1e6:.0f} MB, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    backends = [one for one in BACKENDS if one != "onnx-int8" or len(found.precisions) > 1]
    runs: dict[str, list[dict[str, float]]] = {backend: [] for backend in backends}
    for _ in range(options.rounds):
        for backend in backends:
            runs[backend].append(measure(model, cache, backend, options.images, options.threads))
    results = {backend: medians(runs[backend]) for backend in backends}
    print(json.dumps(results), file=sys.stderr)
    if options.daemon:
        served = [backend for backend in backends if backend != "onnx" or len(backends) < len(BACKENDS)]
        starts: dict[str, list[dict[str, float]]] = {backend: [] for backend in served}
        for backend in served:  # the first start of each embeds the references, and judges int8
            start_daemon(model, cache, backend, scratch, options.threads)
        for _ in range(options.rounds):
            for backend in served:
                starts[backend].append(start_daemon(model, cache, backend, scratch, options.threads))
        for backend in served:
            results[backend] |= medians(starts[backend])
    return results


def shown(results: dict[str, dict[str, float]]) -> bool:
    """Print the figures side by side, with their ratio to torch; tell whether the floors hold."""
    keys = list(dict.fromkeys(key for facts in results.values() for key in facts))
    print(f"{'':24}" + "".join(f"{backend:>22}" for backend in results))
    for key in keys:
        cells = []
        for facts in results.values():
            ratio = facts[key] / results["torch"][key] if key in facts else float("nan")
            cells.append(f"{facts.get(key, float('nan')):12.2f}  ({ratio:5.2f})")
        print(f"{key:24}" + "".join(f"{cell:>22}" for cell in cells))
    quickest = results.get("onnx-int8")
    if quickest is None:
        print("int8 does not pay for this model on this machine and was not kept")
        return True
    holds = True
    for key, floor in FLOORS.items():
        if key in quickest:
            ratio = quickest[key] / results["torch"][key]
            kept = ratio >= floor if floor > 1 else ratio <= floor
            holds &= kept
            print(f"{key}: {ratio:.2f}, floor {floor:.2f}: {'held' if kept else 'MISSED'}")
    return holds


def measure_verdict(model: str, cache: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the seconds of the verdict, of the clock and of the processors, by what the cache holds."""
    root = scratch / "Data"
    for folder in options.photos:
        for one in sorted(path for path in folder.iterdir() if path.is_dir()):
            (root / folder.name / "Images").mkdir(parents=True, exist_ok=True)
            (target := root / folder.name / "Clases" / one.name).mkdir(parents=True)
            for photo in sorted(one.iterdir())[: options.references]:
                shutil.copy(photo, target)
    if not options.photos:
        make_dataset(root, references=options.references)
    config = read_config(write_config(scratch, model=model, cache_dir=cache, backend="torch"), {"HOME": str(scratch)})
    exported = make_exports(models.locate_configured(config))
    facts: dict[str, Any] = {}
    for before in ("nothing cached", "float32 cached", "all cached"):
        if before == "float32 cached":
            for file in cache.glob("embeddings.sqlite*"):
                file.unlink()
            embed_all(config)
        began, began_cpu = time.perf_counter(), used_seconds()
        verdict = judge_int8(config, exported, lambda _: None)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": used_seconds() - began_cpu}
        chosen = ("serves", "references", "filed", "same", "mean_cosine")
        facts[before] = {key: round(value, 1) for key, value in seconds.items()} | {key: verdict[key] for key in chosen}
    return facts


def embed_all(config: Config) -> None:
    """Embed the references as a daemon with torch does."""
    resources = Resources(config)
    embedder, _, _ = resources.load()
    for layout in find_datasets(config.root):
        References(layout.area(Area.CLASES)).support(embedder, reference_settings_of(config.dataset(layout.name)))
    resources.unload()


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--cache", type=Path, help="folder of the exports; default: a temporary one")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of a forward pass; default: the number of cores"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each backend, of which the medians are shown"
    )
    parser.add_argument("--no-daemon", dest="daemon", action="store_false")
    parser.add_argument("--verdict", action="store_true", help="measure the verdict on int8 instead")
    parser.add_argument("--photos", type=Path, nargs="*", default=[])
    parser.add_argument("--references", type=int, default=20, help="references of each class, for --verdict")
    parser.add_argument("--inner", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.inner:
        print(json.dumps(measure_here(options.model, options.cache, options.inner, options.images, options.threads)))
        return 0
    with tempfile.TemporaryDirectory(prefix="sortd-bench-") as folder:
        scratch = Path(folder)
        model = options.model
        if model is None:
            (scratch / "vit").mkdir()
            model = str(build_reference(scratch / "vit"))
        if options.verdict:
            print_json(measure_verdict(model, options.cache or scratch / "cache", options, scratch), n=1)
            return 0
        results = compare(model, options.cache or scratch / "cache", options, scratch)
    if options.json:
        print_json(results, n=options.rounds)
        return 0
    return 0 if shown(results) else 1


if __name__ == "__main__":
    sys.exit(main())
