"""A scan is the truth: it names every file of the user's, and nothing else, whatever the folder does meanwhile."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortd.events import Stamp
from sortd.layout import CONTROLS, Reason, Rule, Why, rule_for_folder
from sortd.watch.scan import scan, scan_steps, stamp, still_seconds, whole_files, why_left, why_unfinished


def never(error: OSError) -> None:
    """Fail: nothing was to be reported."""
    raise AssertionError(error)


def names(folder: Path) -> set[str]:
    """Return what a scan finds, relative to the folder."""
    return {os.path.relpath(path, folder) for path, _ in scan(os.fspath(folder), report=never)}


def test_scan_regular_files_at_any_depth_are_found(tmp_path: Path) -> None:
    """Links, pipes and what lies behind links are no files in the folder."""
    folder = tmp_path / "Images"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").touch()
    for name in ("1.jpg", "a/2.jpg", "a/b/c/3.jpg", "a/notes.txt"):
        (folder / name).write_text(name)
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    assert names(folder) == {"1.jpg", "a/2.jpg", "a/b/c/3.jpg", "a/notes.txt"}


def test_scan_steps_name_what_is_no_file_with_the_reason(tmp_path: Path) -> None:
    """A link, a pipe, a hidden file and an unfinished folder are each told of once."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / ".facebook_1.jpg").touch()
    (tmp_path / "2019.temp").mkdir()
    for number in range(3):
        (tmp_path / "2019.temp" / f"{number}.jpg").touch()
    steps = [step for step in scan_steps(os.fspath(tmp_path), report=never) if step is not None]
    assert {os.path.basename(path): found.reason for path, found in steps if isinstance(found, Why)} == {
        "link.jpg": Reason.SYMBOLIC_LINK,
        "loop.jpg": Reason.SYMBOLIC_LINK,
        "pipe.jpg": Reason.SPECIAL_FILE,
        ".facebook_1.jpg": Reason.HIDDEN,
        "2019.temp": Reason.UNFINISHED,
    }


