"""The models on this machine: found by name or path without the network, and verified by their configuration.

Nothing here imports torch or uses the network.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sortd.config import Config
from sortd.encoder.published import CLIP_OF, PUBLISHED
from sortd.errors import ConfigError, ModelError
from sortd.files import read_regular, sha256_of, write_json

STRONGER = "clip-ViT-B-32"
"""What ``model: auto`` selects if it is in a local cache, and what is recommended."""
PACKAGED = Path(__file__).parents[1] / "model"
SAFETENSORS = ".safetensors"
WEIGHTS = "model.safetensors"

PADS_TEXTS = frozenset({"siglip"})
"""Model types trained on lower-case texts, all padded to the longest that they read, without a mask."""

_LONGEST_LINE = 300  # characters of another library's message
_ANY_SIZE = frozenset({"siglip2", "siglip2_vision_model"})  # SigLIP 2 of fixed size has the type siglip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one can run code
_CONTENT = (".json", ".txt", ".model")  # suffixes of files on which, beside the weights, embeddings depend


class Use(StrEnum):
    """What sortd can use a model for."""

    CLIP = "clip"  # ``model:``
    WORDS = "words"  # ``text_model:`` beside a CLIP of the same space
    IMAGES = "images"  # ``model:`` without class names, or a base of ``sortd finetune``


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete model on this disk that sortd can load."""

    name: str  # "packaged", a model's name, or the folder as configured
    folder: Path
    kind: str  # the model type of transformers: "clip", "siglip", "vision-text-dual-encoder", ...
    use: Use
    files: tuple[Path, ...]  # all on which its embeddings depend, sorted
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A CLIP or an encoder of images on this disk, with the separate text model of a CLIP, if any."""

    clip: ModelFolder
    words: ModelFolder | None = None
    cache_dir: Path | None = None
    """The cache of the exports and of the hashes of weights; None: neither is kept."""

    @property
    def size_bytes(self) -> int:
        """The size of both folders."""
        return self.clip.size_bytes + (0 if self.words is None else self.words.size_bytes)

    def content_digests(self) -> list[str]:
        """Return the ``digest`` of the CLIP and of the text model, if any."""
        parts = [self.clip] if self.words is None else [self.clip, self.words]
        return [digest(part, cache_dir=self.cache_dir) for part in parts]


# ------------------------------------------------------------ finding


def locate_clip(
    model: str,
    *,
    cache_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    packaged: Path = PACKAGED,
) -> ModelFolder:
    """Find and verify the folder of a configured ``model``, without the network.

    Args:
        model: ``auto``, ``packaged``, a folder, or a name on the Hugging Face hub; a name without a slash is one of the
            sentence-transformers organisation.
        cache_dir: sortd's cache, whose ``models`` folder is searched before the caches of the hub's client.
        environment: where ``HF_HOME`` and similar variables are looked up.
        packaged: the folder of the packaged model.

    Raises:
        ModelError: it is missing, incomplete, or takes no images; the message says what to do.
    """
    if model == "auto":
        stronger = find_snapshot(STRONGER, cache_dir=cache_dir, environment=environment)
        return verify_clip("packaged", packaged) if stronger is None else verify_clip(STRONGER, stronger)
    folder = packaged if model == "packaged" else _folder_of("model", model, cache_dir, environment)
    return verify_clip(model, folder)


def locate_pair(model: str, text_model: str | None, cache_dir: Path | None) -> LocatedModel:
    """Find a CLIP and the separate text model, if one is named; see ``locate_clip`` and ``locate_text``."""
    clip = locate_clip(model, cache_dir=cache_dir)
    words = None if text_model is None else locate_text(text_model, cache_dir=cache_dir)
    if words is not None and clip.use is Use.IMAGES:
        raise ModelError(
            f"text model {text_model!r} does not fit model {model!r}, a {clip.kind} that was trained on images alone: "
            f"no text has a place in its space; leave `text_model` out, or set `model:` to the CLIP of that text model"
        )
    partner = CLIP_OF.get(str(text_model).removeprefix("sentence-transformers/"))
    if partner is not None and clip.name != partner and clip.name in {one.name for one in PUBLISHED}:
        raise ModelError(
            f"text model {text_model!r} was trained for {partner}, and model {model!r} is {clip.name}, which has "
            f"another space; set `model: {partner}`, or leave `text_model` out"
        )
    return LocatedModel(clip, words, cache_dir)


def locate_configured(config: Config) -> LocatedModel:
    """Return the configured model and the separate text model, if any.

    Raises:
        ModelError: one of them is not usable.
        ConfigError: the configured mode needs another model.
    """
    model = locate_pair(config.model, config.text_model, config.cache_dir)
    check_modes(config, model.clip)
    return model


def check_modes(config: Config, model: ModelFolder) -> None:
    """Raise ConfigError if a dataset is to be decided by class names, and the model does not read texts."""
    if model.use is not Use.CLIP:
        refuse_text_mode(config, f"model {model.name!r} is a {model.kind} that")


def refuse_text_mode(config: Config, model: str) -> None:
    """Raise ConfigError if a dataset is to be decided by class names; ``model`` begins what the message says of it."""
    wanted = {"mode": config.mode, **{f"datasets: {name}: mode": config.dataset(name).mode for name in config.datasets}}
    for key, mode in wanted.items():
        if mode == "text":
            raise ConfigError(
                f"`{key}: text` decides by class names, and {model} takes images only; set it to "
                f"`best`, which uses the references, or set `model:` to a CLIP such as {STRONGER}"
            )


def locate_text(
    model: str, *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ
) -> ModelFolder:
    """Find and verify a separate text model (configuration key ``text_model``), as ``locate_clip`` does a CLIP."""
    return verify_folder(model, _folder_of("text_model", model, cache_dir, environment))


def _folder_of(key: str, model: str, cache_dir: Path | None, environment: Mapping[str, str]) -> Path:
    # The configuration makes every path absolute; anything without a leading slash or dot is a name.
    if model.startswith(("/", "./", "../", "~")):
        return Path(model).expanduser()
    snapshot = find_snapshot(model, cache_dir=cache_dir, environment=environment)
    if snapshot is None:
        raise ModelError(
            f"{key.replace('_', ' ')} {model!r} is not on this machine, and sortd downloads nothing on its own: run "
            f"`sortd models fetch {model}` with network access, or copy the model's folder here and set `{key}:` to "
            f"its path{', or set `model: packaged`' if key == 'model' else ''}"
        )
    return snapshot


def find_snapshot(
    name: str, *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """Return the folder of a model of the hub in a local cache; None if it is in none."""
    folder = "models--" + repository_of(name).replace("/", "--")
    snapshots = (_snapshot(cache / folder) for cache in _hub_caches(cache_dir, environment))
    return next((snapshot for snapshot in snapshots if snapshot is not None), None)


def available(
    *, cache_dir: Path | None = None, environment: Mapping[str, str] = os.environ, packaged: Path = PACKAGED
) -> tuple[ModelFolder, ...]:
    """Return every model on this machine that can be ``model:`` by its name."""
    candidates: list[tuple[str, Path | None]] = [("packaged", packaged)]
    for cache in _hub_caches(cache_dir, environment):
        for folder in sorted(cache.glob("models--*--*")):
            name = folder.name.removeprefix("models--").replace("--", "/", 1)
            candidates.append((name.removeprefix("sentence-transformers/"), _snapshot(folder)))
    found: dict[str, ModelFolder] = {}
    for name, snapshot in candidates:
        if snapshot is not None:
            with suppress(ModelError):
                found.setdefault(name, verify_clip(name, snapshot))
    return tuple(found.values())


def _hub_caches(cache_dir: Path | None, environment: Mapping[str, str]) -> list[Path]:
    """Return sortd's cache and those of the hub client, by its rules but without importing it."""
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "~"), ".cache"), "huggingface"
    )
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    paths = [hub, environment.get("SENTENCE_TRANSFORMERS_HOME")]
    own = [] if cache_dir is None else [cache_dir / "models"]
    return [*own, *(Path(path).expanduser() for path in paths if path)]


