"""The command ``models prune``: remove exports of models that are gone from sortd's cache.

Only folders that an export has made are removed: those in ``onnx/`` below the cache with the name of an export, in
which every file has a name that an export gives. Whatever else is there stays.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sortd.commands.console import counted, megabytes, print_line, print_table, say, show
from sortd.config import Config
from sortd.encoder import models
from sortd.encoder.models import LocatedModel, ModelFolder, locate_configured
from sortd.encoder.onnx_encoder import MANIFEST, TOKENIZER, export_folder
from sortd.encoder.published import CLIP_OF
from sortd.errors import ConfigError, DestinationError, ModelError, advice_for_write

_EXPORT = re.compile(r"(?P<digest>[0-9a-f]{16})(?P<rest>\.old|\.\d+\.part)?")
_WRITTEN = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|(image|text)(\.int8)?\.onnx(\.data)?|int8-[0-9a-f]{{12}}\.json"
)


def removable_exports(config: Config) -> list[dict[str, Any]]:
    """Return the exports of models that are not on this machine, and what killed exports left, as plain values.

    A model that only another configuration names by its folder counts as gone.
    """
    folder, kept = config.cache_dir / "onnx", _exports_in_use(config)
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        named = _EXPORT.fullmatch(path.name)
        if named is None or (path in kept and not named["rest"]) or (size := _size_of_export(path)) is None:
            continue
        why = "left by an export that was killed" if named["rest"] else "its model is not on this machine"
        found.append({"path": os.fspath(path), "size_bytes": size, "why": why})
    return found


def _exports_in_use(config: Config) -> set[Path]:
    """Return the folders of the exports of all models on this machine, alone and with each text model."""
    found = list(models.available(cache_dir=config.cache_dir))
    texts: list[ModelFolder | None] = [None]
    for name in (*CLIP_OF.values(), config.text_model):
        with suppress(ModelError):
            texts += [] if name is None else [models.locate_text(name, cache_dir=config.cache_dir)]
    located = [LocatedModel(clip, words, config.cache_dir) for clip, words in product(found, texts)]
    with suppress(ConfigError, ModelError):
        located.append(locate_configured(config))
    return {export_folder(model) for model in located}


def _size_of_export(folder: Path) -> int | None:
    """Return the bytes of the files of an export; None if it has a file that no export writes."""
    try:
        if folder.is_symlink():
            return None
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.is_file(follow_symlinks=False), entry.stat().st_size) for entry in entries]
    except OSError:
        return None
    is_ours = all(is_file and _WRITTEN.fullmatch(name) for name, is_file, _ in files)
    return sum(size for *_, size in files) if is_ours else None


def _remove(folder: Path) -> None:
    digest = folder.name.partition(".")[0]
    try:
        with FileLock(folder.with_name(f"{digest}.lock"), timeout=0):
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for name in filter(_WRITTEN.fullmatch, os.listdir(opened)):
                    os.unlink(name, dir_fd=opened)
            finally:
                os.close(opened)
            folder.rmdir()
    except Timeout:
        say(f"sortd: {folder} is being exported now")
    except OSError as error:
        advice = advice_for_write(error) or "run the command as the user that runs sortd"
        raise DestinationError(f"{folder} cannot be removed: {error.strerror}; {advice}") from error


def prune_models(config: Config, *, apply: bool, as_json: bool) -> None:
    """Print what can be removed, and with ``apply`` remove it; raise DestinationError if a folder cannot be removed."""
    entries = removable_exports(config)
    for entry in entries if apply else ():
        _remove(Path(entry["path"]))
    size = sum(entry["size_bytes"] for entry in entries)
    show({"removed": apply, "entries": entries, "size_bytes": size}, _print_removable, as_json=as_json)


def _print_removable(facts: Mapping[str, Any]) -> None:
    rows: Iterator[tuple[str, ...]] = (
        (megabytes(one["size_bytes"]), one["why"], one["path"]) for one in facts["entries"]
    )
    if facts["entries"]:
        print_table(("size", "why", "folder"), rows, right=("size",))
    what = f"{counted(len(facts['entries']), 'export')}, {megabytes(facts['size_bytes'])}"
    print_line(f"removed: {what}" if facts["removed"] else f"can be removed: {what}", style="bold")
    if facts["entries"] and not facts["removed"]:
        say("sortd: to remove them: sortd models prune --apply")
