"""Measure the daemon: start-up, latency of a single image, idle load, and a burst of four datasets.

    python -m benchmarks.daemon [startup] [latency] [newest] [idle] [burst] [--photos FOLDER] [--model MODEL] [--json]

Everything runs in a temporary folder, with the real program as a process of its own.

    startup   seconds of `sortd --help` and `sortd check`, beside those of a bare `python -c pass`
    latency   from the last byte of a lone file to its move, less the settle time; median and 95th percentile
    newest    a file that is dropped while 10,000 wait: how many others are filed between its settling and its filing
    idle      processor seconds that a minute of doing nothing costs, in per cent of a core
    burst     FOLDER/<dataset>/<class>/* as datasets with six references a class, the rest dropped in one burst by
              another process: by slow writes, by rename, as whole folders; every content must then stand in one place
"""

import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.comparison import Side, alternate, interval_of_median, timed
from benchmarks.harness import (
    REPOSITORY,
    argument_parser,
    print_json,
    processor_seconds,
    resident_mebibytes,
    write_config,
)
from tests.daemon_process import COLOURS, DaemonProcess, make_dataset, picture

REFERENCES = 6


def measure_startup(folder: Path, model: str) -> dict[str, Any]:
    """Time the fast commands in alternating rounds."""
    make_dataset(folder / "Data")
    config = write_config(folder, model=model)
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "help": [sys.executable, "-m", "sortd", "--help"],
        "check": [sys.executable, "-m", "sortd", "check", "-c", str(config)],
    }

    def side(command: list[str]) -> Side:
        def work() -> int:
            subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY)
            return 1

        return timed(work)

    pieces = alternate({name: side(command) for name, command in commands.items()}, rounds=6)
    figures: dict[str, Any] = {}
    for name, done in pieces.items():
        found = interval_of_median(piece.seconds for piece in done)
        figures[f"{name}_seconds"] = round(found.median, 3)
        figures[f"{name}_seconds_interval"] = [round(found.low, 3), round(found.high, 3)]
    return figures


def measure_latency(folder: Path, model: str, *, drops: int = 60, settle_seconds: float = 1.0) -> dict[str, Any]:
    """Add single images, and time each from its last byte to its move, by the log and the file system."""
    dataset = make_dataset(folder / "Data")
    config = write_config(folder, model=model, settle_seconds=settle_seconds, abstain="off")
    beyond = []
    with DaemonProcess(config, program="sortd") as daemon:
        daemon.wait_for("daemon.ready", seconds=180)
        for number in range(drops):
            path = dataset / "Images" / f"{number}.jpg"
            picture(random.Random(number).choice(sorted(COLOURS)), number, (640, 480)).save(path)
            written = time.monotonic()
            while path.exists():
                time.sleep(0.002)
            beyond.append(1e3 * (time.monotonic() - written - settle_seconds))
        daemon.stop()
    ordered = sorted(beyond)
    return {
        "drops": drops,
        "settle_seconds": settle_seconds,
        "beyond_settle_ms_median": round(statistics.median(ordered), 1),
        "beyond_settle_ms_p95": round(ordered[int(0.95 * len(ordered))], 1),
        "floor_ms_median": 30,
        "floor_ms_p95": 45,
    }


def measure_newest(folder: Path, model: str, *, backlog: int = 10_000, drops: int = 5) -> dict[str, Any]:
    """Add files one by one while many wait, and count the images that are filed before each.

    The floor: two batches, 64 images.
    """
    dataset, settle_seconds, batch_size = make_dataset(folder / "Data"), 1.0, 32
    dice = np.random.default_rng(0)
    for number in range(backlog):
        pixels = dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(dataset / "Images" / f"waits {number:05}.jpg")
    keys = {"settle_seconds": settle_seconds, "abstain": "off", "guard": "false", "batch_size": batch_size}
    config = write_config(folder, model=model, **keys)
    before = []
    with DaemonProcess(config, program="sortd") as daemon:
        daemon.wait_for("image.filed", count=2 * batch_size, seconds=300)
        for number in range(drops):
            path = dataset / "Images" / f"newest {number}.jpg"
            picture("red", number, (640, 480)).save(folder / path.name)
            (folder / path.name).rename(path)
            until = time.monotonic() + settle_seconds
            while time.monotonic() < until:
                time.sleep(0.001)
            filed = len(daemon.events("image.filed"))
            daemon.wait_for("image.filed", path=str(path), seconds=300)
            order = [line["path"] for line in daemon.events("image.filed")]
            before.append(max(0, order.index(str(path)) - filed))
        left = backlog + drops - len(daemon.events("image.filed"))
        daemon.stop()
    return {
        "backlog": backlog,
        "left_at_the_end": left,
        "filed_before_it": before,
        "most_filed_before_it": max(before),
        "floor": 2 * batch_size,
    }


def measure_idle(folder: Path, model: str, *, seconds: float = 60.0) -> dict[str, Any]:
    """Measure the daemon while it is idle."""
    make_dataset(folder / "Data")
    with DaemonProcess(write_config(folder, model=model), program="sortd") as daemon:
        daemon.wait_for("daemon.ready", seconds=180)
        time.sleep(5)
        before = processor_seconds(daemon.process.pid)
        time.sleep(seconds)
        used = processor_seconds(daemon.process.pid) - before
        daemon.stop()
    return {"seconds": seconds, "percent_of_a_core": round(100 * used / seconds, 2)}


