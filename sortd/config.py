"""Read a YAML file and ``SORTD_...`` variables into one frozen configuration, or report all mistakes in them.

Unless a file is given, the first of these is read: ``./config.yaml``, ``$XDG_CONFIG_HOME/sortd/config.yaml``
(``~/.config``), ``/etc/sortd/config.yaml``; without any, the defaults hold, with ``./Data`` as the root. Relative paths
in a file are relative to its folder, those in variables to the working directory.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from sortd import config_yaml
from sortd.config_reporting import UNIX, Frozen, HookConfig, MetricsConfig, NotifyConfig, TargetConfig, is_address
from sortd.config_variables import ANY, generic_key, holds, merge, variable_name, variables_in
from sortd.errors import ConfigError
from sortd.events import Action
from sortd.files import open_regular

DEFAULT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
)
"""The seven templates of Tip-Adapter and CoOp for ImageNet, and CLIP's default."""

OFF = {"off", "no", "false"}
BACKENDS = ("auto", "torch", "onnx")
SOCKET = "socket:"  # before the path of the socket of `sortd encode`, in the place of a backend
FOREVER = "forever"
_SPAN = re.compile(r"([7-9]|[1-9]\d{1,4})d|[1-9]\d{0,3}w|[1-9]\d{0,2}y")
_DAY_SECONDS = 86_400.0
SOCKET_PATH_BYTES = 107  # see unix(7)

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.1, le=86_400, allow_inf_nan=False)]
ModeName = Literal["avg", "max", "mean", "text", "best", "mixed"]


def _not_off(value: object) -> object:
    """Return None for `off`, which YAML 1.1 and pydantic would read as False."""
    is_off = value is False or (isinstance(value, str) and value.casefold() in OFF)
    return None if is_off else value


def _strangers(value: object) -> object:
    """Return `auto` or a share; a union type would report two errors, one for each member."""
    if value == "auto":
        return value
    try:
        share = float(str(value))
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{value!r} is neither auto nor a share between 0 and 1")
    return share


def _template(value: object) -> object:
    if isinstance(value, str) and "{}" not in value:
        raise ValueError(f"{value!r} has no {{}} for the name of the class")
    return value


def _not_empty(templates: tuple[str, ...]) -> tuple[str, ...]:
    if not templates:
        raise ValueError("the list is empty; it needs at least one sentence")
    return templates


def _span(value: str) -> str:
    if value != FOREVER and not _SPAN.fullmatch(value):
        raise ValueError(f"{value!r} is not a time such as 90d, 8w or 2y, of at least 7 days, and not forever")
    return value


def _backend(value: str) -> str:
    if value.startswith(SOCKET):
        path = value.removeprefix(SOCKET)
        if not path or len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            raise ValueError(f"{value!r} names no path of at most {SOCKET_PATH_BYTES} bytes, as a socket has")
    elif value not in BACKENDS:
        allowed = (*BACKENDS, f"{SOCKET}PATH")
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}{_meant(value, allowed)}")
    return value


class AbstainConfig(Frozen):
    """Conditions under which an image is filed."""

    precision: Share = 0.95
    strangers: Annotated[Literal["auto"] | float, BeforeValidator(_strangers)] = "auto"


class Decoding(Frozen):
    """How images are decoded, and the limits."""

    jpeg: Literal["draft", "full"] = "draft"
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    timeout_seconds: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 20.0
    max_pixels: Annotated[int, Field(ge=4096)] = 50_000_000
    max_side_pixels: Annotated[int, Field(ge=64)] = 40_000
    max_bytes: Annotated[int, Field(ge=4096)] = 500_000_000


class Log(Frozen):
    """Format and level of the log."""

    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class JournalConfig(Frozen):
    """How long moves stay in the journal."""

    keep: Annotated[str, AfterValidator(_span)] = "2y"

    @property
    def keep_seconds(self) -> float | None:
        """The time in seconds, with years of 365 days; None: forever."""
        days = {"d": 1, "w": 7, "y": 365}
        return None if self.keep == FOREVER else int(self.keep[:-1]) * days[self.keep[-1]] * _DAY_SECONDS


