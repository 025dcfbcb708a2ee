"""Read a YAML file and ``SORTD_...`` variables into one frozen configuration, or name every mistake in them.

Searched for, unless a file is named: ``./config.yaml``, ``$XDG_CONFIG_HOME/sortd/config.yaml`` (``~/.config``),
``/etc/sortd/config.yaml``; else all defaults, with ``./Data`` as the root. Relative paths in a file are relative to it,
those in variables to the working directory.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from sortd import config_yaml
from sortd.classify.prompts import DEFAULT_TEMPLATES
from sortd.errors import ConfigError
from sortd.files import open_regular

PREFIX = "SORTD_"
ANY = "*"  # stands in a key's path for the name of a dataset
OFF = {"off", "no", "false"}

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.1, le=86_400, allow_inf_nan=False)]
ModeName = Literal["avg", "max", "mean", "text", "best", "mixed"]


def _not_off(value: object) -> object:
    """`off` is a value of its own; YAML 1.1 and pydantic would read it as False."""
    is_off = value is False or (isinstance(value, str) and value.casefold() in OFF)
    return None if is_off else value


def _strangers(value: object) -> object:
    """A union would complain twice, once for each of its halves."""
    if value == "auto":
        return value
    try:
        share = float(str(value))
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{value!r} is neither auto nor a share between 0 and 1")
    return share


def _with_a_place(template: object) -> object:
    if isinstance(template, str) and "{}" not in template:
        raise ValueError(f"{template!r} has no {{}} where the name of the class goes")
    return template


def _some(templates: tuple[str, ...]) -> tuple[str, ...]:
    if not templates:
        raise ValueError("the list is empty; a class's name needs one sentence at least")
    return templates


def _for_the_collector(path: Path) -> Path:
    if path.suffix != ".prom":
        raise ValueError(f"{path.name!r} does not end in .prom: the textfile collector reads no other file")
    return path


Template = Annotated[str, BeforeValidator(_with_a_place)]


class _Frozen(BaseModel):
    """What every part of the configuration is: frozen, and without a key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class AbstainConfig(_Frozen):
    """How sure a decision must be before an image is filed."""

    precision: Share = 0.95
    strangers: Annotated[Literal["auto"] | float, BeforeValidator(_strangers)] = "auto"


class Decoding(_Frozen):
    """How images become pixels, and what is too much."""

    jpeg: Literal["draft", "full"] = "draft"
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    timeout_seconds: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 20.0
    max_pixels: Annotated[int, Field(ge=4096)] = 50_000_000
    max_side_pixels: Annotated[int, Field(ge=64)] = 40_000
    max_bytes: Annotated[int, Field(ge=4096)] = 500_000_000


class Log(_Frozen):
    """What the log looks like and how much of it there is."""

    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsConfig(_Frozen):
    """Where Prometheus finds the counts; nowhere unless said."""

    textfile: Annotated[Path, AfterValidator(_for_the_collector)] | None = None
    http_port: Annotated[int, Field(ge=1, le=65_535)] | None = None


class DatasetConfig(_Frozen):
    """What may differ from dataset to dataset."""

    mode: ModeName = "mixed"
    abstain: Annotated[AbstainConfig | None, BeforeValidator(_not_off)] = AbstainConfig()
    classifier: Literal["auto", "prototypes", "finetuned"] = "auto"
    prompts: Annotated[tuple[Template, ...], AfterValidator(_some)] = DEFAULT_TEMPLATES
    learn_from_corrections: bool = False
    settle_seconds: Seconds = 1.0
    companions: bool = True
    rejected: Literal["move", "leave"] = "move"
    guard: bool = True
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    backlog_limit: Annotated[int, Field(ge=100, le=10_000_000)] = 100_000


