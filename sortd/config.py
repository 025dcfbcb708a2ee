"""The configuration: a YAML file and ``SORTD_...`` variables become one frozen value, or every mistake at once.

Searched for, unless a file is named: ``./config.yaml``, ``$XDG_CONFIG_HOME/sortd/config.yaml`` (``~/.config``),
``/etc/sortd/config.yaml``; else all defaults, with ``./Data`` as the root. Relative paths in a file are relative to it,
those in variables to the working directory.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sortd.classify.prompts import DEFAULT_TEMPLATES
from sortd.configuring import mistakes, sources, yaml_tree
from sortd.configuring.sources import find
from sortd.errors import ConfigError
from sortd.files import open_regular

__all__ = ["Abstain", "Config", "DatasetConfig", "Decoding", "Log", "Metrics", "find", "load", "restart_needed"]

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


class Abstain(_Frozen):
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


class Metrics(_Frozen):
    """Where Prometheus finds the counts; nowhere unless said."""

    textfile: Annotated[Path, AfterValidator(_for_the_collector)] | None = None
    http_port: Annotated[int, Field(ge=1, le=65_535)] | None = None


class DatasetConfig(_Frozen):
    """What may differ from dataset to dataset."""

    mode: ModeName = "mixed"
    abstain: Annotated[Abstain | None, BeforeValidator(_not_off)] = Abstain()
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
    metrics: Metrics = Metrics()

    def dataset(self, name: str) -> DatasetConfig:
        """Return what holds for a dataset: its own words over those for all, key by key."""
        everyone = {key: getattr(self, key) for key in DatasetConfig.model_fields}
        own = self.datasets.get(name)
        if own is None:
            return DatasetConfig.model_construct(**everyone)
        said = {key: getattr(own, key) for key in own.model_fields_set}
        both = own.abstain, self.abstain
        if "abstain" in said and isinstance(both[0], Abstain) and isinstance(both[1], Abstain):
            ours = {key: getattr(both[0], key) for key in both[0].model_fields_set}
            said["abstain"] = both[1].model_copy(update=ours)
        return DatasetConfig.model_construct(**(everyone | said))


LIVE_KEYS = frozenset(DatasetConfig.model_fields) | {"datasets", "rescan_seconds", "log.level"}
"""What a running sortd takes over on reload; all else waits for a restart."""

_KEYS = sources.keys_of(Config)
_MAY_BE_EMPTY = {"state_dir", "cache_dir", "text_model", "datasets", "log", "metrics", "decoding"}


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the configuration.

    Args:
        path: the file that the user named, which must be there; None searches (see the top of this module).
        environment: where ``SORTD_...``, ``HOME`` and the folders of XDG and systemd are looked up.

    Raises:
        ConfigError: all that is wrong, a line each: ``file:line:column: key: message``.
    """
    file = find(environment) if path is None else path
    tree = yaml_tree.Tree() if file is None else yaml_tree.parse(_content(file))
    base = Path.cwd() if file is None else Path(os.path.abspath(file)).parent
    values = _mapping(tree)
    _drop_empty(values, tree)
    _refuse_nothing_as_a_folder(values, tree)
    sources.make_absolute(values, base, environment)
    variables, wrong = sources.variables(environment, _KEYS)
    sources.make_absolute(variables, Path.cwd(), environment)
    sources.merge(values, variables)
    try:
        config = Config.model_validate(sources.default_folders(base, environment) | values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            where, message = details["loc"], mistakes.said(details, _KEYS)
            if sources.holds(variables, where):
                wrong[sources.variable_name(where)] = message
            else:
                tree.mistake(where, message)
    if tree.mistakes or wrong:
        raise ConfigError("\n".join(mistakes.lines(file, tree, wrong, _KEYS)))
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
            return opened.read(yaml_tree.MAX_BYTES + 1)
    except OSError as error:
        mend = "name a file that is there, or leave -c out for the defaults"
        if isinstance(error, PermissionError):
            mend = "mend its rights, or ask as the user that sortd runs as"
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; {mend}") from error


def _refuse_nothing_as_a_folder(values: dict[str, Any], tree: yaml_tree.Tree) -> None:
    """Quotes with nothing between would mean the folder of the file, which nobody means."""
    for key in ("root", "state_dir", "cache_dir"):
        if isinstance(values.get(key), str) and not values[key].strip():
            tree.mistake((key,), "must not be empty; name a folder, or take the line away")


def _mapping(tree: yaml_tree.Tree) -> dict[str, Any]:
    """Return the values of a document; one of comments only has none."""
    if isinstance(tree.value, dict):
        return tree.value
    if tree.value is not None:
        tree.mistake((), "must be lines of `key: value`")
    return {}


def _drop_empty(values: dict[str, Any], tree: yaml_tree.Tree, above: yaml_tree.Path = ()) -> None:
    """Take keys without a value away; where no value does not plainly mean the default, that is a mistake."""
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
