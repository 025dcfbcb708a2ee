"""Training with ``transformers.Trainer``, which also resumes, and supports mixed precision and several GPUs."""

import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd.arrays import FloatArray, IntArray
from sortd.classify.calibration import log_softmax
from sortd.encoder.finetuned import Network, head_of
from sortd.encoder.quantize import processor_flags
from sortd.errors import ConfigError, DestinationError
from sortd.finetune.data import TrainDataset
from sortd.finetune.frozen import BLOCK, FrozenPart
from sortd.finetune.recipe import CLASSIFIER_RATE, Observer, Recipe, TrainingProgress, TrainingStoppedError

if TYPE_CHECKING:
    import torch

RESERVED = frozenset({"label_names", "label_smoothing_factor", "optim", "output_dir", "remove_unused_columns", "seed"})
"""TrainingArguments that ``--set`` may not change: sortd has an option for them, or relies on their values."""
AMX = "amx_bf16"
"""The flag of processors on which bfloat16 is several times as fast as float32."""
BETA2 = 0.99
"""AdamW's second beta; the default 0.999 is too slow for runs of a few hundred steps."""
CHECKPOINTS = 2
"""Number of checkpoints that are kept: the best and the newest."""
STATE_FILE = "trainer_state.json"
"""The last file of a checkpoint that the Trainer writes."""
DISK_ERRORS = ("os error", "PytorchStreamWriter", "unexpected pos")
"""Parts of the messages of safetensors and ``torch.save`` on a full disk, which raise no ``OSError``."""
ACCURACY_WEIGHT = 0.5
"""Weight of the balanced accuracy in the score of a checkpoint; the rest is the log loss, which is more sensitive with
few validation images."""
LARGEST_STRETCH = 4 / 3
"""Largest aspect ratio of a crop, as in torchvision's RandomResizedCrop."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training."""

    recipe: Recipe
    folder: Path  # for checkpoints
    device: str  # ``cpu``, ``cuda`` or ``mps``
    resume: bool = False
    extra: Sequence[str] = ()  # ``NAME=VALUE`` of transformers' TrainingArguments, in place of the recipe's
    observer: Observer = field(default_factory=Observer)


def train(
    model: "torch.nn.Module", dataset: TrainDataset, validation: TrainDataset, settings: TrainSettings
) -> dict[str, Any]:
    """Train the model of ``make_model`` in place, load its best checkpoint, and return ``best_step`` and ``log``.

    Raises:
        TrainingStoppedError: the observer asked to stop; a checkpoint was written.
        DestinationError: a checkpoint cannot be written.
        ConfigError: see ``training_arguments``.
    """
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

    arguments = training_arguments(settings, images=len(dataset))
    recipe = replace(settings.recipe, weight_decay=arguments.weight_decay)
    groups = parameter_groups(model.get_submodule("module"), recipe, learning_rate=arguments.learning_rate)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=_collate,
        compute_metrics=lambda found: score_of(found.predictions, found.label_ids),
        callbacks=[EarlyStoppingCallback(recipe.patience), _listener(settings.observer)],
        optimizers=(torch.optim.AdamW(groups, betas=(arguments.adam_beta1, arguments.adam_beta2)), None),
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    newest = newest_checkpoint(settings.folder) if settings.resume else None
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else os.fspath(newest))
    except Exception as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in DISK_ERRORS):
            raise
        raise DestinationError(
            f"{settings.folder} cannot be written ({getattr(error, 'strerror', None) or error}); free space and "
            "continue from the last checkpoint with --resume"
        ) from error
    state = trainer.state
    if settings.observer.is_asked_to_stop():
        raise TrainingStoppedError(f"stopped at step {state.global_step} of {state.max_steps}; a checkpoint is written")
    return {"best_step": state.best_global_step, "log": list(state.log_history)}


