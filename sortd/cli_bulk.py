"""The commands of ``sortd bulk``, each of which imports its module when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from sortd.bulk import require_bulk_packages
from sortd.commands.console import Command, ConfigOption, Group, JsonOption, bar, load_config, show

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
def undo(run: RunArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Move what `bulk apply` moved back to where it was."""
    require_bulk_packages()
    from sortd.bulk.apply import show_undone

    show_undone(load_config(config), run, as_json=as_json)
