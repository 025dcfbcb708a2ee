"""An examination: the references of datasets are read, embedded and evaluated, and nothing is moved or learnt."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sortd.classify.evaluate import EvaluationReport, evaluate
from sortd.commands.promotion import serving_facts
from sortd.commands.stored import keep_evaluated
from sortd.config import Config
from sortd.daemon.corrections import corrected_images
from sortd.daemon.embedder import Embedder
from sortd.daemon.resources import Resources, reference_settings_of
from sortd.encoder.base import Encoder
from sortd.errors import DataError, SortdError, StorageError
from sortd.events import ImageRefused
from sortd.layout import JOURNAL_FILE, Area, Layout, find_datasets
from sortd.references import References, ReferencesAbsentError, ReferenceSettings
from sortd.store.history import History

LoadEncoder = Callable[[Config], Encoder]


@dataclass(frozen=True, slots=True)
class Examined:
    """One dataset and what its references are worth."""

    dataset: str
    root: Path
    report: EvaluationReport
    refused: tuple[ImageRefused, ...]
    """References that could not be read."""
    serving: dict[str, Any]
    """Which classifier is to decide, see ``promotion.serving_facts``; the report is about the prototypes."""

    def facts(self) -> dict[str, Any]:
        """Return it all as plain values."""
        unreadable = [{"path": one.path, "message": one.message} for one in self.refused]
        return {"root": str(self.root), **self.report.to_json(), "unreadable": unreadable, "serving": self.serving}


def examine(
    config: Config,
    dataset: str | None = None,
    *,
    load_encoder: LoadEncoder | None = None,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[Examined]:
    """Evaluate one dataset, or all of them, each under its own settings.

    Args:
        config: where everything is.
        dataset: only this one.
        load_encoder: stands in for the configured model.
        tell: is told what is under way, how many references are read, and of how many.

    Raises:
        DataError: there is no such dataset, or one, told after the others, holds nothing to learn from.
        JournalError: the journal of one, told after the others, cannot be read.
        ModelError: the model cannot be had.
    """
    chosen = _chosen(config, dataset)
    site = Resources(config, load_encoder=load_encoder)
    try:
        embedder, _, _ = site.load()
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
        site.unload()


def _examined(config: Config, layout: Layout, embedder: Embedder, tell: Callable[[str, int, int], None]) -> Examined:
    teaching = taught(config, layout)
    reading = partial(tell, f"reading {layout.name}")
    support, refused = References(layout.area(Area.CLASES)).support(embedder, teaching, tell=reading)
    tell(f"judging {layout.name}", len(support.sources), len(support.sources))
    report = evaluate(support, teaching.settings, keep=partial(keep_evaluated, config, layout))
    return Examined(layout.name, layout.root, report, refused, serving_facts(config, layout))


def taught(config: Config, layout: Layout) -> ReferenceSettings:
    """Return what decides, beside the images in ``Clases/``, on a dataset's prototypes: settings and corrections.

    Raises:
        JournalError: the journal, which knows the corrections, cannot be read.
    """
    teaching = reference_settings_of(config.dataset(layout.name))
    file = layout.state_folder(config.state_dir) / JOURNAL_FILE
    if not teaching.learns_from_corrections or not file.is_file():
        return teaching
    with History.open(file) as history:
        return replace(teaching, corrections=corrected_images(layout, history))


def _chosen(config: Config, name: str | None) -> list[Layout]:
    layouts = find_datasets(config.root)
    chosen = [layout for layout in layouts if name is None or layout.name == name]
    if not chosen:
        there = ", ".join(layout.name for layout in layouts) or "none; `sortd init DIR` makes one"
        raise DataError(f"there is no dataset {name or ''} in {config.root}; there are: {there}".replace("  ", " "))
    return chosen
