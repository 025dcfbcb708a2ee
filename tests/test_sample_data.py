"""The sample data: the same for everybody, never written over, and hard for whoever looks at colours alone."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, UnidentifiedImageError

from tests.daemon_process import PATIENCE_SECONDS

DATA = Path(__file__).parents[1] / "Data"
CLASSES = DATA / "Tornillos" / "Clases"
KINDS = {"cross", "torx", "slotted", "hex"}

Features = Callable[[Image.Image], npt.NDArray[np.float64]]


def draw(*arguments: object) -> str:
    """Run the drawing script as ``make run`` does; return what it printed."""
    command = [sys.executable, os.fspath(DATA / "draw.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS).stdout


def contents(folder: Path) -> dict[str, str]:
    """Return the files below a folder with the hashes of what they hold."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {os.fspath(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A dataset with its images to be sorted, and what each of them shows."""
    dataset = tmp_path_factory.mktemp("sample") / "Tornillos"
    truth = dataset.parent / "truth.json"
    draw("incoming", "--dataset", dataset, "--truth", truth)
    return dataset, json.loads(truth.read_text(encoding="utf-8"))


def test_the_references_in_the_repository_are_six_a_class() -> None:
    """Four classes, six readable images each, and together they are small."""
    files = [path for path in CLASSES.rglob("*") if path.is_file()]
    assert Counter(path.parent.name for path in files) == dict.fromkeys(KINDS, 6)
    assert {Image.open(path).convert("RGB").size for path in files} == {(240, 240)}
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_the_references_are_those_that_the_script_draws(tmp_path: Path) -> None:
    """Nobody has touched them up; another Pillow may round a shade differently, no more."""
    draw("references", "--into", tmp_path)
    assert set(contents(tmp_path)) == set(contents(CLASSES))
    for name in contents(CLASSES):
        ours, kept = (np.asarray(Image.open(folder / name).convert("RGB"), int) for folder in (tmp_path, CLASSES))
        assert np.abs(ours - kept).mean() < 3


@pytest.mark.slow
def test_the_same_seed_draws_the_same_bytes(batch: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Two machines with the same libraries sort the same images."""
    draw("incoming", "--dataset", tmp_path)
    assert contents(tmp_path / "Images") == contents(batch[0] / "Images")


def test_the_batch_is_mixed(batch: tuple[Path, dict[str, str]]) -> None:
    """Mostly screws of all kinds, some that belong to no class, one file that is broken, several formats."""
    dataset, truth = batch
    files = sorted((dataset / "Images").iterdir())
    assert [path.name for path in files] == sorted(truth)
    assert len(files) == 40
    shown = Counter(truth.values())
    assert all(shown[kind] >= 7 for kind in KINDS)
    assert 5 <= shown[""] <= 10
    assert {".jpg", ".JPG", ".png", ".webp", ".jpeg"} >= {path.suffix for path in files} >= {".jpg", ".png", ".webp"}
    assert sum(path.stat().st_size for path in files) < 2_000_000
    broken, turned = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
                if image.getexif().get(0x0112, 1) != 1:
                    turned.append(path)
        except (OSError, UnidentifiedImageError):
            broken.append(path)
    assert [truth[path.name] for path in broken] == [""]
    assert len(turned) == 1


def test_names_do_not_tell(batch: tuple[Path, dict[str, str]]) -> None:
    """A camera's number, and no order in which the classes could hide."""
    stems = [Path(name).stem for name in sorted(batch[1])]
    assert all(stem.startswith("IMG_") and stem[4:].isdigit() for stem in stems)
    labels = [label for _, label in sorted(batch[1].items())]
    assert sum(first == second for first, second in pairwise(labels)) < 20


@pytest.mark.slow
def test_what_was_drawn_before_is_left_alone(batch: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """A second `make run` brings no second copy, sorted or not, unless it is asked to."""
    dataset = tmp_path / "Tornillos"
    sorted_away = dataset / "Dataset" / "hex" / "IMG_1252.jpg"
    sorted_away.parent.mkdir(parents=True)
    sorted_away.write_bytes(b"mine")
    assert "nothing drawn" in draw("incoming", "--dataset", dataset)
    assert contents(dataset) == {"Dataset/hex/IMG_1252.jpg": hashlib.sha256(b"mine").hexdigest()}
    draw("incoming", "--dataset", dataset, "--again")
    drawn = contents(dataset / "Images")
    assert len(drawn) == 40
    assert sorted_away.read_bytes() == b"mine"
    assert not set(drawn.values()) & set(contents(batch[0] / "Images").values())
    before = contents(CLASSES)
    assert "nothing drawn" in draw("references")
    assert contents(CLASSES) == before


@pytest.mark.slow
def test_colours_do_not_tell_the_kinds_apart_and_shapes_do(tmp_path: Path) -> None:
    """With five references a class, a histogram and a thumbnail stay below half; the recess's outline is easy."""
    draw("references", "--into", tmp_path, "--each", 14, "--seed", 3)
    paths = sorted(tmp_path.rglob("*.*"))
    images = [Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC) for path in paths]
    labels = np.array([sorted(KINDS).index(path.parent.name) for path in paths])
    assert accuracy(images, labels, colours) <= 0.5
    assert accuracy(images, labels, outline) >= 0.65


def accuracy(images: list[Image.Image], labels: npt.NDArray[np.int64], features: Features, shots: int = 5) -> float:
    """Return the share of images whose nearest reference is of their class, over twenty random support sets."""
    rows = np.stack([features(image) for image in images])
    rows -= rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    random, hits = np.random.default_rng(1), []
    for _ in range(20):
        chosen = np.concatenate([random.permutation(np.flatnonzero(labels == kind))[:shots] for kind in range(4)])
        query = np.setdiff1d(np.arange(len(labels)), chosen)
        nearest = chosen[np.argmax(rows[query] @ rows[chosen].T, axis=1)]
        hits.append((labels[nearest] == labels[query]).mean())
    return float(np.mean(hits))


def colours(image: Image.Image) -> npt.NDArray[np.float64]:
    """Count colours (hue, saturation, value), and shrink the image to 8 x 8."""
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), int), 2, 0)
    counts = np.bincount((hue // 16 * 16 + saturation // 64 * 4 + value // 64).ravel(), minlength=256)
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float).ravel()
    standing_out = 0.02 * (thumbnail - thumbnail.mean()) / (thumbnail.std() + 1e-6)
    return np.concatenate([np.sqrt(counts / counts.sum()), standing_out])


def outline(image: Image.Image) -> npt.NDArray[np.float64]:
    """Walk circles around the middle and note how often grey goes up and down: what a turn does not change."""
    grey = np.asarray(image.convert("L"), float)
    radius, angle = np.linspace(4, 28, 16)[:, None], np.linspace(0, 2 * np.pi, 64, endpoint=False)
    rows, columns = (
        np.clip(np.rint(31.5 + radius * turn), 0, 63).astype(int) for turn in (np.sin(angle), np.cos(angle))
    )
    walked = grey[rows, columns]
    return np.log1p(np.abs(np.fft.rfft(walked - walked.mean(), axis=1))[:, 1:14]).ravel()
