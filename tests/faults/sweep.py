"""A sweep: every fault at every system call of every plot, on one pair of file systems; prints what it found as JSON.

python -m tests.faults.sweep --thin 4 --doubles 60
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sortd.events import Action
from tests.faults.actions import (
    PLOTS,
    ActionWorld,
    broken_action_after_recovery,
    broken_action_before_recovery,
    build_action,
)
from tests.faults.injection import CALLS, MUTATING, Fault, can_trace, run_child
from tests.faults.namespace import enter
from tests.faults.world import MOVES, World, broken_after_recovery, broken_before_recovery, build

AnyWorld = World | ActionWorld

ERRORS = ("EIO", "ENOSPC", "EACCES")
SEED = 20_241


@dataclass(frozen=True)
class Ground:
    """Two places for files and how a file gets from one to the other."""

    name: str
    source: Path
    destination: Path | None = None  # mounted over Dataset, Review and Rejected
    copies: bool = False


@dataclass
class Tally:
    """What a sweep found."""

    runs: Counter[str] = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)  # faults that did not strike
    broken: list[str] = field(default_factory=list)

    def count(self, kind: str, fault: str, broken: list[str], *, struck: bool) -> None:
        """Note one run."""
        self.runs[kind] += 1
        if not struck:
            self.silent.append(fault)
        self.broken += [f"{fault}: {what}" for what in broken]


def grounds(disk: Path, memory: Path, *, can_mount: bool) -> list[Ground]:
    """Return the pairs of file systems that can be had here."""
    same = [
        Ground("disk", disk / "same"),
        Ground("memory", memory / "same"),
        Ground("disk, copied", disk / "copied", copies=True),
    ]
    crossing = [
        Ground("disk to memory", disk / "to_memory", memory / "from_disk"),
        Ground("memory to disk", memory / "to_disk", disk / "from_memory"),
    ]
    return same + (crossing if can_mount else [])


def is_possible(ground: Ground, action: Action) -> bool:
    """Return whether an action can be tried on a ground: a hard link cannot cross, keywords and links are no copies."""
    return action == "move" or not (
        ground.copies or (ground.destination is not None and action in {"hardlink", "keywords"})
    )


def prepare(ground: Ground) -> None:
    """Mount the destination over the folders that sortd moves files to, in this mount namespace."""
    for name in ("Images", "Dataset", "Review", "Rejected"):
        (ground.source / name).mkdir(parents=True, exist_ok=True)
        if ground.destination is not None and name != "Images":
            (ground.destination / name).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", ground.destination / name, ground.source / name], check=True)


def faults_of(world: AnyWorld, names: frozenset[str], thin: int) -> Iterator[Fault]:
    """Yield every fault for every call that the plot makes, or each ``thin``-th of them."""
    counts = _least_counts(world)
    number = 0
    for name in sorted(counts):
        for count in range(1, counts[name] + 1):
            errors = ("", *ERRORS) if name in MUTATING else ("",)
            for error in errors:
                number += 1
                if name in names and number % thin == 0:
                    yield Fault(name, count, error)
                    if error == "EIO":
                        yield Fault(name, count, error, lasting=True)


def _least_counts(world: AnyWorld) -> Counter[str]:
    first, second = (run_child(_again(world).act).calls() for _ in range(2))
    return first & second


def _again(world: AnyWorld) -> AnyWorld:
    if isinstance(world, ActionWorld):
        return build_action(world.root, world.state, world.plot, world.action)
    return build(world.root, world.state, world.plot, copies=world.copies)


def _broken_before(world: AnyWorld) -> list[str]:
    return broken_action_before_recovery(world) if isinstance(world, ActionWorld) else broken_before_recovery(world)


def sweep_single(world: AnyWorld, tally: Tally, thin: int) -> None:
    """Let each fault strike once, look, start again, look."""
    for fault in faults_of(world, CALLS, thin):
        world = _again(world)
        run = run_child(world.act, (fault,))
        label = f"{world.plot}: {fault}"
        broken = [*_broken_before(world), *_recovered(world)]
        struck = run.was_killed if not fault.error else run.has_struck
        tally.count("killed" if not fault.error else "error", label, broken, struck=struck)


def sweep_double(world: AnyWorld, tally: Tally, most: int) -> None:
    """Kill a move, then let a fault strike its recovery, then recover."""
    chosen = random.Random(SEED)  # noqa: S311 - which faults are tried is no secret
    firsts = [fault for fault in faults_of(world, MUTATING, 1) if not fault.error]
    seconds: dict[Fault, list[Fault]] = {}
    for _ in range(most):
        first = chosen.choice(firsts)
        if first not in seconds:
            seconds[first] = _second_faults(world, first)
        second = chosen.choice(seconds[first])
        again = _again(world)
        run_child(again.act, (first,))
        run = run_child(again.recover, (second,))
        broken = [*_broken_before(again), *_recovered(again)]
        tally.count("double", f"{again.plot}: {first} then {second}", broken, struck=run.has_struck)


def _second_faults(world: AnyWorld, first: Fault) -> list[Fault]:
    """Return the faults that can strike the recovery after that first one."""
    struck = _again(world)
    run_child(struck.act, (first,))
    counts = run_child(struck.recover).calls()
    return [
        Fault(name, count, error)
        for name in sorted(MUTATING)
        for count in range(1, counts[name] + 1)
        for error in ("", "EIO")
    ]


def _recovered(world: AnyWorld) -> list[str]:
    run = run_child(world.recover, traced=False)
    broken = broken_action_after_recovery(world) if isinstance(world, ActionWorld) else broken_after_recovery(world)
    return ["recovery failed", *broken] if run.status else broken


def sweep(ground: Ground, state: Path, tally: Tally, *, action: Action, thin: int, most_doubles: int) -> None:
    """Sweep all plots of an action on one ground."""
    prepare(ground)
    for plot in MOVES if action == "move" else PLOTS[action]:
        world: AnyWorld
        if action == "move":
            world = build(ground.source, state, plot, copies=ground.copies)
        else:
            world = build_action(ground.source, state, plot, action)
        sweep_single(world, tally, thin)
        sweep_double(world, tally, most_doubles)


def main() -> int:
    """Sweep and print the tally; status 1 if a promise was broken or a fault did not strike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thin", type=int, default=1, help="take each n-th fault")
    parser.add_argument("--doubles", type=int, default=100, help="pairs of faults for each plot and ground")
    parser.add_argument("--disk", type=Path, default=None, help="a folder on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs")  # noqa: S108
    parser.add_argument("--action", default="move", choices=["move", *PLOTS], help="the action of the dataset")
    parser.add_argument("--grounds", default="", help="only these, by name, comma between")
    arguments = parser.parse_args()
    if reason := can_trace():
        print(json.dumps({"skipped": reason}))
        return 0
    can_mount = enter("tests.faults.sweep")
    tally, began = Tally(), time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=arguments.disk, prefix="sortd-faults-") as disk,
        tempfile.TemporaryDirectory(dir=arguments.memory, prefix="sortd-faults-") as memory,
    ):
        chosen = [one for one in arguments.grounds.split(",") if one]
        for ground in grounds(Path(disk), Path(memory), can_mount=can_mount):
            if (not chosen or ground.name in chosen) and is_possible(ground, arguments.action):
                state = (Path(memory) if ground.name == "memory" else Path(disk)) / "state"
                sweep(
                    ground, state, tally, action=arguments.action, thin=arguments.thin, most_doubles=arguments.doubles
                )
        if can_mount:
            for ground in grounds(Path(disk), Path(memory), can_mount=True):
                for name in ("Dataset", "Review", "Rejected"):
                    if ground.destination is not None and os.path.ismount(ground.source / name):
                        subprocess.run(["umount", ground.source / name], check=True)
    found = {
        "runs": sum(tally.runs.values()),
        **tally.runs,
        "silent": len(tally.silent),
        "across": "yes" if can_mount else "no: mount namespaces cannot be had here",
        "violations": len(tally.broken),
        "seconds": round(time.monotonic() - began, 1),
        "first_silent": tally.silent[:10],
        "first_violations": tally.broken[:20],
    }
    print(json.dumps(found, indent=2))
    return 1 if tally.broken or tally.silent else 0


if __name__ == "__main__":
    sys.exit(main())
