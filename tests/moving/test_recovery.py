"""Recovery: whatever stands where, nothing is lost, nothing of anybody else's is touched, and it ends."""

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.events import Moved, Stamp
from sortd.files import stamp_of
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import MoveFile, MoveProgress, MoveReason, MoveRecord, Role, Selection
from tests.filing_world import Dataset, order

TOKEN = "0123456789abcdef"  # noqa: S105 - a move's
PART = f".sortd-{TOKEN}.0.part"
TAKEN = f".sortd-{TOKEN}.0.del"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A dataset whose class folder is there."""
    dataset = Dataset.below(tmp_path)
    (dataset.root / "Dataset/cat").mkdir(parents=True)
    return dataset


class Crash:
    """A move that was cut short, and the next start."""

    def __init__(
        self, dataset: Dataset, journal: Journal, *names: str, progress: MoveProgress = MoveProgress.INTENDED
    ) -> None:
        """Put files into Images/ and let a move of them be under way."""
        self.dataset, self.journal = dataset, journal
        members: list[MoveFile] = []
        for name in names or ("a.jpg",):
            path = dataset.put(f"Images/{name}", name)
            content = hashlib.sha256(name.encode()).hexdigest()
            role = Role.COMPANION if members else Role.IMAGE
            members.append(MoveFile(role, name, name, stamp_of(os.stat(path)), content=content))
        self.move = MoveRecord(TOKEN, "Images", "Dataset/cat", tuple(members), progress)

    def copied(self, name: str, position: int = 0, content: str = "") -> Path:
        """Put a copy of a member into the class folder, as the sealed one."""
        member = self.move.files[position]
        path = self.dataset.put(f"Dataset/cat/{name}", content or member.name)
        members = list(self.move.files)
        members[position] = replace(member, copy_inode=os.stat(path).st_ino, final=member.final or "")
        self.move = replace(self.move, files=tuple(members))
        return path

    def named(self, *finals: str) -> None:
        """Let the journal know the final names."""
        members = (replace(one, final=name) for one, name in zip(self.move.files, finals, strict=True))
        self.move = replace(self.move, files=tuple(members))

    def recover(self) -> MoveRecord:
        """Start again, twice: the second time there is nothing to do."""
        self.journal.intend([(self.move, MoveReason("filed"))])
        (ended,) = Mover(self.dataset.root, self.journal).recover()
        tree = self.dataset.tree()
        again = Mover(self.dataset.root, self.journal).recover()
        assert again == [] or again[0].progress not in {MoveProgress.DONE, MoveProgress.FAILED}
        assert self.dataset.tree() == tree
        return ended

    @property
    def told(self) -> list[str]:
        """Where the journal says images went."""
        return [record.destination_path for record in self.journal.history.moves(Selection())]


class TestIntended:
    """Renames that may have been made, copies that count for nothing."""

    def test_recover_completed_rename_is_done(self, dataset: Dataset, journal: Journal) -> None:
        """Whatever name it got, and although the user has put a new file under the old name."""
        crash = Crash(dataset, journal)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a (7).jpg")
        dataset.put("Images/a.jpg", "new")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Images/a.jpg": b"new", "Dataset/cat/a (7).jpg": b"a.jpg"}
        assert crash.told == ["Dataset/cat/a (7).jpg"]

    def test_recover_forgets_a_move_that_a_second_connection_ended(self, dataset: Dataset, journal: Journal) -> None:
        """A copy to another disk is written down by its own connection; the first one asks once and knows it then."""

        def to_another_disk(*_: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        mover = Mover(dataset.root, journal, rename=to_another_disk)
        (answer,) = mover.move_all([order(dataset.put("Images/copied.jpg", "copied"))])
        assert isinstance(answer, Moved)
        assert mover.recover() == []
        assert journal.open_tokens == set()

    def test_recover_intent_without_rename_is_failed(self, dataset: Dataset, journal: Journal) -> None:
        """A link of the same file in the class, which is the user's, does not deceive."""
        crash = Crash(dataset, journal)
        os.link(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"a.jpg", "Dataset/cat/a.jpg": b"a.jpg"}
        assert crash.told == []

    def test_recover_moved_file_changed_by_the_user_is_left(self, dataset: Dataset, journal: Journal) -> None:
        """Edited after the move, it is another version: neither taken back nor told as the one that was meant."""
        crash = Crash(dataset, journal)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        dataset.put("Dataset/cat/a.jpg", "edited")
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"edited"}

    def test_recover_incomplete_group_is_moved_back(self, dataset: Dataset, journal: Journal) -> None:
        """The image had moved, its companion had not: both are in the inbox again, nothing there is overwritten."""
        crash = Crash(dataset, journal, "a.jpg", "a.xmp")
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        dataset.put("Images/a.jpg", "new")
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"new", "Images/a (2).jpg": b"a.jpg", "Images/a.xmp": b"a.xmp"}

    def test_recover_group_without_a_removed_companion_is_done(self, dataset: Dataset, journal: Journal) -> None:
        """What is gone cannot be waited for."""
        crash = Crash(dataset, journal, "a.jpg", "a.xmp")
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        (dataset.root / "Images/a.xmp").unlink()
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg"}

    def test_recover_interrupted_move_back_is_completed(self, dataset: Dataset, journal: Journal) -> None:
        """A file under a name that only sortd knows becomes visible again, over nothing."""
        crash = Crash(dataset, journal)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        dataset.put("Images/a.jpg", "new")
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"new", "Images/a (2).jpg": b"a.jpg"}

    @pytest.mark.parametrize("source", ["a.jpg", "another version by now"])
    def test_recover_copy_with_existing_source_is_removed(
        self, dataset: Dataset, journal: Journal, source: str
    ) -> None:
        """Half or whole: the file itself is there, be it rewritten by the user."""
        crash = Crash(dataset, journal)
        dataset.put(f"Dataset/cat/{PART}", "a.j")
        if source != "a.jpg":
            dataset.put("Images/a.jpg", source)
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": source.encode()}

    def test_recover_only_copy_is_published(self, dataset: Dataset, journal: Journal) -> None:
        """The source is gone and the part holds its very bytes: it becomes visible, over nothing."""
        crash = Crash(dataset, journal)
        (dataset.root / "Images/a.jpg").unlink()
        dataset.put(f"Dataset/cat/{PART}", "a.jpg")
        dataset.put("Dataset/cat/a.jpg", "another")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"another", "Dataset/cat/a (2).jpg": b"a.jpg"}
        assert crash.told == ["Dataset/cat/a (2).jpg"]

    @pytest.mark.parametrize("is_known", [True, False])
    def test_recover_unproven_copy_is_kept_hidden(self, dataset: Dataset, journal: Journal, *, is_known: bool) -> None:
        """It is not shown as an image, nor removed: the message names it."""
        crash = Crash(dataset, journal)
        if not is_known:
            member = replace(crash.move.image, content="")
            crash.move = replace(crash.move, files=(member,))
        (dataset.root / "Images/a.jpg").unlink()
        dataset.put(f"Dataset/cat/{PART}", "a.j")
        ended = crash.recover()
        assert ended.progress is MoveProgress.FAILED
        assert PART in ended.message
        assert dataset.tree() == {f"Dataset/cat/{PART}": b"a.j"}

    def test_recover_missing_class_folder_is_no_error(self, dataset: Dataset, journal: Journal) -> None:
        """Everything is in the inbox, so nothing happened."""
        crash = Crash(dataset, journal)
        (dataset.root / "Dataset/cat").rmdir()
        assert crash.recover().progress is MoveProgress.FAILED

    def test_recover_removed_source_folder_is_no_error(self, dataset: Dataset, journal: Journal) -> None:
        """The image stands in its class: that is all there is to it."""
        crash = Crash(dataset, journal)
        dataset.put("Images/sub/b.jpg")
        crash.move = replace(crash.move, source="Images/sub")
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        (dataset.root / "Images/sub/b.jpg").unlink()
        (dataset.root / "Images/sub").rmdir()
        assert crash.recover().progress is MoveProgress.DONE

    def test_recover_missing_disk_keeps_moves_open(self, dataset: Dataset, journal: Journal) -> None:
        """Neither end can be told from here; once it is back, it is."""
        crash = Crash(dataset, journal)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        os.rename(dataset.root / "Dataset", dataset.folder / "unplugged")
        assert crash.recover().progress is MoveProgress.INTENDED
        os.rename(dataset.folder / "unplugged", dataset.root / "Dataset")
        (ended,) = Mover(dataset.root, journal).recover()
        assert ended.progress is MoveProgress.DONE

    def test_recover_missing_dataset_keeps_moves_open(self, dataset: Dataset, journal: Journal) -> None:
        """Nothing is made in its place."""
        crash = Crash(dataset, journal)
        os.rename(dataset.root, dataset.folder / "unplugged")
        assert crash.recover().progress is MoveProgress.INTENDED
        assert not dataset.root.exists()

    def test_recover_missing_copies_and_reasons_never_overwrite(self, dataset: Dataset, journal: Journal) -> None:
        """A shared sidecar's copy finds its name taken meanwhile: it gets its own number; made already, it is kept."""
        crash = Crash(dataset, journal)
        shared = dataset.put("Images/a.xmp", "shared")
        member = MoveFile(Role.SHARED, "a.xmp", "a.xmp", stamp_of(os.stat(shared)))
        reason = MoveFile(Role.REASON, "a.jpg", "a.jpg.reason.json", Stamp(0, 0, 0, 0), body=b"{}")
        crash.move = crash.move.with_file(member).with_file(reason)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        dataset.put("Dataset/cat/a.xmp", "the user's")
        made = dataset.put("Dataset/cat/a.jpg.reason.json", "{}")
        inode = os.stat(made).st_ino
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {
            "Images/a.xmp": b"shared",
            "Dataset/cat/a.jpg": b"a.jpg",
            "Dataset/cat/a.xmp": b"the user's",
            "Dataset/cat/a (2).xmp": b"shared",
        }
        assert os.stat(made).st_ino == inode

    def test_recover_changed_shared_sidecar_is_left_out(self, dataset: Dataset, journal: Journal) -> None:
        """It is no longer the one that belonged to this image."""
        crash = Crash(dataset, journal)
        shared = dataset.put("Images/a.xmp", "shared")
        member = MoveFile(Role.SHARED, "a.xmp", "a.xmp", stamp_of(os.stat(shared)))
        crash.move = crash.move.with_file(member)
        os.rename(dataset.root / "Images/a.jpg", dataset.root / "Dataset/cat/a.jpg")
        dataset.put("Images/a.xmp", "changed")
        dataset.put(f"Dataset/cat/.sortd-{TOKEN}.1.part", "sha")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Images/a.xmp": b"changed", "Dataset/cat/a.jpg": b"a.jpg"}