DROPPER = """
import os, shutil, sys, time
from pathlib import Path
source, target = Path(sys.argv[1]), Path(sys.argv[2])
for dataset in sorted(source.iterdir()):
    files = sorted(dataset.rglob("*.*"))
    inbox = target / dataset.name / "Images"
    for number, file in enumerate(files):
        name = f"{file.parent.name}_{file.name}"
        if number % 50 == 0:
            content = file.read_bytes()
            with (inbox / name).open("wb") as out:
                for start in range(0, len(content), max(1, len(content) // 4)):
                    out.write(content[start:start + max(1, len(content) // 4)]); out.flush(); time.sleep(0.05)
        elif number % 3 == 0:
            shutil.copyfile(file, inbox / f".{name}.part"); os.rename(inbox / f".{name}.part", inbox / name)
        elif number % 3 == 1:
            shutil.copyfile(file, inbox / name)
        else:
            folder = source.parent / "whole" / dataset.name; folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    whole = source.parent / "whole" / dataset.name
    if whole.is_dir():
        os.rename(whole, inbox / "album")
"""


def contents(root: Path) -> Counter[str]:
    """Count every content below the datasets' folders that hold images, by sha256."""
    found: Counter[str] = Counter()
    for area in ("Images", "Dataset", "Review", "Rejected"):
        for path in root.glob(f"*/{area}/**/*"):
            if path.is_file() and not path.name.endswith(".reason.json"):
                found[hashlib.sha256(path.read_bytes()).hexdigest()] += 1
    return found


def measure_burst(folder: Path, model: str, photos: Path) -> dict[str, Any]:
    """Add all images at once, and check that each content is in exactly one place and logged once."""
    root, incoming = folder / "Data", folder / "incoming"
    dropped = 0
    for dataset in sorted(path for path in photos.iterdir() if path.is_dir()):
        for label in sorted(path for path in dataset.iterdir() if path.is_dir()):
            files = sorted(label.iterdir())
            random.Random(label.name).shuffle(files)
            for number, file in enumerate(files):
                kind = root / dataset.name / "Clases" if number < REFERENCES else incoming / dataset.name
                (kind / label.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, kind / label.name / file.name)
                dropped += number >= REFERENCES
        (root / dataset.name / "Images").mkdir()
    expected = Counter(hashlib.sha256(p.read_bytes()).hexdigest() for p in incoming.rglob("*") if p.is_file())
    config = write_config(folder, root=root, model=model)
    memory = []
    with DaemonProcess(config, program="sortd") as daemon:
        daemon.wait_for("daemon.ready", seconds=300)
        began = time.monotonic()
        dropper = subprocess.Popen([sys.executable, "-c", DROPPER, str(incoming), str(root)])
        outcomes = ("image.filed", "image.sent_to_review", "image.rejected")
        while sum(len(daemon.events(outcome)) for outcome in outcomes) < dropped:
            memory.append(round(resident_mebibytes(daemon.process.pid)))
            if time.monotonic() - began > 1200 or daemon.process.poll() is not None:
                break
            time.sleep(1)
        seconds = time.monotonic() - began
        dropper.wait()
        time.sleep(5)
        lines = [line for outcome in outcomes for line in daemon.events(outcome)]
        daemon.stop()
    quarters = [memory[int(len(memory) * share)] for share in (0.25, 0.5, 0.75)] + memory[-1:]
    return {
        "dropped": dropped,
        "seconds": round(seconds, 1),
        "lines": len(lines),
        "lines_for_different_files": len({line["path"] for line in lines}),
        "contents_unchanged_and_once": contents(root) == expected,
        "left_in_images": sum(1 for path in root.glob("*/Images/**/*") if path.is_file()),
        "outcomes": dict(Counter(line["event"] for line in lines)),
        "resident_mebibytes_at_quarters": quarters,
        "resident_mebibytes_peak": max(memory),
    }


def main() -> None:
    """Print the requested measurements."""
    parser = argument_parser(__doc__)
    parser.add_argument("what", nargs="*", default=["startup", "latency", "idle"])
    parser.add_argument("--photos", type=Path, default=REPOSITORY.parent / "shared" / "data" / "photos")
    parser.add_argument("--model", default="packaged")
    arguments = parser.parse_args()
    results = {}
    for what in arguments.what:
        with tempfile.TemporaryDirectory(prefix="sortd-bench-") as name:
            folder = Path(name)
            match what:
                case "startup":
                    results[what] = measure_startup(folder, arguments.model)
                case "latency":
                    results[what] = measure_latency(folder, arguments.model)
                case "newest":
                    results[what] = measure_newest(folder, arguments.model)
                case "idle":
                    results[what] = measure_idle(folder, arguments.model)
                case "burst":
                    results[what] = measure_burst(folder, arguments.model, arguments.photos)
                case _:
                    parser.error(f"{what} is none of startup, latency, newest, idle, burst")
        if not arguments.json:
            print(what, json.dumps(results[what]), flush=True)
    if arguments.json:
        print_json(results, n=1)


if __name__ == "__main__":
    main()
