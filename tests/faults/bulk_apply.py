"""``sortd bulk apply`` killed at random steps, on files and on a store; prints what it found as JSON.

python -m tests.faults.bulk_apply --files 500 --objects 300

Files: SIGKILL at a random system call that changes something, and at every fourth one again in the repetition. Objects,
in moto's server: SIGKILL before or after a random request, or an error in its place, or SIGKILL at a random system call
of the journal. After each, ``apply`` is repeated, and every image must stand in its place, once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem

from sortd.bulk.apply import apply_run
from sortd.bulk.storage import store_of
from sortd.bulk.transfers import JOURNAL, ObjectStore, ObjectVersion
from sortd.config import Config, read_config
from sortd.layout import JOURNAL_FILE, Layout
from sortd.store.history import History
from tests.bulk.decided_run import BUCKET, client_of, objects, s3_server, write_run
from tests.command_line import write_config
from tests.faults.injection import MUTATING, Fault, Run, can_trace, run_child
from tests.faults.sweep import SEED, Tally

LABELS = {"a.jpg": "red", "b.jpg": "green", "c.jpg": None, "d.jpg": "red", "e.jpg": "green", "sub/d.jpg": "red"}
CONTENTS = {name: f"content of {name}".encode() * 1000 for name in LABELS}
SIDECAR = "a.xmp"
STANDING = {"Dataset/red/d.jpg": b"of the user"}
PLACES = {name: "Images" if label is None else f"Dataset/{label}" for name, label in LABELS.items()}
REPETITIONS = 3
DOUBLES = 4  # every so many kills of files are followed by another one


# ---------------------------------------------------------------- files


class Files:
    """A dataset and a run that has decided about its images."""

    def __init__(self, folder: Path) -> None:
        """Write the run; the images have the same bytes in each attempt."""
        self.folder, self.layout = folder, Layout(folder / "Data" / "Set")
        self.config = read_config(write_config(folder), {"HOME": str(folder)})
        self.build()
        images = self.layout.root / "Images"
        decided = {str(images / name): label for name, label in LABELS.items()}
        self.run = write_run(folder / "run", str(images), decided, rows_in_a_part=4)

    def build(self) -> None:
        """Put everything back to where it was at the beginning."""
        shutil.rmtree(self.layout.root, ignore_errors=True)
        shutil.rmtree(self.config.state_dir, ignore_errors=True)
        self.layout.root.mkdir(parents=True)
        self.layout.make()
        before = {f"Images/{name}": content for name, content in CONTENTS.items()}
        for path, content in {**before, f"Images/{SIDECAR}": b"sidecar", **STANDING}.items():
            (self.layout.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.layout.root / path).write_bytes(content)
        for label in ("red", "green"):
            (self.layout.root / "Clases" / label).mkdir()

    def act(self) -> None:
        """Apply the run."""
        checked(apply_run(self.config, self.run))

    def there(self) -> dict[str, bytes]:
        """Return every file outside of Clases/ and its bytes."""
        root = self.layout.root
        areas = ("Images", "Dataset", "Review", "Rejected")
        found = [path for area in areas for path in (root / area).rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): path.read_bytes() for path in found}

    def broken(self) -> list[str]:
        """Return what is wrong after the last repetition."""
        there = self.there()
        problems = misplaced({**CONTENTS, SIDECAR: b"sidecar"}, {**PLACES, SIDECAR: PLACES["a.jpg"]}, there)
        with History.open(self.layout.state_folder(self.config.state_dir) / JOURNAL_FILE) as history:
            if left := history.unfinished():
                problems.append(f"open: {left}")
            if (moved := history.counts()) != {"filed": 5}:
                problems.append(f"the journal has {moved}")
        return problems


def checked(facts: dict[str, Any]) -> None:
    """Raise AssertionError unless every assigned image was moved, now or before."""
    assert not facts["refused"], facts
    assert facts["before"] + sum(facts["moved"].values()) == sum(label is not None for label in LABELS.values()), facts


def misplaced(contents: dict[str, bytes], places: dict[str, str], there: dict[str, bytes]) -> list[str]:
    """Return which contents do not stand once in their folders, and what else is there."""
    problems = []
    for name, content in contents.items():
        found = [path for path, other in there.items() if other == content]
        if not found:
            problems.append(f"{name} is lost")
        elif len(found) > 1:
            problems.append(f"{name} stands {len(found)} times: {found}")
        elif os.path.dirname(found[0]) != places[name]:
            problems.append(f"{name} is at {found[0]}")
    for path, content in STANDING.items():
        if there.get(path) != content:
            problems.append(f"{path} was touched")
    if len(there) != len(contents) + len(STANDING):
        problems.append(f"there are {sorted(there)}")
    return problems


def kill_files(world: Files, tally: Tally, runs: int, dice: random.Random) -> None:
    """Kill that many attempts on files."""
    calls = mutating(run_child(world.act))
    for number in range(runs):
        world.build()
        faults = [Fault(*dice.choice(calls))] + [Fault(*dice.choice(calls))] * (number % DOUBLES == 0)
        attempts = [run_child(world.act, (fault,)) for fault in faults]
        present = set(world.there().values())
        problems = [f"{name} is lost at once" for name, content in CONTENTS.items() if content not in present]
        last = run_child(world.act, traced=False)
        problems += ["the repetition failed"] * (last.status != 0) + world.broken()
        tally.count("files", str(faults), problems, struck=attempts[0].was_killed)


def mutating(run: Run) -> list[tuple[str, int]]:
    """Return each system call of an attempt that changes something, with its number among those of its name."""
    counts = run.calls()
    return [(name, count) for name in sorted(MUTATING) for count in range(1, counts[name] + 1)]


# ---------------------------------------------------------------- objects


class FailingStore(ObjectStore):
    """A store whose n-th step kills the process or raises an error; each request is two steps."""

    def __init__(self, files: FileSystem, at: int, *, kills: bool) -> None:
        """Fail at step ``at``, from 1; 0: never."""
        super().__init__(files)
        self._at, self._kills, self.steps, self._lock = at, kills, 0, threading.Lock()

    def step(self) -> None:
        """Take a step."""
        with self._lock:
            self.steps += 1
            is_it = self.steps == self._at
        if is_it and self._kills:
            os.kill(os.getpid(), signal.SIGKILL)
        elif is_it:
            raise OSError(5, "made by the test")

    def version(self, path: str) -> ObjectVersion | None:
        """Return the present version."""
        self.step()
        return super().version(path)

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes."""
        self.step()
        return super().chunks(path)

    def copy(self, source: str, destination: str) -> None:
        """Copy."""
        self.step()
        super().copy(source, destination)
        self.step()

    def delete(self, path: str) -> None:
        """Delete."""
        self.step()
        super().delete(path)
        self.step()


