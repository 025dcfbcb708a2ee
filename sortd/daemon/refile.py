"""Refile: images that sortd filed go to the class that a later decision gives them.

Only an image that is still the one that sortd put there is moved, with its companions; each move is journaled with its
decision and can be undone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sortd.daemon.assign import CarryOut, Result, carried_out, distinct, found_version, refused
from sortd.daemon.references import ReferencesAbsentError, class_labels
from sortd.errors import DataError
from sortd.events import Assigned, ClassifierKind, DecidedBy, Mode, Move, Outcome
from sortd.layout import Area, Layout
from sortd.store.history import History
from sortd.store.records import Record

BY_SORTD = frozenset({Outcome.FILED.value, Outcome.REFILED.value})
"""Outcomes of moves into a class that no person chose."""


def refile_images(
    layout: Layout, history: History, carry_out: CarryOut, images: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Result], int]]:
    """Move filed images into other classes, some at a time.

    Args:
        layout: the dataset.
        history: of its journal.
        carry_out: carries out moves, and returns what has ended.
        images: as ``refile_facts`` returns them; one that changed or was moved since is not moved.

    Yields:
        The results of some images, and how many of them end later, since they are copied to another file system.

    Raises:
        DataError: there is no class.
        JournalError: the journal cannot be read.
    """
    try:
        labels = frozenset(class_labels(layout.area(Area.CLASES)))
    except ReferencesAbsentError as error:
        raise DataError(str(error)) from error
    found = [_move_or_refusal(layout, history, labels, image) for image in distinct(images)]
    yield [one for one in found if not isinstance(one, Move)], 0
    yield from carried_out(layout.root, history, carry_out, [one for one in found if isinstance(one, Move)])


def refile_facts(
    path: str, size: int, mtime_ns: int, decision: Assigned, *, content: str, encoder_id: str, generation: int
) -> dict[str, object]:
    """Return an image of a request: its path and version, and the decision with what it was made of."""
    return {
        "path": path,
        "size": size,
        "mtime_ns": mtime_ns,
        "label": decision.label,
        "score": decision.score,
        "margin": decision.margin,
        "second_label": decision.second_label,
        "mode": str(decision.mode),
        "confidence": decision.confidence,
        "content": content,
        "encoder_id": encoder_id,
        "generation": generation,
    }


def filed_record(layout: Layout, record: Record | None, path: str) -> Record | None:
    """Return the record of an image that is where sortd filed it; None for any other."""
    if record is None or record.move_reason.outcome not in BY_SORTD:
        return None
    return record if os.path.join(layout.root, record.destination_path) == path else None


def _move_or_refusal(
    layout: Layout, history: History, labels: frozenset[str], image: Mapping[str, Any]
) -> Move | Result:
    path, label = str(image["path"]), str(image["label"])
    if label not in labels:
        return refused(path, f"there is no class {label!r}")
    found = found_version(layout, (Area.DATASET,), image)
    if isinstance(found, dict):
        return found
    record = filed_record(layout, history.last_known(found), path)
    if record is None or history.is_corrected(record.id):
        return refused(path, "it is not an image that sortd filed and nobody moved or corrected")
    if label == record.move.destination.removeprefix(f"{Area.DATASET}/"):
        return refused(path, "it is in this class already")
    return Move(
        path,
        found,
        f"{Area.DATASET}/{label}",
        Outcome.REFILED,
        decision=_decision(image),
        content=_text(image["content"]),
        encoder_id=_text(image["encoder_id"]),
        generation=_journaled(int(image["generation"])),
    )


def _text(value: object) -> str:
    """Return a text that the journal can hold; raise ValueError for lone surrogates."""
    return str(value).encode().decode()


def _journaled(number: int) -> int:
    """Return a number that the journal can hold; raise ValueError for a larger one."""
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{number!r:.100} is not the number of a generation")
    return number


def _decision(image: Mapping[str, Any]) -> Assigned:
    second, mode = image["second_label"], str(image["mode"])
    by: DecidedBy = ClassifierKind.FINETUNED if mode == ClassifierKind.FINETUNED else Mode(mode)
    return Assigned(
        str(image["label"]),
        float(image["score"]),
        float(image["margin"]),
        None if second is None else os.fsdecode(os.fsencode(str(second))),
        by,
        float(image["confidence"]),
    )
