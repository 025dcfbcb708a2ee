"""The arguments of ``transformers.Trainer``: those of the recipe, and over them what the user set."""

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from sortd.errors import ConfigError
from sortd.finetuning.recipe import CLASSIFIER_RATE, Recipe

OUR_OWN = frozenset({"label_names", "label_smoothing_factor", "optim", "output_dir", "remove_unused_columns", "seed"})
"""TrainingArguments that are not to be set: an option of sortd does it, or training relies on it."""
QUICK_BETA = 0.99
"""Of AdamW's second moment: runs of a few hundred steps are over before the usual 0.999 has seen them."""
KEPT = 2
"""Checkpoints that stay: the best and the newest."""


def training_arguments(recipe: Recipe, folder: Path, device: str, extra: Sequence[str], *, images: int) -> Any:  # noqa: ANN401 - transformers has no types
    """Return the TrainingArguments of a run.

    Args:
        recipe: what they say by themselves.
        folder: where checkpoints go.
        device: ``cpu``, ``cuda`` or ``mps``.
        extra: ``NAME=VALUE`` that come before the recipe's.
        images: how many are trained on.

    Raises:
        ConfigError: ``extra`` names what is no TrainingArguments, is not to be set, or has a value that it cannot have.
    """
    from transformers import HfArgumentParser, TrainingArguments

    each = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    epochs = recipe.passes(images, together=recipe.batch_size * each)
    steps = -(-images // (recipe.batch_size * each)) * epochs
    every = max(1, -(-steps // recipe.evaluations))
    said: dict[str, object] = {
        "output_dir": os.fspath(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": 2 * recipe.batch_size,
        "learning_rate": recipe.learning_rate or CLASSIFIER_RATE,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": QUICK_BETA,
        "lr_scheduler_type": "cosine",
        "seed": recipe.seed,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": max(1, every // 4),
        "save_total_limit": KEPT,
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
        **_precision(device),
    }
    if device == "cpu" and each > 1:
        said["ddp_backend"] = "gloo"
    given = [part for name, value in said.items() for part in (f"--{name}", str(value))]
    for pair in extra:
        name, equals, value = pair.partition("=")
        if not equals or name not in TrainingArguments.__dataclass_fields__:
            raise ConfigError(f"--set {pair}: it must be NAME=VALUE with a NAME of transformers' TrainingArguments")
        if name in OUR_OWN:
            raise ConfigError(f"--set {pair}: {name} is sortd's own to set; see `sortd finetune --help`")
        given += [f"--{name}", value]
    parser, usage = HfArgumentParser(TrainingArguments), io.StringIO()
    try:
        with redirect_stderr(usage):  # argparse prints two hundred lines before it says what it does not take
            (arguments,) = parser.parse_args_into_dataclasses(["--label_names", "labels", *given])
    except (SystemExit, ValueError) as error:
        why = (usage.getvalue().strip().splitlines() or [str(error)])[-1]
        raise ConfigError(f"--set {' '.join(extra)}: transformers does not take it: {why}") from error
    return arguments


def steps_of(arguments: Any, images: int) -> int:  # noqa: ANN401 - transformers has no types
    """Return how many steps are made with so many images."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return int(np.ceil(images / batch)) * int(np.ceil(arguments.num_train_epochs))


def _precision(device: str) -> Mapping[str, bool]:
    """Return half precision where the hardware multiplies it faster."""
    import torch

    if device == "cuda":
        return {"bf16": True} if torch.cuda.is_bf16_supported() else {"fp16": True}
    return {"bf16": device == "cpu" and has_amx()}


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether the processor multiplies matrices of bfloat16 by AMX, which is several times as fast as float32."""
    try:
        return "amx_bf16" in cpuinfo.read_text("utf-8", "replace")
    except OSError:
        return False
