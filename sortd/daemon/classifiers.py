"""The fine-tuned models of datasets: which one is to decide, whether it may, and loaded once for all.

What is promoted is read anew at every rebuild. Where a model may not decide, the prototypes do.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sortd.arrays import Pixels
from sortd.classify.calibration import HeldOutOutcomes, calibrate_outcomes
from sortd.classify.prototypes import FinetunedClassifier, describe_label_mismatch
from sortd.classify.types import AbstainSettings
from sortd.daemon.embedder import Embedder
from sortd.encoder.base import Encoder, Rows
from sortd.encoder.finetuned import FinetunedFacts, read_facts, read_promotion
from sortd.encoder.finetuned_network import FinetunedModel
from sortd.errors import ModelError
from sortd.events import Preprocessing
from sortd.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Appointed:
    """What is to decide a dataset: a fine-tuned model that fits, or the prototypes, and why the model may not."""

    facts: FinetunedFacts | None = None
    refusal: str | None = None
    """Why the model that is wanted does not serve, in a sentence; None where it does, or where none is wanted."""

    @property
    def model_id(self) -> str:
        """The identity of the model that decides; empty where the prototypes do."""
        return "" if self.facts is None else self.facts.model_id

    def classifier(self, abstain: AbstainSettings | None, *, generation: int) -> FinetunedClassifier | None:
        """Return what decides in the place of the prototypes, if anything does."""
        return None if self.facts is None else classifier_of(self.facts, abstain, generation=generation)


def classifier_of(facts: FinetunedFacts, abstain: AbstainSettings | None, *, generation: int) -> FinetunedClassifier:
    """Return the classifier that a model's facts make under these settings."""
    outcomes = HeldOutOutcomes(np.clip(facts.confidence, 0.0, 1.0), facts.is_right, facts.classes)
    calibration = calibrate_outcomes(outcomes, abstain, classes=len(facts.labels))
    return FinetunedClassifier(facts.labels, facts.temperature, facts.model_id, generation, calibration, abstain)


def appointed(layout: Layout, state: Path, wanted: str, labels: Sequence[str]) -> Appointed:
    """Return what is to decide a dataset, by what is written down in ``state``; no model is loaded.

    ``wanted`` is the configured ``classifier``: ``auto``, ``prototypes`` or ``finetuned``; ``labels`` are the folders
    in ``Clases/``.
    """
    if wanted == "prototypes":
        return Appointed()
    try:
        promotion = read_promotion(layout.state_folder(state))
        if promotion is None:
            mend = f"`sortd finetune {layout.name}`, then `sortd models promote --dataset {layout.name}`"
            missing = f"`classifier: finetuned` is set, but no model is promoted: {mend}"
            return Appointed(refusal=missing if wanted == "finetuned" else None)
        facts = read_facts(promotion.folder)
    except ModelError as error:
        return Appointed(refusal=str(error))
    if facts.model_id != promotion.model_id:
        return Appointed(
            refusal=f"{facts.folder} holds another model than the one that was promoted: promote it again "
            f"(`sortd models promote {facts.folder} --dataset {layout.name}`)"
        )
    refusal = unfit(facts, labels, dataset=layout.name)
    return Appointed(None if refusal else facts, refusal)


def unfit(facts: FinetunedFacts, labels: Sequence[str], *, dataset: str) -> str | None:
    """Say why a model does not fit the classes of a dataset, and how to mend it; None where it does."""
    difference = describe_label_mismatch(facts.labels, labels)
    if difference is None:
        return None
    return (
        f"the fine-tuned model in {facts.folder} does not fit {dataset}: {difference}; "
        f"`sortd finetune {dataset}` trains another"
    )


class Logits:
    """A fine-tuned model in the place of an encoder: its rows are logits, and it knows no words."""

    has_text = False

    def __init__(self, model: FinetunedModel) -> None:
        """Take over a loaded model."""
        self._model = model
        self.encoder_id = model.facts.model_id
        self.dimensions = len(model.facts.labels)
        self.preprocessing: Preprocessing = model.preprocessing

    def encode_images(self, pixels: Pixels) -> Rows:
        """Return float32 (B, classes) logits of RGB pixels uint8 (B, H, W, 3)."""
        return self._model.logits(pixels)

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Embed no text.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.encoder_id} is a fine-tuned model and embeds no text, {len(texts)} were asked for")


def are_logits(rows: Rows) -> bool:
    """Tell whether rows (B, classes) can be logits: numbers, and not all zeros as of a device in a bad state."""
    return bool(np.isfinite(rows).all() and rows.any(axis=1).all())


def probe_logits(encoder: Encoder) -> None:
    """See that a fine-tuned model answers with logits.

    Raises:
        ModelError: it does not.
    """
    height, width = encoder.preprocessing.crop_height, encoder.preprocessing.crop_width
    noise = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    if not are_logits(encoder.encode_images(noise)):
        raise ModelError(
            f"the fine-tuned model {encoder.encoder_id} answers with zeros: it was not trained, or its device is in a "
            "bad state; set `device: cpu`, or run `sortd finetune` anew"
        )


# What torch and transformers raise where a network and its configuration do not agree, or where memory is short.
BROKEN_NETWORK = (OSError, ValueError, TypeError, RuntimeError, MemoryError)

LoadModel = Callable[[Path], FinetunedModel]
EmbedWith = Callable[[Encoder, FinetunedFacts], Embedder]


class Classifiers:
    """The fine-tuned models in memory, each shared by its datasets; used by one thread, the worker."""

    def __init__(self, state: Path, *, load: LoadModel, embed_with: EmbedWith) -> None:
        """Begin with none; promotions are written down in ``state``, and ``load`` may raise ``ModelError``."""
        self._state, self._load, self._embed_with = state, load, embed_with
        self._loaded: dict[str, Embedder] = {}

    def choose(self, layout: Layout, wanted: str, labels: Sequence[str]) -> Appointed:
        """Return what is to decide a dataset from now on, loaded if need be; arguments as for ``appointed``."""
        found = appointed(layout, self._state, wanted, labels)
        facts = found.facts
        if facts is not None and facts.model_id not in self._loaded:
            try:
                encoder = Logits(self._load(facts.folder))
                probe_logits(encoder)
            except ModelError as error:
                return Appointed(refusal=str(error))
            except BROKEN_NETWORK as error:
                said = (str(error).splitlines() or [type(error).__name__])[0]
                mend = f"run `sortd finetune {layout.name}` anew, or set `device: cpu`"
                return Appointed(refusal=f"the fine-tuned model in {facts.folder} cannot be used ({said}): {mend}")
            self._loaded[facts.model_id] = self._embed_with(encoder, facts)
        return found

    @property
    def loaded(self) -> Mapping[str, Embedder]:
        """What embeds by each model that is in memory, by the model's identity."""
        return self._loaded

    def retain(self, wanted: Collection[str]) -> None:
        """Let go of the models that nobody wants and that have nothing left to do."""
        for model_id, embedder in list(self._loaded.items()):
            if model_id not in wanted and not embedder.pipeline.has_work:
                del self._loaded[model_id]
