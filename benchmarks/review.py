"""Measure the review page: its memory and its speed with 10,000 waiting images, and what a reader costs the daemon.

    python -m benchmarks.review [pages] [filing] [--images 10000] [--rounds 6] [--json]

Everything runs in a temporary folder, with the real programs as processes of their own.

    pages    seconds to the first page and to its first picture, before and after the first request, largest page,
             resident memory of the process that serves them and of its decoding processes, seconds to the groups
    filing   images a second that the daemon files, 300 at once, while a person opens a page of pictures every five
             seconds, relative to those while nobody reads; the floor: 1/1.05
"""

import io
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.comparison import Piece, alternate, claim_of_ratio, conclude, summary, timed
from benchmarks.harness import REPOSITORY, argument_parser, processor_seconds, resident_mebibytes, write_config
from benchmarks.workload import with_comment
from tests.daemon_process import COLOURS, DaemonProcess, make_dataset, picture, teach
from tests.review.world import Client, ReviewProcess

PICTURE = re.compile(rb'src="(/picture/[0-9a-f]+/160\.jpg)"')
KINDS = 40  # of strangers
READS_EVERY_SECONDS = 5.0
FLOOR = 1 / 1.05


def draw_strangers(folder: Path, count: int, seed: int = 0) -> None:
    """Write JPEGs of 1024 x 768 pixels that resemble no class: a few drawings, each with its own comment."""
    dice = np.random.default_rng(seed)
    drawings = []
    for _ in range(KINDS):
        pattern = dice.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        drawn = io.BytesIO()
        Image.fromarray(pattern).resize((1024, 768), Image.Resampling.NEAREST).save(drawn, "JPEG", quality=85)
        drawings.append(drawn.getvalue())
    for number in range(count):
        drawing = with_comment(drawings[number % KINDS], f"{seed} {number}")
        (folder / f"{seed}-{number:05}.jpg").write_bytes(drawing)


