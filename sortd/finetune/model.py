"""The model of a fine-tuning: the base, its initial head, LoRA layers, and averaged weights."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import Array, FloatArray, IntArray, Pixels
from sortd.classify.calibration import balanced_weights, fit_temperature
from sortd.classify.gaussian import MEAN_SHRINKAGE, PSEUDO_ROWS
from sortd.encoder import models
from sortd.encoder.clip import LOADING_ERRORS, preprocessing_of
from sortd.encoder.finetuned import MAP, TOWER, Network, build_tower, head_of
from sortd.encoder.models import SAFETENSORS, first_line, weight_files
from sortd.errors import ModelError
from sortd.events import Fit, Preprocessing
from sortd.finetune.data import TrainDataset
from sortd.finetune.frozen import FrozenPart
from sortd.finetune.recipe import CLASSIFIER_RATE, TOWER_RATE, Recipe
from sortd.finetune.train import plain_views, random_views

if TYPE_CHECKING:
    import torch

VIT = "google/vit-base-patch16-224-in21k"
"""The base for ``auto`` if it is in a local cache."""
DUAL = "vision-text-dual-encoder"
SCALE_UP = 1.5
"""Default input size of a convolutional tower as a multiple of its pretraining size, which shows small details."""
STEP_PIXELS = 16
BATCH = 64
TYPICAL_FACTOR, FACTOR_SPREAD = 1.0, 0.7
"""Median, and standard deviation of the logarithm, of the prior of the factor for logits."""
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the fine-tuned weights that are tried; of equally good ones the first is taken."""
LORA_ALPHA = 2
"""``lora_alpha`` as a multiple of the rank."""


@dataclass(frozen=True, slots=True)
class Base:
    """A network to fine-tune, in evaluation mode, with a random head."""

    name: str
    module: "torch.nn.Module"
    config: Mapping[str, Any]  # the content of config.json
    processor: Mapping[str, Any]  # the content of preprocessor_config.json
    preprocessing: Preprocessing
    learning_rate: float


def find_base(name: str, *, cache_dir: Path | None = None) -> tuple[str, Path]:
    """Return the name and the folder of ``auto``, ``packaged``, a model of the Hugging Face hub, or a folder.

    Raises ModelError.
    """
    if name == "auto":
        name = "packaged" if models.find_snapshot(VIT, cache_dir=cache_dir) is None else VIT
    folder: Path | None = Path(name).expanduser()
    if name == "packaged":
        folder = models.PACKAGED
    elif Path(name).expanduser().is_dir() or name.startswith(("/", ".", "~")):
        name = os.path.abspath(Path(name).expanduser())  # a training may be resumed from another folder
    else:
        folder = models.find_snapshot(name, cache_dir=cache_dir)
    if folder is None:
        raise ModelError(
            f"base {name!r} is not on this machine: run `sortd models fetch {name}` with network access, or give the "
            "path of its folder, or use `--base packaged`"
        )
    within = sorted(folder.glob("0_*/config.json"))  # sentence-transformers' older layout: 0_CLIPModel
    if (folder / "config.json").is_file():
        return name, folder
    if not within:
        raise ModelError(f"base {name!r}: {folder} has no config.json; give the folder of a transformers model")
    return name, within[0].parent


