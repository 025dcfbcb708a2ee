"""A small dataset whose images stay in Images/, for faults, and what must be true of it whatever the fault was."""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sortd.events import Action, Move, Outcome
from sortd.files import stamp_of
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import Selection
from sortd.xmp import with_class
from tests.faults.world import FOLDERS, cleared, hash_of, put_file

PLOTS: dict[Action, list[str]] = {
    "copy": ["filed", "undone"],
    "hardlink": ["filed", "undone"],
    "symlink": ["filed", "undone"],
    "keywords": ["filed", "undone", "existing", "existing undone", "changed undone"],
}
"""What happens to the image: ``existing`` keywords go into a sidecar that another program wrote, ``changed`` ones come
out of a sidecar that another program changed since."""
FORMER = b"""<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description>
<d:subject xmlns:d="http://purl.org/dc/elements/1.1/"><rdf:Bag><rdf:li>sea</rdf:li></rdf:Bag></d:subject>
</rdf:Description></rdf:RDF>"""
SIDECAR = "Images/a.jpg.xmp"


@dataclass(frozen=True)
class ActionWorld:
    """One dataset with a journal, an image with a film, and what sortd is to do with them."""

    root: Path
    state: Path
    plot: str
    action: Action
    originals: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # sha256, inode, mtime
    standing: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    former: bytes | None = None  # the sidecar before the act

    def journal(self) -> Journal:
        """Open the journal."""
        return Journal(self.state / "journal.db", clock=lambda: 1.0, run="faults")

    def act(self) -> None:
        """File the image if it is not filed, or undo that; this is where faults strike."""
        with self.journal() as journal:
            mover = Mover(self.root, journal, sync_threads=1)
            mover.recover()
            if self.plot.endswith("undone"):
                mover.undo(journal.history.moves(Selection(undoable=True)))
            else:
                self.file(journal, mover)

    def file(self, journal: Journal, mover: Mover) -> None:
        """File the image unless it is filed in place: what each scan does."""
        path = self.root / "Images/a.jpg"
        version = stamp_of(os.stat(path))
        if not journal.history.is_filed_in_place(version, "Images", "a.jpg"):
            mover.move_all([Move(str(path), version, "Dataset/cat", Outcome.ASSIGNED, action=self.action)])

    def recover(self) -> None:
        """Do what the next start does."""
        with self.journal() as journal:
            Mover(self.root, journal, sync_threads=1).recover()

    @property
    def is_filed(self) -> bool:
        """Whether the journal says that the image is filed."""
        with self.journal() as journal:
            return bool(journal.history.moves(Selection(undoable=True)))


def build_action(root: Path, state: Path, plot: str, action: Action) -> ActionWorld:
    """Clear the ground and put the plot's files on it."""
    cleared(root, state)
    names = ["a.jpg"] if action == "keywords" else ["a.jpg", "a.MOV"]
    originals = {f"Images/{name}": _put(root / "Images" / name, name) for name in names}
    # The first name in the class is taken, so that a group of links goes back once.
    standing = {} if action == "keywords" else {"Dataset/cat/a.MOV": _put(root / "Dataset/cat/a.MOV", "standing")}
    if plot.startswith("existing"):
        (root / SIDECAR).write_bytes(FORMER)
    if plot.endswith("undone"):
        with (world := ActionWorld(root, state, "filed", action)).journal() as journal:
            world.file(journal, Mover(root, journal, sync_threads=1))
    if plot.startswith("changed"):
        (root / SIDECAR).write_bytes(with_class((root / SIDECAR).read_bytes(), "sea") or b"")
    former = (root / SIDECAR).read_bytes() if (root / SIDECAR).exists() else None
    return ActionWorld(root, state, plot, action, originals, standing, former)


def _put(path: Path, seed: str) -> tuple[str, int, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    put_file(path, seed)
    return _version(path)


def _version(path: Path) -> tuple[str, int, int]:
    status = os.stat(path)
    return hash_of(path), status.st_ino, status.st_mtime_ns


def _entries(world: ActionWorld) -> Iterator[Path]:
    for top in FOLDERS:
        for folder, _, names in os.walk(world.root / top):
            yield from (Path(folder) / name for name in names)


def broken_action_before_recovery(world: ActionWorld) -> list[str]:
    """Return what is broken at any instant: originals are intact, nothing is partial, the former sidecar exists."""
    broken = []
    for path, version in {**world.originals, **world.standing}.items():
        if not (world.root / path).exists() or _version(world.root / path) != version:
            broken.append(f"{path} was touched")
    contents = {version[0] for version in world.originals.values()} | {one[0] for one in world.standing.values()}
    sidecars = {world.former, with_class(world.former, "cat"), *_sidecars_after_undo(world)}
    for file in _entries(world):
        is_sidecar = file.suffix == ".xmp"
        is_whole = file.exists() and (file.read_bytes() in sidecars if is_sidecar else hash_of(file) in contents)
        if not file.name.startswith(".sortd-") and not is_whole:
            broken.append(f"{file} is not whole")
    return broken + _lost_sidecar(world)


def _sidecars_after_undo(world: ActionWorld) -> list[bytes]:
    if world.action != "keywords" or not world.plot.endswith("undone"):
        return []
    after = with_class(None, "sea") if world.plot == "changed undone" else FORMER
    # The class comes out of a sidecar that had another one added: the lists keep that one.
    return [] if after is None else [after]


def _lost_sidecar(world: ActionWorld) -> list[str]:
    """Return a message if the former bytes of the sidecar are in no file and not in the journal."""
    if world.former is None or any(
        path.read_bytes() == world.former for path in _entries(world) if path.parent.name == "Images"
    ):
        return []
    with closing(sqlite3.connect(world.state / "journal.db")) as connection:
        kept = connection.execute("SELECT 1 FROM members WHERE body = ?", (world.former,)).fetchone()
    return [] if kept else ["the former sidecar is lost"]


def broken_action_after_recovery(world: ActionWorld) -> list[str]:
    """Return what is broken once sortd has been started again, and once it has scanned again."""
    broken = broken_action_before_recovery(world) + _broken_outcome(world)
    if not world.plot.endswith("undone"):
        world.act()
        if not world.is_filed:
            broken.append("it is not filed by the next scan")
        broken += [f"after the next scan: {one}" for one in _broken_outcome(world)]
        broken += [f"after the next scan: {one}" for one in broken_action_before_recovery(world)]
    return broken


def _broken_outcome(world: ActionWorld) -> list[str]:
    broken = [f"left over: {path}" for path in _entries(world) if path.name.startswith(".sortd-")]
    with world.journal() as journal:
        broken += [f"open: {record.move}" for record in journal.history.unfinished()]
        undone = [record for record in journal.history.moves(Selection()) if record.undone_by is not None]
        held = journal.history.held_version("Images/a.jpg")
    if bool(undone) != (held is not None):
        broken.append(f"held {held}, undone {len(undone)} times")
    if world.action == "keywords":
        text = (world.root / SIDECAR).read_bytes() if (world.root / SIDECAR).exists() else b""
        if (b"sortd|cat" in text) != world.is_filed:
            broken.append(f"journal says filed: {world.is_filed}, the sidecar has {text!r}")
        return broken
    made = Counter(
        path.suffix
        for path in (world.root / "Dataset").rglob("a*")
        if str(path.relative_to(world.root)) not in world.standing
    )
    expected = Counter({".jpg": 1, ".MOV": 1} if world.is_filed else {})
    if made != expected:
        broken.append(f"in the class: {dict(made)}, expected {dict(expected)}")
    return broken
