"""The result folder of a fine-tuning: weights, facts, metrics, figures and model card."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sortd.arrays import IntArray
from sortd.encoder.finetuned import (
    CONFIG_FILE,
    FACTS_FILE,
    METRICS_FILE,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    FinetunedFacts,
    facts_json,
    read_facts,
)
from sortd.errors import DestinationError
from sortd.files import sync_folder_at
from sortd.finetune.data import disk_errors_translated

if TYPE_CHECKING:
    import torch

CARD_FILE, CARD_TEMPLATE = "README.md", "model_card.md.j2"
CURVES_FILE, CONFUSION_FILE = "curves.png", "confusion.png"
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 9.0, 3.6, 120
LARGEST_INCHES = 20.0
FEW_CLASSES = 25
"""Largest number of classes with numbers in the cells of the confusion matrix."""


def write_result(
    facts: FinetunedFacts,
    table: IntArray,
    module: "torch.nn.Module",
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
) -> None:
    """Write all files of a result into the empty folder ``facts.folder``; ``table`` is the confusion matrix.

    Raises:
        DestinationError: a file cannot be written.
    """
    folder, metrics = facts.folder, facts.metrics
    with disk_errors_translated(folder):
        for name, value in ((CONFIG_FILE, config), (PROCESSOR_FILE, processor), (METRICS_FILE, metrics)):
            _write(folder / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        save_tensors(module.state_dict(), folder / WEIGHTS_FILE)
        mode = (folder / CONFIG_FILE).stat().st_mode
        (folder / WEIGHTS_FILE).chmod(mode)  # safetensors allows only its owner to read
        draw_curves(metrics["log"], metrics["best_step"], folder / CURVES_FILE)
        draw_confusion(table, facts.labels, folder / CONFUSION_FILE)
        _write(folder / CARD_FILE, model_card(metrics))
        _write(folder / FACTS_FILE, facts_json(facts))


def save_tensors(tensors: "Mapping[str, torch.Tensor]", file: Path) -> None:
    """Write tensors as safetensors; raise DestinationError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        save_file(whole, file, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise DestinationError(
            f"{file} cannot be written: {error}; free space, or choose another folder with --output"
        ) from error


def publish_result(folder: Path, output: Path) -> FinetunedFacts:
    """Check and sync a complete folder, rename it to ``output``, and return its facts.

    Raises:
        DestinationError: the name is taken, or the folder cannot be written.
        ModelError: the written folder is invalid.
    """
    read_facts(folder)
    with disk_errors_translated(output.parent):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder_at(folder)
        if output.exists():
            raise DestinationError(f"{output} exists; choose another folder with --output")
        folder.rename(output)
        sync_folder_at(output.parent)
    return read_facts(output)


def model_card(metrics: Mapping[str, Any]) -> str:
    """Return the model card as Markdown from the content of ``metrics.json``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sortd", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701 - Markdown
    environment.filters["share"] = _share
    accuracy, images = metrics["comparison"]["finetuned_accuracy"], metrics["comparison"]["images"]
    margin = 196.0 * (max(accuracy * (1 - accuracy), 0.25 / images) / images) ** 0.5
    return _drawable(environment.get_template(CARD_TEMPLATE).render(metrics, figures=_cells, margin=margin))


def _cells(row: Mapping[str, Any]) -> str:
    shares = [_share(row[key]) for key in ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error")]
    return " | ".join([*shares, f"{row['log_loss']:.3f}"])


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def draw_curves(log: Sequence[Mapping[str, Any]], best_step: int | None, file: Path) -> None:
    """Draw loss and accuracy by epoch, with the chosen checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    trained = [(row["epoch"], row["loss"]) for row in log if "loss" in row]
    evaluated = [row for row in log if "eval_log_loss" in row]
    epochs = [row["epoch"] for row in evaluated]
    if trained:
        losses.plot(*zip(*trained, strict=True), label="training (augmented, smoothed)")
    losses.plot(epochs, [row["eval_log_loss"] for row in evaluated], marker="o", label="validation")
    accuracies.plot(epochs, [100 * row["eval_accuracy"] for row in evaluated], marker="o", label="accuracy")
    balanced = [100 * row["eval_balanced_accuracy"] for row in evaluated]
    accuracies.plot(epochs, balanced, marker="s", linestyle="--", label="balanced accuracy")
    for axes, title in ((losses, "loss"), (accuracies, "validation, per cent")):
        for row in evaluated:
            if row["step"] == best_step:
                axes.axvline(row["epoch"], color="grey", linestyle=":", label="chosen")
        axes.set_xlabel("epoch")
        axes.set_title(title)
        axes.legend(fontsize="small")
    figure.savefig(file)


def draw_confusion(table: IntArray, labels: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix, int64 (C, C), shaded by share of the row."""
    from matplotlib.figure import Figure

    inches = min(LARGEST_INCHES, 3.0 + 0.5 * len(labels))
    figure = Figure(figsize=(inches, inches), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    shown = [_drawable(label) for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), shown, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("correct class")
    if len(labels) <= FEW_CLASSES:
        for row, column in zip(*table.nonzero(), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"  # noqa: PLR2004 - half of the scale
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=shade)
    figure.savefig(file)


def _drawable(text: str) -> str:
    """Return a text with escapes for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _write(file: Path, text: str) -> None:
    file.write_text(text, "utf-8", "backslashreplace")
