"""Lets ``python -m sortd`` be the command."""

from sortd.cli import run_command_line

run_command_line()
