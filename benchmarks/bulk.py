"""Measure ``sortd bulk decide``: equal decisions of its engines, kills, the overhead of Ray, two actors, each stage.

    python -m benchmarks.bulk FOLDER... [--images 2000] [--part 100] [--rounds 1] [--json]

Each FOLDER holds one folder of photos a class; the first eight of a class are its references, the others are copied
with new names, some more than once, until there are so many images. The packaged model decides, with one thread and
one decoding process for each actor and for the plain loop (``--shard 1/1``). Then

- two shards, one actor and two actors decide the same images, and each id with each value is compared;
- Ray decides while its driver is killed (SIGKILL) three times, and then an actor twice;
- ``sortd once`` decides with `abstain: off`, and with the defaults, which also count neighbours; labels are compared.

Seconds are those of the work, without the start of Ray and of the model. Exits with 1 if
decisions differ, or the work ended before all kills.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset

import sortd
from benchmarks.harness import REPOSITORY, argument_parser, print_json, process_tree, used_seconds, write_config
from benchmarks.photos import photos_of
from sortd.bulk.plan import DECISIONS, MANIFEST, PLAN_FILE, make_plan, parts_of

REFERENCES = 8
DRIVER_KILLS, ACTOR_KILLS = 3, 2
ACTOR = b"ray::MapWorker"
POLL_SECONDS = 0.02


def copy_photos(folders: list[Path], data: Path, images: int) -> None:
    """Make a dataset of folders of photos: references, and so many images with new names."""
    rest: list[Path] = []
    for folder in folders:
        labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
        for index, label in enumerate(labels):
            photos = [path for number, path in photos_of(folder) if number == index]
            place = data / "Clases" / f"{folder.name} {label}"
            place.mkdir(parents=True)
            for photo in photos[:REFERENCES]:
                shutil.copy(photo, place)
            rest += photos[REFERENCES:]
    (data / "Images").mkdir()
    for number, photo in enumerate(islice(cycle(rest), images)):
        shutil.copy(photo, data / "Images" / f"{number:05}{photo.suffix.lower()}")


class Bench:
    """One dataset, its plan and its classifiers; a run for each side."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        """Copy the photos, plan, and save the classifiers."""
        self.folder, self.data = folder, folder / "Data" / "photos"
        copy_photos(arguments.folders, self.data, arguments.images)
        self.config = write_config(folder / "config", model="packaged", device="cpu")
        self.plan = folder / "plan"
        make_plan(str(self.data / "Images"), self.plan, fewest_rows=arguments.part)
        with sortd.load_encoder("packaged", device="cpu") as encoder:
            for name, precision in (("abstain", 0.95), ("off", None)):
                classifier = sortd.Classifier.from_folder(self.data / "Clases", encoder=encoder, precision=precision)
                classifier.save(folder / name)

    def run(self, name: str) -> Path:
        """Return a new run of the plan."""
        run = self.folder / name
        shutil.copytree(self.plan / MANIFEST, run / MANIFEST)
        shutil.copy(self.plan / PLAN_FILE, run)
        return run

    def command(self, run: Path, *options: str, classifier: str = "abstain") -> list[str]:
        """Return the command that decides."""
        own = ["--classifier", str(self.folder / classifier), "--config", str(self.config), "--json"]
        return [sys.executable, "-m", "sortd", "bulk", "decide", str(run), *own, *options]

    def decide(self, name: str, *options: str, classifier: str = "abstain") -> tuple[dict[str, Any], pa.Table]:
        """Decide all images; return the facts and the decisions by id."""
        run = self.folder / name
        command = self.command(run if run.exists() else self.run(name), *options, classifier=classifier)
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        if done.returncode:
            raise SystemExit(done.stderr)
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts, decisions_of(self.folder / name)

    def decide_while_killed(self, name: str) -> tuple[dict[str, int], pa.Table]:
        """Decide with Ray, whose processes are killed while they decide; return the kills and the decisions."""
        run, drivers, actors = self.run(name), 0, set[int]()
        for _ in range(DRIVER_KILLS):
            with self._started(run) as process:
                drivers += bool(self._new_actors(run, process, actors))
                process.send_signal(signal.SIGKILL)
        with self._started(run) as process:
            for _ in range(ACTOR_KILLS):
                for pid in self._new_actors(run, process, actors)[:1]:
                    os.kill(pid, signal.SIGKILL)
                    actors.add(pid)
            process.wait()
        return {"drivers": drivers, "actors": len(actors)}, decisions_of(run)

    def _new_actors(self, run: Path, process: "subprocess.Popen[bytes]", killed: set[int]) -> list[int]:
        """Wait until a driver has actors and a part more is decided; return its actors that were not killed."""
        before, found = len(parts_of(run / DECISIONS)), list[int]()
        while process.poll() is None and not (found and len(parts_of(run / DECISIONS)) > before):
            time.sleep(POLL_SECONDS)
            if not found and (found := [pid for pid in actors_of(process.pid) if pid not in killed]):
                # Actors of a killed driver may end the parts that they have begun.
                before = len(parts_of(run / DECISIONS))
        return found if process.poll() is None else []

    @contextmanager
    def _started(self, run: Path) -> Iterator["subprocess.Popen[bytes]"]:
        command = self.command(run, "--actors", "2")
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder
        ) as process:
            yield process

    def labels_of_once(self, name: str, **keys: object) -> dict[str, str | None]:
        """Return the label of each image by ``sortd once`` on copies, None if it is not filed."""
        folder = self.folder / f"once {name}"
        shutil.copytree(self.data, folder / "Data" / "photos")
        config = write_config(folder, model="packaged", device="cpu", guard=False, **keys)
        subprocess.run(
            [sys.executable, "-m", "sortd", "once", "--config", str(config)],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        with sortd.open_dataset(folder / "Data" / "photos", config=config) as dataset:
            moves = dataset.history()
        return {Path(move["from"]).name: move["label"] if move["outcome"] == "filed" else None for move in moves}


def decisions_of(run: Path) -> pa.Table:
    """Return the decisions of a run by id."""
    return pyarrow.dataset.dataset(run / DECISIONS).to_table().sort_by("id")


def actors_of(pid: int) -> Iterator[int]:
    """Yield the actors among the descendants of a driver."""
    for one in process_tree(pid):
        try:
            if Path(f"/proc/{one}/cmdline").read_bytes().startswith(ACTOR):
                yield one
        except OSError:
            continue


def labels_in(table: pa.Table) -> dict[str, str | None]:
    """Return the label of each image by its name."""
    return {
        Path(uri).name: label for uri, label in zip(*(table[key].to_pylist() for key in ("uri", "label")), strict=True)
    }


def agreement(ours: dict[str, str | None], theirs: dict[str, str | None]) -> dict[str, int]:
    """Return how many labels are equal, and how many of the images that both filed are in one class."""
    both = [name for name in ours if ours[name] is not None and theirs.get(name) is not None]
    return {
        "images": len(ours),
        "equal": sum(ours[name] == theirs.get(name) for name in ours),
        "both_filed": len(both),
        "same_class": sum(ours[name] == theirs[name] for name in both),
    }


def processor_seconds_per_image(bench: Bench, images: int) -> float:
    """Return the processor time of an image in the plain loop, without the start of the command and of the model."""
    parts = len(parts_of(bench.plan / MANIFEST))
    used, counts = [], []
    for name, shard in (("all", "1/1"), ("one part", f"1/{parts}")):
        before = used_seconds()
        facts, _ = bench.decide(name, "--shard", shard)
        used.append(used_seconds() - before)
        counts.append(facts["images"])
    assert counts[0] == images
    return float((used[0] - used[1]) / (counts[0] - counts[1]))


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Return all figures of a dataset."""
    sides = {"loop": ("--shard", "1/1"), "one actor": ("--actors", "1"), "two actors": ("--actors", "2")}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    equal: dict[str, bool] = {}
    facts: dict[str, Any] = {}
    _, loop = bench.decide("reference", "--shard", "1/1")
    for number in range(rounds):
        for side, options in sides.items():
            facts[side], table = bench.decide(f"{side} {number}", *options)
            seconds[side].append(facts[side]["working_seconds"])
            equal[f"{side} {number}"] = table.equals(loop)
    bench.decide("shards", "--shard", "1/2")
    equal["two shards"] = bench.decide("shards", "--shard", "2/2")[1].equals(loop)
    kills, table = bench.decide_while_killed("killed")
    equal["killed"] = table.equals(loop)
    off = labels_in(bench.decide("without abstention", "--shard", "1/1", classifier="off")[1])
    loops, ones, twos = (seconds[side] for side in sides)
    return {
        "images": loop.num_rows,
        "ids": len(set(loop["id"].to_pylist())),
        "equal_to_the_loop": equal,
        "kills": kills,
        "overhead_of_one_actor": statistics.median(one / base - 1 for one, base in zip(ones, loops, strict=True)),
        "two_actors_over_one": statistics.median(one / two for one, two in zip(ones, twos, strict=True)),
        "seconds": seconds,
        "start_seconds_of_ray": facts["two actors"]["seconds"] - facts["two actors"]["working_seconds"],
        "processor_seconds_per_image": processor_seconds_per_image(bench, loop.num_rows),
        "stages": facts["loop"]["stages"],
        "bytes_of_decisions_per_image": sum(
            path.stat().st_size for path in parts_of(bench.folder / "reference" / DECISIONS).values()
        )
        / loop.num_rows,
        "once_with_abstain_off": agreement(off, bench.labels_of_once("off", abstain="off")),
        "once_with_neighbours": agreement(labels_in(loop), bench.labels_of_once("abstain")),
    }


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--part", type=int, default=100, help="images of a part of the manifest")
    arguments = parser.parse_args()
    arguments.folders = [folder.absolute() for folder in arguments.folders]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Bench(Path(folder), arguments), arguments.rounds)
    if arguments.json:
        print_json(figures, n=arguments.rounds)
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")
    is_once = figures["ids"] == figures["images"]
    is_killed = figures["kills"] == {"drivers": DRIVER_KILLS, "actors": ACTOR_KILLS}
    sys.exit(0 if is_once and is_killed and all(figures["equal_to_the_loop"].values()) else 1)


if __name__ == "__main__":
    main()
