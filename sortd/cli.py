"""The command line: arguments in, exit codes out; facts on stdout, messages on stderr.

The one place with lazy imports, so that `--help`, `check`, `status`, `history` and `undo` never import torch.
"""

import errno
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sortd import __version__, mends
from sortd.commands import bench as cli_bench
from sortd.commands import decisions as cli_decisions
from sortd.commands import facts as cli_facts
from sortd.commands import finetuning as cli_finetuning
from sortd.commands import models as cli_models
from sortd.commands import moves as cli_moves
from sortd.commands.console import Command, ConfigOption, Group, JsonOption, counted, load_config, printable, say
from sortd.console_line import readable_json
from sortd.errors import SortdError

if TYPE_CHECKING:
    from sortd.logs import Format
    from sortd.messages import Move
    from sortd.running.site import LoadEncoder

PATIENT_PRODUCTS = ("OPENBLAS_THREAD_TIMEOUT", "20")
"""Read by the OpenBLAS in numpy when it is loaded: the binary logarithm of the clock cycles that its threads spin for
after each product (26 if not set). A decision is one small product a batch, and the threads that spun for the next one
burned 3 ms of processor time an image beside the forward; with this 0.1 ms (`benchmarks.efficiency`, two cores)."""

REFUSED = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ENXIO,
})  # fmt: skip
"""What a disk, its owner or a limit refuses: nobody's bug, so a sentence and not a traceback is due."""

REFUSED_CODE = 74
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2