def fill_review(folder: Path, images: int) -> Path:
    """Let sortd, with the encoder of the tests, put so many images into Review/; return the configuration."""
    dataset = make_dataset(folder / "Data")
    teach(dataset)
    draw_strangers(dataset / "Images", images)
    config = write_config(folder, settle_seconds=0.1)
    command = [sys.executable, "-m", "tests.fast_sortd", "once", "-c", str(config)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    return config


def children_mebibytes(pid: int) -> float:
    """Return the resident memory of the children of a process."""
    named = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return sum(resident_mebibytes(child) for child in named)


def measure_pages(folder: Path, images: int) -> dict[str, Any]:
    """Open the page of a library with so many waiting images, cold and warm."""
    config = fill_review(folder, images)
    waiting = sum(1 for path in (folder / "Data").rglob("Review/**/*.jpg"))
    figures: dict[str, Any] = {"waiting": waiting}
    with ReviewProcess(config, program="sortd") as review:
        client = Client(review)
        (key,) = re.findall(r"/d/([0-9a-f]+)/", client.get("/").headers["location"])
        for name in ("cold", "warm"):
            began = time.perf_counter()
            page = client.get(f"/d/{key}/waiting")
            figures[f"{name}_page_seconds"] = round(time.perf_counter() - began, 3)
            client.get(PICTURE.findall(page.content)[0 if name == "cold" else 1].decode())
            figures[f"{name}_first_picture_seconds"] = round(time.perf_counter() - began, 3)
        began, sizes = time.perf_counter(), [len(page.content)]
        for address in PICTURE.findall(page.content):
            client.get(address.decode())
        figures["pictures_of_the_page"] = len(PICTURE.findall(page.content))
        figures["all_pictures_seconds"] = round(time.perf_counter() - began, 3)
        while b"being grouped" in client.get(f"/d/{key}/waiting").content:
            figures["while_grouping_children_mebibytes"] = round(
                max(figures.get("while_grouping_children_mebibytes", 0), children_mebibytes(review.process.pid))
            )
            time.sleep(0.2)
        figures["groups_seconds"] = round(time.perf_counter() - began, 1)
        sizes += [len(client.get(f"/d/{key}/waiting?page={number}").content) for number in range(1, 11)]
        figures["largest_page_kilobytes"] = round(max(sizes) / 1000)
        figures["peak_mebibytes"] = round(resident_mebibytes(review.process.pid, peak=True))
        figures["decoders_mebibytes"] = round(children_mebibytes(review.process.pid))
    return figures


@contextmanager
def reading(review: ReviewProcess, seed: int) -> Iterator[None]:
    """Open a page and its pictures every few seconds, as a browser does for a person who looks at them."""
    stop = threading.Event()

    def read() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # a browser is mostly on another machine
        client, dice, known = Client(review), random.Random(seed), set[bytes]()
        (key,) = re.findall(r"/d/([0-9a-f]+)/", client.get("/").headers["location"])
        while not stop.is_set():
            page = client.get(f"/d/{key}/waiting?page={dice.randint(1, 5)}")
            for address in set(PICTURE.findall(page.content)) - known:
                client.get(address.decode())
                known.add(address)
            stop.wait(READS_EVERY_SECONDS)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure_filing(folder: Path, rounds: int, images: int) -> dict[str, list[Piece]]:
    """Let the daemon, with the packaged model, file images alone and beside a person who reads."""
    dataset = make_dataset(folder / "Data")
    teach(dataset)
    draw_strangers(dataset / "Images", 300)  # what is read
    config = write_config(folder, model="packaged", settle_seconds=0.5)
    numbers = itertools.count()
    with DaemonProcess(config, program="sortd") as daemon, ReviewProcess(config, program="sortd") as review:
        daemon.wait_for("daemon.ready")
        daemon.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")

        def alone() -> Piece:
            return _file(daemon, dataset, next(numbers), images)

        def beside() -> Piece:
            number = next(numbers)
            with reading(review, number):
                return _file(daemon, dataset, number, images)

        pieces = alternate({"alone": alone, "beside a reader": beside}, rounds=rounds)
        daemon.stop()
    return pieces


def _file(daemon: DaemonProcess, dataset: Path, number: int, images: int) -> Piece:
    """Move images into Images/ at once, and wait until they have left it."""
    colours, outside = sorted(COLOURS), dataset.parents[1] / "outside"
    outside.mkdir(exist_ok=True)
    for at in range(images):
        seed = 10_000 * number + at
        picture(colours[at % len(colours)], seed, (1024, 768)).save(outside / f"{seed}.jpg")

    def work() -> int:
        for path in sorted(outside.iterdir()):
            path.rename(dataset / "Images" / path.name)
        daemon.wait_until(lambda: not any((dataset / "Images").iterdir()), "the images are moved")
        return images

    return timed(work, processor=lambda: processor_seconds(daemon.process.pid))()


def main() -> int:
    """Measure what is named, or everything; exit 1 if a floor is missed, 3 if the rounds disagree."""
    parser = argument_parser(__doc__, rounds=6)
    parser.add_argument("what", nargs="*", choices=["pages", "filing", []], default=[])
    parser.add_argument("--images", type=int, default=10_000, help="waiting images, for pages")
    parser.add_argument("--filed", type=int, default=300, help="images filed at once, for filing")
    given = parser.parse_args()
    figures, pieces, claims = {}, {}, []
    for name in given.what or ["pages", "filing"]:
        with tempfile.TemporaryDirectory() as folder:
            if name == "pages":
                figures[name] = measure_pages(Path(folder), given.images)
                continue
            pieces = measure_filing(Path(folder), given.rounds, given.filed)
            what = "images filed beside a reader, relative to alone"
            claims = [claim_of_ratio(what, pieces, "beside a reader", "alone", least=FLOOR)]
    return conclude(summary(pieces), claims, as_json=given.json, rounds=given.rounds, more=figures)


if __name__ == "__main__":
    sys.exit(main())
