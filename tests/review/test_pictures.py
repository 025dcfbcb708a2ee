"""The pictures of the review page: re-encoded, of the right size, cached, and no image holds up another one."""

import hashlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from sortd.config import Config, Decoding
from sortd.events import Stamp
from sortd.files import stamp_of
from sortd.images import decoder_process
from sortd.review.pictures import SIDES, Pictures
from tests.bombs import bombs, png, write_hostile_files
from tests.hostile_files import HOSTILE

LARGEST_SIDE = 2000
"""Of a square of as many pixels as may be decoded: large ones take long."""
ORIENTATION, MAKER, GPS = 0x0112, 0x010F, 0x8825
PRIVATE = "only in the original"
pillow_heif.register_heif_opener()


def configuration(folder: Path, *, timeout_seconds: float = 20.0, side: int = LARGEST_SIDE) -> Config:
    """Return a configuration whose folders are in a temporary one."""
    decoding = Decoding(timeout_seconds=timeout_seconds, max_pixels=side**2)
    return Config(root=folder / "Data", state_dir=folder / "state", cache_dir=folder / "cache", decoding=decoding)


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Pictures]:
    """Pictures with an empty cache."""
    with Pictures(configuration(tmp_path)) as pictures:
        yield pictures


@pytest.fixture(scope="class")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pictures]:
    """Pictures with processes of both sizes."""
    folder = tmp_path_factory.mktemp("shared")
    with Pictures(configuration(folder)) as pictures:
        for side in SIDES:
            assert jpeg(pictures, photo(folder / "first.png"), side)
        yield pictures


def version(path: Path) -> Stamp:
    """Return the stamp of what has a name, also of a link."""
    return stamp_of(path.lstat())


def photo(path: Path, size: tuple[int, int] = (300, 200), seed: int = 0, **options: Any) -> Path:
    """Write an image of coloured noise."""
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(values).resize(size).save(path, compress_level=1, **options)
    return path


def jpeg(pictures: Pictures, path: Path, side: int = 160, content: str = "") -> bytes | None:
    """Return the picture of what has a name now."""
    return pictures.jpeg(os.fspath(path), version(path), content, side)


def shown(pictures: Pictures, path: Path, side: int = 160) -> Image.Image:
    """Return the picture of an image that can be shown, as a browser sees it."""
    content = jpeg(pictures, path, side)
    assert content is not None
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        return image.convert("RGB")


def sha256_of(path: Path) -> str:
    """Return the content of an image, as the index knows it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached(folder: Path) -> set[str]:
    """Return the names of the files in the cache."""
    return {path.name for path in (folder / "cache").rglob("*.jpg")}


def decoders() -> list[int]:
    """Return the decoding processes that this process has started."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    numbers = [int(number) for path in children for number in path.read_text(encoding="ascii").split()]
    return [number for number in numbers if b"decoder_process" in Path(f"/proc/{number}/cmdline").read_bytes()]


