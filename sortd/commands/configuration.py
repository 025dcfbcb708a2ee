"""The command ``config``: the annotated example, and the values in force with their sources."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from sortd import config_yaml
from sortd.commands.console import print_table, printable, say, show
from sortd.config import find_config_file, read_config
from sortd.config_variables import PREFIX, variable_name
from sortd.files import read_regular, shipped

EXAMPLE = "config.example.yaml"


def print_example() -> None:
    """Print a configuration with every key, its default and a comment."""
    typer.echo(read_regular(shipped(EXAMPLE)).decode(), nl=False)


def show_effective(path: Path | None, environment: Mapping[str, str], *, as_json: bool) -> None:
    """Print every value in force with its source: ``file:line``, a variable or ``default``; raises ConfigError."""
    file = find_config_file(environment) if path is None else path
    values = effective_values(path, environment)
    facts = {"config": None if file is None else os.path.abspath(file), "values": values}
    show(facts, _print_effective, as_json=as_json)


def effective_values(path: Path | None, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the value and the source of each key; of a dataset's own keys, those that are set."""
    config = read_config(path, environment)
    file = find_config_file(environment) if path is None else path
    tree = config_yaml.Tree() if file is None else config_yaml.parse(read_regular(file, follow=True))
    given = {name.casefold(): name for name, value in environment.items() if name.startswith(PREFIX) and value}
    general = config.model_dump(exclude={"datasets"})
    own = {name: one.model_dump(exclude_unset=True) for name, one in config.datasets.items()}

    def source(key: tuple[str, ...]) -> str:
        for end in range(len(key), 0, -1):  # a variable may hold the whole group
            variable = given.get(variable_name(key[:end]).casefold(), "")
            value = config_yaml.parse(environment.get(variable, "").encode("utf-8", "surrogateescape")).value
            if variable and _value_at(value, key[end:]) is not None:
                return variable
        is_in_file = key in tree.places and _value_at(tree.value, key) is not None
        return f"{file}:{tree.places[key][0]}" if is_in_file else "default"

    leaves = _leaves({**general, "datasets": own})
    return {".".join(key): {"value": value, "source": source(key)} for key, value in leaves}


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), _plain(value)


def _plain(value: object) -> object:
    """Return a value as JSON has it: a path as text, a secret without its content."""
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):  # one of a list of groups
        return {key: _plain(one) for key, one in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _value_at(value: config_yaml.Value, key: tuple[str, ...]) -> config_yaml.Value:
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _print_effective(facts: Mapping[str, Any]) -> None:
    rows = [
        (key, _written(one["value"]), printable(one["source"].removeprefix(f"{Path.cwd()}/")))
        for key, one in facts["values"].items()
    ]
    print_table(("key", "value", "source"), rows)
    say(f"sortd: read {printable(facts['config'])}" if facts["config"] else "sortd: there is no configuration file")


def _written(value: object) -> str:
    """Return a value as it is written in YAML, on one line."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case list():
            return f"[{', '.join(_written(one) for one in value)}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_written(one)}' for key, one in value.items() if one is not None)}}}"
    return str(value)
