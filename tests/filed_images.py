"""Images that were filed: moved by the real filing into a dataset, journal and all, without a daemon."""

import os
from pathlib import Path

from sortd.events import Assigned, Mode, Move, Moved, Outcome
from sortd.layout import Layout
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.watch.scan import stamp
from tests.daemon_process import picture


def file_images(dataset: Path, state: Path, labels: dict[str, str], *, run: str = "first") -> list[str]:
    """Draw an image of each name, file it under its label, and return where each stands now.

    Args:
        dataset: a dataset's folder.
        state: the state directory.
        labels: by name of a file in Images/, the colour that it has and the class that it goes to; "rejected" sets it
            aside.
        run: the word for this run in the journal.
    """
    layout = Layout(dataset)
    layout.make()
    moves = []
    for index, (name, label) in enumerate(labels.items()):
        path = dataset / "Images" / name
        picture("red" if label == "rejected" else label, 500 + index).save(path, "PNG")
        mark = stamp(os.fspath(path))
        assert mark is not None
        if label == "rejected":
            moves.append(Move(str(path), mark, "Rejected", Outcome.REJECTED, reason="unreadable: torn"))
        else:
            decision = Assigned(label, 0.9, 0.25, "green", Mode.MAX)
            folder = f"Dataset/{label}"
            moves.append(Move(str(path), mark, folder, Outcome.FILED, decision, generation=3, encoder_id="fake-48"))
    with Journal(layout.state_folder(state) / "journal.sqlite", run=run) as journal:
        answers = Mover(dataset, journal).move_all(moves)
    assert all(isinstance(answer, Moved) for answer in answers)
    return [answer.destination for answer in answers if isinstance(answer, Moved)]
