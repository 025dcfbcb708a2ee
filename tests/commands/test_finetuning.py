"""Promoting and demoting fine-tuned models: what is refused, what is written down, and what is shown."""

import json
import os
import shutil
from pathlib import Path

import pytest

from sortd.commands.evaluation import evaluate_datasets, evaluation_sentences
from sortd.config import read_config
from sortd.encoder.finetuned import (
    WEIGHTS_FILE,
    Promotion,
    finetuning_results,
    read_promotion,
    remove_promotion,
    write_promotion,
)
from sortd.errors import DestinationError, ModelError
from sortd.layout import Layout
from tests.command_line import sortd, write_config
from tests.daemon_process import make_dataset
from tests.fake_encoder import FakeEncoder
from tests.finetuned_folder import write_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A dataset of three colours, and no sortd that runs."""
    make_dataset(tmp_path / "Data")
    return write_config(tmp_path)


def state_folder(config: Path, dataset: str = "Colours") -> Path:
    """Return where a dataset's state lies."""
    return Layout(config.parent / "Data" / dataset).state_folder(config.parent / "state")


def result(config: Path, name: str, **facts: object) -> Path:
    """Put a result of fine-tuning where it lies by itself."""
    return write_folder(state_folder(config) / "finetuned" / name, **facts).folder  # type: ignore[arg-type]  # keywords


