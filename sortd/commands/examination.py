"""Evaluation of the references of datasets, without changing anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sortd.classify.evaluate import EvaluationReport, evaluate
from sortd.commands.promotion import dataset_named, serving_facts
from sortd.config import Config
from sortd.daemon.corrections import labelled_images
from sortd.daemon.embedder import Embedder
from sortd.daemon.references import References, ReferencesAbsentError, ReferenceSettings, keep_evaluated
from sortd.daemon.resources import Resources, reference_settings_of
from sortd.encoder.base import Encoder
from sortd.errors import DataError, SortdError, StorageError
from sortd.events import ImageRefused
from sortd.layout import JOURNAL_FILE, Area, Layout, find_datasets
from sortd.store.history import History

LoadEncoder = Callable[[Config], Encoder]


@dataclass(frozen=True, slots=True)
class DatasetEvaluation:
    """The evaluation of one dataset."""

    dataset: str
    root: Path
    report: EvaluationReport
    refused: tuple[ImageRefused, ...]  # references that could not be read
    serving: dict[str, Any]
    """The classifier in use (``promotion.serving_facts``); the report is about the prototypes."""

    def facts(self) -> dict[str, Any]:
        """Return the evaluation as plain values."""
        unreadable = [{"path": one.path, "message": one.message} for one in self.refused]
        return {"root": str(self.root), **self.report.to_json(), "unreadable": unreadable, "serving": self.serving}


def evaluate_datasets(
    config: Config,
    dataset: str | None = None,
    *,
    load_encoder: LoadEncoder | None = None,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[DatasetEvaluation]:
    """Yield the evaluation of one dataset or of all, and raise the first error of a dataset after the last one.

    ``tell(step, done, total)`` is called for each reference; ``load_encoder`` replaces the configured model.

    Raises:
        DataError: there is no such dataset, or a dataset has no references.
        JournalError: a journal cannot be read.
        ModelError: the model is not available.
    """
    chosen = find_datasets(config.root) if dataset is None else [dataset_named(config, dataset)]
    if not chosen:
        raise DataError(f"there is no dataset in {config.root}; create one with `sortd init DIR`")
    resources = Resources(config, load_encoder=load_encoder)
    try:
        embedder, _, _ = resources.load()
        refusal: SortdError | None = None
        for layout in chosen:
            try:
                examined = _examined(config, layout, embedder, tell)
            except ReferencesAbsentError as error:
                refusal = refusal or DataError(str(error))
            except (DataError, StorageError) as error:
                refusal = refusal or error
            else:
                yield examined
        if refusal is not None:
            raise refusal
    finally:
        resources.unload()


def _examined(
    config: Config, layout: Layout, embedder: Embedder, tell: Callable[[str, int, int], None]
) -> DatasetEvaluation:
    reference_settings = settings_with_corrections(config, layout)
    reading = partial(tell, f"reading {layout.name}")
    support, refused = References(layout.area(Area.CLASES)).support(embedder, reference_settings, tell=reading)
    tell(f"evaluating {layout.name}", len(support.sources), len(support.sources))
    report = evaluate(support, reference_settings.settings, keep=partial(keep_evaluated, config, layout))
    return DatasetEvaluation(layout.name, layout.root, report, refused, serving_facts(config, layout))


def settings_with_corrections(config: Config, layout: Layout) -> ReferenceSettings:
    """Return the reference settings of a dataset, with the images that its journal adds to the references.

    Raises:
        JournalError: the journal cannot be read.
    """
    reference_settings = reference_settings_of(config.dataset(layout.name))
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not file.is_file():
        return reference_settings
    learns = reference_settings.learns_from_corrections
    with History.open(file) as history:
        return replace(reference_settings, corrections=labelled_images(layout, history, with_corrections=learns))