class DatasetConfig(Frozen):
    """The keys that can differ between datasets."""

    mode: ModeName = "mixed"
    abstain: Annotated[AbstainConfig | None, BeforeValidator(_not_off)] = AbstainConfig()
    classifier: Literal["auto", "prototypes", "finetuned"] = "auto"
    prompts: Annotated[tuple[Annotated[str, BeforeValidator(_template)], ...], AfterValidator(_not_empty)] = (
        DEFAULT_TEMPLATES
    )
    learn_from_corrections: bool = False
    settle_seconds: Seconds = 1.0
    companions: bool = True
    action: Action = "move"
    rejected: Literal["move", "leave"] = "move"
    emptied_folders: Literal["keep", "remove"] = "keep"
    guard: bool = True
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    backlog_limit: Annotated[int, Field(ge=100, le=10_000_000)] = 100_000


class Config(DatasetConfig):
    """The whole configuration: the keys of the program, and the values for datasets without their own."""

    root: Path
    state_dir: Path
    cache_dir: Path
    cache_megabytes: Annotated[int, Field(ge=10)] = 1000
    datasets: Mapping[str, DatasetConfig] = {}
    model: Annotated[str, Field(min_length=1)] = "auto"
    text_model: Annotated[str, Field(min_length=1)] | None = None
    backend: Annotated[str, AfterValidator(_backend)] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    rescan_seconds: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = 300.0
    polling: Literal["auto", "always", "never"] = "auto"
    polling_seconds: Annotated[float, Field(ge=0.5, le=86_400, allow_inf_nan=False)] = 5.0
    decoding: Decoding = Decoding()
    log: Log = Log()
    journal: JournalConfig = JournalConfig()
    metrics: MetricsConfig = MetricsConfig()
    notify: NotifyConfig = NotifyConfig()
    hooks: tuple[HookConfig, ...] = ()

    @property
    def encoder_socket(self) -> Path | None:
        """The socket of the encoder service; None if the model is loaded in this process."""
        return Path(self.backend.removeprefix(SOCKET)) if self.backend.startswith(SOCKET) else None

    def dataset(self, name: str) -> DatasetConfig:
        """Return the configuration of a dataset: its own keys, and the general values of all others."""
        general = {key: getattr(self, key) for key in DatasetConfig.model_fields}
        found = self.datasets.get(name)
        own = {} if found is None else {key: getattr(found, key) for key in found.model_fields_set}
        abstain = own.get("abstain")
        if abstain is not None and self.abstain is not None:
            own["abstain"] = self.abstain.model_copy(update=abstain.model_dump(exclude_unset=True))
        return DatasetConfig.model_construct(**(general | own))


LIVE_KEYS = frozenset(DatasetConfig.model_fields) | {
    "datasets",
    "rescan_seconds",
    "journal",
    "log.level",
    "notify",
    "hooks",
}
"""The keys that a running sortd applies on reload, with ``metrics`` if any were on; the others need a restart."""

