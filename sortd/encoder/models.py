"""The models on this disk: found by name or path without the network, and checked by their configuration alone.

Nothing here imports torch. Only ``fetch`` uses the network.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sortd.errors import ModelError
from sortd.files import open_regular, read_regular, write_atomic

STRONGER = "clip-ViT-B-32"
"""What ``model: auto`` takes where it is in a local cache, and what is recommended."""
PACKAGED = Path(__file__).parents[1] / "model"

CODE_FREE = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one of them can run code
IDENTITY = (CODE_FREE, ".json", ".txt", ".model")  # what decides on an embedding; a model card does not
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
NOT_FETCHED = ["onnx/*", "openvino/*", "*.onnx"]
PICKLE = "pytorch_model.bin"


class Use(StrEnum):
    """What sortd can do with a model."""

    CLIP = "clip"  # ``model:``
    WORDS = "words"  # ``text_model:`` beside a CLIP of the same space
    IMAGES = "images"  # a base for ``sortd finetune``


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A CLIP that lies complete on this disk, in a shape that sortd loads."""

    name: str  # "packaged", a model's name, or the folder as it was asked for
    folder: Path
    kind: str  # its transformers model type: "clip", "siglip", "vision-text-dual-encoder", ...
    files: tuple[Path, ...]  # all that decides on its embeddings, sorted
    size_bytes: int


# ------------------------------------------------------------ finding