class TestPictures:
    """What is shown of an image, and what is not: by processes that many images leave as they were."""

    @pytest.fixture
    def pictures(self, shared: Pictures) -> Pictures:
        """Pictures with processes of both sizes, which were started once."""
        return shared

    @pytest.mark.parametrize(("size", "small", "large"), [
        ((2400, 1200), (160, 80), (1024, 512)), ((1200, 2400), (80, 160), (512, 1024)), ((90, 40), (90, 40), (90, 40)),
        ((1, 40_000), (1, 160), (1, 1024)), ((40_000, 1), (160, 1), (1024, 1)), ((160, 160), (160, 160), (160, 160)),
    ])  # fmt: skip
    @pytest.mark.parametrize("kind", ["jpg", "png"])
    def test_jpeg_is_whole_and_not_enlarged(
        self,
        pictures: Pictures,
        tmp_path: Path,
        size: tuple[int, int],
        small: tuple[int, int],
        large: tuple[int, int],
        kind: str,
    ) -> None:
        """The longer side is the one that was asked for, unless the image is smaller."""
        path = photo(tmp_path / f"a.{kind}", size)
        assert [shown(pictures, path, side).size for side in SIDES] == [small, large]

    def test_jpeg_stands_upright(self, pictures: Pictures, tmp_path: Path) -> None:
        """As the camera's orientation says."""
        drawn = Image.new("RGB", (300, 200), "red")
        drawn.paste((0, 0, 255), (0, 0, 150, 100))
        corners = {1: (5, 5), 2: (-5, 5), 3: (-5, -5), 4: (5, -5), 5: (5, 5), 6: (-5, 5), 7: (-5, -5), 8: (5, -5)}
        for orientation, (x, y) in corners.items():
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            drawn.save(tmp_path / f"{orientation}.jpg", exif=exif)
            image = shown(pictures, tmp_path / f"{orientation}.jpg")
            assert image.size == ((160, 107) if orientation < 5 else (107, 160))
            blue = image.getpixel((x % image.width, y % image.height))
            assert isinstance(blue, tuple)
            assert blue[2] > 200 > blue[0]

    def test_jpeg_has_no_metadata_of_the_original(self, pictures: Pictures, tmp_path: Path) -> None:
        """No place, camera, comment, profile or appended data."""
        exif = Image.Exif()
        exif[MAKER] = PRIVATE
        exif[GPS] = {1: "N", 2: (41.0, 23.0, 1.0), 3: "E", 4: (2.0, 9.0, 1.0), 29: PRIVATE}
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        path = photo(tmp_path / "a.jpg", exif=exif, icc_profile=profile, comment=PRIVATE.encode())
        with path.open("ab") as file:
            file.write(PRIVATE.encode())
        assert path.read_bytes().count(PRIVATE.encode()) == 4
        for side in SIDES:
            content = jpeg(pictures, path, side)
            assert content is not None
            assert not [word for word in (PRIVATE.encode(), b"Exif", b"ICC", b"http", b"Photoshop") if word in content]
            with Image.open(io.BytesIO(content)) as image:
                assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}

    def test_jpeg_of_a_small_jpeg_is_not_its_bytes(self, pictures: Pictures, tmp_path: Path) -> None:
        """Also where nothing had to be changed."""
        path = photo(tmp_path / "a.jpg", (100, 80))
        assert jpeg(pictures, path) != path.read_bytes()

    def test_jpeg_of_each_format(self, pictures: Pictures, tmp_path: Path) -> None:
        """Frame 0 of animations, over white where transparent."""
        clear = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
        clear.paste((255, 0, 0, 255), (100, 0, 200, 100))
        red = Image.new("RGB", (200, 100), "white")
        red.paste((255, 0, 0), (100, 0, 200, 100))
        blue = Image.new("RGB", (200, 100), "blue")
        clear.save(tmp_path / "alpha.png")
        clear.save(tmp_path / "alpha.webp", lossless=True)
        clear.save(tmp_path / "clear.gif")
        red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue], duration=50)
        red.save(tmp_path / "moving.png", save_all=True, append_images=[blue], duration=50)
        red.save(tmp_path / "moving.webp", save_all=True, append_images=[blue], duration=50)
        red.save(tmp_path / "a.heic")
        red.save(tmp_path / "a.avif")
        red.convert("CMYK").save(tmp_path / "inks.tif")
        names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
        assert len(names) == 9
        for name in names:
            image = shown(pictures, tmp_path / name)
            assert image.size == (160, 80)
            left, right = np.asarray(image)[40, 20].astype(int), np.asarray(image)[40, 140].astype(int)
            assert left.min() > 230, name
            assert right[0] > 200, name
            assert right[1:].max() < 60, name

    def test_jpeg_of_another_version_is_none(self, pictures: Pictures, tmp_path: Path) -> None:
        """Also if its picture is cached: an id names one version."""
        path = photo(tmp_path / "a.png")
        before, content = version(path), sha256_of(path)
        assert pictures.jpeg(os.fspath(path), before, content, 160)
        photo(path, seed=1)
        assert pictures.jpeg(os.fspath(path), before, content, 160) is None
        after = version(path)
        path.unlink()
        assert pictures.jpeg(os.fspath(path), after, "", 160) is None
        assert pictures.jpeg(os.fspath(path / "below"), after, "", 160) is None

    @pytest.mark.parametrize("place", HOSTILE.values(), ids=HOSTILE)
    def test_jpeg_of_what_is_no_file_is_none(
        self, pictures: Pictures, tmp_path: Path, place: Callable[[Path], None]
    ) -> None:
        """Neither is waited for."""
        place(tmp_path / "a.png")
        assert jpeg(pictures, tmp_path / "a.png") is None

    def test_jpeg_of_a_link_to_an_image_is_none(self, pictures: Pictures, tmp_path: Path) -> None:
        """Whatever stamp the caller has."""
        path = photo(tmp_path / "a.png")
        (tmp_path / "link.png").symlink_to(path)
        assert jpeg(pictures, tmp_path / "link.png") is None
        assert pictures.jpeg(os.fspath(tmp_path / "link.png"), version(path), sha256_of(path), 160) is None


