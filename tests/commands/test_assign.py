"""Images assigned to a class or to none from the command line, with and without a daemon, and taken back."""

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from sortd.commands.assign import assign_to_class
from sortd.commands.moves import journal_of, undo_records_of
from sortd.commands.status import settings_with_corrections
from sortd.config import Config, read_config
from sortd.daemon.assign import image_facts
from sortd.daemon.control import AnsweredError, ask
from sortd.daemon.corrections import record_places
from sortd.daemon.dataset_lock import lock_dataset
from sortd.daemon.references import References
from sortd.daemon.resources import Resources
from sortd.errors import DataError
from sortd.events import Outcome
from sortd.files import write_json
from sortd.finetune.data import find_candidates
from sortd.finetune.recipe import Source
from sortd.layout import Area, Layout
from sortd.store.records import Selection
from sortd.watch.scan import stamp
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, tree
from tests.fake_encoder import FakeEncoder
from tests.filed_images import file_images

WAITING = 3


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset with three images in Review/red, one with a sidecar, and two filed ones."""
    write_config(tmp_path, settle_seconds=0.1)
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {"filed0.png": "red", "filed1.png": "red"})
    add_waiting(dataset, WAITING)
    (dataset / "Review" / "red" / "0.xmp").write_text("<x:xmpmeta/>")
    return dataset


def add_waiting(dataset: Path, count: int) -> None:
    """Draw images into Review/red."""
    (dataset / "Review" / "red").mkdir()
    for number in range(count):
        picture("blue", 7000 + number, (24, 24)).save(dataset / "Review" / "red" / f"{number}.png")


def config_file(site: Path) -> Path:
    """Return the path of the configuration of a site."""
    return site.parents[1] / "config.yaml"


def config_of(site: Path) -> Config:
    """Return the configuration of a site."""
    return read_config(config_file(site), {"HOME": "/nonexistent"})


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", config_file(site))


def waiting(site: Path) -> list[dict[str, Any]]:
    """Return the images in Review/ as a request has them."""
    paths = sorted((site / "Review").rglob("*.png"))
    return [image_facts(str(path), mark) for path in paths if (mark := stamp(str(path))) is not None]


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none if there is no folder."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def user_files(site: Path) -> dict[str, bytes]:
    """Return every file of a dataset except those of sortd, with its bytes."""
    return {name: body for name, body in tree(site).items() if not name.startswith(".sortd/")}


class TestCommand:
    """``sortd assign`` where no sortd runs."""

    def test_assign_moves_images_with_companions_and_says_how_to_take_them_back(self, site: Path) -> None:
        """They are in the class, and undo of as many moves puts them back."""
        before, (first, second, _) = user_files(site), [one["path"] for one in waiting(site)]
        ran = run(site, "assign", first, second, "sky")
        assert (ran.code, ran.out.count(" -> ")) == (0, 2)
        assert (
            "2 images assigned to sky, used as references where they lie; to take them back: sortd undo --last 2"
            in ran.err
        )
        assert names_in(site / "Dataset" / "sky") == ["0.png", "0.xmp", "1.png"]
        assert run(site, "undo", "--last", 2).code == 0
        assert user_files(site) == before
        assert names_in(site / "Clases") == ["blue", "green", "red"]

    def test_assign_json_has_the_class_and_the_ids(self, site: Path) -> None:
        """The number of each move is what an undo takes."""
        facts = run(site, "assign", waiting(site)[0]["path"], "blue", "--json").facts
        (one,) = facts["assigned"]
        assert (facts["dataset"], facts["label"], facts["example"], facts["later"]) == ("Colours", "blue", False, 0)
        assert one["destination"] == str(site / "Dataset" / "blue" / "0.png")
        newest = Selection(outcome=Outcome.ASSIGNED, undoable=True, limit=1)
        assert one["id"] == journal_of(config_of(site), Layout(site)).moves(newest)[0]["id"]

    def test_assign_none_takes_no_class(self, site: Path) -> None:
        """Every path is an image; no folder appears in Clases/, and the folder in Dataset/ is no finding."""
        ran = run(site, "assign", "--none", *(one["path"] for one in waiting(site)[:2]))
        assert ran.code == 0
        assert "2 images assigned to no class; to take" in ran.err
        ran = run(site, "assign", "--none", "--example", waiting(site)[0]["path"])
        assert "assigned to no class, used as examples of no class where they lie" in ran.err
        assert names_in(site / "Dataset" / "_none") == ["0.png", "0.xmp", "1.png", "2.png"]
        assert names_in(site / "Clases") == ["blue", "green", "red"]
        facts = run(site, "status", "--json").facts["datasets"]["Colours"]
        assert facts["learnt"] == {"_none": {"corrected": 0, "confirmed": 0, "assigned": 1}}
        assert set(facts["accuracy"]) == {"red"}
        findings = run(site, "check", "--json").facts["findings"]
        assert not [one for one in findings if one["subject"].endswith("/_none") or "_none" in one["what"]]

    def test_assign_through_a_link_and_to_a_class_with_blanks(self, site: Path) -> None:
        """A path is taken as the user spells it."""
        (link := site.parents[1] / "link").symlink_to(site)
        assert run(site, "assign", link / "Review" / "red" / "0.png", "blue sky").code == 0
        assert names_in(site / "Dataset" / "blue sky") == ["0.png", "0.xmp"]

    def test_assign_filed_image_is_a_correction(self, site: Path) -> None:
        """The history and the accuracy have it; undo takes it back."""
        assert run(site, "assign", site / "Dataset" / "red" / "filed0.png", "blue").code == 0
        accuracy = run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]["red"]
        assert (accuracy["checked"], accuracy["corrected"]) == (2, 1)
        assert [one["label"] for one in run(site, "history", "--json", "--outcome", "corrected").facts["moves"]] == [
            "blue"
        ]
        assert run(site, "undo", site / "Dataset" / "blue" / "filed0.png").code == 0
        assert run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]["red"]["checked"] == 0

    def test_assign_part_that_cannot_be_moved_is_exit_65(self, site: Path) -> None:
        """The others are moved."""
        here = site / "Dataset" / "red" / "filed0.png"
        ran = run(site, "assign", waiting(site)[0]["path"], here, "red")
        assert (ran.code, here.exists()) == (65, True)
        assert "in this class already" in ran.out
        assert "0.png" in names_in(site / "Dataset" / "red")

    def test_assign_wrong_usage_is_refused(self, site: Path) -> None:
        """No image, no class, and an example of a class."""
        path = waiting(site)[0]["path"]
        for arguments in ((), ("red",), ("--none",), ("--example", path, "red")):
            assert run(site, "assign", *arguments).code == 2, arguments

    def test_assign_hostile_paths_and_names_move_nothing(self, site: Path) -> None:
        """Outside, links, folders, references, what sortd decides, names that can be no class."""
        path, before = waiting(site)[0]["path"], user_files(site)
        (site / "Review" / "red" / "link.png").symlink_to(config_file(site))
        os.mkfifo(site / "Review" / "red" / "pipe.png")
        picture("red", 1).save(site / "Images" / "new.png")
        for place in (
            config_file(site),
            site / "Review" / "red" / "link.png",
            site / "Review" / "red" / "pipe.png",
            site / "Review" / "red",
            site / "Review" / "gone.png",
            site / "Review" / ".." / "Clases" / "red" / "0.png",
            site / "Clases" / "red" / "0.png",
            site / "Images" / "new.png",
            "/etc/passwd",
            "",
        ):
            assert run(site, "assign", place, "blue").code == 65, place
        for label in ("a/b", "..", ".hidden", "", " ", "new\nline", "@eaDir", path):
            assert run(site, "assign", path, label).code == 65, label
        os.unlink(site / "Images" / "new.png")
        os.unlink(site / "Review" / "red" / "link.png")
        assert user_files(site) == before
        assert names_in(site / "Clases") == ["blue", "green", "red"]

    def test_assign_images_of_two_datasets_is_refused(self, site: Path) -> None:
        """One call has one class of one dataset; nothing is moved."""
        other = make_dataset(site.parent, "Other")
        Layout(other).make()
        picture("red", 1).save(other / "Review" / "a.png")
        ran = run(site, "assign", waiting(site)[0]["path"], other / "Review" / "a.png", "blue")
        assert ran.code == 65
        assert "several datasets (Colours, Other)" in ran.err
        assert len(waiting(site)) == WAITING


class TestFunctions:
    """What a page of its own does with the same functions."""

    def test_undo_records_of_takes_back_exactly_these_moves(self, site: Path) -> None:
        """Whatever was moved since stays."""
        config, layout = config_of(site), Layout(site)
        first = assign_to_class(config, layout, "sky", waiting(site)[:1])["assigned"][0]
        assign_to_class(config, layout, "blue", waiting(site))
        reply = undo_records_of(config, layout, [first["id"]])
        assert [(one["id"], one["restored"]) for one in reply["undone"]] == [(first["id"], first["path"])]
        assert (names_in(site / "Dataset" / "sky"), names_in(site / "Dataset" / "blue")) == ([], ["1.png", "2.png"])
        with pytest.raises(DataError, match="no record 999"):
            undo_records_of(config, layout, [999])
        assert undo_records_of(config, layout, []) == {"undone": [], "later": 0}

    def test_given_since_counts_what_stands(self, site: Path) -> None:
        """Undone moves do not count; images are counted, not acts."""
        config, layout = config_of(site), Layout(site)
        done = assign_to_class(config, layout, "sky", waiting(site))["assigned"]
        mark = stamp(done[0]["destination"])
        assert mark is not None
        assign_to_class(config, layout, "blue", [image_facts(done[0]["destination"], mark)])
        undo_records_of(config, layout, [done[1]["id"]])
        with journal_of(config, layout).open() as history:
            assert history.given_since(0.0) == {"assigned": WAITING - 1}
            assert history.given_since(time.time() + 60) == {"assigned": 0}
        newest = journal_of(config, layout).moves(Selection(outcome=Outcome.ASSIGNED, undoable=True, limit=2))
        assert [(one["label"], Path(str(one["to"])).name) for one in newest] == [("blue", "0.png"), ("sky", "2.png")]

    def test_assign_changed_image_stays_while_others_move(self, site: Path) -> None:
        """Only the version that was shown is moved."""
        images = waiting(site)
        picture("green", 1).save(images[1]["path"])
        reply = assign_to_class(config_of(site), Layout(site), "sky", images)
        assert [one["path"] for one in reply["assigned"] if one["destination"] is None] == [images[1]["path"]]
        assert len(waiting(site)) == 1


def strangers(site: Path) -> int:
    """Return how many images count as examples of no class."""
    config, layout = config_of(site), Layout(site)
    with Resources(config, load_encoder=lambda _: FakeEncoder()) as resources:
        settings = settings_with_corrections(config, layout)
        support, _ = References(layout.area(Area.CLASES)).support(resources.embedder(), settings)
        assert support.labels == ("blue", "green", "red")
        return len(support.strangers)


def test_assign_examples_count_like_those_in_clases(site: Path) -> None:
    """With and without a folder Clases/_none; not those that are no examples, and not once they are undone."""
    config, layout = config_of(site), Layout(site)
    assign_to_class(config, layout, "_none", waiting(site)[:1])
    assert strangers(site) == 0
    done = assign_to_class(config, layout, "_none", waiting(site), is_example=True)["assigned"]
    assert strangers(site) == 2
    (site / "Clases" / "_none").mkdir()
    picture("green", 9).save(site / "Clases" / "_none" / "mine.png")
    assert strangers(site) == 3
    undo_records_of(config, layout, [one["id"] for one in done])
    assert strangers(site) == 1


@pytest.mark.parametrize("learns", ["true", "false"])
def test_history_says_which_corrections_are_references(tmp_path: Path, learns: str) -> None:
    """One by request always is; one to no class only if it is an example; one by hand as the configuration says."""
    write_config(tmp_path, learn_from_corrections=learns)
    dataset = make_dataset(tmp_path / "Data")
    for folder in ("blue", "_none"):
        (dataset / "Dataset" / folder).mkdir(parents=True)
    paths = file_images(dataset, tmp_path / "state", {f"{name}.png": "red" for name in "abcde"})
    config, layout = config_of(dataset), Layout(dataset)
    for path, label, is_example in zip(paths[:3], ("blue", "_none", "_none"), (False, False, True), strict=True):
        mark = stamp(path)
        assert mark is not None
        assign_to_class(config, layout, label, [image_facts(path, mark)], is_example=is_example)
    by_hand = [dataset / "Dataset" / "blue" / "d.png", dataset / "Dataset" / "_none" / "e.png"]
    for path, there in zip(paths[3:], by_hand, strict=True):
        os.rename(path, there)
    with lock_dataset(layout, config.state_dir) as opened:
        record_places(layout, opened.journal, [str(one) for one in by_hand])
    rows = run(dataset, "history", "--json").facts["moves"]
    learnt = {Path(one["to"]).name: one["learnt"] for one in rows if one["outcome"] == "corrected"}
    by_hand_learnt = learns == "true"
    assert learnt == {"a.png": True, "b.png": False, "c.png": True, "d.png": by_hand_learnt, "e.png": by_hand_learnt}


def test_finetune_on_dataset_takes_images_of_no_class_as_such(site: Path) -> None:
    """Dataset/_none is no class of the model."""
    assign_to_class(config_of(site), Layout(site), "_none", waiting(site))
    known, odd = find_candidates(Layout(site), Source.DATASET, config_of(site).state_dir)
    assert {one.label for one in known} == {"red"}
    assert sum(one.path.endswith(".png") for one in odd) == WAITING


class TestByDaemon:
    """The same where sortd runs."""

    def test_assign_is_used_at_once_and_undone_exactly(self, site: Path) -> None:
        """To a new class, to none as an example, and from class to class, with what each undo takes back."""
        config, layout = config_of(site), Layout(site)
        with running(config_file(site)) as daemon:
            sky = assign_to_class(config, layout, "sky", waiting(site)[:1])["assigned"][0]
            daemon.wait_for("prototypes.rebuilt", classes=4, references=13)
            none = assign_to_class(config, layout, "_none", waiting(site)[:1], is_example=True)["assigned"][0]
            daemon.wait_for("image.assigned", label="_none")
            mark = stamp(path := str(site / "Dataset" / "red" / "filed0.png"))
            assert mark is not None
            corrected = assign_to_class(config, layout, "blue", [image_facts(path, mark)])["assigned"][0]
            assert daemon.wait_for("image.corrected", label="red")["corrected_label"] == "blue"
            assert run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]["red"]["corrected"] == 1
            reply = undo_records_of(config, layout, [sky["id"], none["id"], corrected["id"]])
            assert {one["restored"] for one in reply["undone"]} == {sky["path"], none["path"], path}
            daemon.wait_for("prototypes.rebuilt", classes=3, references=12, changed=True)
            assert run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]["red"]["corrected"] == 0
            assert len(daemon.events("image.corrected")) == 1
        assert names_in(site / "Clases") == ["blue", "green", "red"]
        assert len(waiting(site)) == WAITING

    def test_assign_invalid_requests_move_nothing(self, site: Path) -> None:
        """Types and values that no command sends."""
        before, images = user_files(site), waiting(site)
        valid = {"do": "assign", "dataset": "Colours", "root": str(site), "label": "sky", "images": images}
        (site.parent / "elsewhere").mkdir()
        invalid: list[dict[str, Any]] = [
            {"example": 1},
            {"example": "yes"},
            {"example": True},
            {"label": "../x"},
            {"label": "a\0b"},
            {"label": None},
            {"images": [{**images[0], "size": "large"}]},
            {"images": [{**images[0], "path": images[0]["path"] + "\0"}]},
            {"images": [{"path": images[0]["path"]}]},
            {"images": ["0.png"]},
            {"images": []},
            {"root": str(site.parent / "elsewhere")},
            {"dataset": "Other"},
        ]
        with running(config_file(site)):
            for wrong in invalid:
                with pytest.raises(AnsweredError) as caught:
                    ask(config_of(site).state_dir, {**valid, **wrong})
                assert caught.value.exit_code == 65, wrong
            for place in (
                "Review/../Clases/red/0.png",
                "Rejected/0.png",
                "Review/.hidden/0.png",
                "../config.yaml",
                "Review/",
            ):
                reply = ask(config_of(site).state_dir, valid | {"images": [{**images[0], "path": f"{site}/{place}"}]})
                assert reply is not None
                assert [one["destination"] for one in reply["assigned"]] == [None], place
        assert user_files(site) == before
        assert names_in(site / "Clases") == ["blue", "green", "red"]

    def test_assign_by_a_daemon_that_is_killed_leaves_whole_images_and_can_be_repeated(self, tmp_path: Path) -> None:
        """SIGKILL in the middle: each image is in one place with its sidecar; repeating and undoing work."""
        file = write_config(tmp_path, settle_seconds=0.1)
        site = make_dataset(tmp_path / "Data")
        Layout(site).make()
        add_waiting(site, 200)
        for number in range(0, 200, 7):
            (site / "Review" / "red" / f"{number}.xmp").write_text("<x:xmpmeta/>")
        before, images, config = tree(site / "Review"), waiting(site), config_of(site)
        with running(file, keeps_files=False) as daemon:
            request = {"do": "assign", "dataset": "Colours", "root": str(site), "label": "sky", "images": images}
            name = config.state_dir / "requests" / f"{uuid.uuid4().hex}.request"
            write_json(name, {**request, "expires_at": time.time() + 600}, mode=0o644)
            daemon.send(signal.SIGUSR1)
            daemon.wait_for("image.assigned", count=20)
            daemon.stop(signal.SIGKILL)
        for open_request in (config.state_dir / "requests").iterdir():
            open_request.unlink()
        moved, rest = tree(site / "Dataset"), tree(site / "Review")
        assert len(moved) + len(rest) == len(before)
        assert all(Path(name).with_suffix(".png").as_posix() in moved for name in moved if name.endswith(".xmp"))
        if left := waiting(site):
            assert assign_to_class(config, Layout(site), "sky", left)["later"] == 0
        assert len(names_in(site / "Dataset" / "sky")) == len(before)
        assert run(site, "undo", "--last", 200).code == 0
        assert tree(site / "Review") == before
        assert names_in(site / "Clases") == ["blue", "green", "red"]
        with DaemonProcess(file, "once") as daemon:
            assert daemon.wait() == 0
        assert tree(site / "Review") == before
