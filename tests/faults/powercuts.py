"""Power cuts: the child stands still after one of its system calls, some of its disks are synced, all are copied.

What the backing file of a loop device holds is what the disk had received; the copies are mounted, sortd is started on
them, and what is there is compared with the promises. Which disks happened to be synced before the cut is chosen by
an adversary: every subset of source, destination and journal. Needs root, loop devices and the file systems' mkfs.

    python -m tests.faults.powercuts
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from tests.faults.injection import MUTATING, PATIENCE_SECONDS, Fault, attached, be_child, can_trace, run_child
from tests.faults.namespace import enter
from tests.faults.world import FOLDERS, World, broken_after_recovery, broken_before_recovery, build

MIB = 1 << 20
SIZES = {"ext4": 24 * MIB, "xfs": 64 * MIB, "btrfs": 128 * MIB}
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-J", "size=4"],
    "xfs": ["mkfs.xfs", "--unsupported", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "--mixed"],
}
# Each chain syncs one disk after the other, with a cut before, between and after: together every subset of the three.
CHAINS = (("source", "destination", "journal"), ("destination", "journal"), ("journal", "source"))
SEED = 4711


@dataclass(frozen=True)
class Disks:
    """Loop images of one layout, and where they are mounted."""

    work: Path  # images, pristine and in use
    mounts: Path
    kinds: dict[str, str]  # role -> file system; without a destination everything is on the source

    @property
    def root(self) -> Path:
        """The dataset."""
        return self.mounts / "source" / "dataset"

    @property
    def state(self) -> Path:
        """The folder of the journal."""
        return self.mounts / "journal" / "state"

    def make(self) -> None:
        """Make empty file systems."""
        for role, kind in self.kinds.items():
            image = self.work / f"{role}.pristine"
            with image.open("wb") as file:
                file.truncate(SIZES[kind])
            subprocess.run([*MAKE[kind], image], check=True, capture_output=True)

    def keep_pristine(self) -> None:
        """Take what is on the disks now as what each run begins with."""
        for role in self.kinds:
            _copy(self.work / f"{role}.live", self.work / f"{role}.pristine")

    def mount(self, name: str) -> None:
        """Copy images of that name to the live ones and mount them."""
        for role in self.kinds:
            _copy(self.work / f"{role}.{name}", self.work / f"{role}.live")
            (self.mounts / role).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-o", "loop", self.work / f"{role}.live", self.mounts / role], check=True)
        if "destination" in self.kinds:
            for folder in FOLDERS[1:]:
                (self.mounts / "destination" / folder).mkdir(exist_ok=True)
                (self.root / folder).mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["mount", "--bind", self.mounts / "destination" / folder, self.root / folder], check=True
                )

    def unmount(self) -> None:
        """Unmount everything."""
        if "destination" in self.kinds:
            for folder in FOLDERS[1:]:
                subprocess.run(["umount", self.root / folder], check=True)
        for role in self.kinds:
            subprocess.run(["umount", self.mounts / role], check=True)

    def sync(self, role: str) -> None:
        """Let one disk receive all that was written for it."""
        if role in self.kinds:
            descriptor = os.open(self.mounts / role, os.O_RDONLY)
            ctypes.CDLL(None).syncfs(descriptor)
            os.close(descriptor)

    def snapshot(self, name: str) -> None:
        """Copy what the disks have received."""
        for role in self.kinds:
            _copy(self.work / f"{role}.live", self.work / f"{role}.{name}")


@dataclass
class Tally:
    """What the cuts found."""

    cuts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    silent: int = 0


def cut_after(disks: Disks, world: World, fault: Fault, chain: tuple[str, ...], tally: Tally, *, fresh: bool) -> None:
    """Let the child do its work up to one call, cut the power between the syncs of a chain, and look at each cut."""
    disks.mount("pristine")
    if fresh:
        world = _arrived(world)
    struck = _stand_still(world, fault)
    tally.silent += not struck[1]
    disks.snapshot("cut0")
    for number, role in enumerate(chain, start=1):
        disks.sync(role)
        disks.snapshot(f"cut{number}")
    struck[0].kill()
    disks.unmount()
    # The cut before any sync is the same in each chain.
    for number in range(0 if chain is CHAINS[0] else 1, len(chain) + 1):
        disks.mount(f"cut{number}")
        broken = _look(world, fresh=fresh)
        tally.cuts["+".join(disks.kinds.values())] += 1
        tally.broken += [f"{world.plot} {fault} synced {chain[:number]}: {what}" for what in broken]
        disks.unmount()


def _look(world: World, *, fresh: bool) -> list[str]:
    """Recover and compare; what the user himself had not synced may be lost until sortd has journaled it."""
    if fresh:
        with world.journal() as journal:
            known = bool(journal.history.unfinished()) or bool(journal.history.counts())
        world = world if known else replace(world, arrived={})
    broken = broken_before_recovery(world) if not fresh or world.arrived else _half(world)
    run = run_child(world.recover, traced=False)
    broken += ["recovery failed"] if run.status else []
    return broken + (broken_after_recovery(world) if world.arrived else _half(world))


def _half(world: World) -> list[str]:
    """What is in Dataset/ is whole, whoever lost the rest."""
    there = [path for path in (world.root / "Dataset").rglob("*") if path.is_file()]
    return [f"P4 {path}" for path in there if path.stat().st_size == 0]


@dataclass
class _Still:
    """A child that stands still, and its tracer."""

    child: int
    tracer: "subprocess.Popen[str]"

    def kill(self) -> None:
        """End both."""
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self.tracer.wait(PATIENCE_SECONDS)
        if self.tracer.stderr:
            self.tracer.stderr.close()


def _stand_still(world: World, fault: Fault) -> tuple[_Still, bool]:
    """Run the plot until the child has made the call that the fault names; tell whether it did."""
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as log:
        child = be_child(world.act)
        options = ["-e", f"trace={fault.call}", "-e", f"inject={fault.call}:signal=STOP:when={fault.count}"]
        tracer = attached(child, log.name, options)
        os.kill(child, signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            text = Path(log.name).read_text()
            if "stopped by SIGSTOP" in text.partition("SIGCONT")[2]:
                return _Still(child, tracer), True
            if "+++ exited" in text:
                return _Still(child, tracer), False
            time.sleep(0.002)
    raise RuntimeError("the child neither stood still nor ended")


def _arrived(world: World) -> World:
    """Let the user's files arrive just now, so that no disk has their bytes yet."""
    for path in world.arrived:
        if not path.startswith("Images/"):
            continue
        data = (world.root / path).read_bytes()
        (world.root / path).unlink()
        (world.root / path).write_bytes(data)
    return world


