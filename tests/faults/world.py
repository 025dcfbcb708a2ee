"""A small dataset that a fault is let loose on, and what must be true of it whatever the fault was."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sortd.events import Move, Outcome
from sortd.files import stamp_of
from sortd.moving.fs import FolderNames, Listings, rename_new
from sortd.moving.mover import MoveAnswer, Mover
from sortd.store.journal import Journal
from sortd.store.records import Selection

IMAGE_BYTES = 70_000
"""More than one page and less than a chunk; a hole of 1 MiB lies in one image."""


def cannot_rename(*names: int | str) -> None:
    """Be a rename between file systems."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), *names[1:2])


class OldListings(Listings):
    """Listings from before the plot's files came into the destinations: the kernel alone refuses their names."""

    def __init__(self, world: "World") -> None:
        """Take the world whose standing files are not seen."""
        super().__init__()
        self._unseen = {str(world.root / path) for path in world.standing if not path.startswith("Images/")}

    def names(self, folder: int) -> FolderNames:
        """Return the names in an open folder, but for those that stand there."""
        path = os.readlink(f"/proc/self/fd/{folder}")
        return FolderNames(name for name in os.listdir(folder) if f"{path}/{name}" not in self._unseen)


@dataclass(frozen=True)
class World:
    """One dataset with a journal, what the user put in it and what sortd is to do."""

    root: Path
    state: Path
    plot: str
    copies: bool = False  # rename is forbidden, so that everything is copied
    arrived: dict[str, str] = field(default_factory=dict)  # path below the root -> sha256, of what is to be moved
    standing: dict[str, tuple[str, int]] = field(default_factory=dict)  # of what must stay: sha256 and inode

    def journal(self) -> Journal:
        """Open the journal."""
        return Journal(self.state / "journal.db", clock=lambda: 1.0, run="faults")

    def mover(self, journal: Journal) -> Mover:
        """Return what moves files here."""
        rename = cannot_rename if self.copies else rename_new
        # One thread: strace counts for each thread by itself, and the order of syncs would not be the same twice.
        return Mover(self.root, journal, rename=rename, sync_threads=1, listings=OldListings(self))

    def act(self) -> list[MoveAnswer]:
        """Do what the plot says; this is where faults strike."""
        with self.journal() as journal:
            mover = self.mover(journal)
            mover.recover()
            if self.plot == "undo":
                mover.undo(journal.history.moves(Selection(undoable=True)))
                return []
            return mover.move_all(self.moves())

    def recover(self) -> None:
        """Do what the next start does."""
        with self.journal() as journal:
            self.mover(journal).recover()

    def moves(self) -> list[Move]:
        """Return the moves that the plot asks for, of what stands in Images/ now."""
        return [
            Move(str(self.root / path), stamp_of(os.stat(self.root / path)), folder, outcome, reason="broken")
            for path, folder, outcome in MOVES[self.plot]
            if (self.root / path).exists()
        ]


MOVES = {
    "plain": [("Images/a.jpg", "Dataset/cat", Outcome.FILED)],
    "companions": [("Images/a.jpg", "Dataset/cat", Outcome.FILED)],
    "rejected": [("Images/a.jpg", "Rejected", Outcome.REJECTED)],
    "batch": [
        ("Images/a.jpg", "Dataset/cat", Outcome.FILED),
        ("Images/b.jpg", "Dataset/dog", Outcome.FILED),
        ("Images/c.jpg", "Review/cat", Outcome.REVIEW),
    ],
    "undo": [("Images/a.jpg", "Rejected", Outcome.REJECTED)],
}
ARRIVE = {
    "plain": ["a.jpg"],
    "companions": ["a.jpg", "a.jpg.xmp", "a.MOV"],
    "rejected": ["a.jpg", "a.xmp"],
    "batch": ["a.jpg", "b.jpg", "c.jpg", "c.xmp"],
    "undo": ["a.jpg"],
}
STAND = {
    "plain": ["Dataset/cat/a.jpg"],
    "companions": ["Dataset/cat/a (2).MOV", "Dataset/cat/a.jpg"],
    # A second image of the same stem: the sidecar is shared, and stays.
    "rejected": ["Images/a.png"],
    "batch": ["Dataset/dog/b.jpg", "Review/cat/c.xmp"],
    "undo": ["Images/a.png", "Images/a.xmp"],
}
FOLDERS = ("Images", "Dataset", "Review", "Rejected")


