"""Evaluation on held-out images, and the result folder: weights, facts, metrics, figures and model card."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd import __version__, errors
from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.build import build
from sortd.classify.decide import score_batch
from sortd.classify.prompts import prompts
from sortd.classify.proportions import estimated
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import class_texts, generic_text_mean, read_descriptions
from sortd.encoder.finetuned import (
    CONFIG_FILE,
    FACTS_FILE,
    METRICS_FILE,
    PROCESSOR_FILE,
    WEIGHTS_FILE,
    FinetunedFacts,
    Network,
    calibrated,
    facts_json,
    read_facts,
)
from sortd.errors import DestinationError, ModelError
from sortd.events import Mode
from sortd.files import sync_folder_at, text_of
from sortd.finetune.data import Photos, Plan, Predictions, Split, disk_errors_translated
from sortd.finetune.model import average_with_start, logits_in_batches, temperature_of
from sortd.finetune.train import score_of
from sortd.layout import Area, Layout

if TYPE_CHECKING:
    import torch

BINS = 15
"""Number of bins of the expected calibration error, as in Guo et al. (2017)."""
KNOWN_KEPT = 0.95
SIGNIFICANT = 0.05
"""Significance level of McNemar's test."""


def baseline_predictions(
    photos: Photos, split: Split, embedder: Embedder, layout: Layout, templates: Sequence[str]
) -> tuple[Predictions, ...]:
    """Return the predictions of each mode for the test images; all other images are references.

    Without a text encoder there is no ``text``, and ``mixed`` equals ``best``. ``templates`` are of prompts.

    Raises:
        ModelError: the description of a class cannot be read.
    """
    references = np.sort(np.concatenate([split["train"], split["validation"]]))
    has_text = embedder.encoder.has_text
    support = SupportSet(
        labels=photos.labels,
        embeddings=photos.embeddings[references],
        classes=photos.classes[references],
        sources=tuple(photos.files[index][0] for index in references),
        text=class_texts(embedder, _sentences(layout, photos.labels, templates)) if has_text else None,
        text_mean=generic_text_mean(embedder, templates) if has_text else None,
        encoder_id=embedder.encoder.encoder_id,
    )
    queries, odd = photos.embeddings[split["test"]].astype(np.float64), photos.strangers.astype(np.float64)
    found = []
    for mode in Mode:
        if mode is Mode.TEXT and not has_text:
            continue
        prototypes = build(support, DecisionSettings(mode=mode, abstain=None), generation=1)
        known = score_batch(prototypes, queries, mode).probabilities
        strangers = score_batch(prototypes, odd, mode).probabilities.max(axis=1) if len(odd) else np.zeros(0)
        found.append(Predictions(mode.value, known, strangers))
    return tuple(found)


