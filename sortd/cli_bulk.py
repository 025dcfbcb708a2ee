"""The commands of ``sortd bulk``, each of which imports its module when it runs."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from sortd.bulk import require_bulk_packages
from sortd.commands.console import Command, ConfigOption, Group, HtmlOption, JsonOption, bar, load_config, show

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, which `bulk plan` made.")]

bulk = typer.Typer(name="bulk", cls=Group, no_args_is_help=True)


@bulk.callback()
def describe_bulk() -> None:
    """Decide on millions of images, on one machine or many, and move them afterwards. Needs the extra cluster."""


@bulk.command("plan", cls=Command)
def plan(
    source: Annotated[str, typer.Argument(help="A folder, a glob, or a URL: s3://, gs://, hf://.")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run; it must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """List the images of a source into the manifest of a run."""
    require_bulk_packages()
    from sortd.bulk.plan import make_plan, print_planned

    with bar("listing") as tell:
        facts = make_plan(source, out.absolute(), tell=tell)
    show(facts, print_planned, as_json=as_json)


@bulk.command("apply", cls=Command)
def apply(
    run: RunArgument,
    config: ConfigOption = None,
    to: Annotated[
        str | None, typer.Option(metavar="URL", help="Objects: where Dataset/ is. Default: the parent of …/Images.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and move nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move the decided images to their classes. Can be repeated; only what is as it was decided on is moved."""
    require_bulk_packages()
    from sortd.bulk.apply import show_applied

    show_applied(load_config(config), run, to=to, dry_run=dry_run, as_json=as_json)


@bulk.command("undo", cls=Command)
def undo_command(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Move what `bulk apply` moved back to where it was."""
    require_bulk_packages()
    from sortd.bulk.apply import show_undone

    show_undone(load_config(config), run, as_json=as_json)


@bulk.command("decide", cls=Command)
def decide_command(  # noqa: PLR0913, PLR0917 -- each is an option of the command line
    run: RunArgument,
    classifier: Annotated[Path, typer.Option("--classifier", help="Folder that `sortd.Classifier.save` wrote.")],
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option(help="Model. Default: the configured one.")] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Actors of Ray. Default: one for each --cpus processors here.")
    ] = None,
    cpus: Annotated[
        int, typer.Option("--cpus", min=1, max=256, help="Threads and decoding processes of an actor or shard.")
    ] = 1,
    gpus: Annotated[float, typer.Option("--num-gpus", min=0, help="GPUs of an actor, which may be 0.5.")] = 0.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, `auto` or HOST:PORT. Default: one for this command, here.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Decide the I-th of N shards here, without Ray.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images of a forward pass.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Decide on the images of a run. Repeat the same command to resume it."""
    if shard is not None and (actors or gpus or address):
        raise typer.BadParameter("--actors, --num-gpus and --address are of Ray; give none of them with --shard")
    part = shard_of(shard)
    require_bulk_packages(with_ray=part is None)
    from sortd.bulk.decide import DecideSettings
    from sortd.bulk.engines import RayOptions, decide_shard, decide_with_ray, print_decided

    settings = DecideSettings.of(
        load_config(config), classifier.absolute(), model=model, processors=cpus, batch_size=batch_size
    )
    with bar("deciding") as tell:
        if part is not None:
            facts = decide_shard(run.absolute(), settings, part, tell=tell)
        else:
            options = RayOptions(actors or max(1, len(os.sched_getaffinity(0)) // cpus), gpus, address)
            facts = decide_with_ray(run.absolute(), settings, options, tell=tell)
    show(facts, print_decided, as_json=as_json)


def shard_of(text: str | None) -> tuple[int, int] | None:
    """Return the numbers of ``3/8``; raise BadParameter for anything else but None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter("must be I/N, from 1/N to N/N", param_hint="--shard")
    return int(found[1]), int(found[2])


@bulk.command("report", cls=Command)
def report(
    run: RunArgument,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="CSV file with the columns uri and label: the true classes.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, max=10_000, help="Images of the page, drawn at random.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sample.")] = 0,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the decisions of a run, state how many are right, and write a page with a sample."""
    require_bulk_packages()
    from sortd.bulk.report import show_report

    show_report(run.absolute(), labels=labels, sample=sample, seed=seed, page=html, as_json=as_json)
