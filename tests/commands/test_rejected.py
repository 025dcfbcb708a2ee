"""Rejected images: listed with their reasons, and tried again, with and without a daemon."""

import json
import os
from pathlib import Path

import pytest

from sortd.commands.console import printable
from sortd.commands.rejected import rejected_images, retry_rejected
from sortd.config import Config, read_config
from sortd.layout import Layout
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, tree


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset in which sortd rejected two cut images, one of them with a sidecar and of a folder of its own."""
    config = write_config(tmp_path, settle_seconds=0.1)
    dataset = make_dataset(tmp_path / "Data")
    (dataset / "Images" / "trip").mkdir()
    for place in ("one.png", "trip/two.png"):
        picture("red", 1).save(path := dataset / "Images" / place)
        path.write_bytes(path.read_bytes()[:900])
    (dataset / "Images" / "trip" / "two.xmp").write_text("<x:xmpmeta/>")
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
        assert len(daemon.events("image.rejected")) == 2
    return dataset


def config_of(site: Path) -> Config:
    """Return the configuration of a site."""
    return read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"})


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", site.parents[1] / "config.yaml")


def test_rejected_images_have_reason_and_former_path(site: Path) -> None:
    """Neither sidecars nor reason files are among them; the newest comes first."""
    found = rejected_images(config_of(site), Layout(site))
    assert {(os.path.relpath(one["path"], site), os.path.relpath(one["from"], site)) for one in found} == {
        ("Rejected/one.png", "Images/one.png"),
        ("Rejected/two.png", "Images/trip/two.png"),
    }
    assert all("unreadable" in one["reason"] and one["id"] and one["size"] == 900 for one in found)
    assert found[0]["at"] >= found[1]["at"]


def test_rejected_images_unknown_to_the_journal_are_listed_with_the_reason_beside_them(site: Path) -> None:
    """The journal was moved aside, or the user put a file there; a damaged reason file says nothing."""
    (site / "Rejected" / "mine.png").write_bytes(b"x")
    (site / "Rejected" / "mine.png.reason.json").write_text("[" * 9)
    (unknown,) = [one for one in rejected_images(config_of(site), Layout(site)) if one["id"] is None]
    assert (Path(unknown["path"]).name, unknown["reason"], unknown["from"]) == ("mine.png", "", None)
    next((site.parents[1] / "state").glob("*/journal.sqlite")).unlink()
    reasons = {Path(one["path"]).name: one["reason"] for one in rejected_images(config_of(site), Layout(site))}
    assert "unreadable" in reasons["one.png"]
    assert "one.png.reason.json" not in reasons


def test_rejected_images_with_a_hostile_reason_beside_them_are_listed(site: Path) -> None:
    """Anybody who may write to Rejected/ may write one: it is cut, and can be shown whatever is in it."""
    for name, reason in {"long.png": "A" * 3_000_000, "surrogate.png": "\ud800 <b>"}.items():
        (site / "Rejected" / name).write_bytes(b"x")
        (site / "Rejected" / f"{name}.reason.json").write_text(json.dumps({"reason": reason}))
    (site / "Rejected" / "pipe.png").write_bytes(b"x")
    os.mkfifo(site / "Rejected" / "pipe.png.reason.json")
    found = {Path(one["path"]).name: one["reason"] for one in rejected_images(config_of(site), Layout(site))}
    assert (found["long.png"], printable(found["surrogate.png"])) == ("A" * 500, "\\ud800 <b>")
    assert found["pipe.png"] == ""


def test_rejected_images_without_a_journal_are_none(tmp_path: Path) -> None:
    """A dataset that was never used."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    assert rejected_images(config_of(dataset), Layout(dataset)) == []


def test_retry_moves_images_back_and_releases_them(site: Path) -> None:
    """With their sidecars and without their reason files; the next start tries them, and rejects them again."""
    before = tree(site / "Rejected")
    paths = [one["path"] for one in rejected_images(config_of(site), Layout(site))]
    reply = retry_rejected(config_of(site), Layout(site), [*paths, paths[0]])
    assert {one["path"]: one["restored"] for one in reply["retried"]} == {
        str(site / "Rejected" / "one.png"): str(site / "Images" / "one.png"),
        str(site / "Rejected" / "two.png"): str(site / "Images" / "trip" / "two.png"),
    }
    assert tree(site / "Rejected") == {}
    assert sorted(tree(site / "Images")) == ["one.png", "trip/two.png", "trip/two.xmp"]
    assert run(site, "status", "--json").facts["datasets"]["Colours"]["held"] == 0
    with DaemonProcess(site.parents[1] / "config.yaml", "once") as daemon:
        assert daemon.wait() == 0
    assert tree(site / "Rejected").keys() == before.keys()


def test_retry_file_that_sortd_did_not_put_there_stays(site: Path) -> None:
    """The others are tried again."""
    (mine := site / "Rejected" / "mine.png").write_bytes(b"x")
    reply = retry_rejected(config_of(site), Layout(site), [mine, site / "Rejected" / "one.png"])
    assert [one["restored"] for one in reply["retried"]] == [None, str(site / "Images" / "one.png")]
    assert reply["retried"][0]["message"] == f"{mine}: sortd did not put it there"
    assert mine.read_bytes() == b"x"


def test_retry_image_whose_name_is_taken_gets_another_and_is_released(site: Path) -> None:
    """Nothing is overwritten, and what is held is what was moved back."""
    (site / "Images" / "one.png").write_text("another")
    ran = run(site, "release", site / "Rejected" / "one.png")
    assert (ran.code, (site / "Images" / "one.png").read_text()) == (0, "another")
    assert (site / "Images" / "one (2).png").exists()
    assert run(site, "status", "--json").facts["datasets"]["Colours"]["held"] == 0


def test_release_of_a_rejected_file_tries_it_again(site: Path) -> None:
    """The command says where it is; a file that sortd does not know is refused."""
    ran = run(site, "release", site / "Rejected" / "two.png")
    assert ran.code == 0
    assert "Images/trip/two.png" in ran.out
    assert "1 image moved back, to be tried again" in ran.err
    ran = run(site, "release", site / "Rejected" / "two.png")
    assert ran.code == 65
    assert "it is not there" in ran.out


def test_retry_by_the_daemon_is_tried_at_once(site: Path) -> None:
    """The running sortd moves them back and decides at once; these are rejected again."""
    with running(site.parents[1] / "config.yaml") as daemon:
        paths = [one["path"] for one in rejected_images(config_of(site), Layout(site))]
        reply = retry_rejected(config_of(site), Layout(site), paths)
        assert all(one["restored"] for one in reply["retried"])
        daemon.wait_for("image.rejected", count=2)
    assert sorted(tree(site / "Rejected")) == [
        "one.png",
        "one.png.reason.json",
        "two.png",
        "two.png.reason.json",
        "two.xmp",
    ]
