"""What the documents say is what the code does: events, commands, options, exit codes and links are compared."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import typer.core

from sortd import cli, logs
from sortd.errors import SortdError

REPOSITORY = Path(__file__).parents[1]
DISTRIBUTION = "sortd-images"
README = REPOSITORY / "README.md"
SPANISH = REPOSITORY / "README.es.md"


def marked(name: str) -> re.Pattern[str]:
    """Return the pattern of a marked part of a document: its two marks and what stands between."""
    return re.compile(rf"(<!-- {name}:[^\n]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


EVENTS = {value for name, value in vars(logs).items() if name.isupper() and isinstance(value, str)}


def test_the_page_of_the_log_says_what_every_event_means() -> None:
    """A line of the log is looked up there."""
    found = marked("events").search((REPOSITORY / "docs" / "log.md").read_text(encoding="utf-8"))
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
    for name, group in commands().items():
        if isinstance(group, typer.core.TyperGroup):
            (row,) = (row for row in rows if f"`sortd {name} " in row)
            assert {*group.commands} - {"list"} <= {*re.findall(r"[a-z]+", row)}


def options(command: typer.core.TyperCommand | typer.core.TyperGroup) -> set[str]:
    """Return the options of a command and of the commands below it."""
    below = command.commands.values() if isinstance(command, typer.core.TyperGroup) else ()
    own = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    return own.union(*(options(one) for one in below if isinstance(one, typer.core.TyperCommand)))


def test_every_option_of_a_command_in_the_documents_exists() -> None:
    """What follows `sortd COMMAND --` in a line of code, or between backticks, is an option of that command."""
    unknown, known = set[str](), commands()
    for file in [README, SPANISH, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for name, rest in re.findall(r"sortd ([a-z]+)([^`\n|#]*)", file.read_text(encoding="utf-8")):
            command = known.get(name)
            if isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup):
                named = {*re.findall(r"(?<![\w-])--[a-z-]+", rest)} - {"--config"}
                unknown |= {f"{file.name}: sortd {name} {option}" for option in named - options(command)}
    assert unknown == set()


def exit_codes(errors: type[SortdError] = SortdError) -> set[int]:
    """Return the exit codes of an error and its kinds."""
    return {errors.exit_code}.union(*map(exit_codes, errors.__subclasses__()))


def test_the_page_of_the_command_line_says_what_every_exit_code_means() -> None:
    """The codes of the errors stand there, but that of a defect, which comes with a traceback."""
    page = (REPOSITORY / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = page.split("## Exit codes")[1]
    rows = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in row.split(", ")}
    assert rows == exit_codes() - {SortdError.exit_code} | {0, 2, 130}
    (line,) = re.findall(r"^Exit codes: (.*(?:\n.+)*)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code) for code in re.findall(r"\b\d+\b", line)} == rows


@pytest.mark.parametrize(
    "document", ["README.md", "README.es.md", "docs", "docs/monitoring", "CHANGELOG.md", "sortd/model/MODEL_CARD.md"]
)
def test_every_link_leads_somewhere(document: str) -> None:
    """Relative links in the documents name files that are there."""
    path = REPOSITORY / document
    for file in sorted(path.glob("*.md")) if path.is_dir() else [path]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def first_cells(document: Path) -> list[str]:
    """Return what the rows of a document's tables are about, as far as it is written in code."""
    rows = re.findall(r"^\| `([^`|]+)`", document.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.split(r"[ <…\[]", row)[0] if not row.startswith("sortd ") else row.split()[1] for row in rows]


@dataclass(frozen=True)
class Outline:
    """What does not depend on the language in the sections of a README, in order."""

    headings: list[int]
    """The level of each heading."""
    commands: list[list[list[list[str]]]]
    """By section and block of code: the program of each command, the command of sortd, and the options."""
    tables: list[list[tuple[int, int]]]
    """By section: the rows and columns of each table."""
    links: list[set[str]]
    """By section: the files that it links to."""


def invariable(line: str) -> list[str]:
    """Return the words of a command that are the same in all languages."""
    program, *words = line.split("#", maxsplit=1)[0].split()[1:]
    is_named = program.rpartition("/")[2] in {"sortd", "make"}
    return [program, *words[:is_named], *(word for word in words[is_named:] if word.startswith("-"))]


def outline(readme: Path) -> Outline:
    """Return the outline of a README."""
    text = readme.read_text(encoding="utf-8")
    headings = re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    sections = re.split(r"^#+ .*$", text, flags=re.MULTILINE)[1:]
    blocks = [re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE) for section in sections]
    tables = [re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE) for section in sections]
    return Outline(
        headings=[len(marks) for marks in headings],
        commands=[
            [[invariable(line) for line in block.splitlines() if line.startswith("$ ")] for block in inside]
            for inside in blocks
        ],
        tables=[[(table.count("\n"), table.splitlines()[1].count("|")) for table in inside] for inside in tables],
        links=[set(re.findall(r"\]\(([^)]+)\)", section)) - {"README.md", "README.es.md"} for section in sections],
    )


def test_the_spanish_readme_has_the_sections_of_the_english_one() -> None:
    """Headings, commands, tables and links are the same, section by section."""
    assert outline(SPANISH) == outline(README)


def test_the_spanish_readme_says_no_less() -> None:
    """Folders, models, commands, troubles and exit codes of the README stand in the Spanish one, in the same order."""
    assert first_cells(SPANISH) == first_cells(README)
    numbers = re.compile(r"\b(?:2|65|69|73|74|75|78|130)\b")
    ours, theirs = (
        readme.read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
        for readme, heading in ((README, "## Commands"), (SPANISH, "## Órdenes"))
    )
    assert numbers.findall(theirs) == numbers.findall(ours)


def texts() -> Iterator[Path]:
    """Yield every file of the repository that people read or that prints to them."""
    for name in ("sortd", "docs", "systemd", "tests", "benchmarks", "training", "Data", ".ci", "packaging"):
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
