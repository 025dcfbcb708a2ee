"""The first steps of five kinds of use, typed into a shell on a terminal: what is printed, and the files at the end.

README has a table of the commands of each; a test here types those and no other command of sortd. One ``once`` has the
packaged model, which takes as much processor time as all else here; the others, and ``run``, have the fake encoder.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.daemon_process import COLOURS, PATIENCE_SECONDS, picture, tree

REPOSITORY = Path(__file__).parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
PROMPT = re.compile(r"<(\d+)>")


def table(readme: str) -> dict[str, list[str]]:
    """Return the commands by kind of use, from the table of a README."""
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    part = text.split("<!-- first steps: checked by a test -->\n")[1].split("<!-- /first steps -->")[0]
    rows = [row.strip("| ").split(" | ") for row in part.splitlines()[2:] if row.startswith("|")]
    return {row[0]: re.findall(r"`([^`]+)`", row[1]) for row in rows}


USES = list(table("README.md").values())


class Terminal:
    """A shell on a terminal of 100 columns, in a home of its own."""

    def __init__(self, home: Path, *, fast: str) -> None:
        """Start it; commands that match ``fast``, a pattern of sh, use the fake encoder."""
        self.home, self.typed = home, list[str]()
        program = home / "bin" / "sortd"
        program.parent.mkdir()
        interpreter = shlex.quote(sys.executable)
        choice = f'case "$*" in {fast}) exec {interpreter} -m tests.fast_sortd "$@";; esac'
        program.write_text(f'#!/bin/sh\n{choice}\nexec {interpreter} -m sortd "$@"\n')
        python = program.with_name("python")
        python.write_text(f'#!/bin/sh\nexec {interpreter} "$@"\n')
        for file in (program, python):
            file.chmod(0o755)
        environment = {
            "HOME": os.fspath(home),
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.fspath(REPOSITORY),
            "PS1": "<$?>",
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "SORTD_DECODING__WORKERS": "1",
            "SORTD_SETTLE_SECONDS": "0.1",
        }
        self._shell = pexpect.spawn(
            "bash",
            ["--norc", "--noediting"],
            cwd=os.fspath(home),
            env=environment,
            encoding="utf-8",
            timeout=PATIENCE_SECONDS,
            dimensions=(40, 100),
            echo=False,
        )
        self._shell.expect(PROMPT)

    def type(self, command: str, code: int = 0) -> str:
        """Type a command, and return what it printed on the terminal."""
        self.begin(command)
        return self.end(code)

    def begin(self, command: str) -> None:
        """Type a command that does not end by itself."""
        self.typed += [command] if command.split(maxsplit=1)[0] in {"sortd", "python"} else []
        self._shell.sendline(command)

    def wait_for(self, text: str) -> None:
        """Wait until something is printed."""
        self._shell.expect_exact(text)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._shell.sendintr()

    def end(self, code: int = 0) -> str:
        """Wait for the prompt; return what was printed since, and check the exit code."""
        self._shell.expect(PROMPT)
        printed = ESCAPES.sub("", str(self._shell.before))
        assert int(self._shell.match[1]) == code, printed
        return printed

    def close(self) -> None:
        """End the shell."""
        self._shell.close(force=True)


@pytest.fixture
def terminal(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A shell in a new home; its parameter names the commands to which the model does not matter."""
    shell = Terminal(tmp_path, fast=getattr(request, "param", "once*|run*"))
    yield shell
    shell.close()


def fill(dataset: Path) -> None:
    """Copy two references of each class, and one image of each to sort."""
    for index, colour in enumerate(COLOURS):
        folder = dataset / "Clases" / colour
        folder.mkdir(exist_ok=True)
        for number in range(2):
            picture(colour, 100 * index + number).save(folder / f"{number}.png")
        picture(colour, 900 + index).save(dataset / "Images" / f"{colour}.png")


FILED = [f"{colour}/{colour}.png" for colour in sorted(COLOURS)]


def check_typed(terminal: Terminal, use: int) -> None:
    """Check that the commands are those of README, with other paths and further options."""
    named = [command.split()[:2] for command in USES[use]]
    assert [command.split()[:2] for command in terminal.typed] == named


def next_command(printed: str) -> str:
    """Return the command that ``sortd init`` printed as the next."""
    (line,) = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    return line.replace(f"{sys.executable} -m sortd", "sortd")


@pytest.mark.parametrize("terminal", ["*--dry-run"], indirect=True)
def test_shop_sorts_its_product_photos(terminal: Terminal) -> None:
    """The packaged model: what the dry run shows is what is filed, and neither prints a line for each image."""
    printed = terminal.type("sortd init Shop --class red --class green --class blue")
    assert "Shop is a dataset" in printed
    assert ".config/sortd/config.yaml was written" in printed
    fill(terminal.home / "Shop")
    with (terminal.home / ".config/sortd/config.yaml").open("a") as file:
        file.write("abstain: off\nmodel: packaged\n")
    planned = terminal.type("sortd once --dry-run")
    assert "Shop: 3 would be filed, 0 would go to Review" in planned
    assert "nothing was changed" in planned
    assert not (terminal.home / "Shop" / "Dataset" / "red").exists()
    done = terminal.type("sortd once")
    assert "Shop: 3 filed, 0 sent to Review" in done
    assert ".png" not in planned + done
    assert list(tree(terminal.home / "Shop" / "Dataset")) == FILED
    check_typed(terminal, 0)


