"""Which names a relocation tries: the own one, then ``stem (2).ext`` and so on; pure, the kernel says which is free."""

import os

from sortd.moving.relocation import LONGEST_NAME, Relocation, Role

LONGEST_SUFFIX = 20
"""Bytes; what follows the last dot counts as part of the stem from here on."""


def split_name(name: str) -> tuple[str, str]:
    """Return stem and suffix of a base name; the suffix has its dot."""
    stem, suffix = os.path.splitext(name)
    return (name, "") if len(os.fsencode(suffix)) > LONGEST_SUFFIX else (stem, suffix)


def final_names(relocation: Relocation, attempt: int) -> tuple[str, ...]:
    """Return a name for each member, all with the same stem; ``attempt`` counts from 1."""
    if attempt == 1:
        return tuple(_fitted(member.wanted) for member in relocation.members)
    stem, _ = split_name(relocation.image.wanted)
    ending = os.fsencode(f" ({attempt})")
    tails = [os.fsencode(member.wanted.removeprefix(stem)) for member in relocation.members]
    longest = max(len(tail) for tail, member in zip(tails, relocation.members, strict=True) if _sets_room(member.role))
    rooms = [LONGEST_NAME - len(ending) - max(longest, len(tail)) for tail in tails]
    return tuple(
        os.fsdecode(cut(os.fsencode(stem), room) + ending + tail) for tail, room in zip(tails, rooms, strict=True)
    )


def cut(name: bytes, room: int) -> bytes:
    """Return at most ``room`` bytes of ``name`` that end where a character ends."""
    if len(name) <= room:
        return name
    end = max(room, 1)
    # Bytes 10xxxxxx go on with the character before them (RFC 3629, section 3).
    while end > 1 and name[end] & 0xC0 == 0x80:  # noqa: PLR2004 - the two bits of the rule above
        end -= 1
    return name[:end]


def _sets_room(role: Role) -> bool:
    # A reason's long ending is cut for itself alone: it must not cost the image its name.
    return role is not Role.REASON


def _fitted(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) <= LONGEST_NAME:
        return name
    tail = b".reason.json"
    return os.fsdecode(cut(raw.removesuffix(tail), LONGEST_NAME - len(tail)) + tail)
