"""The fine-tuned models of datasets: which one decides, whether it fits, and each loaded once.

Promotions are read at every rebuild. If a model cannot be used, the prototypes decide.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sortd.classify.calibration import HeldOutOutcomes, calibrate_outcomes
from sortd.classify.prototypes import FinetunedClassifier, describe_label_mismatch
from sortd.classify.types import AbstainSettings
from sortd.daemon.embedder import Embedder
from sortd.encoder.base import Encoder, Rows
from sortd.encoder.finetuned import FinetunedFacts, FinetunedModel, read_facts, read_promotion
from sortd.errors import ModelError
from sortd.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class ActiveClassifier:
    """What decides in a dataset: a fine-tuned model, or the prototypes and why the model cannot be used."""

    facts: FinetunedFacts | None = None
    refusal: str | None = None  # why the wanted model cannot be used, in a sentence

    @property
    def model_id(self) -> str:
        """The identity of the model; empty for the prototypes."""
        return "" if self.facts is None else self.facts.model_id

    def classifier(self, abstain: AbstainSettings | None, *, generation: int) -> FinetunedClassifier | None:
        """Return what decides in the place of the prototypes, if anything does."""
        return None if self.facts is None else classifier_of(self.facts, abstain, generation=generation)


def classifier_of(facts: FinetunedFacts, abstain: AbstainSettings | None, *, generation: int) -> FinetunedClassifier:
    """Return the classifier that a model's facts make under these settings."""
    outcomes = HeldOutOutcomes(np.clip(facts.confidence, 0.0, 1.0), facts.is_right, facts.classes)
    calibration = calibrate_outcomes(outcomes, abstain, classes=len(facts.labels))
    return FinetunedClassifier(facts.labels, facts.temperature, facts.model_id, generation, calibration, abstain)


def select_classifier(layout: Layout, state: Path, wanted: str, labels: Sequence[str]) -> ActiveClassifier:
    """Return what decides in a dataset, by the promotion in ``state``; no model is loaded.

    ``wanted`` is the configured ``classifier``: ``auto``, ``prototypes`` or ``finetuned``; ``labels`` are the folders
    in ``Clases/``.
    """
    if wanted == "prototypes":
        return ActiveClassifier()
    try:
        promotion = read_promotion(layout.state_folder(state))
        if promotion is None:
            advice = f"`sortd finetune {layout.name}`, then `sortd models promote --dataset {layout.name}`"
            missing = f"`classifier: finetuned` is set, but no model is promoted: {advice}"
            return ActiveClassifier(refusal=missing if wanted == "finetuned" else None)
        facts = read_facts(promotion.folder)
    except ModelError as error:
        return ActiveClassifier(refusal=str(error))
    if facts.model_id != promotion.model_id:
        return ActiveClassifier(
            refusal=f"{facts.folder} holds another model than the promoted one: promote it again "
            f"(`sortd models promote {facts.folder} --dataset {layout.name}`)"
        )
    refusal = unfit(facts, labels, dataset=layout.name)
    return ActiveClassifier(None if refusal else facts, refusal)


def unfit(facts: FinetunedFacts, labels: Sequence[str], *, dataset: str) -> str | None:
    """Return why a model does not fit the classes of a dataset, and what to do; None if it fits."""
    difference = describe_label_mismatch(facts.labels, labels)
    if difference is None:
        return None
    return (
        f"the fine-tuned model in {facts.folder} does not fit {dataset}: {difference}; "
        f"train another with `sortd finetune {dataset}`"
    )


def are_logits(rows: Rows) -> bool:
    """Return whether rows (B, classes) can be logits: finite, and not zeros as from a device in a bad state."""
    return bool(np.isfinite(rows).all() and rows.any(axis=1).all())


def probe_logits(encoder: Encoder) -> None:
    """Raise ``ModelError`` if a fine-tuned model does not return logits."""
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    noise = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    if not are_logits(encoder.encode_images(noise)):
        raise ModelError(
            f"the fine-tuned model {encoder.encoder_id} returns zeros: it was not trained, or its device is in a "
            "bad state; set `device: cpu`, or run `sortd finetune` again"
        )


# Errors of torch and transformers for a network that does not match its configuration, or without memory.
BROKEN_NETWORK = (OSError, ValueError, TypeError, RuntimeError, MemoryError)

LoadModel = Callable[[Path], FinetunedModel]
EmbedWith = Callable[[Encoder, FinetunedFacts], Embedder]


class Classifiers:
    """The fine-tuned models in memory, shared by datasets; used by one thread, the worker."""

    def __init__(self, state: Path, *, load: LoadModel, embed_with: EmbedWith) -> None:
        """Start without models; ``load`` may raise ``ModelError``."""
        self._state, self._load, self._embed_with = state, load, embed_with
        self.loaded: dict[str, Embedder] = {}  # by the identity of the model

    def select(self, layout: Layout, wanted: str, labels: Sequence[str]) -> ActiveClassifier:
        """Return what decides in a dataset, and load its model; arguments as for ``select_classifier``."""
        found = select_classifier(layout, self._state, wanted, labels)
        facts = found.facts
        if facts is not None and facts.model_id not in self.loaded:
            try:
                encoder = self._load(facts.folder)
                probe_logits(encoder)
            except ModelError as error:
                return ActiveClassifier(refusal=str(error))
            except BROKEN_NETWORK as error:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                advice = f"run `sortd finetune {layout.name}` again, or set `device: cpu`"
                refusal = f"the fine-tuned model in {facts.folder} cannot be used ({said}): {advice}"
                return ActiveClassifier(refusal=refusal)
            self.loaded[facts.model_id] = self._embed_with(encoder, facts)
        return found

    def retain(self, wanted: Collection[str]) -> None:
        """Unload the models that are not in ``wanted`` and have no work left."""
        for model_id, embedder in list(self.loaded.items()):
            if model_id not in wanted and not embedder.pipeline.has_work:
                del self.loaded[model_id]
