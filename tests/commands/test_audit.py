"""Audits: random samples of filed images, their answers, and what they prove, with and without a daemon."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sortd.commands.audit import SAMPLE_FILE, answer_sample_by_ids, draw_sample, open_sample
from sortd.config import read_config
from sortd.daemon.control import AnsweredError, ask
from sortd.daemon.dataset_lock import APART_FACT
from sortd.errors import DataError
from sortd.layout import JOURNAL_FILE, Layout
from sortd.store.journal import Journal
from tests.command_line import Ran, sortd, write_config
from tests.daemon_process import DaemonProcess, make_dataset, picture, running, teach
from tests.filed_images import file_images

FILED = 12


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset into which twelve images were filed."""
    write_config(tmp_path)
    dataset = make_dataset(tmp_path / "Data")
    file_images(dataset, tmp_path / "state", {f"{n:02}.png": ("red", "blue")[n % 2] for n in range(FILED)})
    return dataset


def run(site: Path, *arguments: object) -> Ran:
    """Run a command with this site's configuration."""
    return sortd(*arguments, "--config", site.parents[1] / "config.yaml")


def state_of(site: Path) -> Path:
    """Return the state folder of the dataset."""
    return Layout(site).state_folder(site.parents[1] / "state")


def audit_facts(site: Path) -> dict[str, Any]:
    """Return what the status says of the audits."""
    facts: dict[str, Any] = run(site, "status", "--json").facts["datasets"]["Colours"]["audit"]
    return facts


class TestSample:
    """What is drawn."""

    def test_sample_is_drawn_from_all_filed_images_and_stays_until_it_is_answered(self, site: Path) -> None:
        """A repetition shows the same images; another size draws others; nothing is moved."""
        drawn = run(site, "audit", "--sample", 5, "--json").facts
        assert (len(drawn["images"]), drawn["unchecked"]) == (5, FILED)
        assert all(Path(one["path"]).is_file() for one in drawn["images"])
        assert run(site, "audit", "Colours", "--json").facts["images"] == drawn["images"]
        samples = {
            tuple(one["id"] for one in run(site, "audit", "--sample", size, "--json").facts["images"])
            for size in (11, 10) * 4
        }
        assert len(samples) == 8  # as good as never twice the same
        assert {one for sample in samples for one in sample} > {one["id"] for one in drawn["images"]}

    def test_sample_leaves_out_what_was_corrected_checked_or_removed(self, site: Path) -> None:
        """Only images whose class nobody has judged are drawn, and only where they still are."""
        assert run(site, "undo", "--last", 1).code == 0
        (site / "Dataset" / "red" / "00.png").unlink()
        sample = run(site, "audit", "--json").facts
        assert sample["unchecked"] == FILED - 1
        assert len(sample["images"]) == FILED - 2
        run(site, "audit", "--all-right")
        assert run(site, "audit").code == 65

    def test_sample_page_shows_each_image_and_how_to_answer(self, site: Path, tmp_path: Path) -> None:
        """A contact sheet in one file; a folder that is not there is refused before anything is drawn."""
        page = tmp_path / "audit.html"
        assert run(site, "audit", "--page", tmp_path / "no" / "a.html").code == 73
        assert not (state_of(site) / SAMPLE_FILE).exists()
        ran = run(site, "audit", "--page", page)
        text = page.read_text(encoding="utf-8")
        assert text.count('src="data:image/jpeg;base64,') == FILED
        assert "sortd audit --dataset Colours --all-right" in text
        assert "at least 77 % (95 % confidence)" in text
        assert str(site / "Dataset" / "red" / "00.png") in ran.out
        assert "http" not in text

    def test_sample_of_a_dataset_without_filed_images_is_refused(self, tmp_path: Path) -> None:
        """There is no journal, or nothing in it."""
        write_config(tmp_path)
        dataset = make_dataset(tmp_path / "Data")
        assert run(dataset, "audit").code == 65
        assert run(dataset, "audit", "--all-right").code == 65

    def test_sample_file_that_is_damaged_counts_as_none(self, site: Path) -> None:
        """Whatever it holds, another sample is drawn."""
        image = {"id": 1, "path": "/a.png", "label": "red", "score": 0.5}
        strange: list[dict[str, object]] = [
            {"id": 1 << 63},
            {"id": 0},
            {"path": "a\0b"},
            {"path": "\ud800"},
            {"label": "\ud800"},
            {"score": "x"},
        ]
        facts = [{"drawn_at": 1, "unchecked": 1, "images": [{**image, **one}]} for one in strange]
        facts += [{"drawn_at": 1, "unchecked": float("inf"), "images": []}]
        written = [json.dumps(one).encode() for one in facts]
        for content in (
            b"",
            b"[]",
            b'{"images": 1}',
            b'{"drawn_at": 1, "unchecked": 1, "images": [{"id": "x"}]}',
            *written,
        ):
            (state_of(site) / SAMPLE_FILE).write_bytes(content)
            assert open_sample(state_of(site)) is None
        assert run(site, "audit", "--all-right").code == 65
        assert run(site, "audit").code == 0


