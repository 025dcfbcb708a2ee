"""Embedding of paths, Pillow images and arrays."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sortd
from sortd.api.images import LoadedEncoder
from sortd.errors import DataError, UnreadableError
from tests.daemon_process import picture
from tests.fake_encoder import FakeEncoder


@pytest.fixture
def encoder() -> Iterator[LoadedEncoder]:
    """The fake encoder of the tests, as the library has it."""
    with LoadedEncoder(FakeEncoder()) as opened:
        yield opened


def test_path_image_and_array_give_one_row(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """An image has the same embedding as a path, a link, a Pillow image and an array, in whatever order."""
    image, other = picture("red", 1), picture("blue", 2)
    file, link = tmp_path / "red.png", tmp_path / "link.png"
    image.save(file)
    link.symlink_to(file)
    rows = encoder.encode_images([other, file, image, np.asarray(image), str(link), other])
    assert rows.dtype == np.float32
    assert np.allclose(rows[1:5], rows[1], atol=1e-6)
    assert np.allclose(rows[[0, 5]], rows[0], atol=1e-6)
    assert not np.allclose(rows[0], rows[1], atol=0.1)


def test_image_with_orientation_is_turned(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """The orientation in the EXIF holds for a Pillow image as for its file."""
    image = picture("red", 1, (64, 64))
    image.paste((0, 0, 0), (0, 0, 64, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        rows = encoder.encode_images([tmp_path / "turned.png", opened, image])
    assert np.allclose(rows[0], rows[1], atol=1e-6)
    assert not np.allclose(rows[0], rows[2], atol=0.1)


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), np.uint8(1)],
    ids=["floats", "four channels", "empty", "scalar"],
)
def test_array_of_another_kind_is_refused(encoder: LoadedEncoder, array: Any) -> None:
    """What is no image raises, with what an array must be."""
    with pytest.raises(ValueError, match="must be uint8"):
        encoder.encode_images([array])


@pytest.mark.parametrize("name", ["missing.png", "folder", "pipe.png", "broken.jpg", "note.txt"])
def test_path_that_is_no_image_is_named(encoder: LoadedEncoder, tmp_path: Path, name: str) -> None:
    """A path that cannot be decoded raises an error with its name; the encoder works on afterwards."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (tmp_path / "note.txt").write_text("a note")
    picture("red", 1).save(tmp_path / "red.png")
    with pytest.raises(UnreadableError, match=name):
        encoder.encode_images([tmp_path / "red.png", tmp_path / name])
    assert encoder.encode_images([tmp_path / "red.png"]).shape == (1, encoder.dimension)


@pytest.mark.parametrize("images", ["red.png", Path("red.png"), b"red.png", iter(())])
def test_single_image_instead_of_a_list_is_refused(encoder: LoadedEncoder, images: Any) -> None:
    """A path passed without a list is not read letter by letter."""
    with pytest.raises(TypeError, match="pass a list"):
        encoder.encode_images(images)


def test_nothing_gives_no_rows(encoder: LoadedEncoder) -> None:
    """Empty lists give empty matrices of the right width."""
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, encoder.dimension)


def test_closed_encoder_leaves_no_process_and_no_folder(
    encoder: LoadedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``close`` the decoding processes have ended and the temporary cache is gone; it can be used again."""
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    picture("red", 1).save(tmp_path / "red.png")
    first = encoder.encode_images([tmp_path / "red.png"])
    assert list(scratch.iterdir())
    encoder.close()
    assert not list(scratch.iterdir())
    assert np.array_equal(encoder.encode_images([tmp_path / "red.png"]), first)


def test_embeddings_are_kept_in_the_cache_folder(tmp_path: Path) -> None:
    """With a ``cache_dir`` a file is decoded and encoded once, also by the next encoder."""
    picture("red", 1).save(tmp_path / "red.png")
    with LoadedEncoder(FakeEncoder(), cache_dir=tmp_path / "cache") as first:
        row = first.encode_images([tmp_path / "red.png"])
    with LoadedEncoder(FakeEncoder(), cache_dir=tmp_path / "cache") as second:
        assert np.array_equal(second.encode_images([tmp_path / "red.png"]), row)
        assert second.embedder().forwards == 0


def test_encoder_of_images_refuses_texts() -> None:
    """An encoder without texts says so."""
    with pytest.raises(DataError, match="without texts"):
        LoadedEncoder(FakeEncoder(has_text=False)).encode_texts(["red"])


def test_text_instead_of_a_list_is_refused(encoder: LoadedEncoder) -> None:
    """One string is not read letter by letter."""
    with pytest.raises(TypeError, match="pass a list"):
        encoder.encode_texts("red")


def test_loaded_model_is_the_real_one(tiny_clip: Path) -> None:
    """``load_encoder`` loads a model folder, and refuses a missing one."""
    with sortd.load_encoder(str(tiny_clip), device="cpu", backend="torch") as encoder:
        rows = encoder.encode_images([picture("red", 1), picture("blue", 2)])
        assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
        assert encoder.encode_texts(["red"]).shape == (1, encoder.dimension)
    with pytest.raises(sortd.SortdError):
        sortd.load_encoder(str(tiny_clip / "missing"))


def test_single_array_is_refused(encoder: LoadedEncoder) -> None:
    """One image is no list of its rows; an array of several images is one."""
    image = np.asarray(picture("red", 1))
    single: list[Any] = [image, image[..., 0]]
    for one in single:
        with pytest.raises(TypeError, match="pass a list"):
            encoder.encode_images(one)
    several: Any = np.stack([image, image])
    assert len(encoder.encode_images(several)) == 2


def test_pillow_image_without_pixels_is_refused(encoder: LoadedEncoder, tmp_path: Path) -> None:
    """An empty image and one that Pillow cannot read to its end raise, with what is wrong."""
    with pytest.raises(ValueError, match="no pixels"):
        encoder.encode_images([Image.new("RGB", (0, 9))])
    picture("red", 1, (400, 400)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    with Image.open(tmp_path / "half.jpg") as half, pytest.raises(UnreadableError, match=r"half\.jpg: .*truncated"):
        encoder.encode_images([half])


def test_cache_stays_where_it_was_named(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative ``cache_dir`` is that of the call, although the cache is opened with the first file."""
    picture("red", 1).save(tmp_path / "red.png")
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    with sortd.load_encoder(str(tiny_clip), device="cpu", cache_dir="cache") as encoder:
        monkeypatch.chdir(tmp_path / "later")
        encoder.encode_images([tmp_path / "red.png"])
    assert (tmp_path / "cache").is_dir()
    assert not list((tmp_path / "later").iterdir())
