"""The status file: what a running sortd tells of itself, for ``sortd status``; written beside and renamed."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sortd import mends
from sortd.errors import StartupError

STATUS_FILE = "status.json"


class Status:
    """The status file in the state directory; written by the loop, only when something changed."""

    def __init__(self, state: Path, *, clock: Any = time.time) -> None:  # noqa: ANN401 -- any function of no arguments
        """Write into ``state``, which is made at the first write."""
        self._path = state / STATUS_FILE
        self._clock = clock
        self._last: Mapping[str, Any] | None = None

    def write(self, facts: Mapping[str, Any]) -> bool:
        """Write the facts if they differ from the last ones; tell whether they did.

        Raises:
            OSError: the state directory cannot be written.
        """
        if facts == self._last:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        text = json.dumps({**facts, "written_at": round(self._clock(), 3)}, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self._path)
        self._last = dict(facts)
        return True


def read_status(state: Path) -> dict[str, Any] | None:
    """Return what the last running sortd told, with ``alive``: whether that process still is; None if none ever ran.

    Raises:
        StartupError: the state directory cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((state / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except PermissionError as error:
        raise StartupError(
            f"{state} cannot be read: {error.strerror}; ask as the user that sortd runs as, or as root"
        ) from error
    except OSError as error:
        raise StartupError(mends.unreadable(error)) from error
    facts["alive"] = bool(facts.get("running")) and is_alive(int(facts.get("pid", 0)), facts.get("started_ticks"))
    return facts


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def is_alive(pid: int, ticks: int | None) -> bool:
    """Tell whether the process of that number is still the one that started then: numbers are used again."""
    return pid > 0 and ticks is not None and started_ticks(pid) == ticks
