"""Assign: images in Review/ or Dataset/ go to the class that a person names, or to none.

They are filed into ``Dataset/<class>`` with their companions, journaled like every move, and can be undone. They are
references of the class where they lie then; of no class (``Dataset/_none``), they are examples of it if the person says
so. A class that does not exist is made; its empty folder is removed when the last of these images is taken back. An
image of Dataset/ counts as one that the person moved to another class by hand: see ``corrections``.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sortd.companions import claims, owners_of
from sortd.daemon.corrections import record_places
from sortd.daemon.references import class_name_problem
from sortd.errors import DataError, advice_for_write
from sortd.events import NO_CLASS, ImageGone, Move, Moved, MoveFailed, Outcome, Stamp
from sortd.layout import Area, Layout, rule_below
from sortd.moving.fs import Folders
from sortd.moving.recovery import UndoResult
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import EXAMPLE_OF_NO_CLASS
from sortd.watch.scan import stamp

AT_ONCE = 32  # images moved in one turn of the loop
MADE_FACT = "class_made:"
"""Followed by a class: "yes" if its folder was made for images that a person assigned."""

CarryOut = Callable[[Sequence[Move]], Sequence[Moved | MoveFailed | ImageGone]]
Result = dict[str, Any]
"""``path``, ``destination`` (None: it was not moved), ``id`` of the move in the journal, ``message`` (why not)."""

_ADVICE = {
    Area.IMAGES: "; sortd decides about it",
    Area.REJECTED: "; `sortd release` lets a rejected image be tried again",
}


def image_facts(path: str, version: Stamp) -> dict[str, object]:
    """Return an image of a request: its path, and the version that the person saw."""
    return {"path": path, "size": version.size, "mtime_ns": version.mtime_ns}


def assign_images(
    layout: Layout,
    journal: Journal,
    carry_out: CarryOut,
    label: str,
    images: Sequence[Mapping[str, Any]],
    *,
    is_example: bool = False,
) -> Iterator[tuple[list[Result], int]]:
    """Move images of Review/ or Dataset/ into a class, which is made if it does not exist; some at a time.

    Whoever carries out the moves records those out of another class as corrections: see ``record_places``.
    ``carry_out`` returns what has ended; ``images`` and ``is_example`` are as for ``assign_to_class``.

    Yields:
        The results of some images, and how many of them end later, since they are copied to another file system.

    Raises DataError: the name cannot be that of a class, its folder cannot be made, or no image is named; JournalError.
    """
    if (problem := assigned_label_problem(label, is_example=is_example)) is not None:
        raise DataError(problem)
    reason = "assigned by a person"
    if label == NO_CLASS:
        reason = EXAMPLE_OF_NO_CLASS if is_example else "assigned to no class by a person"
    try:
        with Folders(layout.root) as folders:
            found = [_move_or_refusal(layout, folders, label, reason, image) for image in distinct(images)]
    except OSError as error:
        raise DataError(f"{layout.root} cannot be read: {error.strerror}") from error
    moves = [one for one in found if isinstance(one, Move)]
    refusals = [one for one in found if not isinstance(one, Move)]
    if not found:
        raise DataError("no image was named")
    if moves and label != NO_CLASS:
        _make_class(layout.root, journal, label)
    yield refusals, 0
    is_used = False
    for results, later in carried_out(layout.root, journal.history, carry_out, moves):
        is_used |= later > 0 or any(one["destination"] for one in results)
        yield results, later
    if not is_used:
        _remove_unused_classes(layout.root, journal, {label})


def assigned_label_problem(label: str, *, is_example: bool = False) -> str | None:
    """Return why images cannot be assigned to a class of this name, or as examples; None if they can."""
    if label == NO_CLASS:
        return None
    if (problem := class_name_problem(label)) is not None:
        return f"{label!r} cannot be a class: {problem}"
    return "only images of no class can be examples; those of a class are its references anyway" if is_example else None


def distinct(images: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the images of a request, each path once."""
    return list({str(image["path"]): image for image in images}.values())


