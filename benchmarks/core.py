"""Measure the core's processor time and memory per image, and the time of a scan.

    python -m benchmarks.core [--images 1000000] [--files 100000] [--json]

The core (``sorter.py``) gets the events of a daemon, with a simulated clock and a fake encoder. The result is the
processor time of the core without that of the decisions. Each quarter of the images is timed separately: the ratio of
the last to the first quarter shows a cost that grows. Limits: at most 80 microseconds per image, at most 100,000 images
in memory, and a scan of 100,000 files within a second.
"""

import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import argument_parser, print_json, resident_mebibytes
from sortd.classify.build import build
from sortd.classify.decide import decide_by
from sortd.classify.prototypes import Classifier, PrototypeSet
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.core.sorter import Sorter, SorterSettings
from sortd.events import (
    Command,
    Decision,
    Embed,
    Embedded,
    EmbeddedImage,
    Event,
    ImageGone,
    ImageSeen,
    Inspect,
    Mode,
    Move,
    Moved,
    PrototypesBuilt,
    Rebuild,
    Scan,
    ScanFinished,
    ScanStarted,
    Stamp,
    Tick,
    Writer,
)
from sortd.watch.scan import SLICE, scan

MOST_MICROSECONDS = 30
MOST_KNOWN = 100_000
MOST_SCAN_SECONDS = 0.5
CLASSES = 20
QUARTERS = 4


def prototypes() -> PrototypeSet:
    """Return prototypes of twenty orthogonal classes."""
    support = SupportSet(
        labels=tuple(f"class {number}" for number in range(CLASSES)),
        embeddings=np.eye(CLASSES, dtype=np.float32),
        classes=np.arange(CLASSES),
        sources=tuple(f"{number}.png" for number in range(CLASSES)),
        encoder_id="fake",
    )
    return build(support, DecisionSettings(mode=Mode.MAX, abstain=None), generation=1)


@dataclass
class Inbox:
    """A simulated folder of numbered files."""

    files: int
    filed: bytearray = field(init=False)
    first: int = 0

    def __post_init__(self) -> None:
        """Start with all files in the folder."""
        self.filed = bytearray(self.files)

    def names(self) -> Iterator[int]:
        """Yield the numbers of the files in the order of a scan, which differs from that of their filing."""
        return (number for number in range(self.files) if not self.filed[number])

    @staticmethod
    def path(number: int) -> str:
        """Return the path of a file."""
        return f"/srv/pictures/Data/Holidays/Images/2026/IMG_{number:08}.jpg"

    @staticmethod
    def stamp(number: int) -> Stamp:
        """Return the stamp of a file."""
        return Stamp(64_769, 10_000_000 + number, 3_000_000 + number % 1000, 1_700_000_000_000_000_000 + number)


