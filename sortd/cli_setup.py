"""The commands that set sortd up, each of which imports its module when it runs: ``init``, ``config``, ``service``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sortd.commands.console import Command, ConfigOption, Group, JsonOption

service = typer.Typer(name="service", cls=Group, no_args_is_help=True, help="Install or remove sortd as a service.")

UserOption = Annotated[bool, typer.Option("--user", help="The service of this user, not that of the machine.")]
PlanOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


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
