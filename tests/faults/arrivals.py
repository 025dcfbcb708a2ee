"""Arrivals: one writer that brings images into an inbox in every way that programs bring them; keeps a list of them.

python -m tests.faults.arrivals INBOX STAGING LIST --writer 0 --files 500 --seed 1

Each line of the list is a word and the sha256 of one file: ``due`` files must stand somewhere in the end, each exactly
once; ``maybe`` ones were deleted or replaced by this very writer, and stand somewhere only if sortd was faster.
"""

import argparse
import hashlib
import heapq
import io
import mmap
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

COLOURS = ((200, 40, 40), (40, 190, 60), (50, 60, 210))
SIDE = 8
MOST_AT_ONCE = 40
"""Slow ways that are under way at the same time."""

Pauses = Iterator[float]
"""A way in which a file comes, told as the seconds until it goes on."""


@dataclass
class Writer:
    """Brings files into one folder of an inbox, and knows what it has brought."""

    inbox: Path
    staging: Path
    dice: random.Random
    number: int
    told: list[str] = field(default_factory=list)
    count: int = 0
    serial: int = 0
    last: bytes = b""

    def due(self, content: bytes) -> None:
        """Note a file that must not be lost."""
        self.told.append(f"due {hashlib.sha256(content).hexdigest()}")

    def maybe(self, content: bytes) -> None:
        """Note a file that this writer itself took away, or tried to."""
        self.told.append(f"maybe {hashlib.sha256(content).hexdigest()}")

    def content(self) -> bytes:
        """Make an image; one in twenty is broken, one in ten equal to the one before."""
        self.count += 1
        if self.last and self.dice.random() < 0.1:
            return self.last
        red, green, blue = COLOURS[self.count % 3]
        noise = bytes(
            max(0, min(255, value + self.dice.randrange(-20, 20)))
            for _ in range(SIDE * SIDE)
            for value in (red, green, blue)
        )
        file = io.BytesIO()
        Image.frombytes("RGB", (SIDE, SIDE), noise).save(file, "PNG", compress_level=1)
        made = file.getvalue()
        self.last = made[: len(made) // 2] if self.dice.random() < 0.05 else made
        return self.last

    def place(self) -> Path:
        """Choose where a file is to stand: mostly a camera's name that came before, sometimes a strange one."""
        usual = f"IMG_{self.count % 997:04}.png"
        odd = (
            f"line\nbreak {self.count}.png",
            os.fsdecode(b"caf\xe9 %d.png" % self.count),
            f"{self.count} {'é' * 150}"[: 200 - len(str(self.count))][:120] + ".png",
            f"{self.count:06}" + "n" * 245 + ".png",
            f" {self.count}  .PNG",
        )
        name = self.dice.choice(odd) if self.dice.random() < 0.05 else usual
        path = self.inbox / name
        if os.path.lexists(path) or os.path.lexists(f"{path}.xmp"):
            path = self.inbox / f"unique {self.number} {self.count}.png"
        return path

    def staged(self, content: bytes) -> Path:
        """Write a file outside of every dataset, on the same disk."""
        self.serial += 1
        path = self.staging / f"{self.number} {self.serial}.png"
        path.write_bytes(content)
        return path


def _open(path: Path, flags: int = os.O_CREAT | os.O_EXCL) -> int:
    return os.open(path, os.O_WRONLY | flags, 0o644)


def plainly(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Write it in one go under its own name."""
    writer.due(content)
    path.write_bytes(content)
    yield from ()


def slowly(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Append piece after piece to an open file."""
    writer.due(content)
    file = _open(path)
    for start in range(0, len(content), 1 + len(content) // 4):
        os.write(file, content[start : start + 1 + len(content) // 4])
        yield writer.dice.uniform(0.05, 1.5)
    os.close(file)


def in_two_sittings(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Write half, close, open again, write the rest; half a file that was set aside meanwhile is a file of its own."""
    half = len(content) // 2
    file = _open(path)
    os.write(file, content[:half])
    os.close(file)
    yield writer.dice.uniform(0.02, 0.3)
    try:
        file = _open(path, os.O_APPEND)
    except FileNotFoundError:
        writer.due(content[:half])
        return
    writer.due(content)
    os.write(file, content[half:])
    os.close(file)


def laid_out(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Reserve the full size first and fill it later."""
    writer.due(content)
    file = _open(path)
    os.posix_fallocate(file, 0, len(content))
    yield writer.dice.uniform(0.05, 1.5)
    os.write(file, content)
    os.close(file)


def mapped(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Write through a mapping that outlives the descriptor."""
    writer.due(content)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.ftruncate(file, len(content))
    mapping = mmap.mmap(file, len(content))
    os.close(file)
    yield writer.dice.uniform(0.05, 1.5)
    mapping[:] = content
    mapping.close()


def by_a_second_descriptor(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Close the first descriptor and go on with its double."""
    writer.due(content)
    file = _open(path)
    double = os.dup(file)
    os.write(file, content[:20])
    os.close(file)
    yield writer.dice.uniform(0.05, 1.5)
    os.write(double, content[20:])
    os.close(double)


def by_two_at_once(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Two programs write two halves and close at different times."""
    writer.due(content)
    half = len(content) // 2
    first, second = _open(path), os.open(path, os.O_WRONLY)
    os.pwrite(first, content[:half], 0)
    os.close(first)
    yield writer.dice.uniform(0.05, 1.5)
    os.pwrite(second, content[half:], half)
    os.close(second)


def by_rename(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Write under a temporary name, as rsync, browsers and sync clients do, and rename."""
    writer.due(content)
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(
        writer.dice.choice((f".{name}.Ab3xYz", f"{name}.part", f"{name}.crdownload", f".syncthing.{name}.tmp"))
    )
    temporary.write_bytes(content)
    yield writer.dice.uniform(0.0, 1.0)
    temporary.rename(path)


def by_move(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Move it in whole from another folder of the disk."""
    writer.due(content)
    writer.staged(content).rename(path)
    yield from ()


def by_link(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Link it in; the first name goes later, or now and then is a second name in the inbox itself."""
    writer.due(content)
    staged = writer.staged(content)
    os.link(staged, path)
    if writer.dice.random() < 0.3:
        writer.due(content)
        staged.rename(path.with_name(f"second link {writer.number} {writer.count}.png"))
        return
    yield writer.dice.uniform(0.0, 2.0)
    staged.unlink()


def replaced(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Rename a better version over it after a while: between its decoding and its move, with luck."""
    writer.maybe(content)
    path.write_bytes(content)
    yield writer.dice.uniform(0.0, 1.5)
    better = content + struct.pack("<Q", writer.count)
    writer.due(better)
    staged = writer.staged(better)
    staged.rename(path)


def deleted(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Delete it after a while: while it is decoded, with luck."""
    writer.maybe(content)
    path.write_bytes(content)
    yield writer.dice.uniform(0.0, 1.5)
    path.unlink(missing_ok=True)


def with_a_note(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Put a sidecar first and its image then."""
    note = f"{writer.number} {writer.count}".encode()
    writer.due(note)
    writer.due(content)
    name = f"noted {writer.number} {writer.count}.png"
    path.with_name(f"{name}.xmp").write_bytes(note)
    yield writer.dice.uniform(0.0, 0.2)
    path.with_name(name).write_bytes(content)


def as_a_folder(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Move a folder in that has a deep tree in it."""
    album = writer.staging / f"album {writer.number} {writer.count}"
    (album / "deep" / "er").mkdir(parents=True)
    for place in ("a.png", "deep/b.png", "deep/er/c.png"):
        writer.due(content)
        (album / place).write_bytes(content)
        content = writer.content()
    yield 0.0
    album.rename(path.with_name(album.name))


def into_new_folders(writer: Writer, path: Path, content: bytes) -> Pauses:
    """Make a tree and write into it at once, as ``cp -r`` does."""
    folder = path.parent / f"copied {writer.count % 7}" / str(writer.count % 5)
    folder.mkdir(parents=True, exist_ok=True)
    writer.due(content)
    (folder / f"{writer.number} {writer.count}.png").write_bytes(content)
    yield from ()


WAYS: tuple[Callable[[Writer, Path, bytes], Pauses], ...] = (
    *(plainly, by_rename, by_move) * 4,  # what happens most
    *(slowly, in_two_sittings, laid_out, mapped, by_a_second_descriptor, by_two_at_once),
    *(by_link, replaced, deleted, with_a_note, as_a_folder, into_new_folders),
)


def bring(writer: Writer, files: int, may_go_on: Callable[[], bool]) -> None:
    """Bring so many files, some ways at the same time, and end each of them."""
    going: list[tuple[float, int, Pauses]] = []
    while writer.count < files or going:
        now = time.monotonic()
        if going and going[0][0] <= now:
            _, ticket, pauses = heapq.heappop(going)
            pause = next(pauses, None)
            if pause is not None:
                heapq.heappush(going, (now + pause, ticket, pauses))
        elif writer.count < files and len(going) < MOST_AT_ONCE and (writer.count % 50 or may_go_on()):
            content = writer.content()
            way = writer.dice.choice(WAYS)
            heapq.heappush(going, (now, writer.count, way(writer, writer.place(), content)))
        else:
            time.sleep(min(0.05, going[0][0] - now) if going else 0.05)


def main() -> None:
    """Bring the files and write the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inbox", type=Path)
    parser.add_argument("staging", type=Path)
    parser.add_argument("list", type=Path)
    parser.add_argument("--writer", type=int, default=0, help="its number, in names")
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument(
        "--most-waiting", type=int, default=2_000, help="files in the inbox; it waits while there are more"
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.inbox / f"writer {arguments.writer}"
    folder.mkdir(parents=True, exist_ok=True)

    most = int(arguments.most_waiting)

    def may_go_on() -> bool:
        with os.scandir(folder) as entries:  # the folders that were emptied stay
            return sum(not entry.is_dir() for entry in entries) < most

    dice = random.Random(arguments.seed)  # noqa: S311 - which way a file comes is no secret
    writer = Writer(folder, arguments.staging, dice, arguments.writer)
    bring(writer, arguments.files, may_go_on)
    arguments.list.write_text("".join(f"{line}\n" for line in writer.told))


if __name__ == "__main__":
    main()
