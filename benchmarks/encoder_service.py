"""Compare the encoder of another process (`sortd encode`) with one in the process: speed, processor time, memory.

    python -m benchmarks.encoder_service [--model packaged|vit-b-32|FOLDER] [--rounds 5] [--images 256] [--batch 32]
                                         [--threads N] [--memory] [--json]

Rounds alternate: the encoder in this process, then the same model behind a socket, by one client and by two at once.
The floor: the service, with one client, embeds at least 0.9 of the images per second, by the median of the rounds.
`--memory` starts two daemons with a model each, then two with one encoder process (resident memory without decoders).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import argument_parser, print_json, processor_seconds, resident_mebibytes, write_config
from benchmarks.workload import make_model
from sortd.arrays import Pixels
from sortd.config import read_config
from sortd.encoder.backends import load_fastest
from sortd.encoder.clip import Encoder
from sortd.encoder.remote import RemoteEncoder
from tests.daemon_process import DaemonProcess, make_dataset

FLOOR = 0.9


@contextmanager
def service(config: Path, socket: Path) -> Iterator[int]:
    """Start `sortd encode`, wait until it is ready, and yield its process number."""
    command = [sys.executable, "-m", "sortd", "encode", "--config", str(config), "--socket", str(socket)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"SORTD_LOG__FORMAT": "json"}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and json.loads(line)["event"] == "encoder.ready":
                break
        else:
            raise SystemExit("sortd encode did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield process.pid
        finally:
            process.terminate()


def embed(encoder: Encoder, pixels: Pixels, batch: int) -> None:
    """Embed pixels in batches, as a daemon does."""
    for start in range(0, len(pixels), batch):
        encoder.encode_images(pixels[start : start + batch])


def embed_at_once(encoders: Sequence[Encoder], pixels: Pixels, batch: int) -> None:
    """Embed pixels, divided among several clients."""
    parts = np.array_split(pixels, len(encoders))
    threads = [
        threading.Thread(target=embed, args=(encoder, part, batch))
        for encoder, part in zip(encoders, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(act: Callable[[], None], images: int, pid: int | None = None) -> dict[str, float]:
    """Return images per second, and milliseconds of the processor for an image, those of a process included."""

    def used() -> float:
        return time.process_time() + (0.0 if pid is None else processor_seconds(pid))

    began, began_used = time.perf_counter(), used()
    act()
    return {
        "images_per_second": images / (time.perf_counter() - began),
        "processor_milliseconds": 1000 * (used() - began_used) / images,
    }


def speeds(config: Path, socket: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the medians of the rounds, and the ratios of each round's figures."""
    local = load_fastest(read_config(config, {}), report=lambda _: None)
    side = local.preprocessing
    shape = (options.images, side.crop_height, side.crop_width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    runs: dict[str, list[dict[str, float]]] = {"in_process": [], "one_client": [], "two_clients": []}
    with service(config, socket) as pid:
        clients = [RemoteEncoder(socket) for _ in range(2)]
        difference = float(np.abs(clients[0].encode_images(pixels[:8]) - local.encode_images(pixels[:8])).max())
        for encoder in (local, *clients):
            embed(encoder, pixels[: 2 * options.batch], options.batch)
        for _ in range(options.rounds):
            runs["in_process"].append(timed(lambda: embed(local, pixels, options.batch), options.images))
            one = timed(lambda: embed(clients[0], pixels, options.batch), options.images, pid)
            runs["one_client"].append(one)
            two = timed(lambda: embed_at_once(clients, pixels, options.batch), options.images, pid)
            runs["two_clients"].append(two)
        for client in clients:
            client.close()
    figures = {
        f"{name}_{key}": round(statistics.median(run[key] for run in found), 2)
        for name, found in runs.items()
        for key in found[0]
    }
    for name in ("one_client", "two_clients"):
        for key, short in (("images_per_second", "speed"), ("processor_milliseconds", "processor")):
            ratios = [run[key] / alone[key] for run, alone in zip(runs[name], runs["in_process"], strict=True)]
            figures[f"{name}_{short}_ratio"] = round(statistics.median(ratios), 3)
    return {**figures, "greatest_difference_of_rows": difference, "floor": FLOOR}


def memory(folder: Path, model: str, socket: Path) -> dict[str, float]:
    """Return the resident memory of two daemons with a model each, and of two with one encoder process."""

    def daemons(backend: str) -> float:
        with ExitStack() as stack:
            total = 0.0
            for name in "AB":
                place = folder / f"{name}-{backend.partition(':')[0]}"
                make_dataset(place / "Data", f"Colours{name}", references=12)
                config = write_config(place, model=model, backend=backend, mode="max")
                daemon = stack.enter_context(DaemonProcess(config, program="sortd"))
                daemon.wait_for("daemon.ready")
                total += resident_mebibytes(daemon.process.pid)
            return total

    alone = daemons("auto")
    with service(write_config(folder / "encoder", model=model), socket) as pid:
        sharing = daemons(f"socket:{socket}")
        encoder = resident_mebibytes(pid)
    return {
        "two_daemons_mebibytes": round(alone, 1),
        "two_clients_mebibytes": round(sharing, 1),
        "encoder_mebibytes": round(encoder, 1),
        "memory_ratio": round((sharing + encoder) / alone, 3),
    }


def main() -> int:
    """Print the comparison; exit 1 if the floor is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = str(make_model(folder / "vit-b-32")) if options.model == "vit-b-32" else options.model
        socket = folder / "encoder.sock"
        if options.memory:
            figures = memory(folder, model, socket)
        else:
            config = write_config(folder, model=model, threads=options.threads, device="cpu")
            figures = speeds(config, socket, options)
    if options.json:
        print_json(figures, n=options.rounds)
    else:
        for name, figure in figures.items():
            print(f"{name:<36}{figure:12.6g}")
    return 0 if figures.get("one_client_speed_ratio", 1.0) >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
