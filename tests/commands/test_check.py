"""The check says what is so, and what to mend, without a model and without touching what is not its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sortd.classify.build import build
from sortd.classify.calibration import Calibration
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.commands.check import check_all, machine_findings, watching_findings
from sortd.commands.check_dataset import calibration_findings, link_findings, move_findings, name_findings
from sortd.commands.evaluation import evaluate_datasets
from sortd.commands.findings import Finding, Severity, Topic, error, exit_code, note, warning
from sortd.config import Config, read_config
from sortd.daemon.dataset_lock import lock_dataset
from sortd.events import Mode
from sortd.layout import MARKER, Area, Layout
from sortd.service import lock_holder
from sortd.store.cache import PrototypeFiles
from sortd.store.journal import Journal
from sortd.watch import inotify
from tests.command_line import sortd
from tests.daemon_process import make_dataset, picture, tree
from tests.fake_encoder import FakeEncoder
from tests.made_features import support_set
from tests.prototype_maker import make_prototypes
from tests.tiny_words import build_tiny_words, distil

Findings = list[Finding]
Check = Callable[..., Findings]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A whole, healthy dataset, with every folder and the marker."""
    dataset = make_dataset(tmp_path / "Data")
    Layout(dataset).make()
    return dataset


@pytest.fixture
def look(tmp_path: Path) -> Check:
    """Check ``Data`` below the temporary folder."""

    def look(text: str = "", *, environment: Mapping[str, str] | None = None) -> Findings:
        file = tmp_path / "config.yaml"
        file.write_text(f"root: Data\nstate_dir: state\ncache_dir: cache\nmode: max\n{text}", encoding="utf-8")
        return list(check_all(file, {"HOME": str(tmp_path), **(environment or {})}))

    return look


def config_of(tmp_path: Path) -> Config:
    """Return the configuration that ``look`` uses."""
    return read_config(None, {"HOME": str(tmp_path), "SORTD_ROOT": str(tmp_path / "Data")})


def about(findings: Findings, topic: Topic, *words: str, severity: Severity | None = None) -> Findings:
    """Return the findings on a topic that hold all of these words."""
    return [
        one
        for one in findings
        if one.topic in {topic, None}  # None: a check that was called by itself
        and (severity is None or one.severity is severity)
        and all(word in f"{one.subject} {one.what} {one.mend}" for word in words)
    ]


def bad(findings: Findings) -> Findings:
    """Return what is worse than a note, but for the model, which a checkout may not have yet."""
    return [one for one in findings if one.severity is not Severity.NOTE and one.topic is not Topic.MODEL]


class TestTextModel:
    """A separate text model is compared with its CLIP."""

    @pytest.mark.usefixtures("site")
    def test_check_text_model_of_another_space_is_an_error(self, look: Check, tmp_path: Path, tiny_clip: Path) -> None:
        """Equal dimensions are not enough; a text model that was distilled from the CLIP fits it."""
        words = build_tiny_words(tmp_path / "words")
        config = f"model: {tiny_clip}\ntext_model: {words}\n"
        (finding,) = about(look(config), Topic.MODEL, "text_model", severity=Severity.ERROR)
        assert "do not share a space" in finding.what
        distil(words, tiny_clip)
        assert about(look(config), Topic.MODEL, "shares the space", severity=Severity.NOTE)
        assert not about(look(config), Topic.MODEL, severity=Severity.ERROR)