class TestFile:
    """The file that says who decides."""

    PROMOTION = Promotion(Path("/models/\udcff new"), "finetuned-3-torch-00", "level", 12.5)

    def test_promotion_that_is_written_is_read(self, tmp_path: Path) -> None:
        """Names that are not UTF-8 included; the last one holds, and nothing lies beside it."""
        assert read_promotion(tmp_path / "none") is None
        for promotion in (Promotion(Path("/old"), "old", "stronger", 1.0), self.PROMOTION):
            write_promotion(tmp_path / "state", promotion)
        assert read_promotion(tmp_path / "state") == self.PROMOTION
        assert os.listdir(tmp_path / "state") == ["classifier.json"]
        assert remove_promotion(tmp_path / "state")
        assert not remove_promotion(tmp_path / "state")
        assert read_promotion(tmp_path / "state") is None

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"folder": "/a"}', b"\xff\xfe", b"[" * 200_000])
    def test_promotion_file_that_is_damaged_is_reported_with_its_path(self, tmp_path: Path, content: bytes) -> None:
        """It is neither a promotion nor none."""
        (tmp_path / "classifier.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"classifier\.json is damaged"):
            read_promotion(tmp_path)

    def test_promotion_that_cannot_be_written_keeps_the_last_one(self, tmp_path: Path) -> None:
        """A name that is taken by a folder refuses as a full disk does: with the path, and nothing half-written."""
        (tmp_path / "classifier.json" / "full").mkdir(parents=True)
        with pytest.raises(DestinationError, match=r"classifier\.json cannot be written"):
            write_promotion(tmp_path, self.PROMOTION)
        assert os.listdir(tmp_path) == ["classifier.json"]

    def test_finetuning_results_without_unfinished_ones_are_newest_first(self, config: Path) -> None:
        """The newest comes first; a training that goes on is not there yet."""
        old, new = result(config, "20260101T000000Z-0"), result(config, "20260102T000000Z-0")
        result(config, "20260103T000000Z-0.unfinished")
        (state_folder(config) / "finetuned" / "20260104T000000Z-0").mkdir()
        assert finetuning_results(state_folder(config)) == [new, old]


class TestPromote:
    """``sortd models promote`` and ``demote``, with no sortd that runs."""

    def test_promote_without_a_folder_takes_the_newest_and_demote_removes_it(self, config: Path) -> None:
        """Without a folder or a dataset named, where there is only one; `models` shows which one serves."""
        result(config, "20260101T000000Z-0")
        newest = result(config, "20260102T000000Z-0")
        promoted = sortd("models", "promote", "-c", config, "--json").facts
        assert (promoted["dataset"], promoted["folder"], promoted["serves"]) == ("Colours", str(newest), True)
        assert promoted["told"] == "sortd is not running; it will apply this at its next start"
        facts = sortd("models", "-c", config, "--json").facts["datasets"]["Colours"]
        assert (facts["deciding"], facts["refusal"], facts["folder"]) == ("finetuned", None, str(newest))
        assert [row["serves"] for row in facts["results"]] == [True, False]
        assert "Colours is decided by the fine-tuned model" in sortd("models", "-c", config).out
        demoted = sortd("models", "demote", "--dataset", "Colours", "-c", config, "--json").facts
        assert demoted["demoted"]
        facts = sortd("models", "-c", config, "--json").facts["datasets"]["Colours"]
        assert (facts["deciding"], facts["folder"]) == ("prototypes", None)
        assert not sortd("models", "demote", "-c", config, "--json").facts["demoted"]

    def test_promote_weaker_model_needs_force(self, config: Path) -> None:
        """The refusal has both accuracies in it, and leaves the last promotion alone."""
        result(config, "20260101T000000Z-0", verdict="level")
        assert sortd("models", "promote", "-c", config).code == 0
        weaker = result(config, "20260102T000000Z-0", verdict="weaker")
        refused = sortd("models", "promote", "-c", config)
        assert refused.code == 65
        assert "accuracy 95.0 % of 40 (95 %: 83 to 99 %), mode mixed: 90.0 % of 40 (95 %: 77 to 96 %)" in refused.err
        assert "--force" in refused.err
        before = read_promotion(state_folder(config))
        assert before is not None
        assert before.verdict == "level"
        assert sortd("models", "promote", weaker, "--force", "-c", config).code == 0
        after = read_promotion(state_folder(config))
        assert after is not None
        assert (after.verdict, after.folder) == ("weaker", weaker)

    def test_promote_model_of_other_classes_is_refused_by_name(self, config: Path) -> None:
        """What the model knows and Clases/ has not, and the other way round."""
        result(config, "20260101T000000Z-0", labels=("red", "green", "mauve"))
        refused = sortd("models", "promote", "--force", "-c", config)
        assert refused.code == 65
        assert "Clases/ has 'blue', which the model does not know" in refused.err
        assert "the model knows 'mauve', which Clases/ does not have" in refused.err
        assert read_promotion(state_folder(config)) is None

    def test_promote_with_examples_of_no_class_ignores_them(self, config: Path) -> None:
        """`Clases/_none` is not among the classes that a model must know."""
        (config.parent / "Data" / "Colours" / "Clases" / "_none").mkdir()
        result(config, "20260101T000000Z-0")
        assert sortd("models", "promote", "-c", config).code == 0

    def test_promote_what_is_no_model_is_refused(self, config: Path, tmp_path: Path) -> None:
        """No result at all, a folder of something else, and one without its weights."""
        assert "sortd finetune --dataset Colours" in sortd("models", "promote", "-c", config).err
        assert sortd("models", "promote", tmp_path, "-c", config).code == 69
        damaged = result(config, "20260101T000000Z-0")
        (damaged / WEIGHTS_FILE).unlink()
        refused = sortd("models", "promote", "-c", config)
        assert (refused.code, "is missing" in refused.err) == (69, True)
        rows = sortd("models", "-c", config, "--json").facts["datasets"]["Colours"]["results"]
        assert "is missing" in rows[0]["problem"]

    def test_promote_without_a_dataset_among_several_lists_them(self, config: Path) -> None:
        """The refusal lists them."""
        make_dataset(config.parent / "Data", "Other")
        refused = sortd("models", "promote", "-c", config)
        assert (refused.code, refused.err) == (65, "choose a dataset with --dataset NAME; there are: Colours, Other")
        assert "no dataset 'Third'" in sortd("models", "demote", "--dataset", "Third", "-c", config).err


class TestTold:
    """``check``, ``status`` and ``eval`` say who decides."""

    def test_check_fine_tuned_model_in_use_is_named(self, config: Path) -> None:
        """With what its held-out images foretell."""
        folder = result(config, "20260101T000000Z-0")
        sortd("models", "promote", "-c", config)
        shown = sortd("check", "-c", config).out
        assert f"Colours is decided by the fine-tuned model in {folder}" in shown
        assert " of 40 held-out images (95 %: " in shown
        facts = sortd("status", "-c", config, "--json").facts["datasets"]["Colours"]["classifier"]
        assert (facts["deciding"], facts["folder"]) == ("finetuned", str(folder))

    def test_check_refused_model_is_a_warning_with_advice(self, config: Path) -> None:
        """A class that came since: what differs, and that the prototypes decide."""
        result(config, "20260101T000000Z-0")
        sortd("models", "promote", "-c", config)
        (config.parent / "Data" / "Colours" / "Clases" / "mauve").mkdir()
        findings = json.loads(sortd("check", "-c", config, "--json").out)["findings"]
        (found,) = [one for one in findings if one["subject"] == "classifier: auto"]
        assert (found["severity"], found["mend"].endswith("sortd models demote --dataset Colours")) == ("warning", True)
        assert "the prototypes decide Colours" in found["what"]
        assert "'mauve'" in found["what"]
        shown = sortd("models", "-c", config).out
        assert "'mauve'" in shown
        assert "promoted\tColours\tstronger" in shown

    def test_check_configured_classifier_without_its_model_is_reported(self, config: Path, tmp_path: Path) -> None:
        """`classifier: finetuned` without a promotion is said by `check`; `prototypes` with one as well."""
        write_config(tmp_path, classifier="finetuned")
        assert "no model is promoted" in sortd("check", "-c", config).out
        result(config, "20260101T000000Z-0")
        sortd("models", "promote", "-c", config)
        write_config(tmp_path, classifier="prototypes")
        assert "set `classifier: auto` to use it" in sortd("check", "-c", config).out
        assert not sortd("models", "promote", "-c", config, "--json").facts["serves"]

    def test_check_stronger_model_that_is_not_promoted_is_reported(self, config: Path) -> None:
        """With the command that puts it to work; a level one, or one for other classes, is not."""
        mend = "sortd models promote --dataset Colours"
        result(config, "20260101T000000Z-0", verdict="level")
        assert mend not in sortd("check", "-c", config).out
        result(config, "20260102T000000Z-0")
        assert mend in sortd("check", "-c", config).out
        result(config, "20260103T000000Z-0", labels=("red", "mauve"))
        assert mend not in sortd("check", "-c", config).out

    def test_evaluation_beside_a_fine_tuned_model_names_the_prototypes(self, config: Path) -> None:
        """Where a fine-tuned model decides, the first sentence says so."""
        shutil.copytree(result(config, "20260101T000000Z-0"), config.parent / "elsewhere")
        sortd("models", "promote", config.parent / "elsewhere", "-c", config)
        loaded = read_config(config, {"HOME": str(config.parent)})
        (examined,) = evaluate_datasets(loaded, load_encoder=lambda _: FakeEncoder())
        facts = examined.facts()
        assert set(facts["serving"]["expected"]) == {
            *("held_out", "filed_held_out", "right_held_out", "least_confidence", "notes"),
            *("filed", "filed_interval", "right", "right_interval"),
        }
        assert evaluation_sentences(facts)[0].startswith("Classifier in use: fine-tuned model finetuned-3-torch-")
