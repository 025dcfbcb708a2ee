"""Actions: images that stay in Images/ while a copy, a link or keywords say their class; undo, and what is known."""

import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sortd.companions import is_image
from sortd.events import Action, Move, MoveFailed, MoveFailure, Outcome
from sortd.files import stamp_of
from sortd.moving.fs import exchange_names
from sortd.moving.mover import Mover
from sortd.store.journal import Journal
from sortd.store.records import MoveProgress, Role, Selection
from sortd.xmp import with_class
from tests.filing_world import Dataset, done, moved, order

FILES: list[Action] = ["copy", "hardlink", "symlink"]
SIDECAR = "Images/a.jpg.xmp"
EXISTING = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4">
<dc:subject><rdf:Bag><rdf:li>holiday</rdf:li></rdf:Bag></dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>
"""


def acted(mover: Mover, path: Path, action: Action, folder: str = "Dataset/cat") -> str:
    """Carry out an action that must succeed; return where the image, its copy or its link is."""
    return moved(mover, replace(order(path, folder), action=action, decision=None, reason=""))


def labelled(path: Path, action: Action = "keywords", label: str = "cat") -> Move:
    """Return the order to give an image a class, which is in the journal."""
    return replace(order(path, f"Dataset/{label}", Outcome.ASSIGNED), action=action)


@pytest.fixture
def mover(dataset: Dataset, journal: Journal) -> Mover:
    """What moves files."""
    return Mover(dataset.root, journal)


@pytest.mark.parametrize("action", FILES)
def test_move_all_image_that_stays_has_a_file_in_its_class(
    dataset: Dataset, journal: Journal, mover: Mover, action: Action
) -> None:
    """The original is untouched, its sidecar and film go along, and the journal says the action and the version."""
    path = dataset.put("Images/2024/a.jpg")
    dataset.put("Images/2024/a.xmp", "notes")
    dataset.put("Images/2024/a.MOV", "film")
    dataset.put("Images/2024/a.png", "other image")  # shares the film, which goes with each
    before = os.stat(path)
    there = Path(acted(mover, path, action))
    after = os.stat(path)
    assert (after.st_ino, after.st_mtime_ns, path.read_bytes()) == (before.st_ino, before.st_mtime_ns, b"image")
    assert there == dataset.root / "Dataset/cat/a.jpg"
    assert {one.name: one.read_bytes() for one in there.parent.iterdir()} == {
        "a.jpg": b"image",
        "a.xmp": b"notes",
        "a.MOV": b"film",
    }
    assert there.is_symlink() == (action == "symlink")
    assert os.path.samefile(there, path) == (action != "copy")
    if action == "symlink":
        assert os.readlink(there) == "../../Images/2024/a.jpg"
    (record,) = done(journal)
    assert (record.move.action, record.move.progress) == (action, MoveProgress.DONE)
    assert record.move.image.moved_stamp is not None
    assert record.move.image.moved_stamp.is_same_version(stamp_of(os.lstat(there)))
    assert journal.history.is_filed_in_place(stamp_of(after), "Images/2024", "a.jpg")


@pytest.mark.parametrize("action", FILES)
def test_move_all_taken_name_gets_the_next_number(dataset: Dataset, mover: Mover, action: Action) -> None:
    """Nothing is overwritten: a user's file of that name stays."""
    dataset.put("Dataset/cat/a.jpg", "mine")
    path = dataset.put("Images/a.jpg")
    assert acted(mover, path, action).endswith("Dataset/cat/a (2).jpg")
    assert dataset.tree()["Dataset/cat/a.jpg"] == b"mine"


@pytest.mark.parametrize("action", FILES)
def test_undo_unchanged_file_is_removed_and_the_original_held(
    dataset: Dataset, journal: Journal, mover: Mover, action: Action
) -> None:
    """The copies or links are gone, the original is held, and the version is no longer filed in place."""
    path = dataset.put("Images/a.jpg")
    dataset.put("Images/a.xmp", "notes")
    acted(mover, path, action)
    (result,) = mover.undo(done(journal))
    assert (result.restored, result.message) == (str(path), "")
    assert dataset.tree() == {"Images/a.jpg": b"image", "Images/a.xmp": b"notes"}
    held = mover.held_version(str(path))
    assert held is not None
    assert held.is_same_version(stamp_of(os.stat(path)))
    assert not journal.history.is_filed_in_place(stamp_of(os.stat(path)), "Images", "a.jpg")


