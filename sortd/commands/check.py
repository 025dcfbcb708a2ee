"""Check the configuration, the folders above the datasets, and this machine: disks, watching, processes and the model.

The checks create temporary files in sortd's own folders. No check imports torch, except the comparison of a separate
text model with its CLIP. ``check_dataset`` has the checks of each dataset.
"""

import difflib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Final

from sortd import errors
from sortd.commands.check_dataset import (
    DATASET_CHECKS,
    DECODING_SECONDS,
    READ_AND_ENTER,
    TARGETS,
    WRITE_AND_ENTER,
    entries_of,
    reference_findings,
    user_name,
    write_problem,
)
from sortd.commands.console import counted, megabytes
from sortd.commands.findings import Finding, Topic, error, note, warning
from sortd.commands.groups import label_findings
from sortd.commands.models import EXPORT_MISSING, backend_facts, verdict_sentence
from sortd.commands.moves import datasets_there
from sortd.commands.notify import notification_findings
from sortd.config import Config, read_config
from sortd.daemon.endpoint import listening_socket, text_of_address
from sortd.encoder import models
from sortd.encoder.backends import connect
from sortd.encoder.clip import TorchEncoder
from sortd.encoder.models import STRONGER, LocatedModel
from sortd.encoder.onnx_encoder import find_exports, is_installed
from sortd.errors import ConfigError, JournalError, ModelError, StartupError
from sortd.files import identity_of
from sortd.images.decode import load_decoders
from sortd.layout import Area, Layout, inside_dataset, nested_datasets, root_problem
from sortd.service import lock_holder, read_status
from sortd.watch import inotify

LITTLE_ROOM_BYTES = 1_000_000_000
NO_ROOM_BYTES = 50_000_000
LITTLE_ROOM_SHARE = 0.02
LEAST_INODES = 1000
EARLIEST_SECONDS = 1_735_689_600.0
"""2025-01-01: a clock that shows an earlier time is wrong."""


def check_all(
    path: Path | None, environment: Mapping[str, str], *, decoding_seconds: float = DECODING_SECONDS
) -> Iterator[Finding]:
    """Yield the mistakes of a configuration or, if it is valid, the findings of every check.

    An error of the system, the journal or the status file becomes a finding and stops no other check.
    """
    try:
        config = read_config(path, environment)
    except ConfigError as mistakes:
        yield from (error("configuration", line, "", Topic.CONFIGURATION) for line in str(mistakes).splitlines())
        return
    layouts = datasets_there(config)  # root_findings reports why there are none
    checks = [(topic, check(config, layouts)) for check, topic in SITE_CHECKS.items()]
    for layout in layouts:
        checks += [(topic, check(config, layout)) for check, topic in DATASET_CHECKS.items()]
        checks.append((Topic.REFERENCES, reference_findings(config, layout, decoding_seconds=decoding_seconds)))
        checks.append((Topic.REFERENCES, label_findings(config, layout)))
    for topic, found in checks:
        try:
            yield from (replace(one, topic=one.topic or topic) for one in found)
        except (StartupError, JournalError) as refusal:
            yield error(config.state_dir, str(refusal), "", topic)
        except OSError as refusal:
            advice = errors.advice_for(refusal)
            if isinstance(refusal, PermissionError):
                advice = "correct its permissions, or check as the user that runs sortd: sudo -u USER sortd check"
            what = f"cannot be checked: {refusal.strerror or refusal}"
            yield error(refusal.filename, what, advice, Topic.FOLDERS)


# ---------------------------------------------------------------- folders


def root_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the folder that holds the datasets, and the dataset names in the configuration."""
    root, names = config.root, [layout.name for layout in layouts]
    for name in config.datasets.keys() - set(names):
        near = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {near[0]}?" if near else f"create it (sortd init {root}/{name}) or remove the key"
        yield warning(f"datasets.{name}", f"{root} holds no dataset of that name", advice, Topic.CONFIGURATION)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is missing"
        yield error(root, what, "create it, mount its disk, or set `root` to the folder of your datasets")
        return
    if not os.access(root, READ_AND_ENTER, effective_ids=True):
        yield error(root, "cannot be listed", f"give {user_name()} permission to read and enter it")
        return
    problem = root_problem(root)
    if problem is not None:
        yield error(root, problem.what, problem.advice)
    for nested in nested_datasets(root):
        yield warning(nested.folder, nested.what, nested.advice)
    if not layouts and problem is None:
        yield warning(root, "has no dataset, that is, no folder with a Clases/", f"create one: sortd init {root}/NAME")
    for entry in os.scandir(root):
        if entry.is_symlink() and Layout(Path(entry.path)).is_dataset:
            advice = "move the folder itself below the root, or mount it there (mount --bind)"
            yield warning(entry.path, "is a symbolic link, so it is not used as a dataset", advice)


def own_folder_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that sortd can write its own folders, and that none of them lies in a dataset."""
    folders = {"state_dir": config.state_dir, "cache_dir": config.cache_dir}
    for key, own in folders.items():
        for area in (layout.area(area) for layout in layouts for area in Area):
            if Path(os.path.realpath(area)) in Path(os.path.realpath(own)).parents:
                yield error(own, f"`{key}` lies inside {area}", f"set `{key}` to a folder outside every dataset")
    if config.metrics.textfile is not None:
        folders["metrics.textfile"] = config.metrics.textfile.parent
    for key, own in folders.items():
        above = next(parent for parent in own.parents if parent.exists())
        if own.is_dir():
            if problem := write_problem(own):
                yield error(own, f"`{key}` cannot be written: {problem}", f"chown it to {user_name()}")
        elif own.exists() or not above.is_dir():
            yield error(own, f"`{key}` cannot be a folder: a file is in the way", f"set `{key}` to another folder")
        elif not os.access(above, WRITE_AND_ENTER, effective_ids=True):
            advice = f"create it and chown it to {user_name()}, or set `{key}` to another folder"
            yield error(own, f"`{key}` is missing and cannot be created in {above}", advice)


