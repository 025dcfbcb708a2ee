"""What becomes of a move that did not end: one way for errors and crashes, by looking at what stands where.

Nothing is removed here unless the same bytes are known to stand elsewhere; doing it all again is no mistake.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from itertools import chain

from sortd.companions import split_name
from sortd.errors import ChangedError
from sortd.files import sync_folder
from sortd.moving.copy import Advance, give_back, publish_anywhere, remove_sources, seal_published, settled
from sortd.moving.fs import Folders, is_version, look, names_of, rename_new
from sortd.moving.parts import content_of, make_part, remove_obsolete, remove_part
from sortd.moving.plan import MOST_ATTEMPTS, final_names, names_of_one
from sortd.store.records import MoveFile, MoveProgress, MoveRecord, Role

_NUMBERED = re.compile(r" \((\d+)\)$")


@dataclass(frozen=True, slots=True)
class _Places:
    """The two folders of a move as they are now; a folder that is gone is -1."""

    source: int
    destination: int


def recover(folders: Folders, relocation: MoveRecord, advance: Advance) -> MoveRecord:
    """Bring a move that did not end to its end, or back to its beginning.

    Returns:
        It, with progress DONE, FAILED (every file is in the source folder), or unchanged where a folder that must
        be looked at is not there: a disk that is not mounted keeps its moves open.

    Raises:
        OSError, JournalError: a disk refused; it stays open.
    """
    places = _Places(_open_or_absent(folders, relocation.source), _open_or_absent(folders, relocation.destination))
    match relocation.progress:
        case MoveProgress.INTENDED:
            return _recover_intended(folders, places, relocation)
        case MoveProgress.PUBLISHING:
            return _recover_publishing(folders, places, relocation, advance)
        case MoveProgress.PUBLISHED:
            return _recover_published(folders, places, relocation, advance)
        case _:
            return relocation


# ---------------------------------------------------------------- intended: renames, or copies that count for nothing


def _recover_intended(folders: Folders, places: _Places, relocation: MoveRecord) -> MoveRecord:
    _give_back_taken(places, relocation)
    moved = _moved_members(places, relocation)
    leaving = [position for position, member in enumerate(relocation.members) if member.leaves]
    waiting = [one for one in leaving if one not in moved and _stands(places, relocation, one)]
    if 0 in moved and not waiting:
        return _complete(folders, places, relocation, moved)
    if len(moved) + len(waiting) < len(leaving) and -1 in {places.source, places.destination}:
        return relocation
    if moved:
        return _bring_back(places, relocation, moved)
    return _drop_copies(places, relocation)


def _give_back_taken(places: _Places, relocation: MoveRecord) -> None:
    """End a bringing back that was itself cut short."""
    for position in range(len(relocation.members)):
        taken = relocation.tombstone(position)
        if places.source != -1 and look(places.source, taken) is not None:
            give_back(places.source, taken, relocation, position)


def _moved_members(places: _Places, relocation: MoveRecord) -> dict[int, str]:
    """Return the names in the destination of the files that were renamed, by position."""
    if places.destination == -1:
        return {}
    sought = {
        position: member
        for position, member in enumerate(relocation.members)
        if member.leaves and not _stands(places, relocation, position)
    }
    names = names_of(places.destination, [member.stamp.inode for member in sought.values()])
    moved = {}
    for position, member in sought.items():
        status = look(places.destination, names.get(member.stamp.inode, "."))
        if status is not None and is_version(status, member.stamp):
            moved[position] = names[member.stamp.inode]
    return moved


def _complete(folders: Folders, places: _Places, relocation: MoveRecord, moved: dict[int, str]) -> MoveRecord:
    """Every file has been renamed: make what belongs beside them and let it all be durable."""
    names = _names_beside(relocation, moved[0])
    members: list[MoveFile] = []
    for position, member in enumerate(relocation.members):
        if position in moved:
            members.append(settled(places.destination, member, moved[position]))
        elif not member.leaves and (final := _made(places, relocation, position, names[position])):
            members.append(settled(places.destination, member, final))
    sync_folder(places.destination)
    if places.source != -1:
        remove_obsolete(folders, relocation)
        sync_folder(places.source)
    return replace(relocation, members=tuple(members), progress=MoveProgress.DONE)


def _names_beside(relocation: MoveRecord, image_name: str) -> tuple[str, ...]:
    """Return the names that go with the one that the image got."""
    numbered = _NUMBERED.search(split_name(image_name)[0])
    attempt = int(numbered[1]) if numbered else 1
    names = final_names(relocation, attempt if 0 < attempt < MOST_ATTEMPTS else 1)
    return names if names[0] == image_name else final_names(relocation, 1)


def _made(places: _Places, relocation: MoveRecord, position: int, name: str) -> str:
    """Return the name under which a copy or a reason stands, after making it where it is missing; else nothing."""
    member, part = relocation.members[position], relocation.part_name(position)
    if member.role is Role.REASON:
        expected = hashlib.sha256(member.body).hexdigest()
    else:
        expected = "" if places.source == -1 else content_of(places.source, member.name)
    if expected and content_of(places.destination, name) == expected:
        remove_part(places.destination, part)
        return name
    try:
        make_part(places.source, places.destination, relocation, position)
    except (FileNotFoundError, ChangedError):
        # The user has taken or rewritten the shared file: it is no longer the one that belongs to this image.
        remove_part(places.destination, part)
        return ""
    return publish_anywhere(places.destination, part, chain((name,), names_of_one(relocation, position)))


def _bring_back(places: _Places, relocation: MoveRecord, moved: dict[int, str]) -> MoveRecord:
    if places.source == -1:
        return relocation
    for position, final in moved.items():
        try:
            rename_new(places.destination, final, places.source, relocation.members[position].name)
        except FileExistsError:
            # Its name was taken meanwhile: by way of a name that nobody else has to the next free one.
            taken = relocation.tombstone(position)
            rename_new(places.destination, final, places.source, taken)
            give_back(places.source, taken, relocation, position)
    for position, member in enumerate(relocation.members):
        if not member.leaves:
            remove_part(places.destination, relocation.part_name(position))
    sync_folder(places.source)
    sync_folder(places.destination)
    return relocation.failed("taken back: not every file of the image could be moved")


def _drop_copies(places: _Places, relocation: MoveRecord) -> MoveRecord:
    """Nothing was renamed: remove the copies whose sources stand, and save those whose sources do not."""
    nothing = relocation.failed("nothing had been moved")
    if places.destination == -1:
        return nothing
    unproven, saved = [], []
    for position, member in enumerate(relocation.members):
        part = relocation.part_name(position)
        if look(places.destination, part) is None:
            continue
        if not member.leaves or look(places.source, member.name) is not None:
            remove_part(places.destination, part)
        elif member.content and content_of(places.destination, part) == member.content:
            names = chain((member.wanted,), names_of_one(relocation, position))
            final = publish_anywhere(places.destination, part, names)
            saved.append(settled(places.destination, member, final))
        else:
            unproven.append(part)
    sync_folder(places.destination)
    if saved:
        message = "the source was gone, its copy was whole"
        return replace(relocation, members=tuple(saved), progress=MoveProgress.DONE, message=message)
    if unproven:
        return relocation.failed(f"the source is gone, its copy cannot be proven whole: kept as {', '.join(unproven)}")
    return nothing


# ---------------------------------------------------------------- publishing: whole copies, known by inode and hash


def _recover_publishing(folders: Folders, places: _Places, relocation: MoveRecord, advance: Advance) -> MoveRecord:
    if -1 in {places.source, places.destination}:
        return relocation
    destination = places.destination
    finals = _published(destination, relocation)
    _remove_placeholders(destination, relocation, finals)
    if len(finals) < len(relocation.members):
        if _all_stand(places, relocation):
            return _unpublish(destination, relocation, finals)
        finals |= _publish_rest(destination, relocation, finals)
    if 0 not in finals:
        return relocation.failed(f"{relocation.source}/{relocation.image.name}: its copy is gone")
    for position in finals:
        remove_part(destination, relocation.part_name(position))
    members = tuple(replace(relocation.members[position], final=finals[position]) for position in sorted(finals))
    return remove_sources(folders, seal_published(destination, replace(relocation, members=members), advance))


def _recover_published(folders: Folders, places: _Places, relocation: MoveRecord, advance: Advance) -> MoveRecord:
    if -1 in {places.source, places.destination}:
        return relocation
    try:
        return remove_sources(folders, relocation)
    except PermissionError:
        if not _all_stand(places, relocation):
            raise
    # The sources may not be removed (immutable, another owner's in a sticky folder): the copies go instead, or the
    # images would be copied again and again. Step back first, so that a crash in between is one of that step.
    sealed = replace(relocation, progress=MoveProgress.PUBLISHING)
    advance(sealed)
    return _unpublish(places.destination, sealed, _published(places.destination, sealed))


def _all_stand(places: _Places, relocation: MoveRecord) -> bool:
    return all(
        _stands(places, relocation, position) for position, member in enumerate(relocation.members) if member.leaves
    )


def _published(destination: int, relocation: MoveRecord) -> dict[int, str]:
    """Return the names under which sealed copies are visible.

    An equal file of the user's is none of ours: only the inode tells, or a name that the journal holds because the
    file system's inode numbers need not last.
    """
    by_inode = names_of(destination, [member.copy_inode for member in relocation.members])
    finals = {}
    for position, member in enumerate(relocation.members):
        for name in (by_inode.get(member.copy_inode, ""), member.final):
            if name and not name.startswith(".sortd-") and content_of(destination, name) == member.content:
                finals[position] = name
                break
    return finals


def _remove_placeholders(destination: int, relocation: MoveRecord, finals: dict[int, str]) -> None:
    for position, member in enumerate(relocation.members):
        status = look(destination, member.final) if member.final and position not in finals else None
        if status is not None and status.st_size == 0 and look(destination, relocation.part_name(position)):
            os.unlink(member.final, dir_fd=destination)


def _unpublish(destination: int, relocation: MoveRecord, finals: dict[int, str]) -> MoveRecord:
    """Every source stands: remove the copies, which are ours."""
    for position, name in finals.items():
        os.unlink(name, dir_fd=destination)
        remove_part(destination, relocation.part_name(position))
    for position in range(len(relocation.members)):
        remove_part(destination, relocation.part_name(position))
    sync_folder(destination)
    return relocation.failed("its copies were removed, the files are where they were")


def _publish_rest(destination: int, relocation: MoveRecord, finals: dict[int, str]) -> dict[int, str]:
    """A source is gone: what copies are whole become visible."""
    beside = _names_beside(relocation, finals[0]) if 0 in finals else final_names(relocation, 1)
    published = {}
    for position, member in enumerate(relocation.members):
        part = relocation.part_name(position)
        if position not in finals and content_of(destination, part) == member.content:
            names = chain((beside[position],), names_of_one(relocation, position))
            published[position] = publish_anywhere(destination, part, names)
    return published


def _stands(places: _Places, relocation: MoveRecord, position: int) -> bool:
    member = relocation.members[position]
    status = None if places.source == -1 else look(places.source, member.name)
    return status is not None and is_version(status, member.stamp)


def _open_or_absent(folders: Folders, folder: str) -> int:
    try:
        return folders.open(folder)
    except FileNotFoundError:
        return -1
