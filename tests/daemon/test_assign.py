"""Assigning images in Review/ to a class: what is refused, what is made, and which images are references then."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sortd.daemon.assign import assign_images, forget_made_classes, image_facts
from sortd.daemon.dataset_lock import OpenDataset, open_dataset
from sortd.daemon.learnt import labelled_images
from sortd.errors import DataError
from sortd.layout import Layout
from sortd.store.records import Selection
from sortd.watch.scan import stamp
from tests.daemon_process import make_dataset, picture, tree
from tests.filed_images import file_images


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenDataset]:
    """An open dataset with three images in Review/."""
    layout = Layout(make_dataset(tmp_path / "Data"))
    layout.make()
    (layout.root / "Review" / "red").mkdir()
    for number in range(3):
        picture("blue", number).save(layout.root / "Review" / "red" / f"{number}.png")
    with open_dataset(layout, tmp_path / "state") as dataset:
        yield dataset


def waiting(opened: OpenDataset) -> list[dict[str, Any]]:
    """Return the images in Review/ as a request has them."""
    paths = sorted((opened.layout.root / "Review").rglob("*.png"))
    return [image_facts(str(path), mark) for path in paths if (mark := stamp(str(path))) is not None]


def assign(opened: OpenDataset, label: str, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Assign images, and return the result of each."""
    steps = assign_images(opened.layout, opened.journal, opened.mover.move_all, label, images)
    return [one for results, _ in steps for one in results]


def references(opened: OpenDataset, *, with_corrections: bool = False) -> list[tuple[str, str]]:
    """Return class and path, relative to the dataset, of the images that are references where they lie."""
    found = labelled_images(opened.layout, opened.journal.history, with_corrections=with_corrections)
    return [(label, os.path.relpath(path, opened.layout.root)) for label, path in found]


def test_assign_images_become_references_of_the_class(opened: OpenDataset) -> None:
    """They are filed into a class that is there; the journal has the class, and that a person named it."""
    done = assign(opened, "blue", waiting(opened)[:2])
    assert [os.path.relpath(one["destination"], opened.layout.root) for one in done] == [
        "Dataset/blue/0.png",
        "Dataset/blue/1.png",
    ]
    assert references(opened) == [("blue", "Dataset/blue/0.png"), ("blue", "Dataset/blue/1.png")]
    (newest, _) = opened.journal.history.moves(Selection())
    assert (newest.move_reason.outcome, newest.move_reason.label) == ("assigned", "blue")


def test_assign_undone_or_corrected_image_is_no_reference(opened: OpenDataset) -> None:
    """What the person takes back does not count, and what they move to another class counts as a correction."""
    assign(opened, "blue", waiting(opened))
    third, second, first = opened.journal.history.moves(Selection())
    opened.journal.record_corrections([(second, "green", "Dataset/green/1.png")])
    undone = opened.mover.undo([first])
    assert forget_made_classes(opened.layout, opened.journal, undone)
    assert references(opened) == [("blue", third.destination_path)]
    assert ("green", "Dataset/green/1.png") in references(opened, with_corrections=True)
    assert (opened.layout.root / "Clases" / "blue" / "0.png").exists()


def test_assign_made_class_lasts_until_its_last_image_is_undone(opened: OpenDataset) -> None:
    """Its folder is removed once, and never one that a person made in its place with something in it."""
    folder = opened.layout.root / "Clases" / "sky"
    assign(opened, "sky", waiting(opened))
    records = opened.journal.history.moves(Selection())
    forget_made_classes(opened.layout, opened.journal, opened.mover.undo(records[:2]))
    assert folder.is_dir()
    forget_made_classes(opened.layout, opened.journal, opened.mover.undo(records[2:]))
    assert not folder.exists()
    assert len(waiting(opened)) == 3


def test_assign_made_class_stays_while_a_correction_uses_it(opened: OpenDataset) -> None:
    """A person may have moved other images into it, which would be references of nothing."""
    assign(opened, "sky", waiting(opened)[:2])
    second, first = opened.journal.history.moves(Selection())
    assign(opened, "blue", waiting(opened))
    (third, *_) = opened.journal.history.moves(Selection())
    opened.journal.record_corrections([(third, "sky", "Dataset/sky/2.png")])
    forget_made_classes(opened.layout, opened.journal, opened.mover.undo([first, second]))
    assert (opened.layout.root / "Clases" / "sky").is_dir()


def test_assign_image_named_twice_is_moved_once(opened: OpenDataset) -> None:
    """There is one result and one record of it."""
    (image, *_) = waiting(opened)
    assert len(assign(opened, "sky", [image, dict(image)])) == 1
    assert len(opened.journal.history.moves(Selection())) == 1


def test_assign_image_replaced_by_a_filed_one_is_no_reference(opened: OpenDataset, tmp_path: Path) -> None:
    """A person removes it, and sortd files another image under its name: it must not learn from itself."""
    assign(opened, "blue", waiting(opened))
    os.unlink(opened.layout.root / "Dataset" / "blue" / "0.png")
    file_images(opened.layout.root, tmp_path / "state", {"0.png": "blue"})
    assert references(opened) == [("blue", "Dataset/blue/1.png"), ("blue", "Dataset/blue/2.png")]


def test_assign_changed_or_missing_image_is_refused_and_others_move(opened: OpenDataset) -> None:
    """Each image has a result of its own."""
    images = waiting(opened)
    picture("red", 9).save(images[0]["path"])
    os.unlink(images[1]["path"])
    results = {os.path.basename(one["path"]): one for one in assign(opened, "sky", images)}
    assert "changed or replaced" in results["0.png"]["message"]
    assert "gone" in results["1.png"]["message"]
    assert results["2.png"]["destination"] == str(opened.layout.root / "Dataset" / "sky" / "2.png")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_assign_class_that_is_no_folder_is_refused(opened: OpenDataset, tmp_path: Path, kind: str) -> None:
    """Nothing is moved for a class that would not be one, or through a link."""
    place = opened.layout.root / "Clases" / "sky"
    if kind == "link":
        place.symlink_to(tmp_path, target_is_directory=True)
    else:
        place.write_text("")
    before = tree(opened.layout.root / "Review")
    with pytest.raises(DataError, match="cannot be made"):
        assign(opened, "sky", waiting(opened))
    assert tree(opened.layout.root / "Review") == before


@pytest.mark.parametrize(
    "place", ["Clases/red/0.png", "Review/../Clases/red/0.png", "Review/.hidden/0.png", "Images/0.png"]
)
def test_assign_file_outside_of_review_is_refused(opened: OpenDataset, place: str) -> None:
    """No request moves a reference, or a file that sortd does not look at; no class is made for it."""
    image = {**waiting(opened)[0], "path": f"{opened.layout.root}/{place}"}
    with pytest.raises(DataError, match="not an image in Review/"):
        assign(opened, "sky", [image])
    assert not (opened.layout.root / "Clases" / "sky").exists()
