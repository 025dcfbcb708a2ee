"""The order in which disks are told things: every sync, every refusal to overwrite, in its place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sortd.events import Action
from sortd.store.journal import Journal
from tests.faults.actions import build_action
from tests.faults.injection import Fault, can_trace, run_child
from tests.faults.steps import steps_of
from tests.faults.world import World, build

OBSTACLE = can_trace()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "strace injects")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    """Build the ground for a plot, its journal made beforehand."""

    def made(plot: str, *, copies: bool = False) -> World:
        world = build(tmp_path / "set", tmp_path / "state", plot, copies=copies)
        world.journal().close()
        return world

    return made


def test_rename_is_journaled_before_and_after_and_synced_between(make: Callable[..., World]) -> None:
    """Bytes first, then the intent, the names, the new folder, the old folder, the outcome."""
    world = make("companions")
    assert steps_of(world.act, world.root) == [
        "sync Images/a.jpg",
        "sync Images/a.MOV",
        "sync Images/a.jpg.xmp",
        "journal",
        "rename Images/a.jpg -> Dataset/cat/a.jpg EEXIST",
        "rename Images/a.jpg -> Dataset/cat/a (2).jpg",
        "rename Images/a.MOV -> Dataset/cat/a (2).MOV EEXIST",
        "rename Dataset/cat/a (2).jpg -> Images/a.jpg",
        "rename Images/a.jpg -> Dataset/cat/a (3).jpg",
        "rename Images/a.MOV -> Dataset/cat/a (3).MOV",
        "rename Images/a.jpg.xmp -> Dataset/cat/a (3).jpg.xmp",
        "sync Dataset/cat",
        "sync Images",
        "journal",
    ]


def test_rename_files_beside_an_image_are_complete_before_it_moves(make: Callable[..., World]) -> None:
    """The copy of a shared sidecar and the reason are written and synced under hidden names first."""
    world = make("rejected")
    assert steps_of(world.act, world.root) == [
        "sync Images/a.jpg",
        "sync Images/a.xmp",
        "journal",
        "make Rejected/.sortd-T.1.part",
        "write Rejected/.sortd-T.1.part",
        "sync Rejected/.sortd-T.1.part",
        "make Rejected/.sortd-T.2.part",
        "write Rejected/.sortd-T.2.part",
        "sync Rejected/.sortd-T.2.part",
        "rename Images/a.jpg -> Rejected/a.jpg",
        "rename Rejected/.sortd-T.1.part -> Rejected/a.xmp",
        "rename Rejected/.sortd-T.2.part -> Rejected/a.jpg.reason.json",
        "sync Rejected",
        "sync Images",
        "journal",
    ]


def test_batch_shares_its_commits_and_syncs(make: Callable[..., World]) -> None:
    """Three images cost two commits and one sync of each folder; folders that are new are durable before use."""
    world = make("batch")
    assert steps_of(world.act, world.root) == [
        *("sync Images/a.jpg", "sync Images/b.jpg", "sync Images/c.jpg", "sync Images/c.xmp"),
        "journal",
        *("folder Dataset/cat", "sync Dataset", "rename Images/a.jpg -> Dataset/cat/a.jpg"),
        *("rename Images/b.jpg -> Dataset/dog/b.jpg EEXIST", "rename Images/b.jpg -> Dataset/dog/b (2).jpg"),
        "rename Images/c.jpg -> Review/cat/c.jpg",
        "rename Images/c.xmp -> Review/cat/c.xmp EEXIST",
        "rename Review/cat/c.jpg -> Images/c.jpg",
        "rename Images/c.jpg -> Review/cat/c (2).jpg",
        "rename Images/c.xmp -> Review/cat/c (2).xmp",
        *("sync Dataset/cat", "sync Dataset/dog", "sync Review/cat"),
        "sync Images",
        "journal",
    ]


def test_undo_removes_files_of_sortd_after_the_image_is_back(make: Callable[..., World]) -> None:
    """The same order as a move; our own copies and reasons go last."""
    world = make("undo")
    assert steps_of(world.act, world.root) == [
        "sync Rejected/a.jpg",
        "journal",
        "rename Rejected/a.jpg -> Images/a.jpg",
        "remove Rejected/a.xmp",
        "remove Rejected/a.jpg.reason.json",
        "sync Images",
        "sync Rejected",
        "journal",
    ]


def test_copy_is_durable_before_its_source_is_removed(make: Callable[..., World]) -> None:
    """X1 to X12: nothing of the source is touched before the copy's name is synced and journaled."""
    world = make("plain", copies=True)
    assert steps_of(world.act, world.root) == [
        "sync Images/a.jpg",
        "journal",
        "make Dataset/cat/.sortd-T.0.part",
        "write Dataset/cat/.sortd-T.0.part",
        "sync Dataset/cat/.sortd-T.0.part",
        "journal",
        "rename Dataset/cat/.sortd-T.0.part -> Dataset/cat/a.jpg EEXIST",
        "rename Dataset/cat/.sortd-T.0.part -> Dataset/cat/a (2).jpg",
        "sync Dataset/cat",
        "journal",
        "rename Images/a.jpg -> Images/.sortd-T.0.del",
        "remove Images/.sortd-T.0.del",
        "sync Images",
        "journal",
    ]


