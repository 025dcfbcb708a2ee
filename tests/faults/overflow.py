"""Overflow: more images arrive while the daemon is stopped than the kernel queues events for; all of them are handled.

python -m tests.faults.overflow --files 50000

The daemon gets SIGSTOP, the files are moved in, it gets SIGCONT. Prints as JSON how long the next scan took to find
them and all of it took; status 1 if one is left, lost or doubled, or if nothing was said of the overflow.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.daemon_process import COLOURS, DaemonProcess, make_dataset, picture

QUEUE_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")


def make_flood(folder: Path, files: int) -> Counter[str]:
    """Make images, each another one; return how often each content is there."""
    folder.mkdir()
    seeds = [(colour, picture(colour, seed, (8, 8))) for seed, colour in enumerate(COLOURS)]
    bytes_of = []
    for _, image in seeds:
        path = folder / "seed.bmp"
        image.save(path)
        bytes_of.append(path.read_bytes())
        path.unlink()
    found: Counter[str] = Counter()
    for number in range(files):
        content = bytes_of[number % len(bytes_of)] + b"%08d" % number  # what follows a BMP's pixels is not looked at
        (folder / f"{number}.bmp").write_bytes(content)
        found[hashlib.sha256(content).hexdigest()] += 1
    return found


def flood(folder: Path, files: int, seconds: float) -> dict[str, object]:
    """Flood a daemon that works below a folder, and say what became of the files."""
    dataset = make_dataset(folder / "Data", "Colours")
    config = folder / "config.yaml"
    config.write_text(
        f"root: {folder / 'Data'}\nstate_dir: {folder / 'state'}\ncache_dir: {folder / 'cache'}\nmodel: packaged\n"
        "mode: max\nabstain: off\nguard: no\nsettle_seconds: 0.3\n",
        encoding="utf-8",
    )
    expected = make_flood(folder / "flood", files)
    with DaemonProcess(config) as daemon:
        daemon.wait_for("daemon.ready")
        daemon.send(signal.SIGSTOP)
        for entry in list(os.scandir(folder / "flood")):
            os.rename(entry.path, dataset / "Images" / entry.name)
        began = time.monotonic()
        daemon.send(signal.SIGCONT)
        while daemon.process.poll() is None and time.monotonic() - began < seconds:
            if next(os.scandir(dataset / "Images"), None) is None:
                break
            time.sleep(0.2)
        lasted = time.monotonic() - began
        code = daemon.stop()
        overflows = len(daemon.events("watch.overflowed"))
    there = Counter(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (dataset / "Dataset").rglob("*") if path.is_file()
    )
    return {
        "files": files,
        "kernel_queues": int(QUEUE_LIMIT.read_text()),
        "overflows_told": overflows,
        "exit": code,
        "left": sum(1 for _ in os.scandir(dataset / "Images")),
        "lost": (expected - there).total(),
        "doubled": (there - expected).total(),
        "seconds": round(lasted, 1),
        "files_per_second": round(files / lasted, 1),
    }


def main() -> int:
    """Flood and print what was found; status 1 if something was lost, left or not told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the dataset is made")
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long all of it may take")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="sortd-overflow-"))
    try:
        found = flood(place, arguments.files, arguments.seconds)
    finally:
        shutil.rmtree(place)
    print(json.dumps(found, indent=2))
    is_overflow_due = arguments.files > int(QUEUE_LIMIT.read_text())
    well = (found["left"], found["lost"], found["doubled"], found["exit"]) == (0, 0, 0, 0)
    return 0 if well and (found["overflows_told"] or not is_overflow_due) else 1


if __name__ == "__main__":
    sys.exit(main())
