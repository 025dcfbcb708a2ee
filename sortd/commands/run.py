"""The commands ``init``, ``run`` and ``once``: create a dataset, and file its images."""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress

import typer

from sortd import logs
from sortd.commands.console import counted, printable, say
from sortd.config import Config
from sortd.daemon.daemon import Daemon, simulate
from sortd.daemon.reporting import Metrics, decision_facts
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder.models import check_modes, locate_clip
from sortd.errors import ModelError
from sortd.events import LIKE_NO_CLASS, Move
from sortd.files import readable_json
from sortd.logs import LogFormat
from sortd.service import Notifier


def run_daemon(configured: Callable[[], Config], *, once: bool, load_encoder: LoadEncoder | None = None) -> None:
    """Run the daemon; ``configured`` reads the configuration, now and for each reload.

    ``load_encoder`` replaces the loader of the configured model.
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
        metrics=Metrics(),
        once=once,
    ).run()


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