class TestAnswers:
    """What the answers prove, where no sortd runs."""

    def test_answers_count_each_image_of_the_sample_and_state_the_bound(self, site: Path) -> None:
        """The named ones are wrong, one that is gone too, and all others are right; nothing is moved."""
        sample = run(site, "audit", "--json").facts["images"]
        wrong, gone = sample[0]["path"], sample[1]["path"]
        os.unlink(gone)
        (link := site.parents[1] / "link").symlink_to(site)
        ran = run(site, "audit", "--wrong", link / Path(wrong).relative_to(site), "--wrong", wrong, "--json")
        assert ran.code == 0
        assert ran.facts["sample"] == ran.facts["all"]
        assert (ran.facts["all"]["right"], ran.facts["all"]["judged"]) == (FILED - 2, FILED)
        assert (ran.facts["wrong"][0]["path"], ran.facts["gone"]) == (wrong, [gone])
        assert Path(wrong).is_file()
        assert audit_facts(site)["words"] == "at least 56 % (95 % confidence)"
        assert "10 of 12 (95 %: 55 to 95 %) in random samples" in run(site, "status").out

    def test_answers_are_shown_with_what_to_do(self, site: Path) -> None:
        """A person reads which image to move, and what is proven."""
        sample = run(site, "audit", "--json").facts["images"]
        ran = run(site, "audit", "--wrong", sample[0]["path"])
        assert f"wrong: {sample[0]['path']}; move it from {sample[0]['label']} to its class" in ran.out
        assert "in this sample right: 11 of 12 (95 %: 65 to 99 %)" in ran.out
        assert "Colours: at least 66 % (95 % confidence) of the filed images right" in ran.out

    def test_answers_sixty_without_a_mistake_prove_95_per_cent(self, tmp_path: Path) -> None:
        """The default sample is as large as that needs; one image alone proves nothing."""
        write_config(tmp_path)
        dataset = make_dataset(tmp_path / "Data")
        file_images(dataset, tmp_path / "state", {f"{n:03}.png": "red" for n in range(61)})
        assert run(dataset, "audit", "--sample", 1).code == 0
        assert run(dataset, "audit", "--all-right", "--json").facts["all"]["words"] == "too few to say"
        assert len(run(dataset, "audit", "--json").facts["images"]) == 60
        facts = run(dataset, "audit", "--all-right", "--json").facts
        assert facts["sample"]["words"] == "at least 95 % (95 % confidence)"
        assert facts["all"]["judged"] == 61

    def test_answers_about_other_images_are_refused(self, site: Path) -> None:
        """A path outside of the sample changes nothing; options that contradict each other are refused."""
        run(site, "audit", "--sample", 3)
        assert run(site, "audit", "--wrong", site / "Clases" / "red" / "0.png").code == 65
        assert run(site, "audit", "--wrong", "a.png", "--all-right").code == 2
        assert run(site, "audit", "--all-right", "--sample", 3).code == 2
        assert audit_facts(site)["judged"] == 0
        assert open_sample(state_of(site)) is not None

    @pytest.mark.parametrize("is_running", [True, False])
    def test_answers_without_the_disk_of_the_images_are_refused(self, site: Path, *, is_running: bool) -> None:
        """All of them are gone then, which says nothing of their classes."""
        run(site, "audit")
        with Journal(state_of(site) / JOURNAL_FILE) as journal:
            journal.note(APART_FACT, "Dataset")
        (site / "Dataset").rename(site.parent / "away")
        (site / "Dataset").mkdir()
        with running(site.parents[1] / "config.yaml") if is_running else nullcontext():
            ran = run(site, "audit", "--all-right")
        assert (ran.code, "is the disk mounted?" in ran.err) == (78, True)
        assert audit_facts(site)["judged"] == 0

    def test_answers_corrected_image_counts_once_and_is_no_look_at_its_class(self, site: Path) -> None:
        """Moving a wrong image of an audit to its class does not make the rest of its class checked."""
        config = site.parents[1] / "config.yaml"
        run(site, "audit", "--sample", 2)
        sample = run(site, "audit", "--json").facts["images"]
        run(site, "audit", "--wrong", sample[0]["path"])
        (site / "Dataset" / "green").mkdir(exist_ok=True)
        shutil.move(sample[0]["path"], site / "Dataset" / "green")
        with DaemonProcess(config, "once") as daemon:
            assert daemon.wait() == 0
            assert daemon.events("image.corrected", corrected_label="green")
        accuracy = run(site, "status", "--json").facts["datasets"]["Colours"]["accuracy"]
        assert sum(one["checked"] for one in accuracy.values()) == 2
        assert accuracy[sample[0]["label"]]["corrected"] == 1
        assert sum(one["found_wrong"] for one in accuracy.values()) == 0
        assert (audit_facts(site)["right"], audit_facts(site)["judged"]) == (1, 2)