def repository_of(name: str) -> str:
    """Return the name of a model's repository on the hub."""
    return name if "/" in name else f"sentence-transformers/{name}"


def _snapshot(folder: Path) -> Path | None:
    """Return the newest snapshot in a folder of a hub cache; the hub client writes its commit to refs/main."""
    with suppress(OSError):
        commit = (folder / "refs" / "main").read_text("utf-8").strip()
        snapshot = folder / "snapshots" / commit
        if commit and snapshot.is_dir():
            return snapshot
    return None


# ------------------------------------------------------------ verification of folders


def verify_clip(name: str, folder: Path) -> ModelFolder:
    """Return a folder that can be ``model:``: a CLIP (images and texts in one space), or an encoder of images.

    Raises:
        ModelError: it is another model, or takes images in another form.
    """
    model = verify_folder(name, folder)
    if model.kind in _ANY_SIZE:
        raise ModelError(
            f"model {name!r} is a {model.kind}, which takes images of any size as lists of patches (NaFlex), not of "
            f"one size, as sortd decodes them; choose a SigLIP 2 of fixed size such as google/siglip2-base-patch16-224"
        )
    if model.use is Use.WORDS:
        config = read_object(transformer_folder(model) / "config.json", name)
        kind, *_ = config.get("architectures") or ["model without an architecture"]
        raise ModelError(
            f"model {name!r} is not a CLIP: it is a {kind} ({config.get('model_type', 'of unknown type')}), which "
            f"has no image tower; set `model:` to a CLIP such as {STRONGER}, or to `packaged`"
        )
    return model


