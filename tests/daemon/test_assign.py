"""Assigning images to a class or to none: what is refused, what is made, and which are references or corrections."""

import os
from collections.abc import Iterator
from pathlib import Path
from time import time_ns
from typing import Any

import pytest

from sortd.daemon.assign import assign_images, assigned_label_problem, forget_made_classes, image_facts
from sortd.daemon.corrections import CorrectionScanner, record_places
from sortd.daemon.dataset_lock import OpenDataset, lock_dataset
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
    with lock_dataset(layout, tmp_path / "state") as dataset:
        yield dataset


def waiting(opened: OpenDataset) -> list[dict[str, Any]]:
    """Return the images in Review/ as a request has them."""
    paths = sorted((opened.layout.root / "Review").rglob("*.png"))
    return [image_facts(str(path), mark) for path in paths if (mark := stamp(str(path))) is not None]


def assign(
    opened: OpenDataset, label: str, images: list[dict[str, Any]], *, is_example: bool = False
) -> list[dict[str, Any]]:
    """Assign images, as a command does, and return the result of each."""
    carry_out = opened.mover.move_all
    steps = assign_images(opened.layout, opened.journal, carry_out, label, images, is_example=is_example)
    results = [one for some, _ in steps for one in some]
    record_places(opened.layout, opened.journal, [one["destination"] for one in results if one["destination"]])
    return results


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
    (refused,) = assign(opened, "sky", [image])
    assert refused["destination"] is None
    assert "not an image in Review/ or Dataset/" in refused["message"]
    assert not (opened.layout.root / "Clases" / "sky").exists()


def filed(opened: OpenDataset, names: dict[str, str]) -> list[Path]:
    """File images by class, as a daemon does, and return where they are; ``opened`` reads the same journal."""
    return [Path(path) for path in file_images(opened.layout.root, opened.journal.path.parents[1], names)]


def facts_of(*paths: Path) -> list[dict[str, Any]]:
    """Return images as a request has them."""
    return [image_facts(str(path), mark) for path in paths if (mark := stamp(str(path))) is not None]


def undo(opened: OpenDataset, *identifiers: int) -> None:
    """Undo moves, as a request does."""
    forget_made_classes(opened.layout, opened.journal, opened.mover.undo(opened.journal.history.finished(identifiers)))


def test_assign_results_have_the_ids_of_the_moves(opened: OpenDataset) -> None:
    """Each can be undone alone, whatever was moved since."""
    first, second, third = assign(opened, "blue", waiting(opened))
    (other,) = assign(opened, "green", facts_of(Path(third["destination"])))
    undo(opened, second["id"])
    assert [one["path"] for one in waiting(opened)] == [second["path"]]
    records = {one.id: one.destination_path for one in opened.journal.history.finished([first["id"], other["id"]])}
    assert records == {first["id"]: "Dataset/blue/0.png", other["id"]: "Dataset/green/2.png"}


class TestNoClass:
    """Images of no class."""

    def test_assign_no_class_is_no_class_and_no_reference(self, opened: OpenDataset) -> None:
        """They leave Review/ for Dataset/_none; no folder of a class is made, and the journal says what it was."""
        done = assign(opened, "_none", waiting(opened)[:2])
        assert [os.path.relpath(one["destination"], opened.layout.root) for one in done] == [
            "Dataset/_none/0.png",
            "Dataset/_none/1.png",
        ]
        assert references(opened, with_corrections=True) == []
        assert not (opened.layout.root / "Clases" / "_none").exists()
        reason = opened.journal.history.moves(Selection())[0].move_reason
        assert (reason.outcome, reason.label, reason.reason) == (
            "assigned",
            "_none",
            "assigned to no class by a person",
        )

    def test_assign_example_of_no_class_counts_until_it_is_undone(self, opened: OpenDataset) -> None:
        """It is an example where it lies, also without a folder Clases/_none."""
        first, second = assign(opened, "_none", waiting(opened)[:2], is_example=True)
        assert references(opened) == [("_none", "Dataset/_none/0.png"), ("_none", "Dataset/_none/1.png")]
        undo(opened, first["id"])
        assert references(opened) == [("_none", "Dataset/_none/1.png")]
        os.unlink(second["destination"])
        assert not (opened.layout.root / "Clases" / "_none").exists()

    def test_assign_filed_image_to_no_class_is_a_correction_and_no_reference(self, opened: OpenDataset) -> None:
        """It was filed wrongly; it is an example only if the person says so, whatever corrections count for."""
        (path,) = filed(opened, {"a.png": "red"})
        assign(opened, "_none", facts_of(path))
        assert [one[:3] for one in opened.journal.history.corrections()] == [("red", "_none", "Dataset/_none/a.png")]
        assert opened.journal.history.accuracy()["red"].corrected == 1
        assert references(opened, with_corrections=True) == []

    def test_assign_image_of_no_class_to_a_class_makes_it_a_reference(self, opened: OpenDataset) -> None:
        """The person has changed their mind: it is no example any more."""
        (done, *_) = assign(opened, "_none", waiting(opened)[:1], is_example=True)
        assign(opened, "blue", facts_of(Path(done["destination"])))
        assert references(opened) == [("blue", "Dataset/blue/0.png")]

    def test_assign_example_of_a_class_is_refused(self, opened: OpenDataset) -> None:
        """Images of a class are its references anyway."""
        with pytest.raises(DataError, match="only images of no class"):
            assign(opened, "blue", waiting(opened), is_example=True)
        assert len(waiting(opened)) == 3


