"""The facts of one relocation: an image and its companions on their way from one folder of a dataset to another.

The journal keeps them, the mover and the recovery act on them; none of them knows the others.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from sortd.events import Stamp

TOPS = frozenset({"Images", "Dataset", "Review", "Rejected"})
"""The only folders of a dataset between which sortd moves anything."""

LONGEST_NAME = 255
"""Bytes in one name, not characters, on every file system that sortd was tried on."""


class Role(StrEnum):
    """What a member of a relocation is to its image."""

    IMAGE = "image"
    COMPANION = "companion"  # travels with the image
    SHARED = "shared"  # belongs to another image too: copied, the original stays
    REASON = "reason"  # made by sortd, beside an image that it set aside


class Progress(StrEnum):
    """How far a relocation has come; each word is durable before the next step begins."""

    INTENDED = "intended"  # any of its members may have been renamed; no copy counts for anything
    PUBLISHING = "publishing"  # whole copies stand in the destination, known by inode and hash
    PUBLISHED = "published"  # the copies stand durably under their final names; the sources may go
    DONE = "done"
    FAILED = "failed"  # every member is where it was


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a relocation."""

    role: Role
    name: str  # base name in the source folder; of a reason, its own wanted name
    wanted: str  # base name in the destination folder, where it is free
    stamp: Stamp  # the version that is meant; of a reason, zeros
    content: str = ""  # hexadecimal sha256, where it is known
    body: bytes = b""  # of a reason: all its bytes
    copy_inode: int = 0  # of the copy, from PUBLISHING on
    final: str = ""  # base name that it got
    moved_stamp: Stamp | None = None

    @property
    def leaves(self) -> bool:
        """Whether this file leaves the source folder; the others are made in the destination."""
        return self.role in {Role.IMAGE, Role.COMPANION}


@dataclass(frozen=True, slots=True)
class Relocation:
    """An image (always the first member) and its companions: all of them go, or none."""

    token: str  # 16 hexadecimal digits, never used twice
    source: str  # folder, relative to the dataset
    destination: str
    members: tuple[Member, ...]
    progress: Progress = Progress.INTENDED
    lost: tuple[str, ...] = ()  # metadata that could not be kept
    message: str = ""
    spent: tuple[Member, ...] = ()  # made by sortd in the source folder, of no use once the image is away
    joins: bool = False  # its only member comes to its image: what of that image stands there is not in its way

    @property
    def image(self) -> Member:
        """The member that was decided on."""
        return self.members[0]

    def with_member(self, member: Member) -> Self:
        """The same relocation with one more member."""
        return replace(self, members=(*self.members, member))

    def part_name(self, position: int) -> str:
        """Name of a copy that is not published yet, in the destination folder."""
        return f".sortd-{self.token}.{position}.part"

    def taken_name(self, position: int) -> str:
        """Name of a source that was copied and is to go, in the source folder."""
        return f".sortd-{self.token}.{position}.del"

    def failed(self, message: str) -> Self:
        """The same relocation, taken back."""
        return replace(self, progress=Progress.FAILED, message=message)


class FolderNameError(ValueError):
    """A folder that sortd must not touch was named."""


def checked_folder(folder: str) -> str:
    """Return ``folder`` if it is a plain path below one of the dataset's four folders.

    A journal is a file too: what it names is checked like any other input before something is renamed or removed.

    Raises:
        FolderNameError: it is absolute, climbs, hides, or begins elsewhere.
    """
    components = folder.split("/")
    if components[0] not in TOPS or any(part in {"", ".", ".."} or "\0" in part for part in components):
        raise FolderNameError(f"{folder!r} is no folder that sortd moves files between ({', '.join(sorted(TOPS))})")
    if components[0] != "Images" and any(_is_unfit_for_a_class(part) for part in components):
        raise FolderNameError(f"{folder!r} holds a class name that begins with a dot or has control characters")
    return folder


def checked_name(name: str) -> str:
    """Return ``name`` if it is the base name of a file.

    Raises:
        FolderNameError: it is empty or leads to another folder.
    """
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise FolderNameError(f"{name!r} is no name of a file")
    return name


def _is_unfit_for_a_class(part: str) -> bool:
    return part.startswith(".") or any(ord(character) < ord(" ") or character == "\x7f" for character in part)
