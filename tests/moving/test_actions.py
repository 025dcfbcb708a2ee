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