class TestFiledImages:
    """Images of Dataset/, which a person corrects by request."""

    def test_assign_filed_image_is_a_correction_like_a_move_by_hand(self, opened: OpenDataset) -> None:
        """Companions go with it; accuracy counts it as wrong; it is one reference, and no image of a later audit."""
        red, other = filed(opened, {"a.png": "red", "b.png": "red"})
        red.with_suffix(".xmp").write_text("<x:xmpmeta/>")
        (done,) = assign(opened, "blue", facts_of(red))
        history = opened.journal.history
        assert sorted(os.listdir(opened.layout.root / "Dataset" / "blue")) == ["a.png", "a.xmp"]
        assert history.accuracy()["red"].corrected == 1
        assert len(history.to_audit()) == 1
        assert references(opened, with_corrections=True) == [("blue", "Dataset/blue/a.png")]
        assert history.given_since(0.0) == {"assigned": 1}
        undo(opened, done["id"])
        assert sorted(os.listdir(other.parent)) == ["a.png", "a.xmp", "b.png"]
        assert (history.corrections(), history.accuracy()["red"].corrected) == ([], 0)
        assert references(opened, with_corrections=True) == []

    def test_assign_again_changes_the_one_correction(self, opened: OpenDataset) -> None:
        """Red, blue, green: one correction; back to red: none, as if it had been moved by hand."""
        (path,) = filed(opened, {"a.png": "red"})
        for label, corrections in (("blue", [("red", "blue")]), ("green", [("red", "green")]), ("red", [])):
            (done,) = assign(opened, label, facts_of(path))
            path = Path(done["destination"])
            assert [one[:2] for one in opened.journal.history.corrections()] == corrections
        undo(opened, done["id"])
        assert [one[:2] for one in opened.journal.history.corrections()] == [("red", "green")]
        assert opened.journal.history.given_since(0.0) == {"assigned": 1}

    def test_assign_image_corrected_by_hand_before_and_after(self, opened: OpenDataset) -> None:
        """By hand to blue, by request to green, by hand to red again: what counts is where it is."""
        (path,) = filed(opened, {"a.png": "red"})
        by_hand = opened.layout.root / "Dataset" / "blue"
        by_hand.mkdir()
        path.rename(by_hand / "a.png")
        (done,) = assign(opened, "green", facts_of(by_hand / "a.png"))
        assert [one[:3] for one in opened.journal.history.corrections()] == [("red", "green", "Dataset/green/a.png")]
        undo(opened, done["id"])
        assert [one[:3] for one in opened.journal.history.corrections()] == [("red", "blue", "Dataset/blue/a.png")]
        (done,) = assign(opened, "green", facts_of(by_hand / "a.png"))
        Path(done["destination"]).rename(path)
        record_places(opened.layout, opened.journal, [str(path)])
        assert opened.journal.history.corrections() == []

    def test_assign_image_unknown_to_sortd_is_a_reference_and_no_correction(self, opened: OpenDataset) -> None:
        """A person put it into Dataset/; nothing was decided about it."""
        folder = opened.layout.root / "Dataset" / "red"
        folder.mkdir()
        picture("blue", 7).save(folder / "mine.png")
        (done,) = assign(opened, "blue", facts_of(folder / "mine.png"))
        assert references(opened) == [("blue", "Dataset/blue/mine.png")]
        assert opened.journal.history.corrections() == []
        undo(opened, done["id"])
        assert (folder / "mine.png").exists()

    def test_assign_cut_short_before_the_correction_is_corrected_by_the_next_scan(self, opened: OpenDataset) -> None:
        """The move is durable; a crash right after it loses no correction."""
        (path,) = filed(opened, {"a.png": "red"})
        list(assign_images(opened.layout, opened.journal, opened.mover.move_all, "blue", facts_of(path)))
        assert opened.journal.history.corrections() == []
        scanner = CorrectionScanner(opened.layout, opened.journal, report=lambda _: None)
        scanner.begin(time_ns())
        while scanner.is_under_way:
            scanner.take()
        assert [one[:3] for one in opened.journal.history.corrections()] == [("red", "blue", "Dataset/blue/a.png")]

    def test_assign_to_the_class_that_it_is_in_is_refused(self, opened: OpenDataset) -> None:
        """It would get a number in its name."""
        (path,) = filed(opened, {"a.png": "red"})
        (refused,) = assign(opened, "red", facts_of(path))
        assert "in this class already" in refused["message"]
        assert path.exists()