app = typer.Typer(
    name="sortd",
    cls=Group,
    help="Files the images dropped into a folder into the classes that you teach it by example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:  # noqa: FBT001 -- typer hands it over
    """Print the version and end, where that is wanted."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Files the images dropped into a folder into the classes that you teach it by example."""


@app.command(cls=Command)
def run(config: ConfigOption = None) -> None:
    """Watch, and file what arrives, until stopped."""
    work(config, once=False)


@app.command(cls=Command)
def once(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and touch nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """File what is there now, and stop."""
    if dry_run:
        rehearse(config, as_json=as_json)
    else:
        work(config, once=True)


def work(path: Path | None, *, once: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Run the daemon; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stopped it.
    """
    os.environ.setdefault(*PATIENT_PRODUCTS)
    from sortd import logs
    from sortd.daemon import Daemon
    from sortd.metrics import Metrics
    from sortd.running.site import Site
    from sortd.sdnotify import Notifier

    logs.configure(said_format())
    config = load_config(path)
    logs.configure(config.log.format, config.log.level)
    raise_descriptor_limit()
    Daemon(
        config,
        site=Site(config, load_encoder=load_encoder),
        reload=lambda: load_config(path),
        notifier=Notifier(os.environ),
        metrics=Metrics(),
        once=once,
    ).run()


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may at all: each dataset takes eight, 1024 is the usual soft limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def rehearse(path: Path | None, *, as_json: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Say what would happen; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stopped it.
    """
    from sortd import logs
    from sortd.running import rehearsal

    logs.configure(said_format())
    config = load_config(path)
    logs.configure(config.log.format, "warning")

    told = 0

    def tell(dataset: str, move: "Move", destination: str) -> None:
        nonlocal told
        from sortd.running.account import decision_facts

        told += 1
        facts: Mapping[str, Any] = {"dataset": dataset, "path": move.path, "destination": destination}
        if as_json:
            line = {**facts, "outcome": move.outcome.value, **decision_facts(move)}
            typer.echo(readable_json(line, encoding=sys.stdout.encoding))
        else:
            why = decision_facts(move)
            shown = " ".join(
                f"{key}={why[key]}" for key in ("score", "margin", "second_label", "reason") if why.get(key)
            )
            typer.echo(f"{printable(move.path)} -> {printable(destination)}  {shown}")

    if sys.stderr.isatty() and not logs.is_json():
        say("sortd: loading the model, then deciding what waits; nothing is moved")
    rehearsal.rehearse(config, tell, load_encoder=load_encoder)
    if not logs.is_json():
        say(f"sortd: {counted(told, 'image')} would be moved; nothing was touched")


def said_format() -> "Format":
    """Return the form of the log as far as it is known before the configuration is read: what refuses that is logged.

    A configuration that cannot be read does not say; its variable may, and a stream that is no terminal has JSON.
    """
    named = os.environ.get("SORTD_LOG__FORMAT")
    return "console" if named == "console" else "json" if named == "json" else "auto"


@app.command(cls=Command)
def init(
    directory: Annotated[Path, typer.Argument(help="The dataset's folder; it and what it lacks is made.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Make a folder for this class; repeatable.")
    ] = None,
) -> None:
    """Make the folders of a dataset, and its marker."""
    from sortd.classify.prompts import written_name
    from sortd.errors import LayoutError
    from sortd.layout import Area, Layout
    from sortd.references import is_class_name

    for name in classes or ():
        if "/" in name or not is_class_name(name) or written_name(name) != name:
            why = (
                "a class's name is a folder's: not empty, not hidden, without /, control characters and needless blanks"
            )
            raise typer.BadParameter(f"{name!r} cannot be a class: {why}", param_hint="--class")
    layout = Layout(directory.absolute())
    see_that_it_is_found(layout.root)
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise LayoutError(f"{layout.root} is there but is no folder; move it away, or name another") from error
    except OSError as error:
        raise LayoutError(f"{layout.root} cannot be made: {error.strerror}; mend its rights or name another") from error
    layout.make()
    for name in classes or ():
        folder = layout.area(Area.CLASES) / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise LayoutError(f"{folder} cannot be made: {error.strerror}; mend its rights or room") from error
    root = printable(os.fspath(layout.root))
    typer.echo(f"{root} is a dataset. Teach it: put images into {root}/{Area.CLASES}/<class>/")
    typer.echo(f"Then drop images into {root}/{Area.IMAGES}/ and run")
    for line in how_to_run(Path(os.path.realpath(layout.root)).parent):
        typer.echo(line)


def see_that_it_is_found(dataset: Path) -> None:
    """Refuse a folder in which no sortd would see a dataset.

    Raises:
        LayoutError: it is hidden, or lies inside another dataset.
    """
    from sortd.errors import LayoutError
    from sortd.layout import enclosing_dataset

    real, around = Path(os.path.realpath(dataset)), enclosing_dataset(dataset)
    if real.name.startswith(".") or real == real.parent:
        raise LayoutError(f"{dataset} cannot be a dataset: sortd looks at folders below its root that are not hidden")
    if around is not None:
        beside = around.parent / dataset.name
        raise LayoutError(f"{dataset} lies inside the dataset {around}, where no sortd would see it; make {beside}")


def how_to_run(root: Path) -> Iterator[str]:
    """Yield the command, indented, that runs sortd on the datasets below ``root``, and what makes it shorter."""
    from sortd.config import find, load
    from sortd.errors import ConfigError

    file, command, mistakes = find(os.environ), f"{this_program()} run", ""
    name = "config.yaml (config.example.yaml has every key)" if file is None else printable(os.path.abspath(file))
    named = "" if file is None else f" -c {shlex.quote(os.path.abspath(file))}"
    try:
        is_known = file is not None and os.path.realpath(load(file, os.environ).root) == os.fspath(root)
    except ConfigError as error:
        is_known, mistakes = False, str(error)
    if is_known:
        yield f"    {command}{named}"
        return
    yield f"    SORTD_ROOT={shlex.quote(os.fspath(root))} {command}{named}"
    yield f"With `root: {printable(os.fspath(root))}` in {name} no command needs SORTD_ROOT."
    if mistakes:
        yield f"That configuration is to be corrected first: {printable(mistakes)}"


def this_program() -> str:
    """Return how sortd was called, so that whoever copies it calls the same one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m sortd"
    found = shutil.which("sortd")
    is_usual = called.name != "sortd" or (found is not None and os.path.realpath(found) == os.path.realpath(called))
    return "sortd" if is_usual else shlex.quote(os.path.abspath(called))


@app.command(cls=Command)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


COMMANDS: dict[str, Callable[..., None]] = {
    "check": cli_facts.check,
    "status": cli_facts.status,
    "explain": cli_decisions.explain_command,
    "history": cli_facts.history,
    "undo": cli_moves.undo,
    "release": cli_moves.release,
    "rebuild": cli_moves.rebuild,
    "bench": cli_bench.bench,
    "eval": cli_decisions.evaluate_command,
    "finetune": cli_finetuning.finetune,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(cli_models.models)


def main() -> None:
    """Run the command line; translate errors into a sentence on stderr and an exit code (sysexits(3))."""
    open_missing_streams()
    with translated():
        app()


@contextmanager
def translated() -> Iterator[None]:
    """Let what ends a command end the process: a sentence on stderr, or a line of the log where that is JSON."""
    try:
        yield
    except SortdError as error:
        complain(str(error), error.exit_code)
        leave(error.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        leave(0)
    except OSError as error:
        if error.errno not in REFUSED:
            complain_of_a_fault(error)
            raise
        silence(sys.stdout)
        complain(refusal(error), REFUSED_CODE)
        leave(REFUSED_CODE)
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except Exception as error:
        complain_of_a_fault(error)
        raise


def complain(message: str, exit_code: int) -> None:
    """Say what ended sortd, in the form that its stderr has."""
    logs = sys.modules.get("sortd.logs")
    if logs is not None and logs.is_json():
        logs.say_failed(message, exit_code)
    else:
        print(f"sortd: {message}", file=sys.stderr)


def complain_of_a_fault(error: Exception) -> None:
    """Log an error that nobody expected where stderr is JSON, and end there; else Python's own traceback is due."""
    logs = sys.modules.get("sortd.logs")
    if logs is not None and logs.is_json():
        logs.say_failed(repr(error), 1, error)
        leave(1)


def open_missing_streams() -> None:
    """Put /dev/null where standard input, output or error is closed.

    The next file opened, the journal say, would take its number, and whatever is printed be written into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(STANDARD_OUTPUT, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end
    sys.stderr = sys.stderr or open(STANDARD_ERROR, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end


def silence(stream: TextIO) -> None:
    """Let what is still to be flushed to a stream that takes nothing go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refusal(error: OSError) -> str:
    """Say what was refused, to which path, and what to do."""
    if error.filename is None:
        return f"what was to be written was refused: {error.strerror}; see that there is room where it goes"
    mend = mends.to_write(error) or "see that its disk has room and is well"
    if isinstance(error, PermissionError):
        mend = "mend its rights, or ask as the user that sortd runs as"
    return f"{printable(os.fsdecode(error.filename))}: {error.strerror}; {mend}"


def leave(code: int) -> None:
    """End the process at once: all is closed by now, and taking torch apart politely can outlast a stop timeout."""
    if "torch" not in sys.modules:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
