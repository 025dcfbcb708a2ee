"""A rehearsal: what ``once`` would do, by the same core, worker and rules, with every hand that writes taken off."""

import os
import queue
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from sortd.config import Config
from sortd.errors import LayoutError
from sortd.layout import find_datasets
from sortd.messages import Move, Moved, MoveFailed
from sortd.metrics import Metrics
from sortd.running.dataset import Dataset
from sortd.running.site import LoadEncoder, Site, sorter_settings, teaching_of
from sortd.running.worker import Answer, Posted, Worker, WorkerDied

Tell = Callable[[str, Move, str], None]
"""Hears of each move: dataset, move, destination."""


class Pretence:
    """Carries out no move, but tells of each where the image would stand if that name is free."""

    def __init__(self, name: str, root: Path, tell: Tell) -> None:
        """Pretend for the dataset at ``root``."""
        self._name, self._root, self._tell = name, root, tell

    def move_all(self, moves: Sequence[Move]) -> list[Moved | MoveFailed]:
        """Answer each move as done."""
        done: list[Moved | MoveFailed] = []
        for move in moves:
            destination = os.path.join(self._root, move.folder, os.path.basename(move.path))
            self._tell(self._name, move, destination)
            done.append(Moved(move.path, move.stamp, destination, move.outcome, move.stamp))
        return done


def rehearse(config: Config, tell: Tell, *, load_encoder: LoadEncoder | None = None) -> None:
    """Decide every image that waits and tell where it would go; nothing below the root or the state is written.

    Embeddings go to a temporary cache, so that not even the cache is touched.

    Raises:
        LayoutError: there is no dataset, or one cannot be learnt from.
        ModelError: the model cannot be had.
    """
    layouts = find_datasets(config.root)
    if not layouts:
        raise LayoutError(f"{config.root} holds no dataset: a folder with a Clases/ in it; `sortd init DIR` makes one")
    inbox: queue.SimpleQueue[Posted] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="sortd-") as folder:
        site = Site(config, load_encoder=load_encoder, scratch=Path(folder))
        worker = Worker(site.load, site.unload, inbox.put, site.classifiers)
        datasets = {}
        for layout in layouts:
            own = config.dataset(layout.name)
            datasets[layout.name] = Dataset(
                layout,
                sorter_settings(own),
                teaching_of(own),
                mover=Pretence(layout.name, layout.root, tell),
                ask=worker.ask,
                metrics=Metrics(),
                journal=None,
                last_generation=0,
                needs_marker=False,
            )
        worker.start()
        try:
            for dataset in datasets.values():
                dataset.begin(())
            while not all(dataset.is_drained or dataset.is_stuck for dataset in datasets.values()):
                _turn(inbox, datasets)
        finally:
            worker.stop(60)
    problems = [f"{dataset.name}: {dataset.problem}" for dataset in datasets.values() if dataset.problem]
    if problems:
        raise LayoutError("; ".join(problems))


def _turn(inbox: "queue.SimpleQueue[Posted]", datasets: dict[str, Dataset]) -> None:
    deadlines = [d for dataset in datasets.values() if (d := dataset.sorter.next_deadline()) is not None]
    scanning = any(dataset.has_more_to_look_at or dataset.has_moves for dataset in datasets.values())
    patience = 0.0 if scanning else max(0.0, min(deadlines) - monotonic()) if deadlines else None
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
        dataset.flush()
