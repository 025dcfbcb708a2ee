"""A dataset for programs: its history, filing and undo, with and without a running daemon."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import sortd
from sortd.api import dataset as module
from sortd.api.dataset import DatasetHandle
from sortd.daemon.dataset_lock import lock_dataset
from sortd.encoder.clip import Encoder
from sortd.encoder.finetuned import FinetunedFacts, Promotion, write_promotion
from sortd.errors import DataError, LayoutError, UnreadableError
from sortd.layout import Layout
from tests.command_line import write_config
from tests.daemon_process import check_journals, picture, running, teach
from tests.fake_encoder import FakeEncoder


def fake_model(*_: object) -> Encoder:
    """Return the fake encoder, whatever model is configured."""
    return FakeEncoder()


@pytest.fixture
def handle(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHandle]:
    """A dataset of three colours with its model replaced by the fake encoder, as in the daemons of the tests."""
    monkeypatch.setattr(module, "load_with_backend", fake_model)
    teach(colours)
    Layout(colours).make()
    config = write_config(tmp_path, settle_seconds=0.1)
    with sortd.open_dataset(colours, config=config) as opened:
        yield opened
    check_journals(tmp_path, keeps_files=True, may_be_open=False)


def test_image_is_filed_and_taken_back_without_a_daemon(handle: DatasetHandle) -> None:
    """An image in Images/ goes to its class through the journal, and comes back by undo."""
    path = handle.layout.root / "Images" / "new.png"
    picture("red", 900, patches=40).save(path)
    move = handle.file(path)
    assert (move["outcome"], move["label"]) == ("filed", "red")
    assert Path(move["to"]).is_file()
    assert handle.history(limit=1) == [move]
    (undone,) = handle.undo(moves=move)
    assert undone["restored"] == str(path)
    assert path.is_file()


def test_doubtful_image_goes_to_review_and_then_to_the_named_class(handle: DatasetHandle) -> None:
    """What is not decided goes to Review/; with a label it goes to that class, and is a reference from then on."""
    path = handle.layout.root / "Images" / "strange.png"
    picture("red", 1).resize((64, 64)).point(lambda value: 255 - value // 8).save(path)
    move = handle.file(path)
    assert move["outcome"] == "sent_to_review"
    assigned = handle.file(move["to"], "blue")
    assert (assigned["outcome"], assigned["label"]) == ("assigned", "blue")
    assert [one["outcome"] for one in handle.history(path=assigned["to"])] == ["assigned"]


def test_running_daemon_is_asked(handle: DatasetHandle, tmp_path: Path) -> None:
    """With a daemon the image is filed by it, and undo and assignment are its work too."""
    with running(tmp_path / "config.yaml") as daemon:
        path = handle.layout.root / "Images" / "new.png"
        picture("blue", 901, patches=40).save(path)
        move = handle.file(path)
        assert (move["outcome"], move["label"]) == ("filed", "blue")
        assert daemon.wait_for("image.filed")["path"] == str(path)
        assigned = handle.file(move["to"], "red")
        assert daemon.wait_for("image.assigned")["destination"] == assigned["to"]
        (undone,) = handle.undo(assigned["run"])[:1]
        assert undone["restored"] is not None


def test_broken_image_stays(handle: DatasetHandle) -> None:
    """A file that cannot be decoded is named and stays where it is."""
    path = handle.layout.root / "Images" / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(UnreadableError, match=r"broken\.jpg"):
        handle.file(path)
    assert path.is_file()


def test_what_cannot_be_filed_is_refused(handle: DatasetHandle, tmp_path: Path) -> None:
    """Missing files, files elsewhere and references raise an error that says why; nothing moves."""
    outside = tmp_path / "outside.png"
    picture("red", 1).save(outside)
    reference = handle.layout.root / "Clases" / "red" / "0.png"
    for path, message in (
        (outside, "outside of the dataset"),
        (reference, "is not in"),
        (handle.layout.root / "Images" / "none.png", "not a file"),
        (handle.layout.root / "Images" / ".." / ".." / ".." / "outside.png", "outside of the dataset"),
    ):
        with pytest.raises(DataError, match=message):
            handle.file(path)
    with pytest.raises(DataError, match="was not moved"):
        handle.file(reference, "blue")
    assert outside.is_file()
    assert reference.is_file()
    assert handle.history() == []


def test_undo_of_nothing_is_refused(handle: DatasetHandle) -> None:
    """An unknown run, and a call that names nothing, raise."""
    with pytest.raises(DataError, match="no such move"):
        handle.undo("unknown")
    with pytest.raises(DataError, match="a run, or one move"):
        handle.undo()


def test_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    """The message says what is missing."""
    with pytest.raises(LayoutError, match="no Clases/"):
        sortd.open_dataset(tmp_path)


def test_person_given_class_counts_also_without_a_daemon(handle: DatasetHandle) -> None:
    """An image that was assigned to a class is one of the references with which later images are decided."""
    path = handle.layout.root / "Images" / "new.png"
    picture("red", 900, patches=40).save(path)
    assigned = handle.file(handle.file(path)["to"], "blue")
    handle.close()
    assert assigned["to"] in handle.classifier().prototypes.sources


@pytest.mark.parametrize("with_daemon", [False, True])
def test_file_that_sortd_leaves_alone_is_refused_at_once(
    handle: DatasetHandle, tmp_path: Path, *, with_daemon: bool
) -> None:
    """A held image, a hidden one and an unfinished download stay in Images/, with and without a daemon."""
    held = handle.layout.root / "Images" / "held.png"
    hidden, unfinished = held.with_name(".hidden.png"), held.with_name("new.png")
    for number, path in enumerate((held, hidden, unfinished)):
        picture("red", 900 + number, patches=40).save(path)
    unfinished.with_name("new.png.aria2").touch()
    handle.undo(moves=handle.file(held))
    with running(tmp_path / "config.yaml") if with_daemon else nullcontext():
        for path in (held, hidden, unfinished):
            with pytest.raises(DataError, match="stays in Images/"):
                handle.file(path)
            assert path.is_file()


def test_former_move_of_a_name_is_not_taken_for_the_new_one(
    handle: DatasetHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the daemon has moved the second image of a name but not recorded it yet, the first move is no answer."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    path = handle.layout.root / "Images" / "new.png"
    picture("red", 900, patches=40).save(path)
    first = handle.file(path)
    with pytest.raises(DataError, match="is gone"):
        handle._await(str(path), [first["id"]])


def test_dataset_that_the_guard_holds_is_left_alone(handle: DatasetHandle) -> None:
    """While the guard holds a dataset, nothing is decided without a daemon either."""
    path = handle.layout.root / "Images" / "new.png"
    picture("red", 900, patches=40).save(path)
    with lock_dataset(handle.layout, handle.config.state_dir) as opened:
        opened.journal.note_guard(replace(opened.journal.history.guard(), reason="too many were wrong"))
    with pytest.raises(DataError, match="is held, because too many were wrong"):
        handle.file(path)
    assert path.is_file()


def test_fine_tuned_model_is_not_passed_over(handle: DatasetHandle, vit: FinetunedFacts) -> None:
    """Where a fine-tuned model decides, the prototypes do not decide in its place."""
    path = handle.layout.root / "Images" / "new.png"
    picture("red", 900, patches=40).save(path)
    folder = handle.layout.state_folder(handle.config.state_dir)
    folder.mkdir(parents=True)
    write_promotion(folder, Promotion(vit.folder, vit.model_id, vit.verdict, 0.0))
    with pytest.raises(DataError, match="a fine-tuned model decides"):
        handle.file(path)
    assert path.is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_closed_state_is_an_error_of_the_library(public_folder: Path) -> None:
    """A user who may not enter the state directory gets a JournalError, not a bare PermissionError."""
    state = public_folder / "state"
    state.mkdir(mode=0o700)
    program = (
        "import sortd\n"
        f"handle = sortd.open_dataset({str(public_folder / 'Own')!r}, config={str(public_folder / 'config.yaml')!r})\n"
        "try:\n    handle.history()\nexcept sortd.SortdError as error:\n    print(type(error).__name__)\n"
    )
    (public_folder / "Own/Clases").mkdir(parents=True)
    write_config(public_folder)
    under = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    done = subprocess.run([*under, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "JournalError\n"
