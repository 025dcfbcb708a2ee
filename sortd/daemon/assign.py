"""Assign: images in Review/ go to the class that a person names, and are references of it where they lie then.

They are filed into ``Dataset/<class>`` with their companions, journaled like every move, and can be undone. A class
that does not exist is made; its empty folder is removed when the last of these images is taken back.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sortd.daemon.references import class_name_problem
from sortd.errors import DataError, advice_for_write
from sortd.events import ImageGone, Move, Moved, MoveFailed, Outcome, Stamp
from sortd.layout import Area, Layout, rule_below
from sortd.moving.fs import Folders
from sortd.moving.recovery import UndoResult
from sortd.store.journal import Journal
from sortd.watch.scan import stamp

AT_ONCE = 32  # images moved in one turn of the loop
MADE_FACT = "class_made:"
"""Followed by a class: "yes" if its folder was made for images that a person assigned."""

CarryOut = Callable[[Sequence[Move]], Sequence[Moved | MoveFailed | ImageGone]]
Result = dict[str, Any]
"""``path``, ``destination`` (None: it was not moved) and ``message`` (why not)."""


def image_facts(path: str, version: Stamp) -> dict[str, object]:
    """Return an image of a request: its path, and the version that the person saw."""
    return {"path": path, "size": version.size, "mtime_ns": version.mtime_ns}


def assign_images(
    layout: Layout, journal: Journal, carry_out: CarryOut, label: str, images: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Result], int]]:
    """Move images of Review/ into a class, which is made if it does not exist; some at a time.

    Args:
        layout: the dataset.
        journal: its journal.
        carry_out: carries out moves, and returns what has ended.
        label: the class.
        images: as ``image_facts`` returns them; one that changed since is not moved.

    Yields:
        The results of some images, and how many of them end later, since they are copied to another file system.

    Raises:
        DataError: the name cannot be that of a class, its folder cannot be made, or no image is left.
        JournalError: the journal cannot be written.
    """
    if (problem := class_name_problem(label)) is not None:
        raise DataError(f"{label!r} cannot be a class: {problem}")
    found = [_move_or_refusal(layout, label, image) for image in distinct(images)]
    moves = [one for one in found if isinstance(one, Move)]
    refusals = [one for one in found if not isinstance(one, Move)]
    if not moves:
        raise DataError(refusals[0]["message"] if refusals else "no image was named")
    _make_class(layout.root, journal, label)
    yield refusals, 0
    yield from carried_out(carry_out, moves)


def distinct(images: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the images of a request, each path once."""
    return list({str(image["path"]): image for image in images}.values())


def carried_out(carry_out: CarryOut, moves: Sequence[Move]) -> Iterator[tuple[list[Result], int]]:
    """Carry out moves, some at a time; yield their results, and how many of them end later."""
    for start in range(0, len(moves), AT_ONCE):
        asked = {move.path for move in moves[start : start + AT_ONCE]}
        ended = [one for one in carry_out(moves[start : start + AT_ONCE]) if one.path in asked]
        results = [_facts(one) for one in ended if isinstance(one, Moved | MoveFailed)]
        yield results, len(asked) - len(results)


def forget_made_classes(layout: Layout, journal: Journal, undone: Sequence[UndoResult]) -> bool:
    """Remove the empty folders of classes that were made, once their images are taken back.

    Returns whether any assigned image was taken back, so that its class has fewer references.
    """
    labels = {
        one.record.move_reason.label or ""
        for one in undone
        if one.restored is not None and one.record.move_reason.outcome == Outcome.ASSIGNED
    }
    used: set[str] = set()
    if labels:  # a person may have moved other images into the class too
        used = {one[0] for one in journal.history.assigned()} | {one[1] for one in journal.history.corrections()}
    for label in sorted(labels - used):
        if journal.history.fact(f"{MADE_FACT}{label}") == "yes":
            try:
                with Folders(layout.root) as folders:
                    os.rmdir(label, dir_fd=folders.open(Area.CLASES.value))  # fails unless it is empty
            except OSError:
                continue
            journal.note(f"{MADE_FACT}{label}", "no")
    return bool(labels)


def _move_or_refusal(layout: Layout, label: str, image: Mapping[str, Any]) -> Move | Result:
    found = found_version(layout, Area.REVIEW, image)
    if isinstance(found, dict):
        return found
    folder = f"{Area.DATASET}/{label}"
    return Move(str(image["path"]), found, folder, Outcome.ASSIGNED, reason="assigned by a person")


def found_version(layout: Layout, area: Area, image: Mapping[str, Any]) -> Stamp | Result:
    """Return the version of an image of a request; or why it cannot be moved, if it changed or is not in the area."""
    path, version = str(image["path"]), (int(image["size"]), int(image["mtime_ns"]))
    root = os.fspath(layout.root)
    if not path.startswith(f"{root}/{area}/") or os.path.normpath(path) != path or rule_below(path, root):
        return refused(path, f"it is not an image in {area}/ of this dataset")
    try:
        found = stamp(path)
    except OSError as error:
        return refused(path, str(error.strerror))
    if found is None:
        return refused(path, "the file is gone")
    if (found.size, found.mtime_ns) != version:
        return refused(path, "the file was changed or replaced since it was shown")
    return found


def refused(path: str, message: str) -> Result:
    """Return the result of an image that is not moved, with the reason."""
    return {"path": path, "destination": None, "message": f"{path}: {message}"}


def _facts(ended: Moved | MoveFailed) -> Result:
    if isinstance(ended, MoveFailed):
        return {"path": ended.path, "destination": None, "message": ended.message}
    return {"path": ended.path, "destination": ended.destination, "message": ended.note}


def _make_class(root: Path, journal: Journal, label: str) -> None:
    """Make the folder of a class in Clases/, unless it exists; note that it was made for this."""
    folder = f"{Area.CLASES}/{label}"
    try:
        with Folders(root) as folders:
            folders.open(Area.CLASES.value)  # never made: without this folder, its disk is not mounted
            try:
                folders.open(folder)
            except FileNotFoundError:
                journal.note(f"{MADE_FACT}{label}", "yes")
                folders.make(folder)
    except OSError as error:
        advice = advice_for_write(error) or "move away whatever has this name"
        raise DataError(f"{root}/{folder} cannot be made: {error.strerror}; {advice}") from error