def test_journal_new_file_and_its_folder_are_durable(tmp_path: Path) -> None:
    """Their names too: a journal that a power cut takes away would have been written in vain."""
    below = tmp_path / "below"
    below.mkdir()
    steps = steps_of(lambda: Journal(below / "state" / "journal.db"), tmp_path)
    assert steps[-2:] == ["sync below/state", "sync below"]


ACTIONS: dict[tuple[Action, str], list[str]] = {
    # The copy is durable before it gets its name, and the name before the outcome.
    ("copy", "filed"): [
        "sync Images/a.jpg",
        "sync Images/a.MOV",
        "journal",
        "make Dataset/cat/.sortd-T.0.part",
        "write Dataset/cat/.sortd-T.0.part",
        "sync Dataset/cat/.sortd-T.0.part",
        "make Dataset/cat/.sortd-T.1.part",
        "write Dataset/cat/.sortd-T.1.part",
        "sync Dataset/cat/.sortd-T.1.part",
        "journal",
        "rename Dataset/cat/.sortd-T.0.part -> Dataset/cat/a (2).jpg",
        "rename Dataset/cat/.sortd-T.1.part -> Dataset/cat/a (2).MOV",
        "sync Dataset/cat",
        "journal",
        "sync Images",
        "journal",
    ],
    # The names to try are in the journal before each attempt.
    ("hardlink", "filed"): [
        "sync Images/a.jpg",
        "sync Images/a.MOV",
        "journal",
        "link Images/a.jpg -> Dataset/cat/.sortd-T.0.part",
        "link Images/a.MOV -> Dataset/cat/.sortd-T.1.part",
        "journal",
        "rename Dataset/cat/.sortd-T.0.part -> Dataset/cat/a (2).jpg",
        "rename Dataset/cat/.sortd-T.1.part -> Dataset/cat/a (2).MOV",
        "sync Dataset/cat",
        "journal",
    ],
    ("copy", "undone"): [
        "journal",
        "rename Dataset/cat/a (2).jpg -> Dataset/cat/.sortd-T.0.del",
        "remove Dataset/cat/.sortd-T.0.del",
        "rename Dataset/cat/a (2).MOV -> Dataset/cat/.sortd-T.1.del",
        "remove Dataset/cat/.sortd-T.1.del",
        "sync Dataset/cat",
        "journal",
    ],
    # The former bytes are in the journal before the exchange, and the names are durable before the former file goes.
    ("keywords", "existing"): [
        "sync Images/a.jpg",
        "journal",
        "make Images/.sortd-T.1.part",
        "write Images/.sortd-T.1.part",
        "sync Images/.sortd-T.1.part",
        "journal",
        "rename Images/.sortd-T.1.part -> Images/a.jpg.xmp EXCHANGED",
        "sync Images",
        "remove Images/.sortd-T.1.part",
        "sync Images",
        "journal",
    ],
}


