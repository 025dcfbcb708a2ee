"""The part of the configuration about what sortd reports: metrics, notifications and hooks.

The address of a notification is a secret. It is kept as it is written, with ``${NAME}``, and resolved when a message is
sent: commands that send nothing need neither the file nor the variable.
"""

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from datetime import time
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

EventName = Literal[
    "review_pile", "dataset_held", "disk_missing", "accuracy_low", "class_proposed", "daily_summary"
]  # fmt: skip
EVENT_NAMES: tuple[EventName, ...] = get_args(EventName)
UNIX = "unix:"
_DEFAULT_HOST = "127.0.0.1"
_MOST_PORT = 65_535


class Frozen(BaseModel):
    """Base of all parts of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _textfile(path: Path) -> Path:
    if path.suffix != ".prom":
        raise ValueError(f"{path.name!r} does not end in .prom: the textfile collector reads no other file")
    return path


def _is_encodable(path: str) -> bool:
    """Return whether a path can be given to the system: YAML can write halves of characters."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _address(value: str) -> str:
    """Check an address to listen on; see ``MetricsConfig.address``."""
    if value.startswith(UNIX):
        if value == UNIX or "\0" in value or not _is_encodable(value):
            raise ValueError(f"{value!r} names no path")
        return value
    host, _, port = value.rpartition(":")
    try:
        if host:
            ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        is_valid = ("[" in host or ":" not in host) and port.isdecimal() and 1 <= int(port) <= _MOST_PORT
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{value!r} is no address such as 127.0.0.1:9464, [::1]:9464, {UNIX}PATH or a port")
    return value


class MetricsConfig(Frozen):
    """Where Prometheus finds the metrics; by default nowhere."""

    textfile: Annotated[Path, AfterValidator(_textfile)] | None = None
    http: Annotated[str, AfterValidator(_address)] | None = None
    http_port: Annotated[int, Field(ge=1, le=_MOST_PORT)] | None = None

    @model_validator(mode="after")
    def _require_one_address(self) -> "MetricsConfig":
        if self.http is not None and self.http_port is not None:
            raise ValueError("has both http and http_port; keep http")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything reads the metrics."""
        return self != MetricsConfig()

    @property
    def address(self) -> Path | tuple[str, int] | None:
        """The path of a Unix socket, or an IP address and a port, to listen on; None: not."""
        where = self.http or (None if self.http_port is None else str(self.http_port))
        if where is None:
            return None
        if where.startswith(UNIX):
            return Path(where.removeprefix(UNIX))
        host, _, port = where.rpartition(":")
        return host.strip("[]") or _DEFAULT_HOST, int(port)


# ---------------------------------------------------------------- notifications


def _time(value: str) -> str:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
        raise ValueError(f"{value!r} is no time of the day such as 08:00")
    return value


def _times(value: str) -> str:
    begin, _, end = value.partition("-")
    if _time(begin) == _time(end):
        raise ValueError(f"{value!r} begins when it ends; write two times, such as 22:00-07:00")
    return value


def is_address(text: str) -> bool:
    """Tell whether a text is an address, which may contain a password, wherever it was written."""
    return "://" in text


def _file_with_address(value: object) -> object:
    if isinstance(value, str) and is_address(value):
        raise ValueError("is an address, not a file with one; name it `url`")
    return value


def _as_target(value: object) -> object:
    """Return a group of keys; a text alone is its ``url``."""
    return {"url": value} if isinstance(value, str) else value


def _not_empty(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command or not command[0] or any("\0" in word for word in command):
        raise ValueError("the list is empty or has an empty program; it needs the program and its arguments")
    return command


Events = tuple[EventName, ...]


class TargetConfig(Frozen):
    """One address of Apprise, and the events that are sent to it."""

    url: SecretStr | None = None
    url_file: Annotated[Path | None, BeforeValidator(_file_with_address)] = None
    events: Events = EVENT_NAMES

    @model_validator(mode="after")
    def _require_one_url(self) -> "TargetConfig":
        if (self.url is None) == (self.url_file is None):
            raise ValueError("needs either url or url_file")
        if self.url is not None and not self.url.get_secret_value().strip():
            raise ValueError("has an empty url")
        return self


class HookConfig(Frozen):
    """One command, and the events that start it."""

    command: Annotated[tuple[str, ...], AfterValidator(_not_empty)]
    events: Events = EVENT_NAMES
    timeout_seconds: Annotated[float, Field(ge=0.1, le=3600, allow_inf_nan=False)] = 10.0


class NotifyConfig(Frozen):
    """Where notifications go, what they are about, and how many there are at most; hooks follow the same limits."""

    urls: tuple[Annotated[TargetConfig, BeforeValidator(_as_target)], ...] = ()
    review_above: Annotated[int, Field(ge=1)] = 100
    summary_at: Annotated[str, AfterValidator(_time)] = "08:00"
    messages_per_hour: Annotated[int, Field(ge=1, le=3600)] = 20
    quiet_hours: Annotated[str, AfterValidator(_times)] | None = None

    @property
    def quiet(self) -> tuple[time, time] | None:
        """The begin and end of the hours without messages, in local time."""
        if self.quiet_hours is None:
            return None
        begin, _, end = self.quiet_hours.partition("-")
        return time.fromisoformat(begin), time.fromisoformat(end)


Target = TargetConfig | HookConfig


def targets_of(notify: NotifyConfig, hooks: Sequence[HookConfig]) -> Mapping[str, Target]:
    """Return the addresses and hooks by names that contain no secret: the key, and a hook's program."""
    urls = {f"notify.urls.{at}": target for at, target in enumerate(notify.urls)}
    return {**urls, **{f"hooks.{at} ({hook.command[0]})": hook for at, hook in enumerate(hooks)}}