class Drive:
    """A core with its inbox, and the processor time of the core."""

    def __init__(self, files: int, limit: int) -> None:
        """Start with prototypes and a scan."""
        self.inbox = Inbox(files)
        self.sorter = Sorter(SorterSettings(settle_seconds=1.0, backlog_limit=limit), decide=self.decide)
        self.filed, self.now, self.core_seconds, self.decision_seconds, self.most_known = 0, 0.0, 0.0, 0.0, 0
        self.scans = 0
        self._rows = np.eye(CLASSES, dtype=np.float32)
        self._found: Iterator[int] | None = None
        self._commands: deque[Command] = deque()
        self.tell([Tick()])

    def decide(self, classifier: Classifier, rows: npt.ArrayLike, turned_away: Sequence[int]) -> list[Decision]:
        """Decide with ``decide_by``, and measure the time."""
        began = time.process_time()
        decisions = decide_by(classifier, rows, turned_away)
        self.decision_seconds += time.process_time() - began
        return decisions

    def tell(self, events: list[Event]) -> None:
        """Pass events to the core, and measure the time."""
        receive, commands, now = self.sorter.receive, self._commands, self.now
        began = time.process_time()
        for event in events:
            commands.extend(receive(event, now))
        self.core_seconds += time.process_time() - began

    def run(self) -> Iterator[int]:
        """Yield the number of filed images after each turn, until all are filed."""
        while self.filed < self.inbox.files:
            self._carry_out()
            self._scan_on()
            self.most_known = max(self.most_known, len(self.sorter.images))
            deadline = self.sorter.next_deadline()
            if not self._commands and self._found is None and deadline is not None:
                self.now = max(self.now, deadline)
            if deadline is not None and deadline <= self.now:
                self.tell([Tick()])
            yield self.filed

    def _scan_on(self) -> None:
        if self._found is None:
            return
        numbers = list(islice(self._found, SLICE))
        self.tell([ImageSeen(self.inbox.path(number), self.inbox.stamp(number)) for number in numbers])
        if self.sorter.images.overflowed:  # what is left of it does not fit either: another scan finds it
            self._found = None
        elif len(numbers) < SLICE:
            self._found = None
            self.tell([ScanFinished()])

    def _carry_out(self) -> None:
        events: list[Event] = []
        while self._commands:
            match self._commands.popleft():
                case Rebuild(job):
                    events.append(PrototypesBuilt(prototypes(), job=job))
                    self._begin_scan(events)
                case Scan():
                    self._begin_scan(events)
                case Inspect(path):
                    number = self._number(path)
                    is_gone = self.inbox.filed[number]
                    seen = ImageSeen(path, self.inbox.stamp(number), Writer.ABSENT)
                    events.append(ImageGone(path) if is_gone else seen)
                case Embed(images):
                    rows = tuple(
                        EmbeddedImage(path, stamp, self._rows[stamp.inode % CLASSES], "c0ffee")
                        for path, stamp in images
                    )
                    events.append(Embedded(rows, "fake"))
                case Move() as move:
                    self.inbox.filed[self._number(move.path)] = 1
                    self.filed += 1
                    events.append(Moved(move.path, move.stamp, "elsewhere", move.outcome, move.stamp))
                case other:
                    raise AssertionError(other)
        self.now += 0.001
        self.tell(events)

    def _begin_scan(self, events: list[Event]) -> None:
        self.scans += 1
        self._found = self.inbox.names()
        events.append(ScanStarted())

    @staticmethod
    def _number(path: str) -> int:
        return int(path[-12:-4])


def measure_core(images: int, limit: int) -> dict[str, Any]:
    """File images through a core, and return the cost of each quarter."""
    drive = Drive(images, limit)
    marks, memory, began = [0.0], [resident_mebibytes()], time.perf_counter()
    for filed in drive.run():
        if filed * QUARTERS >= images * len(marks):
            marks.append(drive.core_seconds - drive.decision_seconds)
            memory.append(resident_mebibytes())
    size = images / QUARTERS
    parts = [1e6 * (after - before) / size for before, after in pairwise(marks)]
    return {
        "images": images,
        "seconds": round(time.perf_counter() - began, 1),
        "core_microseconds_an_image": round(1e6 * marks[-1] / images, 1),
        "decision_microseconds_an_image": round(1e6 * drive.decision_seconds / images, 1),
        "quarters_microseconds": [round(part, 1) for part in parts],
        "last_quarter_over_first": round(parts[-1] / parts[0], 2),
        "scans": drive.scans,
        "most_known": drive.most_known,
        "resident_mebibytes": [round(value) for value in memory],
        "floor_microseconds": MOST_MICROSECONDS,
        "floor_known": MOST_KNOWN,
    }


def measure_scan(folder: Path, files: int) -> dict[str, Any]:
    """Return the shortest of three times of a scan of empty files, a thousand per folder."""
    for number in range(files):
        place = folder / f"{number // 1000:04}"
        if number % 1000 == 0:
            place.mkdir()
        (place / f"{number}.jpg").touch()
    troubles: list[OSError] = []
    times = []
    for _ in range(3):
        began = time.perf_counter()
        found = sum(1 for _ in scan(str(folder), report=troubles.append))
        times.append(time.perf_counter() - began)
    assert found == files
    assert not troubles
    return {"files": files, "seconds": round(min(times), 3), "floor_seconds": MOST_SCAN_SECONDS}


def main() -> None:
    """Measure both and print them."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sortd-bench-") as name:
        facts = {"core": measure_core(arguments.images, MOST_KNOWN), "scan": measure_scan(Path(name), arguments.files)}
    if arguments.json:
        print_json(facts, n=1)
        return
    for what, measured in facts.items():
        print(what, json.dumps(measured))


if __name__ == "__main__":
    main()