class TestAnswersToDaemon:
    """Answers while a sortd runs: it alone writes the journal."""

    def test_answers_are_recorded_by_the_daemon_and_move_its_threshold(self, tmp_path: Path) -> None:
        """A hundred checked images, a third of them wrong: the next prototypes file only surer images, and say why."""
        config = write_config(tmp_path, mode="best", abstain="{precision: 0.9}", settle_seconds=0.1)
        dataset = make_dataset(tmp_path / "Data")
        teach(dataset)
        for number in range(120):
            picture(("red", "green", "blue")[number % 3], 3000 + number).save(dataset / "Images" / f"{number:03}.png")
        with running(config) as daemon:
            daemon.wait_for("image.filed", count=110)
            before = daemon.events("prototypes.rebuilt")[-1]["least_confidence"]
            sample = run(dataset, "audit", "--sample", 100, "--json").facts["images"]
            assert len(sample) == 100
            wrong = [part for one in sample[:33] for part in ("--wrong", one["path"])]
            assert run(dataset, "audit", *wrong, "--json").facts["all"]["right"] == 67
            after = daemon.wait_for("prototypes.rebuilt", changed=True, checked=100, right_checked=67)
            assert after["least_confidence"] > before
            found = [one["what"] for one in run(dataset, "check", "--json").facts["findings"]]
            assert any("the threshold follows 100 checked images, 67 right" in what for what in found)

    def test_answers_request_that_is_invalid_changes_nothing(self, site: Path) -> None:
        """Whatever a request holds is checked where it is used; unknown moves are skipped."""
        request = {"do": "check", "dataset": "Colours", "root": str(site)}
        state = site.parents[1] / "state"
        with running(site.parents[1] / "config.yaml"):
            for answers in ([[1, 1]], [["1", True]], [1], [[0, True]], [[1 << 63, True]], [[1, True, 2]]):
                with pytest.raises(AnsweredError):
                    ask(state, {**request, "answers": answers})
            assert ask(state, {**request, "answers": [[999, True], [1, False]]}) == {"checked": 1}
        assert audit_facts(site)["judged"] == 1


def test_answers_by_ids_are_those_by_paths(site: Path) -> None:
    """The numbers of the moves name the wrong images; one that was not drawn is refused, and nothing recorded."""
    config = read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"})
    sample = draw_sample(config, Layout(site), 4)
    with pytest.raises(DataError, match="not in the sample"):
        answer_sample_by_ids(config, Layout(site), [sample.images[0]["id"], 999])
    os.unlink(sample.images[1]["path"])
    answered = answer_sample_by_ids(config, Layout(site), [sample.images[0]["id"]])
    assert (answered["sample"]["right"], answered["sample"]["judged"]) == (2, 4)
    assert (answered["wrong"], answered["gone"]) == ([sample.images[0]], [sample.images[1]["path"]])
    assert audit_facts(site)["judged"] == 4
    with pytest.raises(DataError, match="no sample to answer"):
        answer_sample_by_ids(config, Layout(site), [])
