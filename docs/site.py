"""Pages of the site that are made when it is built: the two READMEs, and the reference from the code."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import typer
import typer.core
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from sortd import cli

REPOSITORY = Path(__file__).parents[1]
COPIED = {
    "index.md": "README.md",
    "inicio.md": "README.es.md",
    "model-card.md": "sortd/model/MODEL_CARD.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files outside of docs/."""
FILES = {
    **{file: page for page, file in COPIED.items()},
    "LICENSE": "licence.md",
    "config.example.yaml": "configuration.md",
}
"""Links to these files lead to these pages."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of docs/ with the pages that are made."""
    for page, make in pages().items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 -- mkdocs passes all
    """Return the text of a page of docs/ with its links to files outside leading to their pages."""
    return redirected(markdown, {f"../{path}": page for path, page in FILES.items()})


def pages() -> Mapping[str, Callable[[], str]]:
    """Return how each made page is made, by its name."""
    made: dict[str, Callable[[], str]] = {name: _copy(file) for name, file in COPIED.items()}
    return {**made, "commands.md": commands, "configuration.md": configuration, "licence.md": licence}


def redirected(markdown: str, targets: Mapping[str, str]) -> str:
    """Return a text whose links to these files lead to these pages."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        return f"]({targets.get(path, path)}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def _copy(file: str) -> Callable[[], str]:
    """Return what makes the page of a file at the top of the repository, or below it."""

    def make() -> str:
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        text = redirected(text, FILES)
        return re.sub(r'((?:\]\(|src="))docs/', r"\1", text)

    return make


def commands() -> str:
    """Return the reference of the commands, as the command line describes itself."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    text = str(get_docs_for_click(obj=group, ctx=typer.Context(group), name="sortd", title="Commands"))
    for name, command in group.commands.items():  # typer shortens these lines to a few words
        line = f"* [`{name}`](#sortd-{name}): {command.get_short_help_str(limit=1000)}"
        text = re.sub(rf"^\* `{name}`: .*$", line.replace("\\", r"\\"), text, count=1, flags=re.MULTILINE)
    return text


def configuration() -> str:
    """Return the example of the configuration, which describes every key."""
    example = (REPOSITORY / "config.example.yaml").read_text(encoding="utf-8")
    return f"# Configuration\n\nEvery key with its default.\n\n```yaml\n{example}```\n"


def licence() -> str:
    """Return the licence."""
    return f"# Licence\n\n```text\n{(REPOSITORY / 'LICENSE').read_text(encoding='utf-8')}```\n"
