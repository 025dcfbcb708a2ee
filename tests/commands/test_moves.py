"""History tells what was moved; undo takes it back without harm; release lets go; all with and without a daemon."""

import csv
import io
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sortd.commands.moves import journals
from sortd.config import read_config
from sortd.core.guard import GuardState
from sortd.daemon.corrections import record_places
from sortd.daemon.dataset_lock import lock_dataset
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.moving.plan import new_token
from sortd.store.history import History
from sortd.store.records import MoveFile, MoveReason, MoveRecord, Role
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, tree
from tests.filed_images import file_images


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset into which four images were filed, in two runs, and one set aside."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {"a.png": "red", "b.png": "blue"}, run="first")
    file_images(dataset, tmp_path / "state", {"c.png": "red", "d.png": "green", "x.png": "rejected"}, run="second")
    return dataset


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", site.parents[1] / "config.yaml")


def names(ran: Ran) -> list[str]:
    """Return the names of the files in a history, newest first."""
    return [Path(one["from"]).name for one in ran.facts["moves"]]


def damaged_journal(site: Path, name: str) -> None:
    """Make a dataset whose journal is no database."""
    dataset = make_dataset(site.parent, name)
    journal = Layout(dataset).state_folder(site.parents[1] / "state") / "journal.sqlite"
    journal.parent.mkdir(parents=True)
    Layout(dataset).make()
    journal.write_bytes(b"garbage" * 1000)


def standing(site: Path) -> list[str]:
    """Return where files stand outside of Clases/."""
    return [path for path in tree(site) if path.partition("/")[0] in {"Images", "Dataset", "Review", "Rejected"}]


class TestHistory:
    """What history tells."""

    def test_history_is_newest_first_with_reasons(self, site: Path) -> None:
        """Each record has its paths, scores, run and model."""
        ran = run(site, "history", "--json")
        assert names(ran) == ["x.png", "d.png", "c.png", "b.png", "a.png"]
        first = ran.facts["moves"][-1]
        assert first["to"] == str(site / "Dataset" / "red" / "a.png")
        assert (first["outcome"], first["label"], first["score"], first["margin"]) == ("filed", "red", 0.9, 0.25)
        assert (first["run"], first["generation"], first["encoder_id"]) == ("first", 3, "fake-48")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--label", "red"], ["c.png", "a.png"]),
            (["--outcome", "rejected"], ["x.png"]),
            (["--run", "first"], ["b.png", "a.png"]),
            (["--limit", "2"], ["x.png", "d.png"]),
            (["--since", "1h"], ["x.png", "d.png", "c.png", "b.png", "a.png"]),
            (["--until", "1h"], []),
            (["--dataset", "Colours", "--limit", "0"], ["x.png", "d.png", "c.png", "b.png", "a.png"]),
        ],
    )
    def test_history_options_select_records(self, site: Path, options: list[str], expected: list[str]) -> None:
        """Records are selected by class, outcome, run, time and dataset."""
        assert names(run(site, "history", "--json", *options)) == expected

    def test_history_path_selects_by_source_or_destination(self, site: Path) -> None:
        """The old and the new path select the record."""
        assert names(run(site, "history", "--json", "--path", site / "Dataset" / "red" / "a.png")) == ["a.png"]
        assert names(run(site, "history", "--json", "--path", site / "Images" / "a.png")) == ["a.png"]

    def test_history_off_a_terminal_is_tab_separated(self, site: Path) -> None:
        """There is one header and no colour; messages go to stderr."""
        ran = run(site, "history", "--limit", "2")
        header, *lines = ran.out.splitlines()
        assert header.split("\t")[:3] == ["when", "dataset", "outcome"]
        assert [line.split("\t")[4] for line in lines] == ["Rejected/x.png", "Dataset/green/d.png"]
        assert "--limit 0" in ran.err

    def test_history_escapes_names_that_are_not_text(self, site: Path) -> None:
        """Line feeds and undecodable bytes are escaped."""
        odd = os.fsdecode(b"odd\n\xff.png")
        file_images(site, site.parents[1] / "state", {odd: "red"})
        assert "Dataset/red/odd\\n\\xff.png" in run(site, "history", "--limit", "1").out
        assert names(run(site, "history", "--limit", "1", "--json")) == [odd]

    def test_history_with_an_invalid_option_is_a_usage_error(self, site: Path) -> None:
        """A value that is no time, outcome or dataset is a usage error."""
        assert run(site, "history", "--since", "soon").code == 2
        assert run(site, "history", "--outcome", "eaten").code == 2
        assert run(site, "history", "--dataset", "Nowhere").code == 65

    def test_history_of_an_unmounted_dataset_is_shown(self, site: Path) -> None:
        """The journal is in the state directory."""
        site.parent.rename(site.parents[1] / "unmounted")
        ran = run(site, "history", "--json")
        assert len(ran.facts["moves"]) == 5
        assert ran.facts["moves"][0]["to"] == "Rejected/x.png"

    def test_history_journal_that_is_damaged_hides_no_other(self, site: Path) -> None:
        """The other journals are shown, and the damaged one is an error."""
        damaged_journal(site, "Bad")
        ran = run(site, "history", "--json")
        assert ran.code == 74
        assert len(ran.facts["moves"]) == 5
        assert "the journal is damaged" in ran.err

    def test_history_row_without_a_score_is_shown(self, site: Path) -> None:
        """Missing values in a row cause no traceback."""
        with closing(sqlite3.connect(journals(read_config(site.parents[1] / "config.yaml", {}))[0].file)) as connection:
            connection.execute("UPDATE moves SET score = NULL, label = NULL, ended_at = 9e999")
            connection.commit()
        assert run(site, "history").out.count("Images/") == 5
        assert run(site, "status").code == 75  # no daemon runs


