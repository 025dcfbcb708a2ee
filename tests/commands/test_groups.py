"""Groups of what waits in Review/: listed, shown on a page, and made into classes, with and without a daemon."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sortd.commands.groups import accept_group, group_piles, groups_page
from sortd.config import Config, read_config
from sortd.daemon.control import ask
from sortd.layout import Layout
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, teach, tree
from tests.fake_encoder import FakeEncoder

STRANGERS = 8


def yellow(seed: int) -> Image.Image:
    """Return a picture of a colour that no class has, as varied as those of the classes."""
    pixels = np.asarray(picture("red", 7000 + seed, patches=40), np.int64) + np.array([30, 185, 0])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset of three colours with yellow images in Review/, one of them with a sidecar."""
    config = write_config(tmp_path, mode="best", abstain="{precision: 0.95}", settle_seconds=0.1)
    dataset = make_dataset(tmp_path / "Data")
    teach(dataset)
    for number in range(STRANGERS):
        yellow(number).save(dataset / "Images" / f"stranger{number:03}.png")
    (dataset / "Images" / "stranger003.xmp").write_text("<x:xmpmeta/>")
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
        assert len(daemon.events("image.sent_to_review")) == STRANGERS
    return dataset


def config_of(site: Path) -> Config:
    """Return the configuration of a site."""
    return read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"})


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", site.parents[1] / "config.yaml")


def no_model(_: Config) -> FakeEncoder:
    """Stand in for a model that must not be loaded."""
    raise AssertionError("a model was loaded for images that are known")


def listed(site: Path) -> Mapping[str, Any]:
    """Return the groups that the command prints."""
    facts: Mapping[str, Any] = run(site, "groups", "--json").facts["datasets"]["Colours"]
    return facts


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none if there is no folder."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


