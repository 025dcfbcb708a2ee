"""The command line: facts go to stdout, messages to stderr, and errors become exit codes.

Each command imports its module when it runs, so that `--help`, `check`, `status`, `history` and `undo` never import
torch.
"""

import errno
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sortd import __version__, errors
from sortd.commands import decisions as cli_decisions
from sortd.commands import finetuning as cli_finetuning
from sortd.commands import models as cli_models
from sortd.commands.console import (
    Command,
    ConfigOption,
    DatasetOption,
    Group,
    JsonOption,
    SinceOption,
    UntilOption,
    counted,
    load_config,
    print_json,
    printable,
    say,
    spinner,
    time_option,
)
from sortd.errors import SortdError
from sortd.files import readable_json

if TYPE_CHECKING:
    from sortd.daemon.resources import LoadEncoder
    from sortd.events import Move
    from sortd.logs import LogFormat

OPENBLAS_SPIN = ("OPENBLAS_THREAD_TIMEOUT", "20")
"""Binary logarithm of the cycles that OpenBLAS threads spin after a product (default 26). Spinning took 3 ms of
processor time per image, with this value 0.1 ms (`benchmarks.efficiency`, two cores)."""

REFUSED = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ENXIO,
})  # fmt: skip
"""Errors of disks, permissions and limits: they are reported without a traceback, since they are no defect of sortd."""

REFUSED_CODE = 74
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2

