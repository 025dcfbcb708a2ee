"""Measure what notifications cost the moves: sortd that has none, and one with 10,000 events in each round.

    python -m benchmarks.notifications [--images 1000] [--rounds 8] [--json]

Two sortd with the encoder of the tests run all the time and file the same images in turn. In one of them the loop posts
10,000 events at the begin of each round, for a hook that works, one that hangs, one that floods stderr, one that is
missing, and an address of Apprise at which nothing listens. The floor is 0.98 of the images a second. The images for
a second of processor time, which depend less on what else the machine does, have no floor: they include the posting.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from benchmarks.comparison import Piece, alternate, claim_of_ratio, conclude, summary
from benchmarks.harness import argument_parser, processor_seconds, write_config
from sortd import logs
from sortd.commands.console import load_config
from sortd.daemon.daemon import Daemon
from sortd.daemon.metrics import Metrics
from sortd.daemon.notices import Notice
from sortd.daemon.resources import Resources
from sortd.service import Notifier
from tests.daemon_process import COLOURS, DaemonProcess, make_dataset, picture
from tests.fast_sortd import load_encoder

FLOOR = 0.98
EVENTS = 10_000
ALONE, BURST = "without notifications", "with 10,000 events a round"
SETTLE_SECONDS = 0.1


def serve(config: Path) -> None:
    """Run sortd with the encoder of the tests; at SIGUSR2, the loop posts the events."""
    logs.configure("json")
    loaded = load_config(config)
    daemon = Daemon(
        loaded,
        resources=Resources(loaded, load_encoder=load_encoder),
        reload=lambda: loaded,
        notifier=Notifier({}),
        metrics=Metrics(is_on=False),
    )

    def post(_number: int, _frame: FrameType | None) -> None:
        for number in range(EVENTS):
            daemon._sender.post(Notice("review_pile", f"event {number}", "Colours"))  # noqa: SLF001 -- as the loop does

    signal.signal(signal.SIGUSR2, post)
    daemon.run()


class Filing:
    """A running sortd and its dataset."""

    def __init__(self, folder: Path, **keys: object) -> None:
        """Start it and file a few images; ``keys`` are settings."""
        self._dataset, self._folder, self._next = make_dataset(folder / "Data"), folder / "next", 0
        self._folder.mkdir()
        config = write_config(folder, abstain="off", mode="max", guard="no", settle_seconds=SETTLE_SECONDS, **keys)
        self.daemon = DaemonProcess(config, "serve", program="benchmarks.notifications")
        self.daemon.wait_for("daemon.ready")
        self.piece(8, is_burst=False)

    def piece(self, count: int, *, is_burst: bool) -> Piece:
        """File so many images, with events at the begin."""
        paths = []
        for _ in range(count):
            self._next += 1
            paths.append(self._folder / f"{self._next:06}.png")
            picture(list(COLOURS)[self._next % len(COLOURS)], 10_000 + self._next).save(paths[-1], compress_level=1)
        os.sync()
        filed = len(self.daemon.events("image.filed"))
        busy, began = processor_seconds(self.daemon.process.pid), time.perf_counter()
        if is_burst:
            self.daemon.send(signal.SIGUSR2)
        for path in paths:
            path.rename(self._dataset / "Images" / path.name)
        self.daemon.wait_for("image.filed", count=filed + count)
        seconds = time.perf_counter() - began - SETTLE_SECONDS
        return Piece(count, seconds, processor_seconds(self.daemon.process.pid) - busy)


def compare(folder: Path, given: argparse.Namespace) -> int:
    """Run both sides in turn and print what was found."""
    heard = folder / "heard"
    hooks = [
        {"command": ["sh", "-c", f"cat >> {heard}"]},
        {"command": ["sleep", "1000"]},
        {"command": ["sh", "-c", "yes >&2"]},
        {"command": ["/nonexistent/hook"]},
    ]
    alone = Filing(folder / "alone")
    burst = Filing(folder / "burst", hooks=hooks, notify={"urls": ["json://127.0.0.1:1"]})
    with alone.daemon, burst.daemon:
        sides = {
            ALONE: lambda: alone.piece(given.images, is_burst=False),
            BURST: lambda: burst.piece(given.images, is_burst=True),
        }
        pieces = alternate(sides, rounds=given.rounds)
        failures = burst.daemon.events("notification.failed")
    claims = [
        claim_of_ratio("images a second, beside notifications", pieces, BURST, ALONE, least=FLOOR),
        claim_of_ratio("images a second of processors", pieces, BURST, ALONE, of_processor_time=True),
    ]
    got = len(heard.read_text().splitlines()) if heard.exists() else 0
    more = {"events": EVENTS * given.rounds, "messages to the hook": got, "lines about failures": len(failures)}
    return conclude(summary(pieces), claims, as_json=given.json, rounds=given.rounds, more=more)


def main() -> int:
    """Run the comparison, or one sortd of it."""
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[sys.argv.index("--config") + 1]))
        return 0
    parser = argument_parser(__doc__, rounds=8)
    parser.add_argument("--images", type=int, default=1000, help="images for each side and round")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), given)


if __name__ == "__main__":
    sys.exit(main())
