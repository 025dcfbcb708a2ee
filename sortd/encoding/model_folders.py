"""What a model's folder holds, read from its configuration alone: is it a CLIP, whole, and free of code?"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sortd.errors import ModelError
from sortd.files import read_regular

STRONGER = "clip-ViT-B-32"
"""What ``model: auto`` takes where it is in a local cache, and what is recommended."""

CODE_FREE = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # loading one of them can run code
IDENTITY = (CODE_FREE, ".json", ".txt", ".model")  # what decides on an embedding; a model card does not


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


def vouch(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a CLIP: two towers into one space.

    Raises:
        ModelError: It holds something else, said by name, or nothing whole.
    """
    model, use = complete(name, folder), use_of(name, folder)
    if use is not Use.CLIP:
        config = _json_object(_first_module(name, folder) / "config.json", name)
        lacks = "sees images but has no text tower" if use is Use.IMAGES else "reads text but sees no images"
        raise ModelError(
            f"model {name!r} is no CLIP: it is a {_describe(config)}, which {lacks}; set `model:` to a CLIP such as "
            f"{STRONGER}, or to `packaged`"
        )
    return model


def use_of(name: str, folder: Path) -> Use:
    """Return what a complete model folder is for, by its configuration.

    Raises:
        ModelError: it has none that can be read.
    """
    config = _json_object(_first_module(name, folder) / "config.json", name)
    if {"vision_config", "text_config"} <= config.keys():
        return Use.CLIP
    return Use.IMAGES if {"image_size", "num_channels", "patch_size"} & config.keys() else Use.WORDS


def complete(name: str, folder: Path) -> ModelFolder:
    """Make sure that a folder holds a sentence-transformers or transformers model, whole and without code.

    Raises:
        ModelError: What is missing, or in which form its weights are.
    """
    _refuse_closed(name, folder)
    if not folder.is_dir():
        mend = "reinstall sortd-images" if name == "packaged" else "check `model:`, or set it to `packaged`"
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
    if not _weights(first):
        raise ModelError(f"model {name!r} in {folder} has no weights (*{CODE_FREE}): fetch or copy it again, whole")
    files = tuple(sorted({path for at in _module_folders(name, folder) for path in _identity_files(at)}))
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
