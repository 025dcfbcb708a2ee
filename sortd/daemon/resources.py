"""The models of a run, the configured one and the fine-tuned ones, with their decoders and cache; and which decides.

Promotions of fine-tuned models are read at every rebuild. If a model cannot be used, the prototypes decide.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from sortd.classify.calibration import HeldOutOutcomes, calibrate_outcomes
from sortd.classify.prototypes import FinetunedClassifier, PrototypeSet, describe_label_mismatch
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.config import Config, DatasetConfig
from sortd.core.sorter import SorterSettings
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import ReferenceSettings, stored_prototypes
from sortd.encoder.backends import load_fastest
from sortd.encoder.clip import Encoder
from sortd.encoder.finetuned import FinetunedFacts, are_logits, load_finetuned, read_facts, read_promotion
from sortd.encoder.models import STRONGER, first_line, locate_clip
from sortd.encoder.remote import AS_COMMAND, RemoteEncoder, Waiting
from sortd.errors import ModelError
from sortd.events import Mode, Preprocessing
from sortd.images.decode import DecodeLimits, Jpeg
from sortd.images.decoder_process import ProcessEnds, start_process
from sortd.images.pool import DecoderPool
from sortd.layout import Layout
from sortd.store.cache import CACHE_FILE, Cache


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
        if (facts := self.facts) is None:
            return None
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
            advice = f"`sortd finetune --dataset {layout.name}`, then `sortd models promote --dataset {layout.name}`"
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
        f"train another with `sortd finetune --dataset {dataset}`"
    )


# Errors of torch and transformers for a network that does not match its configuration, or without memory.
BROKEN_NETWORK = (OSError, ValueError, TypeError, RuntimeError, MemoryError)

LoadEncoder = Callable[[Config], Encoder]

GUARD_IMAGES = 200  # a first batch of a new generation of this size is checked before it is moved
MOST_DECODERS = 8  # processes of some 40 MB each; the configuration can set more


def sorter_settings(config: DatasetConfig) -> SorterSettings:
    """Return the settings of the core from the configuration of a dataset."""
    return SorterSettings(
        settle_seconds=config.settle_seconds,
        batch_size=-(-config.batch_size // 2),
        backlog_limit=config.backlog_limit,
        action=config.action,
        set_rejected_aside=config.rejected == "move" and config.action == "move",
        guard_images=GUARD_IMAGES if config.guard else 0,
    )


def reference_settings_of(config: DatasetConfig) -> ReferenceSettings:
    """Return the settings of the prototypes from the configuration of a dataset."""
    abstain = None
    if config.abstain is not None:
        abstain = AbstainSettings(precision=config.abstain.precision, strangers=config.abstain.strangers)
    return ReferenceSettings(
        settings=DecisionSettings(mode=Mode(config.mode), abstain=abstain),
        templates=tuple(config.prompts),
        learns_from_corrections=config.learn_from_corrections,
        classifier=config.classifier,
    )


def _nothing(*_: object) -> None:
    """Do nothing."""


class PrototypeStore(NamedTuple):
    """Keeps the last prototypes of each dataset, by its name, between runs; see ``cache.py``."""

    read: Callable[[str], PrototypeSet | None]
    write: Callable[[str, PrototypeSet], None]
    forget: Callable[[str], None]


class Resources:
    """Opens the models, decoders and cache of one run; used by one thread."""

    def __init__(self, config: Config, *, load_encoder: LoadEncoder | None = None, scratch: Path | None = None) -> None:
        """Prepare; nothing is touched before ``load``.

        ``load_encoder`` replaces the configured model; ``scratch`` is a folder for embeddings instead of the cache,
        from which only prototypes are read then.
        """
        self.config = config
        self._embeddings, self._is_scratch = scratch or config.cache_dir, scratch is not None
        self._runs_on: list[str] = []
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None
        self._embedder: Embedder | None = None
        self._started: list[ProcessEnds] = []  # decoding processes that no pool has yet
        self._decoders: dict[tuple[Preprocessing, Jpeg], DecoderPool] = {}
        self._cache: Cache | None = None
        self.finetuned: dict[str, Embedder] = {}  # the loaded fine-tuned models by identity, shared by datasets

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unload."""
        self.unload()

    def load(self, waiting: Waiting = AS_COMMAND) -> tuple[Embedder, PrototypeStore, str]:
        """Load the configured model, start its decoders and open the cache.

        ``waiting`` is for an encoder in another process.

        Raises:
            ModelError: The model cannot be loaded.
        """
        config = self.config
        self._started.append(start_process())  # it starts while the model is loaded
        if self._load_encoder is None:
            encoder = load_fastest(config, report=self._runs_on.append, waiting=waiting)
        else:
            encoder = self._load_encoder(config)
        self._encoder = encoder
        decoders = self._pool(encoder.preprocessing, config.decoding.jpeg)
        self._cache = Cache(self._embeddings / CACHE_FILE, max_bytes=config.cache_megabytes * 1_000_000)
        embedder = Embedder(encoder, decoders, self._cache, batch_size=config.batch_size)
        return embedder, self._store(self._cache), describe_encoder(config, encoder, self._runs_on)

    def embedder(self) -> Embedder:
        """Return the embedder of the configured model, which is loaded with the first call; raises as ``load``."""
        if self._embedder is None:
            self._embedder, _, _ = self.load()
        return self._embedder

    def load_beside(self, encoder: Encoder, *, equal_ids: Sequence[str]) -> tuple[Embedder, Embedder]:
        """Load as ``load``; return an embedder of the model, and one of another encoder that gets the same images.

        Images of the first are decoded once for both, which use one cache. Arguments as for ``Embedder``.
        """
        embedder, _, _ = self.load()
        assert self._cache is not None, "it was opened"
        batch_size, decoders = self.config.batch_size, self._pool(encoder.preprocessing, self.config.decoding.jpeg)
        other = Embedder(encoder, decoders, self._cache, batch_size=batch_size, equal_ids=equal_ids)
        return Embedder(embedder.encoder, decoders, self._cache, batch_size=batch_size, beside=(other,)), other

    def _store(self, cache: Cache) -> PrototypeStore:
        """Return the store of prototypes; with a scratch folder it is read-only."""
        config, files = self.config, cache.prototypes
        if self._is_scratch:
            return PrototypeStore(
                lambda name: stored_prototypes(config, Layout(config.root / name)), _nothing, _nothing
            )
        return PrototypeStore(
            read=lambda name: files.read(Layout(config.root / name).key),
            write=lambda name, prototypes: files.write(Layout(config.root / name).key, prototypes),
            forget=lambda name: files.remove(Layout(config.root / name).key),
        )

    def select(self, layout: Layout, wanted: str, labels: Sequence[str]) -> ActiveClassifier:
        """Return what decides in a dataset, and load its model; arguments as for ``select_classifier``."""
        found = select_classifier(layout, self.config.state_dir, wanted, labels)
        facts = found.facts
        if facts is not None and facts.model_id not in self.finetuned:
            try:
                encoder = load_finetuned(facts.folder, device=self.config.device, threads=self.config.threads)
            except ModelError as error:
                return ActiveClassifier(refusal=str(error))
            except BROKEN_NETWORK as error:
                said = first_line(error)
                advice = f"run `sortd finetune --dataset {layout.name}` again, or set `device: cpu`"
                refusal = f"the fine-tuned model in {facts.folder} cannot be used ({said}): {advice}"
                return ActiveClassifier(refusal=refusal)
            assert self._cache is not None, "the configured model is loaded first"
            decoders = self._pool(encoder.preprocessing, "full" if facts.decoding == "full" else "draft")
            self.finetuned[facts.model_id] = Embedder(
                encoder, decoders, self._cache, batch_size=self.config.batch_size, are_sound=are_logits
            )
        return found

    def retain(self, wanted: Collection[str]) -> None:
        """Unload the fine-tuned models that are not in ``wanted`` and have no work left."""
        for model_id, embedder in list(self.finetuned.items()):
            if model_id not in wanted and not embedder.has_work:
                del self.finetuned[model_id]

    def _pool(self, preprocessing: Preprocessing, jpeg: Jpeg) -> DecoderPool:
        """Return the decoders for this input; encoders with the same input share them."""
        if (preprocessing, jpeg) not in self._decoders:
            decoding, (started, self._started) = self.config.decoding, (self._started, [])
            self._decoders[preprocessing, jpeg] = DecoderPool(
                decoding.workers or min(MOST_DECODERS, len(os.sched_getaffinity(0))),
                preprocessing,
                DecodeLimits.of(decoding),
                timeout_seconds=decoding.timeout_seconds,
                jpeg=jpeg,
                started=started or [start_process()],
            )
        return self._decoders[preprocessing, jpeg]

    def unload(self) -> None:
        """Stop the decoders and close the cache."""
        for ends in self._started:
            ends.discard()
        self._started = []
        for decoders in self._decoders.values():
            decoders.close()
        if self._cache is not None:
            self._cache.close()
        if isinstance(self._encoder, RemoteEncoder):
            self._encoder.close()


def describe_encoder(config: Config, encoder: Encoder, runs_on: Sequence[str]) -> str:
    """Return the model and its backend in words; if ``auto`` took the small one, also how to get the stronger one."""
    if isinstance(encoder, RemoteEncoder):
        return f"{encoder.greeting.description}, served at {config.encoder_socket}"
    name = config.model
    if name == "auto":
        found = locate_clip("auto", cache_dir=config.cache_dir).name
        hint = f"; `sortd models fetch {STRONGER}` installs the stronger one" if found == "packaged" else ""
        name = f"{found} (auto{hint})"
    return ", ".join([name, *runs_on])
