"""The resources of a run: the configured and the fine-tuned models with their decoders, and the cache."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sortd.classify.types import AbstainSettings, DecisionSettings, Mode
from sortd.config import Config, DatasetConfig
from sortd.core.sorter import SorterSettings
from sortd.daemon.classifiers import Classifiers, are_logits
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import ReferenceSettings
from sortd.daemon.stored_prototypes import stored_prototypes
from sortd.daemon.worker import PrototypeStore
from sortd.encoder.backends import load_fastest
from sortd.encoder.base import Encoder
from sortd.encoder.finetuned import FinetunedFacts
from sortd.encoder.finetuned_network import load_finetuned
from sortd.encoder.models import STRONGER, locate_clip
from sortd.events import Preprocessing
from sortd.images.decode import DecodeLimits, Jpeg
from sortd.images.pool import DecoderPool
from sortd.layout import Layout
from sortd.store.cache import Cache

LoadEncoder = Callable[[Config], Encoder]

GUARD_IMAGES = 200  # a first batch of a new generation of this size is checked before it is moved
MOST_DECODERS = 8  # processes of some 40 MB each; the configuration can set more


def sorter_settings(config: DatasetConfig) -> SorterSettings:
    """Return the settings of the core from the configuration of a dataset."""
    return SorterSettings(
        settle_seconds=config.settle_seconds,
        batch_size=-(-config.batch_size // 2),
        backlog_limit=config.backlog_limit,
        set_rejected_aside=config.rejected == "move",
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


class Resources:
    """Opens the models, decoders and cache of one run."""

    def __init__(self, config: Config, *, load_encoder: LoadEncoder | None = None, scratch: Path | None = None) -> None:
        """Prepare; nothing is touched before ``load``.

        ``load_encoder`` replaces the configured model; ``scratch`` is a folder for embeddings instead of the cache,
        from which only prototypes are read then.
        """
        self._config = config
        self._embeddings, self._is_scratch = scratch or config.cache_dir, scratch is not None
        self._runs_on: list[str] = []
        self.on_progress: Callable[[str], None] = lambda _: None  # called while the model is loaded
        self._load_encoder = load_encoder or partial(load_fastest, report=self._runs_on.append)
        self._decoders: dict[tuple[Preprocessing, Jpeg], DecoderPool] = {}
        self._cache: Cache | None = None
        self.classifiers = Classifiers(
            config.state_dir,
            load=lambda folder: load_finetuned(folder, device=config.device, threads=config.threads),
            embed_with=self._embed_with,
        )

    def load(self) -> tuple[Embedder, PrototypeStore, str]:
        """Load the configured model, start its decoders and open the cache.

        Raises:
            ModelError: The model cannot be loaded.
        """
        config = self._config
        self.on_progress(f"loading {config.model}")
        encoder = self._load_encoder(config)
        decoders = self._pool(encoder.preprocessing, config.decoding.jpeg)
        self._cache = Cache(self._embeddings / "embeddings.sqlite", max_bytes=config.cache_megabytes * 1_000_000)
        embedder = Embedder(encoder, decoders, self._cache, batch_size=config.batch_size)
        return embedder, self._store(self._cache), ", ".join([self._describe(config), *self._runs_on])

    def _store(self, cache: Cache) -> PrototypeStore:
        """Return the store of prototypes; with a scratch folder it is read-only."""
        config = self._config

        def layout(dataset: str) -> Layout:
            return Layout(config.root / dataset)

        if self._is_scratch:
            return PrototypeStore(lambda dataset: stored_prototypes(config, layout(dataset)), _nothing, _nothing)
        return PrototypeStore(
            read=lambda dataset: cache.prototypes(layout(dataset).key),
            write=lambda dataset, prototypes: cache.remember_prototypes(layout(dataset).key, prototypes),
            forget=lambda dataset: cache.forget_prototypes(layout(dataset).key),
        )

    def _embed_with(self, encoder: Encoder, facts: FinetunedFacts) -> Embedder:
        """Return the embedder of a fine-tuned model, with the decoding of its training."""
        assert self._cache is not None, "the configured model is loaded first"
        decoders = self._pool(encoder.preprocessing, "full" if facts.decoding == "full" else "draft")
        return Embedder(encoder, decoders, self._cache, batch_size=self._config.batch_size, are_sound=are_logits)

    def _pool(self, preprocessing: Preprocessing, jpeg: Jpeg) -> DecoderPool:
        """Return the decoders for this input; encoders with the same input share them."""
        if (preprocessing, jpeg) not in self._decoders:
            decoding = self._config.decoding
            self._decoders[preprocessing, jpeg] = DecoderPool(
                decoding.workers or min(MOST_DECODERS, len(os.sched_getaffinity(0))),
                preprocessing,
                DecodeLimits(
                    max_pixels=decoding.max_pixels, max_side=decoding.max_side_pixels, max_bytes=decoding.max_bytes
                ),
                timeout_seconds=decoding.timeout_seconds,
                jpeg=jpeg,
            )
        return self._decoders[preprocessing, jpeg]

    @staticmethod
    def _describe(config: Config) -> str:
        """Return the name of the model; if ``auto`` took the small one, also how to get the stronger one."""
        if config.model != "auto":
            return config.model
        found = locate_clip("auto", cache_dir=config.cache_dir).name
        hint = f"; `sortd models fetch {STRONGER}` installs the stronger one" if found == "packaged" else ""
        return f"{found} (auto{hint})"

    def unload(self) -> None:
        """Stop the decoders and close the cache."""
        for decoders in self._decoders.values():
            decoders.close()
        if self._cache is not None:
            self._cache.close()
