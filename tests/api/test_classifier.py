"""A classifier of folders and of rows: decisions, saving, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sortd
from sortd.api.images import LoadedEncoder
from sortd.errors import DataError
from tests.command_line import write_config
from tests.daemon_process import DaemonProcess, picture, teach
from tests.fake_encoder import FakeEncoder


@pytest.fixture
def encoder() -> Iterator[LoadedEncoder]:
    """The fake encoder of the tests, as the library has it."""
    with LoadedEncoder(FakeEncoder()) as opened:
        yield opened


def rows_of_two_classes() -> tuple[Any, list[str]]:
    """Return rows of two classes far apart, and their labels."""
    dice = np.random.default_rng(0)
    return np.repeat(np.eye(2, 8), 12, axis=0) + dice.normal(0, 0.1, (24, 8)), ["cat"] * 12 + ["dog"] * 12


def test_folder_decides_as_the_daemon_does(encoder: LoadedEncoder, colours: Path, tmp_path: Path) -> None:
    """Decisions on images equal those in the journal of a daemon with the same references and settings."""
    teach(colours)
    images = {f"{colour}{seed}.png": (colour, seed) for colour in ("red", "blue") for seed in (900, 901)}
    images |= {"mixed.png": ("green", 7)}
    for name, (colour, seed) in images.items():
        picture(colour, seed, patches=40).save(tmp_path / name)
        picture(colour, seed, patches=40).save(colours / "Images" / name)
    classifier = sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)
    decisions = dict(zip(images, classifier.classify([tmp_path / name for name in images]), strict=True))
    with DaemonProcess(write_config(tmp_path), "once") as daemon:
        assert daemon.wait() == 0
    with sortd.open_dataset(colours, config=tmp_path / "config.yaml") as dataset:
        moves = {Path(move["from"]).name: move for move in dataset.history()}
    assert moves.keys() == images.keys()
    for name, decision in decisions.items():
        assert moves[name]["outcome"] == ("filed" if isinstance(decision, sortd.Assigned) else "sent_to_review")
        assert moves[name]["label"] == decision.best_label
        assert moves[name]["score"] == pytest.approx(decision.score, abs=1e-6)


def test_decision_has_the_documented_fields(encoder: LoadedEncoder, colours: Path) -> None:
    """Label, probability, margin, familiarity and reason are there for filed images and for others."""
    teach(colours)
    classifier = sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)
    sure, strange = classifier.classify([picture("red", 900, patches=40), np.full((64, 64, 3), 230, np.uint8)])
    assert (sure.label, sure.reason) == ("red", None)
    assert isinstance(strange, sortd.Abstained)
    assert (strange.label, strange.reason) == (None, "typicality")
    assert 0.0 <= strange.probability <= sure.probability <= 1.0
    assert sure.familiarity is not None
    assert strange.familiarity is not None
    assert strange.familiarity < sure.familiarity
    assert sure.margin > 0


def test_saved_classifier_decides_the_same(encoder: LoadedEncoder, colours: Path, tmp_path: Path) -> None:
    """What is loaded decides as what was saved, with equal numbers."""
    classifier = sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)
    classifier.save(tmp_path / "saved")
    loaded = sortd.Classifier.load(tmp_path / "saved", encoder=encoder)
    images = [picture(colour, 900) for colour in ("red", "green", "blue")]
    assert loaded.classify(images) == classifier.classify(images)
    assert loaded.labels == ("blue", "green", "red")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
    ]


@pytest.mark.parametrize("file", ["classifier.json", "classifier.safetensors"])
def test_damaged_classifier_is_refused(tmp_path: Path, file: str) -> None:
    """A file that is missing, truncated, changed or another one is refused with the folder's name."""
    rows, labels = rows_of_two_classes()
    sortd.Classifier.fit(rows, labels).save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    for content in (whole[: len(whole) // 2], b"\0" + whole[1:], b"", b"[]", b"{}"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DataError, match=str(tmp_path)):
            sortd.Classifier.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match="no classifier"):
        sortd.Classifier.load(tmp_path)


def test_classifier_of_another_encoder_is_refused(encoder: LoadedEncoder, tmp_path: Path, colours: Path) -> None:
    """Embeddings of two encoders are not compared."""
    sortd.Classifier.from_folder(colours / "Clases", encoder=encoder).save(tmp_path / "saved")
    other = LoadedEncoder(FakeEncoder(encoder_id="other-48"))
    with pytest.raises(DataError, match="other-48"):
        sortd.Classifier.load(tmp_path / "saved", encoder=other)


def test_classifier_without_encoder_takes_rows_only() -> None:
    """Images need an encoder, and the message says what to do."""
    rows, labels = rows_of_two_classes()
    classifier = sortd.Classifier.fit(rows, labels)
    assert [decision.label for decision in classifier.classify_rows(rows[:1])] == ["cat"]
    with pytest.raises(DataError, match="classify_rows"):
        classifier.classify([np.zeros((8, 8, 3), np.uint8)])


def test_fit_and_folder_agree(encoder: LoadedEncoder, colours: Path) -> None:
    """Rows of the same references with the same labels give the same decisions as the folder, names included."""
    from_folder = sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)
    files = [Path(source) for source in from_folder.prototypes.sources]
    fitted = sortd.Classifier.fit(
        encoder.encode_images(files), [file.parent.name for file in files], encoder=encoder, mode="mixed"
    )
    images = [picture(colour, 900) for colour in ("red", "green", "blue")]
    for one, other in zip(from_folder.classify(images), fitted.classify(images), strict=True):
        assert one.label == other.label
        assert one.probability == pytest.approx(other.probability, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[1.0, np.nan]], "labels": ["a"]}, "finite"),
        ({"rows": [], "labels": []}, "not empty"),
        ({"rows": [[1.0, 0.0]], "labels": []}, "0 labels"),
        ({"rows": [[1.0, 0.0]], "labels": ["a"], "sources": []}, "0 sources"),
        ({"rows": [[1.0, 0.0]], "labels": ["a"], "mode": "text"}, "texts"),
        ({"rows": [[1.0, 0.0]], "labels": ["a"], "mode": "median"}, "median"),
        ({"rows": [[1.0, 0.0]], "labels": ["a"], "precision": 1.5}, "1.5"),
    ],
)
def test_fit_refuses_what_it_cannot_use(arguments: dict[str, Any], message: str) -> None:
    """Wrong rows, labels and settings raise an error that names them."""
    with pytest.raises(DataError, match=message):
        sortd.Classifier.fit(**arguments)


