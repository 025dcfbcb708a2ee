"""The cache of pictures: what was written is read, the limit holds, and nobody else's files are used or removed."""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sortd.store.pictures import PictureCache
from tests.hostile_files import HOSTILE

KEY = "ab" + 31 * "0f"
PICTURE = b"\xff\xd8\xff\xe0" + bytes(990) + b"\xff\xd9"


def key(number: int) -> str:
    """Return a key; the keys of neighbouring numbers are in different folders."""
    return f"{number % 256:02x}{number:062x}"


@pytest.fixture
def reports() -> list[str]:
    """What the cache has reported."""
    return []


@pytest.fixture
def cache(tmp_path: Path, reports: list[str]) -> PictureCache:
    """A cache for a hundred pictures, in a folder that does not exist yet."""
    return PictureCache(os.fspath(tmp_path / "cache" / "pictures"), max_bytes=100_000, report=reports.append)


def file_of(tmp_path: Path, one: str = KEY, side: int = 160) -> Path:
    """Return the file of a picture."""
    return tmp_path / "cache" / "pictures" / one[:2] / f"{one}-{side}.jpg"


def test_read_returns_what_was_written(cache: PictureCache, tmp_path: Path, reports: list[str]) -> None:
    """By key and side; nobody else may read it."""
    assert cache.read(KEY, 160) is None
    cache.write(KEY, 160, PICTURE)
    assert cache.read(KEY, 160) == PICTURE
    assert cache.read(KEY, 1024) is None
    assert cache.read(key(7), 160) is None
    assert reports == []
    file = file_of(tmp_path)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


@pytest.mark.parametrize(
    "damage",
    [b"", PICTURE[:-1], PICTURE[:500] + bytes(494), bytes(len(PICTURE)), b"<svg/>", PICTURE + bytes(5_000_000)],
    ids=["empty", "cut", "zeros at the end", "zeros", "no JPEG", "huge"],
)
def test_read_damaged_picture_is_none_until_it_is_written_again(
    cache: PictureCache, tmp_path: Path, damage: bytes
) -> None:
    """A power cut may leave any of these, since pictures are not synced."""
    cache.write(KEY, 160, PICTURE)
    file_of(tmp_path).write_bytes(damage)
    assert cache.read(KEY, 160) is None
    cache.write(KEY, 160, PICTURE)
    assert cache.read(KEY, 160) == PICTURE


@pytest.mark.parametrize("place", HOSTILE.values(), ids=HOSTILE)
def test_read_hostile_file_is_none(cache: PictureCache, tmp_path: Path, place: Callable[[Path], None]) -> None:
    """Neither a pipe nor a link holds it up, and writing replaces whatever is not a folder."""
    cache.write(KEY, 160, PICTURE)
    file_of(tmp_path).unlink()
    place(tmp_path / "it")  # the name of a socket has at most 107 bytes
    (tmp_path / "it").rename(file_of(tmp_path))
    assert cache.read(KEY, 160) is None
    cache.write(KEY, 160, PICTURE)
    assert cache.read(KEY, 160) == (None if file_of(tmp_path).is_dir() else PICTURE)
    cache.prune()


def test_prune_removes_the_least_recently_used(cache: PictureCache, tmp_path: Path) -> None:
    """Down to four fifths of the limit; a picture that was read lately stays."""
    for number in range(150):
        cache.write(key(number), 160, PICTURE)
        os.utime(file_of(tmp_path, key(number)), (number, number))
    assert cache.read(key(3), 160) == PICTURE
    cache.prune()
    left = [number for number in range(150) if file_of(tmp_path, key(number)).exists()]
    assert left == [3, *range(150 - len(left) + 1, 150)]
    assert 70_000 <= len(left) * len(PICTURE) <= 80_000


def test_prune_within_the_limit_removes_nothing(cache: PictureCache, tmp_path: Path) -> None:
    """Also not the file that another process is writing."""
    for number in range(90):
        cache.write(key(number), 160, PICTURE)
    cache.prune()
    assert sum(file_of(tmp_path, key(number)).exists() for number in range(90)) == 90


def test_prune_counts_what_another_process_wrote(cache: PictureCache, tmp_path: Path) -> None:
    """It reads the sizes again after an eighth of the limit was written."""
    other = PictureCache(os.fspath(tmp_path / "cache" / "pictures"), max_bytes=100_000)
    cache.write(key(0), 160, PICTURE)
    cache.prune()
    for number in range(1, 200):
        other.write(key(number), 160, PICTURE)
    cache.write(key(200), 160, PICTURE)
    cache.prune()  # only one is new to this process
    assert file_of(tmp_path, key(0)).exists()
    for number in range(201, 215):
        cache.write(key(number), 160, PICTURE)
    cache.prune()
    left = [number for number in range(215) if file_of(tmp_path, key(number)).exists()]
    assert len(left) * len(PICTURE) <= 80_000
    assert {*range(201, 215)} <= set(left)


