"""docs/json.md describes what commands print with ``--json``: the document is made from types, and outputs match it.

``Ran.facts`` compares each output that a test reads with the schema, in all tests.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer
import typer.core

from sortd import cli
from sortd.commands.console import json_values
from sortd.commands.documents import DOCUMENTS
from sortd.commands.json_schema import write
from sortd.layout import Layout
from tests.command_line import require_documented, sortd, write_config
from tests.daemon_process import make_dataset, picture
from tests.filed_images import file_images

DOCS = Path(__file__).parents[2] / "docs"


def test_documentation_of_json_is_that_of_the_types(tmp_path: Path) -> None:
    """``python -m sortd.commands.json_schema docs`` changes nothing."""
    write(tmp_path)
    for name in ("json.md", "json.schema.json"):
        assert (DOCS / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8"), name


def commands_with_json(group: typer.core.TyperGroup, above: str = "") -> Iterator[str]:
    """Yield the commands that have the option ``--json``."""
    for name, command in group.commands.items():
        if any("--json" in parameter.opts for parameter in command.params):
            yield f"{above}{name}"
        if isinstance(command, typer.core.TyperGroup):
            yield from commands_with_json(command, f"{above}{name} ")


def test_every_command_with_json_is_documented() -> None:
    """No command prints a shape of its own."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert {*commands_with_json(group)} == DOCUMENTS.keys()


def test_json_values_have_times_in_utc_and_no_numbers_that_are_not_finite() -> None:
    """Whatever a reader of JSON expects; a dataset may be named like a time."""
    assert json_values(
        {"at": 0.25, "drawn_at": 1e300, "held_since": None, "score": math.nan, "more": ({"bound": -math.inf},)}
    ) == {
        "at": "1970-01-01T00:00:00.250Z",
        "drawn_at": None,
        "held_since": None,
        "score": None,
        "more": [{"bound": None}],
    }
    assert json_values({"released": {"at": 1}, "total": {"seen_at": 3}}) == {
        "released": {"at": 1},
        "total": {"seen_at": 3},
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with filed and rejected images, and one without any."""
    folder = tmp_path_factory.mktemp("json")
    dataset = make_dataset(folder / "Data")
    make_dataset(folder / "Data", "Empty", references=1)
    file_images(dataset, folder / "state", {"a.png": "red", "b.png": "blue", "x.png": "rejected"})
    return write_config(folder)


@pytest.mark.parametrize(
    "command",
    [
        "check", "status", "history", "history --prune --dry-run", "audit Colours", "audit Colours --all-right",
        "models", "models list", "models --available", "models prune", "models demote --dataset Colours",
        "export Colours --out {0}/out.csv", "undo --last 1 --dry-run", "undo --last 2", "release --all",
        "assign {0}/Data/Colours/Dataset/red/a.png blue", "groups Empty",
    ],
)  # fmt: skip
def test_json_of_commands_matches_the_schema(config: Path, command: str) -> None:
    """Each prints one document, about real datasets, without a running sortd."""
    words = command.format(config.parent).split()
    facts: Mapping[str, object] = sortd(*words, "-c", config, "--json").facts
    assert facts["command"] == " ".join(word for word in words if word in {*" ".join(DOCUMENTS).split()})


def test_json_of_an_error_is_the_last_line_of_stderr(config: Path) -> None:
    """Nothing is on stdout; without ``--json`` it is a sentence, as is a wrong option."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "sortd", *arguments, "-c", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = run("models", "demote", "--dataset", "None", "--json")
    error = json.loads(failed.stderr.splitlines()[-1])
    require_documented(error)
    assert (failed.stdout, failed.returncode, error["command"], error["exit_code"]) == ("", 65, "models demote", 65)
    assert "there is no dataset 'None'" in error["error"]
    assert run("history", "--dataset", "None").stderr.startswith("sortd: there is no dataset")


def test_json_of_commands_with_a_model_matches_the_schema(tmp_path: Path, tiny_clip: Path) -> None:
    """What is decided, explained and evaluated, and each line of a dry run."""
    dataset = make_dataset(tmp_path / "Data")
    Layout(dataset).make()
    picture("green", 900).save(dataset / "Images" / "new.png")
    config = write_config(tmp_path, model=tiny_clip, mode="max", abstain="off", settle_seconds=0.1)
    (line,) = sortd("once", "--dry-run", "-c", config, "--json").out.splitlines()
    document = json.loads(line)
    require_documented(document)
    assert (document["command"], document["path"]) == ("once", str(dataset / "Images" / "new.png"))
    for command in ("eval", f"explain {dataset}/Clases/red/0.png", "reconsider", "groups"):
        assert sortd(*command.split(), "-c", config, "--json").facts["command"] == command.split()[0]