def locate_clip(
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
        environment: where ``HF_HOME`` and the like are looked up.
        packaged: the folder of the packaged model.

    Raises:
        ModelError: it is not here, incomplete, or no CLIP that sortd can load; the message says what to do.
    """
    if model == "packaged":
        return verify_clip("packaged", packaged)
    if model == "auto":
        stronger = _snapshot(STRONGER, _hub_caches(cache_dir, environment))
        return verify_clip("packaged", packaged) if stronger is None else verify_clip(STRONGER, stronger)
    if _names_a_path(model):
        return verify_clip(model, Path(model).expanduser())
    snapshot = _snapshot(model, _hub_caches(cache_dir, environment))
    if snapshot is None:
        raise ModelError(
            f"model {model!r} is not on this machine, and sortd downloads nothing by itself: "
            f"run `sortd models fetch {model}` where there is a network, or copy the model's folder here and set "
            f"`model:` to its path, or set `model: packaged`"
        )
    return verify_clip(model, snapshot)


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
    return verify_folder(model, folder)


def find_snapshot(
    name: str, *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """Return the folder of any model of the hub in a local cache; None where it is in none."""
    return _snapshot(name, _hub_caches(cache_dir, environment))


def available(
    *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ, packaged: Path = PACKAGED
) -> tuple[ModelFolder, ...]:
    """Return every CLIP on this machine that sortd can load by name; what cannot serve is left out."""
    snapshots = [("packaged", packaged), *_snapshots(_hub_caches(cache_dir, environment))]
    found: dict[str, ModelFolder] = {}
    for name, folder in snapshots:
        with suppress(ModelError):
            found.setdefault(name, verify_clip(name, folder))
    return tuple(found.values())


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


# ------------------------------------------------------------ what a folder holds


def verify_clip(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a CLIP: two towers into one space.

    Raises:
        ModelError: it holds something else, or nothing whole.
    """
    model, use = verify_folder(name, folder), model_use(name, folder)
    if use is not Use.CLIP:
        config = _json_object(_module_folders(name, folder)[0] / "config.json", name)
        lacks = "sees images but has no text tower" if use is Use.IMAGES else "reads text but sees no images"
        kind, *_ = config.get("architectures") or ["model without an architecture"]
        raise ModelError(
            f"model {name!r} is no CLIP: it is a {kind} ({config.get('model_type', 'of unknown type')}), which "
            f"{lacks}; set `model:` to a CLIP such as {STRONGER}, or to `packaged`"
        )
    return model


def model_use(name: str, folder: Path) -> Use:
    """Return what a complete model folder is for, by its configuration.

    Raises:
        ModelError: it has none that can be read.
    """
    config = _json_object(_module_folders(name, folder)[0] / "config.json", name)
    if {"vision_config", "text_config"} <= config.keys():
        return Use.CLIP
    return Use.IMAGES if {"image_size", "num_channels", "patch_size"} & config.keys() else Use.WORDS


def verify_folder(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a sentence-transformers or transformers model, whole and without code.

    Raises:
        ModelError: something is missing, or its weights are in a form that sortd does not load.
    """
    _refuse_closed(name, folder)
    if not folder.is_dir():
        mend = "reinstall sortd-images" if name == "packaged" else "check `model:`, or set it to `packaged`"
        raise ModelError(f"model {name!r}: there is no folder {folder}; {mend}")
    modules = _module_folders(name, folder)
    first = modules[0]
    config = _json_object(first / "config.json", name)
    if (first / "adapter_config.json").exists():
        raise ModelError(
            f"model {name!r} in {folder} is an adapter (adapter_config.json) that needs another model; "
            f"merge the two (peft: merge_and_unload) and save that"
        )
    for module in modules:
        _refuse_pickles(name, module)
    if not _weights(first):
        raise ModelError(f"model {name!r} in {folder} has no weights (*{CODE_FREE}): fetch or copy it again, whole")
    files = tuple(
        sorted({path for at in modules for path in at.glob("*") if path.suffix in IDENTITY and path.is_file()})
    )
    for path in files:
        if not os.access(path, os.R_OK, effective_ids=True):
            raise _closed(name, path, "read")
    size = sum(path.stat().st_size for path in files)
    return ModelFolder(name, folder, str(config.get("model_type", "unknown")), files, size)


def _refuse_closed(name: str, folder: Path) -> None:
    """Say which folder on the way keeps the service's user out: all below it looks as if it were not there."""
    for step in (*reversed(folder.absolute().parents), folder):
        try:
            is_open = not step.exists() or os.access(step, os.X_OK, effective_ids=True)
        except PermissionError:
            is_open = False
        if not is_open:
            raise _closed(name, step, "enter")
    if folder.is_dir() and not os.access(folder, os.R_OK, effective_ids=True):
        raise _closed(name, folder, "list")


def _closed(name: str, path: Path, verb: str) -> ModelError:
    return ModelError(
        f"model {name!r}: user {os.geteuid()}, who runs sortd, may not {verb} {path}; grant it (chmod a+rX), or copy "
        "the model to where that user may"
    )


def _module_folders(name: str, folder: Path) -> list[Path]:
    """The folder of each module in order; one that brings its own code is refused."""
    if not (folder / "modules.json").exists():
        if not (folder / "config.json").exists():
            raise ModelError(
                f"model {name!r}: {folder} holds neither modules.json nor config.json, so it is no model folder; "
                f"give the folder that does"
            )
        return [folder]
    modules = _json(folder / "modules.json", name)
    if not isinstance(modules, list) or not modules or not all(isinstance(row, dict) for row in modules):
        raise ModelError(f"model {name!r}: {folder / 'modules.json'} is no list of modules; copy the model again")
    for row in modules:
        kind = str(row.get("type", ""))
        if not kind.startswith("sentence_transformers."):
            raise ModelError(f"model {name!r} brings code of its own ({kind}), which sortd does not run")
    first = str(modules[0].get("type", "")).rpartition(".")[2]
    if first not in {"Transformer", "CLIPModel"}:
        raise ModelError(f"model {name!r} is no CLIP: its first module is a {first}, not one transformer")
    paths = [str(row.get("path", "")) for row in modules]
    for path in paths:
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ModelError(f"model {name!r}: modules.json points outside of its folder ({path})")
    return [*(folder / path for path in paths), folder]


def _weights(folder: Path) -> list[Path]:
    """The weights that are really there: in the hub's cache they are links, and a blob may be gone."""
    return [path for path in folder.glob(f"*{CODE_FREE}") if path.is_file()]


def _refuse_pickles(name: str, folder: Path) -> None:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled and not _weights(folder):
        raise ModelError(
            f"model {name!r} in {folder} has its weights only as {', '.join(pickled)}, a format that can run code "
            f"when it is loaded; sortd takes {CODE_FREE} only: load it with sentence-transformers on a machine "
            f"that trusts it, save it again, and set `model:` to that folder"
        )


def _json_object(path: Path, name: str) -> Mapping[str, Any]:
    loaded = _json(path, name)
    if not isinstance(loaded, dict):
        raise ModelError(f"model {name!r}: {path} is no JSON object; fetch or copy the model again")
    return loaded


def _json(path: Path, name: str) -> object:
    try:
        loaded: object = json.loads(read_regular(path, follow=True))
    except FileNotFoundError as error:
        raise ModelError(f"model {name!r} is incomplete: {path} is missing; fetch or copy it again, whole") from error
    except PermissionError as error:
        raise _closed(name, path, "read") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: cannot read {path}: {first_line(error)}; fetch or copy the model again"
        ) from error
    return loaded


def first_line(error: BaseException) -> str:
    """Return what an error says, without what third parties add below it."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------ identity by content


def digest(model: ModelFolder, *, cache_dir: Path | None = None) -> str:
    """Return the hexadecimal sha256 over a model's configuration and weights, whatever its name.

    Half a gigabyte of weights takes a second or two to hash, so the hashes are kept in ``cache_dir`` with the stamps
    of the files.
    """
    sums = checksums(model.files, cache_dir=cache_dir)
    lines = (f"{path.relative_to(model.folder).as_posix()}\0{sums[path]}\n" for path in model.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checksums(files: Iterable[Path], *, cache_dir: Path | None = None) -> dict[Path, str]:
    """Return the hexadecimal sha256 of each file, remembered by stamp as in ``digest``; raises OSError."""
    memory = None if cache_dir is None else cache_dir / "model-hashes.json"
    known: dict[str, str] = {}
    if memory is not None:
        with suppress(OSError, ValueError):  # without the memory all is hashed again
            loaded = json.loads(read_regular(memory))
            known = loaded if isinstance(loaded, dict) else {}
    remembered = len(known)
    sums = {file: _checksum(file, known) for file in files}
    if memory is not None and len(known) > remembered:
        with suppress(OSError):  # a full disk or a read-only cache: the next start hashes again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(memory, json.dumps(known).encode(), durable=False)
    return sums


def _checksum(path: Path, known: dict[str, str]) -> str:
    facts = path.stat()
    key = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
    if key not in known:
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[key]


# ------------------------------------------------------------ fetching


def fetch(name: str, *, cache_dir: Path | None = None) -> Path:
    """Download a model, a CLIP or a text model, from the hub and return its folder; a bar is drawn on a terminal only.

    Args:
        name: as the hub has it; without a slash, one of the sentence-transformers organisation.
        cache_dir: sortd's cache, to hold it in its ``models`` folder; else the hub client's own cache.

    Raises:
        ModelError: no such model, no network, no room, or weights in no form that sortd loads.
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
    return verify_folder(name, folder).folder


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
