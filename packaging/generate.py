"""Write the man pages and the shell completions of sortd: ``python packaging/generate.py OUT``.

The pages have the text of ``--help``; the completions are those of typer, which call sortd for each word.

    OUT/man/sortd.1, OUT/man/sortd-COMMAND.1
    OUT/completions/sortd.bash, OUT/completions/_sortd, OUT/completions/sortd.fish
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))  # the sortd of this checkout, whatever is installed

import typer
import typer.completion

from sortd import __version__
from sortd.cli import app

COMPLETIONS = {"bash": "sortd.bash", "zsh": "_sortd", "fish": "sortd.fish"}
FILES = """\
.SH FILES
.TP
.I config.yaml, ~/.config/sortd/config.yaml, /etc/sortd/config.yaml
The configuration, unless \\-c names one; the first that exists is read.
.B sortd config
prints every key.
.TP
.I ~/.local/state/sortd
The journal of all moves.
"""
EXIT_STATUS = """\
.SH EXIT STATUS
0 done, 2 usage, 65 bad data, 69 model unavailable, 73 and 74 storage, 75 try again, 78 configuration; see sysexits(3).
"""


def generate(out: Path) -> None:
    """Write all files below a folder."""
    manuals, completions = out / "man", out / "completions"
    for folder in (manuals, completions):
        folder.mkdir(parents=True, exist_ok=True)
    command = typer.main.get_command(app)
    root = _context(command, "sortd", **command.context_settings)
    for context in _contexts(root):
        name = context.command_path.replace(" ", "-")
        (manuals / f"{name}.1").write_text(_manual(context, root), encoding="utf-8")
    for shell, file in COMPLETIONS.items():
        script = typer.completion.get_completion_script(  # type: ignore[attr-defined]  # not listed in its __all__
            prog_name="sortd", complete_var="_SORTD_COMPLETE", shell=shell
        )
        if shell == "zsh":  # zsh loads the file at the first completion, which the file must also answer
            script += '\n\n_sortd_completion "$@"'
        (completions / file).write_text(f"{script}\n", encoding="utf-8")


def _context(command: Any, name: str, **settings: Any) -> Any:  # noqa: ANN401 -- typer's click is private
    return command.context_class(command, info_name=name, **settings)


def _contexts(context: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield the context of a command and of all below it."""
    yield context
    for name, command in getattr(context.command, "commands", {}).items():
        if not command.hidden:
            yield from _contexts(_context(command, name, parent=context))


def _manual(context: Any, root: Any) -> str:  # noqa: ANN401
    """Return the man page of a command."""
    command = context.command
    name = context.command_path.replace(" ", "-")
    said = " ".join((command.help or "").split())
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH "{name.upper()}" 1 "" "sortd {__version__}" "User Commands"\n',
        f".SH NAME\n{_escaped(name)} \\- {_escaped(said.split('. ')[0].removesuffix('.'))}\n",
        f".SH SYNOPSIS\n.B {_escaped(context.command_path)}\n{_escaped(usage)}\n",
        f".SH DESCRIPTION\n{_escaped(said)}\n",
    ]
    records = {kind: list(_records(context, kind)) for kind in ("argument", "option")}
    below = [(word, one.help or "") for word, one in getattr(command, "commands", {}).items() if not one.hidden]
    for heading, rows in (("ARGUMENTS", records["argument"]), ("OPTIONS", records["option"]), ("COMMANDS", below)):
        if rows:
            parts.append(f".SH {heading}\n")
            parts += [f".TP\n.B {_escaped(term)}\n{_escaped(' '.join(text.split()))}\n" for term, text in rows]
    if context is root:
        parts += [FILES, EXIT_STATUS]
    pages = [one.command_path.replace(" ", "-") for one in _contexts(context)][1:] or ["sortd"]
    parts.append(".SH SEE ALSO\n" + ",\n".join(f".BR {_escaped(page)} (1)" for page in pages) + "\n")
    return "".join(parts)


def _records(context: Any, kind: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yield the arguments or the options of a command with their help."""
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if parameter.param_type_name == kind and record is not None:
            yield record


def _escaped(text: str) -> str:
    """Return a text in which roff finds no request and no escape."""
    shown = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return f"\\&{shown}" if shown.startswith(".") else shown


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
