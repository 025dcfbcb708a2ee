"""Undoing: images back to where they were, journaled like every relocation, never over another file."""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sortd.events import Outcome, Stamp
from sortd.journal import UNDONE, Grounds, Record
from sortd.mover import new_token
from sortd.moving.companions import owners_of
from sortd.moving.copying import content_of
from sortd.moving.relocation import Member, Relocation, Role
from sortd.moving.renaming import Folders, is_version, look, stamp_of
from sortd.running.relocating import Order, Relocator


@dataclass(frozen=True, slots=True)
class PutBack:
    """What became of the undoing of one record."""

    record: Record
    restored: str | None  # absolute path where the image stands now, or would; None: it was not put back
    message: str = ""  # why not, or what could not be put back with it


class Undoing:
    """Takes moves of one dataset back."""

    def __init__(self, root: Path, relocator: Relocator) -> None:
        """Begin with what carries relocations out."""
        self._root = root
        self._relocator = relocator
        self._plans_made: dict[str, _Plan] = {}  # by token; not told yet

    def undo(self, records: Sequence[Record]) -> list[PutBack]:
        """Put images back, newest first; see ``filing.Filing.undo``."""
        told: list[PutBack] = []
        waiting = list(records)
        while waiting:
            plans = self._plans(waiting)
            made = [plan for plan in plans if isinstance(plan, _Plan)]
            refused = [plan for plan in plans if isinstance(plan, PutBack)]
            self._plans_made |= {plan.relocation.token: plan for plan in made}
            orders = [Order(plan.relocation, _grounds(plan.record)) for plan in made]
            told += self.told(self._relocator.relocate(orders))
            # An image that went on from Review/ stands where its first move put it once the second is undone.
            if not made:
                return told + refused
            waiting = [one.record for one in refused]
        return told

    def told(self, orders: Iterable[Order]) -> list[PutBack]:
        """Say what became of orders that have ended, in which ``undo`` had put its plans; others are not spoken of."""
        return [self._told(order) for order in orders if order.relocation.token in self._plans_made]

    def rehearse(self, records: Sequence[Record], back: set[str]) -> list[PutBack]:
        """Say what ``undo`` would do.

        Args:
            records: of the moves to be undone.
            back: where images would stand again, relative to the dataset; those of these records are added.
        """
        foretold: list[PutBack] = []
        for plan in self._plans(records):
            record = plan.record
            if isinstance(plan, _Plan):
                foretold.append(self._foretold(plan))
            elif record.destination_path in back:
                foretold.append(PutBack(record, f"{os.fspath(self._root)}/{record.source_path}"))
            else:
                foretold.append(plan)
                continue
            back.add(record.source_path)
        return foretold

    def _plans(self, records: Sequence[Record]) -> list["_Plan | PutBack"]:
        newest_first = sorted(records, key=lambda record: record.id, reverse=True)
        try:
            folders = Folders(self._root)
        except OSError as error:
            return [PutBack(record, None, f"{self._root}: {error.strerror}") for record in newest_first]
        with folders:
            return [_plan(folders, record) for record in newest_first]

    def _foretold(self, plan: "_Plan") -> PutBack:
        relocation = plan.relocation
        return PutBack(plan.record, self._path(relocation.destination, relocation.image.wanted), plan.message)

    def _told(self, order: Order) -> PutBack:
        plan, relocation = self._plans_made.pop(order.relocation.token), order.relocation
        if order.is_done:
            return PutBack(plan.record, self._path(relocation.destination, relocation.image.final), plan.message)
        return PutBack(plan.record, None, str(order.trouble or relocation.message))

    def _path(self, folder: str, name: str) -> str:
        return f"{os.fspath(self._root)}/{folder}/{name}"


@dataclass(frozen=True, slots=True)
class _Plan:
    record: Record
    relocation: Relocation
    message: str


