"""A dataset and its journal for programs: what was moved, filing one image, undo."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from sortd.api.classifier import Classifier
from sortd.api.images import LoadedEncoder
from sortd.commands.assign import assign_to_class, facts_at
from sortd.commands.explain import why_kept
from sortd.commands.moves import dataset_at, journal_of, undo_records_of
from sortd.commands.status import settings_with_corrections
from sortd.config import Config, read_config
from sortd.core.sorter import leaves_doubtful, order_for
from sortd.daemon.dataset_lock import lock_dataset
from sortd.daemon.references import References, stored_prototypes
from sortd.daemon.resources import select_classifier
from sortd.encoder.backends import load_with_backend
from sortd.errors import DataError, JournalError, LayoutError, UnreadableError
from sortd.events import Abstained, EmbeddedImage, ImageRefused, Moved
from sortd.layout import Area, Layout
from sortd.service import read_status
from sortd.store.records import Selection
from sortd.watch.scan import stamp

PATIENCE_SECONDS = 60.0
"""For which ``file`` waits until a running daemon has filed an image."""
POLLING_SECONDS = 0.05


class DatasetHandle:
    """One dataset; a context manager, which closes the model if ``file`` loaded one.

    Nothing here moves a file but through the journal: a running daemon is asked, without one the dataset's lock is
    taken for as long as a call needs it. Moves are dictionaries with the keys of ``sortd history --json``;
    ``at`` is in seconds since the epoch.
    """

    def __init__(self, layout: Layout, config: Config) -> None:
        """Use a dataset with a configuration."""
        self.layout, self.config = layout, config
        self._classifier: Classifier | None = None

    def __enter__(self) -> Self:
        """Return the dataset."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.layout.name

    def history(
        self,
        *,
        outcome: str | None = None,
        label: str | None = None,
        run: str | None = None,
        path: str | os.PathLike[str] | None = None,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """Return the moves of the journal that meet every given condition, newest first.

        Args:
            outcome: ``filed``, ``sent_to_review``, ``rejected``, ``assigned``, ``refiled`` or ``undone``.
            label: the class.
            run: one start of sortd, as the key ``run`` of a move names it.
            path: an image, by a path that it has or had.
            limit: at most so many.

        Raises:
            JournalError: the journal cannot be read.
        """
        relative = None if path is None else self._relative(path)
        return self._moves(Selection(outcome=outcome, label=label, run=run, path=relative, limit=limit))

    def file(self, image: str | os.PathLike[str], label: str | None = None) -> dict[str, Any]:
        """File one image and return its move.

        With a label, an image in Review/ or Dataset/ goes to that class, as by ``sortd assign``. Without one, an image
        in Images/ is decided and goes to its class or to Review/: by the running daemon, which is waited for, or here.
        A file that is still being written must not be passed. A broken image goes to Rejected/ where the daemon runs.

        Raises:
            DataError: it lies elsewhere, is held, was not moved, a fine-tuned model decides and no daemon runs, or the
                daemon has not filed it in time; the message says why.
            UnreadableError: it cannot be decoded, and no daemon runs; it stays where it is.
            SortdError: the dataset is not there, or another sortd works on it.
        """
        path = f"{self.layout.root}/{self._relative(image)}"
        known = [one["id"] for one in self.history(path=path, limit=1)]  # the file may have the name of a moved one
        facts = facts_at(path)
        if label is not None:
            done = assign_to_class(self.config, self.layout, label, [facts])["assigned"][0]
            if done["destination"] is None:
                raise DataError(f"{path} was not moved: {done['message']}")
            return self._moves(Selection(id=done["id"], limit=1))[0]
        if self.layout.area_of(path) is not Area.IMAGES:
            raise DataError(f"{path} is not in {self.layout.area(Area.IMAGES)}; to file it elsewhere, pass a label")
        if (why := why_kept(self.config, Path(path))) is not None:
            raise DataError(f"{path} stays in Images/: {why.message}")
        status = read_status(self.config.state_dir)
        return self._await(path, known) if status is not None and status["alive"] else self._file_here(path)

    def undo(self, run: str | None = None, *, moves: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Undo the moves of a run, or one move as ``history`` or ``file`` returned it.

        Returns:
            For each move ``id``, ``was``, ``restored`` (None: it was not moved back) and ``message``.

        Raises:
            DataError: neither or both are given, or there is nothing to undo.
            SortdError: the dataset is not there, or another sortd works on it.
        """
        if (run is None) == (moves is None):
            raise DataError("undo takes a run, or one move")
        identifier = None if moves is None else int(moves["id"])
        records = self._moves(Selection(run=run, id=identifier, undoable=True))
        if not records:
            raise DataError("the journal has no such move that can be undone")
        undone: list[dict[str, Any]] = undo_records_of(
            self.config, self.layout, [int(str(one["id"])) for one in records]
        )["undone"]
        return undone

    def classifier(self) -> Classifier:
        """Return the classifier of the references under the configured model and settings, built with the first call.

        Images to which a person gave a class are references as well. Later changes count after ``close``.

        Raises:
            DataError: there is no class.
            ModelError: the model cannot be loaded.
        """
        if self._classifier is None:
            config = self.config
            backend = config.backend if config.encoder_socket is None else "auto"
            encoder = LoadedEncoder(
                load_with_backend(config, backend), cache_dir=config.cache_dir, jpeg=config.decoding.jpeg
            )
            settings = settings_with_corrections(config, self.layout)
            previous = stored_prototypes(config, self.layout)
            generation = 1 if previous is None else previous.generation + 1
            try:
                rebuilt = References(self.layout.area(Area.CLASES)).rebuild(
                    encoder.embedder(), settings, previous=previous, generation=generation
                )
            except DataError:
                encoder.close()
                raise
            self._classifier = Classifier(rebuilt.prototypes, encoder=encoder)
        return self._classifier

    def close(self) -> None:
        """End what ``file`` and ``classifier`` started."""
        if self._classifier is not None and self._classifier.encoder is not None:
            self._classifier.encoder.close()
        self._classifier = None

    def _file_here(self, path: str) -> dict[str, Any]:
        classifier, wanted = self.classifier(), self.config.dataset(self.name).classifier
        if select_classifier(self.layout, self.config.state_dir, wanted, classifier.labels).facts is not None:
            raise DataError(f"a fine-tuned model decides in {self.name}; start sortd, or run `sortd once`")
        assert classifier.encoder is not None, "classifier() sets it"
        version = stamp(path)
        answer = None if version is None else next(iter(classifier.encoder.embedder().embed([(path, version)])))
        if answer is None or isinstance(answer, ImageRefused):
            raise UnreadableError(f"{path}: {'it is gone' if answer is None else answer.message}")
        assert isinstance(answer, EmbeddedImage)
        (decision,) = classifier.classify_rows(answer.embedding[None])
        companions, action = self.config.dataset(self.name).companions, self.config.dataset(self.name).action
        if isinstance(decision, Abstained) and leaves_doubtful(action):
            raise DataError(f"{path} stays in Images/: no class is certain ({decision.reason})")
        move = order_for(answer, decision, classifier.prototypes, settle_seconds=0.0, action=action)
        with lock_dataset(self.layout, self.config.state_dir, companions=companions) as opened:
            opened.presence.require()
            if guard := opened.journal.history.guard().reason:
                raise DataError(f"{self.name} is held, because {guard}; see `sortd release`")
            ended = [one for one in opened.mover.move_all([move]) if one.path == path]
        if not ended or not isinstance(ended[0], Moved):
            raise DataError(f"{path} was not moved: {getattr(ended[0], 'message', '') if ended else 'try again'}")
        return self._moves(Selection(path=self._relative(path), limit=1))[0]

    def _await(self, path: str, known: list[Any]) -> dict[str, Any]:
        """Return the move of a path that a running daemon is about to make; ``known`` is the move before it, if any."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            found = self.history(path=path, limit=1)
            if found and found[0]["id"] not in known:
                return found[0]
            time.sleep(POLLING_SECONDS)
        where = "still there" if os.path.lexists(path) else "gone, and sortd has not moved it,"
        raise DataError(f"{path} is {where} after {PATIENCE_SECONDS:.0f} s; `sortd status` says more")

    def _moves(self, selection: Selection) -> list[dict[str, Any]]:
        try:
            return journal_of(self.config, self.layout).moves(selection)
        except OSError as error:
            raise JournalError(f"{error.filename} cannot be read: {error.strerror}") from error

    def _relative(self, path: str | os.PathLike[str]) -> str:
        """Return a path relative to the dataset; raise DataError if it lies elsewhere."""
        found = dataset_at(self.config, Path(path))
        if found is None or found[0] != self.layout:
            raise DataError(f"{path} lies outside of the dataset {self.layout.root}")
        return found[1]


def open_dataset(folder: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None) -> DatasetHandle:
    """Return a dataset by its folder.

    Args:
        folder: the dataset, a folder with ``Clases/`` in it.
        config: the configuration of sortd; None: the one that ``sortd`` itself would read. Its ``root`` becomes the
            parent of the folder.

    Raises:
        LayoutError: the folder is no dataset.
        ConfigError: the configuration has mistakes.
    """
    layout = Layout(Path(os.path.abspath(folder)))
    if not layout.is_dataset:
        raise LayoutError(f"{layout.root} is no dataset: it has no {Area.CLASES}/; `sortd init` makes one")
    read = read_config(None if config is None else Path(config), os.environ)
    return DatasetHandle(layout, read.model_copy(update={"root": layout.root.parent}))
