"""The command line: facts go to stdout, messages to stderr, and errors become exit codes.

Each command imports its module when it runs, so that `--help`, `check`, `status`, `history` and `undo` never import
torch.
"""

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sortd import __version__
from sortd.cli_bulk import bulk
from sortd.cli_models import OPENBLAS_SPIN, encode, finetune, models
from sortd.commands.console import (
    Command,
    ConfigOption,
    DatasetCommand,
    DatasetOption,
    Group,
    HtmlOption,
    JsonOption,
    SinceOption,
    UntilOption,
    load_config,
    show,
    spinner,
    time_option,
)
from sortd.exits import exit_on_error, open_missing_streams

if TYPE_CHECKING:
    from sortd.config import Config

OUTCOMES = ("filed", "sent_to_review", "rejected", "assigned", "refiled", "undone", "corrected", "confirmed")

app = typer.Typer(
    name="sortd",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

service = typer.Typer(name="service", cls=Group, no_args_is_help=True, help="Install or remove sortd as a service.")

UserOption = Annotated[bool, typer.Option("--user", help="The service of this user, not that of the machine.")]
PlanOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


def print_version(wanted: bool) -> None:  # noqa: FBT001 -- typer passes it
    """Print the version and exit, if ``wanted``."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    config: ConfigOption = None,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sort the images in a folder into classes that you define by reference images."""


@app.command(cls=Command)
def init(
    directory: Annotated[Path, typer.Argument(help="Folder of the dataset; missing folders are created.")],
    config: ConfigOption = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Create the folder of this class; repeatable.")
    ] = None,
) -> None:
    """Create a dataset, write its folder into a configuration if needed, and print the next command."""
    from sortd.commands.init import create_dataset

    create_dataset(directory, classes or (), config)


