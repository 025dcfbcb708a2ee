"""`sortd init`: which configuration is written, completed or left alone, and the command that follows."""

import os
import shlex
from pathlib import Path

import pytest

from sortd.config import read_config
from tests.command_line import Ran, sortd
from tests.daemon_process import make_dataset


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a configuration, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "SORTD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def command_of(ran: Ran) -> list[str]:
    """Return the words of the printed command, from `run` on."""
    (line,) = [line for line in ran.out.splitlines() if line.startswith("    ")]
    words = shlex.split(line)
    return words[words.index("run") :]


def root_of(file: Path) -> Path:
    """Return the root of a configuration."""
    return read_config(file, {"HOME": "/"}).root


def test_init_without_a_configuration_writes_that_of_the_user(home: Path) -> None:
    """A second dataset beside the first changes nothing."""
    file = home / ".config" / "sortd" / "config.yaml"
    first = sortd("init", home / "Pictures" / "Garden")
    assert (first.code, command_of(first)) == (0, ["run"])
    assert f"{file} was written" in first.out
    assert root_of(file) == home / "Pictures"
    before = file.read_bytes()
    second = sortd("init", home / "Pictures" / "Beach")
    assert f"{file} has its folder as `root`" in second.out
    assert file.read_bytes() == before


def test_init_with_a_configuration_without_root_appends_a_line(home: Path) -> None:
    """Comments, order and the missing line end at the end of the file stay."""
    file = home / "mine.yaml"
    file.write_text("# mine\nmode: max  # best here")
    ran = sortd("init", home / "Pictures" / "Garden", "-c", file)
    assert command_of(ran) == ["run", "-c", str(file)]
    assert file.read_text() == f"# mine\nmode: max  # best here\nroot: {home}/Pictures\n"


@pytest.mark.parametrize("text", ["{mode: max}\n", "mode: max\n...\n"])
def test_init_with_a_configuration_that_takes_no_line_says_what_to_add(home: Path, text: str) -> None:
    """The file stays as it is, and the dataset is created."""
    file = home / "mine.yaml"
    file.write_text(text)
    ran = sortd("init", home / "Pictures" / "Garden", "-c", file)
    assert (ran.code, f"add the line `root: {home}/Pictures`" in ran.err) == (78, True)
    assert file.read_text() == text
    assert (home / "Pictures" / "Garden" / "Clases").is_dir()


@pytest.mark.parametrize("text", ["root: Data\nmode: max\n", "mode: max\n"])
def test_init_beside_another_root_writes_a_configuration_of_its_own(home: Path, text: str) -> None:
    """One sortd has one root; the datasets of the other one stay served, also those of the default root."""
    (home / "config.yaml").write_text(text)
    make_dataset(home / "Data")
    ran = sortd("init", home / "Pictures" / "Garden")
    beside = home / "Pictures" / "config.yaml"
    assert command_of(ran) == ["run", "-c", str(beside)]
    assert (home / "config.yaml").read_text() == text
    own = read_config(beside, {"HOME": str(home)})
    assert (own.root, own.state_dir) == (home / "Pictures", home / "Pictures" / ".sortd-state")
    again = sortd("init", home / "Pictures" / "Beach")
    assert command_of(again) == ["run", "-c", str(beside)]
    beside.write_text("root: elsewhere\n")
    refused = sortd("init", home / "Pictures" / "Third")
    assert (refused.code, "has another `root`" in refused.err) == (78, True)
    assert beside.read_text() == "root: elsewhere\n"


def test_init_with_a_root_in_the_environment_unsets_it_in_the_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable would override the root that is written."""
    monkeypatch.setenv("SORTD_ROOT", "/elsewhere")
    ran = sortd("init", home / "Pictures" / "Garden")
    assert "    env -u SORTD_ROOT " in ran.out
    assert root_of(home / ".config" / "sortd" / "config.yaml") == home / "Pictures"


@pytest.mark.parametrize(
    "name",
    ["my pictures", 'a "b": #c', "-", "é\t", "no", "{x}", "'", "\\n", "\x7f", "\x85x", "\uffff\u2028", "\U000e0001"],
)
def test_init_with_an_odd_path_writes_it_so_that_it_is_read_back(home: Path, name: str) -> None:
    """Quotes, colons, hashes and tabs have a meaning in YAML."""
    assert sortd("init", home / name / "Garden").code == 0
    assert root_of(home / ".config" / "sortd" / "config.yaml") == home / name


def test_init_with_a_path_that_is_not_utf8_is_refused(home: Path) -> None:
    """A configuration cannot contain it; the message names the variable that can."""
    ran = sortd("init", home / os.fsdecode(b"\xff") / "Garden")
    assert (ran.code, "set SORTD_ROOT instead" in ran.err) == (78, True)
    assert not (home / ".config").exists()


@pytest.mark.parametrize("name", ["link.yaml", "file/config.yaml", "/proc/config.yaml"])
def test_init_with_a_configuration_that_cannot_be_written_says_so(home: Path, name: str) -> None:
    """The dataset is created, and a link that leads nowhere is not replaced."""
    (home / "link.yaml").symlink_to(home / "nowhere")
    (home / "file").touch()
    ran = sortd("init", home / "Garden", "-c", name)
    assert (ran.code, (home / "Garden" / "Clases").is_dir()) == (78, True)
    assert "cannot be written: " in ran.err
    assert (home / "link.yaml").is_symlink()
    assert not (home / "nowhere").exists()
