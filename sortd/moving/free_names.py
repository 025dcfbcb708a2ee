"""Which names a relocation tries: the own one, then ``stem (2).ext`` and so on; pure, the kernel says which is free."""

import os

from sortd.moving.companions import fold, parts_beside, split_name
from sortd.store.records import LONGEST_NAME, MoveRecord, Role


def final_names(relocation: MoveRecord, attempt: int) -> tuple[str, ...]:
    """Return a name for each member, all with the same number; ``attempt`` counts from 1."""
    if attempt == 1:
        return tuple(_fitted(member.wanted) for member in relocation.members)
    image = relocation.image.wanted
    stem, suffix = split_name(image)
    number = os.fsencode(f" ({attempt})")
    parts = [(stem, suffix), *(parts_beside(member.wanted, image) for member in relocation.members[1:])]
    longest = max(
        len(os.fsencode(tail))
        for (base, tail), member in zip(parts, relocation.members, strict=True)
        if base == stem and _sets_room(member.role)
    )
    found: list[str] = []
    for (base, tail), member in zip(parts, relocation.members, strict=True):
        name = _numbered(base, number, tail, longest if base == stem else 0)
        if fold(name) in {fold(other) for other in found}:
            own_stem, own_suffix = split_name(member.wanted)  # the names of two members differ there at least
            name = _numbered(own_stem, number, own_suffix, 0)
        found.append(name)
    return tuple(found)


def _numbered(base: str, number: bytes, tail: str, longest: int) -> str:
    ending = number + os.fsencode(tail)
    room = LONGEST_NAME - len(number) - max(longest, len(ending) - len(number))
    return os.fsdecode(cut(os.fsencode(base), room) + ending)


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
