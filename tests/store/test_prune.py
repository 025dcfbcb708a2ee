"""Old moves leave the journal unless something needs them; the figures stay, and the disk gets its pages back."""

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.events import Assigned, Mode, Outcome, Stamp
from sortd.moving.mover import Mover
from sortd.moving.recovery import UndoResult
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.prune import SLICE, Pruning, free_pages, rewrite
from sortd.store.records import PLACES_FACT, MoveFile, MoveProgress, MoveReason, MoveRecord, Role, Selection
from tests.filing_world import Dataset, moved, order

STAMP = Stamp(1, 2, 3, 4)
OLD = 1e6  # all moves of these tests end long before


def file_image(dataset: Dataset, mover: Mover, name: str, label: str = "cat", content: str = "") -> Path:
    """File an image and return where it is."""
    path = dataset.put(f"Images/{name}", name)
    decision = Assigned(label, 0.9, 0.25, "dog", Mode.MIXED)
    return Path(moved(mover, replace(order(path, f"Dataset/{label}", content=content), decision=decision)))


def pruned(dataset: Dataset, journal: Journal, *, before: float = OLD, removes: bool = True) -> Pruning:
    """Make a whole pass."""
    pruning = Pruning(journal, dataset.root, before, removes=removes)
    while pruning.step():
        pass
    return pruning


def names(journal: Journal) -> set[str]:
    """Return the names of the images that the journal has."""
    return {record.move.image.name for record in journal.history.moves(Selection())}


@pytest.fixture
def mover(dataset: Dataset, journal: Journal) -> Mover:
    """What moves the images of the dataset."""
    return Mover(dataset.root, journal)


