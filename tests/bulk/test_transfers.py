"""Moves of objects that a crash left at each of their steps, in a store without ETags: a folder of this disk."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from sortd.bulk.transfers import (
    APPLY,
    ObjectStore,
    Transfer,
    TransferJournal,
    TransferResult,
    transfer_all,
)
from sortd.errors import AlreadyRunningError, JournalError
from sortd.store.records import MoveProgress

BYTES = b"the image"


class Place:
    """A store with one image at ``in/a.jpg`` that goes to ``out/a.jpg``."""

    def __init__(self, folder: Path) -> None:
        """Make it."""
        self.folder = folder
        for name in ("in", "out"):
            (folder / name).mkdir()
        self.put("in/a.jpg", BYTES)
        source, destination = (str(folder / name / "a.jpg") for name in ("in", "out"))
        self.transfer = Transfer("0123456789", APPLY, source, destination, "cat", hashlib.sha256(BYTES).hexdigest())

    def put(self, name: str, content: bytes) -> None:
        """Write an object."""
        (self.folder / name).write_bytes(content)

    def begin(self, progress: MoveProgress) -> None:
        """Journal that the transfer came so far."""
        with closing(TransferJournal(self.folder)) as journal:
            journal.write([replace(self.transfer, progress=progress)])

    def run(self) -> TransferResult:
        """Carry the transfer out."""
        with closing(TransferJournal(self.folder)) as journal, ThreadPoolExecutor(2) as pool:
            (result,) = transfer_all(ObjectStore(LocalFileSystem()), journal, [self.transfer], pool)
        return result

    def there(self) -> dict[str, bytes]:
        """Return every object."""
        found = (path for name in ("in", "out") for path in (self.folder / name).iterdir())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A store."""
    return Place(tmp_path)


def test_transfer_moves_once(place: Place) -> None:
    """A second call does nothing, even if a new object has the source's name."""
    assert place.run() == TransferResult(replace(place.transfer, progress=MoveProgress.DONE))
    assert place.there() == {"out/a.jpg": BYTES}
    place.put("in/a.jpg", BYTES)
    assert place.run().was_done
    assert place.there() == {"in/a.jpg": BYTES, "out/a.jpg": BYTES}


@pytest.mark.parametrize("progress", [MoveProgress.INTENDED, MoveProgress.PUBLISHED])
def test_transfer_with_a_whole_copy_continues(place: Place, progress: MoveProgress) -> None:
    """The copy that a crash left is used; a source that is gone was deleted by the crashed call."""
    place.begin(progress)
    place.put("out/a.jpg", BYTES)
    assert not place.run().message
    assert place.there() == {"out/a.jpg": BYTES}


@pytest.mark.parametrize("progress", [MoveProgress.INTENDED, MoveProgress.PUBLISHED])
def test_transfer_whose_source_is_deleted_is_done(place: Place, progress: MoveProgress) -> None:
    """A crash came before the last commit."""
    place.begin(progress)
    place.put("out/a.jpg", BYTES)
    (place.folder / "in" / "a.jpg").unlink()
    assert place.run().transfer.progress is MoveProgress.DONE
    assert place.there() == {"out/a.jpg": BYTES}


def test_transfer_without_a_copy_begins_again(place: Place) -> None:
    """A crash came before the copy."""
    place.begin(MoveProgress.INTENDED)
    assert not place.run().message
    assert place.there() == {"out/a.jpg": BYTES}


def test_transfer_leaves_what_another_program_wrote(place: Place) -> None:
    """Another object at the destination, whether before or after the intent, is kept."""
    place.begin(MoveProgress.INTENDED)
    place.put("out/a.jpg", b"of the user")
    assert not place.run().message
    assert place.there() == {"out/a.jpg": b"of the user", "out/a (01234567).jpg": BYTES}


def test_transfer_keeps_a_source_that_changed_after_the_copy(place: Place) -> None:
    """The copy is the decided version; the later one is not deleted."""
    place.begin(MoveProgress.PUBLISHED)
    place.put("out/a.jpg", BYTES)
    place.put("in/a.jpg", b"a later version")
    assert place.run().transfer.progress is MoveProgress.DONE
    assert place.there() == {"in/a.jpg": b"a later version", "out/a.jpg": BYTES}


def test_transfer_removes_a_copy_of_a_later_version(place: Place) -> None:
    """The object changed between the check and the copy."""

    class ChangingStore(ObjectStore):
        """Has another program replace the source before each copy."""

        def copy(self, source: str, destination: str) -> None:
            """Copy the later version."""
            place.put("in/a.jpg", b"a later version")
            super().copy(source, destination)

    with closing(TransferJournal(place.folder)) as journal, ThreadPoolExecutor(2) as pool:
        (result,) = transfer_all(ChangingStore(LocalFileSystem()), journal, [place.transfer], pool)
        assert result.message == "the object changed while it was copied"
        assert [one.progress for one in journal.known([place.transfer])] == [None]
    assert place.there() == {"in/a.jpg": b"a later version"}


def test_transfer_leaves_what_another_program_wrote_after_the_copy(place: Place) -> None:
    """It is not our copy, so it is not deleted."""

    class SharedStore(ObjectStore):
        """Has another program replace each copy."""

        def copy(self, source: str, destination: str) -> None:
            """Copy, and write over it."""
            super().copy(source, destination)
            place.put("out/a.jpg", b"of the user")

    with closing(TransferJournal(place.folder)) as journal, ThreadPoolExecutor(2) as pool:
        (result,) = transfer_all(SharedStore(LocalFileSystem()), journal, [place.transfer], pool)
    assert result.message == "the object changed while it was copied"
    assert place.there() == {"in/a.jpg": BYTES, "out/a.jpg": b"of the user"}


def test_transfer_whose_source_changed_before_its_copy_is_forgotten(place: Place) -> None:
    """Its intent would keep the name from others."""
    place.begin(MoveProgress.INTENDED)
    place.put("in/a.jpg", b"a later version")
    assert place.run().message == "the object changed"
    with closing(TransferJournal(place.folder)) as journal:
        assert [one.progress for one in journal.known([place.transfer])] == [None]


def test_transfer_onto_itself_is_refused(place: Place) -> None:
    """A journal that somebody changed does not make sortd delete the only copy."""
    place.transfer = replace(place.transfer, destination=place.transfer.source)
    place.begin(MoveProgress.PUBLISHED)
    assert "its own destination" in place.run().message
    assert place.there() == {"in/a.jpg": BYTES}


def test_journal_is_open_in_one_process_at_a_time(place: Place) -> None:
    """A second call is refused while the first one works; a damaged journal is named."""
    with (
        closing(TransferJournal(place.folder)),
        pytest.raises(AlreadyRunningError, match="another sortd applies this run"),
    ):
        TransferJournal(place.folder)
    (place.folder / "applied.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(JournalError, match=r"applied\.sqlite cannot be used"):
        TransferJournal(place.folder)