_GROUPS: Final[Mapping[str, type[BaseModel]]] = {
    name: type(field.default) for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)
}
_LISTS: Final[Mapping[tuple[str | int, ...], type[BaseModel]]] = {
    ("notify", "urls"): TargetConfig,
    ("hooks",): HookConfig,
}
"""The lists of groups of keys; they are set as a whole."""
_MAY_BE_EMPTY = {"state_dir", "cache_dir", "text_model", "datasets", "hooks", *_GROUPS} - {"abstain"}


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
    """Read a file that must exist, or the one that is found (see the module's docstring), and the environment.

    Raises:
        ConfigError: all mistakes, each as a line ``file:line:column: key: message``.
    """
    file = find_config_file(environment) if path is None else path
    tree = config_yaml.Tree() if file is None else config_yaml.parse(_content(file))
    base = Path.cwd() if file is None else Path(os.path.abspath(file)).parent
    values = tree.value if isinstance(tree.value, dict) else {}
    if tree.value is not None and not isinstance(tree.value, dict):
        tree.mistake((), "must be lines of `key: value`")
    _drop_empty(values, tree)
    _make_absolute(values, base, environment)
    variables, wrong = variables_in(environment, KEYS)
    _make_absolute(variables, Path.cwd(), environment)
    merge(values, variables)
    try:
        config = Config.model_validate(_default_folders(base, environment) | values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            where, message = details["loc"], _message(details)
            if holds(variables, where):
                wrong[variable_name(where)] = message
            else:
                tree.mistake(where, message)
    if tree.mistakes or wrong:
        raise ConfigError("\n".join(_lines(file, tree, wrong)))
    return config


def restart_needed(old: Config, new: Config) -> list[str]:
    """Return the keys that differ from those at the start and that a running sortd does not apply on reload."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    live = LIVE_KEYS | ({"metrics"} if old.metrics.is_on else set())
    return sorted(key for key in changed if not {key, key.partition(".")[0]} & live)


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
        advice = "name an existing file, or omit -c to use the defaults"
        if isinstance(error, PermissionError):
            advice = "correct its permissions, or run the command as the user that runs sortd"
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; {advice}") from error


def _drop_empty(values: dict[str, Any], tree: config_yaml.Tree, above: config_yaml.Path = ()) -> None:
    """Remove keys without a value; report those that must have one."""
    for key, value in list(values.items()):
        path = (*above, key)
        if isinstance(value, dict):
            _drop_empty(value, tree, path)
        if value is None:
            del values[key]
            may_be_empty = (
                key in _MAY_BE_EMPTY if not above else above[0] in {"metrics", "notify", "datasets"} and len(above) == 1
            )
            if not may_be_empty and all(mistake.path != path for mistake in tree.mistakes):
                tree.mistake(path, "has no value; give it one or remove the line")
        elif path in {("root",), ("state_dir",), ("cache_dir",)} and isinstance(value, str) and not value.strip():
            tree.mistake(path, "must not be empty; name a folder, or remove the line")


# ---------------------------------------------------------------- folders and variables


def find_config_file(environment: Mapping[str, str]) -> Path | None:
    """Return the file that is read if none is given: the working directory's, the user's, the machine's or None."""
    places = (Path("config.yaml"), config_file_of_user(environment), Path("/etc/sortd/config.yaml"))
    return next((place for place in places if place is not None and os.path.isfile(place)), None)


def config_file_of_user(environment: Mapping[str, str]) -> Path | None:
    """Return the path of the user's configuration, which need not exist; None without a home."""
    own = _folder_of_xdg("XDG_CONFIG_HOME", ".config", environment)
    return None if own is None else Path(own, "config.yaml")


def _default_folders(base: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the default root, and those of state and cache if systemd, XDG or HOME give one.

    systemd may list several folders; the first is sortd's.
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
    """Return sortd's folder by the XDG specification, which requires relative values to be ignored."""
    named, home = environment.get(variable, ""), environment.get("HOME", "")
    if os.path.isabs(named):
        return os.path.join(named, "sortd")
    return os.path.join(home, below_home, "sortd") if os.path.isabs(home) else None


def _make_absolute(values: dict[str, Any], base: Path, environment: Mapping[str, str]) -> None:
    """Make the paths among the values absolute; a model is a path if it looks like one or such a folder exists."""
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
    _make_reporting_absolute(values, base, environment)
    backend = values.get("backend")
    if isinstance(backend, str) and (path := backend.removeprefix(SOCKET)) not in {backend, ""}:
        values["backend"] = SOCKET + _absolute(path, base, environment)


def _make_reporting_absolute(values: Mapping[str, Any], base: Path, environment: Mapping[str, str]) -> None:
    """Make the paths of a socket, of files with an address, and of programs with a folder in their name absolute."""
    metrics, notify = (found if isinstance(found := values.get(key), dict) else {} for key in ("metrics", "notify"))
    if isinstance(where := metrics.get("http"), str) and (path := where.removeprefix(UNIX)) not in {where, ""}:
        metrics["http"] = UNIX + _absolute(path, base, environment)
    for target in _groups_in(notify.get("urls")):
        if isinstance(file := target.get("url_file"), str) and file and not is_address(file):
            target["url_file"] = _absolute(file, base, environment)
    for hook in _groups_in(values.get("hooks")):
        command = hook.get("command")
        if isinstance(command, list) and command and isinstance(command[0], str) and "/" in command[0]:
            command[0] = _absolute(command[0], base, environment)


def _groups_in(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _absolute(path: str, base: Path, environment: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        path = environment.get("HOME", "~") + path[1:]
    return os.path.normpath(base / path)


# ---------------------------------------------------------------- messages


_WANTED = {
    "float_parsing": "is not a number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "bool_parsing": "is neither yes nor no",
    "string_pattern_mismatch": "is none of auto, cpu, cuda, cuda:0, mps",
    "tuple_type": "is not a list; write one `- ...` line for each",
}
_GROUP_WANTED = {"model_type", "model_attributes_type", "dict_type", "mapping_type"}


def _lines(file: Path | None, tree: config_yaml.Tree, wrong: Mapping[str, str]) -> list[str]:
    """Return a line for each mistake in the file, in order, then one for each mistake in a variable."""
    known = [variable_name(key) for key in KEYS if ANY not in key]
    found = []
    for mistake in sorted(tree.mistakes, key=lambda mistake: (mistake.line, mistake.column)):
        parts = ("..." if is_address(str(part)) else str(part) for part in mistake.path)  # an address is a secret
        key = f"{'.'.join(parts)}: " if mistake.path else ""
        place = "" if file is None else f"{file}:{mistake.line}:{mistake.column}: "
        found.append(f"{place}{key}{mistake.message}")
    for name, message in wrong.items():
        meant = _meant(name, known, likeness=0.8) if message.startswith("unknown") else ""
        found.append(f"{name}: {message}{meant}")
    return found


def _message(details: ErrorDetails) -> str:
    """Return the message for one of pydantic's errors."""
    path, given, context, kind = details["loc"], details["input"], details.get("ctx", {}), details["type"]
    quoted = "the value" if path[:2] == ("notify", "urls") else repr(given)  # an address is a secret
    match kind:
        case "extra_forbidden":
            parent = generic_key(path)[:-1]
            group = next((_LISTS[path[:at]] for at in (1, 2) if path[:at] in _LISTS), None)
            known = (key[-1] for key in KEYS if key[:-1] == parent and key[-1] != ANY)
            siblings = sorted(known if group is None else group.model_fields)
            is_for_all = path[0] == "datasets" and path[2:] in KEYS
            meant = "; it cannot differ between datasets" if is_for_all else _meant(str(path[-1]), siblings)
            message = f"unknown key{meant}"
        case "literal_error" if isinstance(given, str):
            allowed = [word.strip("' ") for word in str(context["expected"]).replace(" or ", ",").split(",")]
            word = "the value" if is_address(given) else repr(given)
            message = f"{word} is none of {', '.join(allowed)}{_meant(given, allowed)}"
        case "value_error":
            message = str(context["error"])
        case _ if kind in _GROUP_WANTED:
            message = "must be a group of keys, indented below it" + (", or `off`" if path[-1] == "abstain" else "")
        case "missing" if len(path) > 1:
            message = "is missing; add it"
        case "missing":
            message = "has no default, since neither HOME nor a folder of systemd is set; add it"
        case "string_too_short":
            message = "must not be empty"
        case _ if kind in _WANTED:
            message = f"{quoted} {_WANTED[kind]}"
        case _ if kind == "literal_error" or kind.endswith("_type"):
            message = "must be one value, not a list or a group of keys"
        case _:
            message = f"{quoted} {details['msg'].replace('Input should', 'should')}"
    return message


def _meant(word: str, known: Sequence[str], *, likeness: float = 0.6) -> str:
    near = (difflib.get_close_matches(written, known, 1, likeness) for written in (word, word.casefold(), word.upper()))
    return next((f"; did you mean {found[0]}?" for found in near if found), "")