def test_prune_removes_only_old_moves_whose_files_are_gone(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """An image, a companion, a correction, a check, the newest move and a young one keep their records."""
    dataset.put("Images/companion.xmp")
    places = {
        name: file_image(dataset, mover, f"{name}.jpg")
        for name in ("gone", "there", "companion", "corrected", "checked", "young", "newest")
    }
    for name in ("gone", "companion", "corrected", "checked", "young", "newest"):
        places[name].unlink()
    records = {record.move.image.name: record for record in journal.history.moves(Selection())}
    journal.record_corrections([(records["corrected.jpg"], "dog", "Dataset/dog/corrected.jpg")])
    journal.record_checks([(records["checked.jpg"].id, True)])
    journal.note(f"{PLACES_FACT}{records['gone.jpg'].id}", "[]")
    young = records["young.jpg"].ended_at
    assert young is not None
    listed = pruned(dataset, journal, before=young, removes=False)
    assert (listed.removed, listed.kept) == (1, 4)
    assert len(names(journal)) == 7
    assert pruned(dataset, journal, before=young).removed == 1
    assert names(journal) == {*records} - {"gone.jpg"}
    assert journal.history.facts_like(PLACES_FACT) == {}
    assert pruned(dataset, journal).removed == 1
    assert names(journal) == {*records} - {"gone.jpg", "young.jpg"}
    assert mover.move_all([]) == []


def test_prune_keeps_the_earlier_moves_of_an_image_that_is_there(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """What an undo of the last move brings back is known by the move before, by its content."""
    path = dataset.put("Images/a.jpg")
    waiting = Path(moved(mover, order(path, "Review/cat", Outcome.REVIEW, content="ab" * 32)))
    refiled = Path(moved(mover, order(waiting, "Dataset/cat", Outcome.FILED, content="ab" * 32)))
    file_image(dataset, mover, "newest.jpg")
    assert pruned(dataset, journal).removed == 0
    refiled.unlink()
    assert pruned(dataset, journal).removed == 2


def test_prune_keeps_undone_moves_their_undo_and_open_moves(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Precision counts the first two, and recovery needs the last."""
    file_image(dataset, mover, "undone.jpg")
    (result,) = mover.undo([journal.history.moves(Selection())[0]])
    assert isinstance(result, UndoResult)
    assert result.restored is not None
    os.unlink(dataset.root / "Images" / "undone.jpg")
    (record,) = journal.history.moves(Selection(outcome="filed"))
    opened = MoveRecord("0" * 16, "Images", "Dataset/cat", record.move.files, MoveProgress.INTENDED)
    journal.intend([(opened, MoveReason("filed", "cat"))])
    file_image(dataset, mover, "newest.jpg")
    assert pruned(dataset, journal).removed == 0


def test_prune_does_not_change_totals_and_precision(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Images that were filed before a correction in their class count as checked, also after they are forgotten."""
    places = [file_image(dataset, mover, f"{number}.jpg", "cat" if number % 2 else "dog") for number in range(10)]
    wrong = next(one for one in journal.history.moves(Selection()) if one.move.image.name == "7.jpg")
    journal.record_corrections([(wrong, "dog", "Dataset/dog/7.jpg")])
    file_image(dataset, mover, "later.jpg", "cat")
    refiled = file_image(dataset, mover, "twice.jpg", "cat", "cd" * 32)
    again = Path(moved(mover, order(refiled, "Dataset/dog", Outcome.REFILED, content="cd" * 32)))
    file_image(dataset, mover, "newest.jpg", "dog")
    before = journal.history.counts(), journal.history.accuracy()
    for place in (*places, again, dataset.root / "Dataset/cat/later.jpg"):
        place.unlink()
    assert pruned(dataset, journal).removed == 12
    assert (journal.history.counts(), journal.history.accuracy()) == before
    assert before[1]["cat"].checked == 5


def test_prune_examines_a_bounded_number_of_moves_in_a_step(dataset: Dataset, journal: Journal) -> None:
    """The loop of the daemon waits for a step only; pages are returned in steps, too."""
    file = MoveFile(Role.IMAGE, "a.jpg", "a.jpg", STAMP, "e" * 64, final="a.jpg", moved_stamp=STAMP)
    made = [
        (MoveRecord(f"{number:016}", "Images", "Dataset/cat", (file,)), MoveReason("filed", "cat", content="e" * 64))
        for number in range(5 * SLICE)
    ]
    journal.intend(made)
    journal.settle([replace(move, progress=MoveProgress.DONE) for move, _ in made])
    pruning = Pruning(journal, dataset.root, OLD, removes=True)
    removed = []
    while pruning.step():
        removed.append(pruning.removed)
    assert removed == [SLICE * number for number in range(1, 5)] + [5 * SLICE - 1]
    (free,) = journal.connection.execute("PRAGMA freelist_count").fetchone()
    assert free > 0
    rewrite(journal)
    assert journal.connection.execute("PRAGMA freelist_count").fetchone()[0] == 0
    assert not free_pages(journal)


def test_rewrite_lets_an_older_journal_return_its_pages(tmp_path: Path) -> None:
    """A journal that was created without incremental vacuum is written anew, once."""
    path = tmp_path / "journal.db"
    with Journal(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
    with Journal(path) as journal:
        assert journal.connection.execute("PRAGMA auto_vacuum").fetchone()[0] == 0
        assert not free_pages(journal)
        rewrite(journal)
        assert journal.connection.execute("PRAGMA auto_vacuum").fetchone()[0] == 2


def test_history_journal_without_the_table_of_removed_moves_is_readable(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """An older sortd created it; its index of the content is another one."""
    file_image(dataset, mover, "a.jpg", content="ab" * 32)
    journal.connection.execute("DROP TABLE pruned")
    journal.connection.execute("DROP INDEX moves_by_content")
    journal.connection.execute("CREATE INDEX moves_by_content ON moves (content) WHERE content != ''")
    journal.connection.execute("UPDATE members SET wanted = name, content = ?", ("ab" * 32,))
    journal.connection.execute("PRAGMA user_version = 1")
    with History.open(journal.path) as history:
        assert history.counts() == {"filed": 1}
        assert history.last_known(content="ab" * 32) is not None
        (before,) = history.moves(Selection())
    with dataset.journal() as migrated:
        assert migrated.connection.execute("PRAGMA user_version").fetchone()[0] > 1
        assert migrated.history.moves(Selection()) == [before]
        assert (
            "substr"
            in migrated.connection.execute("SELECT sql FROM sqlite_master WHERE name = 'moves_by_content'").fetchone()[
                0
            ]
        )


def test_prune_does_not_change_the_precision_of_guesses(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """An image that a person assigned out of Review/, with or without a hash, says whether its guess was right."""
    for name, content in (("a.jpg", "ab" * 32), ("b.jpg", "")):
        path = dataset.put(f"Images/{name}", name)
        decision = Assigned("cat", 0.9, 0.25, "dog", Mode.MIXED)
        guessed = replace(order(path, "Review/cat", Outcome.REVIEW, content=content), decision=decision)
        waiting = Path(moved(mover, guessed))
        Path(moved(mover, order(waiting, "Dataset/cat", Outcome.ASSIGNED, content=content))).unlink()
    file_image(dataset, mover, "newest.jpg")
    assert journal.history.guesses() == (2, 2)
    pruned(dataset, journal)
    assert journal.history.guesses() == (2, 2)


def test_prune_leaves_the_highest_number_of_a_move_that_ended(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """The open move after it may fail, and leaves no record then."""
    file_image(dataset, mover, "a.jpg").unlink()
    (record,) = journal.history.moves(Selection())
    opened = MoveRecord("0" * 16, "Images", "Dataset/cat", record.move.files)
    journal.intend([(opened, MoveReason("filed", "cat"))])
    pruned(dataset, journal)
    journal.settle([opened.failed("")])
    file_image(dataset, mover, "b.jpg")
    assert max(one.id for one in journal.history.moves(Selection())) > record.id


def test_prune_keeps_a_move_of_which_the_disk_does_not_say(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """A folder that cannot be searched is no sign that its images are gone, and others are examined."""
    unknown, gone = file_image(dataset, mover, "unknown.jpg"), file_image(dataset, mover, "gone.jpg", "dog")
    gone.unlink()
    file_image(dataset, mover, "newest.jpg")
    folder = unknown.parent
    folder.rename(dataset.root / "aside")
    folder.symlink_to(folder)
    assert pruned(dataset, journal).removed == 1
    assert names(journal) == {"unknown.jpg", "newest.jpg"}