def faults_of(disks: Disks, world: World) -> list[Fault]:
    """Return every call after which something on a disk may be new."""
    disks.mount("pristine")
    counts = run_child(world.act).calls()
    disks.unmount()
    return [Fault(name, count) for name in sorted(MUTATING) for count in range(1, counts[name] + 1)]


def run_layout(kinds: dict[str, str], plot: str, tally: Tally, most_runs: int, *, fresh: bool) -> None:
    """Cut one plot on one layout of disks after each call, or after as many as are asked for."""
    chosen = random.Random(SEED)  # noqa: S311 - which cuts are made is no secret
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as work,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as mounts,
    ):
        disks = Disks(Path(work), Path(mounts), kinds)
        disks.make()
        disks.mount("pristine")
        world = build(disks.root, disks.state, plot)
        if plot != "undo":
            with world.journal():  # made beforehand: its making is SQLite's affair, and another test's
                pass
        disks.unmount()
        disks.keep_pristine()
        runs = [(fault, chain) for fault in faults_of(disks, world) for chain in CHAINS]
        for fault, chain in sorted(chosen.sample(runs, min(most_runs, len(runs))), key=str):
            cut_after(disks, world, fault, chain, tally, fresh=fresh)


LAYOUTS = (
    {"source": "ext4", "journal": "ext4"},
    {"source": "xfs", "journal": "ext4"},
    {"source": "ext4", "destination": "ext4", "journal": "ext4"},
    {"source": "ext4", "destination": "xfs", "journal": "ext4"},
    {"source": "xfs", "destination": "ext4", "journal": "xfs"},
)


def obstacle() -> str:
    """Return why power cuts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "power cuts need root, to mount loop devices"
    missing = [name for name in ("mkfs.ext4", "mkfs.xfs", "strace", "mount") if shutil.which(name) is None]
    if missing:
        return f"power cuts need {', '.join(missing)}"
    if not Path("/dev/loop-control").exists():
        return "power cuts need loop devices"
    return can_trace()


def _copy(source: Path, destination: Path) -> None:
    """Copy an image, holes kept."""
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        size = os.fstat(reading).st_size
        os.ftruncate(writing, size)
        edges = _edges(reading, size)
        for (start, is_data), (end, _) in pairwise(edges):
            at = start
            while is_data and at < end:
                chunk = os.pread(reading, min(MIB, end - at), at)
                os.pwrite(writing, chunk, at)
                at += len(chunk)
    finally:
        os.close(reading)
        os.close(writing)


def _edges(descriptor: int, size: int) -> list[tuple[int, bool]]:
    edges, at = [], 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        edges += [(at, False), (start, True)]
        at = end
    return [*edges, (at, False), (size, False)]


def main() -> int:
    """Cut and print the tally; status 1 if something was lost, doubled, torn or touched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=6, help="runs for each plot, layout and freshness; 2 to 4 cuts each"
    )
    parser.add_argument("--plots", default="plain,companions,rejected,undo")
    arguments = parser.parse_args()
    if reason := obstacle():
        print(json.dumps({"skipped": reason}))
        return 0
    if not enter("tests.faults.powercuts"):
        print(json.dumps({"skipped": "mount namespaces cannot be had here"}))
        return 0
    tally, began = Tally(), time.monotonic()
    for kinds in LAYOUTS:
        for plot in arguments.plots.split(","):
            for fresh in (False, True):
                run_layout(kinds, plot, tally, arguments.runs, fresh=fresh)
    found = {
        "cuts": sum(tally.cuts.values()),
        **tally.cuts,
        "silent": tally.silent,
        "violations": len(tally.broken),
        "seconds": round(time.monotonic() - began, 1),
        "first_violations": tally.broken[:20],
    }
    print(json.dumps(found, indent=2))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
