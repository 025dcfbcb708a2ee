"""What the documents say is what the code does: events, commands, options, exit codes and links are compared."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer
import typer.core

from sortd import cli, logs

REPOSITORY = Path(__file__).parents[1]
DISTRIBUTION = "sortd-images"
README = REPOSITORY / "README.md"


def marked(name: str) -> re.Pattern[str]:
    """Return the pattern of a marked part of a document: its two marks and what stands between."""
    return re.compile(rf"(<!-- {name}:[^\n]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


EVENTS = {value for name, value in vars(logs).items() if name.isupper() and isinstance(value, str)}


def test_the_readme_says_what_every_event_means() -> None:
    """A line of the log is looked up there."""
    found = marked("events").search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert {*re.findall(r"^\| `([a-z_.]+)` \| \S", found.group(2), re.MULTILINE)} == EVENTS


def commands() -> Mapping[str, object]:
    """Return the commands of the command line by name."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    return group.commands


def test_the_readme_names_every_command_and_no_other() -> None:
    """A command that nobody can find is not there, and one that is only written about is a lie."""
    text = README.read_text(encoding="utf-8")
    section = text.split("## Commands")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {
        word
        for row in rows
        for part in re.findall(r"`([^`]+)`", row)
        if (word := part.removeprefix("sortd ").split()[0])
    }
    assert named == set(commands()) - {"version"}


@pytest.mark.parametrize("document", ["README.md", "README.es.md", "docs", "sortd/model/MODEL_CARD.md"])
def test_every_link_leads_somewhere(document: str) -> None:
    """Relative links in the documents name files that are there."""
    path = REPOSITORY / document
    for file in sorted(path.glob("*.md")) if path.is_dir() else [path]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def first_cells(document: Path) -> set[str]:
    """Return what the rows of a document's tables are about, as far as it is written in code and in Latin letters."""
    rows = re.findall(r"^\| `([^`|]+)`", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.split(r"[ <…\[]", row)[0] if not row.startswith("sortd ") else row.split()[1] for row in rows}


def test_the_spanish_readme_says_no_less() -> None:
    """Folders, modes, commands, troubles and exit codes of the README stand in the Spanish one; events need not."""
    spanish = REPOSITORY / "README.es.md"
    assert first_cells(README) - EVENTS - first_cells(spanish) == set()
    codes = re.compile(r"\b(?:2|65|69|73|74|75|78|130)\b")
    ours = README.read_text(encoding="utf-8").split("## Commands")[1].split("\n## ")[0]
    theirs = spanish.read_text(encoding="utf-8").split("## Órdenes")[1].split("\n## ")[0]
    assert sorted(codes.findall(ours)) == sorted(codes.findall(theirs))


def texts() -> Iterator[Path]:
    """Yield every file of the repository that people read or that prints to them."""
    for name in ("sortd", "docs", "systemd", "tests", "benchmarks", "training", "Data", ".ci"):
        found = (path for path in sorted((REPOSITORY / name).rglob("*")) if "__pycache__" not in path.parts)
        yield from (path for path in found if path.suffix in {".py", ".md", ".j2", ".html", ".service", ".yaml", ""})
    yield from sorted(path for path in REPOSITORY.iterdir() if path.suffix in {".md", ".toml", ".txt", ".yaml"})
    yield REPOSITORY / "Makefile"


REPLACED = (
    "ear", "canary", "hints", "HintsLost", "latecomer", "latecomers", "lane", "lanes", "glance", "outbox", "relocator",
    "relocation", "crossings", "errand", "pretence", "rehearse", "rehearsal", "trainee", "teach_head", "patrol",
    "appoint", "appointed", "put_back", "PutBack", "vouch", "teaching", "taught", "voters", "residence", "attend",
    "bell", "mends", "story", "seat", "spent", "try_out",
)  # fmt: skip
"""Words that were replaced by the field's terms; see docs/architecture.md for the terms in use."""
ON_DISK = ("canary",)
"""Words that stay as the name of a file."""


def test_texts_and_names_use_the_terms_of_the_field() -> None:
    """No name and no sentence of the package or its documents uses a word that was replaced."""
    word = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(word for word in REPLACED)})(?![A-Za-z])", re.IGNORECASE)
    tests = re.compile(r"tests/[\w/]+\.py(?:::\w+)*|`test_\w+`")
    found = {
        f"{path.relative_to(REPOSITORY)}:{number}: {match.group()}"
        for path in [*(REPOSITORY / "sortd").rglob("*.py"), *(REPOSITORY / "docs").glob("*.md"), README]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in word.finditer(tests.sub("", line))
        if not any(name in line for name in ON_DISK)
    }
    assert found == set()


def test_texts_that_say_what_to_install_name_the_distribution() -> None:
    """The name of the import belongs to another author's distribution on the package index."""
    installer = r"(?:pip3?|pipx|uv|uvx|poetry|conda)\b.{0,40}?\b(?:install|add|run|download|uninstall)\b"
    wrong = re.compile(
        rf"{installer}[^#|;&\n]*?[\s'\"`](?:sortd)(?=[\s'\"`\[=<>~!.,;)]|$)"  # pip install sortd, 'sortd>=1'
        r"|\bsortd\[[a-z,]+\]"  # sortd[onnx], in whatever command
        r"|\b(?:re)?install (?:the )?sortd\b(?!-images)"
    )
    found = {
        f"{path.relative_to(REPOSITORY)}: {match.group()}"
        for path in texts()
        if path.is_file() and path != Path(__file__)
        for match in wrong.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set()
    for command in (
        "pip install " + "sortd",
        "pipx install " + "'sortd[onnx]'",
        "uv add " + "sortd==1",
        "`pip install sortd`",
    ):
        assert wrong.search(command), command
    assert not wrong.search("pip install --editable sortd-images")


def test_project_is_called_otherwise_than_its_import() -> None:
    """The distribution, its source archive and what it ships are named in one place."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == DISTRIBUTION
    assert project["project"]["scripts"] == {"sortd": "sortd.cli:main"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["sortd"]
    assert all((REPOSITORY / source).exists() for source in wheel["force-include"])
    # Without a list the source archive holds all that git does not ignore: what the tests open is in it.
    assert "sdist" not in project["tool"]["hatch"]["build"]["targets"]
