"""Checks of what runs and what would run: another sortd, the model, the datasets that the configuration names."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sortd.commands.console import counted, megabytes
from sortd.commands.finding import Finding, Topic, error, note, warning
from sortd.commands.journals import JOURNAL_FILE
from sortd.commands.promotion import compared, serving_facts, waiting_model
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.models import STRONGER
from sortd.errors import JournalError, ModelError, StartupError
from sortd.images.decode import load_decoders
from sortd.journaling.history import History
from sortd.layout import Layout
from sortd.status import read_status

_LOCK = re.compile(r"^\d+: \S+\s+\S+\s+WRITE\s+(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ")
"""A line of /proc/locks, see proc(5): number, kind, advisory, access, pid, device:inode, range."""


def process_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Tell whether a sortd runs already, with this state directory or with another one."""
    try:
        status = read_status(config.state_dir)
    except StartupError as refusal:
        yield error(Topic.PROCESS, config.state_dir, str(refusal))
        return
    own = status["pid"] if status is not None and status["alive"] else None
    if own is not None:
        yield note(Topic.PROCESS, config.state_dir, f"sortd runs already (pid {own}); see `sortd status`")
    if own is not None and status is not None:
        yield from _held_findings(status)
    for layout in layouts:
        holder = lock_holder(layout.marker / "lock")
        if holder is not None and holder != own:
            what = f"is worked on by another process (pid {holder}), which keeps its state elsewhere"
            mend = f"stop that one, or use its configuration; {layout.marker}/state names its folder"
            yield warning(Topic.PROCESS, layout.root, what, mend)
    if os.geteuid() == 0:
        owners = {layout.root.stat().st_uid for layout in layouts} - {0}
        if owners:
            what = "this check ran as root, who may do everything; what it says of rights holds for root alone"
            yield note(Topic.PROCESS, "user", what, "run it as the user that sortd runs as: sudo -u USER sortd check")


def _held_findings(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Tell which datasets the sortd that runs holds, and why."""
    for name, facts in status.get("datasets", {}).items():
        if facts.get("held_since"):
            what = f"is held, nothing in it is moved: {facts['problem']}"
            yield error(Topic.PROCESS, name, what, "sortd takes it up again by itself once this is mended")


def journal_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Read a dataset's journal, all of it: what it cannot say keeps the dataset from being worked on."""
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not os.path.lexists(file):
        return
    try:
        with History.open(file) as history:
            history.verify()
            history.unfinished()
            history.held()
    except JournalError as refusal:
        yield error(Topic.PROCESS, layout.root, str(refusal))


def decoder_findings() -> Iterator[Finding]:
    """Name the image formats that cannot be decoded here: their images would stay in Images/."""
    for missing in load_decoders():
        what, _, mend = missing.partition("; ")
        yield error(Topic.MACHINE, "decoding", what, mend)


def model_findings(config: Config, *, packaged: Path = models.PACKAGED) -> Iterator[Finding]:
    """Tell which model would be used, or how to get the one that is wanted."""
    try:
        model = models.locate_clip(config.model, cache_dir=config.cache_dir, packaged=packaged)
    except ModelError as refusal:
        yield error(Topic.MODEL, f"model: {config.model}", str(refusal))
        return
    what = f"is {model.name}, a {model.kind} of {megabytes(model.size_bytes)} in {model.folder}"
    yield note(Topic.MODEL, f"model: {config.model}", what)
    if config.model == "auto" and model.name == "packaged":
        mend = f"sortd models fetch {STRONGER}"
        yield note(Topic.MODEL, "model: auto", f"{STRONGER}, which is stronger, is not on this machine", mend)
    if config.text_model is not None:
        try:
            models.locate_text(config.text_model, cache_dir=config.cache_dir)
        except ModelError as refusal:
            yield error(Topic.MODEL, f"text_model: {config.text_model}", str(refusal))


def classifier_findings(config: Config, layout: Layout) -> Iterator[Finding]:
    """Tell who would decide a dataset, what is expected of it, and why a fine-tuned model that is wanted may not."""
    serving = serving_facts(config, layout)
    subject = f"classifier: {serving['classifier']}"
    if serving["refusal"] is not None:
        what = f"the prototypes decide {layout.name}: {serving['refusal']}"
        mend = f"or let the prototypes decide for good: sortd models demote --dataset {layout.name}"
        yield warning(Topic.MODEL, subject, what, mend)
    elif serving["deciding"] == "finetuned":
        what = f"{layout.name} is decided by the fine-tuned model in {serving['folder']} ({serving['model_id']})"
        expected = serving["expected"]
        if expected["filed"] is not None:
            what += f"; of {counted(expected['held_out'], 'image')} held out it would file {expected['filed']:.0%}"
        if expected["right"] is not None:
            what += f", {expected['right']:.1%} of them right"
        yield note(Topic.MODEL, subject, what)
        for sentence in expected["notes"]:
            yield warning(Topic.CALIBRATION, layout.root, sentence, "fine-tune with more images, or ask for less")
    elif serving["folder"] is not None:
        what = f"the prototypes decide {layout.name}, though the model in {serving['folder']} was promoted"
        yield note(Topic.MODEL, subject, what, "set `classifier: auto` to let it decide")
    elif (waiting := waiting_model(config, layout)) is not None:
        what = f"the prototypes decide {layout.name}, and a fine-tuned model is stronger ({compared(waiting)})"
        yield note(Topic.MODEL, subject, what, f"sortd models promote --dataset {layout.name}")


def named_dataset_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Find settings for datasets that are not there: most often a name that was misspelt."""
    there = [layout.name for layout in layouts]
    for name in config.datasets:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            mend = f"did you mean {near[0]}?" if near else f"make it (sortd init {config.root}/{name}) or take it out"
            yield warning(
                Topic.CONFIGURATION, f"datasets.{name}", f"there is no dataset of that name in {config.root}", mend
            )


def lock_holder(lock: Path, *, table: Path = Path("/proc/locks")) -> int | None:
    """Return the number of the process that holds a lock file, without touching the lock; None if nobody does.

    Taking it, be it for a moment, could make a sortd that starts just then give up.
    """
    try:
        inode = lock.stat().st_ino
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        found = _LOCK.match(line)
        if found and int(found[2]) == inode and _has_open(int(found[1]), lock):
            return int(found[1])
    return None


def _has_open(pid: int, path: Path) -> bool:
    """Tell whether a process has a file open; of another user's it is believed: equal inodes on two disks are rare."""
    folder = f"/proc/{pid}/fd"
    real = os.path.realpath(path)
    try:
        return any(os.path.realpath(f"{folder}/{name}") == real for name in os.listdir(folder))
    except PermissionError:
        return True
    except OSError:
        return False