app = typer.Typer(
    name="sortd",
    cls=Group,
    help="Sort the images in a folder into classes that you define by reference images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:  # noqa: FBT001 -- typer passes it
    """Print the version and exit, if ``wanted``."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sort the images in a folder into classes that you define by reference images."""


@app.command(cls=Command)
def run(config: ConfigOption = None) -> None:
    """Watch the datasets and file new images, until stopped."""
    work(config, once=False)


@app.command(cls=Command)
def once(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """File the images that are in Images/ now, then exit."""
    if dry_run:
        print_dry_run(config, as_json=as_json)
    else:
        work(config, once=True)


def work(path: Path | None, *, once: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Run the daemon; ``load_encoder`` replaces the loader of the configured model."""
    os.environ.setdefault(*OPENBLAS_SPIN)
    from sortd import logs
    from sortd.daemon.daemon import Daemon
    from sortd.daemon.resources import Resources
    from sortd.metrics import Metrics
    from sortd.systemd import Notifier

    logs.configure(format_in_environment())
    config = load_config(path)
    logs.configure(config.log.format, config.log.level)
    raise_descriptor_limit()
    Daemon(
        config,
        resources=Resources(config, load_encoder=load_encoder),
        reload=lambda: load_config(path),
        notifier=Notifier(os.environ),
        metrics=Metrics(),
        once=once,
    ).run()


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files, usually 1024, to the hard one: each dataset takes eight."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def print_dry_run(path: Path | None, *, as_json: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Print what ``once`` would do; ``load_encoder`` replaces the loader of the configured model."""
    from sortd import logs
    from sortd.daemon.daemon import simulate
    from sortd.daemon.dataset_log import decision_facts

    logs.configure(format_in_environment())
    config = load_config(path)
    logs.configure(config.log.format, "warning")
    count = 0

    def on_move(dataset: str, move: "Move", destination: str) -> None:
        nonlocal count
        count += 1
        why = decision_facts(move)
        if as_json:
            place = {"dataset": dataset, "path": move.path, "destination": destination, "outcome": move.outcome.value}
            typer.echo(readable_json({**place, **why}, encoding=sys.stdout.encoding))
            return
        shown = [f"{key}={why[key]}" for key in ("score", "margin", "second_label", "reason") if why.get(key)]
        typer.echo(f"{printable(move.path)} -> {printable(destination)}  {' '.join(shown)}")

    if sys.stderr.isatty() and not logs.is_json():
        say("sortd: loading the model, then deciding the images in Images/; nothing is moved")
    raise_descriptor_limit()
    simulate(config, on_move, load_encoder=load_encoder)
    if not logs.is_json():
        say(f"sortd: {counted(count, 'image')} would be moved; nothing was changed")


def format_in_environment() -> "LogFormat":
    """Return the log format to use while the configuration is read, since its errors are logged too."""
    named = os.environ.get("SORTD_LOG__FORMAT")
    return "console" if named == "console" else "json" if named == "json" else "auto"


@app.command(cls=Command)
def init(
    directory: Annotated[Path, typer.Argument(help="Folder of the dataset; missing folders are created.")],
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Create the folder of this class; repeatable.")
    ] = None,
) -> None:
    """Create the folders and the marker of a dataset."""
    from sortd.daemon.references import STRANGERS_FOLDER, class_name_problem
    from sortd.errors import LayoutError
    from sortd.layout import Area, Layout, enclosing_dataset

    for name in classes or ():
        why = None if name == STRANGERS_FOLDER else class_name_problem(name)
        if why is not None:
            raise typer.BadParameter(f"{name!r} cannot be a class: {why}", param_hint="--class")
    layout = Layout(directory.absolute())
    real, around = Path(os.path.realpath(layout.root)), enclosing_dataset(layout.root)
    if real.name.startswith(".") or real == real.parent:
        raise LayoutError(f"{layout.root} cannot be a dataset: a dataset is a folder below `root` that is not hidden")
    if around is not None:
        beside = around.parent / layout.name
        raise LayoutError(f"{layout.root} lies inside the dataset {around}, where sortd ignores it; create {beside}")
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.make()
        for name in classes or ():
            (layout.area(Area.CLASES) / name).mkdir(exist_ok=True)
    except FileExistsError as error:
        raise LayoutError(f"{error.filename} is no folder; move it away, or name another folder") from error
    except OSError as error:
        advice = "correct the permissions, free some space, or name another folder"
        raise LayoutError(f"{error.filename} cannot be created: {error.strerror}; {advice}") from error
    root = printable(os.fspath(layout.root))
    typer.echo(f"{root} is a dataset. Put reference images into {root}/{Area.CLASES}/<class>/")
    typer.echo(f"Then put the images to sort into {root}/{Area.IMAGES}/ and run")
    for line in how_to_run(real.parent):
        typer.echo(line)


def how_to_run(root: Path) -> Iterator[str]:
    """Yield the command, indented, that runs sortd on the datasets below ``root``, and how to shorten it."""
    from sortd.config import find_config_file, read_config
    from sortd.errors import ConfigError

    file, command, mistakes = find_config_file(os.environ), f"{this_program()} run", ""
    if file is not None:
        command += f" -c {shlex.quote(os.path.abspath(file))}"
        try:
            if os.path.realpath(read_config(file, os.environ).root) == os.fspath(root):
                yield f"    {command}"
                return
        except ConfigError as error:
            mistakes = str(error)
    name = "config.yaml (config.example.yaml lists all keys)" if file is None else printable(os.path.abspath(file))
    yield f"    SORTD_ROOT={shlex.quote(os.fspath(root))} {command}"
    yield f"With `root: {printable(os.fspath(root))}` in {name}, SORTD_ROOT is not needed."
    if mistakes:
        yield f"First correct that configuration: {printable(mistakes)}"


def this_program() -> str:
    """Return the shell word or words that call the program that runs now."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m sortd"
    found = shutil.which("sortd")
    is_usual = called.name != "sortd" or (found is not None and os.path.realpath(found) == os.path.realpath(called))
    return "sortd" if is_usual else shlex.quote(os.path.abspath(called))


def check(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Decode every reference image, which may take long.")
    ] = False,
) -> None:
    """Check the configuration, folders, permissions, disks, references and model, and print what to correct."""
    from sortd.commands.facts import show_check

    raise typer.Exit(show_check(config, as_json=as_json, thorough=thorough))


def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show whether sortd runs (exit code 75 if not), its model, the images that wait, and the accuracy by class."""
    from sortd.commands.facts import show_status

    raise typer.Exit(show_status(config, as_json=as_json))


def history(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    label: Annotated[str | None, typer.Option("--label", help="Show only moves of this class.")] = None,
    outcome: Annotated[
        str | None, typer.Option(help="Show only filed, sent_to_review, rejected, assigned or undone.")
    ] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Show only moves of this run of sortd.")] = None,
    path: Annotated[Path | None, typer.Option("--path", help="Show only moves from or to this path.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show the newest N moves (0: all).")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show the moves with their reasons, newest first."""
    from sortd.commands.facts import show_history

    if outcome not in {None, "filed", "sent_to_review", "rejected", "assigned", "undone"}:
        raise typer.BadParameter("must be filed, sent_to_review, rejected, assigned or undone", param_hint="--outcome")
    begin, end = time_option("--since", since), time_option("--until", until)
    chosen = {"label": label, "outcome": outcome, "run": run, "since": begin, "until": end}
    show_history(config, dataset=dataset, file=path, limit=limit, as_json=as_json, **chosen)


def undo(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    path: Annotated[Path | None, typer.Argument(help="Undo the last move from or to this path.")] = None,
    config: ConfigOption = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Undo the newest N moves.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Undo the moves of this run (see `sortd history`).")] = None,
    dataset: DatasetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move images back to where they were, and hold them there until they change or are released."""
    from sortd.commands.moves import undo_moves

    ways = [path is not None, last is not None, since is not None or until is not None, run is not None]
    if sum(ways) == 0:
        raise typer.BadParameter("give a PATH, --last N, --since, --until or --run")
    if sum(ways) > 1 and (path is not None or last is not None):
        raise typer.BadParameter("only --since, --until and --run can be combined")
    times = {"since": time_option("--since", since), "until": time_option("--until", until)}
    code = undo_moves(config, path, last=last, dataset=dataset, dry_run=dry_run, as_json=as_json, run=run, **times)
    raise typer.Exit(code)


def release(
    path: Annotated[
        Path | None, typer.Argument(help="Release this held file, or the dataset with this folder.")
    ] = None,
    config: ConfigOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Release all held files and datasets.")] = False,
    dataset: DatasetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Release files that are held after an undo, and datasets that the guard holds."""
    from sortd.commands.moves import release_files

    if (path is None) != everything:
        raise typer.BadParameter("give either a PATH or --all")
    release_files(config, path, dataset=dataset, as_json=as_json)


def rebuild(
    dataset: Annotated[str | None, typer.Argument(help="Rebuild only this dataset. Default: all.")] = None,
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Use the new prototypes even if they look worse.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the running sortd build its prototypes from the references again."""
    from sortd.commands.moves import ask_to_rebuild

    ask_to_rebuild(config, dataset, force=force, as_json=as_json)


def bench(
    folder: Annotated[Path | None, typer.Argument(help="Folder of test images. Default: the datasets.")] = None,
    config: ConfigOption = None,
    images: Annotated[int, typer.Option(min=4, max=10_000, help="Largest number of images.")] = 96,
    as_json: JsonOption = False,
) -> None:
    """Measure images per second and milliseconds per stage on this machine; takes under a minute, moves no file."""
    from sortd.commands.bench import measure, print_measured

    loaded = load_config(config)
    with spinner("measuring") as tell:
        measured = measure(loaded, folder, images=images, tell=tell)
    if as_json:
        print_json(measured)
    else:
        print_measured(measured)


@app.command(cls=Command)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


COMMANDS: dict[str, Callable[..., None]] = {
    "check": check,
    "status": status,
    "explain": cli_decisions.explain_command,
    "history": history,
    "undo": undo,
    "release": release,
    "rebuild": rebuild,
    "bench": bench,
    "eval": cli_decisions.evaluate_command,
    "groups": cli_decisions.groups_command,
    "finetune": cli_finetuning.finetune,
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(cli_models.models)


def main() -> None:
    """Run the command line; errors become a message on stderr and an exit code (sysexits(3))."""
    open_missing_streams()
    with exit_on_error():
        app()


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit on an error of the block, after a message on stderr, or a log line if stderr is JSON."""
    try:
        yield
    except SortdError as error:
        report_error(str(error), error.exit_code)
        leave(error.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        leave(0)
    except OSError as error:
        if error.errno not in REFUSED:
            report_error(repr(error), 1, error)
            raise
        silence(sys.stdout)
        report_error(refusal(error), REFUSED_CODE)
        leave(REFUSED_CODE)
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except Exception as error:
        report_error(repr(error), 1, error)
        raise


def report_error(message: str, exit_code: int, defect: Exception | None = None) -> None:
    """Write the error that ends sortd to stderr, in the format of the log.

    With an unexpected error, ``defect``, exit if that is JSON; else return, and Python prints the traceback.
    """
    logs: Any = sys.modules.get("sortd.logs")  # imported only by commands that write a log
    if logs is not None and logs.is_json():
        logs.say_failed(message, exit_code, defect)
        if defect is not None:
            leave(exit_code)
    elif defect is None:
        print(f"sortd: {message}", file=sys.stderr)


def open_missing_streams() -> None:
    """Open /dev/null for each closed standard stream: the next opened file would get its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(STANDARD_OUTPUT, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end
    sys.stderr = sys.stderr or open(STANDARD_ERROR, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- to the end


def silence(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to /dev/null, so that its last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refusal(error: OSError) -> str:
    """Return a message with the path, the error, and what to do."""
    if error.filename is None:
        return f"the output cannot be written: {error.strerror}; check that there is space for it"
    advice = errors.advice_for_write(error) or "check its disk and the space on it"
    if isinstance(error, PermissionError):
        advice = "correct its permissions, or run the command as the user that runs sortd"
    return f"{printable(os.fsdecode(error.filename))}: {error.strerror}; {advice}"


def leave(code: int) -> None:
    """Exit; with torch loaded, without its teardown, which can take longer than a stop timeout."""
    if "torch" not in sys.modules:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
