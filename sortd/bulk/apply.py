"""The commands ``bulk apply`` and ``bulk undo``: decided images go to the folders of their classes, and back.

A file on this disk lies in ``Images/`` of a dataset and is moved by the mover, with the journal of that dataset. An
object of a store goes to ``Dataset/<class>/`` below a prefix by ``transfers``. Both move only what has the sha256 that
was decided on. Both can be repeated: what is done is known by the journals, so that an image is moved once in a run.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

import typer

from sortd.bulk.plan import decided_rows, read_run
from sortd.bulk.storage import local_path, store_of
from sortd.bulk.transfers import (
    APPLY,
    AT_ONCE,
    JOURNAL,
    UNDO,
    ObjectStore,
    Transfer,
    TransferJournal,
    TransferResult,
    dry_run_transfer,
    transfer_all,
)
from sortd.commands.console import bar, counted, print_line, print_table, printable, say, show
from sortd.commands.moves import journal_of, undo_records_of
from sortd.commands.reconsider import MOST_IN_A_REQUEST, Refile, refiling
from sortd.config import Config
from sortd.daemon.references import class_name_problem
from sortd.daemon.refile import refile_facts
from sortd.errors import DataError, SortdError
from sortd.events import Assigned, Mode, Outcome
from sortd.files import sha256_of
from sortd.layout import Area, Layout
from sortd.store.history import History
from sortd.store.records import Record, Selection
from sortd.watch.scan import stamp

THREADS = 16  # that read files and ask a store at the same time
WRITABLE = ("s3", "gs", "gcs")
"""The schemes of the stores in which objects can be copied and deleted; hf:// is only read."""
MOST_LISTED = 1_000  # refusals that are kept with their messages
MOST_REASONS = 50  # that are counted apart

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class AssignedImage:
    """One image of a run that goes to a class."""

    id: str
    uri: str
    label: str
    probability: float
    margin: float
    encoder_id: str
    sha256: str
    mode: str


COLUMNS = tuple(field.name for field in fields(AssignedImage))


@dataclass
class Applied:
    """What became of the images of a run."""

    moved: Counter[str] = field(default_factory=Counter)  # by class
    before: int = 0  # moved by an earlier call
    later: int = 0  # being copied to another file system by the running sortd
    abstained: Counter[str] = field(default_factory=Counter)  # by reason
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    listed: list[dict[str, str]] = field(default_factory=list)  # the first refusals

    def refuse(self, uri: str, message: str) -> None:
        """Count an image that is not moved."""
        reason = message.removeprefix(f"{uri}: ")
        if reason.startswith(f"{uri} -> "):
            reason = reason.partition(": ")[2]
        self.refused[reason if reason in self.refused or len(self.refused) < MOST_REASONS else "other reasons"] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append({"uri": uri, "message": reason})

    def count(self, scheme: str, result: TransferResult) -> None:
        """Count a transfer of an object."""
        if result.message:
            self.refuse(f"{scheme}://{result.transfer.source}", result.message)
        elif result.was_done:
            self.before += 1
        else:
            self.moved[result.transfer.label] += 1

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "moved": dict(sorted(self.moved.items())),
            "before": self.before,
            "later": self.later,
            "abstained": dict(self.abstained.most_common()),
            "refused": dict(self.refused.most_common()),
            "listed": self.listed,
        }


def assigned_images(run: Path, *, tell: Tell, abstained: Counter[str]) -> Iterator[list[AssignedImage]]:
    """Yield the assigned images of a run in groups, each image once; count the others by reason in ``abstained``.

    ``tell`` is called with the number of decisions that were read, and that of the images of the run.

    Raises:
        DataError: the decisions are damaged, or there are none.
    """
    done, count = 0, int(read_run(run)["count"])
    for rows in decided_rows(run, ("reason", *COLUMNS), at_once=MOST_IN_A_REQUEST):
        found: dict[str, AssignedImage] = {}
        for row in rows:
            reason = row.pop("reason") or "unknown"
            if row["label"] is None:
                abstained[reason.partition(":")[0]] += 1
            elif None in row.values() or not (0 <= row["probability"] <= 1 and isfinite(row["margin"])):
                abstained["incomplete row"] += 1
            else:
                found[row["id"]] = AssignedImage(**row)
        yield list(found.values())
        done += len(rows)
        tell("images", done, count)
    if not done:
        raise DataError(f"{run} has no decisions; make them: sortd bulk decide {run} --classifier FILE")