def training_arguments(settings: TrainSettings, *, images: int) -> Any:  # noqa: ANN401 - transformers has no types
    """Return the TrainingArguments.

    Raises:
        ConfigError: ``extra`` has an unknown or reserved name, or an invalid value.
    """
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    recipe, device = settings.recipe, settings.device
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    batch = max(1, recipe.batch_size // processes)  # of each process, which have a part of each step
    epochs = recipe.epochs_for(images, images_per_step=batch * processes)
    steps = math.ceil(images / (batch * processes)) * epochs
    interval = max(1, math.ceil(steps / recipe.evaluations))
    takes_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else device == "cpu" and AMX in processor_flags()
    said: dict[str, object] = {
        "label_names": "labels",
        "output_dir": os.fspath(settings.folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2 * batch,
        "learning_rate": recipe.learning_rate or CLASSIFIER_RATE,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": BETA2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup,  # a share if below 1
        "seed": recipe.seed,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "eval_steps": interval,
        "save_steps": interval,
        "logging_steps": max(1, interval // 4),
        "save_total_limit": CHECKPOINTS,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_score",
        "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "log_level": "error",
        "bf16": takes_bf16,
        "fp16": device == "cuda" and not takes_bf16,
    }
    if device == "cpu" and processes > 1:
        said["ddp_backend"] = "gloo"
    given = [part for name, value in said.items() for part in (f"--{name}", str(value))]
    for pair in settings.extra:
        name, equals, value = pair.partition("=")
        if not equals or name not in TrainingArguments.__dataclass_fields__:
            raise ConfigError(f"--set {pair}: it must be NAME=VALUE with a NAME of transformers' TrainingArguments")
        if name in RESERVED:
            raise ConfigError(f"--set {pair}: {name} is set by sortd; see `sortd finetune --help`")
        given += [f"--{name}", value]
    usage = io.StringIO()
    try:
        with redirect_stderr(usage):  # argparse prints its usage before the error
            (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(given)
    except (SystemExit, ValueError) as error:
        why = (usage.getvalue().strip().splitlines() or [str(error)])[-1]
        raise ConfigError(f"--set {' '.join(settings.extra)}: rejected by transformers: {why}") from error
    return arguments


def score_of(logits: FloatArray, own: IntArray) -> dict[str, float]:
    """Return accuracy, balanced accuracy, log loss, and the score for the comparison of checkpoints."""
    logs = log_softmax(logits.astype(np.float64))
    right = logits.argmax(axis=1) == own
    balanced = float(np.mean([right[own == label].mean() for label in np.unique(own)]))
    loss = float(-logs[np.arange(len(own)), own].mean())
    score = ACCURACY_WEIGHT * balanced - (1 - ACCURACY_WEIGHT) * loss / float(np.log(max(logits.shape[1], 2)))
    return {"accuracy": float(right.mean()), "balanced_accuracy": balanced, "log_loss": loss, "score": score}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, and remove newer incomplete ones."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            if isinstance(json.loads((path / STATE_FILE).read_text("utf-8")), dict):
                return path
        except (OSError, ValueError):
            pass
        shutil.rmtree(path, ignore_errors=True)  # another process of the training may do the same
    return None


def _collate(chosen: TrainDataset) -> "dict[str, torch.Tensor]":
    """Return the arguments of the model as tensors that share the memory of ``chosen``."""
    import torch

    return {
        "pixels": torch.from_numpy(np.asarray(chosen.pixels)),
        "labels": torch.from_numpy(chosen.classes),
        "weights": torch.from_numpy(chosen.weights),
    }


def _listener(observer: Observer) -> Any:  # noqa: ANN401 - transformers has no types
    """Return the callback that reports progress and stops the training on request."""
    from transformers import TrainerCallback

    class Listener(TrainerCallback):  # type: ignore[misc]  # transformers has no types; it wants this class inherited
        """Calls the observer."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002 - theirs
            observer.progress(TrainingProgress(state.global_step, state.max_steps))
            if observer.is_asked_to_stop():
                control.should_save = control.should_training_stop = True

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401, ARG002 - theirs
            accuracy = (given.get("metrics") or {}).get("eval_accuracy")
            observer.progress(TrainingProgress(state.global_step, state.max_steps, accuracy))

    return Listener()


def make_model(
    network: Network, size: tuple[int, int], dataset: TrainDataset, recipe: Recipe, frozen: FrozenPart | None = None
) -> "torch.nn.Module":
    """Return the module to train: augmentation, normalisation, network and weighted loss.

    Batch norms keep their statistics, since those of small batches are worse. Classes are weighted by their images in
    ``dataset``; ``size`` is height and width of the network's input. With a frozen part, the inputs are its features.
    """
    import torch
    from torch import nn

    held = np.bincount(dataset.classes, weights=dataset.weights, minlength=network.classes)
    rarity = np.where(held > 0, np.maximum(held, 1e-6), 1.0) ** -recipe.balance
    class_weights = torch.from_numpy(rarity * held.sum() / (rarity * held).sum()).float()  # 1 on average

    class ModelWithLoss(nn.Module):
        """Raw pixels, uint8 (B, h, w, 3), or features (B, ...), to a loss."""

        def __init__(self) -> None:
            super().__init__()
            self.module = network.module
            self.register_buffer("class_weights", class_weights, persistent=False)

        def train(self, mode: bool = True) -> "ModelWithLoss":  # noqa: FBT001 - torch's own signature
            super().train(mode)
            for one in self.module.modules():
                if isinstance(one, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the one name for all of them
                    one.eval()
            return self

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
            if frozen is not None:
                output = frozen.start_at(pixels, size)
            else:
                with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                    planes = pixels.permute(0, 3, 1, 2)
                    seen = random_views(planes, size, recipe) if self.training else plain_views(planes, size)
                    values = network.values(seen)
                output = self.module(pixel_values=values)
            logits = getattr(output, "logits", output).float()
            smoothing = recipe.label_smoothing if self.training else 0.0
            losses = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            shares = weights * self.get_buffer("class_weights")[labels]
            return {"loss": (losses * shares).sum() / shares.sum().clamp(min=1e-6), "logits": logits}

    return ModelWithLoss()


def parameter_groups(module: "torch.nn.Module", recipe: Recipe, *, learning_rate: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: layer-wise learning rates, and no decay of head, biases and norms.

    Each numbered block (``encoder.layer.3``, ``stages.1``) is one layer; parameters outside belong to the block before.
    """
    head = {id(parameter) for parameter in head_of(module).parameters()}
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    depths: dict[str, int] = {}
    blocks: set[str] = set()
    for name, _ in named:
        if found := BLOCK.match(name):
            blocks.add(found.group(1))
        depths[name] = len(blocks)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        above = 0 if id(parameter) in head else len(blocks) + 1 - depths[name]
        rate = learning_rate * recipe.layer_decay**above
        decay = recipe.weight_decay if parameter.ndim > 1 and id(parameter) not in head else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def random_views(pixels: "torch.Tensor", size: tuple[int, int], recipe: Recipe) -> "torch.Tensor":
    """Return images (B, 3, h, w) with random crop, flip and colours, float32 (B, 3, height, width), 0 to 255."""
    import torch
    from torch.nn import functional

    planes, count = pixels.float(), len(pixels)

    def uniform(low: float, high: float) -> "torch.Tensor":
        return torch.empty(count, device=planes.device).uniform_(low, high)

    area = uniform(recipe.smallest_area, 1.0)
    stretch = uniform(-math.log(LARGEST_STRETCH), math.log(LARGEST_STRETCH)).exp()
    width, height = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    turn = torch.where(uniform(0, 1) < (0.5 if recipe.flips else 0.0), -1.0, 1.0)
    affine = torch.zeros(count, 2, 3, device=planes.device)
    affine[:, 0, 0], affine[:, 0, 2] = width * turn, uniform(-1, 1) * (1 - width)
    affine[:, 1, 1], affine[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(affine, [count, 3, *size], align_corners=False)
    planes = functional.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (
        uniform(1 - recipe.jitter, 1 + recipe.jitter).view(-1, 1, 1, 1) for _ in range(3)
    )
    planes = planes * brightness
    middle = planes.mean(dim=(1, 2, 3), keepdim=True)
    planes = (planes - middle) * contrast + middle
    grey = planes.mean(dim=1, keepdim=True)
    return ((planes - grey) * saturation + grey).clamp(0, 255)


def plain_views(pixels: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """Return images (uint8 (B, 3, h, w)) resized to height and width; float32, 0 to 255."""
    from torch.nn import functional

    planes = pixels.float()
    if tuple(planes.shape[-2:]) == size:
        return planes
    return functional.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp(0, 255)
