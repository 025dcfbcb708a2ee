"""The commands ``run`` and ``once``: file the images, with the log as output or a summary."""

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import typer

from sortd import logs
from sortd.commands.console import json_document, print_line, print_table, printable, progress, say, show
from sortd.config import Config
from sortd.daemon.daemon import Daemon, Progress
from sortd.daemon.dataset_lock import ReportMove
from sortd.daemon.metrics import Metrics
from sortd.daemon.reporting import Decisions, decision_facts
from sortd.daemon.resources import LoadEncoder, Resources
from sortd.encoder.models import check_modes, locate_clip
from sortd.errors import ModelError
from sortd.events import Move, Outcome
from sortd.files import readable_json
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
    _daemon(config, configured, once=once, load_encoder=load_encoder, file=file).run()


def _daemon(
    config: Config,
    configured: Callable[[], Config],
    *,
    once: bool,
    load_encoder: LoadEncoder | None,
    file: Path | None = None,
) -> Daemon:
    raise_descriptor_limit()
    return Daemon(
        config,
        resources=Resources(config, load_encoder=load_encoder),
        reload=lambda: _reloaded(configured),
        notifier=Notifier(os.environ),
        metrics=Metrics(is_on=config.metrics.is_on),
        once=once,
        groups_command=_groups_command(file),
    )


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


def format_in_environment() -> LogFormat:
    """Return the log format to use while the configuration is read, since its errors are logged too."""
    named = os.environ.get("SORTD_LOG__FORMAT")
    return "console" if named == "console" else "json" if named == "json" else "auto"


def file_once(
    configured: Callable[[], Config], *, verbose: bool, as_json: bool = False, load_encoder: LoadEncoder | None = None
) -> None:
    """File what is in Images/ now, and print a summary, unless the log is JSON: then its lines have all facts.

    ``configured`` and ``load_encoder`` as for ``run_daemon``; with ``verbose``, the log has its line for each image.
    """
    logs.configure(format_in_environment())
    config = configured()
    logs.configure(config.log.format, config.log.level)
    daemon = _daemon(config, configured, once=True, load_encoder=load_encoder)
    if logs.is_json():
        try:
            daemon.run()
        finally:
            if as_json:
                show({"datasets": summary_facts(daemon.decisions())}, _print_done, as_json=True)
        return
    try:
        with progress("starting") as tell:
            is_brief = not verbose and config.log.level == "info"
            without = {logs.IMAGE_REJECTED} if is_brief else ()
            # Again: on a terminal, stderr is now one that keeps lines and the bar apart.
            logs.configure("console", "warning" if is_brief else config.log.level, without=without)
            daemon.run(progress=tell)
    finally:
        show({"datasets": summary_facts(daemon.decisions())}, _print_done, as_json=as_json)


def show_dry_run(
    configured: Callable[[], Config],
    *,
    as_json: bool = False,
    verbose: bool = False,
    load_encoder: LoadEncoder | None = None,
) -> None:
    """Print a summary of what ``once`` would do; with ``verbose`` or ``as_json``, also each move.

    ``configured`` and ``load_encoder`` as for ``run_daemon``.
    """
    logs.configure(format_in_environment())
    config = configured()
    rows: list[tuple[object, ...]] = []

    def on_move(dataset: str, move: Move, destination: str) -> None:
        why = decision_facts(move)
        if as_json:
            place = {"dataset": dataset, "path": move.path, "destination": destination, "outcome": move.outcome.value}
            typer.echo(readable_json(json_document({**place, **why}), encoding=sys.stdout.encoding))
        elif verbose:
            source, target = (os.path.relpath(path, config.root) for path in (move.path, destination))
            folder, name = os.path.split(target)
            target = f"{folder}/" if name == os.path.basename(source) else target
            reason = logs.SHORT_REASONS.get(str(why["reason"]), why["reason"]) if why.get("reason") else ""
            rows.append((source, target, why.get("label"), why.get("score"), why.get("second_label"), reason))

    raise_descriptor_limit()
    # Its messages are for a person, also in a file, unless JSON was asked for.
    chosen: LogFormat = "console" if config.log.format == "auto" else config.log.format
    with nullcontext() if chosen == "json" else progress("starting") as tell:
        logs.configure(chosen, "warning", without={logs.IMAGE_REJECTED})
        decisions = simulate(config, on_move, load_encoder=load_encoder, progress=tell)
    if not as_json:
        if rows:
            print_table(("image", "destination", "best class", "score", "second class", "reason"), rows)
        show({"datasets": summary_facts(decisions)}, _print_planned, as_json=False)


REASONS = {
    "no_classes": "without classes to compare with",
    "name_only": "of classes without images",
    "too_few": "of classes with too few references",
    "stranger": "like images of no class",
    "typicality": "unlike the references",
    "margin": "between two classes",
}
"""Texts after a number of images for the reasons to send them to Review/."""


def summary_facts(decisions: Mapping[str, Decisions]) -> dict[str, dict[str, Any]]:
    """Return for each dataset how many images were filed, by class, sent to Review/, by reason, and rejected."""

    def numbers(counts: Decisions, outcome: Outcome) -> dict[str, int]:
        return {key: number for (what, key), number in counts.most_common() if what is outcome}

    return {
        name: {
            "filed": numbers(counts, Outcome.FILED),
            "review": numbers(counts, Outcome.REVIEW),
            "rejected": sum(numbers(counts, Outcome.REJECTED).values()),
        }
        for name, counts in decisions.items()
    }


def _print_done(facts: Mapping[str, Any]) -> None:
    _print_summary(facts["datasets"], filed="filed", sent="sent to Review", rejected="rejected")


def _print_planned(facts: Mapping[str, Any]) -> None:
    _print_summary(facts["datasets"], filed="would be filed", sent="would go to Review", rejected="would be rejected")
    say("sortd: nothing was changed")


def _print_summary(facts: Mapping[str, dict[str, Any]], *, filed: str, sent: str, rejected: str) -> None:
    for name, numbers in facts.items():
        moved, waits = sum(numbers["filed"].values()), sum(numbers["review"].values())
        reasons = ", ".join(f"{number:,} {REASONS.get(reason, reason)}" for reason, number in numbers["review"].items())
        parts = [f"{moved:,} {filed}", f"{waits:,} {sent}" + (f": {reasons}" if reasons else "")]
        refused = f"; {numbers['rejected']:,} {rejected}" if numbers["rejected"] else ""
        print_line(f"{printable(name)}: {', '.join(parts)}{refused}", style="bold")
    rows = [(name, label, number) for name, one in facts.items() for label, number in one["filed"].items()]
    if rows:
        print_table(("dataset", "class", filed), rows, right=(filed,))


def simulate(
    config: Config, report: ReportMove, *, load_encoder: LoadEncoder | None = None, progress: Progress | None = None
) -> dict[str, Decisions]:
    """Decide every waiting image and report where it would go; nothing below the root or the state folder is written.

    Returns what ``Daemon.decisions`` returns.

    Embeddings go to a temporary cache, and each dataset works with a copy of its journal.

    Raises:
        LayoutError: There is no dataset, or nothing may move in one.
        ModelError: The model cannot be loaded.
        JournalError: A journal cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="sortd-", ignore_cleanup_errors=True) as folder:
        resources = Resources(config, load_encoder=load_encoder, scratch=Path(folder))
        daemon = Daemon(
            config,
            resources=resources,
            reload=lambda: config,
            notifier=Notifier({}),
            metrics=Metrics(is_on=False),
            dry_run=report,
        )
        daemon.run(progress=progress)
        return daemon.decisions()
