"""Lets ``python -m sortd`` be the command."""

from sortd.cli import main

main()