def change_copy(dataset: Dataset) -> None:
    """Edit the copy."""
    (dataset.root / "Dataset/cat/a.jpg").write_bytes(b"edited")


def change_original(dataset: Dataset) -> None:
    """Save another version of the original, as a program does: beside, then renamed over it."""
    dataset.put("Images/new", "other").rename(dataset.root / "Images/a.jpg")


def remove_original(dataset: Dataset) -> None:
    """Delete the original."""
    (dataset.root / "Images/a.jpg").unlink()


def redirect(dataset: Dataset) -> None:
    """Let the link lead elsewhere."""
    link = dataset.root / "Dataset/cat/a.jpg"
    link.unlink()
    link.symlink_to("../../Images/other.jpg")


@pytest.mark.parametrize(
    ("action", "change", "why"),
    [
        ("copy", change_copy, "changed since"),
        ("copy", change_original, "original was changed"),
        ("copy", remove_original, "original is gone"),
        ("hardlink", change_original, "original was changed"),
        ("hardlink", remove_original, "original is gone"),
        ("symlink", redirect, "changed since"),
        ("symlink", remove_original, "original is gone"),
    ],
)
def test_undo_changed_file_is_refused(
    dataset: Dataset, journal: Journal, mover: Mover, action: Action, change: Callable[[Dataset], None], why: str
) -> None:
    """What might be the last file of its content stays, and the reason is given."""
    acted(mover, dataset.put("Images/a.jpg"), action)
    change(dataset)
    before = sorted(os.listdir(dataset.root / "Dataset/cat"))
    (result,) = mover.undo(done(journal))
    assert result.restored is None
    assert why in result.message
    assert sorted(os.listdir(dataset.root / "Dataset/cat")) == before


@pytest.mark.parametrize("action", ["hardlink", "symlink"])
def test_move_all_second_version_keeps_a_link_that_shows_it(
    dataset: Dataset, journal: Journal, mover: Mover, action: Action
) -> None:
    """A later version of the same class needs no second link."""
    path = dataset.put("Images/a.jpg")
    first = acted(mover, path, action)
    with path.open("ab") as file:
        file.write(b" edited")
    assert acted(mover, path, action) == first
    assert os.listdir(dataset.root / "Dataset/cat") == ["a.jpg"]
    assert len(done(journal)) == 2


