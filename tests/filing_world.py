"""A dataset in a temporary folder with a journal, for the tests of what moves files."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sortd.events import Move, Moved, MoveFailed, MoveFailure, Outcome
from sortd.files import stamp_of
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import Record, Selection


@dataclass
class Clock:
    """A clock that goes on by one second whenever it is read."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the next second."""
        self.now += 1
        return self.now


@dataclass
class Dataset:
    """A dataset with ``Images/`` and a journal beside it."""

    folder: Path
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def below(cls, folder: Path) -> Self:
        """Make one."""
        (folder / "set" / "Images").mkdir(parents=True)
        return cls(folder)

    @property
    def root(self) -> Path:
        """The dataset itself."""
        return self.folder / "set"

    def journal(self, run: str = "first") -> Journal:
        """Open its journal."""
        return Journal(self.folder / "state" / "journal.db", clock=self.clock, run=run)

    def put(self, path: str, content: bytes | str = b"image") -> Path:
        """Put a file below the dataset."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return target

    @contextmanager
    def deep(self, depth: int) -> Iterator[Path]:
        """Make nested folders in Images/ and yield the deepest; Python's own removal would recurse too deeply."""
        folder, path = os.open(self.root / "Images", os.O_RDONLY), "Images"
        for _ in range(depth):
            os.mkdir("d", dir_fd=folder)
            inner = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder, path = inner, f"{path}/d"
        os.close(folder)
        try:
            yield self.root / path
        finally:
            subprocess.run(["rm", "-rf", self.root / "Images" / "d"], check=True)

    def tree(self) -> dict[str, bytes]:
        """Return every file of the dataset and what is in it, but for reasons, which are ours."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder) / name
                if not name.endswith(".reason.json"):
                    found[str(path.relative_to(self.root))] = path.read_bytes()
        return found


def order(path: Path, folder: str = "Dataset/cat", outcome: Outcome = Outcome.FILED, content: str = "") -> Move:
    """Order a move of what stands under the path now."""
    return Move(str(path), stamp_of(os.lstat(path)), folder, outcome, content=content)


def moved(filing: Mover, move: Move) -> str:
    """Carry out one move that must succeed; return where it went, relative to the dataset's folder."""
    (answer,) = filing.move_all([move])
    assert isinstance(answer, Moved), answer
    return answer.destination


def failure(filing: Mover, move: Move) -> MoveFailure:
    """Carry out one move that must fail; return why."""
    (answer,) = filing.move_all([move])
    assert isinstance(answer, MoveFailed), answer
    return answer.failure


def done(journal: Journal) -> list[Record]:
    """Return all records, newest first."""
    return journal.history.moves(Selection())
