"""Evaluation on held-out images: metrics of the fine-tuned model and of the baseline, and their comparison."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd import __version__, errors
from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.build import build
from sortd.classify.decide import score_batch
from sortd.classify.prompts import prompts
from sortd.classify.types import DecisionSettings, SupportSet
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import class_texts, generic_text_mean, read_descriptions
from sortd.encoder.finetuned import FinetunedFacts, calibrated
from sortd.encoder.finetuned_network import Network
from sortd.errors import ModelError
from sortd.events import Mode
from sortd.finetune.data import Photos, Plan, Predictions, Split, dataset_of, read_pixels
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
    photos: Photos, split: Split, named: tuple[FloatArray, FloatArray] | None, encoder_id: str
) -> list[Predictions]:
    """Return the predictions of each mode for the test images; all other images are references.

    Without ``named``, the result of ``embed_names``, there is no ``text``, and ``mixed`` equals ``best``.
    """
    references = np.sort(np.concatenate([split.train, split.validation]))
    support = SupportSet(
        labels=photos.labels,
        embeddings=photos.embeddings[references],
        classes=photos.classes[references],
        sources=tuple(photos.files[index][0] for index in references),
        text=None if named is None else named[0],
        text_mean=None if named is None else named[1],
        strangers=np.zeros((0, photos.embeddings.shape[1]), np.float32),
        encoder_id=encoder_id,
        fingerprint="",
    )
    queries, odd = photos.embeddings[split.test].astype(np.float64), photos.strangers.astype(np.float64)
    found = []
    for mode in Mode:
        if mode is Mode.TEXT and named is None:
            continue
        prototypes = build(support, DecisionSettings(mode=mode, abstain=None), generation=1)
        known = score_batch(prototypes, queries, mode).probabilities
        strangers = score_batch(prototypes, odd, mode).probabilities.max(axis=1) if len(odd) else np.zeros(0)
        found.append(Predictions(mode.value, known, strangers))
    return found


def embed_names(
    layout: Layout, labels: Sequence[str], templates: Sequence[str], embedder: Embedder
) -> tuple[FloatArray, FloatArray] | None:
    """Return the text embeddings of the class names (C, d) and their centre (d,); None without a text encoder.

    Raises:
        ModelError: the description of a class cannot be read.
    """
    if not embedder.encoder.has_text:
        return None
    sentences = []
    for label in labels:
        try:
            descriptions = read_descriptions(str(layout.area(Area.CLASES) / label))
        except NotADirectoryError:
            descriptions = ()
        except OSError as error:
            raise ModelError(errors.unreadable(error)) from error
        sentences.append(prompts(label, descriptions, templates))
    return class_texts(embedder, sentences), generic_text_mean(embedder, templates)


def evaluate_model(
    network: Network, start: "Mapping[str, torch.Tensor]", plan: Plan, work: Path, folder: Path
) -> tuple[FinetunedFacts, IntArray]:
    """Average the network with its start weights, calibrate it and compare it with the baseline.

    Return the facts of the model, for ``folder``, and the confusion matrix of the test images, int64 (C, C).
    """
    validation, test = (dataset_of(plan, work, part) for part in ("validation", "test"))
    share, shares = average_with_start(
        network.module,
        start,
        logits=lambda: logits_in_batches(network, validation.pixels),
        score=lambda logits: score_of(logits, validation.classes)["score"],
    )
    held = logits_in_batches(network, validation.pixels)
    temperature = temperature_of(held, validation.classes)
    known = calibrated(logits_in_batches(network, test.pixels), temperature)
    odd = calibrated(logits_in_batches(network, read_pixels(plan, work, "strangers")), temperature)
    predictions = Predictions("finetuned", known, odd.max(axis=1, initial=0.0))
    seen = np.concatenate([calibrated(held, temperature), known])
    classes = np.concatenate([validation.classes, test.classes])
    table = confusion_matrix(predictions.best, test.classes, len(plan.labels))
    shown = ("precision", "recall", "f1")
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