class Objects:
    """A bucket and a run that has decided about its images."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Write the run."""
        os.environ.update(environment)
        self.config: Config = read_config(write_config(folder), {"HOME": str(folder)})
        self.client, self.folder = client_of(environment), folder
        uris = {name: f"s3://{BUCKET}/Images/{name}" for name in LABELS}
        decided = {uris[name]: label for name, label in LABELS.items()}
        contents = {uris[name]: content for name, content in CONTENTS.items()}
        self.run = write_run(folder / "run", f"s3://{BUCKET}/Images", decided, contents, rows_in_a_part=4)

    def build(self) -> None:
        """Put everything back to where it was at the beginning."""
        for name in (JOURNAL, f"{JOURNAL}-journal"):
            (self.run / name).unlink(missing_ok=True)
        wanted = {**{f"Images/{name}": content for name, content in CONTENTS.items()}, **STANDING}
        for key in objects(self.client).keys() - wanted.keys():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        for key, content in wanted.items():
            self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def attempt(self, at: int = 0, *, kills: bool = True) -> Callable[[], None]:
        """Return a function that applies the run and fails at a step of the store."""

        def act() -> None:
            store_of.cache_clear()
            store = FailingStore(store_of("s3"), at, kills=kills)  # one, whose steps count through all groups
            checked(apply_run(self.config, self.run, make_store=lambda _: store))

        return act

    def steps(self) -> int:
        """Return how many steps an attempt has that does not fail."""
        read, write = os.pipe()

        def act() -> None:
            store = FailingStore(store_of("s3"), 0, kills=False)
            apply_run(self.config, self.run, make_store=lambda _: store)
            os.write(write, str(store.steps).encode())

        self.build()
        run_child(act, traced=False)
        os.close(write)
        with open(read, "rb") as pipe:
            return int(pipe.read())

    def broken(self) -> list[str]:
        """Return what is wrong after the last repetition."""
        return misplaced(CONTENTS, PLACES, objects(self.client))