def test_move_all_hard_link_that_is_refused_says_what_to_set(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another file system nothing is made, and the message names the other actions."""
    path = dataset.put("Images/a.jpg")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("sortd.moving.links.os.link", refuse)
    (answer,) = mover.move_all([replace(order(path), action="hardlink")])
    assert isinstance(answer, MoveFailed)
    assert answer.failure is MoveFailure.DESTINATION
    assert "set `action: copy` or `action: symlink`" in answer.message
    assert dataset.tree() == {"Images/a.jpg": b"image"}
    assert journal.history.unfinished() == []


def test_move_all_copy_is_refused_if_the_content_is_another(dataset: Dataset, mover: Mover) -> None:
    """The copy is of the bytes that were decided."""
    path = dataset.put("Images/a.jpg")
    (answer,) = mover.move_all([replace(order(path, content="0" * 64), action="copy")])
    assert isinstance(answer, MoveFailed)
    assert answer.failure is MoveFailure.CHANGED
    assert dataset.tree() == {"Images/a.jpg": b"image"}


def test_is_filed_in_place_renamed_original_is_known_by_copies_only(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """After a rename a symbolic link leads nowhere, so the image needs another; a copy and a hard link remain."""
    known = {}
    for action in FILES:
        path = dataset.put(f"Images/{action}.jpg", action)
        acted(mover, path, action)
        known[action] = journal.history.is_filed_in_place(stamp_of(os.stat(path)), "Images", "renamed.jpg")
    assert known == {"copy": True, "hardlink": True, "symlink": False}


# ---------------------------------------------------------------- keywords


def keywords(path: Path) -> list[str]:
    """Return what exiftool reads: another program than the one that wrote it."""
    tags = ["-XMP-dc:Subject", "-XMP-lr:HierarchicalSubject"]
    run = subprocess.run(["exiftool", "-s3", "-sep", ",", *tags, str(path)], capture_output=True, text=True, check=True)
    return run.stdout.split("\n")[:-1]


@pytest.fixture
def reader() -> None:
    """Skip where exiftool is missing."""
    try:
        subprocess.run(["exiftool", "-ver"], capture_output=True, check=True)
    except OSError:
        pytest.skip("exiftool is not installed")


@pytest.mark.usefixtures("reader")
def test_move_all_keywords_without_a_sidecar_write_one(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Another program reads the class; the image is untouched; the undo removes the sidecar and holds the image."""
    path = dataset.put("Images/a.jpg")
    before = os.stat(path)
    assert moved(mover, labelled(path)) == str(path)
    assert os.stat(path) == before or os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert keywords(dataset.root / SIDECAR) == ["cat", "sortd|cat"]
    (record,) = done(journal)
    assert (record.destination_path, record.move.action, record.move_reason.label) == (
        "Images/a.jpg",
        "keywords",
        "cat",
    )
    (result,) = mover.undo([record])
    assert (result.restored, result.message) == (str(path), "")
    assert dataset.tree() == {"Images/a.jpg": b"image"}
    assert mover.held_version(str(path)) is not None


@pytest.mark.parametrize("name", [SIDECAR, "Images/a.jpg.XMP", "Images/a.xmp"])
@pytest.mark.usefixtures("reader")
def test_move_all_keywords_existing_sidecar_is_extended(
    dataset: Dataset, journal: Journal, mover: Mover, name: str
) -> None:
    """What another program wrote stays, mode included; the undo brings the former bytes back."""
    sidecar = dataset.put(name, EXISTING)
    sidecar.chmod(0o640)
    moved(mover, labelled(dataset.put("Images/a.jpg")))
    assert sorted(dataset.tree()) == sorted(["Images/a.jpg", name])
    assert keywords(sidecar) == ["holiday,cat", "sortd|cat"]
    assert b'xmp:Rating="4"' in sidecar.read_bytes()
    assert os.stat(sidecar).st_mode & 0o777 == 0o640
    mover.undo(done(journal))
    assert sidecar.read_bytes() == EXISTING


def test_move_all_written_keywords_leave_only_the_former_bytes_in_the_journal(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """The record is never pruned, and a sidecar may have megabytes."""
    dataset.put(SIDECAR, EXISTING)
    acted(mover, dataset.put("Images/a.jpg"), "keywords")
    (record,) = done(journal)
    assert {file.role: file.body for file in record.move.files[1:]} == {Role.SIDECAR: b"", Role.FORMER: EXISTING}


@pytest.mark.usefixtures("reader")
def test_undo_keywords_of_a_sidecar_that_changed_keeps_the_change(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """Only what sortd added is taken out: a keyword and a rating that came later stay."""
    sidecar = dataset.put(SIDECAR, EXISTING)
    moved(mover, labelled(dataset.put("Images/a.jpg")))
    later = with_class(sidecar.read_bytes().replace(b'"4"', b'"5"'), "beach")
    assert later is not None
    sidecar.write_bytes(later)
    (result,) = mover.undo(done(journal))
    assert result.restored is not None
    assert keywords(sidecar) == ["holiday,beach", "sortd|beach"]
    assert b'xmp:Rating="5"' in sidecar.read_bytes()


def test_undo_keywords_that_were_there_before_stay(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """A class that the sidecar had already is not sortd's to take out, and nothing was written."""
    before = with_class(EXISTING, "cat")
    assert before is not None
    sidecar = dataset.put(SIDECAR, before)
    inode = os.stat(sidecar).st_ino
    moved(mover, labelled(dataset.put("Images/a.jpg")))
    mover.undo(done(journal))
    assert (sidecar.read_bytes(), os.stat(sidecar).st_ino) == (before, inode)


def test_move_all_keywords_shared_stem_sidecar_is_left(dataset: Dataset, mover: Mover) -> None:
    """A sidecar that two images share by its stem is no place for the class of one."""
    dataset.put("Images/a.xmp", EXISTING)
    dataset.put("Images/a.png")
    moved(mover, labelled(dataset.put("Images/a.jpg")))
    assert dataset.tree()["Images/a.xmp"] == EXISTING
    assert SIDECAR in dataset.tree()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not XML", "not well-formed"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]>' + EXISTING, "document type"),
        (b"<a/>", "no rdf:RDF"),
    ],
)
def test_move_all_keywords_hostile_sidecar_is_left(
    dataset: Dataset, journal: Journal, mover: Mover, content: bytes, why: str
) -> None:
    """What is not XMP is not changed; the image is tried again when it may have been repaired."""
    path = dataset.put("Images/a.jpg")
    dataset.put(SIDECAR, content)
    (answer,) = mover.move_all([labelled(path)])
    assert isinstance(answer, MoveFailed)
    assert (answer.failure, why in answer.message) == (MoveFailure.BUSY, True), answer
    assert dataset.tree() == {"Images/a.jpg": b"image", SIDECAR: content}
    assert journal.history.unfinished() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("owner", "mode", "why"),
    [(65534, 0o444, "read-only"), (1000, 0o644, "read-only"), (1000, 0o666, "owner")],
)
def test_move_all_keywords_sidecar_of_others_is_left(public_folder: Path, owner: int, mode: int, why: str) -> None:
    """A new file would belong to sortd, so that its owner could not write it any more."""
    os.chown(public_folder, 65534, 65534)
    dataset = Dataset.below(public_folder)
    path, sidecar = dataset.put("Images/a.jpg"), dataset.put(SIDECAR, EXISTING)
    for one in (dataset.root, path.parent, path):
        os.chown(one, 65534, 65534)
    os.chown(sidecar, owner, owner)
    sidecar.chmod(mode)
    os.seteuid(65534)
    try:
        with dataset.journal() as journal:
            (answer,) = Mover(dataset.root, journal).move_all([labelled(path)])
    finally:
        os.seteuid(0)
    assert isinstance(answer, MoveFailed)
    assert (answer.failure, why in answer.message) == (MoveFailure.BUSY, True), answer
    assert (sidecar.stat().st_uid, sidecar.stat().st_mode & 0o777) == (owner, mode)
    assert dataset.tree() == {"Images/a.jpg": b"image", SIDECAR: EXISTING}


def test_move_all_keywords_sidecar_replaced_meanwhile_is_brought_back(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that another program saved between the reading and the exchange is not lost."""
    sidecar = dataset.put(SIDECAR, EXISTING)
    path = dataset.put("Images/a.jpg")
    saved: list[Path] = []

    def save_first(folder: int, one: str, other: str) -> None:
        if not saved:
            saved.append(dataset.put("Images/new", b"saved by another program"))
            saved[0].rename(sidecar)
        exchange_names(folder, one, other)

    monkeypatch.setattr("sortd.moving.keywords.exchange_names", save_first)
    (answer,) = mover.move_all([labelled(path)])
    assert isinstance(answer, MoveFailed)
    assert answer.failure is MoveFailure.CHANGED
    assert dataset.tree() == {"Images/a.jpg": b"image", SIDECAR: b"saved by another program"}
    assert journal.history.unfinished() == []


def test_filed_in_place_lists_links_and_keywords(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """Images that are only linked or have keywords are found by the journal; undone ones are not."""
    for name, action in (("a", "copy"), ("b", "symlink"), ("c", "keywords"), ("d", "keywords")):
        moved(mover, labelled(dataset.put(f"Images/{name}.jpg", name), action=action))  # type: ignore[arg-type]  # a loop
    mover.undo(journal.history.moves(Selection(limit=1)))
    assert [record.source_path for record in journal.history.filed_in_place()] == ["Images/b.jpg", "Images/c.jpg"]
    assert all(is_image(record.move.image.name) for record in done(journal))
    assert {record.move.image.role for record in done(journal)} >= {Role.COPY, Role.SYMLINK, Role.KEYWORDS}


# ---------------------------------------------------------------- crashes


class CrashError(BaseException):
    """Ends a move in the middle, as kill -9 does: no handler of errors runs."""


def crash(*_: object, **__: object) -> None:
    """Crash."""
    raise CrashError


def crashed_at(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, place: str, act: Callable[[Mover], object]) -> None:
    """Let an act crash where it calls the function at this place."""
    with dataset.journal() as journal, monkeypatch.context() as context:
        context.setattr(place, crash)
        mover = Mover(dataset.root, journal)
        with pytest.raises(CrashError):
            act(mover)


def recovered(dataset: Dataset) -> list[MoveProgress]:
    """Start again; return how the open moves ended."""
    with dataset.journal() as journal:
        ended = [move.progress for move in Mover(dataset.root, journal).recover()]
        assert journal.history.unfinished() == []
    return ended


@pytest.mark.parametrize("action", ["hardlink", "symlink"])
def test_recover_link_that_was_not_published_is_removed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """Also beside a user's file under the name that the journal has."""
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, "sortd.moving.links.publish_all", lambda mover: acted(mover, path, action))
    dataset.put("Dataset/cat/a.jpg", "mine")
    assert recovered(dataset) == [MoveProgress.FAILED]
    assert dataset.tree() == {"Images/a.jpg": b"image", "Dataset/cat/a.jpg": b"mine"}


@pytest.mark.parametrize("action", ["hardlink", "symlink"])
def test_recover_link_that_was_published_is_completed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """The hidden name is gone, so the final one is sortd's: a second link is never made."""
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, "sortd.moving.links._ended", lambda mover: acted(mover, path, action))
    assert recovered(dataset) == [MoveProgress.DONE]
    assert sorted(dataset.tree()) == ["Dataset/cat/a.jpg", "Images/a.jpg"]
    with dataset.journal() as journal:
        assert journal.history.is_filed_in_place(stamp_of(os.stat(path)), "Images", "a.jpg")


