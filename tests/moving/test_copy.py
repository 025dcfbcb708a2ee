"""A copy to another file system keeps what it may keep, and gives nobody a right that its source did not give."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sortd.moving.copy import Copy, copy_to_part, safe_mode, write_part
from sortd.moving.fs import FILE_FLAGS, FOLDER_FLAGS

NOBODY = 65_534
ACCESS_LIST = "system.posix_acl_access"


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Be another user for a while, with no group of the tests' files."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of the test's user."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"image")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a folder in which anybody may make files."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o777)
    descriptor = os.open(tmp_path / "there", FOLDER_FLAGS)
    yield descriptor
    os.close(descriptor)


def copied(source: Path, folder: int, *, user: int | None = None) -> tuple[Copy, os.stat_result]:
    """Copy a file, as another user if one is named; return what was told and the status of the copy."""
    file = os.open(source, FILE_FLAGS)
    try:
        if user is None:
            copy = copy_to_part(file, folder, "part")
        else:
            with acting_as(user):
                copy = copy_to_part(file, folder, "part")
    finally:
        os.close(file)
    return copy, os.stat("part", dir_fd=folder)


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """Return an access control list as acl(5) has it: tag, permissions, user or group."""
    packed = [
        tag.to_bytes(2, "little") + may.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, may, who in entries
    ]
    return (2).to_bytes(4, "little") + b"".join(packed)


@pytest.mark.parametrize("mode", [0o6755, 0o4711, 0o2644, 0o1600])
def test_copy_of_setuid_file_drops_special_bits(source: Path, folder: int, mode: int) -> None:
    """A copy never has the bits 07000, even with its source's owner, and tells that the mode was not kept."""
    source.chmod(mode)
    copy, status = copied(source, folder)
    assert stat.S_IMODE(status.st_mode) == mode & 0o777
    assert copy.lost == ("mode",)


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o6755, 0o755), (0o4744, 0o744), (0o660, 0o600), (0o606, 0o600), (0o664, 0o644)]
)
def test_copy_with_another_owner_gives_no_wider_rights(source: Path, folder: int, mode: int, expected: int) -> None:
    """Where owner and group cannot be kept, group and others get only what the source gave to both."""
    if os.geteuid() == 0:
        os.chown(source, 1234, 4321)
    source.chmod(mode)
    copy, status = copied(source, folder, user=NOBODY)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, expected)
    assert "owner" in copy.lost


def test_copy_with_another_group_gives_that_group_nothing_more(source: Path, folder: int) -> None:
    """The owner is the same, the group is one that the copying user is no member of."""
    if os.geteuid() == 0:
        os.chown(source, NOBODY, 4321)
    source.chmod(0o640)
    copy, status = copied(source, folder, user=NOBODY)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, NOBODY, 0o600)
    assert copy.lost == ("owner", "mode")


def test_copy_keeps_a_group_that_it_may_keep(source: Path, folder: int) -> None:
    """The owner cannot be kept; the group is the copying user's own."""
    if os.geteuid() == 0:
        os.chown(source, 1234, NOBODY)
    source.chmod(0o640)
    os.fchown(folder, -1, 4321)
    os.fchmod(folder, 0o2777)  # new files get the folder's group
    _, status = copied(source, folder, user=NOBODY)
    assert status.st_gid == NOBODY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("security.capability", bytes.fromhex("0100000200040000000000000000000000000000")),
        ("trusted.overlay.opaque", b"y"),
    ],
)
def test_copy_leaves_attributes_that_only_root_sets(source: Path, folder: int, name: str, value: bytes) -> None:
    """File capabilities and marks of other file systems do not travel; what users set does."""
    try:
        os.setxattr(source, name, value)
    except PermissionError:
        pytest.skip(f"needs the right to set {name}")
    os.setxattr(source, "user.note", b"kept")
    copy, _ = copied(source, folder)
    there = f"/proc/self/fd/{folder}/part"
    assert os.listxattr(there) == ["user.note"]
    assert copy.lost == (name,)


def test_copy_keeps_an_access_list_only_with_its_owner(source: Path, folder: int) -> None:
    """Its entries are about the source's owner and group; without it the mask is no right of the group."""
    entries = [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, 1111),
        (0x04, 0, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    os.setxattr(source, ACCESS_LIST, access_list(*entries))
    assert stat.S_IMODE(os.stat(source).st_mode) == 0o660
    copy, status = copied(source, folder)
    there = f"/proc/self/fd/{folder}/part"
    assert (os.getxattr(there, ACCESS_LIST), stat.S_IMODE(status.st_mode)) == (access_list(*entries), 0o660)
    assert copy.lost == ()
    os.unlink("part", dir_fd=folder)
    copy, status = copied(source, folder, user=NOBODY)
    assert (os.listxattr(there), stat.S_IMODE(status.st_mode)) == ([], 0o600)
    assert set(copy.lost) == {"owner", "mode", ACCESS_LIST}


def test_copy_without_its_access_list_gives_its_mask_to_nobody() -> None:
    """Where the new disk has no access lists, owner and group are kept and the bits of the group were the mask's."""
    assert safe_mode(0o660, [ACCESS_LIST]) == 0o600
    assert safe_mode(0o660, ["user.note"]) == 0o660


def test_part_is_never_written_through_a_link(folder: int, tmp_path: Path) -> None:
    """What stands under a part's name is neither opened nor truncated, a link is not followed."""
    (tmp_path / "precious").write_bytes(b"precious")
    os.symlink(tmp_path / "precious", "part", dir_fd=folder)
    with pytest.raises(FileExistsError):
        write_part(folder, "part", b"reason")
    os.unlink("part", dir_fd=folder)
    os.link(tmp_path / "precious", "part", dst_dir_fd=folder)
    with pytest.raises(FileExistsError):
        write_part(folder, "part", b"reason")
    assert (tmp_path / "precious").read_bytes() == b"precious"
