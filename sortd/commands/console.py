"""Shared parts of the commands: options, output, and the format of times and numbers.

Facts go to stdout, as JSON with ``--json``, as tables on a terminal, else as tab-separated lines; messages to stderr.
The JSON of every command has one shape, see ``json_document`` and docs/json.md.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from sortd.classify.prompts import written_name
from sortd.errors import ConfigError
from sortd.files import readable_json
from sortd.layout import misplaced_root, nested_datasets

if TYPE_CHECKING:
    from sortd.config import Config

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|hours?|d|days?|w|weeks?)(?:\s+ago)?")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

JSON_VERSION = 1
"""The ``schema`` of the JSON that commands print. New keys do not change it; removed or changed ones do."""
LINE_SECONDS = 10.0  # between two lines of progress

Facts = TypeVar("Facts")


def config_given(context: typer.Context, path: Path | None) -> Path | None:
    """Return the value of ``--config``, which may also stand before the command or before its group."""
    above = context.parent
    while path is None and above is not None:
        path, above = above.params.get("config"), above.parent
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        callback=config_given,
        readable=False,  # read_config reports an unreadable file with its own exit code
        help="Configuration file. Default: config.yaml here, in ~/.config/sortd or /etc/sortd, or built-in values.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="Only moves since 2026-03-01, '2026-03-01 14:30', 14:30, 2h, yesterday.")
]
UntilOption = Annotated[str | None, typer.Option("--until", help="Only moves until this time.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write an HTML page to this file.")]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="Name of the dataset. Default: all, or the only one.")
]


def say(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr)


def load_config(path: Path | None, *, tell: Callable[[str], None] = say) -> "Config":
    """Read the configuration; raise ConfigError if it is not valid, or if its root is or lies in a dataset.

    ``tell`` is called with a message about each dataset that is ignored since it lies in another.
    """
    from sortd.config import read_config

    config = read_config(path, os.environ)
    if (problem := misplaced_root(config.root)) is not None:
        raise ConfigError(str(problem))
    for nested in nested_datasets(config.root):
        tell(f"sortd: {printable(str(nested))}")
    return config


_called: dict[str, Any] = {"command": "", "is_json": False}


def json_command() -> str | None:
    """Return the command that this process runs, for example ``models list``, if it prints JSON; else None."""
    return _called["command"] if _called["is_json"] else None


class _OwnHelp:
    """Shows no type after a flag in the help, since a flag takes no value, and notes which command runs."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401 -- typer's own click, whose types it does not publish
        """Return the parameters, flags without a type."""
        parameters = super().get_params(ctx)  # type: ignore[misc]  # of the other base class
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return parameters

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 -- as above
        """Run the command after noting its name and whether it prints JSON."""
        names, above = list[str](), ctx
        while above.parent is not None:  # the outermost is the program
            names, above = [above.info_name, *names], above.parent
        is_json = ctx.params.get("as_json") or ctx.params.get("format_name") == "json"
        _called.update(command=" ".join(names), is_json=bool(is_json))
        return super().invoke(ctx)  # type: ignore[misc]  # of the other base class


class Command(_OwnHelp, typer.core.TyperCommand):
    """A command of sortd."""


class DatasetCommand(Command):
    """A command with the option ``--dataset``, whose name may also be given without the option, as it once was."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 -- typer's own click, as above
        """Take one argument as the name of the dataset, and refuse more."""
        super().parse_args(ctx, args)
        if len(ctx.args) == 1 and ctx.params.get("dataset") is None:
            ctx.params["dataset"] = ctx.args.pop()
        if ctx.args and not ctx.resilient_parsing:
            ctx.fail(f"Got unexpected extra argument(s) ({printable(' '.join(ctx.args))})")
        return list(ctx.args)


class Group(_OwnHelp, typer.core.TyperGroup):
    """A group of commands of sortd."""


def show(facts: Facts, render: Callable[[Facts], None], *, as_json: bool) -> None:
    """Print facts, a mapping, as one JSON document, or else by ``render``."""
    if as_json:
        typer.echo(readable_json(json_document(facts), encoding=sys.stdout.encoding, indent=2))
    else:
        render(facts)


def json_document(facts: Any) -> dict[str, Any]:  # noqa: ANN401 -- a mapping of any plain values
    """Return the document that a command prints: the command, the version of the shape, and its facts.

    Bytes of names that are not UTF-8 are lone surrogates.
    """
    return {"command": _called["command"], "schema": JSON_VERSION, **json_values(facts)}


def json_values(value: Any, key: str = "") -> Any:  # noqa: ANN401 -- of JSON
    """Return plain values as JSON has them: times in UTC by ISO 8601, and null for a number that is not finite.

    A time is a float, in seconds since the epoch, whose key is ``at`` or ends with ``_at`` or ``_since``.
    """
    match value:
        case Mapping():
            return {name: json_values(one, str(name)) for name, one in value.items()}
        case list() | tuple():
            return [json_values(one) for one in value]
        case float() if not math.isfinite(value):
            return None
        case float() if key == "at" or key.endswith(("_at", "_since")):
            return _utc(value)
    return value


def _utc(seconds: float) -> str | None:
    """Return a time as ``2026-03-01T14:30:00.000Z``; None if it is out of range."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return None


