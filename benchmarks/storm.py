"""Check that a real daemon keeps filing, answering its watchdog and its signals during storms of events.

    make       3,000 folders are made in Dataset/
    move       400 folders of 10 images are moved into Images/
    rename     10,000 renames in 8 seconds, in each of Images/, Clases/, Dataset/ and Review/

Each storm has its own daemon: the real command, loop, worker, moves and inotify, with the encoder of the tests.
One image is added when the storm begins and one when it has ended, and both are timed until filed; then the storm
is repeated, with a SIGTERM in it. While Clases/ changes nothing moves, by design, so only the second image counts.
The daemon notifies a watchdog, as under systemd, in every turn of its loop ``PING_SECONDS`` after the last time: the
longest interval, less that, is the longest gap between two turns. The status file has the longest turn too.

The exit code is 1 if a limit is not met.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_json, processor_seconds, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture

PING_SECONDS = 0.05
SETTLE_SECONDS = 1.0
SETTINGS = {"settle_seconds": SETTLE_SECONDS, "mode": "max", "abstain": "off", "guard": False}
FLOORS = {
    "longest_gap_seconds": 0.5,
    "filed_beyond_settle_seconds": 2.0,
    "stopped_after_seconds": 5.0,
    "files_looked_at_per_file": 3.0,
}

Storm = Callable[[Path, Path, str], int]
"""Makes a storm in a dataset, with a folder outside it and a name; returns how many files were moved into Images/."""


class Watchdog:
    """Replaces systemd: records the times of a daemon's watchdog notifications."""

    def __init__(self, folder: Path) -> None:
        """Start to listen."""
        self.pings: list[float] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(folder / "notify"))
        self.environment = {
            "NOTIFY_SOCKET": os.fspath(folder / "notify"),
            "WATCHDOG_USEC": str(round(2e6 * PING_SECONDS)),
        }
        self._thread = threading.Thread(target=self._listen, name="watchdog")
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            if message == b"WATCHDOG=1":
                self.pings.append(time.monotonic())

    def longest_gap(self, began: float, ended: float) -> float:
        """Return the longest time between two turns, in seconds, by the notifications."""
        times = [began, *(ping for ping in self.pings if began < ping < ended), ended]
        gaps = [after - before for before, after in pairwise(times)]
        return max(0.0, max(gaps) - PING_SECONDS)

    def close(self) -> None:
        """End the thread."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self.environment["NOTIFY_SOCKET"])
        self._thread.join()
        self._socket.close()


@contextmanager
def watched(folder: Path) -> Iterator[Watchdog]:
    """Listen to a daemon for a while."""
    watchdog = Watchdog(folder)
    try:
        yield watchdog
    finally:
        watchdog.close()


# ------------------------------------------------------------ storms


def make_folders(dataset: Path, _: Path, name: str, folders: int = 3000) -> int:
    """Create folders in Dataset/."""
    for number in range(folders):
        (dataset / "Dataset" / f"{name} {number}").mkdir()
    return 0


def move_folders(dataset: Path, outside: Path, name: str, folders: int = 400, files: int = 10) -> int:
    """Move folders of images into Images/."""
    images = [picture("red", seed, (32, 32)) for seed in range(8)]
    for folder in range(folders):
        (outside / f"{name} {folder}").mkdir()
        for file in range(files):
            images[file % len(images)].save(outside / f"{name} {folder}" / f"{folder} {file}.png")
    for folder in range(folders):
        (outside / f"{name} {folder}").rename(dataset / "Images" / f"{name} {folder}")
    return folders * files


def rename_in(area: str, renames: int = 10_000, seconds: float = 8.0, files: int = 20) -> Storm:
    """Return the storm that renames files of an area, and folders of it, evenly over the time."""

    def storm(dataset: Path, _: Path, name: str) -> int:
        folder = dataset / area / ("red" if area != "Images" else "album")
        folder.mkdir(parents=True, exist_ok=True)
        names = [folder / f"{name} {number} 0.txt" for number in range(files)]
        for path in names:
            path.write_text("no image")
        began = time.monotonic()
        for count in range(renames):
            number = count % files
            names[number] = names[number].rename(names[number].with_name(f"{name} {number} {count}.txt"))
            if (wait := began + seconds * count / renames - time.monotonic()) > 0:
                time.sleep(wait)
        return renames if area == "Images" else 0

    return storm


STORMS: dict[str, Storm] = {
    "make": make_folders,
    "move": move_folders,
    **{f"rename {area}": rename_in(area) for area in ("Images", "Clases", "Dataset", "Review")},
}


# ------------------------------------------------------------ measuring


def status(folder: Path) -> dict[str, Any]:
    """Return the status of the daemon."""
    facts: dict[str, Any] = json.loads((folder / "state" / "status.json").read_text(encoding="utf-8"))
    return facts


def drop(daemon: DaemonProcess, folder: Path, dataset: Path, name: str) -> float:
    """Add an image, and return the seconds until it was filed, less the settle time."""
    beside = folder / name
    picture("green", 7, (64, 64)).save(beside)
    dropped = time.monotonic()
    path = beside.rename(dataset / "Images" / name)
    daemon.wait_for("image.filed", path=os.fspath(path), seconds=300)
    return time.monotonic() - dropped - SETTLE_SECONDS


@contextmanager
def under_way(storm: Callable[[], object]) -> Iterator[None]:
    """Run a storm in the background, and wait for its end."""
    thread = threading.Thread(target=storm, name="storm")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def measure(storm: Storm) -> dict[str, Any]:
    """Run a storm against a daemon."""
    with tempfile.TemporaryDirectory(prefix="sortd-storm-") as name, watched(Path(name)) as watchdog:
        folder = Path(name)
        dataset, outside = make_dataset(folder / "Data"), folder / "outside"
        outside.mkdir()
        with DaemonProcess(write_config(folder, **SETTINGS), environment=watchdog.environment) as daemon:
            daemon.wait_for("daemon.ready")
            drop(daemon, folder, dataset, "first.png")
            before = files_looked_at(folder)
            came: list[int] = []
            began, used = time.monotonic(), processor_seconds(daemon.process.pid)
            with under_way(lambda: came.append(storm(dataset, outside, "first"))):
                during = drop(daemon, folder, dataset, "during.png")
            after = drop(daemon, folder, dataset, "after.png")
            daemon.wait_for("image.filed", count=3 + (came[0] if storm is move_folders else 0), seconds=600)
            ended, used = time.monotonic(), processor_seconds(daemon.process.pid) - used
            time.sleep(2.5)  # the status file is written every two seconds
            looked, told = files_looked_at(folder), status(folder).get("longest_turn_seconds")
            with under_way(lambda: storm(dataset, outside, "second")):
                time.sleep(0.5 if storm is not move_folders else 3.0)  # its images are made first
                stopping = time.monotonic()
                code = daemon.stop(signal.SIGTERM)
                stopped = time.monotonic() - stopping
        result: dict[str, Any] = {
            "seconds": round(ended - began, 1),
            "processor_seconds": round(used, 1),
            "longest_gap_seconds": round(watchdog.longest_gap(began, ended), 3),
            "longest_turn_seconds_told": told,
            "filed_beyond_settle_seconds": round(after if storm is STORMS["rename Clases"] else max(during, after), 3),
            "of_these_dropped": {"in_the_storm": round(during, 3), "after_it": round(after, 3)},
            "stopped_after_seconds": round(stopped, 3),
            "exit_code": code,
        }
        if looked is not None and before is not None and came[0]:
            result |= {"files": came[0] + 2, "files_looked_at": looked - before}
            result["files_looked_at_per_file"] = round((looked - before) / (came[0] + 2), 2)
        return result


def files_looked_at(folder: Path) -> int | None:
    """Return the daemon's count of file checks."""
    value = status(folder)["datasets"]["Colours"].get("files_looked_at")
    return None if value is None else int(value)


def main() -> int:
    """Print the requested measurements."""
    parser = argument_parser(__doc__)
    parser.add_argument("what", nargs="*", default=list(STORMS), help=", ".join(STORMS))
    arguments = parser.parse_args()
    results = {}
    for what in arguments.what:
        results[what] = measure(STORMS[what])
        if not arguments.json:
            print(what, json.dumps(results[what]), flush=True)
    missed = [
        f"{what}: {figure} is {result[figure]}, at most {floor} is wanted"
        for what, result in results.items()
        for figure, floor in FLOORS.items()
        if result.get(figure, 0.0) > floor
    ]
    if arguments.json:
        print_json({"storms": results, "floors": FLOORS, "missed": missed}, n=1)
    else:
        print("\n".join(missed) or "all floors are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