def carried_out(
    root: Path, history: History, carry_out: CarryOut, moves: Sequence[Move]
) -> Iterator[tuple[list[Result], int]]:
    """Carry out moves, some at a time; yield their results, and how many of them end later."""
    for start in range(0, len(moves), AT_ONCE):
        asked = {move.path for move in moves[start : start + AT_ONCE]}
        ended = [one for one in carry_out(moves[start : start + AT_ONCE]) if one.path in asked]
        results = [_facts(root, history, one) for one in ended if isinstance(one, Moved | MoveFailed)]
        yield results, len(asked) - len(results)


def forget_made_classes(layout: Layout, journal: Journal, undone: Sequence[UndoResult]) -> bool:
    """Remove the empty folders of classes that were made, once their images are taken back; forget the corrections.

    Returns whether any assigned image was taken back, so that its class has fewer references.
    """
    back = {
        one.restored: one.record.move_reason.label or ""
        for one in undone
        if one.restored is not None and one.record.move_reason.outcome == Outcome.ASSIGNED
    }
    record_places(layout, journal, [path for path in back if layout.area_of(path) is Area.DATASET])
    _remove_unused_classes(layout.root, journal, set(back.values()))
    return bool(back)


def _remove_unused_classes(root: Path, journal: Journal, labels: set[str]) -> None:
    """Remove the empty folders of those of these classes that were made and have no image in Dataset/ any more."""
    made = {label for label in labels if journal.history.fact(f"{MADE_FACT}{label}") == "yes"}
    if made:  # a person may have moved other images into the class too
        made -= {label for label, *_ in journal.history.assigned()}
        made -= {corrected for _, corrected, *_ in journal.history.corrections()}
    for label in sorted(made):
        try:
            with Folders(root) as folders:
                os.rmdir(label, dir_fd=folders.open(Area.CLASES.value))  # fails unless it is empty
        except OSError:
            continue
        journal.note(f"{MADE_FACT}{label}", "no")


def _move_or_refusal(
    layout: Layout, folders: Folders, label: str, reason: str, image: Mapping[str, Any]
) -> Move | Result:
    found = found_version(layout, (Area.REVIEW, Area.DATASET), image)
    if isinstance(found, dict):
        return found
    path, folder = str(image["path"]), f"{Area.DATASET}/{label}"
    if os.path.dirname(path) == f"{layout.root}/{folder}":
        return refused(path, "it is in this class already")
    source, _, name = path.removeprefix(f"{layout.root}/").rpartition("/")
    if claims(name) and (owners := owners_of(name, folders.names(source).near(name))):
        return refused(path, f"it belongs to {owners[0]}, with which it moves")
    return Move(path, found, folder, Outcome.ASSIGNED, reason=reason)


def found_version(layout: Layout, areas: Sequence[Area], image: Mapping[str, Any]) -> Stamp | Result:
    """Return the version of an image of a request; or why it cannot be moved, if it changed or is not in the areas."""
    path, version = str(image["path"]), (int(image["size"]), int(image["mtime_ns"]))
    root, area = os.fspath(layout.root), layout.area_of(path)
    if area not in areas or os.path.normpath(path) != path or rule_below(path, root):
        places = " or ".join(f"{one}/" for one in areas)
        return refused(path, f"it is not an image in {places} of this dataset{_ADVICE.get(area or Area.CLASES, '')}")
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
    return _result(path, f"{path}: {message}")


def _facts(root: Path, history: History, ended: Moved | MoveFailed) -> Result:
    if isinstance(ended, MoveFailed):
        return _result(ended.path, ended.message)
    folder, _, name = ended.destination.removeprefix(f"{root}/").rpartition("/")
    record = history.last_put(folder, name)
    return _result(ended.path, ended.note, ended.destination, None if record is None else record.id)


def _result(path: str, message: str, destination: str | None = None, identifier: int | None = None) -> Result:
    return {"path": path, "destination": destination, "id": identifier, "message": message}


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