class TestPublishing:
    """Whole copies, known by inode and hash."""

    def test_recover_unpublished_copy_with_existing_source_is_removed(self, dataset: Dataset, journal: Journal) -> None:
        """An equal file of the user's under the wanted name is none of ours, and is not touched."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied(PART)
        theirs = dataset.put("Dataset/cat/a.jpg", "a.jpg")
        inode = os.stat(theirs).st_ino
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"a.jpg", "Dataset/cat/a.jpg": b"a.jpg"}
        assert os.stat(theirs).st_ino == inode

    def test_recover_published_copy_is_completed(self, dataset: Dataset, journal: Journal) -> None:
        """Whatever name it got."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied("a (3).jpg")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a (3).jpg": b"a.jpg"}
        assert crash.told == ["Dataset/cat/a (3).jpg"]

    def test_recover_published_copy_changed_by_the_user_is_kept(self, dataset: Dataset, journal: Journal) -> None:
        """It is no copy of the source any more: both are kept."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied("a.jpg", content="A.JPG")
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"a.jpg", "Dataset/cat/a.jpg": b"A.JPG"}

    def test_recover_only_copy_is_published(self, dataset: Dataset, journal: Journal) -> None:
        """The source is gone: the part is published and told."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied(PART)
        dataset.put("Dataset/cat/a.jpg", "another")
        (dataset.root / "Images/a.jpg").unlink()
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"another", "Dataset/cat/a (2).jpg": b"a.jpg"}

    def test_recover_incomplete_copy_is_never_published(self, dataset: Dataset, journal: Journal) -> None:
        """Its hash does not fit and its source is gone: it is kept as it is, and said."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied(PART, content="a.jp\0")
        (dataset.root / "Images/a.jpg").unlink()
        ended = crash.recover()
        assert ended.progress is MoveProgress.FAILED
        assert "its copy is gone" in ended.message
        assert dataset.tree() == {f"Dataset/cat/{PART}": b"a.jp\0"}

    def test_recover_partly_published_group_with_all_sources_is_removed(
        self, dataset: Dataset, journal: Journal
    ) -> None:
        """All of them, or none."""
        crash = Crash(dataset, journal, "a.jpg", "a.xmp", progress=MoveProgress.PUBLISHING)
        crash.copied("a.jpg")
        crash.copied(f".sortd-{TOKEN}.1.part", 1)
        assert crash.recover().progress is MoveProgress.FAILED
        assert dataset.tree() == {"Images/a.jpg": b"a.jpg", "Images/a.xmp": b"a.xmp"}

    def test_recover_partly_published_group_without_a_source_is_completed(
        self, dataset: Dataset, journal: Journal
    ) -> None:
        """The companion's only copy must not be removed, so the whole group is published under one number."""
        crash = Crash(dataset, journal, "a.jpg", "a.xmp", progress=MoveProgress.PUBLISHING)
        crash.copied("a (2).jpg")
        crash.copied(f".sortd-{TOKEN}.1.part", 1)
        (dataset.root / "Images/a.xmp").unlink()
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a (2).jpg": b"a.jpg", "Dataset/cat/a (2).xmp": b"a.xmp"}

    @pytest.mark.parametrize("content", ["", "somebody else's"])
    def test_recover_empty_placeholder_is_removed(self, dataset: Dataset, journal: Journal, content: str) -> None:
        """Under the name that the journal holds, and only if it has no bytes to lose."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied(PART)
        crash.named("a.jpg")
        dataset.put("Dataset/cat/a.jpg", content)
        assert crash.recover().progress is MoveProgress.FAILED
        expected = {"Images/a.jpg": b"a.jpg"} | ({"Dataset/cat/a.jpg": content.encode()} if content else {})
        assert dataset.tree() == expected

    def test_recover_changed_inode_numbers_are_replaced_by_content(self, dataset: Dataset, journal: Journal) -> None:
        """On such a file system the journal holds the name."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHING)
        crash.copied("a.jpg")
        member = replace(crash.move.image, copy_inode=1, final="a.jpg")
        crash.move = replace(crash.move, files=(member,))
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg"}