def _sentences(layout: Layout, labels: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return the prompts of each class."""
    sentences = []
    for label in labels:
        try:
            descriptions = read_descriptions(str(layout.area(Area.CLASES) / label))
        except NotADirectoryError:
            descriptions = ()
        except OSError as error:
            raise ModelError(errors.unreadable(error)) from error
        sentences.append(prompts(label, descriptions, templates))
    return sentences


def evaluate_model(
    network: Network,
    start: "Mapping[str, torch.Tensor]",
    plan: Plan,
    folder: Path,
    *,
    validation_logits: Callable[[], FloatArray],
) -> tuple[FinetunedFacts, IntArray]:
    """Average the network with its start weights, calibrate it and compare it with the baseline.

    ``validation_logits`` returns the logits of the validation images, with which the averages are compared.
    Return the facts of the model, for ``folder``, and the confusion matrix of the test images, int64 (C, C).
    """
    validation, test = (plan.images_of(part) for part in ("validation", "test"))
    share, shares = average_with_start(
        network.module,
        start,
        logits=validation_logits,
        score=lambda logits: score_of(logits, validation.classes)["score"],
    )
    held = logits_in_batches(network, validation.pixels)
    temperature = temperature_of(held, validation.classes)
    known = calibrated(logits_in_batches(network, test.pixels), temperature)
    odd = calibrated(logits_in_batches(network, plan.pixels_of("strangers")), temperature)
    predictions = Predictions("finetuned", known, odd.max(axis=1, initial=0.0))
    seen = np.concatenate([calibrated(held, temperature), known])
    classes = np.concatenate([validation.classes, test.classes])
    table = confusion_matrix(predictions.best, test.classes, len(plan.labels))
    shown = ("precision", "predicted", "recall", "f1")
    rows = zip(plan.data["classes"], class_metrics(table, plan.labels), strict=True)
    epochs = plan.recipe.epochs_for(len(plan.classes["train"]), images_per_step=plan.recipe.batch_size)
    metrics = {
        "version": __version__,
        "dataset": plan.dataset,
        "created": plan.created,
        "base": plan.base,
        "labels": list(plan.labels),
        "recipe": {**asdict(plan.recipe), "epochs": epochs},
        "extra": list(plan.extra),
        "data": {key: value for key, value in plan.data.items() if key not in {"classes", "left_out"}},
        "left_out": plan.data["left_out"],
        "classes": [counts | {key: row[key] for key in shown} for counts, row in rows],
        "share": share,
        "shares": shares,
        "temperature": temperature,
        "validation": score_of(held, validation.classes),
        "comparison": compare(plan.baselines, predictions, test.classes, plan.labels),
    }
    facts = FinetunedFacts(
        folder=folder,
        dataset=plan.dataset,
        labels=plan.labels,
        temperature=temperature,
        base=plan.base,
        model_id="",  # computed from the written files
        preprocessing=plan.preprocessing,
        decoding=plan.decoding,
        created=plan.created,
        confidence=seen.max(axis=1),
        is_right=seen.argmax(axis=1) == classes,
        classes=classes,
        metrics=metrics,
    )
    return facts, table


def compare(
    baselines: Sequence[Predictions], model: Predictions, own: IntArray, labels: Sequence[str]
) -> dict[str, Any]:
    """Return the comparison of the modes with the fine-tuned model as plain values; ``own`` are correct classes (N,).

    The verdict is McNemar's exact test against the most accurate mode, whose choice on the test images favours the
    prototypes; without a significant difference it is ``level``.
    """
    found = {one.name: metrics_of(one, own, labels) for one in baselines}
    mine = metrics_of(model, own, labels)
    best = max(baselines, key=lambda one: found[one.name]["accuracy"] or 0.0)
    paired = mcnemar(model.best == own, best.best == own)
    ours, theirs, p_value = paired["only_first_right"], paired["only_second_right"], paired["p_value"]
    verdict = "level" if p_value >= SIGNIFICANT else "stronger" if ours > theirs else "weaker"
    return {
        "images": len(own),
        "prototypes": found,
        "finetuned": mine,
        "best_mode": best.name,
        "best_mode_accuracy": found[best.name]["accuracy"],
        "finetuned_accuracy": mine["accuracy"],
        "mcnemar": {"only_finetuned_right": ours, "only_prototypes_right": theirs, "p_value": p_value},
        "verdict": verdict,
    }


def metrics_of(predictions: Predictions, own: IntArray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a classifier as plain values; ``own`` are the correct classes (N,)."""
    best, confidence = predictions.best, predictions.probabilities.max(axis=1)
    right = best == own
    classes = [row for row in class_metrics(confusion_matrix(best, own, len(labels)), labels) if row["images"]]
    return {
        "images": len(own),
        "accuracy": _mean(right),
        "balanced_accuracy": _mean([row["recall"] for row in classes]),
        "macro_f1": _mean([row["f1"] for row in classes]),
        "calibration_error": calibration_error(confidence, right),
        "log_loss": _mean(-np.log(np.maximum(predictions.probabilities[np.arange(len(own)), own], 1e-12))),
        "open_set": open_set(confidence, predictions.strangers),
    }


def confusion_matrix(best: IntArray, own: IntArray, count: int) -> IntArray:
    """Return the confusion matrix, int64 (C, C): correct classes as rows, predicted classes as columns."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (own, best), 1)
    return table


def class_metrics(table: IntArray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class of a confusion matrix; None if undefined."""
    columns = table.diagonal().tolist(), table.sum(axis=1).tolist(), table.sum(axis=0).tolist()
    return [
        {
            "label": label,
            "images": images,
            "precision": hits / predicted if predicted else None,
            "predicted": predicted,
            "recall": hits / images if images else None,
            "f1": 2 * hits / (images + predicted) if images + predicted else None,
        }
        for label, hits, images, predicted in zip(labels, *columns, strict=True)
    ]


def calibration_error(confidence: Array, right: BoolArray) -> float | None:
    """Return the expected calibration error: the mean gap between confidence and accuracy over bins."""
    if not len(confidence):
        return None
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def open_set(known: Array, strangers: Array) -> dict[str, Any] | None:
    """Return AUROC and FPR95 (``accepted``) of confidence for known images against strangers; None without either."""
    if not len(known) or not len(strangers):
        return None
    ordered = np.sort(strangers)
    below, upto = np.searchsorted(ordered, known, "left"), np.searchsorted(ordered, known, "right")
    kept = float(np.quantile(known, 1.0 - KNOWN_KEPT))
    return {
        "strangers": len(strangers),
        "auroc": float((below + upto).sum() / (2 * len(known) * len(strangers))),
        "accepted": float((strangers >= kept).mean()),
    }


def mcnemar(first: BoolArray, second: BoolArray) -> dict[str, Any]:
    """Return McNemar's exact two-sided test of two classifiers on the same images (Fagerland et al. 2013)."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, number) for number in range(fewer + 1))
    p_value = min(1.0, 2 * tail / 2**differing)
    return {"only_first_right": only_first, "only_second_right": only_second, "p_value": p_value}


def _mean(values: Sequence[float] | Array | BoolArray) -> float | None:
    return float(np.mean(values)) if len(values) else None


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

    Raises DestinationError.
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
    environment.filters["of"] = estimated
    return text_of(environment.get_template(CARD_TEMPLATE).render(metrics, figures=_cells))


def _cells(row: Mapping[str, Any]) -> str:
    shares = [estimated(row[key], row["images"]) for key in ("accuracy", "balanced_accuracy")]
    numbers = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("macro_f1", "calibration_error", "log_loss")]
    return " | ".join([*shares, *numbers])


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
    shown = [text_of(label) for label in labels]
    axes.set_xticks(range(len(labels)), shown, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), shown, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("correct class")
    if len(labels) <= FEW_CLASSES:
        for row, column in zip(*table.nonzero(), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"  # noqa: PLR2004 - half of the scale
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=shade)
    figure.savefig(file)


def _write(file: Path, text: str) -> None:
    file.write_text(text, "utf-8", "backslashreplace")