def apply_run(
    config: Config,
    run: Path,
    *,
    to: str | None = None,
    dry_run: bool = False,
    tell: Tell = lambda *_: None,
    make_store: Callable[[str], ObjectStore] = lambda scheme: ObjectStore(store_of(scheme)),
) -> dict[str, Any]:
    """Move the assigned images of a run, and return what became of each, counted, as plain values.

    ``to`` is the prefix of objects, below which ``Dataset/`` is; by default the parent of the run's source
    ``…/Images``. A dry run checks everything and moves nothing. ``make_store`` connects to the store of a scheme.

    Raises:
        DataError: the run has no decisions, or ``to`` is missing or of another store.
        AlreadyRunningError: another process applies this run.
        JournalError: the run's own journal cannot be written.
    """
    applied = Applied()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, "bulk"))
        files = _Files(config, stack, pool, applied, is_dry=dry_run)
        objects = _Objects(run, to, stack, pool, applied, make_store, is_dry=dry_run)
        for group in assigned_images(run, tell=tell, abstained=applied.abstained):
            files.apply([one for one in group if local_path(one.uri) is not None])
            objects.apply([one for one in group if local_path(one.uri) is None])
    return {"run": os.fspath(run), "dry_run": dry_run, **applied.facts()}


# ---------------------------------------------------------------- files on this disk


class _Files:
    """Moves images out of ``Images/`` of datasets."""

    def __init__(
        self, config: Config, stack: ExitStack, pool: ThreadPoolExecutor, applied: Applied, *, is_dry: bool
    ) -> None:
        self._config, self._stack, self._pool, self._applied, self._is_dry = config, stack, pool, applied, is_dry
        self._refile: dict[Layout, Refile] = {}

    def apply(self, images: Sequence[AssignedImage]) -> None:
        """Move one group."""
        by_layout: dict[Layout, list[tuple[AssignedImage, str]]] = {}
        for image in images:
            path = local_path(image.uri) or ""
            layout = _dataset_of(os.path.dirname(path))
            if layout is None:
                self._applied.refuse(path, "it does not lie in Images/ of a dataset")
            else:
                by_layout.setdefault(layout, []).append((image, path))
        for layout, of_dataset in by_layout.items():
            try:
                self._apply(layout, of_dataset)
            except SortdError as error:
                for _, path in of_dataset:
                    self._applied.refuse(path, str(error))

    def _apply(self, layout: Layout, images: Sequence[tuple[AssignedImage, str]]) -> None:
        config = self._config.model_copy(update={"root": layout.root.parent})
        if (action := config.dataset(layout.name).action) != "move":
            raise DataError(
                f"`action: {action}` of its dataset leaves images where they are; bulk apply would move them"
            )
        if layout not in self._refile:
            self._refile[layout] = self._stack.enter_context(refiling(config, layout, dry_run=self._is_dry))
            self._refile[layout]([])  # recovers moves that did not end: their images are not where they were decided on
        found = list(self._pool.map(_request_or_problem, images))
        ready = [one for one in found if not isinstance(one, str)]
        with journal_of(config, layout).open() as history:
            for (image, path), problem in zip(images, found, strict=True):
                if isinstance(problem, str) and _filing(history, layout, path, image) is None:
                    self._applied.refuse(path, problem)
                else:
                    self._applied.before += isinstance(problem, str)
        if not ready:
            return
        labels = {path: image.label for image, path in images}
        reply = self._refile[layout](ready)
        self._applied.later += reply["later"]
        for one in reply["refiled"]:
            if one["destination"] is None:
                self._applied.refuse(one["path"], one["message"])
            else:
                self._applied.moved[labels[one["path"]]] += 1


@lru_cache
def _dataset_of(folder: str) -> Layout | None:
    """Return the dataset in whose ``Images/`` a folder lies, or which it is."""
    inboxes = (one for one in (Path(folder), *Path(folder).parents) if one.name == Area.IMAGES)
    return next((Layout(one.parent) for one in inboxes if Layout(one.parent).is_dataset), None)


