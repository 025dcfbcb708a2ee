"""Training: ``transformers.Trainer`` with this recipe's optimizer, checkpoints to resume from, and a way to stop.

Resuming, mixed precision, and several GPUs by ``torchrun`` or ``accelerate launch`` are the Trainer's own.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sortd.arrays import FloatArray, IntArray, Pixels
from sortd.errors import DestinationError, StartupError
from sortd.finetuning.arguments import steps_of, training_arguments
from sortd.finetuning.recipe import Recipe
from sortd.finetuning.trainee import parameter_groups

if TYPE_CHECKING:
    import torch


STATE_FILE = "trainer_state.json"
"""The Trainer writes it last: a checkpoint that has it is whole."""
DISK_TROUBLE = ("os error", "PytorchStreamWriter", "unexpected pos")
"""What safetensors and ``torch.save`` say where a disk is full: they raise errors of their own, not ``OSError``."""
ACCURACY_WEIGHT = 0.5
"""Of the balanced accuracy against the log loss in the score by which checkpoints are compared: the first is what is
wanted, the second is less coarse where validation images are few."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """Images to train on or to look at, with their classes and weights."""

    pixels: Pixels
    """uint8 (N, h, w, 3), maybe mapped from a file."""
    classes: IntArray
    """int64 (N,)."""
    weights: FloatArray
    """float32 (N,)."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.classes)

    def __getitems__(self, indices: Sequence[int]) -> "Lesson":
        """Return some of them at once, as torch's loader asks for where it can."""
        return Lesson(self.pixels[indices], self.classes[indices], self.weights[indices])


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come."""

    step: int
    steps: int
    epoch: float
    score: float | None = None
    """The last one; see ``score_of``."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Who watches a training."""

    finished: Callable[[str], None] = lambda _: None
    """Told of every part that is done."""
    progress: Callable[[Progress], None] = lambda _: None
    """Told how far training has come, after each step."""
    is_asked_to_stop: Callable[[], bool] = lambda: False
    """Asked after each step."""


class StoppedError(StartupError):
    """Training was interrupted; its checkpoint is whole and it can be resumed."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves beside the weights."""

    log: list[dict[str, Any]]
    """The Trainer's: rows with ``step``, ``epoch`` and ``loss`` or ``eval_...``."""
    best_step: int | None
    """Whose checkpoint was taken."""


@dataclass(frozen=True)
class Schedule:
    """What a training is given beside its images."""

    recipe: Recipe
    folder: Path
    """Where checkpoints go."""
    device: str
    """``cpu``, ``cuda`` or ``mps``."""
    resume: bool = False
    extra: Sequence[str] = ()
    """``NAME=VALUE`` of transformers' TrainingArguments, over what the recipe says."""
    observer: Observer = field(default_factory=Observer)


def train(trainee: "torch.nn.Module", lesson: Lesson, validation: Lesson, schedule: Schedule) -> Trained:
    """Train in place; the best weights are in the trainee (see ``make_trainee``) afterwards.

    Raises:
        StoppedError: it was asked to stop; a checkpoint was written.
        DestinationError: a checkpoint could not be written.
        ConfigError: ``extra`` names what is no TrainingArguments.
    """
    import torch
    from transformers import EarlyStoppingCallback, Trainer, get_scheduler

    arguments = training_arguments(
        schedule.recipe, schedule.folder, schedule.device, schedule.extra, images=len(lesson)
    )
    steps = steps_of(arguments, len(lesson))
    recipe = replace(schedule.recipe, weight_decay=arguments.weight_decay)
    groups = parameter_groups(trainee.get_submodule("module"), recipe, learning_rate=arguments.learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=(arguments.adam_beta1, arguments.adam_beta2))
    warmup = arguments.warmup_steps if arguments.warmup_steps >= 1 else recipe.warmup * steps
    rates = get_scheduler(arguments.lr_scheduler_type, optimizer, round(warmup), steps)
    trainer = Trainer(
        model=trainee,
        args=arguments,
        train_dataset=lesson,
        eval_dataset=validation,
        data_collator=_collate,
        compute_metrics=lambda found: score_of(found.predictions, found.label_ids),
        callbacks=[EarlyStoppingCallback(recipe.patience), *_listeners(schedule)],
        optimizers=(optimizer, rates),
    )
    _forget_printing(trainer)
    newest = newest_checkpoint(schedule.folder) if schedule.resume else None
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else os.fspath(newest))
    except OSError as error:
        raise DestinationError(
            f"{schedule.folder} cannot be written ({error.strerror or error}); make room there, and add --resume: "
            "the checkpoints before are whole"
        ) from error
    except Exception as error:
        if not any(sign in str(error) for sign in DISK_TROUBLE):
            raise
        raise DestinationError(  # safetensors and torch.save have errors of their own for a full disk
            f"{schedule.folder} cannot be written ({error}); make room there, and add --resume: the checkpoints before "
            "are whole"
        ) from error
    if schedule.observer.is_asked_to_stop():
        raise StoppedError(f"stopped at step {trainer.state.global_step} of {steps}; its checkpoint is whole")
    return Trained(list(trainer.state.log_history), trainer.state.best_global_step)


def score_of(logits: npt.NDArray[np.float32], own: IntArray) -> dict[str, float]:
    """Return accuracy, balanced accuracy, log loss, and the ``score`` by which checkpoints are compared."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    right = logits.argmax(axis=1) == own
    balanced = float(np.mean([right[own == label].mean() for label in np.unique(own)]))
    loss = float(-logs[np.arange(len(own)), own].mean())
    score = ACCURACY_WEIGHT * balanced - (1 - ACCURACY_WEIGHT) * loss / float(np.log(max(logits.shape[1], 2)))
    return {"accuracy": float(right.mean()), "balanced_accuracy": balanced, "log_loss": loss, "score": score}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, and remove those that were not."""
    found = [(int(match.group(1)), path) for path in folder.glob("checkpoint-*") if (match := _numbered(path))]
    for _, path in sorted(found, reverse=True):
        if _is_whole(path):
            return path
        shutil.rmtree(path, ignore_errors=True)  # another process of the team may be at it
    return None


def _numbered(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def _collate(chosen: Lesson) -> "dict[str, torch.Tensor]":
    """Return what the trainee is called with; ``chosen`` is a copy, whose memory the tensors share."""
    import torch

    return {
        "pixels": torch.from_numpy(np.asarray(chosen.pixels)),
        "labels": torch.from_numpy(chosen.classes),
        "weights": torch.from_numpy(chosen.weights),
    }


def _listeners(schedule: Schedule) -> list[Any]:
    """Return the callbacks that tell how far it is, and that end training at the next step when asked to."""
    from transformers import TrainerCallback

    class Listener(TrainerCallback):  # type: ignore[misc]  # transformers has no types; it wants this class inherited
        """Between two steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002 - theirs
            schedule.observer.progress(Progress(state.global_step, state.max_steps, float(state.epoch or 0)))
            if schedule.observer.is_asked_to_stop():
                control.should_save = control.should_training_stop = True

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401, ARG002 - theirs
            score = (given.get("metrics") or {}).get("eval_accuracy")
            schedule.observer.progress(Progress(state.global_step, state.max_steps, float(state.epoch or 0), score))

    return [Listener()]


def _forget_printing(trainer: Any) -> None:  # noqa: ANN401 - transformers has no types
    """Let the Trainer print nothing: stdout is for facts."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
