"""Mover: moves that never overwrite, take companions along, are told truly, and can be undone."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.daemon.control import undo_records
from sortd.daemon.corrections import LIMITS_FACT, Correction, CorrectionScanner, Rejects
from sortd.errors import JournalError
from sortd.events import Move, Moved, MoveFailed, MoveFailure, Outcome, Stamp
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.moving import copy as crossing_module
from sortd.moving.copy_queue import MOST_HANDED_OVER, CopyJob, MoveOrder, Submit
from sortd.moving.fs import lstat_at, rename_new
from sortd.moving.mover import Mover
from sortd.moving.plan import LATE_SECONDS, LateCompanions
from sortd.moving.recovery import UndoResult
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.filing_world import Dataset, done, failure, moved, order


def crossing(*names: int | str) -> None:
    """Rename as between file systems."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), *names[1:2])


def refuse(error: OSError) -> None:
    """Fail where everything can be looked at."""
    raise error


@pytest.fixture(params=["renamed", "copied"])
def mover(request: pytest.FixtureRequest, dataset: Dataset, journal: Journal) -> Mover:
    """What moves files, within a file system or across."""
    rename = rename_new if request.param == "renamed" else crossing
    return Mover(dataset.root, journal, rename=rename)


def test_move_all_image_is_filed_durably(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """It stands in its class byte for byte, the answer says where and which version, the journal says why."""
    path = dataset.put("Images/a.jpg")
    move = order(path)
    (answer,) = mover.move_all([move])
    there = dataset.root / "Dataset/cat/a.jpg"
    assert answer == Moved(str(path), move.stamp, str(there), Outcome.FILED, stamp_of(os.stat(there)))
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}
    (record,) = done(journal)
    assert (record.source_path, record.destination_path) == ("Images/a.jpg", "Dataset/cat/a.jpg")
    assert journal.history.last_known(answer.moved_stamp) == record


@pytest.mark.parametrize("seconds", [15_000_000_000, -62_135_596_800])
def test_move_all_times_beyond_64_bits_of_nanoseconds_are_kept(
    dataset: Dataset, journal: Journal, mover: Mover, seconds: int
) -> None:
    """An image and its sidecar of the year 2445 or 1 are moved, known again by the journal, held and undone."""
    path, sidecar = dataset.put("Images/a.jpg"), dataset.put("Images/a.xmp", "notes")
    for file in (path, sidecar):
        os.utime(file, ns=(seconds * 10**9 + 1, seconds * 10**9 + 1))
    before = os.stat(path).st_mtime_ns
    moved(mover, order(path))
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image", "Dataset/cat/a.xmp": b"notes"}
    (record,) = done(journal)
    assert journal.history.last_known(stamp_of(os.stat(dataset.root / "Dataset/cat/a.jpg"))) == record
    (back,) = mover.undo([record])
    assert (back.restored, back.message) == (str(path), "")
    assert dataset.tree() == {"Images/a.jpg": b"image", "Images/a.xmp": b"notes"}
    held = mover.held_version(str(path))
    assert held is not None
    assert stamp_of(os.stat(path)).agrees_with(held)
    assert os.stat(path).st_mtime_ns == before


def test_move_all_taken_name_gets_a_number(dataset: Dataset, mover: Mover) -> None:
    """Neither a file nor a folder of that name is touched; the next free number is taken."""
    dataset.put("Dataset/cat/a.jpg", "first")
    dataset.put("Dataset/cat/a (2).jpg/inside", "a folder named like the file")
    moved(mover, order(dataset.put("Images/a.jpg", "third")))
    moved(mover, order(dataset.put("Images/a.jpg", "fourth")))
    assert dataset.tree() == {
        "Dataset/cat/a.jpg": b"first",
        "Dataset/cat/a (2).jpg/inside": b"a folder named like the file",
        "Dataset/cat/a (3).jpg": b"third",
        "Dataset/cat/a (4).jpg": b"fourth",
    }


def test_move_all_equal_file_at_the_destination_is_another_file(dataset: Dataset, mover: Mover) -> None:
    """The same bytes under the same name are still somebody else's file: both are kept."""
    dataset.put("Dataset/cat/a.jpg", "same")
    moved(mover, order(dataset.put("Images/a.jpg", "same")))
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"same", "Dataset/cat/a (2).jpg": b"same"}


def test_move_all_second_link_of_the_same_file_is_a_taken_name(dataset: Dataset, mover: Mover) -> None:
    """A rename onto a link of itself does nothing and says it did; ours goes on to a free name."""
    path = dataset.put("Images/a.jpg")
    (dataset.root / "Dataset/cat").mkdir(parents=True)
    os.link(path, dataset.root / "Dataset/cat/a.jpg")
    moved(mover, order(path))
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image", "Dataset/cat/a (2).jpg": b"image"}


def test_move_all_many_equal_names_are_all_kept(dataset: Dataset, mover: Mover) -> None:
    """Sub-folders of Images/ land flat; every file keeps its own number."""
    moves = [order(dataset.put(f"Images/{number}/a.jpg", f"{number}")) for number in range(70)]
    assert all(isinstance(answer, Moved) for answer in mover.move_all(moves))
    names = {f"Dataset/cat/a{'' if number == 1 else f' ({number})'}.jpg" for number in range(1, 71)}
    assert set(dataset.tree()) == names
    assert sorted(dataset.tree().values()) == sorted(f"{number}".encode() for number in range(70))


def test_move_all_name_that_became_free_is_used_again(dataset: Dataset, mover: Mover) -> None:
    """What the mover remembers about numbers never keeps it from the plain name."""
    for _ in range(3):
        moved(mover, order(dataset.put("Images/a.jpg")))
    (dataset.root / "Dataset/cat/a.jpg").unlink()
    assert moved(mover, order(dataset.put("Images/a.jpg"))).endswith("Dataset/cat/a.jpg")


@pytest.mark.parametrize(
    "name", ["€" * 83 + "aa.jpg", "new\nline.jpg", os.fsdecode(b"caf\xe9.jpg"), " .jpg", "a (2).jpg", "-rf"]
)
def test_move_all_unusual_names_are_kept(dataset: Dataset, journal: Journal, mover: Mover, name: str) -> None:
    """255 bytes, newlines, bytes that are no text; twice, so that a number has to fit as well."""
    for content in ("first", "second"):
        moved(mover, order(dataset.put(f"Images/{name}", content)))
    assert sorted(dataset.tree().values()) == [b"first", b"second"]
    assert f"Dataset/cat/{name}" in dataset.tree()
    assert {record.source_path for record in done(journal)} == {f"Images/{name}"}


def test_move_all_missing_files_fail_and_others_move(dataset: Dataset, mover: Mover) -> None:
    """A vanished, a changed, a replaced, a written and a good file in one batch: each is told for itself."""
    paths = {name: dataset.put(f"Images/{name}.jpg", name) for name in ("gone", "changed", "replaced", "busy", "good")}
    moves = [order(path) for path in paths.values()]
    paths["gone"].unlink()
    paths["changed"].write_text("changed by now")
    other = dataset.put("Images/other.tmp", "replaced")
    os.rename(other, paths["replaced"])
    with paths["busy"].open("r+b"):
        answers = mover.move_all(moves)
    told = {Path(answer.path).stem: answer.failure if isinstance(answer, MoveFailed) else "moved" for answer in answers}
    assert told == {
        "gone": MoveFailure.VANISHED,
        "changed": MoveFailure.CHANGED,
        "replaced": MoveFailure.CHANGED,
        "busy": MoveFailure.BUSY,
        "good": "moved",
    }
    assert dataset.tree() == {
        "Images/changed.jpg": b"changed by now",
        "Images/replaced.jpg": b"replaced",
        "Images/busy.jpg": b"busy",
        "Dataset/cat/good.jpg": b"good",
    }


def test_move_all_special_files_and_links_are_not_moved(dataset: Dataset, mover: Mover) -> None:
    """A link, a FIFO and a folder under an image's name stay, and nothing hangs."""
    images = dataset.root / "Images"
    (images / "link.jpg").symlink_to("/etc/passwd")
    os.mkfifo(images / "fifo.jpg")
    (images / "folder.jpg").mkdir()
    for name in ("link.jpg", "fifo.jpg", "folder.jpg"):
        assert failure(mover, order(images / name)) in {MoveFailure.CHANGED, MoveFailure.BUSY}
    assert sorted(os.listdir(images)) == ["fifo.jpg", "folder.jpg", "link.jpg"]
    assert not os.path.exists(dataset.root / "Dataset/cat/link.jpg")