def test_scan_of_class_folders_takes_any_class_name(tmp_path: Path) -> None:
    """A class may be called what a program calls its unfinished files; inside of it the rules hold again."""
    for path in ("engine.part/a.jpg", "x~/b.jpg", "engine.part/c.jpg.part", "@eaDir/d.jpg", "x~/sub.tmp/e.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = scan(os.fspath(tmp_path), report=never, rule_at_top=rule_for_folder)
    assert {os.path.relpath(path, tmp_path) for path, _ in found} == {"engine.part/a.jpg", "x~/b.jpg"}


@pytest.mark.parametrize("rule", CONTROLS, ids=[rule.pattern for rule in CONTROLS])
def test_why_unfinished_with_a_control_file_beside_names_it(tmp_path: Path, rule: Rule) -> None:
    """Of a file, and of each file in a folder that is being downloaded as a whole; no longer when it is gone."""
    album = tmp_path / "Images" / "album"
    album.mkdir(parents=True)
    (album / "a.jpg").touch()
    assert why_unfinished(os.fspath(album / "a.jpg"), os.fspath(tmp_path)) is None
    for control in (album / f"a.jpg{rule.ending}", album.with_name(f"album{rule.ending}")):
        control.touch()
        why = why_left(os.fspath(album / "a.jpg"), os.fspath(tmp_path))
        assert why is not None
        assert why.reason is Reason.UNFINISHED
        assert f"{rule.program} has not finished it: {control} exists" in why.message
        control.unlink()
    assert why_left(os.fspath(album / "a.jpg"), os.fspath(tmp_path)) is None


def test_whole_files_leave_out_what_a_control_file_is_about(tmp_path: Path) -> None:
    """The file beside it, and each file in the folder beside it; not a file whose name merely begins so."""
    for path in ("a.jpg", "a.jpg.aria2", "b.jpg", "album/c.jpg", "album.aria2", "album 2/d.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    found = {os.path.relpath(path, tmp_path) for path, _ in whole_files(os.fspath(tmp_path), report=never)}
    assert found == {"b.jpg", "album 2/d.jpg"}


def test_why_unfinished_of_the_longest_name_is_none(tmp_path: Path) -> None:
    """No control file can stand beside a name that leaves no room for its ending."""
    path = tmp_path / ("a" * 251 + ".jpg")
    path.touch()
    assert why_unfinished(os.fspath(path), os.fspath(tmp_path)) is None


def test_why_left_says_what_is_in_the_way(tmp_path: Path) -> None:
    """Of the file itself, and of the folder above it that is the reason."""
    images = tmp_path / "Images"
    for path in ("a.jpg", ".hidden/b.jpg", "real/c.jpg"):
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).touch()
    (images / "link.jpg").symlink_to("a.jpg")
    (images / "linked").symlink_to("real")
    os.mkfifo(images / "pipe")

    def reason(name: str) -> tuple[Reason, str] | None:
        why = why_left(os.fspath(images / name), os.fspath(tmp_path))
        return None if why is None else (why.reason, why.message)

    assert reason("a.jpg") is reason("real") is reason("gone.jpg") is reason("a.jpg/below") is None
    for name, expected, place in [
        ("link.jpg", Reason.SYMBOLIC_LINK, ""),
        ("linked/c.jpg", Reason.SYMBOLIC_LINK, f"it is in {images / 'linked'}: "),
        ("pipe", Reason.SPECIAL_FILE, ""),
        (".hidden", Reason.HIDDEN, "it is hidden, because its name begins with a dot"),
        (".hidden/b.jpg", Reason.HIDDEN, f"it is in {images / '.hidden'}: "),
    ]:
        found = reason(name)
        assert found is not None
        assert found[0] is expected
        assert found[1].startswith(place)


def test_scan_stamp_equals_that_of_stamp(tmp_path: Path) -> None:
    """Scan and stamp agree, so that a file does not seem to change between them."""
    (tmp_path / "1.jpg").write_text("one")
    [(path, mark)] = scan(os.fspath(tmp_path), report=never)
    assert mark == stamp(path)
    assert mark.size == len("one")


def test_scan_names_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    """Any bytes make a name; they survive as os.fsdecode gives them."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m.jpg"
    Path(os.fsdecode(raw)).touch()
    [(path, _)] = scan(os.fspath(tmp_path), report=never)
    assert os.fsencode(path) == raw
    assert stamp(path) is not None


def test_scan_vanishing_folder_is_no_error(tmp_path: Path) -> None:
    """What was listed and is gone is passed over; the rest is found."""
    for number in range(20):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "x.jpg").touch()
    found = scan(os.fspath(tmp_path), report=never)
    first = next(found)[0]
    for number in range(20):
        if f"d{number}/" not in first:
            shutil.rmtree(tmp_path / f"d{number}")
    assert list(found) == []


def test_scan_missing_folder_is_reported(tmp_path: Path) -> None:
    """Absent is not empty: the caller learns which it was."""
    told: list[OSError] = []
    assert list(scan(os.fspath(tmp_path / "Images"), report=told.append)) == []
    assert [(error.errno, error.filename) for error in told] == [(errno.ENOENT, os.fspath(tmp_path / "Images"))]


def test_scan_unreadable_folder_is_reported_and_the_rest_is_found(tmp_path: Path) -> None:
    """A folder without the right to list it, and one whose disk fails, cost only themselves."""
    for name in ("closed", "broken", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").touch()

    def refusing(folder: str) -> "os._ScandirIterator[str]":
        if folder.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        if folder.endswith("broken"):
            raise OSError(errno.EIO, "Input/output error")  # as readdir(3) says it: without a name
        return os.scandir(folder)

    told: list[OSError] = []
    found = [path for path, _ in scan(os.fspath(tmp_path), report=told.append, scandir=refusing)]
    assert found == [os.fspath(tmp_path / "open" / "x.jpg")]
    assert {error.filename for error in told} == {os.fspath(tmp_path / "closed"), os.fspath(tmp_path / "broken")}


def test_scan_is_lazy(tmp_path: Path) -> None:
    """The first file is there before the other folders were listed, so a loop can take a scan in slices."""
    for number in range(50):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "x.jpg").touch()
    listed: list[str] = []

    def counting(folder: str) -> "os._ScandirIterator[str]":
        listed.append(folder)
        return os.scandir(folder)

    found = scan(os.fspath(tmp_path), report=never, scandir=counting)
    next(found)
    assert len(listed) == 2
    found.close()  # type: ignore[attr-defined]  # a generator, promised as an iterator


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: making many files is then quick."""
    memory = "/dev/shm"  # noqa: S108 - the folder below it is made by tempfile
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else tmp_path) as folder:
        yield Path(folder)