@pytest.mark.parametrize(("action", "plot"), ACTIONS, ids=str)
def test_action_takes_its_steps(tmp_path: Path, action: Action, plot: str) -> None:
    """Of images that stay: every sync and every entry in the journal is in its place."""
    world = build_action(tmp_path / "set", tmp_path / "state", plot, action)
    world.journal().close()
    assert steps_of(world.act, world.root) == ACTIONS[action, plot]


RECOVERIES = {
    # Killed after the rename: only the syncs are missing.
    ("plain", False, Fault("fsync", 2)): ["sync Dataset/cat", "sync Images", "journal"],
    # Killed between image and companion: all go back, the old home synced before the new one.
    ("companions", False, Fault("renameat2", 6)): [
        "rename Dataset/cat/a (3).jpg -> Images/a.jpg",
        "sync Images",
        "sync Dataset/cat",
        "journal",
    ],
    # Killed after the image, before what is made beside it: that is made.
    ("rejected", False, Fault("renameat2", 2)): [
        "remove Rejected/.sortd-T.1.part",
        "make Rejected/.sortd-T.1.part",
        "write Rejected/.sortd-T.1.part",
        "sync Rejected/.sortd-T.1.part",
        "rename Rejected/.sortd-T.1.part -> Rejected/a.xmp",
        "remove Rejected/.sortd-T.2.part",
        "make Rejected/.sortd-T.2.part",
        "write Rejected/.sortd-T.2.part",
        "sync Rejected/.sortd-T.2.part",
        "rename Rejected/.sortd-T.2.part -> Rejected/a.jpg.reason.json",
        "sync Rejected",
        "sync Images",
        "journal",
    ],
    # Killed while copying: the part counts for nothing.
    ("plain", True, Fault("fsync", 2)): ["remove Dataset/cat/.sortd-T.0.part", "sync Dataset/cat", "journal"],
    # Killed before the copy was published: it is removed.
    ("plain", True, Fault("renameat2", 2)): ["remove Dataset/cat/.sortd-T.0.part", "sync Dataset/cat", "journal"],
    # Killed after it was published, before that was durable: it goes on from the sync.
    ("plain", True, Fault("fsync", 3)): [
        "sync Dataset/cat",
        "journal",
        "rename Images/a.jpg -> Images/.sortd-T.0.del",
        "remove Images/.sortd-T.0.del",
        "sync Images",
        "journal",
    ],
    # Killed between taking the source's name and removing it: the rest.
    ("plain", True, Fault("unlinkat", 2)): ["remove Images/.sortd-T.0.del", "sync Images", "journal"],
    # Some of several copies published: they are ours, and go.
    ("rejected", True, Fault("renameat2", 2)): [
        "remove Rejected/a.jpg",
        "remove Rejected/.sortd-T.1.part",
        "remove Rejected/.sortd-T.2.part",
        "sync Rejected",
        "journal",
    ],
}


@pytest.mark.parametrize(("plot", "copies", "fault"), RECOVERIES, ids=str)
def test_recovery_takes_only_the_missing_steps(
    make: Callable[..., World], plot: str, copies: object, fault: Fault
) -> None:
    """After a crash at this step the next start takes these steps, and the one after it none."""
    world = make(plot, copies=bool(copies))
    assert run_child(world.act, (fault,)).was_killed
    assert steps_of(world.recover, world.root) == RECOVERIES[plot, bool(copies), fault]
    assert steps_of(world.recover, world.root) == []
