"""A CLIP's folder on this disk: found by name or path, vouched for before anything loads it, fetched only when told to.

Nothing here imports torch or touches the network, but ``fetch``; ``encoder.py`` loads what is found here.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortd.errors import ModelError

PACKAGED = Path(__file__).parent / "model"
STRONGER = "clip-ViT-B-32"  # what `auto` takes where it is in a local cache
CODE_FREE = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one of them can run code
IDENTITY = (CODE_FREE, ".json", ".txt", ".model")  # what decides on an embedding; a model card does not
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
NOT_FETCHED = ["onnx/*", "openvino/*", "*.onnx"]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A CLIP that lies complete on this disk, in a shape that sortd loads."""

    name: str  # "packaged", a model's name, or the folder as it was asked for
    folder: Path
    kind: str  # its transformers model type: "clip", "siglip", "vision-text-dual-encoder", ...
    files: tuple[Path, ...]  # all that decides on its embeddings, sorted
    size_bytes: int


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
        return _vouch("packaged", packaged)
    if model == "auto":
        stronger = _snapshot(STRONGER, _hub_caches(cache_dir, environment))
        return _vouch("packaged", packaged) if stronger is None else _vouch(STRONGER, stronger)
    if _names_a_path(model):
        return _vouch(model, Path(model).expanduser())
    snapshot = _snapshot(model, _hub_caches(cache_dir, environment))
    if snapshot is None:
        raise ModelError(
            f"model {model!r} is not on this machine, and sortd downloads nothing by itself: "
            f"run `sortd models fetch {model}` where there is a network, or copy the model's folder here and set "
            f"`model:` to its path, or set `model: packaged`"
        )
    return _vouch(model, snapshot)


def vouch_text(
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
    return _complete(model, folder)


def available(
    *,
    cache_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    packaged: Path = PACKAGED,
) -> tuple[Availability, ...]:
    """List every CLIP on this machine that sortd can load by name, the one that ``auto`` means marked."""
    found: dict[str, ModelFolder] = {}
    with suppress(ModelError):  # what cannot serve is not listed; asking for it by name says why
        found["packaged"] = _vouch("packaged", packaged)
    for name, snapshot in _snapshots(_hub_caches(cache_dir, environment)):
        with suppress(ModelError):
            found.setdefault(name, _vouch(name, snapshot))
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
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    target = None if cache_dir is None else str(cache_dir / "models")
    try:
        folder = huggingface_hub.snapshot_download(
            _repository(name), cache_dir=target, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED
        )
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"cannot fetch {name}: HF_HUB_OFFLINE forbids the network; unset it for this command"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot fetch {name}: {_first_line(error)}; check the name and the network, or copy the model's "
            f"folder from another machine and set `model:` to its path"
        ) from error
    return _complete(name, Path(folder)).folder


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


class _Hashes:
    """The sha256 of files by stamp, remembered from start to start; losing the memory costs time only."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._known: dict[str, str] = {}
        self._changed = False
        if memory is not None:
            with suppress(OSError, ValueError):
                loaded = json.loads(memory.read_text("utf-8"))
                self._known = loaded if isinstance(loaded, dict) else {}

    def of(self, path: Path) -> str:
        facts = path.stat()
        key = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
        if key not in self._known:
            with path.open("rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        if self._memory is None or not self._changed:
            return
        beside = self._memory.with_name(f"{self._memory.name}.{os.getpid()}")
        with suppress(OSError):  # a full disk or a read-only cache: the next start hashes again
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self._known), "utf-8")
            beside.replace(self._memory)


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


# ---------------------------------------------------------------- what a folder holds


def _vouch(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a CLIP, two towers into one space, by its configuration alone."""
    model = _complete(name, folder)
    config = _json_object(_first_module(name, folder) / "config.json", name)
    if not {"vision_config", "text_config"} <= config.keys():
        sees = {"image_size", "num_channels", "patch_size"} & config.keys()
        lacks = "sees images but has no text tower" if sees else "reads text but sees no images"
        raise ModelError(
            f"model {name!r} is no CLIP: it is a {_describe(config)}, which {lacks}; set `model:` to a CLIP such as "
            f"{STRONGER}, or to `packaged`"
        )
    return model


def _complete(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a sentence-transformers or transformers model, complete and without code."""
    if not folder.is_dir():
        mend = "reinstall sortd" if name == "packaged" else "check `model:`, or set it to `packaged`"
        raise ModelError(f"model {name!r}: there is no folder {folder}; {mend}")
    first = _first_module(name, folder)
    config = _json_object(first / "config.json", name)
    if (first / "adapter_config.json").exists():
        raise ModelError(
            f"model {name!r} in {folder} is an adapter (adapter_config.json) that needs another model; "
            f"merge the two (peft: merge_and_unload) and save that"
        )
    for module in _module_folders(name, folder):
        _refuse_pickles(name, module)
    if not list(first.glob(f"*{CODE_FREE}")):
        raise ModelError(f"model {name!r} in {folder} has no weights (*{CODE_FREE}): fetch or copy it again, whole")
    files = tuple(sorted({path for at in _module_folders(name, folder) for path in _identity_files(at)}))
    size = sum(path.stat().st_size for path in files)
    return ModelFolder(name, folder, str(config.get("model_type", "unknown")), files, size)


def _first_module(name: str, folder: Path) -> Path:
    """The folder of the network itself."""
    return _module_folders(name, folder)[0]


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
    return [folder / _inside(name, str(row.get("path", ""))) for row in modules] + [folder]


def _inside(name: str, path: str) -> str:
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise ModelError(f"model {name!r}: modules.json points outside of its folder ({path})")
    return path


def _identity_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if path.suffix in IDENTITY and path.is_file())


def _refuse_pickles(name: str, folder: Path) -> None:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled and not list(folder.glob(f"*{CODE_FREE}")):
        raise ModelError(
            f"model {name!r} in {folder} has its weights only as {', '.join(pickled)}, a format that can run code "
            f"when it is loaded; sortd takes {CODE_FREE} only: load it with sentence-transformers on a machine "
            f"that trusts it, save it again, and set `model:` to that folder"
        )


def _describe(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ["model without an architecture"]
    return f"{names[0]} ({config.get('model_type', 'of unknown type')})"


def _json_object(path: Path, name: str) -> Mapping[str, Any]:
    loaded = _json(path, name)
    if not isinstance(loaded, dict):
        raise ModelError(f"model {name!r}: {path} is no JSON object; fetch or copy the model again")
    return loaded


def _json(path: Path, name: str) -> object:
    try:
        loaded: object = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model {name!r} is incomplete: {path} is missing; fetch or copy it again, whole") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: cannot read {path}: {_first_line(error)}; fetch or copy the model again"
        ) from error
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