def _request_or_problem(image_and_path: tuple[AssignedImage, str]) -> dict[str, object] | str:
    """Return an image as a request has it, if its file is the one that was decided on; else why not."""
    image, path = image_and_path
    try:
        before = stamp(path)
        if before is None:
            return "the file is gone"
        if sha256_of(path) != image.sha256 or stamp(path) != before:
            return "the file changed since it was decided"
        mode = Mode(image.mode)
    except OSError as error:
        return str(error.strerror)
    except ValueError as error:
        return str(error)
    decision = Assigned(image.label, image.probability, image.margin, None, mode, confidence=image.probability)
    # The classifier is none of the dataset's generations.
    return refile_facts(path, before, decision, content=image.sha256, encoder_id=image.encoder_id, generation=0)


def _filing(history: History, layout: Layout, path: str, image: AssignedImage) -> Record | None:
    """Return the move, unless it was undone, by which the decided content left its path for a class."""
    relative = path.removeprefix(f"{layout.root}/")
    moves = history.moves(Selection(path=relative, outcome=Outcome.FILED, undoable=True))
    own = (one for one in moves if one.move_reason.content == image.sha256 and one.source_path == relative)
    return next(own, None)


# ---------------------------------------------------------------- objects of a store


class _Objects:
    """Moves objects of a store to ``Dataset/`` below a prefix."""

    def __init__(
        self,
        run: Path,
        to: str | None,
        stack: ExitStack,
        pool: ThreadPoolExecutor,
        applied: Applied,
        make_store: Callable[[str], ObjectStore],
        *,
        is_dry: bool,
    ) -> None:
        self._run, self._to, self._stack, self._pool, self._applied = run, to, stack, pool, applied
        self._make_store, self._is_dry = make_store, is_dry
        self._journal: TransferJournal | None = None

    def apply(self, images: Sequence[AssignedImage]) -> None:
        """Move one group."""
        if not images:
            return
        prefix = self._prefix()
        own, _, folder = prefix.partition("://")
        store, wanted = self._make_store(own), list[Transfer]()
        for image in images:
            scheme, _, path = image.uri.partition("://")
            label, name = image.label, path.rpartition("/")[2]
            problem = class_name_problem(label)
            if scheme not in WRITABLE:
                self._applied.refuse(image.uri, f"objects are moved in {' and '.join(WRITABLE)} only")
            elif scheme != own:
                self._applied.refuse(image.uri, f"it is not in the store of {prefix}")
            elif problem is not None or not name:
                self._applied.refuse(image.uri, f"{label!r} cannot be a class: {problem}" if name else "it has no name")
            else:
                destination = f"{folder}/{Area.DATASET}/{label}/{name}"
                wanted.append(Transfer(image.id, APPLY, path, destination, label, image.sha256))
        for start in range(0, len(wanted), AT_ONCE):
            for result in self._results(store, wanted[start : start + AT_ONCE]):
                self._applied.count(own, result)

    def _results(self, store: ObjectStore, wanted: Sequence[Transfer]) -> list[TransferResult]:
        if self._journal is None and (not self._is_dry or (self._run / JOURNAL).is_file()):
            self._journal = self._stack.enter_context(closing(TransferJournal(self._run)))
        if self._is_dry:
            known = wanted if self._journal is None else self._journal.known(wanted)
            return list(self._pool.map(lambda one: dry_run_transfer(store, one), known))
        assert self._journal is not None
        return transfer_all(store, self._journal, wanted, self._pool)

    def _prefix(self) -> str:
        """Return the URL below which ``Dataset/`` is; raise DataError if it is not known."""
        if self._to is not None:
            prefix = self._to.rstrip("/")
        else:
            parent, _, name = str(read_run(self._run)["source"]).rstrip("/").rpartition("/")
            prefix = parent if name == Area.IMAGES else ""
        if local_path(prefix) is not None:
            raise DataError(
                f"the objects of {self._run} do not lie in …/{Area.IMAGES}: name the URL below which their "
                f"{Area.DATASET}/ is to be, with --to"
            )
        return prefix


