"""The commands of ``sortd bulk``, each of which imports its module when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from sortd.bulk import require_bulk_packages
from sortd.commands.console import Command, Group, JsonOption, bar, show

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