def load_base(name: str, labels: Sequence[str], *, cache_dir: Path | None = None, side: int | None = None) -> Base:
    """Load a base (see ``find_base``) with a new head for ``labels``.

    ``side`` in pixels replaces the default input size; only convolutional towers allow it.

    Raises:
        ModelError: the base is not on this machine, is no image classifier, or does not allow this size.
    """
    found, folder = find_base(name, cache_dir=cache_dir)
    config = models.read_object(folder / "config.json", found)
    if not weight_files(found, folder):
        raise ModelError(
            f"base {found!r} in {folder} has no {SAFETENSORS} weights, and sortd loads no other kind: `sortd models "
            "fetch` converts them, or save the model again with transformers"
        )
    processor = _processor(folder, found)
    names = {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    if config.get("model_type") == DUAL:
        return _load_tower(found, folder, config, processor, names, side)
    return _load_classifier(found, folder, processor, names, side)


def _load_tower(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    names: Mapping[str, Any],
    side: int | None,
) -> Base:
    """Load the vision tower of a dual encoder such as the packaged model."""
    from safetensors.torch import load_file

    vision = dict(config["vision_config"])
    pretrained, is_hybrid = int(vision["image_size"]), bool(vision.get("is_hybrid"))
    chosen = side or (round(SCALE_UP * pretrained / STEP_PIXELS) * STEP_PIXELS if is_hybrid else pretrained)
    if chosen != pretrained and (not is_hybrid or chosen % STEP_PIXELS):
        advice = f"choose a multiple of {STEP_PIXELS}" if is_hybrid else f"its size is {pretrained}; omit --side"
        raise ModelError(f"base {name!r} does not accept images of {chosen} pixels: {advice}")
    vision["image_size"] = chosen
    if "backbone_featmap_shape" in vision:
        vision["backbone_featmap_shape"] = [*vision["backbone_featmap_shape"][:2], *2 * [chosen // STEP_PIXELS]]
    own = {
        "architectures": ["SortdTower"],
        "model_type": TOWER,
        "projection_dim": int(config["projection_dim"]),
        "features": ["embedding", MAP] if is_hybrid else ["embedding"],
        "vision_config": vision,
        **names,
    }
    module = build_tower(own)
    try:
        weights = {
            key: value.float()
            for file in weight_files(name, folder)
            for key, value in load_file(file).items()
            if key.startswith(("vision_model.", "visual_projection."))
        }
        if chosen != pretrained:
            _resize_positions(weights, chosen // STEP_PIXELS)
        lacking, unknown = module.load_state_dict(weights, strict=False)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"base {name!r} in {folder} cannot be loaded: {first_line(error)}; copy the complete folder again"
        ) from error
    missing = [key for key in lacking if not key.startswith("classifier.")]
    if missing or unknown:
        raise ModelError(f"base {name!r} in {folder} has missing or unknown weights ({(missing + unknown)[0]})")
    size = {"size": {"height": chosen, "width": chosen}, "do_resize": True, "do_center_crop": False}
    kept = {key: value for key, value in processor.items() if key not in {"crop_size", "processor_class"}}
    preprocessing = Preprocessing(chosen, chosen, chosen, int(processor.get("resample", 3)), Fit.STRETCH)
    rate = TOWER_RATE if is_hybrid else CLASSIFIER_RATE
    return Base(
        name, module.eval(), own, kept | size | {"image_processor_type": "ViTImageProcessor"}, preprocessing, rate
    )


def _resize_positions(weights: "dict[str, torch.Tensor]", places: int) -> None:
    """Interpolate the position embeddings to ``places`` per side (Dosovitskiy et al. 2021, 3.2)."""
    from torch.nn import functional

    key = next(key for key in weights if key.endswith("position_embeddings"))
    own, grid = weights[key][:, :1], weights[key][:, 1:]
    before = round(grid.shape[1] ** 0.5)
    planes = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    planes = functional.interpolate(planes, size=(places, places), mode="bilinear")
    weights[key] = functional.pad(planes.flatten(2).transpose(1, 2), (0, 0, 1, 0))
    weights[key][:, :1] = own


def _load_classifier(
    name: str, folder: Path, processor: Mapping[str, Any], names: Mapping[str, Any], side: int | None
) -> Base:
    """Load an image classifier of transformers."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    preprocessing = preprocessing_of(processor)
    if side not in {None, preprocessing.crop_height}:
        raise ModelError(f"base {name!r} needs images of {preprocessing.crop_height} pixels; omit --side")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning that the head is new
    logging.disable_progress_bar()
    try:
        module = AutoModelForImageClassification.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            num_labels=len(names["id2label"]),
            **names,
        )
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"base {name!r} in {folder} cannot be loaded as an image classifier: {first_line(error)}; choose a model "
            "that transformers' AutoModelForImageClassification supports"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    module.float().eval()
    head_of(module)
    config = json.loads(module.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # a path of this machine
    return Base(name, module, config, processor, preprocessing, CLASSIFIER_RATE)


def _processor(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the settings of the image processor; transformers 5 may write them into processor_config.json."""
    joint = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and joint.is_file():
        held = models.read_object(joint, name).get("image_processor")
        if isinstance(held, dict):
            return held
    return models.read_object(folder / "preprocessor_config.json", name)


View = Callable[["torch.Tensor"], "torch.Tensor"]
"""From planes (B, 3, h, w) to float32 of the network's size."""


def views_of(recipe: Recipe, size: tuple[int, int], *, random: int) -> list[View]:
    """Return views of images: plain, mirrored if the recipe allows it, and so many random ones."""
    views: list[View] = [lambda pixels: plain_views(pixels, size)]
    if recipe.flips:
        views.append(lambda pixels: plain_views(pixels, size).flip(-1))
    return [*views, *random * [lambda pixels: random_views(pixels, size, recipe)]]


def init_head(
    network: Network,
    train: TrainDataset,
    validation: TrainDataset,
    recipe: Recipe,
    *,
    size: tuple[int, int],
    frozen: FrozenPart | None = None,
) -> None:
    """Set the head of a network to ``gaussian_head`` of frozen features; ``validation`` calibrates its scale.

    As in "linear probing, then fine-tuning" (Kumar et al. 2022), since the gradients of a random head would damage the
    pretrained features. With a frozen part, the images are given by its features.
    """
    import torch

    views = views_of(recipe, size, random=1)
    torch.manual_seed(recipe.seed)
    if frozen is None:
        parts = [_features(network, train.pixels, _seen(network, view)) for view in views]
        plain = _features(network, validation.pixels, _seen(network, views[0]))
    else:
        images, start = len(train), partial(frozen.start_at, size=size)
        stored = (train.pixels[at * images : (at + 1) * images] for at in range(min(len(views), train.views)))
        parts = [_features(network, one, start) for one in stored]
        plain = _features(network, validation.pixels, start)
    rows, count = np.concatenate(parts).astype(np.float64), len(parts)
    classes, weights = np.tile(train.classes, count), np.tile(train.weights, count).astype(np.float64)
    weight, bias = gaussian_head(rows, classes, weights / count, count=network.classes)
    held = plain.astype(np.float64) @ weight.T + bias
    factor = 1.0 / temperature_of(held.astype(np.float32), validation.classes)
    head = head_of(network.module)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(factor * weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(factor * bias))


def gaussian_head(features: Array, classes: IntArray, weights: Array, *, count: int) -> tuple[Array, Array]:
    """Return weight (C, d) and bias (C,) of a linear layer whose outputs are log likelihoods up to a constant.

    It is the Gaussian of docs/decisions.md, section "best", without unit length of rows, which is not linear. Rows of
    ``features`` (N, d) have ``weights`` (N,); a class without images has the common mean.
    """
    held = np.bincount(classes, weights=weights, minlength=count)
    present = held > 0
    means = np.zeros((count, features.shape[1]))
    np.add.at(means, classes, weights[:, None] * features)
    means[present] /= held[present, None]
    center = means[present].mean(axis=0)
    means[~present] = center
    shares = weights / held[classes] / present.sum()
    variance = shares @ np.square(features - center)
    typical = max(float(variance.mean()), 1e-12)
    steady = (len(features) * variance + PSEUDO_ROWS * typical) / (len(features) + PSEUDO_ROWS)
    scale = 1.0 / np.sqrt(steady)
    residuals = (features - means[classes]) * scale
    freedom, width = float(weights.sum() - present.sum()), features.shape[1]
    within = (residuals * weights[:, None]).T @ residuals / max(freedom, 1.0)
    share = width / (width + max(freedom, 0.0))
    shrunk = (1.0 - share) * within
    shrunk[np.diag_indices(width)] += share * max(float(np.trace(within)) / width, 1e-6)
    drawn = (means - center) * scale * (held / (held + MEAN_SHRINKAGE))[:, None]
    weight = np.linalg.solve(shrunk, drawn.T).T
    bias = -0.5 * np.einsum("cd,cd->c", weight, drawn)
    weight = weight * scale
    return weight, bias - weight @ center


def temperature_of(logits: FloatArray, own: IntArray) -> float:
    """Return the temperature (Guo et al. 2017) of logits (V, C) with correct classes (V,) and a log-normal prior."""
    table = logits.astype(np.float64)
    weights = balanced_weights(own, table.shape[1])
    factor, _ = fit_temperature(table, own, weights, typical=TYPICAL_FACTOR, spread=FACTOR_SPREAD)
    return 1.0 / factor


def logits_in_batches(network: Network, pixels: Pixels) -> FloatArray:
    """Return float32 (N, C) logits of memory-mapped images uint8 (N, H, W, 3)."""
    found = [network.logits(np.asarray(part)) for part in _batches(pixels)]
    return np.concatenate(found) if found else np.zeros((0, network.classes), np.float32)


def _seen(network: Network, view: View) -> "Callable[[torch.Tensor], object]":
    """Return the forward pass of a view of pixels (B, h, w, 3)."""
    return lambda pixels: network.module(pixel_values=network.values(view(pixels.permute(0, 3, 1, 2))))


def _features(network: Network, images: npt.NDArray[Any], forward: "Callable[[torch.Tensor], object]") -> FloatArray:
    """Return float32 (N, d): the input of the head for each image."""
    import torch

    seen: list[torch.Tensor] = []
    hook = head_of(network.module).register_forward_pre_hook(lambda _, given: seen.append(given[0].float().cpu()))
    try:
        with torch.inference_mode():
            for part in _batches(images):
                forward(torch.from_numpy(np.array(part)).to(network.device))
    finally:
        hook.remove()
    return np.asarray(torch.cat(seen).numpy(), dtype=np.float32)


def _batches(images: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def add_lora(module: "torch.nn.Module", rank: int) -> "torch.nn.Module":
    """Return the module with LoRA layers; only these and the head are trained.

    Raises:
        ModelError: peft is not installed, or the network has no linear layer except its head.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("--lora needs peft: pip install 'sortd-images[lora]'") from error
    from torch import nn

    head = head_of(module)
    names = {one: name for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    name_of_head = names.pop(head)
    if not names:
        raise ModelError(f"a {type(module).__name__} has no linear layer but its head; leave --lora out")
    targets = list(names.values())
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA * rank, target_modules=targets, modules_to_save=[name_of_head])
    added: torch.nn.Module = get_peft_model(module, config)
    return added


def weights_of(module: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """Return a copy of all weights and statistics, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def average_with_start(
    module: "torch.nn.Module",
    start: "Mapping[str, torch.Tensor]",
    *,
    logits: Callable[[], FloatArray],
    score: Callable[[FloatArray], float],
) -> tuple[float, dict[str, float]]:
    """Load the best average of ``start`` and the module's weights into the module (WiSE-FT, Wortsman et al. 2022).

    ``logits`` returns the logits of the validation images, ``score`` their score. Return the chosen share of the
    fine-tuned weights, and the scores of all shares.
    """
    end = weights_of(module)

    def put(share: float) -> None:
        module.load_state_dict(
            {
                name: value.lerp(end[name], share) if value.is_floating_point() else end[name]
                for name, value in start.items()
            }
        )

    found: dict[float, float] = {}
    for share in SHARES:
        put(share)
        found[share] = score(logits())
    best = max(SHARES, key=lambda share: found[share])
    put(best)
    return best, {f"{share:g}": value for share, value in found.items()}
