"""Explain says why an image goes where it goes, from what serves now, and changes nothing."""

import hashlib
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sortd.classify.build import build
from sortd.classify.decide import decide
from sortd.classify.explain import Explanation, explain, explain_finetuned, explanation_sentences
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.commands.explain import ImageExplanation, explain_image, explain_page
from sortd.config import Config, read_config
from sortd.daemon.resources import ActiveClassifier
from sortd.encoder.finetuned import FinetunedFacts
from sortd.errors import DataError, UnreadableError
from sortd.events import Mode
from sortd.files import stamp_of
from sortd.layout import Layout
from sortd.service import Status, started_ticks
from sortd.store.cache import Cache, PrototypeFiles
from sortd.store.journal import Journal
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset, picture, tree
from tests.fake_encoder import SIDE, FakeEncoder
from tests.filed_images import file_images
from tests.made_features import Blobs, support_set
from tests.prototype_maker import make_prototypes


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A dataset whose prototypes are stored, as a sortd that ran leaves it."""
    write_config(tmp_path, mode="max", abstain="off")
    dataset = make_dataset(tmp_path / "Data")
    Layout(dataset).make()
    prototypes = make_prototypes(dataset, DecisionSettings(Mode.MAX, None))
    PrototypeFiles(tmp_path / "cache" / "prototypes", pytest.fail).write(Layout(dataset).key, prototypes)
    return dataset


def config_of(site: Path) -> Config:
    """Return the configuration of a site."""
    return read_config(site.parents[1] / "config.yaml", {"HOME": "/nonexistent"})


def embedded(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the embedding of an image by the encoder of the tests."""
    row: np.ndarray[Any, np.dtype[np.float32]] = FakeEncoder().encode_images(
        np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))[None]
    )[0]
    return row