@pytest.mark.parametrize("action", ["hardlink", "symlink"])
def test_recover_file_that_replaced_the_link_is_not_taken_for_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """The name in the journal is not enough: the file must be the link, else the image has none and gets another."""
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, "sortd.moving.links._ended", lambda mover: acted(mover, path, action))
    dataset.put("Dataset/cat/new", "mine").rename(dataset.root / "Dataset/cat/a.jpg")
    assert recovered(dataset) == [MoveProgress.FAILED]
    assert dataset.tree() == {"Images/a.jpg": b"image", "Dataset/cat/a.jpg": b"mine"}


@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("hardlink", "sortd.moving.links.publish_all"),
        ("copy", "sortd.moving.copy.publish_all"),
    ],
)
def test_recover_last_file_of_a_removed_original_is_kept(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, action: Action, place: str
) -> None:
    """If somebody removes the original meanwhile, the hidden file may be the last one: it gets a name."""
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, place, lambda mover: acted(mover, path, action))
    path.unlink()
    assert recovered(dataset) == [MoveProgress.DONE]
    assert dataset.tree() == {"Dataset/cat/a.jpg": b"image"}


def undo_newest(mover: Mover) -> None:
    """Undo the newest move."""
    mover.undo(mover._journal.history.moves(Selection(limit=1)))


