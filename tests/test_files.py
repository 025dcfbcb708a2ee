"""Small files are written whole, never through a link, and read without waiting or filling the memory."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sortd.files import open_folder, read_regular, write_atomic
from tests.hostile_files import HOSTILE

pytestmark = pytest.mark.timeout(60)  # a pipe that is waited for would be waited for until the general limit


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("follow", [False, True])
def test_read_regular_other_than_small_file_is_refused(tmp_path: Path, kind: str, *, follow: bool) -> None:
    """Pipes, sockets, folders, links and huge files are an error that names the path."""
    path = tmp_path / "state"
    HOSTILE[kind](path)
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        read_regular(path, limit=1000, follow=follow)
    assert caught.value.filename == str(path)


def test_read_regular_follows_a_link_only_if_it_may(tmp_path: Path) -> None:
    """A configuration may be a link, a file in somebody else's folder may not."""
    (tmp_path / "there").write_bytes(b"facts")
    (tmp_path / "link").symlink_to("there")
    assert read_regular(tmp_path / "link", follow=True) == b"facts"
    with pytest.raises(OSError, match="symbolic link") as caught:
        read_regular(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP


def test_read_regular_reads_up_to_its_limit(tmp_path: Path) -> None:
    """One byte more is refused, also where the size of a file says nothing."""
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "a", limit=4)
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular("/proc/self/status", limit=4)


def test_read_regular_of_a_huge_file_takes_no_memory(tmp_path: Path) -> None:
    """No more than the limit is read of three gigabytes."""
    HOSTILE["sparse file"](tmp_path / "state")
    program = (
        "import resource, sys; from sortd.files import read_regular\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: read_regular(sys.argv[1])\n"
        "except OSError as error: print(error.strerror)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "state"], capture_output=True, text=True, check=True
    )
    assert "larger than" in said.stdout


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "folder"])
def test_write_atomic_existing_name_is_replaced(tmp_path: Path, kind: str) -> None:
    """A link is replaced and not written through; nothing is left beside."""
    HOSTILE[kind](tmp_path / "state")
    write_atomic(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"
    assert not (tmp_path / "state").is_symlink()
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_write_atomic_never_writes_through_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """Neither under the file's name nor under one that it could have been written to beside."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for name in ("state", "state.new", "state.part", f"state.{os.getpid()}.part", f".state.{os.getpid()}.part"):
        link(precious, tmp_path / name)
    write_atomic(tmp_path / "state", b"new")
    assert precious.read_bytes() == b"precious"
    assert (tmp_path / "state").read_bytes() == b"new"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_write_atomic_refuses_a_taken_temporary_name(
    tmp_path: Path, link: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever guessed the random name gets nothing written through a link of that name."""
    monkeypatch.setattr("sortd.files.secrets.token_hex", lambda _: "guessed")
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    link(precious, tmp_path / ".sortd-guessed.part")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "state", b"new")
    assert precious.read_bytes() == b"precious"


def test_write_atomic_refused_leaves_nothing(tmp_path: Path) -> None:
    """A folder in its way is untouched, the error names the file, and nothing is left beside."""
    (tmp_path / "state").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomic(tmp_path / "state", b"new")
    assert caught.value.filename == str(tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]


def test_write_atomic_keeps_to_its_folder(tmp_path: Path) -> None:
    """The folder that was opened is written to, whatever stands under its name by then."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    with open_folder(tmp_path / "mine") as folder:
        (tmp_path / "mine").rename(tmp_path / "aside")
        (tmp_path / "mine").symlink_to("theirs")
        write_atomic(tmp_path / "mine" / "state", b"new", folder=folder)
        assert read_regular(tmp_path / "mine" / "state", folder=folder) == b"new"
    assert (tmp_path / "aside" / "state").read_bytes() == b"new"
    assert list((tmp_path / "theirs").iterdir()) == []
    with pytest.raises(NotADirectoryError), open_folder(tmp_path / "mine"):
        pass


def test_write_atomic_mode_is_set(tmp_path: Path) -> None:
    """They are the mode whatever the umask, and follow the umask where none is given."""
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "shown", b"", mode=0o644)
        write_atomic(tmp_path / "private", b"")
    finally:
        os.umask(before)
    modes = [os.stat(tmp_path / name).st_mode & 0o777 for name in ("shown", "private")]
    assert modes == [0o644, 0o600]


def test_write_atomic_is_synced_before_its_name_and_after(tmp_path: Path) -> None:
    """Bytes, name, folder: in this order, or a power cut leaves an empty file under the name."""
    program = (
        "import os, sys; from sortd import files; told = []\n"
        "def note(word, call): return lambda *a, **k: (told.append(word), call(*a, **k))[1]\n"
        "os.fsync, os.replace = note('sync', os.fsync), note('rename', os.replace)\n"
        "files.write_atomic(sys.argv[1], b'new'); print(*told)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "state"], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["sync", "rename", "sync"]
