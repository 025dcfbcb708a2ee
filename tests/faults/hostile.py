"""The hostile set: images made to harm, bombs and special files, dropped into a real daemon; how much memory it takes.

python -m tests.faults.hostile
python -m tests.faults.hostile --corpus ../shared/data/hostile/hostile.tar.xz

Prints as JSON what became of the files and the peak memory over what was held while idle: of the daemon, of a decoder
and of all together. Status 1 if a process died, a file had no outcome in time, a byte changed, or all together took too
much.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bombs import bombs
from tests.daemon_process import DaemonProcess, make_dataset, picture
from tests.faults.gauges import children, own_megabytes

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "hostile" / "hostile.tar.xz"
LIMIT_MEGABYTES = 300.0
OUTCOMES = frozenset({"image.filed", "image.sent_to_review", "image.rejected", "image.left"})
LOOK_SECONDS = 0.02
SPECIAL = ("pipe.png", "socket.png", "zero.png", "shadow.jpg", "loop.png", "folder.png")


class Scales:
    """Weigh a daemon and its children in a thread, as long as it is asked to."""

    def __init__(self, process: int) -> None:
        """Take what they hold now as what they hold while idle."""
        self._process = process
        self.idle = self._weigh()
        self.peaks = dict(self.idle)
        self.peak_of_all = sum(self.idle.values())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scales")

    def _weigh(self) -> dict[int, float]:
        return {process: own_megabytes(process) for process in (self._process, *children(self._process))}

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            weights = self._weigh()
            self.peak_of_all = max(self.peak_of_all, sum(weights.values()))
            for process, megabytes in weights.items():
                self.peaks[process] = max(self.peaks.get(process, 0.0), megabytes)

    @contextmanager
    def weighing(self) -> Iterator[None]:
        """Weigh while the block lasts."""
        self._thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._thread.join()

    def over_idle(self) -> dict[str, float]:
        """Return the highest peak of the daemon, of a decoder and of all together, in megabytes over idle."""
        least_child = min((value for process, value in self.idle.items() if process != self._process), default=0.0)
        grown = {process: peak - self.idle.get(process, least_child) for process, peak in self.peaks.items()}
        decoders = [value for process, value in grown.items() if process != self._process]
        return {
            "daemon": round(grown[self._process], 1),
            "one_decoder": round(max(decoders, default=0.0), 1),
            "all_together": round(self.peak_of_all - sum(self.idle.values()), 1),
        }


def make_special(inbox: Path) -> socket.socket:
    """Put what is no regular file under the names of images; the socket is to be closed."""
    os.mkfifo(inbox / "pipe.png")
    (inbox / "zero.png").symlink_to("/dev/zero")
    (inbox / "shadow.jpg").symlink_to("/etc/shadow")
    (inbox / "loop.png").symlink_to("loop.png")
    (inbox / "folder.png").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(inbox)  # the name of a socket is at most 108 bytes long
    try:
        listener.bind("socket.png")
    finally:
        os.chdir(here)
    return listener


def contents(folder: Path) -> Counter[str]:
    """Count the regular files below a folder by their bytes, but for reasons."""
    return Counter(
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if not path.is_symlink() and path.is_file() and not path.name.endswith(".reason.json")
    )


def fill(staging: Path, corpus: Path) -> int:
    """Make everything that is to be dropped in; return how many files want an outcome."""
    (staging / "bombs").mkdir(parents=True)
    for name, content in bombs().items():
        (staging / "bombs" / name).write_bytes(content)
    with (staging / "bombs" / "holes.png").open("wb") as file:
        file.write(bombs()["black.png"][:40])
        file.truncate(2 << 30)
    if corpus.is_file():
        with tarfile.open(corpus) as archive:
            archive.extractall(staging / "corpus", filter="data")
    for number in range(20):
        picture("green", 5_000 + number).save(staging / f"sound {number}.png")
    return sum(1 for path in staging.rglob("[!.]*") if path.is_file() and not path.is_symlink())


def attack(folder: Path, corpus: Path, seconds: float) -> dict[str, object]:
    """Drop everything into a daemon that works below a folder, and say what became of it."""
    dataset = make_dataset(folder / "Data", "Colours")
    config = folder / "config.yaml"
    config.write_text(
        f"root: {folder / 'Data'}\nstate_dir: {folder / 'state'}\ncache_dir: {folder / 'cache'}\nmodel: packaged\n"
        "mode: max\nabstain: off\nguard: no\nsettle_seconds: 0.3\ndecoding: {timeout_seconds: 20}\n",
        encoding="utf-8",
    )
    staging = folder / "staging"
    wanted = fill(staging, corpus)
    small = contents(staging / "corpus") if corpus.is_file() else Counter[str]()
    with DaemonProcess(config) as daemon, make_special(dataset / "Images"):
        daemon.wait_for("daemon.ready")
        picture("red", 1).save(dataset / "Images" / "warm.png")
        daemon.wait_for("image.filed")
        scales, began = Scales(daemon.process.pid), time.monotonic()
        told = len(daemon.lines)
        with scales.weighing():
            staging.rename(dataset / "Images" / "attack")
            while time.monotonic() - began < seconds and daemon.process.poll() is None:
                if sum(line["event"] in OUTCOMES for line in daemon.lines[told:]) >= wanted:
                    break
                time.sleep(0.1)
        outcomes = Counter(line["event"] for line in daemon.lines[told:] if line["event"] in OUTCOMES)
        lives = daemon.process.poll() is None
        code = daemon.stop()
        sound = {line["path"] for line in daemon.events("image.filed") if "/sound " in line["path"]}
        died = len(daemon.events("thread.died"))
    there = contents(dataset)
    return {
        "files": wanted,
        "corpus": "there" if corpus.is_file() else f"not there: {corpus}",
        "outcomes": dict(outcomes),
        "without_outcome": wanted - outcomes.total(),
        "sound_ones_filed": len(sound),
        "special_files_untouched": sum(os.path.lexists(dataset / "Images" / name) for name in SPECIAL),
        "changed_or_lost": (small - there).total(),
        "lived_and_stopped_well": lives and code == 0 and died == 0,
        "megabytes_over_idle": scales.over_idle(),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Attack and print what was found; status 1 if it did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, default=CORPUS, help="a tar of hostile images; left out if it is not there"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where the dataset is made")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long all of it may take")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="sortd-hostile-"))
    try:
        found = attack(place, arguments.corpus, arguments.seconds)
    finally:
        shutil.rmtree(place)
    print(json.dumps(found, indent=2))
    over = found["megabytes_over_idle"]
    assert isinstance(over, dict)
    is_harmless = (
        found["lived_and_stopped_well"]
        and (found["without_outcome"], found["changed_or_lost"]) == (0, 0)
        and (found["sound_ones_filed"], found["special_files_untouched"]) == (20, len(SPECIAL))
        and over["all_together"] <= LIMIT_MEGABYTES
    )
    return 0 if is_harmless else 1


if __name__ == "__main__":
    sys.exit(main())
