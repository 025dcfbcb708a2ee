"""The variables ``SORTD_...``, each of which stands for a key of the configuration, and trees of values."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from sortd import config_yaml

PREFIX = "SORTD_"
ANY = "*"  # in a key's path: any name of a dataset


def variables_in(
    environment: Mapping[str, str], keys: AbstractSet[tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of variables of these keys, nested as in a file, and the mistakes by variable.

    ``SORTD_ABSTAIN__PRECISION`` and ``SORTD_DATASETS__Tornillos__MODE`` name keys in groups; lists and mappings are
    written as in YAML: ``SORTD_PROMPTS='["a photo of {}"]'``. An empty variable counts as not set.
    """
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in sorted(key for key in environment if key.startswith(PREFIX) and environment[key]):
        parts = name.removeprefix(PREFIX).split("__")
        is_dataset = parts[0].casefold() == "datasets"
        path = tuple(part if is_dataset and at == 1 else part.casefold() for at, part in enumerate(parts))
        if generic_key(path) not in keys:
            wrong[name] = "unknown variable"
            continue
        value: config_yaml.Value = environment[name]
        if environment[name].lstrip()[:1] in {"[", "{"}:
            tree = config_yaml.parse(environment[name].encode("utf-8", "surrogateescape"))
            if tree.mistakes:
                wrong[name] = tree.mistakes[0].message
                continue
            value = tree.value
        for part in reversed(path[1:]):
            value = {part: value}
        merge(values, {path[0]: value})
    return values, wrong


def variable_name(path: tuple[str | int, ...]) -> str:
    """Return the name of the variable for a key."""
    is_dataset = path[:1] == ("datasets",)
    return PREFIX + "__".join(
        str(part) if is_dataset and at == 1 else str(part).upper() for at, part in enumerate(path)
    )


def generic_key(path: tuple[str | int, ...]) -> tuple[str, ...]:
    """Return the path of a key with ``ANY`` for the name of a dataset."""
    return tuple(ANY if at == 1 and path[0] == "datasets" else str(part) for at, part in enumerate(path))


def holds(values: Mapping[str, Any], path: tuple[str | int, ...]) -> bool:
    """Tell whether the values have a key or its group."""
    inside: Any = values
    for part in path:
        if not isinstance(inside, dict):
            return True
        if part not in inside:
            return False
        inside = inside[part]
    return True


def merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Replace values by those of another tree, key by key."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value