def test_recover_undo_of_a_copy_looks_again(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An original that changed while the copy was hidden: the copy gets its name back."""
    path = dataset.put("Images/a.jpg")
    acted(mover, path, "copy")
    journal.close()
    crashed_at(dataset, monkeypatch, "sortd.moving.removal.os.unlink", undo_newest)
    path.write_bytes(b"other")
    assert recovered(dataset) == [MoveProgress.FAILED]
    assert dataset.tree() == {"Images/a.jpg": b"other", "Dataset/cat/a.jpg": b"image"}


def test_recover_undo_of_a_copy_is_completed(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nothing changed, the next start removes the hidden copy, and the undo is in the journal."""
    acted(mover, dataset.put("Images/a.jpg"), "copy")
    journal.close()
    crashed_at(dataset, monkeypatch, "sortd.moving.removal.os.unlink", undo_newest)
    assert recovered(dataset) == [MoveProgress.DONE]
    assert dataset.tree() == {"Images/a.jpg": b"image"}


def test_undo_copy_with_a_writer_is_refused(dataset: Dataset, journal: Journal, mover: Mover) -> None:
    """A program that has the copy open may still change it: it keeps its name."""
    there = Path(acted(mover, dataset.put("Images/a.jpg"), "copy"))
    with there.open("ab"):
        (result,) = mover.undo(done(journal))
    assert result.restored is None
    assert there.read_bytes() == b"image"


def test_undo_copy_with_other_bytes_and_the_same_times_is_refused(
    dataset: Dataset, journal: Journal, mover: Mover
) -> None:
    """The content decides, not the size and the time."""
    there = Path(acted(mover, dataset.put("Images/a.jpg"), "copy"))
    before = os.stat(there)
    there.write_bytes(b"other")
    os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))
    (result,) = mover.undo(done(journal))
    assert result.restored is None
    assert there.read_bytes() == b"other"