def undo_run(config: Config, run: Path, *, tell: Tell = lambda *_: None) -> dict[str, Any]:
    """Move the images that ``apply_run`` moved back, and return the outcome as plain values; raises as it."""
    undone, scheme = Applied(), ""
    for group in assigned_images(run, tell=tell, abstained=Counter()):
        by_layout: dict[Layout, list[tuple[str, AssignedImage]]] = {}
        for image in group:
            if (path := local_path(image.uri)) is None:
                scheme = image.uri.partition("://")[0]
            elif (layout := _dataset_of(os.path.dirname(path))) is not None:
                by_layout.setdefault(layout, []).append((path, image))
        for layout, images in by_layout.items():
            own = config.model_copy(update={"root": layout.root.parent})
            with journal_of(own, layout).open() as history:
                found = [_filing(history, layout, path, image) for path, image in images]
            reply = undo_records_of(own, layout, [record.id for record in found if record is not None])
            undone.later += reply["later"]
            for one in reply["undone"]:
                if one["restored"] is None:
                    undone.refuse(one["was"], one["message"])
                else:
                    undone.moved[layout.name] += 1
    if scheme:
        _undo_transfers(run, ObjectStore(store_of(scheme)), scheme, undone)
    return {"run": os.fspath(run), **undone.facts()}


def _undo_transfers(run: Path, store: ObjectStore, scheme: str, undone: Applied) -> None:
    with closing(TransferJournal(run)) as journal, ThreadPoolExecutor(THREADS, "bulk") as pool:
        for begun in journal.applied(done=False):  # a crash may have left copies, which are undone as the others
            for result in transfer_all(store, journal, begun, pool):
                if result.message:
                    undone.refuse(f"{scheme}://{result.transfer.source}", result.message)
        for done in journal.applied(done=True):
            wanted = [Transfer(one.id, UNDO, one.destination, one.source, one.label, one.sha256) for one in done]
            for result in transfer_all(store, journal, wanted, pool):
                undone.count(scheme, result)


def show_applied(config: Config, run: Path, *, to: str | None, dry_run: bool, as_json: bool) -> None:
    """Apply a run and print what became of its images; exit with 65 if an image was not moved."""
    with bar("applying") as tell:
        facts = apply_run(config, run.absolute(), to=to, dry_run=dry_run, tell=tell)
    show(facts, _print_applied, as_json=as_json)
    raise typer.Exit(65 if facts["refused"] and not dry_run else 0)


def show_undone(config: Config, run: Path, *, as_json: bool) -> None:
    """Undo what was applied and print the outcome; exit with 65 if an image was not moved back."""
    with bar("undoing") as tell:
        facts = undo_run(config, run.absolute(), tell=tell)
    show(facts, _print_undone, as_json=as_json)
    raise typer.Exit(65 if facts["refused"] else 0)


def _print_applied(facts: Mapping[str, Any]) -> None:
    rows = [
        *(
            (printable(label), "would be filed" if facts["dry_run"] else "filed", n)
            for label, n in facts["moved"].items()
        ),
        *(("", f"stays: {printable(reason)}", n) for reason, n in facts["abstained"].items()),
        *(("", f"not filed: {printable(reason)}", n) for reason, n in facts["refused"].items()),
    ]
    print_table(("class", "outcome", "images"), rows, right=("images",))
    moved = counted(sum(facts["moved"].values()), "image")
    if facts["before"]:
        say(f"sortd: {counted(facts['before'], 'image')} filed by an earlier call")
    if facts["later"]:
        say(f"sortd: {counted(facts['later'], 'image')} still to be copied to another file system")
    if facts["dry_run"]:
        say(f"sortd: {moved} would be filed; nothing was changed")
    else:
        say(f"sortd: {moved} filed; to take them back: sortd bulk undo {printable(facts['run'])}")


def _print_undone(facts: Mapping[str, Any]) -> None:
    for one in facts["listed"]:
        print_line(f"not undone: {printable(one['uri'])}: {printable(one['message'])}", style="yellow")
    say(f"sortd: {counted(sum(facts['moved'].values()), 'image')} moved back")
    if facts["later"]:
        say(f"sortd: {counted(facts['later'], 'image')} still to be copied back from another file system")
