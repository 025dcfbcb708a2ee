"""The actions that leave an image in Images/: which code carries out, recovers and reverses each."""

from collections.abc import Callable
from contextlib import suppress

from sortd.moving.copy import Advance, move_by_copy
from sortd.moving.copy_queue import MoveOrder
from sortd.moving.fs import Folders
from sortd.moving.keywords import plan_keyword_removal, recover_keywords, write_keywords
from sortd.moving.links import link_files, recover_links
from sortd.moving.plan import FreeNames
from sortd.moving.removal import plan_removal, remove_files
from sortd.store.history import History
from sortd.store.records import MoveRecord, Record, Role


def act(
    folders: Folders,
    order: MoveOrder,
    advance: Advance,
    history: History,
    names: FreeNames,
    interrupted: Callable[[], bool],
) -> MoveRecord:
    """Carry out a move whose image stays, which the journal must contain; see the functions for the errors."""
    move, reason = order.move, order.move_reason
    match move.image.role:
        case Role.COPY:
            return move_by_copy(folders, move, advance, interrupted, names=names)
        case Role.KEYWORDS:
            filed = [] if reason.undoes is None else history.finished([reason.undoes])
            return write_keywords(folders, move, reason.label or "", advance, filed=filed[0].move if filed else None)
        case Role.REMOVED:
            return remove_files(folders, move)
        case _:
            earlier = history.last_moved(move.source, move.image.name)
            return link_files(folders, move, advance, names=names, earlier=earlier)


def recover_action(folders: Folders, move: MoveRecord) -> MoveRecord:
    """Complete or reverse a move of links, keywords or an undo that did not end; see ``recovery.recover``."""
    match move.image.role:
        case Role.KEYWORDS:
            return recover_keywords(folders, move)
        case Role.REMOVED:
            with suppress(FileNotFoundError):  # it stays open if a folder is missing
                return remove_files(folders, move)
            return move
        case _:
            return recover_links(folders, move)


def plan_reversal(folders: Folders, record: Record) -> tuple[MoveRecord, list[str]] | str:
    """Return the move that undoes a record whose image stayed, and the files that remain; or why it is refused."""
    plan = plan_keyword_removal if record.move.image.role is Role.KEYWORDS else plan_removal
    return plan(folders, record)