@pytest.fixture
def remembered(site: Path) -> Callable[[Path], Path]:
    """Draw an image and let the cache know its embedding, as after a run."""

    def remember(path: Path, colour: str = "red") -> Path:
        if not path.exists():
            picture(colour, 77).save(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        with Cache(site.parents[1] / "cache" / "embeddings.sqlite") as cache:
            cache.remember_embeddings({content: embedded(path)}, "fake-48")
        return path

    return remember


def no_model(_: Config) -> FakeEncoder:
    """Stand in for a model that must not be loaded."""
    raise AssertionError("a model was loaded for an image that is known")


class TestExplanation:
    """The pure part: prototypes and an embedding in, facts and sentences out."""

    @pytest.mark.parametrize("mode", list(Mode))
    def test_explanation_of_each_mode_agrees_with_the_decision(self, site: Path, tmp_path: Path, mode: Mode) -> None:
        """Label, score and margin are those of ``decide``, in every mode."""
        picture("green", 5).save(tmp_path / "one.png")
        prototypes = make_prototypes(site, DecisionSettings(mode, AbstainSettings()))
        row = embedded(tmp_path / "one.png")
        (decision,) = decide(prototypes, row[None])
        found = explain(prototypes, row)
        assert found.decision == decision
        assert found.scores[0].label == found.label == "green"
        assert found.scores[0].score == pytest.approx(decision.score)
        assert {other.mode for other in found.others} == {other.value for other in Mode} - {mode.value}

    def test_explanation_neighbours_have_their_cosines(self, site: Path) -> None:
        """A reference itself is its own nearest, with a cosine of one."""
        reference = site / "Clases" / "blue" / "2.png"
        found = explain(make_prototypes(site), embedded(reference))
        first, *rest = found.neighbours
        assert (first.path, first.label) == (str(reference), "blue")
        assert first.similarity == pytest.approx(1.0, abs=1e-5)
        assert len(rest) == 4
        assert [one.similarity for one in found.neighbours] == sorted(
            (o.similarity for o in found.neighbours), reverse=True
        )

    def test_explanation_thresholds_name_what_was_missed(self, site: Path) -> None:
        """An image between two classes fails at least one condition, in words too."""
        between = embedded(site / "Clases" / "red" / "0.png") + embedded(site / "Clases" / "blue" / "0.png")
        found = explain(make_prototypes(site), between / np.linalg.norm(between))
        assert not found.is_filed
        assert explanation_sentences(found)[0].startswith("It is sent to Review/")
        passed = {threshold.name: threshold.passed for threshold in found.thresholds}
        assert not all(passed.values())
        assert any("not passed" in sentence for sentence in explanation_sentences(found))

    def test_explanation_of_an_unsure_image_claims_no_share_of_right_ones(self) -> None:
        """What is filed is told with how many it was judged on; what is not sure enough is not called right as well."""
        index = np.arange(6).repeat(8)
        support = support_set(Blobs(6, spread=1.2).draw(index), index)
        prototypes = build(support, DecisionSettings(Mode.BEST, AbstainSettings()), generation=1)
        between = support.embeddings[0] + support.embeddings[8]
        unsure, sure = (
            explain(prototypes, between / np.linalg.norm(between)),
            explain(prototypes, support.embeddings[0]),
        )
        assert (unsure.is_filed, sure.is_filed) == (False, True)
        assert unsure.decision.precision is not None
        assert not any("Precision" in sentence for sentence in explanation_sentences(unsure))
        (judged,) = [sentence for sentence in explanation_sentences(sure) if "Precision" in sentence]
        assert re.search(r": \d+\.\d % of \d+ references left out in turn \(95 %: \d+ to \d+ %\)\.", judged)

    def test_explanation_where_nothing_can_be_filed_asks_for_no_confidence(self) -> None:
        """One reference a class supports no precision: no threshold above 1 is named."""
        blobs, index = Blobs(3), np.arange(3)
        prototypes = build(support_set(blobs.draw(index), index), DecisionSettings(), generation=1)
        said = " ".join(explanation_sentences(explain(prototypes, blobs.draw([1])[0])))
        assert "no confidence suffices, since the references do not support the wanted precision" in said
        assert "1.1" not in said
        assert "too low" not in said

    def test_explanation_of_an_image_in_review_is_that_of_the_daemon(self) -> None:
        """One that looked like no class is not filed without references that were added since."""
        blobs, index = Blobs(4, spread=0.4), np.repeat(np.arange(4), 12)
        prototypes = build(support_set(blobs.draw(index), index), DecisionSettings(), generation=2)
        (row,) = [one for one in blobs.draw([2] * 9) if explain(prototypes, one).is_filed][:1]
        explanation = explain(prototypes, row, turned_away=1)
        assert not explanation.is_filed
        assert "gained since generation 1" in explanation_sentences(explanation)[0]

    def test_explanation_in_mixed_mode_has_the_share_of_the_name(self, site: Path) -> None:
        """All of it in text mode, none in the modes that look at images alone."""
        row = embedded(site / "Clases" / "red" / "0.png")

        def share(mode: Mode) -> float:
            return explain(make_prototypes(site, DecisionSettings(mode, None)), row).text_share

        assert share(Mode.TEXT) == 1.0
        assert share(Mode.BEST) == share(Mode.MAX) == 0.0
        assert 0.0 <= share(Mode.MIXED) < 1.0

    def test_explanation_class_names_with_blanks_are_quoted(self, site: Path, tmp_path: Path) -> None:
        """Where a name ends is seen in sentences and on the page, which would make one blank of two."""
        (site / "Clases" / "red").rename(site / "Clases" / "a  b ")
        prototypes = make_prototypes(site, DecisionSettings(Mode.MAX, None))
        found = explain(prototypes, embedded(site / "Clases" / "a  b " / "0.png"))
        assert explanation_sentences(found)[0] == "It is filed into 'a  b '."
        facts = ImageExplanation(str(tmp_path / "x.png"), "Colours", "", found, is_stored=True, records=()).facts()
        assert facts["label"] == "a  b "
        assert "filed into &#39;a  b &#39;" in explain_page(facts, now=datetime(2026, 1, 1, tzinfo=UTC))

    def test_explanation_without_a_class_is_empty(self, site: Path) -> None:
        """Without a class there is one sentence."""
        found: Explanation = explain(make_prototypes(site, DecisionSettings(Mode.MAX, None)), np.ones(48) / 48**0.5)
        assert explanation_sentences(found)


class TestImage:
    """The whole: a path in, everything about it out."""

    def test_explain_image_only_stored_refuses_what_is_not_embedded(
        self, site: Path, remembered: Callable[[Path], Path]
    ) -> None:
        """A process without a model says what is missing, and explains what is stored."""
        picture("green", 5).save(site / "Images" / "new.png")
        with pytest.raises(DataError, match="is not embedded yet"):
            explain_image(config_of(site), site / "Images" / "new.png", load_encoder=no_model, only_stored=True)
        image = remembered(site / "Images" / "known.png")
        assert explain_image(config_of(site), image, load_encoder=no_model, only_stored=True).path == str(image)

    def test_explain_image_in_the_cache_loads_no_model(self, site: Path, remembered: Callable[[Path], Path]) -> None:
        """What was embedded before is answered from the cache, by the prototypes that serve."""
        image = remembered(site / "Images" / "new.png")
        explained = explain_image(config_of(site), image, load_encoder=no_model)
        assert explained.is_stored
        assert explained.facts()["label"] == "red"
        assert explained.facts()["generation"] == 1

    @pytest.mark.parametrize(
        ("name", "reason"), [(".facebook_1.png", "hidden"), ("mine.png~", "backup"), ("2019.temp/a.png", "unfinished")]
    )
    def test_explain_image_that_stays_in_the_inbox_says_so_first(
        self, site: Path, remembered: Callable[[Path], Path], name: str, reason: str
    ) -> None:
        """It is not filed, whatever would be decided; in another folder, and when it may be filed, nothing is said."""
        plain = remembered(site / "Images" / "new.png")
        assert explain_image(config_of(site), plain, load_encoder=no_model).facts()["outcome"] == "filed"
        image = site / "Images" / name
        image.parent.mkdir(exist_ok=True)
        plain.rename(image)
        explained = explain_image(config_of(site), image, load_encoder=no_model)
        facts = explained.facts()
        assert (facts["outcome"], facts["left"]["reason"]) == ("left", reason)
        first, second, *_ = explained.sentences()
        assert first.startswith("It stays in Images/: ")
        assert second == "Otherwise it would be filed into red."
        assert "stays in Images/" in explain_page(facts, now=datetime.now(UTC))

    def test_explain_image_with_a_control_file_beside_waits(
        self, site: Path, remembered: Callable[[Path], Path]
    ) -> None:
        """A download that stopped is told from a whole image."""
        image = remembered(site / "Images" / "new.png")
        image.with_name("new.png.aria2").touch()
        first = explain_image(config_of(site), image, load_encoder=no_model).sentences()[0]
        assert "aria2 has not finished it" in first

    def test_explain_image_that_is_held_says_so(self, site: Path, remembered: Callable[[Path], Path]) -> None:
        """It was undone and waits for its release."""
        image = remembered(site / "Images" / "new.png")
        with Journal(Layout(site).state_folder(site.parents[1] / "state") / "journal.sqlite") as journal:
            journal.hold("Images/new.png", stamp_of(image.lstat()), "undone")
        facts = explain_image(config_of(site), image, load_encoder=no_model).facts()
        assert (facts["outcome"], facts["left"]["reason"]) == ("left", "held")
        image.unlink()
        with pytest.raises(DataError, match="no such file"):
            explain_image(config_of(site), image, load_encoder=no_model)

    def test_explain_image_that_is_a_link_names_it(self, site: Path, tmp_path: Path) -> None:
        """It is there, and no folder, but it is not followed; nor is a linked folder."""
        for link in (site / "Images" / "link.png", tmp_path / "link.png"):
            link.symlink_to(site / "Clases" / "red" / "0.png")
            with pytest.raises(DataError, match="symbolic link"):
                explain_image(config_of(site), link, load_encoder=no_model)

    def test_explain_image_that_cannot_be_read_and_stays_says_why_it_stays(self, site: Path) -> None:
        """Half a download is no broken image."""
        (site / "Images" / "a.png.part").write_bytes(b"\x89PNG\r\n\x1a\n")
        with pytest.raises(UnreadableError, match=r"stays in Images/: .*\(\*\.part\)"):
            explain_image(config_of(site), site / "Images" / "a.png.part", load_encoder=lambda _: FakeEncoder())

    def test_explain_image_changes_nothing(self, site: Path, remembered: Callable[[Path], Path]) -> None:
        """No file of the dataset, and no record of the journal."""
        image = remembered(site / "Images" / "new.png")
        before = tree(site)
        explain_image(config_of(site), image, load_encoder=no_model)
        assert tree(site) == before
        assert not (site.parents[1] / "state").exists()

    def test_explain_image_outside_the_cache_is_embedded(self, site: Path, tmp_path: Path) -> None:
        """An image that lies anywhere is decided by the only dataset there is."""
        picture("blue", 9).save(tmp_path / "elsewhere.png")
        explained = explain_image(config_of(site), tmp_path / "elsewhere.png", load_encoder=lambda _: FakeEncoder())
        assert (explained.dataset, explained.explanation.label, explained.is_stored) == ("Colours", "blue", True)

    def test_explain_image_without_stored_prototypes_builds_them(self, site: Path, tmp_path: Path) -> None:
        """Before the first run, or with another model, it says that nothing is stored."""
        (file,) = (tmp_path / "cache" / "prototypes").iterdir()
        file.unlink()
        image = site / "Clases" / "green" / "1.png"
        explained = explain_image(config_of(site), image, load_encoder=lambda _: FakeEncoder())
        assert (explained.explanation.label, explained.is_stored) == ("green", False)
        assert "none are stored" in explained.sentences()[-1]
        assert "The image is itself a reference" in explained.sentences()[-2]

    def test_explain_image_without_a_running_sortd_uses_the_present_references(
        self, site: Path, remembered: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        """The next sortd would learn them first; one that runs decides by what it has."""
        image = remembered(site / "Images" / "new.png")
        (site / "Clases" / "red").rename(site / "Clases" / "scarlet")
        explained = explain_image(config_of(site), image, load_encoder=lambda _: FakeEncoder())
        assert (explained.explanation.label, explained.is_stored) == ("scarlet", False)
        ticks = started_ticks(os.getpid())
        Status(tmp_path / "state").write({"running": True, "pid": os.getpid(), "started_ticks": ticks})
        explained = explain_image(config_of(site), image, load_encoder=no_model)
        assert (explained.explanation.label, explained.is_stored) == ("red", True)

    def test_explain_filed_has_its_moves(self, site: Path, remembered: Callable[[Path], Path], tmp_path: Path) -> None:
        """What the journal knows of it comes along."""
        (filed,) = file_images(site, tmp_path / "state", {"a.png": "red"})
        explained = explain_image(config_of(site), remembered(Path(filed)), load_encoder=no_model)
        (record,) = explained.facts()["history"]
        assert (record["from"], record["to"]) == (str(site / "Images" / "a.png"), filed)

    def test_explain_image_that_cannot_be_explained_says_why(self, site: Path, tmp_path: Path) -> None:
        """No such file, no such dataset, no image, or several datasets to choose from."""
        (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
        picture("red", 1).save(tmp_path / "one.png")
        config = config_of(site)
        with pytest.raises(DataError, match="no such file"):
            explain_image(config, site / "Images" / "gone.png")
        with pytest.raises(DataError, match="no dataset 'Other'"):
            explain_image(config, tmp_path / "one.png", "Other")
        with pytest.raises(UnreadableError, match="cannot be decided"):
            explain_image(config, tmp_path / "notes.txt", load_encoder=lambda _: FakeEncoder())
        make_dataset(tmp_path / "Data", "Second", references=1)
        with pytest.raises(DataError, match=r"one\.png is in no dataset; .*: Colours, Second"):
            explain_image(config, tmp_path / "one.png")


class TestFinetuned:
    """An image of a dataset that a fine-tuned model decides."""

    def test_explain_image_with_a_fine_tuned_model_has_both_classifiers(
        self, site: Path, vit: FinetunedFacts, tmp_path: Path
    ) -> None:
        """Probabilities, the threshold and what held-out images say; neighbours and modes come from the prototypes."""
        write_config(tmp_path, mode="max", abstain="{precision: 0.9}")
        assert sortd("models", "promote", vit.folder, "-c", tmp_path / "config.yaml").code == 0
        picture("green", 3).save(tmp_path / "new.png")
        explained = explain_image(config_of(site), tmp_path / "new.png", load_encoder=lambda _: FakeEncoder())
        facts = explained.facts()
        assert (facts["label"], facts["mode"], facts["classifier"]) == ("green", "finetuned", "finetuned")
        assert (facts["encoder_id"], facts["refusal"]) == (vit.model_id, None)
        assert sum(one["score"] for one in facts["scores"]) == pytest.approx(1)
        assert {one["references"] for one in facts["scores"]} == {4}
        assert [one["name"] for one in facts["thresholds"]] == ["confidence"]
        assert len(facts["neighbours"]) == 5
        assert {one["mode"] for one in facts["other_modes"]} == {mode.value for mode in Mode}
        assert "held-out images" in " ".join(facts["sentences"])
        assert "Modes of the prototypes" in explain_page(facts, now=datetime(2026, 1, 1, tzinfo=UTC))
        known = explain_image(config_of(site), tmp_path / "new.png", load_encoder=no_model)
        assert known.facts() == facts

    def test_explain_image_without_an_embedding_omits_the_prototypes(self, site: Path, vit: FinetunedFacts) -> None:
        """The model's own answer stands alone."""
        classifier = ActiveClassifier(vit).classifier(None, generation=3)
        assert classifier is not None
        prototypes = make_prototypes(site, DecisionSettings(Mode.MAX, None))
        found = explain_finetuned(classifier, np.array([3.0, 0.0, 0.0]), prototypes=prototypes, embedding=None)
        assert (found.label, found.neighbours, found.others) == (vit.labels[0], (), ())
        assert not any("other modes" in sentence for sentence in explanation_sentences(found))

    def test_explain_refused_model_is_named(self, site: Path, vit: FinetunedFacts, tmp_path: Path) -> None:
        """The prototypes explain, and the reason is among the sentences."""
        assert sortd("models", "promote", vit.folder, "-c", tmp_path / "config.yaml").code == 0
        (site / "Clases" / "mauve").mkdir()
        picture("green", 3).save(tmp_path / "new.png")
        explained = explain_image(config_of(site), tmp_path / "new.png", load_encoder=lambda _: FakeEncoder())
        assert (explained.facts()["label"], explained.facts()["mode"]) == ("green", "max")
        assert any("'mauve'" in sentence for sentence in explained.sentences())


class TestCommand:
    """The command line around it."""

    def test_explain_command_prints_sentences_and_tables(self, site: Path, remembered: Callable[[Path], Path]) -> None:
        """The verdict first, then the classes, then the nearest references."""
        image = remembered(site / "Images" / "new.png")
        ran = sortd("explain", image, "-c", site.parents[1] / "config.yaml")
        assert ran.out.splitlines()[1] == "It is filed into red."
        assert "class\tscore\tnearest\treferences" in ran.out
        assert str(site / "Clases" / "red") in ran.out

    def test_explain_command_with_json_prints_json(self, site: Path, remembered: Callable[[Path], Path]) -> None:
        """All facts, the sentences among them."""
        image = remembered(site / "Images" / "new.png")
        facts = sortd("explain", image, "-c", site.parents[1] / "config.yaml", "--json").facts
        assert (facts["outcome"], facts["label"], facts["mode"], facts["encoder_id"]) == (
            "filed", "red", "max", "fake-48",
        )  # fmt: skip
        assert len(facts["neighbours"]) == 5
        assert facts["sentences"][0] == "It is filed into red."
        assert {one["mode"] for one in facts["other_modes"]} == {"avg", "mean", "text", "best", "mixed"}

    def test_explain_with_html_writes_a_page(
        self, site: Path, remembered: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        """One file that holds the image and its nearest references and loads nothing."""
        image = remembered(site / "Images" / "new.png")
        page = tmp_path / "why.html"
        ran = sortd("explain", image, "-c", tmp_path / "config.yaml", "--html", page)
        text = page.read_text(encoding="utf-8")
        assert text.count('src="data:image/jpeg;base64,') == 6
        assert "http" not in text
        assert str(page) in ran.err
        assert sortd("explain", image, "-c", tmp_path / "config.yaml", "--html", tmp_path / "no" / "a.html").code == 73