class TestDecoders:
    """Whether every format that sortd reads can be decoded here."""

    def test_check_with_all_decoders_reports_nothing(self) -> None:
        """All of them come with sortd."""
        assert list(machine_findings(config_of(Path("/")), [])) == []

    def test_check_without_a_decoder_reports_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Photos that nothing can decode would stay in Images/ with no more than a line of the log."""
        monkeypatch.setitem(sys.modules, "pillow_heif", None)  # imports of it fail from now on
        (finding,) = machine_findings(config_of(Path("/")), [])
        assert (finding.severity, finding.mend) == (Severity.ERROR, "install its decoder: pip install pillow-heif")
        assert "HEIC cannot be decoded here" in finding.what


class TestWhole:
    """What a check does as a whole."""

    def test_check_description_that_cannot_be_read_is_an_error(self, site: Path, look: Check) -> None:
        """A linked ``class.txt`` is not followed; a finding names it, and the check continues."""
        (site / "Clases" / "red" / "class.txt").symlink_to("/etc/passwd")
        findings = look()
        assert about(findings, Topic.REFERENCES, "red/class.txt", severity=Severity.ERROR)
        assert about(findings, Topic.CALIBRATION)

    def test_check_link_loops_are_looked_at_like_other_links(self, site: Path, look: Check) -> None:
        """One in each area, in a class, beside the datasets and in the marker: no traceback, and the rest is told."""
        for folder in (
            *(site / area.value for area in Area),
            site / "Clases" / "red",
            site,
            site.parent,
            site / MARKER,
        ):
            (folder / "loop").symlink_to("loop")
        findings = look()
        assert not [one for one in bad(findings) if one.severity is Severity.ERROR]
        assert about(findings, Topic.CALIBRATION)

    @pytest.mark.parametrize("name", [".sortd", ".sortd/lock"])
    def test_check_link_in_the_place_of_what_is_sortds_is_an_error(self, site: Path, look: Check, name: str) -> None:
        """It keeps the dataset from being worked on."""
        (site / name).rename(site.parent / "aside") if (site / name).exists() else None
        (site / name).symlink_to(site.parent / "aside")
        (finding,) = about(look(), Topic.FOLDERS, str(site / name), severity=Severity.ERROR)
        assert "nothing is moved" in finding.what

    def test_check_damaged_journal_is_an_error_with_advice(self, site: Path, look: Check, tmp_path: Path) -> None:
        """Before any sortd runs into it."""
        with lock_dataset(Layout(site), tmp_path / "state") as opened:
            journal = opened.journal.path
            opened.journal.note("any", "fact")
        assert not about(look(), Topic.PROCESS, "journal", severity=Severity.ERROR)
        journal.write_bytes(b"garbage" * 1000)
        assert about(look(), Topic.PROCESS, str(journal), "is damaged", "move it aside", severity=Severity.ERROR)

    @pytest.mark.usefixtures("site")
    def test_check_of_a_healthy_dataset_has_only_notes(self, look: Check) -> None:
        """Folders without a problem give notes only."""
        assert bad(look()) == []
        assert about(look(), Topic.FILE_SYSTEM, "renames within one file system")

    @pytest.mark.usefixtures("site")
    def test_check_changes_nothing(self, look: Check, tmp_path: Path) -> None:
        """The tree is the same before and after: no test file, no new folder, no lock."""
        (tmp_path / "config.yaml").touch()
        look()
        before = tree(tmp_path)
        folders = sorted(path for path in tmp_path.rglob("*") if path.is_dir())
        look()
        assert tree(tmp_path) == before
        assert sorted(path for path in tmp_path.rglob("*") if path.is_dir()) == folders
        assert not (tmp_path / "state").exists()
        assert not (tmp_path / "cache").exists()

    @pytest.mark.usefixtures("site")
    def test_check_of_an_invalid_configuration_reports_each_mistake(self, look: Check) -> None:
        """Each mistake is an error with its position, and nothing else is checked."""
        findings = look("settle_seconds: never\nspeed: 3\n")
        assert [one.topic for one in findings] == [Topic.CONFIGURATION] * 2
        assert "config.yaml:5:" in findings[0].what
        assert exit_code(findings) == 78

    @pytest.mark.usefixtures("site")
    def test_check_misspelt_dataset_name_suggests_another(self, look: Check) -> None:
        """Settings for a missing dataset name the dataset that may be meant."""
        assert about(look("datasets: {Colors: {mode: avg}}\n"), Topic.CONFIGURATION, "did you mean Colours?")

    @pytest.mark.parametrize(
        "place",
        [
            *("Data", "Data/loop", "Data/Colours/Images", "Data/Colours/Images/loop", "Data/Colours/Images/sub/loop"),
            *("Data/Colours/Clases", "Data/Colours/Clases/loop", "Data/Colours/Clases/red/loop.png"),
            *("Data/Colours/Dataset", "Data/Colours/Dataset/loop", "Data/Colours/Review/loop", "Data/Colours/Rejected"),
            *("Data/Colours/.sortd", "Data/Colours/.sortd/lock", "Data/Colours/Clases/red/class.txt"),
            *("state", "state/journal", "cache", "cache/embeddings.sqlite", "cache/prototypes", "metrics"),
        ],
    )
    def test_check_with_a_link_loop_anywhere_goes_on_to_its_end(
        self, site: Path, look: Check, tmp_path: Path, place: str
    ) -> None:
        """A link to itself is one finding, or none; every other check is made."""
        path = tmp_path / place
        if path.is_dir():
            path.rename(tmp_path / "moved away")
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(path.name)
        findings = look("metrics: {textfile: metrics/sortd.prom}\n")
        assert about(findings, Topic.MACHINE) or about(findings, Topic.MODEL)
        assert about(findings, Topic.CONFIGURATION) == []
        assert not Layout(site).is_dataset or about(findings, Topic.REFERENCES)

    def test_exit_code_follows_the_topics_of_errors(self) -> None:
        """78 for folders and configuration, 69 for the model alone, 65 for references alone, 0 for warnings."""
        wrong = error("a", "b", topic=Topic.FOLDERS)
        model, data = replace(wrong, topic=Topic.MODEL), replace(wrong, topic=Topic.REFERENCES)
        assert exit_code([wrong, model, data]) == 78
        assert exit_code([model, data]) == 69
        assert exit_code([data]) == 65
        assert exit_code([warning("a", "b", topic=Topic.FOLDERS), note("a", "b", topic=Topic.MODEL)]) == 0


class TestFolders:
    """What is said about folders and rights."""

    def test_check_missing_root_is_an_error(self, look: Check) -> None:
        """A root that does not exist is one error."""
        (finding,) = about(look(), Topic.FOLDERS, severity=Severity.ERROR)
        assert finding.what == "is missing"

    def test_check_root_without_datasets_is_a_warning(self, tmp_path: Path, look: Check) -> None:
        """An empty root is no error, since datasets can be added later."""
        (tmp_path / "Data").mkdir()
        (finding,) = bad(look())
        assert finding.severity is Severity.WARNING
        assert "sortd init" in finding.mend

    def test_check_root_that_is_a_dataset_is_an_error(self, tmp_path: Path, look: Check) -> None:
        """The finding names the folder above, which is the right root."""
        (tmp_path / "Data" / "Clases").mkdir(parents=True)
        (finding,) = about(look(), Topic.FOLDERS, "is itself a dataset")
        assert finding.mend == f"set `root` to {tmp_path}, with every dataset directly in it"

    def test_check_root_inside_a_dataset_is_an_error(self, tmp_path: Path, look: Check) -> None:
        """Datasets in another dataset's Images/ would be sorted by it."""
        (tmp_path / "Clases").mkdir()
        (tmp_path / "Data").mkdir()
        assert about(look(), Topic.FOLDERS, f"lies inside the dataset {tmp_path}", severity=Severity.ERROR)

    @pytest.mark.parametrize("area", list(Area))
    def test_check_linked_area_is_an_error(self, site: Path, look: Check, tmp_path: Path, area: Area) -> None:
        """Nothing is moved through a symbolic link."""
        (site / area).rename(tmp_path / "elsewhere")
        (site / area).symlink_to(tmp_path / "elsewhere")
        assert about(look(), Topic.FOLDERS, str(site / area), "symbolic link", severity=Severity.ERROR)

    def test_check_file_in_place_of_a_folder_is_an_error(self, site: Path, look: Check) -> None:
        """The folder cannot be created then."""
        (site / "Review").rmdir()
        (site / "Review").touch()
        assert about(look(), Topic.FOLDERS, str(site / "Review"), "is no folder", severity=Severity.ERROR)

    def test_check_linked_classes_and_datasets_are_warnings(self, site: Path, look: Check, tmp_path: Path) -> None:
        """Links to classes and datasets are not used, and reported."""
        (site / "Clases" / "linked").symlink_to(site / "Clases" / "red")
        (tmp_path / "Data" / "Other").symlink_to(site)
        findings = look()
        assert about(findings, Topic.FOLDERS, "Clases/linked", "no class", severity=Severity.WARNING)
        assert about(findings, Topic.FOLDERS, "Data/Other", "not used as a dataset", severity=Severity.WARNING)

    def test_check_dataset_inside_a_dataset_is_a_warning(self, site: Path, look: Check) -> None:
        """Its references would be sorted like new images, or ignored."""
        for place in ("Images/Inner", "Inner"):
            (site / place / "Clases").mkdir(parents=True)
            what = f"lies inside the dataset {site}"
            assert about(look(), Topic.FOLDERS, str(site / place), what, severity=Severity.WARNING)

    @pytest.mark.parametrize("key", ["state_dir", "cache_dir"])
    def test_check_own_folder_inside_a_dataset_is_an_error(self, site: Path, look: Check, key: str) -> None:
        """A journal in Images/ would be treated as a file to sort."""
        findings = look(environment={f"SORTD_{key.upper()}": str(site / "Images" / "own")})
        assert about(findings, Topic.FOLDERS, f"`{key}` lies inside", severity=Severity.ERROR)
        assert exit_code(findings) == 78

    @pytest.mark.usefixtures("site")
    def test_check_file_in_place_of_an_own_folder_is_an_error(self, look: Check, tmp_path: Path) -> None:
        """The folder cannot be created."""
        (tmp_path / "state").touch()
        assert about(look(), Topic.FOLDERS, "`state_dir` cannot be a folder", severity=Severity.ERROR)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything; see the test that changes its user")
    def test_check_folder_without_write_permission_is_an_error(self, site: Path, look: Check) -> None:
        """The finding has the folder's path."""
        (site / "Dataset").chmod(0o555)
        assert about(look(), Topic.FOLDERS, str(site / "Dataset"), "may not", severity=Severity.ERROR)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_check_permissions_are_those_of_the_calling_user(self, site: Path, public_folder: Path) -> None:
        """For a user without permissions, every folder of another user is an error."""
        site = site.rename(public_folder / site.name)
        (site / "Clases" / "red").chmod(0o700)
        code = (
            "import os, sys; from pathlib import Path\n"
            "from sortd.commands.check_dataset import class_folder_findings, folder_findings\n"
            "from sortd.layout import Layout; os.setuid(65534)\n"
            "layout = Layout(Path(sys.argv[1]))\n"
            "for check in (folder_findings, class_folder_findings):\n"
            "    for one in check(None, layout): print(one.severity.value, one.subject)"
        )
        told = subprocess.run(
            [sys.executable, "-c", code, str(site)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout.splitlines()
        assert f"error {site / 'Images'}" in told
        assert f"error {site / 'Clases' / 'red'}" in told
        assert f"error {site / '.sortd'}" in told
        assert f"error {site / 'Clases'}" not in told

    def test_check_folders_of_a_renamed_class_are_notes(self, site: Path, look: Check) -> None:
        """Folders with files of a class that no longer exists are reported; empty ones and Review/_none are not."""
        folders = "Dataset/red", "Review/red", "Dataset/green", "Review/_none", "Dataset/mauve"
        for folder in folders:
            (site / folder).mkdir(parents=True)
        for folder in folders[:-1]:
            picture("red", 1).save(site / folder / "a.png")
        assert not about(look(), Topic.FOLDERS, "Clases/ does not have")
        (site / "Clases" / "red").rename(site / "Clases" / "scarlet")
        told = about(look(), Topic.FOLDERS, "holds 1 file of a class that Clases/ does not have")
        assert [one.subject for one in told] == [str(site / "Dataset" / "red"), str(site / "Review" / "red")]


class TestDisks:
    """What is said about disks, clocks and watching."""

    def test_check_refused_rename_is_a_note(self, site: Path, tmp_path: Path) -> None:
        """Where a rename is refused, moves are copies, which the note explains."""

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        (finding,) = move_findings(config_of(tmp_path), Layout(site), rename=refuse)
        assert "Dataset/, Review/, Rejected/ is refused" in finding.what
        assert finding.severity is Severity.NOTE
        assert list((site / "Images").iterdir()) == []

    def test_check_hard_links_within_one_file_system_have_no_finding(self, site: Path, tmp_path: Path) -> None:
        """The trial leaves nothing behind, and other actions need none."""
        linked = config_of(tmp_path).model_copy(update={"action": "hardlink"})
        before = sorted(site.rglob("*"))
        assert list(link_findings(linked, Layout(site))) == []
        assert sorted(site.rglob("*")) == before

    def test_check_mounted_area_is_found_by_a_rename(self, site: Path, tmp_path: Path) -> None:
        """Dataset/ on another file system is found by the rename that fails, not by st_dev."""
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "none", site / "Dataset"], check=False).returncode
        ):
            pytest.skip("mounting is not allowed here")
        try:
            (finding,) = move_findings(config_of(tmp_path), Layout(site))
            assert "into Dataset/ is refused" in finding.what
            linked = config_of(tmp_path).model_copy(update={"action": "hardlink"})
            (finding,) = link_findings(linked, Layout(site))
            assert "a hard link from Images/ is impossible there" in finding.what
            assert finding.severity is Severity.ERROR
        finally:
            subprocess.run(["umount", site / "Dataset"], check=True)

    def test_check_wrong_clock_is_a_warning(self, tmp_path: Path) -> None:
        """History and undo by time depend on the clock."""
        assert [one.severity for one in machine_findings(config_of(tmp_path), [], clock=lambda: 0.0)] == [
            Severity.WARNING
        ]
        assert list(machine_findings(config_of(tmp_path), [], clock=lambda: 1.8e9)) == []

    def test_check_too_few_watches_name_the_setting(self, site: Path, tmp_path: Path) -> None:
        """More folders than watches is an error that names the sysctl; more than half of them a warning."""

        def watched(granted: int) -> Findings:
            limits = inotify.Limits(granted, 128)
            return list(watching_findings(config_of(tmp_path), [Layout(site)], granted=limits))

        assert about(watched(2), Topic.WATCHING, "sysctl -w fs.inotify.max_user_watches", severity=Severity.ERROR)
        assert about(watched(12), Topic.WATCHING, severity=Severity.WARNING)
        assert watched(1000) == []

    def test_check_polled_root_is_a_note(self, site: Path, tmp_path: Path) -> None:
        """Polling is slower, so it is reported."""
        polled = config_of(tmp_path).model_copy(update={"polling": "always"})
        (finding,) = watching_findings(polled, [Layout(site)], granted=inotify.Limits(1, 1))
        assert "is polled" in finding.what


