"""The loss: a contrastive loss in both directions with all images of a concept as positives, and a classifier."""

import torch
from torch.nn import functional


def contrast(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the contrastive losses of images (b, d) and texts (k, d); `place` int64 (b,) is each image's text.

    Each text is a concept, so images of one concept are never negatives of each other. The second part spreads the
    probability of each text over the images evenly among those of its concept (the outer sum of the supervised
    contrastive loss, arXiv:2004.11362).
    """
    logits = scale * functional.normalize(images, dim=-1) @ functional.normalize(texts, dim=-1).T
    to_text = functional.cross_entropy(logits, place)
    belongs = functional.one_hot(place, logits.shape[1]).to(logits.dtype)
    counts = belongs.sum(dim=0)
    log_share = logits.log_softmax(dim=0)
    of_text = -(log_share * belongs).sum(dim=0) / counts.clamp(min=1)
    return to_text, of_text.sum() / (counts > 0).sum()


def classify(logits: torch.Tensor, concepts: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of logits (b, concepts) over `allowed`, bool (b, concepts): the image's data set.

    A photo of a beach may also show what another set calls an umbrella, so only names of its own set are negatives.
    """
    return functional.cross_entropy(logits.masked_fill(~allowed, -1e4), concepts)
