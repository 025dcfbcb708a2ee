"""What a person does on the pages: each form moves what it showed, and takes back what it names, over a real server."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from sortd.events import Assigned, Mode, Move, Moved, Outcome
from sortd.layout import JOURNAL_FILE, Layout
from sortd.moving.mover import Mover
from sortd.review.index import dataset_key
from sortd.review.rendering import class_key
from sortd.store.history import History
from sortd.store.journal import Journal
from sortd.store.records import Selection
from sortd.watch.scan import stamp
from tests.command_line import sortd, write_config
from tests.daemon_process import PATIENCE_SECONDS, make_dataset, picture, running
from tests.review.world import Client, ReviewProcess, every_file

WAITING = 6


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewProcess]:
    """``sortd review``; each test has a dataset of its own below its root."""
    with ReviewProcess(write_config(tmp_path_factory.mktemp("acts"))) as process:
        yield process


@pytest.fixture
def site(review: ReviewProcess, tmp_path: Path) -> Iterator[Path]:
    """A dataset with images in Review/, the first one with a sidecar; no file is lost, whatever is sent."""
    dataset = make_site(review.config.parent / "Data", tmp_path.name)
    before = contents(dataset)
    yield dataset
    assert contents(dataset) == before


def make_site(root: Path, name: str) -> Path:
    """Make a dataset with images in Review/."""
    dataset = make_dataset(root, name)
    Layout(dataset).make()
    for number in range(WAITING):
        picture("blue", 7000 + number, (24, 24)).save(dataset / "Review" / f"{number}.png")
    (dataset / "Review" / "0.xmp").write_text("<x:xmpmeta/>")
    return dataset


def contents(site: Path) -> list[bytes]:
    """Return the content of each file of a person."""
    return sorted(content for name, content in every_file(site).items() if not name.endswith(".reason.json"))


class Person(Client):
    """Somebody at the page of a dataset, with a session of their own."""

    def __init__(self, review: ReviewProcess, site: Path) -> None:
        """Open the page of what waits."""
        super().__init__(review)
        self.dataset = f"/d/{dataset_key(Layout(site))}/"
        self.form_token = self.token(self.dataset)

    def ids(self) -> dict[str, str]:
        """Return the ids of the images on the page of what waits, by the names of their files."""
        page = self.get(f"{self.dataset}waiting").text
        return {name: one for one, name in re.findall(r'href="/image/([0-9a-f]{32})" data-open><bdi>([^<]+)', page)}

    def send(self, path: str, *fields: tuple[str, str]) -> str:
        """Send a form, and return the address that it leads to."""
        reply = self.post(path, [("token", self.form_token), ("back", f"{self.dataset}runs"), *fields])
        assert reply.status == 303, reply.text
        return str(reply.headers["location"])

    def assign(self, label: str, *names: str) -> str:
        """File images of Review/ into a class, and return the address of its effect."""
        ids = self.ids()
        images = [("image", ids[name]) for name in names]
        return self.send(f"{self.dataset}assign", ("label", label), *images)

    def undo(self, number: str = "") -> str:
        """Take back the act of this number, or the newest, and return the page of the effect."""
        named = [("number", number)] if number else []
        return self.get(self.send("/undo", ("dataset", self.dataset.split("/")[2]), *named)).text


@pytest.fixture
def person(review: ReviewProcess, site: Path) -> Person:
    """Somebody at the page of the dataset."""
    return Person(review, site)


def number_of(address: str) -> str:
    """Return the number of the act in an address."""
    return parse_qs(urlsplit(address).query)["effect"][0]


def filed(site: Path) -> set[str]:
    """Return the images in Dataset/, relative to it."""
    return {os.path.relpath(path, site / "Dataset") for path in (site / "Dataset").rglob("*.png")}


def journal_of(site: Path) -> Path:
    """Return the journal of a dataset."""
    return Layout(site).state_folder(site.parents[1] / "state") / JOURNAL_FILE


def move(site: Path, name: str, folder: str, outcome: Outcome, **facts: Any) -> None:
    """Let sortd move an image of Review/, in a run that is named one."""
    path = os.fspath(site / "Review" / name)
    mark = stamp(path)
    assert mark is not None
    with Journal(journal_of(site), run="one") as journal:
        (answer,) = Mover(Layout(site).root, journal).move_all([Move(path, mark, folder, outcome, **facts)])
    assert isinstance(answer, Moved)


def file_by_itself(site: Path, name: str, **facts: Any) -> None:
    """Let sortd file an image of Review/ into a class."""
    move(site, name, "Dataset/red", Outcome.FILED, decision=Assigned("red", 0.9, 0.25, "green", Mode.MAX), **facts)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for a state."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def effect(page: str) -> str:
    """Return the line of effect of a page."""
    found = re.search(r'data-live="effect">([^<]*)', page)
    assert found is not None
    return found[1]


def test_undo_button_takes_back_the_act_that_it_stands_beside(site: Path, person: Person) -> None:
    """Another act of the same person, in another tab, stands; a second press takes back nothing more."""
    first = person.assign("red", "1.png", "2.png")
    person.assign("green", "3.png")
    shown = person.get(first).text
    button = re.search(r'<button form="undo" name="number" value="([0-9]+)"', shown)
    assert button is not None
    assert button[1] == number_of(first)
    assert effect(person.undo(button[1])).startswith("2 images are back.")
    assert filed(site) == {"green/3.png"}
    assert "was taken back before" in person.undo(button[1])
    assert filed(site) == {"green/3.png"}


def test_undo_and_effect_of_another_person_are_not_reached_by_number(site: Path, review: ReviewProcess) -> None:
    """Numbers of acts are easy to guess, and stand in addresses that people share."""
    one, other = Person(review, site), Person(review, site)
    address = one.assign("red", "1.png")
    assert (
        effect(one.get(address).text)
        == "1 image filed into red. sortd does not run: it will use them when it runs again."
    )
    assert effect(other.get(address).text) == ""
    other.undo(number_of(address))
    reply = other.post("/undo-consequences", {"token": other.form_token, "number": number_of(address), "last": "99"})
    assert reply.status == 404
    assert filed(site) == {"red/1.png"}


def test_undo_by_key_goes_on_after_what_was_taken_back_elsewhere(site: Path, person: Person) -> None:
    """The newest act was undone on the command line: the key tells so once, and then takes back the act before."""
    person.assign("red", "1.png")
    person.assign("green", "2.png")
    sortd("undo", "--last", 1, "--dataset", site.name, "--config", site.parents[1] / "config.yaml")
    assert "Nothing was moved." in person.undo()
    assert effect(person.undo()).startswith("1 image is back.")
    assert filed(site) == set()


def test_act_whose_list_cannot_be_read_again_still_has_its_effect(site: Path, person: Person) -> None:
    """What it moved can be seen and taken back, whatever the page of what waits says."""
    person.assign("red", "1.png")
    page = person.get(f"{person.dataset}class/{class_key('red')}").text
    image = re.search(r'name="image" value="([0-9a-f]{32})"', page)
    assert image is not None
    (site / "Review").rename(site / "aside")
    (site / "Review").write_bytes(b"")
    address = person.send(f"{person.dataset}correct", ("label", "green"), ("image", image[1]))
    (site / "Review").unlink()
    (site / "aside").rename(site / "Review")
    assert effect(person.get(address).text).startswith("1 image filed into green.")
    assert effect(person.undo(number_of(address))).startswith("1 image is back.")
    assert filed(site) == {"red/1.png"}


def test_undo_takes_back_an_act_whose_images_were_copied_to_another_disk(tmp_path: Path) -> None:
    """The answer came before the copy had ended, so it names no move: the act is nevertheless the newest."""
    site = make_site(tmp_path / "Data", "Colours")
    (site / "Dataset").mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(site / "Dataset")]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    config = write_config(tmp_path, settle_seconds=0.1)
    try:
        with running(config), ReviewProcess(config) as process:
            person = Person(process, site)
            address = person.assign("red", "1.png")
            wait_until(lambda: filed(site) == {"red/1.png"} and not (site / "Review" / "1.png").exists())
            page = person.get(address).text
            if "still being copied" in page:  # otherwise the copy was faster than the answer
                assert f'name="number" value="{number_of(address)}"' in page
            wait_until(lambda: "assigned" in sortd("history", "--limit", 1, "--json", "--config", config).out)
            person.undo(number_of(address))
            wait_until(lambda: filed(site) == set() and (site / "Review" / "1.png").exists())
            assert "was taken back before" in person.undo(number_of(address))
    finally:
        subprocess.run(["umount", "--lazy", site / "Dataset"], check=True)


def test_undo_counts_images_and_not_their_companions(site: Path, person: Person) -> None:
    """A sidecar goes back with its image."""
    person.assign("red", "0.png")
    assert (site / "Dataset" / "red" / "0.xmp").is_file()
    assert effect(person.undo()).startswith("1 image is back.")
    assert (site / "Review" / "0.xmp").is_file()


def test_undo_by_key_skips_an_act_that_moved_nothing(site: Path, person: Person) -> None:
    """A name that no class can have: the request failed, and the act before is the newest."""
    person.assign("red", "1.png")
    failed = person.get(person.assign("..", "2.png")).text
    assert "cannot be a class" in failed
    assert 'name="number"' not in failed
    assert effect(person.undo()).startswith("1 image is back.")
    assert filed(site) == set()


def test_class_page_shows_the_file_that_is_there_now(site: Path, person: Person) -> None:
    """Another file has the name of one that sortd filed: its own picture is shown, not the one in the cache."""
    file_by_itself(site, "1.png", content=hashlib.sha256((site / "Review" / "1.png").read_bytes()).hexdigest())

    def shown() -> bytes:
        page = person.get(f"{person.dataset}class/{class_key('red')}").text
        found = re.search(r'name="image" value="([0-9a-f]{32})"', page)
        assert found is not None
        reply = person.get(f"/picture/{found[1]}/160.jpg")
        assert reply.status == 200
        return reply.content

    before = shown()
    (site / "Dataset" / "red" / "1.png").rename(site / "Review" / "1.png")
    (site / "Review" / "2.png").rename(site / "Dataset" / "red" / "1.png")
    assert shown() != before


def test_undo_of_a_run_takes_back_what_the_page_showed(site: Path, person: Person) -> None:
    """A move that came after the page was read stands, whatever its run."""
    file_by_itself(site, "1.png", generation=1000)
    page = person.get(f"{person.dataset}runs").text
    file_by_itself(site, "2.png", generation=1000)
    fields = re.findall(r'name="(run|first|last)" value="([^"]+)"', page)
    assert [name for name, _ in fields] == ["run", "first", "last"]
    assert effect(person.get(person.send(f"{person.dataset}undo-run", *fields)).text).startswith("1 image is back.")
    assert filed(site) == {"red/2.png"}


def test_undo_of_consequences_takes_back_what_the_page_showed(site: Path, person: Person) -> None:
    """An image that sortd filed after the page was read stands."""
    address = person.assign("red", "1.png")
    file_by_itself(site, "2.png", generation=1000)
    page = person.get(address).text
    file_by_itself(site, "3.png", generation=1000)
    found = re.search(r'name="number" value="([0-9]+)"><input type="hidden" name="last" value="([0-9]+)"', page)
    assert found is not None
    assert "Take that image back to Review" in page
    after = person.send("/undo-consequences", ("number", found[1]), ("last", found[2]))
    assert effect(person.get(after).text).startswith("1 image is back.")
    assert filed(site) == {"red/1.png", "red/3.png"}


def test_assign_class_whose_name_begins_like_a_key_is_made(site: Path, person: Person) -> None:
    """Only what has the form of a key is one; a key of no class is refused."""
    person.assign("=abc", "1.png")
    assert filed(site) == {"=abc/1.png"}
    reply = person.post(f"{person.dataset}assign", {"token": person.form_token, "label": "=" + "0" * 12})
    assert reply.status == 400
    assert "does not exist any more" in reply.text


BAD_NAMES = ["", " ", "..", "a/b", "../../x", "\0", "a\nb", ".hidden", "x" * 300, "é" * 200, "\u202efdp", "CON\x7f"]


def test_assign_to_a_name_that_no_class_can_have_moves_nothing(site: Path, person: Person) -> None:
    """The effect says why; no folder is made."""
    before = sorted(os.listdir(site / "Clases"))
    for label in BAD_NAMES:
        page = person.get(person.assign(label, "1.png")).text
        assert effect(page).startswith("Nothing was moved."), label
    assert sorted(os.listdir(site / "Clases")) == before
    assert (site / "Review" / "1.png").is_file()


def test_assign_to_the_name_of_no_class_is_none_of_them(site: Path, person: Person) -> None:
    """As the button does, and not a class of this name."""
    page = person.get(person.assign("_none", "1.png")).text
    assert effect(page).startswith("1 image set apart as none of the classes.")
    assert filed(site) == {"_none/1.png"}
    assert not (site / "Clases" / "_none").exists()


OTHER_PLACES = [
    "//evil.example",
    "/\\evil.example",
    "/\t/evil.example",
    "https://evil.example/",
    "",
    "/\r\nX: y",
    "/\0",
]


def test_form_leads_to_pages_of_this_server_only(person: Person) -> None:
    """Whatever the form says, and without other headers."""
    for back in OTHER_PLACES:
        reply = person.post(f"{person.dataset}assign", {"token": person.form_token, "label": "red", "back": back})
        assert reply.headers["location"].startswith(f"{person.dataset}?effect="), back
        assert "X" not in reply.headers


def test_form_of_a_thousand_images_and_more_is_refused_or_answered(site: Path, person: Person) -> None:
    """None of these images exists; the server goes on."""
    fields = [("token", person.form_token), ("label", "red"), *[("image", f"{n:032x}") for n in range(20_000)]]
    assert person.post(f"{person.dataset}assign", fields).status in {303, 400}
    assert person.get(person.dataset).status == 200
    assert filed(site) == set()


def test_retry_of_a_changed_file_moves_nothing(site: Path, person: Person) -> None:
    """Another file has its name since the page was read."""
    move(site, "1.png", "Rejected", Outcome.REJECTED, reason="unreadable: torn")
    image = re.search(r'name="image" value="([0-9a-f]{32})"', person.get(f"{person.dataset}rejected").text)
    assert image is not None
    (site / "Rejected" / "1.png").rename(site / "Review" / "1.png")
    (site / "Review" / "2.png").rename(site / "Rejected" / "1.png")
    page = person.get(person.send(f"{person.dataset}retry", ("image", image[1]))).text
    assert "Nothing was moved." in page
    assert (site / "Rejected" / "1.png").is_file()
    with History.open(journal_of(site)) as history:
        assert [one.move_reason.outcome for one in history.moves(Selection())] == [Outcome.REJECTED]