def kill_objects(world: Objects, tally: Tally, runs: int, dice: random.Random) -> None:
    """Kill that many attempts on objects, or let a request fail."""
    steps = world.steps()
    world.build()
    calls = mutating(run_child(world.attempt()))
    for number in range(runs):
        world.build()
        kind = ("request killed", "request failed", "journal killed")[number % 3]
        at, call = dice.randint(1, steps), Fault(*dice.choice(calls))
        if kind == "journal killed":
            has_struck = run_child(world.attempt(), (call,)).was_killed
        else:
            kills = kind == "request killed"
            run = run_child(world.attempt(at, kills=kills), traced=False)
            has_struck = run.was_killed if kills else run.status != 0
        present = set(objects(world.client).values())
        problems = [f"{name} is lost at once" for name, content in CONTENTS.items() if content not in present]
        # The server may not answer in time on a busy machine; such a call says so and is repeated.
        is_done = any(run_child(world.attempt(), traced=False).status == 0 for _ in range(REPETITIONS))
        problems += ["the repetitions failed"] * (not is_done) + world.broken()
        tally.count(f"objects: {kind}", f"{kind} {at} {call}", problems, struck=has_struck)


@contextmanager
def server_process() -> Iterator[dict[str, str]]:
    """Run the S3 server in a process of its own, so that this one, which forks, has no threads."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with s3_server() as (_, environment):
            os.write(write, json.dumps(environment).encode())
            os.close(write)
            signal.pause()
    os.close(write)
    try:
        with open(read, "rb") as pipe:
            yield json.loads(pipe.read())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> int:
    """Kill, print the tally; status 1 if an image was lost, doubled or misplaced, or no fault struck."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500, help="attempts on files")
    parser.add_argument("--objects", type=int, default=300, help="attempts on objects")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    if reason := can_trace():
        print(json.dumps({"skipped": reason}))
        return 0
    tally, began, dice = Tally(), time.monotonic(), random.Random(arguments.seed)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory(prefix="sortd-faults-") as folder:
        (Path(folder) / "files").mkdir()
        (Path(folder) / "objects").mkdir()
        kill_files(Files(Path(folder) / "files"), tally, arguments.files, dice)
        if arguments.objects:
            with server_process() as environment:
                kill_objects(Objects(Path(folder) / "objects", environment), tally, arguments.objects, dice)
    found = {
        "runs": sum(tally.runs.values()),
        **Counter(tally.runs),
        "silent": len(tally.silent),
        "violations": len(tally.broken),
        "lost": sum("is lost" in what for what in tally.broken),
        "doubled": sum("times" in what for what in tally.broken),
        "seconds": round(time.monotonic() - began, 1),
        "first_silent": tally.silent[:10],
        "first_violations": tally.broken[:20],
    }
    print(json.dumps(found, indent=2))
    return 1 if tally.broken or len(tally.silent) == found["runs"] else 0


if __name__ == "__main__":
    sys.exit(main())