class TestRefusals:
    """What is not shown, and what the processes do then."""

    def test_jpeg_of_a_file_written_to_during_decoding_is_none(self, pictures: Pictures, tmp_path: Path) -> None:
        """The half of one version and the half of another one are no picture."""
        assert jpeg(pictures, photo(tmp_path / "first.png"))
        (process_id,) = decoders()
        path = photo(tmp_path / "a.png")
        os.kill(process_id, signal.SIGSTOP)
        future = pictures._makers[160].ask((os.fspath(path), version(path)), is_content_known=False)
        photo(path, seed=1)
        os.kill(process_id, signal.SIGCONT)
        assert future.result(60) is None
        assert len(cached(tmp_path)) == 1
        assert jpeg(pictures, path)

    def test_jpeg_of_a_broken_image_is_none_and_is_remembered(self, pictures: Pictures, tmp_path: Path) -> None:
        """Until it changes."""
        path = tmp_path / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n torn")
        assert jpeg(pictures, path) is None
        assert list(pictures._makers[160]._refused) == [(os.fspath(path), version(path))]
        assert jpeg(pictures, path) is None
        photo(path)
        assert jpeg(pictures, path)
        assert cached(tmp_path)

    def test_jpeg_of_hostile_files_is_none_or_a_picture(self, tmp_path: Path) -> None:
        """Asked for by many threads at once; afterwards an intact image is shown."""
        folder = tmp_path / "hostile"
        folder.mkdir()
        sound = write_hostile_files(folder)
        for name, content in bombs(LARGEST_SIDE).items():
            (folder / f"bomb {name}").write_bytes(content)
        files = [path for path in folder.rglob("*") if path.is_file()]
        with Pictures(configuration(tmp_path)) as pictures, ThreadPoolExecutor(8) as threads:
            answers = dict(zip(files, threads.map(lambda path: jpeg(pictures, path, 1024), files), strict=True))
            assert jpeg(pictures, photo(tmp_path / "after.png"), 1024)
        assert all(answers[path] for path in sound)
        for answer in filter(None, answers.values()):
            with Image.open(io.BytesIO(answer)) as image:
                assert image.format == "JPEG"
                assert max(image.size) <= 1024

    def test_jpeg_of_an_image_over_the_time_limit_is_none_and_is_remembered(self, tmp_path: Path) -> None:
        """It ends its process once; others are shown."""
        slow = tmp_path / "slow.png"
        slow.write_bytes(png(4000, 4000, depth=16, channels=4))
        with Pictures(configuration(tmp_path, side=4000), decode_seconds=0.05) as pictures:
            assert jpeg(pictures, slow) is None
            assert list(pictures._makers[160]._refused) == [(os.fspath(slow), version(slow))]
            assert jpeg(pictures, slow) is None
            assert any(jpeg(pictures, photo(tmp_path / f"{number}.png", (20, 20))) for number in range(9))

    def test_jpeg_of_others_does_not_wait_for_one_that_hangs(self, tmp_path: Path) -> None:
        """A process that never answers has one image only."""
        with Pictures(configuration(tmp_path, timeout_seconds=3000), decode_seconds=3000) as pictures:
            assert jpeg(pictures, photo(tmp_path / "first.png"))
            (process_id,) = decoders()
            os.kill(process_id, signal.SIGSTOP)
            hanging = photo(tmp_path / "hanging.png")
            future = pictures._makers[160].ask((os.fspath(hanging), version(hanging)), is_content_known=False)
            for number in range(5):
                assert jpeg(pictures, photo(tmp_path / f"{number}.png"))
            assert not future.done()
        assert future.result(0) is None


