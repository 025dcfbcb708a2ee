"""Mutation: each sync, each refusal to overwrite and each look at an identity, taken away in turn, must be noticed.

python -m tests.faults.mutants
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STEPS = "tests/faults/test_steps.py"
FILING = "tests/moving/test_mover.py"
RECOVERY = "tests/moving/test_recovery.py"
STATES = "tests/core/test_sorter_states.py"
DATASET = "tests/daemon/test_dataset.py"
ACTIONS = "tests/moving/test_actions.py"
PATROL = "tests/daemon/test_corrections.py"
TESTS = {
    "files": ("tests/test_files.py", "tests/moving/test_fs.py", STEPS),
    "events": (STEPS, "tests/moving/test_fs.py", FILING),
    "store/journal": (STEPS, "tests/store/test_journal.py"),
    "store/records": ("tests/store/test_journal.py", FILING),
    "moving/fs": (STEPS, "tests/moving/test_fs.py", RECOVERY, FILING),
    "moving/plan": (PATROL, FILING),
    "moving/copy": ("tests/moving/test_copy.py", STEPS, "tests/moving/test_fs.py", RECOVERY, FILING),
    "moving/copy_queue": ("tests/moving/test_copy_queue.py", "tests/daemon/test_move_queue.py", FILING),
    "moving/links": (STEPS, ACTIONS),
    "moving/removal": (STEPS, ACTIONS),
    "moving/keywords": (STEPS, ACTIONS),
    "xmp": ("tests/test_xmp.py", ACTIONS),
    "moving/recovery": (STEPS, ACTIONS, RECOVERY, PATROL, FILING),
    "moving/mover": (STEPS, FILING),
    "daemon/dataset": ("tests/daemon/test_move_queue.py", DATASET),
    "daemon/datasets": ("tests/daemon/test_datasets.py", DATASET),
    "daemon/dataset_lock": ("tests/daemon/test_dataset_lock.py", "tests/daemon/test_presence.py"),
    "daemon/corrections": (PATROL, FILING),
    "daemon/control": ("tests/daemon/test_control.py", PATROL, FILING),
    "core/state": (STATES,),
    "core/sorter": (STATES, DATASET),
    "core/schedule": (STATES,),
    "core/guard": ("tests/core/test_guard.py", DATASET),
}
"""Which tests are to notice, the quick ones first."""


@dataclass(frozen=True)
class Mutant:
    """One safeguard taken away: a text of a module (`moving/copying`), there exactly once, and what stands for it."""

    module: str
    text: str
    instead: str

    @property
    def label(self) -> str:
        """One line that names it."""
        return f"{self.module}: {self.text.strip().splitlines()[0]} -> {self.instead.strip() or 'nothing'}"


SYNCS = (
    Mutant("moving/fs", "        os.fsync(file)\n", "        pass\n"),
    Mutant("moving/copy", "        os.fsync(copy)\n", ""),
    Mutant("moving/copy", "        os.fsync(descriptor)\n", ""),
    Mutant("files", "    try:\n        os.fsync(folder)\n", "    try:\n        pass\n"),
    Mutant("moving/fs", "        sync_folder(parent)\n", ""),
    Mutant("moving/mover", "for folder_of in (_destination, _source):", "for folder_of in (_source,):"),
    Mutant("moving/mover", "for folder_of in (_destination, _source):", "for folder_of in (_destination,):"),
    Mutant("moving/mover", "for folder_of in (_destination, _source):", "for folder_of in (_source, _destination):"),
    Mutant("moving/copy", "    sync_folder(destination)\n", ""),
    Mutant("moving/copy", "    sync_folder(source)\n", ""),
    Mutant("moving/copy", "    advance(sealed)  # X5\n", ""),
    Mutant("moving/copy", "    advance(published)\n", ""),
    Mutant(
        "moving/recovery",
        "    sync_folder(places.destination)\n    if places.source != -1:",
        "    if places.source != -1:",
    ),
    Mutant("moving/recovery", "        remove_obsolete(folders, move)\n        sync_folder(places.source)\n", ""),
    Mutant("moving/recovery", "    sync_folder(places.source)\n    sync_folder(places.destination)\n", ""),
    Mutant(
        "moving/recovery", "    sync_folder(places.source)\n    sync_folder(places.dest", "    sync_folder(places.dest"
    ),
    Mutant("moving/recovery", "    sync_folder(places.destination)\n    if saved:", "    if saved:"),
    Mutant("moving/recovery", "    sync_folder(destination)\n    return move.failed", "    return move.failed"),
    Mutant("store/journal", '"PRAGMA synchronous = FULL"', '"PRAGMA synchronous = 1"'),
    Mutant("store/journal", "                    sync_folder_at(folder)\n", "                    pass\n"),
    Mutant("files", "                if durable:\n                    os.fsync(descriptor)\n", ""),
    Mutant("files", "as folder:\n        os.fsync(folder)\n", "as folder:\n        pass\n"),
    Mutant("files", "        if durable:\n            sync_folder(place)\n", ""),
)

REFUSALS = (
    Mutant("moving/fs", "destination_folder, destination, _RENAME_NOREPLACE)", "destination_folder, destination, 0)"),
    Mutant("moving/copy", "os.O_WRONLY | os.O_CREAT | os.O_EXCL |", "os.O_WRONLY | os.O_CREAT |"),
    Mutant("moving/copy", "os.open(final, _PART_FLAGS", "os.open(final, _PART_FLAGS & ~os.O_EXCL"),
    Mutant("moving/fs", "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW |", "os.O_RDONLY | os.O_DIRECTORY |"),
    Mutant("moving/fs", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK"),
    Mutant("moving/fs", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NOFOLLOW"),
    Mutant("files", "os.O_WRONLY | os.O_CREAT | os.O_EXCL |", "os.O_WRONLY | os.O_CREAT |"),
    Mutant("files", "_READ_FLAGS if follow else _READ_FLAGS | os.O_NOFOLLOW", "_READ_FLAGS"),
    Mutant("files", "os.O_RDONLY | os.O_NONBLOCK |", "os.O_RDONLY |"),
    Mutant("files", "if not stat.S_ISREG(kind):", "if False:"),
    Mutant("files", "file.read(limit + 1)", "file.read()"),
    Mutant("files", "_FOLDER_FLAGS if follow else _FOLDER_FLAGS | os.O_NOFOLLOW)", "_FOLDER_FLAGS)"),
    Mutant("files", "nullcontext(folder) if folder is not None else", ""),
    Mutant("daemon/dataset_lock", "if layout.marker.is_symlink():", "if False:"),
    Mutant("store/records", "if components[0] not in TOPS or", "if"),
    Mutant("store/records", """part in {"", ".", ".."} or""", "False or"),
    Mutant("store/records", 'if name in {"", ".", ".."} or "/" in name or', "if"),
)

RIGHTS = (
    Mutant("moving/copy", "mode = stat.S_IMODE(mode) & 0o777", "mode = stat.S_IMODE(mode)"),
    Mutant("moving/copy", 'if not any(name == "owner" or', "if not any("),
    Mutant("moving/copy", "or name.startswith(_ACCESS_LISTS) for", "for"),
    Mutant("moving/copy", "with_acl=not lost)", "with_acl=True)"),
    Mutant("moving/copy", "if not name.startswith(kept):", "if False:"),
    Mutant("moving/copy", "for owner in (status.st_uid, -1):", "for owner in (status.st_uid,):"),
)
"""What keeps a copy from giving rights that its source did not give."""

IDENTITIES = (
    Mutant("events", "return (self.inode, self.size,", "return (other.inode, self.size,"),
    Mutant("events", "return (self.inode, self.size,", "return (self.inode, other.size,"),
    Mutant("events", "self.size, self.mtime_ns) ==", "self.size, other.mtime_ns) =="),
    Mutant("moving/fs", "if not stat.S_ISREG(status.st_mode) or not is_version(status, file.stamp):", "if False:"),
    Mutant(
        "moving/fs",
        "if file.content and file.stamp.ctime_ns not in {0, status.st_ctime_ns} and",
        "if False and",
    ),
    Mutant("moving/fs", "and sha256_of(descriptor) != file.content:", ":"),
    Mutant("moving/fs", "if writer_of(descriptor) is Writer.PRESENT:", "if False:"),
    Mutant("moving/mover", "check_unchanged(source, file.name, file.stamp, path)", "pass"),
    Mutant("moving/mover", "if file.leaves and (status is None or not is_version(status, file.stamp)):", "if False:"),
    Mutant("moving/copy", "        if not is_version(os.fstat(descriptor), file.stamp):", "        if False:"),
    Mutant("moving/copy", "if status is not None and is_version(status, file.stamp):", "if status is not None:"),
    Mutant(
        "moving/plan",
        "if status is not None and stat.S_ISREG(status.st_mode) and not _is_unfinished(folder, name):",
        "if status is not None and not _is_unfinished(folder, name):",
    ),
    Mutant("moving/plan", " and not _is_unfinished(folder, name):", ":"),
    Mutant(
        "moving/copy",
        "if by_name is None or not is_version(by_name, file.stamp) or not is_version(os.fstat(descriptor), file",
        "if False and (file",
    ),
    Mutant("moving/copy", 'if file.content not in {"", copy.content}:', "if False:"),
    Mutant(
        "moving/copy",
        "if not is_version(visible, file.stamp) or not is_copy_intact(destination, file, file.final):",
        "if False:",
    ),
    Mutant("moving/copy", "        is_version(status, file.stamp)\n        and not has", "        not has"),
    Mutant("moving/copy", "        and not has_writer(source, tombstone)\n", ""),
    Mutant("moving/copy", "        and is_copy_intact(destination, file, file.final)\n", ""),
    Mutant("moving/copy", "if there is None or (there.st_ino, there.st_size) != (ours.st_ino, 0):", "if False:"),
    Mutant("moving/copy", "return status.st_ino == file.copy_inode or", "return True or"),
    Mutant("moving/copy", "if status is None or status.st_size != size:", "if status is None:"),
    Mutant(
        "moving/recovery",
        "if status is not None and is_version(status, file.stamp):\n            moved",
        "if status is not None:\n            moved",
    ),
    Mutant("moving/recovery", "if not file.may_be_last or lstat_at(places.source, file.name) is not None:", "if True:"),
    Mutant(
        "moving/recovery",
        "elif file.content and sha256_at(places.destination, part) == file.content:",
        "elif True:",
    ),
    Mutant("moving/recovery", " and sha256_at(destination, name) == file.content:\n", ":\n"),
    Mutant("moving/recovery", "        if _all_in_source(places, move):", "        if True:"),
    Mutant("moving/recovery", "        if not _all_in_source(places, move):", "        if False:"),
    Mutant("moving/recovery", "if position not in finals and sha256_at(", "if position not in finals or sha256_at("),
    Mutant(
        "moving/recovery",
        "return status is not None and is_version(status, file.stamp)\n",
        "return status is not None\n",
    ),
    Mutant(
        "moving/recovery",
        "if status is not None and status.st_size == 0 and lstat_at(",
        "if status is not None and lstat_at(",
    ),
    Mutant("moving/recovery", "if expected and sha256_at(places.destination, name) == expected:", "if expected:"),
    Mutant("moving/recovery", "if is_version(status, file.moved_stamp):", "if True:"),
    Mutant("moving/recovery", "file.content and sha256_at(folder, file.final) == file.content:", "file.content:"),
)

APART = (
    Mutant(
        "moving/mover", "        if self._interrupted():\n            return order.with_error(_COPY_INTERRUPTED)\n", ""
    ),
    Mutant("moving/mover", " if one.token not in self._copying]", "]"),
    Mutant("moving/mover", " | {_source_of(one): _UNDER_WAY for one in self._copying.values()}", ""),
    Mutant("moving/copy_queue", "if pair in self._crossed:", "if False:"),
    Mutant("moving/copy_queue", "min(self._most - handed_over, self._count)", "self._count"),
    Mutant("daemon/dataset", "                heard += self._withdraw(answer.message)", "                pass"),
    Mutant("daemon/dataset", ", *self._withdraw(message)]", "]"),
    Mutant("moving/copy_queue", "            task.done.wait()\n", "            pass\n"),
    Mutant(
        "moving/copy_queue",
        "                    waiting[client] = tasks\n",
        "                    waiting = {client: tasks, **waiting}\n",
    ),
    Mutant("daemon/dataset_lock", "        _lock(second, layout)\n", ""),
    Mutant("daemon/dataset_lock", "        _lock(self._lock, self._layout)\n", ""),
    Mutant(
        "daemon/dataset_lock",
        "self._taken is not None and identity_of(self._path, follow=False) == self._taken",
        "True",
    ),
    Mutant(
        "daemon/dataset_lock",
        "        self.release()\n        try:\n            self._take()\n",
        "        try:\n            pass\n",
    ),
    Mutant("daemon/dataset_lock", ", lock_problem=lock.problem)", ")"),
    Mutant("daemon/dataset_lock", "if (taken := self.lock_problem()) is not None:", "if (taken := None) is not None:"),
    Mutant("daemon/dataset_lock", 'owner["marker"] == own.st_ino and not is_copy', "not is_copy"),
    Mutant("daemon/dataset_lock", 'owner["marker"] == own.st_ino and not is_copy', 'owner["marker"] == own.st_ino'),
    Mutant("daemon/dataset_lock", " and there[0] != own.st_dev", ""),
    Mutant("daemon/dataset_lock", "if os.path.realpath(former.parent) != os.path.realpath(state) or not", "if not"),
    Mutant("daemon/dataset_lock", "elif area.value in self._apart and _is_empty(folder):", "elif False:"),
    Mutant("daemon/dataset_lock", " and _is_empty(folder):", ":"),
    Mutant("moving/plan", "if not is_taken(names) and (placed", "if (placed"),
    Mutant("moving/plan", "any(map(is_taken, finals))", "is_taken(finals[0])"),
    Mutant("moving/plan", "folders.note_move(", "(lambda *_: None)("),
    Mutant("moving/fs", "if stem_of_other == stem:", "if False:"),
    Mutant("moving/fs", "if not (is_image(name) and is_image(other)) and (", "if False and ("),
    Mutant("moving/plan", "if not self._is_at(record, place):", "if False:"),
    Mutant("moving/plan", " or self.awaits_image(path):", ":"),
    Mutant("moving/plan", "since = self._journal.clock() - LATE_SECONDS", "since = 0.0"),
    Mutant("moving/plan", 'if os.path.lexists(f"{self._root}/{former}"):', "if False:"),
    Mutant("moving/plan", " if not companion.shared]", "]"),
    Mutant("moving/plan", "                places.append(one)\n", "                pass\n"),
    Mutant("daemon/corrections", "if 0 <= now_ns - changed_ns < FOLLOW_NS:", "if False:"),
    Mutant("daemon/control", "if one.move_reason.reason not in apart and ", "if "),
    Mutant("moving/recovery", "if (stranger := _stranger(folders, record)) is not None:", "if (stranger := None):"),
    Mutant(
        "daemon/corrections",
        "return put if put is not None and (gone is None or gone.id < put.id) else None",
        "return put",
    ),
    Mutant("daemon/corrections", "            self._journal.follow(record, refused)\n", "            pass\n"),
    Mutant(
        "daemon/datasets",
        "            dataset.closing.close()\n\n    @contextmanager",
        "            pass\n\n    @contextmanager",
    ),
    Mutant(
        "daemon/datasets",
        "            self.hold(dataset, error)\n\n    def tell",
        "            pass\n\n    def tell",
    ),
)
"""What keeps two threads, two processes, two datasets or two images of one name apart."""

HOLDS = (
    Mutant("daemon/dataset", "            self.journal.note_guard(self.sorter.guard.state)\n", ""),
    Mutant("daemon/dataset", "        self._write_down()\n", ""),
    Mutant(
        "daemon/dataset",
        "            self.journal.note(GENERATION_FACT, str(self._last_generation))\n",
        "",
    ),
    Mutant("core/guard", '            self.state = replace(state, reason="")', "            pass"),
    Mutant("core/guard", "if self.state.held else self._images", "if False else self._images"),
    Mutant("core/guard", "return GuardState(self.held) if self.reason else self", "return self"),
    Mutant("core/guard", "else GuardState(self.state.trusted, generation, reason)", "else GuardState(generation)"),
    Mutant(
        "core/sorter",
        "                self.images.release(path, now)\n",
        "                self.images.release(path, now); self.guard.release()\n",
    ),
    Mutant("daemon/control", "        elif path in {None, root} and (", "        elif ("),
    Mutant("core/state", "        del self._images[image.path]\n        self._moving", "        self._moving"),
    Mutant("core/state", "        if self._moving and (path, stamp) in self._moving:\n", "        if False:\n"),
    Mutant(
        "core/state",
        "        if path in self._images:\n            self._leave(image)",
        "        if False:\n            self._leave(image)",
    ),
    Mutant(
        "core/sorter",
        "        if not self.rebuilds.is_running(event.job):\n            return\n        self.rebuilds.succeed()",
        "        self.rebuilds.succeed()",
    ),
    Mutant(
        "core/sorter",
        "        if not self.rebuilds.is_running(event.job):\n            return\n        self.rebuilds.fail(",
        "        self.rebuilds.fail(",
    ),
    Mutant(
        "core/sorter",
        "        self.references_absent = event.job <= self._absent_in\n",
        "        self.references_absent = False\n",
    ),
    Mutant("core/schedule", "return self._is_running and job == self.job", "return self._is_running"),
    Mutant("daemon/datasets", " and dataset.identity == identity:", ":"),
    Mutant(
        "daemon/datasets",
        "            self._ask(Forget(dataset.identity, with_stored=True))\n",
        "            pass\n",
    ),
)
"""What keeps a hold, a move under way and a rebuild from being ended by anything but what ends them."""

STAYING = (
    Mutant("moving/links", "    advance(replace(sealed, files=files))\n", ""),
    Mutant(
        "moving/links",
        "    sync_folder(destination)\n    files = tuple(with_final(destination, file, file",
        "    files = tuple(with_final(destination, file, file",
    ),
    Mutant("moving/links", "    check_unchanged(destination, part, file.stamp, path)\n", ""),
    Mutant("moving/links", "        if _is_last_name(destination, name):", "        if False:"),
    Mutant("moving/links", "not is_link_to(destination, file.final, file):", "False:"),
    Mutant("moving/removal", "    sync_folder(copies)\n", ""),
    Mutant(
        "moving/removal", "    if not _why_kept(copies, tombstone, originals, file, is_hidden=True):", "    if True:"
    ),
    Mutant("moving/removal", "if is_hidden and has_writer(copies, name):", "if False:"),
    Mutant("moving/removal", "sha256_at(originals, file.wanted) != file.content:", "False:"),
    Mutant("moving/removal", 'return "" if sha256_at(copies, name) == file.content else _CHANGED', 'return ""'),
    Mutant("moving/removal", 'return "" if is_link else _CHANGED', 'return ""'),
    Mutant("moving/keywords", "check_unchanged(folder, image.name, image.stamp, path)", "pass"),
    Mutant("moving/keywords", "    advance(changed)  # K3\n", ""),
    Mutant("moving/keywords", "    if not _is_former(folder, part, move):", "    if False:"),
    Mutant("moving/keywords", " and not has_writer(folder, name)\n", "\n"),
    Mutant(
        "moving/keywords", "        exchange_names(folder, part, sidecar.name)  # another", "        pass  # another"
    ),
    Mutant("moving/keywords", "    sync_folder(folder)\n    os.unlink(part", "    os.unlink(part"),
    Mutant("xmp", "        parser.StartDoctypeDeclHandler = self._doctype\n", ""),
    Mutant("xmp", "    if len(content) > MOST_SIDECAR_BYTES:", "    if False:"),
    Mutant("xmp", "if keyword not in before[one.key] and", "if"),
    Mutant(
        "moving/recovery",
        "for position, file in enumerate(move.files) if file.may_be_last)",
        "for position, file in enumerate(move.files) if file.leaves)",
    ),
)
"""What keeps originals intact, and copies, links and sidecars that may be the last of their content."""

ALL = STAYING + SYNCS + REFUSALS + RIGHTS + IDENTITIES + APART + HOLDS


def copy_with(mutant: Mutant, place: Path) -> None:
    """Copy the program and its tests, the mutant in it.

    Raises:
        ValueError: the text of the mutant is not there exactly once.
    """
    for name in ("sortd", "tests", "pyproject.toml"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    module = place / "sortd" / f"{mutant.module}.py"
    text = module.read_text()
    if text.count(mutant.text) != 1:
        raise ValueError(f"{mutant.label}: found {text.count(mutant.text)} times")
    module.write_text(text.replace(mutant.text, mutant.instead))


def is_noticed(mutant: Mutant) -> bool:
    """Whether some test turns red with this mutant."""
    with tempfile.TemporaryDirectory(prefix="sortd-mutant-") as folder:
        place = Path(folder)
        copy_with(mutant, place)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[mutant.module]],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            check=False,
        )
        return run.returncode == 1


def main() -> int:
    """Try every mutant; print the ones that nothing noticed; status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose label holds one of these, | between")
    arguments = parser.parse_args()
    began = time.monotonic()
    tried = [mutant for mutant in ALL if any(one in mutant.label for one in arguments.only.split("|"))]
    survivors = []
    for mutant in tried:
        noticed = is_noticed(mutant)
        print(f"{'noticed ' if noticed else 'SURVIVED'} {mutant.label}", file=sys.stderr, flush=True)
        survivors += [] if noticed else [mutant.label]
    found = {"mutants": len(tried), "survivors": survivors, "seconds": round(time.monotonic() - began)}
    print(json.dumps(found, indent=2))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