class TestPublished:
    """Copies that stand durably; the sources are to go."""

    @pytest.fixture
    def crash(self, dataset: Dataset, journal: Journal) -> Crash:
        """A copy that stands in its class."""
        crash = Crash(dataset, journal, progress=MoveProgress.PUBLISHED)
        crash.copied("a.jpg")
        crash.named("a.jpg")
        return crash

    def test_recover_source_of_published_copy_is_removed(self, crash: Crash, dataset: Dataset) -> None:
        """Under its own name or the one that sortd took it by."""
        os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg"}

    @pytest.mark.parametrize("is_taken", [False, True])
    def test_recover_changed_source_is_kept(self, crash: Crash, dataset: Dataset, *, is_taken: bool) -> None:
        """What was written to it after the copy was made is not lost."""
        name = TAKEN if is_taken else "a.jpg"
        if is_taken:
            os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        dataset.put(f"Images/{name}", "more")
        ended = crash.recover()
        assert ended.progress is MoveProgress.DONE
        assert "also kept in Images" in ended.message
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg", "Images/a.jpg": b"more"}

    @pytest.mark.parametrize("is_taken", [False, True])
    @pytest.mark.parametrize("other", [None, "A.JPG", "another length"])
    def test_recover_source_without_copy_is_kept(
        self, crash: Crash, dataset: Dataset, *, is_taken: bool, other: str | None
    ) -> None:
        """Removed or replaced by the user: the source is the only one left."""
        if is_taken:
            os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        (dataset.root / "Dataset/cat/a.jpg").unlink()
        if other is not None:
            dataset.put("Dataset/cat/b", other)  # takes the inode number that was freed, so that ours has another
            dataset.put("Dataset/cat/a.jpg", other)
            (dataset.root / "Dataset/cat/b").unlink()
        crash.recover()
        assert dataset.tree()["Images/a.jpg"] == b"a.jpg"

    @pytest.mark.parametrize("whose", ["Images/a.jpg", "Dataset/cat/a.jpg"])
    def test_recover_source_to_keep_is_never_hidden(
        self, crash: Crash, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, whose: str
    ) -> None:
        """A changed source, or one whose copy changed, keeps its name all the time."""

        def taken(*names: object) -> None:
            raise AssertionError(names)

        dataset.put(whose, "changed by now")
        monkeypatch.setattr("sortd.moving.copy.hide", taken)
        assert crash.recover().progress is MoveProgress.DONE
        assert len(dataset.tree()) == 2

    @pytest.mark.parametrize("is_gone", [False, True])
    def test_recover_copies_are_removed_only_if_all_sources_exist(
        self, dataset: Dataset, journal: Journal, monkeypatch: pytest.MonkeyPatch, *, is_gone: bool
    ) -> None:
        """A companion that may not be removed: without the image's own file, the image's copy is the only one."""

        def refuse(_: int, name: str, *__: object) -> None:
            if name == "a.xmp":
                raise PermissionError(1, "Operation not permitted")

        crash = Crash(dataset, journal, "a.jpg", "a.xmp", progress=MoveProgress.PUBLISHED)
        crash.copied("a.jpg")
        crash.copied("a.xmp", 1)
        crash.named("a.jpg", "a.xmp")
        if is_gone:
            (dataset.root / "Images/a.jpg").unlink()
        monkeypatch.setattr("sortd.moving.copy.hide", refuse)
        ended = crash.recover()
        if is_gone:
            assert ended.progress is MoveProgress.PUBLISHED
            assert dataset.tree()["Dataset/cat/a.jpg"] == b"a.jpg"
        else:
            assert ended.progress is MoveProgress.FAILED
            assert dataset.tree() == {"Images/a.jpg": b"a.jpg", "Images/a.xmp": b"a.xmp"}

    def test_recover_hidden_source_with_a_writer_gets_its_name_back(self, crash: Crash, dataset: Dataset) -> None:
        """A writer that had it open all along goes on writing into a file that stays."""
        os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        with (dataset.root / f"Images/{TAKEN}").open("r+b") as file:
            crash.recover()
            file.write(b"A")
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg", "Images/a.jpg": b"A.jpg"}

    def test_recover_new_file_with_the_old_name_is_not_changed(self, crash: Crash, dataset: Dataset) -> None:
        """The source was taken; the user has put another image there."""
        os.rename(dataset.root / "Images/a.jpg", dataset.root / f"Images/{TAKEN}")
        dataset.put("Images/a.jpg", "new")
        assert crash.recover().progress is MoveProgress.DONE
        assert dataset.tree() == {"Dataset/cat/a.jpg": b"a.jpg", "Images/a.jpg": b"new"}