@app.command("config", cls=Command)
def config_command(
    config: ConfigOption = None,
    effective: Annotated[
        bool, typer.Option("--effective", help="Print the values in force, each with its source.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a configuration with every key and its default, or the values in force."""
    from sortd.commands.configuration import print_example, show_effective

    if as_json and not effective:
        raise typer.BadParameter("give --json only with --effective")
    if effective:
        show_effective(config, os.environ, as_json=as_json)
    else:
        print_example()


@app.command(cls=Command)
def run(config: ConfigOption = None) -> None:
    """Watch the datasets and file new images, until stopped."""
    os.environ.setdefault(*OPENBLAS_SPIN)
    from sortd.commands.run import run_daemon

    run_daemon(read_quietly(config), once=False, file=config)


@app.command(cls=Command)
def once(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; change nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show each image.")] = False,
    as_json: JsonOption = False,
) -> None:
    """File the images that are in Images/ now, print how many went where, and exit."""
    os.environ.setdefault(*OPENBLAS_SPIN)  # OpenBLAS reads it when numpy is imported
    from sortd.commands.run import file_once, show_dry_run

    show = show_dry_run if dry_run else file_once
    show(read_quietly(config), as_json=as_json, verbose=verbose)


def read_quietly(path: Path | None) -> Callable[[], "Config"]:
    """Return a function that reads the configuration without messages: the log has them."""
    return partial(load_config, path, tell=lambda _: None)


@app.command(cls=Command)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command(cls=Command)
def check(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Decode every reference image, which may take long.")
    ] = False,
) -> None:
    """Check the configuration, folders, permissions, disks, references and model, and print what to correct."""
    from sortd.commands.check import check_all
    from sortd.commands.check_dataset import DECODING_SECONDS
    from sortd.commands.findings import show_findings

    found = check_all(config, os.environ, decoding_seconds=math.inf if thorough else DECODING_SECONDS)
    raise typer.Exit(show_findings(found, as_json=as_json))


@app.command(cls=Command)
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show whether sortd runs (exit code 75 if not), its model, the images that wait, and the accuracy by class."""
    from sortd.commands.status import show_status

    raise typer.Exit(show_status(load_config(config), config, as_json=as_json))


@app.command("explain", cls=Command)
def explain_command(
    image: Annotated[Path, typer.Argument(help="Path of the image, in any folder.")],
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain where an image is filed, and why."""
    from sortd.commands.explain import show_explanation

    show_explanation(load_config(config), image, dataset, html, as_json=as_json)


@app.command(cls=Command)
def history(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    config: ConfigOption = None,
    dataset: DatasetOption = None,
    label: Annotated[str | None, typer.Option("--label", help="Show only moves of this class.")] = None,
    outcome: Annotated[str | None, typer.Option(help=f"Show only {', '.join(OUTCOMES)}.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Show only moves of this run of sortd.")] = None,
    path: Annotated[Path | None, typer.Option("--path", help="Show only moves from or to this path.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show the newest N moves (0: all).")] = 50,
    format_name: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print them.")
    ] = "table",
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the moves that are older than `journal: {keep: …}` and not needed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --prune: only count them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the moves with their reasons, and what a person corrected or confirmed, newest first."""
    from sortd.commands.history import prune_history, show_history

    if dry_run and not prune:
        raise typer.BadParameter("give --dry-run only with --prune")
    if prune:
        prune_history(load_config(config), dataset, dry_run=dry_run, as_json=as_json)
        return
    if outcome not in {None, *OUTCOMES}:
        raise typer.BadParameter(f"must be one of {', '.join(OUTCOMES)}", param_hint="--outcome")
    begin, end = time_option("--since", since), time_option("--until", until)
    kind = "json" if as_json else format_name
    chosen = {"label": label, "outcome": outcome, "run": run, "since": begin, "until": end}
    show_history(load_config(config), dataset=dataset, file=path, limit=limit, format_name=kind, **chosen)


@app.command("export", cls=DatasetCommand)
def export_images(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    out: Annotated[Path, typer.Option("--out", help="File or folder to write; it must not exist.")],
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    format_name: Annotated[
        Literal["csv", "jsonl", "parquet", "imagefolder", "coco", "fiftyone", "datasets"],
        typer.Option("--format", help="What to write."),
    ] = "csv",
    checked: Annotated[
        bool, typer.Option("--checked-only", help="Export only images whose class a person has given or confirmed.")
    ] = False,
    split: Annotated[
        float | None, typer.Option("--split", min=0.01, max=0.99, help="Share of the part train; the rest is test.")
    ] = None,
    link: Annotated[
        Literal["copy", "hard", "symbolic"], typer.Option("--link", help="How images get into a folder.")
    ] = "copy",
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also export the embeddings.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export the images in Dataset/ with what is known of them, for other programs."""
    from sortd.commands.export import export_dataset
    from sortd.commands.export_formats import ExportFormat, ExportOptions, Link
    from sortd.commands.status import dataset_named

    loaded = load_config(config)
    options = ExportOptions(ExportFormat(format_name), out, checked, split, Link(link), embeddings)
    export_dataset(loaded, dataset_named(loaded, dataset), options, as_json=as_json)


@app.command(cls=Command)
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
    chosen = {"since": time_option("--since", since), "until": time_option("--until", until), "run": run}
    code = undo_moves(load_config(config), path, last=last, dataset=dataset, dry_run=dry_run, as_json=as_json, **chosen)
    raise typer.Exit(code)


@app.command(cls=Command)
def release(
    path: Annotated[
        Path | None,
        typer.Argument(help="Release this held file or the dataset with this folder, or retry this file in Rejected/."),
    ] = None,
    config: ConfigOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Release all held files and datasets.")] = False,
    dataset: DatasetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Release files that are held after an undo, datasets that the guard holds, and a rejected file to try it again."""
    from sortd.commands.moves import release_files
    from sortd.commands.rejected import retry_if_rejected

    if (path is None) != everything:
        raise typer.BadParameter("give either a PATH or --all")
    loaded = load_config(config)
    if path is not None:
        retry_if_rejected(loaded, path, as_json=as_json)
    release_files(loaded, path, dataset=dataset, as_json=as_json)


@app.command(cls=DatasetCommand)
def rebuild(
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Use the new prototypes even if they look worse.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the running sortd build its prototypes from the references again."""
    from sortd.commands.moves import ask_to_rebuild

    ask_to_rebuild(load_config(config), dataset, force=force, as_json=as_json)


@app.command(cls=Command)
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
    show(measured, print_measured, as_json=as_json)


@app.command("eval", cls=DatasetCommand)
def evaluate_command(
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the references by leave-one-out: modes, classes that need images, and suspect images."""
    from sortd.commands.evaluation import show_evaluation

    show_evaluation(load_config(config), dataset, html, as_json=as_json)


@app.command("groups", cls=DatasetCommand)
def groups_command(
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    page: Annotated[Path | None, typer.Option("--page", "--html", help="Write an HTML page with the pictures.")] = None,
    accepted: Annotated[str | None, typer.Option("--accept", help="Make a class from the group with this id.")] = None,
    name: Annotated[str | None, typer.Option("--as", help="The name of that class.")] = None,
    without: Annotated[
        list[Path] | None, typer.Option("--without", help="Leave this image out of that class; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Group the images in Review/ that resemble each other, and make a class from a group."""
    from sortd.commands.groups import accept, show_groups

    if (accepted is None) != (name is None) or (without and accepted is None):
        raise typer.BadParameter("give --accept ID together with --as NAME; --without only with these")
    if accepted is None or name is None:
        show_groups(load_config(config), dataset, page, as_json=as_json)
    else:
        accept(load_config(config), dataset, accepted, name, without or (), as_json=as_json)


@app.command(cls=Command)
def assign(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE... CLASS", help="Images in Review/ or Dataset/, then their class.")
    ],
    config: ConfigOption = None,
    none: Annotated[
        bool, typer.Option("--none", help="The images belong to no class; give no CLASS. They go to Dataset/_none.")
    ] = False,
    example: Annotated[
        bool, typer.Option("--example", help="With --none: the images are also examples of what belongs to no class.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Move images of Review/ or Dataset/ to a class that you name, as references of it; a new class is created."""
    from sortd.commands.assign import assign_paths
    from sortd.events import NO_CLASS

    if example and not none:
        raise typer.BadParameter("give --example only with --none")
    paths, label = (images, NO_CLASS) if none else (images[:-1], images[-1])
    if not paths:
        raise typer.BadParameter("give at least one IMAGE, then the CLASS; or --none")
    assign_paths(load_config(config), [Path(path) for path in paths], label, is_example=example, as_json=as_json)


@app.command(cls=DatasetCommand)
def reconsider(
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Move the images that would be filed elsewhere.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would move, which is the default.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Decide filed images again by the present references, and show which would be filed into another class."""
    from sortd.commands.reconsider import show_reconsidered

    if apply and dry_run:
        raise typer.BadParameter("give either --apply or --dry-run")
    show_reconsidered(load_config(config), dataset, apply=apply, as_json=as_json)


@app.command(cls=DatasetCommand)
def audit(
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of images to draw. Default: 60.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", "--html", help="Write an HTML page with the pictures.")] = None,
    wrong: Annotated[
        list[Path] | None, typer.Option("--wrong", help="This image of the sample is in a wrong class; repeatable.")
    ] = None,
    all_right: Annotated[bool, typer.Option("--all-right", help="No image of the sample is in a wrong class.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw a random sample of filed images to look at, take the answers, and say what they prove."""
    from sortd.commands.audit import show_answers, show_sample

    answered = bool(wrong) or all_right
    if (wrong and all_right) or (answered and (page is not None or sample is not None)):
        raise typer.BadParameter("give either --wrong PATH or --all-right, and neither --sample nor --page with it")
    if answered:
        show_answers(load_config(config), dataset, wrong or (), as_json=as_json)
    else:
        show_sample(load_config(config), dataset, sample, page, as_json=as_json)


@app.command(cls=Command)
def notify(
    config: ConfigOption = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each target.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List where notifications go and which events are sent, and with --test send a test message."""
    from sortd.commands.notify import show_notifications

    raise typer.Exit(show_notifications(load_config(config), is_test=test, as_json=as_json))


@app.command(cls=Command)
def review(
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port on 127.0.0.1. Default: 8337.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead of a port.")] = None,
    proxy: Annotated[str | None, typer.Option("--behind-proxy", help="Host of a proxy that ends TLS for it.")] = None,
) -> None:
    """Serve a web page, on this machine alone, to look at the images in Review/, confirm, correct and undo."""
    from sortd.review import require_review_packages

    require_review_packages()
    from sortd.review.app import create_app
    from sortd.review.server import serve

    serve(create_app, load_config(config), port=port, socket=socket, behind_proxy=proxy)


@service.command("install", cls=Command)
def install(user: UserOption = False, dry_run: PlanOption = False) -> None:
    """Install, enable and start the systemd unit of sortd."""
    from sortd.commands.units import install_service

    install_service(is_of_user=user, dry_run=dry_run)


@service.command("uninstall", cls=Command)
def uninstall(user: UserOption = False, dry_run: PlanOption = False) -> None:
    """Stop and disable the systemd unit of sortd, and remove it; configuration, journal and images stay."""
    from sortd.commands.units import uninstall_service

    uninstall_service(is_of_user=user, dry_run=dry_run)


app.command(cls=Command)(encode)
app.command(cls=DatasetCommand)(finetune)
app.add_typer(models)
app.add_typer(bulk)
app.add_typer(service)


def main() -> None:
    """Run the command line; errors become a message on stderr and an exit code (sysexits(3))."""
    open_missing_streams()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may have ignored it: then no process has an exit code
    with exit_on_error():
        app()
