"""Refile: images go to the class that a decision made outside of the loop gives them.

An image of Dataset/ goes to another class, if it is still the one that sortd put there (``sortd reconsider``); one of
Images/ is filed, unless it or the dataset is held (``sortd bulk apply``). Each moves with its companions; the move is
journaled with its decision and can be undone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sortd.daemon.assign import CarryOut, Result, carried_out, distinct, found_version, image_facts, refused
from sortd.daemon.references import class_labels
from sortd.events import Assigned, ClassifierKind, DecidedBy, Mode, Move, Outcome, Stamp
from sortd.layout import Area, Layout
from sortd.store.history import History
from sortd.store.records import Record

BY_SORTD = frozenset({Outcome.FILED.value, Outcome.REFILED.value})
"""Outcomes of moves into a class that no person chose."""


def refile_images(
    layout: Layout, history: History, carry_out: CarryOut, images: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Result], int]]:
    """File images, or move filed ones into other classes, some at a time; one that changed since is not moved.

    ``images`` are as ``refile_facts`` returns them; for the others and what is yielded, see ``assign_images``.

    Raises DataError: there is no class; JournalError.
    """
    labels = frozenset(class_labels(layout.area(Area.CLASES)))
    found = [_move_or_refusal(layout, history, labels, image) for image in distinct(images)]
    yield [one for one in found if not isinstance(one, Move)], 0
    yield from carried_out(layout.root, history, carry_out, [one for one in found if isinstance(one, Move)])


def refile_facts(
    path: str, version: Stamp, decision: Assigned, *, content: str, encoder_id: str, generation: int
) -> dict[str, object]:
    """Return an image of a request: its path and version, and the decision with what it was made of."""
    return {
        **image_facts(path, version),
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
    found = found_version(layout, (Area.DATASET, Area.IMAGES), image)
    if isinstance(found, dict):
        return found
    is_filed = layout.area_of(path) is Area.DATASET
    own = (layout, history, path, found)
    if (problem := _not_refiled(*own, label) if is_filed else _not_filed(*own)) is not None:
        return refused(path, problem)
    return Move(
        path,
        found,
        f"{Area.DATASET}/{label}",
        Outcome.REFILED if is_filed else Outcome.FILED,
        decision=_decision(image),
        content=_text(image["content"]),
        encoder_id=_text(image["encoder_id"]),
        generation=_journaled(int(image["generation"])),
    )


def _not_refiled(layout: Layout, history: History, path: str, found: Stamp, label: str) -> str | None:
    """Return why an image of Dataset/ is not moved to another class; None if it is."""
    record = filed_record(layout, history.last_known(found), path)
    if record is None or history.is_corrected(record.id):
        return "it is not an image that sortd filed and nobody moved or corrected"
    if label == record.move.destination.removeprefix(f"{Area.DATASET}/"):
        return "it is in this class already"
    return None


def _not_filed(layout: Layout, history: History, path: str, found: Stamp) -> str | None:
    """Return why an image of Images/ is not filed; None if it is."""
    if history.guard().reason:
        return "the dataset is held; see `sortd status` and `sortd release`"
    held = history.held_version(path.removeprefix(f"{layout.root}/"))
    if held is not None and held.is_same_version(found):
        return "its last move was undone; `sortd release` lets it be filed again"
    return None


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
