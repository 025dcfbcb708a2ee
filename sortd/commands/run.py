"""The commands ``init``, ``run`` and ``once``: create a dataset, and file its images."""

import os
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import typer

from sortd import logs
from sortd.classify.prompts import written_name
from sortd.commands.console import counted, printable, say
from sortd.config import Config, find_config_file, read_config
from sortd.daemon.daemon import Daemon, simulate
from sortd.daemon.metrics import Metrics
from sortd.daemon.references import is_class_name
from sortd.daemon.reporting import decision_facts
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder.models import check_modes, locate_clip
from sortd.errors import ConfigError, LayoutError, ModelError
from sortd.events import LIKE_NO_CLASS, Move
from sortd.files import readable_json
from sortd.layout import Area, Layout, enclosing_dataset
from sortd.logs import LogFormat
from sortd.service import Notifier


def run_daemon(
    configured: Callable[[], Config],
    *,
    once: bool,
    file: Path | None = None,
    load_encoder: LoadEncoder | None = None,
) -> None:
    """Run the daemon; ``configured`` reads the configuration, now and for each reload.

    ``file`` is the configuration file if one was named; ``load_encoder`` replaces the loader of the configured model.
    """
    logs.configure(format_in_environment())
    config = configured()
    logs.configure(config.log.format, config.log.level)
    raise_descriptor_limit()
    Daemon(
        config,
        resources=Resources(config, load_encoder=load_encoder),
        reload=lambda: _reloaded(configured),
        notifier=Notifier(os.environ),
        metrics=Metrics(is_on=config.metrics.is_on),
        once=once,
        groups_command=_groups_command(file),
    ).run()


def _groups_command(file: Path | None) -> list[str]:
    """Return the command that prints the groups in Review/ as JSON, with the same program and configuration file."""
    found = shutil.which(sys.argv[0]) if Path(sys.argv[0]).name == "sortd" else None
    program = [sys.executable, "-m", "sortd"] if found is None else [os.path.abspath(found)]
    return [*program, "groups", "--json", *([] if file is None else ["-c", os.path.abspath(file)])]


def _reloaded(configured: Callable[[], Config]) -> Config:
    """Read the configuration again; raises ConfigError, also for a mode that the model does not support."""
    config = configured()
    with suppress(ModelError):  # the model in use stays until a restart
        if config.encoder_socket is None:
            check_modes(config, locate_clip(config.model, cache_dir=config.cache_dir))
    return config


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files, usually 1024, to the hard one: each dataset takes eight."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def show_dry_run(configured: Callable[[], Config], *, as_json: bool, load_encoder: LoadEncoder | None = None) -> None:
    """Print what ``once`` would do; ``configured`` reads the configuration, ``load_encoder`` replaces its model."""
    logs.configure(format_in_environment())
    config = configured()
    logs.configure(config.log.format, "warning")
    count = 0

    def on_move(dataset: str, move: Move, destination: str) -> None:
        nonlocal count
        count += 1
        why = decision_facts(move)
        if as_json:
            place = {"dataset": dataset, "path": move.path, "destination": destination, "outcome": move.outcome.value}
            typer.echo(readable_json({**place, **why}, encoding=sys.stdout.encoding))
            return
        guess = ("label",) if why.get("reason") in LIKE_NO_CLASS else ()
        shown = [f"{key}={why[key]}" for key in (*guess, "score", "margin", "second_label", "reason") if why.get(key)]
        typer.echo(f"{printable(move.path)} -> {printable(destination)}  {' '.join(shown)}")

    if sys.stderr.isatty() and not logs.is_json():
        say("sortd: loading the model, then deciding the images in Images/; nothing is moved")
    raise_descriptor_limit()
    simulate(config, on_move, load_encoder=load_encoder)
    if not logs.is_json():
        say(f"sortd: {counted(count, 'image')} would be moved; nothing was changed")


def format_in_environment() -> LogFormat:
    """Return the log format to use while the configuration is read, since its errors are logged too."""
    named = os.environ.get("SORTD_LOG__FORMAT")
    return "console" if named == "console" else "json" if named == "json" else "auto"


def make_dataset_folders(directory: Path, classes: Sequence[str]) -> None:
    """Create the folders and the marker of a dataset, and print how to run sortd on it.

    Raises:
        BadParameter: a class cannot have that name.
        LayoutError: the folder cannot be a dataset, or cannot be created.
    """
    for name in classes:
        if "/" in name or not is_class_name(name) or written_name(name) != name:
            why = "it must be a visible folder name without /, control characters, and blanks at an end or in a row"
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
        for name in classes:
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
