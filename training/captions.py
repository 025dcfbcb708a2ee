"""Captions: for each step, one caption of every concept in its contrastive loss."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from training.concepts import TEMPLATES, Vocabulary

USUAL_SHARE = 0.5
"""The share of captions with the first name: synonyms are often Latin."""


@dataclass(frozen=True, slots=True)
class Captions:
    """`concepts` int64 (k,), `tokens` int64 (k, t), `mask` int64 (k, t): caption i describes concept i."""

    concepts: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


class Captioner:
    """All captions of all concepts, tokenised once."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast, *, tokens: int) -> None:
        """Tokenise each name in each template."""
        texts: list[str] = []
        rows: list[tuple[int, int]] = []
        for concept in vocabulary.concepts:
            mine = [template.format(name) for name in concept.names for template in TEMPLATES]
            rows.append((len(texts), len(mine)))
            texts += mine
        coded = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        self._tokens, self._mask = coded["input_ids"], coded["attention_mask"]
        self._first = torch.tensor([first for first, _ in rows])
        self._count = torch.tensor([count for _, count in rows])

    def draw(self, shown: torch.Tensor, *, count: int, seed: int) -> Captions:
        """Return captions of the shown concepts (b,) and of random others, `count` in all (or all)."""
        dice = torch.Generator().manual_seed(seed)
        total = len(self._count)
        order = torch.rand(total, generator=dice)
        order[shown] -= 1.0
        concepts = order.argsort()[: min(count, total)]
        share = torch.rand(len(concepts), generator=dice)
        usual = torch.rand(len(concepts), generator=dice) < USUAL_SHARE
        limit = torch.where(usual, torch.tensor(len(TEMPLATES)), self._count[concepts])
        rows = self._first[concepts] + (share * limit).long()
        return Captions(concepts, self._tokens[rows], self._mask[rows])

    def template(self, index: int) -> Captions:
        """Return captions of every concept by its first name in one template."""
        rows = self._first + index
        return Captions(torch.arange(len(rows)), self._tokens[rows], self._mask[rows])