class TestThreads:
    """Requests of many threads, and the life of the processes."""

    def test_jpeg_in_many_threads_gives_each_its_own(self, pictures: Pictures, tmp_path: Path) -> None:
        """Each picture has the colour of its image."""
        paths = []
        for number in range(40):
            paths.append(tmp_path / f"{number}.png")
            Image.new("RGB", (200, 100), (6 * number, 0, 255 - 6 * number)).save(paths[-1])
        with ThreadPoolExecutor(20) as threads:
            wanted = [(path, side) for path in paths for side in SIDES for _ in range(2)]
            images = list(threads.map(lambda one: shown(pictures, *one), wanted))
        for (path, side), image in zip(wanted, images, strict=True):
            assert image.size == ((160, 80) if side == 160 else (200, 100))
            colour = image.getpixel((50, 50))
            assert isinstance(colour, tuple)
            assert abs(colour[0] - 6 * int(path.stem)) < 8
        assert len(decoders()) <= 4

    def test_ask_twice_makes_one_picture(self, pictures: Pictures, tmp_path: Path) -> None:
        """Both wait for the same one."""
        path = photo(tmp_path / "a.png", (2000, 1500))
        ask = pictures._makers[160].ask
        first, second = (ask((os.fspath(path), version(path)), is_content_known=False) for _ in range(2))
        assert first is second
        assert first.result(60)

    def test_pictures_without_a_request_start_nothing(self, tmp_path: Path) -> None:
        """A first picture starts one process of its size."""
        with Pictures(configuration(tmp_path)) as pictures:
            assert decoders() == []
            assert jpeg(pictures, photo(tmp_path / "a.png"))
            assert len(decoders()) == 1
        assert decoders() == []

    def test_start_starts_one_process(self, tmp_path: Path) -> None:
        """Before the first request, and once; a closed one starts none."""
        with Pictures(configuration(tmp_path)) as pictures:
            pictures.start()
            wait_until(lambda: len(decoders()) == 1)
            (process_id,) = decoders()
            pictures.start()
            assert jpeg(pictures, photo(tmp_path / "a.png"))
            assert decoders() == [process_id]
        pictures.start()
        assert decoders() == []

    def test_pictures_without_requests_for_a_while_end_their_processes(self, tmp_path: Path) -> None:
        """The next request starts one again."""
        with Pictures(configuration(tmp_path), idle_seconds=0.0) as pictures:
            for number in range(3):
                assert jpeg(pictures, photo(tmp_path / f"{number}.png"))
                wait_until(lambda: not decoders())
            assert pictures._makers[160]._thread is None

    def test_close_answers_those_who_wait(self, tmp_path: Path) -> None:
        """With None, as later requests; it may be closed twice."""
        path = photo(tmp_path / "a.png")
        pictures = Pictures(configuration(tmp_path))
        future = pictures._makers[160].ask((os.fspath(path), version(path)), is_content_known=False)
        pictures.close()
        pictures.close()
        assert future.done()
        assert jpeg(pictures, photo(tmp_path / "b.png")) is None
        before = set(os.listdir("/proc/self/fd"))
        with Pictures(configuration(tmp_path)) as others:
            assert jpeg(others, path)
        assert set(os.listdir("/proc/self/fd")) == before

    def test_jpeg_without_processes_is_none_and_reported(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The next request tries to start them again."""
        reports: list[str] = []
        with Pictures(configuration(tmp_path), report=reports.append) as pictures:
            with monkeypatch.context() as patch:
                command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
                patch.setattr(decoder_process, "_command", lambda *_: command)
                assert jpeg(pictures, photo(tmp_path / "a.png")) is None
            (report,) = reports
            assert "no such thing" in report
            assert jpeg(pictures, tmp_path / "a.png")


class TestCaching:
    """Pictures that were made before."""

    def test_jpeg_of_a_cached_content_is_not_made_again(self, pictures: Pictures, tmp_path: Path) -> None:
        """Two paths share it, and another process reads it."""
        path = photo(tmp_path / "a.png")
        content = sha256_of(path)
        made = {side: jpeg(pictures, path, side, content) for side in SIDES}
        assert cached(tmp_path) == {f"{content}-{side}.jpg" for side in SIDES}
        shutil.copy(path, tmp_path / "b.png")
        with Pictures(configuration(tmp_path)) as others:
            for side in SIDES:
                assert jpeg(others, tmp_path / "b.png", side, content) == made[side]
            assert decoders_of(others) == []

    def test_jpeg_of_an_unknown_content_is_cached_by_version(self, pictures: Pictures, tmp_path: Path) -> None:
        """The picture of a version that was replaced is not shown for its successor."""
        path = photo(tmp_path / "a.png")
        first = jpeg(pictures, path)
        with Pictures(configuration(tmp_path)) as others:
            assert jpeg(others, path) == first
            assert decoders_of(others) == []
            photo(path, seed=1)
            assert jpeg(others, path) not in {None, first}

    def test_jpeg_with_a_content_that_is_none_is_shown(self, pictures: Pictures, tmp_path: Path) -> None:
        """No such name is used in the cache."""
        contents = ("../../../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "\0")
        for number, content in enumerate(contents):
            assert jpeg(pictures, photo(tmp_path / f"{number}.png", seed=number), content=content)
        assert [len(name) for name in cached(tmp_path)] == len(contents) * [len("-160.jpg") + 64]

    def test_jpeg_with_a_false_content_is_cached_under_its_true_one(self, pictures: Pictures, tmp_path: Path) -> None:
        """A wrong hash does not put one image's picture in the place of another one's."""
        path = photo(tmp_path / "a.png")
        assert jpeg(pictures, path, content="ab" * 32)
        assert cached(tmp_path) == {f"{sha256_of(path)}-160.jpg"}

    def test_jpeg_whose_cached_file_is_damaged_is_made_again(self, pictures: Pictures, tmp_path: Path) -> None:
        """It is replaced."""
        path = photo(tmp_path / "a.png")
        content = sha256_of(path)
        made = jpeg(pictures, path, content=content)
        assert made is not None
        (file,) = (tmp_path / "cache").rglob("*.jpg")
        file.write_bytes(made[:-100])
        assert jpeg(pictures, path, content=content) == made
        assert file.read_bytes() == made

    def test_jpeg_without_a_cache_folder_is_shown(self, tmp_path: Path) -> None:
        """One report says why nothing is cached."""
        reports: list[str] = []
        (tmp_path / "cache").write_text("no folder")
        with Pictures(configuration(tmp_path), report=reports.append) as pictures:
            for number in range(3):
                for side in SIDES:
                    assert jpeg(pictures, photo(tmp_path / f"{number}.png"), side)
        assert len(reports) == 1


# ---------------------------------------------------------------- helpers


def decoders_of(pictures: Pictures) -> list[int]:
    """Return the sides for which there are processes."""
    return [side for side, maker in pictures._makers.items() if maker._thread is not None]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for a state of other processes."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