def verify_folder(name: str, folder: Path) -> ModelFolder:
    """Return a folder that holds a complete model of sentence-transformers or transformers, without code.

    Raises:
        ModelError: something is missing, or its weights are in a format that sortd does not load.
    """
    _check_access(name, folder)
    if not folder.is_dir():
        remedy = "reinstall sortd-images" if name == "packaged" else "check `model:`, or set it to `packaged`"
        raise ModelError(f"model {name!r}: the folder {folder} does not exist; {remedy}")
    modules = module_folders(name, folder)
    first = modules[0]
    config = read_object(first / "config.json", name)
    _refuse_foreign(name, first, config)
    _refuse_code(name, first)
    if (first / "adapter_config.json").exists():
        raise ModelError(
            f"model {name!r} in {folder} is an adapter (adapter_config.json) that needs another model; "
            f"merge the two (peft: merge_and_unload) and save the result"
        )
    for module in modules:
        _refuse_pickles(name, folder, module)
    if not weight_files(name, first):
        raise ModelError(f"model {name!r} in {folder} has no weights ({WEIGHTS}): fetch or copy it again completely")
    files = tuple(
        sorted(
            {path for at in modules for path in at.glob("*") if path.suffix in _CONTENT and path.is_file()}
            | {path for at in modules for path in weight_files(name, at)}
        )
    )
    for path in files:
        if not os.access(path, os.R_OK, effective_ids=True):
            raise _access_error(name, path, "read")
    size = sum(path.stat().st_size for path in files)
    use = Use.IMAGES if {"image_size", "num_channels", "patch_size"} & config.keys() else Use.WORDS
    if {"vision_config", "text_config"} <= config.keys():
        use = Use.CLIP
    return ModelFolder(name, folder, str(config.get("model_type", "unknown")), use, files, size)


def _check_access(name: str, folder: Path) -> None:
    """Raise ModelError for the parent that this user may not enter; everything below it would seem to be missing."""
    for step in (*reversed(folder.absolute().parents), folder):
        try:
            is_open = not step.exists() or os.access(step, os.X_OK, effective_ids=True)
        except PermissionError:
            is_open = False
        if not is_open:
            raise _access_error(name, step, "enter")
    if folder.is_dir() and not os.access(folder, os.R_OK, effective_ids=True):
        raise _access_error(name, folder, "list")


def _access_error(name: str, path: Path, verb: str) -> ModelError:
    return ModelError(
        f"model {name!r}: user {os.geteuid()}, who runs sortd, may not {verb} {path}; grant it (chmod a+rX), or copy "
        "the model to a folder that this user may read"
    )


def module_folders(name: str, folder: Path) -> list[Path]:
    """Return the folder of each module, in order; raise ModelError for modules with their own code."""
    if not (folder / "modules.json").exists():
        if not (folder / "config.json").exists():
            _refuse_foreign(name, folder, {})
            raise ModelError(
                f"model {name!r}: {folder} holds neither modules.json nor config.json; "
                f"set `model:` to the folder that does"
            )
        return [folder]
    modules = _read_json(folder / "modules.json", name)
    if not isinstance(modules, list) or not modules or not all(isinstance(row, dict) for row in modules):
        raise ModelError(f"model {name!r}: {folder / 'modules.json'} is not a list of modules; copy the model again")
    for row in modules:
        kind = str(row.get("type", ""))
        if not kind.startswith("sentence_transformers."):
            raise ModelError(f"model {name!r} has its own code ({kind}), which sortd does not run")
    first = str(modules[0].get("type", "")).rpartition(".")[2]
    if first not in {"Transformer", "CLIPModel"}:
        raise ModelError(f"model {name!r} is not a CLIP: its first module is a {first}, not a transformer")
    paths = [str(row.get("path", "")) for row in modules]
    for path in paths:
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ModelError(f"model {name!r}: modules.json points outside its folder ({path})")
    return [*(folder / path for path in paths), folder]


def transformer_folder(model: ModelFolder) -> Path:
    """Return the folder of a model's first module, which transformers reads."""
    return module_folders(model.name, model.folder)[0]


def weight_files(name: str, folder: Path) -> list[Path]:
    """Return the files of weights that transformers reads: ``model.safetensors``, or the parts that its index names.

    Others beside them (``open_clip_model.safetensors``) do not count. In the hub's cache files are links, whose targets
    may be missing.
    """
    single, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    found = read_object(index, name).get("weight_map")
    parts = sorted({str(part) for part in found.values()}) if isinstance(found, dict) else []
    for part in parts:
        if Path(part).name != part or not (folder / part).is_file():
            raise ModelError(f"model {name!r} is incomplete: {index} names {part}; fetch or copy it again completely")
    return [folder / part for part in parts]


