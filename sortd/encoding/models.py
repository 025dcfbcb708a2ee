"""Where the models are on this disk: found by name or path without the network, fetched only when told to.

Nothing here imports torch or touches the network, but ``fetch``; ``encoder.py`` loads what is found here.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sortd.encoding.model_folders import CODE_FREE, STRONGER, ModelFolder, complete, first_line, vouch
from sortd.errors import ModelError
from sortd.files import open_regular, read_regular, write_atomic

PACKAGED = Path(__file__).parents[1] / "model"
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
PICKLE = "pytorch_model.bin"
NOT_FETCHED = ["onnx/*", "openvino/*", "*.onnx"]


@dataclass(frozen=True, slots=True)
class Availability:
    """One row of ``sortd models``: what is here, and whether ``model: auto`` takes it."""

    name: str
    folder: str
    kind: str
    size_bytes: int
    automatic: bool


def locate(
    model: str,
    *,
    cache_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    packaged: Path = PACKAGED,
) -> ModelFolder:
    """Find the folder that a configured ``model`` means, without the network.

    Args:
        model: ``auto``, ``packaged``, a folder, or a name as the Hugging Face hub has it; a name without a slash is
            one of the sentence-transformers organisation.
        cache_dir: sortd's cache, whose ``models`` folder is searched before the caches of the hub's own client.
        environment: where ``HF_HOME`` and its kin are looked up.
        packaged: the folder of the packaged model.

    Raises:
        ModelError: It is not here, incomplete, or no CLIP that sortd can load; the message says how to mend it.
    """
    if model == "packaged":
        return vouch("packaged", packaged)
    if model == "auto":
        stronger = _snapshot(STRONGER, _hub_caches(cache_dir, environment))
        return vouch("packaged", packaged) if stronger is None else vouch(STRONGER, stronger)
    if _names_a_path(model):
        return vouch(model, Path(model).expanduser())
    snapshot = _snapshot(model, _hub_caches(cache_dir, environment))
    if snapshot is None:
        raise ModelError(
            f"model {model!r} is not on this machine, and sortd downloads nothing by itself: "
            f"run `sortd models fetch {model}` where there is a network, or copy the model's folder here and set "
            f"`model:` to its path, or set `model: packaged`"
        )
    return vouch(model, snapshot)


def locate_text(
    model: str, *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ
) -> ModelFolder:
    """Find the folder of a separate text model (configuration key ``text_model``), as ``locate`` does for a CLIP."""
    folder = Path(model).expanduser() if _names_a_path(model) else None
    folder = folder or _snapshot(model, _hub_caches(cache_dir, environment))
    if folder is None:
        raise ModelError(
            f"text model {model!r} is not on this machine: run `sortd models fetch {model}` where there is a "
            f"network, or copy its folder here and set `text_model:` to its path"
        )
    return complete(model, folder)


def snapshot_of(
    name: str, *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """Return the folder of any model of the hub, whatever it is, in a local cache; None where it is in none."""
    return _snapshot(name, _hub_caches(cache_dir, environment))


def available(
    *,
    cache_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    packaged: Path = PACKAGED,
) -> tuple[Availability, ...]:
    """List every CLIP on this machine that sortd can load by name, the one that ``auto`` means marked."""
    found: dict[str, ModelFolder] = {}
    with suppress(ModelError):  # what cannot serve is not listed; asking for it by name says why
        found["packaged"] = vouch("packaged", packaged)
    for name, snapshot in _snapshots(_hub_caches(cache_dir, environment)):
        with suppress(ModelError):
            found.setdefault(name, vouch(name, snapshot))
    automatic = STRONGER if STRONGER in found else "packaged"
    return tuple(
        Availability(name, str(model.folder), model.kind, model.size_bytes, automatic=name == automatic)
        for name, model in found.items()
    )


def fetch(name: str, *, cache_dir: Path | None = None) -> Path:
    """Download a model from the hub: the one thing in sortd that does; a bar is drawn on a terminal only.

    Args:
        name: as the hub has it; without a slash, one of the sentence-transformers organisation.
        cache_dir: sortd's cache, to hold it in its ``models`` folder; else the hub client's own cache.

    Returns:
        The folder, complete. It may hold a CLIP or a text model.

    Raises:
        ModelError: No such model, no network, no room, or weights in no form that sortd loads.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository = _repository(name)
    target = None if cache_dir is None else str(cache_dir / "models")
    try:
        folder = Path(
            snapshot_download(repository, cache_dir=target, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED)
        )
        offered = HfApi().list_repo_files(repository, revision=folder.name)
        pickles = [path for path in offered if _is_the_only_form(path, offered)]
        if pickles:
            snapshot_download(repository, cache_dir=target, allow_patterns=pickles, revision=folder.name)
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"cannot fetch {name}: HF_HUB_OFFLINE forbids the network; unset it for this command"
        ) from error
    except Exception as error:  # the client's HTTP library, and so its errors, change from version to version
        raise ModelError(
            f"cannot fetch {name}: {first_line(error)}; check the name and the network, or copy the model's "
            f"folder from another machine and set `model:` to its path"
        ) from error
    for path in pickles:
        _convert(name, folder / path)
    return complete(name, folder).folder