def test_recover_keywords_after_the_exchange_are_completed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former sidecar is in the journal, and its hidden file goes."""
    dataset.put(SIDECAR, EXISTING)
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, "sortd.moving.keywords._is_former", lambda mover: moved(mover, labelled(path)))
    assert recovered(dataset) == [MoveProgress.DONE]
    assert sorted(dataset.tree()) == ["Images/a.jpg", SIDECAR]
    assert b"sortd|cat" in dataset.tree()[SIDECAR]
    with dataset.journal() as journal:
        assert [file.body for file in done(journal)[0].move.files if file.role is Role.FORMER] == [EXISTING]


def test_recover_keywords_former_sidecar_that_was_written_goes_back(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that had it open wrote into the hidden file: that version gets its name back."""
    sidecar = dataset.put(SIDECAR, EXISTING)
    path = dataset.put("Images/a.jpg")
    with sidecar.open("ab") as writer:
        crashed_at(dataset, monkeypatch, "sortd.moving.keywords._is_former", lambda mover: moved(mover, labelled(path)))
        writer.write(b"<!-- later -->")
    assert recovered(dataset) == [MoveProgress.FAILED]
    assert dataset.tree() == {"Images/a.jpg": b"image", SIDECAR: EXISTING + b"<!-- later -->"}


def test_recover_keywords_former_sidecar_of_unknown_content_ends(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged journal without its hash, and no hidden file: neither is taken for the other."""
    sidecar = dataset.put(SIDECAR, EXISTING)
    path = dataset.put("Images/a.jpg")
    crashed_at(dataset, monkeypatch, "sortd.moving.keywords._is_former", lambda mover: moved(mover, labelled(path)))
    for hidden in sidecar.parent.glob(".sortd-*"):
        hidden.unlink()
    with dataset.journal() as journal:
        journal.connection.execute("UPDATE members SET content = '' WHERE role = ?", (Role.FORMER,))
    assert recovered(dataset) == [MoveProgress.DONE]
    assert sorted(dataset.tree()) == ["Images/a.jpg", SIDECAR]


def test_move_all_keywords_sidecar_with_a_writer_is_left(dataset: Dataset, mover: Mover) -> None:
    """What that program writes would go into a file without a name."""
    sidecar = dataset.put(SIDECAR, EXISTING)
    path = dataset.put("Images/a.jpg")
    with sidecar.open("ab"):
        (answer,) = mover.move_all([labelled(path)])
    assert isinstance(answer, MoveFailed)
    assert dataset.tree() == {"Images/a.jpg": b"image", SIDECAR: EXISTING}


def test_move_all_keywords_image_replaced_meanwhile_gets_none(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class is that of another version."""
    path = dataset.put("Images/a.jpg")
    move = labelled(path)

    def replaced(*arguments: object) -> None:
        dataset.put("Images/new", "other").rename(path)
        Journal.intend(journal, *arguments)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(journal, "intend", replaced)
    (answer,) = mover.move_all([move])
    assert isinstance(answer, MoveFailed)
    assert answer.failure is MoveFailure.CHANGED
    assert dataset.tree() == {"Images/a.jpg": b"other"}


@pytest.mark.parametrize("action", ["hardlink", "symlink"])
def test_move_all_link_image_replaced_meanwhile_gets_none(
    dataset: Dataset, journal: Journal, mover: Mover, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """The link would be to another version than the decided one."""
    path = dataset.put("Images/a.jpg")
    move = replace(order(path), action=action)

    def replaced(*arguments: object) -> None:
        dataset.put("Images/new", "other").rename(path)
        Journal.intend(journal, *arguments)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(journal, "intend", replaced)
    (answer,) = mover.move_all([move])
    assert isinstance(answer, MoveFailed)
    assert answer.failure is MoveFailure.CHANGED
    assert dataset.tree() == {"Images/a.jpg": b"other"}