def build(root: Path, state: Path, plot: str, *, copies: bool = False) -> World:
    """Clear the ground and put the plot's files on it."""
    cleared(root, state)
    arrived = {f"Images/{name}": put_file(root / "Images" / name, name) for name in ARRIVE[plot]}
    shared = {path for path in arrived if plot == "rejected" and path.endswith(".xmp")}
    standing: dict[str, tuple[str, int]] = {}
    for path in STAND[plot]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        standing[path] = (put_file(root / path, f"standing {path}"), os.stat(root / path).st_ino)
    for path in shared:
        standing[path] = (arrived.pop(path), os.stat(root / path).st_ino)
    world = World(root, state, plot, copies, arrived, standing)
    if plot == "undo":
        with world.journal() as journal:
            world.mover(journal).move_all(world.moves())
        world.arrived["Rejected/a.jpg"] = world.arrived.pop("Images/a.jpg")
    return world


def cleared(root: Path, state: Path) -> None:
    """Make the folders, and remove what is in them."""
    for folder in (*(root / name for name in FOLDERS), state):
        folder.mkdir(parents=True, exist_ok=True)
        for entry in list(os.scandir(folder)):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def put_file(path: Path, seed: str) -> str:
    """Write bytes that no other seed gives, and return their hash."""
    data = bytearray((hashlib.sha256(seed.encode()).digest() * (IMAGE_BYTES // 32 + 1))[:IMAGE_BYTES])
    with path.open("xb") as file:
        file.write(data)
        if path.name == "a.jpg":
            file.seek(1 << 20, os.SEEK_CUR)
            file.write(b"the end")
    return hash_of(path)


def hash_of(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield path below the root and sha256 of every file of the dataset's four folders."""
    for top in FOLDERS:
        for folder, _, names in os.walk(root / top):
            for name in names:
                path = Path(folder) / name
                yield str(path.relative_to(root)), hash_of(path)


def broken_before_recovery(world: World) -> list[str]:
    """Return what is broken of P1, P2 and P4; these hold at every instant."""
    there = dict(files(world.root))
    known = {*world.arrived.values(), *(content for content, _ in world.standing.values())}
    broken = [f"P1 {path} is lost" for path, content in world.arrived.items() if content not in there.values()]
    for path, (content, inode) in world.standing.items():
        if there.get(path) != content or os.stat(world.root / path).st_ino != inode:
            broken.append(f"P2 {path} was touched")
    for path, content in there.items():
        if not Path(path).name.startswith(".sortd-") and content not in known and not _is_whole_reason(world, path):
            broken.append(f"P4 {path} is not whole")
    return broken


def broken_after_recovery(world: World) -> list[str]:
    """Return what is broken of P1 to P5 once sortd has been started again."""
    there = dict(files(world.root))
    broken = broken_before_recovery(world)
    broken += [f"left over: {path}" for path in there if Path(path).name.startswith(".sortd-")]
    counted = Counter(content for path, content in there.items() if path not in world.standing)
    for path, content in world.arrived.items():
        if counted[content] != 1:
            broken.append(f"P3 {path} stands {counted[content]} times")
    for path, (content, _) in world.standing.items():
        if counted[content] > (1 if path.endswith(".xmp") else 0):
            broken.append(f"P3 {path} was copied {counted[content]} times")
    return broken + _broken_groups(world, there) + _broken_journal(world, there)


def _broken_groups(world: World, there: dict[str, str]) -> list[str]:
    homes: dict[str, set[str]] = {}
    for path, content in world.arrived.items():
        stem = Path(path).name.partition(".")[0]
        homes.setdefault(stem, set()).update(
            str(Path(found).parent / Path(found).name.partition(".")[0])
            for found, other in there.items()
            if other == content and found not in world.standing
        )
    broken = [f"companions of {stem} are torn apart: {places}" for stem, places in homes.items() if len(places) > 1]
    rejected = [path for path in there if path.startswith("Rejected/")]
    images = [path for path in rejected if path.endswith(".jpg")]
    reasons = [path for path in rejected if path.endswith(".reason.json")]
    if [f"{path}.reason.json" for path in images] != reasons:
        broken.append(f"reasons do not fit: {rejected}")
    return broken


def _broken_journal(world: World, there: dict[str, str]) -> list[str]:
    with world.journal() as journal:
        broken = [f"open: {record.move}" for record in journal.history.unfinished()]
        done = {record.destination_path for record in journal.history.moves(Selection(undoable=True))}
        moved = {
            path
            for path, content in there.items()
            if content in world.arrived.values() and not path.startswith("Images/") and path not in world.standing
        }
    images = {path for path in moved if path.endswith(".jpg")}
    return broken + ([f"P5 said {sorted(done)}, there {sorted(images)}"] if done != images else [])


def _is_whole_reason(world: World, path: str) -> bool:
    if not path.endswith(".reason.json"):
        return False
    try:
        return bool(json.loads((world.root / path).read_bytes())["reason"])
    except (ValueError, KeyError):
        return False
