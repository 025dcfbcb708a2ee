"""The index of what there is to look at: ids that are found at once, and what the journal says of images."""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sortd.config import Config, read_config
from sortd.events import Abstained, Mode, Move, Outcome
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.mover import Mover
from sortd.review.index import Background, Index, ShownImage
from sortd.store.journal import Journal
from sortd.watch.scan import stamp
from tests.command_line import write_config
from tests.daemon_process import PATIENCE_SECONDS, DaemonProcess, draw_strangers, make_dataset, picture, teach


def config_in(folder: Path) -> Config:
    """Return the configuration of a dataset with two images in Review/."""
    config = read_config(write_config(folder), {"HOME": "/nonexistent"})
    dataset = make_dataset(config.root)
    (dataset / "Review").mkdir()
    for number in range(2):
        picture("red", number).save(dataset / "Review" / f"{number}.png")
    return config


class StalledIndex(Index):
    """An index whose disk does not respond the second time."""

    def __init__(self, config: Config) -> None:
        """Respond once."""
        super().__init__(config)
        self.is_stalled, self.may_go_on, self.is_waiting = False, threading.Event(), threading.Event()

    def _listed(self, layout: Layout, known: Mapping[str, ShownImage]) -> dict[str, ShownImage]:
        if self.is_stalled:
            self.is_waiting.set()
            assert self.may_go_on.wait(PATIENCE_SECONDS)
        return super()._listed(layout, known)


def test_index_find_does_not_wait_for_a_disk_that_does_not_respond(tmp_path: Path) -> None:
    """It is called by the event loop, which serves all datasets and answers the watchdog."""
    index = StalledIndex(config_in(tmp_path))
    (layout,) = index.datasets()
    image, _ = index.waiting(layout)
    index.is_stalled = True
    listing = threading.Thread(target=index.waiting, args=(layout,), kwargs={"now": True})
    finding = threading.Thread(target=index.find, args=(image.id,))
    listing.start()
    try:
        assert index.is_waiting.wait(PATIENCE_SECONDS)
        finding.start()
        finding.join(10)
        assert not finding.is_alive()
        assert index.find(image.id) == image
    finally:
        index.may_go_on.set()
        listing.join()
        finding.join()
        index.close()


def test_index_image_gets_the_decision_that_is_recorded_after_it_was_seen(tmp_path: Path) -> None:
    """A page may be read between the move of an image to Review/ and its record in the journal."""
    config = config_in(tmp_path)
    index = Index(config)
    (layout,) = index.datasets()
    journal, before = layout.state_folder(config.state_dir) / JOURNAL_FILE, tmp_path / "before"
    with Journal(journal, run="first"):
        pass
    shutil.copy(journal, before)
    picture("green", 9).save(path := os.fspath(layout.root / "Images" / "new.png"))
    mark = stamp(path)
    assert mark is not None
    doubt = Abstained("margin", "green", 0.4, 0.01, "red", Mode.MAX)
    with Journal(journal, run="first") as opened:
        Mover(layout.root, opened).move_all([Move(path, mark, "Review/green", Outcome.REVIEW, doubt, content="0" * 64)])
    journal.rename(tmp_path / "after")
    before.rename(journal)
    (seen,) = [one for one in index.waiting(layout) if one.path.endswith("new.png")]
    assert (seen.guess, seen.content) == (None, "")
    (tmp_path / "after").rename(journal)
    (seen,) = [one for one in index.waiting(layout, now=True) if one.path.endswith("new.png")]
    assert (seen.guess, seen.second, seen.content) == ("green", "red", "0" * 64)


def grouped(index: Index, layout: Layout) -> list[bool]:
    """Return of each batch whether it is a proposed class, once no groups are being computed."""
    index.batches(layout)
    while index.grouping(layout) == "running":
        time.sleep(0.05)
    return [one.is_new for one in index.batches(layout)]


def test_index_groups_are_computed_again_for_the_first_prototypes_and_for_a_new_class(tmp_path: Path) -> None:
    """The page may be read before sortd has any, and a class that a person makes may be that of a proposed group."""
    file = write_config(tmp_path, mode="best", abstain="{precision: 0.95}", settle_seconds=0.1)
    config = read_config(file, {"HOME": "/nonexistent"})
    dataset = make_dataset(config.root)
    teach(dataset)
    draw_strangers(dataset / "Images", 8)
    layout, index = Layout(dataset), Index(config)
    try:
        assert grouped(index, layout) == []
        with DaemonProcess(file, "once") as daemon:
            assert daemon.wait() == 0
        index.waiting(layout, now=True)
        assert any(grouped(index, layout))
        (dataset / "Clases" / "black").mkdir()
        for number in range(4):
            Image.new("RGB", (24, 24), (number, 0, 0)).save(dataset / "Clases" / "black" / f"{number}.png")
        with DaemonProcess(file, "once") as daemon:
            assert daemon.wait() == 0
        assert len(index.waiting(layout, now=True)) > 1
        index.batches(layout)
        assert index._pile(layout).labels == ("black", "blue", "green", "red")
    finally:
        index.close()


def test_background_that_is_killed_while_it_sends_has_no_result() -> None:
    """The kernel may kill it when memory is short; the page then has no groups, and no child remains."""
    work = Background(bytes, 10_000_000)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not work.is_done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    assert work.result() is None
    assert multiprocessing.active_children() == []
