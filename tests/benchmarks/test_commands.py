"""Each benchmark runs: with one round of tiny pieces, so that its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import EXIT_MISSED, EXIT_UNDECIDED
from benchmarks.harness import REPOSITORY

pytestmark = pytest.mark.slow

MODULES = sorted((REPOSITORY / "benchmarks").glob("*.py"))
COMMANDS = [path.stem for path in MODULES if 'if __name__ == "__main__"' in path.read_text("utf-8")]
SMALL = ("--rounds", "1", "--photos", "6", "--piece", "6")


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def figures(command: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark with ``--json`` and return its figures; that floors are missed is no error."""
    done = run(command, *arguments, "--json")
    assert done.returncode in {0, EXIT_MISSED, EXIT_UNDECIDED}, done.stderr
    assert done.stdout.startswith("{"), done.stderr
    printed = json.loads(done.stdout)
    assert {"processor", "instructions", "load"} <= printed["machine"].keys()
    found: dict[str, Any] = printed["figures"]
    return found


def names_of(claims: list[dict[str, Any]]) -> list[str]:
    """Return what claims are about, without the photos and backends."""
    return [claim["what"].rpartition(": ")[2] for claim in claims]


@pytest.fixture(scope="module")
def kept(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--keep``, with a tiny model."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "model").symlink_to(tiny_clip)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command_describes_itself(command: str) -> None:
    """``--help`` of each command ends without an error."""
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_efficiency_compares_each_backend_with_its_bare_forward(kept: Path) -> None:
    """The daemon and the bare forward are both measured, and each backend has a claim."""
    found = figures("efficiency", "--keep", str(kept), "--pixels", "64x48", *SMALL)
    sides = {f"{backend}: {side}" for backend in ("torch", "onnx-int8") for side in ("sortd", "bare forward")}
    assert found["sides"].keys() == sides
    assert names_of(found["claims"]) == ["sortd over the bare forward"] * 2 + ["sortd over sortd with torch"]
    assert found["stages_ms"]["torch"].keys() == {"decode", "encode", "move"}


def test_baseline_compares_with_script_and_bound(kept: Path) -> None:
    """Script, decoding and bare forward are measured in the same rounds as the daemon, and the classes compared."""
    more = ("--backends", "onnx-int8", "--references", "6", "--classes", "3", "--pixels", "64x48")
    found = figures("baseline", "--keep", str(kept), *SMALL, *more)
    assert names_of(found["claims"]) == ["sortd over the script", "share of the bound"]
    assert found["photos_compared"] == 2
    assert found["same_classes"]["onnx-int8, draft"].keys() == {"avg", "max"}


def test_peers_compares_with_indexer_and_service(kept: Path) -> None:
    """Small photos have claims on speed, memory and the first line; large ones on speed and memory."""
    found = figures("peers", "--keep", str(kept), "--sizes", "64x48", "1200x900", "--backends", "onnx-int8", *SMALL)
    assert len(found["sides"]) == 6
    with_limit = [claim for claim in found["claims"] if claim["least"] or claim["most"]]
    assert names_of(with_limit) == [
        "sortd over the indexer",
        "peak memory of sortd, MiB",
        "seconds from model.loaded to the first image's line",
        "sortd over the indexer",
        "sortd over the service",
    ]


def test_onnx_compares_backends(kept: Path) -> None:
    """Speed of the encoders, start to READY and memory are compared with torch."""
    found = figures(
        "onnx", "--model", str(kept / "model"), "--cache", str(kept / "cache"), "--images", "2", "--rounds", "1"
    )
    assert len(found["claims"]) == 3
    assert found["torch"]["daemon_mebibytes"] > 0


def test_encoder_compares_models() -> None:
    """Two models embed the same photo."""
    found = figures("encoder", "--images", "1", "--rounds", "1")
    assert names_of(found["claims"]) == ["packaged model over CLIP ViT-B/32"]


def test_decoding_compares_ways() -> None:
    """Each way to decode is measured."""
    found = figures("decoding", "--count", "20", "--rounds", "1", "--side", "800")
    assert len(found["sides"]) == len(found["claims"]) == 6


def test_review_measures_pages_and_filing() -> None:
    """Few images wait, and few are filed beside a reader."""
    found = figures("review", "--images", "120", "--filed", "4", "--rounds", "1")
    assert found["pages"]["waiting"] == 120
    assert found["sides"].keys() == {"alone", "beside a reader"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("core", ("--images", "4000", "--files", "2000")),
        ("scale", ("rebuild", "decide", "--references", "200", "--library", "400", "--classes", "40")),
        ("daemon", ("startup",)),
        ("path", ()),
        ("journal_size", ("--images", "300")),
        ("finetuning", ("--small", "--images", "20", "--epochs", "1", "--device", "cpu", "--rounds", "1")),
    ],
)
def test_other_commands_print_figures(command: str, arguments: tuple[str, ...]) -> None:
    """Tiny sizes give figures, too."""
    assert figures(command, *arguments)


def test_notifications_sends_no_more_than_allowed() -> None:
    """Both sides file the images, and the hook gets few of the events."""
    found = figures("notifications", "--rounds", "1", "--images", "6")
    assert set(found["sides"]) == {"without notifications", "with 10,000 events a round"}
    assert names_of(found["claims"]) == ["images a second, beside notifications", "images a second of processors"]
    assert (found["events"], found["messages to the hook"] <= 20) == (10_000, True)
