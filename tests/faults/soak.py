"""A soak: the real daemon and its fast fake encoder, four writers, kill -9 at random; what came in must come out.

python -m tests.faults.soak --files 200000
python -m tests.faults.soak --files 5000 --folder /mnt/other/disk --seed 7

The first half of the files arrives while the daemon is killed every few seconds and started again, the second half
while one daemon works undisturbed: its descriptors, threads and memory must not grow. Prints a table over time on
stderr and what it found as JSON on stdout; status 1 if a file was lost, doubled or left, or if something grew.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon_process import make_dataset
from tests.faults.gauges import Gauges, gauges_of, growth

REPOSITORY = Path(__file__).parents[2]
DATASETS = ("First", "Second")
AREAS = ("Images", "Dataset", "Review", "Rejected")
DRAIN_SECONDS = 900.0
"""How long the daemon may take, after the last file came, until the inboxes are empty."""

ENOUGH_DRAINED = 100
"""So many images may be left when the killing ends."""

SAMPLE_SECONDS = 5.0
HEADER = "   seconds  brought    filed  starts      pid  files  threads  memory MB  children MB"


@dataclass
class Soak:
    """One run below one folder."""

    folder: Path
    files: int
    writers: int
    seed: int
    most_waiting: int
    kill_seconds: tuple[float, float]
    starts: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    samples: list[Gauges] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def prepare(self) -> Path:
        """Make the datasets and the configuration; return the latter."""
        for name in DATASETS:
            make_dataset(self.folder / "Data", name)
        (self.folder / "staging").mkdir()
        (self.folder / "lists").mkdir()
        keys = {
            "root": self.folder / "Data",
            "state_dir": self.folder / "state",
            "cache_dir": self.folder / "cache",
            "model": "packaged",
            "mode": "max",
            "abstain": "off",
            "guard": "no",
            "settle_seconds": 0.5,
            "rescan_seconds": 20,
        }
        config = self.folder / "config.yaml"
        config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
        return config

    # ------------------------------------------------------------ processes

    def start_writers(self, half: int) -> list[subprocess.Popen[bytes]]:
        """Let the writers bring half of the files."""
        each = self.files // 2 // self.writers
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.faults.arrivals"),
                    os.fspath(self.folder / "Data" / DATASETS[number % len(DATASETS)] / "Images"),
                    os.fspath(self.folder / "staging"),
                    os.fspath(self.folder / "lists" / f"{half} {number}"),
                    *("--writer", str(10 * half + number), "--files", str(each)),
                    *("--seed", str(self.seed + 10 * half + number), "--most-waiting", str(self.most_waiting)),
                ],
                cwd=REPOSITORY,
            )
            for number in range(self.writers)
        ]

    def start_daemon(self, config: Path) -> "subprocess.Popen[bytes]":
        """Start sortd; its lines go to a file."""
        self.starts += 1
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.fast_sortd", "run", "--config", str(config)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                env={**os.environ, "SORTD_LOG__FORMAT": "json", "OMP_NUM_THREADS": "1"},
            )

    def log_bytes(self) -> int:
        """Return how much was logged so far."""
        return (self.folder / "log").stat().st_size if (self.folder / "log").exists() else 0

    def is_ready(self, written: int) -> bool:
        """Tell whether the daemon that began to log there is ready."""
        with (self.folder / "log").open("rb") as log:
            log.seek(written)
            return b'"daemon.ready"' in log.read()

    def end(self, daemon: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
        """Signal the daemon and note how it ended."""
        daemon.send_signal(number)
        self.exits[daemon.wait()] += 1

    # ------------------------------------------------------------ the two halves

    def disturbed(self, config: Path) -> None:
        """Bring the first half; kill and start the daemon all the time, now and then stop it by SIGTERM."""
        dice = random.Random(self.seed)  # noqa: S311 - when it is killed is no secret
        writers = self.start_writers(0)
        while any(writer.poll() is None for writer in writers) or len(self.left()) > ENOUGH_DRAINED:
            written = self.log_bytes()
            daemon = self.start_daemon(config)
            while daemon.poll() is None and dice.random() < 0.98 and not self.is_ready(written):
                time.sleep(0.1)  # one start in some is killed before it is complete
            until = time.monotonic() + dice.uniform(*self.kill_seconds)
            while time.monotonic() < until and daemon.poll() is None:
                time.sleep(0.05)
            self.sample(daemon)
            if daemon.poll() is not None:
                self.exits[daemon.returncode] += 1
                continue
            is_asked = dice.random() < 0.1 and self.is_ready(written)  # before, Python itself ends by the signal
            self.end(daemon, signal.SIGTERM if is_asked else signal.SIGKILL)
        self.check(writers)

    def undisturbed(self, config: Path) -> bool:
        """Bring the second half to one daemon, and wait until nothing is left; return whether that came."""
        daemon = self.start_daemon(config)
        writers = self.start_writers(1)
        until = float("inf")
        while daemon.poll() is None and time.monotonic() < until and (until == float("inf") or self.left()):
            time.sleep(SAMPLE_SECONDS)
            self.sample(daemon, steady=True)
            if until == float("inf") and all(writer.poll() is not None for writer in writers):
                until = time.monotonic() + DRAIN_SECONDS
        self.check(writers)
        self.end(daemon, signal.SIGTERM)
        return not self.left()

    @staticmethod
    def check(writers: Sequence["subprocess.Popen[bytes]"]) -> None:
        """See that the writers did what they were there for.

        Raises:
            RuntimeError: one of them failed: the run says nothing then.
        """
        codes = [writer.wait() for writer in writers]
        if any(codes):
            raise RuntimeError(f"the writers ended with {codes}")

    # ------------------------------------------------------------ what is there

    def left(self) -> list[Path]:
        """Return the images that are still in an inbox."""
        inboxes = [self.folder / "Data" / name / "Images" for name in DATASETS]
        return [path for inbox in inboxes for path in inbox.rglob("*") if path.is_file() and path.suffix != ".xmp"]

    def sample(self, daemon: "subprocess.Popen[bytes]", *, steady: bool = False) -> None:
        """Look at the daemon, and print a line of the table."""
        gauges = gauges_of(daemon.pid)
        if gauges is None:
            return
        if steady:
            self.samples.append(gauges)
        filed = self.filed()
        waiting = len(self.left())
        print(
            f"{time.monotonic() - self.began:10.0f} {filed + waiting:8} {filed:8} {self.starts:7} {daemon.pid:8} "
            f"{gauges.files:6} {gauges.threads:8} {gauges.megabytes:10.1f} {gauges.children_megabytes:12.1f}",
            file=sys.stderr,
            flush=True,
        )

    def filed(self) -> int:
        """Count what the journals say is done."""
        return sum(self._asked("SELECT count(*) FROM moves WHERE progress = 'done'"))

    def unfinished(self) -> int:
        """Count what the journals say is under way."""
        return sum(self._asked("SELECT count(*) FROM moves WHERE progress != 'done'"))

    def _asked(self, question: str) -> list[int]:
        answers = []
        for file in (self.folder / "state").glob("*/journal.sqlite"):
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=30)) as journal:
                try:
                    answers.append(int(journal.execute(question).fetchone()[0]))
                except sqlite3.OperationalError:  # killed before its tables were made
                    answers.append(0)
        return answers

    def verdict(self) -> dict[str, object]:
        """Compare what came in with what is there now."""
        due: Counter[str] = Counter()
        maybe: Counter[str] = Counter()
        for path in (self.folder / "lists").iterdir():
            words = path.read_text().split()
            due.update(content for word, content in zip(words[::2], words[1::2], strict=True) if word == "due")
            maybe.update(content for word, content in zip(words[::2], words[1::2], strict=True) if word == "maybe")
        there, hidden = self._contents()
        lost, more = due - there, there - due
        doubled = more - maybe
        return {
            "due": due.total(),
            "maybe": maybe.total(),
            "there": there.total(),
            "lost": lost.total(),
            "doubled": doubled.total(),
            "images_left_in_the_inbox": len(self.left()),
            "hidden_files": len(hidden),
            "unfinished_in_the_journal": self.unfinished(),
            "first_lost": list(lost)[:5],
            "first_doubled": list(doubled)[:5],
        }

    def _contents(self) -> tuple[Counter[str], list[str]]:
        """Count the files of all areas by their bytes, but for reasons; name the hidden ones."""
        found: Counter[str] = Counter()
        hidden = []
        for name in DATASETS:
            for area in AREAS:
                for folder, _, files in os.walk(self.folder / "Data" / name / area):
                    for file in files:
                        path = os.path.join(folder, file)
                        if file.startswith(".sortd-"):
                            hidden.append(path)
                        if not file.endswith(".reason.json"):
                            with open(path, "rb") as opened:
                                found[hashlib.file_digest(opened, "sha256").hexdigest()] += 1
        return found, hidden


def main() -> int:
    """Soak and print what was found; status 1 if a promise was broken or something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None, help="one is made up and printed otherwise")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to soak; a new one below it")
    parser.add_argument("--most-waiting", type=int, default=500, help="files of one writer that may wait")
    parser.add_argument("--kill", type=float, nargs=2, default=(0.5, 10.0), help="seconds a daemon works, from and to")
    parser.add_argument("--keep", action="store_true", help="leave the folder there if something was broken")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}\n{HEADER}", file=sys.stderr, flush=True)
    place = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="sortd-soak-"))
    soak = Soak(place, arguments.files, arguments.writers, seed, arguments.most_waiting, tuple(arguments.kill))
    config = soak.prepare()
    soak.disturbed(config)
    drained = soak.undisturbed(config)
    found = soak.verdict()
    grown = growth(soak.samples)
    crashes = {code: count for code, count in soak.exits.items() if code not in {0, -signal.SIGKILL}}
    broken = bool(
        found["lost"] or found["doubled"] or found["hidden_files"] or found["unfinished_in_the_journal"] or crashes
    )
    report = {
        "seed": seed,
        "drained": drained,
        "starts": soak.starts,
        "kills": soak.exits[-signal.SIGKILL],
        "crashes": crashes,
        **found,
        "growth": grown,
        "seconds": round(time.monotonic() - soak.began, 1),
    }
    print(json.dumps(report, indent=2))
    failed = broken or not drained or any(one["grew"] for one in grown.values())
    if failed and arguments.keep:
        print(f"kept: {place}", file=sys.stderr)
    else:
        shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