def test_scan_of_many_files_yields_each_once(in_memory: Path) -> None:
    """A burst that overflows every queue is found by one scan; ``benchmarks.core`` measures how long it takes."""
    for folder in range(100):
        (in_memory / f"d{folder}").mkdir()
        for number in range(100):
            os.close(os.open(in_memory / f"d{folder}" / f"IMG_{number:05}.jpg", os.O_CREAT))
    found = [path for path, _ in scan(os.fspath(in_memory), report=never)]
    assert len(found) == len(set(found)) == 10_000


def test_rewrite_with_its_time_put_back_has_another_stamp(tmp_path: Path) -> None:
    """No program can set the time of change; until the kernel's clock ticks it is the same."""
    path = tmp_path / "a.png"
    path.write_text("decided")
    before, known = os.stat(path), stamp(os.fspath(path))
    while stamp(os.fspath(path)) == known:
        with path.open("r+") as file:
            file.write("another")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def test_nothing_and_no_regular_file_have_no_stamp(tmp_path: Path) -> None:
    """Only a regular file has a version."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "folder", "link", "pipe", "file/below"):
        assert stamp(os.fspath(tmp_path / name)) is None


def test_stamp_of_another_write_or_file_differs(tmp_path: Path) -> None:
    """One version, one stamp."""
    path = tmp_path / "a.jpg"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    first = stamp(os.fspath(path))
    path.write_text("two")
    second = stamp(os.fspath(path))
    (tmp_path / "other").write_text("two")
    os.utime(tmp_path / "other", ns=(2, second.mtime_ns if second else 0))
    (tmp_path / "other").rename(path)
    third = stamp(os.fspath(path))
    assert len({first, second, third}) == 3


def test_stamp_failing_disk_raises(tmp_path: Path) -> None:
    """Nothing is known of a file that cannot be looked at; the caller has to hear it."""

    def failing(path: str) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error", path)

    with pytest.raises(OSError, match="Input/output error"):
        stamp(os.fspath(tmp_path / "a.jpg"), stat=failing)


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "seconds"),
    [
        (10 * SECOND, 20 * SECOND + 1, 79.999999999),
        (90 * SECOND, 20 * SECOND + 1, 10.0),
        (10 * SECOND, 130 * SECOND + 1, 0.0),
        (500 * SECOND, 20 * SECOND + 1, 0.0),
        (10 * SECOND, 97 * SECOND, 1.0),
        (10 * SECOND, 99 * SECOND, 0.0),
    ],
    ids=["copied with its mtime", "written", "clock set back", "mtime in the future", "whole seconds", "new on ext3"],
)
def test_still_seconds_is_since_the_later_time_and_never_negative(mtime_ns: int, ctime_ns: int, seconds: float) -> None:
    """Only a file whose mtime and ctime are both old has not changed."""
    assert still_seconds(Stamp(1, 1, 1, mtime_ns, ctime_ns), 100 * SECOND) == seconds