class TestUndo:
    """What undo does where no sortd runs."""

    def test_undo_of_a_file_moves_it_back_and_holds_it(self, site: Path) -> None:
        """The file is at its old path and is not filed again."""
        before = (site / "Dataset" / "red" / "a.png").read_bytes()
        ran = run(site, "undo", site / "Dataset" / "red" / "a.png")
        assert ran.code == 0
        assert (site / "Images" / "a.png").read_bytes() == before
        assert not (site / "Dataset" / "red" / "a.png").exists()
        with History.open(journals(read_config(site.parents[1] / "config.yaml", {}))[0].file) as history:
            assert list(history.held()) == ["Images/a.png"]

    def test_undo_of_the_last_moves_or_a_run_moves_them_back(self, site: Path) -> None:
        """The newest are undone first, and a rejected image loses its reason file."""
        assert len(run(site, "undo", "--last", "2", "--json").facts["undone"]) == 2
        assert standing(site) == [
            "Dataset/blue/b.png", "Dataset/red/a.png", "Dataset/red/c.png", "Images/d.png", "Images/x.png",
        ]  # fmt: skip
        run(site, "undo", "--run", "first")
        assert standing(site) == [
            "Dataset/red/c.png", "Images/a.png", "Images/b.png", "Images/d.png", "Images/x.png",
        ]  # fmt: skip

    def test_undo_of_a_time_range_moves_it_back(self, site: Path) -> None:
        """Only moves in the range are undone."""
        assert run(site, "undo", "--until", "1h", "--json").facts["undone"] == []
        assert len(run(site, "undo", "--since", "1h", "--json").facts["undone"]) == 5
        assert standing(site) == [f"Images/{name}.png" for name in "abcdx"]

    def test_undo_dry_run_changes_nothing(self, site: Path) -> None:
        """It prints what would be moved; the tree and the journal are unchanged."""
        before = tree(site.parents[1])
        ran = run(site, "undo", "--since", "1h", "--dry-run", "--json")
        assert len(ran.facts["undone"]) == 5
        assert ran.facts["undone"][-1]["restored"] == str(site / "Images" / "a.png")
        after = tree(site.parents[1])
        assert {name: data for name, data in after.items() if "journal.sqlite" not in name} == {
            name: data for name, data in before.items() if "journal.sqlite" not in name
        }
        assert names(run(site, "history", "--json")) == ["x.png", "d.png", "c.png", "b.png", "a.png"]

    def test_undo_that_moves_nothing_says_so(self, site: Path) -> None:
        """Nothing is held then."""
        (site / "Dataset" / "red" / "a.png").unlink()
        ran = run(site, "undo", site / "Dataset" / "red" / "a.png")
        assert (ran.code, ran.err) == (65, "sortd: no image was moved back\n")

    def test_undo_overwrites_nothing(self, site: Path) -> None:
        """If the old name is taken, the file gets another one."""
        mine = (site / "Dataset" / "red" / "a.png").read_bytes()
        (site / "Images" / "a.png").write_bytes(b"somebody else's")
        (one,) = run(site, "undo", "--json", site / "Dataset" / "red" / "a.png").facts["undone"]
        assert Path(one["restored"]) == site / "Images" / "a (2).png"
        assert Path(one["restored"]).read_bytes() == mine
        assert (site / "Images" / "a.png").read_bytes() == b"somebody else's"

    def test_undo_of_a_changed_file_is_refused(self, site: Path) -> None:
        """A changed file stays; the others are undone; the exit code is 65."""
        (site / "Dataset" / "red" / "a.png").write_bytes(b"retouched")
        (site / "Dataset" / "blue" / "b.png").unlink()
        ran = run(site, "undo", "--since", "1h", "--json")
        assert ran.code == 65
        messages = {Path(one["was"]).name: one["message"] for one in ran.facts["undone"] if one["restored"] is None}
        assert "changed since" in messages["a.png"]
        assert "no longer there" in messages["b.png"]
        assert (site / "Dataset" / "red" / "a.png").read_bytes() == b"retouched"

    def test_undo_twice_undoes_once(self, site: Path) -> None:
        """The second undo finds no move."""
        run(site, "undo", site / "Dataset" / "red" / "a.png")
        ran = run(site, "undo", site / "Dataset" / "red" / "a.png")
        assert ran.code == 65
        assert "the journal has no move" in ran.err

    def test_undo_without_a_selection_is_a_usage_error(self, site: Path) -> None:
        """Exactly one kind of selection is required."""
        assert run(site, "undo").code == 2
        assert run(site, "undo", "--last", "1", "--run", "first").code == 2
        assert run(site, "undo", "/somewhere/else.png").code == 65

    def test_undo_in_a_locked_dataset_is_refused(self, site: Path) -> None:
        """Nothing is moved while another sortd uses the dataset."""
        before = standing(site)
        with lock_dataset(Layout(site), site.parents[1] / "state"):
            ran = run(site, "undo", "--last", "1")
        assert ran.code == 75
        assert "another sortd works on" in ran.err
        assert standing(site) == before

    def test_undo_recovers_interrupted_moves_first(self, site: Path) -> None:
        """The recovered move is reported."""
        with lock_dataset(Layout(site), site.parents[1] / "state") as opened:
            path = site / "Images" / "new.png"
            path.write_bytes(b"an image")
            member = MoveFile(Role.IMAGE, "new.png", "new.png", stamp_of(path.stat()))
            move = MoveRecord(new_token(), "Images", "Dataset/red", (member,))
            opened.journal.intend([(move, MoveReason("filed", "red"))])
            path.rename(site / "Dataset" / "red" / "new.png")
        ran = run(site, "undo", "--last", "1")
        assert ran.code == 0
        assert "first recovered 1 move that a crash had interrupted" in ran.err


