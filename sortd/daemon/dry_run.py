"""The dry run: the same decisions as ``once``, without writes."""

import queue
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic

from sortd.config import Config
from sortd.daemon.dataset import Dataset
from sortd.daemon.dataset_lock import find_state_folder
from sortd.daemon.move_queue import DryRunMover, Tell
from sortd.daemon.resources import LoadEncoder, Resources, reference_settings_of, sorter_settings
from sortd.daemon.worker import Answer, Posted, Worker, WorkerDied
from sortd.errors import LayoutError
from sortd.events import DatasetId
from sortd.layout import JOURNAL_FILE, Layout, find_datasets
from sortd.metrics import Metrics
from sortd.store.history import copy_journal
from sortd.store.journal import Journal

LOOK_SECONDS = 1.0  # between two turns, at most: the wait until a moved image is left alone has no deadline


def simulate(config: Config, report: Tell, *, load_encoder: LoadEncoder | None = None) -> None:
    """Decide every waiting image and report where it would go; nothing below the root or the state folder is written.

    Embeddings go to a temporary cache, and each dataset works with a copy of its journal.

    Raises:
        LayoutError: There is no dataset, or nothing may move in one.
        ModelError: The model cannot be loaded.
        JournalError: A journal cannot be read.
    """
    layouts = find_datasets(config.root)
    if not layouts:
        raise LayoutError(f"{config.root} holds no dataset (a folder with a Clases/); create one with `sortd init DIR`")
    inbox: queue.SimpleQueue[Posted] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="sortd-") as folder, ExitStack() as journals:
        resources = Resources(config, load_encoder=load_encoder, scratch=Path(folder))
        worker = Worker(resources.load, resources.unload, inbox.put, resources.classifiers)
        datasets: dict[DatasetId, Dataset] = {}
        for number, layout in enumerate(layouts):
            own, identity = config.dataset(layout.name), DatasetId(layout.name, number)
            journal = journals.enter_context(_copied(layout, config, Path(folder) / str(number)))
            datasets[identity] = Dataset(
                identity,
                layout,
                sorter_settings(own),
                reference_settings_of(own),
                mover=DryRunMover(layout.name, layout.root, report),
                ask=worker.ask,
                metrics=Metrics(),
                journal=journal,
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
    """Return a copy of the journal of a dataset, in ``folder``, or an empty one."""
    folder.mkdir()
    file = find_state_folder(layout, config.state_dir) / JOURNAL_FILE
    if file.is_file():
        copy_journal(file, folder / JOURNAL_FILE)
    return Journal(folder / JOURNAL_FILE)


def _turn(inbox: "queue.SimpleQueue[Posted]", datasets: dict[DatasetId, Dataset]) -> None:
    deadlines = [d for dataset in datasets.values() if (d := dataset.sorter.next_deadline()) is not None]
    is_busy = any(dataset.has_more_to_look_at or dataset.move_queue.is_due for dataset in datasets.values())
    seconds = 0.0 if is_busy else max(0.0, min([*deadlines, monotonic() + LOOK_SECONDS]) - monotonic())
    with suppress(queue.Empty):
        match inbox.get(timeout=seconds):
            case WorkerDied(error=error):
                raise error
            case Answer() as answer:
                datasets[answer.dataset].answer(answer)
    for dataset in datasets.values():
        dataset.tick(monotonic())
        dataset.scans.continue_inbox()
        dataset.continue_looking()
        dataset.flush()
