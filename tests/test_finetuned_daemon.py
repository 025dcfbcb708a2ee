"""A fine-tuned model at work: promoted while sortd runs, refused when it does not fit, and taken back."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sortd.finetuned import WEIGHTS_FILE, FinetunedFacts
from tests.command_line import sortd
from tests.daemon_process import COLOURS, DaemonProcess, picture, running

Write = Callable[..., Path]


def drop(dataset: Path, colour: str, number: int) -> str:
    """Put an image into the inbox and return its path."""
    path = dataset / "Images" / f"{colour}-{number}.png"
    picture(colour, number).save(path)
    return str(path)


def test_a_running_sortd_files_by_what_is_promoted_until_it_is_demoted(
    colours: Path, write_config: Write, vit: FinetunedFacts
) -> None:
    """Promote, a class more, a class less, a reload that wants the prototypes, demote: each decides what comes next."""
    config = write_config()
    with running(config) as daemon:
        assert daemon.wait_for("image.filed", path=drop(colours, "red", 1))["mode"] == "max"
        promoted = sortd("models", "promote", vit.folder, "--dataset", "Colours", "-c", config, "--json")
        assert (promoted.code, promoted.facts["verdict"]) == (0, "stronger")
        changed = daemon.wait_for("classifier.changed")
        assert (changed["classifier"], changed["model_id"]) == ("finetuned", vit.model_id)
        for number, colour in enumerate(COLOURS):
            line = daemon.wait_for("image.filed", path=drop(colours, colour, 10 + number))
            assert (line["label"], line["mode"], line["encoder_id"]) == (colour, "finetuned", vit.model_id)
        assert line["generation"] == changed["generation"] > 1

        (colours / "Clases" / "mauve").mkdir()
        refused = daemon.wait_for("classifier.refused")["error"]
        assert "Clases/ has 'mauve', which the model does not know" in refused
        assert daemon.wait_for("image.filed", path=drop(colours, "red", 20))["mode"] == "max"
        (colours / "Clases" / "mauve").rmdir()
        daemon.wait_for("classifier.changed", count=2, classifier="finetuned")
        assert daemon.wait_for("image.filed", path=drop(colours, "blue", 21))["mode"] == "finetuned"

        write_config(classifier="prototypes")
        daemon.send(signal.SIGHUP)
        daemon.wait_for("classifier.changed", count=2, classifier="prototypes")
        assert daemon.wait_for("image.filed", path=drop(colours, "green", 30))["mode"] == "max"
        write_config()
        daemon.send(signal.SIGHUP)
        daemon.wait_for("classifier.changed", count=3, classifier="finetuned")

        demoted = sortd("models", "demote", "--dataset", "Colours", "-c", config, "--json")
        assert demoted.facts["demoted"]
        daemon.wait_for("classifier.changed", count=3, classifier="prototypes")
        assert daemon.wait_for("image.filed", path=drop(colours, "green", 40))["mode"] == "max"
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
def test_a_damaged_model_is_refused_at_the_start_and_the_prototypes_serve(
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