def hold_dataset(site: Path) -> None:
    """Let the journal say that the guard holds the dataset because of its second generation."""
    with lock_dataset(Layout(site), site.parents[1] / "state") as opened:
        opened.journal.note_guard(GuardState(1, 2, "all would go to review"))


def guard_of(site: Path) -> GuardState:
    """Return how the guard stands, by the journal."""
    with lock_dataset(Layout(site), site.parents[1] / "state") as opened:
        return opened.journal.history.guard()


class TestRelease:
    """What release does where no sortd runs."""

    def test_release_of_one_or_all_files(self, site: Path) -> None:
        """A released file is decided again; to release one that is not held is an error."""
        run(site, "undo", "--since", "1h")
        assert run(site, "release", site / "Images" / "a.png", "--json").facts["released"] == {"Colours": 1}
        assert run(site, "release", site / "Images" / "a.png").code == 65
        assert run(site, "release", "--all", "--json").facts["released"] == {"Colours": 4}

    def test_release_of_a_file_leaves_a_held_dataset_held(self, site: Path) -> None:
        """The answer reports that the dataset is still held."""
        run(site, "undo", "--since", "1h")
        hold_dataset(site)
        ran = run(site, "release", site / "Images" / "a.png")
        assert ran.out == "Colours: 1 held file released\n"
        assert "the dataset Colours is still held, so nothing in it is moved: all would go to review" in ran.err
        assert guard_of(site).reason

    def test_release_of_a_dataset_leaves_held_files_held(self, site: Path) -> None:
        """Files that are held after an undo stay held."""
        run(site, "undo", "--since", "1h")
        hold_dataset(site)
        ran = run(site, "release", site)
        assert "Colours: the dataset is released" in ran.out
        assert "nothing is held" not in ran.err
        assert guard_of(site) == GuardState(2)
        assert run(site, "release", site).code == 65
        assert run(site, "release", "--all", "--json").facts["released"] == {"Colours": 5}

    def test_release_of_all_reports_files_and_datasets(self, site: Path) -> None:
        """Released files and datasets are reported, or that nothing is held."""
        hold_dataset(site)
        ran = run(site, "release", "--all", "--json")
        assert ran.facts["released"] == {"Colours": 0}
        assert ran.facts["lifted"] == {"Colours": "all would go to review"}
        assert "nothing is held" in run(site, "release", "--all").err

    def test_status_without_a_daemon_shows_the_hold(self, site: Path) -> None:
        """The hold is in the journal."""
        hold_dataset(site)
        assert run(site, "status", "--json").facts["datasets"]["Colours"]["problem"] == "all would go to review"

    def test_check_shows_the_hold(self, site: Path) -> None:
        """The finding names the command that releases the dataset."""
        hold_dataset(site)
        (finding,) = [one for one in run(site, "check", "--json").facts["findings"] if "is held" in one["what"]]
        assert "all would go to review" in finding["what"]
        assert f"sortd release {site}" in finding["mend"]

    def test_release_without_a_selection_is_a_usage_error(self, site: Path) -> None:
        """Either a path or --all is required."""
        assert run(site, "release").code == 2
        assert run(site, "release", "--all", site / "Images" / "a.png").code == 2

    def test_release_dataset_that_cannot_be_opened_keeps_no_other_held(self, site: Path) -> None:
        """The others are released, and the error is reported."""
        assert run(site, "undo", "--last", "1").code == 0
        damaged_journal(site, "Bad")
        ran = run(site, "release", "--all")
        assert ran.code == 74
        assert "the journal is damaged" in ran.err
        assert run(site, "release", "--all", "--dataset", "Colours", "--json").facts["released"] == {"Colours": 0}


