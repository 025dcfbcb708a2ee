"""Pages are one file each: whole, escaped, and with every picture inside."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sortd.classify.evaluate import evaluate
from sortd.classify.explain import explain
from sortd.classify.types import SupportSet
from sortd.commands.evaluation import (
    DatasetEvaluation,
    check_page_path,
    evaluate_datasets,
    evaluation_page,
    evaluation_sentences,
    write_page,
)
from sortd.commands.explain import ImageExplanation, explain_page
from sortd.commands.status import settings_with_corrections
from sortd.config import read_config
from sortd.errors import DataError, DestinationError, JournalError
from sortd.layout import Layout
from sortd.store.journal import Journal
from sortd.store.records import Selection
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset, picture
from tests.fake_encoder import FakeEncoder
from tests.filed_images import file_images
from tests.prototype_maker import make_prototypes

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
VOID = {"meta", "img", "br", "line", "polyline", "circle", "link", "hr"}


class Page(HTMLParser):
    """What a page holds; a tag that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        """Read it."""
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.addresses += [value or "" for name, value in attributes if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close it."""
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep what is read by people."""
        if self.open[-1:] != ["style"]:
            self.text += data


def noisy_support(folder: Path, classes: int = 4, references: int = 8) -> SupportSet:
    """Return a support set of overlapping classes, so that there are mistakes to show; one reference is in two."""
    random = np.random.default_rng(3)
    middles = random.normal(size=(classes, 24))
    labels = tuple(f"class {index}" for index in range(classes))
    numbers = np.repeat(np.arange(classes), references)
    rows = middles[numbers] + 1.6 * random.normal(size=(len(numbers), 24))
    rows[references] = rows[0]
    return SupportSet(
        labels=labels,
        embeddings=(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32),
        classes=numbers,
        sources=tuple(str(folder / f"{index}.png") for index in range(len(numbers))),
        encoder_id="noise",
    )


def facts_of(folder: Path, **sizes: int) -> dict[str, Any]:
    """Return the facts of an evaluation with mistakes in it."""
    serving = {"deciding": "prototypes", "model_id": None, "refusal": None}
    return DatasetEvaluation(
        "Noise", folder, evaluate(noisy_support(folder, **sizes)), (), serving, "clip-ViT-B-32"
    ).facts()


def explained(dataset: Path, name: str = "it.png") -> dict[str, Any]:
    """Return the facts of an explanation, as ``explain`` gives them."""
    prototypes = make_prototypes(dataset)
    found = explain(prototypes, prototypes.references[0])
    return ImageExplanation(str(dataset / name), "Colours", "00", found, is_stored=True, records=()).facts()


class TestExplainPage:
    """The page of one decision."""

    def test_explain_page_is_complete_and_loads_nothing(self, tmp_path: Path) -> None:
        """Every tag is closed, every picture inside, nothing comes from elsewhere."""
        dataset = make_dataset(tmp_path)
        page = Page(explain_page(explained(dataset), now=NOW))
        assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
        assert len(page.addresses) == 5
        assert "Nearest references" in page.text
        assert "cannot be shown" in page.text  # the image itself is not there

    def test_explain_page_escapes_names(self, tmp_path: Path) -> None:
        """A file or a class named like a tag is shown, not obeyed; bytes that are no text are escaped."""
        dataset = make_dataset(tmp_path)
        (dataset / "Clases" / "blue").rename(dataset / "Clases" / "<script>alert(1)")
        text = explain_page(explained(dataset, "<img src=x onerror=alert(1)>\udcff\n.png"), now=NOW)
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "\\xff\\n.png" in Page(text).text

    def test_explain_page_has_light_and_dark_colours(self, tmp_path: Path) -> None:
        """Light and dark, small and large screens."""
        text = explain_page(explained(make_dataset(tmp_path)), now=NOW)
        assert "prefers-color-scheme: dark" in text
        assert "width=device-width" in text


class TestEvaluationPage:
    """The page of an evaluation."""

    def test_evaluation_page_shows_all_parts(self, tmp_path: Path) -> None:
        """Advice, modes, curve, classes, matrix and suspects, well formed."""
        facts = facts_of(tmp_path)
        text = evaluation_page({"Noise": facts}, now=NOW)
        page = Page(text)
        for title in ("Advice", "Modes", "Classes", "Confusion matrix", "Suspect references"):
            assert title in page.text
        assert facts["advice"]["mode"] in page.text
        assert re.search(r'<polyline points="[\d., ]+"', text)

    def test_evaluation_page_matrix_has_all_counts(self, tmp_path: Path) -> None:
        """Every reference that was judged is in one cell."""
        facts = facts_of(tmp_path)
        cells = re.findall(r'class="cell"[^>]*>(\d+)<', evaluation_page({"Noise": facts}, now=NOW))
        mine = next(mode for mode in facts["modes"] if mode["mode"] == facts["mode"])
        assert sum(map(int, cells)) == mine["judged"]

    def test_evaluation_page_large_matrix_keeps_the_classes_with_most_errors(self, tmp_path: Path) -> None:
        """With many classes those with the most mistakes are shown, and how many are not."""
        text = evaluation_page({"Noise": facts_of(tmp_path, classes=40, references=4)}, now=NOW)
        assert "10 classes with fewer errors are not shown" in Page(text).text

    def test_evaluation_page_duplicates_are_shown_side_by_side(self, tmp_path: Path) -> None:
        """The two pictures of a pair stand together."""
        picture("red", 1).save(tmp_path / "0.png")
        picture("blue", 1).save(tmp_path / "8.png")
        text = evaluation_page({"Noise": facts_of(tmp_path)}, now=NOW)
        assert re.search(r'class="pair"><img [^>]*><img ', text)

    def test_evaluation_names_the_next_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the packaged one decides and is often wrong."""
        monkeypatch.setenv("HOME", str(tmp_path))
        facts = facts_of(tmp_path)
        for enough, word in ((True, "probably"), (False, "possibly"), (None, "possibly")):
            said = " ".join(evaluation_sentences(facts | {"is_labelled_enough": enough, "half_judged": 9}))
            assert f"{word} the limit: `sortd models fetch clip-ViT-B-32`" in said
        make_dataset(tmp_path / "Data")
        config = read_config(write_config(tmp_path), {})
        (right,) = evaluate_datasets(config, load_encoder=lambda _: FakeEncoder())
        assert right.next_model is None
        labels = sorted((tmp_path / "Data/Colours/Clases").iterdir())
        for folder in labels:
            for number, colour in enumerate(("red", "green", "blue") * 2):
                picture(colour, 100 * labels.index(folder) + number).save(folder / f"wrong{number}.png")
        (wrong,) = evaluate_datasets(config, load_encoder=lambda _: FakeEncoder())
        assert wrong.next_model == "clip-ViT-B-32"

    def test_evaluation_page_names_the_classes_that_need_images(self, tmp_path: Path) -> None:
        """By name, and why."""
        facts = facts_of(tmp_path, references=2)
        assert any(
            sentence.startswith("Add images to 4 of 4 classes (class 0: ") for sentence in evaluation_sentences(facts)
        )

    @pytest.mark.parametrize("filed", [0.02, 0.3, 0.75, 0.97, 1.0])
    def test_evaluation_page_point_of_the_settings_lies_on_the_curve(self, tmp_path: Path, filed: float) -> None:
        """The point says how much is filed now, and lies on the line whatever the shares behind it are."""
        facts = facts_of(tmp_path)
        calibration = {**facts["calibration"], "precision_expected": 0.5, "filed_expected": filed}
        modes = [{**mode, "curve": [(0.9, 0.1, 1.0), (0.7, 0.6, 0.9), (0.5, 1.0, 0.7)]} for mode in facts["modes"]]
        text = evaluation_page({"Noise": {**facts, "calibration": calibration, "modes": modes}}, now=NOW)
        line = re.search(r'<polyline points="([^"]*)"', text)
        point = re.search(r'<circle cx="([^"]*)" cy="([^"]*)"', text)
        assert line is not None
        assert point is not None
        ends = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
        across, down = float(point[1]), float(point[2])
        assert down == pytest.approx(np.interp(across, [x for x, _ in ends], [y for _, y in ends]), abs=0.2)
        assert across == pytest.approx(56 + 564 * filed, abs=0.1)

    @pytest.mark.parametrize("expected", [0.95, 0.99])
    def test_evaluation_page_label_of_the_point_is_within_the_plot(self, tmp_path: Path, expected: float) -> None:
        """At the lowest point of the curve it stands above it, where no number of the axis is."""
        facts = facts_of(tmp_path)
        calibration = {**facts["calibration"], "precision_expected": expected, "filed_expected": 0.8}
        points = [(0.9, 0.5, 1.0), (0.5, 1.0, 0.951)]
        modes = [{**mode, "curve": points} for mode in facts["modes"]]
        text = evaluation_page({"Noise": {**facts, "calibration": calibration, "modes": modes}}, now=NOW)
        point = re.search(r'<circle cx="[^"]*" cy="([^"]*)"', text)
        word = re.search(r'y="([^"]*)"[^>]*>now<', text)
        assert point is not None
        assert word is not None
        assert 0 < abs(float(word[1]) - float(point[1])) < 30
        assert float(word[1]) < 270

    def test_evaluation_page_without_judged_references_is_made(self, tmp_path: Path) -> None:
        """One image a class: there is nothing to leave out, and the page says what is missing."""
        facts = facts_of(tmp_path, references=1)
        assert "add images" in Page(evaluation_page({"Noise": facts}, now=NOW)).text

    def test_write_page_that_fails_leaves_no_file(self, tmp_path: Path) -> None:
        """A page that cannot be written is an error with its path, and no half is left."""
        write_page(tmp_path / "a.html", "whole")
        assert (tmp_path / "a.html").read_text(encoding="utf-8") == "whole"
        with pytest.raises(DestinationError, match=r"no/a\.html"):
            write_page(tmp_path / "no" / "a.html", "whole")
        assert [path.name for path in tmp_path.iterdir()] == ["a.html"]

    def test_check_page_path_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        """Minutes of judging are not lost to a folder that is missing; a name that is free passes."""
        (tmp_path / "file").touch()
        check_page_path(tmp_path / "a.html")
        for place, why in (
            (tmp_path, "is a folder"),
            (tmp_path / "no" / "a", "no is not a folder"),
            (tmp_path / "file" / "a", "file is"),
        ):
            with pytest.raises(DestinationError, match=why):
                check_page_path(place)
        (tmp_path / "Data").mkdir()
        gone = sortd("eval", "-c", write_config(tmp_path), "--html", tmp_path / "no" / "a.html")
        assert (gone.code, gone.out) == (73, "")


class TestExamination:
    """The way from folders to a report."""

    def test_evaluate_datasets_reports_its_progress(self, tmp_path: Path) -> None:
        """Each reference that is read counts, and judging begins when all are."""
        make_dataset(tmp_path / "Data")
        told: list[tuple[str, int, int]] = []
        config = read_config(write_config(tmp_path), {"HOME": str(tmp_path)})
        list(evaluate_datasets(config, load_encoder=lambda _: FakeEncoder(), tell=lambda *now: told.append(now)))
        assert told[0][0].startswith("reading ")
        assert told[-1][0].startswith("evaluating ")
        numbers = [done for what, done, _ in told if what.startswith("reading ")]
        assert numbers == list(range(1, told[0][2] + 1))

    def test_evaluate_datasets_uses_the_settings_of_each(self, tmp_path: Path) -> None:
        """References come from Clases/, settings from the configuration, and nothing is touched."""
        file = write_config(tmp_path, datasets="{Second: {mode: avg}}")
        for name in ("First", "Second"):
            Layout(make_dataset(tmp_path / "Data", name, references=3)).make()
        (tmp_path / "Data" / "First" / "Clases" / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
        found = list(
            evaluate_datasets(read_config(file, {"HOME": "/nonexistent"}), load_encoder=lambda _: FakeEncoder())
        )
        assert [(one.dataset, one.report.mode, one.report.references) for one in found] == [
            ("First", "mixed", 9),
            ("Second", "avg", 9),
        ]
        assert [Path(one.path).name for one in found[0].refused] == ["torn.png"]
        assert not (tmp_path / "state").exists()

    def test_evaluate_datasets_with_corrections_uses_them_where_configured(self, tmp_path: Path) -> None:
        """An image that the user moved to another class is one of its references, if the configuration says so."""
        dataset = make_dataset(tmp_path / "Data", references=2)
        (filed,) = file_images(dataset, tmp_path / "state", {"a.png": "red"})
        (dataset / "Dataset" / "blue").mkdir()
        corrected = Path(filed).rename(dataset / "Dataset" / "blue" / "a.png")
        with Journal(Layout(dataset).state_folder(tmp_path / "state") / "journal.sqlite") as journal:
            (record,) = journal.history.moves(Selection())
            journal.record_corrections([(record, "blue", "Dataset/blue/a.png")])
        config = read_config(write_config(tmp_path), {"HOME": "/nonexistent"})
        assert settings_with_corrections(config, Layout(dataset)).corrections == ()
        config = read_config(write_config(tmp_path, learn_from_corrections="true"), {"HOME": "/nonexistent"})
        ((label, path),) = settings_with_corrections(config, Layout(dataset)).corrections
        assert (label, path) == ("blue", str(corrected))

    def test_evaluate_datasets_that_cannot_be_judged_is_an_error(self, tmp_path: Path) -> None:
        """An unknown dataset, none at all, or one without a class."""
        file = write_config(tmp_path)
        (tmp_path / "Data").mkdir()
        assert sortd("eval", "-c", file).code == 65
        (tmp_path / "Data" / "Empty" / "Clases").mkdir(parents=True)
        assert "there are: Empty" in sortd("eval", "Other", "-c", file).err
        with pytest.raises(DataError, match="has no class folder"):
            list(evaluate_datasets(read_config(file, {"HOME": "/nonexistent"}), load_encoder=lambda _: FakeEncoder()))

    def test_evaluate_datasets_that_fails_for_one_hides_no_other(self, tmp_path: Path) -> None:
        """The others come first, whatever the names; then what is wrong with the one is raised."""
        config = read_config(write_config(tmp_path, learn_from_corrections="true"), {"HOME": "/nonexistent"})
        bad = Layout(make_dataset(tmp_path / "Data", "Bad")).state_folder(tmp_path / "state") / "journal.sqlite"
        bad.parent.mkdir(parents=True)
        bad.write_bytes(b"garbage" * 1000)
        make_dataset(tmp_path / "Data", "Good")
        told = evaluate_datasets(config, load_encoder=lambda _: FakeEncoder())
        assert next(told).dataset == "Good"
        with pytest.raises(JournalError, match="the journal is damaged"):
            next(told)
