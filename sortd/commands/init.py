"""The command ``init``: create a dataset, configure the folder that holds it, and print the next command.

A file of the user is never overwritten: a missing configuration is written, and a line is appended to one without a
root. One sortd has one root, so a dataset elsewhere gets a configuration of its own, beside it.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from sortd import config_yaml
from sortd.classify.prompts import written_name
from sortd.commands.console import printable
from sortd.commands.moves import datasets_there
from sortd.config import Config, config_file_of_user, find_config_file, read_config
from sortd.config_variables import variable_name
from sortd.daemon.references import is_class_name
from sortd.errors import ConfigError, LayoutError
from sortd.files import read_regular
from sortd.layout import Area, Layout, inside_dataset

HEADER = "# Written by `sortd init`; `sortd config` prints every key, `sortd config --effective` the values in force.\n"
OWN_STATE = "# The journal of this root; another sortd uses the default folder.\nstate_dir: .sortd-state\n"
ROOT_VARIABLE = variable_name(("root",))  # it would override the file that is written here
_PLAIN_WORD = re.compile(r"/[\w/.,+@-]*(?: [\w/.,+@-]+)*")


@dataclass(frozen=True, slots=True)
class Configured:
    """The configuration to run with: its file, and what was done to it."""

    file: Path
    done: str


def create_dataset(directory: Path, classes: Sequence[str], config: Path | None) -> None:
    """Create a dataset, configure its root, and print what was written and the next command.

    Raises:
        BadParameter: a class cannot have that name.
        LayoutError: the folder cannot be a dataset, or cannot be created.
        ConfigError: the configuration in force is not valid, must be edited by hand, or cannot be written; the
            dataset is created.
    """
    layout = make_dataset_folders(directory, classes)
    folder = printable(os.fspath(layout.root))
    typer.echo(f"{folder} is a dataset.")
    environment = {name: value for name, value in os.environ.items() if name != ROOT_VARIABLE}
    try:
        configured = write_configuration(Path(os.path.realpath(layout.root)).parent, config, environment)
    except OSError as error:
        advice = "correct the permissions, or name another configuration with -c"
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}; {advice}") from error
    typer.echo(f"{printable(os.fspath(configured.file))} {configured.done}.")
    typer.echo(f"Put 5 to 20 images of each class into {folder}/{Area.CLASES}/<class>/,")
    typer.echo(f"and the images to sort into {folder}/{Area.IMAGES}/; then run")
    typer.echo(f"    {run_command(configured.file, environment)}")


def make_dataset_folders(directory: Path, classes: Sequence[str]) -> Layout:
    """Create the folders and the marker of a dataset; raises as ``create_dataset``."""
    for name in classes:
        if "/" in name or not is_class_name(name) or written_name(name) != name:
            why = "it must be a visible folder name without /, control characters, and blanks at an end or in a row"
            raise typer.BadParameter(f"{name!r} cannot be a class: {why}", param_hint="--class")
    layout = Layout(directory.absolute())
    real = Path(os.path.realpath(layout.root))
    if real.name.startswith(".") or real == real.parent:
        raise LayoutError(f"{layout.root} cannot be a dataset: a dataset is a folder below `root` that is not hidden")
    if (problem := inside_dataset(layout.root)) is not None:
        raise LayoutError(str(problem))
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.make()
        for name in classes:
            (layout.area(Area.CLASES) / name).mkdir(exist_ok=True)
    except FileExistsError as error:
        raise LayoutError(f"{error.filename} is no folder; move it away, or name another folder") from error
    except OSError as error:
        advice = "correct the permissions, free some space, or name another folder"
        raise LayoutError(f"{error.filename} cannot be created: {error.strerror}; {advice}") from error
    return layout


def write_configuration(root: Path, named: Path | None, environment: Mapping[str, str]) -> Configured:
    """Return a configuration with this root, which is written or completed if needed.

    ``named`` is the file to use; by default the one in force, or a new one of the user. ``root`` has no links, and
    ``environment`` no variable of the root.
    """
    try:
        os.fspath(root).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{root} is not UTF-8, as a configuration must be; set SORTD_ROOT instead") from error
    if named is not None and not named.exists():
        return _written(named, root)
    file, beside = named or find_config_file(environment), root / "config.yaml"
    config = read_config(file, environment)
    if file is not None and _has_root(config, root):
        return Configured(file.absolute(), "has its folder as `root`")
    if _has_root(config, root) or not datasets_there(config):
        if file is None:
            return _written(config_file_of_user(environment) or beside, root)
        content = read_regular(file, follow=True)
        if "root" not in (config_yaml.parse(content).value or {}):
            return _completed(file.absolute(), content, root)
    if not beside.exists():
        return _written(beside, root, OWN_STATE)
    if _has_root(read_config(beside, environment), root):
        return Configured(beside, "has its folder as `root`")
    raise ConfigError(f"{beside} has another `root`; correct it, or name a new configuration with -c")


def _has_root(config: Config, root: Path) -> bool:
    return os.path.realpath(config.root) == os.fspath(root)


def _written(file: Path, root: Path, more: str = "") -> Configured:
    """Write a new configuration."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8") as opened:  # fails if the file exists
        opened.write(f"{HEADER}{_line(root)}{more}")
    return Configured(file.absolute(), f"was written, with `root: {printable(os.fspath(root))}`")


def _completed(file: Path, content: bytes, root: Path) -> Configured:
    """Append the root to a configuration without one."""
    line = ("" if content.endswith(b"\n") else "\n") + _line(root)
    before, after = config_yaml.parse(content), config_yaml.parse(content + line.encode())
    kept = before.value if isinstance(before.value, dict) else {}
    if after.mistakes or after.value != {**kept, "root": os.fspath(root)}:
        raise ConfigError(f"{file}: add the line `{_line(root).strip()}` to it; it has a form that sortd does not edit")
    with open(file, "ab") as opened:
        opened.write(line.encode())
    return Configured(file, f"has the new line `{_line(root).strip()}`")


def _line(root: Path) -> str:
    """Return the root as a line of YAML; JSON's quoted text, with more escapes, is also YAML's."""
    text = os.fspath(root)
    quoted = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))
    return f"root: {text if _PLAIN_WORD.fullmatch(text) else quoted}\n"


def run_command(file: Path, environment: Mapping[str, str]) -> str:
    """Return the shell command that runs sortd with this configuration, from any folder."""
    is_found = file == config_file_of_user(environment) and not os.path.isfile("config.yaml")
    unset = f"env -u {ROOT_VARIABLE} " if os.environ.get(ROOT_VARIABLE) else ""
    return f"{unset}{this_program()} run" + ("" if is_found else f" -c {shlex.quote(os.fspath(file))}")


def this_program() -> str:
    """Return the shell word or words that call the program that runs now."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m sortd"
    found = shutil.which("sortd")
    is_usual = called.name != "sortd" or (found is not None and os.path.realpath(found) == os.path.realpath(called))
    return "sortd" if is_usual else shlex.quote(os.path.abspath(called))