class TestWhileRunning:
    """What undo, release and rebuild do while a sortd runs: they ask it."""

    @pytest.fixture
    def daemon(self, tmp_path: Path) -> Iterator[tuple[Path, DaemonProcess]]:
        """A sortd that has filed two images, and its dataset."""
        config = write_config(tmp_path, settle_seconds=0.1, abstain="off", mode="max")
        dataset = make_dataset(tmp_path / "Data")
        picture("red", 1).save(dataset / "Images" / "a.png")
        picture("blue", 2).save(dataset / "Images" / "b.png")
        with running(config) as daemon:
            daemon.wait_for("image.filed", count=2)
            yield dataset, daemon

    def test_requests_are_executed_by_the_running_sortd(self, daemon: tuple[Path, DaemonProcess]) -> None:
        """Undo, release and rebuild take effect in the running process and its log."""
        site, process = daemon
        filed = site / "Dataset" / "red" / "a.png"
        content = filed.read_bytes()
        assert run(site, "undo", filed, "--dry-run").code == 0
        assert filed.exists()
        assert run(site, "undo", filed).code == 0
        assert process.wait_for("move.undone")["destination"] == str(site / "Images" / "a.png")
        assert (site / "Images" / "a.png").read_bytes() == content
        facts = run(site, "status", "--json").facts
        assert facts["running"]
        assert facts["datasets"]["Colours"]["held"] == 1
        assert run(site, "rebuild", "--json").facts["rebuilding"] == ["Colours"]
        process.wait_for("prototypes.rebuilt", count=2)
        assert len(process.events("image.filed")) == 2  # held: neither a hint nor a rebuild moved it
        assert run(site, "release", site / "Images" / "a.png", "--json").facts["released"] == {"Colours": 1}
        process.wait_for("image.filed", count=3)
        assert filed.read_bytes() == content

    def test_request_that_fails_returns_its_error(self, daemon: tuple[Path, DaemonProcess]) -> None:
        """The message and the exit code come from the running process."""
        site, _ = daemon
        ran = run(site, "rebuild", "Other")
        assert ran.code == 65
        assert "the running sortd has no dataset 'Other'" in ran.err


def test_rebuild_without_a_running_sortd_is_an_error(site: Path) -> None:
    """The next start builds the prototypes anyway."""
    ran = run(site, "rebuild")
    assert ran.code == 75
    assert "no sortd runs" in ran.err


def test_history_as_csv_is_read_by_the_csv_module(tmp_path: Path) -> None:
    """Each move is a row under a header, with its names as they are: commas, quotes, newlines and rare blanks."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    names = ['a,"b".png', "two\nlines.png", "at 9.41\u202fAM.png", "cr\r.png"]
    file_images(dataset, tmp_path / "state", dict.fromkeys(names, "red"))
    done = sortd("history", "--format", "csv", "-c", str(tmp_path / "config.yaml"))
    rows = list(csv.DictReader(io.StringIO(done.out, newline="")))
    assert [(row["label"], row["outcome"]) for row in rows] == [("red", "filed")] * 4
    assert sorted(Path(row["to"]).name for row in rows) == sorted(names)


def test_history_as_csv_has_one_header(site: Path) -> None:
    """The columns are the same without a move, and with one that a person made; a limit is told."""
    empty = run(site, "history", "--format", "csv", "--label", "none")
    os.rename(site / "Dataset/red/a.png", site / "Dataset/blue/a.png")
    with lock_dataset(Layout(site), site.parents[1] / "state") as opened:
        record_places(Layout(site), opened.journal, [str(site / "Dataset/blue/a.png")])
    some = run(site, "history", "--format", "csv", "--limit", "2")
    assert len(empty.out.splitlines()) == 1
    assert len(some.out.splitlines()) == 3
    assert some.out.splitlines()[0] == empty.out.splitlines()[0]
    assert "--limit 0 shows all" in some.err