def overlap_findings(_config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that no folder belongs to two datasets or areas."""
    areas = [layout.area(area) for layout in layouts for area in Area]
    real = {area: Path(os.path.realpath(area)) for area in areas}
    for (folder, inner), (_, outer) in permutations(real.items(), 2):
        if outer in inner.parents:
            yield error(folder, f"leads to {inner}, which lies in {outer}", "give each dataset folders of its own")
    first: dict[tuple[int, int] | None, Path] = {}
    for folder in [*(layout.root for layout in layouts), *areas]:
        identity = identity_of(folder)  # a bind mount gives one folder two names
        if identity is not None and (known := first.setdefault(identity, folder)) != folder:
            yield error(folder, f"is the same folder as {known}", "unmount or move one of them")
    for layout in layouts:
        for entry in [*entries_of(layout.area(Area.IMAGES)), *entries_of(layout.area(Area.DATASET))]:
            inner = Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and Layout(inner).is_dataset and (nested := inside_dataset(inner)):
                yield warning(nested.folder, nested.what, nested.advice)


# ---------------------------------------------------------------- the machine and the processes


def room_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check the free space, once per file system; for a missing folder, that of the folder above it."""
    kept = {config.cache_dir: "the cache", config.state_dir: "the journal", **{one.root: "images" for one in layouts}}
    by_device = {}
    for folder, what in kept.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        by_device[there.stat().st_dev] = there, what
    for there, what in by_device.values():
        facts = os.statvfs(there)
        free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        if free < max(LITTLE_ROOM_BYTES, LITTLE_ROOM_SHARE * whole):
            found = error if free < NO_ROOM_BYTES else warning
            yield found(there, f"its disk has only {megabytes(free)} left for {what}", "free some space")
        if facts.f_files and facts.f_favail < LEAST_INODES:  # btrfs reports 0 files
            yield warning(there, f"its disk has only {facts.f_favail} inodes left", "remove small files")


def machine_findings(
    _config: Config, _layouts: Sequence[Layout], *, clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Check the clock, which dates the history, and the decoder of every image format."""
    if clock() < EARLIEST_SECONDS:
        what = f"says {time.strftime('%Y-%m-%d', time.gmtime(clock()))}: history and undo by time would be wrong"
        yield warning("clock", what, "set it (timedatectl)")
    for missing in load_decoders():
        what, _, advice = missing.partition("; ")
        yield error("decoding", what, advice)


def watching_findings(
    config: Config, layouts: Sequence[Layout], *, granted: inotify.Limits | None = None
) -> Iterator[Finding]:
    """Check whether changes can be watched or must be polled, and whether the kernel allows enough watches."""
    granted = granted or inotify.limits()
    watched = []
    for layout in layouts:
        kind = inotify.is_blind(os.fspath(layout.root))
        blind = f"lies on {kind}, where changes by other machines raise no event" if kind else ""
        if blind and config.polling == "never":
            yield warning(layout.root, f"{blind}, and polling is off", "set `polling: auto`")
        elif blind or config.polling == "always":
            yield note(layout.root, f"is polled: {blind or '`polling: always`'}")
        else:
            watched.append(layout)
    folders, most = sum(_count_folders(layout) for layout in watched), granted.max_user_watches
    if most is not None and folders > most // 2:
        problem = inotify.advice(OSError(errno.ENOSPC, ""), folders=folders, granted=granted)
        what, advice = f"{counted(folders, 'folder')} are to be watched; {problem}", "or set `polling: always`"
        yield (error if folders > most else warning)("fs.inotify.max_user_watches", what, advice)
    if watched and granted.max_user_instances is not None and len(watched) + 2 > granted.max_user_instances:
        problem = inotify.advice(OSError(errno.EMFILE, ""), granted=granted)
        yield error("fs.inotify.max_user_instances", problem)


def _count_folders(layout: Layout) -> int:
    """Count the folders that would be watched; Dataset/, Review/ and Rejected/ are one level deep."""
    deep = sum(1 for area in (Area.CLASES, Area.IMAGES) for _ in os.walk(layout.area(area)))
    below = [entry for area in TARGETS for entry in entries_of(layout.area(area))]
    return deep + len(TARGETS) + sum(entry.is_dir(follow_symlinks=False) for entry in below)


def process_findings(config: Config, layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Report a sortd that runs already, with this state directory or another, and the datasets that it holds."""
    status = read_status(config.state_dir) or {"alive": False}
    own = status["pid"] if status["alive"] else None
    if own is not None:
        yield note(config.state_dir, f"sortd runs already (pid {own}); see `sortd status`")
        for name, facts in status.get("datasets", {}).items():
            if facts.get("held_since"):
                what = f"is held, so nothing in it is moved: {facts['problem']}"
                yield error(name, what, "correct this; sortd then continues without a restart")
    for layout in layouts:
        holder = lock_holder(layout.marker / "lock")
        if holder is not None and holder != own:
            what = f"is in use by another sortd (pid {holder}) with another state directory"
            advice = f"stop that process, or use its configuration; {layout.marker}/state names its folder"
            yield warning(layout.root, what, advice)
    if os.geteuid() == 0 and {layout.root.stat().st_uid for layout in layouts} - {0}:
        what = "this check ran as root, whom no permission restricts; its findings on permissions hold for root only"
        yield note("user", what, "check as the user that runs sortd: sudo -u USER sortd check")


def endpoint_findings(config: Config, _layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Check that ``metrics.http`` can be listened on; if the running sortd has this address, report its problem."""
    if (address := config.metrics.address) is None:
        return
    status = read_status(config.state_dir) or {"alive": False}
    own = (status.get("endpoint") or {}) if status["alive"] else {}
    problem = own.get("problem")
    if own.get("address") != text_of_address(address):
        try:
            with listening_socket(address):
                return
        except StartupError as refusal:
            problem = str(refusal)
    if problem is not None:
        what, _, advice = problem.removeprefix("metrics.http: ").partition("; ")
        yield error("metrics.http", what, advice)


# ---------------------------------------------------------------- the model


def model_findings(config: Config, _layouts: Sequence[Layout]) -> Iterator[Finding]:
    """Yield which model would be used and what would run it, or how to get the configured one."""
    if config.encoder_socket is not None:
        yield from _service_findings(config, config.encoder_socket)
        return
    subject = f"model: {config.model}"
    try:
        model = models.locate_clip(config.model, cache_dir=config.cache_dir)
        yield note(subject, f"is {model.name}, a {model.kind} of {megabytes(model.size_bytes)} in {model.folder}")
        if config.model == "auto" and model.name == "packaged":
            what = f"the stronger model {STRONGER} is not on this machine"
            yield note(subject, what, f"sortd models fetch {STRONGER}")
        if config.text_model is not None:
            subject = f"text_model: {config.text_model}"
            yield from _space_findings(subject, models.locate_pair(config.model, config.text_model, config.cache_dir))
        subject = "mode"
        models.check_modes(config, model)
    except (ConfigError, ModelError) as refusal:
        yield error(subject, str(refusal))
    yield from _backend_findings(config)


def _service_findings(config: Config, path: Path) -> Iterator[Finding]:
    """Yield what the encoder service serves, or why it cannot be used."""
    subject = f"backend: {config.backend}"
    try:
        with closing(connect(config, path)) as encoder:
            yield note(subject, f"is an encoder service with {encoder.greeting.description}: {encoder.encoder_id}")
    except (ConfigError, ModelError) as refusal:
        yield error(subject, str(refusal))


def _space_findings(subject: str, pair: LocatedModel) -> Iterator[Finding]:
    """Yield that a text model fits its CLIP, or raise ModelError; an export was compared when it was made."""
    if not is_installed() or find_exports(pair) is None:
        TorchEncoder(pair, device="cpu")
    yield note(subject, f"shares the space of {pair.clip.name}")


def _backend_findings(config: Config) -> Iterator[Finding]:
    """Yield findings about the backend, and how to get a faster one."""
    facts = backend_facts(config)
    subject, command = f"backend: {config.backend}", "sortd models export"
    if facts["problem"]:
        yield error(subject, facts["problem"])
    if facts["name"] is None:
        return
    export = facts["export"]
    if facts["name"] == "onnx" and export is None:
        yield warning(subject, f"{EXPORT_MISSING}, so torch is used", command)
        return
    remedy = command if facts["name"] == "torch" and facts["is_installed"] and not export else ""
    yield note(subject, f"the model runs on {facts['name']}: {facts['why']}", remedy)
    if facts["name"] == "onnx" and "int8" in export["precisions"]:
        verdict = facts["agreement"]
        yield note(subject, verdict_sentence(verdict), "" if verdict else command)


SITE_CHECKS: Final[Mapping[Callable[[Config, Sequence[Layout]], Iterator[Finding]], Topic]] = {
    **dict.fromkeys((root_findings, own_folder_findings, overlap_findings), Topic.FOLDERS),
    process_findings: Topic.PROCESS,
    endpoint_findings: Topic.CONFIGURATION,
    notification_findings: Topic.CONFIGURATION,
    model_findings: Topic.MODEL,
    watching_findings: Topic.WATCHING,
    **dict.fromkeys((machine_findings, room_findings), Topic.MACHINE),
}
