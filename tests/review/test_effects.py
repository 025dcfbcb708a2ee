"""What a page says of the acts of people: how many waiting images were filed because of one, and what can be undone."""

import os
import re
from gettext import NullTranslations
from pathlib import Path
from typing import Any

import pytest

from sortd.config import Config, read_config
from sortd.events import Assigned, Mode, Move, Moved, Outcome
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.mover import Mover
from sortd.review.effects import Act, Effects
from sortd.review.index import Index, dataset_key
from sortd.service import Status, started_ticks
from sortd.store.journal import Journal
from sortd.watch.scan import stamp
from tests.command_line import write_config
from tests.daemon_process import make_dataset, picture, running
from tests.review.world import Client, ReviewProcess

ENGLISH = NullTranslations()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A dataset with four images in Review/red."""
    write_config(tmp_path, settle_seconds=0.1)
    dataset = make_dataset(tmp_path / "Data")
    (dataset / "Review" / "red").mkdir(parents=True)
    for number in range(4):
        picture("blue", 7000 + number, (24, 24)).save(dataset / "Review" / "red" / f"{number}.png")
    return Layout(dataset)


@pytest.fixture
def config(layout: Layout) -> Config:
    """Its configuration."""
    return read_config(layout.root.parents[1] / "config.yaml", {"HOME": "/nonexistent"})


@pytest.fixture
def effects(config: Config) -> Effects:
    """The acts of nobody so far."""
    return Effects(Index(config))


def act(effects: Effects, layout: Layout, kind: str, generation: int, **facts: Any) -> Act:
    """Note an act that moved one image."""
    return effects.add(dataset_key(layout), "me", kind, generation=generation, moved=1, label="blue", **facts)


def file_waiting(config: Config, layout: Layout, number: int, generation: int) -> None:
    """File an image of Review/ by the prototypes of a generation."""
    path = str(layout.root / "Review" / "red" / f"{number}.png")
    mark = stamp(path)
    assert mark is not None
    decision = Assigned("blue", 0.9, 0.25, "green", Mode.MAX)
    move = Move(path, mark, "Dataset/blue", Outcome.FILED, decision, generation=generation, encoder_id="fake-48")
    with Journal(layout.state_folder(config.state_dir) / JOURNAL_FILE) as journal:
        assert all(isinstance(one, Moved) for one in Mover(layout.root, journal).move_all([move]))


def text(effects: Effects, one: Act) -> str:
    """Return what a page says of an act."""
    line = effects.line(one.number, one.session, ENGLISH)
    assert line is not None
    return str(line["text"])


def say_of(config: Config, layout: Layout, **facts: object) -> None:
    """Write the status of a sortd that runs: this process."""
    running = {"running": True, "pid": os.getpid(), "started_ticks": started_ticks(os.getpid())}
    Status(config.state_dir).write({**running, "root": str(config.root), "datasets": {layout.name: facts}})


def test_effects_filed_images_belong_to_the_last_act_before_their_prototypes(
    effects: Effects, config: Config, layout: Layout
) -> None:
    """Each image counts for the acts whose references were new in its prototypes, and for no earlier ones."""
    (layout.state_folder(config.state_dir)).mkdir(parents=True)
    first, second = act(effects, layout, "assigned", 5), act(effects, layout, "example", 5)
    third = act(effects, layout, "corrected", 7)
    for number, generation in enumerate((5, 6, 7, 8)):
        file_waiting(config, layout, number, generation)
    assert [len(effects.consequences(one)) for one in (first, second, third)] == [2, 2, 1]
    assert "Your 1 answer made 2 waiting images sure: they were filed." in text(effects, first)


def test_effects_undone_act_names_what_was_filed_because_of_it(
    effects: Effects, config: Config, layout: Layout
) -> None:
    """They stay filed, and can be taken back from there."""
    (layout.state_folder(config.state_dir)).mkdir(parents=True)
    answer = act(effects, layout, "assigned", 5)
    file_waiting(config, layout, 0, 6)
    undone = act(effects, layout, "undone", 6, undoes=answer.number)
    file_waiting(config, layout, 1, 7)
    line = effects.line(undone.number, undone.session, ENGLISH)
    assert line is not None
    assert (line["text"], line["consequences"]) == (
        "1 image is back. 1 image that sortd filed because of it is still filed.",
        1,
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"rebuilding": True, "problem": None}, "sortd rebuilds its prototypes with them …"),
        ({"rebuilding": False, "problem": None}, "Your 1 answer made no other waiting image sure yet."),
        ({"rebuilding": False, "problem": "the new prototypes are worse"}, "the new prototypes are worse"),
    ],
)
def test_effects_of_an_answer_are_what_the_status_says(
    effects: Effects, config: Config, layout: Layout, facts: dict[str, object], said: str
) -> None:
    """A rebuild that is refused, or changes nothing, is not waited for."""
    answer = act(effects, layout, "assigned", 0)
    assert "sortd does not run" in text(effects, answer)
    say_of(config, layout, **facts)
    assert text(effects, answer).endswith(said)


def test_effects_of_images_of_no_class_need_no_prototypes(effects: Effects, config: Config, layout: Layout) -> None:
    """Without an example there is no new reference, hence nothing to wait for."""
    say_of(config, layout, rebuilding=True, problem=None)
    assert text(effects, act(effects, layout, "none", 0)) == "1 image set apart as none of the classes."
    assert "rebuilds" in text(effects, act(effects, layout, "example", 0))


def test_review_page_undo_of_nothing_says_so(layout: Layout) -> None:
    """An answer is taken back once; the next undo finds nothing."""
    with (
        running(layout.root.parents[1] / "config.yaml"),
        ReviewProcess(layout.root.parents[1] / "config.yaml") as review,
    ):
        client, page = Client(review), f"/d/{dataset_key(layout)}/waiting"
        shown = client.get(page).text
        found = re.search(r'name="image" value="([0-9a-f]+)"', shown)
        assert found is not None
        form = {"token": client.token(page), "dataset": dataset_key(layout), "back": page}
        answered = client.post(page.replace("waiting", "assign"), {**form, "image": found[1], "action": "none"})
        said = [client.get(answered.headers["location"]).text]
        said += [client.get(client.post("/undo", form).headers["location"]).text for _ in range(2)]
    for one, words in zip(said, ("1 image set apart", "1 image is back.", "There is nothing to undo."), strict=True):
        assert words in one
