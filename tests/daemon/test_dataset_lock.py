"""OpenDataset: one sortd for each dataset, whatever becomes of its marker, and one journal, whatever it is called."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sortd.daemon.dataset_lock import OpenDataset, lock_dataset
from sortd.errors import AlreadyRunningError, LayoutError
from sortd.events import Move, Moved, Outcome
from sortd.files import identity_of, stamp_of
from sortd.layout import Layout
from tests.hostile_files import HOSTILE


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A dataset with its folders."""
    made = Layout(tmp_path / "Data" / "Cats")
    made.root.mkdir(parents=True)
    made.make()
    return made


def file_one(opened: OpenDataset, name: str = "a.jpg") -> None:
    """File one image."""
    path = opened.layout.root / "Images" / name
    path.write_bytes(name.encode())
    (answer,) = opened.mover.move_all([Move(str(path), stamp_of(os.stat(path)), "Dataset/cat", Outcome.FILED)])
    assert isinstance(answer, Moved)


def counts(layout: Layout, state: Path) -> dict[str, int]:
    """Return what the journal knows."""
    with lock_dataset(layout, state) as opened:
        return opened.journal.history.counts()


def test_open_dataset_second_process_is_refused(layout: Layout, tmp_path: Path) -> None:
    """A second one is told who works on it; afterwards it is free."""
    with (
        lock_dataset(layout, tmp_path / "state"),
        pytest.raises(AlreadyRunningError),
        lock_dataset(layout, tmp_path / "other"),
    ):
        pass
    with lock_dataset(layout, tmp_path / "other"):
        pass


def test_open_dataset_recreated_marker_admits_no_second_sortd(layout: Layout, tmp_path: Path) -> None:
    """Its lock is gone with it; the one in the state folder is not."""
    with lock_dataset(layout, tmp_path / "state"):
        shutil.rmtree(layout.marker)
        layout.make()
        with (
            pytest.raises(AlreadyRunningError, match="another sortd works on"),
            lock_dataset(layout, tmp_path / "state"),
        ):
            pass


def test_marker_lock_recreated_marker_is_locked_again(layout: Layout, tmp_path: Path) -> None:
    """A user may delete the marker and make it anew; no sortd with another state directory gets in after that."""
    with lock_dataset(layout, tmp_path / "state") as opened:
        assert opened.presence.lock_problem() is None
        shutil.rmtree(layout.marker)
        assert opened.presence.lock_problem() is None  # the marker tells that itself
        layout.make()
        assert opened.presence.lock_problem() is None
        with pytest.raises(AlreadyRunningError), lock_dataset(layout, tmp_path / "other"):
            pass
    with lock_dataset(layout, tmp_path / "other"):
        pass


def test_marker_lock_lock_of_another_sortd_is_a_problem(layout: Layout, tmp_path: Path) -> None:
    """It is told as long as the other one works, also when the marker is touched again, and taken back then."""
    with lock_dataset(layout, tmp_path / "state") as opened:
        shutil.rmtree(layout.marker)
        layout.make()
        with lock_dataset(layout, tmp_path / "other"):
            for _ in range(2):
                assert "another sortd works on" in (opened.presence.lock_problem() or "")
        assert opened.presence.lock_problem() is None
        with pytest.raises(AlreadyRunningError), lock_dataset(layout, tmp_path / "other"):
            pass


def test_marker_lock_replaced_file_is_locked_again(layout: Layout, tmp_path: Path) -> None:
    """Also where the marker folder is the same one; what cannot be locked is a problem until it is removed."""
    with lock_dataset(layout, tmp_path / "state") as opened:
        (layout.marker / "lock").unlink()
        (layout.marker / "lock").mkdir()
        assert "cannot be locked" in (opened.presence.lock_problem() or "")
        (layout.marker / "lock").rmdir()
        assert opened.presence.lock_problem() is None
        with pytest.raises(AlreadyRunningError), lock_dataset(layout, tmp_path / "other"):
            pass


def test_state_folder_renamed_dataset_keeps_its_journal(layout: Layout, tmp_path: Path) -> None:
    """History, holds and what was undone do not depend on the name of the folder above."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        file_one(opened)
    renamed = Layout(layout.root.with_name("Felines"))
    layout.root.rename(renamed.root)
    assert counts(renamed, state) == {"filed": 1}
    assert [path.name.rpartition("-")[0] for path in state.iterdir()] == ["Felines"]
    renamed.root.rename(layout.root)
    assert counts(layout, state) == {"filed": 1}


def test_state_folder_copied_dataset_gets_its_own_journal(layout: Layout, tmp_path: Path) -> None:
    """Though its marker names the journal of the one that it was copied from, even when that one is gone."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        file_one(opened)
    copied = Layout(layout.root.with_name("Copy"))
    shutil.copytree(layout.root, copied.root)
    assert counts(copied, state) == {}
    other = Layout(layout.root.with_name("Other"))
    shutil.copytree(layout.root, other.root)
    shutil.rmtree(layout.root)
    assert counts(other, state) == {}


@pytest.mark.parametrize("is_first", [True, False])
def test_state_folder_in_use_is_not_shared_with_a_renamed_dataset(
    layout: Layout, tmp_path: Path, *, is_first: bool
) -> None:
    """The journal is of one of them: of the renamed one, unless the new one took the folder of its name over before."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        file_one(opened)
    renamed = Layout(layout.root.with_name("Felines"))
    layout.root.rename(renamed.root)
    layout.root.mkdir()
    layout.make()
    first, second = (renamed, layout) if is_first else (layout, renamed)
    assert counts(first, state) == {"filed": 1}
    assert counts(second, state) == {}


def test_state_folder_after_a_new_device_number_is_kept(layout: Layout, tmp_path: Path) -> None:
    """Device numbers change with each mount: a renamed dataset keeps its journal, whatever device was noted."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        file_one(opened)
        owner = opened.journal.path.parent / "dataset.json"
    facts = json.loads(owner.read_text())
    owner.write_text(json.dumps({**facts, "device": layout.root.stat().st_dev + 1}))
    renamed = Layout(layout.root.with_name("Felines"))
    layout.root.rename(renamed.root)
    assert counts(renamed, state) == {"filed": 1}