class TestReferences:
    """What is said about the references."""

    def test_check_unreadable_reference_is_a_warning(self, site: Path, look: Check) -> None:
        """A broken image is reported; a text file next to it is no reference."""
        whole = (site / "Clases" / "red" / "0.png").read_bytes()
        (site / "Clases" / "red" / "torn.png").write_bytes(whole[: len(whole) // 2])
        (site / "Clases" / "red" / "notes.txt").write_text("bought in May", encoding="utf-8")
        (finding,) = bad(look())
        assert finding.severity is Severity.WARNING
        assert finding.subject.endswith("red/torn.png")

    def test_check_of_references_that_are_left_out_names_them(self, site: Path, look: Check) -> None:
        """A linked, a hidden and an unfinished reference teach nothing, and nobody would notice otherwise."""
        red = site / "Clases" / "red"
        (red / "link.png").symlink_to(red / "0.png")
        for name in (".facebook_1.jpg", "half.png.part", "Thumbs.db"):
            (red / name).touch()
        found = {one.what for one in about(look(), Topic.REFERENCES, "not used", severity=Severity.WARNING)}
        assert found == {
            "1 entry not used as references (symbolic link): red/link.png",
            "1 entry not used as references (hidden): red/.facebook_1.jpg",
            "1 entry not used as references (unfinished): red/half.png.part",
        }

    def test_check_classes_with_few_or_no_images_are_warnings(self, site: Path, look: Check) -> None:
        """The classes are listed by name, with the effect under the mode."""
        (site / "Clases" / "empty").mkdir()
        (site / "Clases" / "lonely").mkdir()
        picture("red", 7).save(site / "Clases" / "lonely" / "one.png")
        findings = look()
        assert about(findings, Topic.REFERENCES, "`mode: max` files nothing there: empty", severity=Severity.WARNING)
        assert about(findings, Topic.REFERENCES, "lonely (1)", severity=Severity.WARNING)
        named = look(environment={"SORTD_MODE": "mixed"})
        assert about(named, Topic.REFERENCES, "known only by name: empty")

    def test_check_image_in_two_classes_is_a_warning(self, site: Path, look: Check) -> None:
        """Equal files in two classes contradict each other; within one class they do no harm."""
        whole = (site / "Clases" / "red" / "0.png").read_bytes()
        (site / "Clases" / "red" / "again.png").write_bytes(whole)
        assert bad(look()) == []
        (site / "Clases" / "blue" / "twin.png").write_bytes(whole)
        (finding,) = bad(look())
        assert "is a reference of 2 classes (blue, red)" in finding.what

    def test_check_few_strangers_are_a_warning(self, site: Path, look: Check) -> None:
        """Too few examples of what belongs to no class are reported."""
        (site / "Clases" / "_none").mkdir()
        picture("red", 8).save(site / "Clases" / "_none" / "one.png")
        (finding,) = bad(look())
        assert "_none" in finding.subject

    def test_check_invalid_or_similar_class_names_are_warnings(self, site: Path, look: Check) -> None:
        """Control characters are not allowed in a name; Red and red are one folder on other systems."""
        (site / "Clases" / "new\nline").mkdir()
        (site / "Clases" / "Red").mkdir()
        picture("red", 9).save(site / "Clases" / "Red" / "0.png")
        findings = look()
        assert about(findings, Topic.REFERENCES, "names cannot be classes: new\\nline")
        assert about(findings, Topic.REFERENCES, "look the same: Red, red")

    def test_check_class_names_with_invisible_blanks_are_warnings(self, site: Path, look: Check) -> None:
        """Such names are quoted; names that differ only in blanks look the same."""
        for name in ("a  b ", "a b", "  "):
            (site / "Clases" / name).mkdir()
        findings = look()
        assert about(findings, Topic.REFERENCES, "with a blank at an end", "'a  b '")
        assert about(findings, Topic.REFERENCES, "look the same: 'a  b ', a b")
        assert about(findings, Topic.REFERENCES, "names cannot be classes:   ")

    def test_check_dataset_without_a_class_is_an_error(self, tmp_path: Path, look: Check) -> None:
        """Nothing can be decided, and the exit code is that of bad data."""
        (tmp_path / "Data" / "Empty" / "Clases").mkdir(parents=True)
        Layout(tmp_path / "Data" / "Empty").make()
        findings = [one for one in look() if one.topic is not Topic.MODEL]
        assert about(findings, Topic.REFERENCES, "holds no class", severity=Severity.ERROR)
        assert exit_code(findings) == 65

    @pytest.mark.usefixtures("site")
    def test_check_without_time_to_decode_reads_headers(self, tmp_path: Path) -> None:
        """The note has the number of references of which only headers were read."""
        findings = list(
            check_all(None, {"HOME": str(tmp_path), "SORTD_ROOT": str(tmp_path / "Data")}, decoding_seconds=0.0)
        )
        assert about(findings, Topic.REFERENCES, "of 12 the headers read")


class TestCalibration:
    """What the last rebuild found out is told without a model."""

    def test_check_calibration_that_cannot_be_met_is_a_warning(self, site: Path, tmp_path: Path) -> None:
        """The notes of the calibration, and a low share of filed images, are warnings."""
        facts = Calibration(held_out=12, precision_expected=0.9, filed_expected=0.3, notes=("precision 0.99 is asked",))
        own = config_of(tmp_path).dataset("Colours")
        found = list(calibration_findings(Layout(site), own, make_prototypes(site, calibration=facts)))
        assert about(found, Topic.CALIBRATION, "precision 0.99 is asked", severity=Severity.WARNING)
        assert about(found, Topic.CALIBRATION, "only 30.0 % of", severity=Severity.WARNING)
        assert about(found, Topic.CALIBRATION, "a precision of 90.0 % of 4 (95 %: ", severity=Severity.NOTE)

    def test_check_dataset_unread_names_are_a_warning(self, site: Path) -> None:
        """The remedy names both ways out."""
        rows = np.eye(8, dtype=np.float32)
        classes = np.repeat(np.arange(8), 3)
        support = support_set(rows[classes], classes, text=np.roll(rows, 1, axis=0), text_mean=rows.mean(axis=0))
        unread = build(support, DecisionSettings(Mode.MIXED), generation=1)
        (finding,) = name_findings(Layout(site), unread)
        assert finding.severity is Severity.WARNING
        assert "the model does not read the class names: by its name alone 0.0 % of 24 references" in finding.what
        assert "class.txt" in finding.mend
        assert "text_model" in finding.mend
        read = build(replace(support, text=rows), DecisionSettings(Mode.MIXED), generation=1)
        assert not list(name_findings(Layout(site), read))

    @pytest.mark.usefixtures("site")
    def test_check_dataset_without_calibration_is_a_note(self, look: Check, tmp_path: Path) -> None:
        """Before the first run the accuracy is not known, and the summary says so."""
        assert about(look(), Topic.CALIBRATION, "has not been calibrated yet")
        ran = sortd("check", "-c", tmp_path / "config.yaml")
        assert ran.code == 0
        assert "the accuracy of 1 dataset is not known" in ran.out
        assert "no problem found\n" not in ran.out

    @pytest.mark.usefixtures("site")
    def test_check_after_eval_reports_its_calibration(self, look: Check, tmp_path: Path) -> None:
        """The accuracy that `sortd eval` measured is reported."""
        look()
        config = read_config(tmp_path / "config.yaml", {"HOME": str(tmp_path)})
        assert list(evaluate_datasets(config, load_encoder=lambda _: FakeEncoder()))
        told = about(look(), Topic.CALIBRATION)
        assert not about(told, Topic.CALIBRATION, "not been calibrated yet")
        assert about(told, Topic.CALIBRATION, "the last `sortd eval`")

    @pytest.mark.parametrize("change", ["added", "removed", "rewritten", "class", "renamed", "described", "settings"])
    def test_check_after_a_change_reports_no_old_calibration(
        self, site: Path, look: Check, tmp_path: Path, change: str
    ) -> None:
        """An older generation's calibration does not hold for other references or settings."""
        poor = Calibration(held_out=12, precision_expected=0.9, filed_expected=0.1, notes=("precision 0.99 is asked",))
        files = PrototypeFiles(tmp_path / "cache" / "prototypes", pytest.fail)
        settings = DecisionSettings(Mode.MAX, AbstainSettings())
        files.write(Layout(site).key, make_prototypes(site, settings, calibration=poor))
        assert about(look(), Topic.CALIBRATION, "only 10.0 % of", severity=Severity.WARNING)
        red = site / "Clases" / "red"
        match change:
            case "added":
                picture("red", 77).save(red / "more.png")
            case "removed":
                (red / "0.png").unlink()
            case "rewritten":
                picture("red", 78).save(red / "0.png")
                os.utime(red / "0.png", ns=(2**62, 2**62))
            case "class":
                (site / "Clases" / "mauve").mkdir()
            case "renamed":
                red.rename(red.with_name("scarlet"))
            case "described":
                (red / "class.txt").write_text("something red")
                os.utime(red / "class.txt", ns=(2**62, 2**62))
        found = look("abstain: off\n" if change == "settings" else "")
        (told,) = about(found, Topic.CALIBRATION)
        what = "settings (mode or abstain)" if change == "settings" else "references"
        assert told.what == f"the {what} have changed since generation 1: the accuracy is not known"

    def test_check_files_that_are_no_references_are_no_change(self, site: Path, look: Check, tmp_path: Path) -> None:
        """A text file, a truncated image and a duplicate of a reference change no calibration."""
        files = PrototypeFiles(tmp_path / "cache" / "prototypes", pytest.fail)
        files.write(Layout(site).key, make_prototypes(site, DecisionSettings(Mode.MAX, AbstainSettings())))
        red = site / "Clases" / "red"
        (red / "notes.txt").write_text("no image")
        (red / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
        (red / "again.png").write_bytes((red / "0.png").read_bytes())
        assert not about(look(), Topic.CALIBRATION, "have changed")


class TestProcesses:
    """What is said about other processes."""

    def test_check_another_sortd_is_found_by_its_lock(self, site: Path, look: Check, tmp_path: Path) -> None:
        """The finding has the pid of the process that holds the lock."""
        layout = Layout(site)
        assert lock_holder(layout.marker / "lock") is None
        Journal(layout.state_folder(tmp_path / "other") / "journal.sqlite").close()
        with lock_dataset(layout, tmp_path / "other"):
            assert lock_holder(layout.marker / "lock") == os.getpid()
            assert about(look(), Topic.PROCESS, f"pid {os.getpid()}", severity=Severity.WARNING)
        assert about(look(), Topic.PROCESS, "pid") == []


class TestModel:
    """What is said about the model."""

    @pytest.mark.usefixtures("site")
    def test_check_missing_model_is_an_error(self, look: Check) -> None:
        """The finding says how to get the model, and nothing is downloaded."""
        findings = look("model: openai/clip-vit-large-patch14\n")
        (finding,) = about(findings, Topic.MODEL, severity=Severity.ERROR)
        assert "sortd models fetch openai/clip-vit-large-patch14" in finding.what
        assert exit_code(findings) == 69


@pytest.mark.usefixtures("site")
def test_check_json_is_one_object(look: Check, tmp_path: Path) -> None:
    """``--json`` prints one object with the findings, and torch is never imported."""
    look()
    code = (
        "import sys; from sortd.cli import app\n"
        "try: app(['check', '--json', '-c', sys.argv[1]])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HOME": str(tmp_path)},
    )
    facts = json.loads(told.stdout)
    assert set(facts) == {"command", "schema", "errors", "warnings", "findings"}
    assert set(facts["findings"][0]) == {"severity", "topic", "subject", "what", "mend"}
    assert told.stderr.split()[-1] == "False"