@pytest.mark.parametrize(
    ("place", "advice"), [("Rejected/0.png", "lets a rejected image be tried again"), ("Images/0.png", "decides")]
)
def test_assign_rejected_or_new_image_is_refused_with_advice(opened: OpenDataset, place: str, advice: str) -> None:
    """These are sortd's to decide."""
    image = {**waiting(opened)[0], "path": f"{opened.layout.root}/{place}"}
    (refused,) = assign(opened, "_none", [image])
    assert advice in refused["message"]


@pytest.mark.parametrize(
    "label",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "../x",
        "/x",
        ".hidden",
        "new\nline",
        "a\x7f",
        "a\0b",
        " a",
        "@eaDir",
        "\ud800",
        "é" * 128,
    ],
)
def test_assign_hostile_label_is_refused(opened: OpenDataset, label: str) -> None:
    """Nothing is moved and no folder is made."""
    before = sorted(opened.layout.root.rglob("*"))
    assert assigned_label_problem(label) is not None
    with pytest.raises(DataError, match="cannot be a class"):
        assign(opened, label, waiting(opened))
    assert sorted(opened.layout.root.rglob("*")) == before


def test_assign_without_images_is_refused(opened: OpenDataset) -> None:
    """No class is made for nothing."""
    with pytest.raises(DataError, match="no image was named"):
        assign(opened, "sky", [])
    assert not (opened.layout.root / "Clases" / "sky").exists()


def test_assign_sidecar_is_refused_and_moves_with_its_image(opened: OpenDataset) -> None:
    """Named beside its image, as by a pattern of the shell, it does not leave the image."""
    image = Path(waiting(opened)[0]["path"])
    (sidecar := image.with_suffix(".aae")).write_text("<plist/>")
    results = {one["path"]: one for one in assign(opened, "sky", facts_of(sidecar, image))}
    assert "it belongs to 0.png" in results[str(sidecar)]["message"]
    assert sorted(os.listdir(opened.layout.root / "Dataset" / "sky")) == ["0.aae", "0.png"]


def test_assign_image_through_a_linked_folder_is_refused(opened: OpenDataset) -> None:
    """A link in Review/ leads to no reference, and to nothing outside of the dataset."""
    (opened.layout.root / "Review" / "link").symlink_to(opened.layout.root / "Clases" / "red")
    (opened.layout.root / "Clases" / "red" / "0.xmp").write_text("<x:xmpmeta/>")
    linked = facts_of(opened.layout.root / "Review" / "link" / "0.png")
    (refused,) = assign(opened, "sky", linked)
    assert refused["destination"] is None
    assert (opened.layout.root / "Clases" / "red" / "0.png").exists()
    assert not (opened.layout.root / "Clases" / "sky").exists()
    assign(opened, "sky", waiting(opened)[:1])
    assign(opened, "sky", linked)
    assert (opened.layout.root / "Clases" / "sky").exists()  # the class of another image