def _refuse_foreign(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a folder of open_clip (MobileCLIP, too) or timm, which transformers does not read."""
    if "model_type" in config:  # some folders are for both libraries
        return
    is_open_clip = (folder / "open_clip_config.json").exists() or {"image_cfg", "text_cfg"} <= config.keys()
    if is_open_clip or any(path.suffix == ".pt" and "clip" in path.name for path in folder.glob("*.pt")):
        library, others = "open_clip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K or google/siglip2-base-patch16-224"
    elif {"architecture", "pretrained_cfg"} <= config.keys():
        library, others = "timm", "facebook/dinov2-small or clip-ViT-B-32"
    else:
        return
    raise ModelError(
        f"model {name!r}: {folder} is a folder of {library}, and sortd reads those of transformers and "
        f"sentence-transformers; choose a model such as {others}"
    )


def _refuse_code(name: str, folder: Path) -> None:
    """Raise ModelError for a model that is to be run by code in its folder, whatever type it declares."""
    for file in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            names = read_object(folder / file, name).get("auto_map")
            if names:
                shown = ", ".join(map(str, names.values() if isinstance(names, dict) else [names]))
                raise ModelError(
                    f"model {name!r} has its own code (auto_map in {file}: {shown}), which sortd does not run; choose "
                    f"a model of transformers itself, such as {STRONGER} or google/siglip2-base-patch16-224"
                )


def _refuse_pickles(name: str, folder: Path, module: Path) -> None:
    pickled = sorted(path.name for path in module.glob("*") if path.suffix in _PICKLES)
    if pickled and not weight_files(name, module):
        remedy = "load it with sentence-transformers on a machine that may run it, and save it again"
        if any(file.startswith("pytorch_model") for file in pickled):
            remedy = f"run `sortd models convert {folder}`, which accepts tensors only, or {remedy}"
        raise ModelError(
            f"model {name!r} in {module} has its weights only as {', '.join(pickled)}, a format that can run code when "
            f"it is loaded; sortd loads only {SAFETENSORS}: {remedy}"
        )


def read_object(path: Path, name: str) -> Mapping[str, Any]:
    """Return the JSON object in a file of a model; raise ModelError if it is missing, unreadable or damaged."""
    loaded = _read_json(path, name)
    if not isinstance(loaded, dict):
        raise ModelError(f"model {name!r}: {path} is not a JSON object; fetch or copy the model again")
    return loaded


def _read_json(path: Path, name: str) -> object:
    try:
        loaded: object = json.loads(read_regular(path, follow=True))
    except FileNotFoundError as error:
        raise ModelError(f"model {name!r} is incomplete: {path} is missing; fetch or copy it again") from error
    except PermissionError as error:
        raise _access_error(name, path, "read") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: cannot read {path}: {first_line(error)}; fetch or copy the model again"
        ) from error
    return loaded


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; libraries list everything that they would have accepted."""
    return next((line[:_LONGEST_LINE] for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------ digests


def digest(model: ModelFolder, *, cache_dir: Path | None = None) -> str:
    """Return the hexadecimal sha256 over a model's configuration and weights, whatever its name.

    Hashing half a gigabyte takes a second or two, so ``cache_dir`` keeps the hashes with the stamps of the files.
    """
    sums = checksums(model.files, cache_dir=cache_dir)
    lines = [f"{path.relative_to(model.folder).as_posix()}\0{sums[path]}\n" for path in model.files]
    if model.kind in PADS_TEXTS:
        lines.append("padded")  # earlier versions did not pad: their rows and exports must not be used
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def repr_digest(value: object) -> str:
    """Return the hexadecimal sha256 of the ``repr`` of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def checksums(files: Iterable[Path], *, cache_dir: Path | None = None) -> dict[Path, str]:
    """Return the hexadecimal sha256 of each file, cached as in ``digest``; raises OSError."""
    memory = None if cache_dir is None else cache_dir / "model-hashes.json"
    known: dict[str, str] = {}
    if memory is not None:
        with suppress(OSError, ValueError):  # without the cache every file is hashed
            loaded = json.loads(read_regular(memory))
            known = loaded if isinstance(loaded, dict) else {}
    count, sums = len(known), {}
    for file in files:
        facts = file.stat()
        key = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
        if key not in known:
            known[key] = sha256_of(file)
        sums[file] = known[key]
    if memory is not None and len(known) > count:
        with suppress(OSError):  # a full disk or a read-only cache: the next start hashes again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known, durable=False)
    return sums
