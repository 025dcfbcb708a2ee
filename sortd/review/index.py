"""The index of what there is to look at: the images in Review/ of each dataset, their groups, and images by opaque id.

The id of an image names one version of one file, so that a file that changed has another id. Pages and forms contain
ids only. Everything is read: Review/ by its folder, the decisions from the journal, the embeddings from the cache.
"""

import hashlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from time import monotonic, time_ns
from typing import Any

import numpy as np

from sortd.classify.groups import find_groups
from sortd.commands.explain import stored_rows
from sortd.commands.moves import files_in, journal_of
from sortd.companions import is_image
from sortd.config import Config
from sortd.daemon.references import ReferencesAbsentError, class_labels, stored_prototypes
from sortd.errors import DataError
from sortd.events import NO_CLASS, Stamp
from sortd.files import stamp_of
from sortd.layout import Area, Layout, find_datasets
from sortd.store.history import History

FRESH_SECONDS = 2.0
"""Age from which a listing of Review/ is read again."""
RECORDED_NS = 60 * 10**9
"""Time after a change of a file in which it is looked up in the journal again."""
MOST_KNOWN = 50_000
"""Images outside Review/ whose ids are remembered: those of the last pages."""
PAGE_SIZE = 60
"""Images of one page: what a person can look at before deciding on all of them."""
NEAREST = 3
"""Nearest references that are shown beside an image."""
ID_BYTES = 16


def image_id(path: str, stamp: Stamp) -> str:
    """Return the opaque id of one version of a file, in hexadecimal."""
    facts = f"{stamp.size}\0{stamp.mtime_ns}\0".encode() + os.fsencode(path)
    return hashlib.blake2b(facts, digest_size=ID_BYTES).hexdigest()


