"""The pictures of a fine-tuning: the curves of loss and accuracy, and the confusion matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sortd.arrays import IntArray

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 9.0, 3.6, 120
FEW_CLASSES = 25
"""With so many classes at most the numbers are written into the cells of the matrix."""
LARGEST_INCHES = 20.0


def draw_curves(log: Sequence[Mapping[str, Any]], best_step: int | None, file: Path) -> None:
    """Draw loss and accuracy over the epochs of the Trainer's log, the chosen checkpoint marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    trained = [(row["epoch"], row["loss"]) for row in log if "loss" in row]
    looked = [row for row in log if "eval_log_loss" in row]
    epochs = [row["epoch"] for row in looked]
    if trained:
        losses.plot(*zip(*trained, strict=True), label="training (augmented, smoothed)")
    losses.plot(epochs, [row["eval_log_loss"] for row in looked], marker="o", label="validation")
    accuracies.plot(epochs, [100 * row["eval_accuracy"] for row in looked], marker="o", label="accuracy")
    balanced = [100 * row["eval_balanced_accuracy"] for row in looked]
    accuracies.plot(epochs, balanced, marker="s", linestyle="--", label="balanced accuracy")
    for axes, title in ((losses, "loss"), (accuracies, "validation, per cent")):
        for row in looked:
            if row["step"] == best_step:
                axes.axvline(row["epoch"], color="grey", linestyle=":", label="chosen")
        axes.set_xlabel("epoch")
        axes.set_title(title)
        axes.legend(fontsize="small")
    figure.savefig(file)


def draw_confusion(table: IntArray, labels: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix, int64 (C, C): right classes down, given ones across, shaded by share of the row."""
    from matplotlib.figure import Figure

    inches = min(LARGEST_INCHES, 3.0 + 0.5 * len(labels))
    figure = Figure(figsize=(inches, inches), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    shown = [_drawable(label) for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), shown, parse_math=False)
    axes.set_xlabel("filed as")
    axes.set_ylabel("is")
    if len(labels) <= FEW_CLASSES:
        for row, column in zip(*table.nonzero(), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"  # noqa: PLR2004 - half of the scale
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=shade)
    figure.savefig(file)


def _drawable(label: str) -> str:
    """Return a name as it can be drawn: bytes that are no UTF-8 become escapes."""
    return label.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