def test_caches_in_one_folder_never_return_another_picture(tmp_path: Path, reports: list[str]) -> None:
    """Two processes that read, write and remove at the same time."""
    folder = os.fspath(tmp_path / "cache" / "pictures")
    caches = [PictureCache(folder, max_bytes=40_000, report=reports.append) for _ in range(2)]

    def content(number: int) -> bytes:
        return PICTURE[:4] + number.to_bytes(2, "big") + PICTURE[6:]

    def use(start: int) -> None:
        for step in range(100):
            cache, number = caches[step % 2], (start + 7 * step) % 97
            assert cache.read(key(number), 160) in {None, content(number)}
            cache.write(key(number), 160, content(number))
            cache.prune()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, (0, 20, 40, 60)))
    assert reports == []
    left = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert 0 < sum(left) < 40_000 * 1.5


def test_prune_removes_unfinished_files_and_no_others(cache: PictureCache, tmp_path: Path) -> None:
    """A folder of that name may be somebody's own; a killed process leaves an unfinished file."""
    cache.write(KEY, 160, PICTURE)
    folder = file_of(tmp_path).parent
    own = {folder / "holiday.jpg", folder / f"{KEY}.jpg", folder.parent / "me.jpg", folder / "notes" / "text"}
    (folder / "notes").mkdir()
    unfinished = folder / ".sortd-0123456789abcdef.part"
    for path in {*own, unfinished}:
        path.write_bytes(bytes(200_000))
        os.utime(path, (1, 1))
    cache.prune()
    assert not unfinished.exists()
    assert all(path.exists() for path in own)
    assert cache.read(KEY, 160) == PICTURE


@pytest.mark.parametrize("which", ["pictures", "pictures/ab"])
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_folder_that_others_may_write_to_is_not_used(
    cache: PictureCache, tmp_path: Path, reports: list[str], which: str, mode: int
) -> None:
    """Their picture is not shown; it is reported once."""
    cache.write(KEY, 160, PICTURE)
    (tmp_path / "cache" / which).chmod(mode)
    for _ in range(2):
        assert cache.read(KEY, 160) is None
        cache.write(KEY, 160, PICTURE)
        cache.prune()
    (report,) = reports
    assert "others may write to it" in report


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_folder_of_another_user_is_not_used(cache: PictureCache, tmp_path: Path, reports: list[str]) -> None:
    """Its owner could change the pictures at any time."""
    cache.write(KEY, 160, PICTURE)
    os.chown(file_of(tmp_path).parent, 65_534, 65_534)
    assert cache.read(KEY, 160) is None
    cache.write(KEY, 160, PICTURE)
    assert len(reports) == 1


def test_folder_that_is_a_link_is_not_used(cache: PictureCache, tmp_path: Path, reports: list[str]) -> None:
    """Nothing is written where it leads."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pictures").symlink_to(tmp_path / "elsewhere")
    cache.write(KEY, 160, PICTURE)
    assert cache.read(KEY, 160) is None
    assert len(reports) == 1
    assert not list((tmp_path / "elsewhere").rglob("*.jpg"))


def test_write_without_a_folder_is_reported_once(cache: PictureCache, tmp_path: Path, reports: list[str]) -> None:
    """A file has the folder's name; as soon as it is gone, pictures are cached."""
    (tmp_path / "cache").write_text("no folder")
    for number in range(3):
        cache.write(key(number), 160, PICTURE)
        assert cache.read(key(number), 160) is None
        cache.prune()
    assert len(reports) == 1
    (tmp_path / "cache").unlink()
    cache.write(KEY, 160, PICTURE)
    assert cache.read(KEY, 160) == PICTURE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where it may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount(8) here")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_write_on_a_full_disk_is_reported_once(small_disk: Path, reports: list[str]) -> None:
    """What is there is read, and nothing incomplete is left."""
    cache = PictureCache(os.fspath(small_disk / "pictures"), report=reports.append)
    cache.write(KEY, 160, PICTURE)
    large = PICTURE[:-2] + bytes(40_000) + PICTURE[-2:]
    for number in range(4):
        cache.write(key(number), 1024, large)
    assert len(reports) == 1
    assert "No space left" in reports[0]
    assert cache.read(KEY, 160) == PICTURE
    assert not [path for path in small_disk.rglob("*") if path.suffix == ".part"]


def test_write_on_a_read_only_disk_is_reported_once(small_disk: Path, reports: list[str]) -> None:
    """The pictures that are there are read, although their use cannot be noted."""
    cache = PictureCache(os.fspath(small_disk / "pictures"), report=reports.append)
    cache.write(KEY, 160, PICTURE)
    os.utime(small_disk / "pictures" / "ab" / f"{KEY}-160.jpg", (1, 1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for _ in range(2):
        assert cache.read(KEY, 160) == PICTURE
        cache.write(KEY, 160, PICTURE)
        cache.write(key(7), 160, PICTURE)
    assert len(reports) == 1
    assert "Read-only" in reports[0]