def test_state_folder_of_a_dataset_with_the_same_inode_on_another_disk_is_kept(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a whole disk has the inodes of the original: it starts a journal of its own."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        file_one(opened)
    copy = Layout(layout.root.with_name("A copy"))
    layout.root.rename(copy.root)
    original = layout.marker  # seen on another disk, as a bitwise copy would be
    seen = copy.marker.stat()

    def identity(path: Path, *, follow: bool = True) -> tuple[int, int] | None:
        return (seen.st_dev + 1, seen.st_ino) if path == original else identity_of(path, follow=follow)

    monkeypatch.setattr("sortd.daemon.dataset_lock.identity_of", identity)
    assert counts(copy, state) == {}


def test_state_folder_in_another_state_directory_is_kept(layout: Layout, tmp_path: Path) -> None:
    """Whoever starts sortd with other settings takes nothing out of the folder of the first ones."""
    with lock_dataset(layout, tmp_path / "state") as opened:
        file_one(opened)
    renamed = Layout(layout.root.with_name("Felines"))
    layout.root.rename(renamed.root)
    assert counts(renamed, tmp_path / "other") == {}
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "state").iterdir()] == ["Cats"]


@pytest.mark.parametrize("word", ["", "nonsense", "/", "\udce9"])
def test_state_folder_invalid_pointer_is_replaced(layout: Layout, tmp_path: Path, word: str) -> None:
    """Anybody can write there; it leads to no folder that is not of this state directory."""
    (layout.marker / "state").write_text(word, encoding="utf-8", errors="surrogateescape")
    assert counts(layout, tmp_path / "state") == {}
    assert (layout.marker / "state").read_text().startswith(str(tmp_path / "state"))


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "{}", '{"marker": "x", "root": 3}', '{"marker": 1e999}'])
def test_state_folder_invalid_owner_file_is_replaced(layout: Layout, tmp_path: Path, text: str) -> None:
    """What says whose a state folder is may be damaged like any file; the dataset is opened all the same."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        owner = opened.journal.path.parent / "dataset.json"
    owner.write_text(text)
    renamed = Layout(layout.root.with_name("Felines"))
    layout.root.rename(renamed.root)
    assert counts(renamed, state) == {}


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "folder"])
def test_open_dataset_hostile_pointer_is_replaced(layout: Layout, tmp_path: Path, kind: str) -> None:
    """A pipe, a link or a huge file in the marker folder is neither waited for, read nor written through."""
    HOSTILE[kind](layout.marker / "state")
    assert counts(layout, tmp_path / "state") == {}
    assert (layout.marker / "state").read_text().startswith(str(tmp_path / "state"))


def test_open_dataset_folder_as_pointer_is_refused(layout: Layout, tmp_path: Path) -> None:
    """It may be somebody's; the message names it and what to do."""
    (layout.marker / "state").mkdir()
    with (
        pytest.raises(LayoutError, match=r"\.sortd/state cannot be written.*move away"),
        lock_dataset(layout, tmp_path / "state"),
    ):
        pass


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["state", "state.new", "lock"])
def test_open_dataset_link_is_not_written_through(
    layout: Layout, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """Whoever owns the marker folder cannot make sortd change a file elsewhere."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    link(precious, layout.marker / name)
    with suppress(LayoutError), lock_dataset(layout, tmp_path / "state"):
        pass
    assert precious.read_bytes() == b"precious"


def test_open_dataset_linked_marker_is_refused(layout: Layout, tmp_path: Path) -> None:
    """Nothing is made in the folder that the link names."""
    layout.marker.rmdir()
    (tmp_path / "elsewhere").mkdir()
    layout.marker.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match="symbolic link"), lock_dataset(layout, tmp_path / "state"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_open_dataset_hostile_owner_file_is_replaced(layout: Layout, tmp_path: Path) -> None:
    """A pointer may name any folder: a pipe in it is not waited for."""
    (tmp_path / "theirs").mkdir()
    os.mkfifo(tmp_path / "theirs" / "dataset.json")
    (layout.marker / "state").write_text(str(tmp_path / "theirs"))
    assert counts(layout, tmp_path / "state") == {}


def test_state_folder_that_cannot_be_created_is_an_error(layout: Layout, tmp_path: Path) -> None:
    """With its path and what to do."""
    (tmp_path / "state").write_text("a file")
    with pytest.raises(LayoutError, match=r"cannot be created.*state_dir"), lock_dataset(layout, tmp_path / "state"):
        pass


def test_open_dataset_unchanged_files_are_not_written(layout: Layout, tmp_path: Path) -> None:
    """A full disk would keep sortd from starting, and a power cut would leave half a path."""
    state = tmp_path / "state"
    with lock_dataset(layout, state) as opened:
        notes = [layout.marker / "state", opened.journal.path.parent / "dataset.json"]
    before = [os.stat(note) for note in notes]
    for note in notes:
        note.chmod(0o444)
    with lock_dataset(layout, state):
        pass
    assert [(one.st_ino, one.st_mtime_ns) for one in before] == [
        (one.st_ino, one.st_mtime_ns) for one in map(os.stat, notes)
    ]
