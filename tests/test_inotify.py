"""What inotify can and cannot see here is told from /proc, and its limits are named by their settings."""

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
def test_network_and_shared_file_systems_are_known(mountinfo: str, path: str, kind: str | None) -> None:
    """Where another machine may write unseen is told by the type of the file system that covers the path."""
    assert is_blind(path, mountinfo=mountinfo) == kind


def test_this_machines_own_disk_is_not_blind(tmp_path: Path) -> None:
    """The real table can be read, and knows the file system of any path, there or not."""
    assert file_system_of(os.fspath(tmp_path / "not" / "there"))
    assert is_blind("/proc") is None
    assert file_system_of("/proc/self") == "proc"


def test_limits_are_read_and_may_be_absent(tmp_path: Path) -> None:
    """A container may hide them."""
    assert all(isinstance(value, int) for value in (limits().max_user_watches, limits().max_queued_events))
    assert limits(os.fspath(tmp_path)) == Limits(None, None, None)


@pytest.mark.parametrize(
    ("number", "setting"),
    [(errno.ENOSPC, "fs.inotify.max_user_watches=524288"), (errno.EMFILE, "fs.inotify.max_user_instances=1024")],
)
def test_advice_names_the_setting_and_its_value_now(number: int, setting: str) -> None:
    """The kernel says "No space left on device", which misleads: ours says which limit, how high, how to raise it."""
    sentence = advice(OSError(number, os.strerror(number)), granted=Limits(8_192, 128, 16_384))
    assert f"sysctl -w {setting}" in sentence
    assert "= 8192" in sentence or "= 128" in sentence
    assert "space" not in sentence


def test_advice_grows_with_the_number_of_folders() -> None:
    """A million folders need more than the usual advice."""
    sentence = advice(OSError(errno.ENOSPC, ""), folders=1_000_000, granted=Limits(8_192, 128, 16_384))
    assert "max_user_watches=2000000" in sentence


def test_other_errors_speak_for_themselves() -> None:
    """Where no limit is to blame, none is named."""
    assert advice(PermissionError(errno.EACCES, "Permission denied")) == "Permission denied"


def test_nothing_is_claimed_where_inodes_do_not_tell(tmp_path: Path) -> None:
    """A folder that is not known to be watched itself says nothing about those below."""
    (tmp_path / "a").mkdir()
    assert named(unwatched(os.fspath(tmp_path), frozenset())) == []
    assert named(unwatched(os.fspath(tmp_path), frozenset({tmp_path.stat().st_ino}))) == [os.fspath(tmp_path / "a")]


def test_unwatched_a_caller_may_stop_after_each_entry(tmp_path: Path) -> None:
    """A million files in one folder are a million steps, so that the loop takes as many at a time as it wants."""
    for number in range(50):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "a").mkdir()
    steps = list(unwatched(os.fspath(tmp_path), frozenset({tmp_path.stat().st_ino})))
    assert len(steps) > 50
    assert named(steps) == [os.fspath(tmp_path / "a")]


def test_a_closed_descriptor_watches_nothing() -> None:
    """What vanishes while it is read counts as nothing."""
    assert watched_inodes([2**30]) == frozenset()
    assert instances() == frozenset()
