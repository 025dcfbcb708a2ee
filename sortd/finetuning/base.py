"""The base: the model that fine-tuning starts from, found on this disk and given a head of its own."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sortd.encoding import models
from sortd.encoding.model_folders import CODE_FREE, first_line
from sortd.encoding.torch_encoder import preprocessing_of
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.finetuning.network import LOADING_ERRORS, MAP, TOWER, build_tower, head_of
from sortd.finetuning.recipe import CLASSIFIER_RATE, TOWER_RATE

if TYPE_CHECKING:
    import torch

VIT = "google/vit-base-patch16-224-in21k"
"""What ``base: auto`` is where it is in a local cache."""
DUAL = "vision-text-dual-encoder"
SEEN_LARGER = 1.5
"""How much larger a convolutional tower sees images than it was taught on: it does not mind, and small things show."""
STEP_PIXELS = 16


@dataclass(frozen=True, slots=True)
class Base:
    """A network to fine-tune, in evaluation mode, its head not taught yet."""

    name: str
    module: "torch.nn.Module"
    config: Mapping[str, Any]
    """What config.json will hold."""
    processor: Mapping[str, Any]
    """What preprocessor_config.json will hold."""
    preprocessing: Preprocessing
    learning_rate: float
    """What suits it where nobody says another."""


def load_base(name: str, labels: Sequence[str], *, cache_dir: Path | None = None, side: int | None = None) -> Base:
    """Load a base from this disk with a head for some classes.

    Args:
        name: ``auto``, ``packaged``, a name of the hub, or a folder.
        labels: the classes, in the order of the logits.
        cache_dir: sortd's cache, where ``sortd models fetch`` puts models.
        side: pixels of the side of what the network is to see; None leaves it to the base. Only networks that do not
            mind another size take one.

    Raises:
        ModelError: it is not here, is no image classifier, or cannot see images of that size.
    """
    found, folder = find_base(name, cache_dir=cache_dir)
    config = _json(folder / "config.json", found)
    _refuse_pickles(folder, found)
    if config.get("model_type") == DUAL:
        return _tower(found, folder, config, labels, side)
    return _classifier(found, folder, labels, side)


def find_base(name: str, *, cache_dir: Path | None = None) -> tuple[str, Path]:
    """Return which base a name means here, and the folder of its network; see ``load_base``.

    Raises:
        ModelError: it is not here.
    """
    found, folder = _place(name, cache_dir)
    if (folder / "config.json").is_file():
        return found, folder
    within = sorted(folder.glob("0_*/config.json"))  # sentence-transformers' older layout: 0_CLIPModel
    if not within:
        raise ModelError(f"base {name!r}: {folder} holds no config.json; give the folder of a transformers model")
    return found, within[0].parent


def _place(name: str, cache_dir: Path | None) -> tuple[str, Path]:
    if name == "auto":
        cached = models.snapshot_of(VIT, cache_dir=cache_dir)
        return ("packaged", models.PACKAGED) if cached is None else (VIT, cached)
    if name == "packaged":
        return name, models.PACKAGED
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith(("/", ".", "~")):
        return os.path.abspath(folder), folder  # it may be resumed from elsewhere
    cached = models.snapshot_of(name, cache_dir=cache_dir)
    if cached is None:
        raise ModelError(
            f"base {name!r} is not on this machine, and sortd downloads nothing by itself: run `sortd models fetch "
            f"{name}` where there is a network, or copy its folder here and give the path, or take `--base packaged`"
        )
    return name, cached


def _refuse_pickles(folder: Path, name: str) -> None:
    if not any(path.is_file() for path in folder.glob(f"*{CODE_FREE}")):
        raise ModelError(
            f"base {name!r} in {folder} has no {CODE_FREE} weights, and sortd loads no other kind: `sortd models "
            "fetch` converts them, or save the model again with transformers"
        )


# ---------------------------------------------------------------- a tower of a dual encoder, as the packaged model is


def _tower(name: str, folder: Path, config: Mapping[str, Any], labels: Sequence[str], side: int | None) -> Base:
    """Build the vision tower of a dual encoder with a head, at a larger size than it was taught on."""
    from safetensors.torch import load_file

    vision = dict(config["vision_config"])
    taught = int(vision["image_size"])
    is_hybrid = bool(vision.get("is_hybrid"))
    larger = round(SEEN_LARGER * taught / STEP_PIXELS) * STEP_PIXELS if is_hybrid else taught
    chosen = side or larger
    if chosen != taught and (not is_hybrid or chosen % STEP_PIXELS):
        mend = f"choose a multiple of {STEP_PIXELS}" if is_hybrid else f"it takes {taught}; leave --side out"
        raise ModelError(f"base {name!r} cannot see images of {chosen} pixels: {mend}")
    own = {
        "architectures": ["SortdTower"],
        "model_type": TOWER,
        "projection_dim": int(config["projection_dim"]),
        "features": ["embedding", MAP] if is_hybrid else ["embedding"],
        "vision_config": _resized(vision, chosen),
        **_names(labels),
    }
    module = build_tower(own)
    try:
        weights = {
            key: value.float()
            for file in sorted(folder.glob(f"*{CODE_FREE}"))
            for key, value in load_file(file).items()
            if key.startswith(("vision_model.", "visual_projection."))
        }
        if chosen != taught:
            _resize_positions(weights, chosen // STEP_PIXELS)
        lacking, unknown = module.load_state_dict(weights, strict=False)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"base {name!r} in {folder} does not load: {first_line(error)}; copy it again, whole"
        ) from error
    missing = [key for key in lacking if not key.startswith("classifier.")]
    if missing or unknown:
        raise ModelError(f"base {name!r} in {folder} lacks or has too many weights ({(missing + unknown)[0]})")
    processor = _processor(folder, name)
    processor |= {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_center_crop": False}
    processor |= {"size": {"height": chosen, "width": chosen}}
    for key in ("crop_size", "processor_class"):
        processor.pop(key, None)
    seen = Preprocessing(chosen, chosen, chosen, int(processor.get("resample", 3)), Fit.STRETCH)
    return Base(name, module.eval(), own, processor, seen, TOWER_RATE if is_hybrid else CLASSIFIER_RATE)


def _resized(vision: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Return the configuration of a vision tower that sees images of another size."""
    changed = {**vision, "image_size": side}
    if "backbone_featmap_shape" in vision:
        channels = vision["backbone_featmap_shape"][:2]
        changed["backbone_featmap_shape"] = [*channels, side // STEP_PIXELS, side // STEP_PIXELS]
    return changed


def _resize_positions(weights: "dict[str, torch.Tensor]", places: int) -> None:
    """Interpolate the position embeddings to another number of places a side (Dosovitskiy et al. 2021, 3.2)."""
    from torch.nn import functional

    key = next(key for key in weights if key.endswith("position_embeddings"))
    own, grid = weights[key][:, :1], weights[key][:, 1:]
    before = round(grid.shape[1] ** 0.5)
    planes = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    planes = functional.interpolate(planes, size=(places, places), mode="bilinear")
    weights[key] = functional.pad(planes.flatten(2).transpose(1, 2), (0, 0, 1, 0))
    weights[key][:, :1] = own


# ---------------------------------------------------------------- every other image classifier of transformers


def _classifier(name: str, folder: Path, labels: Sequence[str], side: int | None) -> Base:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    processor = _processor(folder, name)
    preprocessing = preprocessing_of(processor)
    if side not in {None, preprocessing.crop_height}:
        raise ModelError(f"base {name!r} takes images of {preprocessing.crop_height} pixels; leave --side out")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no news here
    logging.disable_progress_bar()
    try:
        module = AutoModelForImageClassification.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            num_labels=len(labels),
            **_names(labels),
        )
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"base {name!r} in {folder} cannot be loaded as an image classifier: {first_line(error)}; choose a model "
            "that transformers' AutoModelForImageClassification takes"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    module.float().eval()
    head_of(module)
    own = json.loads(module.config.to_json_string(use_diff=False))
    own.pop("_name_or_path", None)  # where the base lay on this machine
    return Base(name, module, own, processor, preprocessing, CLASSIFIER_RATE)


def _names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _processor(folder: Path, name: str) -> dict[str, Any]:
    """Return the image processor's settings; transformers 5 writes them into those of the whole processor."""
    joint = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and joint.is_file():
        held = _json(joint, name).get("image_processor")
        if isinstance(held, dict):
            return dict(held)
    return _json(folder / "preprocessor_config.json", name)


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"base {name!r}: {os.fspath(path)} is missing; copy the model again, whole") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"base {name!r}: cannot read {path}: {first_line(error)}; copy the model again") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"base {name!r}: {path} is no JSON object; copy the model again")
    return loaded
