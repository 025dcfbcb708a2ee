"""The command line in this very process: arguments in; exit code, facts and messages out."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from typer.testing import CliRunner

from sortd.cli import app
from sortd.errors import SortdError


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """Return what ``--json`` printed."""
        return json.loads(self.out)


@contextmanager
def logs_as_before() -> Iterator[None]:
    """Take back what a command that logs does to the logging of this process."""
    root = logging.getLogger()
    handlers, level, hook, is_configured = (
        list(root.handlers),
        root.level,
        threading.excepthook,
        structlog.is_configured(),
    )
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], threading.excepthook = handlers, hook
        root.setLevel(level)
        logging.getLogger("sortd").setLevel(logging.NOTSET)
        if not is_configured:
            structlog.reset_defaults()


def sortd(*arguments: object, environment: Mapping[str, str] | None = None) -> Ran:
    """Run a command; errors become exit codes as ``main`` makes them."""
    with logs_as_before():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if isinstance(result.exception, SortdError):
        return Ran(result.exception.exit_code, result.stdout, str(result.exception))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def write_config(folder: Path, **keys: object) -> Path:
    """Write a configuration with everything below a folder, for commands that load no model."""
    own = {"root": folder / "Data", "state_dir": folder / "state", "cache_dir": folder / "cache"}
    values = {**own, "model": "packaged", **keys}
    file = folder / "config.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
    return file
