"""The command ``notify``: where notifications go, and a test message; and the findings of `sortd check` about them."""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from sortd.commands.console import print_line, print_table, printable, show
from sortd.commands.findings import Finding, error, note, warning
from sortd.config import Config
from sortd.config_reporting import HookConfig, TargetConfig, targets_of
from sortd.daemon.notices import Notice
from sortd.daemon.sender import address_of, deliver
from sortd.errors import ConfigError
from sortd.layout import Layout

EXIT_FAILED = 69
"""EX_UNAVAILABLE of sysexits.h: a target did not take the test message."""


def show_notifications(config: Config, *, is_test: bool, as_json: bool) -> int:
    """Print the targets and, with ``is_test``, whether each took a test message; return the exit code.

    Raises ConfigError: a test message is asked for, and there is no target.
    """
    targets = targets_of(config.notify, config.hooks)
    if is_test and not targets:
        raise ConfigError("no target is configured; add `notify.urls` or `hooks`, see config.example.yaml")
    rows: list[dict[str, Any]] = [{"target": name, "events": list(target.events)} for name, target in targets.items()]
    if is_test:
        notice = Notice("test", f"This is a test message of sortd on {socket.gethostname()}.")
        for row, target in zip(rows, targets.values(), strict=True):
            row["problem"] = deliver(target, notice, os.environ, local=datetime.now().astimezone())
    limits = {"messages_per_hour": config.notify.messages_per_hour, "quiet_hours": config.notify.quiet_hours}
    show({"targets": rows, **limits}, _print_targets, as_json=as_json)
    return EXIT_FAILED if any(row.get("problem") for row in rows) else 0


def _print_targets(facts: Mapping[str, Any]) -> None:
    is_test = any("problem" in row for row in facts["targets"])
    columns = ("target", "result") if is_test else ("target", "events")
    rows = [
        (row["target"], (row["problem"] or "sent") if is_test else ", ".join(row["events"])) for row in facts["targets"]
    ]
    print_table(columns, rows)
    quiet = f", none at {facts['quiet_hours']}" if facts["quiet_hours"] else ""
    print_line(printable(f"at most {facts['messages_per_hour']} messages an hour{quiet}"))


def notification_findings(config: Config, _layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that hooks can be started, and that addresses can be read; nothing is sent."""
    targets = targets_of(config.notify, config.hooks)
    if config.notify.urls and find_spec("apprise") is None:
        yield error("notify", "Apprise is not installed", "pip install 'sortd-images[notify]'")
    for name, target in targets.items():
        match target:
            case HookConfig(command=(program, *_)) if shutil.which(program) is None:
                yield error(name, f"{program} is missing or not executable", "correct its path or its permissions")
            case TargetConfig():
                try:
                    address_of(target, os.environ)
                except ConfigError as problem:
                    found = warning if target.url is not None else error
                    yield found(name, str(problem), "correct it for the user and the environment that sortd runs with")
    if targets:
        yield note("notify", f"{len(targets)} targets are configured", "sortd notify --test")
