"""The process that exports a model: what it is asked, what it says meanwhile, and how long anybody waits for it.

It writes the step that it is at to stdout, a line each, and what went wrong to stderr, in the last line.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from sortd.encoding.model_folders import ModelFolder, complete, vouch
from sortd.errors import ModelError

STEPS = (
    "loading it in torch",
    "writing its text tower",
    "writing its vision tower",
    "holding both against torch",
    "trying it in int8",
)
"""What an export does, in order; each takes about as long as the others."""

EXPORTER = (sys.executable, "-P", "-m", "sortd.encoding.onnx_export")
EXPORT_SECONDS = 1800.0
"""Far beyond what the largest model takes on a slow disk; a child that needs longer hangs."""
LOOK_SECONDS = 0.5
"""How often whoever waits looks whether the program still goes on."""
STOPPED = "was given up, for sortd was stopped"

Tell = Callable[[str], None]
"""Is told what is under way, in a few words, again and again while it is."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be exported, and how."""

    model: ModelFolder
    words: ModelFolder | None
    identity: str
    into: Path
    """An empty folder."""
    least_gain: float

    def to_json(self) -> str:
        """Return it as an argument for another process."""
        words = None if self.words is None else [self.words.name, str(self.words.folder)]
        facts = {"model": [self.model.name, str(self.model.folder)], "words": words, "identity": self.identity}
        return json.dumps(facts | {"into": str(self.into), "least_gain": self.least_gain})

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Return what ``to_json`` wrote.

        Raises:
            ModelError: a model is not as it was.
        """
        said = json.loads(text)
        words = said["words"]
        return cls(
            vouch(said["model"][0], Path(said["model"][1])),
            None if words is None else complete(words[0], Path(words[1])),
            said["identity"],
            Path(said["into"]),
            said["least_gain"],
        )


def export_seconds(model: ModelFolder, words: ModelFolder | None) -> int:
    """Return about how long an export takes, for whoever waits: seconds, from what it took on two busy cores."""
    size = model.size_bytes + (words.size_bytes if words is not None else 0)
    return 10 * round((15 + size / 10e6) / 10)


def run_child(request: Request, tell: Tell, *, command: Sequence[str] = EXPORTER) -> None:
    """Carry a request out in a process of its own.

    Args:
        request: what is to be done; the last argument of the command.
        tell: is told the step at hand, twice a second.
        command: what does it.

    Raises:
        ModelError: what that process complained of, or that it hung.
    """
    name = request.model.name
    child = subprocess.Popen(  # noqa: S603 -- our own interpreter and module, no shell
        [*command, request.to_json()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    with child:
        complaint = heard(child, name, tell)
    if child.returncode == -signal.SIGKILL:
        raise ModelError(
            f"cannot export {name!r} to ONNX: the process that did it was killed, as the kernel does when memory runs "
            f"out (it needs several times the model's size); set `backend: torch`"
        )
    if child.returncode:
        said = [line for line in complaint.splitlines() if line.strip()] or [f"it ended with {child.returncode}"]
        raise ModelError(f"cannot export {name!r} to ONNX: {said[-1].strip()}; or set `backend: torch`")


def heard(child: "subprocess.Popen[str]", name: str, tell: Tell) -> str:
    """Wait for a child, as long as somebody waits for it; return what it said on stderr.

    Raises:
        ModelError: nobody does any more, or it hung; it has been ended.
    """
    until = monotonic() + EXPORT_SECONDS
    while is_awaited() and monotonic() < until:
        try:
            return child.communicate(timeout=LOOK_SECONDS)[1]
        except subprocess.TimeoutExpired as late:
            tell(_step(late.output))
    child.kill()
    why = f"took over {EXPORT_SECONDS:.0f} s and was ended; set `backend: torch`" if is_awaited() else STOPPED
    raise ModelError(f"exporting {name!r} to ONNX {why}")


def _step(output: bytes | str | None) -> str:
    """Return what a child is at, by all that it has written to stdout so far."""
    text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
    steps = [line for line in text.splitlines() if line in STEPS] or [STEPS[0]]
    return f"step {STEPS.index(steps[-1]) + 1} of {len(STEPS)}, {steps[-1]}"


def is_awaited() -> bool:
    """Tell whether the program goes on: its end joins the thread that asks, which may be long at work for nobody."""
    return threading.main_thread().is_alive()
