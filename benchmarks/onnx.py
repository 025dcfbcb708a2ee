"""Compare torch and ONNX Runtime in float32 and int8 with the same model.

    python -m benchmarks.onnx [--model FOLDER] [--cache FOLDER] [--images 32] [--rounds 6] [--threads N] [--no-daemon]
                              [--json]

Without ``--model`` it is a CLIP ViT-B/32 with random weights, on which speed does not depend. Each backend has its own
process. Measured are the load (imports, files, first pass), images per second of the bare encoder on ready pixels at
its best batch size, and the resident memory afterwards; then, by the real program on a small dataset, the seconds from
start to READY and the daemon's resident memory there.

Floors: int8 embeds at least 1.7 times torch's images per second, is READY in at most a third of torch's time, and takes
at most half of torch's memory.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import (
    Claim,
    Piece,
    Side,
    alternate,
    claim_of_ratio,
    conclude,
    interval_of_median,
    ratios,
    say,
    summary,
)
from benchmarks.harness import Helper, answer_requests, argument_parser, resident_mebibytes, write_config
from benchmarks.workload import BACKENDS, allow_int8, check_backend, make_model
from sortd.encoder import models
from sortd.encoder.export import make_exports
from sortd.encoder.onnx_encoder import Exports, Precision
from tests.daemon_process import DaemonProcess, make_dataset

BATCHES = (1, 8, 32)
FLOORS = (1.7, 1 / 3, 1 / 2)
"""Of int8 relative to torch: images a second at least, seconds to READY and memory at most."""


def answer(options: argparse.Namespace) -> None:
    """Load a backend in this process, tell what that took, and embed as many images as each request asks for."""
    began = time.perf_counter()
    from sortd.encoder.backends import load_model

    threads = options.threads or None
    encoder = load_model(options.model, backend=options.inner, cache_dir=options.cache, threads=threads)
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), height, width, 3), dtype=np.uint8)
    encoder.encode_images(pixels[:1])
    load_seconds = time.perf_counter() - began

    def embed(request: dict[str, int]) -> dict[str, float]:
        size, count = request["batch"], -(-request["images"] // request["batch"])
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            encoder.encode_images(pixels[:size])
        facts = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - busy}
        return {**facts, "count": count * size, "load_seconds": load_seconds, "mebibytes": resident_mebibytes()}

    answer_requests(embed)


def speeds(
    stack: ExitStack, backends: Sequence[str], options: argparse.Namespace
) -> tuple[dict[str, Side], dict[str, Any]]:
    """Start a process for each backend; return sides at the best batch size, and what each load took."""
    sides: dict[str, Side] = {}
    facts: dict[str, Any] = {}
    for backend in backends:
        arguments = ["--inner", backend, "--model", options.model, "--cache", str(options.cache)]
        helper = stack.enter_context(Helper("benchmarks.onnx", *arguments, "--threads", str(options.threads)))
        tried = [{"batch": size, "images": options.images} for size in BATCHES for _ in range(2)]
        answers = [(helper.ask(request), request["batch"]) for request in tried][1:]  # the first one takes longer
        found, best = min(answers, key=lambda pair: float(pair[0]["seconds"] / pair[0]["count"]))
        facts[backend] = {"best_batch": best, "load_seconds": round(found["load_seconds"], 2)}
        facts[backend] |= {"mebibytes": round(answers[-1][0]["mebibytes"])}
        sides[backend] = partial(_embed, helper, best, options.images)
    return sides, facts


def _embed(helper: Helper, batch: int, images: int) -> Piece:
    found = helper.ask({"batch": batch, "images": images})
    return Piece(found["count"], found["seconds"], found["processor_seconds"])


def start_daemon(config: Path, backend: str, memory: list[float], threads: int) -> Piece:
    """Start sortd and stop it; return the seconds to READY, and append its memory then, decoders not counted."""
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    began = time.perf_counter()
    with DaemonProcess(config, program="sortd", environment=environment) as daemon:
        ready = daemon.wait_for("daemon.ready", seconds=600)
        seconds = time.perf_counter() - began
        memory.append(resident_mebibytes(daemon.process.pid))
        check_backend(ready["encoder_id"], backend)
    return Piece(1, seconds)


def measure_starts(
    exported: Exports, backend: str, options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, list[Piece]], dict[str, list[float]]]:
    """Start sortd with torch and with another backend, in turns; return the starts, and the memory at READY."""
    memory: dict[str, list[float]] = {}
    starts: dict[str, Side] = {}
    for one in ("torch", backend):
        place = scratch / one
        make_dataset(place / "Data", references=12)
        if one == "onnx-int8":
            allow_int8(exported, place / "Data")
        keys = {"model": options.model, "cache_dir": options.cache, "threads": options.threads, "mode": "max"}
        config = write_config(place, backend=one.partition("-")[0], **keys)
        start_daemon(config, one, [], options.threads)  # embeds the references
        memory[one] = []
        starts[one] = partial(start_daemon, config, one, memory[one], options.threads)
    return alternate(starts, rounds=options.rounds), memory


def compare(options: argparse.Namespace, scratch: Path) -> int:
    """Measure, print and return the exit code."""
    began = time.perf_counter()
    exported = make_exports(models.locate_pair(options.model, None, options.cache))
    say(f"exports: {exported.size_bytes / 1e6:.0f} MB, {time.perf_counter() - began:.0f} s")
    has_int8 = Precision.INT8 in exported.precisions
    if not has_int8:
        say("int8 is not faster for this model on this machine and was not kept: there are no floors")
    fastest = "onnx-int8" if has_int8 else "onnx"
    with ExitStack() as stack:
        sides, facts = speeds(stack, BACKENDS if has_int8 else BACKENDS[:2], options)
        pieces = alternate(sides, rounds=options.rounds)
    least, most_start, most_memory = FLOORS if has_int8 else (None, None, None)
    claims = [claim_of_ratio(f"{fastest} over torch, images a second", pieces, fastest, "torch", least=least)]
    shown = summary(pieces)
    if options.daemon:
        started, memory = measure_starts(exported, fastest, options, scratch)
        shown |= {f"{backend}: start to READY": found for backend, found in summary(started).items()}
        shares = [ours / theirs for ours, theirs in zip(memory[fastest], memory["torch"], strict=True)]
        times = interval_of_median(ratios(started["torch"], started[fastest]))
        claims += [
            Claim(f"{fastest} relative to torch, seconds from start to READY", times, most=most_start),
            Claim(f"{fastest} relative to torch, memory at READY", interval_of_median(shares), most=most_memory),
        ]
        for backend, found in memory.items():
            facts[backend]["daemon_mebibytes"] = round(statistics.median(found))
    return conclude(shown, claims, as_json=options.json, rounds=options.rounds, more=facts)


def main() -> int:
    """Print the comparison; exit 1 if a floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=6)
    parser.add_argument("--model")
    parser.add_argument("--cache", type=Path, help="folder of the exports; default: a temporary one")
    parser.add_argument("--images", type=int, default=32, help="for each backend and round")
    parser.add_argument("--threads", type=int, default=0, help="of a forward pass; default: the number of cores")
    parser.add_argument("--no-daemon", dest="daemon", action="store_false")
    parser.add_argument("--inner", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.inner:
        answer(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="sortd-bench-") as folder:
        scratch = Path(folder)
        options.model = options.model or str(make_model(scratch / "model"))
        options.cache = options.cache or scratch / "cache"
        return compare(options, scratch)


if __name__ == "__main__":
    sys.exit(main())
