"""The console: how the command line reads its options, shows facts on stdout and says things on stderr.

Facts are JSON where asked for, tables on a terminal, and lines of tab-separated columns everywhere else.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from sortd.deciding.prompts import written_name
from sortd.files import readable_json

if TYPE_CHECKING:
    from sortd.config import Config

STANDARD_ERRORS = 1.96
"""On either side of a mean: 95 % of a normal distribution lie within."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        readable=False,  # whether it can be read says the configuration itself, with its own exit code
        help="The configuration; without it config.yaml here, in ~/.config/sortd or in /etc/sortd, else all defaults.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="From then on: 2026-03-01, '2026-03-01 14:30', 14:30, 2h, yesterday.")
]
UntilOption = Annotated[str | None, typer.Option("--until", help="Until then.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Only this dataset.")]


class Command(typer.core.TyperCommand):
    """A command whose help names no type behind a switch: nothing may be written there."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401 -- typer's own click, whose types it does not publish
        """Return the parameters, the switches without a type."""
        return _without_types(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    """A group of commands with the same help."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401 -- typer's own click, whose types it does not publish
        """Return the parameters, the switches without a type."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: Any) -> Any:  # noqa: ANN401 -- typer's own click, whose types it does not publish
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


def load_config(path: Path | None) -> "Config":
    """Read the configuration named on the command line, or found where the README says.

    Raises:
        ConfigError: it is missing or not valid, or its root is a dataset or lies in one.
    """
    from sortd.config import load
    from sortd.errors import ConfigError
    from sortd.layout import misplaced_root

    config = load(path, os.environ)
    if (problem := misplaced_root(config.root)) is not None:
        raise ConfigError(problem)
    return config


def print_json(facts: object) -> None:
    """Print facts as JSON on stdout; bytes of names that are not UTF-8 come out as escapes of lone surrogates."""
    typer.echo(readable_json(facts, encoding=sys.stdout.encoding, indent=2))


def printable(text: str) -> str:
    """Return a name or path as a terminal can show it: control characters and undecodable bytes as escapes."""
    shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def say(message: str) -> None:
    """Say something that is no fact to whoever sits at the terminal: on stderr."""
    print(message, file=sys.stderr)


def print_line(text: str, *, style: str = "") -> None:
    """Print one line of facts, in colour on a terminal."""
    if not sys.stdout.isatty():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text, style=style), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print rows under a header.

    Args:
        columns: the names of the columns.
        rows: as many cells each; None is an empty one.
        right: the columns that hold numbers.
    """
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *cells):
            typer.echo("\t".join(row))
        return
    cells = [[written_name(cell) for cell in row] for row in cells]
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def moment_option(name: str, text: str | None) -> float | None:
    """Return an option's moment in seconds since the epoch.

    Raises:
        typer.BadParameter: it is none.
    """
    from sortd.moments import moment

    if text is None:
        return None
    try:
        return moment(text, datetime.now().astimezone())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from error


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal that something long is under way; whoever does it tells what is done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status(what) as status:
        yield lambda done: status.update(f"{what}: {printable(done)} done")


@contextmanager
def under_way(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is under way, as whoever does it tells again and again; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status(what) as status:
        yield lambda now: status.update(printable(now))


@contextmanager
def bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with the time left on a terminal, elsewhere nothing; nothing may be printed meanwhile.

    Whoever does the work tells what it is at, how many are done, and of how many.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda now, done, total: shown.update(
            task, description=printable(now), completed=done, total=total or None
        )


def counted(number: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def interval(right: int, judged: int) -> tuple[float, float]:
    """Return between which shares the true one lies, with 95 % confidence, where so many of those judged are right.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    squared = STANDARD_ERRORS**2
    share, whole = right / judged, judged + squared
    centre = (right + squared / 2) / whole
    half = STANDARD_ERRORS * sqrt(share * (1 - share) * judged + squared / 4) / whole
    return max(0.0, centre - half), min(1.0, centre + half)


def out_of(right: int, judged: int) -> str:
    """Return ``26 of 37 (95 %: 54 to 82 %)``: how many, of how many, and what that says of the true share."""
    low, high = interval(right, judged)
    return f"{right:,} of {judged:,} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"


def megabytes(size_bytes: float) -> str:
    """Return a size as a person reads it, in powers of 1000 as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"