class TestListing:
    """What ``sortd groups`` prints and draws."""

    def test_groups_unknown_images_are_one_proposed_group(self, site: Path) -> None:
        """Size, familiarity, nearest class and members; no model is loaded, and nothing changes."""
        before = tree(site)
        facts = listed(site)
        (group,) = facts["groups"]
        assert (facts["waiting"], facts["alone"], group["size"], group["is_new"]) == (STRANGERS, 0, STRANGERS, True)
        assert group["familiarity"] < 0
        assert group["nearest_label"] in {"red", "green", "blue"}
        assert {Path(path).name for path in group["members"]} == {f"stranger{n:03}.png" for n in range(STRANGERS)}
        assert facts["next_to_label"] == []  # 28 references a class
        assert tree(site) == before

    def test_groups_table_names_the_group_and_what_to_do(self, site: Path) -> None:
        """The identifier is what --accept takes."""
        ran = run(site, "groups", "Colours")
        assert listed(site)["groups"][0]["id"] in ran.out
        assert "--accept ID --as NAME" in ran.err

    def test_groups_image_put_there_by_hand_is_embedded(self, site: Path) -> None:
        """The encoder reads what neither journal nor cache know; a damaged file is reported."""
        yellow(98).save(site / "Review" / "mine.png")
        (site / "Review" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
        (pile,) = group_piles(config_of(site), load_encoder=lambda _: FakeEncoder())
        assert [group.size for group in pile.groups] == [STRANGERS + 1]
        assert [Path(one.path).name for one in pile.unreadable] == ["torn.png"]

    def test_groups_few_references_name_images_to_label_next(self, tmp_path: Path) -> None:
        """One image of each kind is asked for, at most one for each class."""
        write_config(tmp_path)
        dataset = make_dataset(tmp_path / "Data", references=2)
        Layout(dataset).make()
        for colour in ("red", "green", "blue"):
            for number in range(4):
                picture(colour, 900 + number, patches=20).save(dataset / "Review" / f"{colour}{number}.png")
        (pile,) = group_piles(config_of(dataset), load_encoder=lambda _: FakeEncoder())
        asked = [Path(path).name.rstrip("0123456789.png") for path in pile.next_to_label]
        assert sorted(asked) == sorted(colour.rstrip("n") for colour in ("red", "green", "blue"))
        page = groups_page({"Colours": pile.facts()}, now=datetime(2026, 1, 1, tzinfo=UTC))
        assert "Label these next" in page

    def test_check_names_images_to_label_next_from_what_is_stored(self, tmp_path: Path) -> None:
        """Few references: check asks for images of Review/ without a model; assigned images count as references."""
        config = write_config(tmp_path, mode="best", abstain="{precision: 0.99}", settle_seconds=0.1)
        dataset = make_dataset(tmp_path / "Data", references=3)
        for number in range(6):
            yellow(number).save(dataset / "Images" / f"{number}.png")
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
        findings = run(dataset, "check", "--json").facts["findings"]
        (asked,) = [one["what"] for one in findings if "labelled next" in one["what"]]
        assert asked.count(".png") == 3
        group = listed(dataset)["groups"][0]
        run(dataset, "groups", "--accept", group["id"], "--as", "yellow")
        findings = run(dataset, "check", "--json").facts["findings"]
        assert not any("without an image" in one["what"] for one in findings)

    def test_groups_page_has_the_pictures_and_loads_nothing(self, site: Path, tmp_path: Path) -> None:
        """A contact sheet in one file, with the command for each group."""
        page = tmp_path / "groups.html"
        ran = run(site, "groups", "--page", page)
        text = page.read_text(encoding="utf-8")
        assert ran.code == 0
        assert text.count('src="data:image/jpeg;base64,') == STRANGERS
        assert f"--accept {listed(site)['groups'][0]['id']} --as NAME" in text
        assert "http" not in text
        assert run(site, "groups", "--page", tmp_path / "no" / "a.html").code == 73

    def test_groups_without_images_says_so(self, tmp_path: Path) -> None:
        """An empty Review/ needs neither references nor a model."""
        write_config(tmp_path)
        make_dataset(tmp_path / "Data")
        (pile,) = group_piles(config_of(tmp_path / "Data" / "Colours"), load_encoder=no_model)
        assert pile.facts()["groups"] == []


class TestAccept:
    """A class from a group where no sortd runs."""

    def test_accept_makes_a_class_whose_references_lie_in_dataset(self, site: Path) -> None:
        """All but the images left out are moved, the sidecar with its own, and the next start files such images."""
        group = listed(site)["groups"][0]
        left_out = next(path for path in group["members"] if "stranger007" in path)
        (link := site.parents[1] / "link").symlink_to(site)
        named = link / Path(left_out).relative_to(site)
        ran = run(site, "groups", "--accept", group["id"], "--as", "yellow", "--without", named, "--json")
        assert ran.code == 0
        assert ran.facts["later"] == 0
        assert names_in(site / "Dataset" / "yellow") == sorted(
            [*(f"stranger{n:03}.png" for n in range(7)), "stranger003.xmp"]
        )
        assert names_in(site / "Clases" / "yellow") == []
        assert Path(left_out).exists()
        history = run(site, "history", "--json", "--outcome", "assigned", "--label", "yellow").facts["moves"]
        assert len(history) == 7
        yellow(99).save(site / "Images" / "new.png")
        with DaemonProcess(site.parents[1] / "config.yaml", "once") as daemon:
            assert daemon.wait() == 0
            assert daemon.events("prototypes.rebuilt", classes=4, references=91)
        assert (site / "Dataset" / "yellow" / "new.png").exists()

    def test_accept_undone_leaves_what_was_there_before(self, site: Path) -> None:
        """The images return to Review/ and the class is gone with its folder, since it was made for them."""
        before = tree(site / "Review")
        group = listed(site)["groups"][0]
        run(site, "groups", "--accept", group["id"], "--as", "yellow")
        assert tree(site / "Review") == {}
        assert run(site, "undo", "--last", STRANGERS).code == 0
        assert tree(site / "Review") == before
        assert names_in(site / "Clases") == ["blue", "green", "red"]

    def test_accept_undone_keeps_a_class_folder_of_the_user(self, site: Path) -> None:
        """A folder that was there, or holds something, is never removed."""
        (site / "Clases" / "yellow").mkdir()
        run(site, "groups", "--accept", listed(site)["groups"][0]["id"], "--as", "yellow")
        run(site, "undo", "--last", STRANGERS)
        run(site, "groups", "--accept", listed(site)["groups"][0]["id"], "--as", "sand")
        (site / "Clases" / "sand" / "class.txt").write_text("sand")
        run(site, "undo", "--last", STRANGERS)
        assert {"yellow", "sand"} <= set(names_in(site / "Clases"))

    def test_accept_overwrites_nothing(self, site: Path) -> None:
        """A name that is taken in the class gets a number."""
        (site / "Dataset" / "yellow").mkdir()
        (site / "Dataset" / "yellow" / "stranger000.png").write_bytes(b"somebody else's")
        run(site, "groups", "--accept", listed(site)["groups"][0]["id"], "--as", "yellow")
        assert (site / "Dataset" / "yellow" / "stranger000.png").read_bytes() == b"somebody else's"
        assert (site / "Dataset" / "yellow" / "stranger000 (2).png").exists()

    def test_accept_hostile_class_name_is_refused(self, site: Path) -> None:
        """Nothing is moved and no folder is made."""
        before, folders = tree(site), sorted(site.rglob("*/"))
        group = listed(site)["groups"][0]["id"]
        for name in ("../Images", "a/b", ".hidden", "", " ", "_none", "new\nline", "@eaDir"):
            assert run(site, "groups", "--accept", group, "--as", name).code == 65, name
        assert (tree(site), sorted(site.rglob("*/"))) == (before, folders)

    def test_accept_unknown_group_or_member_is_refused(self, site: Path) -> None:
        """An old identifier, a path outside of the group, and half of the options."""
        group = listed(site)["groups"][0]["id"]
        assert run(site, "groups", "--accept", "00000000", "--as", "yellow").code == 65
        other = site / "Clases" / "red" / "0.png"
        assert run(site, "groups", "--accept", group, "--as", "yellow", "--without", other).code == 65
        assert run(site, "groups", "--accept", group).code == 2
        assert run(site, "groups", "--without", other).code == 2

    def test_accept_image_changed_since_it_was_shown_stays(self, site: Path) -> None:
        """Only the versions that were grouped are moved."""
        piles = list(group_piles(config_of(site), load_encoder=no_model))
        changed = site / "Review" / Path(piles[0].files[0][0]).parent.name / "stranger000.png"
        picture("blue", 5).save(changed)
        reply = accept_group(config_of(site), piles, piles[0].groups[0].id, "yellow", ())
        refused = [one for one in reply["assigned"] if one["destination"] is None]
        assert [one["path"] for one in refused] == [str(changed)]
        assert "changed" in refused[0]["message"]
        assert len(names_in(site / "Dataset" / "yellow")) == STRANGERS  # seven images and the sidecar


class TestAcceptByDaemon:
    """A class from a group where sortd runs."""

    def test_accept_class_is_used_at_once_and_undone(self, site: Path) -> None:
        """The running sortd moves the images, learns the class, files by it, and forgets it when it is undone."""
        config = site.parents[1] / "config.yaml"
        with running(config) as daemon:
            group = listed(site)["groups"][0]
            ran = run(site, "groups", "--accept", group["id"], "--as", "yellow", "--json")
            assert (ran.code, len(ran.facts["assigned"])) == (0, STRANGERS)
            assert daemon.wait_for("image.assigned", count=STRANGERS)["label"] == "yellow"
            daemon.wait_for("prototypes.rebuilt", classes=4, references=84 + STRANGERS)
            yellow(99).save(site / "Images" / "new.png")
            daemon.wait_for("image.filed", label="yellow")
            assert names_in(site / "Dataset" / "yellow") == sorted(
                ["new.png", *(f"stranger{n:03}.png" for n in range(STRANGERS)), "stranger003.xmp"]
            )
            assert run(site, "undo", "--last", STRANGERS + 1).code == 0
            daemon.wait_for("prototypes.rebuilt", classes=3, references=84, changed=True)
            assert names_in(site / "Clases") == ["blue", "green", "red"]
            assert len(tree(site / "Review")) == STRANGERS + 1
            assert run(site, "release", "--all").code == 0
            assert len(tree(site / "Review")) == STRANGERS + 1

    def test_assign_request_for_anything_but_an_image_in_review_is_refused(self, site: Path) -> None:
        """Paths of a request are checked where they are used."""
        state, outside = site.parents[1] / "state", site.parents[1] / "config.yaml"
        facts = {"size": outside.stat().st_size, "mtime_ns": outside.stat().st_mtime_ns}
        with running(outside):
            for path in (outside, f"{site}/Review/../../../config.yaml", site / "Clases" / "red" / "0.png"):
                request = {"do": "assign", "dataset": "Colours", "root": str(site), "label": "yellow"}
                reply = ask(state, {**request, "images": [{"path": str(path), **facts}]})
                assert reply is not None
                assert "not an image in Review/" in reply["assigned"][0]["message"]
            assert names_in(site / "Clases") == ["blue", "green", "red"]
