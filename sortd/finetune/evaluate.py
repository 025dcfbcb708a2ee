"""Evaluation on held-out images: the metrics of a model and of the prototypes, its baseline, and which is better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sortd import __version__, errors
from sortd.arrays import Array, BoolArray, FloatArray, IntArray
from sortd.classify.build import build
from sortd.classify.decide import judge
from sortd.classify.prompts import GENERIC_NOUNS, prompts
from sortd.classify.types import DecisionSettings, Mode, SupportSet
from sortd.daemon.embedder import Embedder
from sortd.errors import ModelError
from sortd.finetune.data import Photos, Plan, Predictions, Split, dataset_of, read_pixels
from sortd.finetune.model import average_with_start, logits_in_batches, temperature_of
from sortd.finetune.train import score_of
from sortd.finetuned import FinetunedFacts, calibrated
from sortd.finetuned_network import Network
from sortd.layout import Area, Layout
from sortd.references import class_texts, read_descriptions

if TYPE_CHECKING:
    import torch

BINS = 15
"""Bins of equal width of the expected calibration error, as in Guo et al. (2017)."""
KNOWN_KEPT = 0.95
SIGNIFICANT = 0.05
"""Level of McNemar's test: a difference with a smaller p-value counts."""


# ---------------------------------------------------------------- the baseline: every mode of the prototypes


def baseline_predictions(
    photos: Photos, split: Split, named: tuple[FloatArray, FloatArray] | None, encoder_id: str
) -> list[Predictions]:
    """Return what each mode says of the test images; all others are its references, validation included.

    Without ``named`` (see ``embed_names``) ``text`` is left out and ``mixed`` is ``best``.
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
        known = judge(prototypes, queries, mode).probabilities
        strangers = judge(prototypes, odd, mode).probabilities.max(axis=1) if len(odd) else np.zeros(0)
        found.append(Predictions(mode.value, known, strangers))
    return found


def embed_names(
    layout: Layout, labels: Sequence[str], templates: Sequence[str], embedder: Embedder
) -> tuple[FloatArray, FloatArray] | None:
    """Return the embeddings of the classes' names, float32 (C, d), and a generic mean (d,); None without text.

    Raises:
        ModelError: a class's description cannot be read.
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
        sentences.append(prompts(label, descriptions, tuple(templates)))
    generic = [prompt for noun in GENERIC_NOUNS for prompt in prompts(noun, (), tuple(templates))]
    return class_texts(embedder, sentences), embedder.embed_texts(generic).mean(axis=0).astype(np.float32)


# ---------------------------------------------------------------- the trained model


def evaluate_model(
    network: Network, start: "Mapping[str, torch.Tensor]", plan: Plan, work: Path, folder: Path
) -> tuple[FinetunedFacts, IntArray]:
    """Average and calibrate a trained network, and compare it with the baseline.

    Args:
        network: with the weights of its best checkpoint; those of the best average are loaded into it.
        start: the weights before training.
        plan: of the training.
        work: the folder of the plan.
        folder: the folder of the facts.

    Returns:
        The facts of the model, and the confusion matrix of the test images, int64 (C, C).
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
        model_id="",  # it follows from what is written
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
    """Return the comparison of the prototypes' modes with a fine-tuned model on the same images, as plain values.

    The verdict is by McNemar's exact test against the most accurate mode; without a significant difference it is
    ``level``. That mode is chosen on the test images themselves, which favours the prototypes, if anything. ``own`` are
    the right classes, int64 (N,).
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


# ---------------------------------------------------------------- metrics


def metrics_of(predictions: Predictions, own: IntArray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a classifier as plain values, shares between 0 and 1; ``own`` are the right classes."""
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
    """Return int64 (C, C): the number of images of each class (rows) that were given each class (columns)."""
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (own, best), 1)
    return table


def class_metrics(table: IntArray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class of a confusion matrix; None where they are undefined."""
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
    """Return how well confidence separates images of the classes from strangers; None where there are none of either.

    ``auroc`` is the share of pairs in which the known image is the more confident one (ties count half); ``accepted``
    the share of strangers above the confidence that keeps 95 % of the known images (FPR95).
    """
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
    """Return McNemar's exact test of two classifiers on the same images (Fagerland et al. 2013).

    It is the two-sided binomial test of the images that only one of the two gets right.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, number) for number in range(fewer + 1))
    p_value = min(1.0, 2 * tail / 2**differing)
    return {"only_first_right": only_first, "only_second_right": only_second, "p_value": p_value}


def _mean(values: Sequence[float] | Array | BoolArray) -> float | None:
    return float(np.mean(values)) if len(values) else None