def printable(text: str) -> str:
    """Return a text with control characters and undecodable bytes escaped."""
    try:
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that is no byte, as JSON may contain
        encoded = text.encode("utf-8", "backslashreplace")
    shown = encoded.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def print_line(text: str, *, style: str = "") -> None:
    """Print one line of facts, in colour on a terminal."""
    if not sys.stdout.isatty():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text, style=style), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print rows under a header; columns named by ``right`` are aligned to the right."""
    cells = (["" if cell is None else printable(str(cell)) for cell in row] for row in rows)
    if not sys.stdout.isatty():
        for row in chain((columns,), cells):
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(written_name(cell)) for cell in row))
    Console(highlight=False).print(table)


def time_option(name: str, text: str | None) -> float | None:
    """Return the time of an option in seconds since the epoch; raise BadParameter if it is not valid."""
    try:
        return None if text is None else parse_time(text, datetime.now().astimezone())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from error


def parse_time(text: str, now: datetime) -> float:
    """Return a time in seconds since the epoch; raise ValueError if the text is none.

    Args:
        text: ``2026-03-01``, ``2026-03-01 14:30``, ``14:30``, ``2h``, ``3d``, ``today`` or ``yesterday``, in local time
            unless it has a zone (``2026-03-01T14:30+02:00``).
        now: the present, with its time zone.
    """
    word = text.strip().lower()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if word in {"now", "today", "yesterday"}:
        return {"now": now, "today": midnight, "yesterday": midnight - timedelta(days=1)}[word].timestamp()
    if (age := _AGE.fullmatch(word)) is not None:
        return now.timestamp() - float(age[1]) * _SECONDS[age[2][0]]
    if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", word):
        word = f"{now:%Y-%m-%d}T{word:0>5}"
    try:
        parsed = datetime.fromisoformat(word.upper())
        return (parsed if parsed.tzinfo is not None else parsed.astimezone()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f"{text!r} is not a time: write 2026-03-01, '2026-03-01 14:30', 14:30, 2h, 3d or yesterday"
        ) from error


def format_time(seconds: float) -> str:
    """Return seconds since the epoch as local date and time; the number where it is out of range."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def format_duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = max(0, int(seconds))
    parts: list[str] = []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if whole >= size and len(parts) < 2:  # noqa: PLR2004 -- two units say enough
            parts.append(f"{whole // size} {unit}")
            whole %= size
    return " ".join(parts) or "0 s"


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on a terminal, else nothing; yield a function that sets its text."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status(what) as status:
        yield lambda now: status.update(printable(now))


@contextmanager
def bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on a terminal, else nothing; yield a function of a text, the finished parts and all parts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda now, done, total: shown.update(
            task, description=printable(now), completed=done, total=total or None
        )


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on a terminal, else ``progress_lines``; yield as ``bar``."""
    if sys.stderr.isatty():
        with bar(what) as tell:
            yield tell
    else:
        yield progress_lines()


def progress_lines(*, clock: Callable[[], float] = monotonic) -> Callable[[str, int, int], None]:
    """Return a function, as ``bar`` yields, that prints a line for each new text, and then every ten seconds."""
    last, due = "", 0.0

    def tell(now: str, done: int, total: int) -> None:
        nonlocal last, due
        if now == last and clock() < due:
            return
        last, due = now, clock() + LINE_SECONDS
        say(f"sortd: {printable(now)}: {done:,} of {total:,}" if total else f"sortd: {printable(now)}")

    return tell


def decimals(value: float | None, form: str = ".3f") -> str:
    """Return a number in this format; empty for None."""
    return "" if value is None else f"{value:{form}}"


def counted(number: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def megabytes(size_bytes: float) -> str:
    """Return a size with a unit, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"