def dataset_key(layout: Layout) -> str:
    """Return the name of a dataset in an address, since its own may contain any bytes."""
    return hashlib.blake2b(os.fsencode(layout.root), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class ShownImage:
    """One version of an image that a page shows, with the last decision on it, if the journal has one."""

    id: str
    dataset: str
    path: str
    stamp: Stamp
    content: str = ""  # hexadecimal sha256; "": not known
    guess: str | None = None  # the best class
    second: str | None = None
    score: float | None = None
    margin: float | None = None
    mode: str | None = None
    reason: str = ""  # a key of ``explain.REASONS``
    arrived_at: float | None = None  # seconds since the epoch, when sortd moved it there


@dataclass(frozen=True, slots=True)
class ReviewBatch:
    """Images of Review/ that are shown together: a group, or single images with the same best guess."""

    id: str
    images: tuple[ShownImage, ...]
    guess: str | None  # the class to confirm
    is_group: bool  # whether they resemble each other
    is_new: bool = False  # whether the group is proposed as a new class


@dataclass(slots=True)
class _Pile:
    """What is known of Review/ of one dataset; ``images`` is replaced, never changed."""

    lock: threading.Lock = field(default_factory=threading.Lock)  # of all that waits for a disk or a process
    images: dict[str, ShownImage] = field(default_factory=dict)
    listed_at: float = -np.inf
    groups: tuple[Mapping[str, Any], ...] = ()  # fields of ``ImageGroup``, its members as ids
    grouped: frozenset[str] = frozenset()  # the ids that were there when groups were last computed
    labels: tuple[str, ...] = ()  # the classes then; a new one may be that of a proposed group
    work: "Background | None" = None


class Background:
    """A function that runs in a process of its own, whose memory its end returns: grouping thousands of images."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        """Start it; function and arguments must be picklable."""
        self._receiver, sender = get_context("spawn").Pipe(duplex=False)
        self._process = SpawnProcess(target=_send_result, args=(sender, function, arguments), daemon=True)
        self._process.start()
        sender.close()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` does not wait."""
        return self._receiver.poll()

    def result(self) -> Any:  # noqa: ANN401 - of the function
        """Return what the function returned, and end the process; None if it failed, which it has printed."""
        try:
            found = self._receiver.recv()
        except (EOFError, OSError):  # before it sent, or while it did
            found = None
        self.close()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._receiver.close()


def _send_result(sender: Connection, function: Callable[..., Any], arguments: Sequence[object]) -> None:
    os.nice(10)  # the daemon and the pages come first
    sender.send(function(*arguments))


class Index:
    """The images that the pages show; its methods may be called from several threads.

    ``find`` never waits for a disk: one that does not respond stops neither the event loop nor other datasets.
    """

    def __init__(self, config: Config) -> None:
        """Read nothing yet."""
        self.config = config
        self._lock = threading.Lock()
        self._piles: dict[str, _Pile] = {}
        self._others: OrderedDict[str, ShownImage] = OrderedDict()

    def close(self) -> None:
        """End the processes that compute groups."""
        with self._lock:
            piles = list(self._piles.values())
        for pile in piles:
            if pile.work is not None:
                pile.work.close()

    def datasets(self) -> list[Layout]:
        """Return the datasets that are there, by name; raise LayoutError if the root cannot be listed."""
        return list(find_datasets(self.config.root))

    def dataset(self, key: str) -> Layout:
        """Return the dataset of an address; raise DataError if it is not there."""
        found = next((layout for layout in self.datasets() if dataset_key(layout) == key), None)
        if found is None:
            raise DataError("this dataset is not there; its disk may not be mounted")
        return found

    def labels(self, layout: Layout) -> tuple[str, ...]:
        """Return the classes of a dataset; none if Clases/ is not there."""
        try:
            return class_labels(layout.area(Area.CLASES))
        except ReferencesAbsentError:
            return ()

    def waiting(self, layout: Layout, *, now: bool = False) -> list[ShownImage]:
        """Return the images in Review/, in the order of their paths; ``now`` reads the folder in any case.

        Raises DataError and JournalError.
        """
        pile = self._pile(layout)
        with pile.lock:
            if now or monotonic() - pile.listed_at >= FRESH_SECONDS:
                pile.images = self._listed(layout, pile.images)
                pile.listed_at = monotonic()
            return list(pile.images.values())

    def _pile(self, layout: Layout) -> _Pile:
        with self._lock:
            return self._piles.setdefault(dataset_key(layout), _Pile())

    def _listed(self, layout: Layout, known: Mapping[str, ShownImage]) -> dict[str, ShownImage]:
        files = files_in(layout.area(Area.REVIEW))
        found = {image_id(path, mark): (path, mark) for path, mark in sorted(files)}
        missing = {one: file for one, file in found.items() if one not in known or _may_be_recorded(known[one])}
        fresh: dict[str, ShownImage] = {}
        if missing:
            with journal_of(self.config, layout).open() as history:
                fresh = {one: _from_journal(layout, history, one, *file) for one, file in missing.items()}
        images = {one: fresh[one] if one in fresh else known[one] for one in found}
        return {one: image for one, image in images.items() if image.content or is_image(image.path)}

    def batches(self, layout: Layout) -> list[ReviewBatch]:
        """Return the images in Review/ in batches: proposed classes, groups by size, then single images by their guess.

        Groups are computed in another process; until they are there, and for images that came since, there are only
        batches by best guess. Raises as ``waiting``.
        """
        images = {image.id: image for image in self.waiting(layout)}
        pile = self._pile(layout)
        with pile.lock:
            self._regroup(layout, pile, images)
            groups = pile.groups
        batches, grouped = list[ReviewBatch](), set[str]()
        for group in groups:
            members = tuple(images[one] for one in group["members"] if one in images)
            if len(members) > 1:
                commonest = Counter(image.guess for image in members).most_common(1)[0][0]
                guess = commonest if group["nearest_label"] is None else group["nearest_label"]
                batches.append(ReviewBatch(group["id"], members, guess, is_group=True, is_new=group["is_new"]))
                grouped |= {one.id for one in members}
        single: dict[str | None, list[ShownImage]] = {}
        for image in images.values():
            if image.id not in grouped:
                single.setdefault(image.guess, []).append(image)
        for guess, same in sorted(single.items(), key=lambda one: one[0] or ""):  # the same order while they shrink
            surest_first = sorted(same, key=lambda image: (-(image.score or 0.0), image.path))
            batches.append(ReviewBatch(_batch_id(guess), tuple(surest_first), guess, is_group=False))
        return batches

    def _regroup(self, layout: Layout, pile: _Pile, images: Mapping[str, ShownImage]) -> None:
        """Take the groups that were computed, and begin to compute them if images or classes came since."""
        if pile.work is not None and pile.work.is_done:
            pile.groups, pile.work = pile.work.result() or (), None
        if pile.work is not None or (prototypes := stored_prototypes(self.config, layout)) is None:
            return
        contents = {image.id: image.content for image in images.values() if image.content}
        if pile.labels != prototypes.labels or not pile.grouped.issuperset(contents):
            pile.grouped, pile.labels = frozenset(contents), prototypes.labels
            pile.work = Background(_groups, self.config, layout, contents) if len(contents) > 1 else None

    def grouping(self, layout: Layout) -> str:
        """Return ``running`` while groups are computed, ``done`` until ``batches`` has returned them, else ``""``."""
        pile = self._pile(layout)
        with pile.lock:
            return "" if pile.work is None else "done" if pile.work.is_done else "running"

    def find(self, identifier: str) -> ShownImage | None:
        """Return the image with an id; None: it changed, is gone, or was never shown."""
        with self._lock:
            for pile in self._piles.values():
                if (image := pile.images.get(identifier)) is not None:
                    return image
            return self._others.get(identifier)

    def image_at(self, layout: Layout, path: str, **facts: Any) -> ShownImage | None:  # noqa: ANN401 - of ShownImage
        """Return the image at a path, and remember its id; None if no file is there."""
        try:
            mark = stamp_of(os.lstat(path))
        except (OSError, ValueError):  # no name can contain NUL or every surrogate
            return None
        image = ShownImage(image_id(path, mark), layout.name, path, mark, **facts)
        with self._lock:
            self._others[image.id] = image
            self._others.move_to_end(image.id)
            while len(self._others) > MOST_KNOWN:
                self._others.popitem(last=False)
        return image

    def nearest(self, layout: Layout, images: Sequence[ShownImage]) -> dict[str, list[dict[str, Any]]]:
        """Return the nearest references of images by id: ``image``, ``label`` and ``similarity``, a cosine.

        Images without a stored embedding are missing.
        """
        prototypes = stored_prototypes(self.config, layout)
        if prototypes is None or not len(prototypes.references):
            return {}
        rows = stored_rows(self.config, {one.content for one in images if one.content}, prototypes.encoder_id)
        shown = [one for one in images if one.content in rows]
        if not shown:
            return {}
        cosines = np.stack([rows[one.content] for one in shown]) @ prototypes.references.T
        found: dict[str, list[dict[str, Any]]] = {}
        for image, row in zip(shown, cosines, strict=True):
            best = np.argsort(-row, kind="stable")[:NEAREST].tolist()
            near = [
                {
                    "image": self.image_at(layout, prototypes.sources[at]),
                    "label": prototypes.labels[prototypes.classes[at]],
                    "similarity": float(row[at]),
                }
                for at in best
            ]
            found[image.id] = [one for one in near if one["image"] is not None]
        return found


def _may_be_recorded(image: ShownImage) -> bool:
    """Return whether the journal may get a decision on an image that it did not know: a move is recorded afterwards."""
    return not image.content and time_ns() - image.stamp.ctime_ns < RECORDED_NS


def _from_journal(layout: Layout, history: History, identifier: str, path: str, mark: Stamp) -> ShownImage:
    """Return an image with the decision by which sortd put it where it is."""
    record = history.last_known(mark)
    if record is None or os.path.join(layout.root, record.destination_path) != path:
        return ShownImage(identifier, layout.name, path, mark)
    why = record.move_reason
    facts = (why.content, why.label, why.second_label, why.score, why.margin, why.mode, why.reason, record.ended_at)
    return ShownImage(identifier, layout.name, path, mark, *facts)


def _batch_id(guess: str | None) -> str:
    """Return the id of the single images with a best guess, which may contain any bytes."""
    return "single-" + hashlib.blake2b(os.fsencode(guess or NO_CLASS), digest_size=4).hexdigest()


def _groups(config: Config, layout: Layout, contents: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """Return the groups of images, given as contents by id, with the ids of their members."""
    prototypes = stored_prototypes(config, layout)
    rows = {} if prototypes is None else stored_rows(config, set(contents.values()), prototypes.encoder_id)
    ids = [one for one, content in contents.items() if content in rows]
    if prototypes is None or not ids:
        return ()
    found = find_groups(prototypes, np.array([rows[contents[one]] for one in ids]), [contents[one] for one in ids])
    return tuple({**asdict(group), "members": [ids[at] for at in group.members]} for group in found)