def test_move_all_class_folder_that_is_a_link_is_refused(dataset: Dataset, mover: Mover, tmp_path: Path) -> None:
    """Nothing is written through a symbolic link; the image stays."""
    (tmp_path / "outside").mkdir()
    (dataset.root / "Dataset").mkdir()
    (dataset.root / "Dataset/cat").symlink_to(tmp_path / "outside")
    assert failure(mover, order(dataset.put("Images/a.jpg"))) is MoveFailure.DESTINATION
    assert os.listdir(tmp_path / "outside") == []
    assert dataset.tree() == {"Images/a.jpg": b"image"}


@pytest.mark.parametrize(
    "folder", ["Clases/cat", "../cat", "/etc", "Dataset/../Clases", "Dataset/.cat", "Dataset/a\nb"]
)
def test_move_all_other_folder_is_refused(dataset: Dataset, mover: Mover, folder: str) -> None:
    """Only the four folders are written to, and no class hides or has control characters."""
    path = dataset.put("Images/a.jpg")
    assert failure(mover, order(path, folder)) is MoveFailure.DESTINATION
    assert dataset.tree() == {"Images/a.jpg": b"image"}


def test_move_all_path_outside_the_dataset_is_a_value_error(dataset: Dataset, mover: Mover) -> None:
    """It is no file's fault, and is not told as one."""
    with pytest.raises(ValueError, match="not below the dataset"):
        mover.move_all([Move("/etc/passwd", Stamp(1, 2, 3, 4), "Dataset/cat", Outcome.FILED)])
    assert dataset.tree() == {}


def test_move_all_missing_dataset_is_a_failure(dataset: Dataset, mover: Mover) -> None:
    """An unmounted dataset is not made anew."""
    move = order(dataset.put("Images/a.jpg"))
    os.rename(dataset.root, dataset.folder / "elsewhere")
    assert failure(mover, move) is MoveFailure.DESTINATION
    assert not dataset.root.exists()


def test_move_all_full_destination_keeps_everything(dataset: Dataset, mover: Mover) -> None:
    """A name that the file system cannot make holds the dataset; the image is where it was, nothing half is left."""
    os.makedirs(dataset.root / "Dataset")
    (dataset.root / "Dataset/cat").write_text("a file where the class folder should be")
    move = order(dataset.put("Images/a.jpg"))
    assert failure(mover, move) is MoveFailure.DESTINATION
    (dataset.root / "Dataset/cat").unlink()
    assert moved(mover, move).endswith("Dataset/cat/a.jpg")
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}


def test_move_all_image_in_review_is_filed(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """What waited in Review/ goes on from there."""
    review = moved(mover, order(dataset.put("Images/sub/a.jpg"), "Review/dog", Outcome.REVIEW))
    moved(mover, order(Path(review)))
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}
    assert [record.source_path for record in done(journal)] == ["Review/dog/a.jpg", "Images/sub/a.jpg"]


