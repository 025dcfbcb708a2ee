"""A fine-tuned model at work: promoted while sortd runs, refused when it does not fit, and taken back."""

import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sortd.config import read_config
from sortd.encoder.finetuned import WEIGHTS_FILE, FinetunedFacts
from sortd.finetune.recipe import Recipe, TrainingRequest
from sortd.finetune.run import output_of, run_finetuning
from sortd.layout import Layout
from tests.command_line import sortd
from tests.daemon_process import COLOURS, DaemonProcess, picture, running
from tests.fake_encoder import FakeEncoder
from tests.tiny_vit import build_tiny_vit

Write = Callable[..., Path]

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def drop(dataset: Path, colour: str, number: int) -> str:
    """Put an image into the inbox and return its path."""
    path = dataset / "Images" / f"{colour}-{number}.png"
    picture(colour, number).save(path)
    return str(path)


def test_daemon_trained_model_is_promoted_files_and_is_demoted(
    colours: Path, write_config: Write, tmp_path: Path
) -> None:
    """The whole path with the real program: a ViT learns from the folders and decides while sortd runs.

    Promoted, with a class more, with that class gone, by a reload that wants the prototypes and one that does not, and
    demoted: each time the right one decides what comes next.
    """
    for index, colour in enumerate(COLOURS):
        for number in range(12):
            photo = picture(colour, 1000 + 100 * index + number, patches=40)
            photo.save(colours / "Clases" / colour / f"more{number}.png")
    config = write_config(device="cpu")
    loaded = read_config(config, {"HOME": str(tmp_path)})
    recipe = Recipe(epochs=3, batch_size=8, learning_rate=1e-3, evaluations=2, test=0.25, validation=0.25)
    request = TrainingRequest(Layout(colours), base=str(build_tiny_vit(tmp_path / "base")), recipe=recipe)
    output = output_of(request, loaded.state_dir, NOW)
    trained = run_finetuning(request, loaded, output, now=NOW, load_encoder=lambda _: FakeEncoder())
    assert trained is not None
    with running(config, program="sortd") as daemon:
        assert daemon.wait_for("image.filed", path=drop(colours, "red", 1))["mode"] == "max"
        promoted = sortd("models", "promote", "--dataset", "Colours", "--force", "-c", config, "--json").facts
        assert (promoted["folder"], promoted["model_id"]) == (str(output), trained.model_id)
        changed = daemon.wait_for("classifier.changed", classifier="finetuned", model_id=trained.model_id)
        for number, colour in enumerate(COLOURS):
            line = daemon.wait_for("image.filed", path=drop(colours, colour, 10 + number))
            assert (line["label"], line["mode"], line["encoder_id"]) == (colour, "finetuned", trained.model_id)
        assert line["generation"] == changed["generation"] > 1

        (colours / "Clases" / "mauve").mkdir()
        refused = daemon.wait_for("classifier.refused")["error"]
        assert "Clases/ has 'mauve', which the model does not know" in refused
        assert daemon.wait_for("image.filed", path=drop(colours, "red", 20))["mode"] == "max"
        (colours / "Clases" / "mauve").rmdir()
        daemon.wait_for("classifier.changed", count=2, classifier="finetuned")
        assert daemon.wait_for("image.filed", path=drop(colours, "blue", 21))["mode"] == "finetuned"

        write_config(device="cpu", classifier="prototypes")
        daemon.send(signal.SIGHUP)
        daemon.wait_for("classifier.changed", count=2, classifier="prototypes")
        write_config(device="cpu")
        daemon.send(signal.SIGHUP)
        daemon.wait_for("classifier.changed", count=3, classifier="finetuned")

        assert sortd("models", "demote", "--dataset", "Colours", "-c", config).code == 0
        daemon.wait_for("classifier.changed", count=3, classifier="prototypes")
        assert daemon.wait_for("image.filed", path=drop(colours, "red", 40))["mode"] == "max"
        assert daemon.stop() == 0
        assert not daemon.noise
        assert len(daemon.events("classifier.refused")) == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "there is no fine-tuned model in"),
        (lambda folder: flip(folder / WEIGHTS_FILE), "its sha256 differs"),
    ],
    ids=["no folder", "a flipped bit"],
)
def test_daemon_damaged_model_is_refused_at_the_start_and_the_prototypes_serve(
    colours: Path,
    write_config: Write,
    vit: FinetunedFacts,
    tmp_path: Path,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    """The sentence names what is wrong; the image is filed all the same, and the exit is a good one."""
    config, folder = write_config(), tmp_path / "promoted"
    shutil.copytree(vit.folder, folder)
    assert sortd("models", "promote", folder, "-c", config).code == 0
    damage(folder)
    drop(colours, "red", 1)
    with DaemonProcess(config, "once") as daemon:
        assert daemon.wait() == 0
    (refused,) = daemon.events("classifier.refused")
    assert said in refused["error"]
    assert [line["mode"] for line in daemon.events("image.filed")] == ["max"]


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
