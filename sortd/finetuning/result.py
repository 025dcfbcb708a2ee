"""The result of a fine-tuning: a folder that is complete when it appears under its name."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sortd.arrays import IntArray
from sortd.errors import DestinationError
from sortd.finetuned import (
    CARD_FILE,
    CONFIG_FILE,
    CONFUSION_FILE,
    CURVES_FILE,
    FACTS_FILE,
    METRICS_FILE,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    FinetunedFacts,
    facts_json,
    read_facts,
)
from sortd.finetuning.card import model_card
from sortd.finetuning.pictures import draw_confusion, draw_curves
from sortd.finetuning.plan import writing

if TYPE_CHECKING:
    import torch


def write_weights(
    folder: Path, module: "torch.nn.Module", config: Mapping[str, Any], processor: Mapping[str, Any]
) -> None:
    """Write weights, configuration and processor into a folder.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    with writing(folder):
        _write(folder / CONFIG_FILE, _json(config))
        save_tensors(module.state_dict(), folder / WEIGHTS_FILE)
        mode = (folder / CONFIG_FILE).stat().st_mode
        (folder / WEIGHTS_FILE).chmod(mode)  # safetensors writes for its owner alone; the daemon may be another user
        _write(folder / PROCESSOR_FILE, _json(processor))


def save_tensors(tensors: "Mapping[str, torch.Tensor]", file: Path) -> None:
    """Write tensors as safetensors.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        save_file(whole, file, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise DestinationError(
            f"{file} cannot be written: {error}; make room, or choose another place with --output"
        ) from (error)


def write_story(facts: FinetunedFacts, log: Sequence[Mapping[str, Any]], matrix: IntArray) -> None:
    """Write facts, metrics, pictures and card into the folder of facts, which holds the weights already.

    Args:
        facts: of the model; its metrics are written as they are.
        log: the Trainer's.
        matrix: int64 (C, C): the confusion matrix of the test images.

    Raises:
        DestinationError: the disk is full, or not to be written.
    """
    folder = facts.folder
    with writing(folder):
        _write(folder / METRICS_FILE, _json(facts.metrics))
        draw_curves(log, facts.metrics["best_step"], folder / CURVES_FILE)
        draw_confusion(matrix, facts.labels, folder / CONFUSION_FILE)
        _write(folder / CARD_FILE, model_card(facts.metrics))
        _write(folder / FACTS_FILE, facts_json(facts))


def publish(beside: Path, output: Path) -> FinetunedFacts:
    """Give a complete folder its name, durably, and return its facts as any reader finds them.

    Raises:
        DestinationError: the name is taken, or the disk refuses.
        ModelError: what was written does not read back.
    """
    read_facts(beside)
    with writing(output.parent):
        for path in (*beside.iterdir(), beside):
            _make_durable(path)
        if output.exists():
            raise DestinationError(f"{output} is there already; choose another place with --output")
        beside.rename(output)
        _make_durable(output.parent)
    return read_facts(output)


def clear(work: Path) -> None:
    """Remove a work folder that has served.

    Raises:
        DestinationError: the disk refuses.
    """
    with writing(work):
        shutil.rmtree(work)


def _write(file: Path, text: str) -> None:
    file.write_text(text, "utf-8", "backslashreplace")


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