class TestCompanions:
    """Sidecars, films and raws go where their image goes."""

    def test_move_all_companions_move_under_matching_names(
        self, dataset: Dataset, journal: Journal, mover: Mover
    ) -> None:
        """One name that is taken, be it a companion's, gives all of them the next number."""
        for name in ("a.jpg", "a.xmp", "a.jpg.json", "a.MOV"):
            dataset.put(f"Images/{name}", name)
        dataset.put("Dataset/cat/a.MOV", "another film")
        moved(mover, order(dataset.root / "Images/a.jpg"))
        assert dataset.tree() == {
            "Dataset/cat/a.MOV": b"another film",
            "Dataset/cat/a (2).jpg": b"a.jpg",
            "Dataset/cat/a (2).xmp": b"a.xmp",
            "Dataset/cat/a (2).jpg.json": b"a.jpg.json",
            "Dataset/cat/a (2).MOV": b"a.MOV",
        }
        assert len(done(journal)[0].move.files) == 4

    def test_move_all_shared_sidecar_is_copied_until_the_last_image_leaves(
        self, dataset: Dataset, mover: Mover
    ) -> None:
        """The first image gets a copy with all its times, the second takes the file itself."""
        for name in ("a.jpg", "a.png", "a.xmp"):
            dataset.put(f"Images/{name}", name)
        inode = os.stat(dataset.root / "Images/a.xmp").st_ino
        moved(mover, order(dataset.root / "Images/a.jpg"))
        assert sorted(dataset.tree()) == ["Dataset/cat/a.jpg", "Dataset/cat/a.xmp", "Images/a.png", "Images/a.xmp"]
        assert os.stat(dataset.root / "Images/a.xmp").st_ino == inode
        moved(mover, order(dataset.root / "Images/a.png", "Dataset/dog"))
        assert dataset.tree()["Dataset/dog/a.xmp"] == dataset.tree()["Dataset/cat/a.xmp"] == b"a.xmp"
        assert os.listdir(dataset.root / "Images") == []

    def test_move_all_companion_with_a_writer_keeps_its_image(self, dataset: Dataset, mover: Mover) -> None:
        """All of them go, or none."""
        path = dataset.put("Images/a.jpg")
        with dataset.put("Images/a.xmp").open("r+b"):
            assert failure(mover, order(path)) is MoveFailure.BUSY
        assert sorted(dataset.tree()) == ["Images/a.jpg", "Images/a.xmp"]
        moved(mover, order(path))
        assert sorted(dataset.tree()) == ["Dataset/cat/a.jpg", "Dataset/cat/a.xmp"]

    def test_move_all_unfinished_film_is_left(self, dataset: Dataset, mover: Mover) -> None:
        """A download goes on where its control file is; the film follows by the journal when it is whole."""
        for name in ("a.xmp", "a.MOV", "a.MOV.aria2"):
            dataset.put(f"Images/{name}")
        moved(mover, order(dataset.put("Images/a.jpg")))
        assert sorted(dataset.tree()) == [
            "Dataset/cat/a.jpg",
            "Dataset/cat/a.xmp",
            "Images/a.MOV",
            "Images/a.MOV.aria2",
        ]

    def test_move_all_file_found_under_two_spellings_moves_once(
        self, dataset: Dataset, mover: Mover, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where case does not count, a sidecar answers to a.xmp and to a.XMP, and the image to both of its own."""

        def any_case(folder: int, name: str) -> os.stat_result | None:
            names = {one.casefold(): one for one in os.listdir(folder)}
            return lstat_at(folder, names.get(name.casefold(), name))

        monkeypatch.setattr("sortd.moving.mover.lstat_at", any_case)
        dataset.put("Images/a.XMP", "sidecar")
        moved(mover, order(dataset.put("Images/a.jpg")))
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image", "Dataset/cat/a.XMP": b"sidecar"}

    @pytest.mark.parametrize(
        "standing",
        ["IMG_0001.xmp", "img_0001.mov", "IMG_0001.JPG.pp3", "IMG_0001.psd", "IMG_0001 (conflicted copy).xmp"],
    )
    def test_move_all_stem_of_another_file_is_taken(self, dataset: Dataset, mover: Mover, standing: str) -> None:
        """Somebody's edits, film or document without its image: the next camera's image does not stand beside them."""
        dataset.put(f"Dataset/cat/{standing}", "another camera's")
        moved(mover, order(dataset.put("Images/IMG_0001.JPG")))
        assert dataset.tree() == {
            f"Dataset/cat/{standing}": b"another camera's",
            "Dataset/cat/IMG_0001 (2).JPG": b"image",
        }

    def test_move_all_name_must_be_free_for_every_file(self, dataset: Dataset, mover: Mover) -> None:
        """A shared sidecar of another stem than the image's is not put beside an image that it would describe."""
        for name in ("a.jpg.json", "a-edited.jpg"):
            dataset.put(f"Images/{name}", name)
        dataset.put("Dataset/cat/a.jpg", "another camera's")
        moved(mover, order(dataset.root / "Images/a-edited.jpg"))
        assert sorted(dataset.tree()) == [
            *("Dataset/cat/a (2).jpg.json", "Dataset/cat/a-edited (2).jpg", "Dataset/cat/a.jpg")
        ]

    def test_move_all_rejected_image_avoids_names_of_other_sidecars(self, dataset: Dataset, mover: Mover) -> None:
        """Two images of one stem keep their names there, unless a sidecar would belong to both."""
        for name in ("a.jpg", "a.png", "b.jpg", "b.xmp"):
            dataset.put(f"Images/{name}", name)
        dataset.put("Rejected/b.png", "another one")
        orders = [order(dataset.root / f"Images/{name}", "Rejected", Outcome.REJECTED) for name in ("a.jpg", "a.png")]
        mover.move_all([*orders, order(dataset.root / "Images/b.jpg", "Rejected", Outcome.REJECTED)])
        assert sorted(dataset.tree()) == [
            f"Rejected/{name}" for name in ("a.jpg", "a.png", "b (2).jpg", "b (2).xmp", "b.png")
        ]

    def test_move_all_equal_names_in_one_batch_are_distinct(self, dataset: Dataset, mover: Mover) -> None:
        """Two cameras' images of one name in one batch: the second one's film does not become the first one's."""
        first, second = dataset.put("Images/a/IMG_1.JPG", "first"), dataset.put("Images/b/IMG_1.heic", "second")
        dataset.put("Images/b/IMG_1.mov", "the second one's film")
        mover.move_all([order(first), order(second)])
        assert dataset.tree() == {
            "Dataset/cat/IMG_1.JPG": b"first",
            "Dataset/cat/IMG_1 (2).heic": b"second",
            "Dataset/cat/IMG_1 (2).mov": b"the second one's film",
        }

    def test_move_all_links_and_folders_are_not_companions(self, dataset: Dataset, mover: Mover) -> None:
        """Only regular files travel."""
        dataset.put("Images/a.json/inside")
        (dataset.root / "Images/a.xmp").symlink_to("/etc/passwd")
        moved(mover, order(dataset.put("Images/a.jpg")))
        assert sorted(os.listdir(dataset.root / "Images")) == ["a.json", "a.xmp"]

    def test_move_all_without_companions_moves_the_image_only(self, dataset: Dataset, journal: Journal) -> None:
        """Then every file is for itself."""
        dataset.put("Images/a.xmp")
        moved(Mover(dataset.root, journal, companions=False), order(dataset.put("Images/a.jpg")))
        assert sorted(dataset.tree()) == ["Dataset/cat/a.jpg", "Images/a.xmp"]


class TestRejected:
    """Images that are set aside say why."""

    def test_move_all_rejected_image_has_a_reason_file(self, dataset: Dataset, mover: Mover) -> None:
        """As JSON, with the number of the image where it had to take one."""
        for _ in range(2):
            path = dataset.put("Images/a.jpg", "half an ima")
            move = Move(str(path), stamp_of(os.stat(path)), "Rejected", Outcome.REJECTED, reason="truncated: 11 bytes")
            moved(mover, move)
        names = ["a (2).jpg", "a (2).jpg.reason.json", "a.jpg", "a.jpg.reason.json"]
        assert sorted(os.listdir(dataset.root / "Rejected")) == names
        said = json.loads((dataset.root / "Rejected/a.jpg.reason.json").read_text())
        assert (said["name"], said["from"], said["reason"]) == ("a.jpg", "Images", "truncated: 11 bytes")

    def test_move_all_reason_of_a_name_that_is_not_utf8_is_written(self, dataset: Dataset, mover: Mover) -> None:
        """The reason is valid JSON whatever the name is."""
        name = os.fsdecode(b"caf\xe9.jpg")
        moved(mover, order(dataset.put(f"Images/{name}"), "Rejected", Outcome.REJECTED))
        assert json.loads((dataset.root / f"Rejected/{name}.reason.json").read_bytes())["name"] == name

    def test_move_all_reason_of_a_name_with_accents_is_not_escaped(self, dataset: Dataset, mover: Mover) -> None:
        """The name stands in it as it is written."""
        moved(mover, order(dataset.put("Images/año.jpg"), "Rejected", Outcome.REJECTED))
        assert '"año.jpg"' in (dataset.root / "Rejected/año.jpg.reason.json").read_text("utf-8")


class TestUndo:
    """Moves taken back."""

    def test_undo_files_return_and_are_held(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Image, companions, shared sidecars and reasons: the folder is as before, and the image is held."""
        for name in ("sub/a.jpg", "sub/a.jpg.xmp", "b.jpg", "b.png", "b.xmp"):
            dataset.put(f"Images/{name}", name)
        dataset.put("Dataset/cat/a.jpg", "another")
        before = dataset.tree()
        moved(mover, order(dataset.root / "Images/sub/a.jpg"))
        moved(mover, order(dataset.root / "Images/b.jpg", "Rejected", Outcome.REJECTED))
        shutil.rmtree(dataset.root / "Images/sub")
        records = journal.history.moves(Selection(undoable=True))
        foretold = mover.preview_undo(records)
        told = mover.undo(records)
        assert [one.restored for one in told] == [one.restored for one in foretold]
        assert [one.restored for one in told] == [f"{dataset.root}/Images/b.jpg", f"{dataset.root}/Images/sub/a.jpg"]
        assert dataset.tree() == before
        assert os.listdir(dataset.root / "Rejected") == []
        assert {f"{dataset.root}/{path}" for path in journal.history.held()} == {one.restored for one in told}
        assert {one.outcome for one in (record.move_reason for record in done(journal)[:2])} == {"undone"}

    def test_preview_undo_changes_nothing(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Neither files nor journal."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        before = dataset.tree()
        (told,) = mover.preview_undo(done(journal))
        assert told.restored == f"{dataset.root}/Images/a.jpg"
        assert dataset.tree() == before
        assert journal.history.held() == {}
        assert len(done(journal)) == 1

    def test_undo_taken_name_is_not_overwritten(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """A new file under the old name stays; the old one gets a free name, and that one is held."""
        moved(mover, order(dataset.put("Images/a.jpg", "old")))
        dataset.put("Images/a.jpg", "new")
        (told,) = mover.undo(done(journal))
        assert dataset.tree() == {"Images/a.jpg": b"new", "Images/a (2).jpg": b"old"}
        assert told.restored == f"{dataset.root}/Images/a (2).jpg"
        assert list(journal.history.held()) == ["Images/a (2).jpg"]

    def test_undo_impossible_undo_returns_its_reason(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Removed, changed and undone already: each says so, and the good one goes back."""
        moves = {name: order(dataset.put(f"Images/{name}.jpg", name)) for name in ("gone", "edited", "twice", "good")}
        places = {name: Path(moved(mover, move)) for name, move in moves.items()}
        places["gone"].unlink()
        places["edited"].write_text("better now")
        mover.undo(journal.history.moves(Selection(path="Images/twice.jpg")))
        told = {Path(one.record.source_path).stem: one for one in mover.undo(done(journal)[-4:])}
        assert "no longer there" in told["gone"].message
        assert "changed since" in told["edited"].message
        assert "already undone" in told["twice"].message
        assert told["good"].restored == f"{dataset.root}/Images/good.jpg"
        assert [told[name].restored for name in ("gone", "edited", "twice")] == [None] * 3

    def test_undo_of_an_undo_is_refused(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """And it is said what to do."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        mover.undo(done(journal))
        (told,) = mover.undo(journal.history.moves(Selection(limit=1)))
        assert told.restored is None
        assert "sortd release" in told.message
        assert dataset.tree() == {"Images/a.jpg": b"image"}

    def test_undo_error_of_a_disk_concerns_one_image(
        self, dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An image that cannot be looked at, on a network disk that is stale, say, ends no undo and no daemon."""
        for name in ("a.jpg", "b.jpg"):
            moved(mover, order(dataset.put(f"Images/{name}", name)))

        def look_stale(folder: int, name: str) -> os.stat_result | None:
            if name == "a.jpg":
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
            return lstat_at(folder, name)

        monkeypatch.setattr("sortd.moving.recovery.lstat_at", look_stale)
        told = {Path(one.record.source_path).name: one for one in mover.undo(done(journal))}
        assert "Stale" in told["a.jpg"].message
        assert (told["a.jpg"].restored, told["b.jpg"].restored) == (None, f"{dataset.root}/Images/b.jpg")

    def test_undo_changed_companion_stays_and_is_named(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """The image goes back without what the user has worked on since."""
        dataset.put("Images/a.xmp", "one star")
        moved(mover, order(dataset.put("Images/a.jpg")))
        (dataset.root / "Dataset/cat/a.xmp").write_text("five stars")
        (told,) = mover.undo(done(journal))
        assert "a.xmp" in told.message
        assert dataset.tree() == {"Images/a.jpg": b"image", "Dataset/cat/a.xmp": b"five stars"}

    def test_undo_chain_of_moves_is_undone_at_once(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """From Dataset/ by way of Review/ to Images/, foretold as it is done."""
        review = moved(mover, order(dataset.put("Images/a.jpg"), "Review/dog", Outcome.REVIEW))
        moved(mover, order(Path(review)))
        records = done(journal)
        foretold = mover.preview_undo(records)
        told = mover.undo(records)
        assert [one.restored for one in foretold] == [one.restored for one in told]
        assert dataset.tree() == {"Images/a.jpg": b"image"}
        assert list(journal.history.held()) == ["Images/a.jpg"]

    def test_undo_missing_inbox_is_not_created(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Without Images/ its disk is not mounted: nothing is put below."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        (dataset.root / "Images").rmdir()
        (told,) = mover.undo(done(journal))
        assert told.restored is None
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}


class TestHolds:
    """Versions that are not to be moved."""

    def test_release_path_is_absolute(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """A held file is found and released as the daemon names files."""
        path = dataset.put("Images/a.jpg")
        stamp = stamp_of(os.stat(path))
        for name in ("a.jpg", "b.jpg"):
            journal.hold(f"Images/{name}", stamp, "guarded")
        held = mover.held_version(str(path))
        assert held is not None
        assert held.is_same_version(stamp)
        assert mover.release(str(path)) == 1
        assert mover.release() == 1


def looked(corrections: CorrectionScanner, path: Path) -> list[Correction]:
    """Look at one file and record what was found."""
    return corrections.record([found for found in corrections.look(str(path)) if found is not None])


class TestCorrections:
    """The user puts right what sortd did."""

    def test_corrections_moved_file_is_recognised(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """By its inode, or by its name and content where it was copied and removed; once. A mere copy says nothing."""
        for name in ("a.jpg", "b.jpg"):
            moved(mover, order(dataset.put(f"Images/{name}", name), content=_hash(name)))
        (dataset.root / "Dataset/dog").mkdir()
        renamed, copied = dataset.root / "Dataset/dog/new name.jpg", dataset.root / "Dataset/dog/b.jpg"
        os.rename(dataset.root / "Dataset/cat/a.jpg", renamed)
        shutil.copyfile(dataset.root / "Dataset/cat/b.jpg", copied)
        corrections = CorrectionScanner(Layout(dataset.root), journal, refuse)
        assert looked(corrections, copied) == []
        (dataset.root / "Dataset/cat/b.jpg").unlink()
        for path in (renamed, copied):
            assert len(looked(corrections, path)) == 1
            assert looked(corrections, path) == []
        assert {corrected for _, corrected, _, _ in journal.history.corrections()} == {"dog"}

    def test_corrections_file_in_its_place_is_none(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Nor is a stranger's file, be it of the same name and size."""
        there = Path(moved(mover, order(dataset.put("Images/a.jpg", "a cat"), content=_hash("a cat"))))
        stranger = dataset.put("Dataset/dog/b.jpg", "unknown")
        corrections = CorrectionScanner(Layout(dataset.root), journal, refuse)
        assert [looked(corrections, path) for path in (there, stranger)] == [[], []]
        there.unlink()
        assert looked(corrections, dataset.put("Dataset/dog/a.jpg", "a dog")) == []


class TestLateCompanions:
    """What comes after its image was filed follows it."""

    @pytest.mark.parametrize(
        ("late", "final"),
        [
            ("a.MOV", "a.MOV"),
            ("a.jpg.xmp", "a.jpg.xmp"),
            ("a.xmp", "a.xmp"),
            ("a.dng.xmp", "a.dng.xmp"),
            ("a.jpg.supplemental-metadata.json", "a.jpg.supplemental-metadata.json"),
        ],
    )
    def test_late_companion_follows_its_image(
        self, dataset: Dataset, journal: Journal, mover: Mover, late: str, final: str
    ) -> None:
        """Under the name that fits, journaled like any move."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        follow = mover.late.move_for(str(dataset.put(f"Images/{late}", "late")))
        assert follow is not None
        assert moved(mover, follow) == f"{dataset.root}/Dataset/cat/{final}"
        assert journal.history.counts() == {"filed": 1, "followed": 1}

    def test_late_companion_takes_the_number_of_its_image(self, dataset: Dataset, mover: Mover) -> None:
        """An image that got another name has its film beside it under that name."""
        dataset.put("Dataset/cat/a.jpg", "another")
        moved(mover, order(dataset.put("Images/a.jpg")))
        follow = mover.late.move_for(str(dataset.put("Images/a.MOV", "film")))
        assert follow is not None
        assert moved(mover, follow) == f"{dataset.root}/Dataset/cat/a (2).MOV"

    def test_late_companion_overwrites_nothing(self, dataset: Dataset, mover: Mover) -> None:
        """Where its name is taken it gets another one, beside its image all the same."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        dataset.put("Dataset/cat/a.xmp", "the user's")
        follow = mover.late.move_for(str(dataset.put("Images/a.xmp", "late")))
        assert follow is not None
        assert moved(mover, follow) == f"{dataset.root}/Dataset/cat/a (2).xmp"
        assert dataset.tree()["Dataset/cat/a.xmp"] == b"the user's"

    def test_late_companion_second_version_joins_no_other_image(self, dataset: Dataset, mover: Mover) -> None:
        """Saved twice, it gets a name that is no other image's, and that no later image gets."""
        first = order(dataset.put("Images/IMG_1.JPG", "the first camera's"))
        moved(mover, first)
        dataset.put("Dataset/cat/IMG_1 (2).JPG", "another camera's")
        for version in ("one star", "five stars"):
            follow = mover.late.move_for(str(dataset.put("Images/IMG_1.xmp", version)))
            assert follow is not None
            moved(mover, follow)
        moved(mover, order(dataset.put("Images/IMG_1.JPG", "the third camera's")))
        assert dataset.tree() == {
            "Dataset/cat/IMG_1.JPG": b"the first camera's",
            "Dataset/cat/IMG_1.xmp": b"one star",
            "Dataset/cat/IMG_1 (2).JPG": b"another camera's",
            "Dataset/cat/IMG_1 (3).xmp": b"five stars",
            "Dataset/cat/IMG_1 (4).JPG": b"the third camera's",
        }

    @pytest.mark.parametrize(
        ("image", "late"),
        [
            ("IMG_0001.HEIC", "IMG_O0001.AAE"),
            ("IMG_E0001.JPG", "IMG_0001.AAE"),
            ("a(1).jpg", "a.jpg.supplemental-me(1).json"),
            ("a-edited.jpg", "a.jpg.json"),
            ("PXL_1.MP.jpg", "PXL_1.MP"),
            ("PXL_1.RAW-01.COVER.jpg", "PXL_1.RAW-02.ORIGINAL.dng"),
            (f"{'x' * 47}.jpg", f"{'x' * 46}.json"),
            ("a.jpg", "a.Xmp"),
            ("a.jpg", "a (conflicted copy 2025-04-10 093612).xmp"),
            ("a.jpg", "a.txt"),
        ],
    )
    def test_late_companion_of_every_rule_finds_its_image(
        self, dataset: Dataset, mover: Mover, image: str, late: str
    ) -> None:
        """By the journal, and not while an image that it belongs to stands beside it."""
        path = dataset.put(f"Images/{image}")
        assert mover.late.awaits_image(str(dataset.put(f"Images/{late}", "late")))
        (dataset.root / "Images" / late).rename(dataset.root / "late")
        moved(mover, order(path))
        (dataset.root / "late").rename(dataset.root / "Images" / late)
        assert not mover.late.awaits_image(f"{dataset.root}/Images/{late}")
        follow = mover.late.move_for(f"{dataset.root}/Images/{late}")
        assert follow is not None
        assert moved(mover, follow) == f"{dataset.root}/Dataset/cat/{late}"

    def test_late_companion_waits_for_an_image_in_its_folder(self, dataset: Dataset, mover: Mover) -> None:
        """A new image of that name is its own: they leave together."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        dataset.put("Images/a.jpg", "another")
        assert mover.late.move_for(str(dataset.put("Images/a.MOV", "film"))) is None

    def test_late_companion_without_an_image_stays(self, dataset: Dataset, mover: Mover) -> None:
        """What belongs to nobody, to an image of another folder, or to one that the user moved on, is left alone."""
        there = Path(moved(mover, order(dataset.put("Images/a.jpg"))))
        assert mover.late.move_for(str(dataset.put("Images/b.MOV", "film"))) is None
        assert mover.late.move_for(str(dataset.put("Images/deep/a.MOV", "film"))) is None
        assert mover.late.move_for(str(dataset.put("Images/a.doc", "no companion"))) is None
        there.rename(there.with_name("moved on.jpg"))
        assert mover.late.move_for(str(dataset.put("Images/a.MOV", "film"))) is None

    def test_late_companion_ignores_an_image_of_long_ago(
        self, dataset: Dataset, journal: Journal, mover: Mover
    ) -> None:
        """A camera uses its names again."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        film = str(dataset.put("Images/a.MOV", "film"))
        (ended,) = [record.ended_at or 0.0 for record in done(journal)]
        for later, is_found in ((LATE_SECONDS - 1, True), (LATE_SECONDS + 1, False)):
            journal.clock = lambda now=ended + later: now  # type: ignore[misc]
            found = LateCompanions(dataset.root, journal).move_for(film)
            assert (found is not None) == is_found

    def test_late_companion_is_undone_with_its_image(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """Whoever takes the image back wants its film back, too."""
        moved(mover, order(dataset.put("Images/a.jpg")))
        follow = mover.late.move_for(str(dataset.put("Images/a.MOV", "film")))
        assert follow is not None
        moved(mover, follow)
        (image,) = journal.history.moves(Selection(outcome="filed"))
        ((told, later),) = undo_records(mover, journal.history, [image.id], dry_run=False)
        assert ([one.message for one in told], later) == (["", ""], 0)
        assert dataset.tree() == {"Images/a.jpg": b"image", "Images/a.MOV": b"film"}
        assert len(journal.history.held()) == 2

    def test_late_companion_without_companions_stays(self, dataset: Dataset, journal: Journal) -> None:
        """Then they are files like others."""
        mover = Mover(dataset.root, journal, companions=False)
        moved(mover, order(dataset.put("Images/a.jpg")))
        assert mover.late.move_for(str(dataset.put("Images/a.MOV", "film"))) is None

    def test_late_companion_that_arrives_during_a_copy_is_found_after_it(
        self, dataset: Dataset, journal: Journal
    ) -> None:
        """The image stood there when its film came; now it is gone, and the film follows."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        path = dataset.put("Images/a.jpg")
        mover.move_all([order(path)])
        film = str(dataset.put("Images/a.MOV", "film"))
        assert mover.late.move_for(film) is None
        mover.end(elsewhere(jobs))
        assert [(move.path, move.wanted) for move in mover.late.left_by(str(path))] == [(film, "a.MOV")]


class TestEqualNames:
    """Cameras begin to count anew with every card."""

    def test_free_names_many_equal_names_need_two_attempts_each(
        self, dataset: Dataset, mover: Mover, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On either side of a disk's border: the numbers that are taken are not tried again."""
        attempts: list[str] = []

        def noting(source: int, name: str, destination: int, final: str) -> None:
            if final.startswith("a"):
                attempts.append(final)
            rename_new(source, name, destination, final)

        monkeypatch.setattr(crossing_module, "rename_new", noting)
        if mover._rename is rename_new:
            mover._rename = noting
        for number in range(40):
            moved(mover, order(dataset.put(f"Images/{number}/a.jpg", str(number))))
        assert dataset.tree() == {
            "Dataset/cat/a.jpg": b"0",
            **{f"Dataset/cat/a ({number + 1}).jpg": str(number).encode() for number in range(1, 40)},
        }
        assert len(attempts) <= 2 * 40
        (dataset.root / "Dataset/cat/a.jpg").unlink()  # a name that is free again is taken first
        moved(mover, order(dataset.put("Images/again/a.jpg", "again")))
        assert dataset.tree()["Dataset/cat/a.jpg"] == b"again"


class TestMended:
    """Rejected images that somebody mends are filed from where they lie."""

    def test_move_all_reason_is_removed_when_its_image_leaves(
        self, dataset: Dataset, journal: Journal, mover: Mover
    ) -> None:
        """It says nothing about the mended image; a reason that the user wrote upon is kept."""
        for name in ("a.jpg", "b.jpg"):
            moved(mover, order(dataset.put(f"Images/{name}", "broken"), "Rejected", Outcome.REJECTED))
            (dataset.root / "Rejected" / name).write_bytes(b"mended")
        (dataset.root / "Rejected/b.jpg.reason.json").write_text("a note of the user's")
        rejects = Rejects(Layout(dataset.root), journal)
        found = dict(one for one in rejects.scan(10**18) if one is not None)
        assert {Path(path).name for path in found} == {"a.jpg", "b.jpg"}
        for path in found:
            moved(mover, order(Path(path)))
        assert sorted(path.name for path in (dataset.root / "Rejected").iterdir()) == ["b.jpg.reason.json"]
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"mended", "Dataset/cat/b.jpg": b"mended"}

    def test_rejects_each_version_is_tried_once(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """One that was refused again is not tried at the next scan or start; it can still be undone."""
        moved(mover, order(dataset.put("Images/a.jpg", "broken"), "Rejected", Outcome.REJECTED))
        path = dataset.root / "Rejected/a.jpg"
        rejects = Rejects(Layout(dataset.root), journal)
        assert rejects.look(str(path)) is None
        path.write_bytes(b"still broken")
        stamp = rejects.look(str(path))
        assert stamp == stamp_of(os.stat(path))
        rejects.keep(str(path), stamp)
        assert rejects.look(str(path)) is None
        (told,) = mover.undo(done(journal))
        assert told.restored == f"{dataset.root}/Images/a.jpg"

    @pytest.mark.parametrize(
        ("raised", "tried"),
        [
            ({}, set()),
            ({"max_pixels": 2_000}, {"large.jpg"}),
            ({"timeout_seconds": 9}, {"slow.jpg"}),
            ({"decoders": 2}, {"large.jpg", "slow.jpg", "broken.jpg"}),
            ({"max_pixels": 10}, set()),
        ],
        ids=["nothing", "pixels", "time", "decoders", "lowered"],
    )
    def test_rejects_raised_limit_is_tried_once(
        self, dataset: Dataset, journal: Journal, mover: Mover, raised: dict[str, float], tried: set[str]
    ) -> None:
        """Images that were refused for it are tried as they are, again after a crash, and no more once answered."""
        limits = {"max_pixels": 1_000, "timeout_seconds": 5, "decoders": 1}
        Layout(dataset.root).make()
        assert not any(Rejects(Layout(dataset.root), journal, limits).scan(10**18))
        for name, reason in (("large", "too_large: 1"), ("slow", "poison: 2"), ("broken", "unreadable: 3")):
            move = replace(order(dataset.put(f"Images/{name}.jpg", name), "Rejected", Outcome.REJECTED), reason=reason)
            moved(mover, move)
        dataset.put("Rejected/own.jpg", "the user's")

        def again(rejects: Rejects) -> dict[str, Stamp]:
            return dict(one for one in rejects.scan(10**18 + 10**12) if one is not None)

        assert not again(Rejects(Layout(dataset.root), journal, limits))
        found = again(Rejects(Layout(dataset.root), journal, limits | raised))
        assert {Path(path).name for path in found} == tried
        rejects = Rejects(Layout(dataset.root), journal, limits | raised)
        assert again(rejects) == found  # nothing was answered before the crash
        assert not again(rejects)
        for path, stamp in found.items():
            rejects.keep(path, stamp)
        assert not again(rejects)
        assert not again(Rejects(Layout(dataset.root), journal, limits | raised))
        lowered = {**limits, "max_pixels": 1}
        assert not again(Rejects(Layout(dataset.root), journal, lowered))
        assert "large.jpg" in {Path(path).name for path in again(Rejects(Layout(dataset.root), journal, limits))}

    def test_rejects_unknown_limits_are_all_tried(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """A journal of an older sortd, or one whose note is damaged, does not say by which limits it was refused."""
        move = order(dataset.put("Images/a.jpg", "large"), "Rejected", Outcome.REJECTED)
        moved(mover, replace(move, reason="too_large: 1"))
        for noted in (None, "[", "[]", '{"max_pixels": "many"}'):
            if noted is not None:
                journal.note(LIMITS_FACT, noted)
            assert any(Rejects(Layout(dataset.root), journal, {"max_pixels": 5}).scan(10**18))

    def test_rejects_other_files_are_ignored(self, dataset: Dataset, journal: Journal, mover: Mover) -> None:
        """The user's own file in Rejected/, a reason, a folder, a link; and nothing is noted about them."""
        moved(mover, order(dataset.put("Images/a.jpg", "broken"), "Rejected", Outcome.REJECTED))
        dataset.put("Rejected/own.jpg", "the user's")
        dataset.put("Rejected/deep/a.jpg", "the user's")
        (dataset.root / "Rejected/link.jpg").symlink_to("own.jpg")
        rejects = Rejects(Layout(dataset.root), journal)
        assert not any(rejects.scan(10**18))
        rejects.keep(str(dataset.root / "Rejected/own.jpg"), Stamp(1, 2, 3, 4))
        moved(mover, order(dataset.root / "Rejected/a.jpg"))
        dataset.put("Rejected/a.jpg", "the user's, under a name that was free again")
        assert not any(rejects.scan(10**18))
        shutil.rmtree(dataset.root / "Rejected")
        assert list(rejects.scan(10**18)) == []


def changed_in_place(path: Path, content: str, before: os.stat_result) -> None:
    """Write other bytes of the same number into a file and put its time back, until the kernel's clock has ticked."""
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:
        with path.open("r+") as file:
            file.write(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


class TestErrors:
    """Disks that refuse."""

    def test_move_all_journal_that_cannot_be_written_moves_nothing(
        self, dataset: Dataset, journal: Journal, mover: Mover
    ) -> None:
        """The error goes up, so that the daemon stops; the files are where they were."""
        moves = [order(dataset.put(f"Images/{'n' * 200}{number}.jpg")) for number in range(60)]
        journal.connection.execute("PRAGMA max_page_count = 1")
        before = dataset.tree()
        with pytest.raises(JournalError):
            mover.move_all(moves)
        assert dataset.tree() == before

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS])
    def test_move_all_refused_rename_changes_nothing(self, dataset: Dataset, journal: Journal, number: int) -> None:
        """At the image or at a companion: all of them are where they were, and go when the disk serves again."""
        for name in ("a.jpg", "a.xmp", "a.MOV"):
            dataset.put(f"Images/{name}", name)
        before, move = dataset.tree(), order(dataset.root / "Images/a.jpg")
        for count in range(3):
            refusing = Mover(dataset.root, journal, rename=_refusing(number, after=count))
            assert failure(refusing, move) is MoveFailure.DESTINATION
            assert dataset.tree() == before
            assert journal.history.unfinished() == []
        moved(Mover(dataset.root, journal), move)

    def test_move_all_file_that_cannot_be_synced_is_not_moved(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The others of its batch are; each thread's error finds its own file."""
        paths = [dataset.put(f"Images/{number}.jpg", f"{number}") for number in range(40)]
        fsync = os.fsync

        def refuse(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(("/7.jpg", "/31.jpg")):
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        answers = Mover(dataset.root, journal).move_all([order(path) for path in paths])
        failed = [Path(answer.path).name for answer in answers if isinstance(answer, MoveFailed)]
        assert failed == ["7.jpg", "31.jpg"]
        assert sorted(os.listdir(dataset.root / "Images")) == ["31.jpg", "7.jpg"]

    def test_move_all_file_changed_after_its_check_is_moved_back(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even for a moment: its name is compared once more right before the rename."""
        path, renamed = dataset.put("Images/a.jpg"), []
        intend = journal.intend

        def change(*orders: object) -> None:
            intend(*orders)  # type: ignore[arg-type]
            path.write_text("changed")

        monkeypatch.setattr(journal, "intend", change)
        mover = Mover(dataset.root, journal, rename=lambda *names: renamed.append(names))
        assert failure(mover, order(path)) is MoveFailure.CHANGED
        assert renamed == []

    def test_move_all_rewrite_with_the_old_time_is_not_moved(self, dataset: Dataset, mover: Mover) -> None:
        """Of equal size, in place, under the same time: only the time of change shows that it was not looked at."""
        path = dataset.put("Images/a.jpg", "decided")
        meant, before = order(path, content=_hash("decided")), os.stat(path)
        changed_in_place(path, "another", before)
        assert failure(mover, meant) is MoveFailure.CHANGED
        assert dataset.tree() == {"Images/a.jpg": b"another"}
        changed_in_place(path, "decided", os.stat(path))
        assert moved(mover, meant) == str(
            dataset.root / "Dataset/cat/a.jpg"
        )  # new rights or links change no bytes either

    def test_move_all_file_replaced_during_its_move_is_moved_back(self, dataset: Dataset, journal: Journal) -> None:
        """Another inode under the name at the last moment: neither is lost, neither is filed."""
        path, other = dataset.put("Images/a.jpg", "decided"), dataset.put("Images/b.tmp", "another")

        def rename(source: int, name: str, destination: int, final: str) -> None:
            if other.exists():
                os.rename(other, path)
            rename_new(source, name, destination, final)

        assert failure(Mover(dataset.root, journal, rename=rename), order(path)) is MoveFailure.CHANGED
        assert dataset.tree() == {"Images/a.jpg": b"another"}

    def test_move_all_open_move_is_recovered_before_the_next(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder that cannot be synced leaves the move open; once it can, it is done and told by the journal."""
        refused = {"now": True}
        fsync = os.fsync

        def refuse(descriptor: int) -> None:
            if refused["now"] and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/Dataset/cat"):
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        mover = Mover(dataset.root, journal)
        assert failure(mover, order(dataset.put("Images/a.jpg"))) is MoveFailure.DESTINATION
        assert len(journal.history.unfinished()) == 1
        refused["now"] = False
        moved(mover, order(dataset.put("Images/b.jpg")))
        assert {record.source_path for record in done(journal)} == {"Images/a.jpg", "Images/b.jpg"}

    @pytest.mark.parametrize("is_taken", [False, True])
    def test_move_all_source_that_cannot_be_removed_is_not_copied_again(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
    ) -> None:
        """An immutable file, or another owner's in a sticky folder: its copy is withdrawn, only that file waits."""

        def refuse(source: int, name: str, destination: int, final: str) -> None:
            if name.startswith("a.") and final.endswith(".del") and not is_taken:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            rename_new(source, name, destination, final)

        unlink = os.unlink

        def keep(path: str, *, dir_fd: int | None = None) -> None:
            if path.endswith(".del"):
                raise PermissionError(errno.EPERM, "Operation not permitted")
            unlink(path, dir_fd=dir_fd)

        mover = Mover(dataset.root, journal, rename=crossing)
        move = order(dataset.put("Images/a.jpg"))
        with monkeypatch.context() as patch:
            patch.setattr("sortd.moving.copy.rename_new", refuse)
            patch.setattr("sortd.moving.copy.os.unlink", keep)
            failures = [failure(mover, move) for _ in range(3)]
            if not is_taken:
                assert failures == [MoveFailure.BUSY] * 3
                assert dataset.tree() == {"Images/a.jpg": b"image"}
            assert list(dataset.tree().values()).count(b"image") <= 2
        mover.recover()
        if is_taken:
            assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}
        else:
            moved(mover, move)

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
    @pytest.mark.parametrize("refusing", ["Images", "Dataset/cat", None])
    def test_move_all_folder_that_cannot_be_written_is_named(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch, number: int, refusing: str | None
    ) -> None:
        """A rename does not tell which of its folders refused, so both are asked; the other one is not blamed."""

        def refuse_rename(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        def access(_: str, __: int, *, dir_fd: int, effective_ids: bool) -> bool:
            assert effective_ids
            return refusing is None or os.fstat(dir_fd).st_ino != (dataset.root / refusing).stat().st_ino

        (dataset.root / "Dataset/cat").mkdir(parents=True)
        mover = Mover(dataset.root, journal, rename=refuse_rename)
        path = dataset.put("Images/a.jpg")
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", access)
            (answer,) = mover.move_all([order(path)])
        assert isinstance(answer, MoveFailed)
        of_the_file = MoveFailure.BUSY if number == errno.EPERM else MoveFailure.DESTINATION
        assert answer.failure is (MoveFailure.SOURCE if refusing == "Images" else of_the_file)
        assert ("files cannot be removed from Images" in answer.message) == (refusing == "Images")

    def test_move_all_folder_that_cannot_be_read_is_a_source_failure(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The companions of an image cannot be looked for: that says nothing about its class."""
        path = dataset.put("Images/sub/a.jpg")

        def refuse_to_list(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("sortd.moving.mover.with_companions", refuse_to_list)
        (answer,) = Mover(dataset.root, journal).move_all([order(path)])
        assert isinstance(answer, MoveFailed)
        assert answer.failure is MoveFailure.SOURCE
        assert f"{path.parent}: Permission denied; give sortd permission to read it" in answer.message

    def test_move_all_source_of_an_open_move_is_not_moved_again(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A copy stands already and the source cannot be taken away: a second copy would be a duplicate."""

        def refuse(source: int, name: str, destination: int, final: str) -> None:
            if final.endswith(".del"):
                raise OSError(errno.EIO, "Input/output error")
            rename_new(source, name, destination, final)

        mover = Mover(dataset.root, journal, rename=crossing)
        move = order(dataset.put("Images/a.jpg"))
        with monkeypatch.context() as patch:
            patch.setattr("sortd.moving.copy.rename_new", refuse)
            for _ in range(3):
                assert failure(mover, move) is MoveFailure.DESTINATION
            assert sorted(dataset.tree()) == ["Dataset/cat/a.jpg", "Images/a.jpg"]
        assert [one.progress.value for one in mover.recover()] == ["done"]
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}


class TestCrossing:
    """Copies to another file system."""

    @pytest.fixture
    def mover(self, dataset: Dataset, journal: Journal) -> Mover:
        """A filing whose renames all fail as between file systems."""
        return Mover(dataset.root, journal, rename=crossing)

    def test_copy_keeps_times_mode_owner_and_attributes(self, dataset: Dataset, mover: Mover) -> None:
        """To the nanosecond, where the file system can."""
        path = dataset.put("Images/a.jpg")
        os.setxattr(path, "user.note", b"kept")
        path.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(path, 1234, 4321)
        os.utime(path, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
        before = os.stat(path)
        there = moved(mover, order(path))
        after = os.stat(there)
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert after.st_mtime_ns == before.st_mtime_ns
        assert os.getxattr(there, "user.note") == b"kept"

    def test_copy_keeps_holes(self, dataset: Dataset, mover: Mover) -> None:
        """A sparse file does not fill the disk, and its bytes are the same."""
        path = dataset.root / "Images/a.jpg"
        with path.open("wb") as file:
            file.write(b"head")
            file.seek(40 << 20)
            file.write(b"tail")
            file.truncate(60 << 20)
        content, blocks = path.read_bytes(), os.stat(path).st_blocks
        there = moved(mover, order(path))
        assert os.stat(there).st_blocks <= blocks + 16
        assert Path(there).read_bytes() == content

    def test_copy_of_other_bytes_than_were_decided_is_refused(self, dataset: Dataset, mover: Mover) -> None:
        """A copy whose hash is not the decoder's is thrown away."""
        path = dataset.put("Images/a.jpg")
        assert failure(mover, order(path, content="0" * 64)) is MoveFailure.CHANGED
        assert dataset.tree() == {"Images/a.jpg": b"image"}
        moved(mover, order(path, content=_hash("image")))

    def test_copy_from_folder_that_cannot_be_written_is_not_made(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder that is read-only, or another's: no copy is made, only to be withdrawn, at every try for months."""
        mover = Mover(dataset.root, journal, rename=crossing)
        path = dataset.put("Images/a.jpg")

        def refuse_to_write(name: str, mode: int, *, dir_fd: int, effective_ids: bool) -> bool:
            assert effective_ids
            assert os.path.sameopenfile(dir_fd, folder)
            return (name, mode & os.W_OK) != (".", os.W_OK)

        folder = os.open(path.parent, os.O_RDONLY)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", refuse_to_write)
            patch.setattr("sortd.moving.copy.copy_to_part", refuse)
            (answer,) = mover.move_all([order(path)])
        os.close(folder)
        assert isinstance(answer, MoveFailed)
        assert answer.failure is MoveFailure.SOURCE
        assert "files cannot be removed from Images" in answer.message
        assert dataset.tree() == {"Images/a.jpg": b"image"}
        moved(mover, order(path))

    def test_copy_interrupted_leaves_nothing(self, dataset: Dataset, journal: Journal) -> None:
        """At a stop the image is where it was, and no part is left."""
        path = dataset.put("Images/a.jpg", bytes(3 << 20))
        with path.open("r+b") as file:
            file.write(b"x" * (3 << 20))
        asked = iter([False, False, True])
        mover = Mover(dataset.root, journal, rename=crossing, interrupted=lambda: next(asked))
        assert failure(mover, order(path)) is MoveFailure.BUSY
        assert list(dataset.tree()) == ["Images/a.jpg"]
        assert journal.history.unfinished() == []

    def test_copy_of_source_that_changes_is_not_published(self, dataset: Dataset, journal: Journal) -> None:
        """Its bytes are a mixture of two versions: they are thrown away, and the image is looked at again."""
        path = dataset.put("Images/a.jpg", bytes(b"x" * (2 << 20)))

        def append() -> bool:
            with path.open("ab") as file:
                file.write(b"more")
            return False

        mover = Mover(dataset.root, journal, rename=crossing, interrupted=append)
        assert failure(mover, order(path)) is MoveFailure.CHANGED
        assert list(dataset.tree()) == ["Images/a.jpg"]

    def test_copy_runs_where_it_is_submitted(self, dataset: Dataset, journal: Journal) -> None:
        """Other moves are answered at once; a copy made in another thread is answered when it comes to its end."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        assert mover.move_all([order(dataset.put("Images/a.jpg"))]) == []
        assert mover.recover() == []
        assert [type(answer) for answer in mover.end(elsewhere(jobs))] == [Moved]
        assert journal.history.counts() == {"filed": 1}
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}

    def test_copy_under_way_is_neither_recovered_nor_moved_again(self, dataset: Dataset, journal: Journal) -> None:
        """What the other thread is about is left to it, whatever is asked meanwhile and however often."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        move = order(dataset.put("Images/a.jpg"))
        assert mover.move_all([move]) == []
        assert failure(mover, move) is MoveFailure.BUSY
        assert (mover.recover(), len(jobs)) == ([], 1)
        mover.end(elsewhere(jobs))
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}

    def test_copy_interrupted_is_recovered(self, dataset: Dataset, journal: Journal) -> None:
        """A job that begins after the stop touches nothing: its intent is recovered like after a crash."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs), interrupted=lambda: True)
        assert mover.move_all([order(dataset.put("Images/a.jpg"))]) == []
        (answer,) = mover.end(elsewhere(jobs))
        assert isinstance(answer, MoveFailed)
        assert answer.failure is MoveFailure.BUSY
        assert [record.move.progress.value for record in journal.history.unfinished()] == ["intended"]
        assert [one.progress.value for one in mover.recover()] == ["failed"]
        assert dataset.tree() == {"Images/a.jpg": b"image"}

    def test_copy_number_under_way_is_limited(self, dataset: Dataset, journal: Journal) -> None:
        """The journal holds no thousands of intents; the others follow as copies end, and none is forgotten."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        mover.move_all([order(dataset.put("Images/first.jpg"))])
        answers = mover.move_all([order(dataset.put(f"Images/{number}.jpg")) for number in range(100)])
        assert (answers, len(jobs), mover.can_go_on) == ([], MOST_HANDED_OVER, False)
        told = 0
        while jobs:
            told += len(mover.end(elsewhere(jobs)))
            assert mover.move_all([]) == []
        assert told == 101
        assert journal.history.counts() == {"filed": 101}

    def test_give_up_answers_moves_that_wait_for_a_copy(self, dataset: Dataset, journal: Journal) -> None:
        """Nothing was written about it: it is answered at once and stands where it was."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        mover.move_all([order(dataset.put("Images/first.jpg"))])
        mover.move_all([order(dataset.put(f"Images/{number}.jpg")) for number in range(100)])
        given_up = mover.give_up()
        assert [type(answer) for answer in given_up] == [MoveFailed] * (101 - MOST_HANDED_OVER)
        assert len(journal.history.unfinished()) == MOST_HANDED_OVER
        assert failure(mover, order(dataset.put("Images/late.jpg"))) is MoveFailure.BUSY

    def test_undo_across_disks_ends_where_it_is_submitted(self, dataset: Dataset, journal: Journal) -> None:
        """The answer comes later, and says what it would have said at once; the image is held."""
        jobs: list[CopyJob] = []
        mover = Mover(dataset.root, journal, rename=crossing, submit=later(jobs))
        mover.move_all([order(dataset.put("Images/a.jpg"))])
        mover.end(elsewhere(jobs))
        assert mover.undo(done(journal)) == []
        (told,) = mover.end(elsewhere(jobs))
        assert isinstance(told, UndoResult)
        assert told.restored == f"{dataset.root}/Images/a.jpg"
        assert list(journal.history.held()) == ["Images/a.jpg"]

    def test_copy_source_written_meanwhile_is_kept(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A writer that comes after the copy was published: both are kept, nothing that it wrote is lost."""
        path = dataset.put("Images/a.jpg")
        rename = rename_new

        def append(source: int, name: str, destination: int, final: str) -> None:
            if final.endswith(".del"):
                with path.open("ab") as file:
                    file.write(b" and more")
            rename(source, name, destination, final)

        monkeypatch.setattr("sortd.moving.copy.rename_new", append)
        (answer,) = Mover(dataset.root, journal, rename=crossing).move_all([order(path)])
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"image", "Images/a.jpg": b"image and more"}
        assert isinstance(answer, Moved)
        assert "also kept in Images" in answer.note == done(journal)[0].move.message

    def test_copy_that_is_gone_keeps_its_source(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever removes the copy at once does not lose the image."""
        path = dataset.put("Images/a.jpg")
        rename = rename_new

        def remove(source: int, name: str, destination: int, final: str) -> None:
            if final.endswith(".del"):
                (dataset.root / "Dataset/cat/a.jpg").unlink()
            rename(source, name, destination, final)

        monkeypatch.setattr("sortd.moving.copy.rename_new", remove)
        Mover(dataset.root, journal, rename=crossing).move_all([order(path)])
        assert dataset.tree() == {"Images/a.jpg": b"image"}

    @pytest.mark.parametrize("cannot_link", [False, True])
    def test_publish_without_noreplace_overwrites_nothing(
        self, dataset: Dataset, mover: Mover, monkeypatch: pytest.MonkeyPatch, *, cannot_link: bool
    ) -> None:
        """Without RENAME_NOREPLACE by link, and without links by a placeholder: a taken name is taken."""

        def refuse(_: int, name: str, destination: int, final: str) -> None:
            if _stands(destination, final):
                raise FileExistsError(errno.EEXIST, "File exists", name)
            raise OSError(errno.EINVAL, "Invalid argument", name)

        def link(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("sortd.moving.copy.rename_new", refuse)
        if cannot_link:
            monkeypatch.setattr("sortd.moving.copy.os.link", link)
        dataset.put("Dataset/cat/a.jpg", "first")
        moved(mover, order(dataset.put("Images/a.jpg", "second")))
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"first", "Dataset/cat/a (2).jpg": b"second"}


class TestPlaceholders:
    """File systems that can neither refuse to overwrite nor link."""

    @pytest.fixture
    def mover(self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Mover:
        """A filing on one of them."""

        def refuse(*names: int | str) -> None:
            raise OSError(errno.EINVAL, "Invalid argument", *names[1:2])

        monkeypatch.setattr("sortd.moving.copy.rename_new", refuse)
        return Mover(dataset.root, journal, rename=crossing)

    def test_publish_name_taken_at_the_last_moment_is_kept(
        self, dataset: Dataset, mover: Mover, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The placeholder is made only where nothing is."""

        def link(*_: object, **__: object) -> None:
            dataset.put("Dataset/cat/a.jpg", "the user's")
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("sortd.moving.copy.os.link", link)
        moved(mover, order(dataset.put("Images/a.jpg")))
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"the user's", "Dataset/cat/a (2).jpg": b"image"}

    def test_publish_replaced_placeholder_is_kept(
        self, dataset: Dataset, mover: Mover, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only our own empty file is renamed over."""

        def link(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        def replaced(folder: int, name: str) -> os.stat_result | None:
            if name == "a.jpg" and (dataset.root / "Dataset/cat/a.jpg").exists():
                (dataset.root / "Dataset/cat/a.jpg").unlink()
                dataset.put("Dataset/cat/a.jpg", "the user's")
            return lstat_at(folder, name)

        monkeypatch.setattr("sortd.moving.copy.os.link", link)
        monkeypatch.setattr("sortd.moving.copy.lstat_at", replaced)
        assert failure(mover, order(dataset.put("Images/a.jpg"))) is MoveFailure.CHANGED
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"the user's", "Images/a.jpg": b"image"}


def test_move_all_four_movers_with_equal_names_lose_nothing(tmp_path: Path) -> None:
    """The kernel decides, also between processes that know nothing of each other."""
    datasets = [Dataset.below(tmp_path / f"{number}") for number in range(4)]
    shared = tmp_path / "shared"
    shared.mkdir()
    program = (
        "import sys; from pathlib import Path; from sortd.moving.mover import Mover\n"
        "from tests.filing_world import *\n"
        "dataset = Dataset(Path(sys.argv[1]))\n"
        "with dataset.journal() as journal:\n"
        "    moves = [order(path) for path in sorted((dataset.root / 'Images').rglob('*.jpg'))]\n"
        "    answers = Mover(dataset.root, journal).move_all(moves)\n"
        "    assert all(isinstance(answer, Moved) for answer in answers), answers\n"
    )
    for number, dataset in enumerate(datasets):
        (dataset.root / "Dataset").mkdir()
        for one in range(100):
            dataset.put(f"Images/{one}/a.jpg", f"{number} {one}")
    target = datasets[0].root / "Dataset" / "cat"
    target.mkdir()
    if os.geteuid() != 0:
        pytest.skip("one class folder in four datasets takes bind mounts, and these take root")
    mounts = [
        f"mkdir -p {dataset.root}/Dataset/cat && mount --bind {target} {dataset.root}/Dataset/cat"
        for dataset in datasets[1:]
    ]
    runs = [f'({sys.executable} -c "$PROGRAM" {dataset.folder}) & pids="$pids $!"' for dataset in datasets]
    script = " && ".join(mounts) + "\n" + "\n".join(runs) + '\nfor pid in $pids; do wait "$pid" || exit 1; done'
    command = ["unshare", "--mount", "sh", "-c", script]
    subprocess.run(command, env={**os.environ, "PROGRAM": program, "PYTHONPATH": "."}, check=True)
    content = sorted(path.read_text() for path in target.iterdir())
    assert content == sorted(f"{number} {one}" for number in range(4) for one in range(100))


def later(jobs: list[CopyJob]) -> Submit:
    """Keep jobs for later."""

    def submit(job: CopyJob) -> list[MoveOrder]:
        jobs.append(job)
        return []

    return submit


def elsewhere(jobs: list[CopyJob]) -> list[MoveOrder]:
    """Run all jobs that were kept in another thread."""
    orders: list[MoveOrder] = []
    kept = list(jobs)
    jobs.clear()
    thread = threading.Thread(target=lambda: orders.extend(job() for job in kept))
    thread.start()
    thread.join()
    return orders


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stands(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _refusing(number: int, *, after: int) -> Callable[[int, str, int, str], None]:
    count = {"now": 0}

    def rename(source: int, name: str, destination: int, final: str) -> None:
        count["now"] += 1
        if count["now"] == after + 1:
            raise OSError(number, os.strerror(number), name)
        rename_new(source, name, destination, final)

    return rename
