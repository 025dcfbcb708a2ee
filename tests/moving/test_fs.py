"""System calls, folders and names: the kernel decides, links are not followed, writers are left alone."""

import errno
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortd.errors import ChangedError
from sortd.events import Writer
from sortd.files import stamp_of, sync_folder
from sortd.moving.copy import make_part, remove_obsolete, sha256_at
from sortd.moving.fs import (
    FOLDER_FLAGS,
    FRESH_NAMES,
    SECONDS_A_NAME,
    FolderNames,
    Folders,
    Listings,
    is_version,
    lstat_at,
    names_by_inode,
    rename_new,
    writer_of,
)
from sortd.store.records import MoveFile, MoveRecord, Role


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """A descriptor of the temporary folder."""
    descriptor = os.open(tmp_path, FOLDER_FLAGS)
    yield descriptor
    os.close(descriptor)


def test_rename_new_taken_name_is_not_replaced(tmp_path: Path, folder: int) -> None:
    """A taken name is refused by the kernel, be it a file's, a folder's, a link's or one of the same inode."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "file").write_text("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.link(tmp_path / "a", tmp_path / "twin")
    for taken in ("file", "folder", "link", "twin"):
        with pytest.raises(FileExistsError):
            rename_new(folder, "a", folder, taken)
    assert (tmp_path / "file").read_text() == "file"
    assert (tmp_path / "a").read_text() == "a"
    rename_new(folder, "a", folder, "free")
    assert (tmp_path / "free").read_text() == "a"


def test_rename_new_error_of_the_kernel_is_raised(folder: int) -> None:
    """Errors carry their number and the names."""
    with pytest.raises(FileNotFoundError) as caught:
        rename_new(folder, "nothing", folder, "free")
    assert caught.value.filename == "nothing"
    assert caught.value.errno == errno.ENOENT


def test_writer_of_open_file_detects_a_writer(tmp_path: Path) -> None:
    """Nobody, a descriptor, and a mapping whose descriptor is closed already."""
    path = tmp_path / "a"
    path.write_bytes(bytes(4096))
    assert writer_of(str(path)) is Writer.ABSENT
    with path.open("r+b") as file:
        assert writer_of(str(path)) is Writer.PRESENT
        mapping = mmap.mmap(file.fileno(), 4096)
    assert writer_of(str(path)) is Writer.PRESENT
    mapping.close()
    with path.open("rb"):
        assert writer_of(str(path)) is Writer.ABSENT


def test_writer_of_unreadable_path_is_unknown(tmp_path: Path) -> None:
    """Nothing there, a link, a folder and a FIFO give no lease and do not hang."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    for name in ("nothing", "link", "fifo", "."):
        assert writer_of(str(tmp_path / name)) is Writer.UNKNOWN


def test_writer_of_broken_lease_does_not_end_the_process(tmp_path: Path) -> None:
    """Who opens the file for writing while the lease is held makes the kernel signal us: that is ignored."""
    program = (
        "import fcntl, os, subprocess, sys, sortd.moving.fs as renaming\n"
        "setlease = fcntl.fcntl\n"
        "def slow(fd, command, *rest):\n"
        "    answer = setlease(fd, command, *rest)\n"
        "    if (command, *rest) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):\n"
        "        code = 'import os, sys; os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)'\n"
        "        subprocess.run([sys.executable, '-c', code, sys.argv[1]], stderr=subprocess.DEVNULL)\n"
        "    return answer\n"
        "renaming.fcntl.fcntl = slow\n"
        "print(renaming.writer_of(sys.argv[1]).value)"
    )
    path = tmp_path / "a"
    path.write_text("a")
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert run.stdout.strip() in {"absent", "unknown"}


def test_is_version_changed_file_is_another_version(tmp_path: Path, folder: int) -> None:
    """Other bytes, another time and another file under the name are other versions; the device does not count."""
    path = tmp_path / "a"
    path.write_text("a")
    os.utime(path, ns=(1, 1))
    stamp = stamp_of(os.stat(path))
    assert is_version(os.stat(path), stamp)
    assert is_version(os.stat(path), type(stamp)(stamp.device + 1, stamp.inode, stamp.size, stamp.mtime_ns))
    os.utime(path, ns=(1, 2))
    assert not is_version(os.stat(path), stamp)
    path.write_text("aa")
    os.utime(path, ns=(1, 1))
    assert not is_version(os.stat(path), stamp)
    os.rename(path, tmp_path / "old")
    path.write_text("a")
    os.utime(path, ns=(1, 1))
    assert not is_version(os.stat(path), stamp)
    assert lstat_at(folder, "nothing") is None
    assert lstat_at(folder, "x" * 300) is None


def test_names_by_inode_prefers_visible_names(tmp_path: Path, folder: int) -> None:
    """A hidden name counts only where there is no other."""
    for name in (".hidden", ".both", "other"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / ".both", tmp_path / "both")
    inodes = {name: os.stat(tmp_path / name).st_ino for name in (".hidden", "both", "other")}
    found = names_by_inode(folder, [inodes[".hidden"], inodes["both"]])
    assert found == {inodes[".hidden"]: ".hidden", inodes["both"]: "both"}