def test_folder_without_classes_is_refused(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """An empty and a missing folder raise an error with the path."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=str(folder)):
            sortd.Classifier.from_folder(folder, encoder=encoder)


def test_broken_reference_is_named(encoder: LoadedEncoder, colours: Path) -> None:
    """A program hears of a reference that cannot be used, since no log tells it."""
    (colours / "Clases" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)


def test_explanation_names_the_nearest_reference(encoder: LoadedEncoder, colours: Path) -> None:
    """``explain`` gives the neighbours of an image as ``sortd explain`` does."""
    classifier = sortd.Classifier.from_folder(colours / "Clases", encoder=encoder)
    explanation = classifier.explain(colours / "Clases" / "red" / "0.png")
    assert explanation.neighbours[0].path == str(colours / "Clases" / "red" / "0.png")
    assert explanation.label == "red"


def test_classifier_of_rows_refuses_an_encoder_of_other_rows(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """Rows of no named encoder are of the encoder that is passed later, but only if they have its length."""
    rows, labels = rows_of_two_classes()
    sortd.Classifier.fit(rows, labels).save(tmp_path / "kept")
    with pytest.raises(DataError, match="rows have 8 columns"):
        sortd.Classifier.load(tmp_path / "kept", encoder=encoder)


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be raises an error of the library; sources may be paths."""
    rows, labels = rows_of_two_classes()
    classifier = sortd.Classifier.fit(rows, labels, sources=[Path(f"{at}.png") for at in range(len(rows))])  # type: ignore[misc]
    (tmp_path / "taken").touch()
    with pytest.raises(sortd.SortdError, match="taken cannot be written"):
        classifier.save(tmp_path / "taken")
    classifier.save(tmp_path / "kept")
    assert sortd.Classifier.load(tmp_path / "kept").prototypes.sources[0] == "0.png"


@pytest.mark.parametrize("rows", [np.zeros(8), np.full((1, 8), np.nan), np.eye(3)], ids=["one", "nan", "other length"])
def test_probabilities_of_what_is_no_row_are_refused(rows: Any) -> None:
    """Probabilities and decisions refuse the same rows."""
    classifier = sortd.Classifier.fit(*rows_of_two_classes())
    for act in (classifier.classify_rows, classifier.probabilities):
        with pytest.raises(ValueError, match="row"):
            act(rows)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1e400}'], ids=["deep", "infinite"])
def test_hostile_facts_are_refused(tmp_path: Path, text: str) -> None:
    """Whatever the JSON holds, the error is one of the library."""
    sortd.Classifier.fit(*rows_of_two_classes()).save(tmp_path / "kept")
    (tmp_path / "kept" / "classifier.json").write_text(text)
    with pytest.raises(DataError):
        sortd.Classifier.load(tmp_path / "kept")
