"""The loss: captions against images both ways, with all images of a concept as positives, and a plain classifier."""

import torch
from torch.nn import functional


def contrast(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare images (b, d) with texts (k, d); `place` int64 (b,) is each image's text.

    One text stands for a concept, so images of one concept are never each other's negatives. The second part asks of
    each shown text that its probability over the images be spread evenly over its own (the supervised contrastive
    loss's outer sum, arXiv:2004.11362).
    """
    logits = scale * functional.normalize(images, dim=-1) @ functional.normalize(texts, dim=-1).T
    to_text = functional.cross_entropy(logits, place)
    belongs = functional.one_hot(place, logits.shape[1]).to(logits.dtype)
    counts = belongs.sum(dim=0)
    log_share = logits.log_softmax(dim=0)
    of_text = -(log_share * belongs).sum(dim=0) / counts.clamp(min=1)
    return to_text, of_text.sum() / (counts > 0).sum()


def classify(logits: torch.Tensor, concepts: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Cross entropy of (b, concepts) within each image's own data set; `allowed` bool (b, concepts).

    A photo of a beach also shows what another set calls an umbrella: only names of its own set are known to be wrong.
    """
    return functional.cross_entropy(logits.masked_fill(~allowed, -1e4), concepts)
