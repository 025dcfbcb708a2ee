"""Looks once a day for images in Review/ that could be a class of their own, by ``sortd groups`` in another process.

The command needs hundreds of megabytes for some seconds, which its process returns.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog

from sortd import logs
from sortd.daemon.limited_process import run_limited
from sortd.daemon.notices import Notice

SECONDS = 1800.0
"""Time limit of the command."""
_JOIN_SECONDS = 3.0


class Proposals:
    """Runs the command in a thread, and posts a notice about each group that was not known before."""

    def __init__(self, command: Sequence[str], post: Callable[[Notice], None]) -> None:
        """Run ``command``, which prints groups as JSON; ``post`` is called in the thread."""
        self._command, self._post = command, post
        self._known: set[str] = (
            set()
        )  # images of the groups that were reported; the id of a group changes with each image
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Begin to look, unless that is under way; returns at once."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._run, name="proposals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the process and the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        with tempfile.TemporaryFile() as output:
            problem = run_limited(
                ["nice", "-n", "19", *self._command],
                b"",
                seconds=SECONDS,
                environment=os.environ,
                is_stopping=self._stopping.is_set,
                output=output,
                folder=None,  # the configuration, and paths in variables, may be relative to it
            )
            output.seek(0)
            content = output.read()
        if self._stopping.is_set():
            return
        if problem is not None:
            structlog.get_logger().warning(logs.NOTIFICATION_FAILED, notification="class_proposed", error=problem)
            return
        for notice in self._new(json.loads(content)):
            self._post(notice)

    def _new(self, found: Mapping[str, Any]) -> Iterator[Notice]:
        for dataset, facts in found["datasets"].items():
            for group in facts["groups"]:
                if group["is_new"] and not self._known.intersection(group["members"]):
                    self._known.update(group["members"])
                    text = (
                        f"{dataset}: {group['size']:,} images in Review/ resemble each other and no class; "
                        f"`sortd groups` shows the group {group['id']}"
                    )
                    shown = {name: group[name] for name in ("id", "size", "nearest_label")}
                    yield Notice("class_proposed", text, dataset, {**shown, "image": group["members"][0]})
