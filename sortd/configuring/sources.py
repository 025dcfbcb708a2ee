"""Where a configuration comes from: a file that is searched for, ``SORTD_...`` variables, and folders by default.

Everything is text here; ``config.py`` gives it meaning.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from sortd.configuring import yaml_tree

PREFIX = "SORTD_"
ANY = "*"  # stands in a key's path for the name of a dataset

Keys = frozenset[tuple[str, ...]]


def keys_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Keys:
    """List the path of every key that a model knows, sections before what is in them."""
    found: set[tuple[str, ...]] = set()
    for name, field in model.model_fields.items():
        found.add((*above, name))
        for part, is_named in _models_in(field.annotation):
            found |= keys_of(part, (*above, name, ANY) if is_named else (*above, name))
    return frozenset(found)


def _models_in(annotation: object) -> Iterator[tuple[type[BaseModel], bool]]:
    """Find the models in a type, and whether each one stands under a name that the user chooses."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif get_origin(annotation) is Mapping or get_origin(annotation) is dict:
        yield from ((model, True) for model, _ in _models_in(get_args(annotation)[1]))
    elif get_origin(annotation) in {Union, UnionType, Annotated}:
        for part in get_args(annotation):
            yield from _models_in(part)


def siblings(keys: Keys, path: tuple[str | int, ...]) -> list[str]:
    """List the keys that could stand where ``path`` ends."""
    parent = _generic(path)[:-1]
    return sorted(key[-1] for key in keys if key[:-1] == parent and key[-1] != ANY)


def _generic(path: tuple[str | int, ...]) -> tuple[str, ...]:
    return tuple(ANY if at == 1 and path[0] == "datasets" else str(part) for at, part in enumerate(path))


def find(environment: Mapping[str, str]) -> Path | None:
    """Return the file that serves where none is named: the working directory's, the user's, the machine's, or none."""
    own = _folder_of_xdg("XDG_CONFIG_HOME", ".config", environment)
    places = ["config.yaml", own and f"{own}/config.yaml", "/etc/sortd/config.yaml"]
    return next((Path(place) for place in places if place and os.path.isfile(place)), None)


def default_folders(base: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return root, state and cache where nothing was said; of systemd's lists of folders the first is ours.

    Without a home there is no place for state and cache, and none is made up.
    """
    state = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    cache = environment.get("CACHE_DIRECTORY", "").partition(":")[0]
    folders = {
        "root": str(base / "Data"),
        "state_dir": state or _folder_of_xdg("XDG_STATE_HOME", ".local/state", environment),
        "cache_dir": cache or _folder_of_xdg("XDG_CACHE_HOME", ".cache", environment),
    }
    return {key: folder for key, folder in folders.items() if folder}


def _folder_of_xdg(variable: str, below_home: str, environment: Mapping[str, str]) -> str | None:
    """Return our folder where XDG has it; relative values are to be ignored, says its specification."""
    named, home = environment.get(variable, ""), environment.get("HOME", "")
    if os.path.isabs(named):
        return os.path.join(named, "sortd")
    return os.path.join(home, below_home, "sortd") if os.path.isabs(home) else None


def make_absolute(values: dict[str, Any], base: Path, environment: Mapping[str, str]) -> None:
    """Make the paths among the values absolute; a model is a path where it looks like one or a folder is there."""
    metrics = values.get("metrics")
    for section, key in ((values, "root"), (values, "state_dir"), (values, "cache_dir"), (metrics, "textfile")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _absolute(section[key], base, environment)
    for key in ("model", "text_model"):
        named = values.get(key)
        if isinstance(named, str) and named not in {"auto", "packaged", ""}:
            folder = _absolute(named, base, environment)
            if named.startswith(("/", "./", "../", "~")) or os.path.isdir(folder):
                values[key] = folder


def _absolute(path: str, base: Path, environment: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        path = environment.get("HOME", "~") + path[1:]
    return os.path.normpath(base / path)


def variables(environment: Mapping[str, str], keys: Keys) -> tuple[dict[str, Any], dict[str, str]]:
    """Read ``SORTD_SETTLE_SECONDS``, ``SORTD_ABSTAIN__PRECISION``, ``SORTD_DATASETS__Tornillos__MODE`` and their kin.

    A list or mapping is written as in YAML: ``SORTD_PROMPTS='["a photo of {}"]'``. An empty variable says nothing.

    Returns:
        The values, nested as in a file, and by variable what is wrong ("unknown variable" where no key is meant).
    """
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in sorted(key for key in environment if key.startswith(PREFIX) and environment[key]):
        path = _path_of(name)
        if _generic(path) not in keys:
            wrong[name] = "unknown variable"
            continue
        value: yaml_tree.Value = environment[name]
        if environment[name].lstrip()[:1] in {"[", "{"}:
            tree = yaml_tree.parse(environment[name].encode("utf-8", "surrogateescape"))
            if tree.mistakes:
                wrong[name] = tree.mistakes[0].message
                continue
            value = tree.value
        merge(values, _nested(path, value))
    return values, wrong


def variable_name(path: tuple[str | int, ...]) -> str:
    """Return the variable that stands for a key."""
    is_dataset = path[:1] == ("datasets",)
    return PREFIX + "__".join(
        str(part) if is_dataset and at == 1 else str(part).upper() for at, part in enumerate(path)
    )


def _path_of(name: str) -> tuple[str, ...]:
    parts = name.removeprefix(PREFIX).split("__")
    is_dataset = parts[0].casefold() == "datasets"
    return tuple(part if is_dataset and at == 1 else part.casefold() for at, part in enumerate(parts))


def _nested(path: tuple[str, ...], value: yaml_tree.Value) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def holds(values: Mapping[str, Any], path: tuple[str | int, ...]) -> bool:
    """Does this key, or what it stands in, come from here?"""
    inside: Any = values
    for part in path:
        if not isinstance(inside, dict):
            return True
        if part not in inside:
            return False
        inside = inside[part]
    return True


def merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one tree of values over another, key by key."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value
