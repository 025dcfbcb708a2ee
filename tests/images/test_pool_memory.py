"""The memory budget of decoding: large images wait for each other, small ones do not wait."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from sortd.errors import CrowdedError
from sortd.events import ImageRefused, Preprocessing, Refusal
from sortd.images.decode import DecodeLimits, decode_file, decode_image
from sortd.images.decoder_process import DEFAULT_BUDGET_PIXELS
from sortd.images.formats import FORMATS
from sortd.images.pool import Batch, DecodedImage, DecoderPool
from tests.bombs import one_bit_png, png, saved
from tests.images.test_pool import memory_kb, open_files, photo, stamped, warmed

SMALL = Preprocessing(64, 64, 64)
WIDTH, HEIGHT = 3000, 2000
PIXELS = WIDTH * HEIGHT


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Write images of six megapixels, among many small ones."""
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"large-{number}.png")
        paths[-1].write_bytes(one_bit_png(WIDTH, HEIGHT))
        paths += [photo(tmp_path / f"small-{number}-{k}.png", k) for k in range(4)]
    return paths


def taken_by_turns(pool: DecoderPool, batch: Batch) -> Iterator[int]:
    """Decode a batch, and yield what its large images have been given whenever the processes have been fed."""
    while batch.waiting or batch.unanswered:
        pool.feed(batch)
        yield sum(job.needed_pixels for handle in pool._decoders for job in handle.jobs)
        pool.collect(None)


def give_a_large_one(pool: DecoderPool, batch: Batch, process_id: int) -> None:
    """Stop an idle process and give it a large image, which it cannot answer before it goes on."""
    pool.feed(batch)
    while any(handle.jobs for handle in pool._decoders):  # each image comes back, since it needs more memory
        pool.collect(None)
    os.kill(process_id, signal.SIGSTOP)
    pool.feed(batch)
    assert [job.needed_pixels for handle in pool._decoders for job in handle.jobs] == [PIXELS]


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_pool_large_images_share_the_memory_budget(mixed: list[Path], tmp_path: Path, at_a_time: int) -> None:
    """As many are decoded at once as fit, and every image has the pixels of ``decode_file``."""
    batch, limits = Batch(deque(stamped(*mixed))), DecodeLimits(max_pixels=at_a_time * PIXELS + 1)
    with DecoderPool(3, SMALL, limits) as pool:
        warmed(pool, tmp_path)
        assert max(taken_by_turns(pool, batch)) == at_a_time * PIXELS
    answers = {answer.path: answer for answer in batch.answers}
    assert len(batch.answers) == len(mixed)
    for path in map(os.fspath, mixed):
        answer = answers[path]
        assert isinstance(answer, DecodedImage)
        assert np.array_equal(answer.pixels, decode_file(path, SMALL, limits))


def test_pool_small_images_are_decoded_while_a_large_one_waits(mixed: list[Path], tmp_path: Path) -> None:
    """While one process has a large image, the other answers all small ones."""
    limits = DecodeLimits(max_pixels=PIXELS)
    with DecoderPool(2, SMALL, limits) as pool:
        warmed(pool, tmp_path)
        batch = Batch(deque(stamped(*[path for path in mixed if "large" in path.name])))
        busy, free = pool._decoders
        give_a_large_one(pool, batch, busy.process.pid)
        small = Batch(deque(stamped(*[path for path in mixed if "small" in path.name])))
        before = len(batch.answers)
        pool.feed(small)
        while free.jobs:
            pool.collect(None)
            pool.feed(small)
        assert {type(answer) for answer in small.answers} == {DecodedImage}
        assert len(batch.answers) == before
        os.kill(busy.process.pid, signal.SIGCONT)
        while batch.unanswered or batch.waiting or small.unanswered or small.waiting:
            pool.feed(batch)
            pool.feed(small)
            pool.collect(None)
        assert len(small.answers) == 24
        assert {type(answer) for answer in batch.answers} == {DecodedImage}


