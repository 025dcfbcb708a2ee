"""Status tells of the sortd that runs, and of the journals whether or not one runs."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from sortd.commands.status import overview
from sortd.config import read_config
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.service import Status, is_alive, read_status, started_ticks
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset
from tests.filed_images import file_images


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset into which three images were filed, one of them wrongly."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {"a.png": "red", "b.png": "red", "c.png": "blue"})
    with Journal(Layout(dataset).state_folder(tmp_path / "state") / "journal.sqlite") as journal:
        (record, *_) = journal.history.moves(Selection(label="red"))
        journal.record_corrections([(record, "green", "Dataset/green/b.png")])
    return dataset


def facts_of(site: Path) -> dict[str, Any]:
    """Return the overview of this site."""
    return overview(read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"}))


def tell(site: Path, **facts: Any) -> None:
    """Write a status file as a running sortd, this very process, does."""
    told = {
        "running": True,
        "pid": os.getpid(),
        "started_ticks": started_ticks(os.getpid()),
        "version": "0.1.0",
        "root": str(site.parent),
        "ready": True,
        "model": "packaged",
        "encoder_id": "fake-48",
        "config_problem": None,
        "watching": [{"root": str(site), "mode": "polling", "why": "nfs"}],
        "datasets": {
            "Colours": {
                "problem": "Clases is gone",
                "images": {"settling": 2, "ready": 0, "held": 7},
                "generation": 4,
                "classes": ["blue", "green", "red"],
                "references": 12,
                "mode": "max",
            }
        },
        **facts,
    }
    Status(site.parents[1] / "state").write(told)


def shown(site: Path) -> str:
    """Return what the command prints."""
    return sortd("status", "-c", site.parents[1] / "config.yaml").out


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_status_exits_by_whether_a_sortd_runs(site: Path, form: tuple[str, ...]) -> None:
    """A script that asks whether it runs need not read the answer; one that starts up runs."""

    def code() -> int:
        return sortd("status", *form, "-c", site.parents[1] / "config.yaml").code

    assert code() == 75
    tell(site, ready=False)
    assert code() == 0
    tell(site)
    assert code() == 0
    tell(site, running=False)
    assert code() == 75
    tell(site, started_ticks=1)
    assert code() == 75


def test_status_of_a_run_that_an_error_ended_names_the_error(site: Path) -> None:
    """What its last line on stderr said is in reach of whoever looks later."""
    tell(site, running=False, ended_by="the journal is full")
    assert facts_of(site)["ended"] == "failed"
    assert "does not run: the journal is full; last status" in shown(site)


def test_status_of_a_running_sortd_shows_its_facts(site: Path) -> None:
    """Its start, model, watching, waiting images and problems are shown."""
    tell(site)
    facts = facts_of(site)
    assert (facts["running"], facts["pid"], facts["ended"]) == (True, os.getpid(), None)
    assert time.time() - 7200 < facts["started_at"] <= time.time()
    lines = shown(site)
    assert f"sortd 0.1.0 runs since {time.strftime('%Y-', time.localtime(facts['started_at']))}" in lines
    assert "packaged, fake-48" in lines
    assert "polling (nfs)" in lines
    assert "problem   Clases is gone" in lines
    assert "waiting   2 settling" in lines
    assert "generation 4, mode max" in lines


def test_status_accuracy_of_an_unchecked_class_is_not_shown(site: Path) -> None:
    """Accuracy is known only for classes with a correction or an undo."""
    accuracy = facts_of(site)["datasets"]["Colours"]["accuracy"]
    none = dict.fromkeys(("corrected", "undone", "found_wrong", "audited", "audited_right"), 0)
    red = {**none, "filed": 2, "checked": 2, "corrected": 1, "right": 0.5, "interval": (0.0945, 0.9055)}
    blue = {**none, "filed": 1, "checked": 0, "right": None, "interval": None}
    assert accuracy == {"blue": blue, "red": red}
    lines = shown(site)
    assert "red\t2\t1\t0\t0\t1 of 2 (95 %: 9 to 91 %)" in lines
    assert "blue\t1\t0\t0\t0\tnot checked" in lines
    assert "right among all filed images: not checked; to check more: sortd audit --dataset Colours" in lines


def test_status_accuracy_counts_undone_images_and_no_later_ones(site: Path) -> None:
    """An undone image was wrong; images filed later are unchecked."""
    assert sortd("undo", "--last", "1", "--dataset", "Colours", "-c", site.parents[1] / "config.yaml").code == 0
    file_images(site, site.parents[1] / "state", {"d.png": "blue", "e.png": "green"}, run="second")
    accuracy = facts_of(site)["datasets"]["Colours"]["accuracy"]
    blue = {"filed": 2, "checked": 1, "corrected": 0, "undone": 1, "right": 0.0, "interval": (0.0, 0.7935)}
    assert accuracy["blue"].items() >= blue.items()
    assert accuracy["green"]["right"] is None
    assert "blue\t2\t0\t1\t0\t0 of 1 (95 %: 0 to 79 %)" in shown(site)


def test_status_without_a_sortd_reads_the_journals(site: Path) -> None:
    """Never run, stopped and killed are distinguished; the counts are the same."""
    facts = facts_of(site)
    assert (facts["running"], facts["ended"]) == (False, "never ran")
    assert facts["datasets"]["Colours"]["total"] == {"filed": 3}
    assert "has not run yet" in shown(site)
    tell(site, running=False)
    assert facts_of(site)["ended"] == "stopped"
    tell(site, started_ticks=1)
    assert facts_of(site)["ended"] == "died"
    assert "it was killed, or could not record why" in shown(site)
    assert "generation 4, mode max" in shown(site)


def test_status_shows_a_refused_configuration(site: Path) -> None:
    """The mistakes are shown while the previous configuration is used."""
    tell(site, config_problem="config.yaml:3:1: speed: unknown key")
    assert "config.yaml:3:1: speed: unknown key" in shown(site)


def test_status_without_a_sortd_counts_the_inbox(site: Path) -> None:
    """The files that sortd would sort are counted."""
    (site / "Images" / "new.png").touch()
    (site / "Review" / "red").mkdir()
    (site / "Review" / "red" / "odd.png").touch()
    facts = facts_of(site)["datasets"]["Colours"]
    assert (facts["in_images"], facts["in_review"]) == (1, 1)
    assert "waiting   1 file in Images/" in shown(site)


def leave(site: Path) -> dict[str, str]:
    """Put into Images/ what is not handled; return the reasons by path."""
    images = site / "Images"
    (images / "link.png").symlink_to("/nowhere")
    (images / "loop.png").symlink_to("loop.png")
    os.mkfifo(images / "pipe.png")
    for name in (".facebook_1.jpg", "mine~", "a.png.part", "b.png", "b.png.aria2", "Thumbs.db", "ordinary.png"):
        (images / name).touch()
    (images / "2019.temp").mkdir()
    (images / "2019.temp" / "c.png").touch()
    reasons = {
        "symbolic_link": ("link.png", "loop.png"),
        "special_file": ("pipe.png",),
        "hidden": (".facebook_1.jpg",),
        "backup": ("mine~",),
        "system": ("Thumbs.db",),
        "unfinished": ("a.png.part", "b.png", "b.png.aria2", "2019.temp"),
    }
    return {str(images / name): reason for reason, names in reasons.items() for name in names}


@pytest.mark.parametrize("runs", [True, False])
def test_status_of_what_stays_in_images_counts_and_lists_it(site: Path, *, runs: bool) -> None:
    """By reason, from a look at what is there now, whether or not a sortd runs."""
    if runs:
        tell(site)
    expected = leave(site)
    facts = facts_of(site)["datasets"]["Colours"]
    assert {row["path"]: row["reason"] for row in facts["left"]["files"]} == expected
    assert facts["left"]["total"] == len(expected)
    assert facts["left"]["reasons"]["unfinished"] == 4
    assert all(row["message"] for row in facts["left"]["files"])
    assert facts["in_images"] == 1
    assert "left      in Images/: 1 backup, 1 hidden, 1 special file, 2 symbolic link, 1 system, 4 unfinished" in shown(
        site
    )
    shutil.rmtree(site / "Images")
    (site / "Images").mkdir()
    assert facts_of(site)["datasets"]["Colours"]["left"] == {"total": 0, "reasons": {}, "files": []}


def test_status_of_files_that_were_looked_into_lists_them_once(site: Path) -> None:
    """What the running sortd found to be no image is counted with the rest; a file is counted for one reason."""
    notes, half = str(site / "Images" / "notes.txt"), str(site / "Images" / "half.png")
    for path in (notes, half, f"{half}.aria2"):
        Path(path).touch()
    files = [
        {"path": notes, "reason": "not_an_image", "message": "no"},
        {"path": half, "reason": "empty", "message": ""},
    ]
    told = {"images": {}, "left": {"reasons": {"not_an_image": 1, "empty": 1}, "files": files}}
    tell(site, datasets={"Colours": told})
    left = facts_of(site)["datasets"]["Colours"]["left"]
    assert left["reasons"] == {"not_an_image": 1, "unfinished": 2}
    assert sorted(row["path"] for row in left["files"]) == [half, f"{half}.aria2", notes]


def test_status_of_a_held_file_lists_it_while_it_stands_there(site: Path) -> None:
    """An undone image stays, and is no longer told of when somebody took it away."""
    image = site / "Images" / "undone.png"
    image.touch()
    with Journal(Layout(site).state_folder(site.parents[1] / "state") / "journal.sqlite") as journal:
        journal.hold("Images/undone.png", stamp_of(image.lstat()), "undone")
    left = facts_of(site)["datasets"]["Colours"]["left"]
    assert [(row["path"], row["reason"]) for row in left["files"]] == [(str(image), "held")]
    image.unlink()
    assert facts_of(site)["datasets"]["Colours"]["left"]["total"] == 0


def test_status_of_a_missing_dataset_reads_its_journal(site: Path) -> None:
    """With the disk unmounted, the counts are still shown."""
    site.parent.rename(site.parents[1] / "unmounted")
    facts = facts_of(site)["datasets"]["Colours"]
    assert facts["root"] is None
    assert facts["total"] == {"filed": 3}
    assert "missing or not mounted" in shown(site)


def test_status_of_a_damaged_journal_shows_the_problem(site: Path, tmp_path: Path) -> None:
    """Status does not fail because of a damaged journal."""
    (Layout(site).state_folder(tmp_path / "state") / "journal.sqlite").write_bytes(b"no database at all" * 100)
    assert "journal" in facts_of(site)["datasets"]["Colours"]["journal_problem"]


def test_status_with_another_root_shows_both(site: Path) -> None:
    """The running sortd may use another configuration."""
    tell(site, root="/elsewhere")
    assert facts_of(site)["other_root"] == "/elsewhere"


def test_status_of_an_empty_root_says_how_to_begin(tmp_path: Path) -> None:
    """Without datasets, status names the command to create one."""
    write_config(tmp_path)
    (tmp_path / "Data").mkdir()
    assert "sortd init" in sortd("status", "-c", tmp_path / "config.yaml").out


def test_is_alive_with_a_reused_process_number_is_false(tmp_path: Path) -> None:
    """A process is the same only if it started at the same tick."""
    ticks = started_ticks(os.getpid())
    assert ticks is not None
    assert is_alive(os.getpid(), ticks)
    assert not is_alive(os.getpid(), ticks + 1)
    assert not is_alive(0, None)
    assert read_status(tmp_path) is None