class Config(DatasetConfig):
    """The whole configuration: what holds for every dataset that says nothing else, and for the program.

    A model of pydantic inherits from another instead of naming its keys a second time.
    """

    root: Path
    state_dir: Path
    cache_dir: Path
    cache_megabytes: Annotated[int, Field(ge=10)] = 1000
    datasets: Mapping[str, DatasetConfig] = {}
    model: Annotated[str, Field(min_length=1)] = "auto"
    text_model: Annotated[str, Field(min_length=1)] | None = None
    backend: Literal["auto", "torch", "onnx"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    rescan_seconds: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = 300.0
    polling: Literal["auto", "always", "never"] = "auto"
    polling_seconds: Annotated[float, Field(ge=0.5, le=86_400, allow_inf_nan=False)] = 5.0
    decoding: Decoding = Decoding()
    log: Log = Log()
    metrics: MetricsConfig = MetricsConfig()

    def dataset(self, name: str) -> DatasetConfig:
        """Return what holds for a dataset: its own words over those for all, key by key."""
        everyone = {key: getattr(self, key) for key in DatasetConfig.model_fields}
        own = self.datasets.get(name)
        if own is None:
            return DatasetConfig.model_construct(**everyone)
        said = {key: getattr(own, key) for key in own.model_fields_set}
        both = own.abstain, self.abstain
        if "abstain" in said and isinstance(both[0], AbstainConfig) and isinstance(both[1], AbstainConfig):
            ours = {key: getattr(both[0], key) for key in both[0].model_fields_set}
            said["abstain"] = both[1].model_copy(update=ours)
        return DatasetConfig.model_construct(**(everyone | said))


LIVE_KEYS = frozenset(DatasetConfig.model_fields) | {"datasets", "rescan_seconds", "log.level"}
"""What a running sortd takes over on reload; all else waits for a restart."""

_GROUPS: Final[Mapping[str, type[BaseModel]]] = {
    "abstain": AbstainConfig,
    "decoding": Decoding,
    "log": Log,
    "metrics": MetricsConfig,
}
_MAY_BE_EMPTY = {"state_dir", "cache_dir", "text_model", "datasets", "log", "metrics", "decoding"}


def _keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in model.model_fields:
        yield (*above, name)
        if name in _GROUPS:
            yield from _keys(_GROUPS[name], (*above, name))
        elif name == "datasets":
            yield from _keys(DatasetConfig, (*above, name, ANY))


KEYS: Final = frozenset(_keys(Config))
"""The path of every key."""


def read_config(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the configuration.

    Args:
        path: the file that the user named, which must be there; None searches (see the top of this module).
        environment: where ``SORTD_...``, ``HOME`` and the folders of XDG and systemd are looked up.

    Raises:
        ConfigError: all that is wrong, a line each: ``file:line:column: key: message``.
    """
    file = find_config_file(environment) if path is None else path
    tree = config_yaml.Tree() if file is None else config_yaml.parse(_content(file))
    base = Path.cwd() if file is None else Path(os.path.abspath(file)).parent
    values = tree.value if isinstance(tree.value, dict) else {}
    if tree.value is not None and not isinstance(tree.value, dict):
        tree.mistake((), "must be lines of `key: value`")
    _drop_empty(values, tree)
    _make_absolute(values, base, environment)
    variables, wrong = _variables(environment)
    _make_absolute(variables, Path.cwd(), environment)
    _merge(values, variables)
    try:
        config = Config.model_validate(_default_folders(base, environment) | values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            where, message = details["loc"], _said(details)
            if _holds(variables, where):
                wrong[variable_name(where)] = message
            else:
                tree.mistake(where, message)
    if tree.mistakes or wrong:
        raise ConfigError("\n".join(_lines(file, tree, wrong)))
    return config


def restart_needed(old: Config, new: Config) -> list[str]:
    """Name the keys that differ and that a running sortd does not take over on reload."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return sorted(key for key in changed if not {key, key.partition(".")[0]} & LIVE_KEYS)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


# ---------------------------------------------------------------- the file


def _content(file: Path) -> bytes:
    try:
        with os.fdopen(open_regular(file, follow=True), "rb") as opened:
            return opened.read(config_yaml.MAX_YAML_BYTES + 1)
    except OSError as error:
        mend = "name a file that is there, or leave -c out for the defaults"
        if isinstance(error, PermissionError):
            mend = "mend its rights, or ask as the user that sortd runs as"
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; {mend}") from error


def _drop_empty(values: dict[str, Any], tree: config_yaml.Tree, above: config_yaml.Path = ()) -> None:
    """Take away keys without a value; only where that means the default is it no mistake."""
    for key, value in list(values.items()):
        path = (*above, key)
        if isinstance(value, dict):
            _drop_empty(value, tree, path)
        if value is None:
            del values[key]
            may_be_empty = (
                key in _MAY_BE_EMPTY if not above else above[0] in {"metrics", "datasets"} and len(above) == 1
            )
            if not may_be_empty and not tree.is_mistaken(path):
                tree.mistake(path, "has no value; give it one or take the line away")
        elif path in {("root",), ("state_dir",), ("cache_dir",)} and isinstance(value, str) and not value.strip():
            tree.mistake(path, "must not be empty; name a folder, or take the line away")


# ---------------------------------------------------------------- folders and variables


def find_config_file(environment: Mapping[str, str]) -> Path | None:
    """Return the file that serves where none is named: the working directory's, the user's, the machine's, or none."""
    own = _folder_of_xdg("XDG_CONFIG_HOME", ".config", environment)
    places = ["config.yaml", own and f"{own}/config.yaml", "/etc/sortd/config.yaml"]
    return next((Path(place) for place in places if place and os.path.isfile(place)), None)


def _default_folders(base: Path, environment: Mapping[str, str]) -> dict[str, str]:
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


def _make_absolute(values: dict[str, Any], base: Path, environment: Mapping[str, str]) -> None:
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


def _variables(environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of variables, nested as in a file, and by variable what is wrong.

    ``SORTD_ABSTAIN__PRECISION`` and ``SORTD_DATASETS__Tornillos__MODE`` name keys in groups; a list or mapping is
    written as in YAML: ``SORTD_PROMPTS='["a photo of {}"]'``. An empty variable counts as not set.
    """
    values: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in sorted(key for key in environment if key.startswith(PREFIX) and environment[key]):
        path = _path_of(name)
        if _generic(path) not in KEYS:
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
        _merge(values, {path[0]: value})
    return values, wrong


def variable_name(path: tuple[str | int, ...]) -> str:
    """Return the variable that stands for a key."""
    is_dataset = path[:1] == ("datasets",)
    return PREFIX + "__".join(
        str(part) if is_dataset and at == 1 else str(part).upper() for at, part in enumerate(path)
    )


def _generic(path: tuple[str | int, ...]) -> tuple[str, ...]:
    return tuple(ANY if at == 1 and path[0] == "datasets" else str(part) for at, part in enumerate(path))


def _path_of(name: str) -> tuple[str, ...]:
    parts = name.removeprefix(PREFIX).split("__")
    is_dataset = parts[0].casefold() == "datasets"
    return tuple(part if is_dataset and at == 1 else part.casefold() for at, part in enumerate(parts))


def _holds(values: Mapping[str, Any], path: tuple[str | int, ...]) -> bool:
    """Tell whether a key, or the group that it stands in, is among the values."""
    inside: Any = values
    for part in path:
        if not isinstance(inside, dict):
            return True
        if part not in inside:
            return False
        inside = inside[part]
    return True


def _merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one tree of values over another, key by key."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


# ---------------------------------------------------------------- what is said of mistakes


_WANTED = {
    "float_parsing": "is no number",
    "int_parsing": "is no whole number",
    "int_from_float": "is no whole number",
    "bool_parsing": "is neither yes nor no",
    "string_pattern_mismatch": "is none of auto, cpu, cuda, cuda:0, mps",
    "tuple_type": "is not a list; write one `- ...` line for each",
}
_GROUP_WANTED = {"model_type", "model_attributes_type", "dict_type", "mapping_type"}


def _lines(file: Path | None, tree: config_yaml.Tree, wrong: Mapping[str, str]) -> list[str]:
    """Return a line for each mistake in the file, in its order, then one for each in a variable."""
    known = [variable_name(key) for key in KEYS if ANY not in key]
    found = []
    for mistake in sorted(tree.mistakes, key=lambda mistake: (mistake.line, mistake.column)):
        key = f"{'.'.join(map(str, mistake.path))}: " if mistake.path else ""
        found.append(f"{file}:{mistake.line}:{mistake.column}: {key}{mistake.message}")
    for name, message in wrong.items():
        meant = _meant(name, known, likeness=0.8) if message.startswith("unknown") else ""
        found.append(f"{name}: {message}{meant}")
    return found


def _said(details: ErrorDetails) -> str:
    """Put one of pydantic's errors into words."""
    path, given, context, kind = details["loc"], details["input"], details.get("ctx", {}), details["type"]
    match kind:
        case "extra_forbidden":
            parent = _generic(path)[:-1]
            siblings = sorted(key[-1] for key in KEYS if key[:-1] == parent and key[-1] != ANY)
            is_for_all = path[0] == "datasets" and path[2:] in KEYS
            meant = "; it holds for all datasets alike" if is_for_all else _meant(str(path[-1]), siblings)
            message = f"unknown key{meant}"
        case "literal_error" if isinstance(given, str):
            allowed = [word.strip("' ") for word in str(context["expected"]).replace(" or ", ",").split(",")]
            message = f"{given!r} is none of {', '.join(allowed)}{_meant(given, allowed)}"
        case "value_error":
            message = str(context["error"])
        case _ if kind in _GROUP_WANTED:
            message = "must be a group of keys, indented below it" + (", or `off`" if path[-1] == "abstain" else "")
        case "missing":
            message = "has no default, since neither HOME nor a folder of systemd is set; give it"
        case "string_too_short":
            message = "must not be empty"
        case _ if kind in _WANTED:
            message = f"{given!r} {_WANTED[kind]}"
        case _ if kind == "literal_error" or kind.endswith("_type"):
            message = "must be one value, not a list or a group of keys"
        case _:
            message = f"{given!r} {details['msg'].replace('Input should', 'should')}"
    return message


def _meant(word: str, known: Sequence[str], *, likeness: float = 0.6) -> str:
    near = (difflib.get_close_matches(written, known, 1, likeness) for written in (word, word.casefold(), word.upper()))
    return next((f"; did you mean {found[0]}?" for found in near if found), "")
