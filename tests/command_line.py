"""The command line in this very process: arguments in; exit code, facts and messages out."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from typer.testing import CliRunner

from sortd.cli import app
from sortd.commands.documents import DOCUMENTS, Document, FailedDocument
from sortd.commands.json_schema import json_schema
from sortd.errors import SortdError


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """Return what ``--json`` printed, after a comparison with its schema."""
        document = json.loads(self.out)
        require_documented(document)
        return document


@cache
def _validator(command: str) -> Any:
    """Return the validator of a command's documents, which may have no key that the schema lacks."""
    schema = json_schema()
    for one in schema["$defs"].values():
        one["additionalProperties"] = False
    shapes: tuple[type[Document], ...] = (*DOCUMENTS[command], FailedDocument)
    named = [{"$ref": f"#/$defs/{shape.__name__}"} for shape in shapes]
    return Draft202012Validator({**schema, "anyOf": named})


def require_documented(document: Mapping[str, Any]) -> None:
    """Fail if what a command printed is not what docs/json.md says."""
    error = best_match(_validator(document["command"]).iter_errors(document))
    if error is not None:
        why = [f"{list(one.absolute_path)}: {one.message[-300:]}" for one in error.context or [error]]
        raise AssertionError(f"{document['command']}: {'; '.join(why)}")


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