def test_content_of_folder_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Recovery looks again before each batch: what cannot be a file of ours is refused and closed."""
    (tmp_path / "a.jpg").mkdir()
    with Folders(tmp_path) as folders:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(IsADirectoryError):
                sha256_at(folders.open(""), "a.jpg")
        assert len(os.listdir("/proc/self/fd")) == before


def test_folders_link_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link as any component is refused; what is missing is not made by opening."""
    (tmp_path / "outside" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "Dataset").mkdir(parents=True)
    (tmp_path / "set" / "Dataset" / "cat").symlink_to(tmp_path / "outside" / "cat")
    (tmp_path / "set" / "Review").symlink_to(tmp_path / "outside")
    with Folders(tmp_path / "set") as folders:
        for path in ("Dataset/cat", "Review/cat", "Review"):
            with pytest.raises(NotADirectoryError):
                folders.make(path)
        with pytest.raises(FileNotFoundError):
            folders.open("Dataset/dog")
        assert os.fstat(folders.make("Dataset/dog")).st_ino == os.stat(tmp_path / "set" / "Dataset" / "dog").st_ino
    assert [path.name for path in (tmp_path / "outside" / "cat").iterdir()] == []


def test_folders_leave_no_descriptor_open(tmp_path: Path) -> None:
    """Whatever was opened is closed with them."""
    before = len(os.listdir("/proc/self/fd"))
    with Folders(tmp_path) as folders:
        folders.make("Dataset/cat")
        assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_folders_folder_made_by_root_has_the_owner_of_its_parent(tmp_path: Path) -> None:
    """A daemon that runs as root makes folders that the user can use."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "Dataset").mkdir()
    os.chown(tmp_path / "Dataset", 1234, 4321)
    with Folders(tmp_path) as folders:
        made = os.fstat(folders.make("Dataset/cat"))
    assert (made.st_uid, made.st_gid, stat.S_ISDIR(made.st_mode)) == (1234, 4321, True)


def test_sync_folder_error_of_the_disk_is_raised(tmp_path: Path) -> None:
    """Only file systems that know no sync of folders are forgiven."""
    descriptor = os.open(tmp_path, FOLDER_FLAGS)
    sync_folder(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync_folder(descriptor)


def test_remove_obsolete_changed_file_is_kept(tmp_path: Path) -> None:
    """A reason that the user has written into since is his."""
    rejected = tmp_path / "Rejected"
    rejected.mkdir()
    members = []
    for name in ("kept.json", "gone.json", "vanished.json"):
        (rejected / name).write_text("{}")
        members.append(MoveFile(Role.REASON, name, name, stamp_of(os.stat(rejected / name))))
    (rejected / "kept.json").write_text("{my own words}")
    (rejected / "vanished.json").unlink()
    image = MoveFile(Role.IMAGE, "a.jpg", "a.jpg", members[0].stamp)
    with Folders(tmp_path) as folders:
        remove_obsolete(folders, MoveRecord("t", "Rejected", "Images", (image,), obsolete=tuple(members)))
    assert os.listdir(rejected) == ["kept.json"]


def test_make_part_changed_sidecar_is_not_copied(tmp_path: Path, folder: int) -> None:
    """It may belong to another image by now; nothing is made of it."""
    sidecar = tmp_path / "a.xmp"
    sidecar.write_text("seen")
    member = MoveFile(Role.SHARED, "a.xmp", "a.xmp", stamp_of(sidecar.stat()))
    sidecar.write_text("changed since")
    move = MoveRecord("0" * 16, "Images", "Dataset/cat", (member,))
    with pytest.raises(ChangedError, match=r"Images/a\.xmp"):
        make_part(folder, folder, move, 0)
    assert os.listdir(tmp_path) == ["a.xmp"]


def test_near_returns_names_with_the_same_beginning() -> None:
    """Letter case does not count; hidden names are not there."""
    names = FolderNames(["IMG_1.JPG", "img_1.xmp", "IMG_1.jpg.json", "IMG_2.xmp", ".IMG_1.jpg.swp", "IMG_12.xmp"])
    assert {"IMG_1.JPG", "img_1.xmp", "IMG_1.jpg.json"} <= set(names.near("IMG_1.JPG"))
    assert not {"IMG_2.xmp", ".IMG_1.jpg.swp"} & set(names.near("IMG_1.JPG"))
    assert FolderNames(["x", "straße.xmp", "STRASSE.xmp"]).near("STRASSE.jpg") == ["STRASSE.xmp", "straße.xmp"]


def test_folder_names_added_and_discarded_names_count() -> None:
    """A name that is discarded is gone, one spelled otherwise is not, and one that never was there is no mistake."""
    names = FolderNames(["a.xmp", "A.xmp"])
    names.discard("a.xmp")
    names.discard("nothing")
    assert names.near("a.jpg") == ["A.xmp"]
    names.add("a.MOV")
    assert names.near("a.jpg") == ["a.MOV", "A.xmp"]


@pytest.mark.parametrize(
    "standing",
    [
        *("IMG_1.xmp", "img_1.XMP", "IMG_1.psd", "IMG_1", "IMG_1.JPG.xmp", "IMG_1.heic.pp3", "IMG_1.MOV", "IMG_1.png"),
        *("IMG_1 (conflicted copy).xmp", "IMG_1_01.JPG.xmp", "IMG_1.JPG.bak", "IMG_1.JPG_original", "IMG_1.jpg..json"),
        "IMG_1.JPG.reason.json",
    ],
)
def test_is_taken_equal_stem_is_taken(standing: str) -> None:
    """Anything of the stem, with whatever suffix and letter case: an image would stand beside another's edits."""
    assert FolderNames([standing]).is_taken("IMG_1.JPG")