def _plan(folders: Folders, record: Record) -> _Plan | PutBack:
    """Look at what still stands where the record put it; decide what goes back."""
    there = record.relocation
    if record.grounds.outcome == UNDONE:
        said = "it was put back there by an undo; `sortd release` lets it be filed again"
        return PutBack(record, None, f"{record.destination_path}: {said}")
    if record.undone_by is not None:
        return PutBack(record, None, f"{record.destination_path}: undone already")
    try:
        folders.open(there.source.partition("/")[0])  # never made anew: without it, its disk is not mounted
        if (stranger := _stranger(folders, record)) is not None:
            said = f"{there.source}/{stranger} is another image, which it would stand beside; left where it is"
            return PutBack(record, None, f"{record.destination_path}: {said}")
        return _plan_in(folders, folders.open(there.destination), record)
    except OSError as error:
        return PutBack(record, None, f"{record.destination_path}: {error.strerror}")


def _stranger(folders: Folders, record: Record) -> str | None:
    """Return the image to which a companion that followed its own would seem to belong where it came from."""
    there = record.relocation
    if record.grounds.outcome != Outcome.FOLLOWED or there.source.partition("/")[0] == "Images":
        return None
    try:
        owners = owners_of(there.image.name, folders.names(there.source).near(there.image.name))
    except FileNotFoundError:
        return None  # it is made anew
    return owners[0] if owners else None


def _plan_in(folders: Folders, folder: int, record: Record) -> _Plan | PutBack:
    """Look at the members of a move in its destination folder, which is open."""
    there = record.relocation
    found = _find(folder, there.image)
    if isinstance(found, str):
        return PutBack(record, None, f"{record.destination_path}: {found}")
    back, spent, left = [_reversed(there.image, Role.IMAGE, found)], [], []
    for member in there.members[1:]:
        if isinstance(stamp := _find(folder, member), str):
            left.append(member.final)
        elif member.role is Role.COMPANION:
            back.append(_reversed(member, Role.COMPANION, stamp))
        elif member.role is Role.REASON or _is_needless(folders, there, member):
            spent.append(_reversed(member, member.role, stamp))
        elif not _content(folders, there.source, member.name):
            back.append(_reversed(member, Role.COMPANION, stamp))
        else:
            left.append(member.final)
    joins = record.grounds.outcome == Outcome.FOLLOWED  # what was left behind with it may stand there again
    relocation = Relocation(new_token(), there.destination, there.source, tuple(back), spent=tuple(spent), joins=joins)
    message = f"left where they are, changed or gone: {', '.join(left)}" if left else ""
    return _Plan(record, relocation, message)


def _is_needless(folders: Folders, there: Relocation, member: Member) -> bool:
    """Whether the original of a shared companion still says what our copy of it says."""
    copy = _content(folders, there.destination, member.final)
    return copy != "" and copy == _content(folders, there.source, member.name)


def _content(folders: Folders, folder: str, name: str) -> str:
    try:
        return content_of(folders.open(folder), name)
    except OSError:
        return ""


def _find(folder: int, member: Member) -> Stamp | str:
    """Return the version of a member that stands where it was put, or why it cannot be put back.

    Raises:
        OSError: the disk, or its rights, do not let us look.
    """
    status = look(folder, member.final) if member.final else None
    if status is None or member.moved_stamp is None:
        return "no longer there: moved or removed since"
    if is_version(status, member.moved_stamp):
        return member.moved_stamp
    # The undoing of a later move may have copied it here: another inode with the same bytes is the same image.
    if stat.S_ISREG(status.st_mode) and member.content and content_of(folder, member.final) == member.content:
        return stamp_of(status)
    return "changed since it was put there; left where it is"


def _reversed(member: Member, role: Role, stamp: Stamp) -> Member:
    return Member(role, member.final, member.name, stamp, content=member.content if role is Role.IMAGE else "")


def _grounds(record: Record) -> Grounds:
    return replace(record.grounds, outcome=UNDONE, undoes=record.id)
