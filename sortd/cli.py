"""The command line: arguments in, exit codes out; facts on stdout, messages on stderr.

Commands are imported when they run, so that `--help`, `check`, `status`, `history` and `undo` never import torch.
"""

import errno
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Iterator
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
    moment_option,
    print_json,
    printable,
    say,
    under_way,
)
from sortd.errors import SortdError
from sortd.files import readable_json

if TYPE_CHECKING:
    from sortd.daemon.resources import LoadEncoder
    from sortd.events import Move
    from sortd.logs import LogFormat

PATIENT_PRODUCTS = ("OPENBLAS_THREAD_TIMEOUT", "20")
"""Binary logarithm of the cycles that threads of OpenBLAS spin after a product (26 if not set). Spinning took 3 ms of
processor time an image, with this 0.1 ms (`benchmarks.efficiency`, two cores)."""

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
        print_dry_run(config, as_json=as_json)
    else:
        work(config, once=True)


def work(path: Path | None, *, once: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Run the daemon; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stopped it.
    """
    os.environ.setdefault(*PATIENT_PRODUCTS)
    from sortd import logs
    from sortd.daemon.daemon import Daemon
    from sortd.daemon.resources import Resources
    from sortd.metrics import Metrics
    from sortd.systemd import Notifier

    logs.configure(said_format())
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
    """Let this process open as many files as it may at all: each dataset takes eight, 1024 is the usual soft limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def print_dry_run(path: Path | None, *, as_json: bool, load_encoder: "LoadEncoder | None" = None) -> None:
    """Say what ``once`` would do; ``load_encoder`` stands in for the configured model.

    Raises:
        SortdError: what stopped it.
    """
    from sortd import logs
    from sortd.daemon import dry_run
    from sortd.daemon.dataset_log import decision_facts

    logs.configure(said_format())
    config = load_config(path)
    logs.configure(config.log.format, "warning")
    told = 0

    def tell(dataset: str, move: "Move", destination: str) -> None:
        nonlocal told
        told += 1
        why = decision_facts(move)
        if as_json:
            place = {"dataset": dataset, "path": move.path, "destination": destination, "outcome": move.outcome.value}
            typer.echo(readable_json({**place, **why}, encoding=sys.stdout.encoding))
            return
        shown = [f"{key}={why[key]}" for key in ("score", "margin", "second_label", "reason") if why.get(key)]
        typer.echo(f"{printable(move.path)} -> {printable(destination)}  {' '.join(shown)}")

    if sys.stderr.isatty() and not logs.is_json():
        say("sortd: loading the model, then deciding what waits; nothing is moved")
    dry_run.rehearse(config, tell, load_encoder=load_encoder)
    if not logs.is_json():
        say(f"sortd: {counted(told, 'image')} would be moved; nothing was touched")


def said_format() -> "LogFormat":
    """Return the form of the log while the configuration is read, whose refusal is logged too."""
    named = os.environ.get("SORTD_LOG__FORMAT")
    return "console" if named == "console" else "json" if named == "json" else "auto"


@app.command(cls=Command)
def init(
    directory: Annotated[Path, typer.Argument(help="The dataset's folder; it and what it lacks is made.")],
    classes: Annotated[list[str] | None, typer.Option("--class", help="Make this class's folder; repeatable.")] = None,
) -> None:
    """Make the folders of a dataset, and its marker."""
    from sortd.classify.prompts import written_name
    from sortd.errors import LayoutError
    from sortd.layout import Area, Layout, enclosing_dataset
    from sortd.references import is_class_name

    for name in classes or ():
        if "/" in name or not is_class_name(name) or written_name(name) != name:
            why = (
                "a class's name is a folder's: not empty, not hidden, without /, control characters and needless blanks"
            )
            raise typer.BadParameter(f"{name!r} cannot be a class: {why}", param_hint="--class")
    layout = Layout(directory.absolute())
    real, around = Path(os.path.realpath(layout.root)), enclosing_dataset(layout.root)
    if real.name.startswith(".") or real == real.parent:
        raise LayoutError(
            f"{layout.root} cannot be a dataset: sortd looks at folders below its root that are not hidden"
        )
    if around is not None:
        beside = around.parent / layout.name
        raise LayoutError(f"{layout.root} lies inside the dataset {around}, where no sortd would see it; make {beside}")
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.make()
        for name in classes or ():
            (layout.area(Area.CLASES) / name).mkdir(exist_ok=True)
    except FileExistsError as error:
        raise LayoutError(f"{error.filename} is there but is no folder; move it away, or name another") from error
    except OSError as error:
        mend = "mend its rights or room, or name another"
        raise LayoutError(f"{error.filename} cannot be made: {error.strerror}; {mend}") from error
    root = printable(os.fspath(layout.root))
    typer.echo(f"{root} is a dataset. Teach it: put images into {root}/{Area.CLASES}/<class>/")
    typer.echo(f"Then drop images into {root}/{Area.IMAGES}/ and run")
    for line in how_to_run(real.parent):
        typer.echo(line)


def how_to_run(root: Path) -> Iterator[str]:
    """Yield the command, indented, that runs sortd on the datasets below ``root``, and what makes it shorter."""
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
    name = "config.yaml (config.example.yaml has every key)" if file is None else printable(os.path.abspath(file))
    yield f"    SORTD_ROOT={shlex.quote(os.fspath(root))} {command}"
    yield f"With `root: {printable(os.fspath(root))}` in {name} no command needs SORTD_ROOT."
    if mistakes:
        yield f"That configuration is to be corrected first: {printable(mistakes)}"


def this_program() -> str:
    """Return how sortd was called, so that the command that is shown calls the same one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m sortd"
    found = shutil.which("sortd")
    is_usual = called.name != "sortd" or (found is not None and os.path.realpath(found) == os.path.realpath(called))
    return "sortd" if is_usual else shlex.quote(os.path.abspath(called))


def check(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Decode every reference; may take long.")] = False,
) -> None:
    """Look at configuration, folders, rights, disks, references and model, and say what to mend."""
    from sortd.commands.facts import show_check

    raise typer.Exit(show_check(config, as_json=as_json, thorough=thorough))


def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Tell whether sortd runs (exit code 75: none does), with which model, what waits, and how often it was right."""
    from sortd.commands.facts import show_status

    raise typer.Exit(show_status(config, as_json=as_json))


def history(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    label: Annotated[str | None, typer.Option("--label", help="Only this class.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only filed, sent_to_review, rejected or undone.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Only this run of sortd.")] = None,
    path: Annotated[Path | None, typer.Option("--path", help="Only this file: where it was or went.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show the newest N moves (0: all).")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Tell what was moved where and why, newest first."""
    from sortd.commands.facts import show_history

    if outcome not in {None, "filed", "sent_to_review", "rejected", "undone"}:
        raise typer.BadParameter("must be filed, sent_to_review, rejected or undone", param_hint="--outcome")
    begin, end = moment_option("--since", since), moment_option("--until", until)
    chosen = {"label": label, "outcome": outcome, "run": run, "since": begin, "until": end}
    show_history(config, dataset=dataset, file=path, limit=limit, as_json=as_json, **chosen)


def undo(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    path: Annotated[Path | None, typer.Argument(help="Where sortd put a file, or where it came from.")] = None,
    config: ConfigOption = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="The newest N moves.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="All of one run; `sortd history` names the runs.")] = None,
    dataset: DatasetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and touch nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put images back to where they were, and hold them there until they change or are released."""
    from sortd.commands.moves import undo_moves

    ways = [path is not None, last is not None, since is not None or until is not None, run is not None]
    if sum(ways) == 0:
        raise typer.BadParameter("say what: a PATH, --last N, --since or --until, or --run")
    if sum(ways) > 1 and (path is not None or last is not None):
        raise typer.BadParameter("a PATH and --last stand alone; --since, --until and --run go together")
    times = {"since": moment_option("--since", since), "until": moment_option("--until", until)}
    code = undo_moves(config, path, last=last, dataset=dataset, dry_run=dry_run, as_json=as_json, run=run, **times)
    raise typer.Exit(code)


def release(
    path: Annotated[Path | None, typer.Argument(help="A held file, or the folder of a held dataset.")] = None,
    config: ConfigOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every held file and every held dataset.")] = False,
    dataset: DatasetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let files that an undo holds, and datasets that the guard holds, be decided and moved again."""
    from sortd.commands.moves import release_files

    if (path is None) != everything:
        raise typer.BadParameter("say which: a PATH, or --all")
    release_files(config, path, dataset=dataset, as_json=as_json)


def rebuild(
    dataset: Annotated[str | None, typer.Argument(help="Only this dataset.")] = None,
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Use the new prototypes even if they look worse.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let the sortd that runs learn its classes anew."""
    from sortd.commands.moves import ask_to_rebuild

    ask_to_rebuild(config, dataset, force=force, as_json=as_json)


def bench(
    folder: Annotated[Path | None, typer.Argument(help="Whose images serve; without it those of the datasets.")] = None,
    config: ConfigOption = None,
    images: Annotated[int, typer.Option(min=4, max=10_000, help="How many images, at most.")] = 96,
    as_json: JsonOption = False,
) -> None:
    """Measure images per second and milliseconds by stage on this machine; moves no file, takes under a minute."""
    from sortd.commands.bench import measure, print_measured

    loaded = load_config(config)
    with under_way("measuring") as tell:
        measured = measure(loaded, folder, images=images, tell=tell)
    if as_json:
        print_json(measured)
    else:
        print_measured(measured)


@app.command(cls=Command)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


for command in (check, status, history, undo, release, rebuild, bench, cli_finetuning.finetune):
    app.command(cls=Command)(command)
app.command("explain", cls=Command)(cli_decisions.command_explain)
app.command("eval", cls=Command)(cli_decisions.command_eval)
app.add_typer(cli_models.models)


def run_command_line() -> None:
    """Run the command line; translate errors into a sentence on stderr and an exit code (sysexits(3))."""
    open_missing_streams()
    with ending_by_errors():
        app()


@contextmanager
def ending_by_errors() -> Iterator[None]:
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
            complain_of_fault(error)
            raise
        silence(sys.stdout)
        complain(refusal(error), REFUSED_CODE)
        leave(REFUSED_CODE)
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except Exception as error:
        complain_of_fault(error)
        raise


def complain(message: str, exit_code: int) -> None:
    """Say what ended sortd, in the form that its stderr has."""
    if (logs := json_logs()) is not None:
        logs.say_failed(message, exit_code)
    else:
        print(f"sortd: {message}", file=sys.stderr)


def complain_of_fault(error: Exception) -> None:
    """Log an unexpected error where stderr is JSON, and end there; elsewhere Python prints its traceback."""
    if (logs := json_logs()) is not None:
        logs.say_failed(repr(error), 1, error)
        leave(1)


def json_logs() -> Any:  # noqa: ANN401 -- a module that is imported only where logs are written
    """Return ``sortd.logs`` where it writes JSON on stderr, else None."""
    logs = sys.modules.get("sortd.logs")
    return logs if logs is not None and logs.is_json() else None


def open_missing_streams() -> None:
    """Put /dev/null where standard input, output or error is closed: the next file opened would take its number."""
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
    mend = errors.advice_for_write(error) or "see that its disk has room and is well"
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