@pytest.mark.parametrize("standing", ["IMG_10.xmp", "IMG_1.b.jpg", "IMG_1 (2).JPG", "IMG_1-edited.jpg", "AIMG_1.xmp"])
def test_is_taken_other_stem_is_free(standing: str) -> None:
    """A longer stem, another number, the edited version: none of them is in the way."""
    assert not FolderNames([standing]).is_taken("IMG_1.JPG")


@pytest.mark.parametrize(
    ("standing", "coming"),
    [
        ("IMG_0001.AAE", "IMG_E0001.JPG"),
        ("IMG_E0001.JPG", "IMG_0001.AAE"),
        ("a.jpg.json", "a-edited.jpg"),
        ("a-edited.jpg", "a.jpg.json"),
        ("a.jpg(1).json", "a(1).jpg"),
        ("a(1).jpg", "a.jpg(1).json"),
        ("a.jpg", "a_01.jpg.xmp"),
        (f"{'x' * 46}.json", f"{'x' * 47}.jpg"),
        (f"{'x' * 47}.jpg", f"{'x' * 46}.json"),
        ("SND_0001.WAV", "IMG_0001.JPG"),
        ("a (2).xmp", "a (2).jpg"),
    ],
)
def test_is_taken_name_of_a_companion_is_taken(standing: str, coming: str) -> None:
    """A companion is not put where it would be taken for another image's, nor an image beside such a companion."""
    assert FolderNames([standing]).is_taken(coming)


def test_has_relatives_companion_in_either_direction_is_true() -> None:
    """A sidecar without its image, and an image beside a sidecar that comes; not two images and their own sidecars."""
    assert FolderNames(["A.XMP"]).has_relatives("a.jpg")
    assert FolderNames(["A.jpg"]).has_relatives("a.xmp")
    assert not FolderNames(["a.png", "a.png.xmp", "a.png.reason.json", "b.xmp"]).has_relatives("a.jpg")


def test_is_taken_numbered_names_are_distinct() -> None:
    """The next free number is free of everything of its stem."""
    names = FolderNames(["a.jpg", "a (2).xmp", "A (3).Mov"])
    assert [number for number in range(2, 6) if not names.is_taken(f"a ({number}).jpg")] == [4, 5]


def listed(folder: Path, listings: Listings) -> FolderNames:
    """Return the names in a folder by these listings."""
    descriptor = os.open(folder, FOLDER_FLAGS)
    try:
        return listings.names(descriptor)
    finally:
        os.close(descriptor)


def test_listings_small_folder_is_read_for_every_batch(tmp_path: Path) -> None:
    """What somebody put there a moment ago is seen."""
    listings = Listings(clock=lambda: 0.0)
    assert len(listed(tmp_path, listings)) == 0
    (tmp_path / "a.xmp").touch()
    assert len(listed(tmp_path, listings)) == 1


def test_listings_large_folder_is_read_once(tmp_path: Path) -> None:
    """Until it has served for a hundred times of what it took."""
    now = 0.0
    listings = Listings(clock=lambda: now)
    for number in range(FRESH_NAMES + 1):
        (tmp_path / f"{number}.jpg").touch()
    first = listed(tmp_path, listings)
    now = 0.9 * SECONDS_A_NAME * len(first)
    assert listed(tmp_path, listings) is first
    now = 1.1 * SECONDS_A_NAME * len(first)
    assert listed(tmp_path, listings) is not first


def test_listings_number_of_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was asked for least lately is forgotten."""
    monkeypatch.setattr("sortd.moving.fs.MOST_KEPT", 2 * (FRESH_NAMES + 1))
    listings, folders = Listings(clock=lambda: 0.0), [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        for number in range(FRESH_NAMES + 1):
            (folder / f"{number}.jpg").touch()
    first, second, _ = [listed(folder, listings) for folder in folders]
    assert listed(folders[1], listings) is second
    assert listed(folders[0], listings) is not first
