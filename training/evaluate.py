"""Evaluation on held-out images of the training data: zero-shot and five-shot accuracy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from training.augmentation import normalise
from training.captions import Captioner
from training.concepts import TEMPLATES
from training.data import Library, held_out_images
from training.model import Student

Embeddings = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracies in per cent: by names, and by shared-covariance Gaussians with shrinkage from five images a class."""

    zero_shot: dict[str, float]
    few_shot: dict[str, float]

    def flat(self) -> dict[str, float]:
        """Return the figures by name."""
        return {f"zero_shot_{k}": v for k, v in self.zero_shot.items()} | {
            f"few_shot_{k}": v for k, v in self.few_shot.items()
        }


@torch.inference_mode()
def embed(
    student: Student, pixels: torch.Tensor, *, device: torch.device, half: bool, batch: int = 256
) -> torch.Tensor:
    """Embed uint8 (n, h, w, 3) as float32 (n, d) of unit length, in bfloat16 where it is safe if ``half``."""
    rows = []
    for first in range(0, len(pixels), batch):
        images = normalise(pixels[first : first + batch].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            rows.append(functional.normalize(student.embed_images(images)[0].float(), dim=-1).cpu())
    return torch.cat(rows)


@torch.inference_mode()
def embed_concepts(student: Student, captioner: Captioner, *, device: torch.device) -> torch.Tensor:
    """Embed every concept as the mean of its first name in all templates, float32 (concepts, d) of unit length."""
    total: torch.Tensor | None = None
    for index in range(len(TEMPLATES)):
        captions = captioner.template(index)
        texts = functional.normalize(
            student.embed_texts(captions.tokens.to(device), captions.mask.to(device)).float(), dim=-1
        )
        total = texts if total is None else total + texts
    assert total is not None
    return functional.normalize(total, dim=-1).cpu()


def measure(
    student: Student, library: Library, captioner: Captioner, *, device: torch.device, half: bool, at_most: int
) -> Figures:
    """Measure on at most `at_most` held-out images of each data set."""
    was_training = student.training
    student.eval()
    texts = embed_concepts(student, captioner, device=device)
    zero_shot, few_shot = {}, {}
    for data_set in library.data_sets():
        pixels, concepts = held_out_images(library, data_set, at_most=at_most)
        if not len(pixels):
            continue
        images = embed(student, pixels, device=device, half=half)
        known = torch.tensor(sorted({c for c in library.vocabulary.of_label[data_set] if c >= 0}))
        guess = known[(images @ texts[known].T).argmax(dim=1)]
        zero_shot[data_set] = round(100 * (guess == concepts).double().mean().item(), 2)
        few_shot[data_set] = round(few_shot_accuracy(images.double().numpy(), concepts.numpy()), 2)
    student.train(was_training)
    return Figures(zero_shot, few_shot)


def few_shot_accuracy(
    embeddings: Embeddings,
    labels: npt.NDArray[np.int64],
    *,
    shots: int = 5,
    classes: int = 6,
    trials: int = 60,
    seed: int = 0,
) -> float:
    """Return the accuracy in per cent of a shared-covariance Gaussian on `trials` random few-shot tasks."""
    dice = np.random.default_rng(seed)
    names, counts = np.unique(labels, return_counts=True)
    usable = names[counts > shots]
    if len(usable) < classes:
        return float("nan")
    shares = []
    for _ in range(trials):
        drawn = dice.choice(usable, classes, replace=False)
        rows = [dice.permutation(np.flatnonzero(labels == name)) for name in drawn]
        support = np.concatenate([row[:shots] for row in rows])
        query = np.concatenate([row[shots : shots + 20] for row in rows])
        truth = np.repeat(np.arange(classes), [len(row[shots : shots + 20]) for row in rows])
        shares.append(gaussian_right(embeddings[support], embeddings[query], truth, classes))
    return 100 * float(np.mean(shares))


def gaussian_right(support: Embeddings, query: Embeddings, truth: npt.NDArray[np.int64], classes: int) -> float:
    """Fit class means and one covariance with shrinkage to support rows ordered by class; return the accuracy."""
    shots, width = len(support) // classes, support.shape[1]
    means = support.reshape(classes, shots, width).mean(axis=1)
    rest = support - means.repeat(shots, axis=0)
    covariance = rest.T @ rest / max(len(support) - classes, 1)
    precision = width * np.linalg.pinv(
        (len(support) - 1) * covariance + np.trace(covariance) * np.eye(width), hermitian=True
    )
    weights = means @ precision
    scores = query @ weights.T - 0.5 * (weights * means).sum(axis=1)
    return float((scores.argmax(axis=1) == truth).mean())
