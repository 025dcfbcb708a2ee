"""The pages: what they show of a real library, in both languages and with hostile names, without changing anything."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from sortd.events import Abstained, Mode, Move, Moved, Outcome
from sortd.layout import Layout
from sortd.moving.mover import Mover
from sortd.review.index import dataset_key
from sortd.review.rendering import class_key, percent
from sortd.store.journal import Journal
from sortd.watch.scan import stamp
from tests.daemon_process import make_dataset, picture, tree
from tests.filed_images import file_images
from tests.review.world import Client, ReviewProcess

HOSTILE = (
    b"<img src=x onerror=alert(1)>.png",
    b"a\xe2\x80\xaegnp.exe.png",  # RIGHT-TO-LEFT OVERRIDE
    b"b\xe2\x81\xa6\xe2\x80\x8f.png",  # an isolate and a mark
    b"\xff\xfe not utf-8.png",
    b"line\nbreak\x1b[31m.png",
    b"\"quoted' &amp; {{ 7*7 }}.png",
    b"\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d.png",  # from right to left
    b"n" * 251 + b".png",
)
PAGES = ("", "waiting", "audit", "rejected", "runs", "references")
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Characters that no page may contain as such; a line feed is the page's own."""


def send_to_review(dataset: Path, state: Path, names: dict[bytes, str | None]) -> list[str]:
    """Draw an image of each name, let it be sent to Review/ with its best guess, and return where each stands."""
    layout = Layout(dataset)
    layout.make()
    moves = []
    for index, (name, guess) in enumerate(names.items()):
        path = os.fsdecode(os.path.join(os.fsencode(dataset / "Images"), name))
        with open(path, "wb") as file:
            picture(guess or "red", 900 + index).save(file, "PNG")
        mark = stamp(path)
        assert mark is not None
        decision = Abstained("margin", guess, 0.84, 0.1, "blue", Mode.BEST)
        moves.append(Move(path, mark, f"Review/{decision.review_folder}", Outcome.REVIEW, decision, generation=1))
    with Journal(layout.state_folder(state) / "journal.sqlite", run="second") as journal:
        answers = Mover(dataset, journal).move_all(moves)
    assert all(isinstance(answer, Moved) for answer in answers)
    return [answer.destination for answer in answers if isinstance(answer, Moved)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with filed, waiting and rejected images, and with hostile names, made once; nothing may change it."""
    base = tmp_path_factory.mktemp("library")
    dataset = make_dataset(base / "data")
    (dataset / "Clases" / "<i>odd & class").mkdir()
    file_images(dataset, base / "state", {"one.png": "red", "two.png": "green", "torn.png": "rejected"})
    many = {f"img{number:03}.png".encode(): "green" for number in range(70)}
    send_to_review(dataset, base / "state", {**dict.fromkeys(HOSTILE, "red"), **many})
    (base / "config.yaml").write_text(
        f"root: {base / 'data'}\nstate_dir: {base / 'state'}\ncache_dir: {base / 'cache'}\n"
    )
    return base


@pytest.fixture(scope="module")
def review(folder: Path) -> Iterator[ReviewProcess]:
    """The pages of the library."""
    with ReviewProcess(folder / "config.yaml") as process:
        yield process


@pytest.fixture
def client(review: ReviewProcess) -> Client:
    """A client with a session."""
    return Client(review)


@pytest.fixture(scope="module")
def root(folder: Path) -> str:
    """The address of the dataset."""
    return f"/d/{dataset_key(Layout(folder / 'data' / 'Colours'))}/"


def batch_of(page: str, guess: str) -> str:
    """Return the address of the batch with a best guess from the list of the other batches."""
    found = re.search(rf'href="([^"]+)">(?:(?!</a>).)*<bdi>{guess}</bdi>', page, re.DOTALL)
    assert found is not None
    return found[1].replace("&amp;", "&")


def test_home_with_one_dataset_leads_to_its_page(client: Client, root: str) -> None:
    """There is nothing to choose."""
    reply = client.get("/")
    assert (reply.status, reply.headers["location"]) == (303, root)


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("name", PAGES)
def test_page_answers_in_each_language_without_inline_code_or_style(
    client: Client, root: str, name: str, language: str
) -> None:
    """The content security policy forbids code and style in a page."""
    reply = client.get(root + name, **{"Accept-Language": language})
    assert reply.status == 200
    assert f'<html lang="{language}">' in reply.text
    assert not re.search(r"<[^>]* (?:style|on\w+)=(?=[^>]*>)", re.sub(r'"[^"]*"', '""', reply.text))
    assert re.findall(r"<script(?! src)|<style", reply.text) == []
    assert len(reply.content) < 300_000
    if language == "es":
        assert "Waiting" not in reply.text


def test_waiting_page_shows_guess_score_reason_and_forms(client: Client, root: str) -> None:
    """A person sees what to decide on, and the forms name a class by its key and images by their ids."""
    page = client.get(root + "waiting").text
    assert "84\u00a0%" in page
    assert "the probability of the best class is too low" in page
    assert f'name="label" value="={class_key("green")}" data-key="Enter"' in page
    ids = re.findall(r'name="image" value="([0-9a-f]{32})" checked', page)
    assert len(ids) == len(set(ids)) == 60
    assert '<a class="button" href="' in page
    second = client.get(re.findall(r'href="([^"]+page=2)"', page)[0].replace("&amp;", "&")).text
    assert len(re.findall(r'name="image"', second)) == 10


def test_later_leads_through_all_batches_and_ends(client: Client, root: str) -> None:
    """The state is in the address: what was left for later does not come again until it is asked for."""
    seen, address = [], root + "waiting"
    while 'data-key="s"' in (page := client.get(address).text):
        seen.append(address)
        address = re.findall(r'href="([^"]+)" data-key="s"', page)[0].replace("&amp;", "&")
        assert len(seen) < 5
    assert len(seen) == 2
    assert "That was the last batch" in page


@pytest.mark.parametrize("number", ["0", "-1", "99999999999999999999", "²", "x", "3"])
def test_waiting_page_takes_any_number_of_a_page(client: Client, root: str, number: str) -> None:
    """An address is typed by hand, or old."""
    query = urlencode({"page": number, "list": number, "batch": "none", "after": "none"})
    assert client.get(f"{root}waiting?{query}").status == 200


def test_hostile_names_are_shown_visibly(client: Client, root: str, folder: Path) -> None:
    """Markup is text, what is invisible or turns the direction is escaped, and no page fails by a name."""
    page = client.get(root + "waiting").text
    page = client.get(batch_of(page, "red")).text
    assert len(re.findall(r'name="image"', page)) == len(HOSTILE)
    for name in PAGES:
        page += client.get(root + name).text
    ids = set(re.findall(r'name="image" value="([0-9a-f]{32})"', page))
    for one in ids:
        reply = client.get(f"/image/{one}")
        assert reply.status == 200
        page += reply.text
    assert not UNSEEN.search(page)
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in page
    assert r"a\u202egnp.exe.png" in page
    assert r"\xff\xfe not utf-8.png" in page
    assert r"line\nbreak\x1b[31m.png" in page
    assert "{{ 7*7 }}" in page
    assert "<bdi>שלום.png</bdi>" in page
    assert "&lt;i&gt;odd &amp; class" in page
    assert os.fspath(folder) not in client.get(root).text


def test_image_without_stored_embedding_is_shown_without_a_model(client: Client, root: str) -> None:
    """The process loads no model; the page says what is missing, and still takes an answer."""
    page = client.get(root + "waiting").text
    image = re.findall(r'href="(/image/[0-9a-f]{32})" data-open', page)[0]
    shown = client.get(image).text
    assert "is not embedded yet" in shown
    assert f'action="{root}assign"' in shown


def test_review_process_loads_no_model(client: Client, review: ReviewProcess, root: str) -> None:
    """Memory is for pages, not for torch."""
    for name in PAGES:
        client.get(root + name)
    maps = Path(f"/proc/{review.process.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" not in maps
    assert "onnxruntime" not in maps


@pytest.mark.parametrize(
    "address", ["/nothing", "/d/000000000000/", "/image/0123", "/static/pages.py", "/static/x", "/d/%ff/waiting"]
)
def test_unknown_address_has_a_page_of_its_own(client: Client, address: str) -> None:
    """A person who comes by an old address finds the way back."""
    reply = client.get(address, **{"Accept-Language": "es"})
    assert reply.status == 404
    assert "A los conjuntos" in reply.text


def test_reading_every_page_changes_nothing(client: Client, root: str, folder: Path) -> None:
    """No GET writes anything: not into the dataset, not into the journal, no sample of an audit."""
    before = tree(folder / "data"), tree(folder / "state")
    for name in PAGES:
        client.get(root + name)
    for image in re.findall(r'href="(/image/[0-9a-f]{32})"', client.get(root + "waiting").text)[:3]:
        client.get(image)
    after = tree(folder / "data"), tree(folder / "state")
    assert before == after


def test_rejected_page_says_why(client: Client, root: str) -> None:
    """The reason of the rejection stands beside the name, with a form to try again."""
    page = client.get(root + "rejected").text
    assert "torn.png" in page
    assert "unreadable: torn" in page
    assert f'action="{root}retry"' in page


def test_runs_page_counts_moves_and_offers_undo(client: Client, root: str) -> None:
    """Each run says what it did and can be taken back as a whole."""
    page = client.get(root + "runs").text
    assert "2 filed" in page
    assert "78 sent to Review" in page
    assert 'name="run" value="first"' in page
    assert 'name="run" value="second"' in page


def test_audit_page_draws_by_a_form_only(client: Client, root: str) -> None:
    """The page itself draws no sample."""
    page = client.get(root + "audit").text
    assert f'action="{root}draw"' in page
    assert "2 filed images have not been checked" in page


def test_percent_is_never_rounded_to_certainty() -> None:
    """Only what is certain is 100 %."""
    shown = {share: percent(share).replace("\u00a0", " ") for share in (0.0, 0.001, 0.5, 0.844, 0.999, 1.0)}
    assert shown == {0.0: "0 %", 0.001: "< 1 %", 0.5: "50 %", 0.844: "84 %", 0.999: "> 99 %", 1.0: "100 %"}
