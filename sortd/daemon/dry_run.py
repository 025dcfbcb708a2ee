"""A rehearsal: what ``once`` would do, by the same core, worker and rules, with every hand that writes taken off."""

import queue
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from sortd.config import Config
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import find_state_folder
from sortd.daemon.move_queue import DryRunMover, Tell
from sortd.daemon.resources import LoadEncoder, Resources, sorter_settings, teaching_of
from sortd.daemon.worker import Answer, Posted, Worker, WorkerDied
from sortd.errors import LayoutError
from sortd.events import DatasetId
from sortd.layout import JOURNAL_FILE, Layout, find_datasets
from sortd.metrics import Metrics
from sortd.store.database import copy_journal
from sortd.store.journal import Journal

LOOK_SECONDS = 1.0
"""The longest pause between two turns: what waits for a file of a person's to be left alone has no deadline."""


def rehearse(config: Config, tell: Tell, *, load_encoder: LoadEncoder | None = None) -> None:
    """Decide every image that waits and tell where it would go; nothing below the root or the state is written.

    Embeddings go to a temporary cache, so that not even the cache is touched. Each journal is copied: what it remembers
    holds here too, and what would be noted is noted in the copy.

    Raises:
        LayoutError: there is no dataset, or nothing may move in one.
        ModelError: the model cannot be had.
        JournalError: a journal cannot be read.
    """
    layouts = find_datasets(config.root)
    if not layouts:
        raise LayoutError(f"{config.root} holds no dataset: a folder with a Clases/ in it; `sortd init DIR` makes one")
    inbox: queue.SimpleQueue[Posted] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="sortd-") as folder, ExitStack() as journals:
        site = Resources(config, load_encoder=load_encoder, scratch=Path(folder))
        worker = Worker(site.load, site.unload, inbox.put, site.classifiers)
        datasets: dict[DatasetId, Dataset] = {}
        for number, layout in enumerate(layouts):
            own, identity = config.dataset(layout.name), DatasetId(layout.name, number)
            journal = journals.enter_context(_copied(layout, config, Path(folder) / str(number)))
            datasets[identity] = Dataset(
                identity,
                layout,
                sorter_settings(own),
                teaching_of(own),
                mover=DryRunMover(layout.name, layout.root, tell),
                ask=worker.ask,
                metrics=Metrics(),
                journal=journal,
                last_generation=journal.history.last_generation(),
                guard=journal.history.guard(),
                needs_marker=False,
            )
        worker.start()
        try:
            for dataset in datasets.values():
                dataset.begin()
                dataset.scan_handled()
            while not all(dataset.is_drained or dataset.is_stuck for dataset in datasets.values()):
                _turn(inbox, datasets)
        finally:
            worker.stop(60)
    problems = [f"{dataset.name}: {dataset.problem}" for dataset in datasets.values() if dataset.problem]
    if problems:
        raise LayoutError("; ".join(problems))


def _copied(layout: Layout, config: Config, folder: Path) -> Journal:
    """Return a copy of a dataset's journal, in ``folder``; where it has none, an empty one."""
    folder.mkdir()
    file = find_state_folder(layout, config.state_dir) / JOURNAL_FILE
    if file.is_file():
        copy_journal(file, folder / JOURNAL_FILE)
    return Journal(folder / JOURNAL_FILE)


def _turn(inbox: "queue.SimpleQueue[Posted]", datasets: dict[DatasetId, Dataset]) -> None:
    deadlines = [d for dataset in datasets.values() if (d := dataset.sorter.next_deadline()) is not None]
    is_busy = any(dataset.has_more_to_look_at or dataset.has_moves for dataset in datasets.values())
    patience = 0.0 if is_busy else max(0.0, min([*deadlines, monotonic() + LOOK_SECONDS]) - monotonic())
    try:
        message = inbox.get(timeout=patience)
    except queue.Empty:
        pass
    else:
        if isinstance(message, WorkerDied):
            raise message.error
        if isinstance(message, Answer):
            datasets[message.dataset].answer(message)
    for dataset in datasets.values():
        dataset.tick(monotonic())
        dataset.continue_scan()
        dataset.continue_looking()
        dataset.flush()
