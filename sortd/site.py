"""The site: where sortd works. It locks, recovers and opens datasets, and loads the model with what it needs."""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sortd.cache import Cache
from sortd.config import Config, DatasetConfig
from sortd.dataset import Dataset
from sortd.decoders import DecoderPool
from sortd.embedding import Embedder
from sortd.encoder import Encoder, load
from sortd.errors import AlreadyRunningError, LayoutError
from sortd.filing import Filing
from sortd.images import Limits
from sortd.journal import Journal
from sortd.journal_history import History
from sortd.layout import Layout
from sortd.messages import Stamp
from sortd.metrics import Metrics
from sortd.model_folders import STRONGER
from sortd.models import locate
from sortd.prototypes import Abstain, DecisionSettings, Mode
from sortd.references import Teaching
from sortd.sorter import SorterSettings
from sortd.worker import Job, PrototypeStore

LoadEncoder = Callable[[Config], Encoder]

GUARD_IMAGES = 200
"""From so many images on, the first batch of a new generation is tried before it moves."""

GENERATION_FACT = "generation"
"""The journal's note of the last generation that served: numbers are never used again, even when the cache is lost."""


def sorter_settings(config: DatasetConfig) -> SorterSettings:
    """Return the part of a dataset's configuration that its core needs."""
    return SorterSettings(
        settle_seconds=config.settle_seconds,
        batch_size=config.batch_size,
        backlog_limit=config.backlog_limit,
        set_rejected_aside=config.rejected == "move",
        guard_images=GUARD_IMAGES if config.guard else 0,
    )


def teaching_of(config: DatasetConfig) -> Teaching:
    """Return the part of a dataset's configuration that its prototypes depend on."""
    abstain = None
    if config.abstain is not None:
        abstain = Abstain(precision=config.abstain.precision, strangers=config.abstain.strangers)
    return Teaching(
        settings=DecisionSettings(mode=Mode(config.mode), abstain=abstain),
        templates=tuple(config.prompts),
        learns_from_corrections=config.learn_from_corrections,
    )


@dataclass(slots=True)
class _Holding:
    """What is open for one dataset, to be closed again."""

    lock: FileLock
    journal: Journal


class Site:
    """Opens datasets for writing, and the model, for one run."""

    def __init__(self, config: Config, *, load_encoder: LoadEncoder | None = None) -> None:
        """Prepare; nothing is touched before ``open`` and ``load``."""
        self._config = config
        self._load_encoder = load_encoder or (
            lambda config: load(
                config.model,
                text_model=config.text_model,
                backend=config.backend,
                device=config.device,
                cache_dir=config.cache_dir,
                threads=config.threads,
                decoding=config.decoding.jpeg,
            )
        )
        self._run = uuid.uuid4().hex[:8]
        self._held: dict[str, _Holding] = {}
        self._decoders: DecoderPool | None = None
        self._cache: Cache | None = None

    @property
    def state_folder(self) -> Path:
        """The state directory."""
        return self._config.state_dir

    # ------------------------------------------------------------ datasets

    def open(self, layout: Layout, config: Config, *, ask: Callable[[Job], None], metrics: Metrics) -> Dataset:
        """Lock a dataset, recover what a crash left, and return it at work.

        Raises:
            AlreadyRunningError: another sortd has it.
            LayoutError: its folders cannot serve.
            JournalError: its journal cannot be opened.
        """
        own = config.dataset(layout.name)
        layout.make()
        state = layout.state_folder(self.state_folder)
        lock = self._lock(layout, state)
        try:
            journal = Journal(state / "journal.sqlite", run=self._run)
            filing = Filing(layout.root, journal, companions=own.companions)
            recovered = filing.recover()
        except BaseException:
            lock.release()
            raise
        self._held[layout.name] = _Holding(lock, journal)
        last = int(journal.history.fact(GENERATION_FACT) or 0)
        dataset = Dataset(
            layout,
            sorter_settings(own),
            teaching_of(own),
            mover=filing,
            ask=ask,
            metrics=metrics,
            journal=journal,
            last_generation=last,
        )
        dataset.tell_recovered(recovered)
        return dataset

    def begin(self, dataset: Dataset) -> None:
        """Tell a dataset's core what the journal remembers of held and undecided files."""
        journal = self._held[dataset.name].journal
        root = os.fspath(dataset.layout.root)
        held = [(os.path.join(root, path), mark) for path, mark in journal.history.held().items()]
        dataset.begin(held, self._reviewed(dataset, journal.history))

    @staticmethod
    def _reviewed(dataset: Dataset, history: History) -> list[tuple[str, Stamp, int]]:
        """Return the images in Review/ that sortd itself put there and that nobody touched since."""
        found = []
        for path, mark in dataset.scan_review():
            record = history.last_known(mark)
            if record is not None and os.path.join(dataset.layout.root, record.destination_path) == path:
                found.append((path, mark, record.grounds.generation))
        return found

    def close(self, dataset: Dataset) -> None:
        """Note the last generation, close the journal, give the lock back."""
        holding = self._held.pop(dataset.name, None)
        if holding is None:
            return
        holding.journal.note(GENERATION_FACT, str(dataset.last_generation))
        holding.journal.close()
        holding.lock.release()

    @staticmethod
    def _lock(layout: Layout, state: Path) -> FileLock:
        """Take the dataset's lock: in its marker folder, so that it holds whatever state directory the other uses."""
        lock = FileLock(layout.marker / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise AlreadyRunningError(
                f"another sortd works on {layout.root}; stop it first (`sortd status` tells which it is)"
            ) from error
        except OSError as error:
            raise LayoutError(f"{layout.marker}/lock cannot be made: {error.strerror}; mend its rights") from error
        (layout.marker / "state").write_text(f"{state}\n", encoding="utf-8", errors="surrogateescape")
        return lock

    # ------------------------------------------------------------ the model, in the worker's thread

    def load(self) -> tuple[Embedder, PrototypeStore, str]:
        """Load the model, warm the decoders, open the cache.

        Raises:
            ModelError: the model cannot be had.
        """
        config = self._config
        encoder = self._load_encoder(config)
        decoding = config.decoding
        limits = Limits(max_pixels=decoding.max_pixels, max_side=decoding.max_side_pixels, max_bytes=decoding.max_bytes)
        self._decoders = DecoderPool(
            decoding.workers or max(1, min(8, (os.cpu_count() or 2) - 1)),
            encoder.preprocessing,
            limits,
            timeout_seconds=decoding.timeout_seconds,
            jpeg=decoding.jpeg,
        )
        self._cache = Cache(config.cache_dir / "embeddings.sqlite", max_bytes=config.cache_megabytes * 1_000_000)
        embedder = Embedder(encoder, self._decoders, self._cache, batch_size=config.batch_size)
        store = PrototypeStore(self._cache.prototypes, self._cache.remember_prototypes)
        return embedder, store, self._describe(config)

    @staticmethod
    def _describe(config: Config) -> str:
        """Name the model that serves; where ``auto`` had to take the small one, with what gets the stronger one."""
        if config.model != "auto":
            return config.model
        found = locate("auto", cache_dir=config.cache_dir).name
        hint = f"; `sortd models fetch {STRONGER}` gets the stronger one" if found == "packaged" else ""
        return f"{found} (auto{hint})"

    def unload(self) -> None:
        """End the decoders and close the cache."""
        if self._decoders is not None:
            self._decoders.close()
        if self._cache is not None:
            self._cache.close()