def _is_the_only_form(path: str, offered: Sequence[str]) -> bool:
    """Tell whether weights are offered in no other form; some of the oldest published CLIPs are not."""
    folder, _, file = path.rpartition("/")
    return file == PICKLE and not any(
        other.rpartition("/")[0] == folder and other.endswith(CODE_FREE) for other in offered
    )


def _convert(name: str, pickle: Path) -> None:
    """Write the tensors of a pickle as safetensors beside it: once, here, and never while sorting.

    torch's restricted unpickler knows tensors and the containers that hold them, and refuses everything else.
    """
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(pickle, map_location="cpu", weights_only=True)
        tensors = {str(key): value.clone().contiguous() for key, value in loaded.items()}
    except Exception as error:  # whatever a foreign pickle does to its reader, the answer is no
        raise ModelError(
            f"cannot fetch {name}: {pickle.name} holds something else than weights, and was not run "
            f"({first_line(error)}); choose a model with {CODE_FREE} weights"
        ) from error
    beside = pickle.with_name("model.safetensors.part")
    try:
        save_file(tensors, beside, {"format": "pt"})
        beside.replace(pickle.with_name("model.safetensors"))
    except OSError as error:
        raise ModelError(f"cannot fetch {name}: {pickle.parent}: {error.strerror}; make room there") from error


def digest(model: ModelFolder, *, cache_dir: Path | None = None) -> str:
    """Say what a model is by content: hexadecimal sha256 over its configuration and weights, whatever its name.

    Half a gigabyte of weights takes a second or two to hash, so the hashes are kept in ``cache_dir`` with the stamps
    of the files.
    """
    known = _Hashes(None if cache_dir is None else cache_dir / "model-hashes.json")
    whole = hashlib.sha256()
    for path in model.files:
        whole.update(f"{path.relative_to(model.folder).as_posix()}\0{known.of(path)}\n".encode())
    known.save()
    return whole.hexdigest()


def checksums(files: Iterable[Path], *, cache_dir: Path | None = None) -> dict[Path, str]:
    """Return the hexadecimal sha256 of each file, remembered by stamp as in ``digest``.

    Raises:
        OSError: a file cannot be read.
    """
    known = _Hashes(None if cache_dir is None else cache_dir / "model-hashes.json")
    sums = {file: known.of(file) for file in files}
    known.save()
    return sums


class _Hashes:
    """The sha256 of files by stamp, remembered from start to start; losing the memory costs time only."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._known: dict[str, str] = {}
        self._changed = False
        if memory is not None:
            with suppress(OSError, ValueError):
                loaded = json.loads(read_regular(memory))
                self._known = loaded if isinstance(loaded, dict) else {}

    def of(self, path: Path) -> str:
        facts = path.stat()
        key = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
        if key not in self._known:
            with os.fdopen(open_regular(path, follow=True), "rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        if self._memory is None or not self._changed:
            return
        with suppress(OSError):  # a full disk or a read-only cache: the next start hashes again
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._memory, json.dumps(self._known).encode(), durable=False)


# ---------------------------------------------------------------- where models lie


def _names_a_path(model: str) -> bool:
    """The configuration makes every path absolute; what is left without a leading slash or dot is a name."""
    return model.startswith(("/", "./", "../", "~"))


def _hub_caches(cache_dir: Path | None, environment: Mapping[str, str]) -> list[Path]:
    """Where snapshots are looked for: sortd's own cache, then the hub client's (its rules, without importing it)."""
    own = [] if cache_dir is None else [cache_dir / "models"]
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache"), "huggingface"
    )
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    others = [environment[key] for key in ("SENTENCE_TRANSFORMERS_HOME",) if environment.get(key)]
    return [*own, *(Path(path).expanduser() for path in (hub, *others))]


def _repository(name: str) -> str:
    return name if "/" in name else f"sentence-transformers/{name}"


def _snapshot(name: str, caches: list[Path]) -> Path | None:
    """The newest snapshot of a name; the hub's client writes its commit to refs/main."""
    folder = "models--" + _repository(name).replace("/", "--")
    for cache in caches:
        with suppress(OSError):
            commit = (cache / folder / "refs" / "main").read_text("utf-8").strip()
            snapshot = cache / folder / "snapshots" / commit
            if commit and snapshot.is_dir():
                return snapshot
    return None


def _snapshots(caches: list[Path]) -> Iterator[tuple[str, Path]]:
    for cache in caches:
        for folder in sorted(cache.glob("models--*--*")):
            name = folder.name.removeprefix("models--").replace("--", "/", 1)
            snapshot = _snapshot(name, [cache])
            if snapshot is not None:
                yield name.removeprefix("sentence-transformers/"), snapshot
