"""The limits of inotify on this machine are read from /proc, and the advice names the settings."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from sortd.watch.inotify import (
    Limits,
    advice,
    file_system_of,
    instances,
    is_blind,
    limits,
    local_device,
    unwatched,
    watched_inodes,
)

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /srv rw,relatime - xfs /dev/vdb rw
31 30 0:41 / /srv/foto\040archiv rw shared:7 master:2 - nfs4 nas:/volume1 rw
32 30 0:42 / /srv/over rw - tmpfs tmpfs rw
33 30 0:43 / /srv/over rw - cifs //nas/share rw
34 22 0:44 / /mnt/c rw - 9p drvfs rw
35 22 0:45 / /home/eva/pi rw - fuse.sshfs pi: rw
36 22 0:46 / /mnt/caf\303\251 rw - virtiofs share rw
37 22 0:47 / /Users rw - fakeowner /run/host_mark/Users rw
38 22 0:48 / /media/usb rw - fuseblk /dev/sdb1 rw
""".lstrip()


def named(steps: Iterable[str | None]) -> list[str]:
    """Return the folders that are named among the steps of a walk."""
    return [step for step in steps if step is not None]


@pytest.fixture
def mountinfo(tmp_path: Path) -> str:
    """A table of mounts as proc(5) has it."""
    (tmp_path / "mountinfo").write_text(MOUNTS)
    return os.fspath(tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/data", None),
        ("/srv/Tornillos", None),
        ("/srv/foto archiv/Tornillos/Images", "nfs4"),
        ("/srv/foto archive", None),
        ("/srv/over/x", "cifs"),
        ("/mnt/c/Users/eva", "9p"),
        ("/mnt/cx", None),
        ("/home/eva/pi", "fuse.sshfs"),
        ("/mnt/café/x", "virtiofs"),
        ("/Users/eva/Data", "fakeowner"),
        ("/media/usb/DCIM", None),
    ],
)
def test_is_blind_network_file_system_is_named(mountinfo: str, path: str, kind: str | None) -> None:
    """The type of the file system of the path decides whether another machine may write unseen."""
    assert is_blind(path, mountinfo=mountinfo) == kind


def test_is_blind_local_disk_is_none(tmp_path: Path) -> None:
    """The real mount table is readable and covers any path, existing or not."""
    assert file_system_of(os.fspath(tmp_path / "not" / "there"))
    assert is_blind("/proc") is None
    assert file_system_of("/proc/self") == "proc"


@pytest.mark.parametrize(
    ("kind", "is_local"),
    [
        *(("ext4", True), ("overlay", True), ("nfs4", False), ("fuse.any", False), ("fuseblk", False)),
        *(("orangefs", False), ("vfat", False)),
    ],
)
def test_local_device_is_none_where_another_clock_may_set_times(tmp_path: Path, kind: str, is_local: bool) -> None:  # noqa: FBT001 -- a parameter
    """Network and unknown file systems, those of programs, and FAT, which keeps no ctime."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw,relatime - {kind} source rw\n")
    assert (local_device(os.fspath(tmp_path), mountinfo=os.fspath(mounts)) == tmp_path.stat().st_dev) == is_local
    assert local_device(os.fspath(tmp_path / "absent"), mountinfo=os.fspath(mounts)) is None


def test_limits_missing_file_is_none(tmp_path: Path) -> None:
    """A container may hide the limits."""
    assert all(isinstance(value, int) for value in (limits().max_user_watches, limits().max_user_instances))
    assert limits(os.fspath(tmp_path)) == Limits(None, None)


@pytest.mark.parametrize(
    ("number", "setting"),
    [(errno.ENOSPC, "fs.inotify.max_user_watches=524288"), (errno.EMFILE, "fs.inotify.max_user_instances=1024")],
)
def test_advice_reached_limit_names_setting_and_value(number: int, setting: str) -> None:
    """The message replaces "No space left on device" by the limit, its value and how to raise it."""
    sentence = advice(OSError(number, os.strerror(number)), granted=Limits(8_192, 128))
    assert f"sysctl -w {setting}" in sentence
    assert "= 8192" in sentence or "= 128" in sentence
    assert "space" not in sentence


def test_advice_grows_with_the_number_of_folders() -> None:
    """A million folders need more watches than the default advice."""
    sentence = advice(OSError(errno.ENOSPC, ""), folders=1_000_000, granted=Limits(8_192, 128))
    assert "max_user_watches=2000000" in sentence


def test_advice_other_error_is_its_message() -> None:
    """An error without a limit names none."""
    assert advice(PermissionError(errno.EACCES, "Permission denied")) == "Permission denied"


def test_unwatched_unknown_inode_yields_nothing(tmp_path: Path) -> None:
    """Nothing is yielded below a folder that is not known to be watched."""
    (tmp_path / "a").mkdir()
    assert named(unwatched(os.fspath(tmp_path), frozenset())) == []
    assert named(unwatched(os.fspath(tmp_path), frozenset({tmp_path.stat().st_ino}))) == [os.fspath(tmp_path / "a")]


def test_unwatched_stopped_early_reads_no_further(tmp_path: Path) -> None:
    """A million files in one folder are a million steps, of which the loop takes some at a time."""
    for number in range(50):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "a").mkdir()
    steps = list(unwatched(os.fspath(tmp_path), frozenset({tmp_path.stat().st_ino})))
    assert len(steps) > 50
    assert named(steps) == [os.fspath(tmp_path / "a")]


def test_watched_inodes_closed_descriptor_is_empty() -> None:
    """A descriptor that is closed meanwhile has no watches."""
    assert watched_inodes([2**30]) == frozenset()
    assert instances() == frozenset()