def test_pool_large_image_that_kills_its_process_frees_its_budget(tmp_path: Path) -> None:
    """It is poison, and the next large image is decoded."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(one_bit_png(WIDTH, HEIGHT))
    with DecoderPool(1, SMALL, DecodeLimits(max_pixels=PIXELS), kills=1) as pool:
        (process_id,) = warmed(pool, tmp_path)
        batch = Batch(deque(stamped(paths[0])))
        give_a_large_one(pool, batch, process_id)
        os.kill(process_id, signal.SIGKILL)
        pool.collect(None)
        (poison,) = batch.answers
        assert isinstance(poison, ImageRefused)
        assert poison.refusal is Refusal.POISON
        others = list(pool.decode_all(stamped(*paths[1:])))
    assert {type(answer) for answer in others} == {DecodedImage}
    assert len(others) == 2


def test_pool_dropped_large_images_are_closed(mixed: list[Path], tmp_path: Path) -> None:
    """They hold no file open."""
    with DecoderPool(1, SMALL, DecodeLimits(max_pixels=PIXELS)) as pool:
        warmed(pool, tmp_path)
        before = open_files()
        batch = Batch(deque(stamped(*[path for path in mixed if "large" in path.name])))
        while not pool._large:
            pool.feed(batch)
            pool.collect(None)
        assert open_files() > before
        pool.drop(batch)
        assert open_files() == before
        (later,) = pool.decode_all(stamped(photo(tmp_path / "later.png")))
        assert isinstance(later, DecodedImage)


class TestBudget:
    """The budget of an image, from its header."""

    @staticmethod
    def room_of(content: bytes, folder: Path, *, preprocessing: Preprocessing = SMALL) -> int:
        """Return how much room an image asks for when it is given none."""
        path = folder / "image"
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(CrowdedError) as raised:
            decode_image(file, preprocessing, DecodeLimits(), budget_pixels=0)
        return raised.value.pixels

    def test_budget_of_a_jpeg_is_that_of_its_scale(self, tmp_path: Path) -> None:
        """A JPEG of twelve megapixels is decoded at 1/8, within the default budget."""
        jpeg = saved(Image.new("RGB", (4000, 3000)), "JPEG")
        assert self.room_of(jpeg, tmp_path) == 500 * 375
        assert DEFAULT_BUDGET_PIXELS > 500 * 375

    def test_budget_of_a_progressive_jpeg_is_that_of_all_pixels(self, tmp_path: Path) -> None:
        """Its coefficients are held until the last scan, at any scale."""
        jpeg = saved(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True)
        assert self.room_of(jpeg, tmp_path) == 4000 * 3000

    def test_budget_of_a_file_larger_than_its_pixels_is_its_size(self, tmp_path: Path) -> None:
        """Some decoders read the whole file first."""
        assert self.room_of(saved(Image.new("RGB", (64, 64)), "WEBP") + 400_000 * b"x", tmp_path) > 100_000

    def test_budget_is_at_most_max_pixels(self, tmp_path: Path) -> None:
        """A progressive JPEG over the limit gets the whole budget."""
        jpeg = saved(Image.new("L", (9000, 7000)), "JPEG", progressive=True)
        assert self.room_of(jpeg, tmp_path) == DecodeLimits().max_pixels


def heif(image: Image.Image, **options: object) -> bytes:
    """Encode an image as HEIC."""
    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", enc_params={"preset": "ultrafast"}, **options)


SIDE = 1500
OVERHEAD_KB = 12_000
"""What decoding takes beside what the pixels take."""
SMOOTH = Image.merge("RGB", [Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(90 * turn) for turn in range(3)])
INKED, CLEAR = SMOOTH.convert("CMYK"), SMOOTH.convert("RGBA")
CLEAR.putalpha(Image.radial_gradient("L").resize((SIDE, SIDE)))
DEEP = Image.fromarray(np.add.outer(np.arange(SIDE), np.arange(SIDE)).astype(np.uint16) * 30)
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: saved(SMOOTH, "JPEG"),
    "JPEG, progressive": lambda: saved(SMOOTH, "JPEG", progressive=True, subsampling=0),
    "JPEG, inked, progressive, turned": lambda: saved(INKED, "JPEG", progressive=True, exif=TURNED.tobytes()),
    "PNG": lambda: saved(SMOOTH, "PNG"),
    "PNG, transparent, turned": lambda: saved(CLEAR, "PNG", exif=TURNED.tobytes()),
    "PNG, palette, transparent": lambda: saved(SMOOTH.convert("P"), "PNG", transparency=0),
    "PNG, 16 bits": lambda: saved(DEEP, "PNG"),
    "PNG, 16 bits a channel": lambda: png(SIDE, SIDE, depth=16, channels=4),
    "GIF": lambda: saved(SMOOTH, "GIF"),
    "GIF, transparent": lambda: saved(SMOOTH.convert("P"), "GIF", transparency=0),
    "BMP": lambda: saved(SMOOTH, "BMP"),
    "BMP, transparent": lambda: saved(CLEAR, "BMP"),
    "TIFF": lambda: saved(SMOOTH, "TIFF"),
    "TIFF, packed, inked, turned": lambda: saved(INKED, "TIFF", compression="tiff_lzw", exif=TURNED.tobytes()),
    "TIFF, in one strip": lambda: saved(CLEAR, "TIFF", compression="tiff_deflate", tiffinfo={278: SIDE}),
    "TIFF, 16 bits": lambda: saved(DEEP, "TIFF", compression="tiff_lzw"),
    "TIFF, floats": lambda: saved(Image.fromarray(np.asarray(DEEP).astype(np.float32)), "TIFF"),
    "WEBP": lambda: saved(SMOOTH, "WEBP"),
    "WEBP, lossless": lambda: saved(SMOOTH, "WEBP", lossless=True, method=0),
    "WEBP, transparent, turned": lambda: saved(CLEAR, "WEBP", exif=TURNED.tobytes()),
    "WEBP, animated": lambda: saved(SMOOTH, "WEBP", save_all=True, append_images=[CLEAR]),
    "AVIF": lambda: saved(SMOOTH, "AVIF", speed=10),
    "AVIF, 4:4:4, transparent": lambda: saved(CLEAR, "AVIF", speed=10, subsampling="4:4:4", exif=TURNED.tobytes()),
    "AVIF, animated": lambda: saved(SMOOTH, "AVIF", speed=10, save_all=True, append_images=[CLEAR]),
    "HEIC": lambda: heif(SMOOTH),
    "HEIC, 4:4:4, transparent, turned": lambda: heif(CLEAR, chroma=444, exif=TURNED.tobytes()),
    "HEIC, tiles": lambda: heif(SMOOTH, tile_size=256),
    "HEIC, 10 bits": lambda: heif(DEEP),
}


@pytest.fixture(scope="module")
def exact() -> Iterator[DecoderPool]:
    """A process that decodes images of two megapixels, and none that is larger; every pixel of a JPEG."""
    with DecoderPool(1, SMALL, DecodeLimits(max_pixels=SIDE * SIDE), timeout_seconds=60, jpeg="full") as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_max_pixels_fits_into_the_memory(exact: DecoderPool, tmp_path: Path, kind: str) -> None:
    """What the limit on pixels allows, the limit on memory allows too, in every format and kind."""
    path = tmp_path / "image"
    path.write_bytes(KINDS[kind]())
    (process_id,) = warmed(exact, tmp_path)
    Path(f"/proc/{process_id}/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew, see proc(5)
    idle = memory_kb(process_id, "VmRSS")
    (answer,) = exact.decode_all(stamped(path))
    assert isinstance(answer, DecodedImage), answer
    allowed = next(one.peak_bytes for one in FORMATS if one.title == kind.split(",", maxsplit=1)[0])
    assert memory_kb(process_id, "VmHWM") - idle < allowed * SIDE * SIDE / 1024 + OVERHEAD_KB
    assert np.array_equal(answer.pixels, decode_file(os.fspath(path), SMALL, DecodeLimits(), jpeg="full"))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_decode_of_more_than_max_pixels_names_the_limit(exact: DecoderPool, tmp_path: Path, image_format: str) -> None:
    """One row more is refused before anything is decoded, whatever the decoder would have said of it."""
    larger = SMOOTH.resize((SIDE, SIDE + 2))
    path = tmp_path / "image"
    path.write_bytes(heif(larger) if image_format == "HEIF" else saved(larger, image_format))
    (answer,) = exact.decode_all(stamped(path))
    assert isinstance(answer, ImageRefused)
    assert answer.refusal is Refusal.TOO_LARGE
    assert "over the limit of 2,250,000; see decoding.max_pixels" in answer.message


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_decode_of_the_default_max_pixels_fits_into_the_memory(tmp_path: Path, image_format: str) -> None:
    """The photos of today's cameras, of 48 megapixels, are decoded with the limits that nobody changed."""
    large = SMOOTH.resize((8000, 6000))
    path = tmp_path / "image"
    path.write_bytes(heif(large) if image_format == "HEIF" else saved(large, image_format))
    with DecoderPool(1, SMALL, DecodeLimits(), timeout_seconds=60, jpeg="full") as pool:
        (answer,) = pool.decode_all(stamped(path))
    assert isinstance(answer, DecodedImage), answer