def test_home_server_watches_a_folder(terminal: Terminal) -> None:
    """The printed command watches the new dataset; the unit is of the user."""
    command = next_command(terminal.type("sortd init Pictures/Garden"))
    assert command == "sortd run"
    dataset = terminal.home / "Pictures" / "Garden"
    fill(dataset)
    with (terminal.home / ".config/sortd/config.yaml").open("a") as file:
        file.write("abstain: off\nmode: max\n")
    terminal.begin(command)
    for _ in COLOURS:
        terminal.wait_for("image.filed")
    picture("red", 950).save(dataset / ".late.png")
    (dataset / ".late.png").rename(dataset / "Images" / "late.png")
    terminal.wait_for("Images/late.png -> Dataset/red/")
    terminal.interrupt()
    assert "daemon.stopped" in terminal.end()
    planned = terminal.type("sortd service install --user --dry-run")
    assert f"would write {terminal.home}/.config/systemd/user/sortd.service" in planned
    assert "would run systemctl --user enable --now sortd" in planned
    assert list(tree(dataset / "Dataset")) == sorted([*FILED, "red/late.png"])
    check_typed(terminal, 1)


def test_researcher_builds_a_data_set(terminal: Terminal) -> None:
    """Folders of classes become a table of paths, labels and scores."""
    terminal.type("sortd init Flowers --class red --class green --class blue")
    fill(terminal.home / "Flowers")
    with (terminal.home / ".config/sortd/config.yaml").open("a") as file:
        file.write("abstain: off\nmode: max\n")
    assert "Flowers: 3 filed" in terminal.type("sortd once")
    terminal.type("sortd export --out labels.csv")
    header, *rows = (terminal.home / "labels.csv").read_text().splitlines()
    assert "label" in header.split(",")
    assert len(rows) == len(FILED)
    check_typed(terminal, 2)


def test_production_line_calls_it_from_a_program(terminal: Terminal) -> None:
    """Configuration beside the data, facts as JSON, and an image of no format that does not stop the others."""
    terminal.type("sortd init Line/Parts -c Line/sortd.yaml --class red --class green --class blue")
    fill(terminal.home / "Line" / "Parts")
    (terminal.home / "Line" / "Parts" / "Images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with (terminal.home / "Line" / "sortd.yaml").open("a") as file:
        file.write("abstain: off\nmode: max\nmodel: packaged\nlog: {format: json}\n")
    found = json.loads(terminal.type("sortd check -c Line/sortd.yaml --json"))
    assert found["errors"] == 0
    terminal.type("sortd once -c Line/sortd.yaml --json > facts.json 2> log.jsonl")
    assert json.loads((terminal.home / "facts.json").read_text())["datasets"]["Parts"]["filed"] == dict.fromkeys(
        COLOURS, 1
    )
    events = [json.loads(line)["event"] for line in (terminal.home / "log.jsonl").read_text().splitlines()]
    assert (events.count("image.filed"), events.count("image.rejected")) == (3, 1)
    status = json.loads(terminal.type("sortd status -c Line/sortd.yaml --json", code=75))
    assert status["datasets"]["Parts"]["total"] == {"filed": 3, "rejected": 1}
    check_typed(terminal, 3)


def test_distribution_packages_it(terminal: Terminal) -> None:
    """Man pages, completions, the annotated configuration and the units come from the program itself."""
    terminal.type(f"cd {shlex.quote(os.fspath(REPOSITORY))}")
    terminal.type(f"python packaging/generate.py {terminal.home}/out")
    terminal.type("cd")
    assert {"sortd.1", "sortd-once.1", "sortd-service-install.1"} <= {*os.listdir(terminal.home / "out" / "man")}
    assert {*os.listdir(terminal.home / "out" / "completions")} == {"sortd.bash", "_sortd", "sortd.fish"}
    terminal.type("sortd config > config.yaml")
    assert (terminal.home / "config.yaml").read_bytes() == (REPOSITORY / "config.example.yaml").read_bytes()
    effective = json.loads(terminal.type("sortd config --effective --json"))
    line = (terminal.home / "config.yaml").read_text().splitlines().index("mode: mixed") + 1
    assert effective["values"]["mode"] == {"value": "mixed", "source": f"config.yaml:{line}"}
    check_typed(terminal, 4)


def test_both_readmes_name_the_same_first_steps() -> None:
    """The table of the Spanish README has the same commands, with other names of folders."""
    spanish = list(table("README.es.md").values())
    assert [[command.split()[:2] for command in use] for use in spanish] == [
        [command.split()[:2] for command in use] for use in USES
    ]
